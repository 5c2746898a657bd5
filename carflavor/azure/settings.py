"""The config file of a deployment: the keys of azureml-mlflow, checked before anything is sent, and our defaults.

instance_type: Standard_DS3_v2
instance_count: 1
request_settings:
  request_timeout_ms: 60000
"""

import re
from pathlib import Path

import yaml

# Azure's smallest machine on which a network of so many bytes, with what runs it, leaves room for photos. DS1_v2 has
# 3.5 GB, which TensorFlow alone can fill.
_INSTANCE_TYPES = ((100e6, "Standard_DS2_v2"), (1e9, "Standard_DS3_v2"), (float("inf"), "Standard_DS4_v2"))
# Seconds. Azure's own probes give up after five minutes, of which TensorFlow and a large network on two cores want
# two and a slow pull of the image the rest.
_PROBE = {"initial_delay": 30, "period": 10, "timeout": 10, "success_threshold": 1, "failure_threshold": 60}
# Azure's own timeout is 5 s and its queue half a second: the first photos after a start take longer.
_REQUESTS = {"request_timeout_ms": "PT60S", "max_queue_wait_ms": "PT10S", "max_concurrent_requests_per_instance": 2}
_TEXTS = ("environment_variables", "properties")  # by names of the user's
_LONGEST_TIMEOUT = 180  # what a managed endpoint allows, in seconds
_DURATION = re.compile(r"PT(\d+(?:\.\d+)?)S")
_REFUSED = {
    "computeType": "the container services ACI and AKS v1 are retired; without it, the config means a managed online "
    "endpoint",
    "model": "the model is the parameter model",
    "environment": "the environment is the model's own",
    "environment_id": "the environment is the model's own",
    "code_configuration": "an MLflow model needs no scoring script",
    "endpoint_name": "the endpoint is the parameter name",
    "async": "traffic moves to a deployment once it answers, which takes waiting for it",
}


def read_settings(path, model_size=0):
    """Reads the config file of a deployment and writes our defaults into what it leaves open.

    Args:
        path: YAML or JSON file with the keys of azureml-mlflow for managed online endpoints, or an empty text for our
            defaults alone.
        model_size: Bytes of the model's files, for the choice of `instance_type`.

    Returns:
        A dict with every key, timeouts as `PT60S`; `azureml-mlflow` reads it as it is, and `deployment_properties`
        turns it into the properties of a request.

    Raises:
        ValueError: If the file is none, has an unknown key, or a value that Azure would refuse.
    """
    given = _read(path)
    for key in given:
        if key in _REFUSED:
            raise ValueError(f"{path}: expected no key {key}: {_REFUSED[key]}")
    settings = {
        "instance_type": next(name for size, name in _INSTANCE_TYPES if model_size < size),
        "instance_count": 1,
        "app_insights_enabled": True,
        "description": "",
        "environment_variables": {},
        "properties": {},
        "liveness_probe": _PROBE,
        "readiness_probe": _PROBE,
        "request_settings": _REQUESTS,
    }
    # Two ways of saying what is so anyway.
    known = {*settings, "type", "scale_settings"}
    _check_keys(given, known, path)
    if str(given.get("type", "managed")).lower() != "managed":
        raise ValueError(
            f"{path}: expected type: managed, for an endpoint on Kubernetes is made by Azure's own az ml alone. "
            f"Received: type={given['type']!r}"
        )
    if (given.get("scale_settings") or {"type": "default"}) != {"type": "default"}:
        raise ValueError(
            f"{path}: expected scale_settings to be {{type: default}}, as managed endpoints scale by autoscale rules. "
            f"Received: scale_settings={given['scale_settings']!r}"
        )
    for key, default in settings.items():
        value = given.get(key, default)
        if isinstance(default, dict):
            value = _check_mapping(key, value, default, path)
        elif type(value) is not type(default) or value == "" != default:
            raise ValueError(f"{path}: expected {key} to be {_KINDS[type(default)]}. Received: {key}={value!r}")
        settings[key] = value
    if settings["instance_count"] < 1:
        raise ValueError(f"{path}: expected instance_count of at least 1. Received: {settings['instance_count']}")
    return settings


_KINDS = {str: "a text", int: "a whole number", bool: "true or false"}


def _read(path):
    if not path:
        return {}
    try:
        # YAML reads JSON as well.
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"Expected config to be a YAML or JSON file, got {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def _check_keys(given, known, path):
    if unknown := sorted(str(key) for key in given if key not in known):
        raise ValueError(f"{path}: expected keys out of {', '.join(sorted(known))}. Received: {', '.join(unknown)}")


def _check_mapping(key, value, default, path):
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {key} to be a mapping. Received: {key}={value!r}")
    if not default:  # texts by name
        for name, text in value.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise ValueError(f"{path}: expected {key} to be texts in quotes. Received: {name}: {text!r}")
        return value
    _check_keys(value, default, f"{path}, {key}")
    checked = {**default, **value}
    for name, number in checked.items():
        if name.endswith("_ms"):
            checked[name] = _duration(number, f"{path}: {key}.{name}")
        elif type(number) is not int or number < (0 if name == "initial_delay" else 1):
            raise ValueError(f"{path}: expected {key}.{name} to be a whole number above 0. Received: {number!r}")
    return checked


def _duration(value, what):
    """Returns the milliseconds that a key speaks of as the ISO 8601 text that Azure wants."""
    if type(value) is int:
        seconds = value / 1000
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        seconds = float(_DURATION.fullmatch(value)[1])
    else:
        raise ValueError(f"{what}: expected milliseconds, or seconds as PT60S. Received: {value!r}")
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ValueError(f"{what}: expected at most {_LONGEST_TIMEOUT} s, which Azure allows. Received: {value!r}")
    return f"PT{seconds:g}S"


def deployment_properties(settings, model_id):
    """Returns the `properties` of a request that creates or changes a managed online deployment.

    Args:
        settings: What `read_settings` returned.
        model_id: ID of the registered model's version in Azure Resource Manager.
    """
    requests = settings["request_settings"]
    return {
        "endpointComputeType": "Managed",
        "model": model_id,
        "instanceType": settings["instance_type"],
        "appInsightsEnabled": settings["app_insights_enabled"],
        "description": settings["description"],
        "environmentVariables": settings["environment_variables"],
        "properties": settings["properties"],
        "livenessProbe": _probe(settings["liveness_probe"]),
        "readinessProbe": _probe(settings["readiness_probe"]),
        "requestSettings": {
            "requestTimeout": requests["request_timeout_ms"],
            "maxQueueWait": requests["max_queue_wait_ms"],
            "maxConcurrentRequestsPerInstance": requests["max_concurrent_requests_per_instance"],
        },
        "scaleSettings": {"scaleType": "Default"},
    }


def _probe(probe):
    return {
        "initialDelay": f"PT{probe['initial_delay']}S",
        "period": f"PT{probe['period']}S",
        "timeout": f"PT{probe['timeout']}S",
        "successThreshold": probe["success_threshold"],
        "failureThreshold": probe["failure_threshold"],
    }


def change_deployment(sku, properties, path):
    """Returns the `sku` and the `properties` of a deployment after what a config file says; the rest stays.

    Of a mapping, too, such as `request_settings`, what the file does not name stays.

    Args:
        sku: What Azure has as `sku`.
        properties: What Azure has as `properties`.
        path: As for `read_settings`.

    Raises:
        ValueError: As `read_settings`.
    """
    settings, given = read_settings(path), _read(path)
    complete, changed = deployment_properties(settings, properties.get("model")), dict(properties)
    for key, value in given.items():
        name = _camel_case(key)
        if isinstance(value, dict) and name in complete:
            names = value if key in _TEXTS else map(_camel_case, value)
            changed[name] = {**(changed.get(name) or {}), **{inner: complete[name][inner] for inner in names}}
        elif name in complete:
            changed[name] = complete[name]
    capacity = {"capacity": settings["instance_count"]} if "instance_count" in given else {}
    return {**sku, **capacity}, changed


def _camel_case(key):
    """Returns what Azure calls a key of azureml-mlflow."""
    first, *rest = key.removesuffix("_ms").split("_")
    return first + "".join(word.title() for word in rest)
