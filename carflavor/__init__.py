"""Car models in photos, as an MLflow flavor: `save_model`, `log_model`, `load_model`."""

import os

# The most pixels that image.decode() takes: larger than any camera's photo, and 600 MB once decoded. OpenCV, whose own
# limit would be 2^30, reads the variable while it is imported, so it is set before anything of ours imports it; where
# OpenCV was imported before carflavor, decode() alone holds the limit.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "200000000")
# A refused photo is an error that says so; OpenCV would have strangers write to the standard error of a server as well.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

from carflavor.flavor import (  # noqa: E402
    _load_pyfunc,
    get_default_conda_env,
    get_default_pip_requirements,
    load_model,
    log_model,
    save_model,
)
from carflavor.version import __version__  # noqa: E402

__all__ = [
    "__version__",
    "_load_pyfunc",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
]
