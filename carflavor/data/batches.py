"""Batches of stored squares, from record files to the network."""

import keras
import numpy as np

from carflavor.image import squash

# Threads that read ahead. With a single one Keras leaves reading ahead to tf.data and its tuning, whose thread is slow
# to end (TensorFlow 2.21): after every third or fourth epoch of 80 s nothing went on for 45 to 55 s.
_WORKERS = 2


class PhotoBatches(keras.utils.PyDataset):
    """Training batches: uint8 squares as they are stored, in a new order every epoch.

    Args:
        files: List of `RecordFile` of the same classes.
        crops: Crops to take; of several, one is drawn for each photo and epoch.
        batch_size: Photos a batch. What is left over by an epoch's last whole batch waits for a later epoch: a smaller
            batch would be a second shape, and TensorFlow compiles the training step anew for each shape.
        seed: Seed of order and choice. An epoch's order follows from the seed and the epoch's number alone.
        epoch: Number of the first epoch, for a training that goes on.
    """

    def __init__(self, files, crops, batch_size, seed, epoch=0):
        super().__init__(workers=_WORKERS)
        self._images = [[file.images(crop) for crop in crops] for file in files]
        self._places = [(file, row) for file, records in enumerate(files) for row in range(len(records))]
        labels = np.concatenate([records.labels for records in files])
        self._targets = keras.utils.to_categorical(labels, len(files[0].class_names))
        self._crops = len(crops)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._shuffle()

    def _shuffle(self):
        random = np.random.default_rng([self._seed, self._epoch])
        self._order = random.permutation(len(self._places))
        self._choice = random.integers(self._crops, size=len(self._places))

    def on_epoch_end(self):
        self._epoch += 1
        self._shuffle()

    @property
    def photos(self):
        """Number of photos an epoch."""
        return min(len(self) * self._batch_size, len(self._places))

    def __len__(self):
        return max(len(self._places) // self._batch_size, 1)

    def __getitem__(self, index):
        rows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        photos = [self._images[file][self._choice[row]][place] for row in rows for file, place in [self._places[row]]]
        return np.stack(photos), self._targets[rows]


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
