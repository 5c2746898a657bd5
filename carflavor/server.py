"""Serves a packed model: MLflow's own scoring app, behind limits and before an engine that answers callers in batches.

    python -m carflavor.server --model models:/cars@champion --port 5001

The app of `mlflow.pyfunc.scoring_server` parses requests and writes answers: both are those of `mlflow models serve`.
Around it lies an ASGI app that refuses what is too large, too much or no request before anything of it is parsed, and
counts and logs; inside it the model has an engine that gathers the photos of many callers. The code that runs is this
package; what a model directory has under `code/` is checked and never imported.
"""

import asyncio
import base64
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import mlflow
import numpy as np
import uvicorn
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server

from carflavor import flavor
from carflavor.data.example import example_photo
from carflavor.data.locations import resolve_input
from carflavor.image import decode
from carflavor.limits import count_cores, read_limits
from carflavor.scoring import Base64, check_parameters, failed_row, name_rows
from carflavor.serving.batching import LARGEST_BATCH, BatchingEngine
from carflavor.serving.bodies import check_body
from carflavor.serving.connections import SECONDS_TO_SEND
from carflavor.serving.logs import LONGEST_TEXT, set_up_logging
from carflavor.serving.metrics import METRICS_VARIABLE, Metrics
from carflavor.serving.openapi import describe_interface

_MODEL_VARIABLE = "CARFLAVOR_SERVED_MODEL"  # how worker processes know what to serve
_SECONDS_TO_DRAIN = 30
_SECONDS_BETWEEN_CHECKS = 10
_SECONDS_TO_CHECK = 5
_WARM_UP_SIZES = (LARGEST_BATCH, 8, 4, 2, 1)  # all sizes would take half a minute on a slow CPU
_ERROR_CODES = {500: "INTERNAL_ERROR", 503: "TEMPORARILY_UNAVAILABLE"}  # as MLflow calls them
_READING = ("GET", "HEAD")
_METHODS = {
    "/invocations": ("POST",),
    **dict.fromkeys(("/health", "/ping", "/metrics", "/openapi.json"), _READING),
    "/version": ("GET",),
}
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

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
        self._engine = BatchingEngine(self._classifier.engine, self._metrics.batches.observe)
        self._classifier.engine = self._engine
        self._model = PyFuncModel(Model.load(path), pyfunc_model)
        self._schema = self._model.metadata.get_input_schema()
        self._app = scoring_server.init(self._model)
        data = example_photo()[0]
        self._example = decode(data)
        self._interface = json.dumps(describe_interface(limits, base64.b64encode(data).decode())).encode()
        self._check = None
        self._process, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._warm_up()

    def _warm_up(self):
        # The first batches are slow: of Keras those of each of these sizes, for which it compiles the network.
        for size in _WARM_UP_SIZES:
            self._classifier.predict([self._example] * size)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["method"] not in _METHODS.get(scope["path"], _READING):
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
        # MLflow scores in threads of the default executor, six on two cores: batches could hold no more than six.
        # Twice the largest batch: one that is computed, and one that is being decoded.
        executor = ThreadPoolExecutor(2 * LARGEST_BATCH, thread_name_prefix="request")
        asyncio.get_running_loop().set_default_executor(executor)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _is_healthy(self):
        """Says whether a photo was scored a moment ago, or else can be scored now."""
        if time.monotonic() - self._engine.last_answer < _SECONDS_BETWEEN_CHECKS:
            return True
        # One photo for all who ask meanwhile.
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(asyncio.to_thread(self._classifier.predict, [self._example]))
        await asyncio.wait([self._check], timeout=_SECONDS_TO_CHECK)
        return self._check.done() and self._check.exception() is None

    async def _invoke(self, scope, receive, send):
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{self._process}-{next(self._numbers)}"
        answer = _Answer(send, request_id)
        record = {"request_id": request_id, "bytes": 0, "photos": 0}
        self._pending_requests += 1
        self._metrics.pending.inc()
        try:
            if self._pending_requests > self._limits.requests:
                raise Refusal(503, f"expected at most {self._limits.requests} requests at once: try again")
            checked = check_body(await self._read_body(headers, receive, record), self._limits.rows)
            record["photos"] = checked.rows
            photo, box = checked.single_photo()
            if photo is not None and _are_usual(checked.params):
                scoring = self._score_one(photo, box, **checked.params)
            else:
                scoring = self._score(checked.as_request())
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
        finally:
            self._pending_requests -= 1
            self._pending_bytes -= record["bytes"]
            self._metrics.pending.dec()
            seconds = time.perf_counter() - started
            self._metrics.requests.labels(answer.status).inc()
            self._metrics.seconds.observe(seconds)
            if answer.status == 200:
                self._metrics.photos.inc(record["photos"])
            _logger.info(
                "request", extra={"fields": {**record, "status": answer.status, "ms": round(1000 * seconds, 1)}}
            )

    async def _in_time(self, scoring):
        try:
            async with asyncio.timeout(self._seconds_to_answer):
                return await scoring
        except TimeoutError:
            raise Refusal(503, "the request was not answered in time: try again") from None

    async def _score(self, request):
        """Returns what MLflow's own scoring function answers, as text."""
        try:
            answer = await asyncio.to_thread(
                scoring_server.invocations, request, "application/json", self._model, self._schema
            )
        except MlflowException as error:
            if error.get_http_status_code() >= 500 or error.json_kwargs.get("stack_trace"):
                raise
            # MLflow puts what was sent before the reason, and a value that is not what it expects into it.
            reason = error.message.rpartition("Error: ")[2]
            raise Refusal(error.get_http_status_code(), reason[:LONGEST_TEXT]) from None
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
    return ScoringApp(Path(os.environ[_MODEL_VARIABLE]), read_limits(ServerLimits))


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
    os.environ.setdefault("CARFLAVOR_THREADS", str(max(1, count_cores() // workers)))
    options = {
        "host": host,
        "port": port,
        "http": "carflavor.serving.connections:Connection",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": _SECONDS_TO_DRAIN,
    }
    try:
        path = resolve_input(model, "model")
        if workers == 1:
            set_up_logging()
            uvicorn.run(ScoringApp(path, read_limits(ServerLimits)), **options)
        else:
            flavor.read_manifest(path)
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {_MODEL_VARIABLE: str(path), METRICS_VARIABLE: folder}
                uvicorn.run("carflavor.server:create_app", factory=True, workers=workers, **options)
    except (ValueError, OSError, mlflow.MlflowException) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
