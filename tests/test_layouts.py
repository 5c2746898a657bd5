import hashlib

import numpy as np
import pytest
import scipy.io

from carflavor.data.layouts import LAYOUTS, Photo, PhotoReader, read_photo
from carflavor.data.layouts import read_dataset as read_store
from carflavor.data.stores import Store

BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
TRAIN = [
    # The first row of Stanford's own file, but for the class, and others with the types it has.
    (np.uint8(39), np.uint8(116), np.uint16(569), np.uint16(375), np.uint8(2), "00001.jpg"),
    (np.uint8(1), np.uint8(1), np.uint8(255), np.uint8(250), np.uint8(1), "Škoda 7.jpg"),
    (np.uint16(300), np.uint8(7), np.uint16(400), np.uint8(90), np.uint8(3), "00009.jpg"),
]
TEST = [(np.uint8(30), np.uint8(52), np.uint8(246), np.uint8(147), np.uint8(3), "00001.jpg")]
PHOTOS = ("cars_train/00001.jpg", "cars_train/Škoda 7.jpg", "cars_train/00009.jpg", "cars_test/00001.jpg")
CLASS_NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Citroën DS5 2012"]


def read_dataset(folder, layout="auto"):
    return read_store(Store(folder), layout)


def touch(folder, *names):
    """Makes files with their names as content."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")


def photo(name, label, box=None):
    """A photo that is a file of its own."""
    return Photo(name, name, None, label, box)


def write_annotations(path, rows, fields=(*BOX_FIELDS, "class", "fname")):
    scipy.io.savemat(path, {"annotations": struct(rows, fields)})


def struct(rows, fields):
    annotations = np.empty((1, len(rows)), [(field, object) for field in fields])
    for number, row in enumerate(rows):
        annotations[0, number] = row
    return annotations


def cell(texts):
    cells = np.empty((1, len(texts)), object)
    cells[0] = texts
    return cells


def write_devkit(folder, class_names, train, test=None):
    """Writes the .mat files of a Stanford devkit and the empty folders of its photos."""
    for name in ("devkit", "cars_train", "cars_test"):
        (folder / name).mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": cell(class_names)})
    write_annotations(folder / "devkit" / "cars_train_annos.mat", train)
    if test is not None:
        write_annotations(folder / "devkit" / "cars_test_annos_withlabels.mat", test)


@pytest.fixture
def source(tmp_path):
    write_devkit(tmp_path / "cars", CLASS_NAMES, TRAIN, TEST)
    touch(tmp_path / "cars", *PHOTOS)
    return tmp_path / "cars"


@pytest.mark.parametrize("layout", ["auto", "devkit"])
def test_read_devkit(source, layout):
    dataset = read_dataset(source, layout)
    assert dataset.class_names == CLASS_NAMES
    assert dataset.train == [
        photo("cars_train/00001.jpg", 1, (38, 115, 569, 375)),
        photo("cars_train/Škoda 7.jpg", 0, (0, 0, 255, 250)),
        photo("cars_train/00009.jpg", 2, (299, 6, 400, 90)),
    ]
    assert dataset.test == [photo("cars_test/00001.jpg", 2, (29, 51, 246, 147))]
    # NumPy's small types would wrap in whatever is computed with them.
    assert (dataset.layout, dataset.warnings, dataset.missing) == ("devkit", (), ())
    assert {type(number) for photo in dataset.train for number in (photo.label, *photo.box)} == {int}


def test_fields_are_found_by_name(source):
    rows = [(name, class_id, y2, x2, y1, x1) for x1, y1, x2, y2, class_id, name in TRAIN]
    fields = ("fname", "class", "bbox_y2", "bbox_x2", "bbox_y1", "bbox_x1")
    write_annotations(source / "devkit" / "cars_train_annos.mat", rows, fields)
    assert read_dataset(source).train[0].box == (38, 115, 569, 375)
    assert read_dataset(source).train[0].label == 1


def test_one_photo_and_one_class(tmp_path):
    # scipy squeezes a list of one to its element.
    write_devkit(tmp_path / "cars", ["Only Car 2012"], [(*TRAIN[0][:4], np.uint8(1), "a.jpg")])
    touch(tmp_path / "cars", "cars_train/a.jpg")
    dataset = read_dataset(tmp_path / "cars")
    assert dataset.class_names == ["Only Car 2012"]
    assert [(photo.name, photo.label, photo.box) for photo in dataset.train] == [
        ("cars_train/a.jpg", 0, (38, 115, 569, 375))
    ]
    assert dataset.test is None


def test_two_classes_of_one_name_are_refused(tmp_path):
    # After the spaces around them are gone.
    write_devkit(tmp_path / "cars", ["Audi A4", "BMW M3", "Audi A4 "], TRAIN)
    with pytest.raises(ValueError, match="cars_meta.mat: expected different class names, got 'Audi A4' more than once"):
        read_dataset(tmp_path / "cars")


def test_test_photos_without_class_are_no_test_split(source):
    (source / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    rows = [(*row[:4], row[5]) for row in TEST]
    write_annotations(source / "devkit" / "cars_test_annos.mat", rows, (*BOX_FIELDS, "fname"))
    assert read_dataset(source).test is None


def test_digest_tells_sources_apart(tmp_path):
    moved = [(*TRAIN[0][:3], np.uint16(376), *TRAIN[0][4:]), *TRAIN[1:]]
    write_devkit(tmp_path / "one", CLASS_NAMES, TRAIN, TEST)
    write_devkit(tmp_path / "same", CLASS_NAMES, TRAIN, TEST)
    write_devkit(tmp_path / "moved", CLASS_NAMES, moved, TEST)
    write_devkit(tmp_path / "renamed", [*CLASS_NAMES[:2], "Citroen DS5 2012"], TRAIN, TEST)
    for name in ("one", "same", "moved", "renamed"):
        touch(tmp_path / name, *PHOTOS)
    digests = {name: read_dataset(tmp_path / name).digest for name in ("one", "same", "moved", "renamed")}
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((1, 1, 9, 9, 4, "a.jpg"), "row 2: expected a class from 1 to 3, got 4"),
        ((1, 1, 9, 9, 0, "a.jpg"), "row 2: expected a class from 1 to 3, got 0"),
        (
            (1, 1, 9, 9, 1, "../../secret.jpg"),
            "row 2: expected the name of a file in cars_train/, got '../../secret.jpg'",
        ),
        ((1, 1, 9, 9, 1, "/etc/passwd"), "row 2: expected the name of a file in cars_train/, got '/etc/passwd'"),
        (
            (1, 1, np.nan, 9, 1, "a.jpg"),
            "row 2: expected numbers, got bbox_x1=1, bbox_y1=1, bbox_x2=nan, bbox_y2=9, class=1",
        ),
        (
            (1, 1, 9, 9, np.array([]), "a.jpg"),
            "row 2: expected numbers, got bbox_x1=1, bbox_y1=1, bbox_x2=9, bbox_y2=9, class=[]",
        ),
    ],
)
def test_a_bad_row_is_refused(source, row, message):
    path = source / "devkit" / "cars_train_annos.mat"
    write_annotations(path, [TRAIN[0], row])
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value) == f"{path}, {message}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1",
        b"<!DOCTYPE html><html>" * 50,
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384),
    ],
    ids=["empty", "git-lfs pointer", "html", "Matlab 7.3"],
)
@pytest.mark.parametrize("name", ["cars_train_annos.mat", "cars_meta.mat"])
def test_a_file_that_is_no_mat_is_refused(source, name, content):
    path = source / "devkit" / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value).startswith(f"{path}: expected a Matlab file, got one that scipy cannot read: ")


def test_missing_annotations_are_refused(source):
    (source / "devkit" / "cars_train_annos.mat").unlink()
    with pytest.raises(ValueError, match="cars_train_annos.mat: expected a file of the Stanford devkit, got nothing$"):
        read_dataset(source)


def test_a_mat_that_was_cut_off_is_refused(source):
    path = source / "devkit" / "cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(
        ValueError, match="cars_train_annos.mat: expected a Matlab file, got one that scipy cannot read"
    ):
        read_dataset(source)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"annos": 1}, "expected a variable annotations, got annos"),
        (
            {"annotations": [1, 2]},
            "expected annotations with bbox_x1, bbox_y1, bbox_x2, bbox_y2, class, fname, got no fields",
        ),
        (
            {"annotations": {"fname": "a.jpg", "class": 1}},
            "expected annotations with bbox_x1, bbox_y1, bbox_x2, bbox_y2, class, fname, got fname, class",
        ),
        (
            {"annotations": np.empty((1, 0), [(field, object) for field in (*BOX_FIELDS, "class", "fname")])},
            "expected at least one annotated photo, got none",
        ),
    ],
    ids=["another variable", "no struct", "fields missing", "no rows"],
)
def test_a_mat_of_something_else_is_refused(source, variables, message):
    path = source / "devkit" / "cars_train_annos.mat"
    scipy.io.savemat(path, variables)
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value) == f"{path}: {message}"


def test_photos_without_a_file_are_kept_and_listed(source):
    (source / "cars_train" / "00009.jpg").unlink()
    (source / "cars_test" / "00001.jpg").unlink()
    dataset = read_dataset(source)
    assert [photo.name for photo in dataset.train] == list(PHOTOS[:3])
    assert [photo.name for photo in dataset.test] == ["cars_test/00001.jpg"]
    assert dataset.missing == ("cars_train/00009.jpg", "cars_test/00001.jpg")
    assert dataset.warnings == ("2 of 4 labelled photos have no file: cars_train/00009.jpg, cars_test/00001.jpg",)
    with pytest.raises(FileNotFoundError):
        read_photo(Store(source), dataset.train[2])


def test_a_missing_photo_folder_is_refused(source):
    for name in PHOTOS[:3]:
        (source / name).unlink()
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value) == (
        f"{source}: expected the folder cars_train/ with the photos of cars_train_annos.mat, got cars_test/, devkit/"
    )


def test_photos_without_a_label_are_said(source):
    touch(source, "cars_train/00002.jpg", "cars_train/._00001.jpg", "cars_train/Thumbs.db", "cars_test/1/00001.jpg")
    assert read_dataset(source).warnings == (
        "1 photos in cars_train/ are not in devkit/cars_train_annos.mat and are left out",
    )


def test_a_photo_that_is_named_twice_is_refused(source):
    path = source / "devkit" / "cars_train_annos.mat"
    write_annotations(path, [*TRAIN, (1, 1, 9, 9, 3, "00001.jpg")])
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value) == (
        f"{path}, row 4: expected each photo once, got cars_train/00001.jpg again, which is in row 1"
    )


@pytest.mark.parametrize(
    ("train", "test", "meta", "train_annos", "test_annos"),
    [
        (
            "cars_train/cars_train",
            "cars_test/cars_test",
            "car_devkit/devkit/cars_meta.mat",
            "car_devkit/devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels (1).mat",
        ),
        (
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
        ),
        (
            "stanford-cars-dataset/cars_train/cars_train",
            "stanford-cars-dataset/cars_test/cars_test",
            "stanford-cars-dataset-meta/devkit/cars_meta.mat",
            "stanford-cars-dataset-meta/devkit/cars_train_annos.mat",
            "stanford-cars-dataset-meta/cars_test_annos_withlabels (1).mat",
        ),
        (
            "cars_train",
            "cars_test",
            "cars_meta.mat",
            "cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "devkit"])
def test_nested_copies(tmp_path, layout, train, test, meta, train_annos, test_annos):
    touch(tmp_path, f"{train}/00001.jpg", f"{train}/Škoda 7.jpg", f"{train}/00009.jpg", f"{test}/00001.jpg")
    for name in (meta, train_annos, test_annos):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(tmp_path / meta, {"class_names": cell(CLASS_NAMES)})
    write_annotations(tmp_path / train_annos, TRAIN)
    write_annotations(tmp_path / test_annos, TEST)
    dataset = read_dataset(tmp_path, layout)
    assert (dataset.class_names, dataset.layout, dataset.warnings) == (CLASS_NAMES, "devkit", ())
    assert dataset.train == [
        photo(f"{train}/00001.jpg", 1, (38, 115, 569, 375)),
        photo(f"{train}/Škoda 7.jpg", 0, (0, 0, 255, 250)),
        photo(f"{train}/00009.jpg", 2, (299, 6, 400, 90)),
    ]
    assert dataset.test == [photo(f"{test}/00001.jpg", 2, (29, 51, 246, 147))]
    assert read_photo(Store(tmp_path), dataset.test[0]) == f"{test}/00001.jpg".encode()


def test_the_plain_one_of_two_label_files_is_read(source):
    rows = [(*TEST[0][:4], np.uint8(1), TEST[0][5])]
    write_annotations(source / "devkit" / "cars_test_annos_withlabels (1).mat", rows)
    dataset = read_dataset(source)
    assert dataset.test[0].label == 2
    assert dataset.warnings == (
        "Of 2 files with the labels of test photos, devkit/cars_test_annos_withlabels.mat is read",
    )


# Names, fields and types as in Stanford's own file.
SINGLE_FIELDS = ("relative_im_path", *BOX_FIELDS, "class", "test")
SINGLE = [
    ("car_ims/000001.jpg", np.uint8(112), np.uint8(7), np.uint16(853), np.uint16(717), np.uint8(1), np.uint8(0)),
    ("car_ims/000002.jpg", np.uint8(48), np.uint8(24), np.uint16(441), np.uint16(202), np.uint8(1), np.uint8(1)),
    ("car_ims/000003.jpg", np.uint8(7), np.uint8(4), np.uint16(277), np.uint8(180), np.uint8(2), np.uint8(0)),
    ("car_ims/016185.jpg", np.uint8(33), np.uint8(27), np.uint16(602), np.uint16(252), np.uint8(2), np.uint8(1)),
]


def write_single(folder, rows=SINGLE, fields=SINGLE_FIELDS):
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"annotations": struct(rows, fields), "class_names": cell(CLASS_NAMES[:2])}
    scipy.io.savemat(folder / "cars_annos.mat", variables)


@pytest.mark.parametrize("folder", ["car_ims", "car_ims/car_ims"])
@pytest.mark.parametrize("layout", ["auto", "cars_annos"])
def test_read_cars_annos(tmp_path, layout, folder):
    write_single(tmp_path)
    touch(tmp_path, *(f"{folder}/{number:06d}.jpg" for number in (1, 2, 3, 16185)))
    dataset = read_dataset(tmp_path, layout)
    assert (dataset.class_names, dataset.layout, dataset.warnings) == (CLASS_NAMES[:2], "cars_annos", ())
    assert dataset.train == [
        photo(f"{folder}/000001.jpg", 0, (111, 6, 853, 717)),
        photo(f"{folder}/000003.jpg", 1, (6, 3, 277, 180)),
    ]
    assert dataset.test == [
        photo(f"{folder}/000002.jpg", 0, (47, 23, 441, 202)),
        photo(f"{folder}/016185.jpg", 1, (32, 26, 602, 252)),
    ]


@pytest.mark.parametrize("layout", ["auto", "cars_annos"])
def test_cars_annos_beside_photos_of_the_other_numbering_is_refused(tmp_path, layout):
    write_single(tmp_path)
    touch(tmp_path, "cars_train/cars_train/00001.jpg", "cars_test/cars_test/00001.jpg")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path, layout)
    assert str(error.value) == (
        f"{tmp_path}/cars_annos.mat: expected car_ims/000001.jpg and so on, whose photos this file labels, got "
        f"cars_train/ or cars_test/, whose numbers mean other photos, so that every label would be wrong: they need "
        f"devkit/cars_train_annos.mat and devkit/cars_meta.mat"
    )


def test_cars_annos_beside_a_whole_devkit_is_left_alone(source):
    write_single(source)
    dataset = read_dataset(source)
    assert (dataset.layout, len(dataset.train)) == ("devkit", 3)
    assert dataset.warnings == (
        "cars_annos.mat is not read: it numbers the photos of car_ims/, in another order than "
        "devkit/cars_train_annos.mat",
    )


def test_a_devkit_beside_car_ims_is_left_alone(source):
    write_single(source)
    for name in PHOTOS:
        (source / name).unlink()
    touch(source, *(row[0] for row in SINGLE))
    dataset = read_dataset(source)
    assert (dataset.layout, len(dataset.train), len(dataset.test)) == ("cars_annos", 2, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("car_ims/../../1.jpg", 1, 1, 9, 9, 1, 0),
            "row 1: expected the name of a file in car_ims/, got 'car_ims/../../1.jpg'",
        ),
        (
            ("cars_train/1.jpg", 1, 1, 9, 9, 1, 0),
            "row 1: expected the name of a file in car_ims/, got 'cars_train/1.jpg'",
        ),
        (("car_ims/1.jpg", 1, 1, 9, 9, 3, 0), "row 1: expected a class from 1 to 2, got 3"),
        (("car_ims/1.jpg", 1, 1, 9, 9, 1, 2), "row 1: expected test to be 0 or 1, got 2"),
        (
            ("car_ims/1.jpg", 1, "x", 9, 9, 1, 0),
            "row 1: expected numbers, got bbox_x1=1, bbox_y1=x, bbox_x2=9, bbox_y2=9, class=1",
        ),
    ],
)
def test_a_bad_row_of_cars_annos_is_refused(tmp_path, row, message):
    write_single(tmp_path, [row])
    touch(tmp_path, "car_ims/1.jpg")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}/cars_annos.mat, {message}"


def test_cars_annos_with_the_fields_of_another_file_is_refused(tmp_path):
    write_single(tmp_path, TRAIN, (*BOX_FIELDS, "class", "fname"))
    touch(tmp_path, "car_ims/000001.jpg")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/cars_annos.mat: expected annotations with bbox_x1, bbox_y1, bbox_x2, bbox_y2, class, "
        f"relative_im_path, test, got bbox_x1, bbox_y1, bbox_x2, bbox_y2, class, fname"
    )


def test_an_unknown_place_is_refused(tmp_path):
    expected = (
        "expected one of the layouts devkit, cars_annos, anno_csv, tfrecord, huggingface, table, folders "
        "(devkit/cars_meta.mat with cars_train/*.jpg, cars_annos.mat with car_ims/*.jpg, train/<class>/*.jpg, Parquet "
        "or TFRecord files with photos inside, or a table with columns such as path and label)"
    )
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}: {expected}, got an empty folder"
    # Photos whose labels are not there; that they are in two folders makes no classes.
    touch(tmp_path, "cars_train/00001.jpg", "cars_test/00001.jpg", "notes.txt")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}: {expected}, got cars_test/, cars_train/, notes.txt"


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_place_of_another_layout_is_refused(tmp_path, layout):
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: expected .*, got notes.txt$"):
        read_dataset(tmp_path, layout)


def test_the_devkit_by_name_says_what_it_needs(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "valid/a/1.jpg")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path, "devkit")
    assert str(error.value) == (
        f"{tmp_path}: expected the Stanford devkit layout (devkit/cars_meta.mat, devkit/cars_train_annos.mat, "
        f"cars_train/*.jpg), got train/, valid/"
    )


def test_an_unknown_layout_is_refused(source):
    message = (
        "^Expected layout to be one of auto, devkit, cars_annos, anno_csv, tfrecord, huggingface, table, folders. "
        "Received: layout='kaggle'$"
    )
    with pytest.raises(ValueError, match=message):
        read_dataset(source, "kaggle")


def test_two_layouts_in_one_place(source):
    touch(source, "car_data/train/Audi/1.jpg", "car_data/train/BMW/1.jpg", "names.csv")
    dataset = read_dataset(source)
    assert (dataset.layout, len(dataset.train)) == ("devkit", 3)
    assert dataset.warnings == (f"{source} is read as layout=devkit, and might be read as anno_csv",)


def test_the_digest_is_that_of_earlier_versions(source):
    # Record files carry it.
    text = repr(CLASS_NAMES) + (
        "cars_train/00001.jpg 1 (38, 115, 569, 375)\ncars_train/Škoda 7.jpg 0 (0, 0, 255, 250)\n"
        "cars_train/00009.jpg 2 (299, 6, 400, 90)\ncars_test/00001.jpg 2 (29, 51, 246, 147)\n"
    )
    assert read_dataset(source).digest == hashlib.sha256(text.encode()).hexdigest()


def test_reading_photos(source):
    dataset, store = read_dataset(source), Store(source)
    with PhotoReader(store) as reader:
        assert [reader.read(photo) for photo in dataset.train] == [name.encode() for name in PHOTOS[:3]]
    assert dataset.train[0].place == "cars_train/00001.jpg"
