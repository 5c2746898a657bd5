"""Tries many configurations of `train` and compares them: each is a child run, the next is chosen by what came of them.

A study of Optuna chooses the values. A sweep that was killed goes on by the same command: its trials move to the new
run, and the training that was under way goes on from its own checkpoint.
"""

import contextlib
import json
import logging
import pickle
from dataclasses import asdict, dataclass, replace

import mlflow
import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.pruners import MedianPruner, NopPruner
from optuna.trial import TrialState

from carflavor import checkpoint, tracking
from carflavor.data.locations import data_home
from carflavor.locking import lock
from carflavor.preprocess import open_split
from carflavor.spark import check_master
from carflavor.train import RESUMED_FROM_TAG, train
from carflavor.trials.process import TrialFailed
from carflavor.trials.ranges import read_ranges, read_settings
from carflavor.trials.report import SweepReport, say_value
from carflavor.trials.runs import (
    FAILED,
    SWEEP_TAG,
    Search,
    attempt,
    begin_trial,
    end_open_trials,
    read_trial,
    take_over_trials,
)
from carflavor.trials.sampling import UntriedSampler, list_combinations

# A trial is pruned that is worse than the median of at least so many others after the same epoch.
_TRIALS_BEFORE_PRUNING = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        data: Folder with record files, as path or URI, or `sample`.
        preset: One of `carflavor.recipes.PRESETS`.
        settings: Other parameters of `train` that are the same in all trials, as YAML or the name of a YAML file.
        ranges: Parameters of `train` that differ, as YAML or the name of a YAML file: for each a list of values, or
            `{low, high}` with an optional `log`.
        trials: Number of trials in all, with those that an earlier sweep of the same name has done.
        prune: Whether a trial ends early that is worse than most others were after as many epochs.
        name: Sweeps of the same name, data, settings and ranges are one: each goes on where the one before has ended.
        master: Spark master to run trials on at the same time. Empty: one after the other on this machine.
        parallel: Number of trials at the same time, with `master`.
        seed: Seed of the choice of values. That of the trainings is one of their settings.
    """

    data: str = "sample"
    preset: str = "scratch"
    settings: str = ""
    ranges: str = "{learning_rate: {low: 0.0003, high: 0.01, log: true}}"
    trials: int = 20
    prune: bool = True
    name: str = "sweep"
    master: str = ""
    parallel: int = 2
    seed: int = 0


def sweep(config, train=train):
    """Runs the trials as child runs, and logs a comparison and the best parameters to the run.

    Args:
        config: `SweepConfig`.
        train: `carflavor.train.train`, or a function that does the same. Each trial's process imports it by its name.

    Returns:
        The best `carflavor.trials.runs.Trial`, or None if none has finished.

    Raises:
        ValueError: If a parameter or the data is not what is expected, or three trials in a row fail.
    """
    with tracking.step_run("sweep", config) as run, contextlib.ExitStack() as stack:
        ranges = read_ranges(config.ranges)
        settings = read_settings(config.settings, config.data, config.preset, ranges)
        check_master(config.master)
        folder, digest = _look_at_data(config, settings, ranges)
        stack.enter_context(_alone(digest))

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would say each trial's end before we do
        client = mlflow.MlflowClient()
        mlflow.set_tag(SWEEP_TAG, digest)
        parent = client.get_run(run.run_id)
        earlier, interrupted = _go_on(client, parent, ranges)
        total, waiting = _plan(config, ranges, earlier, interrupted)
        report = SweepReport(client, run.run_id, settings, ranges, total, earlier)
        run.on_early_end(report.write)
        search = Search(
            client=client,
            parent=parent,
            ranges=ranges,
            training=pickle.dumps((train, replace(settings, data=folder))),
            pruner=MedianPruner(_TRIALS_BEFORE_PRUNING) if config.prune else NopPruner(),
            earlier=earlier,
            waiting=waiting[: report.left],
        )
        try:
            if report.left == 0:
                _logger.info("All %d trials are done: ask for more, or give the sweep another name", total)
            elif config.master:
                # Not before it is asked for: who has no cluster need not have Spark.
                from carflavor.trials.on_spark import search_on_spark

                search_on_spark(search, report, config.master, config.parallel)
            else:
                _search_here(search, report, config.seed)
        finally:
            end_open_trials(client, parent)
        report.write()
        _say_best(report)
    return report.best


def _look_at_data(config, settings, ranges):
    """Returns the folder of the record files, and what this sweep is called by those that go on with it."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in ("data", "resume", *ranges)}
    said = {
        "settings": fixed,
        "ranges": {name: json.loads(distribution_to_json(ranges[name]))["attributes"] for name in ranges},
    }
    mlflow.log_dict(said, "resolved_config.json")
    with (
        open_split(config.data, settings.training_split) as training,
        open_split(config.data, "validation") as validation,
    ):
        mlflow.set_tag(tracking.DATA_TAG, training.settings["source"])
        # By this MLflow knows the files before the trials do: two at the same time would both make them known, and one
        # of them would fail.
        tracking.log_records(training, "train")
        tracking.log_records(validation, "validation")
        return str(training.path.parent), checkpoint.digest({"name": config.name, **said}, [training, validation], [])


def _alone(digest):
    path = data_home() / "sweeps" / f"{digest}.lock"
    return lock(path, "Another process runs this sweep: give this one another name")


def _go_on(client, parent, ranges):
    earlier, interrupted, run_id = take_over_trials(client, parent, ranges)
    if run_id:
        mlflow.set_tag(RESUMED_FROM_TAG, run_id)
        again = f", of which {len(interrupted)} are taken up again" if interrupted else ""
        _logger.info("Going on where run %s ended, after %d trials%s", run_id, len(earlier) + len(interrupted), again)
    return earlier, interrupted


def _plan(config, ranges, earlier, interrupted):
    """Returns the number of trials in all, and a list of parameters to begin with."""
    combinations = list_combinations(ranges)
    if combinations is None or len(combinations) > config.trials:
        return config.trials, interrupted
    _logger.info("There are %d combinations: each is tried once", len(combinations))
    done = [trial.parameters for trial in earlier if trial.state != FAILED]
    untried = [combination for combination in combinations if combination not in [*done, *interrupted]]
    # In an order that has seen something of everything, wherever it is broken off.
    order = np.random.default_rng(config.seed).permutation(len(untried))
    return len(combinations), [*interrupted, *(untried[index] for index in order)]


def _search_here(search, report, seed):
    # Another seed after each interruption, of the first trial, too: the same would draw the first values again.
    seed = int(np.random.SeedSequence([seed, len(search.earlier), len(search.waiting)]).generate_state(1)[0])
    study = optuna.create_study(direction="maximize", sampler=UntriedSampler(search.ranges, seed), pruner=search.pruner)
    study.add_trials([trial.to_optuna(search.ranges) for trial in search.earlier if trial.state != FAILED])
    for parameters in search.waiting:
        study.enqueue_trial(parameters)
    number = search.last_number
    while report.left > 0:
        number += 1
        trial = study.ask(search.ranges)
        values = ", ".join(f"{name}={say_value(value)}" for name, value in trial.params.items())
        _logger.info("Trial %d: %s", number, values)
        run_id = begin_trial(search.client, search.parent, number, trial.params)
        try:
            study.tell(trial, attempt(trial, run_id, search.training, mlflow.get_tracking_uri()))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except TrialFailed:
            study.tell(trial, state=TrialState.FAIL)
        report.add(read_trial(search.client, search.client.get_run(run_id), search.ranges))
        report.refuse_failures()


def _say_best(report):
    if not any(trial.state != FAILED for trial in report.trials):
        last = f", the last one so: {report.trials[-1].failure}" if report.trials else ""
        raise ValueError(f"All trials have failed{last}")
    if report.best:
        _logger.info(
            "Best: trial %d, validation accuracy %.3f, runs:/%s/model\nIts parameters, for another training:\n%s",
            report.best.number,
            report.best.accuracy,
            report.best.run_id,
            report.best_command(),
        )
