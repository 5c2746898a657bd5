"""What the stand-in for Azure has of a workspace's stores: MLflow's API, which a real server answers, and artifacts."""

import json
import re
import urllib.error
import urllib.parse
import urllib.request

# Azure has MLflow's second version of the API alone: Azure/azure-sdk-for-python#44896 shows its empty 404.
_ABSENT = re.compile(r"api/2\.0/mlflow/(logged-models|traces)|api/3\.0/|version$")
# The plugin reads files from URLs alone in which `.blob.` and the cloud's suffix for storage stand.
STORAGE = "stand-in"
ACCOUNT = f"cars.blob.{STORAGE}"
_BLOB = {"ETag": '"1"', "Last-Modified": "Wed, 25 Nov 2026 12:00:00 GMT", "x-ms-blob-type": "BlockBlob"}
_ASYNC = "api/2.0/preview/mlflow/runs/"


def forward(stand_in, record, rest, **scope):
    """Has MLflow's own server answer; what is particular to Azure is done to the answer."""
    stand_in.check_access(record, **scope, versions=())
    if _ABSENT.match(rest):
        return 404, None
    if rest == f"{_ASYNC}get-run-data-status":
        return 200, {"is_complete": True}
    # The plugin's own call, which writes metrics and comes back for them later.
    later = rest == f"{_ASYNC}log-batch-async"
    status, answer = _ask(
        f"{stand_in.mlflow_url}/{'api/2.0/mlflow/runs/log-batch' if later else rest}", record.method, record
    )
    if later and status == 200:
        return 200, {"batch_tracking_id": "1"}
    if status == 200 and rest.endswith("model-versions/create"):
        version = answer["model_version"]
        tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
        stand_in.register(version["name"], version["version"], version["source"], tags)
    return status, _place_artifacts(answer, stand_in)


def _ask(url, method, record):
    if record.query:
        url = f"{url}?{urllib.parse.urlencode(record.query)}"
    data = None if record.body is None else json.dumps(record.body).encode()
    call = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def _place_artifacts(answer, stand_in):
    """Gives runs Azure's address of their artifacts, wherever in an answer they are."""
    if isinstance(answer, list):
        return [_place_artifacts(item, stand_in) for item in answer]
    if not isinstance(answer, dict):
        return answer
    answer = {key: _place_artifacts(value, stand_in) for key, value in answer.items()}
    if {"run_id", "experiment_id", "artifact_uri"} <= answer.keys():
        place = f"experiments/{answer['experiment_id']}/runs/{answer['run_id']}/artifacts"
        answer["artifact_uri"] = f"{stand_in.workspace_uri.replace('/v1.0/', '/v2.0/')}/{place}"
    return answer


def create_artifacts(stand_in, record, container, origin="ExperimentRun", experiment=None, **scope):
    """Answers with an address for each path, to which the client then writes the file."""
    stand_in.check_access(record, **scope, versions=())
    paths = [entry["path"] for entry in record.body["paths"]]
    information = {path: _locate(stand_in, origin, container, path) for path in paths}
    return 200, {"artifacts": {}, "artifactContentInformation": information, "errors": {}}


def list_artifacts(stand_in, record, container, origin="ExperimentRun", experiment=None, **scope):
    """Answers with the paths that were written."""
    stand_in.check_access(record, **scope, versions=())
    prefix = f"{origin}/{container}/"
    paths = [name.removeprefix(prefix) for name in sorted(stand_in.blobs) if name.startswith(prefix)]
    return 200, {"value": [{"origin": origin, "container": container, "path": path} for path in paths]}


def get_artifact(stand_in, record, container, origin="ExperimentRun", experiment=None, **scope):
    """Answers with the address of a file."""
    stand_in.check_access(record, **scope, versions=())
    path = record.query["path"]
    if f"{origin}/{container}/{path}" not in stand_in.blobs:
        return 404, {"error": {"code": "UserError", "message": f"The artifact '{path}' was not found."}}
    return 200, _locate(stand_in, origin, container, path)


def _locate(stand_in, origin, container, path):
    name = urllib.parse.quote(f"{origin}/{container}/{path}")
    address = f"{stand_in.url}/{ACCOUNT}/{name}?sig={stand_in.signature}"
    return {"contentUri": address, "origin": origin, "container": container, "path": path}


def put_blob(stand_in, record, rest):
    """Writes a file, whole or in blocks, as a storage account does."""
    stand_in.check_signature(record)
    action = record.query.get("comp")
    if action == "block":
        stand_in.blocks[rest, record.query["blockid"]] = record.body or b""
    elif action == "blocklist":
        blocks = re.findall(rb"<Latest>(.+?)</Latest>", record.body)
        stand_in.blobs[rest] = b"".join(stand_in.blocks.pop((rest, block.decode())) for block in blocks)
    else:
        stand_in.blobs[rest] = record.body or b""
    return 201, None, _BLOB


def get_blob(stand_in, record, rest):
    """Returns a file, or the part of it that a header asks for."""
    stand_in.check_signature(record)
    data, asked = stand_in.blobs[rest], re.fullmatch(r"bytes=(\d+)-(\d+)", record.headers["x-ms-range"] or "")
    if not asked:
        return 200, data, _BLOB
    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
    if start >= stop:
        return 416, b"", {"x-ms-error-code": "InvalidRange", **_BLOB}
    return 206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **_BLOB}
