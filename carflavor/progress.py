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
    return tqdm(desc=description, total=photos, initial=done, unit=" photos", mininterval=_find_interval())


def bytes_bar(description, num_bytes):
    """Returns a tqdm bar for what is read or copied, which is not shown in the first second; a context manager.

    Args:
        description: What is being done, in a word or two.
        num_bytes: Number of bytes in all; None if that is not known.
    """
    interval = _find_interval()
    return tqdm(desc=description, total=num_bytes, unit="B", unit_scale=True, mininterval=interval, delay=1.0)


def _find_interval():
    """Returns the seconds between two updates of a bar."""
    # In a log file every update is a line that stays. A notebook, which is no terminal, draws it over the last one.
    is_redrawn = sys.stderr.isatty() or type(sys.stderr).__module__ == "ipykernel.iostream"
    return 1.0 if is_redrawn else 30.0
