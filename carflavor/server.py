"""Serves a packed model: MLflow's own scoring app, behind limits and before an engine that answers callers in batches.

    python -m carflavor.server --model models:/cars@champion --port 5001

The app of `mlflow.pyfunc.scoring_server` parses requests and writes answers: both are those of `mlflow models serve`.
Around it lies an ASGI app that refuses what is too large, too much or no request before anything of it is parsed, and
counts and logs; inside it the model has an engine that gathers the photos of many callers. The code that runs is this
package; what a model directory has under `code/` is checked and never imported.
"""

import asyncio
import base64
import contextvars
import functools
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import uvicorn
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from uvicorn.config import STARTUP_FAILURE

from carflavor import flavor
from carflavor.data.example import example_photo
from carflavor.data.locations import resolve_input
from carflavor.image import decode
from carflavor.limits import count_cores, read_limits
from carflavor.scoring import DEADLINE, Base64, check_parameters, failed_row, name_rows
from carflavor.serving.batching import LARGEST_BATCH, BatchingEngine
from carflavor.serving.bodies import check_body
from carflavor.serving.connections import SECONDS_TO_SEND
from carflavor.serving.logs import set_up_logging
from carflavor.serving.metrics import METRICS_VARIABLE, Metrics
from carflavor.serving.openapi import describe_interface
from carflavor.serving.workers import use_patient_workers

_LONGEST_REASON = 1500  # characters; ten rows with theirs have as many
_REASON_FILE = "reason.txt"  # why a worker process could not start
_MODEL_VARIABLE = "CARFLAVOR_SERVED_MODEL"  # how worker processes know what to serve
_SECONDS_TO_DRAIN = 30
_SECONDS_TO_END = 5  # after that
_SECONDS_BETWEEN_CHECKS = 10
_SECONDS_TO_CHECK = 5
_ERROR_CODES = {500: "INTERNAL_ERROR", 503: "TEMPORARILY_UNAVAILABLE"}  # as MLflow calls them
_READING = ("GET", "HEAD")
_METHODS = {
    "/invocations": ("POST",),
    **dict.fromkeys(("/health", "/ping", "/metrics", "/openapi.json"), _READING),
    "/version": ("GET",),
}
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

_REASONS_NOT_TO_START = (ValueError, OSError, MlflowException)

_logger = logging.getLogger("carflavor.server")  # also where it is run as a program


@dataclass(frozen=True)
class ServerLimits:
    """How much one worker process takes at once; `carflavor.limits.Limits` has more.

    Attributes:
        rows: Photos in one request.
        body_bytes: Bytes of one request; more are answered with 413.
        requests: Requests that are read, wait or are being answered; more are answered with 503 at once.
        pending_bytes: Bytes of all of these together.
    """

    rows: int = 256
    body_bytes: int = 24_000_000
    requests: int = 128
    pending_bytes: int = 256_000_000


class Refusal(Exception):
    """A request that is answered with a status and a sentence and goes no further."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class ScoringApp:
    """The ASGI app.

    Args:
        path: `Path` of a model directory that carflavor wrote.
        limits: `ServerLimits`.

    Raises:
        MlflowException: If the model cannot be loaded.
    """

    def __init__(self, path, limits):
        self._limits = limits
        self._seconds_to_answer = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get()
        self._metrics = Metrics()
        self._pending_requests = self._pending_bytes = 0
        # Not mlflow.pyfunc.load_model: it would import what the model directory names, before anything is checked.
        pyfunc_model = flavor._load_pyfunc(path)
        self._classifier = pyfunc_model.get_raw_model()
        data = example_photo()[0]
        self._example = self._classifier.prepare(decode(data))[np.newaxis]
        # The first batches of a size are slow and take memory for good; the largest first, to take it once.
        for size in reversed(self._classifier.engine.sizes_to_prepare(LARGEST_BATCH)):
            self._classifier.engine(self._example.repeat(size, axis=0))
        self._engine = BatchingEngine(self._classifier.engine, self._metrics.batches.observe)
        self._classifier.engine = self._engine
        # What MLmodel says is under no digest: MLflow rewrites it.
        self._model = PyFuncModel(Model(signature=flavor.build_signature()), pyfunc_model)
        self._schema = self._model.metadata.get_input_schema()
        self._app = scoring_server.init(self._model)
        # MLflow scores in six threads on two cores: batches could hold no more photos. One batch is computed while
        # another one is decoded.
        self._threads = ThreadPoolExecutor(2 * LARGEST_BATCH, thread_name_prefix="request")
        self._interface = json.dumps(describe_interface(limits, base64.b64encode(data).decode())).encode()
        self._check = None
        self._process, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._engine(self._example)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["method"] not in _METHODS.get(scope["path"], ()):
            await _refuse_method(scope["path"], send)
        elif scope["path"] == "/invocations":
            await self._invoke(scope, receive, send)
        elif scope["path"] in ("/health", "/ping"):
            await _send(send, 200 if await self._is_healthy() else 503, b"\n")
        elif scope["path"] == "/metrics":
            await _send(send, 200, self._metrics.render(), Metrics.CONTENT_TYPE)
        elif scope["path"] == "/openapi.json":
            await _send(send, 200, self._interface)
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        # All requests are answered or given up. Python would wait for threads that hang, and without end.
        end = threading.Timer(_SECONDS_TO_END, os._exit, (1,))
        end.daemon = True
        end.start()
        await send({"type": "lifespan.shutdown.complete"})

    async def _is_healthy(self):
        """Says whether a photo was scored a moment ago, or else can be scored now."""
        if time.monotonic() - self._engine.last_answer < _SECONDS_BETWEEN_CHECKS:
            return True
        # One photo for all who ask meanwhile.
        if self._check is None or self._check.done():
            self._check = self._engine.submit(self._example)
        checked = asyncio.wrap_future(self._check)
        await asyncio.wait([checked], timeout=_SECONDS_TO_CHECK)
        return checked.done() and checked.exception() is None

    async def _invoke(self, scope, receive, send):
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{self._process}-{next(self._numbers)}"
        answer = _Answer(send, request_id)
        record = {"request_id": request_id, "bytes": 0, "photos": 0}
        scoring = None
        self._pending_requests += 1
        self._metrics.pending.inc()
        try:
            if self._pending_requests > self._limits.requests:
                raise Refusal(503, f"expected at most {self._limits.requests} requests at once: try again")
            checked = check_body(await self._read_body(headers, receive, record), self._limits.rows)
            record["photos"] = checked.rows
            photo, box = checked.single_photo()
            DEADLINE.set(time.monotonic() + self._seconds_to_answer)
            if photo is not None and _are_usual(checked.params):
                scoring = asyncio.ensure_future(self._score_one(photo, box, **checked.params))
            else:
                scoring = asyncio.ensure_future(self._score(checked.as_request()))
            await answer.send(await self._in_time(scoring))
        except _CallerGone:
            pass
        except Refusal as refusal:
            await answer.refuse(refusal.status, str(refusal))
        except ValueError as error:
            await answer.refuse(400, str(error))
        except Exception:
            _logger.exception("Request %s failed", request_id)
            await answer.refuse(500, f"the server failed; its log has more on request {request_id}")
        except asyncio.CancelledError:
            # uvicorn does that at the end of its patience, and would answer 500.
            await answer.refuse(503, "the server is ending: try again")
        finally:
            self._release(record, scoring)
            seconds = time.perf_counter() - started
            self._metrics.requests.labels(answer.status).inc()
            self._metrics.seconds.observe(seconds)
            if answer.status == 200:
                self._metrics.photos.inc(record["photos"])
            _logger.info(
                "request", extra={"fields": {**record, "status": answer.status, "ms": round(1000 * seconds, 1)}}
            )

    def _release(self, record, scoring):
        """Counts a request no longer, as soon as nothing works on it any more."""
        if scoring is not None and not scoring.done():
            scoring.cancel()
            scoring.add_done_callback(lambda _: self._release(record, None))
            return
        self._pending_requests -= 1
        self._pending_bytes -= record["bytes"]
        self._metrics.pending.dec()

    async def _in_time(self, scoring):
        await asyncio.wait([scoring], timeout=self._seconds_to_answer)
        if not scoring.done():
            raise Refusal(503, "the request was not answered in time: try again")
        return scoring.result()

    async def _score(self, request):
        """Returns what MLflow's own scoring function answers, as text."""
        call = functools.partial(scoring_server.invocations, request, "application/json", self._model, self._schema)
        running = self._threads.submit(contextvars.copy_context().run, call)
        answered = asyncio.wrap_future(running)
        try:
            answer = await asyncio.shield(answered)
        except asyncio.CancelledError:
            # A thread that has begun goes on until it looks at the time again.
            if not running.cancel():
                await asyncio.wait([answered])
                answered.exception()
            raise
        except MlflowException as error:
            if error.get_http_status_code() >= 500 or error.json_kwargs.get("stack_trace"):
                raise
            # MLflow puts what was sent before the reason, and a value that is not what it expects into it.
            reason = error.message.rpartition("Error: ")[2]
            raise Refusal(error.get_http_status_code(), reason[:_LONGEST_REASON]) from None
        return answer.response

    async def _score_one(self, photo, box, top_k=5, min_prob=0.0, on_error="raise"):
        """Returns the same for a single photo, without a DataFrame on the way in and out, which takes 1.3 ms."""
        check_parameters(top_k, min_prob, on_error)
        try:
            decoding = asyncio.get_running_loop().run_in_executor(
                self._classifier.decoders, self._classifier.prepare, Base64(photo), box
            )
            square = await decoding
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(name_rows({0: str(error)}, 1)) from None
            row = failed_row(str(error))
        else:
            (probabilities,) = await asyncio.wrap_future(self._engine.submit(square[np.newaxis]))
            row = self._classifier.describe(probabilities, top_k, min_prob)
        return json.dumps({"predictions": [row]})

    async def _read_body(self, headers, receive, record):
        kind, *parameters = headers.get(b"content-type", b"").decode("latin-1").lower().replace(" ", "").split(";")
        if kind != "application/json" or set(parameters) - {"charset=utf-8", ""}:
            raise Refusal(415, "expected a body with the Content-Type application/json in UTF-8")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refusal(415, "expected a body without Content-Encoding")
        too_large = Refusal(413, f"expected a request of at most {self._limits.body_bytes:,} bytes, got more")
        # h11 and httptools have refused what is no number.
        if int(headers.get(b"content-length", b"0")) > self._limits.body_bytes:
            raise too_large
        body = bytearray()  # not a list of parts: the memory of many small ones stays with the process
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _CallerGone
                    part = message.get("body", b"")
                    body += part
                    record["bytes"] += len(part)
                    self._pending_bytes += len(part)
                    if record["bytes"] > self._limits.body_bytes:
                        raise too_large
                    if self._pending_bytes > self._limits.pending_bytes:
                        raise Refusal(503, "expected fewer or smaller requests at once: try again")
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            raise Refusal(408, f"expected the whole body within {SECONDS_TO_SEND} s") from None


def _are_usual(params):
    """Says whether parameters are of the types that MLflow would hand on as they are."""
    kinds = {"top_k": (int,), "min_prob": (int, float), "on_error": (str,)}
    return all(type(value) in kinds.get(name, ()) for name, value in params.items())


class _CallerGone(Exception):
    pass


class _Answer:
    """The answer to a request: one, whatever happens."""

    def __init__(self, send, request_id):
        self.status = 499  # in nginx's words: the caller has gone
        self._send = send
        self._headers = [(b"x-request-id", request_id.encode())]

    async def send(self, text):
        self.status = 200
        await _send(self._send, 200, text.encode(), "application/json", self._headers)

    async def refuse(self, status, message):
        """Answers with a status and a sentence, unless an answer has begun."""
        if self.status == 200:
            return
        self.status = status
        headers = [*self._headers, (b"retry-after", b"1")] if status == 503 else self._headers
        await _send(self._send, status, _describe_error(status, message), "application/json", headers)


def _describe_error(status, message):
    code = _ERROR_CODES.get(status, "INVALID_PARAMETER_VALUE")
    return json.dumps({"error_code": code, "message": message}).encode()


async def _refuse_method(path, send):
    # MLflow's router also takes `/invocations` with a line break behind it, where none of the limits hold.
    if methods := _METHODS.get(path):
        message = f"expected the method {' or '.join(methods)} for {path}, got another one"
        allow = [(b"allow", ", ".join(methods).encode())]
        await _send(send, 405, _describe_error(405, message), headers=allow)
    else:
        await _send(send, 404, _describe_error(404, "expected a path that /openapi.json lists, got another one"))


async def _send(send, status, body, content_type="application/json", headers=()):
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def create_app():
    """Returns the app of a worker process, which the environment tells what to serve."""
    set_up_logging()
    try:
        return ScoringApp(Path(os.environ[_MODEL_VARIABLE]), read_limits(ServerLimits))
    except _REASONS_NOT_TO_START as error:
        (Path(os.environ[METRICS_VARIABLE]) / _REASON_FILE).write_text(str(error))
        sys.exit(STARTUP_FAILURE)  # processes that end in another way are started again


@click.command()
@click.option("--model", required=True, help="Model as path, runs:/... or models:/...")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=5001, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes, each with the model."
)
def main(model, host, port, workers):
    """Serves a packed model until SIGTERM or Ctrl-C; requests that were taken are answered before it ends."""
    # uvicorn ends by the signal that it has caught: with SIGTERM's own action nothing of Python's would be tidied up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if not os.environ.get("CARFLAVOR_THREADS"):
        os.environ["CARFLAVOR_THREADS"] = str(max(1, count_cores() // workers))
    options = {
        "workers": workers,
        "host": host,
        "port": port,
        "http": "carflavor.serving.connections:Connection",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": _SECONDS_TO_DRAIN,
    }
    try:
        limits = read_limits(ServerLimits)
        path = resolve_input(model, "model")
        set_up_logging()
        if workers == 1:
            uvicorn.run(ScoringApp(path, limits), **options)
        else:
            flavor.read_manifest(path)
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {_MODEL_VARIABLE: str(path), METRICS_VARIABLE: folder}
                use_patient_workers()
                uvicorn.run("carflavor.server:create_app", factory=True, **options)
                if (reason := Path(folder) / _REASON_FILE).is_file():
                    raise ValueError(reason.read_text())
    except _REASONS_NOT_TO_START as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
