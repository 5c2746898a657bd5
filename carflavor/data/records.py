"""The HDF5 record file: one self-contained file a split, holding squares of pixels and what is known of each.

    images/box, images/full  (N, S, S, 3) uint8 RGB, one photo a chunk, uncompressed; either may be absent
    labels       (N,) int64, 0-based in the order of class_names
    class_names  (C,) str
    sources      (N,) str, the file each photo came from
    sizes        (N, 2) int32, height and width of the original photo
    boxes        (N, 4) int32, 0-based half-open x1, y1, x2, y2 in the original photo
    settings     () str, JSON: format version, crop margin, interpolation, seed, source digest

The images of a set too big for one file may be virtual datasets of HDF5 over shards beside the record file. A reader
sees no difference, except that it has to be told of shards that it cannot read: HDF5 gives zeros for them.

Datasets, not attributes: an attribute holds no more than 64 kB, too little for thousands of class names.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import resource
import uuid
from pathlib import Path

import h5py
import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
AUGMENTED = "train-augmented"  # the training split with copies, beside it
CROPS = ("box", "full")
_MAX_OPEN_FILES = 65536
_OTHER_OPEN_FILES = 256  # of a process


class RecordWriter:
    """Writes one record file; a context manager.

    The file gets its name when the block ends without an error, and not before: until then the rows go into a hidden
    file beside it, which is removed if the block fails. After a SIGKILL it stays, and the next writer removes it.

    Args:
        path: Path of the file to write. A file that is there already is replaced when the new one is whole.
        crops: Which of `box` and `full` each row brings.
        image_size: Side S of the squares in pixels.
        class_names: Names in the order of the labels.
        settings: What made the file, for JSON.
    """

    def __init__(self, path, crops, image_size, class_names, settings):
        self.path = Path(path)
        self._crops = tuple(crops)
        self._shape = (image_size, image_size, 3)
        self._class_names = list(class_names)
        self._settings = settings
        self._rows = []
        self._whole = None

    def __len__(self):
        return len(self._rows)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_left_overs()
        self._partial = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        self._file = h5py.File(self._partial, "w")
        shapes = {"shape": (0, *self._shape), "maxshape": (None, *self._shape), "chunks": (1, *self._shape)}
        self._images = [self._file.create_dataset(f"images/{crop}", dtype=np.uint8, **shapes) for crop in self._crops]
        return self

    def _remove_left_overs(self):
        for left_over in self.path.parent.glob(f".{self.path.name}.*.partial"):
            # HDF5 holds a lock on a file that it writes, and the kernel drops it with the process: what is locked
            # belongs to somebody who writes the same file at this moment.
            # Other errors: a file system without locks, where nothing can be told and so nothing is removed.
            with contextlib.suppress(OSError), open(left_over, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left_over.unlink()

    def append(self, images, label, source, size, box):
        """Adds one photo. Its images are written at once, the rest is kept until the file is whole.

        Args:
            images: Dict of crop name -> uint8 RGB array of shape `(S, S, 3)`.
            label: 0-based class id.
            source: Name of the file it came from.
            size: `(height, width)` of the original photo.
            box: `(x1, y1, x2, y2)`, 0-based half-open, in the original photo.
        """
        row = len(self._rows)
        for crop, dataset in zip(self._crops, self._images, strict=True):
            image = np.ascontiguousarray(images[crop])
            if image.shape != self._shape or image.dtype != np.uint8:
                raise ValueError(f"Expected uint8 images of shape {self._shape}. Received: {image.dtype} {image.shape}")
            dataset.resize(row + 1, axis=0)
            # Not dataset[row] = image, which takes twice the time: a photo is a chunk, so its bytes can go as they are.
            dataset.id.write_direct_chunk((row, 0, 0, 0), image)
        self._rows.append((label, source, size, box))

    def finish(self):
        """Brings the whole file to the disk. Its name comes at the end of the block.

        Where several files belong together, each is finished before the first of the blocks ends.
        """
        columns = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
        write_columns(self._file, *columns, self._class_names, self._settings)
        self._file.close()
        # HDF5's lock is gone; this one holds until the file has its name.
        self._whole = open(self._partial, "rb")
        with contextlib.suppress(OSError):
            fcntl.flock(self._whole, fcntl.LOCK_EX)
        os.fsync(self._whole.fileno())

    def __exit__(self, error_type, error, traceback):
        try:
            if error_type is None:
                if self._whole is None:
                    self.finish()
                os.replace(self._partial, self.path)
        finally:
            # Both are still there only after an error. On a full disk closing fails too, and would hide it.
            self._partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
            if self._whole is not None:
                self._whole.close()


def write_columns(file, labels, sources, sizes, boxes, class_names, settings):
    """Writes all of a record file but its images.

    Args:
        file: `h5py.File` open for writing.
        labels: Sequence of N int.
        sources: Sequence of N str.
        sizes: Sequence of N pairs, height and width of the original photos.
        boxes: Sequence of N tuples `(x1, y1, x2, y2)` in the original photos.
        class_names: Names in the order of the labels.
        settings: What made the file, for JSON.
    """
    strings = h5py.string_dtype()
    file.create_dataset("labels", data=np.array(labels, np.int64))
    file.create_dataset("class_names", data=list(class_names), dtype=strings)
    file.create_dataset("sources", data=list(sources), dtype=strings)
    file.create_dataset("sizes", data=np.array(sizes, np.int32).reshape(-1, 2))
    file.create_dataset("boxes", data=np.array(boxes, np.int32).reshape(-1, 4))
    settings = json.dumps({"format_version": FORMAT_VERSION, **settings})
    file.create_dataset("settings", data=settings, dtype=strings)


def _allow_open_files(number):
    """Has this process allowed to open as many files as it may: for one that it cannot open HDF5 gives zeros, too."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    allowed = max(limit, _MAX_OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    if allowed < number + _OTHER_OPEN_FILES:
        raise ValueError(
            f"its pixels in {number:,} shards, too many for the {allowed:,} files that a process may open (ulimit -Hn)"
        )


class RecordFile:
    """A record file opened for reading; a context manager.

    Attributes:
        path: Path of the file.
        crops: Names of the crops it holds, of `box` and `full`.
        image_size: Side S of the stored squares in pixels.
        labels: (N,) int64.
        class_names: List of C str.
        sources: List of N str.
        sizes: (N, 2) int32, height and width of the original photos.
        boxes: (N, 4) int32.
        settings: Dict of what made the file.
        shards: Set of the `Path`s of the files that its pixels are in; empty where they are in the file itself.

    Raises:
        ValueError: If the file is no record file or breaks the format; the message names it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._digest = None
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(f"{self.path}: expected a record file as preprocess writes it, got: {error}") from None
        try:
            self._read_header()
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            self._file.close()
            raise ValueError(f"{self.path}: expected a record file as preprocess writes it, got: {error}") from None

    def _read_header(self):
        self.settings = json.loads(self._file["settings"][()])
        if self.settings["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {self.settings['format_version']}, not {FORMAT_VERSION}")
        self.labels = self._file["labels"][()]
        self.class_names = self._file["class_names"].asstr()[()].tolist()
        self.sources = self._file["sources"].asstr()[()].tolist()
        self.sizes = self._file["sizes"][()]
        self.boxes = self._file["boxes"][()]
        self.crops = tuple(crop for crop in CROPS if f"images/{crop}" in self._file)
        if not self.crops:
            raise ValueError("neither images/box nor images/full")
        rows = len(self.labels)
        lengths = {name: len(getattr(self, name)) for name in ("sources", "sizes", "boxes")}
        if set(lengths.values()) != {rows}:
            raise ValueError(f"{rows} labels beside {lengths}")
        for crop in self.crops:
            shape, dtype = self._file[f"images/{crop}"].shape, self._file[f"images/{crop}"].dtype
            if len(shape) != 4 or shape[0] != rows or shape[1] != shape[2] or shape[3] != 3:
                raise ValueError(f"images/{crop} of shape {shape} beside {rows} labels")
            if dtype != np.uint8:
                raise ValueError(f"images/{crop} of {dtype}, not uint8")
            self.image_size = shape[1]
        self._check_shards()
        if rows and not (0 <= self.labels.min() and self.labels.max() < len(self.class_names)):
            raise ValueError(
                f"labels from {self.labels.min()} to {self.labels.max()} for {len(self.class_names)} classes"
            )

    def _check_shards(self):
        virtual = [self._file[f"images/{crop}"] for crop in self.crops if self._file[f"images/{crop}"].is_virtual]
        names = {source.file_name for dataset in virtual for source in dataset.virtual_sources()}
        # HDF5 looks there first, also where the file was opened through a link.
        self.shards = {Path(os.path.realpath(self.path)).parent / name for name in names}
        if missing := sorted(path for path in self.shards if not path.is_file()):
            raise ValueError(
                f"its pixels in {len(names):,} shards, without {missing[0]}; copy and move it together with its shards"
            )
        if names:
            _allow_open_files(len(names))

    def __len__(self):
        return len(self.labels)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def images(self, crop):
        """Returns the h5py dataset (N, S, S, 3) uint8 RGB of a crop, from which slices are read.

        Raises:
            ValueError: If the file was written without that crop.
        """
        if crop not in self.crops:
            raise ValueError(
                f"{self.path}: expected images of crop={crop}, got a file with only {', '.join(self.crops)}; "
                f"run preprocess with crop=both"
            )
        return self._file[f"images/{crop}"]

    def digest(self):
        """Returns the SHA-256 (hex) over the datasets; two files are equal when theirs are.

        The first call reads all pixels, the next ones do not.
        """
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest

    def _compute_digest(self):
        sha256 = hashlib.sha256()
        names = [f"images/{crop}" for crop in self.crops]
        for name in [*names, "labels", "class_names", "sources", "sizes", "boxes", "settings"]:
            dataset = self._file[name]
            sha256.update(f"{name} {dataset.shape}\n".encode())
            if name.startswith("images/"):
                for row in range(len(dataset)):
                    sha256.update(dataset[row].tobytes())
            elif h5py.check_string_dtype(dataset.dtype):
                for text in np.atleast_1d(dataset[()]):
                    sha256.update(text + b"\0")
            else:
                sha256.update(np.ascontiguousarray(dataset[()]).tobytes())
        return sha256.hexdigest()
