"""The main job: every step on the embedded sample, each as `mlflow run` would start it."""

import logging
from dataclasses import dataclass

import mlflow

from carflavor import tracking
from carflavor.data.locations import data_home
from carflavor.data.sources import EMBEDDED_SAMPLE
from carflavor.preprocess import SAMPLE_IMAGE_SIZE

REGISTERED_NAME = "carflavor-sample"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineConfig:
    """Parameters of the main job: none, so that the first run needs no decision."""


def run_pipeline(config, project):
    """Runs preprocess, train, evaluate, package and deploy on the sample, as children of one run.

    Args:
        config: `PipelineConfig`.
        project: Folder with the MLproject file.

    Returns:
        URI of the registered model.
    """
    records = str(data_home() / "records" / "sample")

    def run_step(entry_point, **parameters):
        submitted = mlflow.projects.run(
            str(project),
            entry_point=entry_point,
            parameters=parameters,
            # The environment is the parent's; without this each child would look for conda.
            env_manager="local",
            run_name=entry_point,
        )
        return mlflow.MlflowClient().get_run(submitted.run_id)

    with tracking.step_run("main", config):
        run_step("preprocess", source="sample", image_size=SAMPLE_IMAGE_SIZE, out=records)
        training = run_step("train", data=records)
        model = f"runs:/{training.info.run_id}/model"
        evaluation = run_step("evaluate", model=model, data=records)
        packaging = run_step("package", model=model, register_as=REGISTERED_NAME)
        model = packaging.data.tags[tracking.MODEL_TAG]
        run_step("deploy", model=model, port=0, keep="false")
        metrics = {
            name: value for name, value in evaluation.data.metrics.items() if name.endswith(("_top_1", "_top_5"))
        }
        mlflow.log_metrics(metrics)
        mlflow.set_tag(tracking.MODEL_TAG, model)
        mlflow.set_tag(tracking.DATA_TAG, EMBEDDED_SAMPLE)
        _logger.info("On the sample's test photos: %s", ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    print(f"\nThe model: {model}\nServe it:  mlflow run . -e deploy --env-manager local -P model={model}")
    return model
