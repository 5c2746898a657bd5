"""`docs/databricks.md`: its command through MLflow to a stand-in for a workspace, its jobs, its code, and its names."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import mlflow
import pytest
from click.testing import CliRunner
from databricks.sdk.service.jobs import JobSettings
from databricks_stand_in import JOB, TOKEN, databricks, find_faults
from mlflow.cli import cli as mlflow_cli
from test_projects import git
from test_projects import project as committed_project

from carflavor import evaluate, package, preprocess, promote, score, train

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "databricks"
PAGE = (ROOT / "docs" / "databricks.md").read_text(encoding="utf-8")
project = committed_project  # the fixture
GIT_URL = "https://host/owner/carflavor.git"
LIBRARIES = json.loads((DOCS / "cluster.json").read_text())["libraries"]
# MLflow leaves the archive of a project open.
pytestmark = pytest.mark.filterwarnings("ignore:.*project.tar.gz:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def workspace(tmp_path_factory, clean_environment, monkeypatch):
    """A stand-in for a workspace, and the environment of a process that knows it."""
    folder = tmp_path_factory.mktemp("workspace")
    with databricks(folder) as workspace:
        workspace.environment = {"DATABRICKS_HOST": workspace.url, "DATABRICKS_TOKEN": TOKEN, "HOME": str(folder)}
        workspace.environment |= {"MLFLOW_TRACKING_URI": "databricks"}
        for name, value in workspace.environment.items():
            monkeypatch.setenv(name, value)
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri("databricks")
        yield workspace
        mlflow.set_tracking_uri(before)


def mlflow_run(uri, config, *arguments):
    """Returns the exit code of MLflow's command, and the error that ended it."""
    command = ["run", str(uri), "-e", "preprocess", "-b", "databricks", "--backend-config", str(config)]
    result = CliRunner().invoke(mlflow_cli, [*command, "--experiment-name", "/Shared/cars", *arguments])
    return result.exit_code, str(result.exception)


def test_the_command_of_the_page_up_to_its_step(workspace, project, photos, tmp_path, clean_environment, monkeypatch):
    """From `mlflow run` here to what the cluster would be told, and that in a shell, as far as it goes without one."""
    assert f"mlflow run {GIT_URL} -e preprocess -b databricks --backend-config cluster.json" in PAGE
    git("clone", "--quiet", "--bare", str(project), "carflavor.git", cwd=tmp_path)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{tmp_path}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", GIT_URL.removesuffix("carflavor.git"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where MLflow leaves its clone
    source, out = "/Volumes/main/cars/photos/mine", "/local_disk0/carflavor/records"
    parameters = ["-P", f"source={source}", "-P", f"out={out}", "-P", "image_size=32", "-P", "workers=1"]
    assert mlflow_run(GIT_URL, DOCS / "cluster.json", "--env-manager", "local", *parameters) == (0, "None")
    (body,), cluster = workspace.submitted, json.loads((DOCS / "cluster.json").read_text())
    assert body["new_cluster"] == cluster["new_cluster"]
    # MLflow adds its own version.
    assert body["libraries"] == [*cluster["libraries"], {"pypi": {"package": f"mlflow=={mlflow.__version__}"}}]
    client = mlflow.MlflowClient(workspace.store)
    experiment = client.get_experiment_by_name("/Shared/cars").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.params["out"]) == ("RUNNING", out)
    assert run.data.tags["mlflow.databricks.runURL"] == f"{workspace.url}/#job/{JOB}/run/1"
    variables = body["shell_command_task"]["env_vars"]
    assert variables == {"MLFLOW_TRACKING_URI": "databricks", "MLFLOW_EXPERIMENT_ID": experiment}
    (archive,) = workspace.files
    folder = f"/databricks/mlflow/projects/{Path(archive).name.removesuffix('.tar.gz')}"
    shell, option, script = body["shell_command_task"]["command"]
    assert (shell, option, script.splitlines()[-1].strip()) == (
        "bash",
        "-c",
        f"mlflow run {folder} --entry-point preprocess --env-manager local "
        f"""-c '{{"_mlflow_local_backend_run_id": "{run.info.run_id}"}}' """
        f"-P source={source} -P out={out} -P image_size=32 -P workers=1",
    )

    # The disks of a cluster, below a folder of the test; rsync as the script calls it.
    def here(path):
        return tmp_path / Path(path).relative_to("/")

    here(archive).parent.mkdir(parents=True)
    here(archive).write_bytes(workspace.files[archive])
    for number, photo in enumerate(photos):
        path = here(source) / f"class {number // 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), photo)
    here("/bin").mkdir()
    here("/bin/rsync").write_text('#!/bin/sh\nexec cp "$4" "$5"\n')
    here("/bin/rsync").chmod(0o755)
    script = re.sub(r"(?<![\w/])/(databricks|dbfs|local_disk0|Volumes)/", rf"{tmp_path}/\1/", script)
    home = here(body["new_cluster"]["spark_env_vars"]["CARFLAVOR_HOME"])
    environment = {**clean_environment, **workspace.environment, **variables, "CARFLAVOR_HOME": str(home)}
    environment |= {"PATH": f"{here('/bin')}{os.pathsep}{environment['PATH']}"}
    done = subprocess.run([shell, option, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["carflavor.step"]) == ("FINISHED", "preprocess")
    assert {path.name for path in here(out).glob("*.h5")} == {"train.h5", "validation.h5"}
    assert (here(folder) / "MLproject").is_file()


def test_a_cluster_that_is_refused(workspace, tmp_path):
    (tmp_path / "MLproject").write_text("entry_points: {preprocess: {command: 'true'}}")
    (tmp_path / "cluster.json").write_text('{"spark_version": "15.4.x-scala2.12"}')
    code, said = mlflow_run(tmp_path, tmp_path / "cluster.json")
    assert (code, workspace.submitted, "new_cluster: node_type_id is missing" in said) == (1, [], True)
    # One of MLflow's own, of which the page warns.
    assert "new_cluster: no key ENV_MANAGER in ClusterSpec" in said


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (["tasks", 0, "spark_python_task", "file"], "a.py", "no key file in SparkPythonTask"),
        (["tasks", 0, "spark_python_task"], {"parameters": []}, "python_file is missing"),
        (["job_clusters", 0, "new_cluster", "num_workers"], "4", "expected int, got '4'"),
        (["job_clusters", 0, "new_cluster", "spark_env_vars", "A"], 1, "expected str, got 1"),
        (["git_source", "git_provider"], "cvs", "expected one of awsCodeCommit, "),
    ],
)
def test_jobs_are_held_to_the_published_models(place, value, fault):
    job = json.loads((DOCS / "training-job.json").read_text())
    assert find_faults(JobSettings, job) == []
    changed = job
    for key in place[:-1]:
        changed = changed[key]
    changed[place[-1]] = value
    (said,) = find_faults(JobSettings, job)
    assert fault in said


@pytest.fixture
def called(monkeypatch):
    """The steps that are called by their functions, as pairs of name and config. They do nothing."""
    called = []
    for module in (preprocess, train, evaluate, package, promote, score):
        name = module.__name__.rpartition(".")[2]
        info = SimpleNamespace(model_uri="runs:/1a/model")
        monkeypatch.setattr(module, name, lambda config, name=name, info=info: called.append((name, config)) or info)
    return called


def read_task(name):
    """Returns what the only task of a job runs."""
    job = json.loads((DOCS / f"{name}.json").read_text())
    assert find_faults(JobSettings, job) == []
    assert f"docs/databricks/{name}.json" in PAGE
    (task,) = job["tasks"]
    assert task["job_cluster_key"] == job["job_clusters"][0]["job_cluster_key"]
    assert task["libraries"] == LIBRARIES
    python = task["spark_python_task"]
    return runpy.run_path(str(ROOT / python["python_file"]))["main"], python["parameters"]


def test_the_scoring_job_takes_up_what_the_training_job_leaves(called):
    main, parameters = read_task("training-job")
    main(*parameters)
    assert [name for name, _ in called] == ["preprocess", "train", "evaluate", "package", "promote"]
    configs = dict(called)
    assert {configs[name].data for name in ("train", "evaluate", "promote")} == {configs["preprocess"].out}
    assert configs["evaluate"].model == configs["package"].model == "runs:/1a/model"
    assert (configs["package"].register_as, configs["package"].alias) == (configs["promote"].name, "challenger")
    command, parameters = read_task("scoring-job")
    with command.make_context("score", list(parameters)) as context:
        assert context.params["model"] == f"models:/{configs['promote'].name}@champion"


def test_the_libraries_of_the_page(tmp_path):
    _, *lines, upload = re.search(r"```bash\n(pip wheel .+?)```", PAGE, re.DOTALL)[1].splitlines()
    shutil.copy(ROOT / "conda.yaml", tmp_path)
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "carflavor-1.2-py3-none-any.whl").touch()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, env=environment, check=True)
    written = (tmp_path / "libraries" / "requirements.txt").read_text().splitlines()
    assert written[0] == f"mlflow=={mlflow.__version__}"
    assert written[-1] == "/Volumes/main/cars/libraries/carflavor-1.2-py3-none-any.whl"
    assert LIBRARIES == [{"requirements": f"{upload.rpartition(' dbfs:')[2]}/requirements.txt"}]


def test_the_code_of_the_page(called, monkeypatch):
    """Every line of the notebook but the steps' own work."""
    registries = []
    monkeypatch.setattr(mlflow, "set_registry_uri", registries.append)  # which would stay for other tests
    (code,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    exec("\n".join(line for line in code.splitlines() if not line.startswith("%")), {})
    assert registries == ["databricks-uc"]
    assert [name for name, _ in called] == ["preprocess", "train", "evaluate", "package", "promote", "score"]
    configs = dict(called)
    assert configs["package"].model == "runs:/1a/model"
    assert configs["package"].register_as == configs["promote"].name == "main.cars.carflavor"
    assert (configs["score"].model, configs["score"].master) == ("models:/main.cars.carflavor@champion", "session")
