"""Trains a network on record files and logs it as a carflavor model."""

import contextlib
import itertools
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import keras
import mlflow
import numpy as np
import tensorflow as tf
from mlflow.entities import Metric

import carflavor
from carflavor import checkpoint, networks, report, tracking
from carflavor.augmentation import build_augmentation
from carflavor.calibration import fit_temperature, fold_temperature
from carflavor.callbacks import AskWhetherToStop, EpochMetrics, KeepEpoch, Progress, Validation
from carflavor.data.batches import PhotoBatches, SquashedBatches
from carflavor.data.locations import resolve_input
from carflavor.data.records import AUGMENTED, CROPS
from carflavor.data.sources import EMBEDDED_SAMPLE
from carflavor.learner import (
    Learner,
    average_statistics,
    compile_model,
    copy_to_train,
    fit_head,
    freeze_statistics,
    predict,
)
from carflavor.networks import NETWORKS
from carflavor.parameters import convert
from carflavor.preprocess import open_split
from carflavor.progress import progress_bar
from carflavor.recipes import PRESETS

RESUMED_FROM_TAG = "carflavor.resumed_from"
_METRICS_AT_ONCE = 1000  # MLflow takes no more in one request

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Parameters of the step; the same names stand in MLproject. What is `auto` is taken from the preset.

    Attributes:
        data: Folder with record files, as path or URI, or `sample`.
        preset: One of `carflavor.recipes.PRESETS`.
        network: One of `carflavor.networks.NETWORKS`.
        weights: What to begin with: `none` (random), `imagenet`, a file with ImageNet weights, or a model of ours as
            `runs:/...`, `models:/...` or path, whose last layer is replaced.
        crop: `box`, `full`, or `mixed` (each photo in one of the ways that are stored, by chance, anew every epoch).
        input_size: Side of the network's input in pixels; `auto` of preset `scratch` is the size the network is for.
        train_scale: Side of the photos in training, as share of `input_size`; see `train_size`.
        head_epochs: Epochs of the last layer alone, on features computed once, before the whole network is trained.
        epochs: Times that the training photos are gone through.
        batch_size: Photos a step.
        optimizer: `adamw` or `sgd` (with Nesterov momentum of 0.9).
        learning_rate: Highest learning rate; it is reached after a tenth of the steps and falls as a cosine to zero.
        backbone_rate: Share of the learning rate that all layers but the last one learn at; it does not reduce their
            weight decay.
        statistics: What BatchNormalizations normalise with in training: those of each `batch`, or the `frozen` ones
            that they begin with.
        weight_decay: Decoupled weight decay of the kernels; BatchNormalization, Scale and biases have none.
        label_smoothing: Share of the probability spread over all classes in the target.
        min_area: Least share of a stored square that a random view keeps.
        color: Strength of random changes of colour, from 0 to 1.
        randaugment: Magnitude of two random operations of RandAugment on each batch, from 0 to 1.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of CutMix, up to 1, 0 for none.
        ema: Momentum of the exponential moving average of the weights that is validated and kept, and of the statistics
            of BatchNormalizations, where it is above their own; 0 for none.
        class_weights: `none`, or `balanced`: a photo counts the more the fewer there are of its class.
        precision: `float32` or `mixed_bfloat16`. The model that is kept computes in float32.
        validation: `hold_out` validates on the validation split and keeps the best epoch; `train` learns from it, too,
            and keeps the last epoch: for the final training, when all settings are chosen.
        augmented: Whether to learn from `train-augmented.h5`, which `augment` writes there, in the place of `train.h5`.
        temperature: What the logits are divided by in the model that is kept, so that its probabilities are honest: a
            number, or `fit` for the one that fits the validation photos best.
        devices: Number of GPUs, or of logical CPUs where there is no GPU, of this machine to share each batch.
        resume: Whether to go on where the same training was killed.
        seed: Seed of initial weights, order and augmentation.
    """

    data: str = "sample"
    preset: str = "scratch"
    network: str = "auto"
    weights: str = "auto"
    crop: str = "auto"
    input_size: int | str = "auto"
    train_scale: float | str = "auto"
    head_epochs: int | str = "auto"
    epochs: int | str = "auto"
    batch_size: int | str = "auto"
    optimizer: str = "auto"
    learning_rate: float | str = "auto"
    backbone_rate: float | str = "auto"
    statistics: str = "auto"
    weight_decay: float | str = "auto"
    label_smoothing: float | str = "auto"
    min_area: float | str = "auto"
    color: float | str = "auto"
    randaugment: float | str = "auto"
    mixup: float | str = "auto"
    cutmix: float | str = "auto"
    ema: float | str = "auto"
    class_weights: str = "auto"
    precision: str = "auto"
    validation: str = "hold_out"
    augmented: bool = False
    temperature: float | str = "fit"
    devices: int = 1
    resume: bool = True
    seed: int = 0

    def resolved(self):
        """Returns a copy in which the preset has said what was `auto`.

        Raises:
            ValueError: If a parameter is not what `carflavor.parameters` says that it may be.
        """
        config = replace(self, **convert(asdict(self)))
        preset = PRESETS[config.preset]
        config = replace(config, **{name: value for name, value in preset.items() if getattr(config, name) == "auto"})
        if config.statistics == "frozen" and config.weights == "none":
            raise ValueError("Expected weights with statistics=frozen: a random network has no statistics to keep")
        if config.input_size == "auto":
            config = replace(config, input_size=NETWORKS[config.network].input_size)
        return config

    @property
    def training_split(self):
        """Name of the record file to learn from."""
        return AUGMENTED if self.augmented else "train"

    @property
    def train_size(self):
        """Side of the photos in training, in pixels: a multiple of 32, or `input_size` where `train_scale` is 1.

        A network trained on random views, in which cars look larger than in whole photos, recognises those best at a
        larger size ([Touvron et al., 2019](https://arxiv.org/abs/1906.06423)); the smaller one is cheaper to train at.
        """
        if self.train_scale == 1:
            return self.input_size
        return max(32, 32 * round(self.train_scale * self.input_size / 32))


def train(config, on_epoch=None):
    """Trains, and logs metrics, curves and the model of the best epoch to the run; without validation of the last one.

    Args:
        config: `TrainConfig`.
        on_epoch: Optional function that is called after each epoch with its number, from 0, and a dict of metrics, and
            ends the training, without a model, by returning True.

    Returns:
        The `mlflow.models.model.ModelInfo` of the logged model; None if `on_epoch` has ended the training.

    Raises:
        ValueError: If a parameter or the data is not what is expected.
    """
    # What is on the stack, the lock of the checkpoint for one, outlives what is done for a run that ends early.
    with contextlib.ExitStack() as stack, tracking.step_run("train", config) as run:
        config = config.resolved()
        mlflow.log_dict(asdict(config), "resolved_config.json")
        # `mlflow run` logs what was typed, `auto` for most: nothing to compare runs by.
        mlflow.log_params({f"used_{name}": getattr(config, name) for name in PRESETS[config.preset]})
        training = stack.enter_context(open_split(config.data, config.training_split))
        validation = stack.enter_context(open_split(config.data, "validation"))
        _check_data(training, validation)
        if config.augmented:
            _check_copies(training, validation)
        mlflow.set_tag(tracking.RECORDS_TAG, tracking.records_address(config.data, training))
        _say_what_it_learns_from(training)
        hold_out = config.validation == "hold_out"
        learned_from = [training] if hold_out else [training, validation]
        crops = _choose_crops(config.crop, learned_from)
        for records, crop in itertools.product(learned_from, crops):
            records.images(crop)  # refuses a crop that is not stored, before anything takes long
        stack.enter_context(device_scope(config.devices))

        keras.utils.set_random_seed(config.seed)
        network = _build_network(config, training.class_names)
        # From here on it takes long: all pixels are read, for the digests.
        tracking.log_records(training, "train")
        tracking.log_records(validation, "validation" if hold_out else "train")
        name = _name_of(config, [training, validation], network)
        kept = stack.enter_context(checkpoint.Checkpoint(name, config.resume))
        run.on_early_end(lambda: _keep_model(run.run_id, kept, config, training))
        class_weights = _class_weights(config.class_weights, learned_from)
        if config.head_epochs and not kept.progress:
            squashed = SquashedBatches(learned_from, crops, config.batch_size, config.input_size)
            _fit_head(network, squashed, config, class_weights)
        validation_batches = (
            SquashedBatches([validation], crops, config.batch_size, config.input_size) if hold_out else None
        )
        batches = PhotoBatches(learned_from, crops, config.batch_size, config.seed)
        learning, learner = _build_learner(network, config, class_weights, len(batches))
        if kept.progress:
            kept.restore(learner.state)
            _take_over_run(kept.progress, run.run_id)
        learner.fit(
            batches.dataset(kept.epochs),
            initial_epoch=kept.epochs,
            epochs=config.epochs,
            steps_per_epoch=len(batches),
            # In this order: each adds to the metrics of the epoch what the next ones use.
            callbacks=[
                Validation(network, learning, validation_batches),
                Progress(batches.photos, kept.epochs, config.epochs),
                KeepEpoch(kept, network, run.run_id),
                EpochMetrics(network),
                AskWhetherToStop(on_epoch),
            ],
            # The batches come in an order of their own. Of a dataset that Keras cannot shuffle it warns.
            shuffle=False,
            verbose=0,
        )
        if kept.best_path is None:
            raise ValueError("The validation loss was no number after any epoch: try a smaller learning_rate")
        mlflow.log_figure(report.curves_figure(kept.progress["history"], kept.progress["best"]["epoch"]), "curves.png")
        mlflow.log_dict(kept.progress["history"], "history.json")
        if learner.stop_training:
            kept.finish()
            return None
        packed = _what_to_pack(kept, config, training)
        packed["training"]["temperature"] = _calibrate(packed["network"], config.temperature, validation_batches)
        model_info = carflavor.log_model(name="model", **packed)
        _logger.info("Model of epoch %d: %s", kept.progress["best"]["epoch"], model_info.model_uri)
        kept.finish()
    return model_info


def _check_data(training, validation):
    if training.class_names != validation.class_names:
        raise ValueError(f"{training.path} and {validation.path}: expected the same class names, got different ones")
    if not len(training) or not len(validation):
        raise ValueError(
            f"{training.path.parent}: expected photos to train and to validate on, "
            f"got {len(training)} and {len(validation)}"
        )


def _check_copies(training, validation):
    # preprocess may have drawn another split since they were made.
    if learned := set(training.sources) & set(validation.sources):
        raise ValueError(
            f"{training.path}: expected copies of the photos that are in train.h5 now, got {len(learned):,} photos of "
            f"{validation.path.name}, such as {min(learned)}: run augment again"
        )
    _logger.info("%s photos to learn from, copies by augment among them", f"{len(training):,}")


def _choose_crops(choice, files):
    if choice != "mixed":
        return (choice,)
    crops = tuple(crop for crop in CROPS if all(crop in file.crops for file in files)) or CROPS
    if len(crops) == 1:
        _logger.info("crop=mixed: %s is all that the record files hold", crops[0])
    return crops


def _say_what_it_learns_from(training):
    mlflow.set_tag(tracking.DATA_TAG, training.settings["source"])
    mlflow.log_dict(training.settings, "data.json")
    if training.settings["source"] == EMBEDDED_SAMPLE:
        _logger.warning(
            "%s\nTraining on the embedded sample: drawings of invented cars. The model will know no real car.\n"
            "Your own photos: mlflow run . -e preprocess --env-manager local -P source=<folder>\n"
            "and then:        mlflow run . -e train --env-manager local -P data=<its output>\n%s",
            "=" * 100,
            "=" * 100,
        )


def _name_of(config, files, network):
    # Neither where the data and the first weights come from nor what happens after the last epoch changes what is
    # learned.
    without = ("data", "augmented", "preset", "weights", "resume", "temperature")
    settings = {name: value for name, value in asdict(config).items() if name not in without}
    return checkpoint.digest(settings, files, network.get_weights())


def device_scope(devices):
    """Returns the context in which a model is built and fitted on several devices of this machine.

    Args:
        devices: Number of GPUs or, where there is no GPU, of logical CPUs.

    Raises:
        ValueError: If TensorFlow sees fewer.
    """
    if devices == 1:
        return contextlib.nullcontext()
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    if not 1 <= devices <= len(found):
        raise ValueError(f"Expected devices to be from 1 to {len(found)}, the {kind}s here. Received: {devices}")
    return tf.distribute.MirroredStrategy(found[:devices]).scope()


def _build_network(config, class_names):
    weights = config.weights
    if weights not in ("none", "imagenet"):
        weights = resolve_input(weights, "weights")
        if weights.is_dir():
            return _build_from_model(weights, config, class_names)
    return networks.build(config.network, len(class_names), config.input_size, weights)


def _build_from_model(path, config, class_names):
    # Random weights of the head come from the seed, whatever else was loaded.
    network = carflavor.load_model(path, engine="keras").network
    if network.name != config.network:
        raise ValueError(
            f"weights: expected a model with network={config.network}, got {config.weights} with network={network.name}"
        )
    _logger.info("weights: the layers of %s, with a new head", config.weights)
    return networks.with_new_head(network, len(class_names), config.input_size)


def _fit_head(network, batches, config, class_weights):
    with progress_bar("head", len(batches.labels)) as progress:
        accuracy = fit_head(
            network, batches, config.head_epochs, config.label_smoothing, class_weights, progress.update
        )
    mlflow.log_metric("head_accuracy", accuracy)
    _logger.info("The last layer alone, trained first, knows %.1f %% of the photos it learned from", 100 * accuracy)


def _build_learner(network, config, class_weights, steps_per_epoch):
    learning = copy_to_train(network, config.precision, config.train_size)
    if config.statistics == "frozen":
        freeze_statistics(learning)
    average_statistics(learning, config.ema)
    learner = Learner(learning, build_augmentation(config), class_weights)
    compile_model(learner, config, learning.layers[-1], steps_per_epoch)
    learner.optimizer.build(learner.trainable_variables)
    return learning, learner


def _class_weights(choice, files):
    if choice == "none":
        return None
    counts = np.bincount(np.concatenate([file.labels for file in files]), minlength=len(files[0].class_names))
    # As scikit-learn's "balanced": every class counts the same in all. A class without photos never occurs.
    return counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))


def _take_over_run(progress, run_id):
    """Gives this run the curves of the one that was killed, and closes that one."""
    if progress["run_id"] == run_id:
        # A scheduler that starts a step again gives it the run that it had.
        _logger.info("Going on after epoch %d, in the same run", progress["epochs"])
        return
    client = mlflow.MlflowClient()
    mlflow.set_tag(RESUMED_FROM_TAG, progress["run_id"])
    now = round(time.time() * 1000)
    metrics = [
        Metric(name, value, now, epoch)
        for name, values in progress["history"].items()
        for epoch, value in enumerate(values)
    ]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics[start : start + _METRICS_AT_ONCE])
    # The store may be another one, or the run deleted: then there is nothing to close.
    with contextlib.suppress(mlflow.MlflowException):
        earlier = client.get_run(progress["run_id"])
        if "head_accuracy" in earlier.data.metrics:
            mlflow.log_metric("head_accuracy", earlier.data.metrics["head_accuracy"])
        if earlier.info.status == "RUNNING":
            client.set_terminated(progress["run_id"], "KILLED")
    _logger.info("Going on after epoch %d, where run %s ended", progress["epochs"], progress["run_id"])


def _calibrate(network, temperature, batches):
    """Folds the temperature into the network; returns it, or None where there is none."""
    if temperature == "fit":
        if batches is None:
            _logger.warning(
                "The probabilities are not calibrated: no photo was held out to fit the temperature on. "
                "temperature=<number> takes the one that a training with validation=hold_out has found"
            )
            return None
        temperature = fit_temperature(predict(network, batches), batches.labels)
    fold_temperature(network, temperature)
    mlflow.log_metric("temperature", temperature)
    return temperature


def _what_to_pack(kept, config, training):
    """Returns the arguments of `carflavor.save_model` for the network of the best epoch."""
    best = kept.progress["best"]
    return {
        "network": keras.saving.load_model(kept.best_path, compile=False),
        "class_names": training.class_names,
        "crop_margin": training.settings["crop_margin"],
        "image_size": training.image_size,
        "training": {
            **asdict(config),
            "data": training.settings,
            "best_epoch": best["epoch"],
            "validation_accuracy": best["validation_accuracy"],
            # Until the network is calibrated.
            "temperature": None,
        },
    }


def _keep_model(run_id, kept, config, training):
    if kept.best_path is None:
        _logger.warning("No epoch came to its end: there is no model to keep")
        return
    with tempfile.TemporaryDirectory(dir=kept.folder) as folder:
        carflavor.save_model(path=Path(folder) / "model", **_what_to_pack(kept, config, training))
        # As text: azureml-mlflow takes no Path.
        mlflow.MlflowClient().log_artifacts(run_id, str(Path(folder) / "model"), "model")
    _logger.warning(
        "Kept the model of epoch %d, not calibrated: runs:/%s/model. The same command goes on after epoch %d, from %s",
        kept.progress["best"]["epoch"],
        run_id,
        kept.epochs,
        kept.folder,
    )
