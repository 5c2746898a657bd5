"""Photos into rows of pools, in this process or in several."""

import contextlib
import hashlib
import itertools
from dataclasses import dataclass

from carflavor import image
from carflavor.data import duplicates
from carflavor.data.layouts import Photo, PhotoReader
from carflavor.data.processes import map_in_processes
from carflavor.limits import count_cores

# That a process is handed: few, so that it stops soon; enough, so that handing over costs nothing.
_PHOTOS_AT_ONCE = 16
_LEAST_SIDE_TO_HASH = 128  # pixels; the hash is of 32 x 32
_SIDE_WITHOUT_POOL = 256  # pixels: as preprocess stores them by default, so that hashes are the same
_PHOTOS_A_PROCESS = 1500  # small ones, which one decodes in the second that another takes to start


@dataclass(frozen=True, slots=True)
class Task:
    """A photo and where its squares go.

    Attributes:
        split: Which pool.
        row: Row in it.
        photo: `carflavor.data.layouts.Photo`.
    """

    split: str
    row: int
    photo: Photo


class _Decoder:
    """What a process needs to work on photos."""

    def __init__(self, store, pools, margin):
        self._pools = pools
        self._margin = margin
        self._reader = PhotoReader(store)

    def close(self):
        self._reader.close()

    def read(self, tasks):
        """Yields tasks with the bytes of their photos, or the error, in the order that is fastest for the store."""
        by_photo = {task.photo: task for task in tasks}
        for photo, data in self._reader.read_many(list(by_photo)):
            yield by_photo[photo], data

    def decode_batch(self, batch):
        """Writes the squares of photos; returns what is to be known of each, a dict for JSON.

        Args:
            batch: List of `Task`, or of pairs as `read` yields them.
        """
        if isinstance(batch[0], Task):
            batch = self.read(batch)
        entries = [self._decode_one(task, data) for task, data in batch]
        # After all of them: between two photos, whose decoding takes the processor's caches, it takes three times as
        # long.
        for entry in entries:
            if "reduced" in entry:
                # A text: four numbers take twice the memory, and all photos of a dataset are known at a time.
                entry["hash"] = duplicates.hash_reduced(entry.pop("reduced")).tobytes().hex()
        return entries

    def _decode_one(self, task, data):
        """Writes the squares of a photo; returns what is to be known of it, with `reduced` for its hash."""
        done, pool = {"split": task.split, "row": task.row}, self._pools.get(task.split)
        try:
            if isinstance(data, Exception):
                raise data
            squares = self._cut_squares(pool, task.photo, data, done)
        except (ValueError, OSError) as error:
            return done | {"error": getattr(error, "strerror", None) or str(error)}
        # Outside: what is wrong with the disk is not wrong with the photo.
        if pool:
            pool.write(task.row, squares)
        return done

    def _cut_squares(self, pool, photo, data, done):
        """Returns the squares of a photo by crop, and fills in what is known of it, as far as it comes."""
        done |= {"sha256": hashlib.sha256(data).hexdigest(), "format": image.find_format(data)}
        encoded = image.EncodedPhoto(data)
        boxes = {"box": (photo.box, self._margin), "full": (None, 0)}
        crops, size = (pool.crops, pool.image_size) if pool else (("full",), _SIDE_WITHOUT_POOL)
        try:
            squares = {crop: encoded.cut_square(size, *boxes[crop]) for crop in crops}
        finally:
            if encoded.size:
                done["size"] = list(encoded.size)
        height, width = encoded.size
        # The square has the coarse waves as the photo has them, and takes a tenth of the time.
        seen = squares["full"] if "full" in squares and size >= _LEAST_SIDE_TO_HASH else encoded.decode()
        done["reduced"] = duplicates.reduce_photo(seen)
        done["grey"] = image.is_grey(seen)
        # Where nobody drew a box, the car is the whole photo.
        done["box"] = list(photo.box or (0, 0, width, height))
        return squares


def decode_photos(tasks, store, pools, margin, workers):
    """Decodes photos, cuts and scales them, and writes the squares.

    Args:
        tasks: List of `Task`.
        store: `carflavor.data.stores.Store` of the photos.
        pools: Dict of split -> `carflavor.data.pools.Pool`. Of a split without one nothing is written, no box cut out.
        margin: Pixels that boxes are widened by on each side.
        workers: Processes; 1 for this one, 0 for one a core where there are photos enough for them.

    Yields:
        Lists of dicts, one a photo, in any order: `split`, `row`, `sha256` (hex, of the file), `format` (`JPEG` and so
        on, or None), `size` (height, width), `hash` (hex of 4 uint64), `grey` (bool) and `box` (x1, y1, x2, y2); of one
        that cannot be read `error`, and what was known by then.
    """
    workers = workers or min(count_cores(), 1 + len(tasks) // _PHOTOS_A_PROCESS)
    with contextlib.closing(_Decoder(store, pools, margin)) as decoder:
        # A stream is read by this process alone, and its bytes are handed over.
        batches = _batch(decoder.read(tasks) if store.is_stream else tasks, _PHOTOS_AT_ONCE)
        yield from map_in_processes(decoder.decode_batch, batches, workers)


def _batch(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
