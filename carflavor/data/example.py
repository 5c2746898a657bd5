"""One photo of the sample, by itself: serving needs it, and nothing else of the sample, which takes SciPy to write."""

import numpy as np

from carflavor.data.drawing import CLASS_NAMES, draw_photo
from carflavor.image import encode_jpeg

EXAMPLE_SEED = 6  # a large red car before a town


def example_photo():
    """Draws one photo for smoke tests and input examples, the same at every call.

    Returns:
        The bytes of a JPEG file, the car's box `(x1, y1, x2, y2)` in it, 0-based half-open, and the name of its class.
    """
    photo, box = draw_photo(0, np.random.default_rng(EXAMPLE_SEED))
    return encode_jpeg(photo), box, CLASS_NAMES[0]
