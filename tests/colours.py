"""Small trainings: three colours for classes, a network that learns them in seconds, and a real `mlflow run`."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np

from carflavor.data.records import RecordWriter
from carflavor.networks import NETWORKS, Network
from carflavor.networks.resnet import _basic_block, build_resnet

PROJECT = Path(__file__).parents[1]
COLOURS = [(220, 40, 40), (40, 200, 60), (50, 60, 220)]


def write_split(path, rows, crops=("box", "full"), names=("red", "green", "blue"), size=40):
    """Writes noisy squares whose colour is their class; under `full` they are darker."""
    random = np.random.default_rng(len(rows))
    with RecordWriter(path, crops, size, names, {"source": "colours", "crop_margin": 16}) as writer:
        for row, label in enumerate(rows):
            square = np.clip(np.array(COLOURS[label]) + random.normal(0, 30, (size, size, 3)), 0, 255).astype("uint8")
            images = {"box": square, "full": square // 2}
            images = {crop: images[crop] for crop in crops}
            writer.append(images, label, f"{row}.jpg", (size, size), (0, 0, size, size))


def add_tiny_network():
    """Puts a real network that TensorFlow compiles in a second beside those that users choose from."""
    NETWORKS["tiny"] = Network(
        lambda num_classes, input_size: build_resnet([1], _basic_block, num_classes, input_size, "tiny"), 32
    )


@contextmanager
def mlflow_run(step, parameters, environment, log):
    """Opens a real `mlflow run` of a step as a process group of its own, which does not outlive the block.

    Args:
        step: Entry point.
        parameters: Texts `name=value`.
        environment: What `clean_environment` gives.
        log: File that takes what is printed.

    Yields:
        `subprocess.Popen`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "run", str(PROJECT), "-e", step, "--env-manager", "local"]
        + [f"-P{parameter}" for parameter in parameters],
        env={
            **environment,
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "CARFLAVOR_HOME": os.environ["CARFLAVOR_HOME"],
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, log, seconds=180):
    """Waits until `condition()` is true and returns it; fails with the end of the file `log`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.5)
    raise AssertionError(f"it did not come to pass within {seconds} s:\n{Path(log.name).read_text()[-3000:]}")
