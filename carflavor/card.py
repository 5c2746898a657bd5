"""The model card: README.md of a packed model, which says what it is, how good it is, and how to ask it."""

import json
import re
from pathlib import Path

import jinja2

from carflavor.data.sources import EMBEDDED_SAMPLE
from carflavor.measures import Share

CARD = "README.md"
_VERSION = "<version>"  # in the model, which has no number before it is registered
_CLASSES_NAMED = 8
_LONGEST_DESCRIPTION = 5000  # characters; MLflow's databases have no room for more
_NOT_WHOLE = f"\n\nThe rest stands in {CARD} of the model."


def write_card(path, name, alias, licence="", evaluation=None):
    """Writes README.md into a model directory. It is in no manifest: loading does not read it.

    Args:
        path: Path of the model directory, packed as it will be registered.
        name: Name in the registry that it will have.
        alias: Alias that it will have there.
        licence: Licence of the model, as text; empty if it is not stated.
        evaluation: Optional content of `evaluation.json`, with the id of its run as `run`.

    Returns:
        The text, with `<version>` for its number in the registry.
    """
    path = Path(path)
    manifest, class_names = (_read_json(path / name) for name in ("manifest.json", "classes.json"))
    facts = _describe(manifest, class_names, evaluation)
    text = _CARD.render(facts, name=name, alias=alias, version=_VERSION, licence=licence)
    (path / CARD).write_text(text, encoding="utf-8")
    return text


def shorten(text, version):
    """Returns a card as a registry has room for it, with the number of the version.

    It is whole, or cut off before a heading or, without one, anywhere.
    """
    text = text.replace(_VERSION, str(version))
    if len(text) <= _LONGEST_DESCRIPTION:
        return text
    room = text[: _LONGEST_DESCRIPTION - len(_NOT_WHOLE)]
    end = room.rfind("\n\n## ")
    return room[: end if end > 0 else None] + _NOT_WHOLE


def _describe(manifest, class_names, evaluation):
    """Returns what the template tells of a model."""
    training, engine = manifest["training"], manifest["engine"]
    data = training.get("data") or {}
    source, weights = data.get("source") or "not known", training.get("weights") or "not known"
    name = "OpenVINO" if engine["name"] == "openvino" else "Keras"
    epoch, accuracy = training.get("best_epoch"), training.get("validation_accuracy")
    held_out = training.get("validation", "hold_out") == "hold_out"
    return {
        "class_names": class_names,
        "named": _CLASSES_NAMED,
        "is_sample": source == EMBEDDED_SAMPLE,
        "source": source,
        "weights": weights,
        "trained_crop": training.get("crop"),
        "is_calibrated": training.get("temperature") is not None,
        "learned_validation": not held_out,
        "crop_margin": manifest["crop_margin"],
        "engine": f"{name} in {engine['precision']}",
        "parities": list((manifest["parity"] or {}).get("crops", {}).items()),
        "boxes": "" if training.get("crop") == "full" else ", boxes=[(40, 30, 150, 100)]",
        "origin": [
            ("network", training.get("network")),
            ("input", f"{manifest['input_size']} x {manifest['input_size']} pixels"),
            ("began with weights", weights),
            ("learned from", source),
            ("digest of that source", data.get("source_digest")),
            ("crop in training", training.get("crop")),
            ("preset", training.get("preset")),
            ("epoch kept, from 0", epoch),
            ("validation accuracy, by which it was chosen", None if accuracy is None else f"{100 * accuracy:.1f} %"),
            ("temperature", None if training.get("temperature") is None else f"{training['temperature']:.3f}"),
            ("engine", f"{name} in {engine['precision']}"),
            ("packed by carflavor", manifest["carflavor_version"]),
        ],
        **_describe_evaluation(evaluation),
    }


def _describe_evaluation(evaluation):
    if evaluation is None:
        return {"crops": [], "calibration": [], "thresholds": []}
    measured = {crop: tables["measurement"] for crop, tables in evaluation["crops"].items()}
    shares = ("top_1", "top_5", "make", "without_near_duplicates")
    return {
        "evaluation_run": evaluation["run"],
        "measured_source": evaluation["data"]["source"],
        "measured_photos": f"{next(iter(measured.values()))['photos']:,}",
        "crops": [
            (crop, [str(Share(**found[share])) if found[share] else "not known" for share in shares])
            for crop, found in measured.items()
        ],
        "calibration": [
            (crop, found["calibration"]["ece"], found["calibration"]["mean_prob"])
            for crop, found in measured.items()
            if found["calibration"]
        ],
        "thresholds": [
            (crop, chosen["min_prob"], Share(**chosen["answered"]), Share(**chosen["accuracy"]))
            for crop, tables in evaluation["crops"].items()
            if (chosen := (tables["threshold"] or {}).get("test"))
        ],
    }


def _plain(text):
    """Keeps Markdown and HTML from reading a name as theirs, and a line break from ending a row of a table."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


_ENVIRONMENT = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters["plain"] = _plain
_CARD = _ENVIRONMENT.from_string((Path(__file__).parent / "templates" / "card.md").read_text(encoding="utf-8"))
