"""Shards of copies by a Spark cluster. Numbers of shards go to the workers, and nothing but their names comes back."""

import contextlib
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import cv2

from carflavor.spark import cancel_job, run_tasks

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
    waiting, tag = set(numbers), f"carflavor-{uuid.uuid4().hex}"

    def look():
        written = {number for number in waiting if copying.find_shard(number).is_file()}
        waiting.difference_update(written)
        on_shards(written)

    # In another thread: it waits for the last task, while this one tells of each, and can be interrupted.
    with ThreadPoolExecutor(1) as executor:
        job = executor.submit(run_tasks, spark, partial(_write_shard, copying, numbers), len(numbers), tag)
        try:
            while not wait([job], _SECONDS_BETWEEN_LOOKS).done:
                look()
            job.result()
            look()
        finally:
            if not job.done():
                with contextlib.suppress(Exception):
                    spark.sparkContext.setLogLevel("OFF")  # each task would complain
                cancel_job(spark, tag, job)


def _write_shard(copying, numbers, place):
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches a local cluster, too, and is for the process that waits for it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)  # one a core is threads enough
    copying.write_shard(numbers[place])
    return str(numbers[place])
