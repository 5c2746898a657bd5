import keras
import numpy as np
import pytest
from keras import layers

from carflavor.gradcam import grad_cam

CORNER = np.zeros((8, 8))
CORNER[:4, 4:] = 1


def build_network_of_one_corner(scale=1.0):
    """A network of known answer: brightness in the upper right quarter speaks for class 1, and nothing else counts."""
    photos = keras.Input((8, 8, 3), dtype="uint8")
    x = layers.Rescaling(1 / 255)(photos)
    x = layers.Cropping2D(((0, 4), (4, 0)))(x)
    x = layers.ZeroPadding2D(((0, 4), (4, 0)))(x)
    x = layers.GlobalAveragePooling2D()(x)
    network = keras.Model(photos, layers.Dense(2, activation="softmax")(x))
    network.layers[-1].set_weights([scale * np.array([[-1.0, 1.0]] * 3), np.zeros(2)])
    return network


def test_corner_lights_up_and_nothing_else():
    (heat,) = grad_cam(build_network_of_one_corner(), np.full((1, 8, 8, 3), 255, np.uint8), [1])
    np.testing.assert_allclose(heat, CORNER, atol=1e-6)


def test_what_speaks_against_a_class_stays_dark():
    (heat,) = grad_cam(build_network_of_one_corner(), np.full((1, 8, 8, 3), 255, np.uint8), [0])
    assert not heat.any()


def test_network_that_is_sure_lights_up_too():
    network = build_network_of_one_corner(scale=1e4)
    photos = np.full((2, 8, 8, 3), 255, np.uint8)
    assert network.predict_on_batch(photos)[:, 1].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(grad_cam(network, photos, [1, 1]), [CORNER, CORNER], atol=1e-6)


def test_each_photo_has_its_own_map():
    photos = np.zeros((2, 8, 8, 3), np.uint8)
    photos[0, 0, 7] = photos[1, 3, 4] = 255
    first, second = grad_cam(build_network_of_one_corner(), photos, [1, 1])
    assert np.argwhere(first).tolist() == [[0, 7]]
    assert np.argwhere(second).tolist() == [[3, 4]]


def test_our_networks(tiny_network):
    photos = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), "uint8")
    heat = grad_cam(tiny_network, photos, [0, 1, 2])
    assert (heat.shape, heat.dtype) == ((3, 8, 8), np.float32)
    assert heat.min() >= 0 and heat.max() == pytest.approx(1)


def test_network_without_pooling_is_refused():
    network = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2, activation="softmax")])
    with pytest.raises(ValueError, match="Expected a network with a global pooling. Received: one without"):
        grad_cam(network, np.zeros((1, 8, 8, 3), np.uint8), [0])
