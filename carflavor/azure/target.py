"""The target `azureml` of `mlflow deployments`: azureml-mlflow, told which workspace and what to deploy on.

What azureml-mlflow does by itself: it takes `-t azureml` for the address of a registry and ends with `'NoneType' object
has no attribute 'group'`; only the workspace's whole `azureml://...` will do. Without a config file it deploys to Azure
Container Instances, and `list`, `get` and `delete` ask for what stands there; both ways are retired. `update` sends a
PATCH of what a PATCH does not change, and then ends with a TypeError. `carflavor_azureml.py` says how this module comes
into its place.
"""

import contextlib
import logging
import re
import tempfile
import warnings
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST

from carflavor.azure.arm import RefusedError, ResourceManager
from carflavor.azure.endpoint import Endpoint, check_name, serves, traffic
from carflavor.azure.settings import change_deployment, read_settings
from carflavor.azure.workspace import find_workspace
from carflavor.package import MANIFEST_TAG

try:
    # The module, not the class: MLflow wants one client in a plugin.
    from azure.core.exceptions import AzureError, ResourceNotFoundError
    from azureml.mlflow.deploy import deployment_client, run_local
except ImportError as error:
    raise ImportError(f"Azure ML needs packages that are not here ({error}): pip install 'carflavor[azure]'") from error

__all__ = ["AzureMLTarget", "run_local", "target_help"]

_CONFIG = "deploy-config-file"
_DIGEST = "CARFLAVOR_EXPECTED_SHA256"

# Below MLflow's logger, whose level and form `mlflow deployments` prints with.
_logger = logging.getLogger(f"mlflow.{__name__}")


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
            uri = workspace.tracking_uri or self._arm.expect_workspace()["properties"]["mlFlowTrackingUri"]
        super().__init__(uri)

    def create_deployment(self, name, model_uri, flavor=None, config=None, endpoint=None):
        """See `BaseDeploymentClient`. The config file is checked, and a missing one is our defaults.

        A model of carflavor is asked for a photo before it gets traffic, and is removed where it does not answer. What
        carries traffic is left alone: that is for `update`.
        """
        with _as_mlflow_errors():
            check_name(name)
            _check_request(flavor, config)
            place, tags = Endpoint(self._arm, endpoint or name), {}
            # What is in a registry of Azure's that workspaces share, azureml-mlflow finds.
            if not (model_uri.startswith("models:/") and "registries" in mlflow.get_registry_uri()):
                model_uri, tags = self._find_model(model_uri)
            self._refuse_what_serves(place, name, alone=endpoint is None)
            # The deployment serves these very files or does not start.
            expected = {_DIGEST: tags[MANIFEST_TAG]} if MANIFEST_TAG in tags else {}
            with _complete(config, expected) as complete, warnings.catch_warnings():
                # azureml-mlflow asks MLflow for its stages, which are deprecated.
                warnings.simplefilter("ignore", FutureWarning)
                if endpoint is None:
                    # Before azureml-mlflow makes it, by a PUT which takes the traffic from one that is there.
                    place.create(self._arm.expect_workspace()["location"])
                standing = self._arm.wait_until_settled(place.path(name))
                if standing and not serves(standing):
                    # Azure mends a failed deployment only sometimes.
                    place.remove(name)
                    standing = None
                try:
                    created = super().create_deployment(name, model_uri, flavor, complete, place.name)
                    self._ask(place, name, tags)
                    if endpoint is None:
                        place.move({name: 100})
                except BaseException as error:
                    self._clear_away(place, name, standing, error)
                    raise
        return created

    def _clear_away(self, place, name, standing, error):
        """Deletes a deployment that has failed, after its last words, if it is no longer what stood there before."""
        try:
            if self._arm.get(place.path(name)) in (None, standing):
                return
            self._show_logs(place, name)
            # Also where the answer to moving it was lost: Azure deletes nothing that has traffic.
            if traffic(place.expect(place.find())).keys() == {name}:
                place.move({})
            place.remove(name)
        except ValueError as second:
            raise ValueError(f"{_sentence(error)}. {place.name}/{name} stays: {second}") from error
        if isinstance(error, (ValueError, AzureError)):
            raise ValueError(f"{_sentence(error)}. {place.name}/{name} is removed again") from error

    def update_deployment(self, name, model_uri=None, flavor=None, config=None, endpoint=None):
        """See `BaseDeploymentClient`. What the config file leaves open, and all without one, stays as it is.

        A model of carflavor is asked for a photo afterwards. Where it does not answer, the deployment becomes what it
        was again.
        """
        with _as_mlflow_errors():
            _check_request(flavor, config)
            place = Endpoint(self._arm, endpoint or name)
            found = self._arm.wait_until_settled(place.path(name))
            if found is None:
                raise _nothing(name, endpoint)
            before = {key: found[key] for key in ("location", "tags", "sku", "properties") if found.get(key)}
            sku, properties = found["sku"], found["properties"]
            if config and _CONFIG in config:
                sku, properties = change_deployment(sku, properties, config[_CONFIG])
            if not model_uri:
                tags = self._find_tags(properties.get("model") or "")
            else:
                model_uri, tags = self._find_model(model_uri)
                variables = {**(properties.get("environmentVariables") or {})}
                variables.pop(_DIGEST, None)  # of the old model
                if MANIFEST_TAG in tags:
                    variables[_DIGEST] = tags[MANIFEST_TAG]
                _, model, version = model_uri.split("/")
                model_id = f"{self._arm.workspace.resource_id}/models/{model}/versions/{version}"
                properties = {**properties, "model": model_id, "environmentVariables": variables}
            self._change(place, name, before, {**before, "sku": sku, "properties": properties}, tags)
        return {"name": name, "flavor": flavor or "python_function"}

    def _change(self, place, name, before, body, tags):
        try:
            # PUT, where azureml-mlflow sends a PATCH: what that may change, Azure says, is sku and tags.
            place.put(name, body)
            self._ask(place, name, tags)
        except RefusedError:
            raise
        except BaseException as error:
            self._show_logs(place, name)
            self._put_back(place, name, before, error)
            raise

    def _put_back(self, place, name, before, error):
        """Makes a deployment what it was before an error, where it served then."""
        if not serves(before):
            return
        try:
            self._arm.wait_until_settled(place.path(name))
            self._arm.change("PUT", place.path(name), before)
        except ValueError as second:
            raise ValueError(
                f"{_sentence(error)}. {place.name}/{name} could not be made what it was: {second}"
            ) from error
        if isinstance(error, ValueError):
            raise ValueError(f"{error}. {place.name}/{name} is again what it was") from error

    def _show_logs(self, place, name):
        if lines := place.read_logs(name):
            _logger.warning("The last lines of %s/%s:\n%s", place.name, name, lines)

    def _ask(self, place, name, tags):
        if MANIFEST_TAG in tags:
            [row] = place.ask(name)
            _logger.info("%s/%s answers a photo with %s (%.2f)", place.name, name, row["label"], row["prob"])

    def _refuse_what_serves(self, place, name, alone):
        """Raises an error where a deployment, or its endpoint that has it alone, carries traffic already."""
        found = place.find()
        shares = traffic(found) if found else {}
        if name in shares or (alone and shares):
            raise MlflowException(
                f"Expected {place.name} to have no traffic for {name if name in shares else 'others'}, got {shares}: "
                "`mlflow deployments update` changes what serves, and --endpoint makes a deployment beside it",
                error_code=RESOURCE_ALREADY_EXISTS,
            )

    def _find_model(self, model_uri):
        """Returns `models:/name/version` and the tags of that version in the workspace's registry.

        What an alias or `latest` means, which azureml-mlflow does not know, that registry says as well.
        """
        name, _, which = model_uri.removeprefix("models:/").replace("@", "/@").partition("/")
        if which.startswith("@"):
            client = mlflow.MlflowClient(self.target_uri, self.target_uri)
            which = str(client.get_model_version_by_alias(name, which[1:]).version)
        elif which == "latest":
            versions = [version["name"] for version in self._arm.list(f"/models/{name}/versions")]
            which = max(filter(str.isdecimal, versions), key=int, default="latest")
        found = None
        if model_uri.startswith("models:/") and which:
            found = self._arm.get(f"/models/{name}/versions/{which}")
        if found is None:
            raise ValueError(
                f"Expected a model of the registry of {self._arm.workspace.name} as models:/name/version, "
                f"got {model_uri}: carflavor's step deploy registers one there"
            )
        return f"models:/{name}/{which}", found["properties"].get("tags") or {}

    def _find_tags(self, model_id):
        """Returns the tags of the version of a model that a deployment has; none for one of a registry of its own."""
        found = re.search(r"/models/[^/]+/versions/[^/]+$", model_id)
        version = self._arm.get(found[0]) if found and "registries" not in model_id else None
        return (version["properties"].get("tags") or {}) if version else {}

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


def _check_request(flavor, config):
    """Refuses what azureml-mlflow would refuse when an endpoint is made already, or would not look at."""
    if flavor not in (None, "python_function"):
        raise ValueError(f"Expected flavor python_function, by which Azure serves all models. Received: {flavor}")
    if unknown := sorted(set(config or {}) - {_CONFIG}):
        raise ValueError(f"Expected config to be {_CONFIG}=FILE alone. Received: {', '.join(unknown)}")


def _sentence(error):
    """Returns what an error says, on one line."""
    return " ".join(str(error).split()).rstrip(".")


def _nothing(name, endpoint):
    return MlflowException(
        f"Expected a deployment {name} of the endpoint {endpoint or name}, got none",
        error_code=RESOURCE_DOES_NOT_EXIST,
    )


@contextlib.contextmanager
def _as_mlflow_errors():
    """Turns ValueError, and what azureml-mlflow lets through of Azure's, into what MLflow expects of a plugin."""
    try:
        yield
    except ValueError as error:
        # One traceback on the terminal, not three.
        raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
    except AzureError as error:
        raise MlflowException(" ".join(error.message.split())) from None


@contextlib.contextmanager
def _complete(config, variables):
    """Yields a config whose file says everything that the user's leaves open, and environment variables of ours."""
    config = config or {}
    settings = read_settings(config.get(_CONFIG, ""))
    settings["environment_variables"] = {**variables, **settings["environment_variables"]}
    with tempfile.TemporaryDirectory() as folder:
        complete = Path(folder) / "config.yaml"
        # azureml-mlflow stumbles over a key with an empty text or false, which mean nothing else than no key.
        said = {key: value for key, value in settings.items() if value}
        complete.write_text(yaml.safe_dump(said), encoding="utf-8")
        yield {**config, _CONFIG: str(complete)}
