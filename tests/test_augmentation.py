import numpy as np
import pytest
import tensorflow as tf

from carflavor.augmentation import Augmentation, RandomOperations, change_color, view

NONE = {"min_area": 1.0, "color": 0.0, "randaugment": 0.0, "mixup": 0.0, "cutmix": 0.0}
SQUARE = np.arange(16, dtype="float32").reshape(1, 4, 4, 1).repeat(3, axis=3)


def see(photo, size, center=(0.5, 0.5), extent=(1.0, 1.0), turn=0.0):
    values = [tf.constant([value], tf.float32) for value in (*center, *extent, turn)]
    return view(photo, size, *values).numpy()[0, :, :, 0]


def test_whole_view_is_the_photo():
    np.testing.assert_allclose(see(SQUARE, 4), np.arange(16.0).reshape(4, 4), atol=1e-5)


def test_view_of_a_quarter():
    # The right upper quarter: columns 2 and 3 of rows 0 and 1.
    np.testing.assert_allclose(see(SQUARE, 2, (0.75, 0.25), (0.5, 0.5)), [[2, 3], [6, 7]], atol=1e-5)


def test_mirrored_and_turned_views():
    np.testing.assert_allclose(see(SQUARE, 4, extent=(-1.0, 1.0))[0], [3, 2, 1, 0], atol=1e-5)
    # By a quarter turn the first row reads a column.
    np.testing.assert_allclose(see(SQUARE, 4, turn=np.pi / 2)[0], [3, 7, 11, 15], atol=1e-4)


def test_view_is_scaled_bilinearly():
    # Pixels of the result lie midway between four of the photo: (0 + 1 + 4 + 5) / 4 and so on.
    np.testing.assert_allclose(see(SQUARE, 2), [[2.5, 4.5], [10.5, 12.5]], atol=1e-5)


def change(rgb, brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0):
    values = [tf.constant([[[value]]], tf.float32) for value in (brightness, contrast, saturation, turn)]
    return change_color(tf.constant([[[rgb]]], tf.float32), *values).numpy().ravel()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [200, 100, 50]),
        ({"brightness": 0.5}, [100, 50, 25]),
        ({"contrast": 0.5}, [163.75, 113.75, 88.75]),
        # 0.299 * 200 + 0.587 * 100 + 0.114 * 50
        ({"saturation": 0.0}, [124.2, 124.2, 124.2]),
        # A third of a turn hands each channel's value to the next one.
        ({"turn": 2 * np.pi / 3}, [50, 200, 100]),
    ],
)
def test_changes_of_color(changes, expected):
    np.testing.assert_allclose(change([200, 100, 50], **changes), expected, rtol=1e-4)


@pytest.fixture
def photos():
    return np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), "uint8")


TARGETS = np.eye(6, dtype="float32")


def augment(photos, **changes):
    return [part.numpy() for part in Augmentation(32, **{**NONE, **changes}, seed=0)(photos, TARGETS)]


def test_views_are_uint8_and_differ_from_photo_to_photo_and_from_batch_to_batch(photos):
    same = photos[:1].repeat(6, axis=0)
    augmentation = Augmentation(32, **{**NONE, "min_area": 0.5}, seed=0)
    first, targets = (part.numpy() for part in augmentation(same, TARGETS))
    assert (first.dtype, first.shape) == (np.uint8, (6, 32, 32, 3))
    np.testing.assert_array_equal(targets, TARGETS)
    assert len({photo.tobytes() for photo in first}) == 6
    assert not np.array_equal(first, augmentation(same, TARGETS)[0].numpy())
    np.testing.assert_array_equal(first, Augmentation(32, **{**NONE, "min_area": 0.5}, seed=0)(same, TARGETS)[0])


def test_color_and_randaugment_change_colors_within_the_range(photos):
    plain, _ = augment(photos)
    for changes in ({"color": 0.4}, {"randaugment": 0.5}):
        changed, targets = augment(photos, **changes)
        assert changed.dtype == np.uint8
        assert not np.array_equal(changed, plain)
        np.testing.assert_array_equal(targets, TARGETS)


def test_operations_do_less_at_a_smaller_magnitude():
    # A ramp of 256 values down, another across: what is lost of either can be seen.
    ramp = np.arange(0, 256, 4, dtype="float32")
    photos = np.repeat(np.stack(np.meshgrid(ramp, ramp[::-1], ramp[:1] + 90), axis=-1)[:, :, 0][None], 16, axis=0)

    def changes(magnitude):
        keep_their_strength = {"AutoContrast", "Equalization"}
        return {
            type(operation).__name__: float(np.abs(operation(photos, training=True) - photos).mean())
            for operation in RandomOperations(magnitude, seed=0).operations
            if type(operation).__name__ not in keep_their_strength
        }

    low, high = changes(0.1), changes(1.0)
    assert len(low) == 8
    for name, change in low.items():
        assert change < 0.4 * high[name], name
        assert change < 10, name


def test_two_operations_change_a_batch(photos):
    layer = RandomOperations(0.5, seed=0)
    step = tf.function(layer)
    squares = tf.cast(photos, tf.float32)
    results = [step(squares).numpy() for _ in range(8)]
    assert all(result.shape == photos.shape for result in results)
    # Other operations in each batch, and a strength of its own for each photo.
    assert len({result.tobytes() for result in results}) == 8
    same = [step(squares[:1] * tf.ones((6, 1, 1, 1))).numpy() for _ in range(8)]
    assert max(len({photo.tobytes() for photo in result}) for result in same) == 6


# CutMix takes the share of a box whose edges lie between pixels: on 32 px that is off by up to 2/32 of 200.
@pytest.mark.parametrize(("mix", "tolerance"), [("mixup", 1.0), ("cutmix", 12.5)])
def test_mixing_mixes_targets_as_it_mixes_photos(mix, tolerance):
    # One flat colour a photo: what share of which photo is in the result can be read from its pixels.
    flat = np.arange(0, 240, 40, dtype="uint8")[:, None, None, None] * np.ones((6, 40, 40, 3), "uint8")
    mixed, targets = augment(flat, **{mix: 1.0})
    np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-5)
    assert ((targets > 0).sum(axis=1) == 2).any()
    expected = targets @ np.arange(0, 240, 40)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), expected, atol=tolerance)


# Of photos mixed by draws from Beta(1, 1) and Beta(0.1, 0.1), found by drawing 16,384 each. An alpha that is itself
# drawn anew for each batch, from 0 to these, gives 0.40 and 0.07.
@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 0.58), (0.1, 0.13)])
def test_cutmix_draws_from_the_beta_distribution_of_its_alpha(alpha, expected):
    augmentation = Augmentation(32, **{**NONE, "cutmix": alpha}, seed=0)
    flat, targets = np.zeros((64, 32, 32, 3), "uint8"), np.eye(64, dtype="float32")
    shares = np.concatenate([augmentation(flat, targets)[1].numpy().max(axis=1) for _ in range(16)])
    assert np.mean((shares > 0.55) & (shares < 0.85)) == pytest.approx(expected, abs=0.03)


def test_each_batch_is_mixed_in_one_of_both_ways():
    flat = np.arange(0, 240, 40, dtype="uint8")[:, None, None, None] * np.ones((6, 40, 40, 3), "uint8")
    augmentation = Augmentation(32, **{**NONE, "mixup": 1.0, "cutmix": 1.0}, seed=0)
    step = tf.function(augmentation)
    kinds = set()
    for _ in range(20):
        mixed, targets = step(flat, TARGETS)
        assert (mixed.shape, targets.shape) == ((6, 32, 32, 3), (6, 6))
        kinds.add("cutmix" if any(len(np.unique(photo)) > 1 for photo in mixed.numpy()) else "mixup")
    assert kinds == {"mixup", "cutmix"}
