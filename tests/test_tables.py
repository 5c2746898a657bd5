import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_layouts import photo, read_dataset, touch

from carflavor.data.layouts import Photo, PhotoReader, read_photo
from carflavor.data.layouts import read_dataset as read_store
from carflavor.data.stores import Store

HEAD = "path,class,x1,y1,x2,y2,split\n"


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8", newline="")


@pytest.fixture
def photos(tmp_path):
    touch(tmp_path, "photos/1.jpg", "photos/2.jpg", "photos/ä b/3.jpg", "photos/4.jpg")
    return tmp_path


TABLE = """\
path,class,x1,y1,x2,y2,split
photos/1.jpg,Škoda,10,20,300,200,train
photos/4.jpg,"Citroën, DS5",,,,,train
photos/ä b/3.jpg,Škoda,0,0,64,48,test
photos/2.jpg,Ram C/V,1,2,30,40,train
"""


@pytest.mark.parametrize("layout", ["auto", "table"])
def test_table(photos, layout):
    write(photos, "labels.csv", TABLE)
    dataset = read_dataset(photos, layout)
    assert (dataset.class_names, dataset.layout) == (["Citroën, DS5", "Ram C/V", "Škoda"], "table")
    assert dataset.train == [
        photo("photos/1.jpg", 2, (10, 20, 300, 200)),
        photo("photos/4.jpg", 0),
        photo("photos/2.jpg", 1, (1, 2, 30, 40)),
    ]
    assert dataset.test == [photo("photos/ä b/3.jpg", 2, (0, 0, 64, 48))]
    assert (dataset.warnings, dataset.missing) == ((), ())
    assert read_photo(Store(photos), dataset.test[0]) == "photos/ä b/3.jpg".encode()


@pytest.mark.parametrize(
    "text",
    [
        # Excel: a mark before the first letter, semicolons, CRLF, and an empty line at the end.
        "\ufeffFile Name;Label\r\nphotos/1.jpg;b\r\nphotos/2.jpg;a\r\n;\r\n",
        "image\tcategory\nphotos/1.jpg\tb\nphotos/2.jpg\ta\n",
        # Beside other columns, relative to the folder of photos, and from Windows.
        'id,filename,label,note\n7,.\\1.jpg,b,"x\ny"\n8,2.jpg,a,\n',
        # Ids in another order than the names.
        "img_path,class_id,class_name\nphotos/1.jpg,12,b\nphotos/2.jpg,3,a\n",
        "file,label_name\nphotos/1.jpg,b\nphotos/2.jpg,a\n",
    ],
)
def test_tables_as_people_write_them(photos, text):
    write(photos, "my cars.csv", text)
    dataset = read_dataset(photos)
    assert (dataset.class_names, dataset.test, dataset.layout) == (["a", "b"], None, "table")
    assert dataset.train == [photo("photos/1.jpg", 1), photo("photos/2.jpg", 0)]


def test_class_names_stand_in_the_order_of_ids(photos):
    write(photos, "cars.csv", "path,label,label_name\nphotos/1.jpg,10,a\nphotos/2.jpg,9,b\nphotos/4.jpg,10,a\n")
    dataset = read_dataset(photos)
    assert dataset.class_names == ["b", "a"]
    assert [photo.label for photo in dataset.train] == [1, 0, 1]


def test_ids_without_names_are_names_in_the_order_of_numbers(photos):
    write(photos, "cars.csv", "path,label\nphotos/1.jpg,10\nphotos/2.jpg,9\n")
    assert read_dataset(photos).class_names == ["9", "10"]


@pytest.mark.parametrize(
    ("head", "box"),
    [
        ("xmin,ymin,xmax,ymax", (39, 116, 569, 375)),
        ("X_Max,y min,x-min,y_max", (569, 116, 39, 375)),
        ("left,top,right,bottom", (39, 116, 569, 375)),
        # As the devkit calls them, whose numbers count from 1.
        ("bbox_x1,bbox_y1,bbox_x2,bbox_y2", (40, 117, 569, 375)),
    ],
)
def test_boxes_by_other_names(photos, head, box):
    write(photos, "cars.csv", f"path,label,{head}\nphotos/1.jpg,a,{','.join(map(str, box))}\nphotos/2.jpg,b,,,,\n")
    assert [photo.box for photo in read_dataset(photos).train] == [(39, 116, 569, 375), None]


def test_a_table_for_each_split(tmp_path):
    # As Hugging Face's image folders have them: relative to the table, and the same names in each.
    for split in ("train", "validation", "test"):
        touch(tmp_path, f"{split}/1.jpg", f"{split}/2.jpg")
        write(tmp_path, f"{split}/metadata.csv", "file_name,label\n1.jpg,0\n2.jpg,1\n")
    dataset = read_dataset(tmp_path)
    assert [photo.name for photo in dataset.train] == [
        "train/1.jpg",
        "train/2.jpg",
        "validation/1.jpg",
        "validation/2.jpg",
    ]
    assert dataset.test == [photo("test/1.jpg", 0), photo("test/2.jpg", 1)]


def test_a_table_for_each_split_beside_folders_of_photos(tmp_path):
    touch(tmp_path, "cars/train/1.jpg", "cars/train/2.jpg", "cars/test/1.jpg")
    write(tmp_path, "cars/train.csv", "image,label\n1.jpg,a\n2.jpg,b\n")
    write(tmp_path, "cars/test.csv", "image,label\n1.jpg,b\n")
    dataset = read_dataset(tmp_path)
    assert dataset.train == [photo("cars/train/1.jpg", 0), photo("cars/train/2.jpg", 1)]
    assert dataset.test == [photo("cars/test/1.jpg", 1)]


@pytest.mark.parametrize("test", ["image,label\n1.jpg,\n", "image,label\n1.jpg,-1\n", "image\n1.jpg\n"])
def test_test_photos_without_labels_are_no_test_split(tmp_path, test):
    touch(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "train.csv", "image,label\n1.jpg,a\n2.jpg,b\n")
    write(tmp_path, "test.csv", test)
    assert read_dataset(tmp_path).test is None


def test_photos_of_a_table_without_files(photos):
    write(photos, "cars.csv", "path,label\nphotos/1.jpg,a\nphotos/9.jpg,b\n")
    dataset = read_dataset(photos)
    assert dataset.train[1] == photo("photos/9.jpg", 1)
    assert dataset.missing == ("photos/9.jpg",)


def test_a_table_is_preferred_to_class_folders(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    write(tmp_path, "cars.csv", "path,label\na/1.jpg,x\nb/2.jpg,y\n")
    # Tables of other things.
    write(tmp_path, "prices.csv", "car,price,price,x1\nx,1,1,1\n")
    write(tmp_path, "more/empty.csv", "")
    dataset = read_dataset(tmp_path)
    assert (dataset.class_names, dataset.layout) == (["x", "y"], "table")
    assert dataset.warnings == (f"{tmp_path} is read as layout=table, and might be read as folders",)
    assert read_dataset(tmp_path, "folders").class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,class\n../secret.jpg,a\n",
            ", row 2: expected the path of a photo inside the dataset, got '../secret.jpg'",
        ),
        ("path,class\n/etc/passwd,a\n", ", row 2: expected the path of a photo inside the dataset, got '/etc/passwd'"),
        ("path,class\nC:\\1.jpg,a\n", ", row 2: expected the path of a photo inside the dataset, got 'C:\\\\1.jpg'"),
        (
            "path,class\ns3://x/1.jpg,a\n",
            ", row 2: expected the path of a photo inside the dataset, got 's3://x/1.jpg'",
        ),
        ("path,class\n,a\n", ", row 2: expected the path of a photo inside the dataset, got ''"),
        ("path,class\nphotos/1.jpg,\n", ", row 2: expected a label, got none"),
        ("path,class\nphotos/1.jpg,-2\n", ", row 2: expected a label from 0, got -2"),
        ("path,class\nphotos/1.jpg\n", ", row 2: expected 2 fields as in the header, got 1"),
        ("path,class\n", ": expected at least one photo, got none"),
        (
            "path,class\nphotos/1.jpg,a\nphotos/2.jpg,a\n\n./photos/1.jpg,a\n",
            ", row 5: expected each photo once, got photos/1.jpg again, which is in row 2",
        ),
        (
            "path,class\nphotos/7.jpg,a\n",
            ": expected the photos that it names, such as photos/7.jpg, got none of them in cars.csv, photos/",
        ),
        (
            "path,class,x1,y1,x2\nphotos/1.jpg,a,1,2,3\n",
            ": expected the columns x1, y1, x2, y2 for boxes, got none named y2",
        ),
        ("path,class,Path\nphotos/1.jpg,a,b\n", ": expected different names of columns, got 'path' more than once"),
        (HEAD + "photos/1.jpg,a,1,2,x,4,train\n", ", row 2: expected a box of four numbers, got 1, 2, x, 4"),
        (HEAD + "photos/1.jpg,a,1,2,nan,4,train\n", ", row 2: expected a box of four numbers, got 1, 2, nan, 4"),
        (HEAD + "photos/1.jpg,a,1,2,,4,train\n", ", row 2: expected a box of four numbers, got 1, 2, , 4"),
        (
            HEAD + "photos/1.jpg,a,100,20,50,70,train\n",
            ", row 2: expected a box as x1, y1, x2, y2 with x1 < x2 and y1 < y2, got 100, 20, 50, 70",
        ),
        (
            HEAD + "photos/1.jpg,a,0.1,0.2,0.5,1,train\n",
            ", row 2: expected a box in pixels, got fractions of the photo: 0.1, 0.2, 0.5, 1",
        ),
        (
            HEAD + "photos/1.jpg,a,1,2,3,4,holdout\n",
            ", row 2: expected train, validation or test in the column split, got 'holdout'",
        ),
        (
            "path,label,class_name\nphotos/1.jpg,0,a\nphotos/2.jpg,0,b\n",
            ", row 3: expected label 0 to be 'a' as in rows before, got 'b'",
        ),
    ],
)
def test_a_table_that_is_wrong_is_refused(photos, text, message):
    write(photos, "cars.csv", text)
    with pytest.raises(ValueError) as error:
        read_dataset(photos, "table")
    assert str(error.value) == f"{photos}/cars.csv{message}"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"a.csv": "path,label\nphotos/1.jpg,a\n", "b.csv": "path,label\nphotos/1.jpg,b\n"},
            "expected one table, or one for each split, got a.csv, b.csv",
        ),
        (
            {"all.csv": "path,label\nphotos/1.jpg,a\n", "test.csv": "path,label\nphotos/1.jpg,b\n"},
            "expected one table, or one for each split, got all.csv, test.csv",
        ),
        (
            {"train.csv": "path,label\nphotos/1.jpg,a\n", "train_2.csv": "path,label\nphotos/1.jpg,b\n"},
            "expected one table for train, got train.csv, train_2.csv",
        ),
        (
            {"train.csv": "path,label\nphotos/1.jpg,a\n", "test.csv": "path,label\nphotos/1.jpg,a\n"},
            "expected each photo once, got photos/1.jpg 2 times",
        ),
        (
            {"test.csv": "path,label\nphotos/1.jpg,a\n"},
            "expected labelled photos for training, got test",
        ),
        (
            {"cars.csv": "1.jpg,a\n2.jpg,b\n"},
            "expected a table with columns such as path and label (CSV with a header, or Parquet), got cars.csv with "
            "1.jpg, a",
        ),
    ],
)
def test_tables_of_which_the_dataset_cannot_be_told_are_refused(photos, tables, message):
    for name, text in tables.items():
        write(photos, name, text)
    with pytest.raises(ValueError) as error:
        read_dataset(photos, "table")
    assert str(error.value) == f"{photos}: {message}"


def test_a_parquet_table_of_paths(photos):
    columns = {"file_name": ["1.jpg", "2.jpg"], "label": [1, 0], "bbox": [[1.0, 2.0, 30.4, 40.0], None]}
    pq.write_table(pa.table(columns), photos / "photos" / "cars.parquet")
    dataset = read_dataset(photos)
    assert (dataset.class_names, dataset.layout) == (["0", "1"], "table")
    assert dataset.train == [photo("photos/1.jpg", 1, (1, 2, 30, 40)), photo("photos/2.jpg", 0)]


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# As `datasets` writes it into the schema.
METADATA = (
    '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["AM General Hummer SUV 2000", '
    '"Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"], "_type": "ClassLabel"}}}}'
)
HF_NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]


def write_parquet(path, images, labels, metadata=METADATA, image=IMAGE, rows_in_group=2, **columns):
    columns = {"image": pa.array(images, image), "label": labels, **columns}
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": metadata})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)


def images(*names):
    return [{"bytes": f"photo {name}".encode(), "path": name} for name in names]


TRAIN_FILES = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
TEST_FILE = "data/test-00000-of-00001.parquet"


@pytest.fixture
def huggingface(tmp_path):
    write_parquet(tmp_path / TRAIN_FILES[0], images("a.jpg", "b.jpg", "c.jpg"), [2, 0, 1])
    write_parquet(tmp_path / TRAIN_FILES[1], images("d.jpg"), [2])
    write_parquet(tmp_path / TEST_FILE, images("e.jpg"), [1])
    write(tmp_path, "README.md", "---\ndataset_info: {}\n---\n")
    touch(tmp_path, ".gitattributes")
    return tmp_path


@pytest.mark.parametrize("layout", ["auto", "huggingface"])
def test_huggingface(huggingface, layout):
    dataset = read_dataset(huggingface, layout)
    assert (dataset.class_names, dataset.layout) == (HF_NAMES, "huggingface")
    assert dataset.train == [
        Photo("a.jpg", TRAIN_FILES[0], 0, 2, None),
        Photo("b.jpg", TRAIN_FILES[0], 1, 0, None),
        Photo("c.jpg", TRAIN_FILES[0], 2, 1, None),
        Photo("d.jpg", TRAIN_FILES[1], 0, 2, None),
    ]
    assert dataset.test == [Photo("e.jpg", TEST_FILE, 0, 1, None)]
    assert (dataset.warnings, dataset.missing) == ((), ())
    assert dataset.train[2].place == "data/train-00000-of-00002.parquet, row 3"


def test_photos_of_huggingface(huggingface):
    dataset, store = read_dataset(huggingface), Store(huggingface)
    # In their order, again from the start, and with gaps and steps back.
    order = [0, 1, 2, 3, 4, 0, 2, 1, 4, 3, 0, 0]
    photos = [*dataset.train, *dataset.test]
    with PhotoReader(store) as reader:
        assert [reader.read(photos[row]) for row in order] == [f"photo {'abcde'[row]}.jpg".encode() for row in order]
    assert read_photo(store, dataset.train[1]) == b"photo b.jpg"


def test_photos_of_a_table_are_read_once(tmp_path, monkeypatch):
    names = [f"{number:03d}.jpg" for number in range(100)]
    write_parquet(tmp_path / "train.parquet", images(*names), [number % 3 for number in range(100)], rows_in_group=50)
    opened = []
    open_file = Store.open
    monkeypatch.setattr(Store, "open", lambda store, name: opened.append(name) or open_file(store, name))
    dataset = read_dataset(tmp_path)
    opened.clear()
    batches = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **kwargs: batches.append(kwargs) or iter_batches(*args, **kwargs)
    )
    with PhotoReader(Store(tmp_path)) as reader:
        assert [reader.read(photo) for photo in dataset.train] == [f"photo {name}".encode() for name in names]
        # Back, to photos that are no longer at hand.
        assert [reader.read(dataset.train[row]) for row in (49, 0, 30)] == [
            b"photo 049.jpg",
            b"photo 000.jpg",
            b"photo 030.jpg",
        ]
    assert opened == ["train.parquet"]
    assert [batch["row_groups"] for batch in batches] == [[0], [1], [0], [0]]


def test_huggingface_bytes_without_paths(tmp_path):
    # Hugging Face's own conversion, whose files are called by numbers in a folder for each split.
    file = "default/train/0000.parquet"
    write_parquet(tmp_path / file, [b"one", b"two"], ["BMW", "Audi"], None, pa.binary())
    write_parquet(tmp_path / "default" / "test" / "0000.parquet", [b"three"], ["BMW"], None, pa.binary())
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == ["Audi", "BMW"]
    assert dataset.train == [
        Photo(f"{file}#0", file, 0, 1, None),
        Photo(f"{file}#1", file, 1, 0, None),
    ]
    assert dataset.test == [Photo("default/test/0000.parquet#0", "default/test/0000.parquet", 0, 1, None)]
    assert read_photo(Store(tmp_path), dataset.train[1]) == b"two"


def test_huggingface_photos_of_one_name_in_both_splits(tmp_path):
    # The path that somebody's machine had is no part of the name.
    rows = [{"bytes": b"1", "path": "/home/me/1.jpg"}, {"bytes": b"2", "path": "..\\2.jpg"}]
    write_parquet(tmp_path / "train.parquet", rows, [0, 1])
    write_parquet(tmp_path / "test.parquet", rows, [0, 1])
    dataset = read_dataset(tmp_path)
    assert [photo.name for photo in [*dataset.train, *dataset.test]] == [
        "train/1.jpg",
        "train/2.jpg",
        "test/1.jpg",
        "test/2.jpg",
    ]


def test_huggingface_boxes(tmp_path):
    write_parquet(tmp_path / "train.parquet", images("a", "b"), [0, 1], bbox=[[38, 115, 569, 375], None])
    assert [photo.box for photo in read_dataset(tmp_path).train] == [(38, 115, 569, 375), None]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([100, 20, 50, 70], "expected a box as x1, y1, x2, y2 with x1 < x2 and y1 < y2, got 100, 20, 50, 70"),
        ([1, 2, 3], "expected a box of four numbers, got 1, 2, 3"),
    ],
)
def test_huggingface_boxes_of_another_kind_are_refused(tmp_path, box, message):
    # The first as COCO has them: x, y, width, height.
    write_parquet(tmp_path / "train.parquet", images("a", "b"), [0, 1], bbox=[[1, 1, 9, 9], box])
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}/train.parquet, row 2: {message}"


def test_huggingface_boxes_that_are_none_can_be_told_of(tmp_path):
    boxes = [[100, 20, 50, 70], [1, 1, 9, 9], [5, 5, 5, 9]]
    write_parquet(tmp_path / "train.parquet", images("a", "b", "c"), [0, 1, 1], bbox=boxes)
    dataset = read_store(Store(tmp_path), refuse_boxes=False)
    assert [list(photo.box) for photo in dataset.train] == boxes
    assert [sentence.split(":")[0] for sentence in dataset.refused_boxes] == [
        f"{tmp_path}/train.parquet, row {row}" for row in (1, 3)
    ]


def test_huggingface_class_names_of_the_card(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", images("a", "b"), [1, 0], None)
    card = """\
---
license: other
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': AM General Hummer SUV 2000
          '1': Acura RL Sedan 2012
          '10': Audi RS 4 Convertible 2008
          '2': c
          '3': d
          '4': e
          '5': f
          '6': g
          '7': h
          '8': i
          '9': j
  splits:
  - name: train
    num_examples: 2
---
# Cars
"""
    write(tmp_path, "README.md", card)
    dataset = read_dataset(tmp_path)
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", *"cdefghij", "Audi RS 4 Convertible 2008"]
    assert dataset.class_names == names
    assert [photo.label for photo in dataset.train] == [1, 0]


@pytest.mark.parametrize("metadata", [None, "no json", '{"info": 1}', '{"info": {"features": {"label": {}}}}'])
def test_huggingface_without_class_names(tmp_path, metadata):
    write_parquet(tmp_path / "train.parquet", images("a", "b"), [1, 0], metadata)
    dataset = read_dataset(tmp_path)
    assert dataset.class_names == ["0", "1"]
    assert dataset.warnings == ("No file names the classes: they are called by their numbers",)


def test_huggingface_test_photos_without_labels(tmp_path):
    write_parquet(tmp_path / "train.parquet", images("a", "b"), [1, 0])
    write_parquet(tmp_path / "test.parquet", images("c", "d"), [-1, -1])
    dataset = read_dataset(tmp_path)
    assert dataset.test is None
    assert dataset.warnings == ("The 2 test photos have no labels and are left out",)


def test_huggingface_row_without_bytes_is_refused_when_it_is_read(tmp_path):
    write_parquet(tmp_path / "train.parquet", [*images("a"), {"bytes": None, "path": "b"}, None], [1, 0, 1])
    dataset = read_dataset(tmp_path)
    with PhotoReader(Store(tmp_path)) as reader:
        assert reader.read(dataset.train[0]) == b"photo a"
        for row in (1, 2):
            with pytest.raises(ValueError, match="^expected the bytes of a photo, got none$"):
                reader.read(dataset.train[row])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "row 2: expected a label from 0 to 2 or the name of a class, got 3"),
        ([0, -1], "row 2: expected a label from 0 to 2 or the name of a class, got -1"),
        ([0, None], "row 2: expected a label, got none"),
        (["Acura RL Sedan 2012", "Acura"], "row 2: expected a label from 0 to 2 or the name of a class, got 'Acura'"),
        ([[0], [1]], "row 1: expected a number or a text as label, got [0]"),
    ],
)
def test_huggingface_labels_out_of_range_are_refused(tmp_path, labels, message):
    write_parquet(tmp_path / "train.parquet", images("a", "b"), labels)
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}/train.parquet, {message}"


def test_huggingface_files_that_contradict_each_other_are_refused(huggingface):
    names = json.loads(METADATA)
    names["info"]["features"]["label"]["names"].reverse()
    write_parquet(huggingface / TRAIN_FILES[1], images("d.jpg"), [2], json.dumps(names))
    with pytest.raises(ValueError) as error:
        read_dataset(huggingface)
    assert str(error.value) == f"{huggingface}/{TRAIN_FILES[1]}: expected the class names of {TEST_FILE}, got others"


def test_a_missing_part_is_refused(huggingface):
    (huggingface / TRAIN_FILES[0]).unlink()
    with pytest.raises(ValueError) as error:
        read_dataset(huggingface)
    assert str(error.value) == f"{huggingface}/{TRAIN_FILES[0]}: expected one of 2 files of a split, got nothing"


def test_huggingface_of_two_configurations_is_refused(tmp_path):
    write_parquet(tmp_path / "a" / "train" / "0000.parquet", images("a"), [0])
    write_parquet(tmp_path / "b" / "train" / "0000.parquet", images("b"), [0])
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: expected the Parquet files of one dataset, got a/train/0000.parquet and b/train/0000.parquet"
    )


def test_huggingface_without_labels_is_refused(tmp_path):
    table = pa.table({"image": pa.array(images("a"), IMAGE), "text": ["a car"]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(error.value) == f"{tmp_path}/train.parquet: expected a column named label, got image, text"


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PAR1" + bytes(40) + b"PAR1"]
)
@pytest.mark.parametrize("layout", ["auto", "huggingface", "table"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path, layout, content):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path, layout)
    assert str(error.value).startswith(
        f"{tmp_path}/train.parquet: expected a Parquet file, got one that pyarrow cannot read: "
    )


def test_a_parquet_whose_photos_are_damaged_is_refused_when_they_are_read(tmp_path):
    path = tmp_path / "train.parquet"
    photos = [{"bytes": bytes(range(256)) * 40, "path": name} for name in ("a.jpg", "b.jpg")]
    write_parquet(path, photos, [0, 1])
    data = path.read_bytes()
    # The header of the page that holds the photos, which are the first column.
    path.write_bytes(data[:4] + b"\xff" * 20 + data[24:])
    dataset = read_dataset(tmp_path)
    with PhotoReader(Store(tmp_path)) as reader:
        with pytest.raises(ValueError, match="^expected the bytes of a photo, got some that pyarrow cannot read: "):
            reader.read(dataset.train[0])
