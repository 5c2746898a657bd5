"""Squares of photos on the disk before it is known which record file each belongs to.

A pool is a record file in the making. HDF5 gives every row its place when the file is made, and the file is closed;
rows are then written past HDF5 to these places, in any order, by any number of processes. So it is a whole file at
every moment, and a process that is killed takes at most the rows that it was writing.
"""

import os
from pathlib import Path

import h5py
import numpy as np

from carflavor.data.records import CROPS


class Pool:
    """N rows of squares in an HDF5 file.

    Args:
        path: Path of a file that `create_pool` has made.
        read_only: Whether nothing is going to be written; the file may then be somebody else's.

    Attributes:
        path: As given.
        crops: Names of the crops that each row has, of `box` and `full`.
        image_size: Side S of the squares in pixels.

    Pickles as its path and the rows' places: processes that it is sent to write to the same file.

    Raises:
        OSError: If there is no such file or HDF5 cannot read it.
    """

    def __init__(self, path, read_only=False):
        self.path = Path(path)
        self._flags = os.O_RDONLY if read_only else os.O_RDWR
        with h5py.File(self.path, "r") as file:
            self.crops = tuple(crop for crop in CROPS if f"images/{crop}" in file)
            datasets = [file[f"images/{crop}"] for crop in self.crops]
            self.image_size = datasets[0].shape[1]
            self._offsets = np.stack([_find_offsets(dataset) for dataset in datasets])
        self._descriptor = None

    def __len__(self):
        return self._offsets.shape[1]

    def __getstate__(self):
        return {**self.__dict__, "_descriptor": None}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the file; it is opened again where it is needed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, row, images):
        """Writes a row.

        Args:
            row: From 0.
            images: Dict of crop name -> uint8 RGB array of shape `(S, S, 3)`.
        """
        shape = (self.image_size, self.image_size, 3)
        for crop, offset in zip(self.crops, self._offsets[:, row], strict=True):
            image = np.ascontiguousarray(images[crop])
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"Expected uint8 images of shape {shape}. Received: {image.dtype} {image.shape}")
            self._write_at(offset, image)

    def read(self, row):
        """Returns a row as `write` takes it."""
        shape = (self.image_size, self.image_size, 3)
        return {
            crop: np.frombuffer(self._read_at(offset), np.uint8).reshape(shape)
            for crop, offset in zip(self.crops, self._offsets[:, row], strict=True)
        }

    def close_up(self, rows):
        """Moves some rows to the front and forgets the others.

        Of the front itself all that is kept stays where it is; the gaps are filled with what is kept behind it. It can
        be done again after it was interrupted.

        Args:
            rows: Int array of the rows to keep, ascending.

        Returns:
            Int array (len(rows),): which row now lies at each place.
        """
        order = order_closed_up(rows)
        for gap in np.flatnonzero(order != np.arange(len(order))):
            for offsets in self._offsets:
                self._write_at(offsets[gap], self._read_at(offsets[order[gap]]))
        return order

    def synchronise(self):
        """Brings all rows to the disk, out of memory.

        Nobody reads them soon, and the gigabytes of a large set would push everything else out of it. It pays, too:
        rows that take the memory of those before them are written in a tenth of the time on a machine that has to be
        given memory first, as virtual ones are.
        """
        descriptor = self._open()
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _open(self):
        if self._descriptor is None:
            self._descriptor = os.open(self.path, self._flags)
        return self._descriptor

    def _write_at(self, offset, data):
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._open(), view, int(offset))
            view, offset = view[written:], offset + written

    def _read_at(self, offset):
        return os.pread(self._open(), self.image_size * self.image_size * 3, int(offset))


def order_closed_up(rows):
    """Returns the order of rows in a record file: those of the front where they are, gaps filled with those behind it.

    Args:
        rows: Int array of the rows to keep, ascending.

    Returns:
        Int array (len(rows),): which row lies at each place.
    """
    order = np.arange(len(rows))
    order[np.setdiff1d(order, rows, assume_unique=True)] = rows[rows >= len(rows)]
    return order


def create_pool(path, crops, image_size, rows):
    """Makes the file of a pool, with room for all rows on the disk.

    Args:
        path: Path of the file; one that is there is replaced.
        crops: Which of `box` and `full` each row has.
        image_size: Side S of the squares in pixels.
        rows: Number of rows, at least 1.

    Returns:
        `Pool`.

    Raises:
        OSError: If there is not enough room.
    """
    shape = (image_size, image_size, 3)
    # Not written over: a process that is about to end may still write to it.
    Path(path).unlink(missing_ok=True)
    with h5py.File(path, "w") as file:
        images = file.create_group("images")
        for crop in crops:
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((1, *shape))
            # Places are given now, and nothing is written to them.
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((rows, *shape), (h5py.h5s.UNLIMITED, *shape))
            h5py.h5d.create(images.id, crop.encode(), h5py.h5t.STD_U8LE, space, properties)
    with open(path, "rb+") as file:
        # A file with holes would find out that the disk is full in the middle of the work.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return Pool(path)


def _find_offsets(dataset):
    """Returns int64 (N,): where in the file the chunk of each row begins."""
    offsets = np.zeros(len(dataset), np.int64)

    def note(chunk):
        offsets[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return offsets
