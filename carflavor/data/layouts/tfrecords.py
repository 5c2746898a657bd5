"""TFRecord files as TensorFlow Datasets (TFDS) writes them. Importing this module loads TensorFlow.

    cars196-train.tfrecord-00000-of-00008    examples of image, label from 0, bbox and id
    cars196-test.tfrecord-00000-of-00008
    label.labels.txt                         a class name a line, in the order of the ids
    features.json

`bbox` is ymin, xmin, ymax, xmax in fractions of the photo.
"""

import math
import re
import struct
from pathlib import PurePosixPath

import tensorflow as tf
from google.protobuf.message import DecodeError

from carflavor.data.layouts.dataset import (
    Photo,
    build_dataset,
    check_class_names,
    check_shards,
    find_split,
    is_tfrecord,
    list_top,
    name_embedded,
    visible_names,
)
from carflavor.image import read_size

_LABELS = "label.labels.txt"
_SPLIT = re.compile(r"(?:^|[-_.])([A-Za-z]+)\.tfrecord")
# tfds.image_classification.Cars196 divides the devkit's corners as they are, which count from 1 and include the last
# pixel. Other datasets are expected to have corners from 0, the last one outside.
_COUNTS_FROM_ONE = re.compile(r"cars196-")
# A record is its length, a checksum of that, its content, and a checksum of that.
_HEADER_SIZE, _CHECKSUM_SIZE = 12, 4
_PIECE_SIZE = 1 << 20
_OWN_NAMES = ("image/filename", "file_name", "filename", "id")


def read_tfrecords(store):
    """Reads all TFRecord files of a dataset once, from beginning to end: labels are beside the photos in them.

    Boxes become pixels by the size in each photo's header. A photo whose header cannot be read has none.

    Raises:
        ValueError: If the files are not those of one dataset, or an example is not what TFDS writes.
    """
    names = [name for name in visible_names(store) if is_tfrecord(name)]
    if not names:
        raise ValueError(
            f"{store.place}: expected TFRecord files such as cars196-train.tfrecord-00000-of-00008, got "
            f"{list_top(store)}"
        )
    if len({PurePosixPath(name).parent for name in names}) > 1:
        raise ValueError(
            f"{store.place}: expected the TFRecord files of one dataset, got {names[0]} and {names[-1]}, which are in "
            f"different folders"
        )
    check_shards(store, names)
    rows = []
    for name in names:
        word = _SPLIT.search(PurePosixPath(name).name)
        split = find_split(word[1]) if word else None
        if split is None:
            raise ValueError(
                f"{store.place}/{name}: expected train, validation or test before .tfrecord, got {word and word[1]}"
            )
        rows += [(split, name, row, *values) for row, values in enumerate(_read_examples(store, name))]
    class_names, warnings = _read_class_names(store, PurePosixPath(names[0]).parent), []
    for split in ("validation", "test"):
        if (found := [row for row in rows if row[0] == split]) and all(row[4] == -1 for row in found):
            warnings.append(f"The {len(found):,} {split} photos have no labels and are left out")
            rows = [row for row in rows if row[0] != split]
    if class_names is None:
        warnings.append(f"There is no {_LABELS}: the classes are called by their numbers")
        class_names = [str(label) for label in range(len({row[4] for row in rows}))]
    for _, name, row, _, label, *_ in rows:
        if not 0 <= label < len(class_names):
            raise ValueError(
                f"{store.place}/{name}, row {row + 1}: expected a label from 0 to {len(class_names) - 1}, got {label}"
            )
    by_split = {}
    photo_names = name_embedded([row[:4] for row in rows])
    for photo_name, (split, name, row, _, label, box, _) in zip(photo_names, rows, strict=True):
        by_split.setdefault(split, []).append(Photo(photo_name, name, row, label, box))
    refused_boxes = [row[6] for row in rows if row[6]]
    return build_dataset(store, "tfrecord", class_names, by_split, warnings, refused_boxes)


class TFRecordPhotos:
    """The photos in a TFRecord file. How far a record is from the start is remembered as far as has been read.

    Args:
        store: `Store`.
        name: Name of the file in it.
    """

    def __init__(self, store, name):
        self._where = f"{store.place}/{name}"
        self._file = store.open(name)
        self._starts = [0]

    def read(self, row):
        """Returns the bytes of the photo in a record, counted from 0.

        Raises:
            ValueError: If the file is damaged.
        """
        while len(self._starts) <= row:
            self._file.seek(self._starts[-1])
            length = _read_length(self._file, f"{self._where}, row {len(self._starts)}")
            self._note_end(len(self._starts) - 1, length)
        where = f"{self._where}, row {row + 1}"
        self._file.seek(self._starts[row])
        length = _read_length(self._file, where)
        self._note_end(row, length)
        return _parse(_read_content(self._file, length, where), where)["image"].bytes_list.value[0]

    def _note_end(self, row, length):
        if len(self._starts) == row + 1:
            self._starts.append(self._starts[row] + _HEADER_SIZE + length + _CHECKSUM_SIZE)

    def close(self):
        self._file.close()


def _read_examples(store, name):
    """Returns own name or None, label, box, and the sentence that refuses it or None, of each example in a file."""
    found, where = [], f"{store.place}/{name}"
    counts_from_one = _COUNTS_FROM_ONE.match(PurePosixPath(name).name) is not None
    # From beginning to end without a step aside: inside an archive each would start anew.
    with store.open(name) as file:
        while (length := _read_length(file, here := f"{where}, row {len(found) + 1}")) is not None:
            features = _parse(_read_content(file, length, here), here)
            label = features["label"].int64_list.value if "label" in features else ()
            if len(label) != 1:
                raise ValueError(f"{here}: expected an example with one label, got {len(label)}")
            own_name = next((features[key].bytes_list.value for key in _OWN_NAMES if key in features), None)
            own_name = own_name[0].decode("utf-8", "replace") if own_name else None
            found.append((own_name, label[0], *_read_box(features, counts_from_one, here)))
    if not found:
        raise ValueError(f"{where}: expected at least one photo, got an empty file")
    return found


def _read_length(file, where):
    """Returns the length of the next record, or None at the end of the file."""
    header = file.read(_HEADER_SIZE)
    if not header:
        return None
    if len(header) < _HEADER_SIZE:
        raise ValueError(f"{where}: expected a record of a TFRecord file, got the end of the file")
    length, checksum = struct.unpack("<QI", header)
    if checksum != _masked_crc32c(header[:8]):
        raise ValueError(f"{where}: expected a record of a TFRecord file, got other bytes")
    return length


def _read_content(file, length, where):
    # In pieces: no memory is taken for a length that is only claimed.
    content = bytearray()
    while piece := file.read(min(length - len(content), _PIECE_SIZE)):
        content += piece
    # The content's own checksum is left alone: in Python it takes longer than decoding the photo, and a damaged photo
    # is noticed then.
    if len(content) < length or len(file.read(_CHECKSUM_SIZE)) < _CHECKSUM_SIZE:
        raise ValueError(f"{where}: expected a record of {length:,} bytes, got a file that is cut off")
    return bytes(content)


def _masked_crc32c(data):
    """Returns the checksum that TensorFlow writes: CRC-32C, turned and shifted (tensorflow/core/lib/hash/crc32c.h)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _parse(record, where):
    """Returns the features of an example with a photo."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise ValueError(f"{where}: expected a tf.train.Example, got {len(record):,} bytes of something else") from None
    if "image" not in features or len(features["image"].bytes_list.value) != 1:
        found = ", ".join(sorted(features)[:8])
        raise ValueError(f"{where}: expected an example with the bytes of one image, got {found or 'no features'}")
    return features


def _read_box(features, counts_from_one, where):
    numbers = list(features["bbox"].float_list.value) if "bbox" in features else []
    if not numbers:
        return None, None
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: expected a bbox of four numbers, got {numbers}")
    ymin, xmin, ymax, xmax = numbers
    refusal = None
    if not (0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1):
        refusal = (
            f"{where}: expected a bbox as ymin, xmin, ymax, xmax in fractions of the photo, got "
            f"{', '.join(f'{number:g}' for number in numbers)}"
        )
    try:
        width, height = read_size(features["image"].bytes_list.value[0])
    except ValueError:
        # The photo is refused when it is decoded.
        return None, refusal
    x1, y1, x2, y2 = round(xmin * width), round(ymin * height), round(xmax * width), round(ymax * height)
    return ((x1 - 1, y1 - 1, x2, y2) if counts_from_one else (x1, y1, x2, y2)), refusal


def _read_class_names(store, folder):
    name = (folder / _LABELS).as_posix()
    if name not in store.names:
        return None
    where = f"{store.place}/{name}"
    try:
        return check_class_names(store.read(name).decode("utf-8").splitlines(), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected names in UTF-8, got other bytes at position {error.start}") from None
