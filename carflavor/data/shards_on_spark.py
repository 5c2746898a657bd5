"""Shards by a Spark cluster, each by a task. Numbers of them go to the workers, and nothing but numbers comes back."""

from functools import partial

from carflavor.data.failures import UnreachableError
from carflavor.spark import TaskError, running_tasks, settle_task

_SECONDS_BETWEEN_LOOKS = 1


def write_shards_on_spark(spark, work, numbers, on_shards):
    """Writes shards, each in a task of its own, and waits for all.

    Args:
        spark: Session, whose workers see what `work` names.
        work: What pickles and has `write_shard(number)` and `find_shard(number)`, the `Path` that is there when the
            shard is whole: `carflavor.data.copies.Copying` or `carflavor.partitions.Scoring`.
        numbers: List of the numbers of shards, at least one.
        on_shards: Function that is called about once a second with the set of those that were written since. What it
            raises ends the work.

    Raises:
        ValueError: If a task failed as often as Spark tries again, or what it wrote is not seen here.
    """
    waiting = set(numbers)

    def find_missing():
        return work.find_shard(min(waiting)) if waiting else None

    write = partial(_write_shard, work, numbers)
    with running_tasks(spark, write, len(numbers), _SECONDS_BETWEEN_LOOKS, find_missing) as looks:
        for _ in looks:
            written = {number for number in waiting if work.find_shard(number).is_file()}
            waiting -= written
            on_shards(written)


def _write_shard(work, numbers, place):
    settle_task()
    try:
        work.write_shard(numbers[place])
    except UnreachableError as error:
        raise TaskError(str(error)) from error
    return str(numbers[place])
