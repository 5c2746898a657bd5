"""Writes what a packed model is hosted with: a folder for Docker, or one for a server with systemd and nginx."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import jinja2
import yaml
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from packaging.requirements import InvalidRequirement, Requirement

from carflavor import flavor
from carflavor.limits import Limits, read_limits
from carflavor.locking import lock
from carflavor.server import ServerLimits
from carflavor.serving.connections import SECONDS_TO_SEND

_TEMPLATES = Path(__file__).parent / "templates"
_SECONDS_TO_ANSWER = 20
_WORK_FOLDER = ".deploy"  # below `out`; a call that was killed leaves it
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def check_name(name):
    """Raises a ValueError unless it can be the name of a service, an image and a variable of nginx."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"Expected name to be of at most 63 lower-case letters, digits and hyphens, the first one a letter and the "
            f"last one no hyphen. Received: name={name!r}"
        )


def check_port(port):
    """Raises a ValueError unless it is one that nginx can be told."""
    if not port:
        raise ValueError("Expected port to be a number that nginx can be told. Received: port=0")


def write_docker_context(model, out, name, digest=""):
    """Writes the folder that an image is built from: `Dockerfile`, `model` and the requirements.

    Args:
        model: `Path` of a model directory that carflavor wrote.
        out: `Path` of the folder to write; what an earlier call has left there is replaced.
        name: Name of the image, for `check_name`.
        digest: SHA-256 that the model's manifest must have, or an empty text.

    Raises:
        ValueError: If there are other things in the folder, another process writes there, the name is none, or the
            model wants to have installed what is no package of an index.
        MlflowException: If the model is none of ours, or was changed.
    """
    check_name(name)
    flavor.read_manifest(model, digest or None)
    facts = {"name": name, "python": _read_python(model), "run": shlex.join(docker_run(name, 8080))}
    texts = {"Dockerfile": _render("Dockerfile", facts), "requirements.txt": _read_requirements(model)}
    _write_folder(model, out, texts)


def write_server_files(model, out, name, port, workers, digest=""):
    """Writes what a server with systemd and nginx needs: unit, site, requirements, the model, and how to install them.

    The limits that the environment names (`CARFLAVOR_MAX_...`) become the service's, and the site's in step with them.

    Args:
        model: `Path` of a model directory that carflavor wrote.
        out: `Path` of the folder to write; what an earlier call has left there is replaced.
        name: Name of the service, for `check_name`; it will live in a folder for each model in `/opt/<name>`.
        port: Port on 127.0.0.1 that nginx asks.
        workers: Processes, each with the model.
        digest: SHA-256 that the model's manifest must have, or an empty text.

    Raises:
        ValueError: If there are other things in the folder, another process writes there, the name is none, a limit is
            no number, the port is 0, or the model wants to have installed what is no package of an index.
        MlflowException: If the model is none of ours, or was changed.
    """
    check_name(name)
    check_port(port)
    limits = asdict(read_limits(Limits)) | asdict(read_limits(ServerLimits))
    seconds_to_answer = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
    flavor.read_manifest(model, digest or None)
    digest = flavor.manifest_sha256(model)
    facts = {
        "name": name,
        "variable": name.replace("-", "_"),
        "home": f"/opt/{name}/{digest[:12]}",
        "port": port,
        "workers": workers,
        "digest": digest,
        "limits": [(f"CARFLAVOR_MAX_{limit.upper()}", value) for limit, value in limits.items()]
        + [("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", seconds_to_answer)],
        "body_bytes": limits["body_bytes"],
        "seconds_to_send": SECONDS_TO_SEND,
        "seconds_to_answer": seconds_to_answer,
        "python": _read_python(model),
    }
    names = {f"{name}.service": "server.service", f"{name}.conf": "nginx.conf", "INSTALL.md": "INSTALL.md"}
    texts = {name: _render(template, facts) for name, template in names.items()}
    _write_folder(model, out, {**texts, "requirements.txt": _read_requirements(model)})


def docker_answers():
    """Says whether there is a Docker engine to build an image with."""
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=_SECONDS_TO_ANSWER).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def build_image(context, name):
    """Builds an image of a folder that `write_docker_context` wrote; what Docker says of it is shown.

    Raises:
        ValueError: If it cannot be built.
    """
    # Without a value Docker takes it from the environment, which may name a mirror.
    mirror = ["--build-arg", "PIP_INDEX_URL"] if os.environ.get("PIP_INDEX_URL") else []
    built = subprocess.run(["docker", "build", *mirror, "--tag", name, str(context)])
    if built.returncode:
        raise ValueError(f"docker build ended with exit code {built.returncode}; see above")


def docker_run(name, port):
    """Returns the command that serves an image on a port of this machine alone, as a list of words."""
    limits = ["--read-only", "--tmpfs", "/tmp", "--memory", "3g", "--stop-timeout", "40"]
    return ["docker", "run", "--rm", *limits, "--publish", f"127.0.0.1:{port}:8080", name]


def _read_python(model):
    """Returns the version of Python that a model was packed with, such as 3.11."""
    python = yaml.safe_load((model / "python_env.yaml").read_text(encoding="utf-8"))["python"]
    # Under no digest, and a line break would be a command of the Dockerfile.
    if not isinstance(python, str) or not re.fullmatch(r"[0-9]+\.[0-9]+", python):
        raise ValueError(f"python_env.yaml of the model: expected a version of Python as 3.11, got {python!r}")
    return python


def _read_requirements(model):
    """Returns what serving needs, as text for pip.

    The requirements are under no digest, for MLflow rewrites them. Packages come from the index that is asked, under
    their names: an address, another index or a path would have code from anywhere installed, in part as root.
    """
    requirements = []
    for number, line in enumerate((model / "requirements.txt").read_text(encoding="utf-8").splitlines(), 1):
        if not (text := re.sub(r"(^|\s)#.*", "", line).strip()):
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            requirement = None
        if requirement is None or requirement.url:
            raise ValueError(
                "requirements.txt of the model: expected packages as name==version, without addresses, options and "
                f"paths, got line {number}: {line!r}"
            )
        if requirement.name == "mlflow":
            requirement.name = "mlflow-skinny"  # the rest of MLflow is trackers, databases and plots
        requirements.append(f"{requirement}\n")
    return "".join(requirements)


def _render(template, facts):
    return _ENVIRONMENT.get_template(template).render(facts)


def _write_folder(model, out, texts):
    """Writes a copy of a model and texts by their names; when all are there they take the place of what `out` had.

    The first line of the first text is how a folder of an earlier call is known.
    """
    names, work = [*texts, "model"], out / _WORK_FOLDER
    found = sorted(path.name for path in out.iterdir() if path.name != _WORK_FOLDER) if out.is_dir() else []
    others = [name for name in found if name not in names]
    if others or (found and not _begins_alike(out / names[0], texts[names[0]])):
        raise ValueError(
            f"out: expected an empty folder, or one of an earlier deploy, got {out} with {(others or found)[0]}"
        )
    with lock(work / "lock", f"Another process writes {out}"):
        try:
            folder = work / "new"
            shutil.rmtree(folder, ignore_errors=True)
            flavor.copy_model(model, folder / "model")
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            for path in folder.rglob("*"):
                # What MLflow downloads may be its owner's alone; the server is another user.
                path.chmod(0o755 if path.is_dir() else 0o644)
            for name in names:
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                os.replace(folder / name, out / name)
        finally:
            # A network drive keeps the lock, which is open, and so its folder.
            shutil.rmtree(work, ignore_errors=True)


def _begins_alike(path, text):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.readline() == text.encode().splitlines(keepends=True)[0]
    return False


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)
