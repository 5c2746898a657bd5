"""From photos to the champion of a registry, in one task of a job.

In one, because only notebooks can hand a value, here the model of `train`, to the next task.
"""

import sys

from carflavor.command import set_up_logging
from carflavor.evaluate import EvaluateConfig, evaluate
from carflavor.package import PackageConfig, package
from carflavor.preprocess import PreprocessConfig, preprocess
from carflavor.promote import PromoteConfig, promote
from carflavor.train import TrainConfig, train


def main(photos, records, name):
    """Runs the steps.

    Args:
        photos: Folder of labelled photos, those for the test among them.
        records: Folder for the record files, on the local disk of the machine.
        name: Name of the model in Unity Catalog.
    """
    preprocess(PreprocessConfig(source=photos, out=records))
    model = train(TrainConfig(data=records, preset="quick")).model_uri
    evaluate(EvaluateConfig(model=model, data=records))
    package(PackageConfig(model=model, register_as=name, alias="challenger"))
    promote(PromoteConfig(data=records, name=name))


if __name__ == "__main__":
    set_up_logging()
    main(*sys.argv[1:])
