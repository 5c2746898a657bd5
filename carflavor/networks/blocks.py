"""What every network here is made of: a convolution, its BatchNormalization and its Scale."""

from keras import layers

from carflavor.layers import Scale

# Keras's default of 0.99 remembers several epochs of a few thousand photos: in the first ones the network would be
# validated with the statistics of weights long gone.
BATCH_NORM_MOMENTUM = 0.9


def conv_bn_scale(x, convolution, bn_name, scale_name, *, epsilon, bn_affine, gamma_initializer="ones"):
    """Applies a convolution, a BatchNormalization and a Scale.

    Args:
        x: Keras tensor of shape `(batch, height, width, channels)`.
        convolution: Layer to apply, built with `use_bias=False`: what follows takes a bias out again.
        bn_name: Name of the BatchNormalization.
        scale_name: Name of the Scale.
        epsilon: Added to the variance by the BatchNormalization.
        bn_affine: Whether the BatchNormalization has a gamma and a beta beside those of the Scale, as in the ResNets
            of Caffe that were brought to Keras.
        gamma_initializer: Initializer of the Scale's gamma.

    Returns:
        Keras tensor that the Scale gives.
    """
    x = convolution(x)
    x = layers.BatchNormalization(
        momentum=BATCH_NORM_MOMENTUM, epsilon=epsilon, center=bn_affine, scale=bn_affine, name=bn_name
    )(x)
    return Scale(gamma_initializer=gamma_initializer, name=scale_name)(x)
