"""Serves a packed model: MLflow's own scoring app, behind limits and before an engine that answers callers in batches.

    python -m carflavor.server --model models:/cars@champion --port 5001

The app of `mlflow.pyfunc.scoring_server` parses requests and writes answers: both are those of `mlflow models serve`.
Around it lies an ASGI app that refuses what is too large, too much or no request before anything of it is parsed, and
counts and logs; inside it the model has an engine that gathers the photos of many callers. The code that runs is this
package; what a model directory has under `code/` is checked and never imported.
"""

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import mlflow
import numpy as np
import prometheus_client
import prometheus_client.multiprocess
import uvicorn
from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel, scoring_server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from carflavor import flavor
from carflavor.batching import LARGEST_BATCH, BatchingEngine
from carflavor.bodies import check_body
from carflavor.data.example import example_photo
from carflavor.data.locations import resolve_input
from carflavor.image import decode
from carflavor.limits import count_cores, read_limits
from carflavor.scoring import Base64, check_parameters, failed_row, name_rows

_MODEL_VARIABLE = "CARFLAVOR_SERVED_MODEL"  # how worker processes know what to serve
_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # where they share what they count
_SECONDS_TO_SEND = 30  # a whole body
_SECONDS_TO_DRAIN = 30
_SECONDS_TO_LINGER = 0.5
_LARGEST_HEAD = 65_536  # bytes
_SECONDS_BETWEEN_CHECKS = 10
_SECONDS_TO_CHECK = 5
_LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)
_ERROR_CODES = {500: "INTERNAL_ERROR", 503: "TEMPORARILY_UNAVAILABLE"}  # as MLflow calls them
_LONGEST_TEXT = 1500  # characters of an answer or the log; ten rows with their reasons have as many
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


class Metrics:
    """What is counted, for Prometheus."""

    def __init__(self):
        self._registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "carflavor_requests", "Requests to /invocations.", ["status"], registry=self._registry
        )
        self.seconds = prometheus_client.Histogram(
            "carflavor_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            buckets=_LATENCIES,
            registry=self._registry,
        )
        self.photos = prometheus_client.Counter(
            "carflavor_photos", "Photos of answered requests.", registry=self._registry
        )
        self.batches = prometheus_client.Histogram(
            "carflavor_batch_photos",
            "Photos that went through the network together.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        )
        self.pending = prometheus_client.Gauge(
            "carflavor_pending_requests",
            "Requests that are read, wait or are being answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def render(self):
        """Returns the metrics of all worker processes in Prometheus's text form, as bytes."""
        if _METRICS_VARIABLE not in os.environ:
            return prometheus_client.generate_latest(self._registry)
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.multiprocess.MultiProcessCollector(registry)
        return prometheus_client.generate_latest(registry)


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
        self._check = None
        self._process, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._warm_up()

    def _warm_up(self):
        # OpenVINO prepares itself for each size of batch when it first meets it.
        photo = self._example = decode(example_photo()[0])
        for size in range(LARGEST_BATCH, 0, -1):
            self._classifier.predict([photo] * size)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"] == "/invocations" and scope["method"] == "POST":
            await self._invoke(scope, receive, send)
        elif scope["path"] in ("/health", "/ping") and scope["method"] in ("GET", "HEAD"):
            await _send(send, 200 if await self._is_healthy() else 503, b"\n")
        elif scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            await _send(send, 200, self._metrics.render(), prometheus_client.CONTENT_TYPE_LATEST)
        elif scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
        else:
            # MLflow's router also takes `/invocations` with a line break behind it, where none of the limits hold.
            status = 405 if scope["path"] == "/invocations" else 404
            await _send(send, status, _describe_error(status, "expected POST /invocations or a GET of another path"))

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
            raise Refusal(error.get_http_status_code(), reason[:_LONGEST_TEXT]) from None
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
            async with asyncio.timeout(_SECONDS_TO_SEND):
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
            raise Refusal(408, f"expected the whole body within {_SECONDS_TO_SEND} s") from None


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
    _set_up_logging()
    return ScoringApp(Path(os.environ[_MODEL_VARIABLE]), read_limits(ServerLimits))


class _JsonFormatter(logging.Formatter):
    """A line of JSON an event: for people still legible, for programs to search."""

    def format(self, record):
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            "event": record.getMessage()[:_LONGEST_TEXT],  # MLflow tells names that callers sent
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = _describe(record.exc_info)
        return json.dumps(entry)


def _describe(exc_info):
    # Where, and what kind, but not the text: it may hold what a caller sent.
    kind, _, trace = exc_info
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    return f"{kind.__name__} at {' < '.join(reversed(places))}"


def _set_up_logging():
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("carflavor").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    # MLflow's goes to a handler of its own.
    logging.getLogger("mlflow").handlers.clear()
    logging.getLogger("mlflow").propagate = True


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's that ends where a caller takes for ever, and not while a request is on its way.

    uvicorn takes heads of any length, waits without end for them and for who does not read its answers, and at SIGTERM
    hangs up on everybody who waits for none at that moment.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self._head_bytes = 0
        self._ending = False
        # Of the first request, of each one, and of answers that are not read.
        self._sending = self._abort_after(_SECONDS_TO_SEND)
        self._reading = None

    def connection_lost(self, exc):
        self._sending.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data):
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _LARGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"expected a head of at most {_LARGEST_HEAD:,} bytes, got more")

    def on_message_begin(self):
        super().on_message_begin()
        self._sending.cancel()
        self._sending = self._abort_after(_SECONDS_TO_SEND + 1)  # the app refuses a body that is late before

    def on_headers_complete(self):
        super().on_headers_complete()
        self._head_bytes = 0
        if self._ending:
            self.cycle.keep_alive = False

    def on_body(self, body):
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self):
        super().on_message_complete()
        self._head_bytes = 0
        self._sending.cancel()

    def pause_writing(self):
        super().pause_writing()
        self._reading = self._abort_after(_SECONDS_TO_SEND)

    def resume_writing(self):
        super().resume_writing()
        if self._reading:
            self._reading.cancel()

    def shutdown(self):
        self._ending = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_SECONDS_TO_LINGER, super().shutdown)
        else:
            super().shutdown()

    def _abort_after(self, seconds):
        return self.loop.call_later(seconds, self.transport.abort)


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
        "http": "carflavor.server:Connection",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": _SECONDS_TO_DRAIN,
    }
    try:
        path = resolve_input(model, "model")
        if workers == 1:
            _set_up_logging()
            uvicorn.run(ScoringApp(path, read_limits(ServerLimits)), **options)
        else:
            flavor.read_manifest(path)
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {_MODEL_VARIABLE: str(path), _METRICS_VARIABLE: folder}
                uvicorn.run("carflavor.server:create_app", factory=True, workers=workers, **options)
    except (ValueError, OSError, mlflow.MlflowException) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
