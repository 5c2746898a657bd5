"""The dataset layouts people have, read into one form: lists of photos with label and box.

    devkit         Stanford's Matlab files with cars_train/ and cars_test/, however copies nest them
    cars_annos     Stanford's cars_annos.mat with car_ims/
    anno_csv       class folders with anno_train.csv, anno_test.csv or names.csv, as on Kaggle
    tfrecord       TFRecord files of TensorFlow Datasets
    huggingface    Parquet files with the photos inside
    table          a CSV or Parquet table of paths and labels
    folders        class folders of any dataset

Ids are those of the source where it has any. Class folders alone have none: they are numbered in their sorted order.
"""

from dataclasses import replace

from carflavor.data.layouts.dataset import Dataset, Photo, is_tfrecord, list_top, visible_names
from carflavor.data.layouts.devkit import find_devkit, read_cars_annos, read_devkit
from carflavor.data.layouts.folders import find_folders, read_anno_csv, read_folders
from carflavor.data.layouts.huggingface import find_huggingface, read_huggingface
from carflavor.data.layouts.photos import PhotoReader, read_photo
from carflavor.data.layouts.tables import find_table, read_table

__all__ = ["LAYOUTS", "Dataset", "Photo", "PhotoReader", "read_dataset", "read_photo"]


def _read_tfrecords(store):
    # Not at the top of the file: it loads TensorFlow, which no other layout needs.
    from carflavor.data.layouts.tfrecords import read_tfrecords

    return read_tfrecords(store)


# In the order of preference, where a place might be read in several ways.
_READERS = {
    "devkit": read_devkit,
    "cars_annos": read_cars_annos,
    "anno_csv": read_anno_csv,
    "tfrecord": _read_tfrecords,
    "huggingface": read_huggingface,
    "table": read_table,
    "folders": read_folders,
}
LAYOUTS = ("auto", *_READERS)


def read_dataset(store, layout="auto", refuse_boxes=True):
    """Reads the class names, labels and boxes of a dataset, and where its photos are.

    Args:
        store: `carflavor.data.stores.Store`.
        layout: One of `LAYOUTS`. `auto`: the layout is recognised by the names of the files.
        refuse_boxes: Whether a table's box whose corners are not in order ends it: perhaps all are of another form, and
            whoever cuts them out would cut out something else. If not, such boxes are in the `Dataset` as they are.

    Returns:
        `Dataset`. Labelled photos without a file are in it, and in its `missing`.

    Raises:
        ValueError: If the store has no such layout, or what it says is contradictory.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Expected layout to be one of {', '.join(LAYOUTS)}. Received: layout={layout!r}")
    first, *others = _recognise(store) if layout == "auto" else [layout]
    dataset = _READERS[first](store)
    if refuse_boxes and dataset.refused_boxes:
        raise ValueError(dataset.refused_boxes[0])
    if others:
        warning = f"{store.place} is read as layout={first}, and might be read as {' or '.join(others)}"
        dataset = replace(dataset, warnings=(warning, *dataset.warnings))
    return dataset


def _recognise(store):
    """Returns the layouts that a store seems to have: those with files of a known name first, class folders last."""
    in_folders = find_folders(store)
    has_tfrecords = any(map(is_tfrecord, visible_names(store)))
    found = [
        find_devkit(store),
        in_folders if in_folders == "anno_csv" else None,
        "tfrecord" if has_tfrecords else None,
    ]
    found = [layout for layout in found if layout]
    # Whatever tables lie beside those: what is in them is looked at only where nothing else tells.
    if not found:
        found = [layout for layout, find in (("huggingface", find_huggingface), ("table", find_table)) if find(store)]
    if in_folders == "folders":
        found.append("folders")
    if not found:
        raise ValueError(
            f"{store.place}: expected one of the layouts {', '.join(_READERS)} (devkit/cars_meta.mat with "
            f"cars_train/*.jpg, cars_annos.mat with car_ims/*.jpg, train/<class>/*.jpg, Parquet or TFRecord files with "
            f"photos inside, or a table with columns such as path and label), got {list_top(store)}"
        )
    return found
