"""From the bytes of a photo to the square of pixels that a network sees. Arrays only.

Preprocessing, evaluation and serving all come through here, so that what is served is what was trained.
"""

import contextlib
import io
import itertools
import os
import re
import struct
import zlib
from functools import partial

import cv2
import numpy as np
from PIL import AvifImagePlugin, ImageOps

try:
    import pillow_heif
except ModuleNotFoundError:
    pillow_heif = None  # decode() says which extra brings it

MAX_PIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])  # see carflavor/__init__.py
# The decoders go by these same bytes, so that no file is one format to us and another to them. No camera writes the
# rest of what OpenCV reads (JPEG 2000, HDR, Sun raster, ...): it is only more code for strangers to try.
_FORMAT = re.compile(
    rb"(?P<JPEG>\xff\xd8)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WebP>RIFF.{4}WEBP)|(?P<BMP>BM)|(?P<TIFF>II\*\0|MM\0\*)"
    rb"|(?P<GIF>GIF8[79]a)|(?P<AVIF>.{4}ftyp(?:.{4}){0,8}?avi[fs])|(?P<HEIC>.{4}ftyp(?:he[iv][cmsx]|m[is]f1))",
    re.DOTALL,
)
_FORMATS = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC"
# In a scan's data, 0xFF is followed by 0x00 where it is a value and by 0xD0 to 0xD7 where the decoder may restart. What
# else is below 0xC0 starts no segment: libjpeg goes on to the next marker.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_JPEG_END, _JPEG_SCAN, _JPEG_FRAMES = 0xD9, 0xDA, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Each passes over the whole photo, however little it brings: 100 over 25 megapixels take 2.5 s. Encoders write about
# ten, or 18 for CMYK; libtiff has the first limit for JPEGs in a TIFF (LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER).
_MAX_JPEG_SCANS, _LARGE_JPEG, _MAX_LARGE_JPEG_SCANS = 100, 5_000_000, 20
_MAX_JPEG_SEGMENTS = 10_000  # a segment has up to 64 kB: profiles and previews take a hundred or so
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_LARGE_PNG = 1_000_000  # bytes, which unpack in a second at most, whatever they are
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}
# Of the first chunk: where width and height start in the bits from byte 20 on, their mask, and what is added.
_WEBP_SIZES = {b"VP8 ": (48, 64, 0x3FFF, 0), b"VP8L": (8, 22, 0x3FFF, 1), b"VP8X": (32, 56, 0xFFFFFF, 1)}
_TIFF_SIZE, _TIFF_TILE = (256, 257), (322, 323)  # tags of width and height
# Of a square's side, so much a JPEG has to have left where less of it is decoded. 224 pixels, what networks see, are as
# much of 256, what is stored; and half of 480, a common height of older photos, is above it.
_LEAST_SIDE = 7 / 8
_GREY_SPREAD, _GREY_STEP = 2, 8  # levels between the channels; of so many rows and columns one is looked at
_MAX_TIFF_TILE = 4096  # pixels a side; OpenCV makes room for a whole one of up to 1 GB, however small the photo


class _Refusal(ValueError):
    """Says itself what is wrong with a photo, where other exceptions are those of decoders."""


class EncodedPhoto:
    """A photo in the bytes of a file, which may come from a stranger.

    Format and size are read from the header before anything is decoded, and by nothing else does the decoder take
    memory (but see `_open_avif`).

    Args:
        data: Bytes of a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or, with the extra `heic`, HEIC.
        max_pixels: Most pixels that the photo may have; a TIFF, a JPEG of four colours and an animated WebP two thirds
            of them; `MAX_PIXELS` where that is less. An AVIF is taken only without a lower limit: see `_open_avif`.

    Attributes:
        format: `JPEG`, `PNG`, and so on: by the bytes, whatever the file is called.
        width: In pixels, as the file has it: before the orientation that it states is applied.
        height: Likewise.
        size: Height and width as the photo is shown; None until it was decoded.

    Raises:
        ValueError: If the bytes are no photo of these formats, one that was cut off (OpenCV fills the missing part of a
            JPEG with grey and says so on standard error only), or one of more pixels.
    """

    def __init__(self, data, max_pixels=MAX_PIXELS):
        if not data:
            raise ValueError("expected the bytes of a photo, got none")
        self._length = len(data)
        self.format = find_format(data)
        if self.format is None:
            raise ValueError(f"expected a {_FORMATS}, got {len(data):,} bytes of something else")
        if self.format == "AVIF" and max_pixels < MAX_PIXELS:
            raise ValueError("expected a photo of another format, got an AVIF, whose header need not tell its size")
        max_pixels = min(max_pixels, MAX_PIXELS)
        with self._one_kind_of_error():
            (self.width, self.height), is_costly, self._load = _OPENERS[self.format](data)
            if is_costly:
                # Decoding takes up to 14 bytes a pixel, and 9 otherwise.
                max_pixels = max_pixels * 2 // 3
            if self.width * self.height > max_pixels:
                raise _Refusal(
                    f"expected a photo of at most {max_pixels:,} pixels, got one of {self.width:,} x {self.height:,}"
                )
        self.size = None
        self._decoded = {}

    @contextlib.contextmanager
    def _one_kind_of_error(self):
        try:
            yield
        except _Refusal:
            raise
        except Exception:  # of any kind: what hostile bytes bring decoders to is not in their documentation
            raise _Refusal(
                f"expected a whole {self.format}, got {self._length:,} bytes of one that is cut off, damaged or of a "
                f"rare kind"
            ) from None

    def decode(self, scale=1):
        """Decodes the photo as 8-bit RGB.

        Greyscale is repeated in three channels, CMYK converted, 16 bits reduced to 8, alpha dropped, and the
        orientation that the file states applied: boxes refer to the photo as it is shown. Of an animation or several
        pages, the first picture is decoded.

        Args:
            scale: 1, 2, 4 or 8 for a JPEG, of which a whole, half, quarter or eighth of each side is decoded; 1 for
                all others.

        Returns:
            uint8 RGB array of shape `(height, width, 3)`.

        Raises:
            ValueError: If the photo is damaged.
        """
        if scale not in self._decoded:
            with self._one_kind_of_error():
                photo = self._load(scale) if scale > 1 else self._load()
                if sorted(photo.shape[:2]) != sorted((-(-self.width // scale), -(-self.height // scale))):
                    raise EOFError
            is_turned = (photo.shape[0] > photo.shape[1]) != (self.height > self.width)
            self.size = (self.width, self.height) if is_turned else (self.height, self.width)
            self._decoded[scale] = photo
        return self._decoded[scale]

    def cut_square(self, size, box=None, margin=0):
        """Decodes a part of the photo, or all of it, as a square: the way of every photo to the network.

        Of a JPEG no more is decoded than the square needs, which takes half the time where the photo is twice as large.
        What is cut out alone decides how much that is, so that training and serving see the same pixels.

        Args:
            size: Side of the square in pixels.
            box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels of the photo as it is shown; None for the whole photo.
            margin: Pixels of the photo that are added on each side of the box, as far as it reaches.

        Returns:
            uint8 RGB array of shape `(size, size, 3)`.

        Raises:
            ValueError: If the photo is damaged, or the box holds no pixel of it.
        """
        if box is None:
            return squash(self.decode(self._choose_scale(self.width, self.height, size)), size)
        x1, y1, x2, y2 = (int(value) for value in box)
        scale = self._choose_scale(x2 - x1, y2 - y1, size)
        return squash(cut_out(self.decode(scale), (x1, y1, x2, y2), margin, scale, self.size), size)

    def _choose_scale(self, width, height, size):
        if self.format != "JPEG":
            return 1
        least = _LEAST_SIDE * size
        return next((scale for scale in (8, 4, 2) if min(width, height) >= scale * least), 1)


def decode(data, max_pixels=MAX_PIXELS):
    """Decodes the bytes of a photo as 8-bit RGB: `EncodedPhoto(data, max_pixels).decode()`."""
    return EncodedPhoto(data, max_pixels).decode()


def find_format(data):
    """Returns `JPEG`, `PNG` and so on by the first bytes of a photo, or None."""
    known = _FORMAT.match(data)
    return known and known.lastgroup


def read_size(data):
    """Reads how large a photo is, without decoding it.

    Args:
        data: Bytes of a photo in one of the formats that `decode` takes.

    Returns:
        Width and height in pixels, as the file has them: before the orientation that it states is applied.

    Raises:
        ValueError: If there is no such header.
    """
    if file_format := find_format(data):
        with contextlib.suppress(Exception):  # of any kind, as in EncodedPhoto
            (width, height), *_ = _OPENERS[file_format](data)
            return width, height
    raise ValueError(f"expected a {_FORMATS}, got {len(data):,} bytes without the header of one")


def _open_jpeg(data):
    """Goes from marker to marker: what is inside an embedded preview or after the end is not the photo's."""
    position, size, is_cmyk, scans = 2, None, False, 0
    for segment in itertools.count():
        if segment > _MAX_JPEG_SEGMENTS:
            raise _Refusal(f"expected a JPEG of at most {_MAX_JPEG_SEGMENTS:,} segments, got one of more")
        if not (marker := _JPEG_MARKER.search(data, position)):
            break
        kind, start = marker[1][0], marker.end()
        if kind == _JPEG_END:
            return size, is_cmyk, partial(_decode_by_opencv, data)
        if kind in _JPEG_FRAMES and size is None:
            is_cmyk = data[start + 7] > 3
            size = int.from_bytes(data[start + 5 : start + 7]), int.from_bytes(data[start + 3 : start + 5])
        scans += kind == _JPEG_SCAN
        most = _MAX_LARGE_JPEG_SCANS if size and size[0] * size[1] > _LARGE_JPEG else _MAX_JPEG_SCANS
        if scans > most:
            raise _Refusal(f"expected a JPEG of at most {most} scans, got one of more")
        # Every other marker starts a segment, whose length counts its own two bytes.
        position = start + int.from_bytes(data[start : start + 2])
    raise _Refusal(f"expected a whole JPEG, got {len(data):,} bytes of one that was cut off")


def _open_png(data):
    """Keeps the chunks that make the picture: OpenCV would unpack texts too, and make room for any length claimed."""
    view, kept, position, kind, packed = memoryview(data), bytearray(data[:8]), 8, None, bytearray()
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length  # with length, kind and checksum
        if kind in _PNG_CHUNKS:
            kept += view[position:end]
        if kind == b"IDAT":
            packed += view[position + 8 : end - 4]
        position = end
    if position > len(data):
        raise EOFError
    width, height, depth, color = struct.unpack_from(">IIBB", kept, 16)

    def load():
        if len(packed) > _LARGE_PNG:
            # A row has a byte more than its pixels, and interlacing at most doubles the rows.
            _check_unpacked(packed, 2 * height * (width * _PNG_CHANNELS[color] * depth // 8 + 2))
        return _decode_by_opencv(kept)

    return (width, height), False, load


def _check_unpacked(packed, expected):
    """Refuses a PNG that goes on after its last pixel: libpng unpacks the rest too, a thousand times its size."""
    inflater, size = zlib.decompressobj(), 0
    for start in range(0, len(packed), 16_384):
        size += len(inflater.decompress(packed[start : start + 16_384]))
        if size > expected:
            raise _Refusal(f"expected a PNG of {expected:,} bytes once unpacked, got more")


def _open_webp(data):
    x, y, mask, added = _WEBP_SIZES[data[12:16]]
    bits = int.from_bytes(data[20:30], "little")
    size = (bits >> x & mask) + added, (bits >> y & mask) + added
    is_animated = data[12:16] == b"VP8X" and data[20] & 2  # then a whole canvas is kept, twice and with alpha
    return size, is_animated, lambda: _decode_by_opencv(data)


def _open_bmp(data):
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return (width, abs(height)), False, lambda: _decode_by_opencv(data)  # negative where the first row is the upper one


def _open_gif(data):
    return struct.unpack_from("<HH", data, 6), False, lambda: _decode_by_opencv(data)


def _open_tiff(data):
    order = "<" if data.startswith(b"I") else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, directory)
    sides = dict.fromkeys((*_TIFF_SIZE, *_TIFF_TILE), 0)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in sides:
            (value,) = struct.unpack_from(order + {3: "H", 4: "I"}[kind], data, entry + 8)
            # The largest, where a tag is there more than once: decoders differ in which they take.
            sides[tag] = max(sides[tag], value)
    if max(sides[tag] for tag in _TIFF_TILE) > _MAX_TIFF_TILE:
        raise _Refusal(f"expected a TIFF with tiles of at most {_MAX_TIFF_TILE:,} pixels a side, got larger ones")
    return [sides[tag] for tag in _TIFF_SIZE], True, lambda: _decode_by_opencv(data)


# Not IMREAD_REDUCED_COLOR_2 and so on, which are BGR.
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def _decode_by_opencv(data, scale=1):
    return cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[scale])


def _open_avif(data):
    # Not by OpenCV: it leaves out the orientation and, where there is alpha, exchanges red and blue (5.0.0). Not by
    # PIL.Image.open: that has a limit of its own, which warns and is the whole process's to set.
    # Here alone the header can lie: libavif takes a picture of up to 2^28 pixels out of a file that claims a small one,
    # which for a moment takes up to 1.1 GB.
    picture = AvifImagePlugin.AvifImageFile(io.BytesIO(data))

    def load():
        ImageOps.exif_transpose(picture, in_place=True)
        photo = np.empty((picture.height, picture.width, 3), np.uint8)
        # In bands, as Pillow hands pixels over by way of two copies.
        for top in range(0, picture.height, 256):
            band = picture.crop((0, top, picture.width, min(top + 256, picture.height)))
            photo[top : top + 256] = np.asarray(band.convert("RGB"))
        return photo

    return picture.size, False, load


def _open_heic(data):
    if pillow_heif is None:
        raise _Refusal("expected a photo of another format, got a HEIC, which needs `pip install 'carflavor[heic]'`")
    picture = pillow_heif.open_heif(io.BytesIO(data))

    def load():  # libheif applies the orientation
        pixels = np.asarray(picture)
        if picture.mode == "RGB":
            return pixels
        return cv2.cvtColor(pixels, {"L": cv2.COLOR_GRAY2RGB, "RGBA": cv2.COLOR_RGBA2RGB}[picture.mode])

    return picture.size, False, load


_OPENERS = {
    "JPEG": _open_jpeg,
    "PNG": _open_png,
    "WebP": _open_webp,
    "BMP": _open_bmp,
    "TIFF": _open_tiff,
    "GIF": _open_gif,
    "AVIF": _open_avif,
    "HEIC": _open_heic,
}


def encode_jpeg(photo, quality=90):
    """Encodes a uint8 RGB array of shape `(height, width, 3)` as the bytes of a JPEG."""
    _, data = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def cut_out(photo, box, margin, scale=1, size=None):
    """Cuts the car out of a photo, with some of its surroundings.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
        box: `(x1, y1, x2, y2)`, 0-based half-open, in pixels of the photo. What lies outside the photo is ignored.
        margin: Pixels added on each side, as far as the photo reaches.
        scale: How many pixels of the photo as it was, each way, `photo` has one of. Box and margin are in those.
        size: Height and width of the photo as it was; those of `photo` if None.

    Returns:
        uint8 array of shape `(height of the crop, width of the crop, 3)`, a view.

    Raises:
        ValueError: If the box holds no pixel of the photo.
    """
    height, width = size or photo.shape[:2]
    x1, y1, x2, y2 = (int(value) for value in box)
    if not (max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
        raise ValueError(
            f"expected a box with x1 < x2 and y1 < y2 inside the photo of {width} x {height} pixels, "
            f"got ({x1}, {y1}, {x2}, {y2})"
        )
    # At the far edges a slice ends by itself; a negative start would count from there.
    top, left = max(y1 - margin, 0) // scale, max(x1 - margin, 0) // scale
    return photo[top : -(-(y2 + margin) // scale), left : -(-(x2 + margin) // scale)]


def is_grey(photo):
    """Says whether a photo has no colours, also where it is stored as a colour photo; some pixels are looked at.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
    """
    red, green, blue = cv2.split(np.ascontiguousarray(photo[::_GREY_STEP, ::_GREY_STEP]))
    # JPEG rounds each channel by itself.
    return max(cv2.norm(red, green, cv2.NORM_INF), cv2.norm(green, blue, cv2.NORM_INF)) <= _GREY_SPREAD


def squash(photo, size):
    """Scales a photo to a square, without regard to its aspect ratio.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`.
        size: Side of the square in pixels.

    Returns:
        uint8 RGB array of shape `(size, size, 3)`; the photo itself where it has that shape already.
    """
    # Means of 2 x 2 pixels, as often as it goes: so there is no aliasing. INTER_AREA takes means down to any size, but
    # those of other blocks by a loop that needs ten times as long (OpenCV 4.14 and 5.0).
    while min(photo.shape[:2]) >= 2 * size:
        height, width = photo.shape[0] // 2, photo.shape[1] // 2  # without the last row or column of an odd number
        photo = cv2.resize(photo[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    if photo.shape[:2] == (size, size):
        return photo
    # Where a side is too short, INTER_AREA is bilinear, too, with less blur.
    interpolation = cv2.INTER_LINEAR if min(photo.shape[:2]) >= size else cv2.INTER_AREA
    return cv2.resize(photo, (size, size), interpolation=interpolation)
