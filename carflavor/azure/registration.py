"""A model as a version of the workspace's registry: found there, or put there with an environment that Azure builds."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import DataType, Schema

try:
    import azureml.mlflow  # noqa: F401, by which MLflow reads and writes azureml://
except ImportError as error:
    raise ImportError(f"Azure ML needs packages that are not here ({error}): pip install 'carflavor[azure]'") from error

from carflavor.azure.arm import print_call
from carflavor.flavor import manifest_sha256
from carflavor.package import MANIFEST_TAG

ENVIRONMENT_TAG = "carflavor_azure_environment"
# Azure's inference server imports it from 1.3 on, and installs what the model's conda.yaml says, no more.
_MONITORING = "azureml-ai-monitoring==1.0.0"
# That server, which Azure adds to the environment, comes with inference-schema 1.8, which takes no later one.
_WRAPT = "wrapt==1.16.0"
_SECONDS_TO_UPLOAD = 3600


def prepare_model(path, dst_path):
    """Writes a copy of a model directory that Azure can build and serve, if it has to differ.

    The environment gets a package that Azure's server imports, the version of another that it takes, and a Python that
    can be had next year as well. The signature loses the outputs that are lists. What the model reads and answers stays
    the same.

    Args:
        path: Path of the model directory.
        dst_path: Folder to write the copy to; must not exist.

    Returns:
        Path of the model directory to register: `path` itself where nothing has to differ.

    Raises:
        ValueError: If its `conda.yaml` is none, or names no Python.
    """
    conda = yaml.safe_load((Path(path) / "conda.yaml").read_text(encoding="utf-8"))
    dependencies = conda.get("dependencies", []) if isinstance(conda, dict) else []
    pythons = [entry for entry in dependencies if isinstance(entry, str) and re.match(r"python\s*=", entry)]
    pips = [entry["pip"] for entry in dependencies if isinstance(entry, dict) and "pip" in entry]
    if len(pythons) != 1 or len(pips) != 1:
        raise ValueError(f"Expected {path}/conda.yaml to name a Python, as python=3.11, and packages under pip")
    version = re.search(r"\d+\.\d+", pythons[0])
    if version is None:
        raise ValueError(f"Expected {path}/conda.yaml to name a Python as python=3.11. Received: {pythons[0]!r}")
    changed = False
    # A minor version: channels drop old patch versions, and a build that worked fails a year later.
    if pythons[0] != f"python={version[0]}":
        dependencies[dependencies.index(pythons[0])] = f"python={version[0]}"
        changed = True
    wanted = [_WRAPT if re.match(r"wrapt\b", line) else line for line in pips[0]]
    if not any(re.match(r"azureml-ai-monitoring\b", line) for line in wanted):
        wanted.append(_MONITORING)
    if wanted != pips[0]:
        pips[0][:] = wanted
        changed = True
    model = Model.load(str(path))
    outputs = model.signature.outputs.inputs
    # When it starts, the scoring script in Azure's image (Azure/azureml-assets, mlflow_score_script.py of
    # mlflow-py312-inference) asks for the pandas types of all outputs, and ends where MLflow has none, as of a list.
    scalars = [column for column in outputs if isinstance(column.type, DataType)]
    if not changed and scalars == outputs:
        return Path(path)
    shutil.copytree(path, dst_path, ignore=shutil.ignore_patterns("__pycache__"))
    model.signature = ModelSignature(model.signature.inputs, Schema(scalars), model.signature.params)
    model.save(str(Path(dst_path) / "MLmodel"))
    (Path(dst_path) / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False), encoding="utf-8")
    requirements = Path(dst_path) / "requirements.txt"
    requirements.write_text("".join(f"{line}\n" for line in pips[0]), encoding="utf-8")
    return Path(dst_path)


def version_tags(path):
    """Returns the tags of a version by which it is found again, of a model directory as `prepare_model` returned it."""
    environment = hashlib.sha256((Path(path) / "conda.yaml").read_bytes()).hexdigest()
    return {MANIFEST_TAG: manifest_sha256(path), ENVIRONMENT_TAG: environment}


def register_model(arm, path, name, tracking_uri):
    """Finds the version of a model in a workspace's registry, or registers it.

    A version is this model when it was registered with the same manifest and the same environment, so registering
    twice makes one version.

    Args:
        arm: `carflavor.azure.arm.ResourceManager` of the workspace.
        path: Path of the model directory, as `prepare_model` returned it.
        name: Name in the registry.
        tracking_uri: `azureml://...` of the workspace, by which MLflow uploads.

    Returns:
        The version, a str; of a dry run that would register it `new`.
    """
    tags = version_tags(path)
    for version in arm.list(f"/models/{name}/versions"):
        if tags.items() <= (version["properties"].get("tags") or {}).items():
            return version["name"]
    # Not `as_uri`: azureml-mlflow takes what stands after file:// for a path, also where that writes %20 for a blank.
    source = f"file://{Path(path).resolve()}"
    if arm.dry_run:
        sizes = [file.stat().st_size for file in Path(path).rglob("*") if file.is_file()]
        body = {"source": source, "files": len(sizes), "bytes": sum(sizes), "tags": tags}
        print_call("REGISTER", f"{tracking_uri}, {name}", body)
        return "new"
    # For 50 files together. By itself azureml-mlflow gives up after five minutes, too soon for a large model.
    os.environ.setdefault("AZUREML_ARTIFACTS_DEFAULT_TIMEOUT", str(_SECONDS_TO_UPLOAD))
    # azureml-mlflow uploads what begins with file://, and takes the rest for an address that Azure knows.
    return create_version(mlflow.MlflowClient(tracking_uri, tracking_uri), name, source, tags).version


def create_version(client, name, source, tags, run_id=None):
    """Makes a version of a model, and the model where the registry does not know it yet.

    Args:
        client: `mlflow.MlflowClient` of the registry.
        name: Name of the model in it.
        source: Where the files are, as URI.
        tags: Dict of tags of the version.
        run_id: ID of the run that the files belong to, if any.

    Returns:
        MLflow's `ModelVersion`.
    """
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, source, run_id=run_id, tags=tags)
