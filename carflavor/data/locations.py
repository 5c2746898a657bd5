"""Where things are: turns what a user types for a place into a local path."""

import atexit
import functools
import hashlib
import importlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from carflavor.data.urls import is_url, shown

_MLFLOW_SCHEMES = ("runs:", "models:", "mlflow-artifacts:")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+:", re.IGNORECASE)


def data_home():
    """Returns the folder for what outlives a clone of the project: `CARFLAVOR_HOME`, or `~/.carflavor`."""
    return Path(os.environ.get("CARFLAVOR_HOME") or Path.home() / ".carflavor").absolute()


def is_artifact(place):
    """Whether a place is an artifact of MLflow, as `runs:/...` and `models:/...` are."""
    return place.startswith(_MLFLOW_SCHEMES)


def resolve_input(place, parameter, names=None):
    """Finds what a user names as input.

    Args:
        place: A local path, `file:` URL, an artifact of MLflow as `runs:/<run id>/<path>` or
            `models:/<name>/<version>`, or a URL that fsspec knows, such as `abfss://...`. What is not here is copied to
            a temporary folder, which goes with the process; from a URL no more than once.
        parameter: What the user calls it, for the error's first word.
        names: Names of the files that are needed, if what is at a URL is a folder; all if None.

    Returns:
        Absolute `Path` of an existing file or folder.

    Raises:
        ValueError: If nothing is there; for a relative path with the absolute form to type.
    """
    if not place:
        raise ValueError(f"{parameter}: expected a path or URI, got an empty text")
    if is_artifact(place):
        # Not at the top of the file: it takes more than a second, and each process that decodes photos comes by here.
        import mlflow

        try:
            folder = tempfile.mkdtemp(dir=_temporary_folder())
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=folder)).absolute()
        except (mlflow.MlflowException, OSError) as error:
            # The first line: what follows in some of MLflow's messages is advice on settings.
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{parameter}: nothing could be read from {place}: {reason}") from None
    if is_url(place):
        try:
            # Here, because fsspec is not among what a served model requires.
            remote = importlib.import_module("carflavor.data.remote")
            return copy_here(remote.RemotePlace(place), names)
        except ModuleNotFoundError as error:
            missing = f"{error.name}, which reads URLs, is not installed: pip install {error.name}"
            raise ValueError(f"{parameter}: {shown(place)}: {missing}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{parameter}: {error}") from None
    path = _local_path(place, parameter, "a local path, runs:/... or models:/...")
    if path.exists():
        return path.absolute()
    if path.is_absolute():
        raise ValueError(f"{parameter}: {path} does not exist")
    # `mlflow run` starts a step in the project's folder, or in a temporary clone of it, not where the user stands.
    raise ValueError(
        f"{parameter}: the relative path {place} does not exist in {Path.cwd()}, where the step runs; "
        f'type it in full, for instance {parameter}="$PWD/{place}"'
    )


def resolve_model(place, parameter="model"):
    """Turns what a user names as model into the URI that MLflow loads and registers it by.

    Args:
        place: `runs:/...`, `models:/...`, or a model directory.
        parameter: What the user calls it, for the error's first word.

    Returns:
        The URI as it is, or the absolute path of the directory as str.

    Raises:
        ValueError: If a directory is named that is not there.
    """
    return place if is_artifact(place) else str(resolve_input(place, parameter))


def resolve_output(place, parameter):
    """Turns what a user names as output folder into an absolute `Path`; it need not exist.

    Raises:
        ValueError: If the place is a file, is not on this machine, or is relative to a clone that MLflow will delete.
    """
    path = _local_path(place, parameter, "a local path")
    if not path.is_absolute() and _in_temporary_clone():
        raise ValueError(
            f"{parameter}: the relative path {place} would be lost with the temporary clone that the project runs "
            f'in; type it in full, for instance {parameter}="$PWD/{place}"'
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"{parameter}: expected a folder, got the file {path}")
    return path.absolute()


def copy_here(remote, names=None):
    """Copies what is at a URL to a temporary folder, which goes with the process, unless it is there already.

    Args:
        remote: `carflavor.data.remote.RemotePlace`.
        names: Names of the files of a folder to copy; all if None.

    Returns:
        Absolute `Path` of the file or folder; it has the name that it has at the URL.

    Raises:
        OSError: If something is not there or cannot be copied.
    """
    target = Path(_temporary_folder()) / hashlib.sha256(remote.url.encode()).hexdigest()[:16] / remote.name
    remote.copy(target, names)
    return target


def local_path(place):
    """Returns the `Path` that a path or `file:` URL names."""
    return Path(url2pathname(urlsplit(place).path)) if place.startswith("file:") else Path(place).expanduser()


@functools.cache
def _temporary_folder():
    # MLflow would leave what it downloads, and what it copies from a local store, for good.
    folder = tempfile.mkdtemp(prefix="carflavor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _local_path(place, parameter, expected):
    # More than one letter before the colon: C:\photos is a path.
    if _SCHEME.match(place) and not place.startswith("file:"):
        raise ValueError(f"{parameter}: expected {expected}, got {shown(place)}")
    return local_path(place)


def _in_temporary_clone():
    # `mlflow run <git url>` clones into tempfile.mkdtemp() and leaves no other sign: its tags are those of a local
    # clone that has a remote.
    folder = Path.cwd()
    # resolve(): where the temporary folder is a link, as on macOS, the current folder is not written through it.
    in_temporary_folder = folder.parent == Path(tempfile.gettempdir()).resolve()
    return in_temporary_folder and re.fullmatch(r"tmp[a-z0-9_]{8}", folder.name) is not None
