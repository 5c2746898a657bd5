"""What a training needs to go on after it was killed: one folder for each pair of data and settings.

    progress.json      epochs done, MLflow run, curves, and the names of the two files below that belong to it
    state-<n>.npz      every variable of the model and its optimizer after n epochs
    best-<n>.keras     the network of the best epoch so far
    lock               locked by the process that trains

Files are written under new names, then `progress.json` is replaced, then files that it no longer names are deleted: a
process or a machine that dies at any moment leaves a folder from which the next one goes on.
"""

import hashlib
import json
import os
import shutil
import zipfile
import zlib

import numpy as np

from carflavor.data.locations import data_home
from carflavor.locking import lock
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


class Checkpoint:
    """The checkpoint folder of one training; a context manager that keeps other processes out of it.

    Args:
        name: What `digest` returned.
        resume: Whether to go on from what was kept; otherwise it is deleted.

    Attributes:
        folder: `Path` of the folder, under `data_home()`.
        progress: Dict of what was done so far, or None: `epochs` int, `run_id` str, `history` dict of metric name to
            list, `best` dict with `epoch`, `validation_accuracy` and `rank`, or None.

    Raises:
        ValueError: If another process trains with the same data and settings, or what was kept is damaged.
    """

    def __init__(self, name, resume=True):
        self.folder = data_home() / "checkpoints" / name
        self.progress = None
        self._resume = resume
        self._progress_path = self.folder / "progress.json"

    def __enter__(self):
        self._lock = lock(
            self.folder / "lock",
            f"Another process is training with the same data and settings: its checkpoint {self.folder} is in use",
        )
        try:
            if not self._resume:
                self.finish()
            elif self._progress_path.is_file():
                self.progress = json.loads(self._progress_path.read_text())
        except ValueError as error:
            self._lock.close()
            raise self._damaged(self._progress_path, error) from None
        return self

    def __exit__(self, *error):
        if not self._progress_path.is_file():
            # A training that was refused, or that has come to its end.
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _damaged(self, path, error):
        return ValueError(f"{path} is damaged ({error}): delete {self.folder} to begin anew")

    def restore(self, variables):
        """Gives variables the values that they had when `progress` was written.

        Args:
            variables: Keras variables, in the order in which they were saved.

        Raises:
            ValueError: If the file is damaged or belongs to other variables.
        """
        path = self.folder / self.progress["state"]
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as state:
                values = [state[str(index)] for index in range(len(state.files))]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(path, error) from None
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
        np.savez(self.folder / state, **{str(index): variable.numpy() for index, variable in enumerate(variables)})
        _write_to_disk(self.folder / state)
        best_file = self.progress and self.progress["best_file"]
        if network is not None:
            best_file = f"best-{epochs}.keras"
            network.save(self.folder / best_file)
            _write_to_disk(self.folder / best_file)
        self.progress = {**progress, "best": best, "state": state, "best_file": best_file}
        partial = self.folder / "progress.json.partial"
        partial.write_text(json.dumps(self.progress))
        _write_to_disk(partial)
        os.replace(partial, self._progress_path)
        _write_to_disk(self.folder)
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

    def finish(self):
        """Says that nothing is left to go on with: what is not kept anew is deleted when the block ends."""
        self._progress_path.unlink(missing_ok=True)
        self.progress = None


def _write_to_disk(path):
    # A file whose name is on the disk before its content is there is empty after a power cut.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
