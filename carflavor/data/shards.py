"""Shards: what one task of Spark makes of some photos, in a file of their squares and of what is known of them.

The photos of a split are always cut into shards at the same rows, so that one run finds those of another. A row of a
shard has the place of its photo; where that was not to be decoded or cannot be read, nothing was written to it.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from dataclasses import dataclass

import h5py

from carflavor.data.decoding import decode_photos
from carflavor.data.pools import create_pool

PARTIAL = ".partial"  # ends the names of those that are not whole


@dataclass(frozen=True)
class Shard:
    """Some photos of a split, one after the other.

    Attributes:
        split: Their split.
        first: Row of the first one in the split.
        rows: Number of rows.
    """

    split: str
    first: int
    rows: int

    @property
    def name(self):
        """Name of its file."""
        return f"{self.split}-{self.first:09d}.h5"


def cut_shards(split, rows, size):
    """Returns the list of a split's shards.

    Args:
        split: Name of the split.
        rows: Number of its photos.
        size: Photos a shard; the last one may have fewer.
    """
    return [Shard(split, first, min(size, rows - first)) for first in range(0, rows, size)]


def write_shard(folder, shard, tasks, store, crops, image_size, margin):
    """Decodes the photos of a shard and writes them. The file gets its name when it is whole and on the disk.

    Args:
        folder: Path of the folder. A shard that is there already is left as it is.
        shard: `Shard`.
        tasks: List of the `carflavor.data.decoding.Task` to do.
        store: `carflavor.data.stores.Store` of the photos.
        crops: Which of `box` and `full` each row has.
        image_size: Side of the squares in pixels.
        margin: Pixels that boxes are widened by on each side.
    """
    path = os.path.join(folder, shard.name)
    if os.path.exists(path):
        return
    here = [dataclasses.replace(task, row=task.row - shard.first) for task in tasks]
    with writing_whole(path) as partial:
        with create_pool(partial, crops, image_size, shard.rows) as pool:
            decoded = decode_photos(here, store, {shard.split: pool}, margin, workers=1)
            entries = [entry | {"row": entry["row"] + shard.first} for entries in decoded for entry in entries]
        with h5py.File(partial, "r+") as file:
            texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
            file.create_dataset("entries", data=texts, dtype=h5py.string_dtype())


@contextlib.contextmanager
def writing_whole(path):
    """Yields the path of a file to write, which gets its name at the end of the block, when it is on the disk.

    Several processes may write one at a time; if the block raises an error, nothing is left.

    Args:
        path: Path of the file.
    """
    # A task that was given up may still write its own.
    partial = f"{path}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        # The disk may be full, or the folder gone; what is to be told is the first error.
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def read_entries(path):
    """Returns the list of what `decode_photos` has said of the photos of a shard."""
    with h5py.File(path, "r") as file:
        return [json.loads(text) for text in file["entries"].asstr()[()]]
