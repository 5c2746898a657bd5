"""A folder for each class: of any dataset, and Stanford Cars as Kaggle has it, with boxes and ids in tables.

train/<class>/*.jpg  test/<class>/*.jpg            or valid/, or no folder for the splits at all

car_data/car_data/train/<class>/00001.jpg          car_data/car_data/test/<class>/00001.jpg
anno_train.csv  anno_test.csv                      without a header: file, x1, y1, x2, y2, class from 1
names.csv                                          without a header: a class name a row, in the order of the ids
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from carflavor.data.layouts.csv_rows import read_rows
from carflavor.data.layouts.dataset import (
    Photo,
    build_dataset,
    check_class_names,
    check_distinct,
    check_file_name,
    find_file,
    find_split,
    is_photo,
    list_top,
    shorten,
    visible_names,
)

_NAMES = "names.csv"
_ANNOTATIONS = {"train": "anno_train.csv", "test": "anno_test.csv"}
# Folders of photos without classes; who lost the labels of cars_train/ has no dataset of the classes train and test.
_NO_CLASSES = {"cars_train", "cars_test", "car_ims", "images", "imgs", "photos"}


@dataclass(frozen=True)
class _ClassFolders:
    """Which photos are in which class's folder.

    Attributes:
        folders: Dict of split -> folder that holds the class folders.
        photos: Dict of split -> list of (class folder's name, photo's name in the store), sorted.
        warnings: Sentences.
    """

    folders: dict
    photos: dict
    warnings: list


def find_folders(store):
    """Returns which layout of this module a store holds, `anno_csv` or `folders`, or None."""
    names = visible_names(store)
    paths = [PurePosixPath(name) for name in names if is_photo(name)]
    has_splits = any(_split_of(path) for path in paths)
    if not has_splits:
        classes = {path.parent for path in paths if path.parent.name}
        if len({folder for folder in classes if not _is_without_classes(folder.name)}) < 2:
            return None
    files = {PurePosixPath(name).name for name in names}
    return "anno_csv" if has_splits and files & {_NAMES, *_ANNOTATIONS.values()} else "folders"


def read_folders(store):
    """Reads class folders. Classes are numbered in the sorted order of their folders: no file tells another.

    Raises:
        ValueError: If the photos are not in class folders beside each other.
    """
    found = _scan(store)
    if "train" not in found.photos:
        raise ValueError(f"{store.place}: expected photos in train/<class>/, got {list_top(store)}")
    # Not of the other splits: a class that is there alone could not be learned.
    class_names = check_class_names(sorted({folder.strip() for folder, _ in found.photos["train"]}), store.place)
    if len(class_names) < 2:
        raise ValueError(f"{store.place}: expected the folders of two classes, got that of {class_names[0]} alone")
    ids = {name: label for label, name in enumerate(class_names)}
    by_split = {split: _label_by_folder(store, found.photos[split], ids, "train/") for split in found.photos}
    return build_dataset(store, "folders", class_names, by_split, found.warnings)


def read_anno_csv(store):
    """Reads class folders with `anno_train.csv`, `anno_test.csv` or `names.csv`; each may be missing.

    The ids are those of the tables. Slashes of names in `names.csv` are hyphens in folders. Photos of a split without
    table have no boxes.

    Raises:
        ValueError: If a table contradicts the folders or itself, or is no such table.
    """
    found = _scan(store)
    tables = {split: find_file(visible_names(store), name) for split, name in _ANNOTATIONS.items()}
    tables = {split: _read_annotations(store, name) for split, name in tables.items() if name}
    names = find_file(visible_names(store), _NAMES)
    if not names and not tables:
        expected = ", ".join([*_ANNOTATIONS.values(), _NAMES])
        raise ValueError(f"{store.place}: expected one of {expected} beside class folders, got {list_top(store)}")
    if "train" not in found.folders:
        raise ValueError(f"{store.place}: expected photos in train/<class>/, got {list_top(store)}")
    for split in tables:
        # Labels without photos: the photos are listed as missing where they would be.
        found.folders.setdefault(split, (PurePosixPath(found.folders["train"]).parent / split).as_posix())
        found.photos.setdefault(split, [])
    if names:
        class_names, source = _read_names(store, names), _NAMES
        # Checked again: two names must not share a folder.
        folders = check_class_names([name.replace("/", "-") for name in class_names], f"{store.place}/{names}")
        ids = {name: label for label, name in enumerate(folders)}
    else:
        class_names, source = _order_by_annotations(store, found, tables), " and ".join(_ANNOTATIONS.values())
        ids = {name: label for label, name in enumerate(class_names)}
    by_split, warnings = {}, list(found.warnings)
    for split, photos in found.photos.items():
        folder = found.folders[split]
        by_split[split] = _label_by_folder(store, photos, ids, source)
        if split in tables:
            by_split[split] = _label_by_table(store, folder, photos, ids, *tables[split])
            if left_out := len({name for _, name in photos} - {photo.file for photo in by_split[split]}):
                warnings.append(f"{left_out:,} photos in {folder}/ are not in {tables[split][0]} and are left out")
        else:
            warnings.append(f"No table has the photos of {folder}/: they have no boxes")
    return build_dataset(store, "anno_csv", class_names, by_split, warnings)


def _split_of(path):
    """Returns the split of a photo in `<split>/<class>/`, else None."""
    return find_split(path.parts[-3]) if len(path.parts) > 2 else None


def _is_without_classes(word):
    return word.lower() in _NO_CLASSES or find_split(word) is not None


def _scan(store):
    """Finds the class folders.

    Raises:
        ValueError: If they are not beside each other.
    """
    paths = [PurePosixPath(name) for name in visible_names(store) if is_photo(name)]
    classes = [path for path in paths if _split_of(path)]
    if not classes:
        return _scan_without_splits(store, paths)
    folders, photos, warnings = {}, {}, []
    for path in classes:
        split, folder = _split_of(path), path.parents[1].as_posix()
        if folders.setdefault(split, folder) != folder:
            raise ValueError(
                f"{store.place}: expected the class folders of one dataset, got {folders[split]}/ and {folder}/"
            )
        photos.setdefault(split, []).append((path.parent.name, path.as_posix()))
    if len({PurePosixPath(folder).parent for folder in folders.values()}) > 1:
        raise ValueError(
            f"{store.place}: expected the splits of one dataset beside each other, got "
            f"{shorten([f'{folder}/' for folder in folders.values()])}"
        )
    others = [path for path in paths if not _split_of(path)]
    for path in others:
        if any(find_split(part) for part in path.parts[:-3]):
            raise ValueError(f"{store.place}/{path}: expected a photo in <split>/<class>/, got it deeper in folders")
    if others:
        warnings.append(
            f"{len(others):,} photos are in no class's folder and are left out: {shorten(list(map(str, others)))}"
        )
    photos = {split: photos[split] for split in ("train", "validation", "test") if split in photos}
    return _ClassFolders(folders, photos, warnings)


def _scan_without_splits(store, paths):
    inside = [path for path in paths if path.parent.name]
    places = sorted({path.parents[1] for path in inside})
    classes = {path.parent.name for path in inside}
    if not inside or all(_is_without_classes(name) for name in classes):
        raise ValueError(f"{store.place}: expected photos in <class>/ or train/<class>/, got {list_top(store)}")
    if len(places) > 1:
        first, second = (next(path for path in inside if path.parents[1] == place) for place in places[:2])
        raise ValueError(f"{store.place}: expected class folders beside each other, got {first} and {second}")
    warnings = []
    if len(inside) < len(paths):
        warnings.append(f"{len(paths) - len(inside):,} photos are in no class's folder and are left out")
    photos = {"train": [(path.parent.name, path.as_posix()) for path in inside]}
    return _ClassFolders({"train": places[0].as_posix()}, photos, warnings)


def _label_by_folder(store, photos, ids, source):
    for folder, name in photos:
        if folder.strip() not in ids:
            raise ValueError(f"{store.place}/{name}: expected the folder of a class of {source}, got {folder!r}")
    return [Photo(name, name, None, ids[folder.strip()], None) for folder, name in photos]


def _label_by_table(store, folder, photos, ids, table, rows):
    """Returns the photos of a table; `rows` are its rows as `_read_annotations` returns them."""
    where = f"{store.place}/{table}"
    folders_by_id = {label: name for name, label in ids.items()}
    # As they are spelled: with white space around them, some copies.
    names = {(class_folder.strip(), PurePosixPath(name).name): name for class_folder, name in photos}
    places = {}
    for class_folder, name in photos:
        places.setdefault(PurePosixPath(name).name, class_folder)
    found = []
    for row, file_name, box, class_id in rows:
        if not 1 <= class_id <= len(ids):
            raise ValueError(f"{where}, row {row}: expected a class from 1 to {len(ids)}, got {class_id}")
        class_folder = folders_by_id[class_id - 1]
        name = names.get((class_folder, file_name))
        if not name and file_name in places:
            raise ValueError(
                f"{where}, row {row}: expected {file_name} in the folder of class {class_id}, {class_folder!r}, got it "
                f"in {places[file_name]!r}"
            )
        name = name or f"{folder}/{class_folder}/{file_name}"
        found.append((row, Photo(name, name, None, class_id - 1, box)))
    check_distinct(found, where)
    return [photo for _, photo in found]


def _order_by_annotations(store, found, tables):
    """Returns class names in the order of the ids: each photo's folder names the class whose id the table has."""
    folders = {}
    for split, (table, rows) in tables.items():
        places = {}
        for class_folder, name in found.photos[split]:
            places.setdefault(PurePosixPath(name).name, set()).add(class_folder)
        for row, file_name, _, class_id in rows:
            candidates = places.get(file_name, set())
            # A name that is in two folders tells nothing.
            if len(candidates) == 1 and folders.setdefault(class_id, *candidates) not in candidates:
                raise ValueError(
                    f"{store.place}/{table}, row {row}: expected the photos of class {class_id} in one folder, got "
                    f"{folders[class_id]!r} and {candidates.pop()!r}"
                )
    if sorted(folders) != list(range(1, len(folders) + 1)):
        raise ValueError(
            f"{store.place}: expected {_NAMES}, or photos of every class from 1 to {max(folders, default=0)} in the "
            f"tables, got those of {len(folders)} classes"
        )
    return check_class_names([folders[class_id] for class_id in sorted(folders)], store.place)


def _read_names(store, name):
    where = f"{store.place}/{name}"
    for row, fields in read_rows(store, name):
        if len(fields) != 1:
            raise ValueError(f"{where}, row {row}: expected one name, got {len(fields)} fields")
    return check_class_names([fields[0] for _, fields in read_rows(store, name)], where)


def _read_annotations(store, name):
    """Returns the name of a table, and its rows: number from 1, file name, box (0-based half-open), class from 1."""
    where, rows = f"{store.place}/{name}", []
    for row, fields in read_rows(store, name):
        try:
            file_name, *numbers = fields
            x1, y1, x2, y2, class_id = map(int, numbers)
        except ValueError:
            raise ValueError(
                f"{where}, row {row}: expected a file name and five whole numbers (x1, y1, x2, y2, class), got "
                f"{', '.join(fields)[:200]}"
            ) from None
        file_name = check_file_name(file_name, "a class's folder", f"{where}, row {row}")
        # The devkit's numbers, which count from 1 and include the last pixel.
        rows.append((row, file_name, (x1 - 1, y1 - 1, x2, y2), class_id))
    if not rows:
        raise ValueError(f"{where}: expected at least one annotated photo, got none")
    return name, rows
