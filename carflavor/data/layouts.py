"""The dataset layouts people have, read into one form: lists of photos with label and box."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

LAYOUTS = ("auto", "devkit")
_BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


@dataclass(frozen=True)
class Photo:
    """One labelled photo of a dataset.

    Attributes:
        path: Path of the file.
        name: The path inside the dataset, with forward slashes.
        label: 0-based class id.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels, as Python ints.
    """

    path: Path
    name: str
    label: int
    box: tuple


@dataclass(frozen=True)
class Dataset:
    """What a layout holds.

    Attributes:
        class_names: Names in the order of the labels.
        train: List of `Photo`.
        test: List of `Photo`, or None where the layout brings no labels for its test photos.
        digest: SHA-256 (hex) over names, labels and boxes, to tell one source from another.
    """

    class_names: list
    train: list
    test: list | None
    digest: str


def read_dataset(source, layout="auto"):
    """Reads the class names, labels and boxes of a folder of photos.

    Args:
        source: Folder.
        layout: `auto` or one of `LAYOUTS`.

    Returns:
        `Dataset`.

    Raises:
        ValueError: If the folder has no such layout, or what it says is contradictory.
    """
    source = Path(source)
    if layout not in LAYOUTS:
        raise ValueError(f"Expected layout to be one of {', '.join(LAYOUTS)}. Received: layout={layout!r}")
    if not source.is_dir():
        raise ValueError(f"{source}: expected a folder, got {'a file' if source.exists() else 'nothing'}")
    if not (source / "devkit" / "cars_meta.mat").is_file():
        raise ValueError(
            f"{source}: expected the Stanford devkit layout (devkit/cars_meta.mat, devkit/cars_train_annos.mat, "
            f"cars_train/*.jpg), got {_listing(source)}"
        )
    return _read_devkit(source)


def _read_devkit(source):
    devkit = source / "devkit"
    # np.atleast_1d throughout: scipy squeezes a list of one to a scalar.
    names = np.atleast_1d(_load_variable(devkit / "cars_meta.mat", "class_names"))
    class_names = [str(name).strip() for name in names]
    if twice := [name for name in class_names if class_names.count(name) > 1]:
        raise ValueError(f"{devkit / 'cars_meta.mat'}: expected different class names, got {twice[0]!r} more than once")
    train = _read_annotations(devkit / "cars_train_annos.mat", source, "cars_train", len(class_names))
    labelled_test = devkit / "cars_test_annos_withlabels.mat"
    # cars_test_annos.mat names the same photos without a class: nothing can be measured on them.
    test = None
    if labelled_test.is_file():
        test = _read_annotations(labelled_test, source, "cars_test", len(class_names))
    sha256 = hashlib.sha256(repr(class_names).encode())
    for photo in [*train, *(test or [])]:
        sha256.update(f"{photo.name} {photo.label} {photo.box}\n".encode())
    return Dataset(class_names, train, test, sha256.hexdigest())


def _read_annotations(path, source, folder, num_classes):
    annotations = np.atleast_1d(_load_variable(path, "annotations"))
    # By name, never by position: the files with and without `class` differ by one field.
    fields, found = (*_BOX_FIELDS, "class", "fname"), annotations.dtype.names or ()
    if not set(fields) <= set(found):
        raise ValueError(
            f"{path}: expected annotations with {', '.join(fields)}, got {', '.join(found) or 'no fields'}"
        )
    if not annotations.size:
        raise ValueError(f"{path}: expected at least one annotated photo, got none")
    if not (source / folder).is_dir():
        raise ValueError(
            f"{source}: expected the folder {folder}/ with the photos of {path.name}, got {_listing(source)}"
        )
    photos = []
    for row, annotation in enumerate(annotations, start=1):
        try:
            # int() before any sum: the file's scalars are uint8 and uint16, and would wrap.
            x1, y1, x2, y2, class_id = (int(annotation[field]) for field in fields[:-1])
        except (TypeError, ValueError):
            values = ", ".join(f"{field}={annotation[field]}" for field in fields[:-1])
            raise ValueError(f"{path}, row {row}: expected numbers, got {values}") from None
        label = class_id - 1
        file_name = str(annotation["fname"])
        if not 0 <= label < num_classes:
            raise ValueError(f"{path}, row {row}: expected a class from 1 to {num_classes}, got {class_id}")
        if Path(file_name).name != file_name:
            raise ValueError(f"{path}, row {row}: expected the name of a file in {folder}/, got {file_name!r}")
        # Boxes are 1-based and include their last pixel, as Matlab counts.
        photos.append(Photo(source / folder / file_name, f"{folder}/{file_name}", label, (x1 - 1, y1 - 1, x2, y2)))
    return photos


def _load_variable(path, name):
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of the Stanford devkit, got nothing")
    try:
        variables = loadmat(path, squeeze_me=True)
    # Whatever the bytes lead scipy to: an IndexError for a short text, a NotImplementedError for Matlab's 7.3 format.
    except Exception as error:
        raise ValueError(f"{path}: expected a Matlab file, got one that scipy cannot read: {error}") from None
    if name not in variables:
        found = ", ".join(sorted(variable for variable in variables if not variable.startswith("__")))
        raise ValueError(f"{path}: expected a variable {name}, got {found or 'none'}")
    return variables[name]


def _listing(folder):
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
