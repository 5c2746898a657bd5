"""From the bytes of a photo to the square of pixels that a network sees. Arrays only.

Preprocessing, evaluation and serving all come through here, so that what is served is what was trained.
"""

import cv2
import numpy as np

# What libjpeg marks the end of a picture with; a scan that no such mark follows was cut off.
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"


def decode(data):
    """Decodes the bytes of a photo as 8-bit RGB.

    Greyscale is repeated in three channels, CMYK converted, 16 bits reduced to 8, alpha dropped, and an EXIF
    orientation applied: boxes refer to the photo as it is shown.

    Args:
        data: Bytes of a JPEG, PNG, WebP, BMP, TIFF or whatever else OpenCV reads.

    Returns:
        uint8 RGB array of shape `(height, width, 3)`.

    Raises:
        ValueError: If the bytes are no photo, or a JPEG that was cut off. OpenCV fills the missing part with grey and
            says so on standard error only.
    """
    if not data:
        raise ValueError("expected the bytes of a photo, got none")
    if data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < data.rfind(_JPEG_SCAN):
        raise ValueError(f"expected a whole JPEG, got {len(data):,} bytes of one that was cut off")
    try:
        photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        # Among others: more pixels than OpenCV agrees to decode.
        raise ValueError(f"expected a photo that OpenCV can decode, got an error: {error.err or error}") from None
    if photo is None:
        raise ValueError(f"expected a photo that OpenCV can decode, got {len(data):,} bytes of something else")
    return photo


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
    left, top = max(x1 - margin, 0), max(y1 - margin, 0)
    return photo[top : min(y2 + margin, height), left : min(x2 + margin, width)]


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
