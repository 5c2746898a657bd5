"""Operations that make another photo of a photo, by chance, with the car's box carried along.

Whatever moves the car is one affine map for each copy, read through one interpolation: each operation by itself would
blur the photo once more. Maps, blur and hue are OpenCV's; the rest of the colours is Pillow's, whose operations are
those that RandAugment was measured with. Both work on one photo, keep nothing between two, and carflavor needs them
anyway. docs/augment.md has the libraries that were weighed against them.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_STRETCH = math.log(4 / 3)  # of a crop, as in Szegedy et al., 2014, https://arxiv.org/abs/1409.4842, section 6
_ERASED_STRETCH = math.log(1 / 0.3)  # as in Zhong et al., 2017, https://arxiv.org/abs/1708.04896
_RANDAUGMENT_OPERATIONS = 2  # of each photo
_PROBES = 16  # points along each side of a box, at which is looked what is left of it


@dataclass(frozen=True)
class Change:
    """What is done to a photo: drawn once, it can be done to several pictures of one photo.

    Attributes:
        maps: Functions of width and height, in pixels, that give a 3 x 3 matrix: where a point of the photo goes, as
            seen from the photo's centre. They are done one after the other, and before the edits.
        edits: Functions from one uint8 RGB array of shape `(height, width, 3)` to another, which leave theirs alone.
    """

    maps: tuple = ()
    edits: tuple = ()

    def apply(self, picture, size):
        """Changes a picture.

        Args:
            picture: uint8 RGB array of shape `(height, width, 3)`.
            size: `(height, width)` of what it is a picture of, from which it may have been squashed: a turned car keeps
                its shape.

        Returns:
            uint8 RGB array of the picture's shape. What lies beyond its border is the border's pixel.
        """
        height, width = picture.shape[:2]
        matrix = self._matrix(size)
        if not np.array_equal(matrix, np.eye(3)):
            scale = np.diag([width / size[1], height / size[0], 1.0])
            # A pixel's centre is half a pixel from its corner, from which boxes count; OpenCV counts from the centre.
            matrix = _translation(-0.5, -0.5) @ scale @ matrix @ np.linalg.inv(scale) @ _translation(0.5, 0.5)
            picture = cv2.warpAffine(
                picture, matrix[:2], (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
            )
        for edit in self.edits:
            picture = edit(picture)
        return picture

    def move_box(self, box, size):
        """Returns where a box is afterwards: the smallest upright one around it, cut at the photo's border.

        Args:
            box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels of the photo.
            size: `(height, width)` of the photo.

        Returns:
            Tuple of int, likewise; None if nothing of the box is left in the photo.
        """
        height, width = size
        x, y = self._move(np.array(box)[[0, 2, 0, 2]], np.array(box)[[1, 1, 3, 3]], size)
        # 1e-6: what floating point makes of a whole number is that number.
        x1, y1 = (math.floor(max(value, 0) + 1e-6) for value in (x.min(), y.min()))
        x2, y2 = (math.ceil(min(*values) - 1e-6) for values in ((x.max(), width), (y.max(), height)))
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None

    def visible_share(self, box, size):
        """Returns how much of what is in a box, as in `move_box`, is in the photo afterwards, as share from 0 to 1."""
        x1, y1, x2, y2 = box
        places = (np.arange(_PROBES) + 0.5) / _PROBES
        points = np.meshgrid(x1 + (x2 - x1) * places, y1 + (y2 - y1) * places)
        x, y = self._move(*map(np.ravel, points), size)
        return np.mean((x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0]))

    def _matrix(self, size):
        height, width = size
        matrix = np.eye(3)
        for build in self.maps:
            matrix = build(width, height) @ matrix
        return _translation(width / 2, height / 2) @ matrix @ _translation(-width / 2, -height / 2)

    def _move(self, x, y, size):
        return self._matrix(size)[:2] @ np.stack([x, y, np.ones_like(x)])


class Operations:
    """The operations that a user has named.

    Args:
        text: Names of operations in the order in which they are done, separated by commas, each with the most that it
            does after a colon, or without: `crop,flip,rotate:5`. See `MOST`.

    Raises:
        ValueError: If this is not what the text is.
    """

    def __init__(self, text):
        self._drawn = [_parse(word.strip(), text) for word in text.split(",")]
        names = [name for name, _ in self._drawn]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each of the operations once. Received: operations={text!r}")

    def __str__(self):
        """Returns the text in which nothing is left to defaults."""
        return ",".join(name if most is None else f"{name}:{most:g}" for name, most in self._drawn)

    def draw(self, random):
        """Draws a `Change` by a `numpy.random.Generator`."""
        return _join([_DRAW[name](random, most) for name, most in self._drawn])


def _parse(word, text):
    name, colon, number = word.partition(":")
    if name not in _DRAW:
        known = ", ".join(_DRAW)
        raise ValueError(f"Expected operations among {known}, separated by commas. Received: operations={text!r}")
    if name not in MOST:
        if colon:
            raise ValueError(f"Expected {name} without a number. Received: operations={text!r}")
        return name, None
    default, highest = MOST[name]
    if not colon:
        return name, default
    try:
        most = float(number)
    except ValueError:
        most = math.nan
    if not 0 < most <= highest:
        raise ValueError(f"Expected {name}:<number above 0, up to {highest:g}>. Received: operations={text!r}")
    return name, most


def _join(changes):
    return Change(
        tuple(build for change in changes for build in change.maps),
        tuple(edit for change in changes for edit in change.edits),
    )


def _scaling(x, y):
    return np.diag([x, y, 1.0])


def _translation(x, y):
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _map(build):
    return Change(maps=(build,))


def _edit(function):
    return Change(edits=(function,))


def _pillow_edit(function):
    return _edit(lambda picture: np.asarray(function(Image.fromarray(picture))))


def _flip(random, most):
    mirror = random.choice([-1.0, 1.0])
    return _map(lambda width, height: _scaling(mirror, 1.0))


def _crop(random, most):
    """Cuts off up to the share `most` of the area, and enlarges what is left to the whole."""
    area, root = random.uniform(1 - most, 1), math.exp(random.uniform(-_STRETCH, _STRETCH) / 2)
    kept = np.minimum([math.sqrt(area) * root, math.sqrt(area) / root], 1.0)
    center = (1 - kept) * random.uniform(-0.5, 0.5, 2)
    return _map(lambda width, height: _scaling(*(1 / kept)) @ _translation(*(-center * (width, height))))


def _pad(random, most):
    """Adds up to the share `most` of the side on each of the four sides, and reduces it all to the former size."""
    (left, right), (top, bottom) = random.uniform(0, most, (2, 2))

    def build(width, height):
        moved = _translation((left - right) / 2 * width, (top - bottom) / 2 * height)
        return _scaling(1 / (1 + left + right), 1 / (1 + top + bottom)) @ moved

    return _map(build)


def _rotate(random, most):
    angle = math.radians(random.uniform(-most, most))
    cos, sin = math.cos(angle), math.sin(angle)
    return _map(lambda width, height: np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]))


def _shift(random, most):
    shares = random.uniform(-most, most, 2)
    return _map(lambda width, height: _translation(*(shares * (width, height))))


def _zoom(random, most):
    factor = math.exp(random.uniform(-1, 1) * math.log(1 + most))
    return _map(lambda width, height: _scaling(factor, factor))


def _color(random, most):
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    changes = [_enhance(random, most, enhancer) for enhancer in enhancers]
    turn = round(random.uniform(-most, most) * 64) % 256  # up to a quarter of the circle, which has 256 hues

    def turn_hue(picture):
        hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(turn)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)

    return _join([*changes, _edit(turn_hue)])


def _blur(random, most):
    share = random.uniform(0, most)

    def blur(picture):
        sigma = share * max(picture.shape)
        return cv2.GaussianBlur(picture, (0, 0), sigma)

    return _edit(blur)


def _erase(random, most):
    """Puts noise in the place of a rectangle, of every other photo."""
    is_erased = random.random() < 0.5
    area = random.uniform(most / 10, most)
    root = math.exp(random.uniform(-_ERASED_STRETCH, _ERASED_STRETCH) / 2)
    erased = np.minimum([math.sqrt(area) * root, math.sqrt(area) / root], 1.0)
    corner = (1 - erased) * random.random(2)
    seed = random.integers(2**32)

    def erase(picture):
        if not is_erased:
            return picture
        shape = picture.shape[1::-1]
        x1, y1 = np.round(corner * shape).astype(int)
        width, height = np.maximum(np.round(erased * shape), 1).astype(int)
        picture = picture.copy()
        hole = picture[y1 : y1 + height, x1 : x1 + width]
        hole[:] = np.random.default_rng(seed).integers(0, 256, hole.shape, np.uint8)
        return picture

    return _edit(erase)


def _randaugment(random, most):
    """Draws two of the operations of Cubuk et al., 2019, https://arxiv.org/abs/1909.13719.

    With `most` at 1 they reach about as far as that article's do, the same as in `carflavor.augmentation`. Solarizing
    is left out there and here: it turns a car into its negative.
    """
    drawn = [
        _shear(random, 0.3 * most, axis=0),
        _shear(random, 0.3 * most, axis=1),
        _shift(random, 0.3 * most),
        _rotate(random, 30 * most),
        _enhance(random, 0.4 * most, ImageEnhance.Brightness),
        _enhance(random, 0.9 * most, ImageEnhance.Contrast),
        _enhance(random, 0.9 * most, ImageEnhance.Color),
        _enhance(random, 0.9 * most, ImageEnhance.Sharpness),
        _posterize(random, 4 * most),
        _pillow_edit(ImageOps.autocontrast),
        _pillow_edit(ImageOps.equalize),
    ]
    return _join([drawn[index] for index in random.integers(len(drawn), size=_RANDAUGMENT_OPERATIONS)])


def _shear(random, most, axis):
    matrix = np.eye(3)
    matrix[axis, 1 - axis] = random.uniform(-most, most)
    return _map(lambda width, height: matrix)


def _enhance(random, most, enhancer):
    factor = random.uniform(1 - most, 1 + most)
    return _pillow_edit(lambda image: enhancer(image).enhance(factor))


def _posterize(random, most):
    bits = 8 - round(random.uniform(0, most))
    return _pillow_edit(lambda image: ImageOps.posterize(image, bits))


_DRAW = {
    "crop": _crop,
    "pad": _pad,
    "flip": _flip,
    "rotate": _rotate,
    "shift": _shift,
    "zoom": _zoom,
    "color": _color,
    "blur": _blur,
    "erase": _erase,
    "randaugment": _randaugment,
}
# The most that an operation does unless it is said otherwise, and the most that may be said. Of `crop` and `erase` it
# is a share of the area, of `pad`, `shift` and `blur` one of the side, of `rotate` degrees.
MOST = {
    "crop": (0.3, 0.75),
    "pad": (0.15, 0.5),
    "rotate": (8.0, 180.0),
    "shift": (0.1, 0.5),
    "zoom": (0.2, 1.0),
    "color": (0.3, 1.0),
    "blur": (0.005, 0.1),
    "erase": (0.15, 0.5),
    "randaugment": (0.3, 1.0),
}
