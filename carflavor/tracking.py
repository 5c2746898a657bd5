"""How a step becomes an MLflow run: it joins the run that `mlflow run` opened, or opens one, and ends it truthfully."""

import contextlib
import ctypes
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import mlflow
import pandas as pd
from mlflow.data.dataset_source_registry import get_dataset_source_from_json

STEP_TAG = "carflavor.step"
RECORDS_TAG = "carflavor.records"  # the folder that holds the record files of a run
DATA_TAG = "carflavor.data"  # what a run learned from or was measured on
MODEL_TAG = "carflavor.model"  # URI of the model that a run was about

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_DIGEST_LENGTH = 36  # what MLflow's databases have room for
_SECONDS_FOR_PARENT = 600  # what a step may take to keep its best checkpoint

_logger = logging.getLogger(__name__)


class StepRun:
    """The run of one step.

    Attributes:
        run_id: MLflow's id of the run.
    """

    def __init__(self, run_id):
        self.run_id = run_id
        self._on_early_end = []

    def on_early_end(self, function):
        """Has `function()` called when the step fails or is interrupted, to keep what is worth keeping."""
        self._on_early_end.append(function)

    def _end_early(self, status):
        try:
            for function in self._on_early_end:
                function()
        finally:
            mlflow.end_run(status)


def records_address(data, records):
    """Returns what to name the record files of a run by: what the user called them, in a form that lasts.

    Args:
        data: What the user typed, `sample`, a path or a URI.
        records: `RecordFile` that was found there.
    """
    return str(records.path.parent) if os.path.exists(data) else data


def log_records(records, context):
    """Notes a record file as input of the active run: where it lies, its digest, and its photos and labels as schema.

    Args:
        records: `RecordFile`.
        context: What it was used for: `train`, `validation` or `test`.

    Returns:
        The `mlflow.data` dataset, to log metrics with.
    """
    dataset = mlflow.data.from_pandas(
        pd.DataFrame({"photo": records.sources, "label": [records.class_names[label] for label in records.labels]}),
        # Not the path as it is: MLflow knows two kinds of local source, and warns that either would do.
        source=get_dataset_source_from_json(json.dumps({"uri": str(records.path)}), source_type="local"),
        targets="label",
        name=f"{records.settings['source']} {records.path.stem}",
        digest=records.digest()[:_DIGEST_LENGTH],
    )
    mlflow.log_input(dataset, context=context)
    return dataset


@contextlib.contextmanager
def step_run(step, config):
    """Runs a block as an MLflow run with `config.json` on it.

    The run ends FINISHED, or FAILED with the traceback as its artifact `error.txt`, or KILLED after SIGINT,
    SIGTERM or SIGHUP.

    Args:
        step: Name of the step, for the run's name and tag.
        config: The step's frozen dataclass. It is logged as a file: `mlflow run` logs the parameters itself, as the
            text that was typed, and logging `0.1` after `0.10` is an error.

    Yields:
        `StepRun`.
    """
    joins_run = "MLFLOW_RUN_ID" in os.environ
    # Asked now: a process whose parent has gone gets another one. The process of a sweep's trial joins a run, too, but
    # one that the sweep has opened.
    mlflow_run = os.getppid() if joins_run and multiprocessing.parent_process() is None else None
    if mlflow_run is not None and sys.platform == "linux":
        # Whoever stops a job may stop `mlflow run` alone, which tells its step nothing. The kernel does.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    with _signals_as_keyboard_interrupt() as received:
        # A run that `mlflow run` has opened keeps the name that its user gave it.
        run = StepRun(mlflow.start_run(run_name=None if joins_run else step).info.run_id)
        try:
            mlflow.set_tag(STEP_TAG, step)
            mlflow.log_dict(dataclasses.asdict(config), "config.json")
            yield run
        except KeyboardInterrupt:
            # First of all, before what may take long.
            mlflow.MlflowClient().set_terminated(run.run_id, "KILLED")
            if mlflow_run is not None:
                _insist_on(run.run_id, "KILLED", mlflow_run)
            run._end_early("KILLED")
            raise
        except BaseException:
            try:
                mlflow.log_text(traceback.format_exc(), "error.txt")
            finally:
                # Also where the artifact store is what fails: MLflow would end the run as FINISHED at exit.
                run._end_early("FAILED")
            raise
        mlflow.end_run()
        if received and mlflow_run is not None:
            # A step for which Ctrl-C is the way to end.
            _insist_on(run.run_id, "FINISHED", mlflow_run)


def _insist_on(run_id, status, mlflow_run):
    # `mlflow run` means to leave a run alone that has ended already, but compares a text with numbers
    # (RunStatus.is_terminated in mlflow.projects._maybe_set_run_terminated) and writes FAILED over our status once
    # this process is gone. So a process of its own, out of Ctrl-C's reach, waits for that and has the last word.
    subprocess.Popen(
        [sys.executable, "-m", "carflavor.tracking", run_id, status, str(mlflow_run)],
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_and_write_status(run_id, status, mlflow_run):
    client = mlflow.MlflowClient()
    deadline = time.monotonic() + _SECONDS_FOR_PARENT
    # Where the parent lives on, as a notebook that called mlflow.projects.run does, its FAILED is what is waited for.
    while time.monotonic() < deadline and client.get_run(run_id).info.status == status:
        try:
            os.kill(mlflow_run, 0)  # sends nothing: asks whether the process is there
        except ProcessLookupError:
            break
        time.sleep(0.2)
    client.set_terminated(run_id, status)


@contextlib.contextmanager
def _signals_as_keyboard_interrupt():
    received = []

    def interrupt(number, frame):
        received.append(number)
        # Ctrl-C reaches this process twice: from the terminal, and as SIGTERM from the parent `mlflow run`. Only the
        # first may interrupt, or the second would break what the first has begun to save.
        for signal_number in previous:
            signal.signal(signal_number, signal.SIG_IGN)
        _logger.warning("%s received: ending the step", signal.Signals(number).name)
        raise KeyboardInterrupt

    # Python allows handlers in the main thread only; in another one (a notebook server's, say) signals are its host's.
    in_main_thread = threading.current_thread() is threading.main_thread()
    # SIGHUP: a terminal that is closed, or a connection that is lost.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
    previous = {number: signal.signal(number, interrupt) for number in numbers if not _is_ignored(number)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_ignored(number):
    # As nohup has it, and a sweep's task on Spark for its trainings. But a shell that starts a job in the background
    # has SIGINT ignored by all that it starts, and no one has asked for it.
    asked_for = number != signal.SIGINT or multiprocessing.parent_process() is not None
    return asked_for and signal.getsignal(number) == signal.SIG_IGN


if __name__ == "__main__":
    _wait_and_write_status(sys.argv[1], sys.argv[2], int(sys.argv[3]))
