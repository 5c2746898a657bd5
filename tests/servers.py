"""Real servers for tests: MLflow's two, `carflavor.server`, Azurite and a web server; and a client."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
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


def mlflow_server(folder, environment):
    """Context manager of a `Server` of MLflow's own, with an sqlite store in a folder."""
    command = ["-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    return serving(command, folder / "mlflow-server.log", folder, environment, seconds=120)


def carflavor_server(model, folder, environment, workers=1):
    """Context manager of a `Server` of ours."""
    command = ["-m", "carflavor.server", "--model", str(model), "--workers", str(workers)]
    return serving(command, folder / "server.log", folder, environment, seconds=120)


@contextlib.contextmanager
def azurite(folder):
    """Yields the connection string of a Blob Storage, by Microsoft's emulator."""
    command = shutil.which("azurite-blob")
    assert command, "azurite-blob is missing: npm install azurite@3.37.0, and put its node_modules/.bin on PATH"
    port, log = free_port(), folder / "azurite.log"
    # The version check: it knows those of its own time, and the SDK may be younger.
    options = ["--blobPort", str(port), "--location", str(folder), "--disableTelemetry", "--skipApiVersionCheck"]
    # The account of every Azurite, as its documentation gives it.
    name = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    endpoint = f"http://127.0.0.1:{port}/{name}"
    with open(log, "w") as file:
        process = subprocess.Popen([command, *options], stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                request(endpoint)
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"DefaultEndpointsProtocol=http;AccountName={name};AccountKey={key};BlobEndpoint={endpoint};"
    finally:
        process.terminate()
        process.wait(60)


class _FolderHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Nothing: what is asked for is no matter of the test."""


@contextlib.contextmanager
def web_server(handler):
    """Yields the URL of a web server.

    Args:
        handler: Path of a folder whose files it has, or a subclass of `http.server.BaseHTTPRequestHandler`.
    """
    if isinstance(handler, Path):
        handler = functools.partial(_FolderHandler, directory=handler)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
