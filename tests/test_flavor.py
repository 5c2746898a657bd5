import json
import logging
import shutil
import subprocess
import sys
import textwrap

import cloudpickle
import keras
import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import CLASS_NAMES
from mlflow.exceptions import MlflowException

import carflavor
from carflavor import flavor, image
from carflavor.networks.resnet import _basic_block, build_resnet


def run_python(code, cwd, environment, *arguments):
    """Runs code in a process of its own and returns its last line of output as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def squares(photos):
    return np.stack([image.squash(image.squash(photo, 48), 32) for photo in photos])


@pytest.fixture(scope="module")
def expected(tiny_network, squares):
    """Probabilities of the network itself, before it was saved."""
    probabilities = tiny_network.predict_on_batch(squares)
    assert len(set(probabilities.argmax(axis=1))) > 1, "the photos should not all get one answer"
    return probabilities


def test_model_directory_has_the_documented_files(packed_model):
    names = {path.relative_to(packed_model).as_posix() for path in packed_model.rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith("code/")} == {
        "MLmodel",
        "classes.json",
        "conda.yaml",
        "data/custom_objects.cloudpickle",
        "data/keras_module.txt",
        "data/model.keras",
        "data/save_format.txt",
        "input_example.json",
        "manifest.json",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    }
    assert {"code/carflavor/__init__.py", "code/carflavor/data/sample.py", "code/carflavor/layers.py"} <= names
    assert not any("__pycache__" in name for name in names)


def test_mlmodel_names_four_ways_in(packed_model):
    mlmodel = yaml.safe_load((packed_model / "MLmodel").read_text())
    assert set(mlmodel["flavors"]) == {"python_function", "carflavor", "tensorflow", "keras"}
    assert mlmodel["flavors"]["python_function"]["loader_module"] == "carflavor"
    inputs = json.loads(mlmodel["signature"]["inputs"])
    assert [(column["name"], column["type"], column["required"]) for column in inputs] == [
        ("image", "string", True),
        ("x1", "double", False),
        ("y1", "double", False),
        ("x2", "double", False),
        ("y2", "double", False),
    ]
    assert [(p["name"], p["default"]) for p in json.loads(mlmodel["signature"]["params"])] == [
        ("top_k", 5),
        ("min_prob", 0.0),
        ("on_error", "raise"),
    ]


def test_environment_files_pin_versions_but_no_patch_of_python(packed_model):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert yaml.safe_load((packed_model / "python_env.yaml").read_text())["python"] == version
    conda_env = yaml.safe_load((packed_model / "conda.yaml").read_text())
    assert conda_env["dependencies"][0] == f"python={version}"
    requirements = (packed_model / "requirements.txt").read_text().splitlines()
    assert f"keras=={keras.__version__}" in requirements
    assert all("==" in requirement for requirement in requirements)


def test_manifest_says_how_photos_are_prepared(packed_model):
    manifest = json.loads((packed_model / "manifest.json").read_text())
    assert (manifest["input_size"], manifest["image_size"], manifest["crop_margin"]) == (32, 48, 4)
    assert manifest["training"] == {"network": "tiny"}
    assert {"classes.json", "data/model.keras", "code/carflavor/scoring.py"} <= set(manifest["sha256"])


def test_class_names_survive(packed_model):
    assert json.loads((packed_model / "classes.json").read_text(encoding="utf-8")) == CLASS_NAMES
    assert carflavor.load_model(packed_model).class_names == CLASS_NAMES


def test_load_model_answers_like_the_network(packed_model, photos, expected):
    answer = carflavor.load_model(packed_model).predict(photos, top_k=3)
    np.testing.assert_allclose(answer["prob"], expected.max(axis=1), rtol=1e-5)
    assert answer["label"].tolist() == [CLASS_NAMES[i] for i in expected.argmax(axis=1)]
    assert answer["class_id"].tolist() == expected.argmax(axis=1).tolist()


def test_pyfunc_answers_like_the_network(packed_model, photos, expected):
    frame = pd.DataFrame({"image": [image.encode_jpeg(photo, quality=100) for photo in photos]})
    decoded = np.stack([image.squash(image.squash(image.decode(data), 48), 32) for data in frame["image"]])
    answer = mlflow.pyfunc.load_model(str(packed_model)).predict(frame)
    by_hand = carflavor.load_model(packed_model).network.predict_on_batch(decoded)
    np.testing.assert_allclose(answer["prob"], by_hand.max(axis=1), rtol=1e-5)
    # JPEG costs a little, even at its best quality.
    np.testing.assert_allclose(answer["prob"], expected.max(axis=1), atol=0.05)


FRESH_PROCESS = """
    import json, sys
    import numpy as np
    assert "carflavor" not in sys.modules
    path, squares = sys.argv[1], np.load(sys.argv[2])
"""


@pytest.fixture(scope="module")
def moved_model(packed_model, squares, tmp_path_factory):
    """The model directory in another place than where it was written, and photos beside it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(packed_model, folder / "moved")
    np.save(folder / "squares.npy", squares)
    return folder


def test_mlflow_pyfunc_loads_in_a_fresh_process(moved_model, expected, clean_environment):
    answer = run_python(
        FRESH_PROCESS
        + """
    import mlflow
    import pandas as pd
    model = mlflow.pyfunc.load_model(path)
    frame = model.predict(pd.DataFrame({"image": list(squares)}))
    import carflavor
    print(json.dumps([frame["prob"].tolist(), frame["label"].tolist(), carflavor.__file__]))
        """,
        moved_model,
        clean_environment,
        "moved",
        "squares.npy",
    )
    probabilities, labels, code = answer
    np.testing.assert_allclose(probabilities, expected.max(axis=1), atol=0.02)
    assert labels == [CLASS_NAMES[i] for i in expected.argmax(axis=1)]
    # The packed package answers, also where another carflavor is installed.
    assert code == str(moved_model / "moved" / "code" / "carflavor" / "__init__.py")


def test_mlflow_tensorflow_loads_where_carflavor_cannot_be_imported(moved_model, expected, clean_environment):
    probabilities = run_python(
        FRESH_PROCESS
        + """
    sys.modules["carflavor"] = None  # any import of it fails from here on
    import mlflow
    network = mlflow.tensorflow.load_model(path)
    assert type(network.get_layer("scale_conv1")).__name__ == "Scale"
    print(json.dumps(network.predict_on_batch(squares).tolist()))
        """,
        moved_model,
        clean_environment,
        "moved",
        "squares.npy",
    )
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_mlflow_keras_loads_after_import_carflavor(moved_model, expected, clean_environment):
    probabilities = run_python(
        FRESH_PROCESS
        + """
    sys.path.append("moved/code")
    import carflavor
    import mlflow
    print(json.dumps(mlflow.keras.load_model(path).predict_on_batch(squares).tolist()))
        """,
        moved_model,
        clean_environment,
        "moved",
        "squares.npy",
    )
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_carflavor_loads_without_reading_a_pickle(moved_model, expected, clean_environment):
    probabilities = run_python(
        FRESH_PROCESS
        + """
    sys.path.append("moved/code")
    import carflavor
    print(json.dumps(carflavor.load_model(path).engine(squares).tolist()))
        """,
        moved_model,
        {**clean_environment, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        "moved",
        "squares.npy",
    )
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_import_carflavor_is_light(clean_environment, packed_model):
    loaded = run_python(
        """
        import json, sys
        import mlflow.models  # which loads pyspark, where that is installed
        before = set(sys.modules)
        import carflavor
        heavy = ("tensorflow", "keras", "pyspark", "azure", "torch", "fsspec", "adlfs", "aiohttp")
        print(json.dumps([name for name in heavy if name in sys.modules.keys() - before]))
        """,
        packed_model / "code",
        clean_environment,
    )
    assert loaded == []


@pytest.mark.parametrize("name", ["data/model.keras", "classes.json", "code/carflavor/scoring.py"])
def test_load_model_refuses_a_changed_file_by_name(packed_model, tmp_path, name):
    shutil.copytree(packed_model, tmp_path / "model")
    with open(tmp_path / "model" / name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(MlflowException, match=f"{name} is not the file that was packed"):
        carflavor.load_model(tmp_path / "model")


def test_load_model_refuses_a_missing_file_by_name(packed_model, tmp_path):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "model" / "data" / "model.keras").unlink()
    with pytest.raises(MlflowException, match="data/model.keras is not the file that was packed"):
        carflavor.load_model(tmp_path / "model")


def test_load_model_refuses_a_newer_format(packed_model, tmp_path):
    shutil.copytree(packed_model, tmp_path / "model")
    manifest = json.loads((packed_model / "manifest.json").read_text())
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(MlflowException, match="expected a model of format 2 or older, got 3"):
        carflavor.load_model(tmp_path / "model")


def test_load_model_takes_the_format_without_engines(packed_model, tmp_path, photos, expected):
    shutil.copytree(packed_model, tmp_path / "model")
    manifest = json.loads((packed_model / "manifest.json").read_text())
    del manifest["engine"], manifest["parity"]
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    answer = carflavor.load_model(tmp_path / "model").predict(photos)
    np.testing.assert_allclose(answer["prob"], expected.max(axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["data/extra.pkl", "engine/network.xml", "code/carflavor/evil.py"])
def test_load_model_refuses_an_added_file_by_name(packed_model, tmp_path, name):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("")
    with pytest.raises(MlflowException, match=f"{name} is not among the files that were packed"):
        carflavor.load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["code/yaml", "code/x__pycache__/evil.py"])
def test_load_model_refuses_what_python_would_import_from_elsewhere(packed_model, tmp_path, name):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.py").write_text("")
    link = tmp_path / "model" / "code" / name.split("/")[1]
    if name == "code/yaml":
        link.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.copytree(tmp_path / "elsewhere", link)
    with pytest.raises(MlflowException, match=f"{name} is not among the files that were packed"):
        carflavor.load_model(tmp_path / "model")


def test_load_model_needs_the_whole_engine(openvino_model, tmp_path):
    shutil.copytree(openvino_model, tmp_path / "model")
    manifest = json.loads((openvino_model / "manifest.json").read_text())
    del manifest["sha256"]["engine/network.bin"]
    (tmp_path / "model" / "engine" / "network.bin").unlink()
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MlflowException, match="manifest.json is damaged, it lacks engine/network.bin"):
        carflavor.load_model(tmp_path / "model")


@pytest.mark.parametrize("changes", [{"sha256": []}, {"format_version": "two"}, {"engine": "keras"}, {"engine": None}])
def test_load_model_says_when_the_manifest_has_other_types(packed_model, tmp_path, changes):
    shutil.copytree(packed_model, tmp_path / "model")
    manifest = json.loads((packed_model / "manifest.json").read_text())
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(MlflowException, match="manifest.json is damaged"):
        carflavor.load_model(tmp_path / "model")


def test_load_model_may_demand_a_manifest(packed_model, tmp_path, monkeypatch):
    digest = flavor.manifest_sha256(packed_model)
    assert len(digest) == 64
    carflavor.load_model(packed_model, expected_sha256=digest.upper())
    shutil.copytree(packed_model, tmp_path / "model")
    # Someone who can write the files can write a manifest that fits them.
    (tmp_path / "model" / "classes.json").write_text('["d", "e", "f"]')
    manifest = json.loads((packed_model / "manifest.json").read_text())
    manifest["sha256"]["classes.json"] = flavor._sha256(tmp_path / "model" / "classes.json")
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    assert carflavor.load_model(tmp_path / "model").class_names == ["d", "e", "f"]
    refused = f"expected a manifest.json with the SHA-256 {digest}, got "
    with pytest.raises(MlflowException, match=refused):
        carflavor.load_model(tmp_path / "model", expected_sha256=digest)
    monkeypatch.setenv("CARFLAVOR_EXPECTED_SHA256", digest)
    carflavor.load_model(packed_model)
    for load in (carflavor.load_model, mlflow.pyfunc.load_model):
        with pytest.raises(MlflowException, match=refused):
            load(str(tmp_path / "model"))


def test_openvino_answers_like_the_network(openvino_model, photos, expected, monkeypatch):
    manifest = json.loads((openvino_model / "manifest.json").read_text())
    assert manifest["engine"] == {"name": "openvino", "precision": "float32"}
    assert {"engine/network.xml", "engine/network.bin"} <= set(manifest["sha256"])
    classifier = carflavor.load_model(openvino_model)
    assert (classifier.engine.name, classifier.manifest) == ("openvino", manifest)
    np.testing.assert_allclose(classifier.predict(photos)["prob"], expected.max(axis=1), rtol=1e-4)
    with pytest.raises(ValueError, match=r"engine='keras'\).network"):
        classifier.network  # noqa: B018
    assert carflavor.load_model(openvino_model, engine="keras").network.count_params() > 0
    monkeypatch.setenv("CARFLAVOR_ENGINE", "keras")
    assert carflavor.load_model(openvino_model).engine.name == "keras"
    assert carflavor.load_model(openvino_model, engine="openvino").engine.name == "openvino"


def test_openvino_serves_without_tensorflow(openvino_model, squares, expected, tmp_path, clean_environment):
    np.save(tmp_path / "squares.npy", squares)
    requirements = (openvino_model / "requirements.txt").read_text()
    assert "openvino==" in requirements and "tensorflow" not in requirements and "keras" not in requirements
    probabilities = run_python(
        FRESH_PROCESS
        + """
    import mlflow
    import pandas as pd
    answer = mlflow.pyfunc.load_model(path).predict(pd.DataFrame({"image": list(squares)}))
    assert not {"tensorflow", "keras"} & set(sys.modules)
    print(json.dumps(answer["prob"].tolist()))
        """,
        tmp_path,
        clean_environment,
        openvino_model,
        "squares.npy",
    )
    np.testing.assert_allclose(probabilities, expected.max(axis=1), atol=0.02)


def test_keras_reads_a_model_that_was_packed_with_openvino(openvino_model, squares, expected):
    network = mlflow.tensorflow.load_model(str(openvino_model))
    np.testing.assert_allclose(network.predict_on_batch(squares), expected, rtol=1e-5)


def test_without_openvino_a_model_is_refused_unless_keras_may_run_it(openvino_model, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    with pytest.raises(MlflowException, match="packed for OpenVINO, which is not installed here: pip install openvino"):
        carflavor.load_model(openvino_model)
    assert carflavor.load_model(openvino_model, allow_fallback=True).engine.name == "keras"
    monkeypatch.setenv("CARFLAVOR_ALLOW_FALLBACK", "true")
    assert carflavor.load_model(openvino_model).engine.name == "keras"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": {}}'])
def test_load_model_says_when_the_manifest_is_damaged(packed_model, tmp_path, text):
    shutil.copytree(packed_model, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text(text)
    with pytest.raises(MlflowException, match="manifest.json is damaged, it lacks "):
        carflavor.load_model(tmp_path / "model")


def test_load_model_refuses_another_flavor(tmp_path):
    (tmp_path / "MLmodel").write_text("flavors: {}")
    with pytest.raises(MlflowException, match="expected a model that carflavor wrote"):
        carflavor.load_model(tmp_path)


def test_load_model_says_which_code_runs_when_it_is_not_the_packed_one(packed_model, tmp_path, caplog):
    shutil.copytree(packed_model, tmp_path / "model")
    changed = tmp_path / "model" / "code" / "carflavor" / "version.py"
    changed.write_text(changed.read_text() + "\n# a later version\n")
    manifest = json.loads((packed_model / "manifest.json").read_text())
    manifest["sha256"]["code/carflavor/version.py"] = flavor._sha256(changed)
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.INFO, logger="carflavor"):
        carflavor.load_model(packed_model)
        assert "differs" not in caplog.text
        carflavor.load_model(tmp_path / "model")
    assert f"the one imported here ({carflavor.__version__}, " in caplog.text
    assert "differs, and is the one that runs" in caplog.text


def test_only_scale_is_pickled(packed_model):
    restored = cloudpickle.loads((packed_model / "data" / "custom_objects.cloudpickle").read_bytes())
    assert list(restored) == ["carflavor>Scale"]
    assert restored["carflavor>Scale"](axis=1).get_config()["axis"] == 1


def test_log_model_to_a_real_store(store, tiny_network, photos, expected):
    with mlflow.start_run() as run:
        model_info = carflavor.log_model(
            tiny_network, name="model", class_names=CLASS_NAMES, image_size=48, registered_model_name="cars"
        )
    for uri in (model_info.model_uri, f"runs:/{run.info.run_id}/model", "models:/cars/1"):
        answer = carflavor.load_model(uri).predict(photos)
        np.testing.assert_allclose(answer["prob"], expected.max(axis=1), rtol=1e-5)


def test_input_example_is_a_photo_that_the_model_answers(packed_model):
    model = mlflow.pyfunc.load_model(str(packed_model))
    answer = model.predict(model.input_example)
    assert answer["error"].tolist() == [None]
    assert answer["label"][0] in CLASS_NAMES


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((32, 48, 3), 3, "Received: input_shape=(None, 32, 48, 3)"),
        ((32, 32, 1), 3, "Received: input_shape=(None, 32, 32, 1)"),
        ((32, 32, 3), 4, "a probability for each of 3 classes. Received: output_shape=(None, 4)"),
    ],
)
def test_save_model_refuses_other_networks(tmp_path, shape, classes, message):
    photos = keras.Input(shape, dtype="uint8")
    outputs = keras.layers.Dense(classes)(keras.layers.Flatten()(photos))
    with pytest.raises(ValueError) as error:
        carflavor.save_model(keras.Model(photos, outputs), tmp_path / "model", class_names=CLASS_NAMES)
    assert str(error.value).endswith(message)
    assert not (tmp_path / "model").exists()


def test_save_model_refuses_two_classes_of_one_name(tmp_path, tiny_network):
    with pytest.raises(ValueError, match="Expected different class names. Received: 'Audi A4' more than once"):
        carflavor.save_model(tiny_network, tmp_path / "model", class_names=["Audi A4", "BMW M3", "Audi A4"])


def test_save_model_writes_over_nothing(tmp_path, tiny_network):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(MlflowException, match="already exists and is not empty"):
        carflavor.save_model(tiny_network, tmp_path / "model", class_names=CLASS_NAMES)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_requirements_can_be_chosen(tmp_path):
    network = build_resnet([1], _basic_block, 3, 32, "tiny")
    carflavor.save_model(network, tmp_path / "more", CLASS_NAMES, extra_pip_requirements=["left-pad==1.0"])
    requirements = (tmp_path / "more" / "requirements.txt").read_text().splitlines()
    assert {"left-pad==1.0", f"keras=={keras.__version__}"} <= set(requirements)
    carflavor.save_model(network, tmp_path / "other", CLASS_NAMES, pip_requirements=["mlflow", "left-pad==1.0"])
    assert (tmp_path / "other" / "requirements.txt").read_text().splitlines() == ["mlflow", "left-pad==1.0"]
