import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from carflavor.layers import Scale
from carflavor.learner import copy_to_train
from carflavor.networks.training_form import training_form


def build_network(norm_options):
    photos = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(photos)
    x = layers.BatchNormalization(epsilon=1.1e-5, momentum=0.9, name="bn", **norm_options)(x)
    x = Scale(name="scale")(x)
    x = layers.Activation("relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(photos, layers.Dense(2, name="fc")(x))


def with_random_variables(network, seed):
    random = np.random.default_rng(seed)
    for variable in network.variables:
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return network


def train_step(network, photos):
    """Returns the outputs of a training step, and the gradient by variable path."""
    with tf.GradientTape() as tape:
        outputs = network(photos, training=True)
        loss = tf.reduce_sum(outputs**2)
    variables = {variable.path: variable.value for variable in network.trainable_variables}
    gradients = tape.gradient(loss, variables)
    return outputs.numpy(), {path: gradient.numpy() for path, gradient in gradients.items()}


@pytest.fixture
def photos():
    return np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype("float32")


@pytest.mark.parametrize("norm_options", [{}, {"scale": False, "center": False}])
def test_training_form_computes_the_same(norm_options, photos):
    network = with_random_variables(build_network(norm_options), 1)
    twin = with_random_variables(build_network(norm_options), 1)
    trained = training_form(twin)
    assert [layer.name for layer in trained.layers if "bn" in layer.name] == ["scale_of_bn"]
    assert not any(isinstance(layer, Scale) for layer in trained.layers)

    outputs, gradients = train_step(network, photos)
    trained_outputs, trained_gradients = train_step(trained, photos)

    np.testing.assert_allclose(trained_outputs, outputs, rtol=1e-5)
    assert {path.split("/", 1)[-1] for path in trained_gradients} == {path.split("/", 1)[-1] for path in gradients}
    for path, gradient in gradients.items():
        np.testing.assert_allclose(trained_gradients[path], gradient, rtol=1e-4, atol=1e-4, err_msg=path)
    # The moving statistics of the network that is saved have moved, as they do in the network itself.
    for name in ("moving_mean", "moving_variance"):
        expected = getattr(network.get_layer("bn"), name).numpy()
        np.testing.assert_allclose(getattr(twin.get_layer("bn"), name).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(trained(photos, training=False), network(photos, training=False), rtol=1e-5)


def test_bfloat16_feature_maps_leave_variables_and_statistics_in_float32(photos):
    network = with_random_variables(build_network({}), 5)
    network.get_layer("scale").gamma.assign([1.001] * 4)  # which bfloat16 would round to 1
    mixed = copy_to_train(network, "mixed_bfloat16")
    layers_by_network = [training_form(network).get_layer("scale_of_bn"), training_form(mixed).get_layer("scale_of_bn")]
    features = tf.constant(np.repeat(photos[..., :1], 4, axis=3))
    assert layers_by_network[1](tf.cast(features, tf.bfloat16), training=True).dtype == tf.bfloat16
    layers_by_network[0](tf.cast(tf.cast(features, tf.bfloat16), tf.float32), training=True)
    expected, outputs = (layer(features, training=False).numpy() for layer in layers_by_network)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_golden_statistics():
    # One channel with the values 1, 2, 3, 6: mean 3, variance 3.5; a kernel of the value 1 passes them on.
    photos = np.array([1.0, 2.0, 3.0, 6.0], "float32").reshape(4, 1, 1, 1)
    inputs = keras.Input((1, 1, 1))
    norm = layers.BatchNormalization(momentum=0.9, epsilon=0.5, scale=False, center=False)
    scale = Scale(gamma_initializer=keras.initializers.Constant(2.0), beta_initializer="ones")
    trained = training_form(keras.Model(inputs, scale(norm(inputs))))
    # 2 * (x - 3) / sqrt(3.5 + 0.5) + 1
    np.testing.assert_allclose(np.ravel(trained(photos, training=True)), [-1.0, 0.0, 1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(norm.moving_mean.numpy(), [0.3], rtol=1e-6)  # 0.9 * 0 + 0.1 * 3
    np.testing.assert_allclose(norm.moving_variance.numpy(), [1.25], rtol=1e-6)  # 0.9 * 1 + 0.1 * 3.5


def test_frozen_normalisation_keeps_its_statistics(photos):
    network = with_random_variables(build_network({}), 2)
    network.get_layer("bn").trainable = False
    trained = training_form(network)
    before = network.get_layer("bn").moving_mean.numpy()
    np.testing.assert_allclose(trained(photos, training=True), network(photos, training=False), rtol=1e-5)
    np.testing.assert_array_equal(network.get_layer("bn").moving_mean.numpy(), before)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_pointwise_convolutions_are_products_of_matrices(strides, padding, photos):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, strides=strides, padding=padding, use_bias=False, name="pointwise")(inputs)
    network = keras.Model(inputs, layers.Conv2D(2, 1, name="with_bias")(x))
    trained = training_form(network)
    assert [layer.name for layer in trained.layers[1:]] == ["pointwise_as_product", "with_bias"]
    outputs, gradients = train_step(network, photos)
    trained_outputs, trained_gradients = train_step(trained, photos)
    np.testing.assert_allclose(trained_outputs, outputs, rtol=1e-5, atol=1e-5)
    assert trained_gradients.keys() == gradients.keys()
    for path, gradient in gradients.items():
        np.testing.assert_allclose(trained_gradients[path], gradient, rtol=1e-4, atol=1e-4, err_msg=path)


def test_network_can_be_saved_after_training(photos, tmp_path):
    network = with_random_variables(build_network({}), 3)
    trained = training_form(network)
    trained(photos, training=True)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert [type(layer).__name__ for layer in loaded.layers][2:4] == ["BatchNormalization", "Scale"]
    np.testing.assert_allclose(loaded(photos), trained(photos, training=False), rtol=1e-5)


def test_network_can_have_two_training_forms(photos):
    network = with_random_variables(build_network({}), 4)
    first, second = training_form(network), training_form(network)
    np.testing.assert_array_equal(first(photos), second(photos))


def test_scale_without_normalisation_is_retrained():
    inputs = keras.Input((4,))
    network = keras.Model(inputs, Scale(name="alone")(layers.Dense(2, name="fc")(inputs)))
    with pytest.raises(ValueError, match="Expected a BatchNormalization before alone. Received: another layer"):
        training_form(network)
