"""Record files whose pixels stay in shards: HDF5 virtual datasets, for sets too big to be gathered in one file."""

import os

import h5py
import numpy as np

from carflavor.data.build import Build
from carflavor.data.pools import order_closed_up
from carflavor.data.shards import cut_shards, read_entries


class ShardedBuild(Build):
    """A `Build` without pools: shards are kept, in a folder beside the record files, which refer to them.

    What is known of photos is read from the shards; the journal holds no more than the key and the stages.
    """

    # A reader opens as many files as a record file has shards.
    shard_size = 2048
    keeps_shards = True

    def __init__(self, folder, key, rows, crops, image_size):
        super().__init__(folder, key | {"sharded": True}, rows, crops, image_size)

    def __enter__(self):
        super().__enter__()
        self._shards = {
            shard.name: shard for split, rows in self.rows.items() for shard in cut_shards(split, rows, self.shard_size)
        }
        for name in self._shards:
            if path := self._find(name):
                self.add(read_entries(path))
        return self

    def _is_usable(self):
        return True

    def _open_pools(self):
        """Leaves `pools` empty."""

    def _find(self, name):
        """Returns the path of a shard, or None. After the first of them were published it is one of two."""
        folders = [self.shards] + ([self._published_shards()] if self._has("publishing", "all") else [])
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def _published_shards(self):
        return self._folder.parent / self.shards.name

    def gather(self, path, entries):
        """Leaves the rows of a shard where they are."""

    def add(self, entries):
        """Takes note of photos that are in their shards, a list of dicts with `split`, `row` and what `done` holds."""
        self.done |= {(entry["split"], entry["row"]): entry for entry in entries}

    def finish(self, files, class_names, settings):
        """Makes record files that refer to the shards; see `Build.finish`."""
        if self._has("publishing", "all"):
            return
        for split, (pool, photos) in files.items():
            if split == pool:
                # As pools are closed up, so that files are equal however they were made.
                order = order_closed_up(np.array([photo["row"] for photo in photos]))
                by_row = {photo["row"]: photo for photo in photos}
                photos = [by_row[row] for row in order.tolist()]
            self._path(split).unlink(missing_ok=True)
            with h5py.File(self._path(split), "w") as file:
                rows = np.array([photo["row"] for photo in photos])
                for crop in self.crops:
                    file.create_virtual_dataset(f"images/{crop}", self._lay_out(pool, rows, f"images/{crop}"))
                self._write_columns(file, photos, class_names, settings)
            with open(self._path(split), "rb") as file:
                os.fsync(file.fileno())

    def _lay_out(self, split, order, dataset):
        """Returns the layout of a virtual dataset: the rows of a split in an order."""
        square = (self.image_size, self.image_size, 3)
        layout = h5py.VirtualLayout((len(order), *square), np.uint8)
        in_place = order == np.arange(len(order))
        for shard in self._shards.values():
            if shard.split != split:
                continue
            # By its path beside the record file, so that both can be moved together.
            source = h5py.VirtualSource(f"{self.shards.name}/{shard.name}", dataset, (shard.rows, *square))
            is_here = order // self.shard_size == shard.first // self.shard_size
            # Rows of a selection ascend, and so do their places: those that fill gaps are a selection of their own.
            for places in (np.flatnonzero(is_here & in_place), np.flatnonzero(is_here & ~in_place)):
                if len(places):
                    layout[places] = source[order[places] - shard.first]
        return layout

    def publish(self, splits):
        """Gives the shards and the finished files their names beside the folder."""
        if not self._has("publishing", "all"):
            self._journal.add([{"stage": "publishing", "split": "all"}])
        self._published_shards().mkdir(exist_ok=True)
        for name in self._shards:
            if (self.shards / name).is_file():
                os.replace(self.shards / name, self._published_shards() / name)
        super().publish(splits)
