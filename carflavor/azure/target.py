"""The target `azureml` of `mlflow deployments`: azureml-mlflow, told which workspace and what to deploy on.

What azureml-mlflow does by itself: it takes `-t azureml` for the address of a registry and ends with `'NoneType' object
has no attribute 'group'`; only the workspace's whole `azureml://...` will do. Without a config file it deploys to Azure
Container Instances, and `list`, `get` and `delete` ask for what stands there; both ways are retired. `update` sends a
PATCH of what a PATCH does not change, and then ends with a TypeError. `carflavor_azureml.py` says how this module comes
into its place.
"""

import contextlib
import logging
import tempfile
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from carflavor.azure.arm import ResourceManager
from carflavor.azure.settings import deployment_properties, read_settings
from carflavor.azure.workspace import find_workspace

try:
    # The module, not the class: MLflow wants one client in a plugin.
    from azure.core.exceptions import ResourceNotFoundError
    from azureml.mlflow.deploy import deployment_client, run_local
except ImportError as error:
    raise ImportError(f"Azure ML needs packages that are not here ({error}): pip install carflavor[azure]") from error

__all__ = ["AzureMLTarget", "run_local", "target_help"]

_CONFIG = "deploy-config-file"

_logger = logging.getLogger(__name__)


def target_help():
    """Returns what `mlflow deployments help -t azureml` prints."""
    return (
        "The target is azureml, for the workspace of MLFLOW_TRACKING_URI=azureml://..., of a config.json in this "
        "folder or one above, or of the variables AZUREML_ARM_... of Azure's own machines; or it is a workspace's "
        f"whole azureml://... URI. -C {_CONFIG}=FILE names a YAML or JSON file with keys such as instance_type, "
        "instance_count, request_settings, liveness_probe and readiness_probe; without one, a managed online endpoint "
        "on Standard_DS2_v2 is made. docs/azure.md of carflavor has them all."
    )


class AzureMLTarget(deployment_client.AzureMLDeploymentClient):
    """azureml-mlflow's client, for managed online endpoints alone.

    Args:
        target_uri: `azureml` for the workspace that is known from where the user works, or the workspace's
            `azureml://...`.
    """

    def __init__(self, target_uri):
        with _as_mlflow_errors():
            workspace = find_workspace("" if target_uri.strip("/:") == "azureml" else target_uri)
            self._arm = ResourceManager(workspace)
            uri = workspace.tracking_uri or _ask_for_uri(self._arm)
        super().__init__(uri)

    def create_deployment(self, name, model_uri, flavor=None, config=None, endpoint=None):
        """See `BaseDeploymentClient`. The config file is checked, and a missing one is our defaults."""
        with _as_mlflow_errors(), _complete(config) as complete:
            model_uri = _resolve(model_uri)
            if model_uri.startswith("models:/") and "registries" not in mlflow.get_registry_uri():
                # Before there is an endpoint: azureml-mlflow makes that first, and finds out afterwards.
                self._find_model(model_uri)
            return super().create_deployment(name, model_uri, flavor, complete, endpoint)

    def update_deployment(self, name, model_uri=None, flavor=None, config=None, endpoint=None):
        """See `BaseDeploymentClient`. Without a config file the deployment keeps what it has."""
        path = f"/onlineEndpoints/{endpoint or name}/deployments/{name}"
        with _as_mlflow_errors():
            found = self._arm.get(path)
            if found is None:
                raise _nothing(name, endpoint)
            properties, sku = {**found["properties"]}, found["sku"]
            if config and _CONFIG in config:
                settings = read_settings(config[_CONFIG])
                properties = deployment_properties(settings, properties["model"])
                sku = {**sku, "capacity": settings["instance_count"]}
            if model_uri:
                properties["model"] = self._find_model(_resolve(model_uri))
            # PUT, where azureml-mlflow sends a PATCH: what that may change, Azure says, is sku and tags.
            body = {"location": found["location"], "tags": found.get("tags") or {}, "sku": sku}
            self._arm.change("PUT", path, {**body, "properties": properties})
        return {"name": name, "flavor": flavor or "python_function"}

    def _find_model(self, model_uri):
        name, _, version = model_uri.removeprefix("models:/").partition("/")
        if not model_uri.startswith("models:/") or self._arm.get(f"/models/{name}/versions/{version}") is None:
            raise ValueError(
                f"Expected a model of the registry of {self._arm.workspace.name} as models:/name/version, "
                f"got {model_uri}: carflavor's step deploy registers one there"
            )
        return f"{self._arm.workspace.resource_id}/models/{name}/versions/{version}"

    def list_deployments(self, endpoint=None):
        """See `BaseDeploymentClient`. Of every endpoint, or of one."""
        names = [endpoint] if endpoint else [found["name"] for found in self.list_endpoints()]
        return [
            {**deployment, "endpointName": name}
            for name in names
            for deployment in super(AzureMLTarget, self).list_deployments(name)
        ]

    def get_deployment(self, name, endpoint=None):
        """See `BaseDeploymentClient`."""
        for deployment in self.list_deployments(endpoint or name) if self._has_endpoint(endpoint or name) else []:
            if deployment["name"] == name:
                return {**deployment, "flavor": "python_function"}
        raise _nothing(name, endpoint)

    def delete_deployment(self, name, endpoint=None, **kwargs):
        """See `BaseDeploymentClient`. The endpoint that `create` made along with a deployment goes with it."""
        if not self._has_endpoint(endpoint or name):
            _logger.info("There is no endpoint %s", endpoint or name)
            return
        names = [deployment["name"] for deployment in self.list_deployments(endpoint or name)]
        if endpoint is None and names in ([], [name]):
            self.delete_endpoint(name)
        elif name in names:
            super().delete_deployment(name, endpoint=endpoint, **kwargs)
        else:
            raise _nothing(name, endpoint)

    def _has_endpoint(self, name):
        try:
            return bool(self.get_endpoint(name))
        except ResourceNotFoundError:
            return False


def _nothing(name, endpoint):
    return MlflowException(
        f"Expected a deployment {name} of the endpoint {endpoint or name}, got none",
        error_code=RESOURCE_DOES_NOT_EXIST,
    )


def _ask_for_uri(arm):
    found = arm.get()
    if found is None:
        raise ValueError(f"Expected a workspace {arm.workspace.resource_id}, got nothing there")
    return found["properties"]["mlFlowTrackingUri"]


@contextlib.contextmanager
def _as_mlflow_errors():
    """Turns ValueError into what MLflow expects of a plugin."""
    try:
        yield
    except ValueError as error:
        raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error


@contextlib.contextmanager
def _complete(config):
    """Yields a config whose file says everything that the user's leaves open."""
    config = config or {}
    path = config.get(_CONFIG, "")
    # azureml-mlflow stumbles over a key with an empty text or false, which mean nothing else than no key.
    settings = {key: value for key, value in read_settings(path).items() if value}
    with tempfile.TemporaryDirectory() as folder:
        complete = Path(folder) / "config.yaml"
        complete.write_text(yaml.safe_dump(settings), encoding="utf-8")
        yield {**config, _CONFIG: str(complete)}


def _resolve(model_uri):
    """Returns `models:/name/version` for an alias or `latest`, which azureml-mlflow does not know."""
    if not model_uri.startswith("models:/"):
        return model_uri
    name, _, which = model_uri.removeprefix("models:/").replace("@", "/@").partition("/")
    if which.startswith("@"):
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, which[1:]).version}"
    if which == "latest":
        versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
        return f"models:/{name}/{max(int(version.version) for version in versions)}"
    return model_uri
