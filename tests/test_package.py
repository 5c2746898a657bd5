import shutil

import mlflow
import numpy as np
import pytest

import carflavor
from carflavor.package import PackageConfig, package


@pytest.fixture
def logged_model(store, tiny_network):
    with mlflow.start_run():
        return carflavor.log_model(tiny_network, class_names=["a", "b", "c"], image_size=48).model_uri


def test_package_registers_a_version_with_an_alias(store, logged_model):
    first = package(PackageConfig(logged_model, register_as="cars", alias="champion"))
    second = package(PackageConfig(logged_model, register_as="cars", alias="champion"))
    assert (int(first.version), int(second.version)) == (1, 2)
    assert str(store.get_model_version_by_alias("cars", "champion").version) == "2"
    answer = carflavor.load_model("models:/cars@champion").predict([np.zeros((48, 48, 3), "uint8")])
    assert answer["label"][0] in ("a", "b", "c")
    run = store.search_runs(["0"])[0]
    assert run.data.tags["carflavor.model"] == "models:/cars/2"


def test_package_takes_a_folder(store, packed_model):
    package(PackageConfig(str(packed_model), register_as="cars"))
    run = store.search_runs(["0"])[0]
    assert store.get_model_version("cars", "1").run_id == run.info.run_id
    assert carflavor.load_model("models:/cars/1").image_size == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alias": "latest"}, "Expected alias to be a word other than latest or v1. Received: alias='latest'"),
        ({"alias": "v3"}, "Received: alias='v3'"),
        ({"alias": "V3"}, "Received: alias='V3'"),
        ({"alias": ""}, "Received: alias=''"),
        ({"alias": "two words"}, "Received: alias='two words'"),
        ({"register_as": ""}, "Expected register_as to be a name without / and :. Received: register_as=''"),
        ({"register_as": "cars/best"}, "Received: register_as='cars/best'"),
    ],
)
def test_package_refuses_names_before_anything_is_registered(store, packed_model, changes, message):
    with pytest.raises(ValueError, match=message):
        package(PackageConfig(str(packed_model), **changes))
    assert store.search_registered_models() == []


def test_package_refuses_a_model_that_was_changed(store, packed_model, tmp_path):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "model" / "classes.json").write_text('["d", "e", "f"]')
    with pytest.raises(mlflow.MlflowException, match="classes.json is not the file that was packed"):
        package(PackageConfig(str(tmp_path / "model"), register_as="cars"))
    assert store.search_registered_models() == []


def test_package_refuses_a_model_that_is_not_there(store):
    with pytest.raises(mlflow.MlflowException, match="nothing"):
        package(PackageConfig("models:/nothing/1", register_as="cars"))
    with pytest.raises(ValueError, match=r"model: the relative path nothing does not exist .* model=\"\$PWD/nothing\""):
        package(PackageConfig("nothing", register_as="cars"))
    assert store.search_registered_models() == []
