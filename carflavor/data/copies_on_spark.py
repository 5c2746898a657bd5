"""Shards of copies by a Spark cluster. Numbers of shards go to the workers, and nothing but their names comes back."""

from concurrent.futures import wait
from functools import partial

from carflavor.spark import running_tasks, settle_task

_SECONDS_BETWEEN_LOOKS = 1


def write_shards_on_spark(spark, copying, numbers, on_shards):
    """Writes shards, each in a task of its own, and waits for all.

    Args:
        spark: Session, whose workers see what `copying` names.
        copying: `carflavor.data.copies.Copying`.
        numbers: List of the numbers of shards, at least one.
        on_shards: Function that is called about once a second with the set of those that were written since.

    Raises:
        ValueError: If a task failed as often as Spark tries again.
    """
    waiting = set(numbers)

    def look():
        written = {number for number in waiting if copying.find_shard(number).is_file()}
        waiting.difference_update(written)
        on_shards(written)

    with running_tasks(spark, partial(_write_shard, copying, numbers), len(numbers)) as job:
        while not wait([job], _SECONDS_BETWEEN_LOOKS).done:
            look()
        job.result()
        look()


def _write_shard(copying, numbers, place):
    settle_task()
    copying.write_shard(numbers[place])
    return str(numbers[place])
