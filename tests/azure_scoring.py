"""How the stand-in for Azure answers photos: as the server does that Azure puts around MLflow's models."""

import json

from azure_endpoints import find_deployment, find_endpoint
from azure_server import Refusal
from servers import request

# What a token of Microsoft Entra is for that endpoints with the auth mode AADToken take.
AUDIENCE = "https://ml.azure.com"


def score(stand_in, record, endpoint):
    with stand_in.lock:
        resource = _check_key(stand_in, record, endpoint)
        deployment = record.headers["azureml-model-deployment"] or _choose(stand_in, resource)
        properties = find_deployment(stand_in, endpoint, deployment)["properties"]
    if properties["provisioningState"] != "Succeeded":
        raise Refusal(503, f"The deployment '{deployment}' is not ready.", "ServiceUnavailable")
    if not isinstance(record.body, dict) or "input_data" not in record.body:
        raise Refusal(424, "Request must contain a top level key named 'input_data'.", "ModelError")
    url = stand_in.scoring_url
    if isinstance(url, dict):
        # .../models/<name>/versions/<version>
        url = url.get(deployment) or url.get("/".join(properties["model"].split("/")[-3::2]))
    if url is None:
        raise Refusal(503, f"No model runs for '{deployment}': set scoring_url.", "ServiceUnavailable")
    status, text, _ = request(url, _read_input(record.body))
    headers = {"azureml-model-deployment": deployment}
    if status != 200:
        # What the model answers is passed on as a failed dependency.
        raise Refusal(424, text, "ModelError", headers=headers)
    return 200, json.loads(text)["predictions"], headers


def _check_key(stand_in, record, endpoint):
    resource = find_endpoint(stand_in, endpoint)
    keys = {f"Bearer {key}" for key in stand_in.keys.get(endpoint, ()) if key}
    if resource["properties"]["authMode"] == "AADToken":
        keys = stand_in.bearers(AUDIENCE)
    if record.headers["Authorization"] not in keys:
        raise Refusal(401, "The key or token is missing or invalid.")
    return resource


def _choose(stand_in, endpoint):
    """Returns the deployment whose turn it is; after a hundred requests each has had exactly its share."""
    traffic = {name: share for name, share in endpoint["properties"]["traffic"].items() if share}
    if not traffic:
        raise Refusal(404, f"The endpoint '{endpoint['name']}' has no traffic to any deployment.")
    served = stand_in.served.setdefault((endpoint["name"], tuple(sorted(traffic.items()))), dict.fromkeys(traffic, 0))
    total = sum(served.values()) + 1
    chosen = max(traffic, key=lambda name: traffic[name] * total - 100 * served[name])
    served[chosen] += 1
    return chosen


def get_swagger(stand_in, record, endpoint):
    _check_key(stand_in, record, endpoint)
    return 200, {"openapi": "3.0.0", "components": {"schemas": {"ServiceOutput": {"type": "array"}}}}


def _read_input(body):
    """Turns the body of a request to Azure's server into one that MLflow's server reads.

    A model with a data frame as its input example gets no other form: Azure/azureml-assets, mlflow_score_script.py of
    mlflow-py312-inference, which hands `PandasParameterType(..., orient="split")` of inference-schema to its server.
    """
    rows = body["input_data"]
    if not isinstance(rows, dict) or not {"columns", "data"} <= rows.keys() <= {"columns", "index", "data"}:
        raise Refusal(424, "Expected input_data to be a data frame: columns, index and data.", "ModelError")
    return {"dataframe_split": rows, **({"params": body["params"]} if "params" in body else {})}
