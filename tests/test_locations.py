import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import pytest
from colours import PROJECT

from carflavor.data.locations import data_home, resolve_input, resolve_output


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


@pytest.mark.parametrize("resolve", [resolve_input, resolve_output])
@pytest.mark.parametrize("place", ["s3://bucket/cars", "https://example.com/cars.tgz", "abfss://a@b.net/cars"])
def test_remote_stores_are_refused(resolve, place):
    with pytest.raises(ValueError) as error:
        resolve(place, "source")
    assert str(error.value).startswith("source: expected a local path")
    assert str(error.value).endswith(f", got {place}")
    assert "\n" not in str(error.value)


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
