"""The HDF5 record file: one self-contained file a split, holding squares of pixels and what is known of each.

    images/box, images/full  (N, S, S, 3) uint8 RGB, one photo a chunk, uncompressed; either may be absent
    labels       (N,) int64, 0-based in the order of class_names
    class_names  (C,) str
    sources      (N,) str, the file each photo came from
    sizes        (N, 2) int32, height and width of the original photo
    boxes        (N, 4) int32, 0-based half-open x1, y1, x2, y2 in the original photo
    settings     () str, JSON: format version, crop margin, interpolation, seed, source digest

Datasets, not attributes: an attribute holds no more than 64 kB, too little for thousands of class names.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path

import h5py
import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
CROPS = ("box", "full")
_ROWS_BEFORE_WRITE = 64


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
        self._settings = {"format_version": FORMAT_VERSION, **settings}
        self._rows = []

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in self.path.parent.glob(f".{self.path.name}.*.partial"):
            left_over.unlink()
        self._partial = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial"
        self._file = h5py.File(self._partial, "w")
        for crop in self._crops:
            self._create(f"images/{crop}", self._shape, np.uint8, chunks=(1, *self._shape))
        self._create("labels", (), np.int64)
        self._create("sources", (), h5py.string_dtype())
        self._create("sizes", (2,), np.int32)
        self._create("boxes", (4,), np.int32)
        self._file.create_dataset("class_names", data=self._class_names, dtype=h5py.string_dtype())
        self._file.create_dataset("settings", data=json.dumps(self._settings), dtype=h5py.string_dtype())
        return self

    def _create(self, name, shape, dtype, chunks=True):
        self._file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunks)

    def append(self, images, label, source, size, box):
        """Adds one photo.

        Args:
            images: Dict of crop name -> uint8 RGB array of shape `(S, S, 3)`.
            label: 0-based class id.
            source: Name of the file it came from.
            size: `(height, width)` of the original photo.
            box: `(x1, y1, x2, y2)`, 0-based half-open, in the original photo.
        """
        self._rows.append((images, label, source, size, box))
        if len(self._rows) == _ROWS_BEFORE_WRITE:
            self._write_rows()

    def _write_rows(self):
        if not self._rows:
            return
        images, labels, sources, sizes, boxes = zip(*self._rows, strict=True)
        columns = {f"images/{crop}": np.stack([row[crop] for row in images]) for crop in self._crops}
        columns |= {"labels": labels, "sources": list(sources), "sizes": sizes, "boxes": boxes}
        for name, values in columns.items():
            dataset = self._file[name]
            start = len(dataset)
            dataset.resize(start + len(self._rows), axis=0)
            dataset[start:] = values
        self._rows.clear()

    def __exit__(self, error_type, error, traceback):
        try:
            if error_type is None:
                self._write_rows()
                self._file.flush()
        finally:
            self._file.close()
            if error_type is not None:
                self._partial.unlink()
        if error_type is None:
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._partial, self.path)


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

    Raises:
        ValueError: If the file is no record file or breaks the format; the message names it.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(f"{self.path}: expected a record file as preprocess writes it, got: {error}") from None
        try:
            self._read_header()
        except (KeyError, ValueError, TypeError, AttributeError) as error:
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
        for crop in self.crops:
            shape = self._file[f"images/{crop}"].shape
            if len(shape) != 4 or shape[0] != rows or shape[1] != shape[2] or shape[3] != 3:
                raise ValueError(f"images/{crop} of shape {shape} beside {rows} labels")
            self.image_size = shape[1]
        if rows and not (0 <= self.labels.min() and self.labels.max() < len(self.class_names)):
            raise ValueError(
                f"labels from {self.labels.min()} to {self.labels.max()} for {len(self.class_names)} classes"
            )

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
        """Returns the SHA-256 (hex) over the datasets; two files are equal when theirs are."""
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
