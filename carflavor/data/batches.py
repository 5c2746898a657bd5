"""Batches of stored squares, from record files to the network."""

from functools import lru_cache

import keras
import numpy as np
import tensorflow as tf

from carflavor.image import squash

# Threads that read ahead. With a single one Keras leaves reading ahead to tf.data and its tuning, whose thread is slow
# to end (TensorFlow 2.21): after every third or fourth epoch of 80 s nothing went on for 45 to 55 s.
_WORKERS = 2
_BATCHES_AHEAD = 4


class PhotoBatches:
    """Training batches: squares as they are stored, in a new order every epoch.

    Args:
        files: List of `RecordFile` of the same classes.
        crops: Crops to take; of several, one is drawn for each photo and epoch.
        batch_size: Photos a batch. What is left over by an epoch's last whole batch waits for a later epoch: a smaller
            batch would be a second shape, and TensorFlow compiles the training step anew for each shape.
        seed: Seed of order and choice. An epoch's order follows from the seed and the epoch's number alone.
    """

    def __init__(self, files, crops, batch_size, seed):
        self._images = [[file.images(crop) for crop in crops] for file in files]
        self._places = [(file, row) for file, records in enumerate(files) for row in range(len(records))]
        labels = np.concatenate([records.labels for records in files])
        self._targets = keras.utils.to_categorical(labels, len(files[0].class_names)).astype(np.float32)
        self._crops = len(crops)
        self._batch_size = min(batch_size, len(self._places))
        self._seed = seed
        self._draw = lru_cache(2)(self._draw_anew)

    def _draw_anew(self, epoch):
        random = np.random.default_rng([self._seed, epoch])
        return random.permutation(len(self._places)), random.integers(self._crops, size=len(self._places))

    @property
    def photos(self):
        """Number of photos an epoch."""
        return len(self) * self._batch_size

    def __len__(self):
        """Returns the number of batches an epoch."""
        return len(self._places) // self._batch_size

    def read(self, step):
        """Reads a batch; steps count from the first of the first epoch.

        Returns:
            uint8 RGB `(batch, S, S, 3)` and float32 `(batch, C)`, one-hot.
        """
        epoch, index = divmod(int(step), len(self))
        order, choice = self._draw(epoch)
        rows = order[index * self._batch_size : (index + 1) * self._batch_size]
        photos = [self._images[file][choice[row]][place] for row in rows for file, place in [self._places[row]]]
        return np.stack(photos), self._targets[rows]

    def dataset(self, first_epoch=0):
        """Returns an endless `tf.data.Dataset` of the batches from an epoch on, read ahead by a thread.

        It reads ahead into the next epoch, too. Not a `keras.utils.PyDataset`, which reaches TensorFlow through a
        Python generator: while a training takes its batches from one, the kernel is asked for 190 MB of memory anew in
        every step (TensorFlow 2.21), and each epoch ends with a tenth of a second of waiting.
        """
        shapes = ((self._batch_size, *self._images[0][0].shape[1:]), (self._batch_size, self._targets.shape[1]))

        def read(step):
            batch = tf.numpy_function(self.read, [step], (tf.uint8, tf.float32))
            return tuple(tf.ensure_shape(part, shape) for part, shape in zip(batch, shapes, strict=True))

        dataset = tf.data.Dataset.counter(first_epoch * len(self)).map(read).prefetch(_BATCHES_AHEAD)
        options = tf.data.Options()
        options.autotune.enabled = False  # see _WORKERS
        return dataset.with_options(options)


class SquashedBatches(keras.utils.PyDataset):
    """Batches as serving sees photos: every crop of every photo, squashed to the network's size, in stored order.

    Args:
        files: List of `RecordFile` of the same classes.
        crops: Crops to take, one after the other.
        batch_size: Photos a batch; the last one may be smaller.
        input_size: Side of the network's input in pixels.
    """

    def __init__(self, files, crops, batch_size, input_size):
        super().__init__(workers=_WORKERS)
        self._places = [
            (records.images(crop), row, label)
            for crop in crops
            for records in files
            for row, label in enumerate(records.labels)
        ]
        self._num_classes = len(files[0].class_names)
        self._batch_size = batch_size
        self._input_size = input_size

    @property
    def labels(self):
        """(N,) int64, the true class of every photo of every crop."""
        return np.array([label for *_, label in self._places])

    def __len__(self):
        return -(-len(self._places) // self._batch_size)

    def __getitem__(self, index):
        places = self._places[index * self._batch_size : (index + 1) * self._batch_size]
        photos = [squash(images[row], self._input_size) for images, row, _ in places]
        return np.stack(photos), keras.utils.to_categorical([label for *_, label in places], self._num_classes)
