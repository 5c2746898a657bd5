"""How a packed network is run, behind one call."""

import keras


class KerasEngine:
    """Runs a network with Keras.

    Args:
        path: Path of the `model.keras`.

    Attributes:
        network: The `keras.Model`.
        input_size: Side of its square input in pixels.
    """

    def __init__(self, path):
        # compile=False: what a model was trained with is not needed to run it.
        self.network = keras.saving.load_model(path, compile=False)
        self.input_size = self.network.input_shape[1]

    def __call__(self, photos):
        """Returns the probabilities of a batch.

        Args:
            photos: uint8 RGB array of shape `(batch, input_size, input_size, 3)`.

        Returns:
            float32 array of shape `(batch, number of classes)`; rows sum to 1.
        """
        # Not `predict`: it builds a data pipeline and a progress bar for every call.
        return self.network.predict_on_batch(photos)
