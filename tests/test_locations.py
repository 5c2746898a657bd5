import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import mlflow
import pytest
from colours import PROJECT, write_split
from tqdm import tqdm

from carflavor import progress
from carflavor.data.locations import data_home, resolve_input, resolve_output
from carflavor.data.records import RecordFile
from carflavor.preprocess import open_split


def test_data_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARFLAVOR_HOME", "elsewhere")
    assert data_home() == tmp_path / "elsewhere"
    monkeypatch.setenv("CARFLAVOR_HOME", "")
    monkeypatch.setenv("HOME", "/home/ada")
    assert data_home() == Path("/home/ada/.carflavor")


def test_local_inputs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my cars"
    folder.mkdir()
    for place in ("my cars", str(folder), "~/my cars", folder.as_uri(), f"file:{folder}"):
        assert resolve_input(place, "source") == folder


@pytest.mark.parametrize("place", ["s3://bucket/cars", "https://example.com/cars.tgz", "abfss://a@b.net/cars"])
def test_an_output_in_a_remote_store_is_refused(place):
    with pytest.raises(ValueError) as error:
        resolve_output(place, "out")
    assert str(error.value) == f"out: expected a local path, got {place}"
    with pytest.raises(ValueError, match="^out: expected a local path, got s3://bucket/cars$"):
        resolve_output("s3://AKIA:secret@bucket/cars", "out")


def test_what_is_neither_path_nor_url_is_refused():
    with pytest.raises(ValueError, match="^data: expected a local path, runs:/... or models:/..., got s3:bucket/cars$"):
        resolve_input("s3:bucket/cars", "data")


def test_records_on_azure(container, tmp_path):
    write_split(tmp_path / "train.h5", [0, 1, 2])
    write_split(tmp_path / "validation.h5", [2, 1])
    for name in ("train.h5", "validation.h5"):
        container.upload_blob(f"my/records/{name}", (tmp_path / name).read_bytes())
    records = f"abfss://{container.container_name}@devstoreaccount1.dfs.core.windows.net/my/records"
    path = resolve_input(f"{records}/train.h5", "data")
    with RecordFile(tmp_path / "train.h5") as written, RecordFile(path) as read:
        assert (read.path.name, read.digest()) == ("train.h5", written.digest())
    with open_split(records, "validation") as validation:
        assert validation.labels.tolist() == [2, 1]
    # Only what is needed was copied; the rest follows where all is asked for.
    folder = resolve_input(records, "data", ["validation.h5"])
    assert [path.name for path in folder.iterdir()] == ["validation.h5"]
    assert resolve_input(records, "data") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["train.h5", "validation.h5"]
    with pytest.raises(ValueError, match=f"^data: {records}/test.h5 does not exist$"):
        open_split(records, "test")


def test_a_url_is_copied_once(container):
    container.upload_blob("train.h5", b"one")
    url = f"abfss://{container.container_name}/train.h5"
    path = resolve_input(url, "data")
    container.upload_blob("train.h5", b"other", overwrite=True)
    assert resolve_input(url, "data") == path
    assert path.read_bytes() == b"one"


def test_a_served_model_lacks_the_packages_for_urls():
    code = """
import sys
sys.modules |= dict.fromkeys(["fsspec", "aiohttp", "tqdm"])  # as if they were not installed
import carflavor.server
carflavor.server.resolve_input("abfss://cars/model", "model")
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.stderr.endswith(
        "ValueError: model: abfss://cars/model: fsspec, which reads URLs, is not installed: pip install fsspec\n"
    )


def test_names_outside_a_folder_are_not_written(monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe("/model/MLmodel", b"")
    monkeypatch.setitem(files.store, "/model/../../x", files.store["/model/MLmodel"])
    with pytest.raises(ValueError, match="^model: memory://model: expected names below one folder, got '../../x'$"):
        resolve_input("memory://model", "model")


def test_copying_shows_how_far_it_is(container, monkeypatch, capsys):
    container.upload_blob("records/train.h5", bytes(1000))
    container.upload_blob("records/test.h5", bytes(500))
    # Not only after a second.
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options | {"delay": 0}))
    resolve_input(f"abfss://{container.container_name}/records", "data")
    assert re.search(r"copy records: 100%.* 1\.50k/1\.50k ", capsys.readouterr().err)


def test_copies_from_urls_go_with_the_process(container, tmp_path):
    container.upload_blob("records/report.json", b"hello")
    place = f"abfss://{container.container_name}/records"
    code = f"from carflavor.data.locations import *; print(resolve_input('{place}', 'data'))"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.stdout.startswith(str(temporary)), ended.stderr
    assert list(temporary.iterdir()) == []


def test_nothing_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place, message in {
        "": "source: expected a path or URI, got an empty text",
        "/no/where": "source: /no/where does not exist",
        "file:///no/where%20else": "source: /no/where else does not exist",
        "cars": (
            f"source: the relative path cars does not exist in {tmp_path}, where the step runs; "
            'type it in full, for instance source="$PWD/cars"'
        ),
    }.items():
        with pytest.raises(ValueError) as error:
            resolve_input(place, "source")
        assert str(error.value) == message


def test_artifacts_of_a_run(store):
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "records/report.json")
    folder = resolve_input(f"runs:/{run.info.run_id}/records", "data")
    assert folder.is_absolute()
    assert (folder / "report.json").read_text() == "hello"


def test_copies_of_artifacts_go_with_the_process(store, tmp_path):
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "records/report.json")
    code = f"from carflavor.data.locations import *; print(resolve_input('runs:/{run.info.run_id}/records', 'data'))"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    ended = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.stdout.startswith(str(temporary)), ended.stderr
    assert list(temporary.iterdir()) == []


def test_artifacts_of_a_registered_model(store):
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "model/classes.json")
    store.create_registered_model("cars")
    store.create_model_version("cars", f"{run.info.artifact_uri}/model")
    store.set_registered_model_alias("cars", "champion", 1)
    for place in ("models:/cars/1", "models:/cars@champion"):
        assert (resolve_input(place, "model") / "classes.json").read_text() == "hello"


def test_artifacts_that_are_not_there(store):
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "records/report.json")
    # What MLflow says of the last goes on with a list of settings.
    missing = [f"runs:/{run.info.run_id}/nope", "runs:/nope/records", "runs:/", "models:/nope/1", "models:/nope@best"]
    for place in [*missing, "models:nope", "mlflow-artifacts:/records"]:
        with pytest.raises(ValueError) as error:
            resolve_input(place, "data")
        assert str(error.value).startswith(f"data: nothing could be read from {place}: ")
        assert "\n" not in str(error.value)


def test_outputs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_output("new/cars", "out") == tmp_path / "new" / "cars"
    assert resolve_output("file:///new/my%20cars", "out") == Path("/new/my cars")
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cars").write_text("")
    with pytest.raises(ValueError, match=f"^out: expected a folder, got the file {tmp_path}/cars$"):
        resolve_output(str(tmp_path / "cars"), "out")


@pytest.mark.parametrize("place", ["runs:/0123456789abcdef0123456789abcdef/records", "models:/cars/1"])
def test_an_output_in_a_store_of_mlflow_is_refused(place):
    with pytest.raises(ValueError, match=f"^out: expected a local path, got {place}$"):
        resolve_output(place, "out")


def test_a_relative_output_in_a_temporary_clone_is_refused(monkeypatch, tmp_path):
    # `mlflow run <git URL>` clones into such a folder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tempfile.mkdtemp())
    with pytest.raises(ValueError) as error:
        resolve_output("cars", "out")
    assert str(error.value) == (
        "out: the relative path cars would be lost with the temporary clone that the project runs in; "
        'type it in full, for instance out="$PWD/cars"'
    )
    assert resolve_output("/data/cars", "out") == Path("/data/cars")
