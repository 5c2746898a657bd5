"""Packs what `serving.py` serves: ours, and the article's model of the same network. It is started by that script.

A network with random weights answers nearly the same for every photo, and equal labels would say nothing. So the random
network is given what makes it tell photos apart: statistics of its BatchNormalizations from the photos, and a
classifier that has a class for each of them, resized as we do it or as the article does (its differs: one step, and
bilinear). It takes the same arithmetic to run.
"""

import json
import sys
from functools import partial
from pathlib import Path

import cv2
import keras
import mlflow
import numpy as np
import tensorflow as tf
from article_serving import save_article_model

import carflavor
from carflavor import networks
from carflavor.image import decode, squash
from carflavor.layers import Scale

IMAGE_SIZE = 256  # what preprocessing stores by default
INPUT_SIZE = 224
NUM_CLASSES = 196
SEED = 0
# Gammas that are zero in a new ResNet, and in no trained one.
LAST_GAMMA = 0.3
# Of the classifier. The ridge makes it forgive what bfloat16 changes.
SHARPNESS, RIDGE = 20.0, 0.01


def build_random_network(name, photos):
    """Builds a network with seeded random weights that tells photos apart.

    Args:
        name: Name in `carflavor.networks`.
        photos: List of uint8 RGB arrays of any size, at most as many as there are classes.
    """
    keras.utils.set_random_seed(SEED)
    network = networks.build(name, NUM_CLASSES, INPUT_SIZE)
    for layer in network.layers:
        if isinstance(layer, Scale):
            gamma, beta = layer.get_weights()
            layer.set_weights([np.where(gamma == 0, LAST_GAMMA, gamma), beta])
    as_ours = np.stack([squash(squash(photo, IMAGE_SIZE), INPUT_SIZE) for photo in photos])
    as_article = np.stack([cv2.resize(photo, (INPUT_SIZE, INPUT_SIZE)) for photo in photos])
    set_statistics(network, as_ours)
    fit_classifier(network, [as_ours, as_article])
    return network


def set_statistics(network, photos):
    """Gives the BatchNormalizations of a network the mean and variance that they see in some photos."""
    normalizations = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    momentum = normalizations[0].momentum
    for layer in normalizations:
        layer.momentum = 0.0
    # As one graph, which frees what the next layers no longer need: Keras would keep all of a ResNet-152, 20 GB.
    tf.function(partial(network, training=True), autograph=False)(photos)
    for layer in normalizations:
        layer.momentum = momentum


def fit_classifier(network, forms):
    """Gives the last layer of a network a class for each photo, by ridge regression on what it is fed with.

    Args:
        network: `keras.Model`.
        forms: List of arrays of the same photos `(N, S, S, 3)`, resized in different ways.
    """
    head = network.layers[-1]
    features = keras.Model(network.input, head.input).predict(np.concatenate(forms), batch_size=8, verbose=0)
    mean = features.mean(axis=0)
    differences = features - mean
    targets = np.tile(np.eye(len(forms[0]), NUM_CLASSES), (len(forms), 1)) - 1 / len(forms[0])
    products = differences @ differences.T
    ridge = RIDGE * np.trace(products) / len(products) * np.eye(len(products))
    kernel = SHARPNESS * differences.T @ np.linalg.solve(products + ridge, targets)
    head.set_weights([kernel, -mean @ kernel])


def main(network, model, precision, photos, folder):
    """Writes `ours` and `article` into a folder, or the article's alone beside a model that there is already.

    Args:
        network: Name in `carflavor.networks`.
        model: Path of a packed model, or None to pack one of random weights.
        precision: Of OpenVINO, where none is given.
        photos: List of paths.
        folder: Where to write.
    """
    if model:
        class_names = json.loads((Path(model) / "classes.json").read_text(encoding="utf-8"))
        keras_model = mlflow.tensorflow.load_model(model)
    else:
        class_names = [f"Car {index}" for index in range(NUM_CLASSES)]
        decoded = [decode(Path(path).read_bytes()) for path in photos]
        keras_model = build_random_network(network, decoded)
        carflavor.save_model(
            keras_model,
            Path(folder) / "ours",
            class_names,
            image_size=IMAGE_SIZE,
            engine="openvino",
            precision=precision,
            calibration=[squash(squash(photo, IMAGE_SIZE), INPUT_SIZE) for photo in decoded],
        )
    save_article_model(keras_model, class_names, Scale, Path(folder) / "article")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
