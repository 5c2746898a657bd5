"""Puts a packed model where it answers requests, and asks it once."""

import base64
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mlflow

from carflavor import hosting, tracking
from carflavor.data.example import example_photo
from carflavor.data.locations import data_home, resolve_input, resolve_model, resolve_output
from carflavor.package import MANIFEST_TAG, find_version
from carflavor.scoring import BOX_COLUMNS

TARGETS = ("local", "docker", "server", "azureml")
ACTIONS = ("create", "update", "status", "rollback", "delete")
_OF_AZURE = ("action", "config", "workspace", "traffic", "dry_run")
_HOST = "127.0.0.1"
_PROJECT = Path(__file__).parents[1]
_SECONDS_TO_START = 180
_SECONDS_TO_STOP = 40  # more than the server takes to answer what it has begun

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeployConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory that carflavor wrote, as path, `runs:/...` or `models:/...`. Only `azureml` has actions
            that need none.
        target: Where to, one of `TARGETS`.
        port: Port on 127.0.0.1; 0 for any free one.
        workers: Processes of the server, each with the model; an image has one.
        keep: Whether the local server or container stays until Ctrl-C, instead of ending after its first answer.
        name: Name of the image, of the service, or of the endpoint at `azureml`.
        out: Folder to write for `docker` and `server`; empty for one under `CARFLAVOR_HOME`.
        action: What to do at `azureml`: `create`, `update`, `status`, `rollback` or `delete`.
        config: File that describes a deployment at `azureml`; our defaults if empty.
        workspace: Azure ML workspace; the one known from where the user works if empty.
        traffic: Shares of the traffic that a new deployment gets one after the other, in percent.
        dry_run: Whether `azureml` prints what it would change instead.
    """

    model: str = ""
    target: str = "local"
    port: int = 5001
    workers: int = 1
    keep: bool = True
    name: str = "carflavor"
    out: str = ""
    action: str = "create"
    config: str = ""
    workspace: str = ""
    traffic: str = "10,50,100"
    dry_run: bool = False


def deploy(config):
    """Starts `carflavor.server`, waits until it is healthy, sends a photo of the sample and prints the answer.

    For `docker` it runs in a container, of an image that is built before; where no Docker engine runs, the folder that
    the image is built from is written and no more. For `server`, what systemd and nginx need is written.

    Args:
        config: `DeployConfig`.

    Returns:
        The server's answer, a dict with `predictions`; None where files were written and no server was started. For
        `azureml` see `carflavor.azure.rollout`.

    Raises:
        ValueError: If a parameter is not what is expected or belongs to another target, the port is taken, the folder
            has other files, the image cannot be built, or the server does not come up or answer; for `azureml` see
            `carflavor.azure.rollout`.
    """
    with tracking.step_run("deploy", config):
        if config.target == "azureml":
            return _deploy_to_azure(config)
        _check(config)
        if config.target == "server":
            _write_server_files(config)
            return None
        has_docker = config.target == "docker" and hosting.docker_answers()
        if has_docker or config.target == "local":
            # Before what may take minutes. A free one may be another one's by then.
            _free_port(config.port)
        if config.target == "docker" and not _build_image(config, has_docker):
            return None
        port = _free_port(config.port)
        url = f"http://{_HOST}:{port}"
        if config.target == "docker":
            serving = _serving(hosting.docker_run(config.name, port))
        else:
            serving = _serving_locally(resolve_model(config.model), port, config.workers)
        with serving as server:
            _wait_until_healthy(server, url)
            photo, box, class_name = example_photo()
            answer = _ask(url, photo, box)
            mlflow.log_dict(answer, "answer.json")
            print(f"A photo of {class_name} is answered with\n{json.dumps(answer, indent=2, ensure_ascii=False)}")
            print(f"Ask it yourself:\n{_curl_line(url, photo, box)}", flush=True)
            if config.keep:
                print("Serving until Ctrl-C", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    server.wait()
                    raise ValueError(f"The server ended by itself with exit code {server.returncode}")
    return answer


def _check(config):
    for name in _OF_AZURE:
        if (value := getattr(config, name)) != getattr(DeployConfig, name):
            raise ValueError(
                f"Expected {name} with target=azureml alone. Received: {name}={value!r}, target={config.target!r}"
            )
    if not config.model:
        raise ValueError("Expected model, which is to be served. Received: model=''")
    if config.target in ("docker", "server"):
        hosting.check_name(config.name)
    if config.target == "server":
        hosting.check_port(config.port)


def _deploy_to_azure(config):
    try:
        # Azure's packages are an extra.
        from carflavor.azure.rollout import deploy_to_azure
    except ImportError as error:
        raise ValueError(str(error)) from error
    return deploy_to_azure(config, _find_digest(config.model))


def _free_port(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ValueError(f"Expected port {port} of {_HOST} to be free, got: {error.strerror}") from None
        return probe.getsockname()[1]


def _find_digest(model):
    """Returns the SHA-256 that the registry knows of the manifest of a registered model; an empty text for others."""
    version = find_version(model)
    return version.tags.get(MANIFEST_TAG, "") if version else ""


def _write_server_files(config):
    out, model, digest = _find_out(config), resolve_input(config.model, "model"), _find_digest(config.model)
    hosting.write_server_files(model, out, config.name, config.port, config.workers, digest)
    print(f"Wrote {out}. INSTALL.md there says how to serve it with systemd and nginx", flush=True)


def _build_image(config, has_docker):
    """Builds the image; says so and returns False where there is no engine to do it."""
    out, model, digest = _find_out(config), resolve_input(config.model, "model"), _find_digest(config.model)
    hosting.write_docker_context(model, out, config.name, digest)
    if not has_docker:
        line = f"docker build -t {config.name} {shlex.quote(str(out))}"
        print(f"No Docker engine answers here: wrote the build context alone. Where one runs:  {line}", flush=True)
        return False
    hosting.build_image(out, config.name)
    print(f"Built the image {config.name}. Serve it:  {shlex.join(hosting.docker_run(config.name, 8080))}", flush=True)
    return True


def _find_out(config):
    if config.out:
        return resolve_output(config.out, "out")
    return data_home() / "deploy" / f"{config.name}-{config.target}"


def _serving_locally(model, port, workers):
    command = [sys.executable, "-m", "carflavor.server", "--model", model, "--host", _HOST, "--port", str(port)]
    digest = _find_digest(model)
    return _serving(
        [*command, "--workers", str(workers)],
        MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
        # Also where carflavor is not installed, as in an environment of `mlflow run`.
        PYTHONPATH=os.pathsep.join([str(_PROJECT), os.environ.get("PYTHONPATH", "")]),
        **({"CARFLAVOR_EXPECTED_SHA256": digest} if digest else {}),
    )


@contextlib.contextmanager
def _serving(command, **environment):
    # A session of its own: Ctrl-C is for this process, which then ends the server.
    server = subprocess.Popen(command, start_new_session=True, env={**os.environ, **environment})
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_healthy(server, url):
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ValueError(f"The server ended with exit code {server.returncode} before it was healthy; see above")
        with contextlib.suppress(OSError):
            _open(f"{url}/health")
            return
        time.sleep(0.5)
    raise ValueError(f"The server was not healthy within {_SECONDS_TO_START} s")


def _ask(url, photo, box):
    body = {
        "dataframe_records": [{"image": base64.b64encode(photo).decode(), **dict(zip(BOX_COLUMNS, box, strict=True))}]
    }
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return json.loads(_open(request))
    except urllib.error.HTTPError as error:
        raise ValueError(f"The server answered {error.code}: {error.read(2000).decode(errors='replace')}") from None


def _open(request):
    # No proxy: the server is on this machine, and behind a firewall http_proxy is set.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return response.read()


def _curl_line(url, photo, box):
    path = data_home() / "example.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo)
    corners = "".join(f', "{name}": {value}' for name, value in zip(BOX_COLUMNS, box, strict=True))
    # Through a pipe: as an argument, a photo of more than 96 kB is longer than Linux allows.
    return (
        f"""(printf '{{"dataframe_records": [{{"image": "'; base64 < {shlex.quote(str(path))} | tr -d '\\n'; """
        f"""printf '"{corners}}}]}}') | """
        f"curl -s -H 'Content-Type: application/json' --data-binary @- {url}/invocations"
    )
