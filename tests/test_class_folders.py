import pytest
from test_layouts import photo, read_dataset, touch

# Some of Stanford's classes in the devkit's order, which is not the sorted one.
NAMES = """\
AM General Hummer SUV 2000
Acura Integra Type R 2001
Audi TTS Coupe 2012
Audi TT Hatchback 2011
Ram C/V Cargo Van Minivan 2012
smart fortwo Convertible 2012
"""
KAGGLE = [
    "car_data/car_data/train/AM General Hummer SUV 2000/00462.jpg",
    "car_data/car_data/train/Acura Integra Type R 2001/00198.jpg",
    "car_data/car_data/train/Audi TT Hatchback 2011/00001.jpg",
    "car_data/car_data/train/Audi TTS Coupe 2012/00002.jpg",
    "car_data/car_data/train/Ram C-V Cargo Van Minivan 2012/00094.jpg",
    "car_data/car_data/train/smart fortwo Convertible 2012/00158.jpg",
    "car_data/car_data/test/Audi TT Hatchback 2011/00001.jpg",
    "car_data/car_data/test/Ram C-V Cargo Van Minivan 2012/00316.jpg",
]
ANNO_TRAIN = """\
00001.jpg,39,116,569,375,4
00002.jpg,36,116,868,587,3
00094.jpg,10,20,300,200,5
00158.jpg,1,1,64,48,6
00198.jpg,85,109,601,381,2
00462.jpg,621,393,1484,1096,1
"""
ANNO_TEST = """\
00316.jpg,30,52,246,147,5
00001.jpg,100,19,576,203,4
"""
TRAIN = "car_data/car_data/train"
TEST = "car_data/car_data/test"
CLASS_NAMES = [
    "AM General Hummer SUV 2000",
    "Acura Integra Type R 2001",
    "Audi TTS Coupe 2012",
    "Audi TT Hatchback 2011",
    "Ram C/V Cargo Van Minivan 2012",
    "smart fortwo Convertible 2012",
]


def write(folder, **tables):
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text, "utf-8")


@pytest.fixture
def kaggle(tmp_path):
    touch(tmp_path, *KAGGLE)
    write(tmp_path, names=NAMES, anno_train=ANNO_TRAIN, anno_test=ANNO_TEST)
    return tmp_path


@pytest.mark.parametrize("layout", ["auto", "anno_csv"])
def test_kaggle(kaggle, layout):
    dataset = read_dataset(kaggle, layout)
    assert (dataset.class_names, dataset.layout) == (CLASS_NAMES, "anno_csv")
    assert dataset.train == [
        photo(f"{TRAIN}/Audi TT Hatchback 2011/00001.jpg", 3, (38, 115, 569, 375)),
        photo(f"{TRAIN}/Audi TTS Coupe 2012/00002.jpg", 2, (35, 115, 868, 587)),
        photo(f"{TRAIN}/Ram C-V Cargo Van Minivan 2012/00094.jpg", 4, (9, 19, 300, 200)),
        photo(f"{TRAIN}/smart fortwo Convertible 2012/00158.jpg", 5, (0, 0, 64, 48)),
        photo(f"{TRAIN}/Acura Integra Type R 2001/00198.jpg", 1, (84, 108, 601, 381)),
        photo(f"{TRAIN}/AM General Hummer SUV 2000/00462.jpg", 0, (620, 392, 1484, 1096)),
    ]
    assert dataset.test == [
        photo(f"{TEST}/Ram C-V Cargo Van Minivan 2012/00316.jpg", 4, (29, 51, 246, 147)),
        photo(f"{TEST}/Audi TT Hatchback 2011/00001.jpg", 3, (99, 18, 576, 203)),
    ]
    assert (dataset.warnings, dataset.missing) == ((), ())


def test_kaggle_with_names_alone(kaggle):
    (kaggle / "anno_train.csv").unlink()
    (kaggle / "anno_test.csv").unlink()
    dataset = read_dataset(kaggle)
    assert (dataset.class_names, dataset.layout) == (CLASS_NAMES, "anno_csv")
    assert [(photo.name[len(TRAIN) + 1 :], photo.label, photo.box) for photo in dataset.train] == [
        ("AM General Hummer SUV 2000/00462.jpg", 0, None),
        ("Acura Integra Type R 2001/00198.jpg", 1, None),
        ("Audi TT Hatchback 2011/00001.jpg", 3, None),
        ("Audi TTS Coupe 2012/00002.jpg", 2, None),
        ("Ram C-V Cargo Van Minivan 2012/00094.jpg", 4, None),
        ("smart fortwo Convertible 2012/00158.jpg", 5, None),
    ]
    assert [photo.label for photo in dataset.test] == [3, 4]
    assert dataset.warnings == (
        f"No table has the photos of {TRAIN}/: they have no boxes",
        f"No table has the photos of {TEST}/: they have no boxes",
    )


def test_kaggle_without_names_has_the_ids_of_the_tables(kaggle):
    (kaggle / "names.csv").unlink()
    dataset = read_dataset(kaggle)
    assert dataset.class_names == [*CLASS_NAMES[:4], "Ram C-V Cargo Van Minivan 2012", CLASS_NAMES[5]]
    assert [photo.label for photo in dataset.train] == [3, 2, 4, 5, 1, 0]
    assert [photo.label for photo in dataset.test] == [4, 3]


def test_kaggle_without_tables_is_read_as_folders(kaggle):
    for name in ("anno_train.csv", "anno_test.csv", "names.csv"):
        (kaggle / name).unlink()
    dataset = read_dataset(kaggle)
    assert dataset.layout == "folders"
    assert dataset.class_names == [
        "AM General Hummer SUV 2000",
        "Acura Integra Type R 2001",
        "Audi TT Hatchback 2011",
        "Audi TTS Coupe 2012",
        "Ram C-V Cargo Van Minivan 2012",
        "smart fortwo Convertible 2012",
    ]
    assert [photo.label for photo in dataset.test] == [2, 4]


def test_kaggle_by_name_as_folders_leaves_the_tables_alone(kaggle):
    assert read_dataset(kaggle, "folders").train[0].box is None


def test_kaggle_without_test_photos(kaggle):
    for name in KAGGLE[-2:]:
        (kaggle / name).unlink()
    (kaggle / "anno_test.csv").unlink()
    assert read_dataset(kaggle).test is None


def test_kaggle_with_photos_without_files_and_without_rows(kaggle):
    (kaggle / KAGGLE[4]).unlink()
    touch(kaggle, f"{TRAIN}/Audi TTS Coupe 2012/00003.jpg")
    dataset = read_dataset(kaggle)
    assert dataset.missing == (KAGGLE[4],)
    assert dataset.train[2] == photo(KAGGLE[4], 4, (9, 19, 300, 200))
    assert dataset.warnings == (
        f"1 photos in {TRAIN}/ are not in anno_train.csv and are left out",
        f"1 of 8 labelled photos have no file: {KAGGLE[4]}",
    )


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"anno_train": "00001.jpg,39,116,569,375\n"},
            "anno_train.csv, row 1: expected a file name and five whole numbers (x1, y1, x2, y2, class), got "
            "00001.jpg, 39, 116, 569, 375",
        ),
        (
            {"anno_train": ANNO_TRAIN + "00003.jpg,1,1,x,9,1\n"},
            "anno_train.csv, row 7: expected a file name and five whole numbers (x1, y1, x2, y2, class), got "
            "00003.jpg, 1, 1, x, 9, 1",
        ),
        (
            {"anno_train": "fname,bbox_x1,bbox_y1,bbox_x2,bbox_y2,class\n"},
            "anno_train.csv, row 1: expected a file name and five whole numbers (x1, y1, x2, y2, class), got "
            "fname, bbox_x1, bbox_y1, bbox_x2, bbox_y2, class",
        ),
        ({"anno_train": ""}, "anno_train.csv: expected at least one annotated photo, got none"),
        ({"anno_train": "00001.jpg,1,1,9,9,7"}, "anno_train.csv, row 1: expected a class from 1 to 6, got 7"),
        ({"anno_train": "00001.jpg,1,1,9,9,0"}, "anno_train.csv, row 1: expected a class from 1 to 6, got 0"),
        (
            {"anno_train": "../../../secret.jpg,1,1,9,9,1"},
            "anno_train.csv, row 1: expected the name of a file in a class's folder, got '../../../secret.jpg'",
        ),
        (
            {"anno_train": "00001.jpg,39,116,569,375,3"},
            "anno_train.csv, row 1: expected 00001.jpg in the folder of class 3, 'Audi TTS Coupe 2012', got it in "
            "'Audi TT Hatchback 2011'",
        ),
        (
            {"anno_train": ANNO_TRAIN + "\n00001.jpg,39,116,569,375,4"},
            f"anno_train.csv, row 8: expected each photo once, got {TRAIN}/Audi TT Hatchback 2011/00001.jpg again, "
            f"which is in row 1",
        ),
        ({"names": ""}, "names.csv: expected names of classes, got none"),
        (
            {"names": NAMES + "smart fortwo Convertible 2012"},
            "names.csv: expected different class names, got 'smart fortwo Convertible 2012' more than once",
        ),
        ({"names": NAMES + "A/B\nA-B\n"}, "names.csv: expected different class names, got 'A-B' more than once"),
        ({"names": "AM General,Hummer"}, "names.csv, row 1: expected one name, got 2 fields"),
        (
            {"names": "AM General Hummer SUV 2000"},
            f"{TRAIN}/Acura Integra Type R 2001/00198.jpg: expected the folder of a class of names.csv, got "
            f"'Acura Integra Type R 2001'",
        ),
        ({"names": 'a\n"open'}, "names.csv, row 2: expected a CSV file, got one with this: unexpected end of data"),
    ],
)
def test_a_table_that_is_wrong_is_refused(kaggle, tables, message):
    write(kaggle, **tables)
    with pytest.raises(ValueError) as error:
        read_dataset(kaggle)
    assert str(error.value) == f"{kaggle}/{message}"


def test_a_table_in_another_encoding_is_refused(kaggle):
    (kaggle / "names.csv").write_bytes("Citroën DS5 2012\n".encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_dataset(kaggle)
    assert str(error.value) == f"{kaggle}/names.csv: expected a CSV file in UTF-8, got other bytes at position 5"


def test_a_table_for_photos_that_are_not_there(kaggle):
    for name in KAGGLE[-2:]:
        (kaggle / name).unlink()
    dataset = read_dataset(kaggle)
    assert [photo.label for photo in dataset.test] == [4, 3]
    assert dataset.missing == (KAGGLE[-1], KAGGLE[-2])


def test_tables_without_training_photos_are_refused(kaggle):
    for name in KAGGLE[:-2]:
        (kaggle / name).unlink()
    with pytest.raises(ValueError) as error:
        read_dataset(kaggle)
    assert str(error.value) == (
        f"{kaggle}: expected photos in train/<class>/, got anno_test.csv, anno_train.csv, car_data/, names.csv"
    )


def test_ids_that_no_folder_has_are_refused_without_names(kaggle):
    (kaggle / "names.csv").unlink()
    write(kaggle, anno_train="00001.jpg,39,116,569,375,196\n")
    with pytest.raises(ValueError) as error:
        read_dataset(kaggle)
    assert str(error.value) == (
        f"{kaggle}: expected names.csv, or photos of every class from 1 to 196 in the tables, got those of 3 classes"
    )


def test_ids_of_two_folders_are_refused_without_names(kaggle):
    (kaggle / "names.csv").unlink()
    write(kaggle, anno_train="00001.jpg,39,116,569,375,1\n00002.jpg,36,116,868,587,1\n")
    with pytest.raises(ValueError) as error:
        read_dataset(kaggle)
    assert str(error.value) == (
        f"{kaggle}/anno_train.csv, row 2: expected the photos of class 1 in one folder, got 'Audi TT Hatchback 2011' "
        f"and 'Audi TTS Coupe 2012'"
    )


@pytest.mark.parametrize("layout", ["auto", "folders"])
@pytest.mark.parametrize("place", ["", "archive/my cars/"])
@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val"), ("train", "valid")])
def test_class_folders(tmp_path, layout, place, train, test):
    names = [
        f"{place}{train}/Škoda/10.PNG",
        f"{place}{train}/Škoda/9.webp",
        f"{place}{train}/Audi/1.jpg",
        f"{place}{test}/Škoda/1.jpeg",
    ]
    touch(
        tmp_path, *names, f"{place}{train}/Audi/.DS_Store", f"{place}{train}/Audi/notes.txt", "__MACOSX/train/a/1.jpg"
    )
    dataset = read_dataset(tmp_path, layout)
    assert (dataset.class_names, dataset.layout) == (["Audi", "Škoda"], "folders")
    assert dataset.train == [photo(names[2], 0), photo(names[0], 1), photo(names[1], 1)]
    assert dataset.test == [photo(names[3], 1)]
    assert dataset.warnings == (
        () if test == "test" else ("There are no labelled test photos: the 1 for validation are used as such",)
    )


def test_class_folders_with_three_splits(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "validation/a/1.jpg", "validation/a/2.jpg", "test/b/1.jpg")
    dataset = read_dataset(tmp_path)
    assert [photo.name for photo in dataset.train] == [
        "train/a/1.jpg",
        "train/b/1.jpg",
        "validation/a/1.jpg",
        "validation/a/2.jpg",
    ]
    assert [photo.name for photo in dataset.test] == ["test/b/1.jpg"]
    assert dataset.warnings == (
        "The 2 photos for validation are used with those for training, from which preprocess draws its own validation "
        "photos",
    )


@pytest.mark.parametrize("place", ["", "cars/"])
def test_class_folders_without_splits(tmp_path, place):
    # A class may be called like a split.
    touch(tmp_path, f"{place}train/1.jpg", f"{place}bus/1.jpg", f"{place}car/1.jpg", f"{place}car/2.jpg")
    dataset = read_dataset(tmp_path)
    assert (dataset.class_names, dataset.test) == (["bus", "car", "train"], None)
    assert dataset.train == [
        photo(f"{place}bus/1.jpg", 0),
        photo(f"{place}car/1.jpg", 1),
        photo(f"{place}car/2.jpg", 1),
        photo(f"{place}train/1.jpg", 2),
    ]


def test_test_photos_without_class_folders_are_left_out(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/7.jpg", "logo.png")
    dataset = read_dataset(tmp_path)
    assert (len(dataset.train), dataset.test) == (2, None)
    assert dataset.warnings == ("2 photos are in no class's folder and are left out: logo.png, test/7.jpg",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/a/1.jpg", "train/b/x/1.jpg"],
            "/train/b/x/1.jpg: expected a photo in <split>/<class>/, got it deeper in folders",
        ),
        (["train/a/1.jpg"], ": expected the folders of two classes, got that of a alone"),
        (["test/a/1.jpg", "test/b/1.jpg"], ": expected photos in train/<class>/, got test/"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"],
            "/test/c/1.jpg: expected the folder of a class of train/, got 'c'",
        ),
        (
            ["one/train/a/1.jpg", "two/train/a/1.jpg"],
            ": expected the class folders of one dataset, got one/train/ and two/train/",
        ),
        (
            ["one/train/a/1.jpg", "two/test/a/1.jpg"],
            ": expected the splits of one dataset beside each other, got one/train/, two/test/",
        ),
        (["BMW/3/1.jpg", "Audi/1.jpg"], ": expected class folders beside each other, got Audi/1.jpg and BMW/3/1.jpg"),
        (
            ["BMW/3/1.jpg", "Audi/A4/1.jpg"],
            ": expected class folders beside each other, got Audi/A4/1.jpg and BMW/3/1.jpg",
        ),
    ],
)
def test_folders_of_which_classes_cannot_be_told_are_refused(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}{message}"


def test_photos_in_one_folder_are_no_class(tmp_path):
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    with pytest.raises(ValueError, match="expected one of the layouts devkit, .* got images/$"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match="expected photos in <class>/ or train/<class>/, got images/$"):
        read_dataset(tmp_path, "folders")
