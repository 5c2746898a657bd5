"""Car models in photos, as an MLflow flavor: `save_model`, `log_model`, `load_model`."""

import importlib
import os

import wrapt

from carflavor.version import __version__

# The most pixels that image.decode() takes: larger than any camera's photo, and 600 MB once decoded. OpenCV, whose own
# limit would be 2^30, reads the variable while it is imported, so it is set before anything of ours imports it; where
# OpenCV was imported before carflavor, decode() alone holds the limit.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "200000000")
# A refused photo is an error that says so; OpenCV would have strangers write to the standard error of a server as well.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
# MLflow reports to its makers which of its functions are called, unless it is told otherwise before it is imported.
# Told here, because every step, the server and the workers of Spark come by here first.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

__all__ = [
    "__version__",
    "_load_pyfunc",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
]


def __getattr__(name):
    # MLflow takes more than a second to import, which processes that decode photos do without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("carflavor.flavor"), name)


def __dir__():
    return sorted({*globals(), *__all__})


@wrapt.when_imported("keras")
def _register_layers(keras):
    # mlflow.keras.load_model knows nothing of carflavor: Keras must know Scale by the time it reads a network, and
    # importing Keras here would cost everybody who only wants `import carflavor` several seconds.
    importlib.import_module("carflavor.layers")
