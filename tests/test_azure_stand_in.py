"""The stand-in for Azure, by bare requests and driven by Microsoft's own plugin for MLflow, azureml-mlflow."""

import base64
import copy
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import yaml
from azure_models import find_faults
from azure_stand_in import AzureStandIn
from colours import PROJECT
from mlflow import MlflowClient
from servers import mlflow_server
from servers import request as plain_request

import carflavor
from carflavor.image import encode_jpeg

API = "2022-02-01-preview"
# What the plugin reads from the file that `deploy-config-file` names.
CONFIG = {
    "instance_type": "Standard_F4s_v2",
    "instance_count": 2,
    "app_insights_enabled": True,
    "environment_variables": {"CARFLAVOR_MAX_ROWS": "8"},
    "readiness_probe": {"initial_delay": 30, "period": 10, "timeout": 5, "failure_threshold": 30},
    "request_settings": {"request_timeout_ms": "PT60S", "max_concurrent_requests_per_instance": 4},
}
SCOPE = (
    "/subscriptions/11111111-2222-3333-4444-555555555555/resourceGroups/cars-group"
    "/providers/Microsoft.MachineLearningServices/workspaces/cars-workspace"
)
ENDPOINT = {"location": "westeurope", "properties": {"authMode": "Key", "description": "Cars"}, "tags": {"a": "b"}}
DEPLOYMENT = {
    "location": "westeurope",
    "sku": {"name": "Default", "capacity": 2},
    "properties": {
        "endpointComputeType": "Managed",
        "instanceType": "Standard_F4s_v2",
        "appInsightsEnabled": True,
        "model": f"{SCOPE}/models/cars/versions/1",
        "environmentVariables": {"CARFLAVOR_MAX_ROWS": "8"},
        "readinessProbe": {"failureThreshold": 30, "initialDelay": "PT30S", "period": "PT10S", "timeout": "PT5S"},
        "requestSettings": {"maxConcurrentRequestsPerInstance": 4, "requestTimeout": "PT1M"},
    },
}
TRAFFIC = {"properties": {"traffic": {"blue": 100}}}

# A client in a process of its own, as a user's is: a call a line, an answer a line. Standard output belongs to the
# answers, since the plugin prints a dot for each poll.
CLIENT = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", 1)
os.dup2(2, 1)
import pandas
# Not by get_deploy_client: where carflavor is installed, that gives its own.
from azureml.mlflow.deploy.deployment_client import AzureMLDeploymentClient
client = AzureMLDeploymentClient(sys.argv[1])
for line in sys.stdin:
    name, arguments = json.loads(line)
    if "df" in arguments:
        arguments["df"] = pandas.DataFrame(arguments["df"])
    try:
        answer = {"result": getattr(client, name)(**arguments)}
        if isinstance(answer["result"], pandas.DataFrame):
            answer["result"] = answer["result"].to_dict("records")
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer, default=str), file=answers)
"""


class PluginError(Exception):
    """What the plugin raised: name and message."""


@pytest.fixture(scope="module")
def stand_in():
    with AzureStandIn() as stand_in:
        stand_in.register("cars", "1")
        yield stand_in


@pytest.fixture(scope="module")
def plugin(stand_in, clean_environment, tmp_path_factory):
    """Function that calls a method of the plugin's client: `plugin("get_endpoint", endpoint="cars")`."""
    folder = tmp_path_factory.mktemp("plugin")
    environment = {name: value for name, value in clean_environment.items() if not name.startswith("AZURE")}
    environment |= stand_in.environment | {"MLFLOW_TRACKING_URI": stand_in.workspace_uri}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, stand_in.workspace_uri],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def call(name, /, **arguments):
        process.stdin.write(json.dumps([name, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()[-3000:]
        answer = json.loads(line)
        if "error" in answer:
            raise PluginError(f"{answer['error']}: {answer['message']}")
        return answer["result"]

    with process:
        yield call
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The deployment's options as `mlflow deployments create --config deploy-config-file=...` passes them."""
    path = tmp_path_factory.mktemp("config") / "deploy.json"
    path.write_text(json.dumps(CONFIG))
    return {"deploy-config-file": str(path)}


@pytest.fixture
def traffic_file(tmp_path):
    def write(traffic):
        path = tmp_path / "endpoint.json"
        path.write_text(json.dumps({"traffic": traffic}))
        return {"endpoint-config-file": str(path)}

    return write


def send(stand_in, method, path, body=None, version=API, headers=None):
    """Makes a request below the workspace, with a token of the managed identity, and returns status, body, headers."""
    headers = authorization(stand_in) if headers is None else headers
    url = f"{stand_in.url}{SCOPE}{path}?api-version={version}"
    return open_url(stand_in, method, url, body, {"Content-Type": "application/json", **headers})


def authorization(stand_in):
    identity = {"X-IDENTITY-HEADER": stand_in.environment["IDENTITY_HEADER"]}
    url = f"{stand_in.environment['IDENTITY_ENDPOINT']}?api-version=2019-08-01&resource={stand_in.url}"
    return {"Authorization": f"Bearer {open_url(stand_in, 'GET', url, None, identity)[1]['access_token']}"}


def open_url(stand_in, method, url, body, headers):
    context = ssl.create_default_context(cafile=stand_in.environment["SSL_CERT_FILE"])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    data = None if body is None else json.dumps(body).encode()
    try:
        with opener.open(urllib.request.Request(url, data, headers, method=method), timeout=30) as response:
            return response.status, json.loads(response.read() or "null"), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or "null"), error.headers


def steps(stand_in, since):
    """Requests since a number of them, as `(method, path below the workspace, status)`; polls have no path."""
    return [
        (record.method, "poll" if "/mfeOperation" in record.path else record.path.removeprefix(SCOPE), record.status)
        for record in stand_in.requests[since:]
    ]


def traffic(stand_in, endpoint):
    return stand_in.endpoints[endpoint]["properties"]["traffic"]


@pytest.mark.parametrize(
    "body, model",
    [
        (ENDPOINT, "OnlineEndpointData"),
        (DEPLOYMENT, "OnlineDeploymentData"),
        (TRAFFIC, "PartialOnlineEndpointPartialTrackedResource"),
    ],
)
def test_checker_lets_right_bodies_through(body, model):
    assert find_faults(body, model, API) == []


@pytest.mark.parametrize(
    "body, model, place, value, fault",
    [
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "sku.count",
            2,
            "sku: expected keys among capacity, family, name, size, tier, got 'count'",
        ),
        (DEPLOYMENT, "OnlineDeploymentData", "location", None, "location: expected a value, got none"),
        (DEPLOYMENT, "OnlineDeploymentData", "sku.capacity", "2", "sku.capacity: expected int, got '2'"),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.requestSettings.requestTimeout",
            60000,
            "properties.requestSettings.requestTimeout: expected duration, got 60000",
        ),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.readinessProbe.period",
            "10 s",
            "properties.readinessProbe.period: expected duration, got '10 s'",
        ),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.endpointComputeType",
            "ACI",
            "properties.endpointComputeType: expected one of Kubernetes, Managed, got 'ACI'",
        ),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.appInsightsEnabled",
            1,
            "properties.appInsightsEnabled: expected bool, got 1",
        ),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.environmentVariables.CARFLAVOR_MAX_ROWS",
            8,
            "properties.environmentVariables.CARFLAVOR_MAX_ROWS: expected str, got 8",
        ),
        (
            DEPLOYMENT,
            "OnlineDeploymentData",
            "properties.scaleSettings",
            {"maxInstances": 2},
            "properties.scaleSettings.scaleType: expected one of Default, TargetUtilization, got None",
        ),
        (
            ENDPOINT,
            "OnlineEndpointData",
            "properties.authMode",
            "key",
            "properties.authMode: expected one of AMLToken, Key, AADToken, got 'key'",
        ),
        (ENDPOINT, "OnlineEndpointData", "properties", None, "properties: expected a value, got none"),
        (
            TRAFFIC,
            "PartialOnlineEndpointPartialTrackedResource",
            "properties.traffic",
            {"blue": 50.5},
            "properties.traffic.blue: expected int, got 50.5",
        ),
    ],
)
def test_checker_names_what_is_wrong(stand_in, body, model, place, value, fault):
    body = copy.deepcopy(body)
    *parents, key = place.split(".")
    target = body
    for parent in parents:
        target = target[parent]
    target[key] = value
    assert find_faults(body, model, API) == [fault]


def test_server_refuses_wrong_bodies_and_changes_nothing(stand_in):
    body = copy.deepcopy(ENDPOINT)
    body["properties"]["authentication"] = body["properties"].pop("authMode")
    status, answer, _ = send(stand_in, "PUT", "/onlineEndpoints/wrong", body)
    assert status == 400
    assert answer["error"]["code"] == "BadRequest"
    assert [detail["message"] for detail in answer["error"]["details"]] == [
        "properties: expected keys among authMode, compute, description, keys, mirrorTraffic, properties, "
        "provisioningState, publicNetworkAccess, scoringUri, swaggerUri, traffic, got 'authentication'",
        "properties.authMode: expected a value, got none",
    ]
    assert "wrong" not in stand_in.endpoints


@pytest.mark.parametrize(
    "path, version, headers, status, code",
    [
        ("", API, {}, 401, "InvalidAuthenticationToken"),
        ("", API, {"Authorization": "Bearer guessed"}, 401, "InvalidAuthenticationToken"),
        ("", "2019-05-01", None, 400, "InvalidApiVersionParameter"),
        ("/onlineEndpoints/absent", API, None, 404, "ResourceNotFound"),
        ("/pipelines", API, None, 404, "InvalidResourceType"),
    ],
)
def test_server_refuses_strangers_and_unknown_paths(stand_in, path, version, headers, status, code):
    answer = send(stand_in, "GET", path, version=version, headers=headers)
    assert (answer[0], answer[1]["error"]["code"]) == (status, code)


def finish(stand_in, method, path, body=None):
    """Makes a request that starts work and polls until it has ended; returns the last poll's status and body."""
    status, answer, headers = send(stand_in, method, path, body)
    assert status in {200, 201, 202}, answer
    url = headers["Azure-AsyncOperation"] or headers["Location"]
    while True:
        status, answer, _ = open_url(stand_in, "GET", url, None, authorization(stand_in))
        if status != 202 and (answer or {}).get("status") != "InProgress":
            return status, answer


@pytest.fixture
def two_colours(stand_in):
    """The endpoint `pair` with the deployments `blue`, which has all traffic, and `green`."""
    finish(stand_in, "PUT", "/onlineEndpoints/pair", ENDPOINT)
    finish(stand_in, "PUT", "/onlineEndpoints/pair/deployments/blue", DEPLOYMENT)
    finish(stand_in, "PUT", "/onlineEndpoints/pair/deployments/green", DEPLOYMENT)
    finish(stand_in, "PATCH", "/onlineEndpoints/pair", TRAFFIC)
    yield
    finish(stand_in, "DELETE", "/onlineEndpoints/pair")
    assert [name for name in stand_in.deployments if name[0] == "pair"] == []


@pytest.mark.parametrize(
    "shares, message",
    [
        ({"blue": 90}, "Traffic must add up to 0 or 100, got {'blue': 90}."),
        ({"blue": 110, "green": -10}, "Traffic must add up to 0 or 100, got {'blue': 110, 'green': -10}."),
        (
            {"blue": 50, "red": 50},
            "Traffic is given to deployments that do not exist: red.",
        ),
    ],
)
def test_traffic_that_does_not_add_up_is_refused(stand_in, two_colours, shares, message):
    status, answer, _ = send(stand_in, "PATCH", "/onlineEndpoints/pair", {"properties": {"traffic": shares}})
    assert (status, answer["error"]["message"]) == (400, message)
    assert traffic(stand_in, "pair") == {"blue": 100}


def test_traffic_is_replaced_by_patch_and_by_put(stand_in, two_colours):
    finish(stand_in, "PATCH", "/onlineEndpoints/pair", {"properties": {"traffic": {"green": 100}}})
    assert traffic(stand_in, "pair") == {"green": 100}
    # Whoever writes a whole endpoint over one that exists, and says nothing of traffic, takes it away.
    finish(stand_in, "PUT", "/onlineEndpoints/pair", ENDPOINT)
    assert traffic(stand_in, "pair") == {}


def test_deployment_with_traffic_is_not_deleted(stand_in, two_colours):
    status, answer, _ = send(stand_in, "DELETE", "/onlineEndpoints/pair/deployments/blue")
    assert status == 400
    assert answer["error"]["message"] == "The deployment 'blue' has 100 % of the traffic; set it to 0 first."
    assert finish(stand_in, "DELETE", "/onlineEndpoints/pair/deployments/green") == (204, None)
    assert sorted(name for name in stand_in.deployments if name[0] == "pair") == [("pair", "blue")]


def test_work_that_goes_on_is_not_disturbed(stand_in):
    assert send(stand_in, "PUT", "/onlineEndpoints/slow", ENDPOINT)[1]["properties"]["provisioningState"] == "Creating"
    assert send(stand_in, "PUT", "/onlineEndpoints/slow", ENDPOINT)[0] == 409
    # One answer about an endpoint calls it unfinished; at the next it is done, and new work may begin.
    assert send(stand_in, "PUT", "/onlineEndpoints/slow", ENDPOINT)[0] == 200
    stand_in.recover()
    assert finish(stand_in, "DELETE", "/onlineEndpoints/slow")[0] == 204


@pytest.mark.parametrize(
    "change, status, message",
    [
        (
            {"model": f"{SCOPE}/models/cars/versions/9"},
            404,
            "The model 'cars' has no version '9' in this workspace.",
        ),
        (
            {"model": "models:/cars/1"},
            400,
            "Expected the id of a version of a model in this workspace, got 'models:/cars/1'.",
        ),
        ({"instanceType": None}, 400, "A managed deployment needs an instanceType."),
    ],
)
def test_deployment_needs_a_registered_model_and_a_machine(stand_in, two_colours, change, status, message):
    body = copy.deepcopy(DEPLOYMENT)
    body["properties"].update(change)
    answer = send(stand_in, "PUT", "/onlineEndpoints/pair/deployments/red", body)
    assert (answer[0], answer[1]["error"]["message"]) == (status, message)
    assert ("pair", "red") not in stand_in.deployments


def test_instances_and_tags_are_changed_by_patch_and_nothing_else(stand_in, two_colours):
    path = "/onlineEndpoints/pair/deployments/green"
    finish(stand_in, "PATCH", path, {"sku": {"capacity": 3}, "tags": {"tried": "yes"}})
    green = stand_in.deployments["pair", "green"]
    assert (green["sku"], green["tags"]) == ({"name": "Default", "capacity": 3}, {"tried": "yes"})
    assert green["properties"] == {**DEPLOYMENT["properties"], "provisioningState": "Succeeded"}
    status, answer, _ = send(stand_in, "POST", f"{path}/getLogs", {"containerType": "InferenceServer", "tail": 10})
    assert (status, answer) == (200, {"content": "Instance status:\nInferenceServer: Succeeded\n"})


@pytest.mark.parametrize("kind, status", [("MLFlow", 201), ("mlflow_model", 400)])
def test_model_is_registered_by_the_older_version_of_the_api(stand_in, kind, status):
    # What is `modelType` in 2022-02-01-preview was called `modelFormat`.
    body = {"properties": {"modelUri": "azureml://artifacts/x", "modelFormat": kind}}
    assert send(stand_in, "PUT", "/models/older/versions/1", body, version="2021-10-01")[0] == status
    assert (("older", "1") in stand_in.models) == (status == 201)
    stand_in.models.pop(("older", "1"), None)


def test_names_of_endpoints_are_checked(stand_in):
    status, answer, _ = send(stand_in, "PUT", "/onlineEndpoints/my_cars", ENDPOINT)
    assert (status, answer["error"]["message"]) == (
        400,
        "Expected a name of 3 to 32 letters, digits and hyphens, got 'my_cars'.",
    )


def test_plugin_creates_endpoint_deployment_and_traffic(stand_in, plugin, config):
    since = len(stand_in.requests)
    created = plugin("create_deployment", name="cars", model_uri="models:/cars/1", config=config)
    assert (created["name"], created["properties"]["provisioningState"]) == ("cars", "Succeeded")
    assert steps(stand_in, since) == [
        ("GET", "", 200),
        ("PUT", "/onlineEndpoints/cars", 201),
        ("GET", "poll", 200),
        ("GET", "poll", 200),
        ("GET", "/onlineEndpoints/cars", 200),
        ("GET", "/onlineEndpoints/cars", 200),
        ("GET", "", 200),
        ("PUT", "/onlineEndpoints/cars/deployments/cars", 201),
        ("GET", "poll", 200),
        ("GET", "poll", 200),
        ("GET", "/onlineEndpoints/cars/deployments/cars", 200),
        ("PATCH", "/onlineEndpoints/cars", 202),
        ("GET", "poll", 202),
        ("GET", "poll", 200),
        ("GET", "/onlineEndpoints/cars/deployments/cars", 200),
    ]
    assert traffic(stand_in, "cars") == {"cars": 100}
    assert stand_in.deployments["cars", "cars"]["properties"] == {
        **DEPLOYMENT["properties"],
        "privateNetworkConnection": False,
        "provisioningState": "Succeeded",
    }
    assert stand_in.deployments["cars", "cars"]["sku"] == {"name": "Default", "capacity": 2}
    assert stand_in.endpoints["cars"]["properties"]["authMode"] == "AMLToken"


def test_plugin_keeps_two_deployments_beside_each_other(stand_in, plugin, config, traffic_file):
    assert plugin("create_endpoint", name="colours")["properties"]["traffic"] == {}
    for name in ["blue", "green"]:
        plugin("create_deployment", name=name, model_uri="models:/cars/1", config=config, endpoint="colours")
    plugin("update_endpoint", endpoint="colours", config=traffic_file({"blue": 90, "green": 10}))
    assert traffic(stand_in, "colours") == {"blue": 90, "green": 10}
    listed = plugin("list_deployments", endpoint="colours")
    assert [(found["name"], found["properties"]["provisioningState"]) for found in listed] == [
        ("blue", "Succeeded"),
        ("green", "Succeeded"),
    ]
    # What is left has to add up again: the plugin only leaves the name out.
    with pytest.raises(PluginError, match=r"Traffic must add up to 0 or 100, got \{'blue': 90\}"):
        plugin("delete_deployment", name="green", endpoint="colours")
    plugin("update_endpoint", endpoint="colours", config=traffic_file({"blue": 100}))
    plugin("delete_deployment", name="green", endpoint="colours")
    assert [name for endpoint, name in stand_in.deployments if endpoint == "colours"] == ["blue"]
    plugin("delete_endpoint", endpoint="colours")
    assert "colours" not in stand_in.endpoints
    with pytest.raises(PluginError, match="MlflowException: No deployment with name blue found"):
        plugin("get_deployment", name="blue")


@pytest.mark.parametrize(
    "method, path, options, error, left",
    [
        (
            "PUT",
            "onlineEndpoints/broken$",
            {"status": 401},
            "ClientAuthenticationError: (InvalidAuth",
            [],
        ),
        ("PUT", "onlineEndpoints/broken$", {"status": 403}, "HttpResponseError: (AuthorizationFailed)", []),
        ("GET", "workspaces/cars-workspace$", {"status": 404}, "ResourceNotFoundError: (ResourceNotFound)", []),
        ("PUT", "deployments/broken$", {"status": 409}, "ResourceExistsError: (Conflict)", ["endpoint"]),
        ("GET", "mfeOperationsStatus", {"break_connection": True, "times": 9}, "ServiceResponseError", ["endpoint"]),
        ("PATCH", "onlineEndpoints/broken$", {"status": 403}, "(AuthorizationFailed)", ["endpoint", "deployment"]),
    ],
)
def test_failure_leaves_no_traffic_and_a_second_run_heals_it(
    stand_in, plugin, config, method, path, options, error, left
):
    stand_in.fail(method, path, **options)
    arguments = {"name": "broken", "model_uri": "models:/cars/1", "config": config}
    with pytest.raises(PluginError) as raised:
        plugin("create_deployment", **arguments)
    assert error in str(raised.value)
    there = {"endpoint": "broken" in stand_in.endpoints, "deployment": ("broken", "broken") in stand_in.deployments}
    assert [name for name, is_there in there.items() if is_there] == left
    if left:
        assert traffic(stand_in, "broken") == {}
    stand_in.recover()
    plugin("create_deployment", **arguments)
    assert traffic(stand_in, "broken") == {"broken": 100}
    plugin("delete_endpoint", endpoint="broken")


@pytest.mark.parametrize(
    "method, path, options, statuses",
    [
        ("PUT", "onlineEndpoints/bumpy$", {"status": 429, "headers": {"Retry-After": "1"}}, [429, 201]),
        ("PUT", "onlineEndpoints/bumpy$", {"status": 500, "times": 2}, [500, 500, 201]),
        ("GET", "mfeOperationsStatus", {"break_connection": True}, [None, 200, 200, 200, 200]),
    ],
)
def test_plugin_gets_over_what_passes(stand_in, plugin, config, method, path, options, statuses):
    stand_in.fail(method, path, **options)
    since = len(stand_in.requests)
    plugin("create_deployment", name="bumpy", model_uri="models:/cars/1", config=config)
    met = [one.status for one in stand_in.requests[since:] if one.method == method and re.search(path, one.path)]
    assert met == statuses
    assert traffic(stand_in, "bumpy") == {"bumpy": 100}
    plugin("delete_endpoint", endpoint="bumpy")


def test_deployment_that_ends_failed_gets_no_traffic(stand_in, plugin, config):
    stand_in.fail_deployment("faulty")
    arguments = {"name": "faulty", "model_uri": "models:/cars/1", "config": config}
    with pytest.raises(PluginError, match=r"\(ResourceNotReady\) The container did not become ready"):
        plugin("create_deployment", **arguments)
    assert stand_in.deployments["faulty", "faulty"]["properties"]["provisioningState"] == "Failed"
    assert traffic(stand_in, "faulty") == {}
    plugin("create_deployment", **arguments)
    assert stand_in.deployments["faulty", "faulty"]["properties"]["provisioningState"] == "Succeeded"
    assert traffic(stand_in, "faulty") == {"faulty": 100}


def test_endpoint_answers_with_the_packed_model(stand_in, plugin, scoring_url, photos, two_colours):
    photo = base64.b64encode(encode_jpeg(photos[0])).decode()
    split = {"columns": ["image"], "data": [[photo]]}
    [expected] = json.loads(plain_request(scoring_url, {"dataframe_split": split})[1])["predictions"]
    stand_in.scoring_url = scoring_url
    since = len(stand_in.requests)
    for arguments in [{"endpoint": "pair"}, {"endpoint": "pair", "deployment_name": "green"}]:
        [row] = plugin("predict", df={"image": [photo]}, **arguments)
        # The plugin reads figures by pandas, which rounds them.
        assert (row["label"], row["prob"]) == (expected["label"], pytest.approx(expected["prob"], abs=1e-9))
    scored = [record for record in stand_in.requests[since:] if record.path == "/inference/pair/score"]
    assert [record.headers["azureml-model-deployment"] for record in scored] == [None, "green"]
    assert [record.body["input_data"]["columns"] for record in scored] == [["image"], ["image"]]

    finish(stand_in, "PATCH", "/onlineEndpoints/pair", {"properties": {"traffic": {"blue": 90, "green": 10}}})
    key = send(stand_in, "POST", "/onlineEndpoints/pair/listKeys")[1]["secondaryKey"]

    def score(body, key=key):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return open_url(stand_in, "POST", f"{stand_in.url}/inference/pair/score", body, headers)

    answers = [score({"input_data": split}) for _ in range(20)]
    assert [answer[1] for answer in answers] == [[expected]] * 20
    chosen = [headers["azureml-model-deployment"] for _, _, headers in answers]
    assert (chosen.count("blue"), chosen.count("green")) == (18, 2)
    assert score({"input_data": split, "params": {"top_k": 1}})[1] == [{**expected, "top_k": expected["top_k"][:1]}]
    # The body of MLflow's own server is none of Azure's.
    assert score({"dataframe_split": split})[:2] == (
        424,
        {
            "error": {
                "code": "ModelError",
                "message": "Request must contain a top level key named 'input_data'.",
                "details": [],
            }
        },
    )
    assert score({"input_data": [{"image": photo}]})[1]["error"]["message"] == (
        "Expected input_data to be a data frame: columns, index and data."
    )
    status, answer, _ = score({"input_data": {**split, "data": [["no photo"]]}})
    assert (status, "row 0" in answer["error"]["message"]) == (424, True)
    assert score({"input_data": split}, key="guessed")[0] == 401


STORE_CLIENT = """
import sys
import mlflow
from mlflow.entities import Metric, Param
mlflow.set_experiment("cars")
with mlflow.start_run() as run:
    mlflow.log_params({"network": "tiny"})
    client = mlflow.MlflowClient()
    client.log_batch(run.info.run_id, metrics=[Metric("loss", 1 / step, 0, step) for step in range(1, 5)])
    mlflow.log_metrics({"accuracy": 0.5}, synchronous=False)
    mlflow.log_dict({"epochs": 2}, "config.json")
    mlflow.log_artifacts(sys.argv[1], "model")
client.create_registered_model("fresh")
version = client.create_model_version("fresh", "file://" + sys.argv[1], tags={"colour": "blue"})
print(run.info.run_id, version.version, version.source)
try:
    client.create_logged_model(run.info.experiment_id)
except mlflow.MlflowException as error:
    print(error)
"""


@pytest.fixture(scope="module")
def mlflow_store(stand_in, clean_environment, tmp_path_factory):
    """MLflow's client of the server that keeps the workspace's runs and models, past the stand-in."""
    with mlflow_server(tmp_path_factory.mktemp("store"), clean_environment) as server:
        stand_in.mlflow_url = server.url
        yield MlflowClient(server.url)


@pytest.fixture
def in_workspace(stand_in, mlflow_store, clean_environment, tmp_path):
    """Function that runs Python code with the workspace as its tracking store and returns the lines it prints."""
    environment = clean_environment | stand_in.environment | {"MLFLOW_TRACKING_URI": stand_in.workspace_uri}
    # The project, and what tests have beside it.
    environment |= {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])}
    environment |= {"CARFLAVOR_HOME": str(tmp_path / "home")}

    def run(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


def read_blobs(stand_in, prefix):
    return {name.removeprefix(prefix): data for name, data in stand_in.blobs.items() if name.startswith(prefix)}


def test_workspace_is_a_tracking_store_and_a_registry(stand_in, packed_model, mlflow_store, in_workspace):
    *_, created, refused = in_workspace(STORE_CLIENT, packed_model)
    run_id, version, source = created.split()
    run = mlflow_store.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"network": "tiny"})
    assert [metric.value for metric in mlflow_store.get_metric_history(run_id, "loss")] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert run.data.metrics["accuracy"] == 0.5
    batches = [one for one in stand_in.requests if "/runs/log-batch" in one.path and one.body["run_id"] == run_id]
    assert [(record.path.rpartition("/")[2], len(record.body.get("metrics", []))) for record in batches] == [
        ("log-batch", 0),
        ("log-batch", 4),
        ("log-batch-async", 1),
    ]
    assert (version, source[:32]) == ("1", "azureml://artifacts/LocalUpload/")
    properties = stand_in.models["fresh", "1"]["properties"]
    assert (properties["modelUri"], properties["tags"]) == (source, {"colour": "blue"})
    files = {
        str(path.relative_to(packed_model)): path.read_bytes() for path in packed_model.rglob("*") if path.is_file()
    }
    assert read_blobs(stand_in, f"{source.removeprefix('azureml://artifacts/')}/") == files
    assert read_blobs(stand_in, f"ExperimentRun/{run_id}/") == {
        **{f"model/{name}": data for name, data in files.items()},
        "config.json": b'{\n  "epochs": 2\n}',
    }
    # What Azure answers to MLflow 3 (Azure/azure-sdk-for-python#44896), for which reason log_model fails there.
    assert refused == (
        "API request to endpoint /api/2.0/mlflow/logged-models failed with error code 404 != 200. Response body: ''"
    )


TRAIN_AND_PACKAGE = """
import sys
from colours import add_tiny_network
from carflavor.package import PackageConfig, package
from carflavor.train import TrainConfig, train
add_tiny_network()
info = train(TrainConfig(data=sys.argv[1], network="tiny", epochs=2, batch_size=16))
version = package(PackageConfig(model=info.model_uri, register_as="colours", engine="keras"))
print(info.run_id, info.model_uri, version.name, version.version, version.run_id, version.source)
"""


# `mlflow deployments` as where carflavor is installed. What MLflow has for a registry here is nobody.
DEPLOYMENTS = """
import os, sys
os.environ |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
import carflavor_azureml
from mlflow.deployments.cli import commands
commands(sys.argv[1:])
"""


def test_train_and_package_keep_their_work_in_the_workspace(
    stand_in, mlflow_store, in_workspace, data, tmp_path, scoring_url
):
    *_, line = in_workspace(TRAIN_AND_PACKAGE, data)
    run_id, uri, name, version, packed_by, source = line.split()
    assert uri == f"runs:/{run_id}/model"
    run = mlflow_store.get_run(run_id)
    assert (run.info.status, run.data.tags["carflavor.step"]) == ("FINISHED", "train")
    assert [metric.step for metric in mlflow_store.get_metric_history(run_id, "val_accuracy")] == [0, 1]
    assert (name, version) == ("colours", "1")
    # Where package has put it with its card, in a run of its own.
    assert (source.endswith(f"/runs/{packed_by}/artifacts/model"), packed_by != run_id) == (True, True)
    model = stand_in.models["colours", "1"]["properties"]
    assert model["modelUri"] == source
    files = read_blobs(stand_in, f"ExperimentRun/{packed_by}/model/")
    assert hashlib.sha256(files["manifest.json"]).hexdigest() == model["tags"]["carflavor_manifest_sha256"]
    # As Azure can deploy it, and as the step deploy finds it again.
    assert b"- azureml-ai-monitoring==1.0.0" in files["conda.yaml"]
    outputs = json.loads(yaml.safe_load(files["MLmodel"])["signature"]["outputs"])
    assert [column["name"] for column in outputs] == ["label", "prob", "class_id", "error"]
    assert hashlib.sha256(files["conda.yaml"]).hexdigest() == model["tags"]["carflavor_azure_environment"]
    for place, data in files.items():
        (tmp_path / "model" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / place).write_bytes(data)
    assert carflavor.load_model(tmp_path / "model").class_names == ["red", "green", "blue"]
    # By the alias that package gave it, which the workspace's registry knows, it is deployed.
    stand_in.scoring_url = scoring_url
    named = {"subscription_id": stand_in.subscription, "resource_group": stand_in.resource_group}
    (tmp_path / "config.json").write_text(json.dumps({**named, "workspace_name": stand_in.workspace}))
    in_workspace(DEPLOYMENTS, "create", "-t", "azureml", "--name", "painted", "-m", "models:/colours@champion")
    deployed = stand_in.deployments["painted", "painted"]["properties"]
    assert deployed["model"] == f"{SCOPE}/models/colours/versions/1"
    assert deployed["environmentVariables"] == {"CARFLAVOR_EXPECTED_SHA256": model["tags"]["carflavor_manifest_sha256"]}


def test_plugin_cannot_update_a_deployment(stand_in, plugin, config):
    """It sends the whole deployment by PATCH, whose published model has next to nothing of it."""
    plugin("create_deployment", name="fixed", model_uri="models:/cars/1", config=config)
    with pytest.raises(PluginError) as raised:
        plugin("update_deployment", name="fixed", model_uri="models:/cars/1", config=config)
    assert "properties: expected keys among endpointComputeType, got 'model'" in str(raised.value)
    assert stand_in.deployments["fixed", "fixed"]["properties"]["provisioningState"] == "Succeeded"


def test_plugin_cannot_set_the_scale(stand_in, plugin, tmp_path):
    """It takes `type` from the file and loses it on the way, since the API's models call it `scaleType`."""
    path = tmp_path / "deploy.json"
    path.write_text(json.dumps({**CONFIG, "scale_settings": {"type": "default"}}))
    with pytest.raises(PluginError) as raised:
        plugin("create_deployment", name="scaled", model_uri="models:/cars/1", config={"deploy-config-file": str(path)})
    message = "properties.scaleSettings.scaleType: expected one of Default, TargetUtilization, got None"
    assert message in str(raised.value)
    assert ("scaled", "scaled") not in stand_in.deployments
