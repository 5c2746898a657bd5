"""The form that a network is trained in: the same layers, variables and numbers, computed with less work.

Keras computes a BatchNormalization in training as a dozen elementwise operations, and Scale as two more; each goes
through the whole feature map in memory, and so do their gradients. TensorFlow has one kernel for all of it
(FusedBatchNormV3; oneDNN's on CPUs, cuDNN's on GPUs), with which a training step of EfficientNet-Lite0 takes half the
time, and one of ResNet-152 in bfloat16 less than half.

The gradient of a 1 x 1 convolution by its filter is a product of two matrices. oneDNN's product takes a third of the
time of its convolution gradient in bfloat16 (1.6 against 4.4 ms for 8 x 14 x 14 photos of 256 -> 1024 channels), and as
long in float32. `benchmarks/training.py` measures whole steps.
"""

import keras
import tensorflow as tf

from carflavor.layers import Scale


def training_form(network):
    """Returns a network of the same layers and variables that computes a training step faster.

    Every BatchNormalization is computed together with the Scale after it, every 1 x 1 convolution as a product of
    matrices. The numbers are those of `network` up to rounding, in training as in inference, moving statistics
    included. It is for training only: what is saved is `network`, whose variables it shares.

    Args:
        network: Functional `keras.Model` in which every `Scale` takes the output of a `BatchNormalization`.

    Returns:
        `keras.Model`.

    Raises:
        ValueError: If a `Scale` takes something else.
    """
    normalised = {}

    def call_layer(layer, inputs, *args, **kwargs):
        if isinstance(layer, Scale):
            if id(inputs) not in normalised:
                raise ValueError(f"Expected a BatchNormalization before {layer.name}. Received: another layer")
            norm, inputs = normalised[id(inputs)]
            return ScaledBatchNormalization(norm, layer, name=f"{layer.name}_of_{norm.name}")(inputs)
        if _is_pointwise(layer):
            return PointwiseConvolution(layer, name=f"{layer.name}_as_product")(inputs)
        outputs = layer(inputs, *args, **kwargs)
        if isinstance(layer, keras.layers.BatchNormalization):
            # Of the new graph only what leads to its end stays: where a Scale follows, not this output.
            normalised[id(outputs)] = (layer, inputs)
        return outputs

    return keras.models.clone_model(network, clone_function=lambda layer: layer, call_function=call_layer)


class ScaledBatchNormalization(keras.layers.Layer):
    """A BatchNormalization and the Scale after it in one computation, with the variables of both.

    Args:
        norm: Built `keras.layers.BatchNormalization` over the last axis.
        scale: Built `carflavor.layers.Scale` over the last axis.
        **kwargs: What every Keras layer takes.
    """

    def __init__(self, norm, scale, **kwargs):
        # A float32 layer that casts nothing: statistics stay in float32 where feature maps are bfloat16.
        super().__init__(autocast=False, dtype="float32", **kwargs)
        self.norm = norm
        self.scale = scale
        self.built = True

    def call(self, inputs, training=False):
        norm = self.norm
        gamma, beta = tf.convert_to_tensor(self.scale.gamma), tf.convert_to_tensor(self.scale.beta)
        if norm.center:
            beta = beta + gamma * norm.beta
        if norm.scale:
            gamma = gamma * norm.gamma
        of_batch = training and norm.trainable
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=gamma,
            offset=beta,
            mean=tf.zeros([0]) if of_batch else tf.convert_to_tensor(norm.moving_mean),
            variance=tf.zeros([0]) if of_batch else tf.convert_to_tensor(norm.moving_variance),
            epsilon=norm.epsilon,
            is_training=of_batch,
        )
        if not of_batch:
            return outputs
        # The kernel gives the variance of the population (divided by n - 1); Keras keeps that of the sample.
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)
        variance *= (count - 1) / count
        for moving, value in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
            moving.assign(moving * norm.momentum + value * (1 - norm.momentum))
        return outputs

    def compute_output_shape(self, input_shape):
        return input_shape


def _is_pointwise(layer):
    return (
        type(layer) is keras.layers.Conv2D
        and layer.kernel_size == (1, 1)
        and layer.groups == 1
        and not layer.use_bias
        and layer.activation is keras.activations.linear
        and layer.data_format == "channels_last"
    )


class PointwiseConvolution(keras.layers.Layer):
    """A 1 x 1 convolution as a product of matrices, with the variable of its layer.

    Args:
        convolution: Built `keras.layers.Conv2D` without bias and activation.
        **kwargs: What every Keras layer takes.
    """

    def __init__(self, convolution, **kwargs):
        super().__init__(dtype=convolution.dtype_policy, **kwargs)
        self.convolution = convolution
        self.built = True

    def call(self, inputs):
        rows, columns = self.convolution.strides
        if (rows, columns) != (1, 1):
            inputs = inputs[:, ::rows, ::columns]
        kernel = tf.convert_to_tensor(self.convolution.kernel)
        channels, filters = kernel.shape[2:]
        products = tf.matmul(tf.reshape(inputs, (-1, channels)), tf.reshape(kernel, (channels, filters)))
        return tf.reshape(products, tf.concat([tf.shape(inputs)[:-1], [filters]], axis=0))

    def compute_output_shape(self, input_shape):
        return self.convolution.compute_output_shape(input_shape)
