"""The trials of a sweep as MLflow keeps them: child runs, from which a later sweep of the same name goes on.

There is no second database: what Optuna has to know about earlier trials is read from their runs once, when a sweep
begins, into a study in memory. MLflow's own storage for Optuna, `MlflowStorage`, is left to Spark, which demands it
(`carflavor.trials.on_spark`): it asks the tracking server four times for every trial so far at every epoch's end, which
made 7 s a trial after 30 trials on a local database, and hands out no trial that was put into its queue.
"""

import time
from dataclasses import dataclass

import mlflow
import optuna
from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from carflavor.trials.process import TrialFailed, run_training

SWEEP_TAG = "carflavor.sweep"  # what is searched, over which ranges, and on what data, as a digest
TRIAL_TAG = "carflavor.trial"  # number of a trial, from 1
PRUNED_TAG = "carflavor.pruned"  # the epoch after which a trial was given up
FAILURE_TAG = "carflavor.failure"  # why a trial came to no result
BEST_METRIC = "best_val_accuracy"

FINISHED, PRUNED, FAILED, INTERRUPTED = "finished", "pruned", "failed", "interrupted"
# Where a run comes from: what MLflow notes itself only on runs that are opened by a name of the `mlflow` module.
_ORIGIN_TAGS = (MLFLOW_USER, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_GIT_COMMIT)
_MAX_TRIALS = 50_000  # MLflow gives no more at once
_MAX_FAILURE = 500
# A trial is not pruned in this share of its own epochs: curves cross while the learning rate warms up.
_SHARE_BEFORE_PRUNING = 0.25
_STATES = {"FINISHED": FINISHED, "FAILED": FAILED}
_OPTUNA_STATES = {FINISHED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}


@dataclass(frozen=True)
class Trial:
    """One trial, as it ended.

    Attributes:
        number: Its number in the sweep, from 1.
        run_id: MLflow's id of its run.
        state: `FINISHED`, `PRUNED`, `FAILED` or `INTERRUPTED`.
        parameters: Dict of what was varied.
        accuracies: Dict of epoch, from 0, to validation accuracy.
        seconds: How long it took.
        failure: Why it came to no result, or an empty text.
    """

    number: int
    run_id: str
    state: str
    parameters: dict
    accuracies: dict
    seconds: float
    failure: str = ""

    @property
    def accuracy(self):
        """The best validation accuracy, or None before the first epoch's end."""
        return max(self.accuracies.values(), default=None)

    def to_optuna(self, ranges):
        """Returns the `optuna.trial.FrozenTrial`; of a finished or pruned trial."""
        return optuna.trial.create_trial(
            state=_OPTUNA_STATES[self.state],
            value=self.accuracy,
            params=self.parameters,
            distributions=ranges,
            intermediate_values=self.accuracies,
        )


@dataclass(frozen=True)
class Search:
    """What a search for the best values begins with, on one machine or on Spark.

    Attributes:
        client: `mlflow.MlflowClient`.
        parent: `mlflow.entities.Run` of the sweep.
        ranges: Dict of parameter name to Optuna distribution.
        training: See `carflavor.trials.process.run_training`.
        pruner: Optuna pruner.
        earlier: List of `Trial` that earlier sweeps have done.
        waiting: List of dicts of parameters to try first: those whose training was interrupted, or all that there are.
    """

    client: mlflow.MlflowClient
    parent: mlflow.entities.Run
    ranges: dict
    training: bytes
    pruner: optuna.pruners.BasePruner
    earlier: list
    waiting: list

    @property
    def last_number(self):
        """Number of the last trial that earlier sweeps have done, 0 where there is none."""
        return max((trial.number for trial in self.earlier), default=0)


def find_trial_runs(client, parent, ranges=()):
    """Returns the runs of the trials under a sweep, the first one first; those that have the parameters in `ranges`."""
    runs = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'",
        max_results=_MAX_TRIALS,
        order_by=["attributes.start_time ASC"],
    )
    return [run for run in runs if set(ranges) <= run.data.params.keys()]


def read_trial(client, run, ranges):
    """Reads a trial from its run; one that has not ended counts as interrupted."""
    tags = run.data.tags
    # By the tags: the status of a pruned one is KILLED as that of an interrupted one, and FINISHED for a moment before.
    if PRUNED_TAG in tags:
        state = PRUNED
    else:
        state = FAILED if FAILURE_TAG in tags else _STATES.get(run.info.status, INTERRUPTED)
    ended = run.info.end_time or time.time() * 1000
    return Trial(
        number=int(tags.get(TRIAL_TAG, 0)),
        run_id=run.info.run_id,
        state=state,
        parameters={name: _parse(run.data.params[name], distribution) for name, distribution in ranges.items()},
        accuracies={point.step: point.value for point in client.get_metric_history(run.info.run_id, "val_accuracy")},
        seconds=(ended - run.info.start_time) / 1000,
        failure=tags.get(FAILURE_TAG, ""),
    )


def _parse(text, distribution):
    if isinstance(distribution, CategoricalDistribution):
        return {str(choice): choice for choice in distribution.choices}[text]
    return int(text) if isinstance(distribution, IntDistribution) else float(text)


def begin_trial(client, parent, number, parameters):
    """Opens the run of a trial under that of its sweep, and returns its id."""
    tags = {name: value for name, value in parent.data.tags.items() if name in _ORIGIN_TAGS}
    tags |= {MLFLOW_PARENT_RUN_ID: parent.info.run_id, **_name_tags(number)}
    run = client.create_run(parent.info.experiment_id, tags=tags)
    client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in parameters.items()])
    return run.info.run_id


def name_trial(client, run_id, number):
    """Gives a run that was opened by others the name and the tag of a trial."""
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in _name_tags(number).items()])


def _name_tags(number):
    return {MLFLOW_RUN_NAME: f"trial {number}", TRIAL_TAG: str(number)}


def attempt(trial, run_id, training, tracking_uri):
    """Runs the training of a trial to its end, and ends its run.

    Args:
        trial: `optuna.Trial` with all its parameters; it is told the accuracy of each epoch and asked whether to go on.
        run_id: MLflow run of the trial.
        training: See `carflavor.trials.process.run_training`.
        tracking_uri: Where the run is.

    Returns:
        The best validation accuracy.

    Raises:
        optuna.TrialPruned: If the trial was given up.
        TrialFailed: If it came to no result.
    """
    client = mlflow.MlflowClient(tracking_uri)
    known = {}
    pruned = False

    def on_epoch(accuracies, epochs):
        nonlocal pruned
        for epoch in accuracies.keys() - known.keys():
            trial.report(accuracies[epoch], epoch)
        known.update(accuracies)
        pruned = max(accuracies) >= max(1, round(_SHARE_BEFORE_PRUNING * epochs)) and trial.should_prune()
        if pruned:
            client.set_tag(run_id, PRUNED_TAG, f"after epoch {max(accuracies) + 1}")
        return pruned

    try:
        accuracies = run_training(training, trial.params, run_id, tracking_uri, on_epoch)
    except TrialFailed as error:
        client.set_tag(run_id, FAILURE_TAG, str(error)[:_MAX_FAILURE])
        client.set_terminated(run_id, "FAILED")
        raise
    best = max(accuracies.values())
    client.log_metric(run_id, BEST_METRIC, best)
    if pruned:
        # MLflow's own integration calls it so, too. What was interrupted has no PRUNED_TAG.
        client.set_terminated(run_id, "KILLED")
        raise optuna.TrialPruned
    for epoch in accuracies.keys() - known.keys():
        trial.report(accuracies[epoch], epoch)
    return best


def end_open_trials(client, parent):
    """Ends runs under a sweep that nobody works on any more as `KILLED`."""
    for run in find_trial_runs(client, parent):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")


def take_over_trials(client, parent, ranges):
    """Moves the trials of earlier sweeps that were the same to a new one, and ends those sweeps.

    Trials that were interrupted stay where they are: they will be tried again.

    Args:
        client: `mlflow.MlflowClient`.
        parent: `mlflow.entities.Run` of the new sweep; its `SWEEP_TAG` says what is the same.
        ranges: Dict of parameter name to Optuna distribution.

    Returns:
        List of `Trial` that were moved; list of dicts of parameters that were interrupted; run id of the last of the
        earlier sweeps, or None.
    """
    sweeps = client.search_runs(
        [parent.info.experiment_id],
        f"tags.`{SWEEP_TAG}` = '{parent.data.tags[SWEEP_TAG]}'",
        max_results=_MAX_TRIALS,
        order_by=["attributes.start_time DESC"],
    )
    earlier = [sweep for sweep in sweeps if sweep.info.run_id != parent.info.run_id]
    moved, interrupted = [], []
    for sweep in reversed(earlier):
        end_open_trials(client, sweep)
        if sweep.info.status == "RUNNING":
            client.set_terminated(sweep.info.run_id, "KILLED")
        for run in find_trial_runs(client, sweep, ranges):
            trial = read_trial(client, run, ranges)
            if trial.state == INTERRUPTED:
                interrupted.append(trial.parameters)
            else:
                client.set_tag(trial.run_id, MLFLOW_PARENT_RUN_ID, parent.info.run_id)
                moved.append(trial)
    tried = [trial.parameters for trial in moved]
    again = [parameters for index, parameters in enumerate(interrupted) if parameters not in interrupted[:index]]
    again = [parameters for parameters in again if parameters not in tried]
    return moved, again, earlier[0].info.run_id if earlier else None
