"""Turns the model of a run into a version of the model registry that callers can name."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import mlflow

import carflavor
from carflavor import tracking
from carflavor.data import sample
from carflavor.data.locations import resolve_model

_ALIAS = re.compile(r"[A-Za-z][\w-]{0,254}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackageConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory that carflavor wrote, as path, `runs:/...` or `models:/...`.
        register_as: Name in the registry.
        alias: Alias that the new version gets, and any older version loses.
    """

    model: str
    register_as: str = "carflavor"
    alias: str = "champion"


def package(config):
    """Checks that a model loads and answers, and registers it.

    Args:
        config: `PackageConfig`.

    Returns:
        The `mlflow.entities.model_registry.ModelVersion`.

    Raises:
        ValueError: If a name is not one that the registry takes.
        MlflowException: If the model cannot be loaded.
    """
    with tracking.step_run("package", config):
        # Here and not in the registry, where the version would be there already when the alias is refused.
        if not _ALIAS.fullmatch(config.alias) or config.alias == "latest" or re.fullmatch(r"[vV]\d+", config.alias):
            raise ValueError(f"Expected alias to be a word other than latest or v1. Received: alias={config.alias!r}")
        if not config.register_as or set(config.register_as) & set("/:"):
            raise ValueError(
                f"Expected register_as to be a name without / and :. Received: register_as={config.register_as!r}"
            )
        uri = resolve_model(config.model)
        photo, box, _ = sample.example_photo()
        carflavor.load_model(uri).predict([photo], [box])
        if Path(uri).is_dir():
            # The registry refers to a place that lasts: a folder of the user's becomes an artifact of this run.
            mlflow.log_artifacts(uri, "model")
            uri = f"runs:/{mlflow.active_run().info.run_id}/model"
        version = mlflow.register_model(uri, config.register_as)
        mlflow.MlflowClient().set_registered_model_alias(config.register_as, config.alias, version.version)
        mlflow.set_tag(tracking.MODEL_TAG, f"models:/{config.register_as}/{version.version}")
        _logger.info(
            "Registered as models:/%s/%s, which is now models:/%s@%s",
            config.register_as,
            version.version,
            config.register_as,
            config.alias,
        )
    return version
