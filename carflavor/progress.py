"""The bar that every long step shows: photos done, rate, time left."""

import sys

from tqdm import tqdm


def progress_bar(description, photos):
    """Returns a tqdm bar on standard error; a context manager.

    Args:
        description: What is being done, in a word or two.
        photos: Number of photos in all.
    """
    # In a log file every update is a line that stays.
    interval = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(desc=description, total=photos, unit=" photos", mininterval=interval)
