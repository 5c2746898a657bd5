"""How a packed network is run, behind one call: by Keras, or by OpenVINO from an intermediate representation (IR).

Keras, TensorFlow, OpenVINO and NNCF are imported by what needs them: a model that OpenVINO serves loads no TensorFlow.
"""

import contextlib
import functools
import importlib.util
import logging
import platform
import sys
import threading
from pathlib import Path

import numpy as np

ENGINES = ("keras", "openvino")
# Arithmetic of the convolutions. OpenVINO knows the first two by these names.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # int8: what was not quantised
IR_FILE = "network.xml"
IR_FILES = (IR_FILE, "network.bin")
# As many photos as NNCF takes by default to find the ranges of the activations.
CALIBRATION_PHOTOS = 300

_PADDED = (1, 2, 4, 8, 16, 32)

_logger = logging.getLogger(__name__)


class KerasEngine:
    """Runs a network with Keras and TensorFlow, in the precision it was saved in.

    Args:
        path: Path of the `model.keras`.

    Attributes:
        network: The `keras.Model`.
        input_size: Side of its square input in pixels.
    """

    name, precision = "keras", "float32"

    def __init__(self, path):
        import keras
        import tensorflow as tf

        # compile=False: what a model was trained with is not needed to run it.
        self.network = keras.saving.load_model(path, compile=False)
        self.input_size = self.network.input_shape[1]
        # Not `predict`: it builds a data pipeline and a progress bar for every call.
        call = tf.function(functools.partial(self.network, training=False), autograph=False)
        shape = (self.input_size, self.input_size, 3)
        self._to_tensor = functools.partial(tf.constant, dtype=self.network.input.dtype)
        self._compile = functools.cache(
            lambda size: call.get_concrete_function(tf.TensorSpec((size, *shape), self.network.input.dtype))
        )

    def sizes_to_prepare(self, largest):
        """Returns the sizes of batch, up to a largest one, that each take time or memory when they first come."""
        return [size for size in _PADDED if size <= largest]

    def __call__(self, photos):
        """Returns the probabilities of a batch.

        Args:
            photos: uint8 RGB array of shape `(batch, input_size, input_size, 3)`.

        Returns:
            float32 array of shape `(batch, number of classes)`; rows sum to 1.
        """
        count = len(photos)
        # The call is compiled for each size of batch, so there are but a few.
        size = next((size for size in _PADDED if size >= count), count)
        padded = np.zeros((size, *photos.shape[1:]), np.uint8)
        padded[:count] = photos
        return self._compile(size)(self._to_tensor(padded)).numpy()[:count]


class OpenVinoEngine:
    """Runs the IR of a network with OpenVINO. It may be called from several threads; they take turns.

    Args:
        path: Path of the `network.xml`; the weights lie beside it.
        precision: What it was converted for, one of `PRECISIONS`.
        threads: Cores to use; None for all.

    Attributes:
        input_size: Side of its square input in pixels.
        precision: As given.

    Raises:
        ImportError: If OpenVINO is not installed.
    """

    name = "openvino"

    def __init__(self, path, precision, threads=None):
        openvino = _import_openvino()
        core = openvino.Core()
        if precision == "bfloat16" and not cpu_has_bfloat16():
            _logger.warning(
                "The model was packed in bfloat16, which this CPU does not compute in: it runs in float32, "
                "several times slower"
            )
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            # Bound threads of two processes, as of two workers of Spark, are bound to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        compiled = core.compile_model(core.read_model(path), "CPU", options)
        self.input_size = compiled.input(0).partial_shape[1].get_length()
        self.precision = precision
        self._request = compiled.create_infer_request()
        self._turn = threading.Lock()

    def sizes_to_prepare(self, largest):
        """Returns the sizes of batch, as `KerasEngine` does: all, for batches are not padded."""
        return list(range(1, largest + 1))

    def __call__(self, photos):
        """Returns the probabilities of a batch, as `KerasEngine` does."""
        with self._turn:
            # The result is a view of memory that the next call writes to.
            return self._request.infer([np.ascontiguousarray(photos)], share_inputs=True)[0].copy()


def check(engine, precision):
    """Raises a ValueError unless there is such an engine and it can be packed here in such a precision."""
    if engine not in ENGINES:
        raise ValueError(f"Expected engine to be one of {', '.join(ENGINES)}. Received: engine={engine!r}")
    known = ["float32"] if engine == "keras" else list(PRECISIONS)
    if precision not in known:
        raise ValueError(
            f"Expected precision to be one of {', '.join(known)} with engine={engine}. "
            f"Received: precision={precision!r}"
        )
    # Here, and not minutes later when the network is converted.
    if precision == "int8" and importlib.util.find_spec("nncf") is None:
        raise ValueError("precision=int8 needs NNCF: pip install 'carflavor[int8]'")


def load_engine(data, ir, packed, name=None, allow_fallback=False, threads=None):
    """Loads the engine of a packed model.

    Args:
        data: Path of the folder with `model.keras`.
        ir: Path of the folder with the IR.
        packed: Dict with `name` and `precision` of the engine that the model was packed with.
        name: One of `ENGINES` to use instead; None for the packed one.
        allow_fallback: Whether Keras may run a model where OpenVINO is not installed.
        threads: Cores that OpenVINO may use; None for all.

    Raises:
        ValueError: If there is no such engine or the model has no IR.
        ImportError: If OpenVINO is needed and not installed, and a fallback is not allowed.
    """
    name = name or packed["name"]
    if name not in ENGINES:
        raise ValueError(f"expected engine to be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "openvino" and packed["name"] != "openvino":
        raise ValueError("expected a model that was packed with engine=openvino, got one without; package it again")
    if name == "openvino":
        try:
            return OpenVinoEngine(ir / IR_FILE, packed["precision"], threads)
        except ImportError as error:
            if not allow_fallback:
                raise ImportError(
                    "The model was packed for OpenVINO, which is not installed here: pip install openvino. "
                    "Or have Keras run it, several times slower: allow_fallback=True or CARFLAVOR_ALLOW_FALLBACK=true"
                ) from error
            _logger.warning("OpenVINO is not installed: Keras runs the model instead, several times slower")
    return KerasEngine(data / "model.keras")


def convert(network, folder, precision, calibration=None):
    """Converts a network for OpenVINO: BatchNormalization and Scale become part of the convolutions.

    Args:
        network: `keras.Model` from uint8 RGB photos `(batch, S, S, 3)` to probabilities `(batch, C)`.
        folder: Folder to write the IR into; is made.
        precision: One of `PRECISIONS`.
        calibration: For `int8`, uint8 RGB photos `(N, S, S, 3)` of the training split, or an iterable of them.

    Raises:
        ImportError: If OpenVINO, or NNCF for `int8`, is not installed.
        ValueError: If there are no photos to quantise with.
    """
    import tensorflow as tf

    openvino = _import_openvino()
    call = tf.function(
        functools.partial(network, training=False),
        input_signature=[tf.TensorSpec(network.input_shape, tf.uint8)],
        autograph=False,
    )
    with _without_telemetry():
        converted = openvino.convert_model(call)
        if precision == "int8":
            converted = _quantise(converted, calibration)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Weights in half precision would save room and change the network.
    openvino.save_model(converted, folder / IR_FILE, compress_to_fp16=False)


def cpu_has_bfloat16():
    """Says whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in _import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def describe_cpu():
    """Returns the name of this machine's CPU, for a record of what was measured where."""
    with contextlib.suppress(ImportError):
        return _import_openvino().Core().get_property("CPU", "FULL_DEVICE_NAME")
    return platform.processor() or platform.machine()


def _quantise(converted, calibration):
    if calibration is None or not len(calibration):
        raise ValueError("expected photos of the training split to quantise with, got none")
    import nncf

    photos = nncf.Dataset([photo[np.newaxis] for photo in calibration])
    # MIXED: symmetric weights, asymmetric activations, which suits activations that are not ReLU.
    return nncf.quantize(
        converted, photos, preset=nncf.QuantizationPreset.MIXED, subset_size=min(CALIBRATION_PHOTOS, len(calibration))
    )


def _import_openvino():
    with _without_telemetry():
        return importlib.import_module("openvino")


@contextlib.contextmanager
def _without_telemetry():
    # OpenVINO and NNCF report to Google Analytics from the moment they are imported, unless openvino_telemetry cannot
    # be imported: then they do without. Who serves the photos of others cannot have that.
    there = "openvino_telemetry" in sys.modules
    if not there:
        sys.modules["openvino_telemetry"] = None
    try:
        yield
    finally:
        if not there:
            del sys.modules["openvino_telemetry"]
