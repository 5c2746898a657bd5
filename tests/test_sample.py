import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.io

from carflavor.data.drawing import draw_photo
from carflavor.data.example import example_photo
from carflavor.data.sample import write_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "cars"
    write_sample(folder)
    return folder


def read_annotations(folder, name):
    return scipy.io.loadmat(folder / "devkit" / name, squeeze_me=True)["annotations"]


def read_photo(path):
    return cv2.imread(str(path))[..., ::-1]


def digest_files(folder):
    """Returns the SHA-256 of each file by its path in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_write_sample_names_classes(sample):
    names = scipy.io.loadmat(sample / "devkit" / "cars_meta.mat")["class_names"]
    assert names.shape == (1, 8)
    assert [str(name.item()) for name in names[0]] == [
        "Aurora Hatchback 2011",
        "Belmar Vela Sedan 2012",
        "Corvia Luna Hatchback 2008",
        "Dorado Cirro Sedan 2010",
        "Halden Fjord Minivan 2012",
        "Norden C/V Cargo Van 2009",
        "Osaki Pico Hatchback 2012",
        "Škvara Citron Coupé 2010",
    ]


@pytest.mark.parametrize(
    ("name", "photos", "count", "fields"),
    [
        ("cars_train_annos.mat", "cars_train", 896, "bbox_x1 bbox_y1 bbox_x2 bbox_y2 class fname"),
        ("cars_test_annos_withlabels.mat", "cars_test", 224, "bbox_x1 bbox_y1 bbox_x2 bbox_y2 class fname"),
        ("cars_test_annos.mat", "cars_test", 224, "bbox_x1 bbox_y1 bbox_x2 bbox_y2 fname"),
    ],
)
def test_write_sample_matches_devkit(sample, name, photos, count, fields):
    annotations = scipy.io.loadmat(sample / "devkit" / name)["annotations"]
    assert annotations.shape == (1, count)
    assert annotations.dtype.names == tuple(fields.split())
    assert annotations["fname"][0, 0].tolist() == ["00001.jpg"]
    assert annotations["fname"][0, -1].tolist() == [f"{count:05d}.jpg"]
    assert annotations["bbox_x1"][0, 0].shape == (1, 1)
    assert {str(value.dtype) for value in annotations["bbox_x2"][0]} == {"uint8", "uint16"}
    assert len(list((sample / photos).iterdir())) == count


def test_write_sample_shuffles_balanced_classes(sample):
    labels = read_annotations(sample, "cars_train_annos.mat")["class"].astype(int)
    assert np.bincount(labels).tolist() == [0, 112, 112, 112, 112, 112, 112, 112, 112]
    assert set(labels[:40].tolist()) == {1, 2, 3, 4, 5, 6, 7, 8}


def test_boxes_are_one_based_and_inside_their_photos(sample):
    for row in read_annotations(sample, "cars_train_annos.mat"):
        height, width, _ = read_photo(sample / "cars_train" / row["fname"]).shape
        assert 1 <= row["bbox_x1"] < row["bbox_x2"] <= width
        assert 1 <= row["bbox_y1"] < row["bbox_y2"] <= height
        assert 0.3 < (int(row["bbox_x2"]) - int(row["bbox_x1"])) / width < 1


def test_draw_photo_puts_the_car_into_its_box():
    # Of one silhouette and seed, two models stand in the same scene: the photos differ in the car only.
    belmar, box = draw_photo(1, np.random.default_rng(5))
    dorado, same_box = draw_photo(3, np.random.default_rng(5))
    assert box == same_box
    assert belmar.dtype == np.uint8
    ys, xs = np.nonzero(np.abs(belmar.astype(int) - dorado).max(axis=2) > 20)
    x1, y1, x2, y2 = box
    assert x1 - 5 <= xs.min() < x1 + 0.2 * (x2 - x1)
    assert x2 - 0.2 * (x2 - x1) < xs.max() < x2 + 5
    assert y1 - 5 <= ys.min() < ys.max() < y2 + 5


def test_same_seed_writes_same_bytes_in_another_process_and_with_other_threads(tmp_path):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(2)
    write_sample(tmp_path / "here", train_per_class=3, test_per_class=2)
    cv2.setNumThreads(threads)
    code = "import cv2, sys; from carflavor.data.sample import write_sample; cv2.setNumThreads(1); "
    code += "write_sample(sys.argv[1], train_per_class=3, test_per_class=2)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    digests = digest_files(tmp_path / "here")
    assert len(digests) == 24 + 16 + 4
    assert digest_files(tmp_path / "there") == digests


def test_other_seed_writes_other_photos(tmp_path, sample):
    write_sample(tmp_path / "other", train_per_class=1, test_per_class=1, seed=1)
    photos = {digest for name, digest in digest_files(tmp_path / "other").items() if name.endswith(".jpg")}
    assert len(photos) == 16
    assert photos.isdisjoint(digest_files(sample).values())


def test_a_photo_does_not_depend_on_how_many_are_drawn(tmp_path, sample):
    write_sample(tmp_path / "few", train_per_class=1, test_per_class=1)
    photos = {digest for name, digest in digest_files(tmp_path / "few").items() if name.endswith(".jpg")}
    assert photos <= set(digest_files(sample).values())


def test_train_and_test_photos_are_all_different(sample):
    digests = digest_files(sample)
    assert len(digests) == 896 + 224 + 4
    assert len(set(digests.values())) == len(digests)


def test_write_sample_refuses_a_folder_that_holds_anything(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty folder. Received: "):
        write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_write_sample_accepts_an_empty_folder_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "cars").mkdir()
    write_sample(tmp_path / "cars", train_per_class=1, test_per_class=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cars"]
    assert sorted(path.name for path in (tmp_path / "cars").iterdir()) == [
        "cars_test",
        "cars_train",
        "devkit",
    ]


def test_write_sample_leaves_nothing_when_it_fails(tmp_path):
    with pytest.raises(ValueError):
        write_sample(tmp_path / "cars", train_per_class=1, test_per_class=1, seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_example_photo():
    photo, (x1, y1, x2, y2), name = example_photo()
    assert name == "Aurora Hatchback 2011"
    assert photo[:3] == b"\xff\xd8\xff"
    assert len(photo) < 25_000
    height, width, channels = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR).shape
    assert channels == 3
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert example_photo() == (photo, (x1, y1, x2, y2), name)


@pytest.fixture(scope="module", params=["full", "box"])
def crops(sample, request):
    """Whole photos or their boxes: images and labels from 0, of the training and of the test split."""
    splits = []
    for name, photos in (
        ("cars_train_annos.mat", "cars_train"),
        ("cars_test_annos_withlabels.mat", "cars_test"),
    ):
        rows = read_annotations(sample, name)
        images = [read_photo(sample / photos / row["fname"]) for row in rows]
        if request.param == "box":
            images = [
                image[row["bbox_y1"] - 1 : row["bbox_y2"], row["bbox_x1"] - 1 : row["bbox_x2"]]
                for image, row in zip(images, rows, strict=True)
            ]
        splits.append((images, rows["class"].astype(int) - 1))
    return splits


def histogram(image):
    """Returns the shares of 8 x 8 x 8 colours."""
    bins = (image >> 5).reshape(-1, 3).astype(int) @ (64, 8, 1)
    return np.bincount(bins, minlength=512) / len(bins)


def pixels(image):
    return cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).ravel() / 255


def ridge_accuracy(train, train_labels, test, test_labels):
    """Fits a ridge classifier; a fifth of the training photos chooses how strongly it is regularised."""

    def fit_and_score(fit, labels, score, expected, strength):
        mean, scale = fit.mean(axis=0), fit.std(axis=0) + 1e-6
        fit, score = (fit - mean) / scale, (score - mean) / scale
        dual = np.linalg.solve(fit @ fit.T + strength * np.eye(len(fit)), np.eye(8)[labels] - 1 / 8)
        return np.mean(np.argmax(score @ fit.T @ dual, axis=1) == expected)

    held = np.arange(len(train)) % 5 == 0
    strengths = [10.0, 100.0, 1000.0, 10000.0, 100000.0]
    held_out = [
        fit_and_score(train[~held], train_labels[~held], train[held], train_labels[held], strength)
        for strength in strengths
    ]
    strength = strengths[int(np.argmax(held_out))]
    return fit_and_score(train, train_labels, test, test_labels, strength)


@pytest.mark.parametrize("features", [histogram, pixels])
def test_the_sample_is_no_toy_for_a_linear_classifier(crops, features):
    (train, train_labels), (test, test_labels) = crops
    train, test = (np.array([features(image) for image in images]) for images in (train, test))
    assert ridge_accuracy(train, train_labels, test, test_labels) < 0.5


def test_the_sample_is_no_toy_for_the_nearest_colours(crops):
    (train, train_labels), (test, test_labels) = crops
    train, test = (np.array([histogram(image) for image in images]) for images in (train, test))
    nearest = np.argmin((train**2).sum(axis=1) - 2 * test @ train.T, axis=1)
    assert np.mean(train_labels[nearest] == test_labels) < 0.5
