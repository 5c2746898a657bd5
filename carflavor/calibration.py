"""Makes a network's probabilities honest with a single number, the temperature.

Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599), section 4.2
"""

import keras
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

_RANGE = (0.05, 20.0)


def fit_temperature(probabilities, labels):
    """Finds the temperature that makes probabilities fit photos best, by the likelihood of their true classes.

    Args:
        probabilities: (N, C) float, of photos that the network has not learned from.
        labels: (N,) int, the true classes.

    Returns:
        float, above 1 where the probabilities are too sure. 1.0 where every photo is recognised: how sure to be of a
        wrong answer cannot be learned without one, and the likelihood would ask for ever more.
    """
    if (probabilities.argmax(axis=1) == labels).all():
        return 1.0
    # softmax(log(p) / T) is softmax(z / T), for log(p) and the logits z differ by one number a photo.
    logs = np.log(np.maximum(probabilities.astype(float), np.finfo(np.float32).tiny))
    rows = np.arange(len(labels))

    def loss(log_temperature):
        return -log_softmax(logs / np.exp(log_temperature), axis=1)[rows, labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded").x))


def fold_temperature(network, temperature):
    """Divides the logits of a network by a temperature, in place, so that every way of calling it is calibrated.

    Args:
        network: `keras.Model` whose last layer is a Dense with softmax.
        temperature: float above 0.

    Raises:
        ValueError: If the last layer is another one.
    """
    layer = find_softmax_layer(network)
    for weight in layer.weights:
        weight.assign(weight / temperature)


def find_softmax_layer(network):
    """Returns the last layer of a network, the Dense with softmax that its probabilities come from.

    Raises:
        ValueError: If the last layer is another one.
    """
    layer = network.layers[-1]
    if not isinstance(layer, keras.layers.Dense) or layer.activation is not keras.activations.softmax:
        raise ValueError(f"Expected a network that ends in a Dense layer with softmax. Received: {layer}")
    return layer
