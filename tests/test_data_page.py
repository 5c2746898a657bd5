"""The commands of docs/data.md, run as they stand there on small datasets of the layouts that it names."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from click.testing import CliRunner
from test_layouts import BOX_FIELDS, SINGLE_FIELDS, cell, struct, write_devkit
from test_tables import write_parquet
from test_tfrecords import example
from test_tfrecords import write as write_tfrecords

from carflavor.data.drawing import draw_photo
from carflavor.data.layouts import LAYOUTS
from carflavor.data.records import RecordFile
from carflavor.image import encode_jpeg

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text("utf-8")
COMMANDS = re.findall(r"^mlflow run \. -e preprocess --env-manager local (.*)$", PAGE, re.MULTILINE)
NAMES = ["Škoda Octavia", "Ram C/V Van"]
# Label and whether it is a test photo, of photos 1 to 8.
PHOTOS = {number: (number % 2, number > 6) for number in range(1, 9)}
TRAIN = [number for number, (_, is_test) in PHOTOS.items() if not is_test]
TEST = [number for number, (_, is_test) in PHOTOS.items() if is_test]


def photo(number):
    drawn, _ = draw_photo(PHOTOS[number][0], np.random.default_rng(number))
    return encode_jpeg(drawn)


def write_photo(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(number))


def mat_row(number, name):
    return (1, 1, 60, 40, PHOTOS[number][0] + 1, name)


def devkit(home):
    folder = home / "stanford_cars"
    rows = {split: [mat_row(n, f"{n:05d}.jpg") for n in numbers] for split, numbers in splits()}
    write_devkit(folder, NAMES, rows["train"], rows["test"])
    for split, numbers in splits():
        for number in numbers:
            write_photo(folder / f"cars_{split}" / f"{number:05d}.jpg", number)
    return folder


def splits():
    return [("train", TRAIN), ("test", TEST)]


def devkit_in_a_zip(home):
    shutil.make_archive(str(home / "stanford_cars"), "zip", devkit(home))


def cars_annos(home):
    folder = home / "cars196"
    rows = [
        (f"car_ims/{number:06d}.jpg", 1, 1, 60, 40, label + 1, int(is_test))
        for number, (label, is_test) in PHOTOS.items()
    ]
    for number in PHOTOS:
        write_photo(folder / "car_ims" / f"{number:06d}.jpg", number)
    assert SINGLE_FIELDS == ("relative_im_path", *BOX_FIELDS, "class", "test")
    scipy.io.savemat(
        folder / "cars_annos.mat", {"annotations": struct(rows, SINGLE_FIELDS), "class_names": cell(NAMES)}
    )


def anno_csv(home):
    folder = home / "car_data"
    for split, numbers in splits():
        for number in numbers:
            label = PHOTOS[number][0]
            write_photo(folder / "car_data" / split / NAMES[label].replace("/", "-") / f"{number:05d}.jpg", number)
        rows = [f"{number:05d}.jpg,1,1,60,40,{PHOTOS[number][0] + 1}\n" for number in numbers]
        (folder / f"anno_{split}.csv").write_text("".join(rows), "utf-8")
    (folder / "names.csv").write_text("".join(f"{name}\n" for name in NAMES), "utf-8")


def folders(home):
    for split, numbers in splits():
        for number in numbers:
            folder = home / "my_cars" / split / ["Škoda Octavia", "Citroën DS5"][PHOTOS[number][0]]
            write_photo(folder / f"{number}.jpg", number)


def huggingface(home):
    for split, numbers in splits():
        path = home / "stanford_cars_hf" / "data" / f"{split}-00000-of-00001.parquet"
        images = [{"bytes": photo(number), "path": f"{number}.jpg"} for number in numbers]
        features = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["A", "B"]}}}}'
        write_parquet(path, images, [PHOTOS[number][0] for number in numbers], features)


def tfrecord(home):
    folder = home / "tensorflow_datasets" / "cars196" / "2.1.0"
    for split, numbers in splits():
        examples = [
            example(photo(number), PHOTOS[number][0], [0.1, 0.1, 0.9, 0.9], id=f"{number:05d}".encode())
            for number in numbers
        ]
        write_tfrecords(folder / f"cars196-{split}.tfrecord-00000-of-00001", *examples)
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in NAMES), "utf-8")


def table(home):
    rows = ["path,class,x1,y1,x2,y2,split"]
    for split, numbers in splits():
        for number in numbers:
            write_photo(home / "photos" / "mine" / f"{number}.jpg", number)
            rows.append(f"mine/{number}.jpg,{NAMES[PHOTOS[number][0]]},0,0,60,40,{split}")
    (home / "photos" / "photos.csv").write_text("\n".join(rows), "utf-8")


BUILDERS = {
    "stanford_cars": devkit,
    "cars196": cars_annos,
    "car_data": anno_csv,
    "my_cars": folders,
    "stanford_cars_hf": huggingface,
    "2.1.0": tfrecord,
    "photos": table,
    "stanford_cars.zip": devkit_in_a_zip,
}


def source_of(command):
    return re.search(r'-P source="([^"]*)"', command)[1]


def test_the_page_has_a_command_for_each_layout():
    local = [Path(source_of(command)).name for command in COMMANDS if "://" not in command]
    assert local == list(BUILDERS)
    headings = re.findall(r"^\*\*`(\w+)`\*\*", PAGE, re.MULTILINE)
    assert set(headings) == set(LAYOUTS) - {"auto"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if "://" not in command], ids=source_of)
def test_command(command, store, tmp_path, monkeypatch):
    """What `mlflow run` makes of the line: an option for each parameter. A URL of Azure's is test_stores' to try."""
    monkeypatch.setenv("HOME", str(tmp_path))
    BUILDERS[Path(source_of(command)).name](tmp_path)
    words = shlex.split(command.replace("$HOME", str(tmp_path)))
    parameters = [word for word in words if word != "-P"]
    options = [part for name in parameters for part in (f"--{name.split('=')[0]}", name.split("=", 1)[1])]
    result = CliRunner().invoke(runpy.run_path(str(ROOT / "entrypoints" / "preprocess.py"))["main"], options)
    assert result.exit_code == 0, result.output
    with RecordFile(tmp_path / "records" / "test.h5") as test:
        assert len(test) == len(TEST)
        assert test.labels.tolist() in ([1, 0], [0, 1])
        assert len(test.class_names) == 2
