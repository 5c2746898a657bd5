"""Record files in the making: whatever ends the process, the next one goes on where it was."""

import hashlib
import json
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

from carflavor.data.journal import Journal
from carflavor.data.pools import Pool, create_pool
from carflavor.data.records import write_columns
from carflavor.locking import lock

_ROWS_IN_MEMORY = 512  # that are not on the disk yet, or twice as many: 100 MB of the default squares
_SHARDS_NAME = re.compile(r"shards-[0-9a-f]{16}")


class Build:
    """A folder with the pools that photos go to and a journal of what is done; a context manager.

    First every photo goes to the row of its pool. When all hashes are known it is decided which row belongs to which
    record file, and the pools become record files. Only then do these get their names.

    Args:
        folder: Hidden folder beside the record files; made where it is missing.
        key: What the files are made of, for JSON. Of other work nothing is kept.
        rows: Dict of split -> number of photos, for `train` and, where there are labels, `test`.
        crops: Which of `box` and `full` each row has.
        image_size: Side of the squares in pixels.

    Attributes:
        rows: As given.
        crops: As given.
        image_size: As given.
        pools: Dict of split -> `Pool`, as long as there are photos to decode.
        done: Dict of (split, row) -> dict of what is known of a photo: `size`, `box`, `hash`; or `error`.
        starts_over: Whether something was kept that is of no use, since the source or a setting changed.

    Raises:
        ValueError: If another process works in the folder.
        OSError: If there is no room for the pools.
    """

    # Photos. Spark takes a tenth of a second a task (4.3, 2 cores); a lost worker takes a second's work or two along.
    shard_size = 1024
    keeps_shards = False

    def __init__(self, folder, key, rows, crops, image_size):
        self._folder = Path(folder)
        self._key = key
        self.rows = rows
        self.crops = crops
        self.image_size = image_size
        self.pools = {}
        self._unsynchronised, self._synchronising = 0, []
        # Shards of other photos or settings, which a worker may still write that nobody waits for, go elsewhere.
        self._shards_name = f"shards-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def __enter__(self):
        self._lock = lock(
            self._folder / "lock", f"Another process writes record files to {self._folder.parent}: {self._folder}"
        )
        try:
            self._journal = Journal(self._folder / "journal", self._key)
            self.starts_over = self._journal.is_other
            if not self._is_usable():
                self._journal.clear()
            self.done = {(e["split"], e["row"]): e for e in self._journal.entries if "row" in e}
            for folder in self._folder.iterdir():
                if _SHARDS_NAME.fullmatch(folder.name) and folder != self.shards:
                    _remove_shards(folder)
            self._open_pools()
        except BaseException:
            self._lock.close()
            raise
        self._synchroniser = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_):
        self._synchroniser.shutdown()
        for pool in self.pools.values():
            pool.close()
        self._journal.close()
        self._lock.close()

    def _has(self, stage, split):
        return {"stage": stage, "split": split} in self._journal.entries

    def _is_usable(self):
        for split in self.rows:
            if self._has("closed", split):
                continue
            # HDF5 was changing the file: what came of it cannot be known.
            if self._has("closing", split) or (self._journal.entries and not self._path(split).is_file()):
                return False
        return True

    def _open_pools(self):
        for split, rows in self.rows.items():
            if not self._has("closed", split):
                self.pools[split] = self._open_pool(split, rows)

    def _open_pool(self, split, rows):
        if self._journal.entries:
            return Pool(self._path(split))
        return create_pool(self._path(split), self.crops, self.image_size, rows)

    def _path(self, split):
        return self._folder / f"{split}.h5"

    @property
    def shards(self):
        """`Path` of the folder for shards, see `carflavor.data.shards`; it need not be there."""
        return self._folder / self._shards_name

    def gather(self, path, entries):
        """Copies rows of a shard to their pool.

        Args:
            path: `Path` of the shard.
            entries: List of what is known of its photos. Those with an `error` have no squares.
        """
        whole = [entry for entry in entries if "error" not in entry]
        with Pool(path, read_only=True) as shard:
            for entry in whole:
                self.pools[entry["split"]].write(entry["row"], shard.read(entry["row"] % self.shard_size))
            shard.synchronise()

    def add(self, entries):
        """Notes photos that are in their pools, a list of dicts with `split`, `row` and what `done` holds."""
        self._journal.add(entries)
        self.done |= {(entry["split"], entry["row"]): entry for entry in entries}
        self._unsynchronised += len(entries)
        if self._unsynchronised >= _ROWS_IN_MEMORY and all(future.done() for future in self._synchronising):
            self._wait_for_disk()
            # Beside the decoding, which would else wait for it at the end.
            self._synchronising = [self._synchroniser.submit(pool.synchronise) for pool in self.pools.values()]
            self._unsynchronised = 0

    def forget_errors(self):
        """Has photos that could not be read be read again, where their pool is still open."""
        self.done = {
            (split, row): entry
            for (split, row), entry in self.done.items()
            if "error" not in entry or split not in self.pools
        }

    def _wait_for_disk(self):
        for future in self._synchronising:
            future.result()  # or the error, which the system tells once

    def finish(self, files, class_names, settings):
        """Makes record files of the pools.

        Args:
            files: Dict of split -> pair of the pool's split and the photos of the file, dicts with `row`, `label`,
                `source`, `size` and `box`, in the order of their rows.
            class_names: Names in the order of the labels.
            settings: What made the files, for JSON.
        """
        self._wait_for_disk()
        for split, (pool, photos) in files.items():
            if split != pool and not self._has("copied", split):
                self._copy(split, self.pools[pool], photos, class_names, settings)
                self._journal.add([{"stage": "copied", "split": split}])
        for split, (pool, photos) in files.items():
            if split == pool and not self._has("closed", split):
                self._close(split, photos, class_names, settings)

    def _copy(self, split, pool, photos, class_names, settings):
        with create_pool(self._path(split), self.crops, self.image_size, len(photos)) as copy:
            for row, photo in enumerate(photos):
                copy.write(row, pool.read(photo["row"]))
                if (row + 1) % _ROWS_IN_MEMORY == 0:
                    copy.synchronise()
            self._complete(copy, photos, class_names, settings)

    def _close(self, split, photos, class_names, settings):
        pool = self.pools[split]
        order = pool.close_up(np.array([photo["row"] for photo in photos]))
        by_row = {photo["row"]: photo for photo in photos}
        self._journal.add([{"stage": "closing", "split": split}])
        self._complete(pool, [by_row[row] for row in order.tolist()], class_names, settings)
        self._journal.add([{"stage": "closed", "split": split}])

    def _complete(self, pool, photos, class_names, settings):
        """Makes a record file of a pool, whose first rows are those of the photos."""
        with h5py.File(pool.path, "r+") as file:
            for crop in pool.crops:
                file[f"images/{crop}"].resize(len(photos), axis=0)
            self._write_columns(file, photos, class_names, settings)
        pool.synchronise()

    def _write_columns(self, file, photos, class_names, settings):
        """Writes all of a record file but its images, of photos as `finish` takes them."""
        columns = ([photo[name] for photo in photos] for name in ("label", "source", "size", "box"))
        write_columns(file, *columns, class_names, settings)

    def publish(self, splits):
        """Gives the finished files their names, `<split>.h5` beside the folder."""
        for split in splits:
            # Those that are not there any more have theirs, from a process that was killed here.
            if self._path(split).is_file():
                os.replace(self._path(split), self._folder.parent / f"{split}.h5")
        for folder in self._folder.parent.iterdir():
            # Of earlier record files, which are replaced now.
            if _SHARDS_NAME.fullmatch(folder.name) and not (self.keeps_shards and folder.name == self.shards.name):
                shutil.rmtree(folder)

    def remove(self):
        """Removes the folder."""
        if self.shards.is_dir():
            _remove_shards(self.shards)
        # A network drive keeps the lock and the journal, which are open, and so the folder.
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_shards(folder):
    # A task that was given up may be about to write its shard: then to nowhere.
    shutil.rmtree(folder.rename(folder.parent / f"removed-{uuid.uuid4().hex}"))
