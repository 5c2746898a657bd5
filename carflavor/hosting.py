"""Writes what a packed model is hosted with: a folder for Docker, or one for a server with systemd and nginx."""

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
    """Writes the folder that an image is built from: `Dockerfile` and `model`.

    Args:
        model: `Path` of a model directory that carflavor wrote.
        out: `Path` of the folder to write; what an earlier call has left there is replaced.
        name: Name of the image, for `check_name`.
        digest: SHA-256 that the model's manifest must have, or an empty text.

    Raises:
        ValueError: If there are other things in the folder, another process writes there, or the name is none.
        MlflowException: If the model is none of ours, or was changed.
    """
    check_name(name)
    flavor.read_manifest(model, digest or None)
    facts = {"name": name, "python": _read_python(model), "run": shlex.join(docker_run(name, 8080))}
    _write_folder(model, out, {"Dockerfile": _render("Dockerfile", facts)})


def write_server_files(model, out, name, port, workers, digest=""):
    """Writes what a server with systemd and nginx needs: unit, site, requirements, the model, and how to install them.

    The limits that the environment names (`CARFLAVOR_MAX_...`) become the service's, and the site's in step with them.

    Args:
        model: `Path` of a model directory that carflavor wrote.
        out: `Path` of the folder to write; what an earlier call has left there is replaced.
        name: Name of the service, for `check_name`; it will live in `/opt/<name>`.
        port: Port on 127.0.0.1 that nginx asks.
        workers: Processes, each with the model.
        digest: SHA-256 that the model's manifest must have, or an empty text.

    Raises:
        ValueError: If there are other things in the folder, another process writes there, the name is none, a limit is
            no number, or the port is 0.
        MlflowException: If the model is none of ours, or was changed.
    """
    check_name(name)
    check_port(port)
    limits = asdict(read_limits(Limits)) | asdict(read_limits(ServerLimits))
    seconds_to_answer = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
    flavor.read_manifest(model, digest or None)
    facts = {
        "name": name,
        "variable": name.replace("-", "_"),
        "home": f"/opt/{name}",
        "port": port,
        "workers": workers,
        "digest": flavor.manifest_sha256(model),
        "limits": [(f"CARFLAVOR_MAX_{limit.upper()}", value) for limit, value in limits.items()]
        + [("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", seconds_to_answer)],
        "body_bytes": limits["body_bytes"],
        "seconds_to_send": SECONDS_TO_SEND,
        "seconds_to_answer": seconds_to_answer,
        "python": _read_python(model),
    }
    names = {f"{name}.service": "server.service", f"{name}.conf": "nginx.conf", "INSTALL.md": "INSTALL.md"}
    texts = {name: _render(template, facts) for name, template in names.items()}
    requirements = (model / "requirements.txt").read_text(encoding="utf-8")
    # As in the Dockerfile: of MLflow, serving needs what mlflow-skinny has.
    texts["requirements.txt"] = re.sub(r"^mlflow==", "mlflow-skinny==", requirements, flags=re.MULTILINE)
    _write_folder(model, out, texts)


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
    return yaml.safe_load((model / "python_env.yaml").read_text(encoding="utf-8"))["python"]


def _render(template, facts):
    return _ENVIRONMENT.get_template(template).render(facts)


def _write_folder(model, out, texts):
    """Writes a copy of a model and texts by their names; when all are there they take the place of what `out` had."""
    names, work = {"model", *texts}, out / _WORK_FOLDER
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name not in (*names, _WORK_FOLDER):
            raise ValueError(f"out: expected an empty folder, or one of an earlier deploy, got {out} with {path.name}")
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
            for name in sorted(names):
                if (out / name).is_dir():
                    shutil.rmtree(out / name)
                os.replace(folder / name, out / name)
        finally:
            # A network drive keeps the lock, which is open, and so its folder.
            shutil.rmtree(work, ignore_errors=True)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)
