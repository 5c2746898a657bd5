"""Predictions for many photos: on a cluster of one master and two workers, on one machine, and after a kill."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import CLASS_NAMES
from servers import web_server
from test_mlproject import load

import carflavor
from carflavor import partitions, tracking
from carflavor import score as scoring_step
from carflavor.data import shards_on_spark
from carflavor.data.shards import PARTIAL
from carflavor.data.unlabelled import list_photos
from carflavor.locking import lock
from carflavor.score import SUCCESS, WORK_FOLDER, ScoreConfig, score, write_predictions
from carflavor.scoring import CarClassifier
from carflavor.spark import ask_workers, open_session

ROOT = Path(carflavor.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from clusters import Cluster  # noqa: E402

NO_PHOTO = "expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got 8 bytes of something else"
PARTS = [f"part-{number:05d}.parquet" for number in range(9)]
COLUMNS = ["photo", "label", "prob", "class_id", "top_k", "error"]
CODE = """
import sys
from carflavor import partitions
from carflavor.score import ScoreConfig, write_predictions
partitions._FEWEST_PHOTOS = 32
write_predictions(ScoreConfig(model=sys.argv[1], photos=sys.argv[2], out=sys.argv[3], master=sys.argv[4]))
"""


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(partitions, "_FEWEST_PHOTOS", 32)


@pytest.fixture(scope="module")
def cars(photos, tmp_path_factory):
    """280 photos in folders of folders, each of which takes a while to decode, and one of them is none."""
    folder = tmp_path_factory.mktemp("photos") / "cars"
    for number, photo in enumerate(photos):
        enlarged = cv2.resize(photo[..., ::-1], (640, 480), interpolation=cv2.INTER_NEAREST)
        noise = np.random.default_rng(number).integers(0, 8, enlarged.shape, "uint8")
        png = cv2.imencode(".png", enlarged // 8 * 8 + noise, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        one = folder.with_name(f"{number}.png")
        one.write_bytes(png)
        for copy in range(35):
            path = folder / f"camera {number % 3}" / f"{copy % 2}" / f"{number}-{copy:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(one, path)
    (folder / "camera 1" / "0" / "4-34.png").unlink()
    (folder / "camera 1" / "0" / "4-34.png").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo either")
    return folder


@pytest.fixture(scope="module")
def expected(cars, openvino_model, tmp_path_factory):
    """What one worker on this machine makes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "_FEWEST_PHOTOS", 32)
        return read(write(openvino_model, cars, tmp_path_factory.mktemp("expected"), master="local[1]")[0])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def few_cars(photos, tmp_path_factory):
    """The eight photos as files."""
    folder = tmp_path_factory.mktemp("few") / "cars"
    folder.mkdir()
    for number, photo in enumerate(photos):
        cv2.imwrite(str(folder / f"{number}.png"), photo[..., ::-1])
    return folder


def write(model, photos, out, **settings):
    return write_predictions(ScoreConfig(model=str(model), photos=str(photos), out=str(out), **settings))


def read(out):
    """Returns all parts as one table, in their order."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("part-*.parquet")))


def names(folder):
    return sorted(os.listdir(folder))


def parts_done(out):
    return sorted(path.name for path in out.glob(f"{WORK_FOLDER}/*/part-*.parquet"))


def test_a_row_a_photo_in_the_order_of_the_photos(expected, cars, photos, openvino_model):
    found = [path.relative_to(cars).as_posix() for path in cars.rglob("*.png")]
    assert expected.column_names == COLUMNS
    assert expected["photo"].to_pylist() == sorted(found)
    rows = {row["photo"]: row for row in expected.to_pylist()}
    assert [row for row in rows.values() if row["error"] is not None] == [
        {"photo": "camera 1/0/4-34.png", "label": None, "prob": None, "class_id": None, "top_k": [], "error": NO_PHOTO}
    ]
    # One by one, as a server is asked for them.
    firsts = [next(name for name in found if f"/{number}-" in name and "34" not in name) for number in range(8)]
    answers = carflavor.load_model(openvino_model).predict([cars / name for name in firsts])
    assert set(answers["label"]) > {answers["label"][0]}  # they tell photos apart
    for name, answer in zip(firsts, answers.to_dict("records"), strict=True):
        assert rows[name]["label"] == answer["label"] == CLASS_NAMES[rows[name]["class_id"]]
        assert rows[name]["prob"] == pytest.approx(answer["prob"], abs=1e-6)
        assert [entry["label"] for entry in rows[name]["top_k"]] == [entry["label"] for entry in answer["top_k"]]
        assert rows[name]["top_k"][0] == {"label": rows[name]["label"], "prob": rows[name]["prob"]}


def test_two_workers_write_equal_rows_and_load_the_model_once_each(cars, expected, cluster, openvino_model, tmp_path):
    def tell():
        import os

        from carflavor import partitions

        info = partitions._load_once.cache_info()
        if not info.misses:
            return os.getpid(), 0, 0, None, None
        classifier = partitions._load_once(*partitions_key)
        compiled = classifier.engine._request.get_compiled_model()
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        return os.getpid(), info.misses, info.hits, threads, classifier.decoders._max_workers

    seen = []
    with pytest.MonkeyPatch.context() as patch, open_session(cluster.master, "test") as session:

        def publish(folder, out, count):
            nonlocal partitions_key
            # While the model's folder is there.
            partitions_key = str(folder / "model"), carflavor.flavor.manifest_sha256(folder / "model"), 1, ()
            seen.extend(answer for _, answer in ask_workers(session, tell))
            publish_all(folder, out, count)

        partitions_key, publish_all = None, scoring_step._publish
        patch.setattr(scoring_step, "_publish", publish)
        out, summary = write(openvino_model, cars, tmp_path / "out", master=cluster.master)
    assert read(out).equals(expected)
    assert names(out) == sorted([SUCCESS, *PARTS])
    assert (summary["photos"], summary["errors"]) == (280, 1)
    workers = {answer[0]: answer[1:] for answer in seen}
    assert len(workers) == 2
    assert [(misses, threads, decoders) for misses, _, threads, decoders in workers.values()] == [(1, 1, 1)] * 2
    assert sum(misses + hits for misses, hits, *_ in workers.values()) == len(PARTS)
    assert min(hits for _, hits, *_ in workers.values()) >= 1


def test_killed_it_goes_on_with_the_parts_that_are_whole(
    cars, expected, cluster, openvino_model, tmp_path, clean_environment, caplog
):
    out, environment = tmp_path / "out", {**clean_environment, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, openvino_model, cars, out, cluster.master],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(parts_done(out)) < 3:
        time.sleep(0.01)
    # The driver alone: the executors have to see by themselves.
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert names(out) == [WORK_FOLDER]
    time.sleep(1)  # in which a task that runs may write its part
    done = parts_done(out)
    assert 3 <= len(done) < len(PARTS)
    (folder,) = (path for path in (out / WORK_FOLDER).iterdir() if path.is_dir())
    whole = {name: (folder / name).stat().st_mtime_ns for name in done}
    (folder / f"{PARTS[-1]}.1a2b{PARTIAL}").write_bytes(b"PAR1")
    with caplog.at_level(logging.INFO, "carflavor"):
        _, summary = write(openvino_model, cars, out, master=cluster.master)
    assert f"Going on after {32 * len(done) - (8 if PARTS[-1] in done else 0)} of 280 photos" in caplog.messages
    assert {name: (out / name).stat().st_mtime_ns for name in done} == whole
    assert read(out).equals(expected)
    assert names(out) == sorted([SUCCESS, *PARTS])


def test_a_worker_that_is_killed_half_way_is_done_without(
    cars, expected, cluster, openvino_model, tmp_path, monkeypatch
):
    def write_shards(session, work, numbers, on_shards):
        def kill_one(written):
            done.extend(written)
            if done and not killed:
                killed.append(len(done))
                cluster.workers.pop().kill()
            on_shards(written)

        write_shards_on_spark(session, work, numbers, kill_one)

    killed, done, write_shards_on_spark = [], [], scoring_step.write_shards_on_spark
    monkeypatch.setattr(shards_on_spark, "_SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(scoring_step, "write_shards_on_spark", write_shards)
    write(openvino_model, cars, tmp_path / "out", master=cluster.master)
    assert 1 <= killed[0] < len(PARTS)
    assert read(tmp_path / "out").equals(expected)
    assert names(tmp_path / "out") == sorted([SUCCESS, *PARTS])


def test_photos_in_a_dataframe_as_the_docs_have_it(few_cars, cluster, openvino_model, tmp_path):
    photos = tmp_path / "cars"
    shutil.copytree(few_cars, photos)
    (photos / "4.png").write_bytes(b"no photo")
    expected = carflavor.load_model(openvino_model).predict(
        [photos / f"{number}.png" for number in range(8)], on_error="report"
    )
    text = (ROOT / "docs" / "score.md").read_text()
    blocks = [
        block
        for block in re.findall(r"```python\n(.+?)```", text, re.DOTALL)
        if "def predict" in block or "_udf" in block
    ]
    assert len(blocks) == 2

    def find_threads():
        """Returns how many threads the model has that MLflow keeps for `spark_udf` in this process; None without."""
        from mlflow.pyfunc.spark_model_cache import SparkModelCache

        for model, _ in SparkModelCache._models.values():
            engine = model._model_impl.get_raw_model().engine
            return engine._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
        return None

    with open_session(cluster.master, "test") as session:
        names = {"spark": session}
        for block in blocks:
            block = block.replace("/shared/photos", str(photos))
            exec(re.sub("/shared/model|models:/carflavor@champion", str(openvino_model), block), names)
            rows = sorted((row.asDict() for row in names["answers"].collect()), key=lambda row: row["path"])
            assert [Path(row["path"]).name for row in rows] == [f"{number}.png" for number in range(8)]
            for column in ("label", "class_id", "error"):
                assert [row[column] for row in rows] == [
                    None if pd.isna(value) else value for value in expected[column]
                ]
            assert [row["prob"] for row in rows if row["error"] is None] == pytest.approx(
                expected["prob"].dropna().tolist(), abs=1e-6
            )
            assert [len(row["top_k"]) for row in rows] == [3] * 4 + [0] + [3] * 3
        threads = [answer for _, answer in ask_workers(session, find_threads)]
    assert set(filter(None, threads)) == {1}


def test_processes_and_archives_give_equal_rows(cars, expected, openvino_model, tmp_path):
    archive = shutil.make_archive(tmp_path / "cars", "zip", cars)
    out, _ = write(openvino_model, archive, tmp_path / "out", workers=2)
    assert read(out).equals(expected)


def test_a_table_of_paths_and_urls_with_boxes(few_cars, photos, openvino_model, tmp_path):
    assert photos[3].shape == (39, 66, 3)
    shutil.copy(few_cars / "3.png", tmp_path / "3.png")
    with web_server(few_cars) as url:
        rows = [
            ("3.png", 20, 10, 40, 25),
            (f"{few_cars}/5.png", "", "", "", ""),
            (f"{url}/6.png", 1, 1, 9, 9),
            ("3.png", "", "", "", ""),
            ("4.png", "", "", "", ""),
            (f"{url}/8.png", "", "", "", ""),
            ("3.png", 2, 3, 1, 8),
        ]
        pd.DataFrame(rows, columns=["image_url", "x1", "y1", "x2", "y2"]).to_csv(tmp_path / "cars.csv", index=False)
        out, summary = write(openvino_model, tmp_path / "cars.csv", tmp_path / "out", workers=1, top_k=2)
    table = read(out)
    assert table.column_names == ["photo", "x1", "y1", "x2", "y2", *COLUMNS[1:]]
    answers = table.to_pylist()
    assert [answer["photo"] for answer in answers] == [row[0] for row in rows]
    boxes = [tuple(answer[x] for x in ("x1", "y1", "x2", "y2")) for answer in answers]
    none = (None,) * 4
    assert boxes == [(20, 10, 40, 25), none, (1, 1, 9, 9), none, none, none, (2, 3, 1, 8)]
    given = [photos[3], photos[5], photos[6], photos[3]]
    direct = carflavor.load_model(openvino_model).predict(given, [boxes[0], None, boxes[2], None], top_k=2)
    assert [answer["label"] for answer in answers[:4]] == direct["label"].tolist()
    assert [answer["prob"] for answer in answers[:4]] == pytest.approx(direct["prob"].tolist(), abs=1e-6)
    assert answers[0]["prob"] != answers[3]["prob"]  # the box was used
    assert [len(answer["top_k"]) for answer in answers] == [2, 2, 2, 2, 0, 0, 0]
    errors = [answer["error"] for answer in answers]
    assert errors[:5] == [None] * 4 + ["No such file or directory"]
    assert errors[5] == f"{url}/8.png does not exist"
    assert errors[6] == ("expected a box with x1 < x2 and y1 < y2 inside the photo of 66 x 39 pixels, got (2, 3, 1, 8)")
    assert (summary["photos"], summary["errors"]) == (7, 3)


def test_names_in_a_table_that_are_no_files(few_cars, openvino_model, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    shutil.copy(few_cars / "1.png", tmp_path / "~backup.png")
    names = [
        "pipe.png",
        "/dev/zero",
        ".",
        "a\0b.png",
        "file:///a%00b.png",
        "file://[a",
        "~backup.png",
        "x" * 300 + ".png",
    ]
    pd.DataFrame({"path": names}).to_parquet(tmp_path / "cars.parquet")
    out, summary = write(openvino_model, tmp_path / "cars.parquet", tmp_path / "out", workers=1)
    errors = [row["error"] for row in read(out).to_pylist()]
    assert errors[:3] == [
        f"{place}: expected a file, got a folder or a device"
        for place in (tmp_path / "pipe.png", "/dev/zero", tmp_path)
    ]
    assert errors[3] == r"expected a path or URL, got 'a\x00b.png': embedded null byte"
    assert errors[4:6] == [
        "expected a path or URL, got 'file:///a%00b.png': embedded null byte",
        "expected a path or URL, got 'file://[a': Invalid IPv6 URL",
    ]
    assert errors[6:] == [None, "File name too long"]


def test_what_lies_beside_the_photos_changes_nothing(few_cars, openvino_model, tmp_path, monkeypatch, caplog):
    """Such as predictions of the same photos, in a folder below theirs, and a log that grows."""
    photos = tmp_path / "cars"
    shutil.copytree(few_cars, photos)
    write(openvino_model, photos, photos / "scores", workers=1)
    listed = list_photos(str(photos))
    digest, stamp = listed.digest(), listed.store.stamp()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring_step, "_publish", lambda *_: (_ for _ in ()).throw(Killed))
        write(openvino_model, photos, photos / "scores", workers=1)
    (photos / "camera.log").write_text("a line")
    with caplog.at_level(logging.INFO, "carflavor"):
        out, _ = write(openvino_model, photos, photos / "scores", workers=1)
    assert "Going on after 8 of 8 photos" in caplog.messages
    assert read(out)["photo"].to_pylist() == [f"{number}.png" for number in range(8)]
    assert list_photos(str(photos)).digest() == digest
    assert list_photos(str(photos)).store.stamp() == stamp  # which workers of Spark see
    os.utime(photos / "3.png", (1, 1))
    assert list_photos(str(photos)).digest() != digest


def test_out_within_the_model_is_refused(few_cars, openvino_model, tmp_path):
    shutil.copytree(openvino_model, tmp_path / "model")
    with pytest.raises(ValueError, match=f"^out: expected a folder outside the model {tmp_path}/model, got "):
        write(tmp_path / "model", few_cars, tmp_path / "model" / "out", workers=1)


def test_tables_as_spark_writes_them(few_cars, openvino_model, tmp_path):
    folder = tmp_path / "cars.parquet"
    folder.mkdir()
    for part, numbers in enumerate(([1, 0], [7])):
        frame = pd.DataFrame({"id": numbers, "path": [f"{few_cars}/{number}.png" for number in numbers]})
        frame.to_parquet(folder / f"part-{part}.snappy.parquet")
    # A task that had no rows.
    pq.write_table(
        pa.schema([("id", pa.int64()), ("path", pa.string())]).empty_table(), folder / "part-2.snappy.parquet"
    )
    (folder / SUCCESS).touch()
    out, _ = write(openvino_model, folder, tmp_path / "out", workers=1)
    assert read(out).column_names == COLUMNS
    assert [Path(name).name for name in read(out)["photo"].to_pylist()] == ["1.png", "0.png", "7.png"]


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("name,label", "a.jpg,1", "expected a column such as path or url, got name, label"),
        ("path,x1,y1,x2", "a.jpg,1,2,3", "expected the columns x1, y1, x2, y2 for boxes, got none named y2"),
        ("path,bbox", "a.jpg,big", "row 2: expected a box of four numbers, got b, i, g"),
        ("path,x1,y1,x2,y2", "a.jpg,0,0,1e300,1", "row 2: expected a box of four numbers, got 0, 0, 1e300, 1"),
        ("path,note", ",none", "row 2: expected the path or URL of a photo, got none"),
        ("path", "https://a.example/1.jpg?sig=s3cret", "photo 1: https://a.example/1.jpg: expected a URL without a"),
        ("path", "nowhere://1.jpg", "photo 1: nowhere://1.jpg: Protocol not known: nowhere"),
    ],
)
def test_tables_that_are_refused(tmp_path, header, row, expected):
    (tmp_path / "cars.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ValueError) as error:
        list_photos(str(tmp_path / "cars.csv"))
    assert str(error.value).startswith("photos: ") and expected in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_row_of_a_folder_of_tables_is_named_by_its_file(tmp_path):
    (tmp_path / "cars.parquet").mkdir()
    with pytest.raises(ValueError, match=f"^photos: {tmp_path}/cars.parquet: expected a table, or a folder of Parquet"):
        list_photos(str(tmp_path / "cars.parquet"))
    for part, path in enumerate(["a.jpg", None]):
        pq.write_table(pa.table({"path": pa.array([path], pa.string())}), tmp_path / "cars.parquet" / f"{part}.parquet")
    with pytest.raises(ValueError) as error:
        list_photos(str(tmp_path / "cars.parquet"))
    assert str(error.value) == (
        f"photos: {tmp_path}/cars.parquet/1.parquet, row 1: expected the path or URL of a photo, got none"
    )


def test_places_without_photos(tmp_path, few_cars):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=f"^photos: expected photos in {tmp_path}, got notes.txt$"):
        list_photos(str(tmp_path))
    archive = shutil.make_archive(tmp_path / "cars", "gztar", few_cars)
    with pytest.raises(ValueError, match=f"^photos: expected photos that .* got {archive}, .* pack it anew as"):
        list_photos(archive)
    with pytest.raises(ValueError, match="^photos: .*/nowhere does not exist$"):
        list_photos(str(tmp_path / "nowhere"))


def test_an_unreadable_photo_ends_it_under_raise_and_loses_nothing(few_cars, openvino_model, tmp_path, caplog):
    photos = tmp_path / "cars"
    shutil.copytree(few_cars, photos)
    (photos / "4.png").write_bytes(b"no photo")
    with pytest.raises(ValueError) as error:
        write(openvino_model, photos, tmp_path / "out", workers=1, on_error="raise")
    assert str(error.value) == (
        f"photos: {photos}: 4.png: {NO_PHOTO}. With on_error=report such photos are rows with an error"
    )
    assert names(tmp_path / "out") == [WORK_FOLDER]
    with caplog.at_level(logging.INFO, "carflavor"):
        out, summary = write(openvino_model, photos, tmp_path / "out", workers=1)
    assert "Going on after 8 of 8 photos" in caplog.messages
    assert [row["error"] for row in read(out).to_pylist()] == [None] * 4 + [NO_PHOTO] + [None] * 3
    assert (summary["photos"], summary["errors"], summary["photos_per_second"]) == (8, 1, None)


def test_earlier_predictions_stay_until_all_new_ones_are_there(cars, few_cars, openvino_model, tmp_path, monkeypatch):
    out, _ = write(openvino_model, few_cars, tmp_path / "out", workers=1)
    earlier = read(out)
    replaced = []

    def replace(source, target):
        replaced.append(target)
        if Path(target).parent == out:
            assert names(out) == [WORK_FOLDER, *PARTS[: len(names(out)) - 1]]  # nothing of the earlier run
            if len(names(out)) == 2:
                raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a setting"):
        # In the middle of the work.
        patch.setattr(partitions.Scoring, "write_shard", lambda *_: (_ for _ in ()).throw(ValueError("a setting")))
        write(openvino_model, cars, out, workers=1)
    assert read(out).equals(earlier)
    assert SUCCESS in names(out)
    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # In the middle of giving names.
        patch.setattr(os, "replace", replace)
        write(openvino_model, cars, out, workers=1)
    assert names(out) == [WORK_FOLDER, PARTS[0]]
    with pytest.raises(ValueError, match="^photos: .*: camera 1/0/4-34.png: "):
        write(openvino_model, cars, out, workers=1, on_error="raise")
    _, summary = write(openvino_model, cars, out, workers=1)
    assert summary["photos_per_second"] is None  # nothing was scored again
    assert names(out) == sorted([SUCCESS, *PARTS])
    assert read(out)["photo"].to_pylist() == list(list_photos(str(cars)).names)


def test_a_part_that_was_lost_after_it_got_its_name_is_scored_again(few_cars, openvino_model, tmp_path, monkeypatch):
    """As on a network drive, from which the hidden folder cannot be removed."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        out, _ = write(openvino_model, few_cars, tmp_path / "out", workers=1)
    assert names(out) == [WORK_FOLDER, SUCCESS, PARTS[0]]
    (out / PARTS[0]).unlink()
    # Some of it could be.
    next(out.glob(f"{WORK_FOLDER}/*/model/manifest.json")).unlink()
    out, summary = write(openvino_model, few_cars, out, workers=1)
    assert names(out) == [SUCCESS, PARTS[0]]
    assert (summary["photos"], read(out).num_rows) == (8, 8)


def test_into_a_folder_that_takes_files_from_their_start_to_their_end_alone(
    few_cars, openvino_model, tmp_path, monkeypatch
):
    """As volumes of Databricks, with neither times nor permissions."""

    def refuse(*args, **options):
        raise OSError(95, os.strerror(95))

    def open_in_order(file, mode="r", *args, **options):
        return refuse() if set(mode) & set("a+") and str(file).startswith(str(tmp_path)) else opened(file, mode, *args)

    opened = open
    monkeypatch.setattr("builtins.open", open_in_order)
    for name in ("chmod", "utime", "pwrite", "truncate", "ftruncate"):
        monkeypatch.setattr(os, name, refuse)
    for _ in range(2):
        out, summary = write(openvino_model, few_cars, tmp_path / "out", workers=1)
        assert (summary["photos"], names(out)) == (8, ["_SUCCESS", "part-00000.parquet"])


def test_parts_of_somebody_else_are_left_alone(few_cars, openvino_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-00000.parquet").write_bytes(b"theirs")
    (out / SUCCESS).touch()
    message = f"^out: expected an empty folder or one of an earlier score, got part-00000.parquet in {out}$"
    with pytest.raises(ValueError, match=message):
        write(openvino_model, few_cars, out, workers=1)
    assert names(out) == [SUCCESS, "part-00000.parquet"]


def test_another_setting_starts_over(cars, openvino_model, tmp_path, caplog, monkeypatch):
    def stop_after_two(self, number):
        if number == 2:
            raise Killed
        return write_shard(self, number)

    write_shard = partitions.Scoring.write_shard
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(partitions.Scoring, "write_shard", stop_after_two)
        write(openvino_model, cars, tmp_path / "out", workers=1)
    assert parts_done(tmp_path / "out") == PARTS[:2]
    out, _ = write(openvino_model, cars, tmp_path / "out", workers=1, min_prob=1.0)
    assert f"not what they were when {out / WORK_FOLDER} was begun: starting over" in caplog.text
    labels = [row["label"] for row in read(out).to_pylist() if row["error"] is None]
    assert labels == ["unknown"] * 279


def test_limits_of_the_environment(few_cars, openvino_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CARFLAVOR_MAX_PHOTO_PIXELS", "2600")
    out, _ = write(openvino_model, few_cars, tmp_path / "out", workers=1)
    assert [row["error"] for row in read(out).to_pylist()] == [None] * 4 + [
        f"expected a photo of at most 2,600 pixels, got one of {width} x {height}"
        for width, height in ((63, 42), (60, 45), (57, 48), (54, 51))
    ]


def test_limits_of_the_environment_in_a_session_that_was_there_before(few_cars, openvino_model, tmp_path, monkeypatch):
    with open_session("local[1]", "before"):
        monkeypatch.setenv("CARFLAVOR_MAX_PHOTO_PIXELS", "2600")
        out, summary = write(openvino_model, few_cars, tmp_path / "out", master="session")
        assert summary["errors"] == 4
        # And the other way round: the worker has it from the step before.
        monkeypatch.delenv("CARFLAVOR_MAX_PHOTO_PIXELS")
        assert write(openvino_model, few_cars, out, master="session")[1]["errors"] == 0


def test_a_photo_that_goes_meanwhile_is_a_row_with_an_error(cars, openvino_model, tmp_path, monkeypatch):
    def write_shard(self, number):
        (folder / "0-00.png").unlink(missing_ok=True)
        return written(self, number)

    folder, written = tmp_path / "cars", partitions.Scoring.write_shard
    shutil.copytree(cars / "camera 0" / "0", folder)
    monkeypatch.setattr(partitions.Scoring, "write_shard", write_shard)
    out, summary = write(openvino_model, folder, tmp_path / "out", workers=1)
    assert (summary["photos"], summary["errors"]) == (54, 1)
    assert read(out).to_pylist()[0]["error"] == "No such file or directory"


def test_photos_that_are_too_large_are_not_kept_for_their_batch(few_cars, openvino_model, tmp_path, monkeypatch):
    def predict_rows(self, photos, *arguments, **settings):
        kept.extend(map(len, photos))
        return predict(self, photos, *arguments, **settings)

    sizes = [(few_cars / f"{number}.png").stat().st_size for number in range(8)]
    limit = sorted(sizes)[4]
    kept, predict = [], CarClassifier.predict_rows
    monkeypatch.setattr(CarClassifier, "predict_rows", predict_rows)
    monkeypatch.setenv("CARFLAVOR_MAX_PHOTO_BYTES", str(limit))
    out, summary = write(openvino_model, few_cars, tmp_path / "out", workers=1)
    assert kept == [size for size in sizes if size <= limit]
    assert [row["error"] for row in read(out).to_pylist()] == [
        None if size <= limit else f"expected a photo of at most {limit:,} bytes, got {size:,}" for size in sizes
    ]
    assert summary["errors"] == 8 - len(kept) > 0


def test_the_step_logs_what_it_did(few_cars, openvino_model, tmp_path, store):
    (tmp_path / "cars").mkdir()
    for name in ("1.png", "5.png"):
        shutil.copy(few_cars / name, tmp_path / "cars")
    (tmp_path / "cars" / "2.png").write_bytes(b"no photo")
    command, _ = load("score")
    arguments = [f"--model={openvino_model}", f"--photos={tmp_path / 'cars'}", f"--out={tmp_path / 'out'}"]
    result = CliRunner().invoke(command, [*arguments, "--workers=1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert {name: run.data.metrics[name] for name in ("photos", "errors", "unknown")} == {
        "photos": 3,
        "errors": 1,
        "unknown": 0,
    }
    assert run.data.metrics["photos_per_second"] > 0
    assert run.data.tags[tracking.STEP_TAG] == "score"
    assert run.data.tags["carflavor.predictions"] == str(tmp_path / "out")
    artifacts = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "artifacts")))
    assert names(artifacts) == ["config.json", "predictions.png", "report.html", "scoring.json"]
    summary = json.loads((artifacts / "scoring.json").read_text())
    assert summary["first_errors"] == [{"photo": "2.png", "error": NO_PHOTO}]
    assert summary["manifest_sha256"] == carflavor.flavor.manifest_sha256(openvino_model)
    assert sum(row["photos"] for row in summary["photos_by_label"]) == 2
    assert "2.png" in (artifacts / "report.html").read_text()


def test_what_is_refused_before_any_work(few_cars, openvino_model, tmp_path, store):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"Expected master to be local\[n\], spark://.*Received: master='head:7077'"):
        write(openvino_model, few_cars, out, master="head:7077")
    with pytest.raises(ValueError, match="^expected on_error to be one of raise, report, got 'skip'$"):
        write(openvino_model, few_cars, out, on_error="skip")
    with pytest.raises(carflavor.flavor.MlflowException, match="expected a model that carflavor wrote"):
        score(ScoreConfig(model=str(few_cars), photos=str(few_cars), out=str(out)))
    assert [run.info.status for run in store.search_runs(["0"])] == ["FAILED"]
    assert not out.exists()
    with lock(out / WORK_FOLDER / "lock", ""), pytest.raises(ValueError, match=f"^Another process writes .* to {out}$"):
        write(openvino_model, few_cars, out, workers=1)


def test_without_a_master_no_pyspark_is_needed(clean_environment):
    code = "import sys; sys.modules['pyspark'] = None; import carflavor.score"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment, check=True)
