"""Photos into rows of pools, in this process or in several."""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass

import cv2

from carflavor import image
from carflavor.data import duplicates
from carflavor.data.layouts import Photo, PhotoReader

# That a process is handed: few, so that it stops soon; enough, so that handing over costs nothing.
_PHOTOS_AT_ONCE = 16
_LEAST_SIDE_TO_HASH = 128  # pixels; the hash is of 32 x 32
_SIDE_WITHOUT_POOL = 256  # pixels: as preprocess stores them by default, so that hashes are the same


@dataclass(frozen=True)
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
        self._store = store
        self._pools = pools
        self._margin = margin
        self._reader = PhotoReader(store)

    def close(self):
        self._reader.close()

    def read(self, tasks):
        """Yields tasks with the bytes of their photos, or the error, in the order that is fastest for the store."""
        by_file = {}
        for task in tasks:
            by_file.setdefault(task.photo.file, []).append(task)
        files = [name for name, (first, *_) in by_file.items() if first.photo.row is None]
        for name, content in self._store.read_many(files):
            for task in by_file[name]:
                yield task, content
        for task in tasks:
            if task.photo.row is not None:
                try:
                    yield task, self._reader.read(task.photo)
                except (ValueError, OSError) as error:
                    yield task, error

    def decode(self, task, data):
        """Writes the squares of a photo; returns what is to be known of it, a dict for JSON."""
        done, pool = {"split": task.split, "row": task.row}, self._pools.get(task.split)
        try:
            if isinstance(data, Exception):
                raise data
            squares = self._decode(pool, task.photo, data, done)
        except (ValueError, OSError) as error:
            return done | {"error": getattr(error, "strerror", None) or str(error)}
        # Outside: what is wrong with the disk is not wrong with the photo.
        if pool:
            pool.write(task.row, squares)
        return done

    def _decode(self, pool, photo, data, done):
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
        done["hash"] = duplicates.hash_photo(seen).tolist()
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
        workers: Processes; 1 for this one.

    Yields:
        Lists of dicts, one a photo, in any order: `split`, `row`, `sha256` (hex, of the file), `format` (`JPEG` and so
        on, or None), `size` (height, width), `hash` (4 uint64 as int), `grey` (bool) and `box` (x1, y1, x2, y2); of one
        that cannot be read `error`, and what was known by then.
    """
    with contextlib.closing(_Decoder(store, pools, margin)) as decoder:
        # A stream is read by this process alone, and its bytes are handed over.
        batches = _batch(decoder.read(tasks) if store.is_stream else tasks, _PHOTOS_AT_ONCE)
        if workers == 1:
            for batch in batches:
                yield _decode_batch(decoder, batch)
        else:
            yield from _decode_in_processes(decoder, batches, workers)


def _batch(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _decode_batch(decoder, batch):
    if isinstance(batch[0], Task):
        batch = decoder.read(batch)
    return [decoder.decode(task, data) for task, data in batch]


def _decode_in_processes(decoder, batches, workers):
    # Not forks of this process, whose libraries may have threads: of one that has none, and the imports behind it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(workers, context, _begin, (decoder,))
    try:
        # They start for two seconds, in which this process decodes itself, as one of them.
        pending = {executor.submit(_decode_here, batch) for batch in itertools.islice(batches, 2 * workers)}
        while not any(future.done() for future in pending) and (batch := next(batches, None)):
            yield _decode_batch(decoder, batch)
        for batch in batches:
            pending.add(executor.submit(_decode_here, batch))
            # A few ahead, so that no process waits for this one, and memory is flat.
            if len(pending) >= 3 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        executor.shutdown(cancel_futures=True)


_here = None


def _begin(decoder):
    global _here
    _here = decoder
    # Ctrl-C is for the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A process a core is threads enough.
    cv2.setNumThreads(1)


def _end_with_parent():
    # Killed, it could tell nobody, and this process would wait for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _decode_here(batch):
    return _decode_batch(_here, batch)
