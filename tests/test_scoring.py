import base64
import threading
import time

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import CLASS_NAMES
from mlflow.exceptions import MlflowException

import carflavor
from carflavor import image
from carflavor.data.layouts import read_dataset
from carflavor.data.records import RecordFile
from carflavor.data.sample import write_sample
from carflavor.data.stores import Store
from carflavor.image import encode_jpeg, squash
from carflavor.limits import Limits
from carflavor.preprocess import PreprocessConfig, write_records
from carflavor.scoring import CarClassifier, PyfuncModel, decode_base64

NO_PHOTO = "expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got"


@pytest.fixture(scope="module")
def classifier(packed_model):
    return carflavor.load_model(packed_model)


@pytest.fixture(scope="module")
def pyfunc(classifier):
    return PyfuncModel(classifier)


@pytest.fixture(scope="module")
def jpegs(photos):
    return [encode_jpeg(photo, quality=100) for photo in photos]


def as_base64(data):
    return base64.b64encode(data).decode()


def test_answer_has_the_documented_columns(classifier, photos):
    answer = classifier.predict(photos[:2], top_k=2)
    assert answer.columns.tolist() == ["label", "prob", "class_id", "top_k", "error"]
    assert [str(dtype) for dtype in answer.dtypes] == ["object", "Float64", "Int64", "object", "object"]
    row = answer.iloc[0]
    assert row["label"] == row["top_k"][0]["label"] == CLASS_NAMES[row["class_id"]]
    assert row["prob"] == row["top_k"][0]["prob"] >= row["top_k"][1]["prob"]
    assert len(row["top_k"]) == 2
    assert row["error"] is None


def test_top_k_of_more_than_all_classes_is_all_classes(classifier, photos):
    top_k = classifier.predict(photos[:1], top_k=100)["top_k"][0]
    assert sorted(entry["label"] for entry in top_k) == sorted(CLASS_NAMES)
    assert sum(entry["prob"] for entry in top_k) == pytest.approx(1)


def test_photos_come_as_path_bytes_or_array(classifier, jpegs, tmp_path):
    (tmp_path / "car.jpg").write_bytes(jpegs[0])
    decoded = image.decode(jpegs[0])
    answer = classifier.predict([str(tmp_path / "car.jpg"), tmp_path / "car.jpg", jpegs[0], decoded])
    assert answer["prob"].nunique() == 1


def test_order_survives_batches(classifier, photos):
    # More photos than one batch of 32 holds.
    one_by_one = [classifier.predict([photo])["prob"][0] for photo in photos]
    together = classifier.predict(photos * 9)["prob"]
    np.testing.assert_allclose(together, one_by_one * 9, rtol=1e-5)


def test_box_is_cut_with_the_margin_of_training(classifier, photos):
    photo = photos[0]  # 30 x 75 pixels; the model widens boxes by 4
    answer = classifier.predict([photo], [(10, 8, 40, 20)])
    by_hand = classifier.predict([photo[4:24, 6:44]])
    assert answer["prob"][0] == by_hand["prob"][0] != classifier.predict([photo])["prob"][0]


def test_min_prob_makes_a_label_unknown(classifier, photos):
    answer = classifier.predict(photos[:1], min_prob=1.0)
    assert answer["label"][0] == "unknown"
    assert answer["class_id"][0] is pd.NA
    assert answer["top_k"][0][0]["label"] in CLASS_NAMES
    assert 0 < answer["prob"][0] < 1


def test_report_answers_for_the_other_photos(classifier, photos):
    answer = classifier.predict([photos[0], b"no photo", photos[1]], on_error="report")
    assert answer["error"][1] == f"{NO_PHOTO} 8 bytes of something else"
    assert answer["label"][1] is None and answer["class_id"][1] is pd.NA and answer["top_k"][1] == []
    assert answer["label"][[0, 2]].notna().all()
    assert answer["prob"][[0, 2]].tolist() == classifier.predict([photos[0], photos[1]])["prob"].tolist()


def test_raise_names_the_rows(classifier, photos, tmp_path):
    with pytest.raises(ValueError) as error:
        classifier.predict([photos[0], b"", tmp_path / "none.jpg"])
    message = str(error.value)
    assert message.startswith(
        "2 of 3 photos cannot be scored (rows count from 0): row 1: expected the bytes of a photo"
    )
    assert "row 2: [Errno 2] No such file or directory" in message


def test_raise_names_ten_rows_of_many(classifier):
    with pytest.raises(ValueError, match="row 9: .*; and 40 more$"):
        classifier.predict([b"x"] * 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "expected top_k to be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "expected top_k to be a whole number of at least 1, got 2.5"),
        ({"top_k": True}, "expected top_k to be a whole number of at least 1, got True"),
        ({"min_prob": 1.5}, "expected min_prob to be a number from 0 to 1, got 1.5"),
        ({"min_prob": float("nan")}, "expected min_prob to be a number from 0 to 1, got nan"),
        ({"on_error": "ignore"}, "expected on_error to be one of raise, report, got 'ignore'"),
        ({"boxes": []}, "expected a box or None for each of 1 photos, got 0"),
    ],
)
def test_parameters_are_checked(classifier, photos, arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier.predict(photos[:1], **arguments)


@pytest.mark.parametrize("photo", ["car.jpg", b"photo", np.zeros((20, 30, 3), "uint8")], ids=["path", "bytes", "array"])
def test_one_photo_outside_a_list_is_refused(classifier, photo):
    with pytest.raises(ValueError, match="expected a list of photos, got one photo that is not in a list"):
        classifier.predict(photo)


def test_no_photos_are_refused(classifier):
    with pytest.raises(ValueError, match="expected at least one photo, got none"):
        classifier.predict([])


@pytest.mark.parametrize(
    "text",
    [
        "AAEC/v8=",
        "AAEC/v8",
        "AAEC_v8",
        " AAEC\r\n/v8=\n",
        "data:image/jpeg;base64,AAEC/v8=",
        "DATA:;BASE64,AAEC_v8",
    ],
)
def test_decode_base64_takes_what_people_send(text):
    assert decode_base64(text) == b"\x00\x01\x02\xfe\xff"


@pytest.mark.parametrize(
    "text", ["!!!!", "abcd!!!!efgh", "A", "AAEC/v8=AAEC", "data:image/jpeg,AAEC", "", "  ", "data:;base64,", "é"]
)
def test_decode_base64_refuses_the_rest(text):
    with pytest.raises(ValueError, match="^expected a "):
        decode_base64(text)


def test_pyfunc_takes_base64_bytes_and_arrays_alike(pyfunc, jpegs):
    frame = pd.DataFrame({"image": [as_base64(jpegs[0]), jpegs[0], image.decode(jpegs[0])]}, index=[7, 8, 9])
    answer = pyfunc.predict(frame)
    assert answer["prob"].nunique() == 1
    assert answer.index.tolist() == [7, 8, 9]


def test_pyfunc_never_reads_a_path_from_a_string(pyfunc, jpegs, tmp_path):
    (tmp_path / "car.jpg").write_bytes(jpegs[0])
    with pytest.raises(MlflowException, match="expected a photo"):
        pyfunc.predict(pd.DataFrame({"image": [str(tmp_path / "car.jpg")]}))


def test_pyfunc_boxes_may_be_missing_in_some_rows(pyfunc, classifier, jpegs):
    frame = pd.DataFrame(
        {"image": [as_base64(jpegs[0])] * 2, "x1": [10, None], "y1": [8, None], "x2": [40, None], "y2": [20, None]}
    )
    photo = image.decode(jpegs[0])
    expected = classifier.predict([photo, photo], [(10, 8, 40, 20), None])
    assert pyfunc.predict(frame)["prob"].tolist() == expected["prob"].tolist()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (as_base64(b"no photo"), f"{NO_PHOTO} 8 bytes of something else"),
        ("!!!", "expected a photo in base64, got a text that is no base64"),
        ("None", "expected a photo, got null"),
        ("", "expected a photo in base64, got an empty text"),
        (None, "expected a photo, got null"),
        (float("nan"), "expected a photo, got null"),
        (pd.NA, "expected a photo, got null"),
        (5, "expected a photo, got int"),
        ([1, 2], "expected a photo, got list"),
        ({"a": 1}, "expected a photo, got dict"),
        (np.zeros((2, 2, 3)), "expected a uint8 RGB array of shape (height, width, 3), got float64 of shape (2, 2, 3)"),
        (
            np.zeros((0, 2, 3), "uint8"),
            "expected a uint8 RGB array of shape (height, width, 3), got uint8 of shape (0, 2, 3)",
        ),
    ],
)
def test_pyfunc_refuses_a_bad_row_by_number(pyfunc, jpegs, value, reason):
    frame = pd.DataFrame({"image": pd.Series([as_base64(jpegs[0]), value], dtype=object)})
    with pytest.raises(MlflowException) as error:
        pyfunc.predict(frame)
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"
    assert error.value.message == f"1 of 2 photos cannot be scored (rows count from 0): row 1: {reason}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"photo": ["x"]}, "expected a column image, got photo"),
        ({}, "expected a column image, got none"),
        ({"image": ["x"], "x1": [1.0]}, "expected all of x1, y1, x2, y2 or none, got x1"),
        ({"image": []}, "expected at least one photo, got none"),
    ],
)
def test_pyfunc_refuses_other_frames(pyfunc, columns, message):
    with pytest.raises(MlflowException, match=message):
        pyfunc.predict(pd.DataFrame(columns))


def test_pyfunc_refuses_two_columns_of_one_name(pyfunc):
    with pytest.raises(MlflowException, match="expected each column once, got image more than once"):
        pyfunc.predict(pd.DataFrame([["x", "y"]], columns=["image", "image"]))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((None, 1, 2, 3), r"expected a box of four numbers x1, y1, x2, y2, got \[None, 1, 2, 3\]"),
        ((1, 2, float("inf"), 3), "expected a box of four numbers"),
        (5, "expected a box of four numbers x1, y1, x2, y2, got 5"),
        ((5, 5, 5, 9), r"expected a box with x1 < x2 and y1 < y2 inside the photo of 25 x 10 pixels"),
    ],
)
def test_boxes_are_checked(classifier, box, message):
    with pytest.raises(ValueError, match=message):
        classifier.predict([np.zeros((10, 25, 3), "uint8")], [box])


def test_serving_sees_the_pixels_that_preprocessing_stored(classifier, store, tmp_path):
    """The two routes from a file to the network, compared on the photos of a real dataset folder."""
    write_sample(tmp_path / "cars", train_per_class=2, test_per_class=1)
    write_records(
        PreprocessConfig(source=str(tmp_path / "cars"), out=str(tmp_path / "records"), crop="both", image_size=48)
    )
    test = read_dataset(Store(tmp_path / "cars")).test
    served = []
    classifier = carflavor.scoring.CarClassifier(
        lambda squares: served.extend(squares) or np.zeros((len(squares), 3), "float32"),
        CLASS_NAMES,
        crop_margin=16,
        image_size=48,
    )
    classifier.engine.input_size = 32
    paths = [tmp_path / "cars" / photo.file for photo in test]
    classifier.predict(paths, [photo.box for photo in test])
    classifier.predict(paths)
    with RecordFile(tmp_path / "records" / "test.h5") as records:
        stored = [squash(square, 32) for crop in ("box", "full") for square in records.images(crop)]
    np.testing.assert_array_equal(served, stored)


class Network:
    """An engine that knows nothing."""

    input_size = 32

    def __call__(self, squares):
        return np.full((len(squares), 3), 1 / 3, "float32")


@pytest.fixture
def count_decoded(monkeypatch):
    """Has photos of the largest size take a moment; returns a function that says how many were decoded at once."""
    # No JPEG, of which an eighth of each side would be decoded.
    large = cv2.imencode(".png", np.full((4990, 5000, 3), 100, np.uint8))[1].tobytes()
    now, most = [], []

    def cut_square(photo, size, box, margin):
        now.append(photo)
        most.append(len(now))
        time.sleep(0.02)
        now.remove(photo)
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(image.EncodedPhoto, "cut_square", cut_square)

    def count(classifier):
        classifier.predict([large] * 24)
        return max(most)

    return count


@pytest.mark.parametrize(
    ("threads", "pixels", "expected"), [(1, 25, 1), (2, 25, 1), (8, 25, 4), (64, 25, 4), (64, 50, 4), (64, 200, 8)]
)
def test_photos_of_the_largest_size_have_room_for_four_on_any_number_of_cores(count_decoded, threads, pixels, expected):
    limits = Limits(photo_pixels=1_000_000 * pixels)
    classifier = CarClassifier(Network(), CLASS_NAMES, 4, 48, limits=limits, threads=threads)
    assert count_decoded(classifier) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_who_sends_many_photos_has_as_many_in_front_of_others_as_are_decoded_and_one(monkeypatch, threads):
    goes_on, waiting = threading.Event(), []
    monkeypatch.setattr(image, "squash", lambda photo, size: goes_on.wait(30) and np.zeros((32, 32, 3), np.uint8))
    classifier = CarClassifier(Network(), CLASS_NAMES, 4, 48, threads=threads)
    submit = classifier.decoders.submit
    monkeypatch.setattr(classifier.decoders, "submit", lambda *call: waiting.append(call) or submit(*call))
    caller = threading.Thread(target=classifier.predict, args=([np.zeros((9, 9, 3), np.uint8)] * 20,))
    caller.start()
    time.sleep(0.3)
    ahead = len(waiting)
    goes_on.set()
    caller.join(30)
    assert (ahead, len(waiting)) == (threads + 1, 20)


def test_threads_of_the_environment_are_those_that_decode(packed_model, monkeypatch):
    monkeypatch.setenv("CARFLAVOR_THREADS", "3")
    assert carflavor.load_model(packed_model).decoders._max_workers == 3
    assert carflavor.load_model(packed_model, threads=2).decoders._max_workers == 2
