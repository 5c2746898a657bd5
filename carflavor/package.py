"""Turns the model of a run into a version of the model registry that callers can name, with the engine that runs it."""

import contextlib
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.uri import get_databricks_profile_uri_from_artifact_uri

import carflavor
from carflavor import engines, flavor, report, tracking
from carflavor.card import shorten, write_card
from carflavor.data.example import example_photo
from carflavor.data.locations import resolve_input, resolve_model
from carflavor.image import squash
from carflavor.parity import measure_parity
from carflavor.predictions import CarModel, predict_split
from carflavor.preprocess import open_split

PRECISIONS = ("auto", *engines.PRECISIONS)
# Of a registered version: what loading it may demand. Without a dot, which Unity Catalog refuses in names of tags.
MANIFEST_TAG = "carflavor_manifest_sha256"
_SOURCE_TAG = "carflavor.source_model"  # of a run of this step: MLflow's id of the model that it packed
_ALIAS = re.compile(r"[A-Za-z][\w-]{0,254}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackageConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory that carflavor wrote, as path, `runs:/...` or `models:/...`.
        register_as: Name in the registry.
        alias: Alias that the new version gets, and any older version loses.
        engine: What runs the network, `openvino` or `keras`.
        precision: Arithmetic of OpenVINO: `float32`, `bfloat16`, `int8`, or `auto` for bfloat16 where this CPU computes
            in it and float32 elsewhere.
        data: Folder with `validation.h5`, on which the engine is compared with Keras, and for `int8` `train.h5`; as
            path or URI, or `sample`. `auto` for what the model's run of train names.
        licence: Licence of the model, for its card. Empty where it is not stated.
    """

    model: str
    register_as: str = "carflavor"
    alias: str = "champion"
    engine: str = "openvino"
    precision: str = "auto"
    data: str = "auto"
    licence: str = ""


def package(config):
    """Packs a model with an engine that answers like Keras does, checks that it loads, and registers it with its card.

    Args:
        config: `PackageConfig`.

    Returns:
        The `mlflow.entities.model_registry.ModelVersion`.

    Raises:
        ValueError: If a parameter is not what is expected, or the engine answers worse than Keras.
        MlflowException: If the model cannot be loaded.
    """
    with tracking.step_run("package", config), tempfile.TemporaryDirectory() as folder:
        _check_names(config)
        source_version = find_version(config.model)
        source = resolve_input(config.model, "model")
        if config.engine == "openvino":
            path = _pack(config, source, source_version, Path(folder))
        elif flavor.read_manifest(source)["engine"]["name"] != config.engine:
            path = _save(CarModel(config.model, source, None, engine="keras"), Path(folder) / config.engine)
        else:
            # A copy: the card is written into it.
            path = Path(folder) / "model"
            flavor.copy_model(source, path)
        photo, box, _ = example_photo()
        carflavor.load_model(path).predict([photo], [box])
        digest = flavor.manifest_sha256(path)
        tags = {MANIFEST_TAG: digest}
        if model_id := _find_model_id(source, source_version):
            mlflow.set_tag(_SOURCE_TAG, model_id)
        evaluation = _find_evaluation(source_version, model_id)
        card = write_card(path, config.register_as, config.alias, config.licence, evaluation)
        if mlflow.get_registry_uri().startswith("azureml:"):
            path, tags = _prepare_for_azure(path, Path(folder) / "azure")
        # The registry refers to a place that lasts, where the model lies with its card. As str: azureml-mlflow takes no
        # other path.
        mlflow.log_artifacts(str(path), "model")
        uri = f"runs:/{mlflow.active_run().info.run_id}/model"
        version = _register(uri, config.register_as, tags)
        client = mlflow.MlflowClient()
        client.update_model_version(config.register_as, version.version, description=shorten(card, version.version))
        client.set_registered_model_alias(config.register_as, config.alias, version.version)
        mlflow.set_tags({tracking.MODEL_TAG: f"models:/{config.register_as}/{version.version}", MANIFEST_TAG: digest})
        _logger.info(
            "Registered as models:/%s/%s, which is now models:/%s@%s",
            config.register_as,
            version.version,
            config.register_as,
            config.alias,
        )
    return version


def _prepare_for_azure(path, dst_path):
    # What stands in Azure's registry is what `mlflow deployments create -t azureml` deploys as it is. Azure's packages
    # are an extra, without which there is no such registry.
    from carflavor.azure.registration import prepare_model, version_tags

    prepared = prepare_model(path, dst_path)
    return prepared, version_tags(prepared)


def _register(uri, name, tags):
    if not (uri.startswith("runs:/") and mlflow.get_registry_uri().startswith("azureml:")):
        return mlflow.register_model(uri, name, tags=tags)
    # MLflow does not find the model among the files that azureml-mlflow lists, which it takes for the run's, and then
    # looks for a logged model, which Azure does not have: it gets the address of the files instead.
    from carflavor.azure.registration import create_version

    source = RunsArtifactRepository.get_underlying_uri(uri)
    return create_version(mlflow.MlflowClient(), name, source, tags, run_id=uri.split("/")[1])


def find_version(model):
    """Returns the `ModelVersion` that a `models:/...` address means to MLflow, or None where it means none.

    Args:
        model: What a user names as model: a path, `runs:/...`, a logged model or a version of a registered one, by its
            number, an alias, `latest` or a stage.

    Raises:
        ValueError: If it begins with `models:` and means nothing, or nothing that the registry has.
    """
    if not model.startswith("models:"):
        return None
    try:
        # What MLflow downloads is what the first part says; the rest is a path in it.
        place, inner = ModelsArtifactRepository.split_models_uri(model)
        client = mlflow.MlflowClient(registry_uri=get_databricks_profile_uri_from_artifact_uri(place))
        found = get_model_name_and_version(client, place)
        version = client.get_model_version(*found) if len(found) == 2 else None  # else a logged model, by its id
    except MlflowException as error:
        raise ValueError(f"model: nothing could be read from {model}: {error.message}") from None
    if inner:
        raise ValueError(f"model: expected models:/<name>/<version> or models:/<name>@<alias>, got {model}")
    return version


def _check_names(config):
    # Here and not in the registry, where the version would be there already when the alias is refused.
    if not _ALIAS.fullmatch(config.alias) or config.alias == "latest" or re.fullmatch(r"[vV]\d+", config.alias):
        raise ValueError(f"Expected alias to be a word other than latest or v1. Received: alias={config.alias!r}")
    if not config.register_as or set(config.register_as) & set("/:"):
        raise ValueError(
            f"Expected register_as to be a name without / and :. Received: register_as={config.register_as!r}"
        )
    engines.check(config.engine, "float32" if config.precision == "auto" else config.precision)


def _pack(config, source, version, folder):
    """Writes the model anew with OpenVINO and how it compares with Keras; returns the path."""
    model = CarModel(config.model, source, None, engine="keras")
    data = _find_data(config.model, version) if config.data == "auto" else config.data
    with contextlib.ExitStack() as stack:
        splits = ("train", "validation") if config.precision == "int8" else ("validation",)
        files = {split: stack.enter_context(open_split(data, split)) for split in splits}
        for file in files.values():
            model.check(file)
            if not len(file):
                raise ValueError(f"{file.path}: expected photos to compare the engines on, got none")
        validation = files["validation"]
        mlflow.set_tag(tracking.RECORDS_TAG, tracking.records_address(data, validation))
        tracking.log_records(validation, "validation")
        crops = [crop for crop in validation.crops if model.trained_crop in (crop, "mixed", None)] or validation.crops
        # Accuracy is compared on the first of them, agreement on the last.
        compared, note = [validation], model.knows(validation)
        if note:
            compared += _open_unseen(stack, data, model, crops, note)
        expected = {crop: [predict_split(model.classifier, file, crop) for file in compared] for crop in crops}
        refusal = None
        for precision in _choose_precisions(config.precision):
            calibration = _choose_photos(files["train"], crops, model) if precision == "int8" else None
            path = _save(model, folder / precision, engine="openvino", precision=precision, calibration=calibration)
            refusal = _compare(path, precision, compared, expected, note)
            if not refusal:
                return path
        raise ValueError(f"{refusal}. Try another precision, or engine=keras")


def _save(model, path, **engine):
    """Writes a model anew, with another engine; returns the path."""
    carflavor.save_model(
        model.network,
        path,
        model.classifier.class_names,
        image_size=model.classifier.image_size,
        crop_margin=model.classifier.crop_margin,
        training=model.classifier.manifest["training"],
        **engine,
    )
    return path


def _choose_precisions(precision):
    """Returns what to try, the fastest first."""
    if precision == "bfloat16" and not engines.cpu_has_bfloat16():
        raise ValueError(
            "Expected a CPU that computes in bfloat16, to compare it with Keras; this one does not: "
            "precision=float32 or int8"
        )
    if precision != "auto":
        return [precision]
    return ["bfloat16", "float32"] if engines.cpu_has_bfloat16() else ["float32"]


def _open_unseen(stack, data, model, crops, note):
    """Returns the test photos, in a list, or an empty list where there are none that fit.

    Their labels are not read: how often two engines agree says nothing of how good a model is.
    """
    with contextlib.suppress(ValueError):
        test = stack.enter_context(open_split(data, "test"))
        model.check(test)
        if len(test) and set(crops) <= set(test.crops):
            return [test]
    _logger.warning("On photos that a network has learned, engines agree more than on others: %s", note)
    return []


def _compare(path, precision, compared, expected, note):
    """Measures the engine of a packed model beside Keras; returns why it is refused, or an empty text."""
    # Whatever CARFLAVOR_ENGINE says: it is this one that is measured.
    classifier = carflavor.load_model(path, engine="openvino")
    validation, unseen = compared[0], compared[-1]
    figures, refusals = {}, []
    for crop, by_keras in expected.items():
        by_engine = [predict_split(classifier, file, crop) for file in compared]
        parity = measure_parity(
            validation.labels, by_engine[0], by_keras[0], classifier.class_names, unseen=(by_engine[-1], by_keras[-1])
        )
        what = f"OpenVINO in {precision}, crop={crop}"
        _logger.info("%s: %s", what, parity.describe())
        figures[crop] = parity.to_dict()
        mlflow.log_metrics({f"parity_{precision}_{crop}_{name}": value for name, value in figures[crop].items()})
        mlflow.log_figure(
            report.agreement_figure(by_engine[-1], by_keras[-1], f"OpenVINO in {precision}"),
            f"parity_{precision}_{crop}.png",
        )
        if parity.refusal:
            refusals.append(f"{what}: {parity.refusal}: {parity.describe()}")
    flavor.write_parity(
        path,
        {
            "with": "keras in float32",
            "cpu": engines.describe_cpu(),
            "accuracy_of": {"source": validation.settings["source"], "digest": validation.digest()},
            "agreement_of": {"source": unseen.settings["source"], "digest": unseen.digest()},
            "note": note,
            "crops": figures,
        },
    )
    if refusals:
        _logger.warning("%s", "; ".join(refusals))
    return "; ".join(refusals)


def _choose_photos(training, crops, model):
    """Returns squares of training photos drawn at random, the same at every call, from every crop in turn."""
    rows = np.random.default_rng(0).permutation(len(training))[: engines.CALIBRATION_PHOTOS]
    size = model.classifier.engine.input_size
    return [squash(training.images(crops[turn % len(crops)])[row], size) for turn, row in enumerate(rows)]


def _find_data(model, version):
    """Returns the address of the record files that a model's run names: of `train`, or of what packed a version."""
    run_ids = [mlflow.models.get_model_info(resolve_model(model)).run_id, version and version.run_id]
    for run_id in filter(None, run_ids):
        with _warning_of(f"the run {run_id} of the model"):
            if address := mlflow.get_run(run_id).data.tags.get(tracking.RECORDS_TAG):
                return address
    raise ValueError(
        "data: expected the folder with validation.h5, on which OpenVINO is compared with Keras; "
        "the run of this model names none"
    )


def _find_model_id(source, version):
    """Returns MLflow's id of the logged model that a model is or was packed from; an empty text if it is not known."""
    if model_id := Model.load(source).model_id:
        return model_id
    # What was packed anew has none; the run that has packed it knows of which.
    if version and version.run_id:
        with _warning_of(f"the run {version.run_id} of the model"):
            return mlflow.get_run(version.run_id).data.tags.get(_SOURCE_TAG, "")
    return ""


def _find_evaluation(version, model_id):
    """Returns what the newest evaluation of a model has found, its `evaluation.json` with the id of the run.

    None where the store knows of none.
    """
    measured = {}  # id of run -> when
    if version:
        with _warning_of(f"the evaluations of models:/{version.name}/{version.version}"):
            measured |= _find_evaluations(version)
    if model_id:
        # The model may come from another store.
        with _warning_of(f"the evaluations of the model {model_id}"):
            for metric in mlflow.get_logged_model(model_id).metrics or []:
                if metric.key.endswith("_top_1"):
                    measured[metric.run_id] = max(metric.timestamp, measured.get(metric.run_id, 0))
    for run_id in sorted(measured, key=measured.get, reverse=True):
        # The run may have failed before it wrote it.
        with _warning_of(f"evaluation.json of the run {run_id}"):
            return {**mlflow.artifacts.load_dict(f"runs:/{run_id}/evaluation.json"), "run": run_id}
    return None


def _find_evaluations(version):
    """Returns when each run has measured a version by its number, in the experiments that are at hand."""
    experiments = {mlflow.active_run().info.experiment_id}
    if version.run_id:
        experiments.add(mlflow.get_run(version.run_id).info.experiment_id)
    named = f"tags.`{tracking.MODEL_TAG}` = 'models:/{version.name}/{version.version}'"
    runs = mlflow.MlflowClient().search_runs(list(experiments), named)
    steps = ("evaluate", "promote")
    return {run.info.run_id: run.info.start_time for run in runs if run.data.tags.get(tracking.STEP_TAG) in steps}


@contextlib.contextmanager
def _warning_of(what):
    """Goes on where the store cannot be asked, and says so."""
    try:
        yield
    except (MlflowException, OSError) as error:
        _logger.warning("Nothing could be read of %s: %s", what, str(error).partition("\n")[0])
