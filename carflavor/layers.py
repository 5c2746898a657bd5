"""The layer that this project adds to Keras."""

import keras
from keras import ops


# The registered name is a file format: every saved model refers to it. It never changes.
@keras.saving.register_keras_serializable(package="carflavor", name="Scale")
class Scale(keras.layers.Layer):
    """Multiplies each channel by a learned gamma and adds a learned beta.

    `output = inputs * gamma + beta`, with one gamma and one beta for each entry of `axis`. It stands after a
    BatchNormalization that was built with `scale=False, center=False`, or whose statistics were converted from Caffe,
    where normalisation and scaling are two layers.

    Args:
        axis: Integer, the axis that holds the channels. Defaults to the last one.
        gamma_initializer: Initializer of gamma. Defaults to ones.
        beta_initializer: Initializer of beta. Defaults to zeros.
        gamma_regularizer: Optional regularizer of gamma.
        beta_regularizer: Optional regularizer of beta.
        gamma_constraint: Optional constraint of gamma.
        beta_constraint: Optional constraint of beta.
        **kwargs: What every Keras layer takes, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of any rank of at least 2 whose size along `axis` is known.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Example:

    >>> layer = carflavor.layers.Scale(gamma_initializer=keras.initializers.Constant(2.0))
    >>> keras.ops.convert_to_numpy(layer(np.ones((1, 2), "float32")))
    array([[2., 2.]], dtype=float32)

    Reference: [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167), section 3, gamma and beta of Algorithm 1.
    """

    def __init__(
        self,
        axis=-1,
        gamma_initializer="ones",
        beta_initializer="zeros",
        gamma_regularizer=None,
        beta_regularizer=None,
        gamma_constraint=None,
        beta_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"Expected axis to be an int. Received: axis={axis!r}")
        self.axis = axis
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.supports_masking = True

    def build(self, input_shape):
        rank = len(input_shape)
        if not -rank <= self.axis < rank or self.axis % rank == 0:
            raise ValueError(
                f"Expected axis to name a dimension of the input other than the batch. "
                f"Received: axis={self.axis}, input_shape={tuple(input_shape)}"
            )
        channels = input_shape[self.axis]
        if channels is None:
            raise ValueError(
                f"Expected the size of the input along axis {self.axis} to be known. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.gamma = self.add_weight(
            name="gamma",
            shape=(channels,),
            initializer=self.gamma_initializer,
            regularizer=self.gamma_regularizer,
            constraint=self.gamma_constraint,
        )
        self.beta = self.add_weight(
            name="beta",
            shape=(channels,),
            initializer=self.beta_initializer,
            regularizer=self.beta_regularizer,
            constraint=self.beta_constraint,
        )

    def call(self, inputs):
        rank = len(inputs.shape)
        per_channel = [1] * rank
        per_channel[self.axis] = -1
        gamma = ops.reshape(ops.cast(self.gamma, self.compute_dtype), per_channel)
        beta = ops.reshape(ops.cast(self.beta, self.compute_dtype), per_channel)
        return inputs * gamma + beta

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "axis": self.axis,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
        }
