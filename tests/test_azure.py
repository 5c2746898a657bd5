"""target=azureml against the stand-in: what is sent, where the traffic goes, and what is left when something fails."""

import hashlib
import json
import os
import re
import subprocess
import sys

import mlflow
import pytest
import yaml
from azure_stand_in import AzureStandIn
from click.testing import CliRunner
from servers import mlflow_server
from test_mlproject import ROOT, load

import carflavor
from carflavor.azure import registration
from carflavor.azure.settings import read_settings
from carflavor.azure.workspace import Workspace, find_workspace
from carflavor.deploy import DeployConfig, deploy
from carflavor.flavor import manifest_sha256

SUBSCRIPTION = "11111111-2222-3333-4444-555555555555"
WORKSPACE = f"{SUBSCRIPTION}/cars-group/cars-workspace"
PATH = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/cars-group/providers/Microsoft.MachineLearningServices/workspaces"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """A store for all runs of this file: making one takes longer than most of its tests."""
    folder = tmp_path_factory.mktemp("runs")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CARFLAVOR_HOME", str(folder / "home"))
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield
        mlflow.set_tracking_uri(before)


@pytest.fixture
def azure(scoring_url, packed_model, tmp_path, monkeypatch):
    """The stand-in with the packed model as version 1 of `cars` in its registry."""
    with AzureStandIn() as stand_in:
        stand_in.scoring_url = scoring_url
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        know_model(stand_in, "cars", "1", registration.prepare_model(packed_model, tmp_path / "prepared"))
        yield stand_in


def know_model(stand_in, name, version, path):
    stand_in.register(name, version)
    conda = hashlib.sha256((path / "conda.yaml").read_bytes()).hexdigest()
    tags = {"carflavor_manifest_sha256": manifest_sha256(path), "carflavor.azure_environment": conda}
    stand_in.models[name, version]["properties"]["tags"] = tags


def run(packed_model, **options):
    return deploy(DeployConfig(str(packed_model), "azureml", workspace=WORKSPACE, **{"name": "cars", **options}))


def writes(azure):
    """Returns what has changed something, as method, path below the workspace, and status."""
    below = f"{PATH}/cars-workspace"
    return [
        (request.method, request.path.removeprefix(below), request.status)
        for request in azure.requests
        if request.method in ("PUT", "PATCH", "DELETE")
    ]


def shares(azure):
    """Returns the traffic that was asked for, in order."""
    return [request.body["properties"]["traffic"] for request in azure.requests if request.method == "PATCH"]


def traffic(azure):
    return azure.endpoints["cars"]["properties"]["traffic"]


def models(azure):
    return {name: one["properties"]["model"].rpartition("/")[2] for (_, name), one in azure.deployments.items()}


def test_create_deploys_asks_and_then_moves_the_traffic(azure, packed_model):
    found = run(packed_model)
    assert writes(azure) == [
        ("PUT", "/onlineEndpoints/cars", 201),
        ("PUT", "/onlineEndpoints/cars/deployments/blue", 201),
        ("PATCH", "/onlineEndpoints/cars", 202),
    ]
    assert shares(azure) == [{"blue": 100}]
    # The first photo comes before any traffic, and past its rules.
    kinds = [request.path.rpartition("/")[2] for request in azure.requests if request.method in ("PATCH", "POST")]
    assert kinds == ["token", "score", "cars", "token", "score"]
    scores = [request for request in azure.requests if request.path.endswith("/score")]
    assert [request.headers["azureml-model-deployment"] for request in scores] == ["blue", "blue"]
    assert scores[0].body["input_data"]["columns"] == ["image", "x1", "y1", "x2", "y2"]
    assert (found["state"], found["traffic"]) == ("Succeeded", {"blue": 100})
    assert found["deployments"] == {
        "blue": {"state": "Succeeded", "model": "cars/1", "instances": 1, "instance_type": "Standard_DS2_v2"}
    }
    assert found["answer"][0]["label"] in carflavor.load_model(packed_model).class_names


def test_what_create_sends(azure, packed_model):
    run(packed_model)
    endpoint, deployment = (request.body for request in azure.requests if request.method == "PUT")
    assert endpoint == {
        "location": "westeurope",
        "identity": {"type": "SystemAssigned"},
        "properties": {"authMode": "AMLToken", "properties": {"azureml.mlflow_client_endpoint": "True"}},
    }
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", deployment["tags"].pop("carflavor.deployed"))
    probe = {
        "initialDelay": "PT30S",
        "period": "PT10S",
        "timeout": "PT10S",
        "successThreshold": 1,
        "failureThreshold": 60,
    }
    assert deployment == {
        "location": "westeurope",
        "tags": {"carflavor.model": "models:/cars/1"},
        "sku": {"name": "Default", "capacity": 1},
        "properties": {
            "endpointComputeType": "Managed",
            "model": f"{PATH}/cars-workspace/models/cars/versions/1",
            "instanceType": "Standard_DS2_v2",
            "appInsightsEnabled": True,
            "description": "",
            "environmentVariables": {"CARFLAVOR_EXPECTED_SHA256": manifest_sha256(packed_model)},
            "properties": {},
            "livenessProbe": probe,
            "readinessProbe": probe,
            "requestSettings": {
                "requestTimeout": "PT60S",
                "maxQueueWait": "PT10S",
                "maxConcurrentRequestsPerInstance": 2,
            },
            "scaleSettings": {"scaleType": "Default"},
        },
    }


def test_update_goes_by_steps_beside_the_old_deployment_and_rollback_back(azure, packed_model):
    run(packed_model)
    azure.requests.clear()
    found = run(packed_model, action="update", traffic="5,100")
    assert shares(azure) == [{"blue": 95, "green": 5}, {"green": 100}]
    assert found["deployments"].keys() == {"blue", "green"}
    assert run(packed_model, action="rollback")["traffic"] == {"blue": 100}
    # And the next update takes the idle one again.
    assert run(packed_model, action="update")["traffic"] == {"green": 100}


def test_a_new_deployment_that_does_not_answer_is_removed_and_the_old_one_keeps_the_traffic(azure, packed_model):
    run(packed_model)
    azure.requests.clear()
    azure.scoring_url = {"blue": azure.scoring_url}
    with pytest.raises(ValueError, match="POST of a photo to green was answered 503"):
        run(packed_model, action="update")
    assert (shares(azure), traffic(azure), models(azure)) == ([], {"blue": 100}, {"blue": "1"})


def test_a_deployment_that_fails_under_traffic_loses_it_again(azure, packed_model):
    run(packed_model)
    azure.requests.clear()
    url, asked = azure.scoring_url, []

    class ForAWhile(dict):
        def get(self, name, default=None):
            asked.append(name)
            return url if asked.count("green") < 3 else default

    azure.scoring_url = ForAWhile()
    with pytest.raises(ValueError, match="POST of a photo to green was answered 503"):
        run(packed_model, action="update", traffic="10,50,100")
    assert shares(azure) == [{"blue": 90, "green": 10}, {"blue": 50, "green": 50}, {"blue": 100}]
    assert traffic(azure) == {"blue": 100}


def test_a_deployment_that_ends_failed_is_removed_and_a_second_run_heals(azure, packed_model):
    azure.fail_deployment("blue")
    with pytest.raises(ValueError, match="deployments/blue ended Failed: ResourceNotReady: The container did not"):
        run(packed_model)
    assert (azure.deployments, traffic(azure)) == ({}, {})
    assert run(packed_model)["traffic"] == {"blue": 100}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (dict(status=401), "GET of workspace cars-workspace was answered 401: .* log in by `az login`"),
        (dict(status=403), "answered 403: .* needs the role"),
        (dict(status=404), "Expected a workspace .*cars-workspace, got nothing there"),
        (dict(status=409), "answered 409: .*run this again when that has ended"),
    ],
)
def test_refusals_are_one_sentence_and_change_nothing(azure, packed_model, failure, message):
    azure.fail("GET", "workspaces/cars-workspace$", **failure)
    with pytest.raises(ValueError, match=message) as caught:
        run(packed_model)
    assert "\n" not in str(caught.value)
    assert (writes(azure), azure.endpoints) == ([], {})
    assert run(packed_model)["traffic"] == {"blue": 100}


@pytest.mark.parametrize(
    ("method", "path", "failure"),
    [
        ("PUT", "deployments/blue$", dict(status=429, headers={"Retry-After": "1"})),
        ("PUT", "onlineEndpoints/cars$", dict(status=500, times=2)),
        ("PATCH", "onlineEndpoints/cars$", dict(status=500, times=2)),
        ("GET", "mfeOperationsStatus", dict(break_connection=True)),
        ("PATCH", "onlineEndpoints/cars$", dict(break_connection=True)),
    ],
)
def test_what_passes_by_itself_is_tried_again(azure, packed_model, method, path, failure):
    azure.fail(method, path, **failure)
    assert run(packed_model)["traffic"] == {"blue": 100}


def test_a_connection_that_stays_broken_while_azure_works_is_said_and_a_second_run_heals(azure, packed_model):
    azure.fail("GET", "mfeOperationsStatus", times=8, break_connection=True)
    with pytest.raises(ValueError, match="GET of onlineEndpoints/cars was not answered: .*Remote end closed"):
        run(packed_model)
    # The endpoint is being made, nothing else.
    assert (azure.endpoints.keys(), azure.deployments) == ({"cars"}, {})
    with pytest.raises(ValueError, match="GET of onlineEndpoints/cars/deployments/blue was not answered"):
        run(packed_model)
    assert traffic(azure) == {}
    assert run(packed_model)["traffic"] == {"blue": 100}


def test_traffic_that_cannot_be_moved_leaves_it_where_it_was(azure, packed_model):
    run(packed_model)
    azure.fail("PATCH", "onlineEndpoints/cars$", status=409)
    with pytest.raises(ValueError, match="PATCH of onlineEndpoints/cars was answered 409"):
        run(packed_model, action="update")
    assert traffic(azure) == {"blue": 100}
    assert run(packed_model, action="update")["traffic"] == {"green": 100}


def test_a_rollout_that_was_killed_half_way_is_taken_up_by_the_next(azure, packed_model):
    run(packed_model)
    run(packed_model, action="update")
    azure.endpoints["cars"]["properties"]["traffic"] = {"blue": 50, "green": 50}
    # blue is the older of the two.
    assert run(packed_model, action="rollback")["traffic"] == {"blue": 100}
    azure.endpoints["cars"]["properties"]["traffic"] = {"blue": 50, "green": 50}
    azure.requests.clear()
    assert run(packed_model, action="update", traffic="100")["traffic"] == {"green": 100}
    assert shares(azure) == [{"blue": 100}, {"green": 100}]


def test_delete_removes_the_endpoint_and_is_content_without_one(azure, packed_model):
    run(packed_model)
    for _ in range(2):
        assert deploy(DeployConfig(target="azureml", name="cars", workspace=WORKSPACE, action="delete")) is None
        assert (azure.endpoints, azure.deployments) == ({}, {})
    assert ("cars", "1") in azure.models


def test_dry_run_prints_every_request_and_sends_no_change(azure, packed_model, capsys):
    assert run(packed_model, dry_run=True) is None
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if re.match("[A-Z]+ ", line)]
    assert [line.split("?")[0].replace(f"{azure.url}{PATH}/cars-workspace", "") for line in lines] == [
        "PUT /onlineEndpoints/cars",
        "PUT /onlineEndpoints/cars/deployments/blue",
        "POST the scoring URI of cars, azureml-model-deployment: blue",
        "PATCH /onlineEndpoints/cars",
        "POST the scoring URI of cars, azureml-model-deployment: blue",
    ]
    assert '"requestTimeout": "PT60S"' in printed and "Bearer" not in printed
    assert (writes(azure), azure.endpoints) == ([], {})


def test_a_model_that_the_workspace_does_not_know_is_registered_in_a_dry_run(azure, packed_model, capsys):
    azure.models.clear()
    run(packed_model, dry_run=True)
    assert f"REGISTER {azure.workspace_uri}, cars" in capsys.readouterr().out


def test_a_model_that_the_workspace_does_not_know_is_registered_once(azure, packed_model, tmp_path, clean_environment):
    azure.models.clear()
    options = ["--model", str(packed_model), "--target", "azureml", "--name", "cars", "--workspace", WORKSPACE]
    # A folder of its own: in tmp_path the step keeps its runs, in a file of the same name.
    (folder := tmp_path / "server").mkdir()
    with mlflow_server(folder, clean_environment) as server:
        azure.mlflow_url = server.url
        # A process of its own: azureml-mlflow reads Azure's addresses when it is imported, which MLflow does.
        result = subprocess.run(
            [sys.executable, str(ROOT / "entrypoints" / "deploy.py"), *options],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert (result.returncode, list(azure.models)) == (0, [("cars", "1")]), result.stderr
    # The second time it is there, and nothing has to be registered.
    run(packed_model, action="update")
    assert models(azure) == {"blue": "1", "green": "1"}
    prepared = registration.prepare_model(packed_model, tmp_path / "again")
    # LocalUpload/<a name of the plugin's>/model/...
    uploaded = {name.split("/", 3)[3]: content for name, content in azure.blobs.items()}
    files = [path for path in prepared.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(prepared).as_posix(): path.read_bytes() for path in files}.items() <= uploaded.items()
    assert b"azureml-ai-monitoring==1.0.0" in uploaded["conda.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(traffic="50,10,100"), "Expected traffic to be rising percentages up to 100"),
        (dict(traffic="10,50"), "Expected traffic to be rising percentages up to 100"),
        (dict(name="9cars"), "Expected name to be 3 to 32 letters"),
        (dict(workspace="cars"), "Expected workspace to be an azureml:// URI"),
        (dict(action="update"), "Expected an endpoint cars to update, got none"),
        (dict(action="status"), "Expected an endpoint cars in cars-workspace, got none"),
        (dict(action="rollback"), "Expected an endpoint cars in cars-workspace, got none"),
        (dict(model=""), "Expected model, which action=create deploys"),
    ],
)
def test_refused_parameters(azure, packed_model, options, message):
    complete = {"model": str(packed_model), "name": "cars", "workspace": WORKSPACE, **options}
    with pytest.raises(ValueError, match=message):
        deploy(DeployConfig(target="azureml", **complete))
    assert writes(azure) == []


def test_the_command(azure, packed_model):
    command, _ = load("deploy")
    options = [
        "--model",
        str(packed_model),
        "--target",
        "azureml",
        "--name",
        "cars",
        "--workspace",
        WORKSPACE,
        "--action",
    ]
    result = CliRunner().invoke(command, [*options, "create"])
    assert (result.exit_code, result.exception) == (0, None)
    result = CliRunner().invoke(command, [*options, "rollback"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        1,
        "Error: Expected another deployment of cars to go back to, got only blue",
    )


def test_settings_take_milliseconds_and_fill_in_what_is_left_open(tmp_path):
    path = tmp_path / "config.json"
    requests = {"request_timeout_ms": 5}
    path.write_text(json.dumps({"instance_type": "Standard_F4s_v2", "type": "Managed", "request_settings": requests}))
    settings = read_settings(str(path))
    assert (settings["instance_type"], settings["instance_count"]) == ("Standard_F4s_v2", 1)
    assert settings["request_settings"]["request_timeout_ms"] == "PT0.005S"
    assert settings["request_settings"]["max_queue_wait_ms"] == "PT10S"
    assert [read_settings("", size)["instance_type"] for size in (0, 250e6, 2e9)] == [
        "Standard_DS2_v2",
        "Standard_DS3_v2",
        "Standard_DS4_v2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("computeType: aci", "expected no key computeType: the container services ACI and AKS v1 are retired"),
        ("instance_typ: x", "expected keys out of .*. Received: instance_typ"),
        ("liveness_probe: {delay: 1}", "liveness_probe: expected keys out of .*. Received: delay"),
        ("readiness_probe: {period: 0}", "expected readiness_probe.period to be a whole number above 0. Received: 0"),
        ("instance_count: two", "expected instance_count to be a whole number. Received: instance_count='two'"),
        ("instance_count: 0", "expected instance_count of at least 1. Received: 0"),
        ("instance_type: ''", "expected instance_type to be a text. Received: instance_type=''"),
        ("app_insights_enabled: 1", "expected app_insights_enabled to be true or false"),
        ("environment_variables: {A: 1}", "expected environment_variables to be texts in quotes. Received: A: 1"),
        ("request_settings: {request_timeout_ms: PT200S}", "expected at most 180 s, which Azure allows"),
        ("request_settings: {request_timeout_ms: 1m}", "expected milliseconds, or seconds as PT60S. Received: '1m'"),
        ("scale_settings: {type: target_utilization}", "expected scale_settings to be {type: default}"),
        ("type: kubernetes", "expected type: managed. Received: type='kubernetes'"),
        ("- a", "expected keys and values, got list"),
        ("{", "Expected config to be a YAML or JSON file"),
    ],
)
def test_settings_refuse_what_azure_would(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(str(path))


def test_find_workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = Workspace("s", "g", "w")
    uri = "azureml://westeurope.api.azureml.ms/mlflow/v2.0" + expected.resource_id
    assert find_workspace("s/g/w") == expected
    assert find_workspace(uri) == Workspace("s", "g", "w", uri)
    for bad in ("s/g", "azureml://x/mlflow/v1.0/subscriptions/s", str(tmp_path / "config.json")):
        with pytest.raises(ValueError, match="Expected workspace to be|Expected the workspace's URI|does not exist"):
            find_workspace(bad)
    with pytest.raises(ValueError, match="Expected to know the workspace: set MLFLOW_TRACKING_URI"):
        find_workspace()
    (tmp_path / ".azureml").mkdir()
    named = {"subscription_id": "s", "resource_group": "g", "workspace_name": "w"}
    (tmp_path / ".azureml" / "config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text("{}")  # of another program
    assert find_workspace() == expected
    for name, value in zip(("SUBSCRIPTION", "RESOURCEGROUP", "WORKSPACE_NAME"), "abc", strict=True):
        monkeypatch.setenv(f"AZUREML_ARM_{name}", value)
    assert find_workspace() == Workspace("a", "b", "c")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    assert find_workspace() == Workspace("s", "g", "w", uri)


def test_the_environment_of_a_registered_model_is_one_that_azure_builds(packed_model, tmp_path):
    prepared = registration.prepare_model(packed_model, tmp_path / "prepared")
    conda = yaml.safe_load((prepared / "conda.yaml").read_text())
    assert conda["dependencies"][0] == "python=3.11"
    assert conda["dependencies"][-1]["pip"][-1] == "azureml-ai-monitoring==1.0.0"
    assert (prepared / "requirements.txt").read_text().splitlines() == conda["dependencies"][-1]["pip"]
    # It is the same model, and needs no other change.
    assert manifest_sha256(prepared) == manifest_sha256(packed_model)
    assert registration.prepare_model(prepared, tmp_path / "again") == prepared
    carflavor.load_model(prepared)


def test_without_azures_packages_one_sentence_names_the_extra(packed_model, clean_environment, tmp_path):
    (tmp_path / "azure").mkdir()
    (tmp_path / "azure" / "__init__.py").write_text("")
    code = (
        "from carflavor.deploy import DeployConfig, deploy\n"
        "try: deploy(DeployConfig(target='azureml', action='status'))\n"
        "except ValueError as error: print(error)"
    )
    paths = [str(tmp_path), *filter(None, sys.path)]
    environment = {
        **clean_environment,
        "PYTHONPATH": ":".join(paths),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.splitlines()[-1:] == [
        "Azure ML needs packages that are not here (No module named 'azure.core'): pip install carflavor[azure]"
    ], result.stderr
