"""What the stand-in for Azure has of a workspace and its registry of models."""

from azure_models import CLIENTS
from azure_server import LOCATION, PROVIDER, Refusal


def get_workspace(stand_in, record, subscription, group, workspace):
    # The clients of different services of the same API call this one by different versions.
    stand_in.check_access(record, subscription, group, workspace, versions=(*CLIENTS, "2022-01-01-preview"))
    properties = {"mlFlowTrackingUri": stand_in.workspace_uri, "provisioningState": "Succeeded"}
    identity = {"id": stand_in.scope, "name": stand_in.workspace, "type": f"{PROVIDER}/workspaces"}
    return 200, {**identity, "location": LOCATION, "properties": properties}


def write_model(stand_in, name, version, properties):
    identity = {"id": f"{stand_in.scope}/models/{name}/versions/{version}", "name": version}
    kind = f"{PROVIDER}/workspaces/models/versions"
    stand_in.models[name, version] = {**identity, "type": kind, "properties": dict(properties)}
    return stand_in.models[name, version]


def get_model_version(stand_in, record, model, version, **scope):
    stand_in.check_access(record, **scope)
    return 200, find_model(stand_in, model, version)


def find_model(stand_in, name, version):
    if (name, version) not in stand_in.models:
        raise Refusal(404, f"The model '{name}' has no version '{version}' in this workspace.", "NotFound")
    return stand_in.models[name, version]


def list_model_versions(stand_in, record, model, **scope):
    stand_in.check_access(record, **scope)
    versions = [version for (name, _), version in stand_in.models.items() if name == model]
    if not versions:
        raise Refusal(404, f"The model '{model}' was not found in this workspace.", "NotFound")
    return 200, {"value": versions}


def put_model_version(stand_in, record, model, version, **scope):
    stand_in.check_access(record, **scope)
    body = stand_in.check_body(record, "ModelVersionData")
    known = (model, version) in stand_in.models
    return (200 if known else 201), write_model(stand_in, model, version, body["properties"])
