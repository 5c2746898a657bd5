"""Keeps two processes from working in one folder, and two works from mixing in it."""

import fcntl
import hashlib
import json
import logging
import os
import shutil

_logger = logging.getLogger(__name__)


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
        file = open(path, "w")  # it stays empty; not to append, which volumes of Databricks refuse
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


def open_work_folder(root, key, what):
    """Returns the folder for what this work has done so far, and removes what there is of other work.

    Args:
        root: `Path` of a folder that is locked.
        key: What the work is, for JSON.
        what: What a warning says has changed where there was other work.
    """
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    for other in root.iterdir():
        if other.is_dir() and other != folder:
            _logger.warning("%s or a setting are not what they were when %s was begun: starting over", what, root)
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return folder
