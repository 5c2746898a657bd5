"""Who `scoring.py` measures: a bare loop over files, and the step on a cluster. They are started by that script."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

# It reports to Google Analytics as soon as OpenVINO is imported, unless it cannot be.
sys.modules["openvino_telemetry"] = None

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import openvino  # noqa: E402
from measuring import answer_rounds, memory_of  # noqa: E402

from carflavor.engines import IR_FILE, PRECISIONS  # noqa: E402
from carflavor.image import EncodedPhoto  # noqa: E402
from carflavor.score import ScoreConfig, write_predictions  # noqa: E402
from carflavor.spark import open_session  # noqa: E402

_BATCH_SIZES = (8, 16, 32)
_TRIED = 256  # photos, to find the fastest batch
_SECONDS_A_SAMPLE = 1
_sessions = ExitStack()  # not a local one, with which they would go


class Loop:
    """A packed network, compiled for one size of batch and one thread.

    Args:
        model: Path of the model directory.
        precision: As it was packed.
        batch_size: Photos at a time.
    """

    def __init__(self, model, precision, batch_size):
        core = openvino.Core()
        network = core.read_model(Path(model) / "engine" / IR_FILE)
        self._size = network.input(0).partial_shape[1].get_length()
        network.reshape([batch_size, self._size, self._size, 3])
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # two loops would share one core
        }
        self._request = core.compile_model(network, "CPU", options).create_infer_request()
        self._batch = np.zeros((batch_size, self._size, self._size, 3), np.uint8)

    def run(self, paths):
        """Scores photos; returns how many a second."""
        started, classes = time.perf_counter(), []
        for first in range(0, len(paths), len(self._batch)):
            some = paths[first : first + len(self._batch)]
            for row, path in enumerate(some):
                self._batch[row] = EncodedPhoto(path.read_bytes()).cut_square(self._size)
            answers = self._request.infer([self._batch], share_inputs=True)[0]
            classes += answers[: len(some)].argmax(axis=1).tolist()
        return len(classes) / (time.perf_counter() - started)


def prepare_bare(model, photos, precision, half):
    """Prepares rounds of a bare loop in one thread; see `answer_rounds`.

    Args:
        model: Path of the model directory.
        photos: Folder of photos.
        precision: As the model was packed.
        half: Which half of the photos, 0 or 1; None for all.
    """
    cv2.setNumThreads(1)
    paths = sorted(Path(photos).rglob("*.jpg"))
    paths = paths if half is None else paths[half::2]
    loops = [Loop(model, precision, size) for size in _BATCH_SIZES]
    best = max(loops, key=lambda loop: max(loop.run(paths[:_TRIED]) for _ in range(2)))
    return {"photos": len(paths)}, partial(best.run, paths)


def prepare_spark(model, photos, warm_up, master):
    """Prepares rounds of the step without its MLflow run, in a session that is opened now; see `answer_rounds`.

    Args:
        model: Path of the model directory.
        photos: Folder of photos.
        warm_up: Folder of some other photos, for what a session and its workers do once.
        master: Address of the cluster.
    """
    _sessions.enter_context(open_session(master, "benchmark"))
    score(model, warm_up, master)

    def measure_round():
        ended, peak = threading.Event(), [0]

        def watch():
            while not ended.wait(_SECONDS_A_SAMPLE):
                peak[0] = max(peak[0], memory_of([os.getpid()]))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            seconds, number = score(model, photos, master)
        finally:
            ended.set()
            watcher.join()
        return {"seconds": seconds, "per_second": number / seconds, "peak_bytes": peak[0]}

    return {}, measure_round


def score(model, photos, master):
    """Returns the seconds of the step without its MLflow run, whose files are removed, and the number of photos."""
    out = tempfile.mkdtemp()
    started = time.perf_counter()
    try:
        _, summary = write_predictions(ScoreConfig(model=model, photos=photos, master=master, out=out))
        return time.perf_counter() - started, summary["photos"]
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    prepare = {"bare": prepare_bare, "spark": prepare_spark}[sys.argv[1]]
    answer_rounds(partial(prepare, **json.loads(sys.argv[2])))
