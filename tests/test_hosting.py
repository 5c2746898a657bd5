"""What `deploy` writes for a server and for Docker, checked by systemd's and nginx's own tools and run behind nginx."""

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from functools import partial

import mlflow
import pytest
from conftest import CLASS_NAMES
from servers import carflavor_server, free_port, request

from carflavor import flavor
from carflavor.deploy import DeployConfig, deploy
from carflavor.hosting import write_docker_context, write_server_files
from carflavor.image import encode_jpeg
from carflavor.locking import lock

MISSING = "{} is missing: apt-get install {}"


def write_server(model, out, **changes):
    deploy(DeployConfig(str(model), target="server", **{"name": "cars", "port": 5055, "out": str(out), **changes}))
    return out


@pytest.fixture
def written(store, openvino_model, tmp_path, monkeypatch):
    """What is written for a server of small requests."""
    monkeypatch.setenv("CARFLAVOR_MAX_BODY_BYTES", "60000")
    monkeypatch.setenv("CARFLAVOR_MAX_ROWS", "16")
    return write_server(openvino_model, tmp_path / "out", workers=2)


def run_systemd_analyze(*arguments):
    command = shutil.which("systemd-analyze")
    assert command, MISSING.format("systemd-analyze", "systemd")
    environment = {**os.environ, "SYSTEMD_COLORS": "0", "SYSTEMD_EMOJI": "0"}
    found = subprocess.run([command, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    return found.returncode, found.stdout + found.stderr


def find_nginx():
    command = shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
    assert command, MISSING.format("nginx", "nginx")
    return command


def write_nginx_conf(site, folder, port):
    """Writes a whole configuration around a site, as a distribution has one, with all its files in a folder."""
    folder.mkdir()
    (folder / "site.conf").write_text(site.replace("listen 80;", f"listen 127.0.0.1:{port};"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {paths} include {folder}/site.conf; }}\n"
    )
    return ["-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def test_files_for_a_server(store, openvino_model, written, capsys):
    assert sorted(path.name for path in written.iterdir()) == [
        "INSTALL.md",
        "cars.conf",
        "cars.service",
        "model",
        "requirements.txt",
    ]
    assert (written / "model" / "manifest.json").read_bytes() == (openvino_model / "manifest.json").read_bytes()
    unit = (written / "cars.service").read_text().splitlines()
    digest = flavor.manifest_sha256(openvino_model)
    home = f"/opt/cars/{digest[:12]}"
    assert (
        f"ExecStart={home}/venv/bin/python -m carflavor.server --model {home}/model --host 127.0.0.1 --port 5055 "
        "--workers 2"
    ) in unit
    assert [line for line in unit if line.startswith("Environment=")] == [
        f"Environment=PYTHONPATH={home}/model/code PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 "
        "HOME=/tmp",
        f"Environment=CARFLAVOR_EXPECTED_SHA256={digest}",
        "Environment=CARFLAVOR_MAX_PHOTO_BYTES=16000000",
        "Environment=CARFLAVOR_MAX_PHOTO_PIXELS=25000000",
        "Environment=CARFLAVOR_MAX_ROWS=16",
        "Environment=CARFLAVOR_MAX_BODY_BYTES=60000",
        "Environment=CARFLAVOR_MAX_REQUESTS=128",
        "Environment=CARFLAVOR_MAX_PENDING_BYTES=256000000",
        "Environment=MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT=60",
    ]
    assert {"MemoryMax=6G", "DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"} <= set(unit)
    site = (written / "cars.conf").read_text()
    for line in ("client_max_body_size 60000;", "client_body_timeout 30s;", "proxy_read_timeout 65s;"):
        assert f"    {line}\n" in site
    assert "server 127.0.0.1:5055 max_fails=0;" in site
    assert f"sudo python3.11 -m venv {home}/venv\n" in (written / "INSTALL.md").read_text()
    requirements = (written / "requirements.txt").read_text()
    assert f"mlflow-skinny=={mlflow.__version__}\n" in requirements and "\nmlflow==" not in f"\n{requirements}"
    (run,) = store.search_runs(["0"])
    assert run.info.status == "FINISHED"


STAND_INS = {
    "sudo": 'exec "$@"',
    "python3.11": "mkdir -p $3/bin && cp $PIP $3/bin/pip",
    "pip": "exit ${PIP_FAILS:-0}",
    "systemctl": 'echo "$@" >> $ASKED',
    "nginx": "",
    "curl": "",
}


@pytest.fixture
def run_install(tmp_path):
    """Runs blocks of commands of INSTALL.md, in a folder in place of `/`; returns what systemctl was asked."""
    for name, script in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    for folder in ("opt", "etc/systemd/system", "etc/nginx/conf.d"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "PIP": f"{tmp_path}/bin/pip",
        "ASKED": f"{tmp_path}/asked",
    }

    def run(folder, blocks, **variables):
        commands = re.findall(r"```bash\n(.*?)```", (folder / "INSTALL.md").read_text(), re.DOTALL)[blocks]
        text = re.sub(r"(?<= )/(opt|etc)/", rf"{tmp_path}/root/\1/", "".join(commands))
        (tmp_path / "asked").write_text("")
        subprocess.run(["bash", "-c", text], cwd=folder, env=environment | variables, timeout=60)
        return (tmp_path / "asked").read_text().splitlines()

    return run


def test_a_new_model_is_installed_beside_the_one_that_serves(
    store, openvino_model, packed_model, tmp_path, run_install
):
    out, etc, opt = tmp_path / "out", tmp_path / "root" / "etc", tmp_path / "root" / "opt" / "cars"
    first, second = (flavor.manifest_sha256(model)[:12] for model in (openvino_model, packed_model))
    started = ["daemon-reload", "enable cars", "restart cars"]
    assert run_install(write_server(openvino_model, out), slice(0, 2)) == [*started, "reload nginx"]
    unit, site = etc / "systemd" / "system" / "cars.service", etc / "nginx" / "conf.d" / "cars.conf"
    assert f"--model /opt/cars/{first}/model " in unit.read_text()
    assert (opt / first / "model" / "MLmodel").is_file() and (opt / first / "venv" / "bin").is_dir()
    site.write_text(site.read_text().replace("server_name _;", "server_name cars.example;"))
    # The packages cannot be had: all is as it was.
    assert run_install(write_server(packed_model, out), slice(0, 1), PIP_FAILS="1") == []
    assert f"--model /opt/cars/{first}/model " in unit.read_text()
    with open(opt / first / "model" / "engine" / "network.bin") as weights:
        assert run_install(out, slice(0, 1)) == started
        assert f"--model /opt/cars/{second}/model " in unit.read_text()
        assert "server_name cars.example;" in site.read_text() and os.fstat(weights.fileno()).st_nlink == 1
        # The same model with other limits: what a server has open is not written over.
        assert run_install(write_server(openvino_model, out), slice(0, 1)) == started
        assert os.fstat(weights.fileno()).st_nlink == 0


def test_another_user_can_read_what_was_written(openvino_model, store, tmp_path):
    shutil.copytree(openvino_model, tmp_path / "private")
    (tmp_path / "private").chmod(0o700)
    (tmp_path / "private" / "classes.json").chmod(0o600)
    out = write_server(tmp_path / "private", tmp_path / "out")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_dir()}
    assert modes == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()} == {0o644}


def test_systemd_takes_the_unit(written, tmp_path):
    text = (written / "cars.service").read_text()
    # It looks for the program.
    program = tmp_path / re.search("ExecStart=/(opt/.*?/python) ", text)[1].replace("opt/cars", "opt")
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    unit = tmp_path / "cars.service"
    unit.write_text(text.replace("/opt/cars", str(tmp_path / "opt")))
    assert run_systemd_analyze("verify", "--man=no", str(unit)) == (0, "")
    # From 0, safe, to 10.
    code, said = run_systemd_analyze("security", "--offline=true", "--no-pager", "--threshold=15", str(unit))
    assert code == 0, said
    exposure = float(re.search(r"Overall exposure level for cars.service: ([\d.]+)", said)[1])
    assert exposure <= 1.5
    # It would have said so.
    for right, wrong, complaint in [
        ("DynamicUser=yes", "DynamicUser=perhaps", "Failed to parse boolean value: perhaps"),
        ("MemoryMax=", "MemoryMost=", "'MemoryMost'"),
    ]:
        unit.write_text(text.replace("/opt/cars", str(tmp_path / "opt")).replace(right, wrong))
        assert complaint in run_systemd_analyze("verify", "--man=no", str(unit))[1]


def test_nginx_takes_the_site(written, tmp_path):
    site = (written / "cars.conf").read_text()
    arguments = write_nginx_conf(site, tmp_path / "nginx", free_port())
    found = subprocess.run([find_nginx(), "-t", *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stderr.splitlines() if "[warn]" in line] == []
    arguments = write_nginx_conf(site.replace("keepalive 32;", "keepalife 32;"), tmp_path / "wrong", free_port())
    found = subprocess.run([find_nginx(), "-t", *arguments], capture_output=True, text=True)
    assert found.returncode == 1 and 'unknown directive "keepalife"' in found.stderr


@contextlib.contextmanager
def nginx(site, folder):
    """Yields the address of a real nginx with a site."""
    port = free_port()
    process = subprocess.Popen([find_nginx(), *write_nginx_conf(site, folder, port)])
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                request(f"http://127.0.0.1:{port}/health")
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def test_nginx_before_the_server(written, openvino_model, photos, tmp_path, clean_environment):
    """The written site before a real server with the written unit's variables."""
    unit = (written / "cars.service").read_text()
    lines = re.findall("^Environment=(.*)$", unit, re.MULTILINE)
    variables = dict(pair.split("=", 1) for line in lines for pair in line.split())
    # As the unit has it: the code that runs is the model's.
    environment = {**clean_environment, **variables, "PYTHONPATH": str(written / "model" / "code")}
    text = base64.b64encode(encode_jpeg(photos[0])).decode()
    body = {"dataframe_records": [{"image": text}]}
    with carflavor_server(written / "model", tmp_path, environment) as server:
        port = server.url.rpartition(":")[2]
        site = (written / "cars.conf").read_text().replace("127.0.0.1:5055", f"127.0.0.1:{port}")
        with nginx(site, tmp_path / "nginx") as url:
            direct, through = (request(f"{address}/invocations", body) for address in (server.url, url))
            assert through[:2] == direct[:2] and through[0] == 200
            assert json.loads(through[1])["predictions"][0]["label"] in CLASS_NAMES
            # A caller's id is kept, and what is none becomes one of nginx's.
            sent = {"Content-Type": "application/json", "X-Request-ID": "order-7"}
            assert request(f"{url}/invocations", body, sent)[2]["X-Request-ID"] == "order-7"
            found = request(f"{url}/invocations", body, {**sent, "X-Request-ID": "a b"})[2]["X-Request-ID"]
            assert re.fullmatch("[0-9a-f]{32}", found)
            # Both refuse the same bytes with the same words: the largest body goes through, one more does not.
            small = json.dumps(body).encode()
            assert request(f"{url}/invocations", small.ljust(60_000))[0] == 200
            refused = [request(f"{address}/invocations", small.ljust(60_001))[:2] for address in (server.url, url)]
            assert refused[0][0] == refused[1][0] == 413
            assert json.loads(refused[0][1]) == json.loads(refused[1][1])
            assert request(f"{url}/nothing")[0] == 404
            assert "carflavor_requests_total" in request(f"{url}/metrics")[1]
            # Idle for longer than the server keeps a connection.
            time.sleep(5.5)
            assert request(f"{url}/invocations", body)[0] == 200
            server.process.terminate()
            server.process.wait(40)
            status, said, headers = request(f"{url}/invocations", body)
            assert (status, headers["Retry-After"]) == (503, "5")
            assert json.loads(said) == {
                "error_code": "TEMPORARILY_UNAVAILABLE",
                "message": "the server does not answer: try again",
            }


def test_a_folder_is_written_anew_and_others_are_left_alone(store, openvino_model, packed_model, tmp_path):
    out = write_server(packed_model, tmp_path / "out")
    assert not (out / "model" / "engine").exists()
    (out / ".deploy" / "new" / "model").mkdir(parents=True)  # as a call leaves it that was killed
    write_server(openvino_model, out)
    assert (out / "model" / "engine" / "network.xml").is_file()
    assert len(list(out.iterdir())) == 5
    with lock(out / ".deploy" / "lock", ""), pytest.raises(ValueError, match=f"^Another process writes {out}$"):
        write_server(packed_model, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError) as error:
        write_server(packed_model, out)
    assert str(error.value) == f"out: expected an empty folder, or one of an earlier deploy, got {out} with notes.txt"
    assert (out / "model" / "engine" / "network.xml").is_file()


@pytest.mark.parametrize("write", [write_docker_context, partial(write_server_files, port=5055, workers=1)])
def test_what_is_called_like_ours_and_is_another_hand_s_is_left_alone(openvino_model, tmp_path, write):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights.bin").write_text("mine")
    message = f"^out: expected an empty folder, or one of an earlier deploy, got {out} with "
    with pytest.raises(ValueError, match=f"{message}model$"):
        write(openvino_model, out, "cars")
    for name in ("Dockerfile", "cars.service", "requirements.txt"):
        (out / name).write_text("FROM scratch\n")
        with pytest.raises(ValueError, match=message):
            write(openvino_model, out, "cars")
        assert (out / name).read_text() == "FROM scratch\n"
        (out / name).unlink()
    assert (out / "model" / "weights.bin").read_text() == "mine"


@pytest.mark.parametrize("write", [write_docker_context, partial(write_server_files, port=5055, workers=1)])
def test_a_deploy_that_was_killed_has_another_one_go_on(openvino_model, tmp_path, monkeypatch, write):
    replace, moved = os.replace, []

    def be_killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", be_killed)
    with pytest.raises(KeyboardInterrupt):
        write(openvino_model, tmp_path / "out", "cars")
    monkeypatch.setattr(os, "replace", replace)
    write(openvino_model, tmp_path / "out", "cars")
    assert (tmp_path / "out" / "model" / "MLmodel").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 0}, "Expected port to be a number that nginx can be told. Received: port=0"),
        (
            {"name": "Cars"},
            "Expected name to be of at most 63 lower-case letters, digits and hyphens, the first one a letter and the "
            "last one no hyphen. Received: name='Cars'",
        ),
        ({"name": "a;b"}, "Received: name='a;b'"),
        ({"name": "cars-"}, "Received: name='cars-'"),
        ({"name": "-cars"}, "Received: name='-cars'"),
    ],
)
def test_what_no_server_can_be_told(openvino_model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_server_files(openvino_model, tmp_path / "out", **{"name": "cars", "port": 5055, "workers": 1, **changes})
    assert not (tmp_path / "out").exists()


def test_a_folder_within_the_model_is_refused(openvino_model, tmp_path):
    shutil.copytree(openvino_model, tmp_path / "model")
    out = tmp_path / "model" / "server"
    with pytest.raises(ValueError, match=f"^out: expected a folder outside the model {tmp_path}/model, got {out}/"):
        write_server_files(tmp_path / "model", out, "cars", 5055, 1)
    assert list(out.iterdir()) == []


def test_a_model_that_the_registry_does_not_know_is_not_written(store, openvino_model, tmp_path):
    with mlflow.start_run() as run:
        mlflow.log_artifacts(openvino_model, "model")
    mlflow.register_model(f"runs:/{run.info.run_id}/model", "cars", tags={"carflavor_manifest_sha256": "0" * 64})
    with pytest.raises(mlflow.MlflowException, match="expected a manifest.json with the SHA-256 0000000000"):
        write_server("models:/cars/1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("client", [True, False])
def test_docker_without_an_engine(store, openvino_model, tmp_path, monkeypatch, capsys, client):
    """Docker's real client, where it is installed, without an engine; and no client at all."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    if not client:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert deploy(DeployConfig(str(openvino_model), target="docker", name="cars")) is None
    context = tmp_path / "home" / "deploy" / "cars-docker"
    assert capsys.readouterr().out == (
        "No Docker engine answers here: wrote the build context alone. Where one runs:  "
        f"docker build -t cars {context}\n"
    )
    assert sorted(path.name for path in context.iterdir()) == ["Dockerfile", "model", "requirements.txt"]
    assert flavor.read_manifest(context / "model")["engine"]["name"] == "openvino"


@pytest.mark.parametrize(
    "line",
    [
        "cars @ https://example.com/cars-1.0-py3-none-any.whl",
        "https://example.com/cars.zip",
        "git+https://example.com/cars",
        "--index-url https://example.com/simple",
        "-r others.txt",
        "-e .",
        "./cars",
        "model/code",
        "numpy==2.2.0 --hash=sha256:00",
        "numpy==2.2.0 \\",
        "numpy==${VERSION}",
        "numpy=2",
    ],
)
def test_what_is_installed_are_packages_of_an_index(openvino_model, tmp_path, line):
    """requirements.txt is under no digest: who may write where models lie may write there."""
    model = tmp_path / "model"
    shutil.copytree(openvino_model, model)
    number = len((model / "requirements.txt").read_text().splitlines()) + 1
    with open(model / "requirements.txt", "a") as file:
        file.write(f"\n{line}\n")
    for write in (write_docker_context, partial(write_server_files, port=5055, workers=1)):
        with pytest.raises(ValueError) as error:
            write(model, tmp_path / "out", "cars")
        assert str(error.value).startswith("requirements.txt of the model: expected packages as name==version, ")
        assert f"got line {number}: " in str(error.value) and repr(line) in str(error.value)
        assert not (tmp_path / "out").exists()


def test_requirements_of_a_user_s_own_are_written(openvino_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(openvino_model, model)
    (model / "requirements.txt").write_text(
        "# mine\nmlflow==3.15.0\n\npillow-heif>=1.8.1,<2  # HEIC\nuvicorn[standard]\nnumpy==2.2.0; python_version < '4'"
    )
    write_docker_context(model, tmp_path / "out", "cars")
    assert (tmp_path / "out" / "requirements.txt").read_text() == (
        'mlflow-skinny==3.15.0\npillow-heif<2,>=1.8.1\nuvicorn[standard]\nnumpy==2.2.0; python_version < "4"\n'
    )


@pytest.mark.parametrize(
    "python", ["'3.11-slim AS packages\\nRUN curl example.com'", "3", "[3.11]", "'3.11\n\n'", "''"]
)
def test_what_is_no_python_is_not_written(openvino_model, tmp_path, python):
    model = tmp_path / "model"
    shutil.copytree(openvino_model, model)
    (model / "python_env.yaml").write_text(f"python: {python}\n".replace("'3.11-", '"3.11-').replace("com'", 'com"'))
    with pytest.raises(ValueError, match=r"^python_env.yaml of the model: expected a version of Python as 3.11, got "):
        write_docker_context(model, tmp_path / "out", "cars")
    assert not (tmp_path / "out").exists()


def test_the_image_has_the_python_of_the_model(openvino_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(openvino_model, model)
    (model / "python_env.yaml").write_text("python: '3.12'\n")
    write_docker_context(model, tmp_path / "out", "cars")
    lines = (tmp_path / "out" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith(("FROM", "USER", "HEALTHCHECK"))] == [
        "FROM python:3.12-slim AS packages",
        "FROM python:3.12-slim",
        "USER 10001:10001",
        "HEALTHCHECK --interval=15s --timeout=6s --start-period=60s \\",
    ]
    assert "#     docker build -t cars ." in lines
    assert [line for line in lines if "{{" in line or "}}" in line] == []


# An engine cannot be had in tests. What a container would run is run without one, from what the image would hold.
DOCKER = """#!{python}
import json, os, pathlib, sys
folder, arguments = pathlib.Path({folder!r}), sys.argv[1:]
with open(folder / "asked", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if arguments[0] == "build":
    (folder / "context").symlink_to(arguments[-1])
    sys.exit(int(os.environ.get("BUILD_FAILS", "0")))
if arguments[0] == "run":
    model = (folder / "context").resolve() / "model"
    os.environ["PYTHONPATH"] = str(model / "code")
    port = arguments[arguments.index("--publish") + 1].split(":")[1]
    command = ["-m", "carflavor.server", "--model", str(model), "--host", "127.0.0.1", "--port", port]
    os.execv({python!r}, [{python!r}, *command])
"""


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """Stands in for Docker; returns a function that tells what it was asked."""
    folder = tmp_path / "docker"
    folder.mkdir()
    (folder / "docker").write_text(DOCKER.format(python=sys.executable, folder=str(folder)))
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return lambda: [json.loads(line) for line in (folder / "asked").read_text().splitlines()]


def test_docker_builds_runs_and_asks(store, openvino_model, docker, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example")
    out, port = str(tmp_path / "out"), free_port()
    config = DeployConfig(str(openvino_model), target="docker", name="cars", out=out, port=port, keep=False)
    assert deploy(config)["predictions"][0]["label"] in CLASS_NAMES
    run = "run --rm --read-only --tmpfs /tmp --memory 3g --stop-timeout 40 --publish"
    assert docker() == [
        ["version", "--format", "{{.Server.Version}}"],
        ["build", "--build-arg", "PIP_INDEX_URL", "--tag", "cars", out],
        [*run.split(), f"127.0.0.1:{port}:8080", "cars"],
    ]
    output = capfd.readouterr().out
    assert f"Built the image cars. Serve it:  docker {run} 127.0.0.1:8080:8080 cars\n" in output
    assert "A photo of Aurora Hatchback 2011 is answered with" in output
    with pytest.raises(OSError):
        request(f"http://127.0.0.1:{port}/health")


def test_docker_with_a_port_that_is_taken_builds_nothing(store, docker, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"^Expected port {port} of 127.0.0.1 to be free"):
            deploy(DeployConfig("models:/nothing/1", target="docker", port=port, out=str(tmp_path / "out")))
    assert [words[0] for words in docker()] == ["version"]
    assert not (tmp_path / "out").exists()


def test_docker_that_fails_to_build(store, openvino_model, docker, tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_FAILS", "2")
    with pytest.raises(ValueError, match="^docker build ended with exit code 2; see above$"):
        deploy(DeployConfig(str(openvino_model), target="docker", name="cars", out=str(tmp_path / "out")))
    assert [words[0] for words in docker()] == ["version", "build"]
