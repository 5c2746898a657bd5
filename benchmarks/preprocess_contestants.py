"""Who `preprocess.py` measures: a bare loop over photos, and ours. They are started by that script."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from measuring import answer_rounds, memory_of, processes_of_session

from carflavor.preprocess import PreprocessConfig, write_records

_SECONDS_A_SAMPLE = 0.05


def prepare_bare(source, image_size):
    """Prepares rounds of `cv2.imdecode` and `cv2.resize` in one thread; see `answer_rounds`."""
    cv2.setNumThreads(1)
    paths = sorted(Path(source).rglob("*.jpg"))

    def measure_round():
        started = time.perf_counter()
        for path in paths:
            photo = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            cv2.resize(photo, (image_size, image_size))
        return len(paths) / (time.perf_counter() - started)

    return {"photos": len(paths)}, measure_round


def time_preprocess(source, image_size, **options):
    """Returns the seconds of the step without its MLflow run, whose files are removed; with crop=full."""
    out = tempfile.mkdtemp()
    started = time.perf_counter()
    try:
        write_records(PreprocessConfig(source=source, crop="full", image_size=image_size, out=out, **options))
        return time.perf_counter() - started
    finally:
        shutil.rmtree(out)


def prepare_ours(source, image_size, workers):
    """Prepares rounds of the step without its MLflow run: photos a second."""
    number = len(list(Path(source).rglob("*.jpg")))
    return {"photos": number}, lambda: number / time_preprocess(source, image_size, workers=workers)


def prepare_peak(source, image_size, workers):
    """Prepares rounds of the same, which are looked at all the time: bytes of memory at the peak.

    Not the rounds whose time is taken: to find out how much memory a process has takes milliseconds, in which it waits.
    """

    def measure_round():
        ended, peak = threading.Event(), [0]

        def watch():
            while not ended.wait(_SECONDS_A_SAMPLE):
                peak[0] = max(peak[0], memory_of(processes_of_session(os.getsid(0))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            time_preprocess(source, image_size, workers=workers)
        finally:
            ended.set()
            watcher.join()
        return peak[0]

    return {}, measure_round


if __name__ == "__main__":
    prepare = {"bare": prepare_bare, "ours": prepare_ours, "peak": prepare_peak}[sys.argv[1]]
    answer_rounds(partial(prepare, **json.loads(sys.argv[2])))
