"""What training does to photos, and to their targets, before the network sees them: part of the training graph.

Geometry is one affine map for each photo, read through one interpolation; colour is one 3 x 3 matrix for each photo.
Keras's own layers do the same operation by operation, each with a pass over the batch: cropping, resizing, flipping,
shifting and zooming 32 photos took 136 ms of CPU time with them and 51 ms in one map, changing colours 112 ms with
RandomColorJitter and next to nothing as a matrix. MixUp, CutMix and the operations of RandAugment are Keras's.
"""

import math
from functools import partial

import keras
import tensorflow as tf

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as everywhere in image processing


def build_augmentation(config):
    """Builds the `Augmentation` that a `carflavor.train.TrainConfig` without `auto` asks for."""
    return Augmentation(
        config.train_size,
        config.min_area,
        config.color,
        config.randaugment,
        config.mixup,
        config.cutmix,
        config.seed,
    )


class Augmentation(keras.layers.Layer):
    """Augments a batch of photos and mixes it.

    Args:
        size: Side of the photos it returns, in pixels.
        min_area: Least share of the stored square that a view keeps; 1 keeps all of it.
        color: Strength of the changes of brightness, contrast, saturation and hue; 0 leaves colours alone.
        randaugment: Magnitude of `RandomOperations`, from 0 (none) to 1.
        mixup: Alpha of mixup's Beta distribution; 0 mixes none.
        cutmix: Alpha of CutMix's Beta distribution, up to 1; 0 cuts none. With both, each batch gets one of the two, by
            chance.
        seed: Seed of everything random.

    Call arguments:
        photos: uint8 RGB of shape `(batch, S, S, 3)`.
        targets: float32 of shape `(batch, C)`.

    Returns:
        uint8 RGB `(batch, size, size, 3)`, what a network is served, and float32 `(batch, C)`.
    """

    def __init__(self, size, min_area, color, randaugment, mixup, cutmix, seed):
        super().__init__(name="augmentation", dtype="float32", autocast=False)
        self._view = RandomView(size, min_area, seed)
        self._color = RandomColor(color, seed + 1) if color else None
        self._randaugment = RandomOperations(randaugment, seed + 2) if randaugment else None
        self._mixes = []
        if mixup:
            self._mixes.append(keras.layers.MixUp(mixup, seed=seed + 3))
        if cutmix:
            # Both ends: of one number Keras draws alpha anew each time, from 0 to it.
            self._mixes.append(keras.layers.CutMix((cutmix, cutmix), seed=seed + 4))
        self._seed_generator = keras.random.SeedGenerator(seed + 5)

    def call(self, photos, targets):
        photos = self._view(tf.cast(photos, tf.float32))
        if self._color is not None:
            photos = self._color(photos)
        if self._randaugment is not None:
            photos = self._randaugment(tf.clip_by_value(photos, 0.0, 255.0))
        if self._mixes:
            mixes = [partial(_mix, mix, photos, targets) for mix in self._mixes]
            chosen = keras.random.randint((), 0, len(mixes), seed=self._seed_generator)
            photos, targets = tf.switch_case(chosen, mixes)
        return tf.cast(tf.round(tf.clip_by_value(photos, 0.0, 255.0)), tf.uint8), targets


def _mix(layer, photos, targets):
    mixed = layer({"images": photos, "labels": targets}, training=True)
    return tf.ensure_shape(mixed["images"], photos.shape), tf.ensure_shape(mixed["labels"], targets.shape)


class RandomView(keras.layers.Layer):
    """Cuts a part out of each square, stretches, turns and mirrors it, and scales it to the network's size.

    The part's share of the area is drawn evenly from `min_area` to 1, its stretch from 3/4 to 4/3 (Szegedy et al.,
    2014, https://arxiv.org/abs/1409.4842, section 6, whose areas go down to 0.08: less than half a car is none). It
    turns by up to 5 degrees, as a camera is held, and every other photo is mirrored.

    Args:
        size: Side of the result in pixels.
        min_area: Least share of the square's area that is kept. With 1 the view is the whole square, and only turned
            or mirrored.
        seed: Seed of the draws.

    Call arguments:
        photos: float32 of shape `(batch, S, S, 3)`.

    Returns:
        float32 of shape `(batch, size, size, 3)`, interpolated bilinearly; beyond the border its pixels repeat.
    """

    _MAX_STRETCH = 4 / 3
    _MAX_TURN = math.radians(5)

    def __init__(self, size, min_area, seed):
        super().__init__(name="random_view")
        self._size = size
        self._min_area = min_area
        self._seed_generator = keras.random.SeedGenerator(seed)

    def call(self, photos):
        count = tf.shape(photos)[0]

        def draw(low, high):
            return keras.random.uniform((count,), low, high, seed=self._seed_generator)

        area, turn = draw(self._min_area, 1.0), draw(-self._MAX_TURN, self._MAX_TURN)
        stretch = math.log(self._MAX_STRETCH) if self._min_area < 1 else 0.0
        root = tf.exp(draw(-stretch / 2, stretch / 2 + 1e-12))
        width, height = tf.minimum(tf.sqrt(area) * root, 1.0), tf.minimum(tf.sqrt(area) / root, 1.0)
        center_x, center_y = 0.5 + (1 - width) * draw(-0.5, 0.5), 0.5 + (1 - height) * draw(-0.5, 0.5)
        mirror = tf.sign(draw(-1.0, 1.0))
        return view(photos, self._size, center_x, center_y, width * mirror, height, turn)


def view(photos, size, center_x, center_y, width, height, turn):
    """Reads a turned rectangle out of each photo as a square.

    Args:
        photos: float32 of shape `(batch, S, S, 3)`.
        size: Side of the result in pixels.
        center_x: (batch,) float32, the rectangle's centre as a share of S.
        center_y: (batch,) float32, likewise.
        width: (batch,) float32, the rectangle's width as a share of S; negative to mirror it.
        height: (batch,) float32, likewise.
        turn: (batch,) float32, angle in radians.

    Returns:
        float32 of shape `(batch, size, size, 3)`.
    """
    side = tf.cast(photos.shape[1], tf.float32)
    cos, sin = tf.cos(turn), tf.sin(turn)
    # The pixel (u, v) of the result, (u + 0.5) / size - 0.5 from its centre, is read at x_u * u + x_v * v + x_0.
    x_u, x_v = side * cos * width / size, -side * sin * height / size
    y_u, y_v = side * sin * width / size, side * cos * height / size
    middle = (size - 1) / 2
    x_0 = side * center_x - 0.5 - (x_u + x_v) * middle
    y_0 = side * center_y - 0.5 - (y_u + y_v) * middle
    zero = tf.zeros_like(turn)
    # Not keras.ops.image.affine_transform: its result has the size of its input, so the resizing would be a second
    # interpolation.
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=photos,
        transforms=tf.stack([x_u, x_v, x_0, y_u, y_v, y_0, zero, zero], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )


class RandomColor(keras.layers.Layer):
    """Changes brightness, contrast, saturation and hue of each photo: one matrix on its colours.

    Brightness, contrast and saturation are drawn evenly from 1 - strength to 1 + strength, the hue turns by up to
    strength x 90 degrees about the axis of greys, and one photo in twenty loses its colour: a car's model does not
    depend on its paint, and some photos are black and white.

    Args:
        strength: From 0 to 1.
        seed: Seed of the draws.

    Call arguments:
        photos: float32 from 0 to 255 of shape `(batch, height, width, 3)`.

    Returns:
        float32 of the same shape, in which values may leave 0 to 255.
    """

    _GREY_SHARE = 0.05

    def __init__(self, strength, seed):
        super().__init__(name="random_color")
        self._strength = strength
        self._seed_generator = keras.random.SeedGenerator(seed)

    def call(self, photos):
        shape = (tf.shape(photos)[0], 1, 1)

        def draw(low, high):
            return keras.random.uniform(shape, low, high, seed=self._seed_generator)

        low, high = 1 - self._strength, 1 + self._strength
        brightness, contrast, saturation = draw(low, high), draw(low, high), draw(low, high)
        saturation *= tf.cast(draw(0.0, 1.0) >= self._GREY_SHARE, tf.float32)
        turn = draw(-self._strength, self._strength) * math.pi / 2
        return change_color(photos, brightness, contrast, saturation, turn)


def change_color(photos, brightness, contrast, saturation, turn):
    """Changes colours; brightness, contrast and saturation leave a photo alone at 1, `turn` at 0.

    Args:
        photos: float32 from 0 to 255 of shape `(batch, height, width, 3)`.
        brightness: (batch, 1, 1) float32, factor of all values.
        contrast: (batch, 1, 1) float32, factor of the distance from the middle grey.
        saturation: (batch, 1, 1) float32, factor of the distance from the pixel's own grey.
        turn: (batch, 1, 1) float32, angle in radians by which hues turn.

    Returns:
        float32 of the shape of `photos`.
    """
    # A rotation about the axis (1, 1, 1), by Rodrigues' formula, for colours as rows.
    about_grey = tf.constant([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]]) / math.sqrt(3.0)
    hue = tf.cos(turn) * tf.eye(3) + (1 - tf.cos(turn)) / 3 + tf.sin(turn) * about_grey
    grey = tf.tile(tf.constant(_LUMINANCE)[:, None], [1, 3])
    matrix = brightness * contrast * tf.matmul(hue, saturation * tf.eye(3) + (1 - saturation) * grey)
    shape = tf.shape(photos)
    pixels = tf.matmul(tf.reshape(photos, [shape[0], -1, 3]), matrix) + 127.5 * (1 - contrast)
    return tf.reshape(pixels, shape)


class RandomOperations(keras.layers.Layer):
    """Changes each batch by two of ten operations, drawn by chance: RandAugment (Cubuk et al., 2019,
    https://arxiv.org/abs/1909.13719).

    How far an operation goes is drawn for each photo, from nothing to `magnitude` times about what that article ends
    at: shear by 0.3, shift by 0.3 of the side, turn by 30 degrees, brightness by 0.4 of the range, contrast, colour and
    sharpness by 0.9, down to 4 bits a channel. Autocontrast and equalising know no magnitude.

    Keras's own RandAugment is not used: the smaller its magnitude the more it inverts (Solarization) and the fewer bits
    it leaves, at 0.1 one; its shifts and turns reach a whole photo and a full circle; and it computes all its
    operations to keep two, 1 s of CPU time for 32 photos of 192 px where this takes 0.07. Solarization is left out: its
    lower threshold cannot be set in the pixels' range.

    Args:
        magnitude: From 0 to 1.
        seed: Seed of the draws.

    Call arguments:
        photos: float32 from 0 to 255 of shape `(batch, height, width, 3)`.

    Returns:
        float32 of the same shape.
    """

    def __init__(self, magnitude, seed):
        super().__init__(name="random_operations")
        layers, colors = keras.layers, {"value_range": (0, 255), "seed": seed}
        sharpness = 0.5 * (1 - 0.9 * magnitude), 0.5 * (1 + 0.9 * magnitude)  # 0.5 leaves a photo as it is
        self.operations = [
            layers.RandomShear(0.3 * magnitude, 0.3 * magnitude, seed=seed),
            layers.RandomTranslation(0.3 * magnitude, 0.3 * magnitude, seed=seed),
            layers.RandomRotation(magnitude * 30 / 360, seed=seed),
            layers.RandomBrightness(0.4 * magnitude, **colors),
            layers.RandomContrast(0.9 * magnitude, **colors),
            layers.RandomColorDegeneration(0.9 * magnitude, **colors),
            layers.RandomSharpness(sharpness, **colors),
            layers.RandomPosterization((round(8 - 4 * magnitude), 8), **colors),
            layers.AutoContrast(value_range=(0, 255)),
            layers.Equalization(value_range=(0, 255)),
        ]
        self._seed_generator = keras.random.SeedGenerator(seed)

    def call(self, photos):
        for chosen in tf.unstack(keras.random.randint((2,), 0, len(self.operations), seed=self._seed_generator)):
            changes = [partial(operation, photos, training=True) for operation in self.operations]
            photos = tf.ensure_shape(tf.switch_case(chosen, changes), photos.shape)
        return photos
