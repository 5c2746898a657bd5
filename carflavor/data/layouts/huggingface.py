"""Datasets as Hugging Face has them: Parquet files with the photos inside.

    README.md
    data/train-00000-of-00001.parquet    image: struct of bytes and path; label: int from 0; perhaps bbox
    data/test-00000-of-00001.parquet

The names of the classes are in the files' schema, or in the head of README.md.
"""

import pyarrow as pa
import yaml

from carflavor.data.layouts.columns import (
    Entry,
    drop_unlabelled,
    find_columns,
    number_labels,
    read_box,
    read_class_label,
    read_split,
)
from carflavor.data.layouts.dataset import (
    Photo,
    build_dataset,
    check_class_names,
    check_shards,
    find_file,
    find_split_of_file,
    list_top,
    name_embedded,
    visible_names,
)
from carflavor.data.layouts.parquet import find_image_column, open_parquet


def find_huggingface(store):
    """Says whether a store has Parquet files with photos inside.

    Raises:
        ValueError: If the first of them cannot be read.
    """
    return any(name.endswith(".parquet") for name in visible_names(store)) and bool(_find_files(store))


def read_huggingface(store):
    """Reads the labels of all Parquet files, but not the photos inside them.

    Raises:
        ValueError: If the files are not those of one dataset, or a row is not what its column says.
    """
    names = _find_files(store)
    if not names:
        raise ValueError(
            f"{store.place}: expected data/train-00000-of-00001.parquet and so on with a column of photos (struct of "
            f"bytes and path, or bytes), got {list_top(store)}"
        )
    check_shards(store, names)
    splits = [find_split_of_file(name) for name in names]
    if None in splits and any(splits):
        raise ValueError(
            f"{store.place}/{names[splits.index(None)]}: expected train, validation or test in the name, as in others, "
            f"got none of them"
        )
    entries, class_names, warnings = [], None, []
    for name, split in zip(names, splits, strict=True):
        rows, found = _read_entries(store, name, split)
        if entries and found != class_names:
            raise ValueError(f"{store.place}/{name}: expected the class names of {names[0]}, got others")
        class_names = found
        entries += rows
    if class_names is None:
        class_names = _read_names_of_card(store, names[0])
    if class_names is not None:
        class_names = check_class_names(class_names, f"{store.place}/{names[0]}")
    entries, warnings = drop_unlabelled(entries)
    if not entries:
        raise ValueError(f"{store.place}: expected labelled photos in {names[0]}, got none")
    if class_names is None and all(isinstance(entry.label, int) for entry in entries) and not entries[0].label_name:
        warnings.append("No file names the classes: they are called by their numbers")
    class_names, labels = number_labels(entries, class_names, store.place)
    names = name_embedded([(entry.split, entry.table, entry.number - 1, entry.path) for entry in entries])
    by_split = {}
    for entry, name, label in zip(entries, names, labels, strict=True):
        photo = Photo(name, entry.table, entry.number - 1, label, entry.box)
        by_split.setdefault(entry.split, []).append(photo)
    refused_boxes = [entry.refusal for entry in entries if entry.refusal]
    return build_dataset(store, "huggingface", class_names, by_split, warnings, refused_boxes)


def _find_files(store):
    """Returns the Parquet files with photos, all of one dataset."""
    names, places = [], {}
    for name in visible_names(store):
        if name.endswith(".parquet"):
            with open_parquet(store, name) as table:
                if find_image_column(table.schema_arrow, f"{store.place}/{name}"):
                    names.append(name)
    for name in names:
        # Hugging Face's own conversion has a folder for each configuration, and in it one for each split.
        folder = name.rpartition("/")[0]
        if find_split_of_file(f"{folder}/x") and not find_split_of_file(name.rpartition("/")[2]):
            folder = folder.rpartition("/")[0]
        places.setdefault(folder, name)
    if len(places) > 1:
        first, second = list(places.values())[:2]
        raise ValueError(f"{store.place}: expected the Parquet files of one dataset, got {first} and {second}")
    return names


def _read_entries(store, name, split_of_file):
    """Returns the rows of a file as `Entry`s, and the class names in its schema or None."""
    where = f"{store.place}/{name}"
    with open_parquet(store, name) as table:
        schema = table.schema_arrow
        columns = find_columns(schema.names, where, images=True)
        if not columns.label:
            raise ValueError(f"{where}: expected a column named label, got {', '.join(schema.names)}")
        is_struct = pa.types.is_struct(schema.field(columns.path).type)
        # Of a struct only the paths: the bytes are nearly all of the file.
        has_names = is_struct and schema.field(columns.path).type.get_field_index("path") >= 0
        wanted = [columns.label, columns.label_name, columns.split, columns.box, *(columns.corners or ())]
        wanted = [column for column in wanted if column] + ([f"{columns.path}.path"] if has_names else [])
        rows = table.read(columns=wanted).to_pylist()
        class_names = read_class_label(schema.metadata, columns.label)
    if not rows:
        raise ValueError(f"{where}: expected at least one photo, got none")
    entries = []
    for number, values in enumerate(rows, start=1):
        here = f"{where}, row {number}"
        own_name = (values[columns.path] or {}).get("path") if has_names else None
        split, box = read_split(columns, values, split_of_file, here), read_box(columns, values, here)
        label_name = values[columns.label_name] if columns.label_name else None
        entries.append(Entry(here, name, number, split, own_name, values[columns.label], label_name, *box))
    return entries, class_names


def _read_names_of_card(store, table):
    """Returns the class names in the head of the dataset's README.md, or None."""
    card = find_file(visible_names(store), "README.md")
    parts = store.read(card).decode("utf-8", "replace").split("---\n") if card else []
    with open_parquet(store, table) as file:
        column = find_columns(file.schema_arrow.names, table, images=True).label
    try:
        info = yaml.safe_load(parts[1])["dataset_info"]
        # A list where the dataset has several configurations.
        features = (info[0] if isinstance(info, list) else info)["features"]
        names = next(feature for feature in features if feature["name"] == column)["dtype"]["class_label"]["names"]
        names = {int(label): str(name) for label, name in names.items()}
        return [names[label] for label in range(len(names))]
    # Whatever else people write there: it is a text first of all.
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, yaml.YAMLError):
        return None
