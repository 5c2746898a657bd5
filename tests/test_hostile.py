"""What hostile callers are answered, and what others have of them. The requests stand in `hostile.py`."""

import contextlib
import http.client
import json
import os
import signal
import socket
import time

import pytest
from callers import CLOSED, run_all
from hostile import BODY, CASES, GOOD, WITNESSED, post
from servers import carflavor_server, request


@pytest.fixture(scope="module")
def server(openvino_model, tmp_path_factory, clean_environment):
    with carflavor_server(openvino_model, tmp_path_factory.mktemp("hostile"), clean_environment) as server:
        yield server


@pytest.fixture(scope="module")
def address(server):
    return "127.0.0.1", int(server.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def deaf_caller(address):
    """A connection of somebody who sends requests with long answers and reads none."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(3)
        connection.connect(address)
        long_answer = post({"inputs": [{"image": "!"}] * 256, "params": {"on_error": "report"}})
        with contextlib.suppress(TimeoutError):  # as soon as the server has no place for more answers
            connection.sendall(long_answer * 1000)
        yield connection


@pytest.fixture(scope="module")
def results(server, address, deaf_caller):
    """By the name of a case: what came of it, bytes of extra memory, and how long another caller waited."""
    before = request(f"{server.url}/invocations", BODY)[:2]
    results = {case.name: result for case, *result in run_all(CASES, WITNESSED, address, server.process.pid)}
    assert request(f"{server.url}/health")[0] == 200
    assert request(f"{server.url}/invocations", BODY)[:2] == before
    assert before[0] == 200
    return results


def test_there_are_at_least_eighty():
    assert len({case.name for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer(results, case):
    outcome, _, _ = results[case.name]
    assert (outcome.status, case.message in outcome.message) == (case.status, True), outcome.message[:500]
    if case.status not in (200, CLOSED):
        # Next to nothing of what was sent, and nothing of what is inside.
        assert len(outcome.message) <= 1500
        assert not any(word in outcome.text for word in ("Traceback", "stack_trace", ".py", "site-packages"))
    assert b"\r\nset-cookie" not in outcome.head.lower()


def test_none_takes_much_memory(results):
    assert {name: extra for name, (_, extra, _) in results.items() if extra > 300e6} == {}


def test_none_has_others_wait_for_long(results):
    assert {name: wait for name, (_, _, wait) in results.items() if wait > 2} == {}


def test_the_log_has_no_failure_and_nothing_of_what_was_sent(results, server):
    # The decoders of JPEG and PNG write lines of their own.
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert [line for line in lines if json.loads(line)["level"] == "error"] == []
    assert max(map(len, lines)) < 1500
    assert json.loads(BODY)["dataframe_records"][0]["image"][:40] not in server.log.read_text()


def test_who_reads_no_answer_is_hung_up_on(results, server, deaf_caller):
    """Which takes half a minute, as `results` does."""
    assert "carflavor_pending_requests 0.0\n" in request(f"{server.url}/metrics")[1]
    with contextlib.suppress(ConnectionResetError):
        while deaf_caller.recv(65536):  # and not a TimeoutError at the end
            pass


def test_a_url_is_never_fetched(server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}/car.jpg"
        assert request(f"{server.url}/invocations", {"inputs": [{"image": url}]})[0] == 400
        other.settimeout(0.5)
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_request_that_is_on_its_way_at_sigterm_is_answered(openvino_model, tmp_path, clean_environment):
    """On a kept connection that has just been answered, where the next request follows."""
    with carflavor_server(openvino_model, tmp_path, clean_environment) as server:
        with contextlib.closing(
            http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        ) as connection:
            for wait in (0, 0.25):
                time.sleep(wait)
                connection.request("POST", "/invocations", BODY, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert (answer.status, GOOD in answer.read().decode()) == (200, True)
                if not wait:
                    os.kill(server.process.pid, signal.SIGTERM)
            assert answer.headers["Connection"] == "close"
        assert server.process.wait(30) == 0
