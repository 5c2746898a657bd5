"""A table of photos: path, label, and perhaps box and split, as CSV or Parquet.

    labels.csv       path,class,x1,y1,x2,y2,split
    photos/...

or `train.csv`, `test.csv` and `validation.csv`. Columns are recognised by the usual names, see `columns`. Paths are
relative to the table, to the top, or to a folder of photos.
"""

import csv
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from carflavor.data.layouts.columns import (
    Columns,
    Entry,
    drop_unlabelled,
    find_columns,
    number_labels,
    read_box,
    read_class_label,
    read_split,
)
from carflavor.data.layouts.csv_rows import read_rows
from carflavor.data.layouts.dataset import (
    Photo,
    build_dataset,
    check_class_names,
    check_distinct,
    check_path,
    check_shards,
    depth_first,
    find_split_of_file,
    is_photo,
    list_top,
    shorten,
    visible_names,
)
from carflavor.data.layouts.parquet import find_image_column, open_parquet

_DELIMITERS = (",", ";", "\t")
_MAX_HEADER = 100_000  # bytes
_EXPECTED = "a table with columns such as path and label (CSV with a header, or Parquet)"


@dataclass(frozen=True)
class Table:
    """A file that may be a table of photos.

    Attributes:
        name: Its name in the store.
        header: Names of its columns.
        delimiter: Of a CSV file.
        columns: `Columns`.
        class_names: Names in the order of the ids, where a Parquet file has them.
    """

    name: str
    header: list
    delimiter: str | None
    columns: Columns
    class_names: list | None = None


def find_table(store):
    """Says whether a store has a table with columns for paths and labels.

    Raises:
        ValueError: If a file that ends so is no Parquet file, or has some of a box's columns only.
    """
    return any(table.columns.is_complete for table in _read_headers(store))


def read_table(store):
    """Reads a table, or one for each split.

    Raises:
        ValueError: If there is no such table or more than one, or a row is not what its column says.
    """
    candidates = _read_headers(store)
    tables = [table for table in candidates if table.columns.is_complete]
    if not tables:
        found = [f"{table.name} with {shorten(table.header)}" for table in candidates]
        raise ValueError(f"{store.place}: expected {_EXPECTED}, got {'; '.join(found) or list_top(store)}")
    check_shards(store, [table.name for table in tables])
    splits = {table.name: find_split_of_file(table.name) for table in tables}
    _check_one_for_each_split(store, splits)
    entries = [entry for table in tables for entry in _read_entries(store, table, splits[table.name])]
    entries, warnings = drop_unlabelled(entries)
    if not entries:
        raise ValueError(f"{store.place}: expected labelled photos in {tables[0].name}, got none")
    class_names = tables[0].class_names
    if class_names is not None:
        class_names = check_class_names(class_names, f"{store.place}/{tables[0].name}")
    class_names, labels = number_labels(entries, class_names, store.place)
    by_split, by_table = {}, {}
    for entry, file, label in zip(entries, _find_files(store, entries), labels, strict=True):
        photo = Photo(file, file, None, label, entry.box)
        by_split.setdefault(entry.split, []).append(photo)
        by_table.setdefault(entry.table, []).append((entry.number, photo))
    for table, rows in by_table.items():
        check_distinct(rows, f"{store.place}/{table}")
    refused_boxes = [entry.refusal for entry in entries if entry.refusal]
    return build_dataset(store, "table", class_names, by_split, warnings, refused_boxes)


def _read_headers(store):
    tables = (read_header(store, name) for name in sorted(visible_names(store), key=depth_first))
    return [table for table in tables if table]


def read_header(store, name, labels=True):
    """Reads which columns a file has.

    Args:
        store: `Store`; of it `place`, `open` and `read` are used.
        name: Name of the file in it.
        labels: As `find_columns` takes it.

    Returns:
        `Table`, or None where the file is no CSV, or no Parquet file with a column of paths.

    Raises:
        ValueError: As `find_columns` does, or if a file that ends so is no Parquet file.
    """
    where, ending = f"{store.place}/{name}", PurePosixPath(name).suffix.lower()
    if ending == ".parquet":
        with open_parquet(store, name) as file:
            schema = file.schema_arrow
        if find_image_column(schema, where):
            return None
        columns = find_columns(schema.names, where, labels=labels)
        kind = schema.field(columns.path).type if columns.path else pa.null()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            names = read_class_label(schema.metadata, columns.label)
            return Table(name, schema.names, None, columns, names)
    elif ending in (".csv", ".tsv"):
        with store.open(name) as file:
            line = file.readline(_MAX_HEADER).decode("utf-8-sig", "replace")
        # Not csv.Sniffer, which takes letters for delimiters: that one by which most columns are there.
        headers = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in _DELIMITERS}
        delimiter = max(_DELIMITERS, key=lambda delimiter: len(headers[delimiter]))
        header = headers[delimiter]
        return Table(name, header, delimiter, find_columns(header, where, labels=labels))
    return None


def _check_one_for_each_split(store, splits):
    """Refuses tables of which it cannot be told which is the dataset's."""
    by_split = {}
    for name, split in splits.items():
        # The parts of one table count once.
        by_split.setdefault(split, {}).setdefault(name.partition("-of-")[0].rpartition("-")[0] or name, name)
    for split, tables in by_split.items():
        if len(tables) > 1 or None in by_split and len(by_split) > 1:
            names = list(tables.values()) if len(tables) > 1 else list(splits)
            what = f"one table for {split}" if split and len(tables) > 1 else "one table, or one for each split"
            raise ValueError(f"{store.place}: expected {what}, got {shorten(names)}")


def read_values(store, table):
    """Reads the rows of a table.

    Args:
        store: As `read_header` takes it.
        table: `Table`.

    Returns:
        List of pairs: number of the row as people count, and dict of column -> text or number.

    Raises:
        ValueError: If a row has not as many fields as the header.
    """
    where, columns = f"{store.place}/{table.name}", table.columns
    if table.delimiter:
        _, *rows = read_rows(store, table.name, table.delimiter)
        if wrong := next(((row, fields) for row, fields in rows if len(fields) != len(table.header)), None):
            raise ValueError(
                f"{where}, row {wrong[0]}: expected {len(table.header)} fields as in the header, got {len(wrong[1])}"
            )
        rows = [(row, dict(zip(table.header, fields, strict=True))) for row, fields in rows]
    else:
        with open_parquet(store, table.name) as file:
            # Not all columns: others may hold whatever there is.
            wanted = [columns.path, columns.label, columns.label_name, columns.split, columns.box]
            wanted = [column for column in (*wanted, *(columns.corners or ())) if column]
            rows = list(enumerate(file.read(columns=wanted).to_pylist(), start=1))
    return rows


def _read_entries(store, table, split_of_file):
    where, columns, rows = f"{store.place}/{table.name}", table.columns, read_values(store, table)
    if not rows:
        raise ValueError(f"{where}: expected at least one photo, got none")
    entries = []
    for row, values in rows:
        here = f"{where}, row {row}"
        path = check_path(values[columns.path] or "", here)
        split, box = read_split(columns, values, split_of_file, here), read_box(columns, values, here)
        label_name = values[columns.label_name] if columns.label_name else None
        entries.append(Entry(here, table.name, row, split, path, values[columns.label], label_name, *box))
    return entries


def _find_files(store, entries):
    """Returns the names in the store of the files that the rows of tables name, whether they are there or not."""
    names, by_group = set(store.names), {}
    for entry in entries:
        by_group.setdefault((entry.table, entry.split), []).append(entry.path)
    folders = sorted({PurePosixPath(name).parent.as_posix() for name in names if is_photo(name)}, key=depth_first)
    bases = {}
    for (table, split), paths in by_group.items():
        # Paths are relative to the table or to the top; or to a folder of photos, which may be one for each split.
        own = PurePosixPath(table).parent.as_posix()
        base = _find_base(names, (own, "."), paths) or _find_base(names, folders, paths)
        if base is None and split == "train":
            raise ValueError(
                f"{store.place}/{table}: expected the photos that it names, such as {paths[0]}, got none of them in "
                f"{list_top(store)}"
            )
        bases[table, split] = own if base is None else base
    return [_join(bases[entry.table, entry.split], entry.path) for entry in entries]


def _find_base(names, folders, paths):
    """Returns the folder in which most of some paths are, the first of those, or None."""
    hits = {folder: sum(_join(folder, path) in names for path in paths) for folder in folders}
    base = max(hits, key=hits.get, default=None)
    return base if base is not None and hits[base] else None


def _join(base, path):
    return path if base == "." else f"{base}/{path}"
