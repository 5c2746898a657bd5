import mlflow
import numpy as np
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from carflavor.report.sweeps import sweep_figure
from carflavor.train import TrainConfig
from carflavor.trials.report import SweepReport
from carflavor.trials.runs import Trial

RANGES = {
    "learning_rate": FloatDistribution(0.001, 0.1, log=True),
    "crop": CategoricalDistribution(["box", "full"]),
}


def synthetic_trials(count):
    random = np.random.default_rng(0)
    trials = []
    for number in range(1, count + 1):
        rate, crop = float(10 ** random.uniform(-3, -1)), str(random.choice(["box", "full"]))
        epochs = 0 if number == 3 else 4 if number % 4 == 0 else 8
        state = {0: "failed", 4: "pruned", 8: "finished"}[epochs]
        top = 0.9 - 0.2 * (np.log10(rate) + 2) ** 2
        accuracies = {epoch: float(top * (1 - 0.6**epoch)) for epoch in range(epochs)}
        trials.append(Trial(number, f"{number:032x}", state, {"learning_rate": rate, "crop": crop}, accuracies, 60.0))
    return trials


@pytest.mark.parametrize("count", [1, 3, 30])
def test_figure_of_few_and_many_trials(count, tmp_path):
    trials = synthetic_trials(count)
    best = max(trials, key=lambda trial: trial.accuracy or 0)
    figure = sweep_figure(trials, RANGES, best, {"learning_rate": 0.8, "crop": 0.2} if count == 30 else {})
    figure.savefig(tmp_path / "figure.png")
    curves, rate, crop = figure.axes
    assert len(curves.lines) >= sum(bool(trial.accuracies) for trial in trials)
    assert curves.get_title(loc="right").startswith(f"best: {best.accuracy:.1%}, trial {best.number}, epoch 8")
    assert rate.get_title(loc="left") == ("learning_rate (80%)" if count == 30 else "learning_rate")
    assert rate.get_xscale() == "log"
    assert [label.get_text() for label in crop.get_xticklabels()] == ["box", "full"]


def test_figure_where_none_has_finished(tmp_path):
    trials = [trial for trial in synthetic_trials(8) if trial.state != "finished"]
    sweep_figure(trials, RANGES, None, {}).savefig(tmp_path / "figure.png")
    sweep_figure([trial for trial in trials if not trial.accuracies], RANGES, None, {}).savefig(tmp_path / "none.png")


def test_report_says_how_far_it_is(store, caplog):
    def trial(number, state, rate, accuracies, failure=""):
        parameters = {"learning_rate": rate, "crop": "full"}
        return Trial(number, f"{number:032x}", state, parameters, dict(enumerate(accuracies)), 90.0, failure)

    settings = TrainConfig(data="/my records/a", preset="quick")
    earlier = [trial(1, "finished", 0.001, [0.5, 0.8]), trial(2, "failed", 0.1, [], "no space")]
    with mlflow.start_run() as run, caplog.at_level("INFO", "carflavor"):
        # Five are to be made, not four: one is made up for.
        report = SweepReport(store, run.info.run_id, settings, RANGES, 6, earlier)
        report._started -= 7200  # two hours ago
        report.add(trial(3, "finished", 0.002, [0.6, 0.75]))
        report.add(trial(4, "pruned", 0.05, [0.3]))
        report.add(trial(5, "finished", 0.004, [0.85, 0.9]))
        report.add(trial(6, "failed", 0.09, [], "no memory"))
    assert (report.best.number, report.left) == (5, 1)
    assert [record.message for record in caplog.records] == [
        "Trial 3: validation accuracy 0.750, best so far 0.800 (trial 1), 4 of 6 to go in about 8 h 0 min",
        "Trial 4: given up after epoch 1 with 0.300, best so far 0.800 (trial 1), 3 of 6 to go in about 3 h 0 min",
        "Trial 5: validation accuracy 0.900, the best so far, 2 of 6 to go in about 1 h 20 min",
        "Trial 6 failed: no memory, best so far 0.900 (trial 5), 1 of 6 to go in about 30 min",
    ]
    assert report.best_command() == (
        "mlflow run . -e train --env-manager local -P 'data=/my records/a' -P preset=quick -P crop=full "
        "-P learning_rate=0.004"
    )
    points = store.get_metric_history(run.info.run_id, "best_val_accuracy")
    assert [(point.step, point.value) for point in points] == [(1, 0.8), (5, 0.9)]
    table = pd.read_csv(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/trials.csv"))
    assert table["trial"].tolist() == [5, 1, 3, 4, 2, 6]
    assert table["best_epoch"].tolist()[:4] == [2, 2, 2, 1]
    assert table["minutes"].tolist() == [1.5] * 6
