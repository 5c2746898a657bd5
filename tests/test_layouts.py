import numpy as np
import pytest
import scipy.io

from carflavor.data.layouts import Photo, read_dataset

BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
TRAIN = [
    # The first row of Stanford's own file, but for the class, and others with the types it has.
    (np.uint8(39), np.uint8(116), np.uint16(569), np.uint16(375), np.uint8(2), "00001.jpg"),
    (np.uint8(1), np.uint8(1), np.uint8(255), np.uint8(250), np.uint8(1), "Škoda 7.jpg"),
    (np.uint16(300), np.uint8(7), np.uint16(400), np.uint8(90), np.uint8(3), "00009.jpg"),
]
TEST = [(np.uint8(30), np.uint8(52), np.uint8(246), np.uint8(147), np.uint8(3), "00001.jpg")]
CLASS_NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Citroën DS5 2012"]


def write_annotations(path, rows, fields=(*BOX_FIELDS, "class", "fname")):
    annotations = np.empty((1, len(rows)), [(field, object) for field in fields])
    for number, row in enumerate(rows):
        annotations[0, number] = row
    scipy.io.savemat(path, {"annotations": annotations})


def write_devkit(folder, class_names, train, test=None):
    """Writes the .mat files of a Stanford devkit and the empty folders of its photos."""
    for name in ("devkit", "cars_train", "cars_test"):
        (folder / name).mkdir(parents=True)
    names = np.empty((1, len(class_names)), object)
    names[0] = class_names
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    write_annotations(folder / "devkit" / "cars_train_annos.mat", train)
    if test is not None:
        write_annotations(folder / "devkit" / "cars_test_annos_withlabels.mat", test)


@pytest.fixture
def source(tmp_path):
    write_devkit(tmp_path / "cars", CLASS_NAMES, TRAIN, TEST)
    return tmp_path / "cars"


@pytest.mark.parametrize("layout", ["auto", "devkit"])
def test_read_devkit(source, layout):
    dataset = read_dataset(source, layout)
    assert dataset.class_names == CLASS_NAMES
    assert dataset.train == [
        Photo(source / "cars_train" / "00001.jpg", "cars_train/00001.jpg", 1, (38, 115, 569, 375)),
        Photo(source / "cars_train" / "Škoda 7.jpg", "cars_train/Škoda 7.jpg", 0, (0, 0, 255, 250)),
        Photo(source / "cars_train" / "00009.jpg", "cars_train/00009.jpg", 2, (299, 6, 400, 90)),
    ]
    assert dataset.test == [Photo(source / "cars_test" / "00001.jpg", "cars_test/00001.jpg", 2, (29, 51, 246, 147))]
    # NumPy's small types would wrap in whatever is computed with them.
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


def test_a_missing_photo_folder_is_refused(source):
    (source / "cars_test").rmdir()
    with pytest.raises(ValueError) as error:
        read_dataset(source)
    assert str(error.value) == (
        f"{source}: expected the folder cars_test/ with the photos of cars_test_annos_withlabels.mat, "
        "got cars_train/, devkit/"
    )


def test_a_folder_of_another_layout_is_refused(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
    expected = (
        r"expected the Stanford devkit layout \(devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_train/\*.jpg\)"
    )
    with pytest.raises(ValueError, match=rf"^{tmp_path}: {expected}, got train/, valid/$"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/valid: {expected}, got an empty folder$"):
        read_dataset(tmp_path / "valid")


def test_a_source_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "cars.tgz").write_bytes(b"")
    with pytest.raises(ValueError, match="cars.tgz: expected a folder, got a file$"):
        read_dataset(tmp_path / "cars.tgz")
    with pytest.raises(ValueError, match="nowhere: expected a folder, got nothing$"):
        read_dataset(tmp_path / "nowhere")


def test_an_unknown_layout_is_refused(source):
    with pytest.raises(ValueError, match="^Expected layout to be one of auto, devkit. Received: layout='kaggle'$"):
        read_dataset(source, "kaggle")
