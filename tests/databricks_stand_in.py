"""A stand-in for a Databricks workspace: what `mlflow run -b databricks` asks it for, and nothing else.

Runs are kept by MLflow's own server app. Bodies are held to the models of the Jobs and Clusters API that Databricks
publishes in its SDK.
"""

import contextlib
import dataclasses
import enum
import http.server
import json
import types
import typing
import urllib.parse

from databricks.sdk.service.compute import ClusterSpec, Library
from mlflow.server import app, handlers
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from servers import web_server

TOKEN = "dapi-of-a-test"
JOB, RUN = 11, 47


def find_faults(kind, value, place="body"):
    """Returns what of a body is not as a type of the SDK has it, a list of sentences: keys, types, words of an enum."""
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        (kind,) = (argument for argument in arguments if argument is not type(None))
        arguments = typing.get_args(kind)
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(origin):
        fields = {field.name: field for field in dataclasses.fields(origin)}
        if not isinstance(value, dict):
            return [f"{place}: expected {origin.__name__}, got {value!r}"]
        hints = typing.get_type_hints(origin)
        # Optional in the SDK, where a policy or a pool may give them.
        needed = {"spark_version", "node_type_id"} if origin is ClusterSpec else set()
        needed |= {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        faults = [f"{place}: no key {name} in {origin.__name__}" for name in sorted(value.keys() - fields.keys())]
        faults += [f"{place}: {name} is missing" for name in sorted(needed - value.keys())]
        parts = [(hints[name], value[name], name) for name in value if name in fields]
        return faults + [fault for part, item, name in parts for fault in find_faults(part, item, f"{place}.{name}")]
    if origin in (list, dict) and isinstance(value, origin):
        items = value.items() if origin is dict else enumerate(value)
        return [fault for name, item in items for fault in find_faults(arguments[-1], item, f"{place}.{name}")]
    if issubclass(origin, enum.Enum):
        words = [member.value for member in origin]
        return [] if value in words else [f"{place}: expected one of {', '.join(words)}, got {value!r}"]
    return [] if type(value) is origin else [f"{place}: expected {origin.__name__}, got {value!r}"]


@contextlib.contextmanager
def databricks(folder):
    """Context manager of a workspace on 127.0.0.1.

    Args:
        folder: `Path` of an empty folder for runs and artifacts.

    Yields:
        A namespace of its `url`, the `store` of its runs as MLflow's URI, `files` of DBFS by path, and `submitted`, the
        bodies of jobs that were taken.
    """
    workspace = types.SimpleNamespace(store=f"sqlite:///{folder}/mlflow.db", files={}, submitted=[])
    # Not by `initialize_backend_stores`, which makes it the store of this process, for other tests as well.
    handlers._tracking_store = SqlAlchemyStore(workspace.store, str(folder / "artifacts"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, content = self.find_answer(body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def find_answer(self, body):
            url = urllib.parse.urlsplit(self.path)
            if url.path.startswith("/.well-known/"):
                return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": "No such endpoint"}
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return 403, {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."}
            call = f"{self.command} {url.path}"
            if url.path.startswith("/api/2.0/mlflow/"):
                found = app.test_client().open(
                    self.path, method=self.command, data=body, content_type="application/json"
                )
                return found.status_code, found.data
            if call == "GET /api/2.0/dbfs/get-status":
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No file or directory exists"}
            if call.startswith("POST /dbfs/"):
                workspace.files[url.path] = body
                return 200, {}
            if call == "POST /api/2.0/jobs/runs/submit":
                return self.submit(json.loads(body))
            if self.path == f"/api/2.0/jobs/runs/get?run_id={RUN}":
                page = f"{workspace.url}/#job/{JOB}/run/1"
                return 200, {"job_id": JOB, "run_id": RUN, "run_page_url": page, "state": {}}
            return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": f"No API found for '{call}'"}

        def submit(self, body):
            faults = find_faults(ClusterSpec, body["new_cluster"], "new_cluster")
            faults += find_faults(list[Library], body["libraries"], "libraries")
            if faults:
                return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "; ".join(faults)}
            workspace.submitted.append(body)
            return 200, {"run_id": RUN}

        def log_message(self, *args):
            """Nothing: a test looks at what was kept."""

    try:
        with web_server(Handler) as workspace.url:
            yield workspace
    finally:
        handlers._tracking_store = None  # MLflow has one in a process
