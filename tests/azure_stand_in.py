"""A stand-in for Azure Machine Learning: an HTTPS server for tests that clients reach by environment variables alone.

Where Azure's behaviour is not published, the stand-in takes the reading that forgives a client less. Nothing here has
been compared with Azure itself.
"""

import contextlib
import re
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import azure_endpoints
import azure_registry
import azure_scoring
import azure_store
from azure_models import CLIENTS, find_faults
from azure_scoring import AUDIENCE
from azure_server import LOCATION, PROVIDER, HttpsServer, Refusal, route

_WORKSPACE = f"/subscriptions/{{subscription}}/resourceGroups/{{group}}/providers/{PROVIDER}/workspaces/{{workspace}}"
_ENDPOINT = f"{_WORKSPACE}/onlineEndpoints/{{endpoint}}"
_DEPLOYMENT = f"{_ENDPOINT}/deployments/{{deployment}}"
_MODEL = f"{_WORKSPACE}/models/{{model}}"
_ARTIFACTS = f"/artifact/v2.0{_WORKSPACE}/artifacts/{{origin}}/{{container}}"
_RUN_ARTIFACTS = f"/history/v1.0{_WORKSPACE}/experiments/{{experiment}}/runs/{{container}}/artifacts"
_METHODS = ["GET", "PUT", "POST", "PATCH", "DELETE"]
_OPERATIONS = f"/subscriptions/{{subscription}}/providers/{PROVIDER}/locations/{{location}}"


@dataclass
class _Failure:
    method: str
    path: re.Pattern
    status: int
    times: int
    headers: dict
    break_connection: bool
    is_done: bool


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

    Its parts: `azure_registry`, `azure_endpoints`, `azure_scoring` and `azure_store`.

    It answers as Azure Resource Manager with its document of clouds, as the managed identity's source of tokens, as
    the workspace's registry of models and as its endpoints. State is in three dictionaries that tests may read and
    write; each value is a resource in the API's own form.

    Attributes:
        polls: How many answers about a resource say that work on it goes on, before one says that it has ended.
        scoring_url: URL to which `dataframe_split` and the like are posted, such as `http://127.0.0.1:5000/invocations`,
            for all deployments, or a dictionary of one for each deployment's name or model, such as `cars/1`.
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
        self.lock = threading.RLock()
        self._failures, self.failing, self._operations, self.served = [], {}, {}, {}
        self._tokens, self.keys, self._identity_header = {}, {}, secrets.token_hex(8)
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

    def fail(self, method, path_pattern, status=500, times=1, headers=None, break_connection=False, is_done=False):
        """Has requests fail that would otherwise be answered.

        Args:
            method: `GET`, ...
            path_pattern: Regular expression that is searched for in the path, such as `deployments/green$`.
            status: HTTP status of the answer.
            times: How many requests fail.
            headers: Dictionary of headers for the answer, such as `Retry-After`.
            break_connection: Whether the connection ends without an answer instead.
            is_done: Whether what they ask for is done all the same, and only the answer is lost.
        """
        failure = _Failure(method, re.compile(path_pattern), status, times, headers or {}, break_connection, is_done)
        self._failures.append(failure)

    def fail_deployment(self, name, times=1):
        """Has the next provisionings of a deployment of this name end as `Failed`."""
        self.failing[name] = times

    def recover(self):
        """Has nothing fail any more, and ends all work that goes on: a while has passed."""
        with self.lock:
            self._failures.clear()
            self.failing.clear()
            for operation in self._operations.values():
                operation.polls = 0
                self._advance(operation)

    def register(self, name, version, source="azureml://artifacts/model", tags=None):
        """Puts a version of a model into the workspace's registry, as a client can by its requests."""
        properties = {"modelUri": source, "modelType": "mlflow_model", "tags": tags or {}, "properties": {}}
        azure_registry.write_model(self, name, version, properties)

    def answer(self, record):
        """Returns status, body and headers for a request; None for a connection that is to break."""
        answer = self._answer(record)
        record.status = answer and answer[0]
        if record.path not in {"/metadata/endpoints", "/msi/token"}:
            self.requests.append(record)
        return answer

    def _answer(self, record):
        with self.lock:
            for failure in self._failures:
                if failure.times and failure.method == record.method and failure.path.search(record.path):
                    failure.times -= 1
                    if failure.is_done:
                        self._act(record)
                    if failure.break_connection:
                        return None
                    refusal = Refusal(failure.status, "The stand-in was told to fail.", headers=failure.headers)
                    return refusal.status, refusal.body, refusal.headers
        return self._act(record)

    def _act(self, record):
        try:
            for method, path, act in _ROUTES:
                if method == record.method and (found := path.fullmatch(record.path)):
                    with contextlib.nullcontext() if act in _SLOW else self.lock:
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
        if resource not in {self.url, AUDIENCE}:
            raise Refusal(400, f"Expected the resource {self.url} or {AUDIENCE}, got {resource}.")
        self._tokens[token := secrets.token_hex(16)] = resource
        expiry = str(int(time.time()) + 3600)
        return 200, {"access_token": token, "expires_on": expiry, "resource": resource, "token_type": "Bearer"}

    def check_access(self, record, subscription, group=None, workspace=None, versions=tuple(CLIENTS)):
        """Refuses a request without a token, about another workspace, or by an unknown version of the API."""
        if record.headers["Authorization"] not in self.bearers(self.url):
            challenge = f'Bearer authorization_uri="{self.url}", error="invalid_token"'
            raise Refusal(401, "The access token is missing or invalid.", headers={"WWW-Authenticate": challenge})
        if subscription != self.subscription:
            raise Refusal(404, f"The subscription '{subscription}' could not be found.", "SubscriptionNotFound")
        if group is not None and group.lower() != self.resource_group.lower():
            raise Refusal(404, f"Resource group '{group}' could not be found.", "ResourceGroupNotFound")
        if workspace is not None and workspace.lower() != self.workspace.lower():
            raise Refusal(404, f"The resource '{PROVIDER}/workspaces/{workspace}' was not found.")
        if versions and (version := record.query.get("api-version")) not in versions:
            message = f"The api-version '{version}' is invalid. The supported versions are '{','.join(versions)}'."
            raise Refusal(400, message, "InvalidApiVersionParameter")

    def check_body(self, record, model):
        """Returns the body of a request, which is refused where it is not as the published model says."""
        if faults := find_faults(record.body, model, record.query["api-version"]):
            details = [{"code": "InvalidBody", "message": fault} for fault in faults]
            raise Refusal(400, f"The request is invalid: {'; '.join(faults)}", details=details)
        return record.body

    def bearers(self, resource):
        """Returns the headers `Authorization` with tokens that were given away for a resource."""
        return {f"Bearer {token}" for token, one in self._tokens.items() if one == resource}

    def check_signature(self, record):
        """Refuses a request to the storage account whose URL this server did not give away."""
        if record.query.get("sig") != self.signature:
            raise Refusal(403, "The signature is not one of this account.", "AuthenticationFailed")

    # Long-running operations

    def start(self, store, key, resource, error=None):
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

    def advance_resource(self, store, key):
        """Lets time pass for a resource that is asked for; returns whether work on it goes on."""
        unfinished = [work for work in self._operations.values() if work.store is store and work.key == key]
        for operation in unfinished:
            self._advance(operation)
        return not all(operation.done for operation in unfinished)

    def refuse_if_busy(self, store, key):
        """Refuses a request to change what something else changes at this moment."""
        if self.advance_resource(store, key):
            raise Refusal(409, f"An operation on {key} is in progress; try again when it has ended.")

    def operation_headers(self, kind, identity, record):
        """Returns the headers of an answer that say where to ask for the end of an operation."""
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
            return 202, None, self.operation_headers("mfeOperationResults", operation, record)
        return (204, None) if work.resource is None else (200, work.resource)

    def _find_operation(self, identity):
        if identity not in self._operations:
            raise Refusal(404, f"The operation '{identity}' was not found.")
        self._advance(operation := self._operations[identity])
        return operation


_ROUTES = [
    route("GET", "/metadata/endpoints", AzureStandIn._get_clouds),
    route("GET", "/msi/token", AzureStandIn._get_token),
    route("GET", f"{_OPERATIONS}/mfeOperationsStatus/{{operation}}", AzureStandIn._get_operation),
    route("GET", f"{_OPERATIONS}/mfeOperationResults/{{operation}}", AzureStandIn._get_result),
    route("GET", _WORKSPACE, azure_registry.get_workspace),
    route("GET", f"{_MODEL}/versions", azure_registry.list_model_versions),
    route("GET", f"{_MODEL}/versions/{{version}}", azure_registry.get_model_version),
    route("PUT", f"{_MODEL}/versions/{{version}}", azure_registry.put_model_version),
    route("GET", f"{_WORKSPACE}/onlineEndpoints", azure_endpoints.list_endpoints),
    route("GET", _ENDPOINT, azure_endpoints.get_endpoint),
    route("PUT", _ENDPOINT, azure_endpoints.put_endpoint),
    route("PATCH", _ENDPOINT, azure_endpoints.patch_endpoint),
    route("DELETE", _ENDPOINT, azure_endpoints.delete_endpoint),
    route("POST", f"{_ENDPOINT}/listKeys", azure_endpoints.list_keys),
    route("POST", f"{_ENDPOINT}/token", azure_endpoints.get_endpoint_token),
    route("GET", f"{_ENDPOINT}/deployments", azure_endpoints.list_deployments),
    route("GET", _DEPLOYMENT, azure_endpoints.get_deployment),
    route("PUT", _DEPLOYMENT, azure_endpoints.put_deployment),
    route("PATCH", _DEPLOYMENT, azure_endpoints.patch_deployment),
    route("DELETE", _DEPLOYMENT, azure_endpoints.delete_deployment),
    route("POST", f"{_DEPLOYMENT}/getLogs", azure_endpoints.get_logs),
    route("POST", "/inference/{endpoint}/score", azure_scoring.score),
    route("GET", "/inference/{endpoint}/swagger.json", azure_scoring.get_swagger),
    *[route(method, f"/mlflow/v2.0{_WORKSPACE}/{{rest}}", azure_store.forward) for method in _METHODS],
    route("POST", f"{_ARTIFACTS}/batch/metadata", azure_store.create_artifacts),
    route("GET", _ARTIFACTS, azure_store.list_artifacts),
    route("GET", f"{_ARTIFACTS}/contentinfo", azure_store.get_artifact),
    route("POST", f"{_RUN_ARTIFACTS}/batch/metadata", azure_store.create_artifacts),
    route("GET", _RUN_ARTIFACTS, azure_store.list_artifacts),
    route("GET", f"{_RUN_ARTIFACTS}/contentinfo", azure_store.get_artifact),
    route("PUT", f"/{azure_store.ACCOUNT}/{{rest}}", azure_store.put_blob),
    route("GET", f"/{azure_store.ACCOUNT}/{{rest}}", azure_store.get_blob),
    route("GET", f"/modelmanagement/v1.0{_WORKSPACE}/services", azure_endpoints.list_services),
    route("GET", f"/modelmanagement/v1.0{_WORKSPACE}/services/{{service}}", azure_endpoints.get_service),
]

# What waits for another server; nothing else waits for it.
_SLOW = {azure_scoring.score, azure_store.forward}
