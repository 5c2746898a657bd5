"""The bar that every long step shows: photos done, rate, time left."""

import sys

from tqdm import tqdm


def progress_bar(description, photos, done=0):
    """Returns a tqdm bar on standard error; a context manager.

    Args:
        description: What is being done, in a word or two.
        photos: Number of photos in all.
        done: Number of photos that were done before.
    """
    # In a log file every update is a line that stays.
    interval = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(desc=description, total=photos, initial=done, unit=" photos", mininterval=interval)


def bytes_bar(description, num_bytes):
    """Returns a tqdm bar for what is read or copied, which is not shown in the first second; a context manager.

    Args:
        description: What is being done, in a word or two.
        num_bytes: Number of bytes in all; None if that is not known.
    """
    interval = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(desc=description, total=num_bytes, unit="B", unit_scale=True, mininterval=interval, delay=1.0)
