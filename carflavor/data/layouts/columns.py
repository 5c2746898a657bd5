"""What the columns of a table mean, by the names that people give them."""

import json
import math
from dataclasses import dataclass

from carflavor.data.layouts.dataset import check_class_names, find_split

# In the order of preference, where a table has several.
_PATHS = (
    *("path", "file_path", "filepath", "image_path", "img_path", "photo_path", "relative_im_path", "file_name"),
    *("filename", "fname", "image_name", "img_name", "file", "image", "img", "photo"),
)
_URLS = ("url", "uri", "image_url", "photo_url")
_IMAGES = ("image", "img", "photo", "picture", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "class", "target", "category", "class_id", "label_id", "class_idx", "label_idx")
_LABEL_NAMES = ("class_name", "classname", "label_name", "category_name", "label_text")
_SPLITS = ("split", "subset", "partition", "set")
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
    ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"),
)
# What the devkit calls them: who exports its annotations as a table keeps the names, and numbers that count from 1.
_DEVKIT_CORNERS = _CORNERS[-1]
_LARGEST_CORNER = 2**31 - 2  # pixels: record files hold corners as int32
_BOXES = ("bbox", "box", "bounding_box")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns by what they mean; None where there is none.

    Attributes:
        path: Path of the photo's file, or the photo itself.
        label: Class id or name.
        label_name: Class name, beside an id.
        split: Word for the split.
        corners: Names of x1, y1, x2, y2.
        box: All four in a list.
    """

    path: str | None
    label: str | None
    label_name: str | None
    split: str | None
    corners: tuple | None
    box: str | None

    @property
    def is_complete(self):
        return self.path is not None and self.label is not None


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Attributes:
        where: What errors call it: file and row.
        table: Name of the table in the store.
        number: Number of the row as people count.
        split: `train`, `validation`, `test`.
        path: Path of the photo's file as the table has it, the photo's own name where it is inside the table, or None.
        label: What the label column has.
        label_name: What the column of names has, or None.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels, or None.
        refusal: Sentence that refuses the box, or None where it is one.
    """

    where: str
    table: str
    number: int
    split: str
    path: str | None
    label: object
    label_name: str | None
    box: tuple | None
    refusal: str | None


def find_columns(names, where, images=False, labels=True):
    """Finds the columns of a table.

    Args:
        names: Names of its columns.
        where: What errors call the table.
        images: Whether photos are inside, so that `path` is the column that holds them.
        labels: Whether it is a table of photos only if it has labels. If not, `path` may be a column of URLs, too.

    Returns:
        `Columns`.

    Raises:
        ValueError: If only some of a box's columns are there, or two have one name.
    """
    words = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in names]
    by_word = dict(zip(reversed(words), reversed(names), strict=True))

    def find(candidates):
        return next((by_word[word] for word in candidates if word in by_word), None)

    paths = _IMAGES if images else _PATHS if labels else (*_PATHS, *_URLS)
    path, label, label_name = find(paths), find(_LABELS), find(_LABEL_NAMES)
    corners = next((candidates for candidates in _CORNERS if set(candidates) <= by_word.keys()), None)
    columns = Columns(
        path,
        label or label_name,
        label_name if label else None,
        find(_SPLITS),
        corners and tuple(by_word[word] for word in corners),
        None if corners else find(_BOXES),
    )
    # Any other table may have what it likes.
    if columns.is_complete or (path and not labels):
        if twice := [word for word in by_word if words.count(word) > 1]:
            raise ValueError(f"{where}: expected different names of columns, got {by_word[twice[-1]]!r} more than once")
        if corners is None and (some := [words for words in _CORNERS[:3] if set(words) & by_word.keys()]):
            absent = next(word for word in some[0] if word not in by_word)
            raise ValueError(f"{where}: expected the columns {', '.join(some[0])} for boxes, got none named {absent}")
    return columns


def read_box(columns, values, where):
    """Reads the box of a row.

    Args:
        columns: `Columns`.
        values: Dict of column -> value, text or number.
        where: What errors call the row.

    Returns:
        `(x1, y1, x2, y2)`, 0-based half-open, as ints, or None where the row or the table has no box; and the sentence
        that refuses it where its corners are not in order, else None.

    Raises:
        ValueError: If it is no four numbers in pixels.
    """
    if columns.corners:
        numbers = [values[name] for name in columns.corners]
    elif columns.box:
        numbers = values[columns.box]
    else:
        return None, None
    if numbers is None or all(number in (None, "") for number in numbers):
        return None, None
    text = ", ".join(map(str, numbers))
    try:
        numbers = [float(number) for number in numbers]
        x1, y1, x2, y2 = map(round, numbers)
        if max(map(abs, numbers)) > _LARGEST_CORNER:
            raise OverflowError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: expected a box of four numbers, got {text}") from None
    if max(numbers) <= 1 and not all(number.is_integer() for number in numbers):
        raise ValueError(f"{where}: expected a box in pixels, got fractions of the photo: {text}")
    if columns.corners and tuple(name.strip().lower() for name in columns.corners) == _DEVKIT_CORNERS:
        x1, y1 = x1 - 1, y1 - 1
    refusal = None
    if not (x1 < x2 and y1 < y2):
        refusal = f"{where}: expected a box as x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {text}"
    return (x1, y1, x2, y2), refusal


def read_split(columns, values, split_of_file, where):
    """Returns the split of a row: that of its file where the file is one split, else what the row says, else `train`.

    Raises:
        ValueError: If the row has another word than the usual ones.
    """
    if split_of_file or not columns.split:
        return split_of_file or "train"
    if split := find_split(str(values[columns.split])):
        return split
    raise ValueError(
        f"{where}: expected train, validation or test in the column {columns.split}, got {values[columns.split]!r}"
    )


def drop_unlabelled(entries):
    """Leaves out test or validation photos that have no labels, as the makers of contests publish them.

    Args:
        entries: List of `Entry`.

    Returns:
        The others, and sentences about what was left out.
    """
    warnings = []
    for split in ("validation", "test"):
        rows = [entry for entry in entries if entry.split == split]
        # Hugging Face writes -1 where there is no label.
        if rows and all(entry.label in (None, "", -1, "-1") for entry in rows):
            warnings.append(f"The {len(rows):,} {split} photos have no labels and are left out")
            entries = [entry for entry in entries if entry.split != split]
    return entries, warnings


def number_labels(entries, class_names, place):
    """Gives each row its class id.

    Args:
        entries: List of `Entry`.
        class_names: Names in the order of the ids from 0, where the dataset has them; else None. Then the names are
            those in the column beside the ids, in the order of these; or the ids themselves; or the labels, sorted.
        place: What errors call the dataset.

    Returns:
        Class names, and a list of ids from 0.

    Raises:
        ValueError: If a row has no label, one out of range, or one that contradicts another row.
    """
    labels = [_read_label(entry) for entry in entries]
    if class_names is not None:
        ids = {name: label for label, name in enumerate(class_names)}
        for entry, label in zip(entries, labels, strict=True):
            if label not in ids and not (isinstance(label, int) and 0 <= label < len(class_names)):
                raise ValueError(
                    f"{entry.where}: expected a label from 0 to {len(class_names) - 1} or the name of a class, got "
                    f"{label!r}"
                )
        return class_names, [label if isinstance(label, int) else ids[label] for label in labels]
    if not all(isinstance(label, int) for label in labels):
        labels = [str(label) for label in labels]
    known = sorted(set(labels))
    if isinstance(known[0], int) and known[0] < 0:
        entry = entries[labels.index(known[0])]
        raise ValueError(f"{entry.where}: expected a label from 0, got {known[0]}")
    names = dict(zip(known, map(str, known), strict=True))
    if isinstance(known[0], int) and entries[0].label_name is not None:
        names = {}
        for entry, label in zip(entries, labels, strict=True):
            if names.setdefault(label, entry.label_name) != entry.label_name:
                raise ValueError(
                    f"{entry.where}: expected label {label} to be {names[label]!r} as in rows before, got "
                    f"{entry.label_name!r}"
                )
    ids = {label: number for number, label in enumerate(known)}
    return check_class_names([names[label] for label in known], place), [ids[label] for label in labels]


def _read_label(entry):
    label = entry.label.strip() if isinstance(entry.label, str) else entry.label
    if isinstance(label, float) and label.is_integer():
        # What pandas makes of integers in a column with gaps.
        label = int(label)
    if isinstance(label, bool):
        label = str(label)
    if isinstance(label, str) and label.lstrip("-").isdecimal() and label.isascii():
        return int(label)
    if label in (None, "") or isinstance(label, float) and math.isnan(label):
        raise ValueError(f"{entry.where}: expected a label, got none")
    if not isinstance(label, int | str):
        raise ValueError(f"{entry.where}: expected a number or a text as label, got {str(label)[:100]}")
    return label


def read_class_label(metadata, column):
    """Returns the class names that Hugging Face's `datasets` keeps in a Parquet file's schema, or None.

    Args:
        metadata: Dict of bytes, or None.
        column: Name of the label column.
    """
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    # Other tools write other things there; the file can be read without it.
    except (KeyError, TypeError, ValueError):
        return None
