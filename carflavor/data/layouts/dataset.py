"""The form that every layout is read into, and what all layouts have in common."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

# What people keep photos as. A file of another kind is no photo of a class, whatever folder it is in.
_FORMATS_BY_ENDING = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe"), ("JPEG",)),
    ".png": ("PNG",),
    ".webp": ("WebP",),
    ".bmp": ("BMP",),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    ".gif": ("GIF",),
    ".avif": ("AVIF",),
    # What both, HEIC and AVIF, are kept in.
    **dict.fromkeys((".heic", ".heif"), ("HEIC", "AVIF")),
}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*)")
_TFRECORD = re.compile(r"\.tfrecords?(-\d{5}-of-\d{5})?$")
_LISTED = 8


@dataclass(frozen=True, slots=True)
class Photo:
    """One labelled photo of a dataset.

    Attributes:
        name: The path inside the dataset, with forward slashes; no two photos have the same. Of a photo inside a
            Parquet or TFRecord file: its own name, after its split where another split has a photo of that name, or
            `<file>#<row>` where it has none.
        file: Name in the store of the file that holds it.
        row: Row inside that file from 0, or None where the file is the photo.
        label: 0-based class id.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels, as Python ints, or None where nobody drew one: the whole
            photo.
    """

    name: str
    file: str
    row: int | None
    label: int
    box: tuple | None

    @property
    def place(self):
        """What errors call it: its file, and the row in it as people count."""
        return self.file if self.row is None else f"{self.file}, row {self.row + 1}"


@dataclass(frozen=True)
class Dataset:
    """What a layout holds.

    Attributes:
        class_names: Names in the order of the labels.
        train: List of `Photo`.
        test: List of `Photo`, or None where the layout brings no labels for its test photos.
        digest: SHA-256 (hex) over names, labels and boxes, to tell one source from another.
        layout: Which of `LAYOUTS` it was.
        warnings: Sentences for people, on what was found and perhaps not meant.
        missing: Names of labelled photos that have no file. They are in `train` and `test` all the same.
        refused_boxes: Sentences, each of which refuses a box of one of the photos that shows that boxes are not what
            was expected.
    """

    class_names: list
    train: list
    test: list | None
    digest: str
    layout: str
    warnings: tuple = ()
    missing: tuple = ()
    refused_boxes: tuple = ()

    @property
    def splits(self):
        """Dict of split -> list of `Photo`: `train` and, where there are labels for it, `test`."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})

    @property
    def photos(self):
        """List of all: `train`, then `test`."""
        return [*self.train, *(self.test or [])]


def build_dataset(store, layout, class_names, by_split, warnings=(), refused_boxes=()):
    """Makes a `Dataset` of what a layout's reader found.

    Photos for validation are the test photos where there are no others, and training photos where there are: which of
    these are kept aside for validation is drawn elsewhere.

    Args:
        store: The `Store` that was read.
        layout: Name of the layout.
        class_names: List of str, as `check_class_names` returns it.
        by_split: Dict of `train`, `validation`, `test` -> list of `Photo`; splits without labels are left out.
        warnings: Sentences of the reader.
        refused_boxes: As `Dataset` has them.

    Raises:
        ValueError: If there is nothing to train on, or a photo is there twice.
    """
    warnings = list(warnings)
    by_split = {split: photos for split, photos in by_split.items() if photos}
    if "train" not in by_split:
        found = " and ".join(by_split) or "none at all"
        raise ValueError(f"{store.place}: expected labelled photos for training, got {found}")
    train, validation, test = (by_split.get(split) for split in ("train", "validation", "test"))
    if validation and test:
        warnings.append(
            f"The {len(validation):,} photos for validation are used with those for training, from which preprocess "
            f"draws its own validation photos"
        )
        train = [*train, *validation]
    elif validation:
        warnings.append(f"There are no labelled test photos: the {len(validation):,} for validation are used as such")
        test = validation
    photos = [*train, *(test or [])]
    counts = Counter(photo.name for photo in photos)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{store.place}: expected each photo once, got {twice[0]} {counts[twice[0]]} times")
    names = set(store.names)
    missing = tuple(photo.name for photo in photos if photo.file not in names)
    if missing:
        warnings.append(f"{len(missing):,} of {len(photos):,} labelled photos have no file: {shorten(missing)}")
    sha256 = hashlib.sha256(repr(class_names).encode())
    for photo in photos:
        sha256.update(f"{photo.name} {photo.label} {photo.box}\n".encode())
    digest = sha256.hexdigest()
    return Dataset(class_names, train, test, digest, layout, tuple(warnings), missing, tuple(refused_boxes))


def check_class_names(names, where):
    """Returns class names as a list of str without white space around them.

    Raises:
        ValueError: If there are none, one is empty, or two are the same.
    """
    names = [str(name).strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"{where}: expected names of classes, got {'an empty one' if names else 'none'}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: expected different class names, got {twice[0]!r} more than once")
    return names


def check_distinct(rows, where):
    """Refuses a list of photos that names one twice.

    Args:
        rows: Pairs of the row's number, as people count, and `Photo`.
        where: What the error calls the list.
    """
    first = {}
    for row, photo in rows:
        if photo.name in first:
            raise ValueError(
                f"{where}, row {row}: expected each photo once, got {photo.name} again, which is in row "
                f"{first[photo.name]}"
            )
        first[photo.name] = row


def check_file_name(text, folder, where):
    """Returns the name of a file that a table names, without white space around it.

    Args:
        text: What the table has.
        folder: What the error calls the place of such files.
        where: What the error calls the table and the row.

    Raises:
        ValueError: If it names a file in another folder.
    """
    name = text.strip()
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{where}: expected the name of a file in {folder}, got {text!r}")
    return name


def check_path(text, where):
    """Returns a path that a table names in its normal form: relative, with forward slashes.

    Raises:
        ValueError: If it is empty, absolute, or leads out of the dataset.
    """
    path = PurePosixPath(text.strip().replace("\\", "/"))
    if not path.name or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text.strip()):
        raise ValueError(f"{where}: expected the path of a photo inside the dataset, got {text!r}")
    return str(path)


def check_shards(store, names):
    """Refuses files named `...-00000-of-00002...` some of which are missing: classes and photos would be, too."""
    found = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            found.setdefault((shard["before"], int(shard["count"]), shard["after"]), set()).add(int(shard["number"]))
    for (before, count, after), numbers in found.items():
        # Not as a set of all numbers: a name may promise 99,999.
        if len(numbers) < count:
            number = next(number for number in range(count) if number not in numbers)
            raise ValueError(
                f"{store.place}/{before}-{number:05d}-of-{count:05d}{after}: expected one of {count} files of a "
                f"split, got nothing"
            )


def name_embedded(rows):
    """Names the photos inside Parquet or TFRecord files, all in one manner.

    Args:
        rows: Tuples of split, file, row from 0, and the photo's own name or None.

    Returns:
        List of different str.
    """
    # A path that somebody's machine had says nothing here, and might lead anywhere.
    own = [re.split(r"[/\\]", name)[-1] if name else "" for *_, name in rows]
    if all(own):
        with_split = [f"{split}/{name}" for (split, *_), name in zip(rows, own, strict=True)]
        for names in (own, with_split):
            if len(set(names)) == len(names):
                return names
    return [f"{file}#{row}" for _, file, row, _ in rows]


def find_split(word):
    """Returns `train`, `validation` or `test` for the usual words for them, else None."""
    return _SPLITS.get(word.strip().lower())


def find_split_of_file(name):
    """Returns the split that a file's name starts with, or that its folder is called, else None."""
    path = PurePosixPath(name)
    first_word = re.match(r"[A-Za-z]*", path.name)[0]
    return find_split(first_word) or find_split(path.parent.name)


def is_photo(name):
    """Says whether a name is that of a photo, by its ending."""
    return name.lower().endswith(tuple(_FORMATS_BY_ENDING))


def is_named_as(name, file_format):
    """Says whether a name may be that of a photo of a format, as `carflavor.image` calls it: by its ending, if any."""
    return file_format in _FORMATS_BY_ENDING.get(PurePosixPath(name).suffix.lower(), [file_format])


def is_tfrecord(name):
    """Says whether a name is that of a TFRecord file or of one part of it."""
    return _TFRECORD.search(name) is not None


def depth_first(name):
    """Key that sorts names by their depth in folders, then by length."""
    return name.count("/"), len(name), name


def find_file(names, file_name):
    """Returns the name in the fewest folders that ends with a file's name, or None."""
    return min((name for name in names if PurePosixPath(name).name == file_name), key=depth_first, default=None)


def visible_names(store):
    """Returns the names in a store but for what operating systems and tools leave in folders and archives."""
    # `._00001.jpg` and `__MACOSX/` are in archives that a Mac made: no photos, whatever their ending.
    return [name for name in store.names if not re.search(r"(^|/)(\.|__MACOSX/)", name)]


def list_top(store):
    """Returns what is at the top of a store, for errors."""
    top = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in store.names})
    return shorten(top) or "an empty folder"


def shorten(names):
    """Joins the first of some names."""
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
