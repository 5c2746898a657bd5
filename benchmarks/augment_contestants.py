"""The processes of benchmarks/augment.py: `ours` and `keras`, as the first argument says."""

import sys
import time

import cv2
import numpy as np
from measuring import answer_rounds

SIDE = 256
PHOTOS = {"ours": 1000, "keras": 60}  # a round takes some seconds
BOX = (60, 80, 200, 180)


def make_photos():
    """Returns eight uint8 RGB squares of soft colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), np.uint8)
    return [cv2.resize(field, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for field in coarse]


def build_ours():
    from carflavor.augment import DEFAULT_OPERATIONS
    from carflavor.data.operations import Operations

    cv2.setNumThreads(1)
    operations = Operations(DEFAULT_OPERATIONS)

    def change(photo, seed):
        drawn = operations.draw(np.random.default_rng(seed))
        return drawn.apply(photo, (SIDE, SIDE)), drawn.move_box(BOX, (SIDE, SIDE))

    return change


def build_keras():
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    box, values = {"bounding_box_format": "xyxy"}, {"value_range": (0, 255)}
    layers = [
        keras.layers.RandomZoom((-0.2, 0.0), **box),
        keras.layers.RandomFlip("horizontal", **box),
        keras.layers.RandomRotation(8 / 360, **box),
        keras.layers.RandomColorJitter(
            brightness_factor=0.3, contrast_factor=0.3, saturation_factor=0.3, hue_factor=0.075, **values
        ),
        keras.layers.RandomGaussianBlur(**values),
        keras.layers.RandomErasing(**values),
    ]

    def change(photo, seed):
        images = tf.cast(photo[None], tf.float32)
        boxes = {"boxes": np.array([[BOX]], np.float32), "labels": np.zeros((1, 1))}
        for layer in layers:
            drawn = layer.get_random_transformation({"images": images}, training=True, seed=seed)
            images = layer.transform_images(images, drawn)
            if layer.bounding_box_format:
                boxes = layer.transform_bounding_boxes(boxes, drawn)
        return np.asarray(images)[0].astype(np.uint8), np.asarray(boxes["boxes"])[0, 0]

    return change


def build(kind):
    started = time.perf_counter()
    photos = make_photos()
    change = {"ours": build_ours, "keras": build_keras}[kind]()
    change(photos[0], 0)
    seconds = time.perf_counter() - started

    def measure_round():
        before = time.perf_counter()
        for seed in range(PHOTOS[kind]):
            change(photos[seed % len(photos)], seed)
        return [PHOTOS[kind] / (time.perf_counter() - before)]

    return {f"{kind}_start_seconds": round(seconds, 1)}, measure_round


if __name__ == "__main__":
    answer_rounds(lambda: build(sys.argv[1]))
