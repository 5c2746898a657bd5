"""What happens after each epoch of a training."""

import sys
import time

import keras
import mlflow
import numpy as np
from mlflow.keras import MlflowCallback

from carflavor.learner import take_averages
from carflavor.networks.training_form import training_form
from carflavor.progress import progress_bar


class Validation(keras.callbacks.Callback):
    """After each epoch takes the averaged weights over into the network that is kept, and validates that one.

    Args:
        network: `keras.Model` that is kept.
        learning: `keras.Model` that learns.
        batches: Batches to validate on, or None.
    """

    def __init__(self, network, learning, batches):
        super().__init__()
        self._network = network
        self._learning = learning
        self._batches = batches
        if batches is not None:
            self._validated = training_form(network)
            self._validated.compile(loss="categorical_crossentropy", metrics=["accuracy"], jit_compile=False)

    def on_epoch_end(self, epoch, logs=None):
        logs["learning_rate"] = float(self.model.optimizer.learning_rate)
        take_averages(self._network, self._learning, self.model)
        if self._batches is not None:
            values = self._validated.evaluate(self._batches, verbose=0, return_dict=True)
            logs |= {"val_loss": values["loss"], "val_accuracy": values["accuracy"]}


class Progress(keras.callbacks.Callback):
    """Shows one bar over the whole training, and a line an epoch; adds `photos_per_second` to the metrics.

    Args:
        photos: Training photos an epoch.
        done: Epochs that were done before.
        epochs: Number of epochs.
    """

    def __init__(self, photos, done, epochs):
        super().__init__()
        self._photos = photos
        self._bar = progress_bar("train", photos * epochs, photos * done)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # Of the last batch; what follows in the epoch is validation.
        self._seconds = time.perf_counter() - self._started
        share = (batch + 1) / self.params["steps"]
        self._bar.update(round(self._photos * (self._epoch + share)) - self._bar.n)

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite(logs["loss"]):
            raise ValueError(f"The loss is {logs['loss']} after epoch {epoch + 1}: try a smaller learning_rate")
        logs["photos_per_second"] = self._photos / self._seconds
        validated = "val_loss" in logs
        self._bar.write(
            f"epoch {epoch + 1}/{self.params['epochs']}: loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.3f}, "
            + (f"validation loss {logs['val_loss']:.3f}, " if validated else "")
            + (f"validation accuracy {logs['val_accuracy']:.3f}, " if validated else "")
            + f"{logs['photos_per_second']:.0f} photos/s",
            # Beside the bar. Standard output waits in a buffer where it is no terminal.
            file=sys.stderr,
        )

    def on_train_end(self, logs=None):
        self._bar.close()


class KeepEpoch(keras.callbacks.Callback):
    """Writes the checkpoint of each epoch, and into it the network of the best one.

    The best is the epoch with the best validation accuracy, and of those the first with the least loss; without
    validation the last one.

    Args:
        kept: `carflavor.checkpoint.Checkpoint`.
        network: The `keras.Model` to keep.
        run_id: MLflow's id of the run.
    """

    def __init__(self, kept, network, run_id):
        super().__init__()
        self._kept = kept
        self._network = network
        self._run_id = run_id

    def on_epoch_end(self, epoch, logs=None):
        progress = self._kept.progress or {"history": {}, "best": None}
        history = {name: [*progress["history"].get(name, []), float(value)] for name, value in logs.items()}
        rank = [logs["val_accuracy"], -logs["val_loss"]] if "val_accuracy" in logs else [epoch]
        best = progress["best"]
        is_best = np.isfinite(rank).all() and (best is None or rank > best["rank"])
        if is_best:
            best = {"epoch": epoch + 1, "validation_accuracy": logs.get("val_accuracy"), "rank": rank}
        self._kept.save(
            self.model.state,
            self._network if is_best else None,
            epochs=epoch + 1,
            run_id=self._run_id,
            history=history,
            best=best,
        )


class AskWhetherToStop(keras.callbacks.Callback):
    """Ends the training after the epoch for which `on_epoch(epoch, metrics)` returns True."""

    def __init__(self, on_epoch):
        super().__init__()
        self._on_epoch = on_epoch

    def on_epoch_end(self, epoch, logs=None):
        if self._on_epoch is not None and self._on_epoch(epoch, dict(logs)):
            self.model.stop_training = True


class EpochMetrics(MlflowCallback):
    """MLflow's callback, with the layers of the network.

    Args:
        network: The `keras.Model` to keep. What is fitted holds it as one of its layers.
    """

    def __init__(self, network):
        super().__init__()
        self._network = network

    def on_train_begin(self, logs=None):
        # In place of MLflow's, whose summary would be of the learner.
        mlflow.log_params({f"optimizer_{name}": value for name, value in self.model.optimizer.get_config().items()})
        lines = []
        self._network.summary(print_fn=lambda line, **unused: lines.append(line))
        mlflow.log_text("\n".join(lines), "model_summary.txt")
