"""Photos for benchmarks: drawn cars in any size, with as many bytes as real photos have."""

from functools import partial

import cv2
import numpy as np

from carflavor.data.drawing import CLASS_NAMES, draw_photo
from carflavor.data.processes import map_in_processes
from carflavor.image import encode_jpeg

_NOISE_SHIFTS = 200  # pixels


def draw_photos(folder, number, side):
    """Writes drawn photos into class folders; noise makes their bytes as many as those of real photos."""
    noise = np.random.default_rng(0).normal(0, 6, (side + _NOISE_SHIFTS, side + _NOISE_SHIFTS, 3)).astype(np.int16)
    draw = partial(_draw_some, folder, side, noise)
    for _ in map_in_processes(draw, (range(first, min(first + 50, number)) for first in range(0, number, 50)), 2):
        pass


def _draw_some(folder, side, noise, numbers):
    for index in numbers:
        random = np.random.default_rng(index)
        drawn, _ = draw_photo(index % len(CLASS_NAMES), random)
        height, width = drawn.shape[:2]
        scale = side / max(height, width)
        width, height = round(width * scale), round(height * scale)
        top, left = random.integers(_NOISE_SHIFTS, size=2)  # to draw noise anew takes ten times as long as the rest
        photo = cv2.resize(drawn, (width, height)) + noise[top : top + height, left : left + width]
        path = folder / "train" / f"{index % len(CLASS_NAMES)}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(photo.clip(0, 255).astype(np.uint8)))
