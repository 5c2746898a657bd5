"""Grad-CAM: where in a photo a network finds what speaks for a class.

Reference: [Selvaraju et al., 2017](https://arxiv.org/abs/1610.02391)
"""

import keras
import numpy as np
import tensorflow as tf

from carflavor.calibration import find_softmax_layer


def grad_cam(network, photos, classes):
    """Computes heat maps over the last feature map, the one that the network pools.

    Args:
        network: `keras.Model` with a global pooling, ending in a Dense layer with softmax.
        photos: uint8 RGB array of shape `(N, S, S, 3)`.
        classes: (N,) int, for each photo the class to explain.

    Returns:
        float32 array of shape `(N, height, width)` of the feature map, 0 to 1; all 0 where nothing speaks for it.

    Raises:
        ValueError: If the network is built otherwise.
    """
    softmax, feature_map = find_softmax_layer(network), find_feature_map(network)
    to_features = keras.Model(network.input, feature_map)
    from_features = keras.Model(feature_map, softmax.input)
    features = tf.cast(to_features(photos, training=False), "float32")
    with tf.GradientTape() as tape:
        tape.watch(features)
        # The logit and not the probability, which no longer moves where the network is sure.
        logits = tf.cast(from_features(features, training=False), "float32") @ softmax.kernel
        of_class = tf.gather(logits, classes, batch_dims=1)
    channel_weights = tf.reduce_mean(tape.gradient(of_class, features), axis=(1, 2), keepdims=True)
    heat = tf.nn.relu(tf.reduce_sum(channel_weights * features, axis=-1)).numpy()
    return heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)


def find_feature_map(network):
    """Returns the Keras tensor (batch, height, width, channels) that a network pools over the whole photo.

    Raises:
        ValueError: If there is none, or the network does not end in a Dense layer with softmax.
    """
    find_softmax_layer(network)
    pooled = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)
    pooling = [layer for layer in network.layers if isinstance(layer, pooled)]
    if not pooling:
        raise ValueError("Expected a network with a global pooling. Received: one without")
    return pooling[-1].input
