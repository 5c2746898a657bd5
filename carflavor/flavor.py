"""Writes and reads the model directory: one set of files that MLflow loads in four ways.

    MLmodel            flavors python_function (loader_module carflavor), carflavor, tensorflow, keras
    data/              as mlflow.tensorflow writes it: model.keras, custom_objects.cloudpickle, ...
    classes.json       class names in id order
    engine/            OpenVINO's form of the network, where it was packed with one
    manifest.json      SHA-256 of every file that loading reads, crop margin and sizes, how it was trained, the engine
    code/carflavor     this package
    requirements.txt   conda.yaml   python_env.yaml   input_example.json

keras and TensorFlow are imported inside the functions that need them: `import carflavor` stays light, and OpenVINO
serves a model without them.
"""

import base64
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array, Object, Property

from carflavor import engines
from carflavor.data.example import example_photo
from carflavor.limits import Limits, read_limits, read_number, read_switch
from carflavor.scoring import BOX_COLUMNS, CarClassifier, PyfuncModel
from carflavor.version import __version__

FLAVOR_NAME = "carflavor"
FORMAT_VERSION = 2  # 1 knew no engine but Keras
_DATA, _ENGINE, _CLASSES, _MANIFEST, _CODE = "data", "engine", "classes.json", "manifest.json", "code"
_PACKAGE = Path(__file__).parent
# What this module and those it imports, directly or not, cannot be imported without.
_REQUIRED = ("mlflow", "numpy", "pandas", "cloudpickle", "opencv-python-headless", "pillow", "wrapt")
# What carflavor.server needs besides: it is packed, too.
_SERVER = ("prometheus-client", "httptools")

_logger = logging.getLogger(__name__)


def get_default_pip_requirements(engine="keras"):
    """Returns what a model directory needs to be loaded and served: pip requirements at the installed versions.

    TensorFlow is required under the name it is installed by. People who serve on CPUs alone save some hundred
    megabytes with `pip_requirements=[... "tensorflow-cpu==..." ...]`; asking for it by default would have MLflow warn
    of a missing package at every load in the environment that trained the model.

    Args:
        engine: Engine of the model, one of `carflavor.engines.ENGINES`. OpenVINO needs neither TensorFlow nor Keras.
    """
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    tensorflow = "tensorflow" if "tensorflow" in installed else "tensorflow-cpu"
    names = ("openvino",) if engine == "openvino" else (tensorflow, "keras")
    return [f"{name}=={importlib.metadata.version(name)}" for name in (*names, *_REQUIRED, *_SERVER)]


def get_default_conda_env(engine="keras"):
    """Returns a conda environment, as the dict of its YAML file, with `get_default_pip_requirements`."""
    return {
        "name": "carflavor-model",
        "channels": ["conda-forge"],
        "dependencies": [f"python={_python_version()}", "pip", {"pip": get_default_pip_requirements(engine)}],
    }


def _python_version():
    # No patch version: whoever serves the model has some 3.11, seldom this very one.
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def save_model(
    network,
    path,
    class_names,
    image_size=256,
    crop_margin=16,
    training=None,
    engine="keras",
    precision="float32",
    calibration=None,
    conda_env=None,
    pip_requirements=None,
    extra_pip_requirements=None,
    mlflow_model=None,
    metadata=None,
):
    """Writes a model directory.

    Args:
        network: `keras.Model` from uint8 RGB photos `(batch, S, S, 3)` to probabilities `(batch, C)`.
        path: Folder to write; must not exist or be empty.
        class_names: C names in the order of the probabilities.
        image_size: Side in pixels that preprocessing stored the training photos at.
        crop_margin: Pixels that preprocessing widened boxes by on each side.
        training: Optional dict, how the network was trained, for the manifest.
        engine: What runs the network, `keras` or `openvino`.
        precision: Arithmetic of OpenVINO: `float32`, `bfloat16`, or `int8` quantised by NNCF. Keras has `float32`.
        calibration: For `int8`, uint8 RGB photos `(N, S, S, 3)` of the training split.
        conda_env: Conda environment as dict or path. Defaults to `get_default_conda_env(engine)`.
        pip_requirements: Requirements instead of the default ones.
        extra_pip_requirements: Requirements beside the default ones.
        mlflow_model: `mlflow.models.Model` to add the flavors to, as MLflow's `log_model` passes it.
        metadata: Optional dict for the MLmodel file.

    Raises:
        ValueError: If the network is no classifier of that many classes of square uint8 photos, there is no such engine
            or precision, or NNCF, which `int8` needs, is not installed.
        ImportError: If OpenVINO is needed and not installed.
        MlflowException: If the folder is not empty.
    """
    from carflavor import layers

    class_names = [str(name) for name in class_names]
    _check(network, class_names)
    engines.check(engine, precision)
    path = Path(path)
    mlflow_model = mlflow_model or Model()
    if conda_env is None and pip_requirements is None and extra_pip_requirements is None:
        conda_env = get_default_conda_env(engine)
    elif conda_env is None and pip_requirements is None:
        pip_requirements = [*get_default_pip_requirements(engine), *extra_pip_requirements]
        extra_pip_requirements = None
    # By value: by reference the pickle would be of use only where carflavor is installed.
    cloudpickle.register_pickle_by_value(layers)
    try:
        mlflow.tensorflow.save_model(
            network,
            path,
            custom_objects={"carflavor>Scale": layers.Scale},
            code_paths=[str(_PACKAGE)],
            mlflow_model=mlflow_model,
            # mlflow.tensorflow describes a network and knows tensors only; below, the signature of the pyfunc follows.
            signature=ModelSignature(Schema([TensorSpec(np.dtype(np.uint8), (-1, *network.input_shape[1:]))])),
            input_example=_input_example(),
            conda_env=conda_env,
            pip_requirements=pip_requirements,
            extra_pip_requirements=extra_pip_requirements,
            metadata=metadata,
        )
    finally:
        cloudpickle.unregister_pickle_by_value(layers)
    # Whatever other layers happen to be registered in this process: no part of the model.
    (path / _DATA / "global_custom_objects.cloudpickle").unlink(missing_ok=True)
    _write_json(path / _CLASSES, class_names)
    if engine == "openvino":
        engines.convert(network, path / _ENGINE, precision, calibration)
    _write_json(
        path / _MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "carflavor_version": __version__,
            "input_size": network.input_shape[1],
            "image_size": image_size,
            "crop_margin": crop_margin,
            "training": training or {},
            "engine": {"name": engine, "precision": precision},
            "parity": None,
            "sha256": {name: _sha256(path / name) for name in _files_that_loading_reads(path)},
        },
    )
    _loosen_python_version(path / "python_env.yaml")
    _add_flavors(mlflow_model, path)


def _check(network, class_names):
    shape = network.input_shape
    if len(shape) != 4 or shape[1] != shape[2] or shape[1] is None or shape[3] != 3:
        raise ValueError(f"Expected a network of square RGB photos (batch, S, S, 3). Received: input_shape={shape}")
    if network.output_shape != (None, len(class_names)):
        raise ValueError(
            f"Expected a network with a probability for each of {len(class_names)} classes. "
            f"Received: output_shape={network.output_shape}"
        )
    if twice := [name for name in class_names if class_names.count(name) > 1]:
        raise ValueError(f"Expected different class names. Received: {twice[0]!r} more than once")


def _input_example():
    photo, box, _ = example_photo()
    return pd.DataFrame([[base64.b64encode(photo).decode(), *map(float, box)]], columns=["image", *BOX_COLUMNS])


def build_signature():
    """Returns the `mlflow.models.ModelSignature` of every model: photos in, predictions out."""
    top_k = Array(Object([Property("label", DataType.string), Property("prob", DataType.double)]))
    return ModelSignature(
        inputs=Schema([ColSpec("string", "image"), *(ColSpec("double", name, required=False) for name in BOX_COLUMNS)]),
        outputs=Schema(
            [
                ColSpec("string", "label", required=False),
                ColSpec("double", "prob", required=False),
                ColSpec("long", "class_id", required=False),
                ColSpec(top_k, "top_k"),
                ColSpec("string", "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("top_k", DataType.long, 5),
                ParamSpec("min_prob", DataType.double, 0.0),
                ParamSpec("on_error", DataType.string, "raise"),
            ]
        ),
    )


def _add_flavors(mlflow_model, path):
    network = mlflow_model.flavors["tensorflow"]
    mlflow_model.signature = build_signature()
    # mlflow.keras reads `data`; mlflow.tensorflow, where it finds this entry, takes everything from it.
    mlflow_model.add_flavor("keras", **network)
    mlflow_model.add_flavor(FLAVOR_NAME, carflavor_version=__version__, format_version=FORMAT_VERSION, code=_CODE)
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module="carflavor",
        code=_CODE,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    mlflow_model.save(path / "MLmodel")


def _loosen_python_version(path):
    python_env = yaml.safe_load(path.read_text())
    python_env["python"] = _python_version()
    path.write_text(yaml.safe_dump(python_env, sort_keys=False))


def log_model(network, class_names, name="model", **options):
    """Logs a model directory to the active run, or to one that it opens.

    Args:
        network: `keras.Model`, see `save_model`.
        class_names: C names in the order of the probabilities.
        name: Name of the model in the run.
        **options: What `save_model` takes besides, and what `mlflow.models.Model.log` takes, such as
            `registered_model_name` or `tags`; the latter not where Azure ML is the tracking store.

    Returns:
        `mlflow.models.model.ModelInfo`.
    """
    if mlflow.get_tracking_uri().startswith("azureml:"):
        return _log_files(network, class_names, name, **options)
    return Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__package__],
        network=network,
        class_names=class_names,
        **options,
    )


def _log_files(network, class_names, name, **options):
    """Logs a model as files of a run, which Azure ML has; it answers 404 to the logged models of MLflow 3.

    Reference: [Azure/azure-sdk-for-python#44896](https://github.com/Azure/azure-sdk-for-python/issues/44896)
    """
    run_id = (mlflow.active_run() or mlflow.start_run()).info.run_id
    mlflow_model = Model(artifact_path=name, run_id=run_id)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        save_model(network, path, class_names, mlflow_model=mlflow_model, **options)
        mlflow.log_artifacts(path, name)
    return mlflow_model.get_model_info()


def load_model(model_uri, dst_path=None, engine=None, allow_fallback=None, expected_sha256=None, threads=None):
    """Loads a model for use in Python.

    Args:
        model_uri: Path, `runs:/...`, `models:/...` or whatever MLflow reads artifacts from.
        dst_path: Optional existing folder to download to.
        engine: `keras` or `openvino`, instead of `CARFLAVOR_ENGINE` or else what the model was packed with.
        allow_fallback: Whether Keras may run a model that was packed for OpenVINO where that is not installed, instead
            of `CARFLAVOR_ALLOW_FALLBACK` or else not.
        expected_sha256: SHA-256 that `manifest.json` must have, instead of `CARFLAVOR_EXPECTED_SHA256` or else any.
        threads: Cores for OpenVINO, and threads that decode photos, instead of `CARFLAVOR_THREADS` or else all.

    Returns:
        `carflavor.scoring.CarClassifier`: `load_model(uri).predict(["car.jpg"])`.

    Raises:
        MlflowException: If nothing is there, it is no carflavor model, a file of it was changed, there is no such
            engine in it, or OpenVINO is needed and not installed.
    """
    path = Path(mlflow.artifacts.download_artifacts(artifact_uri=str(model_uri), dst_path=dst_path))
    return _load_classifier(path, engine, allow_fallback, expected_sha256, threads)


def _load_pyfunc(path):
    """Loads the model for `mlflow.pyfunc`, which calls this with the path of the model directory."""
    return PyfuncModel(_load_classifier(Path(path)))


def _load_classifier(path, engine=None, allow_fallback=None, expected_sha256=None, threads=None):
    manifest = read_manifest(path, expected_sha256)
    _say_which_code_runs(path, manifest)
    class_names = json.loads((path / _CLASSES).read_text(encoding="utf-8"))
    try:
        threads = threads or read_number("CARFLAVOR_THREADS", None)
        loaded = engines.load_engine(
            path / _DATA,
            path / _ENGINE,
            manifest["engine"],
            engine or os.environ.get("CARFLAVOR_ENGINE"),
            read_switch("CARFLAVOR_ALLOW_FALLBACK", False) if allow_fallback is None else allow_fallback,
            threads,
        )
        limits = read_limits(Limits)
    except (ImportError, ValueError) as error:
        raise MlflowException(f"{path}: {error}", error_code=INVALID_PARAMETER_VALUE) from error
    _logger.info("The network is run by %s in %s", loaded.name, loaded.precision)
    sizes = manifest["crop_margin"], manifest["image_size"]
    return CarClassifier(loaded, class_names, *sizes, limits, manifest, threads)


def copy_model(path, target):
    """Copies a model directory, without what Python has compiled in it.

    Args:
        path: `Path` of the directory.
        target: `Path` of the copy; must not exist.

    Raises:
        ValueError: If the copy would lie in the directory itself.
    """
    if target.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"out: expected a folder outside the model {path}, got {target}")
    # Contents alone: not every store of a cloud keeps times and permissions.
    for file in filter(Path.is_file, path.rglob("*")):
        name = file.relative_to(path)
        if "__pycache__" not in name.parts:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)


def manifest_sha256(path):
    """Returns the SHA-256 of a model directory's `manifest.json`, and with it of every file that loading reads."""
    return _sha256(Path(path) / _MANIFEST)


def write_parity(path, parity):
    """Notes in the manifest of a model directory how its engine compares with Keras."""
    path = Path(path) / _MANIFEST
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "parity": parity})


def read_manifest(path, expected_sha256=None):
    """Reads `manifest.json` and checks every file that it names, before any of them is read for what it holds.

    Args:
        path: Path of the model directory.
        expected_sha256: SHA-256 that the manifest must have, instead of `CARFLAVOR_EXPECTED_SHA256` or else any.

    Returns:
        The manifest, a dict.

    Raises:
        MlflowException: If there is none, it is not the expected one, it is damaged, it is of a newer format, or a
            file was changed, is missing or is in the folders that loading reads and not in the manifest.
    """
    if not (path / _MANIFEST).is_file():
        raise _refusal(path, f"expected a model that carflavor wrote, with a {_MANIFEST}, got none")
    expected_sha256 = (expected_sha256 or os.environ.get("CARFLAVOR_EXPECTED_SHA256", "")).strip().lower()
    if expected_sha256 and expected_sha256 != (found := manifest_sha256(path)):
        raise _refusal(path, f"expected a {_MANIFEST} with the SHA-256 {expected_sha256}, got {found}")
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        needed = {_CLASSES, f"{_DATA}/model.keras"}
        if manifest.get("engine", {}).get("name") == "openvino":
            needed |= {f"{_ENGINE}/{name}" for name in engines.IR_FILES}
        missing = needed - set(manifest["sha256"].keys())
        missing |= {"format_version", "carflavor_version", "crop_margin", "image_size"} - set(manifest)
        is_newer = int(manifest.get("format_version", 0)) > FORMAT_VERSION
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = {repr(error)}
    if missing:
        raise _refusal(path, f"{_MANIFEST} is damaged, it lacks {', '.join(sorted(missing))}")
    if is_newer:
        raise _refusal(
            path,
            f"expected a model of format {FORMAT_VERSION} or older, got {manifest['format_version']}: "
            f"install carflavor {manifest['carflavor_version']} or newer",
        )
    for name, expected in manifest["sha256"].items():
        if not (path / name).is_file() or _sha256(path / name) != expected:
            raise _refusal(path, f"{name} is not the file that was packed (its SHA-256 differs from {_MANIFEST})")
    if added := set(_files_that_loading_reads(path)) - set(manifest["sha256"]):
        raise _refusal(
            path,
            f"{min(added)} is not among the files that were packed (there is no SHA-256 of it in {_MANIFEST})",
        )
    # Format 1 knew no other.
    return {"engine": {"name": "keras", "precision": "float32"}, **manifest}


def _refusal(path, message):
    return MlflowException(f"{path}: {message}", error_code=INVALID_PARAMETER_VALUE)


def _say_which_code_runs(path, manifest):
    # mlflow.pyfunc puts the packed code first on sys.path, so a process that has not imported carflavor yet gets the
    # packed one, and one that has keeps its own: Python imports a package once.
    running = {name: _sha256(_PACKAGE / name) for name in _python_files(_PACKAGE)}
    packed = {name: _sha256(path / _CODE / "carflavor" / name) for name in _python_files(path / _CODE / "carflavor")}
    if running != packed:
        _logger.warning(
            "The model was packed with carflavor %s; the one imported here (%s, %s) differs, and is the one that runs",
            manifest["carflavor_version"],
            __version__,
            _PACKAGE,
        )
    else:
        _logger.info("carflavor %s from %s", __version__, _PACKAGE)


def _files_that_loading_reads(path):
    """Returns the names of the files that loading may read, and of links, behind which there may be more."""
    folders = (path / _DATA, path / _ENGINE, path / _CODE)
    found = [file for folder in folders for file in folder.rglob("*") if file.is_file() or file.is_symlink()]
    # What Python compiles it writes there itself.
    names = [file.relative_to(path) for file in found if "__pycache__" not in file.relative_to(path).parts]
    return sorted([_CLASSES, *(name.as_posix() for name in names)])


def _python_files(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
