"""The server's interface as an OpenAPI 3.1 document, for people, for makers of clients and for those who test it."""

from carflavor.scoring import BOX_COLUMNS, ON_ERROR
from carflavor.version import __version__

_ERRORS = {
    400: "A photo, box, parameter or body is not what is expected; `message` names the rows.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON in UTF-8.",
    503: "Too much at once: try again after the seconds of `Retry-After`.",
}


def describe_interface(limits, photo):
    """Returns the document as a dict.

    Args:
        limits: `carflavor.server.ServerLimits`.
        photo: A photo in base64, for the example.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "carflavor",
            "version": __version__,
            "description": "Says which car each photo shows.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/invocations": {"post": _describe_invocations(limits, photo)},
            "/health": {"get": _describe_check("Whether photos are scored.")},
            "/ping": {"get": _describe_check("As /health.")},
            "/metrics": {"get": _describe_metrics()},
            "/version": {"get": {"summary": "The version of MLflow.", "responses": {"200": {"description": "It."}}}},
        },
        "components": {
            "schemas": {
                "Row": _describe_row(),
                "Columns": _describe_columns(limits),
                "Params": _describe_params(),
                "Prediction": _describe_prediction(),
                "Error": _object(error_code={"type": "string"}, message={"type": "string"}),
            }
        },
    }


def _describe_invocations(limits, photo):
    rows = _list_of(_reference("Row"), limits)
    split = _object(
        columns={"type": "array", "items": {"type": "string"}, "contains": {"const": "image"}},
        data={"type": "array", "minItems": 1, "maxItems": limits.rows, "items": {"type": "array"}},
    )
    forms = {
        "dataframe_records": rows,
        "dataframe_split": split,
        "inputs": {"anyOf": [rows, _reference("Columns")]},
        "instances": {"anyOf": [rows, _reference("Columns")]},
    }
    body = {
        "type": "object",
        "properties": {**forms, "params": {"anyOf": [_reference("Params"), {"type": "null"}]}},
        "oneOf": [{"required": [form]} for form in forms],
    }
    answer = _object(predictions={"type": "array", "items": _reference("Prediction")})
    example = {"dataframe_records": [{"image": photo}], "params": {"top_k": 2}}
    return {
        "summary": "Says which car each photo shows.",
        "operationId": "score",
        "parameters": [
            {
                "name": "X-Request-ID",
                "in": "header",
                "description": "Letters, digits, `_`, `.` and `-`, at most 64: they stand in the log and the answer.",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {
            "required": True,
            "description": f"At most {limits.body_bytes:,} bytes.",
            "content": {"application/json": {"schema": body, "examples": {"one photo": {"value": example}}}},
        },
        "responses": {
            "200": {"description": "A prediction for each row.", **_json(answer)},
            **{str(status): {"description": text, **_json(_reference("Error"))} for status, text in _ERRORS.items()},
        },
    }


def _describe_row():
    number = {"type": ["number", "null"]}
    image = {
        "type": "string",
        "contentEncoding": "base64",
        "description": "A JPEG, PNG, WebP, BMP, TIFF, GIF or HEIC. White space, a prefix `data:image/...;base64,`, the "
        "URL-safe letters and missing padding are accepted.",
    }
    return {
        "type": "object",
        "description": "A photo; and the car's box in its pixels, `x2` and `y2` outside it: all four numbers or none.",
        "properties": {"image": image, **dict.fromkeys(BOX_COLUMNS, number)},
        "required": ["image"],
    }


def _describe_columns(limits):
    row = _describe_row()
    return row | {
        "description": "The same, a list for each field; all of one length.",
        "properties": {name: _list_of(field, limits) for name, field in row["properties"].items()},
    }


def _describe_params():
    return {
        "type": "object",
        "properties": {
            "top_k": {"type": "integer", "minimum": 1, "default": 5},
            "min_prob": {
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": 0,
                "description": "Below it the label is `unknown`.",
            },
            "on_error": {
                "enum": list(ON_ERROR),
                "default": ON_ERROR[0],
                "description": "`raise`: a bad photo refuses the request. `report`: its row says why.",
            },
        },
    }


def _describe_prediction():
    return _object(
        label={"type": ["string", "null"]},
        prob={"type": ["number", "null"], "minimum": 0, "maximum": 1},
        class_id={"type": ["integer", "null"], "minimum": 0},
        top_k={"type": "array", "items": _object(label={"type": "string"}, prob={"type": "number"})},
        error={"type": ["string", "null"]},
    )


def _describe_check(summary):
    return {
        "summary": summary,
        "responses": {"200": {"description": "They are."}, "503": {"description": "They are not."}},
    }


def _describe_metrics():
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "summary": "Requests, photos, batches and latencies.",
        "responses": {"200": {"description": "Prometheus's text form.", "content": text}},
    }


def _object(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(schema, limits):
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": limits.rows}


def _json(schema):
    return {"content": {"application/json": {"schema": schema}}}


def _reference(name):
    return {"$ref": f"#/components/schemas/{name}"}
