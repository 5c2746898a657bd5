"""Has `mlflow deployments -t azureml` find the workspace, whatever order the packages were installed in.

azureml-mlflow and carflavor would both be the plugin `azureml` of `mlflow.deployments`, where the last entry point of a
name wins, in the order in which the file system lists folders. So carflavor is none there. It is a provider of run
contexts that has no context: MLflow loads every provider when it is imported, before `mlflow.deployments`, and this
module has the target registered once all entry points of `mlflow.deployments` are, by the method that MLflow has for
it.

No part of the package carflavor: importing that by `import mlflow` would keep `mlflow.pyfunc.load_model` from taking
the carflavor that is packed in a model.
"""

import wrapt
from mlflow.tracking.context.abstract_context import RunContextProvider


@wrapt.when_imported("mlflow.deployments.interface")
def _register_target(interface):
    interface.plugin_store.register("azureml", "carflavor.azure.target")


class NoContext(RunContextProvider):
    """A provider that adds nothing to any run."""

    def in_context(self):
        return False

    def tags(self):
        return {}
