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
