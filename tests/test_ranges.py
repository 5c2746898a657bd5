import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from carflavor.train import TrainConfig
from carflavor.trials.ranges import read_ranges, read_settings
from carflavor.trials.sampling import UntriedSampler, list_combinations


def test_ranges_become_distributions(tmp_path):
    text = """
learning_rate: {low: 1e-4, high: 0.01, log: true}
mixup: [0, 0.2]
head_epochs: {low: 0, high: 30}
crop: [box, mixed]
preset: [quick, article]
"""
    (tmp_path / "ranges.yaml").write_text(text)
    expected = {
        "learning_rate": FloatDistribution(0.0001, 0.01, log=True),
        "mixup": CategoricalDistribution([0.0, 0.2]),
        "head_epochs": IntDistribution(0, 30),
        "crop": CategoricalDistribution(["box", "mixed"]),
        "preset": CategoricalDistribution(["quick", "article"]),
    }
    assert read_ranges(text) == read_ranges(str(tmp_path / "ranges.yaml")) == expected
    settings = read_settings("{epochs: 3, cutmix: 1, devices: 2}", "/records", "best", {"crop": expected["crop"]})
    assert settings == TrainConfig(data="/records", preset="best", epochs=3, cutmix=1.0, devices=2, crop="box")
    assert read_settings("", "sample", "scratch", {}) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "ranges: expected YAML such as {learning_rate: {low: 0.0001, high: 0.01, log: true}, mixup: [0, 0.2, 0.4]}",
        ),
        ("[0, 1]", "ranges: expected YAML such as {learning_rate: "),
        ("{mixup: [", "while parsing a flow node expected the node content"),
        ("ranges.yaml", 'type it in full, for instance ranges="$PWD/ranges.yaml"'),
        ("{learning_rte: [0.1, 0.2]}", "ranges: expected names from preset, network, weights, "),
        ("{learning_rte: [0.1, 0.2]}", "Received: learning_rte"),
        ("{data: [/a, /b]}", "Received: data"),
        ("{validation: [train, hold_out]}", "Received: validation"),
        (
            "{mixup: 0.2}",
            "ranges: expected a list of values or {low, high}, with log if wanted, for mixup. Received: 0.2",
        ),
        ("{mixup: {low: 0.2}}", "for mixup. Received: {'low': 0.2}"),
        ("{mixup: {low: 0, high: 1, step: 0.1}}", "for mixup. Received: {'low': 0, 'high': 1, 'step': 0.1}"),
        ("{mixup: {low: 1, high: 0}}", "expected low to be less than high for mixup. Received: low=1.0, high=0.0"),
        ("{mixup: {low: 0, high: .inf}}", "Received: low=0.0, high=inf"),
        ("{input_size: {low: auto, high: 224}}", "for input_size. Received: low=auto, high=224"),
        ("{mixup: {low: 0, high: 1, log: true}}", "to be more than 0 for mixup, as log is true. Received: low=0.0"),
        ("{mixup: {low: 0.1, high: 1, log: 10}}", "ranges: expected log to be true or false for mixup. Received: 10"),
        ("{mixup: [0.2]}", "ranges: expected two or more different values for mixup. Received: [0.2]"),
        ("{mixup: [0, 0.0]}", "ranges: expected two or more different values for mixup. Received: [0, 0.0]"),
        ("{mixup: [0, null]}", "ranges: expected a number or a text for mixup. Received: None"),
        ("{mixup: [0, true]}", "ranges: expected a number or a text for mixup. Received: True"),
        ("{learning_rate: [0, 0.1]}", "ranges: learning_rate: 0.0 is not in the range x>0"),
        ("{epochs: [2.5, 3]}", "ranges: epochs: '2.5' is not a valid integer range"),
        ("{crop: [box, half]}", "ranges: crop: 'half' is not one of 'box', 'full', 'mixed'"),
        ("{crop: {low: 1, high: 2}}", "ranges: expected a list of values for crop. Received: {'low': 1, 'high': 2}"),
    ],
)
def test_ranges_that_are_none(text, message):
    with pytest.raises(ValueError) as refusal:
        read_ranges(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{mixup: 0.1}", "settings: expected parameters that do not stand in ranges. Received: mixup"),
        ("{mixup: 0.1, colour: 1}", "settings: expected names from network, weights, "),
        ("{epochs: 0}", "settings: epochs: 0 is not in the range x>=1"),
        ("{epochs: [1, 2]}", "settings: expected a number or a text for epochs. Received: [1, 2]"),
        ("{preset: quick}", "Received: preset"),
        ("epochs=3", 'type it in full, for instance settings="$PWD/epochs=3"'),
    ],
)
def test_settings_that_are_none(text, message):
    with pytest.raises(ValueError) as refusal:
        read_settings(text, "sample", "scratch", {"mixup": CategoricalDistribution([0.0, 0.2])})
    assert message in str(refusal.value)


def test_listed_values_in_any_order_need_one_combination_that_is_valid():
    statistics = CategoricalDistribution(["frozen", "batch"])
    refused = "statistics=frozen goes with none of the other values: Expected weights with statistics=frozen"
    with pytest.raises(ValueError, match=f"ranges: {refused}"):
        read_settings("", "sample", "scratch", {"statistics": statistics})
    with pytest.raises(ValueError, match="^Expected weights with statistics=frozen"):
        read_settings("{statistics: frozen}", "sample", "scratch", {"mixup": CategoricalDistribution([0.0, 0.2])})
    ranges = {"statistics": statistics, "weights": CategoricalDistribution(["none", "imagenet"])}
    assert read_settings("", "sample", "scratch", ranges).statistics == "frozen"


def test_sampler_tries_no_combination_twice():
    ranges = {"mixup": CategoricalDistribution([0.0, 0.1, 0.2]), "head_epochs": IntDistribution(1, 5)}
    assert len(list_combinations(ranges)) == 15
    assert list_combinations(ranges)[0] == {"mixup": 0.0, "head_epochs": 1}
    assert list_combinations({**ranges, "learning_rate": FloatDistribution(0.001, 0.1, log=True)}) is None
    study = optuna.create_study(direction="maximize", sampler=UntriedSampler(ranges, seed=0))
    for _ in range(15):
        trial = study.ask(ranges)
        # All but the best value are much alike: TPE alone would try it again and again.
        study.tell(trial, float(trial.params == {"mixup": 0.1, "head_epochs": 3}))
    tried = [(trial.params["mixup"], trial.params["head_epochs"]) for trial in study.trials]
    assert sorted(tried) == [(mixup, epochs) for mixup in (0.0, 0.1, 0.2) for epochs in (1, 2, 3, 4, 5)]
