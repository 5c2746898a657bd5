"""Car models in photos, as an MLflow flavor: `save_model`, `log_model`, `load_model`."""

import os

# Larger than any camera's photo, and 600 MB once decoded: OpenCV's own limit of 2^30 pixels lets a file of a few bytes
# take 3 GB. OpenCV reads the variable while it is imported, so it is set before anything of ours imports it; whoever
# imported OpenCV before carflavor keeps that limit.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "200000000")

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
