"""CSV files as rows of texts."""

import csv
import io


def read_rows(store, name, delimiter=","):
    """Reads the rows of a CSV file, but for empty ones.

    Args:
        store: `Store`.
        name: Name of the file in it.
        delimiter: Character between the fields.

    Returns:
        List of pairs: number of the line from 1, and list of str.

    Raises:
        ValueError: If the file is no CSV in UTF-8.
    """
    where = f"{store.place}/{name}"
    try:
        # With the mark that Excel puts before the first column's name, or without it.
        text = store.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected a CSV file in UTF-8, got other bytes at position {error.start}") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
    except csv.Error as error:
        raise ValueError(f"{where}, row {reader.line_num}: expected a CSV file, got one with this: {error}") from None
