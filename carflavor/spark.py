"""Spark sessions, for the steps that can run on a cluster. Loads pyspark where a session is opened, and not before."""

import contextlib
import os
import re
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import carflavor
from carflavor.data.locations import data_home

_MASTERS = r"(local(\[[^\]]+\])?|spark://.+|k8s://.+|yarn|session)$"


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
