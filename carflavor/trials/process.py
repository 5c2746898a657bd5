"""Runs one training of a sweep in a process of its own.

TensorFlow gives memory back only when its process ends, and a process that the kernel kills for want of memory, or that
crashes inside TensorFlow, takes no more than its own trial with it. The price is TensorFlow's import, some seconds a
trial. This module does without it: on a Spark worker it waits beside each training.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing import resource_tracker

import mlflow

from carflavor.command import set_up_logging

_SECONDS_BETWEEN_SIGNALS = 1
_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_SECONDS_TO_END = 600  # what an interrupted training may take to keep its best model


class TrialFailed(Exception):
    """A training came to no result. Its sweep goes on."""


def run_training(training, parameters, run_id, tracking_uri, on_epoch):
    """Runs a training in a process of its own.

    An interruption of this process interrupts the training, which ends as any interrupted training does. If this
    process is killed, the training is, too, and leaves its checkpoint.

    Args:
        training: Pickled `(train, config)`: `carflavor.train.train` and a `TrainConfig`.
        parameters: Dict of what to replace in the config.
        run_id: MLflow run that the training joins.
        tracking_uri: Where that run is.
        on_epoch: Function that is called after each epoch but the last one with a dict of epoch, from 0, to validation
            accuracy and the number of epochs in all, and ends the training by returning True.

    Returns:
        Dict of epoch, from 0, to validation accuracy; with the epochs before a resumed training was killed.

    Raises:
        TrialFailed: If the training raised an error, or its process ended without a result.
    """
    # A fresh interpreter: a fork would share this one's locks and database connections.
    context = multiprocessing.get_context("spawn")
    connection, its_connection = context.Pipe()
    its_lifeline, lifeline = context.Pipe(duplex=False)
    arguments = (its_connection, its_lifeline, training, parameters, run_id, tracking_uri)
    process = context.Process(target=_train, args=arguments)
    with connection, lifeline:
        with its_connection, its_lifeline, _interrupts_blocked():
            process.start()
        try:
            return _attend(process, connection, on_epoch)
        except BaseException:
            # Ctrl-C has reached it, too. Python complains of two signals at the same time.
            process.join(_SECONDS_BETWEEN_SIGNALS)
            process.terminate()
            raise
        finally:
            process.join(_SECONDS_TO_END)
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_blocked():
    # For the new process, which inherits this: a Ctrl-C while it imports TensorFlow would end in a traceback. It waits
    # until the training is ready to end well. The first process of a program would start this one, and unblock all.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attend(process, connection, on_epoch):
    try:
        while True:
            said, content = connection.recv()
            if said == "done":
                return content
            if said == "failed":
                raise TrialFailed(content)
            connection.send(on_epoch(*content))
    except (EOFError, ConnectionError):
        process.join()
        raise TrialFailed(_say_how_it_ended(process.exitcode)) from None


def _say_how_it_ended(exit_code):
    if exit_code == -signal.SIGKILL:
        return "Its process was killed (SIGKILL), as the kernel does where memory runs out: try a smaller batch_size"
    if exit_code < 0:
        return f"Its process was ended by {signal.Signals(-exit_code).name}"
    if exit_code == _INTERRUPTED:
        return "Its process was interrupted, and the sweep was not"
    return f"Its process ended with exit code {exit_code}"


def _train(connection, lifeline, training, parameters, run_id, tracking_uri):
    """What the process does."""
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    try:
        train, config = pickle.loads(training)
        config = replace(config, **parameters)
        set_up_logging()
        mlflow.set_tracking_uri(tracking_uri)
        os.environ["MLFLOW_RUN_ID"] = run_id  # a step joins this run
        accuracies = {}

        def on_epoch(epoch, metrics):
            if not accuracies:
                accuracies.update(_read_accuracies(run_id, before=epoch))
            accuracies[epoch] = float(metrics["val_accuracy"])
            epochs = config.resolved().epochs
            if epoch + 1 == epochs:
                return False  # there is nothing left to save by ending it
            connection.send(("epoch", (accuracies, epochs)))
            return connection.recv()

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        train(config, on_epoch)
        # A training that was killed after its last epoch has only its model to log.
        connection.send(("done", accuracies or _read_accuracies(run_id)))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception as error:
        connection.send(("failed", str(error) or type(error).__name__))


def _read_accuracies(run_id, before=math.inf):
    history = mlflow.MlflowClient().get_metric_history(run_id, "val_accuracy")
    return {point.step: point.value for point in history if point.step < before}


def _die_with(lifeline):
    with contextlib.suppress(EOFError):
        lifeline.recv()  # nothing is ever sent: it ends when the other process does
    os.kill(os.getpid(), signal.SIGKILL)
