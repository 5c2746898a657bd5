"""What `training.py` measures in TensorFlow: ours, and keras.applications. It is started by that script."""

import json
import sys
import time
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from measuring import answer_rounds

from carflavor import networks
from carflavor.augmentation import build_augmentation
from carflavor.data.batches import PhotoBatches
from carflavor.data.records import RecordFile
from carflavor.learner import Learner, compile_model, copy_to_train
from carflavor.train import TrainConfig

WARM_UP_STEPS = 2  # the first one compiles
STEPS_PER_EPOCH = 100  # for the learning rate alone
# What the other side does, too, whatever a preset says.
PLAIN = {"weights": "none", "optimizer": "adamw", "statistics": "batch", "ema": 0.0, "train_scale": 1.0}


def build_keras_applications(config, num_classes):
    """Builds the network of keras.applications for a plain `fit`."""
    shape = (config.input_size, config.input_size, 3)
    model = keras.Sequential(
        [
            keras.Input(shape, dtype="uint8"),
            keras.layers.Rescaling(1 / 127.5, offset=-1.0),
            keras.applications.ResNet152(weights=None, include_top=False, pooling="avg", input_shape=shape),
            keras.layers.Dense(num_classes, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay),
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        metrics=["accuracy"],
    )
    return model


def build_before(config, num_classes):
    """Builds our network as it is saved, for Keras's own training step."""
    network = _build_network(config, num_classes)
    return _compile(network, network, config)


def build_ours(config, num_classes):
    """Builds our network in the form in which it is trained, without augmentation."""
    network = _build_network(config, num_classes)
    return _compile(Learner(network, Unchanged()), network, config)


def build_ours_with_augmentation(config, num_classes):
    """Builds all that is fitted to record files."""
    network = _build_network(config, num_classes)
    return _compile(Learner(network, build_augmentation(config)), network, config)


def _build_network(config, num_classes):
    return copy_to_train(networks.build(config.network, num_classes, config.input_size), config.precision)


def _compile(model, network, config):
    compile_model(model, config, network.layers[-1], STEPS_PER_EPOCH)
    return model


class Unchanged(keras.layers.Layer):
    """The augmentation that leaves photos and targets alone."""

    def call(self, photos, targets):
        return photos, targets


# What is measured step by step: the function that builds it, and what it builds it of.
STEP_CONTESTANTS = {
    "keras_applications_resnet152": (build_keras_applications, {"network": "resnet152", "precision": "float32"}),
    "resnet152_float32": (build_ours, {"network": "resnet152", "precision": "float32"}),
    "resnet152_bfloat16": (build_ours, {"network": "resnet152", "precision": "mixed_bfloat16"}),
    "resnet152_before": (build_before, {"network": "resnet152", "precision": "float32"}),
    "lite0": (build_ours, {"network": "efficientnet-lite0", "precision": "float32"}),
    "lite0_before": (build_before, {"network": "efficientnet-lite0", "precision": "float32"}),
}


def prepare(contestant, steps, num_classes, records, **settings):
    """Prepares the rounds of a contestant; see `answer_rounds`.

    Args:
        contestant: Its name.
        steps: Steps a round, of those that are measured step by step.
        num_classes: Number of classes.
        records: Path of the record file for those that are measured epoch by epoch.
        **settings: Parameters of `TrainConfig`.
    """
    if contestant in STEP_CONTESTANTS:
        build, own_settings = STEP_CONTESTANTS[contestant]
        config = TrainConfig(**settings, **own_settings, **PLAIN).resolved()
        measure_round = prepare_steps(build(config, num_classes), config, num_classes, steps)
    else:
        config = TrainConfig(preset="quick", **settings, **PLAIN).resolved()
        in_memory = contestant == "lite0_from_arrays"
        measure_round = prepare_epochs(build_ours_with_augmentation(config, num_classes), config, records, in_memory)
    return {"tensorflow": tf.__version__, "keras": keras.__version__}, measure_round


def prepare_steps(model, config, num_classes, steps):
    """Returns a function that measures some steps on arrays."""
    random = np.random.default_rng(0)
    shape = (config.batch_size * max(steps, WARM_UP_STEPS), config.input_size, config.input_size, 3)
    photos = random.integers(0, 256, shape, "uint8")
    targets = keras.utils.to_categorical(random.integers(num_classes, size=len(photos)), num_classes)

    def fit(steps):
        rates = Rates(config.batch_size)
        count = config.batch_size * steps
        model.fit(photos[:count], targets[:count], batch_size=config.batch_size, callbacks=[rates], verbose=0)
        return rates.of_steps

    fit(WARM_UP_STEPS)
    return partial(fit, steps)


def prepare_epochs(model, config, records, in_memory):
    """Returns a function that measures one epoch on a record file, or on an array of its photos."""
    file = RecordFile(records)
    if in_memory:
        targets = keras.utils.to_categorical(file.labels, len(file.class_names))
        data = {"x": file.images("box")[()], "y": targets, "batch_size": config.batch_size}
    else:
        batches = PhotoBatches([file], ("box",), config.batch_size, config.seed)
        data = {"x": batches.dataset(), "steps_per_epoch": len(batches), "shuffle": False}

    def fit():
        rates = Rates(config.batch_size)
        model.fit(**data, callbacks=[rates], verbose=0)
        return rates.of_epochs

    fit()
    return fit


class Rates(keras.callbacks.Callback):
    """Notes photos a second, of steps and of epochs.

    Args:
        batch_size: Photos a step.
    """

    def __init__(self, batch_size):
        super().__init__()
        self._batch_size = batch_size
        self.of_steps, self.of_epochs = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch_started = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.of_steps.append(self._batch_size / (time.perf_counter() - self._step_started))

    def on_epoch_end(self, epoch, logs=None):
        photos = self._batch_size * self.params["steps"]
        self.of_epochs.append(photos / (time.perf_counter() - self._epoch_started))


if __name__ == "__main__":
    answer_rounds(partial(prepare, sys.argv[1], **json.loads(sys.argv[2])))
