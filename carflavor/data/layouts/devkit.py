"""Stanford Cars with its Matlab files: the devkit, however copies nest it, and the single `cars_annos.mat`.

    devkit/cars_meta.mat                     class_names: 1 x C cell of texts
    devkit/cars_train_annos.mat              annotations: 1 x N struct of box, class and fname
    devkit/cars_test_annos_withlabels.mat    the same for the test photos; optional
    cars_train/00001.jpg  cars_test/00001.jpg

    cars_annos.mat                           class_names, and annotations of box, class, relative_im_path and test
    car_ims/000001.jpg

Both number the photos from 1, each in its own order, so that the annotations of one fit no photo of the other.
"""

import io
import re
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
from scipy.io import loadmat

from carflavor.data.layouts.dataset import (
    Photo,
    build_dataset,
    check_class_names,
    check_distinct,
    check_file_name,
    depth_first,
    find_file,
    is_photo,
    list_top,
    visible_names,
)

_META, _TRAIN, _SINGLE = "cars_meta.mat", "cars_train_annos.mat", "cars_annos.mat"
# Browsers number what they download twice, and a copy on Kaggle was uploaded so.
_TEST = re.compile(r"cars_test_annos_withlabels( ?\(\d+\))?\.mat")
_BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def find_devkit(store):
    """Returns which layout of this module a store holds, `devkit` or `cars_annos`, or None."""
    names = visible_names(store)
    files = {PurePosixPath(name).name for name in names}
    if _SINGLE in files:
        has_photos_of_devkit = _has_photos(names, "cars_train") or not _has_photos(names, "car_ims")
        return "devkit" if _TRAIN in files and has_photos_of_devkit else "cars_annos"
    return "devkit" if files & {_META, _TRAIN} else None


def read_devkit(store):
    """Reads a store with the devkit's Matlab files, wherever in it they and the folders of photos are.

    Raises:
        ValueError: If a file is missing, or what it says is contradictory.
    """
    names, warnings = visible_names(store), []
    meta, train = find_file(names, _META), find_file(names, _TRAIN)
    if not meta and not train:
        raise ValueError(
            f"{store.place}: expected the Stanford devkit layout (devkit/{_META}, devkit/{_TRAIN}, cars_train/*.jpg), "
            f"got {list_top(store)}"
        )
    meta, train = meta or _beside(train, _META), train or _beside(meta, _TRAIN)
    # Sorted by length first: the name without a number before those with one.
    labelled = sorted((name for name in names if _TEST.fullmatch(PurePosixPath(name).name)), key=depth_first)
    if len(labelled) > 1:
        warnings.append(f"Of {len(labelled)} files with the labels of test photos, {labelled[0]} is read")
    if single := find_file(names, _SINGLE):
        warnings.append(f"{single} is not read: it numbers the photos of car_ims/, in another order than {train}")
    class_names = _read_class_names(store, meta)
    photos = {"train": _read_annotations(store, names, train, "cars_train", len(class_names), warnings)}
    wanted = {photo.file for photo in photos["train"]}
    if not wanted & set(names):
        raise ValueError(
            f"{store.place}: expected the folder cars_train/ with the photos of {_TRAIN}, got {list_top(store)}"
        )
    # cars_test_annos.mat names the same photos without a class: nothing can be measured on them.
    if labelled:
        photos["test"] = _read_annotations(store, names, labelled[0], "cars_test", len(class_names), warnings)
    return build_dataset(store, "devkit", class_names, photos, warnings)


def read_cars_annos(store):
    """Reads a store with `cars_annos.mat`, which holds all 16,185 photos, and the folder `car_ims`.

    Raises:
        ValueError: If there are the photos of `cars_train/` instead, the file is missing, or what it says is
            contradictory.
    """
    names, warnings = visible_names(store), []
    single = find_file(names, _SINGLE)
    if not single:
        raise ValueError(f"{store.place}: expected {_SINGLE} and car_ims/*.jpg, got {list_top(store)}")
    if not _has_photos(names, "car_ims") and (_has_photos(names, "cars_train") or _has_photos(names, "cars_test")):
        raise ValueError(
            f"{store.place}/{single}: expected car_ims/000001.jpg and so on, whose photos this file labels, got "
            f"cars_train/ or cars_test/, whose numbers mean other photos, so that every label would be wrong: they "
            f"need devkit/{_TRAIN} and devkit/{_META}"
        )
    class_names = _read_class_names(store, single)
    where = f"{store.place}/{single}"
    is_test = []
    for row, annotation in enumerate(_load_annotations(store, single, ("relative_im_path", "test")), start=1):
        flag = str(annotation["test"])
        if flag not in ("0", "1"):
            raise ValueError(f"{where}, row {row}: expected test to be 0 or 1, got {flag}")
        is_test.append(flag == "1")
    photos = _read_annotations(store, names, single, "car_ims", len(class_names), warnings, "relative_im_path")
    if not {photo.file for photo in photos} & set(names):
        raise ValueError(f"{store.place}: expected car_ims/ with the photos of {_SINGLE}, got {list_top(store)}")
    by_split = {"train": [], "test": []}
    for photo, flag in zip(photos, is_test, strict=True):
        by_split["test" if flag else "train"].append(photo)
    return build_dataset(store, "cars_annos", class_names, by_split, warnings)


def _read_class_names(store, name):
    # np.atleast_1d throughout: scipy squeezes a list of one to a scalar.
    return check_class_names(np.atleast_1d(_load_variable(store, name, "class_names")), f"{store.place}/{name}")


def _read_annotations(store, names, name, word, num_classes, warnings, name_field="fname"):
    """Returns the photos of a Matlab file; those are in a folder called `word`."""
    where, rows = f"{store.place}/{name}", []
    for row, annotation in enumerate(_load_annotations(store, name, (name_field,)), start=1):
        try:
            # int() before any sum: the file's scalars are uint8 and uint16, and would wrap.
            x1, y1, x2, y2, class_id = (int(annotation[field]) for field in (*_BOX_FIELDS, "class"))
        except (TypeError, ValueError, OverflowError):
            values = ", ".join(f"{field}={annotation[field]}" for field in (*_BOX_FIELDS, "class"))
            raise ValueError(f"{where}, row {row}: expected numbers, got {values}") from None
        if not 1 <= class_id <= num_classes:
            raise ValueError(f"{where}, row {row}: expected a class from 1 to {num_classes}, got {class_id}")
        text = str(annotation[name_field])
        if name_field != "fname" and text.count("/") == 1:
            text = text.removeprefix(f"{word}/")
        file_name = check_file_name(text, f"{word}/", f"{where}, row {row}")
        # Boxes are 1-based and include their last pixel, as Matlab counts.
        rows.append((row, file_name, class_id - 1, (x1 - 1, y1 - 1, x2, y2)))
    folder = _find_folder(names, word, {file_name for _, file_name, *_ in rows}) or _beside(name, word)
    photos = [
        (row, Photo(f"{folder}/{file_name}", f"{folder}/{file_name}", None, label, box))
        for row, file_name, label, box in rows
    ]
    check_distinct(photos, where)
    photos = [photo for _, photo in photos]
    inside = {name for name in names if name.rpartition("/")[0] == folder and is_photo(name)}
    if unlabelled := len(inside - {photo.file for photo in photos}):
        warnings.append(f"{unlabelled:,} photos in {folder}/ are not in {name} and are left out")
    return photos


def _load_annotations(store, name, fields):
    annotations = np.atleast_1d(_load_variable(store, name, "annotations"))
    # By name, never by position: the files with and without `class` differ by one field.
    fields, found = (*_BOX_FIELDS, "class", *fields), annotations.dtype.names or ()
    if not set(fields) <= set(found):
        raise ValueError(
            f"{store.place}/{name}: expected annotations with {', '.join(fields)}, got "
            f"{', '.join(found) or 'no fields'}"
        )
    if not annotations.size:
        raise ValueError(f"{store.place}/{name}: expected at least one annotated photo, got none")
    return annotations


def _load_variable(store, name, variable):
    where = f"{store.place}/{name}"
    if name not in store.names:
        raise ValueError(f"{where}: expected a file of the Stanford devkit, got nothing")
    data = store.read(name)
    try:
        variables = loadmat(io.BytesIO(data), squeeze_me=True)
    # Whatever the bytes lead scipy to: an IndexError for a short text, a NotImplementedError for Matlab's 7.3 format.
    except Exception as error:
        raise ValueError(f"{where}: expected a Matlab file, got one that scipy cannot read: {error}") from None
    if variable not in variables:
        found = ", ".join(sorted(name for name in variables if not name.startswith("__")))
        raise ValueError(f"{where}: expected a variable {variable}, got {found or 'none'}")
    return variables[variable]


def _beside(name, other):
    """Returns the path of a file that should be in the same folder, or of a folder that should be beside devkit/."""
    folder = PurePosixPath(name).parent
    if not other.endswith(".mat"):
        while folder.name in ("devkit", "car_devkit"):
            folder = folder.parent
    return (folder / other).as_posix()


def _has_photos(names, word):
    return any(is_photo(name) and PurePosixPath(name).parent.name == word for name in names)


def _find_folder(names, word, files):
    """Returns the folder called `word` that has the most of some files: copies nest cars_train/cars_train/."""
    paths = [PurePosixPath(name) for name in names]
    counts = Counter(path.parent.as_posix() for path in paths if path.parent.name == word and path.name in files)
    return min(counts, key=lambda folder: (-counts[folder], *depth_first(folder)), default=None)
