"""Photos into rows of pools by a Spark cluster: each task decodes some of them into a shard, which is gathered here.

To the workers go the names of photos, and by way of Spark nothing comes back: shards lie in a folder that all see.
"""

import functools
import hashlib
import os
import pickle
import socket
import zlib

from carflavor.data.failures import UnreachableError
from carflavor.data.shards import PARTIAL, cut_shards, read_entries, write_shard
from carflavor.spark import TaskError, running_tasks, settle_task

_SECONDS_BETWEEN_LOOKS = 0.2


class ShardWriter:
    """What a task of Spark does, once it is pickled and there: `ShardWriter(...)(number)` writes a shard.

    Args:
        folder: Path of the folder for shards.
        shards: List of pairs of `Shard` and the list of its tasks.
        store: `carflavor.data.stores.Store` of the photos.
        form: `crops`, `image_size` and `margin`, as `write_shard` takes them.
    """

    def __init__(self, folder, shards, store, form):
        self._folder = os.fspath(folder)
        # Each task is sent all of it, and opens no more than what it needs.
        self._shards = [zlib.compress(pickle.dumps(shard), 1) for shard in shards]
        self._store = SentStore(store)
        self._form = form

    def __call__(self, number):
        settle_task()
        shard, tasks = pickle.loads(zlib.decompress(self._shards[number]))
        store = self._store.open()
        try:
            write_shard(self._folder, shard, tasks, store, *self._form)
        except UnreachableError as error:
            raise TaskError(str(error)) from error
        except OSError as error:
            raise TaskError(f"worker {socket.gethostname()}: {self._folder}: {error.strerror or error}") from error
        return shard.name


def refuse_copy(store, master, parameter="source"):
    """Refuses an archive at a URL for workers of other machines, which would each copy it once for every process.

    Raises:
        ValueError: As said.
    """
    if master and not master.startswith("local") and store.is_copy:
        raise ValueError(
            f"{parameter}: expected photos that workers of Spark can read where they are, got {store.place}, an "
            f"archive at a URL, which each of them would copy: unpack it there, or copy it to a drive that all see"
        )


class SentStore:
    """A store on its way to a process that opens it once, whatever number of tasks it runs.

    Args:
        store: `carflavor.data.stores.Store`, or what pickles and has its `place` and `stamp`.
        parameter: What the user calls it.
        is_checked: Whether a process looks, before it reads, if its files are what they were where it was sent from: a
            worker of Spark may have come after `check_visible`.
    """

    def __init__(self, store, parameter="source", is_checked=True):
        self._pickled = pickle.dumps(store)
        self._parameter = parameter
        self._is_checked = is_checked
        self._key = hashlib.sha256(self._pickled).hexdigest()
        self._place = store.place
        self._stamp = store.stamp()

    def open(self):
        """Returns the store.

        Raises:
            TaskError: If its files are not here what they are where it was sent from.
        """
        return _open_once(self)

    def find_problem(self):
        """Returns the sentence for files that are not on this machine what they are where it was sent from, or None."""
        try:
            stamp = self.load().stamp()
            problem = None if stamp == self._stamp else "it does not see the same files there"
        except (ValueError, OSError) as error:
            problem = str(error)
        return problem and (
            f"{self._parameter}: expected a place that all workers of Spark see, got {self._place}; "
            f"worker {socket.gethostname()}: {problem}"
        )

    def load(self):
        """Returns the store, anew and unchecked."""
        return pickle.loads(self._pickled)

    def __eq__(self, other):
        return self._key == other._key

    def __hash__(self):
        return hash(self._key)


@functools.lru_cache(1)
def _open_once(sent):
    if sent._is_checked and (problem := sent.find_problem()):
        raise TaskError(problem)
    return sent.load()


def decode_on_spark(spark, tasks, store, build, margin):
    """Does what `carflavor.data.decoding.decode_photos` does on a Spark cluster.

    What is left of an earlier run is gathered first. A shard is removed when the block that was handed its entries asks
    for the next ones, or has ended; or is kept, if the build keeps shards.

    Args:
        spark: Session.
        tasks: List of `carflavor.data.decoding.Task`.
        store: `carflavor.data.stores.Store` of the photos.
        build: `carflavor.data.build.Build` with `shards`.
        margin: Pixels that boxes are widened by on each side.

    Yields:
        Lists of dicts, as `decode_photos` does; what they speak of is in its pool.

    Raises:
        ValueError: If the workers failed, in a sentence.
    """
    split_tasks = {}
    for task in tasks:
        split_tasks.setdefault((task.split, task.row // build.shard_size), []).append(task)
    cuts = [shard for split, rows in build.rows.items() for shard in cut_shards(split, rows, build.shard_size)]
    waiting = {
        shard.name: (shard, split_tasks[key])
        for shard in cuts
        if (key := (shard.split, shard.first // build.shard_size)) in split_tasks
    }
    build.shards.mkdir(exist_ok=True)
    _remove_partials(build.shards)
    yield from _gather(build, waiting)
    if not waiting:
        return
    form = build.crops, build.image_size, margin
    writer = ShardWriter(build.shards, list(waiting.values()), store, form)

    def find_missing():
        return build.shards / min(waiting) if waiting else None

    with running_tasks(spark, writer, len(waiting), _SECONDS_BETWEEN_LOOKS, find_missing) as looks:
        for _ in looks:
            yield from _gather(build, waiting)


def _gather(build, waiting):
    """Yields what is known of the photos of shards that are there, and takes these from those that are waited for."""
    for name in sorted(waiting.keys() & set(os.listdir(build.shards))):
        _, tasks = waiting.pop(name)
        path, is_kept = build.shards / name, False
        # Of an earlier run it may hold more than is to be done.
        rows = {task.row for task in tasks}
        entries = [entry for entry in read_entries(path) if entry["row"] in rows]
        try:
            build.gather(path, entries)
            yield entries
            is_kept = build.keeps_shards
        finally:
            # Also where it was refused: the next run then reads the photos again.
            if not is_kept:
                path.unlink()


def _remove_partials(folder):
    """Removes what tasks have left that were lost."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
