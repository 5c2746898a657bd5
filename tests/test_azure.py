"""target=azureml against the stand-in: what is sent, where the traffic goes, and what is left when something fails."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import click
import mlflow
import pandas as pd
import pytest
import yaml
from azure.core.exceptions import HttpResponseError
from azure_stand_in import AzureStandIn
from click.testing import CliRunner
from mlflow.models import Model
from mlflow.pyfunc.scoring_server import _get_jsonable_obj
from servers import mlflow_server
from test_mlproject import ROOT, load

import carflavor
from carflavor.azure import arm, registration
from carflavor.azure.rollout import deploy_to_azure
from carflavor.command import StepCommand
from carflavor.data.example import example_photo
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
    """The stand-in with the packed model as version 1 of `cars` in its registry, and no time lost between requests."""
    monkeypatch.setattr(arm, "_BACKOFF", 0.01)
    monkeypatch.setattr(arm, "_SECONDS_BETWEEN_POLLS", 0.05)
    with AzureStandIn() as stand_in:
        stand_in.scoring_url = scoring_url
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        know_model(stand_in, "cars", "1", registration.prepare_model(packed_model, tmp_path / "prepared"))
        yield stand_in


def know_model(stand_in, name, version, path):
    stand_in.register(name, version)
    conda = hashlib.sha256((path / "conda.yaml").read_bytes()).hexdigest()
    tags = {"carflavor_manifest_sha256": manifest_sha256(path), "carflavor_azure_environment": conda}
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


class ForAWhile(dict):
    """The URL for every deployment, but for one only so many times."""

    def __init__(self, url, name, times):
        self.url, self.name, self.times = url, name, times

    def get(self, key, default=None):
        if key == self.name:
            self.times -= 1
            return self.url if self.times >= 0 else default
        # The model is asked for where its deployment has none.
        return default if "/" in key else self.url


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
    azure.scoring_url = ForAWhile(azure.scoring_url, "green", 2)
    with pytest.raises(ValueError, match="POST of a photo to green was answered 503"):
        run(packed_model, action="update", traffic="10,50,100")
    assert shares(azure) == [{"blue": 90, "green": 10}, {"blue": 50, "green": 50}, {"blue": 100}]
    # Gone, or rollback would go to it.
    assert (traffic(azure), models(azure)) == ({"blue": 100}, {"blue": "1"})
    with pytest.raises(ValueError, match="Expected a deployment of cars from before blue to go back to, got none"):
        run(packed_model, action="rollback")


def test_a_refused_deployment_leaves_the_one_to_roll_back_to(azure, packed_model):
    run(packed_model)
    run(packed_model, action="update")
    azure.fail("PUT", "deployments/blue$", status=403)
    with pytest.raises(ValueError, match="PUT of onlineEndpoints/cars/deployments/blue was answered 403"):
        run(packed_model, action="update")
    assert (traffic(azure), models(azure)) == ({"green": 100}, {"blue": "1", "green": "1"})
    assert run(packed_model, action="rollback")["traffic"] == {"blue": 100}


@pytest.mark.parametrize("mode, asked", [("Key", ["listKeys"]), ("AADToken", []), ("AMLToken", ["token"])])
def test_endpoints_of_every_auth_mode_are_asked_and_no_secret_is_told(
    azure, packed_model, caplog, capsys, tmp_path, mode, asked
):
    run(packed_model)
    azure.endpoints["cars"]["properties"]["authMode"] = mode
    azure.requests.clear()
    caplog.set_level("DEBUG")
    with pytest.raises(ValueError) as refused:
        azure.scoring_url, url = {"blue": azure.scoring_url}, azure.scoring_url
        run(packed_model, action="update")
    azure.scoring_url = url
    assert run(packed_model, action="update", traffic="100")["traffic"] == {"green": 100}
    posts = [request.path.rpartition("/")[2] for request in azure.requests if request.method == "POST"]
    assert [kind for kind in posts if kind not in ("score", "getLogs")] == asked * 3
    secrets = {request.headers["Authorization"].split()[1] for request in azure.requests}
    secrets |= {secret for pair in azure.keys.values() for secret in pair if secret}
    [failed, _] = mlflow.search_runs(order_by=["start_time DESC"], max_results=2).run_id[::-1]
    told = [
        caplog.text,
        *capsys.readouterr(),
        str(refused.value),
        mlflow.artifacts.load_text(f"runs:/{failed}/error.txt"),
    ]
    assert len(secrets) > 1 and not [secret for secret in secrets for text in told if secret in text]


def test_rollback_does_not_go_to_what_never_had_all_of_the_traffic(azure, packed_model):
    run(packed_model)
    # As a rollout leaves it that was killed while Azure built green.
    azure.polls = 99
    azure.fail("GET", "mfeOperationsStatus", times=9, break_connection=True)
    with pytest.raises(ValueError, match="was not answered"):
        run(packed_model, action="update")
    azure.recover()
    azure.polls = 1
    assert models(azure) == {"blue": "1", "green": "1"}
    sentence = "from before blue to go back to, got only green, which is newer: action=update brings one up$"
    with pytest.raises(ValueError, match=sentence):
        run(packed_model, action="rollback")
    assert traffic(azure) == {"blue": 100}
    # Of what others have made nobody knows the age.
    for deployment in azure.deployments.values():
        deployment["tags"] = {}
    assert run(packed_model, action="rollback")["traffic"] == {"green": 100}


@pytest.mark.parametrize("failure", [dict(break_connection=True), dict(status=500, times=4)])
def test_a_deployment_whose_answer_was_lost_is_no_refused_one(azure, packed_model, failure):
    run(packed_model)
    azure.polls = 9  # the request that is sent again is answered 409
    azure.fail("PUT", "deployments/green$", is_done=True, **failure)
    assert run(packed_model, action="update")["traffic"] == {"green": 100}
    assert [status for method, path, status in writes(azure) if path.endswith("green")][-1] in (409, 500)
    # One that does not come up is removed as ever.
    azure.fail("PUT", "deployments/blue$", is_done=True, **failure)
    azure.fail_deployment("blue")
    with pytest.raises(ValueError, match="^onlineEndpoints/cars/deployments/blue did not come up: PUT of .* answered "):
        run(packed_model, action="update")
    assert (traffic(azure), models(azure)) == ({"green": 100}, {"green": "1"})


def test_a_deployment_that_ends_failed_is_removed_and_a_second_run_heals(azure, packed_model):
    azure.fail_deployment("blue")
    with pytest.raises(ValueError, match="deployments/blue ended Failed: ResourceNotReady: The container did not"):
        run(packed_model)
    assert (azure.deployments, traffic(azure)) == ({}, {})
    assert run(packed_model)["traffic"] == {"blue": 100}


# What Python's own client says of a connection that ends without an answer.
BROKEN = "('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))"


def break_for_good(azure):
    azure.polls = 99
    azure.fail("GET", "mfeOperationsStatus", times=9, break_connection=True)


# What is done to a rollout of green beside blue; what is said, … for Azure's own words; what is left beside blue and
# its traffic. docs/azure.md has it as a table.
FAILURES = {
    "401": (
        lambda azure: azure.fail("PUT", "deployments/green$", status=401),
        "PUT of onlineEndpoints/cars/deployments/green was answered 401: InvalidAuthenticationToken: …. Log in by `az "
        "login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
        {},
    ),
    "403": (
        lambda azure: azure.fail("PUT", "deployments/green$", status=403),
        "PUT of onlineEndpoints/cars/deployments/green was answered 403: AuthorizationFailed: …. The account "
        "needs the role AzureML Data Scientist or Contributor on the workspace",
        {},
    ),
    "404": (
        lambda azure: azure.fail("PUT", "deployments/green$", status=404),
        "PUT of onlineEndpoints/cars/deployments/green was answered 404: ResourceNotFound: …. Look whether the "
        "name and the workspace are spelt right",
        {},
    ),
    "409": (
        lambda azure: azure.fail("PATCH", "onlineEndpoints/cars$", status=409),
        "PATCH of onlineEndpoints/cars was answered 409: Conflict: …. Something else is changing it: look at "
        "action=status and run this again when that has ended",
        {},
    ),
    "429 once": (
        lambda azure: azure.fail("PUT", "deployments/green$", status=429, headers={"Retry-After": "1"}),
        None,
        {"green": "1"},
    ),
    "429 for good": (
        lambda azure: azure.fail("PUT", "deployments/green$", status=429, times=9),
        "PUT of onlineEndpoints/cars/deployments/green was answered 429: TooManyRequests: …. Azure takes fewer "
        "requests than were sent: run this again later",
        {},
    ),
    "answer lost": (
        lambda azure: azure.fail("PUT", "deployments/green$", break_connection=True, is_done=True),
        None,
        {"green": "1"},
    ),
    "500 twice": (lambda azure: azure.fail("PATCH", "onlineEndpoints/cars$", times=2), None, {"green": "1"}),
    "ends Failed": (
        lambda azure: azure.fail_deployment("green"),
        "PUT of onlineEndpoints/cars/deployments/green ended Failed: ResourceNotReady: …",
        {},
    ),
    "broken connection": (
        lambda azure: azure.fail("GET", "mfeOperationsStatus", break_connection=True),
        None,
        {"green": "1"},
    ),
    "broken for good": (
        break_for_good,
        f"GET of onlineEndpoints/cars/deployments/green was not answered: {BROKEN}",
        {"green": "1"},
    ),
    "broken when traffic moves": (
        lambda azure: azure.fail("PATCH", "onlineEndpoints/cars$", times=99, break_connection=True),
        f"PATCH of onlineEndpoints/cars was not answered: {BROKEN}. The traffic could not be put back to "
        f"{{'blue': 100}} (PATCH of onlineEndpoints/cars was not answered: {BROKEN}): action=status shows where it is, "
        "and where green has any action=rollback takes it back",
        {"green": "1"},
    ),
    "smoke test": (
        lambda azure: setattr(azure, "scoring_url", {"blue": azure.scoring_url}),
        "POST of a photo to green was answered 503: ServiceUnavailable: …",
        {},
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_table_of_failures(azure, packed_model, name):
    fail, sentence, left = FAILURES[name]
    run(packed_model)
    url = azure.scoring_url
    fail(azure)
    if sentence is None:
        assert run(packed_model, action="update")["traffic"] == {"green": 100}
        assert models(azure) == {"blue": "1", **left}
        return
    with pytest.raises(ValueError) as caught:
        run(packed_model, action="update")
    words = "The stand-in was told to fail|The container did .* fail|No model runs .* scoring_url"
    assert re.sub(words, "…", str(caught.value)) == sentence
    assert (traffic(azure), models(azure)) == ({"blue": 100}, {"blue": "1", **left})
    assert sentence in (ROOT / "docs" / "azure.md").read_text()
    azure.recover()
    azure.scoring_url, azure.polls = url, 1
    assert run(packed_model, action="update")["traffic"] == {"green": 100}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (dict(status=401), "GET of workspace cars-workspace was answered 401: .* Log in by `az login`"),
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


def test_what_is_left_failed_with_traffic_on_it_is_mended(azure, packed_model):
    run(packed_model)
    run(packed_model, action="update", traffic="100")
    azure.endpoints["cars"]["properties"]["traffic"] = {"blue": 50, "green": 50}
    azure.deployments["cars", "green"]["properties"]["provisioningState"] = "Failed"
    azure.requests.clear()
    assert run(packed_model, action="update", traffic="100")["traffic"] == {"green": 100}
    assert writes(azure)[:3] == [
        ("PATCH", "/onlineEndpoints/cars", 202),
        ("DELETE", "/onlineEndpoints/cars/deployments/green", 202),
        ("PUT", "/onlineEndpoints/cars/deployments/green", 201),
    ]
    assert shares(azure) == [{"blue": 100}, {"green": 100}]


class Waiting(dict):
    """URLs of which that of green is given away once somebody says so, when green has traffic."""

    def __init__(self, azure):
        self.azure, self.url, self.asked, self.go_on = azure, azure.scoring_url, threading.Event(), threading.Event()

    def get(self, name, default=None):
        if name == "green" and traffic(self.azure).get("green"):
            self.asked.set()
            self.go_on.wait(60)
        return self.url


@pytest.mark.parametrize(
    "number, code, left, healing",
    [
        # Ctrl-C puts the traffic back and tidies up; nothing can be done after a SIGKILL, but by the next run.
        (signal.SIGINT, 130, ({"blue": 100}, {"blue": "1"}), [{"green": 100}]),
        (
            signal.SIGKILL,
            -9,
            ({"blue": 90, "green": 10}, {"blue": "1", "green": "1"}),
            [{"blue": 100}, {"green": 100}],
        ),
    ],
)
def test_a_rollout_that_a_signal_ends(azure, packed_model, tmp_path, number, code, left, healing):
    run(packed_model)
    azure.scoring_url = waiting = Waiting(azure)
    options = ["--model", packed_model, "--target", "azureml", "--name", "cars", "--workspace", WORKSPACE]
    process = start_step([*options, "--action", "update"], tmp_path)
    try:
        assert waiting.asked.wait(60)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    finally:
        waiting.go_on.set()
        process.kill()
    assert (process.returncode, traffic(azure), models(azure)) == (code, *left), output
    assert ("SIGINT received: ending the step" in output) == (number == signal.SIGINT)
    azure.requests.clear()
    assert run(packed_model, action="update", traffic="100")["traffic"] == {"green": 100}
    assert shares(azure) == healing


def start_step(options, cwd, **variables):
    """Starts the step in a process of its own, with the store of this file's runs."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoints" / "deploy.py"), *map(str, options)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            **variables,
        },
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_status_does_not_wait_for_what_goes_on(azure, packed_model, monkeypatch):
    run(packed_model)
    azure.endpoints["cars"]["properties"]["provisioningState"] = "Updating"
    azure.deployments["cars", "blue"]["properties"]["provisioningState"] = "Creating"
    monkeypatch.setattr(arm, "_SECONDS_TO_WAIT", 0)
    found = run(packed_model, action="status")
    assert (found["state"], found["deployments"]["blue"]["state"]) == ("Updating", "Creating")


def test_nobody_waits_for_a_day_because_azure_says_so(azure, packed_model, monkeypatch):
    monkeypatch.setattr(arm, "_LONGEST_PAUSE", 0.01)
    azure.fail("PUT", "onlineEndpoints/cars$", status=429, times=99, headers={"Retry-After": "86400"})
    with pytest.raises(ValueError, match="answered 429: .*Azure takes fewer requests than were sent: run this again"):
        run(packed_model)
    # Nor is a poll's pause longer, whatever the form it is asked for in.
    for wanted in ("86400", "Wed, 25 Nov 2026 12:00:00 GMT"):
        assert arm._seconds_to_wait(SimpleNamespace(headers={"Retry-After": wanted})) == 0.01


def test_what_never_ends_is_given_up(azure, packed_model, monkeypatch):
    run(packed_model)
    azure.polls = 10**6
    monkeypatch.setattr(arm, "_SECONDS_TO_WAIT", 0.3)
    message = (
        "PUT of onlineEndpoints/cars/deployments/green did not end within 0.3 s; action=status shows how it goes on"
    )
    with pytest.raises(ValueError, match=message):
        run(packed_model, action="update")
    assert traffic(azure) == {"blue": 100}


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
    assert '"requestTimeout": "PT60S"' in printed
    assert (writes(azure), azure.endpoints) == ([], {})


def test_a_model_that_the_workspace_does_not_know_is_registered_in_a_dry_run(azure, packed_model, capsys):
    azure.models.clear()
    run(packed_model, dry_run=True)
    printed = capsys.readouterr().out
    files = [path for path in packed_model.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert f"REGISTER {azure.workspace_uri}, cars\n" in printed and f'"files": {len(files)},\n' in printed


def test_a_model_that_the_workspace_does_not_know_is_registered_once(azure, packed_model, tmp_path, clean_environment):
    azure.models.clear()
    options = ["--model", str(packed_model), "--target", "azureml", "--name", "cars", "--workspace", WORKSPACE]
    with mlflow_server(tmp_path, clean_environment) as server:
        azure.mlflow_url = server.url
        # A process of its own: azureml-mlflow reads Azure's addresses when it is imported, which MLflow does.
        # What is uploaded lies in a folder of this one.
        (tmp_path / "Škoda models").mkdir()
        process = start_step(options, tmp_path, TMPDIR=str(tmp_path / "Škoda models"))
        output = process.communicate(timeout=100)[0]
    assert (process.returncode, list(azure.models)) == (0, [("cars", "1")]), output
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
        # Not «there is no endpoint», while it runs on in the other workspace.
        (dict(action="delete", workspace=f"{WORKSPACE}-2"), "Expected a workspace .*/cars-workspace-2, got nothing"),
        (dict(action="status", workspace="a/b/c"), "Expected a workspace .*/workspaces/c, got nothing there"),
        (dict(action="rollback"), "Expected an endpoint cars in cars-workspace, got none"),
        (dict(model=""), "Expected model, which action=create deploys"),
    ],
)
def test_refused_parameters(azure, packed_model, options, message):
    complete = {"model": str(packed_model), "name": "cars", "workspace": WORKSPACE, **options}
    with pytest.raises(ValueError, match=message):
        deploy(DeployConfig(target="azureml", **complete))
    assert writes(azure) == []


def test_a_config_file_that_is_refused_is_so_before_anything_is_sent(azure, packed_model, tmp_path):
    (tmp_path / "config.yaml").write_text("computeType: aci\n")
    with pytest.raises(
        ValueError, match="config.yaml: expected no key computeType: the container services ACI and AKS"
    ):
        run(packed_model, config=str(tmp_path / "config.yaml"))
    assert azure.requests == []


def test_a_name_that_azure_refuses_for_models_is_refused_before_anything_is_sent(azure):
    config = DeployConfig("models:/our cars/1", "azureml", name="cars", workspace=WORKSPACE)
    with pytest.raises(ValueError, match="Expected the model's name to be letters, digits, .*, got 'our cars'"):
        deploy_to_azure(config)
    with pytest.raises(ValueError, match="^model: nothing could be read from models:/nothing/latest: "):
        deploy(DeployConfig("models:/nothing/latest", "azureml", name="cars", workspace=WORKSPACE))
    assert azure.requests == []


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
        "Error: Expected a deployment of cars from before blue to go back to, got none",
    )


def test_what_azures_packages_raise_is_a_sentence():
    @click.command(cls=StepCommand)
    def step():
        # As of a storage account behind a firewall, to which azureml-mlflow uploads.
        raise HttpResponseError("This request is not authorized.\nRequestId: 1")

    result = CliRunner().invoke(step)
    assert (result.exit_code, result.output) == (1, "Error: Azure: This request is not authorized. RequestId: 1\n")


def test_the_transcript(azure, packed_model, caplog):
    """What is said, and where the traffic is, after one command each: create to delete, with two that fail."""
    command, _ = load("deploy")
    photo, box, _ = example_photo()
    answer = carflavor.load_model(packed_model).predict([photo], [box]).iloc[0]

    def say(action, *options):
        caplog.clear()
        options = ["--target", "azureml", "--name", "cars", "--workspace", WORKSPACE, "--action", action, *options]
        result = CliRunner().invoke(command, options)
        said = [record.getMessage() for record in caplog.records if record.name.startswith("carflavor.azure")]
        for line in said:
            assert without_answer(line) in page
        return result.exit_code, said, result.output

    def without_answer(text):
        return re.sub(r" with .* \(\d\.\d\d\)", " with", text)

    page = without_answer((ROOT / "docs" / "azure.md").read_text())

    def answers(deployment):
        return f"cars/{deployment} answers a photo with {answer.label} ({answer.prob:.2f})"

    def moved(**shares):
        return f"Traffic of cars: {shares}"

    def deploying(deployment):
        return f"Deploying cars/{deployment}: Azure builds an image first, in 10 to 30 minutes"

    def last_lines(deployment):
        return f"The last lines of cars/{deployment}:\nInstance status:\nInferenceServer: Succeeded\n"

    caplog.set_level("INFO", "carflavor")
    model = ["--model", str(packed_model)]
    code, said, output = say("create", *model)
    assert (code, said) == (0, [deploying("blue"), answers("blue"), moved(blue=100), answers("blue")])
    assert json.loads(output[output.index("{") :])["traffic"] == traffic(azure) == {"blue": 100}

    code, said, output = say("update", *model)
    assert (code, said) == (
        0,
        [
            deploying("green"),
            answers("green"),
            moved(blue=90, green=10),
            answers("green"),
            moved(blue=50, green=50),
            answers("green"),
            moved(green=100),
            answers("green"),
        ],
    )
    assert json.loads(output)["traffic"] == traffic(azure) == {"green": 100}
    assert models(azure) == {"blue": "1", "green": "1"}

    url, refused = (
        azure.scoring_url,
        "Error: POST of a photo to blue was answered 503: ServiceUnavailable: No model runs",
    )
    azure.scoring_url = {"green": url}
    code, said, output = say("update", *model)
    assert (code, said) == (1, [deploying("blue"), last_lines("blue"), "Removed cars/blue"])
    assert output.startswith(refused)
    assert (traffic(azure), models(azure)) == ({"green": 100}, {"green": "1"})

    azure.scoring_url = ForAWhile(url, "blue", 2)
    code, said, output = say("update", *model)
    assert (code, said) == (
        1,
        [
            deploying("blue"),
            answers("blue"),
            moved(green=90, blue=10),
            answers("blue"),
            moved(green=50, blue=50),
            "Putting the traffic of cars back",
            moved(green=100),
            last_lines("blue"),
            "Removed cars/blue",
        ],
    )
    assert output.startswith(refused)
    assert (traffic(azure), models(azure)) == ({"green": 100}, {"green": "1"})

    assert say("delete") == (0, ["Deleted cars. The models stay registered"], "")
    assert (azure.endpoints, azure.deployments) == ({}, {})


def test_the_environment_of_a_registered_model_is_one_that_azure_builds(packed_model, tmp_path):
    prepared = registration.prepare_model(packed_model, tmp_path / "prepared")
    conda = yaml.safe_load((prepared / "conda.yaml").read_text())
    assert conda["dependencies"][0] == "python=3.11"
    packages = conda["dependencies"][-1]["pip"]
    assert packages[-1] == "azureml-ai-monitoring==1.0.0"
    # The latest that the server of Azure can be installed beside.
    assert [line for line in packages if line.startswith("wrapt")] == ["wrapt==1.16.0"]
    assert (prepared / "requirements.txt").read_text().splitlines() == packages
    # What Azure's scoring script asks for when it starts; of the whole signature MLflow raises an error.
    outputs = Model.load(prepared).signature.outputs
    assert (outputs.input_names(), len(outputs.pandas_types())) == (["label", "prob", "class_id", "error"], 4)
    # What it then answers with is JSON, also where nothing is known for certain.
    photo = pd.DataFrame(json.loads((prepared / "input_example.json").read_text())["data"])
    photo.columns = ["image", "x1", "y1", "x2", "y2"]
    answer = mlflow.pyfunc.load_model(prepared).predict(photo, params={"min_prob": 1.0})
    assert json.loads(json.dumps(_get_jsonable_obj(answer, pandas_orient="records")))[0]["label"] == "unknown"
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
        "Azure ML needs packages that are not here (No module named 'azure.core'): pip install 'carflavor[azure]'"
    ], result.stderr
