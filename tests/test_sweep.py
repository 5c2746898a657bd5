import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.entities import Param
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from test_train import add_tiny_network, wait_for, write_split

import carflavor
from carflavor import sweep as sweeping
from carflavor import trials as recording
from carflavor.networks import NETWORKS
from carflavor.ranges import read_ranges, read_settings
from carflavor.report.sweeps import sweep_figure
from carflavor.sampling import UntriedSampler, list_combinations
from carflavor.sweep import SweepConfig, sweep
from carflavor.sweep_report import SweepReport
from carflavor.train import TrainConfig, train
from carflavor.trial_process import TrialFailed
from carflavor.trials import Trial, take_over_trials

PROJECT = Path(__file__).parents[1]
LEARNING_RATE = {"learning_rate": FloatDistribution(0.001, 0.1, log=True)}


@pytest.fixture(autouse=True)
def tiny_network_by_name(monkeypatch):
    monkeypatch.delitem(NETWORKS, "tiny", raising=False)  # has it removed after the test
    add_tiny_network()


@pytest.fixture
def data(tmp_path):
    write_split(tmp_path / "records" / "train.h5", [0, 1, 2] * 16)
    write_split(tmp_path / "records" / "validation.h5", [0, 1, 2] * 4)
    return tmp_path / "records"


def small(data, ranges, **changes):
    settings = "{network: tiny, epochs: 3, batch_size: 16}"
    return SweepConfig(**{"data": str(data), "settings": settings, "ranges": ranges, **changes})


# The process of each trial imports these by name.


def train_tiny(config, on_epoch):
    add_tiny_network()
    return train(config, on_epoch)


def train_and_kill_the_sweep(config, on_epoch):
    """Kills the sweep after the second epoch at a learning rate of 0.002."""

    def kill(epoch, metrics):
        if epoch == 1 and config.learning_rate == 0.002:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return on_epoch(epoch, metrics)

    return train_tiny(config, kill)


def die(config, on_epoch):
    os.kill(os.getpid(), signal.SIGKILL)


def sweeps_and_trials(store):
    runs = store.search_runs(["0"], order_by=["attributes.start_time ASC"])
    sweeps = [run for run in runs if run.data.tags.get("carflavor.step") == "sweep"]
    return sweeps, [run for run in runs if "carflavor.trial" in run.data.tags]


def parent_of(run):
    return run.data.tags["mlflow.parentRunId"]


def read_csv(run_id):
    return pd.read_csv(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/trials.csv"))


def test_sweep_compares_trials_that_finish_fail_and_are_pruned(store, data, monkeypatch):
    monkeypatch.setattr(sweeping, "_TRIALS_BEFORE_PRUNING", 1)
    # In this order, which is that of seed 0: the loss is no number, learns well, learns nothing.
    best = sweep(small(data, "{learning_rate: [0.003, 0.0000001, 1.0e+30]}"), train_tiny)
    (parent,), trials = sweeps_and_trials(store)
    assert [trial.info.run_name for trial in trials] == ["trial 1", "trial 2", "trial 3"]
    assert [parent_of(trial) for trial in trials] == [parent.info.run_id] * 3
    assert [trial.data.params["learning_rate"] for trial in trials] == ["1e+30", "0.003", "1e-07"]
    assert [trial.info.status for trial in trials] == ["FAILED", "FINISHED", "KILLED"]
    failed, finished, pruned = trials
    failure = "The loss is nan after epoch 1: try a smaller learning_rate"
    assert failed.data.tags["carflavor.failure"] == failure
    assert "carflavor.pruned" not in finished.data.tags
    assert pruned.data.tags["carflavor.pruned"] == "after epoch 2"
    assert pruned.data.tags["mlflow.source.name"] == parent.data.tags["mlflow.source.name"]

    # Each is the run of a training; only the one that has finished has a model.
    assert [trial.data.tags["carflavor.step"] for trial in trials] == ["train"] * 3
    history = [point.step for point in store.get_metric_history(finished.info.run_id, "val_accuracy")]
    assert history == [0, 1, 2]
    assert len(store.get_metric_history(pruned.info.run_id, "val_accuracy")) == 2
    (model,) = mlflow.search_logged_models(output_format="list")
    assert model.source_run_id == finished.info.run_id
    assert carflavor.load_model(f"runs:/{finished.info.run_id}/model").class_names == ["red", "green", "blue"]
    assert list(Path(os.environ["CARFLAVOR_HOME"], "checkpoints").glob("*/progress.json")) == []

    assert (best.number, best.run_id, best.parameters) == (2, finished.info.run_id, {"learning_rate": 0.003})
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best_val_accuracy": best.accuracy}
    assert finished.data.metrics["best_val_accuracy"] == best.accuracy > 0.6
    assert parent.data.tags["carflavor.model"] == f"runs:/{finished.info.run_id}/model"
    assert parent.data.tags["carflavor.data"] == "colours"
    assert {used.dataset.name for used in parent.inputs.dataset_inputs} == {"colours train", "colours validation"}
    artifacts = {artifact.path for artifact in store.list_artifacts(parent.info.run_id)}
    assert artifacts == {
        *("best.json", "comparison.png", "config.json", "report.html", "resolved_config.json", "trials.csv")
    }
    assert mlflow.artifacts.load_dict(f"runs:/{parent.info.run_id}/best.json") == {"learning_rate": 0.003}
    table = read_csv(parent.info.run_id)
    assert table["trial"].tolist() == [2, 3, 1]
    assert table["state"].tolist() == ["finished", "pruned", "failed"]
    assert table["learning_rate"].tolist() == [0.003, 1e-7, 1e30]
    assert table["epochs"].tolist() == [3, 2, 0]
    assert table["failure"].tolist()[2] == failure
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/report.html")).read_text()
    assert f"mlflow run . -e train -P data={data} -P network=tiny -P epochs=3 -P batch_size=16" in page


def test_killed_sweep_goes_on_where_it_was(store, data, clean_environment):
    """The first sweep is a process of its own; the training of its second trial kills it with SIGKILL."""
    program = f"""
import sys
sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}]
sys.modules["pyspark"] = None  # a sweep without a master does without it
import mlflow, test_sweep
if __name__ == "__main__":
    test_sweep.add_tiny_network()
    mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
    config = test_sweep.small({str(data)!r}, "{{learning_rate: [0.002, 0.003]}}", seed=3)
    test_sweep.sweep(config, test_sweep.train_and_kill_the_sweep)
"""
    Path("killed.py").write_text(program)
    environment = {**clean_environment, "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"]}
    killed = subprocess.run([sys.executable, "killed.py"], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (dead,), (finished, interrupted) = sweeps_and_trials(store)
    assert [run.info.status for run in (dead, finished)] == ["RUNNING", "FINISHED"]
    # A trial whose sweep dies may have time to say so.
    assert interrupted.info.status in ("RUNNING", "KILLED")
    assert finished.data.params["learning_rate"] == "0.003"

    sweep(small(data, "{learning_rate: [0.002, 0.003]}", seed=3), train_tiny)
    (dead, parent), (finished, interrupted, resumed) = sweeps_and_trials(store)
    assert (dead.info.status, parent.info.status) == ("KILLED", "FINISHED")
    assert parent.data.tags["carflavor.resumed_from"] == dead.info.run_id
    # What was done is now this sweep's; what was not stays where it was, and is done again from its checkpoint.
    assert parent_of(finished) == parent.info.run_id
    assert (parent_of(interrupted), interrupted.info.status) == (dead.info.run_id, "KILLED")
    assert (parent_of(resumed), resumed.info.status) == (parent.info.run_id, "FINISHED")
    assert resumed.data.params["learning_rate"] == "0.002"
    assert resumed.data.tags["carflavor.resumed_from"] == interrupted.info.run_id
    curves = [store.get_metric_history(run.info.run_id, "val_accuracy") for run in (interrupted, resumed)]
    first, whole = ([(point.step, point.value) for point in curve] for curve in curves)
    assert [step for step, _ in whole] == [0, 1, 2] and whole[: len(first)] == first and len(first) >= 1
    assert sorted(read_csv(parent.info.run_id)["trial"]) == [1, 2]


def test_interrupted_mlflow_run_shows_what_it_found(store, data, clean_environment):
    """Ctrl-C goes to the whole process group of a real `mlflow run`, as from a terminal."""
    log = open("mlflow-run.log", "w")
    parameters = [f"data={data}", "settings={input_size: 32, epochs: 5000, batch_size: 16}"]
    project_run = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-e", "sweep", "--env-manager", "local"]
        + [f"-P{parameter}" for parameter in parameters],
        env={
            **clean_environment,
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"],
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for(lambda: [run for run in sweeps_and_trials(store)[1] if "val_accuracy" in run.data.metrics], log)
        os.killpg(project_run.pid, signal.SIGINT)
        assert project_run.wait(timeout=120) != 0
    finally:
        if project_run.poll() is None:
            os.killpg(project_run.pid, signal.SIGKILL)
        log.close()
    assert "Traceback" not in Path(log.name).read_text().split("SIGINT received")[1]
    wait_for(lambda: {run.info.status for runs in sweeps_and_trials(store) for run in runs} == {"KILLED"}, log)
    _, (trial,) = sweeps_and_trials(store)
    answer = carflavor.load_model(f"runs:/{trial.info.run_id}/model").predict([np.zeros((40, 40, 3), "uint8")])
    assert answer["label"][0] in ("red", "green", "blue")


def test_trial_whose_process_dies_is_a_failed_one(store, data):
    with pytest.raises(
        ValueError, match=r"All trials have failed, the last one so: Its process was killed \(SIGKILL\)"
    ):
        sweep(small(data, "{mixup: {low: 0, high: 1}}", trials=1), die)
    (parent,), (trial,) = sweeps_and_trials(store)
    assert (parent.info.status, trial.info.status) == ("FAILED", "FAILED")


@pytest.fixture
def without_processes(monkeypatch):
    """Stands in for the process of a trial: the better, the smaller the learning rate."""

    def run_training(training, parameters, run_id, tracking_uri, on_epoch):
        client = mlflow.MlflowClient(tracking_uri)
        accuracies = {}
        for epoch in range(3):
            accuracies[epoch] = (epoch + 1) / 4 - parameters["learning_rate"]
            client.log_metric(run_id, "val_accuracy", accuracies[epoch], step=epoch)
            if epoch < 2 and on_epoch(dict(accuracies)):
                break
        client.set_terminated(run_id)
        return accuracies

    monkeypatch.setattr(recording, "run_training", run_training)


def test_sweep_goes_on_to_more_trials_under_the_same_name(store, data, without_processes, capsys):
    ranges = "{learning_rate: {low: 0.001, high: 0.1, log: true}}"
    first = sweep(small(data, ranges, trials=2))
    more = sweep(small(data, ranges, trials=5))
    again = sweep(small(data, ranges, trials=5))
    other = sweep(small(data, ranges, trials=1, name="other"))
    sweeps, trials = sweeps_and_trials(store)
    assert [trial.info.run_name for trial in trials] == [f"trial {number}" for number in (1, 2, 3, 4, 5, 1)]
    assert [parent_of(trial) for trial in trials] == [sweeps[2].info.run_id] * 5 + [sweeps[3].info.run_id]
    # The same seed does not draw the same values again.
    assert len({trial.data.params["learning_rate"] for trial in trials[:5]}) == 5
    assert trials[5].data.params["learning_rate"] == trials[0].data.params["learning_rate"]
    assert more.accuracy >= first.accuracy and again == more and other.number == 1
    assert [len(read_csv(run.info.run_id)) for run in sweeps] == [2, 5, 5, 1]
    assert [run.data.tags.get("carflavor.resumed_from") for run in sweeps] == [
        *(None, sweeps[0].info.run_id, sweeps[1].info.run_id, None)
    ]


def test_three_failures_in_a_row_end_the_sweep(store, data, monkeypatch):
    def run_training(training, parameters, run_id, tracking_uri, on_epoch):
        raise TrialFailed("no space left on the device")

    monkeypatch.setattr(recording, "run_training", run_training)
    with pytest.raises(ValueError, match="3 trials in a row have failed, the last one so: no space left on the device"):
        sweep(small(data, "{mixup: {low: 0, high: 1}}"))
    (parent,), trials = sweeps_and_trials(store)
    assert (parent.info.status, len(trials)) == ("FAILED", 3)
    assert read_csv(parent.info.run_id)["failure"].tolist() == ["no space left on the device"] * 3


def test_one_sweep_runs_once_at_a_time(store):
    with sweeping._alone("digest"), sweeping._alone("another"):
        with pytest.raises(ValueError, match="Another process runs this sweep: give this one another name"):
            with sweeping._alone("digest"):
                pass


def test_sweep_goes_on_in_parallel_on_spark(store, data, without_processes, monkeypatch):
    """One trial is done and one interrupted on this machine; a local cluster takes that one up, and tries another."""
    ranges = "{learning_rate: {low: 0.001, high: 0.1, log: true}, mixup: [0, 0.1]}"
    sweep(small(data, ranges, trials=1))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recording, "run_training", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep(small(data, ranges, trials=3))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT / "tests"))
    best = sweep(small(data, ranges, trials=3, master="local[2]"), train_tiny)

    sweeps, trials = sweeps_and_trials(store)
    assert [run.info.status for run in sweeps] == ["FINISHED", "KILLED", "FINISHED"]
    done, interrupted, *parallel = trials
    assert [trial.info.status for trial in trials] == ["FINISHED", "KILLED", "FINISHED", "FINISHED"], [
        trial.data.tags.get("carflavor.failure") for trial in trials
    ]
    assert [parent_of(trial) for trial in trials] == [sweeps[index].info.run_id for index in (2, 1, 2, 2)]
    assert sorted(trial.info.run_name for trial in parallel) == ["trial 2", "trial 3"]
    again, new = sorted(parallel, key=lambda trial: parameters(trial) != parameters(interrupted))
    assert parameters(again) == parameters(interrupted)
    assert len({parameters(trial) for trial in (done, interrupted, new)}) == 3
    # One run a trial: that of MlflowStorage is that of the training.
    for trial in parallel:
        assert trial.data.tags["carflavor.step"] == "train"
        assert trial.data.metrics["best_val_accuracy"] == trial.data.metrics["value"]
        assert carflavor.load_model(f"runs:/{trial.info.run_id}/model").class_names == ["red", "green", "blue"]
    starts_and_ends = [(trial.info.start_time, trial.info.end_time) for trial in parallel]
    assert max(start for start, _ in starts_and_ends) < min(end for _, end in starts_and_ends)
    assert sweeps[2].info.run_name == "sweep"
    assert sweeps[2].data.metrics["best_val_accuracy"] == best.accuracy
    assert sorted(read_csv(sweeps[2].info.run_id)["trial"]) == [1, 2, 3]


def parameters(run):
    return run.data.params["learning_rate"], run.data.params["mixup"]


def test_spark_master_that_is_none(store, data):
    with pytest.raises(ValueError, match=r"Expected master to be local\[n\], spark://.*Received: master='head:7077'"):
        sweep(small(data, "{mixup: {low: 0, high: 1}}", master="head:7077"))


def test_interrupted_trials_are_taken_up_once(store):
    def open_run(status, tags, rate=None):
        run = store.create_run("0", tags=tags)
        if rate:
            store.log_batch(run.info.run_id, params=[Param("learning_rate", rate)])
        if status != "RUNNING":
            store.set_terminated(run.info.run_id, status)
        return run.info.run_id

    def open_trial(sweep_id, status, rate, **tags):
        return open_run(status, {"mlflow.parentRunId": sweep_id, "carflavor.trial": "1", **tags}, rate)

    same = {"carflavor.sweep": "abc"}
    first, second = open_run("RUNNING", same), open_run("KILLED", same)
    other = open_run("RUNNING", {"carflavor.sweep": "def"})
    open_trial(first, "KILLED", "0.01")  # taken up by the second sweep, and finished
    open_trial(first, "KILLED", "0.02")  # taken up, and interrupted again
    finished = open_trial(second, "FINISHED", "0.01")
    running = open_trial(second, "RUNNING", "0.02")
    pruned = open_trial(second, "KILLED", "0.03", **{"carflavor.pruned": "after epoch 2"})
    failed = open_trial(second, "FAILED", "0.04", **{"carflavor.failure": "no space"})
    open_trial(second, "RUNNING", None)  # died before it had parameters
    elsewhere = open_trial(other, "FINISHED", "0.05")
    for epoch, accuracy in enumerate((0.4, 0.7, 0.6)):
        store.log_metric(finished, "val_accuracy", accuracy, step=epoch)

    parent = store.get_run(open_run("RUNNING", same))
    moved, again, last = take_over_trials(store, parent, LEARNING_RATE)
    assert [(trial.run_id, trial.state, trial.parameters) for trial in moved] == [
        (finished, "finished", {"learning_rate": 0.01}),
        (pruned, "pruned", {"learning_rate": 0.03}),
        (failed, "failed", {"learning_rate": 0.04}),
    ]
    assert moved[0].accuracies == {0: 0.4, 1: 0.7, 2: 0.6} and moved[0].accuracy == 0.7
    assert moved[2].failure == "no space"
    assert again == [{"learning_rate": 0.02}]
    assert last == second
    assert [store.get_run(run_id).info.status for run_id in (first, second, running)] == ["KILLED"] * 3
    assert store.get_run(other).info.status == "RUNNING"
    assert parent_of(store.get_run(finished)) == parent.info.run_id
    assert parent_of(store.get_run(running)) == second
    assert parent_of(store.get_run(elsewhere)) == other


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


def test_command_refuses_in_one_sentence_before_anything_starts(store, data):
    command = runpy.run_path(str(PROJECT / "entrypoints" / "sweep.py"))["main"]
    refused = CliRunner().invoke(command, ["--data", str(data), "--ranges", "{mixup: [0.2]}"])
    assert refused.exit_code == 1
    assert refused.output == "Error: ranges: expected two or more different values for mixup. Received: [0.2]\n"
    refused = CliRunner().invoke(command, ["--data", str(data / "none")])
    assert refused.output == f"Error: data: {data}/none does not exist\n"
    sweeps, trials = sweeps_and_trials(store)
    assert [run.info.status for run in sweeps] == ["FAILED", "FAILED"] and trials == []


def test_sampler_tries_no_combination_twice():
    ranges = {"mixup": CategoricalDistribution([0.0, 0.1, 0.2]), "head_epochs": IntDistribution(1, 5)}
    assert len(list_combinations(ranges)) == 15
    assert list_combinations(ranges)[0] == {"mixup": 0.0, "head_epochs": 1}
    assert list_combinations({**ranges, **LEARNING_RATE}) is None
    study = optuna.create_study(direction="maximize", sampler=UntriedSampler(ranges, seed=0))
    for _ in range(15):
        trial = study.ask(ranges)
        # All but the best value are much alike: TPE alone would try it again and again.
        study.tell(trial, float(trial.params == {"mixup": 0.1, "head_epochs": 3}))
    tried = [(trial.params["mixup"], trial.params["head_epochs"]) for trial in study.trials]
    assert sorted(tried) == [(mixup, epochs) for mixup in (0.0, 0.1, 0.2) for epochs in (1, 2, 3, 4, 5)]


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


RANGES = {**LEARNING_RATE, "crop": CategoricalDistribution(["box", "full"])}


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
        "mlflow run . -e train -P 'data=/my records/a' -P preset=quick -P crop=full -P learning_rate=0.004"
    )
    points = store.get_metric_history(run.info.run_id, "best_val_accuracy")
    assert [(point.step, point.value) for point in points] == [(1, 0.8), (5, 0.9)]
    table = read_csv(run.info.run_id)
    assert table["trial"].tolist() == [5, 1, 3, 4, 2, 6]
    assert table["best_epoch"].tolist()[:4] == [2, 2, 2, 1]
    assert table["minutes"].tolist() == [1.5] * 6
