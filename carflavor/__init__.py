"""Car models in photos, as an MLflow flavor: `save_model`, `log_model`, `load_model`."""

from carflavor.flavor import (
    _load_pyfunc,
    get_default_conda_env,
    get_default_pip_requirements,
    load_model,
    log_model,
    save_model,
)
from carflavor.version import __version__

__all__ = [
    "__version__",
    "_load_pyfunc",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
]
