"""Spark sessions, for the steps that can run on a cluster. Loads pyspark where a session is opened, and not before."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import pandas as pd

import carflavor
from carflavor.data.locations import data_home

_MASTERS = r"(local(\[[^\]]+\])?|spark://.+|k8s://.+|yarn|session)$"
_SLOTS_BY_DEFAULT = 64  # where Spark does not tell how many tasks it runs at once, as Databricks without servers
# What a task of `ask_workers` takes at least: those that are quicker would all be run by the worker that is up first.
_SECONDS_A_QUESTION = 0.3
_SECONDS_BETWEEN_CANCELS = 1
# Network drives show a list of files that is this old, at most, with the settings they come with.
_SECONDS_UNTIL_SEEN = 90


_opened = weakref.WeakSet()  # sessions that are not others'


class TaskError(ValueError):
    """What a task raises for its user: a sentence that says all."""


def check_master(master):
    """Refuses a Spark master that is none, and any where pyspark is not installed; `""` means no Spark.

    Raises:
        ValueError: As said.
    """
    if master and find_spec("pyspark") is None:
        raise ValueError("master: expected pyspark to be installed, got none: pip install 'carflavor[spark]'")
    if master and not re.match(_MASTERS, master):
        raise ValueError(
            f"Expected master to be local[n], spark://..., k8s://..., yarn or session. Received: master={master!r}"
        )


@contextlib.contextmanager
def open_session(master, step):
    """Opens a Spark session, and stops it at the end of the block; one that is there already is used and left open.

    Args:
        master: As `check_master` takes it. `session`: a session that is there, such as a notebook's, or the one that
            the platform gives to a job, as Databricks does.
        step: Name of the step, for Spark's own pages.

    Yields:
        `pyspark.sql.SparkSession`.

    Raises:
        ValueError: If none can be had.
    """
    from pyspark.sql import SparkSession

    if session := SparkSession.getActiveSession():
        yield session  # its owner's to stop
        return
    if master == "session":
        builder = SparkSession.builder
    else:
        builder = _configure(SparkSession.builder.master(master))
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    handler = signal.getsignal(signal.SIGINT)
    try:
        session = builder.appName(f"carflavor {step}").getOrCreate()
    except Exception as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"master: no Spark session could be had from {master}: {reason}") from error
    if master != "session":
        _opened.add(session)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)  # Spark has put its own in the place of the step's
    try:
        yield session
    finally:
        if master != "session":
            session.stop()


def _configure(builder):
    # Where carflavor is not installed on the workers, they find it where it lies here.
    packages = [str(Path(carflavor.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        # Limits of photos, and what runs a model.
        **{name: value for name, value in os.environ.items() if name.startswith("CARFLAVOR_")},
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, packages))),
        "CARFLAVOR_HOME": str(data_home()),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        # The bars of several processes would write over each other.
        "TQDM_DISABLE": "1",
    }
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    for name, value in environment.items():
        builder = builder.config(f"spark.executorEnv.{name}", value)
    return builder


def run_tasks(spark, function, count, tag=None):
    """Has the workers run a function for the numbers from 0, each in a task of its own.

    It goes by way of a DataFrame: a session on another machine, as of Databricks Connect, has no RDDs.

    Args:
        spark: Session.
        function: Takes a number, returns str. It and what it holds is pickled.
        count: Number of tasks, at least 1.
        tag: Name to cancel the job by.

    Returns:
        List of what the function returned, in the order of the numbers.

    Raises:
        ValueError: If a task failed as often as Spark tries again.
    """

    def run(batches):
        for batch in batches:
            yield pd.DataFrame({"number": batch["id"], "result": [function(number) for number in batch["id"].tolist()]})

    if tag:
        _tagging(spark).add(tag)
    try:
        rows = spark.range(0, count, 1, count).mapInPandas(run, "number long, result string").collect()
    except Exception as error:
        raise ValueError(_explain(error)) from error
    finally:
        if tag:
            _tagging(spark).remove(tag)
    return [row.result for row in sorted(rows, key=lambda row: row.number)]


@contextlib.contextmanager
def running_tasks(spark, function, count, seconds, find_missing):
    """Has the workers run tasks that write files, for which the block looks; what is left at its end is cancelled.

    Args:
        spark: Session.
        function: As `run_tasks` takes it.
        count: Likewise.
        seconds: Between two looks.
        find_missing: Function that returns the path of a file that the block has not seen yet, or None.

    Yields:
        An iterator, of which each step is time for a look, until all tasks have ended and no file is missing. It raises
        a ValueError if a task failed as often as Spark tries again, after a last look, or if a file does not come.
    """
    tag = f"carflavor-{uuid.uuid4().hex}"
    # In another thread: it waits for the last task, while this one goes on, and can be interrupted.
    with ThreadPoolExecutor(1) as executor:
        job = executor.submit(run_tasks, spark, function, count, tag)
        try:
            yield _look_until_done(job, seconds, find_missing)
        finally:
            if not job.done():
                silence(spark)
                _cancel_job(spark, tag, job)


def _look_until_done(job, seconds, find_missing):
    while not wait([job], seconds).done:
        yield
    # Of a job that failed as well: what is done is done.
    yield
    job.result()
    deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
    while missing := find_missing():
        if time.monotonic() > deadline:
            raise ValueError(
                f"master: expected {missing}, which a worker of Spark wrote, got nothing; "
                f"is the folder the same on all machines?"
            )
        time.sleep(seconds)
        yield


def silence(spark):
    """Has a session that is about to end log nothing more, for each task that is cancelled would complain."""
    # Not one that others go on with.
    if spark in _opened:
        spark.sparkContext.setLogLevel("OFF")


def settle_task():
    """Makes the process of a task what those of one machine are."""
    # One a core is threads enough.
    cv2.setNumThreads(1)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches a local cluster, too, and is for the process that waits for it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cancel_job(spark, tag, job):
    """Cancels a job of `run_tasks` and returns when it has ended.

    Args:
        spark: Session.
        tag: As `run_tasks` was given it.
        job: `concurrent.futures.Future` of `run_tasks`.
    """
    # More than once: the job may not have begun.
    while not job.done():
        _tagging(spark).cancel(tag)
        with contextlib.suppress(Exception):
            job.result(_SECONDS_BETWEEN_CANCELS)


def _tagging(spark):
    """Returns a `_Tagging` of a session."""
    try:
        context = spark.sparkContext
    except AttributeError:  # which a session on another machine does not have
        return _Tagging(spark.addTag, spark.removeTag, spark.interruptTag)
    # Not those of the session here either: they do not reach the jobs of `collect` (Spark 4.3).
    return _Tagging(context.addJobTag, context.removeJobTag, context.cancelJobsWithTag)


class _Tagging(NamedTuple):
    add: Callable
    remove: Callable
    cancel: Callable


def _explain(error):
    """Returns the sentence in what Spark raises, in which Python's traceback stands inside Java's."""
    text = re.split(r"\n\s+at ", str(error))[0].strip()
    if said := re.findall(rf"^(?:[\w.]+\.)?{TaskError.__name__}: (.+)$", text, re.MULTILINE):
        return said[-1]
    if said := re.findall(r"^(?:[\w.]+\.)?\w+(?:Error|Interrupt): .+$", text, re.MULTILINE):
        return f"master: a task failed on a worker: {said[-1]}"
    # After py4j's line, of the call, comes Spark's own.
    lines = [line for line in text.splitlines() if not line.startswith("An error occurred while calling")]
    return f"master: Spark failed: {lines[0].removeprefix(': ') if lines else type(error).__name__}"


def ask_workers(spark, function):
    """Has a function run by every worker of a session, as far as can be: by as many tasks as run at once.

    Args:
        spark: Session.
        function: Takes nothing, returns something for JSON. It is pickled.

    Returns:
        List of pairs of a worker's host name and what the function returned there.

    Raises:
        ValueError: If the function raised an error.
    """
    asked, answers = 0, []
    # Again where workers have come since.
    while asked < (slots := _count_slots(spark)):
        asked = slots
        answers += run_tasks(spark, functools.partial(_answer, function), asked)
    return [tuple(json.loads(answer)) for answer in answers]


def _count_slots(spark):
    try:
        return spark.sparkContext.defaultParallelism
    except AttributeError:  # which a session on another machine does not have
        return _SLOTS_BY_DEFAULT


def _answer(function, number):
    started = time.monotonic()
    answer = json.dumps([socket.gethostname(), function()])
    time.sleep(max(0, started + _SECONDS_A_QUESTION - time.monotonic()))
    return answer


def check_visible(spark, folder, parameter="out", in_order=False, source=None):
    """Refuses a folder, and a source, that are not the same on this machine and on all workers of a session.

    This machine writes a file there that all workers must see, each of them writes one that this machine must see.

    Args:
        spark: Session.
        folder: Path of the folder; it is made where it is missing.
        parameter: What the user calls it.
        in_order: Whether files are written there from their start to their end alone, which is all that the stores of
            some clouds take, such as volumes of Databricks. Record files are not.
        source: `carflavor.data.on_spark.SentStore` that workers are to read, or None.

    Raises:
        ValueError: If a worker does not see the folder or cannot write to it, or sees another source or none; with the
            worker's name.
    """
    folder = Path(folder).absolute()
    tokens = folder / f".visible-{uuid.uuid4().hex}"
    tokens.mkdir(parents=True)
    try:
        (tokens / "here").touch()
        look = functools.partial(_look, str(tokens), in_order, source)
        for host, (name, problem, source_problem) in ask_workers(spark, look):
            if not problem and not (tokens / name).is_file():
                problem = "what it writes there is not seen here"
            if problem:
                raise ValueError(
                    f"{parameter}: expected a folder that this machine and all workers of Spark share, "
                    f"got {folder}; worker {host}: {problem}"
                )
            if source_problem:
                raise ValueError(source_problem)
    finally:
        shutil.rmtree(tokens, ignore_errors=True)


def _look(tokens, in_order, source):
    """Returns the name of a file written into a folder, what went wrong with it, and with the source, each or None."""
    return *_leave_token(tokens, in_order), source and source.find_problem()


def _leave_token(tokens, in_order):
    """Returns the name of a file that was written into a folder, and what went wrong, or None."""
    name = uuid.uuid4().hex
    # By its name, for a network drive may show a list of files that is half a minute old.
    if not os.path.exists(os.path.join(tokens, "here")):
        return name, "it does not see what is there"
    try:
        descriptor = os.open(os.path.join(tokens, name), os.O_WRONLY | os.O_CREAT)
        try:
            if not in_order:
                os.pwrite(descriptor, b"seen", 4096)
            os.pwrite(descriptor, b"seen", 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return name, f"it cannot write there: {error.strerror}"
    return name, None
