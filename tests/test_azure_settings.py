"""What describes a deployment, and which workspace is meant: files and variables, read before anything is sent."""

import json

import mlflow
import pytest

from carflavor.azure.settings import change_deployment, read_settings
from carflavor.azure.workspace import Workspace, find_workspace


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
        ("type: kubernetes", "^[^\n]+: expected type: managed, for .* on Kubernetes .* Received: type='kubernetes'$"),
        ("- a", "expected keys and values, got list"),
        ("{", "Expected config to be a YAML or JSON file"),
    ],
)
def test_settings_refuse_what_azure_would(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(str(path))


def test_a_config_file_changes_what_it_names_and_nothing_else(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("instance_count: 3\nrequest_settings: {request_timeout_ms: 90000}\n")
    requests = {"requestTimeout": "PT1S", "maxQueueWait": "PT2S", "maxConcurrentRequestsPerInstance": 8}
    properties = {
        "model": "m",
        "instanceType": "Standard_F4s_v2",
        "livenessProbe": {"period": "PT1S", "failureThreshold": 120},
        "requestSettings": requests,
        "environmentVariables": {"CARFLAVOR_EXPECTED_SHA256": "abc", "A_B": "old"},
    }
    assert change_deployment({"name": "Default", "capacity": 1}, properties, str(path)) == (
        {"name": "Default", "capacity": 3},
        {**properties, "requestSettings": {**requests, "requestTimeout": "PT90S"}},
    )
    path.write_text("liveness_probe: {initial_delay: 7}\nenvironment_variables: {A_B: new, c_d: new}\n")
    assert change_deployment({}, properties, str(path))[1] == {
        **properties,
        "livenessProbe": {"period": "PT1S", "failureThreshold": 120, "initialDelay": "PT7S"},
        "environmentVariables": {"CARFLAVOR_EXPECTED_SHA256": "abc", "A_B": "new", "c_d": "new"},
    }
    path.write_text("instance_type: Standard_DS4_v2\n")
    sku, changed = change_deployment({"name": "Default", "capacity": 2}, properties, str(path))
    assert (sku["capacity"], changed) == (2, {**properties, "instanceType": "Standard_DS4_v2"})


def test_find_workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = Workspace("s", "g", "w")
    uri = "azureml://westeurope.api.azureml.ms/mlflow/v2.0" + expected.resource_id
    assert find_workspace("s/g/w") == expected
    assert find_workspace(uri) == Workspace("s", "g", "w", uri)
    for bad, message in {
        "s/g": "Expected workspace to be",
        "azureml://x/mlflow/v1.0/subscriptions/s": "Expected the workspace's URI",
        str(tmp_path / "config.json"): "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
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
