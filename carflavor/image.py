"""From the bytes of a photo to the square of pixels that a network sees. Arrays only.

Preprocessing, evaluation and serving all come through here, so that what is served is what was trained.
"""

import os
import re

import cv2
import numpy as np

MAX_PIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])  # see carflavor/__init__.py
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xd9"
# In a scan's data, 0xFF is followed by 0x00 where it is a value and by 0xD0 to 0xD7 where the decoder may restart.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)


def decode(data):
    """Decodes the bytes of a photo as 8-bit RGB.

    Greyscale is repeated in three channels, CMYK converted, 16 bits reduced to 8, alpha dropped, and an EXIF
    orientation applied: boxes refer to the photo as it is shown.

    Args:
        data: Bytes of a JPEG, PNG, WebP, BMP, TIFF or whatever else OpenCV reads.

    Returns:
        uint8 RGB array of shape `(height, width, 3)`.

    Raises:
        ValueError: If the bytes are no photo, a JPEG that was cut off (OpenCV fills the missing part with grey and says
            so on standard error only), or a photo of more than `MAX_PIXELS`.
    """
    if not data:
        raise ValueError("expected the bytes of a photo, got none")
    if data.startswith(_JPEG_START) and _is_cut_off(data):
        raise ValueError(f"expected a whole JPEG, got {len(data):,} bytes of one that was cut off")
    try:
        photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise ValueError(f"expected a photo of at most {MAX_PIXELS:,} pixels, got a larger one") from None
        raise ValueError(f"expected a photo that OpenCV can decode, got an error: {error.err}") from None
    if photo is None:
        raise ValueError(f"expected a photo that OpenCV can decode, got {len(data):,} bytes of something else")
    return photo


def _is_cut_off(jpeg):
    """Goes from marker to marker: an end among the bytes of an embedded preview or after the picture is another's."""
    position = len(_JPEG_START)
    while marker := _JPEG_MARKER.search(jpeg, position):
        if marker[1] == _JPEG_END:
            return False
        # Every other marker starts a segment, whose length counts its own two bytes.
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
    return True


def encode_jpeg(photo, quality=90):
    """Encodes a uint8 RGB array of shape `(height, width, 3)` as the bytes of a JPEG."""
    _, data = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def cut_out(photo, box, margin):
    """Cuts the car out of a photo, with some of its surroundings.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels of the photo. What lies outside the photo is ignored.
        margin: Pixels added on each side, as far as the photo reaches.

    Returns:
        uint8 array of shape `(height of the crop, width of the crop, 3)`, a view.

    Raises:
        ValueError: If the box holds no pixel of the photo.
    """
    height, width = photo.shape[:2]
    x1, y1, x2, y2 = (int(value) for value in box)
    if not (max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
        raise ValueError(
            f"expected a box with x1 < x2 and y1 < y2 inside the photo of {width} x {height} pixels, "
            f"got ({x1}, {y1}, {x2}, {y2})"
        )
    # At the far edges a slice ends by itself; a negative start would count from there.
    return photo[max(y1 - margin, 0) : y2 + margin, max(x1 - margin, 0) : x2 + margin]


def squash(photo, size):
    """Scales a photo to a square, without regard to its aspect ratio.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
        size: Side of the square in pixels.

    Returns:
        uint8 RGB array of shape `(size, size, 3)`; the photo itself where it has that shape already.
    """
    if photo.shape[:2] == (size, size):
        return photo
    # INTER_AREA averages what is reduced (no aliasing) and is bilinear where the photo is enlarged.
    return cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA)
