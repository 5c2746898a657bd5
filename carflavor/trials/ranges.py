"""What a sweep fixes and what it varies: from the text that a user types to what `train` and Optuna take."""

import math
from dataclasses import fields
from typing import get_args

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from carflavor.data.locations import resolve_input
from carflavor.parameters import convert, train_types
from carflavor.train import TrainConfig
from carflavor.trials.sampling import list_combinations

_EXAMPLES = {
    "settings": "{epochs: 10, crop: mixed}",
    "ranges": "{learning_rate: {low: 0.0001, high: 0.01, log: true}, mixup: [0, 0.2, 0.4]}",
}
# Places and habits of a training, not settings: a parameter of the sweep itself, or what a sweep relies on. Without
# validation photos (validation=train) trials cannot be compared.
_NOT_FOR_SWEEPS = ("data", "validation", "resume")
_NOT_FOR_SETTINGS = (*_NOT_FOR_SWEEPS, "preset")  # a parameter of the sweep itself, too
_NOT_FOR_RANGES = (*_NOT_FOR_SWEEPS, "devices", "temperature")


def read_settings(text, data, preset, ranges):
    """Reads the parameters that are the same in all trials.

    Args:
        text: YAML mapping of `train`'s parameters to values, the name of a file with one, or empty for none.
        data: Folder with record files.
        preset: One of `carflavor.recipes.PRESETS`.
        ranges: What `read_ranges` returned.

    Returns:
        `carflavor.train.TrainConfig`. The parameters in `ranges` have the first value of their range.

    Raises:
        ValueError: If a parameter is unknown, also in `ranges`, or not what `train` takes, or if a value that is listed
            in `ranges` goes with no combination of the others.
    """
    given = _read_mapping(text, "settings", _NOT_FOR_SETTINGS) if text else {}
    if both := [name for name in given if name in ranges]:
        raise ValueError(f"settings: expected parameters that do not stand in ranges. Received: {', '.join(both)}")
    values = {name: _convert(value, "settings", name) for name, value in given.items()}
    listed = {name: range_ for name, range_ in ranges.items() if isinstance(range_, CategoricalDistribution)}
    low = {name: range_.low for name, range_ in ranges.items() if name not in listed}
    combinations = list_combinations(listed) or [{name: range_.choices[0] for name, range_ in listed.items()}]
    configs = [TrainConfig(**{"data": data, "preset": preset, **values, **low, **tried}) for tried in combinations]
    _check_values(combinations, [_find_error(config) for config in configs])
    return configs[0]


def _find_error(config):
    """Returns what is wrong with parameters that the command's types would take each by itself, or None."""
    try:
        config.resolved()
    except ValueError as error:
        return error


def _check_values(combinations, errors):
    if None not in errors:
        raise errors[0]
    outcomes = list(zip(combinations, errors, strict=True))
    possible = {pair for tried, error in outcomes if error is None for pair in tried.items()}
    for tried, error in outcomes:
        for name, value in tried.items():
            if (name, value) not in possible:
                raise ValueError(f"ranges: {name}={value} goes with none of the other values: {error}")


def read_ranges(text):
    """Reads the parameters that differ between trials.

    Args:
        text: YAML mapping of `train`'s parameters to a list of values or to `{low, high}` with an optional `log`, or
            the name of a file with one.

    Returns:
        Dict of parameter name to Optuna distribution.

    Raises:
        ValueError: If a parameter is unknown or its range is none.
    """
    given = _read_mapping(text, "ranges", _NOT_FOR_RANGES)
    return {name: _read_range(name, values) for name, values in given.items()}


def _read_mapping(text, parameter, excluded):
    expected = f"{parameter}: expected YAML such as {_EXAMPLES[parameter]}, or a file with it"
    content = _parse(text, parameter)
    if isinstance(content, str):
        path = resolve_input(content, parameter)
        if not path.is_file():
            raise ValueError(f"{expected}. Received: the folder {path}")
        content = _parse(path.read_text(encoding="utf-8"), parameter)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{expected}. Received: {text!r}")
    names = [name for name in train_types() if name not in excluded]
    if unknown := [str(name) for name in content if name not in names]:
        raise ValueError(f"{parameter}: expected names from {', '.join(names)}. Received: {', '.join(unknown)}")
    return content


def _parse(text, parameter):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{parameter}: expected YAML such as {_EXAMPLES[parameter]}. {problem}") from None


def _read_range(name, values):
    if isinstance(values, list):
        choices = [_convert(value, "ranges", name) for value in values]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(f"ranges: expected two or more different values for {name}. Received: {values}")
        return CategoricalDistribution(choices)
    kind = _number_type(name)
    if kind is None:
        raise ValueError(f"ranges: expected a list of values for {name}. Received: {values!r}")
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
        raise ValueError(
            f"ranges: expected a list of values or {{low, high}}, with log if wanted, for {name}. Received: {values!r}"
        )
    low, high = (_convert(values[end], "ranges", name) for end in ("low", "high"))
    if not (isinstance(low, kind) and isinstance(high, kind) and low < high < math.inf):
        raise ValueError(f"ranges: expected low to be less than high for {name}. Received: low={low}, high={high}")
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"ranges: expected log to be true or false for {name}. Received: {log!r}")
    if log and low <= 0:
        raise ValueError(f"ranges: expected low to be more than 0 for {name}, as log is true. Received: low={low}")
    return (IntDistribution if kind is int else FloatDistribution)(low, high, log=log)


def _convert(value, parameter, name):
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"{parameter}: expected a number or a text for {name}. Received: {value!r}")
    try:
        return convert({name: value})[name]
    except ValueError as error:
        raise ValueError(f"{parameter}: {error}") from None


def _number_type(name):
    (field_type,) = (field.type for field in fields(TrainConfig) if field.name == name)
    kinds = get_args(field_type) or (field_type,)
    return next((kind for kind in (int, float) if kind in kinds), None)
