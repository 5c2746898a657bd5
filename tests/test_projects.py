"""The project run as its users run it: by `mlflow run`, with every environment manager, from folders and Git URLs.

Only conda is stood in for; the environments are real, and built by uv, which must be on PATH.
"""

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from carflavor.data.drawing import CLASS_NAMES
from carflavor.data.example import example_photo
from carflavor.data.sample import write_sample

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STAND_IN = ROOT / "tests" / "conda_stand_in"
SPLITS = ["test.h5", "train.h5", "validation.h5"]
# Git rewrites its beginning to a local folder. MLflow takes a file:// URL, which exists here, for a project folder.
GIT_URL = "https://git.example/carflavor.git"
# What says where a run takes place: a test's own, or none.
LEFT_OUT = ("MLFLOW_", "CARFLAVOR_", "CONDA", "GIT_", "PYTEST_", "PYTHON", "UV_COMPILE_BYTECODE", "VIRTUAL_ENV")


@pytest.fixture(scope="module", autouse=True)
def uv():
    if shutil.which("uv") is None:
        pytest.fail("uv is not on PATH, and these tests build environments with it: install it with `pip install uv`")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The working tree as it is, committed, without what Git ignores."""
    folder = tmp_path_factory.mktemp("project") / "carflavor"
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git("init", "--quiet", "--initial-branch=main", cwd=folder)
    git("add", "--all", "--force", cwd=folder)
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "commit.gpgsign=false")
    git(*identity, "commit", "--quiet", "--no-verify", "--message=Working tree", cwd=folder)
    return folder


@pytest.fixture
def clone(project, tmp_path):
    git("clone", "--quiet", str(project), "carflavor", cwd=tmp_path)
    return tmp_path / "carflavor"


@pytest.fixture
def here(tmp_path):
    """The folder that the user stands in, away from the project."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def env(tmp_path):
    """The variables of a user who has set none of MLflow's and of ours, but for a home of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    # A link, as macOS has it: the current folder is then not written through the name in TMPDIR.
    (tmp_path / "temporary").mkdir()
    (tmp_path / "tmp").symlink_to("temporary")
    return {**kept, "PATH": path, "TMPDIR": str(tmp_path / "tmp"), "CARFLAVOR_HOME": str(tmp_path / "home")}


@pytest.fixture
def conda(tmp_path):
    return shutil.copytree(STAND_IN, tmp_path / "conda")


def git(*arguments, cwd):
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(["git", *arguments], cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout


def call(*command, cwd, env, timeout=300):
    """Returns a command's exit code, and what it wrote to the terminal."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            # `mlflow run` starts a shell, and that the step.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            print(process.communicate()[0])
            raise
    print(output)
    return process.returncode, output


def last_run(folder):
    """Returns the newest run in the store that `mlflow run` makes in the folder that it is called from."""
    runs = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["0"], max_results=1)
    assert runs, "no run was recorded"
    return runs[0]


def run_project(uri, entry_point, *arguments, cwd, env, timeout=300):
    """Runs an entry point to its end and returns the MLflow run."""
    code, output = call("mlflow", "run", str(uri), "-e", entry_point, *arguments, cwd=cwd, env=env, timeout=timeout)
    run = last_run(cwd)
    assert (code, run.info.status) == (0, "FINISHED"), output[-3000:]
    assert run.data.tags["mlflow.project.entryPoint"] == entry_point
    return run


def predicted_label(run, cwd, env):
    """Has a process that knows nothing of the project load the model of a run and predict the sample's example."""
    script = (
        "import mlflow, pandas, sys\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "print(model.predict(pandas.DataFrame({'image': [sys.stdin.read()]})).label[0])"
    )
    photo = base64.b64encode(example_photo()[0]).decode()
    command = [sys.executable, "-c", script, f"runs:/{run.info.run_id}/model"]
    result = subprocess.run(command, cwd=cwd, env=env, input=photo, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_in(environment, package):
    """Whether an environment's own Python has imported a package: uv compiles none, Python does so at the import."""
    return any(environment.glob(f"lib/python3.11/site-packages/{package}/__pycache__/__init__.*.pyc"))


def test_train_without_a_flag_runs_in_a_conda_environment(clone, conda, env):
    env["MLFLOW_CONDA_HOME"] = str(conda)
    # One epoch: how good it becomes is what the main job shows.
    run = run_project(".", "train", "-P", "epochs=1", cwd=clone, env=env, timeout=1200)
    assert run.data.tags["mlflow.project.env"] == "conda"
    (environment,) = (conda / "envs").iterdir()
    assert imported_in(environment, "keras")
    assert predicted_label(run, clone, env) in CLASS_NAMES
    assert git("status", "--porcelain", cwd=clone) == ""


def test_uv_builds_the_environment_of_conda_yaml(clone, here, env, tmp_path):
    env["MLFLOW_ENV_ROOT"] = str(tmp_path / "environments")
    run = run_project(clone, "preprocess", "--env-manager", "uv", cwd=here, env=env, timeout=600)
    assert run.data.tags["mlflow.project.env"] == "uv"
    (environment,) = (tmp_path / "environments").iterdir()
    assert imported_in(environment, "h5py")
    assert sorted(path.name for path in Path(run.data.tags["carflavor.records"]).glob("*.h5")) == SPLITS


def test_without_conda_mlflow_says_how_to_name_it(clone, here, env, tmp_path):
    # A PATH of its own, for a CI machine may have a conda beside its other programs.
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "git").symlink_to(shutil.which("git"))
    env["PATH"] = str(programs)
    code, output = call(sys.executable, "-m", "mlflow", "run", str(clone), "-e", "preprocess", cwd=here, env=env)
    (sentence,) = (line for line in output.splitlines() if "Could not find Conda executable at conda." in line)
    assert "setting the MLFLOW_CONDA_HOME environment variable" in sentence
    assert "Traceback" not in output
    assert code == 1


def test_runs_from_a_git_url_need_nothing_of_their_clone(project, here, env, tmp_path):
    git("clone", "--quiet", "--bare", str(project), "carflavor.git", cwd=tmp_path)
    env |= {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://git.example/",
    }
    clones = tmp_path / "temporary"
    write_sample(tmp_path / "photos", train_per_class=2, test_per_class=1)
    local = ("--env-manager", "local")

    code, output = call("mlflow", "run", GIT_URL, "-e", "preprocess", *local, "-P", "out=records", cwd=here, env=env)
    assert f"=== Fetching project from {GIT_URL} into {tmp_path}/tmp/tmp" in output
    assert (
        "Error: out: the relative path records would be lost with the temporary clone that the project runs in; "
        'type it in full, for instance out="$PWD/records"\n'
    ) in output
    assert (code, last_run(here).info.status) == (1, "FAILED")

    source = f"source={tmp_path}/photos"
    run = run_project(GIT_URL, "preprocess", *local, "-P", source, "-P", "out=", cwd=here, env=env)
    assert run.data.tags["mlflow.source.name"] == GIT_URL
    assert run.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD", cwd=project).strip()
    records = Path(run.data.tags["carflavor.records"])
    assert records.is_relative_to(tmp_path / "home")

    data = f"data={records}"
    training = run_project(GIT_URL, "train", *local, "-P", data, "-P", "epochs=1", cwd=here, env=env)
    model = f"model=runs:/{training.info.run_id}/model"
    evaluation = run_project(GIT_URL, "evaluate", *local, "-P", model, "-P", data, cwd=here, env=env)
    assert 0 <= evaluation.data.metrics["box_top_1"] <= 1

    # MLflow leaves them behind, and the operating system removes them some day.
    assert len(list(clones.glob("*/MLproject"))) == 4
    shutil.rmtree(clones)
    clones.mkdir()
    recorded = [path for folder in (here, tmp_path / "home") for path in folder.rglob("*") if path.is_file()]
    names = [str(clones).encode(), str(tmp_path / "tmp").encode()]
    naming_clones = {path.name for path in recorded if any(name in path.read_bytes() for name in names)}
    # Both for tracebacks only: the refused run's own, and where the pickled code of Scale came from.
    assert naming_clones <= {"error.txt", "custom_objects.cloudpickle"}
    assert predicted_label(training, here, env) in CLASS_NAMES


def test_from_another_folder_a_relative_path_is_refused(clone, here, env):
    photos = here / "relative" / "photos"
    write_sample(photos, train_per_class=2, test_per_class=1)
    arguments = ("-e", "preprocess", "--env-manager", "local", "-P")
    code, output = call("mlflow", "run", str(clone), *arguments, "source=relative/photos", cwd=here, env=env)
    assert (
        f"Error: source: the relative path relative/photos does not exist in {clone}, where the step runs; "
        'type it in full, for instance source="$PWD/relative/photos"\n'
    ) in output
    assert "Traceback" not in output
    assert (code, last_run(here).info.status) == (1, "FAILED")

    run = run_project(clone, "preprocess", "--env-manager", "local", "-P", f"source={photos}", cwd=here, env=env)
    assert run.data.tags["carflavor.records"].startswith(env["CARFLAVOR_HOME"])
    assert run.data.metrics["photos"] == 24


GOOD = """\
name: carflavor
channels: [conda-forge]
dependencies: [python=3.11, pip, pip: [six==1.17.0]]
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "prefix: /opt\n", "expected only the keys name, channels and dependencies, got 'prefix'"),
        (GOOD.replace("name: carflavor", "name: 1"), "expected name to be a text, got 1"),
        (GOOD.replace("[conda-forge]", "conda-forge"), "expected channels to be a list of texts, got 'conda-forge'"),
        ("name: carflavor\n", "expected dependencies to be a list, got None"),
        ("- python=3.11\n", "expected name, channels and dependencies, got ['python=3.11']"),
        (
            GOOD.replace("pip, pip:", "pip, numpy=2.4.6, pip:"),
            "expected numpy under `pip:`; of conda's packages, only python and pip are known",
        ),
        (GOOD.replace("=3.11", "==3.11"), "expected a dependency as name or name=version, got 'python==3.11'"),
        (GOOD.replace("=3.11", ">=3.11"), "expected a dependency as name or name=version, got 'python>=3.11'"),
        (GOOD.replace("=3.11", "="), "expected a dependency as name or name=version, got 'python='"),
        (GOOD.replace("python=", ""), "expected a dependency as name or name=version, got 3.11"),
        (GOOD.replace("pip, pip:", "pip:"), "expected pip among the dependencies"),
        (GOOD.replace("python=3.11, ", ""), "expected python among the dependencies"),
        (GOOD.replace("pip, pip:", "pip, python, pip:"), "expected python once, got it twice"),
        (
            GOOD.replace("pip: [six==1.17.0]", "conda: [six]"),
            "expected `pip:` with a list of requirements, got {'conda': ['six']}",
        ),
        (GOOD.replace("[six==1.17.0]", ""), "expected `pip:` with a list of requirements, got {'pip': None}"),
        (GOOD.replace("]]", "], pip: [six]]"), "expected one list under `pip:`, got a second"),
        (
            GOOD.replace("six==1.17.0", "-r more.txt"),
            "expected requirements under `pip:`, got the option '-r more.txt'",
        ),
    ],
    ids=lambda value: "yaml" if value.endswith("\n") else value,
)
def test_stand_in_refuses_what_conda_may_not_take(conda, env, tmp_path, text, expected):
    assert text != GOOD
    file = tmp_path / "conda.yaml"
    file.write_text(text)
    program = str(conda / "bin" / "conda")
    answer = call(program, "env", "create", "-n", "bad", "--file", str(file), cwd=tmp_path, env=env)
    assert answer == (1, f"conda stand-in: {file}: {expected}\n")
    assert call(program, "env", "list", "--json", cwd=tmp_path, env=env) == (0, '{"envs": []}\n')


@pytest.mark.parametrize("arguments", [[], ["install", "six"], ["env", "create", "-n", "bad"], ["remove", "--all"]])
def test_stand_in_refuses_other_calls(conda, env, tmp_path, arguments):
    answer = call(str(conda / "bin" / "conda"), *arguments, cwd=tmp_path, env=env)
    assert answer == (
        1,
        f"conda stand-in: expected --help, env list or env create, got: {' '.join(arguments)}\n",
    )


def test_stand_in_activates_only_what_it_has_built(conda, env, tmp_path):
    script = f"source {conda}/bin/../etc/profile.d/conda.sh && conda activate missing && echo activated"
    answer = call("bash", "-c", script, cwd=tmp_path, env=env)
    assert answer == (
        1,
        "conda stand-in: expected `conda activate` and an environment's name, got: activate missing\n",
    )
