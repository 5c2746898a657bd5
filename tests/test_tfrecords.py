import io
import struct
import subprocess
import sys

import pytest
import tensorflow as tf
from PIL import Image
from test_layouts import read_dataset, touch

from carflavor.data.layouts import Photo, PhotoReader, read_photo
from carflavor.data.layouts import read_dataset as read_store
from carflavor.data.stores import Store

# The numbers of the devkit's first photo, 600 x 400 pixels, as tfds.image_classification.Cars196 divides them:
# ymin, xmin, ymax, xmax.
BOX = [116 / 400, 39 / 600, 375 / 400, 569 / 600]
LABELS = "AM General Hummer SUV 2000\nAcura RL Sedan 2012\nRam C/V Cargo Van Minivan 2012\n"
NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]
TRAIN = ("cars196-train.tfrecord-00000-of-00002", "cars196-train.tfrecord-00001-of-00002")
TEST = "cars196-test.tfrecord-00000-of-00001"


def encode(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTO, SMALL = encode(600, 400), encode(60, 40)


def example(image=PHOTO, label=0, bbox=BOX, **texts):
    features = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text])) for name, text in texts.items()}
    if image is not None:
        features["image"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
    if label is not None:
        features["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    if bbox is not None:
        features["bbox"] = tf.train.Feature(float_list=tf.train.FloatList(value=bbox))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write(path, *examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in examples:
            writer.write(record)


@pytest.fixture
def cars196(tmp_path):
    folder = tmp_path / "cars196" / "2.1.0"
    write(folder / TRAIN[0], example(label=2, id=b"00001"), example(SMALL, 0, None, id=b"00002"))
    write(folder / TRAIN[1], example(label=1, bbox=[1 / 400, 1 / 600, 1, 1], id=b"00003"))
    write(folder / TEST, example(label=2, id=b"00001"))
    (folder / "label.labels.txt").write_text(LABELS, "utf-8")
    touch(folder, "dataset_info.json", "features.json")
    return folder


@pytest.mark.parametrize("layout", ["auto", "tfrecord"])
@pytest.mark.parametrize("levels", [0, 2])
def test_cars196(cars196, layout, levels):
    place, before = (cars196, "") if levels == 0 else (cars196.parents[1], "cars196/2.1.0/")
    dataset = read_dataset(place, layout)
    assert (dataset.class_names, dataset.layout) == (NAMES, "tfrecord")
    # The devkit's 39 and 116 count from 1.
    assert dataset.train == [
        Photo("train/00001", before + TRAIN[0], 0, 2, (38, 115, 569, 375)),
        Photo("train/00002", before + TRAIN[0], 1, 0, None),
        Photo("train/00003", before + TRAIN[1], 0, 1, (0, 0, 600, 400)),
    ]
    assert dataset.test == [Photo("test/00001", before + TEST, 0, 2, (38, 115, 569, 375))]
    assert {type(number) for number in (dataset.train[0].label, *dataset.train[0].box)} == {int}
    assert (dataset.warnings, dataset.missing) == ((), ())


def test_photos_of_cars196(cars196):
    dataset, store = read_dataset(cars196), Store(cars196)
    photos = [*dataset.train, *dataset.test]
    with PhotoReader(store) as reader:
        for row in (0, 1, 2, 3, 1, 0, 3, 2):
            assert reader.read(photos[row]) == (SMALL if row == 1 else PHOTO)
    assert read_photo(store, dataset.train[1]) == SMALL


def test_photos_are_found_in_any_order(tmp_path):
    photos = [encode(width, 10) for width in range(10, 16)]
    write(tmp_path / "mine-train.tfrecord", *(example(photo) for photo in photos))
    dataset = read_dataset(tmp_path)
    with PhotoReader(Store(tmp_path)) as reader:
        for row in (2, 0, 2, 1, 5, 0, 3, 4):
            assert reader.read(dataset.train[row]) == photos[row]


def test_another_dataset_counts_from_zero(tmp_path):
    write(tmp_path / "mine-train.tfrecord", example(bbox=[0.25, 0.125, 0.5, 0.75]), example(label=1, bbox=[]))
    write(tmp_path / "mine-validation.tfrecord", example(label=1, bbox=[0, 0, 1, 1]))
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == ["0", "1"]
    assert dataset.train == [
        Photo("mine-train.tfrecord#0", "mine-train.tfrecord", 0, 0, (75, 100, 450, 200)),
        Photo("mine-train.tfrecord#1", "mine-train.tfrecord", 1, 1, None),
    ]
    assert dataset.test == [Photo("mine-validation.tfrecord#0", "mine-validation.tfrecord", 0, 1, (0, 0, 600, 400))]
    assert dataset.warnings == (
        "There is no label.labels.txt: the classes are called by their numbers",
        "There are no labelled test photos: the 1 for validation are used as such",
    )


def test_corners_of_large_photos_come_back_exactly(tmp_path):
    # float32 has 24 bits.
    corners = [(4999, 6999, 5001, 7001), (1, 1, 2, 2), (3333, 17, 7777, 9999)]
    photo = encode(10_000, 10_000)
    rows = [example(photo, 0, [y1 / 10_000, x1 / 10_000, y2 / 10_000, x2 / 10_000]) for x1, y1, x2, y2 in corners]
    write(tmp_path / "mine-train.tfrecord", *rows)
    assert [photo.box for photo in read_dataset(tmp_path).train] == corners


def test_a_photo_that_is_none_is_kept(tmp_path):
    # What reads it says so.
    write(tmp_path / "mine-train.tfrecord", example(b"no photo"))
    dataset = read_dataset(tmp_path)
    assert dataset.train[0].box is None
    assert read_photo(Store(tmp_path), dataset.train[0]) == b"no photo"


def test_test_photos_without_labels_are_no_test_split(cars196):
    write(cars196 / TEST, example(label=-1), example(label=-1))
    dataset = read_dataset(cars196)
    assert dataset.test is None
    assert dataset.warnings == ("The 2 test photos have no labels and are left out",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (example(label=3), "expected a label from 0 to 2, got 3"),
        (example(label=-1), "expected a label from 0 to 2, got -1"),
        (example(label=None), "expected an example with one label, got 0"),
        (example(image=None), "expected an example with the bytes of one image, got bbox, label"),
        (b"", "expected an example with the bytes of one image, got no features"),
        (b"no example", "expected a tf.train.Example, got 10 bytes of something else"),
        (example(bbox=[0.1, 0.2, 0.3]), "expected a bbox of four numbers, got [0.10000000149011612"),
        (example(bbox=[0.1, 0.2, float("nan"), 0.5]), "expected a bbox of four numbers, got [0.10000000149011612"),
        (
            example(bbox=[116, 39, 375, 569]),
            "expected a bbox as ymin, xmin, ymax, xmax in fractions of the photo, got 116, 39, 375, 569",
        ),
        (
            example(bbox=[0.5, 0.2, 0.25, 0.5]),
            "expected a bbox as ymin, xmin, ymax, xmax in fractions of the photo, got 0.5, 0.2, 0.25, 0.5",
        ),
    ],
)
def test_an_example_that_is_wrong_is_refused(cars196, record, message):
    write(cars196 / TRAIN[1], example(), record)
    with pytest.raises(ValueError) as error:
        read_dataset(cars196)
    assert str(error.value).startswith(f"{cars196}/{TRAIN[1]}, row 2: {message}")


def test_boxes_that_are_none_can_be_told_of(tmp_path):
    bbox = [[0.5, 0.25, 0.25, 0.5], [116, 39, 375, 569], [0.25, 0.25, 0.5, 0.5]]
    write(tmp_path / "mine-train.tfrecord", *(example(bbox=numbers) for numbers in bbox))
    dataset = read_store(Store(tmp_path), refuse_boxes=False)
    assert [photo.box for photo in dataset.train] == [
        (150, 200, 300, 100),
        (39 * 600, 116 * 400, 569 * 600, 375 * 400),
        (150, 100, 300, 200),
    ]
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert [str(error.value)] == list(dataset.refused_boxes[:1])
    assert len(dataset.refused_boxes) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", ": expected at least one photo, got an empty file"),
        (lambda data: data[:-1], ", row 1: expected a record of "),
        (lambda data: data + b"\0" * 5, ", row 2: expected a record of a TFRecord file, got the end of the file"),
        (lambda data: data + b"\0" * 20, ", row 2: expected a record of a TFRecord file, got other bytes"),
        (
            lambda data: b"version https://git-lfs.github.com",
            ", row 1: expected a record of a TFRecord file, got other",
        ),
        # A length of 2^60 with its right checksum: no memory is taken for it.
        (
            lambda data: struct.pack("<Q", 2**60) + b"\xc4\x23\x4e\x8e" + data[12:],
            ", row 1: expected a record of 1,152,921,504,606,846,976 bytes, got a file that is cut off",
        ),
    ],
)
def test_a_file_that_is_damaged_is_refused(cars196, spoil, message):
    path = cars196 / TRAIN[1]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        read_dataset(cars196)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_missing_part_is_refused(cars196):
    (cars196 / TRAIN[1]).unlink()
    with pytest.raises(ValueError) as error:
        read_dataset(cars196)
    assert str(error.value) == f"{cars196}/{TRAIN[1]}: expected one of 2 files of a split, got nothing"


def test_two_versions_are_refused(cars196):
    write(cars196.parent / "2.0.0" / TEST, example())
    with pytest.raises(ValueError) as error:
        read_dataset(cars196.parent)
    assert str(error.value) == (
        f"{cars196.parent}: expected the TFRecord files of one dataset, got 2.0.0/{TEST} and 2.1.0/{TRAIN[1]}, which "
        f"are in different folders"
    )


def test_a_split_of_another_name_is_refused(cars196):
    write(cars196 / "cars196-unsupervised.tfrecord", example())
    with pytest.raises(ValueError) as error:
        read_dataset(cars196)
    assert str(error.value) == (
        f"{cars196}/cars196-unsupervised.tfrecord: expected train, validation or test before .tfrecord, got "
        f"unsupervised"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected names of classes, got none"),
        (b"a\n\nb\n", "expected names of classes, got an empty one"),
        (b"a\nb\na\n", "expected different class names, got 'a' more than once"),
        ("a\nCitroën\n".encode("latin-1"), "expected names in UTF-8, got other bytes at position 7"),
    ],
)
def test_class_names_that_are_wrong_are_refused(cars196, text, message):
    (cars196 / "label.labels.txt").write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_dataset(cars196)
    assert str(error.value) == f"{cars196}/label.labels.txt: {message}"


def test_other_layouts_do_not_load_tensorflow(clean_environment):
    code = "import carflavor.data.layouts, sys; print('tensorflow' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**clean_environment, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert process.stdout == "False\n", process.stderr
