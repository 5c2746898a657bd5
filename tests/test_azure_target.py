"""`mlflow deployments -t azureml` with azureml-mlflow and carflavor in either order, and without one of them."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from azure_stand_in import AzureStandIn

import carflavor
from carflavor.data.example import example_photo
from carflavor.flavor import manifest_sha256
from carflavor.scoring import BOX_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
CARFLAVOR, PLUGIN = "carflavor", "azureml-mlflow==1.62.0.post6"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What carflavor is built from, where a build may leave its own files."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "carflavor_azureml.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "carflavor", folder / "carflavor", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def install(source):
    """A function that installs packages one after the other into a folder, and nothing that they need."""

    def install(folder, *packages):
        for package in packages:
            wanted = str(source) if package == CARFLAVOR else package
            command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target"]
            subprocess.run([*command, str(folder), wanted], check=True)
        return folder

    return install


@pytest.fixture(scope="module")
def both(install, tmp_path_factory):
    """A folder where both are installed."""
    return install(tmp_path_factory.mktemp("both"), PLUGIN, CARFLAVOR)


def command_line(folders, environment, cwd, *arguments):
    """Runs `mlflow deployments` where the packages of some folders are installed; returns exit code and output."""
    result = subprocess.run(
        [sys.executable, "-m", "mlflow", "deployments", *arguments],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, sys.path)]),
            "PYTHONUNBUFFERED": "1",
        },
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


@pytest.fixture
def azure(clean_environment):
    with AzureStandIn() as stand_in:
        stand_in.register("cars", "1")
        stand_in.variables = {
            **{name: value for name, value in clean_environment.items() if not name.startswith("AZURE")},
            **stand_in.environment,
            "MLFLOW_TRACKING_URI": stand_in.workspace_uri,
        }
        yield stand_in


def test_the_literal_commands(azure, both, scoring_url, packed_model, tmp_path):
    """A transcript: what is typed, what is printed, and where the traffic goes."""
    azure.scoring_url = {"cars/1": scoring_url, "cars/3": scoring_url, "cars/2": f"{scoring_url}/nowhere"}
    for version in ("1", "2", "3"):
        azure.register("cars", version, tags={"carflavor_manifest_sha256": manifest_sha256(packed_model)})
    (tmp_path / "deployment.yaml").write_text(
        "instance_type: Standard_F4s_v2\nrequest_settings: {request_timeout_ms: 30000}\n"
    )
    photo, box, _ = example_photo()
    # pandas reads a column as {index: value}.
    (tmp_path / "photo.json").write_text(json.dumps(as_columns(photo, box)))
    answer = carflavor.load_model(packed_model).predict([photo], [box]).iloc[0]
    answered = f"cars/cars answers a photo with {answer.label} ({answer.prob:.2f})"

    def run(command):
        code, output = command_line([both], azure.variables, tmp_path, *command.split(), "-t", "azureml")
        # The plugin prints a dot for each poll; what MLflow logs begins with the time.
        lines = [re.sub(r"^[\d/]+ [\d:]+ ", "", line.lstrip(".")) for line in output.splitlines()]
        lines = [line for line in lines if line]
        if command.split()[0] in ("create", "update", "delete"):
            assert without_answer(lines[-1]) in page
        return code, lines

    def without_answer(text):
        return re.sub(r" with .* \(\d\.\d\d\)", " with", text)

    page = without_answer((ROOT / "docs" / "azure.md").read_text())

    made = run("create --name cars -m models:/cars/1 --config deploy-config-file=deployment.yaml")
    assert made == (
        0,
        [f"INFO mlflow.carflavor.azure.target: {answered}", "python_function deployment cars is created"],
    )
    assert (shares(azure), model(azure)) == ({"cars": 100}, "cars/versions/1")
    deployment = azure.deployments["cars", "cars"]["properties"]
    assert (deployment["instanceType"], deployment["requestSettings"]["requestTimeout"]) == ("Standard_F4s_v2", "PT30S")
    # What the file leaves open is ours.
    assert deployment["readinessProbe"]["failureThreshold"] == 60
    assert "name: cars" in run("get --name cars")[1]
    assert run("list")[1][0] == "List of all deployments:"
    run("predict --name cars -I photo.json -O answer.json")
    assert json.loads((tmp_path / "answer.json").read_text())["label"] == {"0": answer.label}
    # A second create would take the traffic away while the model is changed.
    code, lines = run("create --name cars -m models:/cars/3")
    assert (code, lines[-1]) == (
        1,
        "mlflow.exceptions.MlflowException: Expected cars to have no traffic for cars, got {'cars': 100}: "
        "`mlflow deployments update` changes what serves, and --endpoint makes a deployment beside it",
    )
    code, lines = run("update --name cars -m models:/cars/2")
    failed = "mlflow.exceptions.MlflowException: POST of a photo to cars was answered 424: ModelError: "
    assert (code, lines[-1].startswith(failed)) == (1, True), lines[-1]
    assert lines[-1].endswith(". cars/cars is again what it was")
    assert (shares(azure), model(azure)) == ({"cars": 100}, "cars/versions/1")
    assert azure.deployments["cars", "cars"]["properties"] == deployment
    made = run("update --name cars -m models:/cars/latest")
    assert made == (
        0,
        [f"INFO mlflow.carflavor.azure.target: {answered}", "Deployment cars is updated (with flavor python_function)"],
    )
    assert (shares(azure), model(azure)) == ({"cars": 100}, "cars/versions/3")
    # Without a config file the rest is what it was.
    assert azure.deployments["cars", "cars"]["properties"]["instanceType"] == "Standard_F4s_v2"
    assert run("delete --name cars") == (0, ["Deployment cars is deleted"])
    assert (azure.endpoints, azure.deployments) == ({}, {})


def shares(azure):
    return azure.endpoints["cars"]["properties"]["traffic"]


def model(azure):
    return azure.deployments["cars", "cars"]["properties"]["model"].rpartition("/models/")[2]


def as_columns(photo, box):
    row = {"image": base64.b64encode(photo).decode(), **dict(zip(BOX_COLUMNS, map(float, box), strict=True))}
    return {name: {"0": value} for name, value in row.items()}


@pytest.mark.parametrize("order", [(PLUGIN, CARFLAVOR), (CARFLAVOR, PLUGIN)])
def test_the_order_of_installation_does_not_matter(azure, install, tmp_path, order):
    """In a folder of their own each, for the later one's entry points win; in one the file system has its own order."""
    sites = [install(tmp_path / f"site{number}", package) for number, package in enumerate(order)]
    code, output = command_line(sites, azure.variables, tmp_path, "list", "-t", "azureml")
    assert (code, "List of all deployments:\n[]" in output) == (0, True), output


def hide(folder, package):
    """Has a folder that comes first on the path say that a package is installed there, with no entry points."""
    information = folder / f"{package.replace('-', '_')}-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0\n")


def test_without_carflavor_the_command_fails_in_azureml_mlflow(azure, install, tmp_path):
    """What carflavor mends; once this fails, upstream has mended it."""
    folder = install(tmp_path / "site", PLUGIN)
    hide(folder, "carflavor")
    code, output = command_line([folder], azure.variables, tmp_path, "list", "-t", "azureml")
    assert (code, output.splitlines()[-1]) == (1, "AttributeError: 'NoneType' object has no attribute 'group'")


def test_without_azureml_mlflow_one_sentence_names_the_extra(azure, install, tmp_path):
    folder = install(tmp_path / "site", CARFLAVOR)
    hide(folder, "azureml-mlflow")
    (folder / "azureml").mkdir()
    (folder / "azureml" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'azureml'\")\n")
    code, output = command_line([folder], azure.variables, tmp_path, "list", "-t", "azureml")
    assert (code, output.splitlines()[-1]) == (
        1,
        'RuntimeError: Failed to load the plugin "azureml": Azure ML needs packages that are not here '
        "(No module named 'azureml'): pip install 'carflavor[azure]'",
    )


# Calls of the client, a list of names and arguments, and what they return or raise, a line each after an @: the plugin
# prints dots.
CLIENT = """
import json, sys
from mlflow.deployments import get_deploy_client
print("@", json.dumps([name in sys.modules for name in ("carflavor_azureml", "carflavor")]))
client = get_deploy_client("azureml")
for name, arguments in json.loads(sys.argv[1]):
    try:
        answer = getattr(client, name)(**arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print("\\n@", json.dumps(answer))
"""


def test_the_client_refuses_before_anything_is_made_and_asks_for_nothing_retired(azure, both, tmp_path):
    for name, text in {"aci": "computeType: aci", "async": "async: true", "three": "instance_count: 3"}.items():
        (tmp_path / name).write_text(text)

    def config(name):
        return {"config": {"deploy-config-file": str(tmp_path / name)}}

    azure.register("cars", "2")
    cars = {"name": "cars", "model_uri": "models:/cars/1"}
    calls = [
        ["create_deployment", cars | config("aci")],
        ["create_deployment", cars | config("async")],
        ["create_deployment", {"name": "cars", "model_uri": "models:/cars/7"}],
        ["create_deployment", {"name": "cars", "model_uri": "runs:/0123456789abcdef/model"}],
        ["create_deployment", cars | {"flavor": "carflavor"}],
        ["create_deployment", cars | {"config": {"instance_type": "Standard_F4s_v2"}}],
        ["get_deployment", {"name": "cars"}],
        ["delete_deployment", {"name": "cars"}],
        ["update_deployment", {"name": "cars"}],
        ["create_deployment", cars],
        ["update_deployment", cars | {"model_uri": "models:/cars/2"} | config("three")],
        ["create_deployment", cars | {"name": "green", "endpoint": "cars"}],
        ["delete_deployment", {"name": "cars"}],
        ["list_deployments", {}],
    ]
    answers, _ = call_client(calls, azure, both, tmp_path)
    # A model brings its own carflavor, which Python takes only where none was imported before.
    assert answers[0] == [True, False]
    nothing = "MlflowException: Expected a deployment cars of the endpoint cars, got none"
    assert "expected no key computeType: the container services ACI and AKS v1 are retired" in answers[1]
    assert "expected no key async" in answers[2]
    assert answers[3].startswith("MlflowException: Expected a model of the registry of cars-workspace as models:/name")
    assert answers[4].startswith("MlflowException: Expected a model of the registry of cars-workspace as models:/name")
    assert answers[5:7] == [
        "MlflowException: Expected flavor python_function, by which Azure serves all models. Received: carflavor",
        "MlflowException: Expected config to be deploy-config-file=FILE alone. Received: instance_type",
    ]
    assert answers[7:10] == [nothing, None, nothing]
    writes = [request for request in azure.requests if request.method not in ("GET", "POST")]
    assert [(request.method, request.path.rpartition("/onlineEndpoints/")[2]) for request in writes] == [
        ("PUT", "cars"),
        ("PUT", "cars/deployments/cars"),
        ("PATCH", "cars"),
        ("PUT", "cars/deployments/cars"),
        ("PUT", "cars/deployments/green"),
        # What carries traffic loses it before it goes.
        ("PATCH", "cars"),
        ("DELETE", "cars/deployments/cars"),
    ]
    made = writes[1].body
    assert (made["properties"]["endpointComputeType"], made["properties"]["instanceType"]) == (
        "Managed",
        "Standard_DS2_v2",
    )
    assert (made["properties"]["requestSettings"]["requestTimeout"], made["sku"]["capacity"]) == ("PT1M", 1)
    assert (writes[3].body["sku"]["capacity"], writes[3].body["properties"]["model"][-16:]) == (3, "/cars/versions/2")
    assert [deployment["name"] for deployment in answers[-1]] == ["green"]
    assert not [request for request in azure.requests if "/services" in request.path]


def call_client(calls, azure, both, cwd):
    """Returns what calls of the client return or raise, the first of them what is imported before."""
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(calls)],
        env={**azure.variables, "PYTHONPATH": os.pathsep.join([str(both), *filter(None, sys.path)])},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line[2:]) for line in result.stdout.splitlines() if line.startswith("@ ")]
    assert len(answers) == 1 + len(calls), result.stderr
    return answers, result.stderr


def test_what_create_cannot_bring_up_is_removed_after_its_last_words(azure, both, tmp_path):
    create = ["create_deployment", {"name": "cars", "model_uri": "models:/cars/1"}]
    azure.fail_deployment("cars")
    [_, answer], said = call_client([create], azure, both, tmp_path)
    assert "The container did not become ready" in answer and answer.endswith(". cars/cars is removed again")
    assert "The last lines of cars/cars:\nInstance status:\nInferenceServer: Failed\n" in said
    assert azure.deployments == {}
    # The traffic is moved, and nobody hears of it: the deployment goes with it all the same.
    azure.fail("GET", "mfeOperationResults", times=4, break_connection=True)
    [_, answer], said = call_client([create], azure, both, tmp_path)
    assert answer.startswith("MlflowException: GET of onlineEndpoints/cars was not answered: ")
    assert answer.endswith(". cars/cars is removed again")
    assert (azure.deployments, shares(azure)) == ({}, {})
    # What Azure refuses to change stays what it was, and is not removed.
    beside = ["create_deployment", {"name": "green", "model_uri": "models:/cars/1", "endpoint": "cars"}]
    azure.register("cars", "2")
    call_client([create, beside], azure, both, tmp_path)
    azure.fail("PUT", "deployments/green$", status=403)
    again = ["create_deployment", beside[1] | {"model_uri": "models:/cars/2"}]
    [_, answer], said = call_client([again], azure, both, tmp_path)
    assert "AuthorizationFailed" in answer and "removed" not in answer
    assert azure.deployments["cars", "green"]["properties"]["model"].endswith("/cars/versions/1")
