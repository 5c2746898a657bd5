"""What `carflavor.server` has beyond MLflow's: limits, batches, metrics, logs, and an end that loses nothing."""

import base64
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from servers import carflavor_server, free_port, request, serving, wait_until

from carflavor import flavor
from carflavor.image import encode_jpeg

FORMS = "expected a JSON object with one of dataframe_records, dataframe_split, inputs, instances, got "
SMALL_LIMITS = {
    "CARFLAVOR_MAX_BODY_BYTES": "300000",
    "CARFLAVOR_MAX_REQUESTS": "4",
    "CARFLAVOR_MAX_PENDING_BYTES": "500000",
    "CARFLAVOR_MAX_ROWS": "8",
    "CARFLAVOR_MAX_PHOTO_BYTES": "50000",
    "CARFLAVOR_MAX_PHOTO_PIXELS": "10000",
}


@pytest.fixture(scope="module")
def server(openvino_model, tmp_path_factory, clean_environment):
    with carflavor_server(openvino_model, tmp_path_factory.mktemp("server"), clean_environment) as server:
        yield server


@pytest.fixture(scope="module")
def small_server(openvino_model, tmp_path_factory, clean_environment):
    folder = tmp_path_factory.mktemp("small")
    with carflavor_server(openvino_model, folder, clean_environment | SMALL_LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def text(photos):
    return base64.b64encode(encode_jpeg(photos[0])).decode()


@pytest.fixture(scope="module")
def body(text):
    return {"dataframe_records": [{"image": text}]}


def connect(server):
    """A connection on which nothing was sent yet."""
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def head(length):
    return (
        "POST /invocations HTTP/1.1\r\nHost: cars\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def read_answer(connection):
    """Returns the status and the body of the next answer on a connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    header, _, content = received.partition(b"\r\n\r\n")
    length = int(header.lower().partition(b"content-length:")[2].split()[0])
    while len(content) < length:
        content += connection.recv(65536)
    return int(header.split()[1]), json.loads(content)


def metric(server, name):
    lines = request(f"{server.url}/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def log_lines(server):
    """The events that the server has logged; that of a request comes after its answer."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_routes_are_those_of_mlflow_and_metrics(server):
    assert request(f"{server.url}/ping")[:2] == (200, "\n")
    assert request(f"{server.url}/version")[0] == 200
    assert request(f"{server.url}/nothing")[0] == 404
    assert request(f"{server.url}/invocations")[0] == 405
    status, text, headers = request(f"{server.url}/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    assert "# TYPE carflavor_request_seconds histogram" in text


def test_tensorflow_is_not_loaded(server):
    with open(f"/proc/{server.process.pid}/maps") as maps:
        assert "libtensorflow" not in maps.read()


@pytest.mark.parametrize(
    ("sent", "headers", "status", "message"),
    [
        (b"{", None, 400, "expected a JSON object, got a body that is no JSON: "),
        ({"nonsense": 1}, None, 400, FORMS + "none of them"),
        (b"image\nYQ==\n", {"Content-Type": "text/csv"}, 415, "expected a body with the Content-Type application/json"),
        (b"PAR1", {"Content-Type": "application/vnd.apache.parquet"}, 415, "expected a body with the Content-Type"),
        (b"{}", {"Content-Type": ""}, 415, "expected a body with the Content-Type application/json in UTF-8"),
        (b"{}", {"Content-Type": "application/json; charset=latin-1"}, 415, "expected a body with the Content-Type"),
        (
            b"{}",
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            415,
            "expected a body without Content-Encoding",
        ),
        ({"inputs": [{"photo": "YQ=="}]}, None, 400, "Model is missing inputs ['image']"),
        (
            {"inputs": [{"image": "YQ=="}], "params": {"top_k": "x"}},
            None,
            400,
            "Can not safely convert `<class 'str'>` to `DataType.long` for value `x`",
        ),
        ({"inputs": [{"image": "YQ=="}], "params": {"on_error": "x" * 500}}, None, 400, "got 'xxxx"),
    ],
)
def test_errors_are_a_sentence_that_repeats_nothing(server, sent, headers, status, message):
    got, text, _ = request(f"{server.url}/invocations", sent, headers)
    answer = json.loads(text)
    assert (got, set(answer)) == (status, {"error_code", "message"})
    assert message in answer["message"]
    assert len(answer["message"]) < 400


def test_request_ids(server, body):
    url = f"{server.url}/invocations"
    given = request(url, body, {"Content-Type": "application/json", "X-Request-ID": "abc-123.x"})
    assert given[2]["X-Request-ID"] == "abc-123.x"
    made = request(url, body, {"Content-Type": "application/json", "X-Request-ID": "no id at all!"})
    other = request(url, body, {"Content-Type": "application/json"})
    assert re.fullmatch(r"[0-9a-f]{12}-\d+", made[2]["X-Request-ID"])
    assert made[2]["X-Request-ID"] != other[2]["X-Request-ID"]


def test_log_has_each_request_and_no_photo(server, body, text):
    request(f"{server.url}/invocations", body, {"Content-Type": "application/json", "X-Request-ID": "find-me"})
    bad = {"dataframe_records": [{"image": text[:-40] + "!" * 40}]}
    request(f"{server.url}/invocations", bad, {"Content-Type": "application/json", "X-Request-ID": "find-me-too"})

    def find(request_id):
        return next((line for line in log_lines(server) if line.get("request_id") == request_id), None)

    assert wait_until(lambda: find("find-me-too"))["status"] == 400
    found = find("find-me")
    assert (found["event"], found["status"], found["photos"]) == ("request", 200, 1)
    assert found["bytes"] == len(json.dumps(body)) and found["ms"] > 0 and found["time"].endswith("+00:00")
    assert text[:40] not in server.log.read_text()


def test_metrics_count_requests_photos_and_batches(server, body, text):
    names = ('carflavor_requests_total{status="200"}', 'carflavor_requests_total{status="400"}')
    names += ("carflavor_photos_total", "carflavor_batch_photos_sum", "carflavor_request_seconds_count")
    before = [metric(server, name) for name in names]
    request(f"{server.url}/invocations", {"inputs": {"image": [text] * 3}})
    request(f"{server.url}/invocations", {"inputs": {"image": ["!"] * 3}})
    assert [metric(server, name) - value for name, value in zip(names, before, strict=True)] == [1, 1, 3, 3, 2]
    assert metric(server, "carflavor_pending_requests") == 0


def test_callers_with_one_photo_each_are_answered_in_batches(server, body):
    before = metric(server, "carflavor_batch_photos_count"), metric(server, "carflavor_batch_photos_sum")
    expected = json.loads(request(f"{server.url}/invocations", body)[1])["predictions"][0]["label"]
    labels = []

    def call():
        for _ in range(20):
            labels.append(json.loads(request(f"{server.url}/invocations", body)[1])["predictions"][0]["label"])

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    batches = metric(server, "carflavor_batch_photos_count") - before[0]
    assert metric(server, "carflavor_batch_photos_sum") - before[1] == 161
    assert labels == [expected] * 160
    assert batches < 161


def test_a_wish_for_another_protocol_is_ignored_wherever_its_bytes_are_cut(server, body):
    """As Java's client sends it for HTTP/2; on one connection, after the heads of others."""
    content = json.dumps(body).encode()
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nupGrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    sent = head(len(content))[:-2] + wish + content
    start = sent.index(b"upGrade")
    cuts = [[cut] for cut in range(start - 3, start + 12)] + [list(range(1, len(sent) - len(content) + 1))]
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for ends in cuts:
            for first, last in itertools.pairwise([0, *ends, len(sent)]):
                connection.sendall(sent[first:last])
                time.sleep(0.01)  # so that the server reads it by itself
            status, answer = read_answer(connection)
            assert (status, list(answer)) == (200, ["predictions"]), (ends, answer)
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: cars\r\n\r\n")
            assert read_answer(connection)[0] == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_while_it_is_read(small_server, declared):
    with connect(small_server) as connection:
        if declared:
            connection.sendall(head(10**12))
        else:
            start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            connection.sendall(start + b"7a120\r\n" + b" " * 310_000)  # the first of 500,000 bytes
        assert read_answer(connection) == (
            413,
            {
                "error_code": "INVALID_PARAMETER_VALUE",
                "message": "expected a request of at most 300,000 bytes, got more",
            },
        )


def test_more_requests_than_it_takes_are_refused_at_once(small_server, body):
    waiting = [connect(small_server) for _ in range(4)]
    try:
        for connection in waiting:
            connection.sendall(head(100) + b" ")  # and the rest does not come
        wait_until(lambda: metric(small_server, "carflavor_pending_requests") == 4)
        started = time.monotonic()
        status, text, headers = request(f"{small_server.url}/invocations", body)
        assert (status, headers["Retry-After"], time.monotonic() - started < 1) == (503, "1", True)
        assert json.loads(text) == {
            "error_code": "TEMPORARILY_UNAVAILABLE",
            "message": "expected at most 4 requests at once: try again",
        }
        assert request(f"{small_server.url}/health")[0] == 200
    finally:
        for connection in waiting:
            connection.close()
    wait_until(lambda: metric(small_server, "carflavor_pending_requests") == 0)
    assert request(f"{small_server.url}/invocations", body)[0] == 200


def test_requests_that_are_too_large_together_are_refused(small_server):
    with connect(small_server) as first, connect(small_server) as second:
        for connection in (first, second):
            connection.sendall(head(290_000) + b" " * 280_000)
        # The one whose part comes last.
        ((refused,), _, _) = select.select([first, second], [], [], 30)
        status, answer = read_answer(refused)
    assert (status, answer["message"]) == (503, "expected fewer or smaller requests at once: try again")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "YQ=="}] * 9, "expected at most 8 photos in a request, got 9"),
        ([{"image": "A" * 100_004}], "row 0: expected a photo of at most 50,000 bytes, got "),
        ([{"image": "A" * 80_000}], "row 0: expected a photo of at most 50,000 bytes, got 60,000"),
    ],
)
def test_limits_of_rows_and_bytes(small_server, rows, message):
    status, text, _ = request(f"{small_server.url}/invocations", {"dataframe_records": rows})
    assert status == 400
    assert message in json.loads(text)["message"]


def test_limit_of_pixels(small_server, photos):
    large = base64.b64encode(encode_jpeg(photos[0].repeat(9, axis=0).repeat(9, axis=1), quality=20)).decode()
    status, text, _ = request(f"{small_server.url}/invocations", {"inputs": [{"image": large}]})
    assert status == 400
    assert "row 0: expected a photo of at most 10,000 pixels, got one of " in json.loads(text)["message"]


def test_sigterm_answers_what_was_taken(openvino_model, tmp_path, clean_environment, body):
    """Under load: each request ends in an answer, or never reached the server."""
    with carflavor_server(openvino_model, tmp_path, clean_environment) as server:
        statuses, lost = [], []
        stop = threading.Event()

        def call():
            while not stop.is_set():
                try:
                    statuses.append(request(f"{server.url}/invocations", body)[0])
                except OSError as error:
                    # Refused when the server was gone already is not lost; an answer that broke off is.
                    if not isinstance(getattr(error, "reason", error), (ConnectionRefusedError, ConnectionResetError)):
                        lost.append(repr(error))
                    return

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(30) == 0
        stop.set()
        for thread in threads:
            thread.join(60)
        logged = [line["status"] for line in log_lines(server) if line["event"] == "request"]
    assert lost == []
    assert set(statuses) == {200} and len(statuses) > 20
    assert logged == [200] * len(statuses)


def test_sigterm_waits_for_a_body_that_is_being_sent(openvino_model, tmp_path, clean_environment, body):
    content = json.dumps(body).encode()
    with carflavor_server(openvino_model, tmp_path, clean_environment) as server, connect(server) as connection:
        connection.sendall(head(len(content)) + content[:-5])
        wait_until(lambda: metric(server, "carflavor_pending_requests") == 1)
        os.kill(server.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(content[-5:])
        status, answer = read_answer(connection)
        assert (status, list(answer)) == (200, ["predictions"])
        assert server.process.wait(30) == 0


SERVER_WITH_AN_ENGINE_THAT_HANGS = """
import time
from carflavor import engines, server

answer, calls = engines.OpenVinoEngine.__call__, []

def hang_after_warming_up(self, photos):
    calls.append(1)
    if len(calls) > server.LARGEST_BATCH + 1:
        time.sleep(600)
    return answer(self, photos)

engines.OpenVinoEngine.__call__ = hang_after_warming_up
server._SECONDS_BETWEEN_CHECKS = 600
server._SECONDS_TO_DRAIN = 1
server.main()
"""


@pytest.mark.parametrize(("count", "exit_code"), [(1, 0), (2, 1)])
def test_an_engine_that_hangs_is_told_and_does_not_hold_up_the_end(
    openvino_model, tmp_path, clean_environment, text, count, exit_code
):
    """Two photos wait in a thread of Python's, which it would join."""
    content = json.dumps({"inputs": {"image": [text] * count}}).encode()
    command = ["-c", SERVER_WITH_AN_ENGINE_THAT_HANGS, "--model", str(openvino_model)]
    environment = clean_environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with (
        serving(command, tmp_path / "server.log", tmp_path, environment, seconds=120) as server,
        connect(server) as connection,
    ):
        connection.sendall(head(len(content)) + content)
        wait_until(lambda: metric(server, "carflavor_pending_requests") == 1)
        os.kill(server.process.pid, signal.SIGTERM)
        status, answer = read_answer(connection)
        assert (status, answer["message"]) == (503, "the server is ending: try again")
        assert server.process.wait(30) == exit_code
    assert [line["status"] for line in log_lines(server) if line["event"] == "request"] == [503]


def test_what_nobody_waits_for_any_more_is_not_worked_on(openvino_model, tmp_path, clean_environment, body):
    """A request that takes minutes, of which one second is given."""
    # No JPEG, of which an eighth of each side would be decoded.
    large = base64.b64encode(cv2.imencode(".png", np.full((4900, 5000, 3), 100, np.uint8))[1]).decode()
    environment = clean_environment | {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "1"}
    with carflavor_server(openvino_model, tmp_path, environment) as server:
        rows = [{"image": large}] * (20_000_000 // len(large))
        status, text, _ = request(f"{server.url}/invocations", {"inputs": rows[:250]})
        assert (status, json.loads(text)["message"]) == (503, "the request was not answered in time: try again")
        wait_until(lambda: metric(server, "carflavor_pending_requests") == 0, seconds=10)
        assert request(f"{server.url}/invocations", body)[0] == 200


def find_workers(server):
    parent = server.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_worker_that_was_killed_has_nothing_pending(openvino_model, tmp_path, clean_environment):
    with carflavor_server(openvino_model, tmp_path, clean_environment, workers=2) as server, connect(server) as caller:
        caller.sendall(head(100) + b" ")
        wait_until(lambda: metric(server, "carflavor_pending_requests") == 1)
        killed = find_workers(server)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pending_of_those_that_answer(server) == 0, seconds=60)
        assert {f"Child process [{pid}] died" for pid in killed} <= {line["event"] for line in log_lines(server)}


def test_a_worker_that_is_busy_for_seconds_is_not_killed(openvino_model, tmp_path, clean_environment, body):
    """As where the machine swaps or a decoder holds Python's lock: uvicorn gives it 5 s unless it is told."""
    with carflavor_server(openvino_model, tmp_path, clean_environment, workers=2) as server:
        workers = find_workers(server)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6.5)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert request(f"{server.url}/invocations", body)[0] == 200
        time.sleep(1)  # twice as long as uvicorn waits between two looks at them
        assert find_workers(server) == workers


def pending_of_those_that_answer(server):
    try:
        return metric(server, "carflavor_pending_requests")
    except OSError:
        return None  # nobody, until they are started again


def test_workers_that_the_environment_names_are_not_heeded(openvino_model, tmp_path, clean_environment):
    with carflavor_server(openvino_model, tmp_path, clean_environment | {"WEB_CONCURRENCY": "4"}) as server:
        assert request(f"{server.url}/ping")[0] == 200


def test_worker_processes_share_their_metrics(openvino_model, tmp_path, clean_environment, body):
    with carflavor_server(openvino_model, tmp_path, clean_environment, workers=2) as server:
        sent = 0
        while len({line["process"] for line in log_lines(server) if line["event"] == "request"}) < 2:
            assert request(f"{server.url}/invocations", body)[0] == 200
            sent += 1
            assert sent < 1000  # the system chooses who takes a connection
        wait_until(lambda: metric(server, 'carflavor_requests_total{status="200"}') == sent)
        wait_until(lambda: metric(server, "carflavor_pending_requests") == 0)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CARFLAVOR_EXPECTED_SHA256": "00"}, "expected a manifest.json with the SHA-256 00, got "),
        ({"CARFLAVOR_MAX_ROWS": "none"}, "expected CARFLAVOR_MAX_ROWS to be a whole number of at least 1, got 'none'"),
        ({"CARFLAVOR_ENGINE": "onnx"}, "expected engine to be one of keras, openvino, got 'onnx'"),
    ],
)
def test_it_says_in_a_sentence_why_it_does_not_start(
    openvino_model, tmp_path, clean_environment, changes, message, workers
):
    command = [sys.executable, "-m", "carflavor.server", "--model", openvino_model, "--port", str(free_port())]
    command += ["--workers", str(workers)]
    process = subprocess.run(
        command, cwd=tmp_path, env=clean_environment | changes, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("Error: ") and message in process.stderr
    assert "Traceback" not in process.stderr


def test_it_serves_the_model_that_is_demanded(openvino_model, tmp_path, clean_environment, body):
    digest = flavor.manifest_sha256(openvino_model)
    environment = clean_environment | {"CARFLAVOR_EXPECTED_SHA256": digest}
    with carflavor_server(openvino_model, tmp_path, environment) as server:
        assert request(f"{server.url}/invocations", body)[0] == 200
