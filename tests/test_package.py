import importlib.util
import json
import logging
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from colours import write_split

import carflavor
from carflavor import engines, flavor, parity
from carflavor.evaluate import EvaluateConfig, evaluate
from carflavor.package import PackageConfig, package

NAMES = ["red", "green", "blue"]


@pytest.fixture
def logged_model(store, tiny_network, data):
    """A model in a run that names its record files, as `train` leaves it."""
    with mlflow.start_run(tags={"carflavor.records": str(data)}):
        return carflavor.log_model(tiny_network, class_names=NAMES, image_size=40, training={"crop": "box"}).model_uri


def test_package_registers_a_version_with_an_alias(store, logged_model):
    first = package(PackageConfig(logged_model, register_as="cars", alias="champion", engine="keras"))
    second = package(PackageConfig(logged_model, register_as="cars", alias="champion", engine="keras"))
    assert (int(first.version), int(second.version)) == (1, 2)
    assert str(store.get_model_version_by_alias("cars", "champion").version) == "2"
    answer = carflavor.load_model("models:/cars@champion").predict([np.zeros((48, 48, 3), "uint8")])
    assert answer["label"][0] in NAMES
    run = store.search_runs(["0"])[0]
    assert run.data.tags["carflavor.model"] == "models:/cars/2"


def test_package_packs_openvino_and_says_how_it_compares(store, logged_model, data):
    version = package(PackageConfig(logged_model, register_as="cars", precision="float32"))
    path = Path(mlflow.artifacts.download_artifacts("models:/cars/1"))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["engine"] == {"name": "openvino", "precision": "float32"}
    assert manifest["training"] == {"crop": "box"}
    assert manifest["parity"]["with"] == "keras in float32"
    assert manifest["parity"]["accuracy_of"]["source"] == "colours"
    assert manifest["parity"]["agreement_of"] == manifest["parity"]["accuracy_of"]
    # The crop that it was trained with, and not the other one that the files hold.
    assert list(manifest["parity"]["crops"]) == ["box"]
    figures = manifest["parity"]["crops"]["box"]
    assert (figures["photos"], figures["agreement"], figures["accuracy_difference"]) == (12, 1.0, 0.0)
    assert figures["accuracy"] == figures["keras_accuracy"]
    assert 0 <= figures["mean_difference"] <= figures["max_difference"] < 1e-5
    assert carflavor.load_model("models:/cars/1").engine.name == "openvino"
    run = store.get_run(version.run_id)
    assert run.data.metrics["parity_float32_box_agreement"] == 1.0
    assert run.data.tags["carflavor.records"] == str(data)
    assert {"parity_float32_box.png", "model"} <= {file.path for file in store.list_artifacts(version.run_id)}
    # What loading it may demand.
    assert store.get_model_version("cars", "1").tags["carflavor_manifest_sha256"] == flavor.manifest_sha256(path)


@pytest.mark.parametrize("engine", ["keras", "openvino"])
def test_package_writes_a_card_of_what_evaluate_has_found(store, logged_model, data, engine):
    write_split(data / "test.h5", [0, 1, 2] * 7)
    found = evaluate(EvaluateConfig(logged_model, str(data)))["box"]
    (evaluation,) = store.search_runs(["0"], "tags.`carflavor.step` = 'evaluate'")
    package(PackageConfig(logged_model, "cars", "challenger", engine, "auto", licence="For research alone."))
    path = Path(mlflow.artifacts.download_artifacts("models:/cars@challenger"))
    card = (path / "README.md").read_text(encoding="utf-8")
    version = store.get_model_version("cars", "1")
    assert version.description == card.replace("<version>", "1")
    assert card.startswith("# cars\n\nNames the car in a photo: one of 3 classes, red, green, blue.\n")
    assert f"on 21 test photos of colours, run `{evaluation.info.run_id}`" in card
    assert f"| `box` | {found.measurement.top_1} | " in card and "| `full` | " in card
    assert "It is version <version> of `cars` in the registry, registered with the alias `challenger`" in card
    assert "\nFor research alone. The licence of the photos\n" in card
    assert ("same answer as Keras for 100.00 %\n  of 12 photos" in card) == (engine == "openvino")
    # It is under no digest: what loading demands is there all the same, and a changed card does no harm.
    assert flavor.manifest_sha256(path) == version.tags["carflavor_manifest_sha256"]
    (path / "README.md").write_text("changed")
    assert carflavor.load_model(path).class_names == NAMES
    # The model of the training has none, and neither has what lies there changed.
    assert not list(Path(mlflow.artifacts.download_artifacts(logged_model)).glob("README.md"))


def test_package_tells_of_the_newest_evaluation_that_can_be_read(store, logged_model, data, caplog):
    write_split(data / "test.h5", [0, 1, 2] * 7)
    for _ in range(2):
        evaluate(EvaluateConfig(logged_model, str(data)))
    newest, older = (run.info for run in store.search_runs(["0"], "tags.`carflavor.step` = 'evaluate'"))
    (Path(newest.artifact_uri) / "evaluation.json").unlink()
    package(PackageConfig(logged_model, register_as="cars", engine="keras"))
    assert f"on 21 test photos of colours, run `{older.run_id}`" in store.get_model_version("cars", "1").description
    assert f"Nothing could be read of evaluation.json of the run {newest.run_id}: " in caplog.text
    (Path(older.artifact_uri) / "evaluation.json").unlink()
    package(PackageConfig(logged_model, register_as="cars", engine="keras"))
    assert "It was not measured on test photos" in store.get_model_version("cars", "2").description


def test_a_version_is_packed_anew_with_the_records_and_evaluations_that_are_known_of_it(
    store, logged_model, data, caplog
):
    write_split(data / "test.h5", [0, 1, 2] * 7)
    package(PackageConfig(logged_model, register_as="cars", precision="float32"))
    evaluate(EvaluateConfig(logged_model, str(data)))
    package(PackageConfig("models:/cars/1", register_as="cars", precision="float32"))
    (of_source,) = store.search_runs(["0"], "tags.`carflavor.step` = 'evaluate'")
    assert f"run `{of_source.info.run_id}`" in store.get_model_version("cars", "2").description
    evaluate(EvaluateConfig("models:/cars/1", str(data)))
    store.set_registered_model_alias("cars", "first", "1")
    package(PackageConfig("models:/cars@first", register_as="cars", precision="float32"))
    of_version = store.search_runs(
        ["0"], "tags.`carflavor.model` = 'models:/cars/1' AND tags.`carflavor.step` = 'evaluate'"
    )
    assert f"run `{of_version[0].info.run_id}`" in store.get_model_version("cars", "3").description
    # And of the version that was packed from a version.
    package(PackageConfig("models:/cars/3", register_as="cars", precision="float32"))
    assert f"run `{of_source.info.run_id}`" in store.get_model_version("cars", "4").description
    assert "Nothing could be read" not in caplog.text


def test_package_writes_nothing_into_a_folder_of_its_user(store, packed_model):
    before = sorted(path.name for path in packed_model.iterdir())
    package(PackageConfig(str(packed_model), register_as="cars", engine="keras"))
    assert sorted(path.name for path in packed_model.iterdir()) == before
    assert "It was not measured on test photos" in store.get_model_version("cars", "1").description


def test_package_packs_a_model_of_openvino_for_keras_again(store, logged_model, photos):
    package(PackageConfig(logged_model, register_as="cars", precision="float32"))
    package(PackageConfig("models:/cars/1", register_as="cars", engine="keras"))
    before, after = (carflavor.load_model(f"models:/cars/{version}") for version in (1, 2))
    assert (before.engine.name, after.engine.name) == ("openvino", "keras")
    assert after.manifest["training"] == {"crop": "box"}
    np.testing.assert_allclose(after.predict(photos)["prob"], before.predict(photos)["prob"], rtol=1e-4)


def test_package_takes_the_fastest_precision_that_passes(store, logged_model, monkeypatch, caplog):
    monkeypatch.setattr(engines, "cpu_has_bfloat16", lambda: True)
    package(PackageConfig(logged_model, register_as="cars"))
    assert carflavor.load_model("models:/cars/1").engine.precision == "bfloat16"
    choose = flavor.write_parity
    monkeypatch.setattr(parity, "MIN_AGREEMENT", 1.1)

    def let_the_second_pass(path, figures):
        choose(path, figures)
        monkeypatch.setattr(parity, "MIN_AGREEMENT", 0.5)

    monkeypatch.setattr(flavor, "write_parity", let_the_second_pass)
    with caplog.at_level(logging.WARNING, logger="carflavor"):
        package(PackageConfig(logged_model, register_as="cars"))
    assert "OpenVINO in bfloat16, crop=box: it agrees with Keras on less than" in caplog.text
    assert carflavor.load_model("models:/cars/2").engine.precision == "float32"


def test_package_quantises_on_training_photos(store, logged_model):
    package(PackageConfig(logged_model, register_as="cars", precision="int8"))
    classifier = carflavor.load_model("models:/cars/1")
    assert (classifier.engine.name, classifier.engine.precision) == ("openvino", "int8")
    assert classifier.manifest["parity"]["crops"]["box"]["mean_difference"] > 0


def test_package_measures_the_engine_that_it_packs_whatever_else_is_to_be_loaded(store, logged_model, monkeypatch):
    monkeypatch.setenv("CARFLAVOR_ENGINE", "keras")
    package(PackageConfig(logged_model, register_as="cars", precision="int8"))
    manifest = carflavor.load_model("models:/cars/1").manifest
    assert manifest["parity"]["crops"]["box"]["mean_difference"] > 0


def test_package_refuses_an_engine_that_answers_otherwise(store, logged_model, monkeypatch):
    monkeypatch.setattr(parity, "MIN_AGREEMENT", 1.1)
    with pytest.raises(ValueError) as error:
        package(PackageConfig(logged_model, register_as="cars", precision="float32"))
    assert str(error.value).startswith(
        "OpenVINO in float32, crop=box: it agrees with Keras on less than 110.0% of the photos: 100.00% of 12 photos "
        "get the same answer; accuracy "
    )
    assert str(error.value).endswith(" at most. Try another precision, or engine=keras")
    assert store.search_registered_models() == []
    (run,) = store.search_runs(["0"], "attributes.status = 'FAILED'")
    assert run.data.metrics["parity_float32_box_agreement"] == 1.0


def test_package_compares_on_the_photos_that_it_is_given(store, packed_model, tmp_path, logged_model):
    write_split(tmp_path / "other" / "validation.h5", [0, 1, 2] * 2)
    package(PackageConfig(logged_model, register_as="cars", precision="float32", data=str(tmp_path / "other")))
    assert carflavor.load_model("models:/cars/1").manifest["parity"]["crops"]["box"]["photos"] == 6
    message = "data: expected the folder with validation.h5, on which OpenVINO is compared with Keras; the run of this "
    with pytest.raises(ValueError, match=message):
        package(PackageConfig(str(packed_model), register_as="cars"))
    write_split(tmp_path / "strangers" / "validation.h5", [0, 1, 2], names=("cyan", "green", "blue"))
    with pytest.raises(ValueError, match="expected the 3 classes of the model"):
        package(PackageConfig(logged_model, register_as="cars", data=str(tmp_path / "strangers")))
    with pytest.raises(ValueError, match=r"expected .*train.h5, which preprocess writes, got nothing"):
        package(PackageConfig(logged_model, register_as="cars", precision="int8", data=str(tmp_path / "other")))


def test_package_compares_a_model_that_knows_the_validation_photos_on_those_of_the_test(
    store, tiny_network, data, tmp_path, caplog
):
    training = {"crop": "box", "validation": "train", "data": {"source_digest": None}}
    carflavor.save_model(tiny_network, tmp_path / "model", class_names=NAMES, image_size=40, training=training)
    config = PackageConfig(str(tmp_path / "model"), register_as="cars", precision="float32", data=str(data))
    with caplog.at_level(logging.WARNING, logger="carflavor"):
        package(config)
        assert "engines agree more than on others: the model has learned from the validation photos" in caplog.text
        caplog.clear()
        write_split(data / "test.h5", [0, 1, 2] * 7)
        package(config)
        assert "engines agree" not in caplog.text
    parity_of = [carflavor.load_model(f"models:/cars/{version}").manifest["parity"] for version in (1, 2)]
    assert [found["crops"]["box"]["photos"] for found in parity_of] == [12, 21]
    assert parity_of[1]["agreement_of"]["digest"] != parity_of[1]["accuracy_of"]["digest"]


def test_package_refuses_bfloat16_where_it_cannot_be_measured(store, logged_model, monkeypatch):
    monkeypatch.setattr(engines, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="Expected a CPU that computes in bfloat16"):
        package(PackageConfig(logged_model, register_as="cars", precision="bfloat16"))


def test_package_takes_a_folder(store, packed_model):
    package(PackageConfig(str(packed_model), register_as="cars", engine="keras"))
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
        ({"engine": "onnx"}, "Received: engine='onnx'"),
        ({"engine": "keras", "precision": "int8"}, "Received: precision='int8'"),
    ],
)
def test_package_refuses_names_before_anything_is_registered(store, packed_model, changes, message):
    with pytest.raises(ValueError, match=message):
        package(PackageConfig(str(packed_model), **changes))
    assert store.search_registered_models() == []


def test_package_says_at_once_that_nncf_is_missing(store, logged_model, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find_spec(name))
    monkeypatch.setattr(carflavor.package, "resolve_input", None)  # what takes long begins with it
    with pytest.raises(ValueError, match=r"^precision=int8 needs NNCF: pip install 'carflavor\[int8\]'$"):
        package(PackageConfig(logged_model, register_as="cars", precision="int8"))


def test_package_refuses_a_model_that_was_changed(store, packed_model, tmp_path):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "model" / "classes.json").write_text('["d", "e", "f"]')
    with pytest.raises(mlflow.MlflowException, match="classes.json is not the file that was packed"):
        package(PackageConfig(str(tmp_path / "model"), register_as="cars", engine="keras"))
    assert store.search_registered_models() == []


def test_package_refuses_a_model_that_is_not_there(store):
    for model in ("models:/nothing/1", "models:/nothing@champion", "models:/nothing/Production"):
        with pytest.raises(ValueError, match=f"model: nothing could be read from {model}: "):
            package(PackageConfig(model, register_as="cars"))
    with pytest.raises(ValueError, match=r"model: the relative path nothing does not exist .* model=\"\$PWD/nothing\""):
        package(PackageConfig("nothing", register_as="cars"))
    assert store.search_registered_models() == []
