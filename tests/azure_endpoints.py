"""What the stand-in for Azure has of managed online endpoints and their deployments."""

import re
import secrets
import time

from azure_registry import find_model
from azure_server import PROVIDER, Refusal

# The names that Azure's documentation allows for endpoints and deployments.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")


def _check_name(name):
    if not _NAME.fullmatch(name):
        raise Refusal(400, f"Expected a name of 3 to 32 letters, digits and hyphens, got '{name}'.")


def _check_traffic(stand_in, endpoint, properties):
    traffic = properties.get("traffic") or {}
    names = {*traffic, *(properties.get("mirrorTraffic") or {})}
    if missing := sorted(name for name in names if (endpoint, name) not in stand_in.deployments):
        raise Refusal(400, f"Traffic is given to deployments that do not exist: {', '.join(missing)}.")
    if not all(0 <= share <= 100 for share in traffic.values()) or sum(traffic.values()) not in {0, 100}:
        raise Refusal(400, f"Traffic must add up to 0 or 100, got {traffic}.")


def find_endpoint(stand_in, name):
    stand_in.advance_resource(stand_in.endpoints, name)
    if name not in stand_in.endpoints:
        raise Refusal(404, f"The endpoint '{name}' was not found in this workspace.")
    return stand_in.endpoints[name]


def list_endpoints(stand_in, record, **scope):
    stand_in.check_access(record, **scope)
    return 200, {"value": list(stand_in.endpoints.values())}


def get_endpoint(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    return 200, find_endpoint(stand_in, endpoint)


def put_endpoint(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    _check_name(endpoint)
    body = stand_in.check_body(record, "OnlineEndpointData")
    stand_in.refuse_if_busy(stand_in.endpoints, endpoint)
    _check_traffic(stand_in, endpoint, body["properties"])
    known = endpoint in stand_in.endpoints
    scoring = f"{stand_in.url}/inference/{endpoint}"
    # PUT replaces: what it does not name is gone, traffic as well.
    properties = {
        "traffic": {},
        "mirrorTraffic": {},
        "publicNetworkAccess": "Enabled",
        **body["properties"],
        "scoringUri": f"{scoring}/score",
        "swaggerUri": f"{scoring}/swagger.json",
    }
    identity = {"id": f"{stand_in.scope}/onlineEndpoints/{endpoint}", "name": endpoint}
    kind = f"{PROVIDER}/workspaces/onlineEndpoints"
    resource = {"tags": {}, **body, **identity, "type": kind, "properties": properties}
    operation = stand_in.start(stand_in.endpoints, endpoint, resource)
    status = 200 if known else 201
    return status, stand_in.endpoints[endpoint], stand_in.operation_headers("mfeOperationsStatus", operation, record)


def patch_endpoint(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    body = stand_in.check_body(record, "PartialOnlineEndpointPartialTrackedResource")
    find_endpoint(stand_in, endpoint)
    stand_in.refuse_if_busy(stand_in.endpoints, endpoint)
    changes = body.get("properties") or {}
    _check_traffic(stand_in, endpoint, changes)
    current = stand_in.endpoints[endpoint]
    # `traffic` replaces what was there: the plugin takes a deployment off by leaving its name out.
    resource = {**current, "properties": {**current["properties"], **changes}}
    resource["tags"] = body.get("tags", current["tags"])
    operation = stand_in.start(stand_in.endpoints, endpoint, resource)
    return 202, None, stand_in.operation_headers("mfeOperationResults", operation, record)


def delete_endpoint(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    if endpoint not in stand_in.endpoints:
        return 204, None
    stand_in.refuse_if_busy(stand_in.endpoints, endpoint)
    operation = stand_in.start(stand_in.endpoints, endpoint, None)
    return 202, None, stand_in.operation_headers("mfeOperationResults", operation, record)


def list_keys(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    _check_mode(stand_in, endpoint, "Key")
    primary, secondary = stand_in.keys.setdefault(endpoint, (secrets.token_hex(8), secrets.token_hex(8)))
    return 200, {"primaryKey": primary, "secondaryKey": secondary}


def get_endpoint_token(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    _check_mode(stand_in, endpoint, "AMLToken")
    token, _ = stand_in.keys.setdefault(endpoint, (secrets.token_hex(8), None))
    now = int(time.time())
    times = {"expiryTimeUtc": now + 3600, "refreshAfterTimeUtc": now + 1800}
    return 200, {"accessToken": token, "tokenType": "Bearer", **times}


def _check_mode(stand_in, endpoint, expected):
    if (mode := find_endpoint(stand_in, endpoint)["properties"]["authMode"]) != expected:
        raise Refusal(400, f"Expected an endpoint with the auth mode {expected}, got {mode}.")


def find_deployment(stand_in, endpoint, name):
    find_endpoint(stand_in, endpoint)
    stand_in.advance_resource(stand_in.deployments, (endpoint, name))
    if (endpoint, name) not in stand_in.deployments:
        raise Refusal(404, f"The endpoint '{endpoint}' has no deployment '{name}'.")
    return stand_in.deployments[endpoint, name]


def list_deployments(stand_in, record, endpoint, **scope):
    stand_in.check_access(record, **scope)
    find_endpoint(stand_in, endpoint)
    return 200, {"value": [found for (owner, _), found in stand_in.deployments.items() if owner == endpoint]}


def get_deployment(stand_in, record, endpoint, deployment, **scope):
    stand_in.check_access(record, **scope)
    return 200, find_deployment(stand_in, endpoint, deployment)


def put_deployment(stand_in, record, endpoint, deployment, **scope):
    stand_in.check_access(record, **scope)
    _check_name(deployment)
    body = stand_in.check_body(record, "OnlineDeploymentData")
    find_endpoint(stand_in, endpoint)
    stand_in.refuse_if_busy(stand_in.endpoints, endpoint)
    key = endpoint, deployment
    stand_in.refuse_if_busy(stand_in.deployments, key)
    _check_model(stand_in, body["properties"].get("model"))
    if not body["properties"].get("instanceType"):
        raise Refusal(400, "A managed deployment needs an instanceType.")
    known = key in stand_in.deployments
    identity = {"id": f"{stand_in.scope}/onlineEndpoints/{endpoint}/deployments/{deployment}", "name": deployment}
    kind = f"{PROVIDER}/workspaces/onlineEndpoints/deployments"
    properties = {"environmentVariables": {}, **body["properties"]}
    resource = {"tags": {}, **body, **identity, "type": kind, "properties": properties}
    error = None
    if stand_in.failing.get(deployment):
        stand_in.failing[deployment] -= 1
        message = "The container did not become ready: the stand-in was told to fail."
        error = {"code": "ResourceNotReady", "message": message}
    operation = stand_in.start(stand_in.deployments, key, resource, error)
    status = 200 if known else 201
    return status, stand_in.deployments[key], stand_in.operation_headers("mfeOperationsStatus", operation, record)


def _check_model(stand_in, model):
    found = re.fullmatch(rf"{re.escape(stand_in.scope)}/models/([^/]+)/versions/([^/]+)", model or "")
    if not found:
        raise Refusal(400, f"Expected the id of a version of a model in this workspace, got {model!r}.")
    find_model(stand_in, *found.groups())


def patch_deployment(stand_in, record, endpoint, deployment, **scope):
    stand_in.check_access(record, **scope)
    body = stand_in.check_body(record, "PartialOnlineDeploymentPartialTrackedResource")
    find_deployment(stand_in, endpoint, deployment)
    stand_in.refuse_if_busy(stand_in.deployments, key := (endpoint, deployment))
    current = stand_in.deployments[key]
    resource = {**current, "properties": dict(current["properties"])}
    resource["sku"] = {**current.get("sku", {}), **body.get("sku", {})}
    resource["tags"] = body.get("tags", current["tags"])
    operation = stand_in.start(stand_in.deployments, key, resource)
    return 202, None, stand_in.operation_headers("mfeOperationResults", operation, record)


def delete_deployment(stand_in, record, endpoint, deployment, **scope):
    stand_in.check_access(record, **scope)
    if (key := (endpoint, deployment)) not in stand_in.deployments:
        return 204, None
    if share := stand_in.endpoints[endpoint]["properties"]["traffic"].get(deployment, 0):
        raise Refusal(400, f"The deployment '{deployment}' has {share} % of the traffic; set it to 0 first.")
    stand_in.refuse_if_busy(stand_in.deployments, key)
    operation = stand_in.start(stand_in.deployments, key, None)
    return 202, None, stand_in.operation_headers("mfeOperationResults", operation, record)


def get_logs(stand_in, record, endpoint, deployment, **scope):
    stand_in.check_access(record, **scope)
    stand_in.check_body(record, "DeploymentLogsRequest")
    state = find_deployment(stand_in, endpoint, deployment)["properties"]["provisioningState"]
    return 200, {"content": f"Instance status:\nInferenceServer: {state}\n"}


# The retired API of container instances, which the plugin asks as well


def get_service(stand_in, record, service, **scope):
    stand_in.check_access(record, **scope, versions=())
    raise Refusal(404, f"The service '{service}' was not found.", "NoSuchService")


def list_services(stand_in, record, **scope):
    stand_in.check_access(record, **scope, versions=())
    return 200, {"value": []}
