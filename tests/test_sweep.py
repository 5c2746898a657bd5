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
from colours import PROJECT, add_tiny_network, mlflow_run, wait_for
from mlflow.entities import Param
from optuna.distributions import FloatDistribution
from optuna.pruners import ThresholdPruner

import carflavor
from carflavor import sweep as sweeping
from carflavor.sweep import SweepConfig, sweep
from carflavor.train import train
from carflavor.trials import runs as recording
from carflavor.trials.process import TrialFailed
from carflavor.trials.runs import take_over_trials

pytestmark = pytest.mark.usefixtures("tiny_network_by_name")


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


def interrupt_only_the_training(config, on_epoch):
    return train_tiny(config, lambda *epoch: os.kill(os.getpid(), signal.SIGTERM))


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
    command = f"mlflow run . -e train --env-manager local -P data={data} -P network=tiny -P epochs=3 -P batch_size=16"
    assert command in page


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
    parameters = [f"data={data}", "settings={input_size: 32, epochs: 5000, batch_size: 16}"]
    with open("mlflow-run.log", "w") as log, mlflow_run("sweep", parameters, clean_environment, log) as project_run:
        wait_for(lambda: [run for run in sweeps_and_trials(store)[1] if "val_accuracy" in run.data.metrics], log)
        os.killpg(project_run.pid, signal.SIGINT)
        assert project_run.wait(timeout=120) != 0
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


def test_trial_whose_process_is_interrupted_is_a_failed_one(store, data):
    failure = "Its process was interrupted, and the sweep was not"
    with pytest.raises(ValueError, match=f"All trials have failed, the last one so: {failure}"):
        sweep(small(data, "{mixup: {low: 0, high: 1}}", trials=1), interrupt_only_the_training)
    time.sleep(2)  # an interrupted step of `mlflow run` writes KILLED over what is there a moment later
    _, (trial,) = sweeps_and_trials(store)
    assert (trial.info.status, trial.data.tags["carflavor.failure"]) == ("FAILED", failure)


def test_first_training_starts_with_interrupts_blocked(store):
    program = """
import multiprocessing, signal
from carflavor.trials.process import _interrupts_blocked

def tell():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)

if __name__ == "__main__":
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=tell)
        with _interrupts_blocked():
            process.start()
        process.join()
"""
    Path("starts.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run([sys.executable, "starts.py"], env=environment, capture_output=True, text=True)
    assert ended.stdout.split() == ["True", "True"], ended.stderr


@pytest.fixture
def without_processes(monkeypatch):
    """Stands in for the process of a trial: the better, the smaller the learning rate."""

    def run_training(training, parameters, run_id, tracking_uri, on_epoch):
        client = mlflow.MlflowClient(tracking_uri)
        accuracies = {}
        for epoch in range(3):
            accuracies[epoch] = (epoch + 1) / 4 - parameters["learning_rate"]
            client.log_metric(run_id, "val_accuracy", accuracies[epoch], step=epoch)
            if epoch < 2 and on_epoch(dict(accuracies), 3):
                break
        client.set_terminated(run_id)
        return accuracies

    monkeypatch.setattr(recording, "run_training", run_training)


def sweep_and_interrupt(config, monkeypatch):
    """Runs a sweep to the training of its next trial, and interrupts it there."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recording, "run_training", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)


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


def test_sweep_that_was_interrupted_in_its_first_trial_draws_other_values(store, data, without_processes, monkeypatch):
    ranges = "{learning_rate: {low: 0.001, high: 0.1, log: true}}"
    sweep_and_interrupt(small(data, ranges, trials=2), monkeypatch)
    sweep(small(data, ranges, trials=2))
    _, (interrupted, again, new) = sweeps_and_trials(store)
    rates = [trial.data.params["learning_rate"] for trial in (interrupted, again, new)]
    assert rates[1] == rates[0] != rates[2]


@pytest.mark.parametrize(("epochs", "pruned"), [(3, "after epoch 2"), (40, "after epoch 11")])
def test_trial_is_not_pruned_in_the_first_quarter_of_its_own_epochs(store, monkeypatch, epochs, pruned):
    def run_training(training, parameters, run_id, tracking_uri, on_epoch):
        accuracies = {}
        for epoch in range(epochs - 1):
            accuracies[epoch] = 0.1
            if on_epoch(dict(accuracies), epochs):
                break
        return accuracies

    monkeypatch.setattr(recording, "run_training", run_training)
    study = optuna.create_study(pruner=ThresholdPruner(lower=0.5))
    run_id = store.create_run("0").info.run_id
    with pytest.raises(optuna.TrialPruned):
        recording.attempt(study.ask(), run_id, b"", mlflow.get_tracking_uri())
    assert store.get_run(run_id).data.tags["carflavor.pruned"] == pruned


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
    sweep_and_interrupt(small(data, ranges, trials=3), monkeypatch)
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
    # Its own process may have ended it last.
    failed = open_trial(second, "KILLED", "0.04", **{"carflavor.failure": "no space"})
    open_trial(second, "RUNNING", None)  # died before it had parameters
    elsewhere = open_trial(other, "FINISHED", "0.05")
    for epoch, accuracy in enumerate((0.4, 0.7, 0.6)):
        store.log_metric(finished, "val_accuracy", accuracy, step=epoch)

    parent = store.get_run(open_run("RUNNING", same))
    ranges = {"learning_rate": FloatDistribution(0.001, 0.1, log=True)}
    moved, again, last = take_over_trials(store, parent, ranges)
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


def test_command_refuses_in_one_sentence_before_anything_starts(store, data):
    command = runpy.run_path(str(PROJECT / "entrypoints" / "sweep.py"))["main"]
    refused = CliRunner().invoke(command, ["--data", str(data), "--ranges", "{mixup: [0.2]}"])
    assert refused.exit_code == 1
    assert refused.output == "Error: ranges: expected two or more different values for mixup. Received: [0.2]\n"
    refused = CliRunner().invoke(command, ["--data", str(data / "none")])
    assert refused.output == f"Error: data: {data}/none does not exist\n"
    sweeps, trials = sweeps_and_trials(store)
    assert [run.info.status for run in sweeps] == ["FAILED", "FAILED"] and trials == []
