"""A stand-in for Azure Machine Learning: an HTTPS server for tests that clients reach by environment variables alone.

Where Azure's behaviour is not published, the stand-in takes the reading that forgives a client less. Nothing here has
been compared with Azure itself.
"""

import contextlib
import json
import re
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import azure_store
from azure_models import CLIENTS, find_faults
from azure_server import HttpsServer, Refusal, route
from servers import request

LOCATION = "westeurope"
_PROVIDER = "Microsoft.MachineLearningServices"
_WORKSPACE = f"/subscriptions/{{subscription}}/resourceGroups/{{group}}/providers/{_PROVIDER}/workspaces/{{workspace}}"
_ENDPOINT = f"{_WORKSPACE}/onlineEndpoints/{{endpoint}}"
_DEPLOYMENT = f"{_ENDPOINT}/deployments/{{deployment}}"
_MODEL = f"{_WORKSPACE}/models/{{model}}"
_ARTIFACTS = f"/artifact/v2.0{_WORKSPACE}/artifacts/{{origin}}/{{container}}"
_RUN_ARTIFACTS = f"/history/v1.0{_WORKSPACE}/experiments/{{experiment}}/runs/{{container}}/artifacts"
_METHODS = ["GET", "PUT", "POST", "PATCH", "DELETE"]
_OPERATIONS = f"/subscriptions/{{subscription}}/providers/{_PROVIDER}/locations/{{location}}"
# What a token of Microsoft Entra is for that endpoints with the auth mode AADToken take.
_SCORING = "https://ml.azure.com"
# The names that Azure's documentation allows for endpoints and deployments.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")


@dataclass
class _Failure:
    method: str
    path: re.Pattern
    status: int
    times: int
    headers: dict
    break_connection: bool


@dataclass
class _Operation:
    """Work on a resource that takes a while; `polls` counts the answers that will still call it unfinished."""

    store: dict
    key: object
    resource: dict | None
    polls: int
    error: dict | None = None
    done: bool = False


@dataclass
class AzureStandIn:
    """Context manager of a server on 127.0.0.1 that stands in for a workspace of Azure Machine Learning.

    It answers as Azure Resource Manager with its document of clouds, as the managed identity's source of tokens, as
    the workspace's registry of models and as its endpoints. State is in three dictionaries that tests may read and
    write; each value is a resource in the API's own form.

    Attributes:
        polls: How many answers about a resource say that work on it goes on, before one says that it has ended.
        scoring_url: URL to which `dataframe_split` and the like are posted, such as `http://127.0.0.1:5000/invocations`,
            for all deployments, or a dictionary of one for each deployment's name.
        mlflow_url: URL of an `mlflow server` that keeps the workspace's runs and its registry of models.
        models: By name and version, both strings.
        endpoints: By name.
        deployments: By the names of endpoint and deployment.
        blobs: Files of runs and of models, as bytes by `origin/container/path`.
        requests: List of `Record`, of all requests so far but those for tokens and for the document of clouds.
        url: The server's.
        workspace_uri: What `MLFLOW_TRACKING_URI` may be set to.
        environment: Variables that a client's process needs on top of its own.
    """

    polls: int = 1
    scoring_url: str | dict | None = None
    mlflow_url: str | None = None
    subscription: str = "11111111-2222-3333-4444-555555555555"
    resource_group: str = "cars-group"
    workspace: str = "cars-workspace"
    models: dict = field(default_factory=dict)
    endpoints: dict = field(default_factory=dict)
    deployments: dict = field(default_factory=dict)
    blobs: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)

    def __enter__(self):
        self._lock = threading.RLock()
        self._failures, self._failing, self._operations, self._served = [], {}, {}, {}
        self._tokens, self._keys, self._identity_header = {}, {}, secrets.token_hex(8)
        self.blocks, self.signature = {}, secrets.token_hex(8)
        self._folder = tempfile.TemporaryDirectory()
        certificate, key = Path(self._folder.name, "certificate.pem"), Path(self._folder.name, "key.pem")
        self._server = HttpsServer(self.answer, certificate, key)
        self.url = f"https://127.0.0.1:{self._server.server_port}"
        self.scope = _WORKSPACE.format(
            subscription=self.subscription, group=self.resource_group, workspace=self.workspace
        )
        self.workspace_uri = f"azureml://127.0.0.1:{self._server.server_port}/mlflow/v1.0{self.scope}"
        self.environment = {
            "ARM_CLOUD_METADATA_URL": f"{self.url}/metadata/endpoints?api-version=2019-05-01",
            "AZUREML_CURRENT_CLOUD": "StandIn",
            "IDENTITY_ENDPOINT": f"{self.url}/msi/token",
            "IDENTITY_HEADER": self._identity_header,
            # requests reads the one, Python's own client and httpx the other.
            "REQUESTS_CA_BUNDLE": str(certificate),
            "SSL_CERT_FILE": str(certificate),
            "NO_PROXY": "127.0.0.1",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._folder.cleanup()

    def fail(self, method, path_pattern, status=500, times=1, headers=None, break_connection=False):
        """Has requests fail that would otherwise be answered, before anything that they ask for is done.

        Args:
            method: `GET`, ...
            path_pattern: Regular expression that is searched for in the path, such as `deployments/green$`.
            status: HTTP status of the answer.
            times: How many requests fail.
            headers: Dictionary of headers for the answer, such as `Retry-After`.
            break_connection: Whether the connection ends without an answer instead.
        """
        failure = _Failure(method, re.compile(path_pattern), status, times, headers or {}, break_connection)
        self._failures.append(failure)

    def fail_deployment(self, name, times=1):
        """Has the next provisionings of a deployment of this name end as `Failed`."""
        self._failing[name] = times

    def recover(self):
        """Has nothing fail any more, and ends all work that goes on: a while has passed."""
        with self._lock:
            self._failures.clear()
            self._failing.clear()
            for operation in self._operations.values():
                operation.polls = 0
                self._advance(operation)

    def register(self, name, version, source="azureml://artifacts/model", tags=None):
        """Puts a version of a model into the workspace's registry, as a client can by its requests."""
        properties = {"modelUri": source, "modelType": "mlflow_model", "tags": tags or {}, "properties": {}}
        self._write_model(name, version, properties)

    def answer(self, record):
        """Returns status, body and headers for a request; None for a connection that is to break."""
        answer = self._answer(record)
        record.status = answer and answer[0]
        if record.path not in {"/metadata/endpoints", "/msi/token"}:
            self.requests.append(record)
        return answer

    def _answer(self, record):
        with self._lock:
            for failure in self._failures:
                if failure.times and failure.method == record.method and failure.path.search(record.path):
                    failure.times -= 1
                    if failure.break_connection:
                        return None
                    refusal = Refusal(failure.status, "The stand-in was told to fail.", headers=failure.headers)
                    return refusal.status, refusal.body, refusal.headers
        try:
            for method, path, act in _ROUTES:
                if method == record.method and (found := path.fullmatch(record.path)):
                    with contextlib.nullcontext() if act in _SLOW else self._lock:
                        return (*act(self, record, **found.groupdict()), {})[:3]
            raise Refusal(404, f"No route for {record.method} {record.path}.", "InvalidResourceType")
        except Refusal as refusal:
            return refusal.status, refusal.body, refusal.headers

    # Tokens and clouds

    def _get_clouds(self, record):
        authentication = {"loginEndpoint": self.url, "audiences": [self.url], "tenant": "common"}
        suffixes = {"storage": azure_store.STORAGE, "keyVaultDns": "vault.azure.net", "acrLoginServer": "azurecr.io"}
        cloud = {"name": "StandIn", "portal": self.url, "resourceManager": f"{self.url}/"}
        return 200, [{**cloud, "authentication": authentication, "suffixes": suffixes}]

    def _get_token(self, record):
        if record.headers["X-IDENTITY-HEADER"] != self._identity_header:
            raise Refusal(401, "The header X-IDENTITY-HEADER is not that of this machine.")
        resource = record.query.get("resource")
        if resource not in {self.url, _SCORING}:
            raise Refusal(400, f"Expected the resource {self.url} or {_SCORING}, got {resource}.")
        self._tokens[token := secrets.token_hex(16)] = resource
        expiry = str(int(time.time()) + 3600)
        return 200, {"access_token": token, "expires_on": expiry, "resource": resource, "token_type": "Bearer"}

    def check_access(self, record, subscription, group=None, workspace=None, versions=tuple(CLIENTS)):
        """Refuses a request without a token, about another workspace, or by an unknown version of the API."""
        if record.headers["Authorization"] not in self._bearers(self.url):
            challenge = f'Bearer authorization_uri="{self.url}", error="invalid_token"'
            raise Refusal(401, "The access token is missing or invalid.", headers={"WWW-Authenticate": challenge})
        if subscription != self.subscription:
            raise Refusal(404, f"The subscription '{subscription}' could not be found.", "SubscriptionNotFound")
        if group is not None and group.lower() != self.resource_group.lower():
            raise Refusal(404, f"Resource group '{group}' could not be found.", "ResourceGroupNotFound")
        if workspace is not None and workspace.lower() != self.workspace.lower():
            raise Refusal(404, f"The resource '{_PROVIDER}/workspaces/{workspace}' was not found.")
        if versions and (version := record.query.get("api-version")) not in versions:
            message = f"The api-version '{version}' is invalid. The supported versions are '{','.join(versions)}'."
            raise Refusal(400, message, "InvalidApiVersionParameter")

    def _bearers(self, resource):
        return {f"Bearer {token}" for token, one in self._tokens.items() if one == resource}

    def check_signature(self, record):
        """Refuses a request to the storage account whose URL this server did not give away."""
        if record.query.get("sig") != self.signature:
            raise Refusal(403, "The signature is not one of this account.", "AuthenticationFailed")

    # Long-running operations

    def _start(self, store, key, resource, error=None):
        """Begins to put a resource in place, or to remove it for None, and returns the operation's id."""
        old = store.get(key)
        if old or resource:
            state = "Deleting" if resource is None else "Updating" if old else "Creating"
            shown = old or resource
            store[key] = {**shown, "properties": {**shown["properties"], "provisioningState": state}}
        self._operations[identity := secrets.token_hex(8)] = _Operation(store, key, resource, self.polls, error)
        return identity

    def _advance(self, operation):
        if operation.done:
            return
        if operation.polls > 0:
            operation.polls -= 1
            return
        operation.done = True
        if operation.resource is None:
            operation.store.pop(operation.key, None)
            if operation.store is self.endpoints:
                for key in [key for key in self.deployments if key[0] == operation.key]:
                    del self.deployments[key]
        else:
            state = "Failed" if operation.error else "Succeeded"
            operation.resource["properties"]["provisioningState"] = state
            operation.store[operation.key] = operation.resource

    def _advance_resource(self, store, key):
        """Lets time pass for a resource that is asked for; returns whether work on it goes on."""
        unfinished = [work for work in self._operations.values() if work.store is store and work.key == key]
        for operation in unfinished:
            self._advance(operation)
        return not all(operation.done for operation in unfinished)

    def _refuse_if_busy(self, store, key):
        if self._advance_resource(store, key):
            raise Refusal(409, f"An operation on {key} is in progress; try again when it has ended.")

    def _operation_headers(self, kind, identity, record):
        base = f"{self.url}{_OPERATIONS.format(subscription=self.subscription, location=LOCATION)}"
        url = f"{base}/{kind}/{identity}?api-version={record.query['api-version']}"
        return {
            {"mfeOperationsStatus": "Azure-AsyncOperation", "mfeOperationResults": "Location"}[kind]: url,
            "x-ms-async-operation-timeout": "PT1H",
            # Azure's clients take "Retry-After: 0" for no header at all, and wait half a minute between two polls.
            "x-ms-retry-after-ms": "10",
        }

    def _get_operation(self, record, subscription, location, operation):
        self.check_access(record, subscription)
        work = self._find_operation(operation)
        body = {"id": record.path, "name": operation, "status": "InProgress"}
        if work.done:
            body["status"] = "Failed" if work.error else "Succeeded"
            body["error"] = work.error
        return 200, body, {"x-ms-retry-after-ms": "10"}

    def _get_result(self, record, subscription, location, operation):
        self.check_access(record, subscription)
        work = self._find_operation(operation)
        if not work.done:
            return 202, None, self._operation_headers("mfeOperationResults", operation, record)
        return (204, None) if work.resource is None else (200, work.resource)

    def _find_operation(self, identity):
        if identity not in self._operations:
            raise Refusal(404, f"The operation '{identity}' was not found.")
        self._advance(operation := self._operations[identity])
        return operation

    # The workspace and its models

    def _get_workspace(self, record, subscription, group, workspace):
        # The clients of different services of the same API call this one by different versions.
        self.check_access(record, subscription, group, workspace, versions=(*CLIENTS, "2022-01-01-preview"))
        properties = {"mlFlowTrackingUri": self.workspace_uri, "provisioningState": "Succeeded"}
        identity = {"id": self.scope, "name": self.workspace, "type": f"{_PROVIDER}/workspaces"}
        return 200, {**identity, "location": LOCATION, "properties": properties}

    def _write_model(self, name, version, properties):
        identity = {"id": f"{self.scope}/models/{name}/versions/{version}", "name": version}
        kind = f"{_PROVIDER}/workspaces/models/versions"
        self.models[name, version] = {**identity, "type": kind, "properties": dict(properties)}
        return self.models[name, version]

    def _get_model_version(self, record, model, version, **scope):
        self.check_access(record, **scope)
        return 200, self._find_model(model, version)

    def _find_model(self, name, version):
        if (name, version) not in self.models:
            raise Refusal(404, f"The model '{name}' has no version '{version}' in this workspace.", "NotFound")
        return self.models[name, version]

    def _list_model_versions(self, record, model, **scope):
        self.check_access(record, **scope)
        versions = [version for (name, _), version in self.models.items() if name == model]
        if not versions:
            raise Refusal(404, f"The model '{model}' was not found in this workspace.", "NotFound")
        return 200, {"value": versions}

    def _put_model_version(self, record, model, version, **scope):
        self.check_access(record, **scope)
        body = self._check_body(record, "ModelVersionData")
        known = (model, version) in self.models
        return (200 if known else 201), self._write_model(model, version, body["properties"])

    # Endpoints

    def _check_body(self, record, model):
        if faults := find_faults(record.body, model, record.query["api-version"]):
            details = [{"code": "InvalidBody", "message": fault} for fault in faults]
            raise Refusal(400, f"The request is invalid: {'; '.join(faults)}", details=details)
        return record.body

    def _check_name(self, name):
        if not _NAME.fullmatch(name):
            raise Refusal(400, f"Expected a name of 3 to 32 letters, digits and hyphens, got '{name}'.")

    def _check_traffic(self, endpoint, properties):
        traffic = properties.get("traffic") or {}
        names = {*traffic, *(properties.get("mirrorTraffic") or {})}
        if missing := sorted(name for name in names if (endpoint, name) not in self.deployments):
            raise Refusal(400, f"Traffic is given to deployments that do not exist: {', '.join(missing)}.")
        if not all(0 <= share <= 100 for share in traffic.values()) or sum(traffic.values()) not in {0, 100}:
            raise Refusal(400, f"Traffic must add up to 0 or 100, got {traffic}.")

    def _find_endpoint(self, name):
        self._advance_resource(self.endpoints, name)
        if name not in self.endpoints:
            raise Refusal(404, f"The endpoint '{name}' was not found in this workspace.")
        return self.endpoints[name]

    def _list_endpoints(self, record, **scope):
        self.check_access(record, **scope)
        return 200, {"value": list(self.endpoints.values())}

    def _get_endpoint(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        return 200, self._find_endpoint(endpoint)

    def _put_endpoint(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        self._check_name(endpoint)
        body = self._check_body(record, "OnlineEndpointData")
        self._refuse_if_busy(self.endpoints, endpoint)
        self._check_traffic(endpoint, body["properties"])
        known = endpoint in self.endpoints
        scoring = f"{self.url}/inference/{endpoint}"
        # PUT replaces: what it does not name is gone, traffic as well.
        properties = {
            "traffic": {},
            "mirrorTraffic": {},
            "publicNetworkAccess": "Enabled",
            **body["properties"],
            "scoringUri": f"{scoring}/score",
            "swaggerUri": f"{scoring}/swagger.json",
        }
        identity = {"id": f"{self.scope}/onlineEndpoints/{endpoint}", "name": endpoint}
        kind = f"{_PROVIDER}/workspaces/onlineEndpoints"
        resource = {"tags": {}, **body, **identity, "type": kind, "properties": properties}
        operation = self._start(self.endpoints, endpoint, resource)
        status = 200 if known else 201
        return status, self.endpoints[endpoint], self._operation_headers("mfeOperationsStatus", operation, record)

    def _patch_endpoint(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        body = self._check_body(record, "PartialOnlineEndpointPartialTrackedResource")
        self._find_endpoint(endpoint)
        self._refuse_if_busy(self.endpoints, endpoint)
        changes = body.get("properties") or {}
        self._check_traffic(endpoint, changes)
        current = self.endpoints[endpoint]
        # `traffic` replaces what was there: the plugin takes a deployment off by leaving its name out.
        resource = {**current, "properties": {**current["properties"], **changes}}
        resource["tags"] = body.get("tags", current["tags"])
        operation = self._start(self.endpoints, endpoint, resource)
        return 202, None, self._operation_headers("mfeOperationResults", operation, record)

    def _delete_endpoint(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        if endpoint not in self.endpoints:
            return 204, None
        self._refuse_if_busy(self.endpoints, endpoint)
        operation = self._start(self.endpoints, endpoint, None)
        return 202, None, self._operation_headers("mfeOperationResults", operation, record)

    def _list_keys(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        self._check_mode(endpoint, "Key")
        primary, secondary = self._keys.setdefault(endpoint, (secrets.token_hex(8), secrets.token_hex(8)))
        return 200, {"primaryKey": primary, "secondaryKey": secondary}

    def _get_endpoint_token(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        self._check_mode(endpoint, "AMLToken")
        token, _ = self._keys.setdefault(endpoint, (secrets.token_hex(8), None))
        now = int(time.time())
        times = {"expiryTimeUtc": now + 3600, "refreshAfterTimeUtc": now + 1800}
        return 200, {"accessToken": token, "tokenType": "Bearer", **times}

    def _check_mode(self, endpoint, expected):
        if (mode := self._find_endpoint(endpoint)["properties"]["authMode"]) != expected:
            raise Refusal(400, f"Expected an endpoint with the auth mode {expected}, got {mode}.")

    # Deployments

    def _find_deployment(self, endpoint, name):
        self._find_endpoint(endpoint)
        self._advance_resource(self.deployments, (endpoint, name))
        if (endpoint, name) not in self.deployments:
            raise Refusal(404, f"The endpoint '{endpoint}' has no deployment '{name}'.")
        return self.deployments[endpoint, name]

    def _list_deployments(self, record, endpoint, **scope):
        self.check_access(record, **scope)
        self._find_endpoint(endpoint)
        return 200, {"value": [found for (owner, _), found in self.deployments.items() if owner == endpoint]}

    def _get_deployment(self, record, endpoint, deployment, **scope):
        self.check_access(record, **scope)
        return 200, self._find_deployment(endpoint, deployment)

    def _put_deployment(self, record, endpoint, deployment, **scope):
        self.check_access(record, **scope)
        self._check_name(deployment)
        body = self._check_body(record, "OnlineDeploymentData")
        self._find_endpoint(endpoint)
        self._refuse_if_busy(self.endpoints, endpoint)
        key = endpoint, deployment
        self._refuse_if_busy(self.deployments, key)
        self._check_model(body["properties"].get("model"))
        if not body["properties"].get("instanceType"):
            raise Refusal(400, "A managed deployment needs an instanceType.")
        known = key in self.deployments
        identity = {"id": f"{self.scope}/onlineEndpoints/{endpoint}/deployments/{deployment}", "name": deployment}
        kind = f"{_PROVIDER}/workspaces/onlineEndpoints/deployments"
        properties = {"environmentVariables": {}, **body["properties"]}
        resource = {"tags": {}, **body, **identity, "type": kind, "properties": properties}
        error = None
        if self._failing.get(deployment):
            self._failing[deployment] -= 1
            message = "The container did not become ready: the stand-in was told to fail."
            error = {"code": "ResourceNotReady", "message": message}
        operation = self._start(self.deployments, key, resource, error)
        status = 200 if known else 201
        return status, self.deployments[key], self._operation_headers("mfeOperationsStatus", operation, record)

    def _check_model(self, model):
        found = re.fullmatch(rf"{re.escape(self.scope)}/models/([^/]+)/versions/([^/]+)", model or "")
        if not found:
            raise Refusal(400, f"Expected the id of a version of a model in this workspace, got {model!r}.")
        self._find_model(*found.groups())

    def _patch_deployment(self, record, endpoint, deployment, **scope):
        self.check_access(record, **scope)
        body = self._check_body(record, "PartialOnlineDeploymentPartialTrackedResource")
        self._find_deployment(endpoint, deployment)
        self._refuse_if_busy(self.deployments, key := (endpoint, deployment))
        current = self.deployments[key]
        resource = {**current, "properties": dict(current["properties"])}
        resource["sku"] = {**current.get("sku", {}), **body.get("sku", {})}
        resource["tags"] = body.get("tags", current["tags"])
        operation = self._start(self.deployments, key, resource)
        return 202, None, self._operation_headers("mfeOperationResults", operation, record)

    def _delete_deployment(self, record, endpoint, deployment, **scope):
        self.check_access(record, **scope)
        if (key := (endpoint, deployment)) not in self.deployments:
            return 204, None
        if share := self.endpoints[endpoint]["properties"]["traffic"].get(deployment, 0):
            raise Refusal(400, f"The deployment '{deployment}' has {share} % of the traffic; set it to 0 first.")
        self._refuse_if_busy(self.deployments, key)
        operation = self._start(self.deployments, key, None)
        return 202, None, self._operation_headers("mfeOperationResults", operation, record)

    def _get_logs(self, record, endpoint, deployment, **scope):
        self.check_access(record, **scope)
        self._check_body(record, "DeploymentLogsRequest")
        state = self._find_deployment(endpoint, deployment)["properties"]["provisioningState"]
        return 200, {"content": f"Instance status:\nInferenceServer: {state}\n"}

    # Scoring, as the server does that Azure puts around MLflow's models

    def _score(self, record, endpoint):
        with self._lock:
            resource = self._check_key(record, endpoint)
            deployment = record.headers["azureml-model-deployment"] or self._choose(resource)
            properties = self._find_deployment(endpoint, deployment)["properties"]
        if properties["provisioningState"] != "Succeeded":
            raise Refusal(503, f"The deployment '{deployment}' is not ready.", "ServiceUnavailable")
        if not isinstance(record.body, dict) or "input_data" not in record.body:
            raise Refusal(424, "Request must contain a top level key named 'input_data'.", "ModelError")
        url = self.scoring_url.get(deployment) if isinstance(self.scoring_url, dict) else self.scoring_url
        if url is None:
            raise Refusal(503, f"No model runs for '{deployment}': set scoring_url.", "ServiceUnavailable")
        status, text, _ = request(url, _read_input(record.body))
        headers = {"azureml-model-deployment": deployment}
        if status != 200:
            # What the model answers is passed on as a failed dependency.
            raise Refusal(424, text, "ModelError", headers=headers)
        return 200, json.loads(text)["predictions"], headers

    def _check_key(self, record, endpoint):
        resource = self._find_endpoint(endpoint)
        keys = {f"Bearer {key}" for key in self._keys.get(endpoint, ()) if key}
        if resource["properties"]["authMode"] == "AADToken":
            keys = self._bearers(_SCORING)
        if record.headers["Authorization"] not in keys:
            raise Refusal(401, "The key or token is missing or invalid.")
        return resource

    def _choose(self, endpoint):
        """Returns the deployment whose turn it is; after a hundred requests each has had exactly its share."""
        traffic = {name: share for name, share in endpoint["properties"]["traffic"].items() if share}
        if not traffic:
            raise Refusal(404, f"The endpoint '{endpoint['name']}' has no traffic to any deployment.")
        served = self._served.setdefault((endpoint["name"], tuple(sorted(traffic.items()))), dict.fromkeys(traffic, 0))
        total = sum(served.values()) + 1
        chosen = max(traffic, key=lambda name: traffic[name] * total - 100 * served[name])
        served[chosen] += 1
        return chosen

    def _get_swagger(self, record, endpoint):
        self._check_key(record, endpoint)
        return 200, {"openapi": "3.0.0", "components": {"schemas": {"ServiceOutput": {"type": "array"}}}}

    # The retired API of container instances, which the plugin asks as well

    def _get_service(self, record, service, **scope):
        self.check_access(record, **scope, versions=())
        raise Refusal(404, f"The service '{service}' was not found.", "NoSuchService")

    def _list_services(self, record, **scope):
        self.check_access(record, **scope, versions=())
        return 200, {"value": []}


def _read_input(body):
    """Turns the body of a request to Azure's server into one that MLflow's server reads."""
    rows = body["input_data"]
    if isinstance(rows, dict) and {"columns", "data"} <= rows.keys():
        form = {"dataframe_split": rows}
    elif isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        form = {"dataframe_records": rows}
    else:
        form = {"inputs": rows}
    return {**form, "params": body["params"]} if "params" in body else form


_ROUTES = [
    route("GET", "/metadata/endpoints", AzureStandIn._get_clouds),
    route("GET", "/msi/token", AzureStandIn._get_token),
    route("GET", f"{_OPERATIONS}/mfeOperationsStatus/{{operation}}", AzureStandIn._get_operation),
    route("GET", f"{_OPERATIONS}/mfeOperationResults/{{operation}}", AzureStandIn._get_result),
    route("GET", _WORKSPACE, AzureStandIn._get_workspace),
    route("GET", f"{_MODEL}/versions", AzureStandIn._list_model_versions),
    route("GET", f"{_MODEL}/versions/{{version}}", AzureStandIn._get_model_version),
    route("PUT", f"{_MODEL}/versions/{{version}}", AzureStandIn._put_model_version),
    route("GET", f"{_WORKSPACE}/onlineEndpoints", AzureStandIn._list_endpoints),
    route("GET", _ENDPOINT, AzureStandIn._get_endpoint),
    route("PUT", _ENDPOINT, AzureStandIn._put_endpoint),
    route("PATCH", _ENDPOINT, AzureStandIn._patch_endpoint),
    route("DELETE", _ENDPOINT, AzureStandIn._delete_endpoint),
    route("POST", f"{_ENDPOINT}/listKeys", AzureStandIn._list_keys),
    route("POST", f"{_ENDPOINT}/token", AzureStandIn._get_endpoint_token),
    route("GET", f"{_ENDPOINT}/deployments", AzureStandIn._list_deployments),
    route("GET", _DEPLOYMENT, AzureStandIn._get_deployment),
    route("PUT", _DEPLOYMENT, AzureStandIn._put_deployment),
    route("PATCH", _DEPLOYMENT, AzureStandIn._patch_deployment),
    route("DELETE", _DEPLOYMENT, AzureStandIn._delete_deployment),
    route("POST", f"{_DEPLOYMENT}/getLogs", AzureStandIn._get_logs),
    route("POST", "/inference/{endpoint}/score", AzureStandIn._score),
    route("GET", "/inference/{endpoint}/swagger.json", AzureStandIn._get_swagger),
    *[route(method, f"/mlflow/v2.0{_WORKSPACE}/{{rest}}", azure_store.forward) for method in _METHODS],
    route("POST", f"{_ARTIFACTS}/batch/metadata", azure_store.create_artifacts),
    route("GET", _ARTIFACTS, azure_store.list_artifacts),
    route("GET", f"{_ARTIFACTS}/contentinfo", azure_store.get_artifact),
    route("POST", f"{_RUN_ARTIFACTS}/batch/metadata", azure_store.create_artifacts),
    route("GET", _RUN_ARTIFACTS, azure_store.list_artifacts),
    route("GET", f"{_RUN_ARTIFACTS}/contentinfo", azure_store.get_artifact),
    route("PUT", f"/{azure_store.ACCOUNT}/{{rest}}", azure_store.put_blob),
    route("GET", f"/{azure_store.ACCOUNT}/{{rest}}", azure_store.get_blob),
    route("GET", f"/modelmanagement/v1.0{_WORKSPACE}/services", AzureStandIn._list_services),
    route("GET", f"/modelmanagement/v1.0{_WORKSPACE}/services/{{service}}", AzureStandIn._get_service),
]

# What waits for another server; nothing else waits for it.
_SLOW = {AzureStandIn._score, azure_store.forward}
