import keras
import numpy as np
import pytest
import tensorflow as tf

from carflavor.augmentation import Augmentation
from carflavor.learner import (
    FusedAdamW,
    Learner,
    average_statistics,
    build_optimizer,
    copy_to_train,
    fit_head,
    freeze_statistics,
    take_averages,
)
from carflavor.networks.resnet import _basic_block, build_resnet
from carflavor.train import TrainConfig

TARGETS = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2]]


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    return build_resnet([1], _basic_block, 3, 32, "tiny")


@pytest.fixture
def photos():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), "uint8")


def build_learner(network, class_weights=None, **settings):
    config = TrainConfig(**{"epochs": 10, "weight_decay": 0.0, "label_smoothing": 0.0, **settings}).resolved()
    learner = Learner(network, Augmentation(32, 1.0, 0.0, 0.0, 0.0, 0.0, seed=0), class_weights)
    learner.compile(build_optimizer(config, network.layers[-1], 10), "categorical_crossentropy", jit_compile=False)
    return learner


def test_learning_rate_rises_and_falls(network):
    schedule = build_optimizer(
        TrainConfig(epochs=10, learning_rate=0.1).resolved(), network.layers[-1], 10
    )._learning_rate
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.05, 0.0], atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("share", [1.0, 0.25, 0.01])
def test_backbone_learns_at_its_share_of_the_rate(network, optimizer, share):
    learner = build_learner(network, optimizer=optimizer, learning_rate=0.01, backbone_rate=share)
    learner.optimizer.iterations.assign(10)  # the warm-up is over
    before = [variable.numpy() for variable in learner.trainable_variables]
    # Under one gradient everywhere both take one step everywhere.
    learner.optimizer.apply([tf.ones_like(value) for value in before], learner.trainable_variables)
    steps = [value - variable.numpy() for variable, value in zip(learner.trainable_variables, before, strict=True)]
    head_step = steps[-1][0]
    assert head_step > 0.001
    for step in steps[:-2]:
        np.testing.assert_allclose(step, head_step * share, rtol=1e-3, atol=1e-7)
    for step in steps[-2:]:
        np.testing.assert_allclose(step, head_step, rtol=1e-3)


def test_fused_adamw_updates_as_keras_does():
    random = np.random.default_rng(0)
    begin, gradients = random.normal(size=(40, 30)), random.normal(size=(5, 40, 30))
    ended = []
    for optimizer in (keras.optimizers.AdamW, FusedAdamW):
        variable = keras.Variable(begin, dtype="float32")
        rates = keras.optimizers.schedules.CosineDecay(0.1, 10)
        optimizer = optimizer(rates, weight_decay=0.05, use_ema=True)
        for gradient in gradients:
            optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
        ended.append([variable.numpy(), *(value.numpy() for value in optimizer.variables if value.shape == (40, 30))])
    assert len(ended[0]) == 4 and np.abs(ended[0][0] - begin).max() > 0.1  # weights, both moments, average
    np.testing.assert_allclose(ended[1], ended[0], atol=1e-5)


def test_weight_decay_is_of_kernels_alone(network):
    learner = build_learner(network, learning_rate=0.01, weight_decay=0.5)
    learner.optimizer.iterations.assign(10)
    before = [variable.numpy() for variable in learner.trainable_variables]
    learner.optimizer.apply([tf.zeros_like(value) for value in before], learner.trainable_variables)
    for variable, value in zip(learner.trainable_variables, before, strict=True):
        # After the warm-up the rate is 0.01.
        kept = 1 - 0.5 * 0.01 if variable.path.endswith("kernel") else 1
        np.testing.assert_allclose(variable.numpy(), kept * value, rtol=1e-5, err_msg=variable.path)


def test_class_weights_count_by_the_mixed_target(network, photos):
    mixed = np.array([[0.75, 0.25, 0.0]] * 6, "float32")

    def loss(class_weights):
        learner = build_learner(network, class_weights, learning_rate=1e-12)
        return learner.fit(photos, mixed, batch_size=6, verbose=0).history["loss"][0]

    plain = loss(None)
    assert loss([1.0, 0.0, 0.0]) == pytest.approx(0.75 * plain, rel=1e-4)
    assert loss([0.0, 2.0, 0.0]) == pytest.approx(0.5 * plain, rel=1e-4)
    assert loss([0.0, 0.0, 3.0]) == 0.0


def test_averages_go_to_the_network_that_is_kept(network, photos):
    learning = copy_to_train(network, "float32")
    learner = build_learner(learning, learning_rate=0.01, ema=0.5)
    optimizer = learner.optimizer
    optimizer.build(learner.trainable_variables)
    start = [variable.numpy() for variable in learning.trainable_variables]
    seen = []
    for _ in range(2):
        learner.train_on_batch(photos, TARGETS)
        seen.append([variable.numpy() for variable in learning.trainable_variables])
    take_averages(network, learning, learner)
    for kept, values in zip(network.trainable_variables, zip(start, *seen, strict=True), strict=True):
        np.testing.assert_allclose(kept.numpy(), 0.25 * values[0] + 0.25 * values[1] + 0.5 * values[2], atol=1e-6)
    # What is not trained, the moving statistics, is taken as it is.
    for kept, learned in zip(network.non_trainable_variables, learning.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(kept.numpy(), learned.numpy())


def test_copy_to_train_takes_photos_of_another_size(network, photos):
    copy = copy_to_train(network, "float32", 48)
    assert (network.input_shape, copy.input_shape) == ((None, 32, 32, 3), (None, 48, 48, 3))
    assert copy(np.repeat(np.repeat(photos, 3, axis=1), 3, axis=2)[:, ::2, ::2]).shape == (6, 3)
    for own, copied in zip(network.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(own, copied)


def test_copy_to_train_computes_in_bfloat16_but_for_the_head(network, photos):
    copy = copy_to_train(network, "mixed_bfloat16")
    dtypes = {layer.name: layer.compute_dtype for layer in copy.layers[1:]}
    assert dtypes.pop("fc") == "float32"
    assert set(dtypes.values()) == {"bfloat16"}
    assert {variable.dtype for variable in copy.trainable_variables} == {"float32"}
    np.testing.assert_allclose(copy(photos), network(photos), atol=0.02)
    assert not np.array_equal(copy(photos), network(photos))


def test_frozen_statistics_stay_and_scales_learn(network, photos):
    freeze_statistics(network)
    before = {variable.path: variable.numpy() for variable in network.variables}
    learner = build_learner(network, learning_rate=0.01)
    learner.optimizer.iterations.assign(10)
    learner.train_on_batch(photos, TARGETS)
    changed = {variable.path for variable in network.variables if (variable.numpy() != before[variable.path]).any()}
    assert not [path for path in changed if path.startswith("bn")]
    assert {"scale_conv1/gamma", "scale_conv1/beta", "conv1/kernel", "fc/kernel"} <= changed


@pytest.mark.parametrize(("momentum", "share"), [(0.0, 0.1), (0.5, 0.1), (0.99, 0.01)])
def test_statistics_are_averaged_over_as_many_steps_as_weights(network, photos, momentum, share):
    average_statistics(network, momentum)
    network(photos, training=True)
    of_batch = keras.Model(network.input, network.get_layer("conv1").output)(photos).numpy().mean(axis=(0, 1, 2))
    # It began at 0.
    np.testing.assert_allclose(network.get_layer("bn_conv1").moving_mean, share * of_batch, rtol=1e-3, atol=1e-6)


@pytest.fixture
def batches(photos):
    class Batches:
        labels = TARGETS.argmax(axis=1)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return photos[3 * index : 3 * index + 3], TARGETS[3 * index : 3 * index + 3]

    return Batches()


def test_fit_head_counts_photos_by_their_class(network, batches, photos):
    # What counts nothing is not learned: all photos are taken for the one class that counts.
    fit_head(network, batches, 200, 0.0, np.array([0.0, 0.0, 1.0]), on_photos=lambda count: None)
    assert network(photos).numpy().argmax(axis=1).tolist() == [2] * 6


def test_fit_head_trains_the_last_layer_alone(network, batches, photos):
    before = network.get_weights()
    counts = []
    accuracy = fit_head(network, batches, 200, 0.0, None, on_photos=counts.append)
    assert counts == [3, 3]
    changed = [not np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True)]
    assert changed == [False] * (len(before) - 2) + [True, True]
    assert accuracy == np.mean(network(photos).numpy().argmax(axis=1) == TARGETS.argmax(axis=1)) > 0.5
