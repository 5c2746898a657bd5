"""Real servers for tests: `mlflow models serve` and `carflavor.server`, and a client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    """One that runs.

    Attributes:
        url: Its address.
        process: The `Popen` of the command.
        log: Path of what it prints.
    """

    url: str
    process: subprocess.Popen
    log: Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(url, body=None, headers=None, timeout=60):
    """Returns the status, the text and the headers that the server answers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json"} if headers is None else headers
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=timeout) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def wait_until(condition, seconds=30):
    """Waits until a function returns anything that is true, and returns that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def serving(command, log, cwd, environment, seconds):
    """Context manager of a `Server` that a command of Python starts; `--host` and `--port` are added to it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if request(f"{url}/health")[0] == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield Server(url, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def mlflow_models_serve(model, folder, environment, env_manager="local", seconds=120):
    """Context manager of a `Server` that MLflow starts."""
    command = ["-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", env_manager]
    return serving(command, folder / f"serve-{env_manager}.log", folder, environment, seconds)


def carflavor_server(model, folder, environment, workers=1):
    """Context manager of a `Server` of ours."""
    command = ["-m", "carflavor.server", "--model", str(model), "--workers", str(workers)]
    return serving(command, folder / "server.log", folder, environment, seconds=120)
