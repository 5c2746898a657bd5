"""The packed model behind MLflow's real scoring server and behind ours, started as people start them."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import CLASS_NAMES
from servers import carflavor_server, free_port, mlflow_models_serve, request

import carflavor
from carflavor import flavor
from carflavor.deploy import DeployConfig, _find_digest, deploy
from carflavor.image import encode_jpeg

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["mlflow models serve", "carflavor.server"])
def server(request, packed_model, tmp_path_factory, clean_environment):
    """The address of each: a request is answered alike."""
    folder = tmp_path_factory.mktemp("serving")
    serve = mlflow_models_serve if request.param == "mlflow models serve" else carflavor_server
    with serve(packed_model, folder, clean_environment) as running:
        yield f"{running.url}/invocations"


@pytest.fixture(scope="module")
def jpegs(photos):
    return [encode_jpeg(photo, quality=100) for photo in photos[:2]]


@pytest.fixture(scope="module")
def texts(jpegs):
    return [base64.b64encode(jpeg).decode() for jpeg in jpegs]


@pytest.fixture(scope="module")
def expected(packed_model, jpegs):
    return carflavor.load_model(packed_model).predict(jpegs)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "form",
    [
        lambda texts: {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        lambda texts: {"dataframe_records": [{"image": text} for text in texts]},
        lambda texts: {"inputs": {"image": texts}},
        lambda texts: {"inputs": [{"image": text} for text in texts]},
        lambda texts: {"instances": [{"image": text} for text in texts]},
    ],
    ids=["dataframe_split", "dataframe_records", "inputs of columns", "inputs of rows", "instances"],
)
def test_server_answers_one_photo_or_many_in_every_form(server, texts, expected, form, count):
    status, text, _ = request(server, form(texts[:count]))
    assert status == 200
    predictions = json.loads(text)["predictions"]
    assert [row["label"] for row in predictions] == expected["label"][:count].tolist()
    np.testing.assert_allclose([row["prob"] for row in predictions], expected["prob"][:count], rtol=1e-4)
    assert set(predictions[0]) == {"label", "prob", "class_id", "top_k", "error"}
    assert predictions[0]["class_id"] == CLASS_NAMES.index(predictions[0]["label"])
    assert predictions[0]["error"] is None


def test_server_takes_boxes_and_parameters(server, texts, jpegs, packed_model):
    rows = [{"image": texts[0], "x1": 10, "y1": 8, "x2": 40, "y2": 20}]
    status, text, _ = request(server, {"inputs": rows, "params": {"top_k": 2, "min_prob": 1.0}})
    (answer,) = json.loads(text)["predictions"]
    by_hand = carflavor.load_model(packed_model).predict([jpegs[0]], [(10, 8, 40, 20)])
    assert status == 200
    assert answer["prob"] == pytest.approx(by_hand["prob"][0], rel=1e-4)
    assert (answer["label"], answer["class_id"], len(answer["top_k"])) == ("unknown", None, 2)


def test_server_reports_bad_rows_beside_good_ones(server, texts):
    body = {"dataframe_split": {"columns": ["image"], "data": [["!!"], [texts[0]]]}, "params": {"on_error": "report"}}
    status, text, _ = request(server, body)
    first, second = json.loads(text)["predictions"]
    assert status == 200
    assert first == {
        "label": None,
        "prob": None,
        "class_id": None,
        "top_k": [],
        "error": "expected a photo in base64, got a text that is no base64",
    }
    assert second["error"] is None


NO_PHOTO = base64.b64encode(b"no photo").decode()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (NO_PHOTO, "row 1: expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got 8 bytes of something else"),
        ("!!!", "row 1: expected a photo in base64, got a text that is no base64"),
        ("", "row 1: expected a photo in base64, got an empty text"),
        (None, "row 1: expected a photo, got null"),
        (5, "row 1: expected a photo, got int"),
        ([1, 2], "row 1: expected a photo, got list"),
        ("/etc/passwd", "row 1: expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got 8 bytes"),
    ],
)
def test_server_answers_400_with_row_and_reason(server, texts, value, reason):
    body = {"dataframe_split": {"columns": ["image"], "data": [[texts[0]], [value]]}}
    status, text, _ = request(server, body)
    assert status == 400
    assert reason in json.loads(text)["message"]
    assert "Traceback" not in text and "stack_trace" not in text


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["image"], "data": []}},
        {"dataframe_records": []},
        {"inputs": {"image": []}},
        {"instances": []},
        {"dataframe_split": {"columns": ["image"], "data": [[5]]}},
        {"dataframe_split": {"columns": ["photo"], "data": [[NO_PHOTO]]}},
        {"dataframe_split": {"columns": ["image", "x1"], "data": [[NO_PHOTO, 1]]}},
        {"dataframe_split": {"columns": ["image", "x1", "y1", "x2", "y2"], "data": [[NO_PHOTO, "a", 1, 2, 3]]}},
        {"inputs": {"image": [NO_PHOTO]}, "params": {"top_k": 0}},
        {"inputs": {"image": [NO_PHOTO]}, "params": {"top_k": "many"}},
        {"nonsense": 1},
        b'{"inputs": ',
        b"",
    ],
)
def test_server_answers_400_to_other_bodies(server, body):
    status, text, _ = request(server, body)
    assert status == 400
    assert "Traceback" not in text and "stack_trace" not in text


def test_serve_with_uv_builds_the_environment_from_the_model_alone(
    packed_model, texts, expected, tmp_path, clean_environment
):
    """In an environment that never saw carflavor, with the packages that requirements.txt names and no other."""
    assert shutil.which("uv", path=clean_environment["PATH"]), "uv is needed: pip install -e '.[test]'"
    environment = {**clean_environment, "MLFLOW_ENV_ROOT": str(tmp_path / "environments")}
    with mlflow_models_serve(packed_model, tmp_path, environment, "uv", seconds=600) as server:
        status, text, _ = request(f"{server.url}/invocations", {"inputs": {"image": texts}})
    assert status == 200
    assert [row["label"] for row in json.loads(text)["predictions"]] == expected["label"].tolist()


def test_deploy_local_answers_and_ends(store, packed_model, capfd):
    answer = deploy(DeployConfig(str(packed_model), port=0, keep=False))
    assert answer["predictions"][0]["label"] in CLASS_NAMES
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FINISHED"
    output = capfd.readouterr().out
    assert "A photo of Aurora Hatchback 2011 is answered with" in output
    assert "curl -s -H 'Content-Type: application/json'" in output


def test_deploy_demands_the_manifest_that_the_registry_names(store, packed_model, capfd):
    with mlflow.start_run() as run:
        mlflow.log_artifacts(packed_model, "model")
    mlflow.register_model(f"runs:/{run.info.run_id}/model", "cars", tags={"carflavor_manifest_sha256": "0" * 64})
    store.set_registered_model_alias("cars", "champion", "1")
    # All that MLflow takes for this version.
    for address in ("/1", "/1/", "/01", "/latest", "/Latest", "/None", "/none/", "@champion", "@champion/"):
        assert _find_digest(f"models:/cars{address}") == "0" * 64, address
    for address in ("/2", "/Production", "@other", "@champion/data", "/1/data"):
        with pytest.raises(ValueError, match="^model: (nothing could be read from|expected) models:/"):
            _find_digest(f"models:/cars{address}")
    for model in (f"runs:/{run.info.run_id}/model", str(packed_model)):
        assert _find_digest(model) == ""
    with pytest.raises(ValueError, match="The server ended with exit code 1 before it was healthy"):
        deploy(DeployConfig("models:/cars@champion", port=0, keep=False))
    assert "expected a manifest.json with the SHA-256 0000000000" in capfd.readouterr().err
    store.set_model_version_tag("cars", "1", "carflavor_manifest_sha256", flavor.manifest_sha256(packed_model))
    assert deploy(DeployConfig("models:/cars@champion", port=0, keep=False))["predictions"]


def test_deploy_local_serves_until_ctrl_c(store, packed_model, clean_environment, tmp_path):
    """The printed curl line is run as it stands; then Ctrl-C ends the server, and the run as FINISHED."""
    port = free_port()
    environment = {**clean_environment, "CARFLAVOR_HOME": str(tmp_path)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    parameters = ["-P", f"model={packed_model}", "-P", f"port={port}"]
    project_run = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "run", PROJECT, "-e", "deploy", "--env-manager", "local", *parameters],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines = []
        for line in project_run.stdout:
            lines.append(line.rstrip())
            if line.startswith("Serving until Ctrl-C"):
                break
        curl_line = lines[lines.index("Ask it yourself:") + 1]
        answer = json.loads(subprocess.check_output(["bash", "-c", curl_line], cwd=tmp_path, env=environment))
        assert answer["predictions"][0]["label"] in CLASS_NAMES
        os.killpg(project_run.pid, signal.SIGINT)
        project_run.wait(60)
    finally:
        if project_run.poll() is None:
            os.killpg(project_run.pid, signal.SIGKILL)
        project_run.stdout.close()
    with pytest.raises(OSError):
        request(f"http://127.0.0.1:{port}/health")
    # `mlflow run` has written FAILED first.
    deadline = time.monotonic() + 60
    while store.search_runs(["0"])[0].info.status != "FINISHED" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert store.search_runs(["0"])[0].info.status == "FINISHED"


def test_deploy_refuses_a_port_that_is_taken(store, packed_model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"Expected port {port} of 127.0.0.1 to be free"):
            deploy(DeployConfig(str(packed_model), port=port))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": True}, "Expected dry_run with target=azureml alone. Received: dry_run=True, target='docker'"),
        ({"action": "delete"}, "Expected action with target=azureml alone. Received: action='delete', target='docker'"),
        ({"target": "local", "traffic": "100"}, "Received: traffic='100', target='local'"),
        ({"target": "server", "workspace": "cars"}, "Received: workspace='cars', target='server'"),
        ({"config": "cars.yaml"}, "Received: config='cars.yaml', target='docker'"),
        ({"model": ""}, "Expected model, which is to be served. Received: model=''"),
        ({"name": "Cars"}, "Received: name='Cars'"),
        ({"target": "server", "name": "Cars"}, "Received: name='Cars'"),
        ({"target": "server", "port": 0}, "Expected port to be a number that nginx can be told. Received: port=0"),
    ],
)
def test_deploy_refuses_what_it_would_not_heed_before_it_looks_for_the_model(store, changes, message):
    with pytest.raises(ValueError) as error:
        deploy(DeployConfig(**{"model": "models:/nothing/1", "target": "docker", **changes}))
    assert str(error.value).endswith(message)


def test_deploy_says_when_the_server_does_not_come_up(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="The server ended with exit code 1 before it was healthy"):
        deploy(DeployConfig(str(tmp_path / "empty"), port=0, keep=False))
