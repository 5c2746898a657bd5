import contextlib
import os
import shutil
import sqlite3
import sys
import uuid

import keras
import mlflow
import numpy as np
import pytest
from azure.storage.blob import BlobServiceClient
from colours import add_tiny_network, write_split
from servers import azurite, mlflow_models_serve

import carflavor
from carflavor.image import squash
from carflavor.networks import NETWORKS
from carflavor.networks.resnet import _basic_block, build_resnet

# With a slash, quotes of both kinds and letters beyond ASCII: names that real datasets have.
CLASS_NAMES = ["Ram C/V Cargo Van 2012", 'Škoda "Octavia" Combi 2010', "Citroën l'Ami 1961"]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The database of a new sqlite store. MLflow takes a second to make one, for each version that it ever had."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """MLflow's real sqlite store in the test's own folder, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", [f"{tmp_path}/mlruns/0"])
    monkeypatch.setenv("CARFLAVOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield mlflow.MlflowClient()
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def tiny_network(photos):
    """A real network of one basic block, 3 classes at 32 px, that has learned the eight photos a little."""
    keras.utils.set_random_seed(0)
    network = build_resnet([1], _basic_block, len(CLASS_NAMES), 32, "tiny")
    network.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    squares = np.stack([squash(squash(photo, 48), 32) for photo in photos])
    network.fit(squares, np.arange(len(photos)) % 3, epochs=12, verbose=0)
    return network


@pytest.fixture(scope="session")
def packed_model(tiny_network, tmp_path_factory):
    """The model directory of the tiny network."""
    path = tmp_path_factory.mktemp("packed") / "model"
    carflavor.save_model(
        tiny_network, path, class_names=CLASS_NAMES, image_size=48, crop_margin=4, training={"network": "tiny"}
    )
    return path


@pytest.fixture(scope="session")
def openvino_model(tiny_network, tmp_path_factory):
    """The same with OpenVINO in float32 as its engine."""
    path = tmp_path_factory.mktemp("openvino") / "model"
    carflavor.save_model(tiny_network, path, class_names=CLASS_NAMES, image_size=48, crop_margin=4, engine="openvino")
    return path


@pytest.fixture(scope="session")
def photos():
    """Eight uint8 RGB photos of different shapes."""
    random = np.random.default_rng(0)
    # Smooth fields of colour, not noise: noise is grey once it is squashed.
    coarse = [random.integers(0, 256, (3, 3, 3), "uint8") for _ in range(8)]
    return [np.kron(field, np.ones((10 + row, 25 - row, 1), "uint8")) for row, field in enumerate(coarse)]


@pytest.fixture(scope="session")
def clean_environment():
    """The environment for a process of its own: this interpreter first on the path, nothing of ours or MLflow's."""
    ours = ("MLFLOW_", "CARFLAVOR_", "PYTHON")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


@pytest.fixture(scope="session")
def scoring_url(packed_model, tmp_path_factory, clean_environment):
    """Where MLflow's own server answers by the packed model, as the one does that Azure puts around it."""
    # Other tests look at what is in the model's directory.
    environment = clean_environment | {"PYTHONDONTWRITEBYTECODE": "1"}
    with mlflow_models_serve(packed_model, tmp_path_factory.mktemp("scoring"), environment) as server:
        yield f"{server.url}/invocations"


@pytest.fixture
def tiny_network_by_name(monkeypatch):
    """`network=tiny`, for one test."""
    monkeypatch.setitem(NETWORKS, "tiny", None)  # has it removed again; a delitem of what is not there would not
    add_tiny_network()


@pytest.fixture
def data(tmp_path):
    """A folder with record files of three colours: 48 training photos and 12 for validation."""
    write_split(tmp_path / "records" / "train.h5", [0, 1, 2] * 16)
    write_split(tmp_path / "records" / "validation.h5", [0, 1, 2] * 4)
    return tmp_path / "records"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    with azurite(tmp_path_factory.mktemp("azurite")) as connection_string:
        yield connection_string


@pytest.fixture
def container(emulator, monkeypatch):
    """A new container `cars-<8 characters>` of an emulated Azure account, as the client of Microsoft's SDK."""
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", emulator)
    with BlobServiceClient.from_connection_string(emulator) as service:
        yield service.create_container(f"cars-{uuid.uuid4().hex[:8]}")
