"""Which Azure ML workspace is meant: by parameter, by MLflow's tracking URI, or by what the environment says."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import mlflow

from carflavor.data.locations import resolve_input

# azureml://<host>/mlflow/v1.0/<ID of the workspace>, as the workspace's page and azureml-mlflow write it.
_URI = re.compile(
    r"azureml://[^/]+/mlflow/v[\d.]+"
    r"/subscriptions/([^/]+)/resourceGroups/([^/]+)/providers/Microsoft\.MachineLearningServices/workspaces/([^/?]+)\??",
    re.IGNORECASE,
)
# What compute instances of Azure ML set.
_VARIABLES = ("AZUREML_ARM_SUBSCRIPTION", "AZUREML_ARM_RESOURCEGROUP", "AZUREML_ARM_WORKSPACE_NAME")
_FILE_KEYS = ("subscription_id", "resource_group", "workspace_name")


@dataclass(frozen=True)
class Workspace:
    """An Azure ML workspace by name.

    Attributes:
        subscription: ID of the subscription.
        resource_group: Name of the resource group.
        name: Name of the workspace.
        tracking_uri: Its `azureml://...` for MLflow, or an empty text where that is not known yet.
    """

    subscription: str
    resource_group: str
    name: str
    tracking_uri: str = ""

    @property
    def resource_id(self):
        """The ID of the workspace in Azure Resource Manager, which begins with a slash."""
        return (
            f"/subscriptions/{self.subscription}/resourceGroups/{self.resource_group}"
            f"/providers/Microsoft.MachineLearningServices/workspaces/{self.name}"
        )


def find_workspace(named=""):
    """Finds the workspace that a user names, or else the one that is known from where the user works.

    Args:
        named: `azureml://...`, `subscription/resource-group/name`, or a `config.json` as Azure's portal gives it. If
            empty: MLflow's tracking URI where that is `azureml://...`, the variables `AZUREML_ARM_...` of Azure's own
            machines, or a `config.json` in this folder, its `.azureml`, or a folder above, in this order.

    Returns:
        `Workspace`.

    Raises:
        ValueError: If none is found, or what names it is malformed.
    """
    if named.startswith("azureml:"):
        return _read_uri(named)
    if named.endswith(".json") or Path(named or "missing").is_file():
        return _read_file(resolve_input(named, "workspace"))
    if named:
        parts = named.strip("/").split("/")
        if len(parts) != 3 or not all(parts):
            raise ValueError(
                "Expected workspace to be an azureml:// URI, subscription/resource-group/name or a config.json. "
                f"Received: workspace={named!r}"
            )
        return Workspace(*parts)
    if mlflow.get_tracking_uri().startswith("azureml:"):
        return _read_uri(mlflow.get_tracking_uri())
    if all(os.environ.get(name) for name in _VARIABLES):
        return Workspace(*(os.environ[name] for name in _VARIABLES))
    for folder in (Path.cwd(), *Path.cwd().parents):
        for path in (folder / "config.json", folder / ".azureml" / "config.json"):
            # Many programs have a config.json: only one that names a workspace is ours.
            if path.is_file() and all(f'"{key}"' in path.read_text(errors="replace") for key in _FILE_KEYS):
                return _read_file(path)
    raise ValueError(
        "Expected to know the workspace: set MLFLOW_TRACKING_URI=azureml://..., or name it as "
        "workspace=subscription/resource-group/name, or put the config.json of the workspace's page here"
    )


def _read_uri(uri):
    found = _URI.fullmatch(uri)
    if found is None:
        raise ValueError(
            "Expected the workspace's URI to be azureml://<region>.api.azureml.ms/mlflow/v1.0/subscriptions/.../"
            f"resourceGroups/.../providers/Microsoft.MachineLearningServices/workspaces/..., got {uri!r}"
        )
    return Workspace(*found.groups(), tracking_uri=uri)


def _read_file(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {path} to be the config.json of a workspace, got: {error}") from None
    if not isinstance(content, dict) or not all(content.get(key) for key in _FILE_KEYS):
        raise ValueError(f"Expected {path} to have {', '.join(_FILE_KEYS)}, as the workspace's config.json has them")
    return Workspace(*(content[key] for key in _FILE_KEYS))
