import keras
import numpy as np
import pytest
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

from carflavor.data.batches import PhotoBatches, SquashedBatches
from carflavor.data.records import RecordFile, RecordWriter


def write_file(path, labels, size=40):
    """Writes noise, which is darker under `full`."""
    random = np.random.default_rng(len(labels))
    with RecordWriter(path, ("box", "full"), size, ("red", "green", "blue"), {}) as writer:
        for row, label in enumerate(labels):
            square = random.integers(128, 256, (size, size, 3), "uint8")
            writer.append({"box": square, "full": square // 2}, label, f"{row}.jpg", (size, size), (0, 0, size, size))


@pytest.fixture
def records(tmp_path):
    write_file(tmp_path / "train.h5", [0, 1, 2] * 16)
    with RecordFile(tmp_path / "train.h5") as file:
        yield file


def test_training_batches_are_the_stored_bytes(records):
    batches = PhotoBatches([records], ("box",), batch_size=20, seed=0)
    assert len(batches) == 2 and batches.photos == 40  # 48 photos: eight wait for a later epoch
    photos, targets = batches.read(0)
    assert (photos.dtype, photos.shape, targets.shape) == (np.uint8, (20, 40, 40, 3), (20, 3))
    stored = records.images("box")[:]
    for photo, target in zip(photos, targets, strict=True):
        row = np.flatnonzero((stored == photo).all(axis=(1, 2, 3)))
        assert records.labels[row].tolist() == [target.argmax()]


def test_order_follows_from_seed_and_epoch_alone(records):
    batches = PhotoBatches([records], ("box", "full"), batch_size=48, seed=0)
    first, second = batches.read(0)[0], batches.read(1)[0]  # a batch is an epoch
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(PhotoBatches([records], ("box", "full"), 48, seed=0).read(1)[0], second)
    np.testing.assert_array_equal(batches.read(0)[0], first)
    assert not np.array_equal(PhotoBatches([records], ("box", "full"), 48, seed=1).read(0)[0], first)


def test_mixed_batches_draw_both_crops(records):
    photos, _ = PhotoBatches([records], ("box", "full"), batch_size=48, seed=0).read(0)
    assert 0.2 < (photos.max(axis=(1, 2, 3)) < 128).mean() < 0.8


def test_several_files_make_one_order(records, tmp_path):
    write_file(tmp_path / "validation.h5", [2] * 7)
    with RecordFile(tmp_path / "validation.h5") as validation:
        photos, targets = PhotoBatches([records, validation], ("box",), batch_size=55, seed=0).read(0)
        assert targets.sum(axis=0).tolist() == [16, 16, 23]
        stored = np.concatenate([records.images("box")[:], validation.images("box")[:]])
        assert sorted(photo.tobytes() for photo in photos) == sorted(photo.tobytes() for photo in stored)


def test_few_photos_still_make_a_batch(tmp_path):
    write_file(tmp_path / "train.h5", [0, 1, 2])
    with RecordFile(tmp_path / "train.h5") as records:
        batches = PhotoBatches([records], ("box",), batch_size=32, seed=0)
        assert (len(batches), batches.photos) == (1, 3)
        assert batches.read(0)[0].shape == (3, 40, 40, 3)


def test_squashed_batches_are_every_crop_of_every_photo_in_order(records):
    batches = SquashedBatches([records], ("box", "full"), batch_size=40, input_size=32)
    assert len(batches) == 3
    photos = np.concatenate([batches[index][0] for index in range(3)])
    targets = np.concatenate([batches[index][1] for index in range(3)])
    assert photos.shape == (96, 32, 32, 3)
    assert (photos[:48].min(axis=(1, 2, 3)) >= 128).all() and (photos[48:].max(axis=(1, 2, 3)) < 128).all()
    assert targets.argmax(axis=1).tolist() == [0, 1, 2] * 32 == batches.labels.tolist()


class Watching(keras.Model):
    """Keeps the sum of each batch it is given, in order."""

    def train_step(self, data):
        self.seen.append(int(np.sum(data[0], dtype=np.int64)))
        return {"loss": 0.0}


def test_fit_is_given_the_batches_of_each_epoch_in_order(records):
    batches = PhotoBatches([records], ("box",), batch_size=4, seed=0)
    watching = Watching()
    watching.seen = []
    watching.compile(run_eagerly=True)
    epochs = {"initial_epoch": 1, "epochs": 4, "steps_per_epoch": len(batches)}
    watching.fit(batches.dataset(1), **epochs, shuffle=False, verbose=0)
    expected = [int(np.sum(batches.read(step)[0], dtype=np.int64)) for step in range(12, 48)]
    assert watching.seen == expected and len(set(expected)) == 36


def test_dataset_has_the_batches_as_they_are_read(records):
    batches = PhotoBatches([records], ("box",), batch_size=20, seed=0)
    for step, (photos, targets) in enumerate(batches.dataset().take(3)):
        np.testing.assert_array_equal(photos, batches.read(step)[0])
        np.testing.assert_array_equal(targets, batches.read(step)[1])
        assert (photos.dtype, targets.dtype) == ("uint8", "float32")


def test_tf_data_does_not_tune_itself(records):
    """The thread that does so held up every third or fourth epoch for most of a minute, with nothing computed."""
    squashed = SquashedBatches([records], ("box",), batch_size=4, input_size=32)
    datasets = [PhotoBatches([records], ("box",), 4, seed=0).dataset(), PyDatasetAdapter(squashed).get_tf_dataset()]
    assert [dataset.options().autotune.enabled for dataset in datasets] == [False, False]
