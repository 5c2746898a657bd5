"""What a training needs to go on after it was killed: one folder for each pair of data and settings.

    progress.json      epochs done, MLflow run, curves, and the names of the two files below that belong to it
    state-<n>.npz      every variable of the model and its optimizer after n epochs
    best-<n>.keras     the network of the best epoch so far
    lock               locked by the process that trains

Files are written under new names, then `progress.json` is replaced, then files that it no longer names are deleted: a
process that dies at any moment leaves a folder from which the next one goes on.
"""

import fcntl
import hashlib
import json
import os
import shutil

import numpy as np

from carflavor.data.locations import data_home
from carflavor.version import __version__


def digest(settings, files, weights):
    """Returns the hex name of a training: the same for the same beginning, settings, photos and version of carflavor.

    Args:
        settings: Dict of JSON values.
        files: `RecordFile`s that it learns from and is validated on.
        weights: List of arrays, the values of the network that it begins with.
    """
    parts = {"carflavor": __version__, "settings": settings, "data": [file.digest() for file in files]}
    sha256 = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for weight in weights:
        sha256.update(np.ascontiguousarray(weight))
    return sha256.hexdigest()[:16]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(refusal) from None
    return file


class Checkpoint:
    """The checkpoint folder of one training; a context manager that keeps other processes out of it.

    Args:
        name: What `digest` returned.

    Attributes:
        folder: `Path` of the folder, under `data_home()`.
        progress: Dict of what was done so far, or None: `epochs` int, `run_id` str, `history` dict of metric name to
            list, `best` dict with `epoch`, `validation_accuracy` and `rank`, or None.

    Raises:
        ValueError: If another process trains with the same data and settings.
    """

    def __init__(self, name):
        self.folder = data_home() / "checkpoints" / name
        self.progress = None

    def __enter__(self):
        self._lock = lock(
            self.folder / "lock",
            f"Another process is training with the same data and settings: its checkpoint {self.folder} is in use",
        )
        if (self.folder / "progress.json").is_file():
            self.progress = json.loads((self.folder / "progress.json").read_text())
        return self

    def __exit__(self, *error):
        if not (self.folder / "progress.json").is_file():
            # A training that was refused, or that has come to its end.
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def restore(self, variables):
        """Gives variables the values that they had when `progress` was written.

        Args:
            variables: Keras variables, in the order in which they were saved.

        Raises:
            ValueError: If the file is damaged or belongs to other variables.
        """
        path = self.folder / self.progress["state"]
        try:
            with np.load(path, allow_pickle=False) as state:
                values = [state[str(index)] for index in range(len(state.files))]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {self.folder} to begin anew") from None
        shapes = [tuple(variable.shape) for variable in variables]
        if shapes != [value.shape for value in values]:
            raise ValueError(f"{path} does not fit the network: delete {self.folder} to begin anew")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def save(self, variables, network, best, **progress):
        """Keeps the state after an epoch.

        Args:
            variables: Keras variables of model and optimizer.
            network: `keras.Model` to keep as the best so far, or None if the one kept before still is.
            best: Dict about the best epoch, or None.
            **progress: What else `progress` shall hold: `epochs`, `run_id`, `history`.
        """
        epochs = progress["epochs"]
        state = f"state-{epochs}.npz"
        with open(self.folder / state, "wb") as file:
            np.savez(file, **{str(index): variable.numpy() for index, variable in enumerate(variables)})
            file.flush()
            os.fsync(file.fileno())
        best_file = self.progress and self.progress["best_file"]
        if network is not None:
            best_file = f"best-{epochs}.keras"
            network.save(self.folder / best_file)
        self.progress = {**progress, "best": best, "state": state, "best_file": best_file}
        partial = self.folder / "progress.json.partial"
        partial.write_text(json.dumps(self.progress))
        os.replace(partial, self.folder / "progress.json")
        for file in [*self.folder.glob("state-*"), *self.folder.glob("best-*")]:
            if file.name not in (state, best_file):
                file.unlink()

    @property
    def epochs(self):
        """Number of epochs done."""
        return self.progress["epochs"] if self.progress else 0

    @property
    def best_path(self):
        """`Path` of the network that was kept as the best, or None."""
        return self.folder / self.progress["best_file"] if self.progress and self.progress["best_file"] else None

    def forget(self):
        """Begins anew: what was done before is overwritten after the first epoch."""
        self.progress = None

    def remove(self):
        """Deletes the folder: the training has come to its end."""
        shutil.rmtree(self.folder)
