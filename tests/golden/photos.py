"""The photos of the golden features, for the script that makes them and the test that reads them."""

import numpy as np


def draw_photo(size, index):
    """Draws the golden photos: soft bands of colour, a disc and a bar, in whole numbers only, alike on every machine.

    Args:
        size: Side in pixels.
        index: Which photo.

    Returns:
        uint8 RGB array of shape `(size, size, 3)`.
    """
    y, x = np.mgrid[:size, :size] * 1024 // size
    slopes = np.array([[3, 1], [-1, 2], [2, -3]]) + index
    photo = np.stack([np.abs((a * x + b * y) % 510 - 255) for a, b in slopes], axis=-1)
    photo[(x - 600) ** 2 + (y - 450) ** 2 < (200 + 60 * index) ** 2] = (210, 40, 60 + 90 * index)
    photo[(y > 780) & (y < 840) & (x > 150)] = (20, 20, 30)
    return photo.astype(np.uint8)
