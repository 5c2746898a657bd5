"""What `serving.py` takes as the limit: OpenVINO alone in a process, without HTTP. It is started by that script.

The packed IR in the packed precision, compiled for one fixed size of batch, which is the fastest there is: one photo
with all cores at it, and batches with all cores at one (a stream) or one core at each of several.
"""

import base64
import itertools
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

# It reports to Google Analytics as soon as OpenVINO is imported, unless it cannot be.
sys.modules["openvino_telemetry"] = None

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import openvino  # noqa: E402
from load import percentile  # noqa: E402
from measuring import answer_rounds, memory_of  # noqa: E402

from carflavor.engines import IR_FILE, PRECISIONS  # noqa: E402

BATCH_SIZES = (8, 16, 32)
CORES = len(os.sched_getaffinity(0))
WARM_UP_SECONDS = 0.1


class Bare:
    """A packed network, compiled for one size of batch.

    Args:
        model: Path of the model directory.
        precision: As it was packed, one of `PRECISIONS`.
        texts: Photos as base64, bytes.
        batch_size: Photos at a time.
        streams: Batches at a time; cores are divided among them.
    """

    def __init__(self, model, precision, texts, batch_size, streams):
        core = openvino.Core()
        network = core.read_model(Path(model) / "engine" / IR_FILE)
        size = network.input(0).partial_shape[1].get_length()
        network.reshape([batch_size, size, size, 3])
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": CORES,
        }
        compiled = core.compile_model(network, "CPU", options)
        self._requests = [compiled.create_infer_request() for _ in range(streams)]
        self._batches = np.empty((streams, batch_size, size, size, 3), np.uint8)
        self._texts = itertools.cycle(texts)
        for batch in self._batches:
            self._decode(batch)
        self.measure(WARM_UP_SECONDS)

    def measure(self, seconds, decoding=False):
        """Scores batches for some time, each stream in a thread of its own.

        Args:
            seconds: For how long new batches are begun.
            decoding: Whether each batch is decoded first, by the thread that scores it, or one decoded before is taken.

        Returns:
            Photos a second, and the list of seconds that each batch took.
        """
        taken = []
        started = time.perf_counter()
        threads = [
            threading.Thread(target=self._run, args=(request, batch, started + seconds, decoding, taken))
            for request, batch in zip(self._requests, self._batches, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(taken) * self._batches.shape[1] / (time.perf_counter() - started), taken

    def _run(self, request, batch, end, decoding, taken):
        while (begun := time.perf_counter()) < end:
            if decoding:
                self._decode(batch)
            request.infer([batch], share_inputs=True)
            taken.append(time.perf_counter() - begun)

    def _decode(self, batch):
        for row in batch:
            photo = np.frombuffer(base64.b64decode(next(self._texts)), np.uint8)
            cv2.resize(cv2.imdecode(photo, cv2.IMREAD_COLOR_RGB), row.shape[1::-1], dst=row)


def prepare(model, precision, decoding, seconds, photos):
    """Prepares rounds; see `answer_rounds`.

    Args:
        model: Path of the model directory.
        precision: As it was packed.
        decoding: Whether batches are decoded, too.
        seconds: That each size of batch is measured in a round.
        photos: List of paths.
    """
    # Each stream decodes its own photos: a core for each, and no second level of threads.
    cv2.setNumThreads(1)
    texts = [base64.b64encode(Path(path).read_bytes()) for path in photos]
    started = time.perf_counter()
    single = Bare(model, precision, texts, 1, 1)
    startup = time.perf_counter() - started
    batches = {
        f"{size} photos, {streams} stream{'s' * (streams > 1)}": Bare(model, precision, texts, size, streams)
        for size, streams in itertools.product(BATCH_SIZES, sorted({1, CORES}))
    }

    def measure_round():
        alone = sorted(single.measure(seconds)[1])
        figures = {f"p{percent}_ms": 1000 * percentile(alone, percent) for percent in (50, 95, 99)}
        if decoding:
            figures["decoding_p50_ms"] = 1000 * percentile(sorted(single.measure(seconds, decoding)[1]), 50)
        rates = {name: bare.measure(seconds, decoding)[0] for name, bare in batches.items()}
        return figures | {"per_second": rates, "memory_mb": memory_of([os.getpid()]) / 1e6}

    return {"openvino": openvino.__version__, "startup_s": startup}, measure_round


if __name__ == "__main__":
    answer_rounds(partial(prepare, **json.loads(sys.argv[1])))
