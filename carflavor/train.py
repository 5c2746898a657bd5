"""Trains a network on record files and logs it as a carflavor model."""

import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass

import keras
import mlflow
import numpy as np
from keras import layers, ops
from mlflow.keras import MlflowCallback

import carflavor
from carflavor import report, tracking
from carflavor.data.locations import data_home
from carflavor.image import squash
from carflavor.networks import NETWORKS
from carflavor.preprocess import EMBEDDED_SAMPLE, open_split
from carflavor.progress import progress_bar

CROP_CHOICES = {"box": ("box",), "full": ("full",), "mixed": ("box", "full")}
# Share of the stored side that a random crop keeps: 224 of 256, the usual pair since Krizhevsky et al., 2012.
_CROP_SHARE = 0.875

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        data: Folder with record files, as path or URI, or `sample`.
        network: One of `carflavor.networks.NETWORKS`.
        crop: `box`, `full`, or `mixed` (each photo in one of the two ways, by chance, anew every epoch).
        input_size: Side of the network's input in pixels, or `auto` for the size the network is meant for.
        epochs: Times that the training photos are gone through.
        batch_size: Photos a step.
        learning_rate: Highest learning rate; it is reached after a tenth of the steps and falls as a cosine to zero.
        weight_decay: Decoupled weight decay of the kernels; BatchNormalization, Scale and biases have none.
        label_smoothing: Share of the probability spread over all classes in the target.
        seed: Seed of initial weights, order and augmentation.
    """

    data: str = "sample"
    network: str = "resnet18"
    crop: str = "box"
    input_size: str = "auto"
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 0.001
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0


def train(config):
    """Trains, and logs metrics, curves and the model of the best epoch to the run.

    Args:
        config: `TrainConfig`.

    Returns:
        The `mlflow.models.model.ModelInfo` of the logged model.

    Raises:
        ValueError: If a parameter or the data is not what is expected.
    """
    with tracking.step_run("train", config) as run:
        with open_split(config.data, "train") as training, open_split(config.data, "validation") as validation:
            input_size = _check(config, training, validation)
            _say_what_it_learns_from(training)
            keras.utils.set_random_seed(config.seed)
            network = NETWORKS[config.network].build(len(training.class_names), input_size)
            training_batches = PhotoBatches(training, CROP_CHOICES[config.crop], config.batch_size, config.seed)
            validation_batches = SquashedBatches(validation, CROP_CHOICES[config.crop], config.batch_size, input_size)
            model = AugmentedNetwork(build_augmentation(training.image_size, input_size, config.seed), network)
            _compile(model, config, len(training_batches))

            best = BestNetwork(network, data_home() / "checkpoints" / run.run_id / "best.keras")
            packed = _pack_arguments(config, training)
            run.on_early_end(lambda: _keep_checkpoint(run.run_id, best, packed))
            history = model.fit(
                training_batches,
                validation_data=validation_batches,
                epochs=config.epochs,
                # In this order: an epoch is said to be over when its network is kept.
                callbacks=[best, Progress(training_batches.photos, config.epochs), EpochMetrics()],
                verbose=0,
            )
            mlflow.log_figure(report.curves_figure(history.history), "curves.png")
            mlflow.log_dict(history.history, "history.json")
            packed["training"] |= {"best_epoch": best.epoch + 1, "validation_accuracy": best.accuracy}
            model_info = carflavor.log_model(best.load(), name="model", **packed)
        shutil.rmtree(best.path.parent)
        _logger.info("Model of epoch %d: %s", best.epoch + 1, model_info.model_uri)
    return model_info


def _check(config, training, validation):
    if config.network not in NETWORKS:
        raise ValueError(f"Expected network to be one of {', '.join(NETWORKS)}. Received: network={config.network!r}")
    if config.crop not in CROP_CHOICES:
        raise ValueError(f"Expected crop to be one of {', '.join(CROP_CHOICES)}. Received: crop={config.crop!r}")
    if training.class_names != validation.class_names:
        raise ValueError(f"{training.path} and {validation.path}: expected the same class names, got different ones")
    if not len(training) or not len(validation):
        raise ValueError(
            f"{training.path.parent}: expected photos to train and to validate on, "
            f"got {len(training)} and {len(validation)}"
        )
    if config.input_size == "auto":
        return NETWORKS[config.network].input_size
    if not config.input_size.isdecimal() or not 32 <= int(config.input_size) <= 1024:
        raise ValueError(
            f"Expected input_size to be auto or a number from 32 to 1024. Received: input_size={config.input_size!r}"
        )
    return int(config.input_size)


def _say_what_it_learns_from(training):
    mlflow.set_tag(tracking.DATA_TAG, training.settings["source"])
    mlflow.log_dict(training.settings, "data.json")
    if training.settings["source"] == EMBEDDED_SAMPLE:
        _logger.warning(
            "%s\nTraining on the embedded sample: drawings of invented cars. The model will know no real car.\n"
            "Your own photos: mlflow run . -e preprocess -P source=<folder>, then -e train -P data=<its output>\n%s",
            "=" * 100,
            "=" * 100,
        )


class PhotoBatches(keras.utils.PyDataset):
    """Training batches of stored squares: uint8 from the HDF5 file to the device, in a new order every epoch.

    Args:
        records: `RecordFile`.
        crops: Crops to take; of several, one is drawn for each photo and epoch.
        batch_size: Photos a batch. What is left over by an epoch's last whole batch waits for a later epoch: a smaller
            batch would be a second shape, and TensorFlow compiles the training step anew for each shape.
        seed: Seed of order and choice.
    """

    def __init__(self, records, crops, batch_size, seed):
        super().__init__()
        self._images = [records.images(crop) for crop in crops]
        self._targets = keras.utils.to_categorical(records.labels, len(records.class_names))
        self._batch_size = batch_size
        self._random = np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self):
        rows = len(self._targets)
        self._order = self._random.permutation(rows)
        self._choice = self._random.integers(len(self._images), size=rows)

    @property
    def photos(self):
        """Number of photos an epoch."""
        return min(len(self) * self._batch_size, len(self._targets))

    def __len__(self):
        return max(len(self._targets) // self._batch_size, 1)

    def __getitem__(self, index):
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return np.stack([self._images[self._choice[row]][row] for row in rows]), self._targets[rows]


class SquashedBatches(keras.utils.PyDataset):
    """Validation batches as serving sees photos: every crop of every photo, squashed to the network's size.

    Args:
        records: `RecordFile`.
        crops: Crops to take, one after the other.
        batch_size: Photos a batch.
        input_size: Side of the network's input in pixels.
    """

    def __init__(self, records, crops, batch_size, input_size):
        super().__init__()
        self._images = [records.images(crop) for crop in crops]
        self._targets = keras.utils.to_categorical(records.labels, len(records.class_names))
        self._batch_size = batch_size
        self._input_size = input_size

    def __len__(self):
        return -(-len(self._targets) * len(self._images) // self._batch_size)

    def __getitem__(self, index):
        count = len(self._targets)
        places = range(index * self._batch_size, min((index + 1) * self._batch_size, count * len(self._images)))
        photos = [squash(self._images[place // count][place % count], self._input_size) for place in places]
        return np.stack(photos), self._targets[[place % count for place in places]]


@keras.saving.register_keras_serializable(package="carflavor")
class ToPixels(layers.Layer):
    """Rounds floats from 0 to 255 to uint8: what a network sees in training is what it is served."""

    def call(self, inputs):
        return ops.cast(ops.round(ops.clip(inputs, 0, 255)), "uint8")


def build_augmentation(image_size, input_size, seed):
    """Builds the part of the training graph that crops, resizes, flips, shifts and zooms.

    Args:
        image_size: Side S of the stored squares in pixels.
        input_size: Side of the network's input in pixels.
        seed: Seed of the random layers.

    Returns:
        `keras.Sequential` from uint8 `(batch, S, S, 3)` to uint8 `(batch, input_size, input_size, 3)`.
    """
    cropped = round(_CROP_SHARE * image_size)
    return keras.Sequential(
        [
            keras.Input((image_size, image_size, 3), dtype="uint8"),
            # One place for all photos of a batch, as Keras draws it; the shift below differs from photo to photo.
            layers.RandomCrop(cropped, cropped, seed=seed),
            layers.Resizing(input_size, input_size, antialias=True),
            layers.RandomFlip("horizontal", seed=seed + 1),
            layers.RandomTranslation(0.08, 0.08, fill_mode="nearest", seed=seed + 2),
            # Mostly outwards: the crop before has enlarged the car already.
            layers.RandomZoom((-0.05, 0.25), fill_mode="nearest", seed=seed + 3),
            ToPixels(),
        ],
        name="augmentation",
    )


class AugmentedNetwork(keras.Model):
    """A network that augments its photos in training and takes them as they are otherwise."""

    def __init__(self, augmentation, network):
        super().__init__(name="augmented")
        self.augmentation = augmentation
        self.network = network

    def call(self, photos, training=False):
        if training:
            photos = self.augmentation(photos, training=True)
        return self.network(photos, training=training)


def _compile(model, config, steps_per_epoch):
    steps = config.epochs * steps_per_epoch
    warmup_steps = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps - warmup_steps, 1),
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=config.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        metrics=["accuracy"],
        # XLA is several times slower on this network's CPU kernels than TensorFlow's own (oneDNN).
        jit_compile=False,
    )


class BestNetwork(keras.callbacks.Callback):
    """Keeps the network of the epoch with the best validation accuracy, and of those the first with the least loss.

    Keras's ModelCheckpoint would save the model that is fitted, augmentation included, and under its final name while
    it still writes.

    Args:
        network: The `keras.Model` to keep.
        path: File to keep it in.
    """

    def __init__(self, network, path):
        super().__init__()
        self._network = network
        self._rank = None
        self.path = path
        self.epoch = None
        self.accuracy = None

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            return
        rank = (logs["val_accuracy"], -logs["val_loss"])
        if self._rank is not None and rank <= self._rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name("partial.keras")
        self._network.save(partial)
        os.replace(partial, self.path)
        self._rank, self.epoch, self.accuracy = rank, epoch, float(logs["val_accuracy"])

    def load(self):
        """Returns the network that was kept."""
        return keras.saving.load_model(self.path, compile=False)


class EpochMetrics(MlflowCallback):
    """MLflow's callback without its second copy of the validation metrics, which has no step."""

    def on_test_end(self, logs=None):
        pass


class Progress(keras.callbacks.Callback):
    """Shows one bar over the whole training, and a line an epoch; adds `photos_per_second` to the metrics.

    Args:
        photos: Training photos an epoch.
        epochs: Number of epochs.
    """

    def __init__(self, photos, epochs):
        super().__init__()
        self._photos = photos
        self._bar = progress_bar("train", photos * epochs)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        share = (batch + 1) / self.params["steps"]
        self._bar.update(round(self._photos * (self._epoch + share)) - self._bar.n)

    def on_test_begin(self, logs=None):
        self._seconds = time.perf_counter() - self._started

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["loss"]):
            raise ValueError(f"The loss is {logs['loss']} after epoch {epoch + 1}: try a smaller learning_rate")
        logs["photos_per_second"] = self._photos / self._seconds
        self._bar.write(
            f"epoch {epoch + 1}/{self.params['epochs']}: loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.3f}, "
            f"validation loss {logs['val_loss']:.3f}, validation accuracy {logs['val_accuracy']:.3f}, "
            f"{logs['photos_per_second']:.0f} photos/s",
            # Beside the bar. Standard output waits in a buffer where it is no terminal.
            file=sys.stderr,
        )

    def on_train_end(self, logs=None):
        self._bar.close()


def _pack_arguments(config, training):
    return {
        "class_names": training.class_names,
        "crop_margin": training.settings["crop_margin"],
        "image_size": training.image_size,
        "training": {**asdict(config), "data": training.settings},
    }


def _keep_checkpoint(run_id, best, packed):
    if best.epoch is None:
        _logger.warning("No epoch came to its end: there is no model to keep")
        return
    folder = best.path.parent / "model"
    packed["training"] |= {"best_epoch": best.epoch + 1, "validation_accuracy": best.accuracy}
    carflavor.save_model(best.load(), folder, **packed)
    mlflow.MlflowClient().log_artifacts(run_id, folder, "model")
    shutil.rmtree(best.path.parent)
    _logger.warning("Kept the model of epoch %d: runs:/%s/model", best.epoch + 1, run_id)
