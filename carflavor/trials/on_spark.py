"""Runs the trials of a sweep on a Spark cluster, by MLflow's own integration of Optuna with Spark.

`MlflowSparkStudy` has each task choose values by itself from what all of them have written into `MlflowStorage`: a run
for the study, and a child run for each trial. Here the study's run is the sweep's, and a training joins the run of its
trial, so that there is one run a trial. Four things are done otherwise than they would be without us:

- Each task has a copy of the same sampler, and would draw the same values as the others: ours draws anew.
- Trials that are put into Optuna's queue are taken out and lost by `MlflowStorage`: ours come by the sampler.
- It numbers trials by counting them, and two tasks that begin one at the same time get the same number: ours have
  numbers from their tasks' shares.
- A KILLED run is a pruned trial to `MlflowStorage`. What was interrupted is not shown to it.
"""

import contextlib
import json
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import mlflow
import numpy as np
from mlflow.entities import Metric, RunTag
from mlflow.optuna.storage import MlflowStorage
from mlflow.pyspark.optuna.study import MlflowSparkStudy
from optuna.distributions import CategoricalDistribution, IntDistribution, distribution_to_json
from pyspark import TaskContext

from carflavor.spark import open_session, silence
from carflavor.trials.process import TrialFailed
from carflavor.trials.runs import BEST_METRIC, FAILED, FAILURE_TAG, attempt, find_trial_runs, name_trial, read_trial
from carflavor.trials.sampling import UntriedSampler

_SECONDS_BETWEEN_LOOKS = 5


def search_on_spark(search, report, master, parallel):
    """Makes the trials that are left, several at the same time.

    Args:
        search: `carflavor.trials.runs.Search`.
        report: `carflavor.trials.report.SweepReport`.
        master: Spark master.
        parallel: Number of trials at the same time, at most.

    Raises:
        ValueError: If no Spark session can be had, or three trials fail one after the other.
    """
    tasks = min(parallel, report.left)
    logging.getLogger("mlflow.pyspark.optuna.study").setLevel(logging.WARNING)  # it calls every sweep a resumed one
    with open_session(master, "sweep") as spark, _study_run(search) as study_name:
        study = MlflowSparkStudy(
            study_name,
            MlflowStorage(search.parent.info.experiment_id),
            TaskSampler(search.ranges, search.waiting, tasks, report.left, search.last_number),
            search.pruner,
        )
        objective = Objective(search.ranges, search.training, mlflow.get_tracking_uri())
        # In another thread: it waits for the last trial, while this one tells of each, and can be interrupted.
        with ThreadPoolExecutor(1) as executor, contextlib.ExitStack() as stack:
            searching = executor.submit(study.optimize, objective, report.left, n_jobs=tasks, catch=(TrialFailed,))
            stack.callback(_add_ended_trials, search, report)
            try:
                while not wait([searching], _SECONDS_BETWEEN_LOOKS).done:
                    _add_ended_trials(search, report)
                    report.refuse_failures()
            except BaseException:
                silence(spark)
                while not wait([searching], 1).done:
                    spark.sparkContext.cancelAllJobs()  # more than once: the job may not have begun
                raise
            searching.result()


@contextlib.contextmanager
def _study_run(search):
    """Makes the run of the sweep the study that `MlflowStorage` looks for, and yields its name."""
    client, run_id = search.client, search.parent.info.run_id
    for trial in search.earlier:
        if trial.state != FAILED:
            _show_to_storage(client, trial, search.ranges)
    # It numbers a trial by counting the points of this metric.
    numbers = range(search.last_number)
    client.log_batch(run_id, metrics=[Metric("trial_id", number, number, 1) for number in numbers])
    client.set_tag(run_id, "optuna.study_direction", "MAXIMIZE")
    name, study_name = search.parent.info.run_name, f"sweep-{run_id}"
    client.update_run(run_id, name=study_name)  # it finds a study by the name of its run
    try:
        yield study_name
    finally:
        client.update_run(run_id, name=name)


def _show_to_storage(client, trial, ranges):
    """Writes a trial that was made on one machine as `MlflowStorage` would have written it."""
    now = round(time.time() * 1000)
    tags = {
        "param_directions": json.dumps({name: distribution_to_json(ranges[name]) for name in ranges}),
        "numbers": str(trial.number - 1),
        **{
            f"param_internal_val_{name}": json.dumps(ranges[name].to_internal_repr(value))
            for name, value in trial.parameters.items()
        },
    }
    metrics = [Metric("intermediate_value", value, now, epoch) for epoch, value in trial.accuracies.items()]
    client.log_batch(
        trial.run_id,
        metrics=[*metrics, Metric("value", trial.accuracy, now, 1)],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )


class TaskSampler(UntriedSampler):
    """The sampler of a sweep for tasks that each begin with a copy of it.

    Args:
        ranges: Dict of parameter name to Optuna distribution.
        waiting: List of dicts of parameters that are to be tried first.
        tasks: Number of tasks.
        trials: Number of trials that they make in all.
        last_number: Number of the last trial before these.

    Attributes:
        number: Number of the trial that was begun last.
    """

    def __init__(self, ranges, waiting, tasks, trials, last_number):
        super().__init__(ranges)
        self._waiting = waiting
        self._tasks = tasks
        self._trials = trials
        self._last_number = last_number
        self._begun = 0
        self._given = None
        self.number = last_number

    def before_trial(self, study, trial):
        self.reseed_rng()
        self._random = np.random.default_rng()
        task = TaskContext.get().partitionId()
        place = self._begun * self._tasks + task
        self._given = self._waiting[place] if place < len(self._waiting) else None
        self._begun += 1
        # Spark's share of a range begins at this place.
        self.number = self._last_number + task * self._trials // self._tasks + self._begun
        super().before_trial(study, trial)

    def infer_relative_search_space(self, study, trial):
        return self._ranges if self._given else super().infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self._given or super().sample_relative(study, trial, search_space)


@dataclass(frozen=True)
class Objective:
    """What a Spark task does for each of its trials.

    Attributes:
        ranges: Dict of parameter name to Optuna distribution.
        training: See `carflavor.trials.process.run_training`.
        tracking_uri: Where the runs are.
    """

    ranges: dict
    training: bytes
    tracking_uri: str

    def __call__(self, trial):
        if threading.current_thread() is threading.main_thread():
            # A Ctrl-C reaches a local cluster, too. The sweep decides, or the trial would count as failed.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        client = mlflow.MlflowClient(self.tracking_uri)
        run_id = trial._trial_id  # what MlflowStorage calls a trial by
        name_trial(client, run_id, trial.study.sampler.number)
        for name, distribution in self.ranges.items():
            _suggest(trial, name, distribution)
        try:
            return attempt(trial, run_id, self.training, self.tracking_uri)
        finally:
            client.update_run(run_id, status="RUNNING")  # MlflowStorage ends it, and refuses to end an ended one


def _suggest(trial, name, distribution):
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    else:
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _add_ended_trials(search, report):
    known = {trial.run_id for trial in report.trials}
    for run in find_trial_runs(search.client, search.parent, search.ranges):
        # A training ends its run before its last metrics have arrived; the result is noted later.
        noted = BEST_METRIC in run.data.metrics or FAILURE_TAG in run.data.tags
        if noted and run.info.run_id not in known and run.info.status != "RUNNING":
            report.add(read_trial(search.client, run, search.ranges))
