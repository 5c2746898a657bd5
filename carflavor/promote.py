"""Makes a version of the registry the champion, where evaluation finds it better than the one that is."""

import logging
from dataclasses import dataclass

import mlflow

from carflavor import tracking
from carflavor.data.records import CROPS
from carflavor.evaluate import EvaluateConfig, evaluate_in_run
from carflavor.preprocess import open_split

CHAMPION, CHALLENGER = "champion", "challenger"  # aliases in the registry
CROP_CHOICES = ("all", *CROPS)
# What tags of a version with its figures begin with. Unity Catalog refuses . , - = / : in names of tags.
EVALUATION_TAGS = "carflavor_evaluation_"
_P_VALUE = 0.05  # below it the report of evaluate calls a difference more than chance explains

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromoteConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        data: Folder with `test.h5`, as path or URI, or `sample`.
        name: Name in the registry.
        challenger: Which version of it to promote: its number or an alias.
        crop: Crop protocol that decides: `box` or `full`, whichever callers use, or `all` that the test file holds.
        margin: Accuracy that may be lost, as share: 0 asks for a version that is better, more than 0 for one that is
            not worse by as much.
        dry_run: Whether to say what would be done, and change nothing in the registry.
    """

    data: str
    name: str = "carflavor"
    challenger: str = CHALLENGER
    crop: str = "all"
    margin: float = 0.0
    dry_run: bool = False


def promote(config):
    """Evaluates a version against the champion on the same photos, and gives it the alias `champion` if it is better.

    What evaluation has found becomes tags of the version, whether it is promoted or not. Then a single call of the
    registry moves the alias; whoever loads `models:/<name>@champion` gets the old version or the new one. Last, the
    alias `challenger` is taken from the version. A step that was interrupted in between is made whole by the next one.

    Args:
        config: `PromoteConfig`.

    Returns:
        The verdict of `judge`, `first` where there was no champion, or `champion` where it was that version already.

    Raises:
        ValueError: If there is no such version, it is not found better, another one became champion meanwhile, or the
            test file lacks the crop.
        MlflowException: If the registry refuses.
    """
    with tracking.step_run("promote", config):
        client = mlflow.MlflowClient()
        version, champion = _find_versions(client, config)
        uri = f"models:/{config.name}/{version}"
        if version == champion:
            _withdraw_challenger(client, config, version)
            _logger.info("%s is the champion already: nothing was measured", uri)
            return "champion"
        against = f"models:/{config.name}/{champion}" if champion else ""
        # Before anything takes long.
        with open_split(config.data, "test") as test:
            judged = [crop for crop in test.crops if config.crop in ("all", crop)]
            if not judged:
                raise ValueError(f"crop: expected {' or '.join(test.crops)}, as {test.path} has it, got {config.crop}")
        all_findings = evaluate_in_run(EvaluateConfig(uri, config.data, against))
        comparisons = {crop: all_findings[crop].comparison for crop in judged}
        verdict = judge(comparisons.values(), config.margin) if champion else "first"
        mlflow.set_tag(EVALUATION_TAGS + "verdict", verdict)
        if not config.dry_run:
            _tag(client, config.name, version, _list_tags(all_findings, verdict, champion))
        said = _say_comparisons(comparisons) if champion else _say_first(all_findings, judged)
        if verdict in ("worse", "not better"):
            wanted = f"not worse by {100 * config.margin:g} points than" if config.margin else "better than"
            raise ValueError(f"{uri} is not promoted: evaluation did not find it {wanted} {against}: {said}")
        instead = f" instead of version {champion}" if champion else ", the first one"
        if config.dry_run:
            _logger.info("%s would become the champion%s; nothing was changed: %s", uri, instead, said)
            return verdict
        _crown(client, config, version, champion)
        _logger.info("%s is the champion now%s: %s", uri, instead, said)
    return verdict


def judge(comparisons, margin=0.0):
    """Decides whether a model may take the place of another one.

    Args:
        comparisons: `carflavor.measures.Comparison` of the new one with the old one, one for each crop protocol.
        margin: Accuracy that may be lost, as share; 0 for none.

    Returns:
        `better`: under one protocol at least McNemar's exact test says so at 5 %, and under none that it is worse.
        `not worse`: under none the 95 % interval of the difference reaches as low as `-margin`, which is above 0.
        `worse`: under one at least the test says so. `not better`: none of these.
    """
    comparisons = list(comparisons)
    clear = [comparison.difference for comparison in comparisons if comparison.p_value < _P_VALUE]
    if clear and min(clear) > 0:
        return "better"
    if margin > 0 and all(comparison.low > -margin for comparison in comparisons):
        return "not worse"
    return "worse" if any(difference < 0 for difference in clear) else "not better"


def _find_versions(client, config):
    """Returns the numbers, as text, of the version to promote and of the champion, which is empty if there is none."""
    model = client.get_registered_model(config.name)
    # By its number from here on: an alias may move while photos are scored.
    version = config.challenger
    if not version.isdecimal():
        version = model.aliases.get(config.challenger)
        if version is None:
            known = ", ".join(sorted(model.aliases)) or "none"
            raise ValueError(
                f"challenger: expected a version of {config.name}, as number or alias (there are: {known}), "
                f"got {config.challenger!r}"
            )
    return str(client.get_model_version(config.name, version).version), str(model.aliases.get(CHAMPION, ""))


def _list_tags(all_findings, verdict, champion):
    run = mlflow.MlflowClient().get_run(mlflow.active_run().info.run_id)
    tags = {"run": run.info.run_id, "data": run.data.tags[tracking.DATA_TAG], "verdict": verdict}
    if champion:
        tags["against"] = champion
    for crop, findings in all_findings.items():
        measurement, comparison = findings.measurement, findings.comparison
        tags[f"{crop}_photos"] = str(measurement.photos)
        tags |= _list_interval(f"{crop}_top_1", measurement.top_1.value, measurement.top_1)
        if measurement.top_5:
            tags |= _list_interval(f"{crop}_top_5", measurement.top_5.value, measurement.top_5)
        if comparison:
            tags |= _list_interval(f"{crop}_difference", comparison.difference, comparison)
            tags[f"{crop}_mcnemar_p"] = f"{comparison.p_value:.4g}"
    return {EVALUATION_TAGS + name: value for name, value in tags.items()}


def _list_interval(name, value, interval):
    return {name: f"{value:.4f}", f"{name}_low": f"{interval.low:.4f}", f"{name}_high": f"{interval.high:.4f}"}


def _tag(client, name, version, tags):
    found = client.get_model_version(name, version).tags
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)
    # Of an evaluation before: on other crops, or against a champion that there is no longer.
    for tag in found.keys() - tags.keys():
        if tag.startswith(EVALUATION_TAGS):
            client.delete_model_version_tag(name, version, tag)


def _crown(client, config, version, champion):
    # The registry cannot be told to move an alias only if nobody else has. It has been minutes since it was asked.
    found = str(client.get_registered_model(config.name).aliases.get(CHAMPION, ""))
    if found != champion:
        raise ValueError(
            f"Expected models:/{config.name}@{CHAMPION} to be {f'version {champion} still' if champion else 'unset'}, "
            f"got version {found or 'none'}: it was moved while photos were scored. Promote again"
        )
    client.set_registered_model_alias(config.name, CHAMPION, version)
    _withdraw_challenger(client, config, version)


def _withdraw_challenger(client, config, version):
    aliases = client.get_registered_model(config.name).aliases
    if not config.dry_run and str(aliases.get(CHALLENGER, "")) == version:
        client.delete_registered_model_alias(config.name, CHALLENGER)


def _say_comparisons(comparisons):
    return "; ".join(
        f"crop={crop} {100 * comparison.difference:+.1f} points ({100 * comparison.low:+.1f} to "
        f"{100 * comparison.high:+.1f}, p = {comparison.p_value:.2g}) on {comparison.first.of:,} photos"
        for crop, comparison in comparisons.items()
    )


def _say_first(all_findings, judged):
    return "; ".join(
        f"crop={crop} top-1 {all_findings[crop].measurement.top_1} of {all_findings[crop].measurement.photos:,} photos"
        for crop in judged
    )
