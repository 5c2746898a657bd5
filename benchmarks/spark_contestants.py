"""Who `spark.py` measures beside bare loops: the step in one process and on a cluster. That script starts them."""

import json
import sys
import time
from contextlib import ExitStack
from functools import partial

from measuring import answer_rounds
from preprocess_contestants import time_preprocess

import carflavor.preprocess
from carflavor.spark import open_session

_sessions = ExitStack()  # not a local one, with which they would go
_decode = carflavor.preprocess._decode


def prepare(source, image_size, warm_up, **options):
    """Prepares rounds of the step without its MLflow run: the seconds of all and of decoding; see `answer_rounds`.

    Args:
        source: Folder of photos.
        image_size: Side of the squares in pixels.
        warm_up: Folder of some other photos, for what a session and its workers do once.
        options: Of `PreprocessConfig`; with `master` the session is opened now and serves all rounds.
    """
    seconds = []

    def decode(*arguments):
        started = time.perf_counter()
        _decode(*arguments)
        seconds.append(time.perf_counter() - started)

    carflavor.preprocess._decode = decode
    if "master" in options:
        _sessions.enter_context(open_session(options["master"], "benchmark"))
    time_preprocess(warm_up, image_size, **options)

    def measure_round():
        return time_preprocess(source, image_size, **options), seconds[-1]

    return {}, measure_round


if __name__ == "__main__":
    answer_rounds(partial(prepare, **json.loads(sys.argv[2])))
