"""Keeps two processes from working in one folder."""

import fcntl
import os


def lock(path, refusal):
    """Locks a file against other processes until it is closed or this process ends.

    Args:
        path: `Path` of the file; it and its folder are made where they are missing.
        refusal: What to say where another process holds the lock.

    Returns:
        The open file.

    Raises:
        ValueError: If another process holds the lock.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have deleted it since it was opened: then it locks nothing.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            raise ValueError(refusal) from None
        except FileNotFoundError:
            pass
        file.close()
