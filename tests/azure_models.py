"""Checks bodies of requests against the published models of the Azure Machine Learning API.

The models are those of azure-ai-ml, whose clients Microsoft generates from the API's specification.
"""

import enum
import functools
import importlib.metadata
import importlib.util
import re
import sys

from msrest.exceptions import DeserializationError, ValidationError
from msrest.serialization import Deserializer, Serializer

# The client in azure-ai-ml of each version of the API that has requests with bodies.
CLIENTS = {"2022-02-01-preview": "v2022_02_01_preview", "2021-10-01": "v2021_10_01"}

# What a value of each basic type is in JSON. Booleans are no numbers, which Python's isinstance would make them.
_BASIC = {"str": {str}, "int": {int}, "long": {int}, "float": {int, float}, "bool": {bool}, "object": None}
_PARSED = {"duration": Deserializer.deserialize_duration, "iso-8601": Deserializer.deserialize_iso}


@functools.cache
def read_models(api_version):
    """Returns the module with the models of one version of the API.

    It is loaded by its path: `import azure.ai.ml` loads the whole SDK, which takes seconds and which the models do
    without.
    """
    name = f"azure_models_{CLIENTS[api_version]}"
    folder = importlib.metadata.distribution("azure-ai-ml").locate_file(
        f"azure/ai/ml/_restclient/{CLIENTS[api_version]}/models"
    )
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_faults(body, model, api_version):
    """Compares a body with a model: keys that it does not know, that are missing, and values of another type.

    Keys that the service fills in itself are let through, as by Azure: a client may send back what it has read.

    Args:
        body: What JSON was parsed to.
        model: Name of a model, such as `OnlineDeploymentData`.
        api_version: One of `CLIENTS`.

    Returns:
        List of sentences, such as "properties.livenessProbe.period: expected duration, got 30".
    """
    return list(_find(body, model, read_models(api_version), ""))


def _find(value, kind, models, place):
    if kind[0] in "{[":
        container = {"{": dict, "[": list}[kind[0]]
        if not isinstance(value, container):
            yield f"{place or 'body'}: expected {container.__name__}, got {value!r}"
            return
        for key, item in value.items() if container is dict else enumerate(value):
            yield from _find(item, kind[1:-1], models, f"{place}.{key}")
    elif kind in _PARSED:
        try:
            if not isinstance(value, str):
                raise DeserializationError(kind)
            _PARSED[kind](value)
        except DeserializationError:
            yield f"{place}: expected {kind}, got {value!r}"
    elif kind in _BASIC:
        if _BASIC[kind] is not None and type(value) not in _BASIC[kind]:
            yield f"{place}: expected {kind}, got {value!r}"
    else:
        yield from _find_in_object(value, getattr(models, kind), models, place)


def _find_in_object(value, model, models, place):
    if not isinstance(value, dict):
        yield f"{place or 'body'}: expected {model.__name__}, got {value!r}"
        return
    prefix = f"{place}." if place else ""
    # Of its own, not inherited: a subtype's attribute of that name is its parent's list of all of them.
    for attribute, subtypes in vars(model).get("_subtype_map", {}).items():
        key = model._attribute_map[attribute]["key"]
        if value.get(key) not in subtypes:
            yield f"{prefix}{key}: expected one of {', '.join(subtypes)}, got {value.get(key)!r}"
        else:
            yield from _find_in_object(value, getattr(models, subtypes[value[key]]), models, place)
        return
    attributes = {entry["key"]: (name, entry["type"]) for name, entry in model._attribute_map.items()}
    for key in value:
        if key not in attributes:
            yield f"{place or 'body'}: expected keys among {', '.join(sorted(attributes))}, got {key!r}"
    for key, (attribute, kind) in attributes.items():
        rules = dict(model._validation.get(attribute, {}))
        readonly, required = rules.pop("readonly", False), rules.pop("required", False)
        if value.get(key) is None:
            # null is how JSON leaves a key out.
            if required and not readonly:
                yield f"{prefix}{key}: expected a value, got none"
            continue
        faults = list(_find(value[key], kind, models, f"{prefix}{key}"))
        yield from faults
        if faults or readonly:
            continue
        try:
            Serializer.validate(value[key], key, **rules)
        except ValidationError as error:
            yield f"{prefix}{key}: expected {error.rule} {error.value}, got {value[key]!r}"
        names = _read_enum(model, attribute, models)
        if names and value[key] not in names:
            yield f"{prefix}{key}: expected one of {', '.join(names)}, got {value[key]!r}"


def _read_enum(model, attribute, models):
    """Returns the values that an attribute may have; they are in the model's docstring alone."""
    found = re.search(rf":vartype {attribute}: str or\s+~azure\.mgmt\S*\.models\.(\w+)", model.__doc__ or "")
    kind = getattr(models, found[1], None) if found else None
    return [item.value for item in kind] if isinstance(kind, enum.EnumMeta) else []
