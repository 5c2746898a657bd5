import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import carflavor
from carflavor.image import cut_out, decode, encode_jpeg, squash

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def encoded(picture, file_format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded_16_bits(extension, pixels):
    return cv2.imencode(extension, np.array(pixels, np.uint16))[1].tobytes()


def palette_with_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 200, 30, 250, 20, 40])
    picture.putdata([0, 1])
    return encoded(picture, "PNG", transparency=0)


def with_exif_preview(jpeg):
    """Puts a whole smaller JPEG into an EXIF segment, as cameras do."""
    preview = encoded(NOISE.resize((16, 12)), "JPEG")
    entries = struct.pack("<HHII", 0x201, 4, 1, 44) + struct.pack("<HHII", 0x202, 4, 1, len(preview))
    first, second = struct.pack("<HI", 0, 14), struct.pack("<H", 2) + entries + struct.pack("<I", 0)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + first + second + preview
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def jpeg_that_claims(width, height):
    frame = JPEG.index(b"\xff\xc0")
    return JPEG[: frame + 5] + struct.pack(">HH", height, width) + JPEG[frame + 9 :]


JPEG = encoded(NOISE, "JPEG")
PROGRESSIVE = encoded(NOISE, "JPEG", progressive=True)
PREVIEWED = with_exif_preview(JPEG)
PNG = encoded(NOISE, "PNG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encoded(Image.new("L", (16, 16), 100), "JPEG"), [100, 100, 100], id="grey JPEG"),
        # Ink, not light: Pillow writes it inverted, as Adobe does.
        pytest.param(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), [255, 0, 0], id="CMYK JPEG red"),
        pytest.param(
            encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "JPEG"), [100, 100, 100], id="CMYK JPEG grey"
        ),
        pytest.param(encoded(Image.new("L", (2, 2), 100), "PNG"), [100, 100, 100], id="grey PNG"),
        pytest.param(encoded(Image.new("1", (2, 2), 1), "PNG"), [255, 255, 255], id="one-bit PNG"),
        pytest.param(encoded(Image.new("RGBA", (2, 2), (10, 200, 30, 0)), "PNG"), [10, 200, 30], id="alpha PNG"),
        pytest.param(encoded(Image.new("LA", (2, 2), (77, 0)), "PNG"), [77, 77, 77], id="grey alpha PNG"),
        pytest.param(palette_with_transparency(), [10, 200, 30], id="palette PNG"),
        # OpenCV takes channels as BGR.
        pytest.param(encoded_16_bits(".png", [[[0x1234, 0x8000, 0xFF80]]]), [255, 128, 18], id="16-bit PNG"),
        pytest.param(encoded_16_bits(".png", [[0x80FF]]), [128, 128, 128], id="16-bit grey PNG"),
        pytest.param(encoded_16_bits(".tiff", [[[0x1234, 0x8000, 0xFF80]]]), [255, 128, 18], id="16-bit TIFF"),
        pytest.param(encoded_16_bits(".tiff", [[0x80FF]]), [128, 128, 128], id="16-bit grey TIFF"),
        pytest.param(encoded(Image.new("RGB", (2, 2), (10, 200, 30)), "BMP"), [10, 200, 30], id="BMP"),
        pytest.param(encoded(Image.new("RGB", (2, 2), (10, 200, 30)), "WEBP", lossless=True), [10, 200, 30], id="WebP"),
    ],
)
def test_decode_gives_8_bit_rgb(data, expected):
    photo = decode(data)
    assert photo.dtype == np.uint8
    assert photo.shape[2] == 3
    # A JPEG is exact to a step or two.
    np.testing.assert_allclose(photo[0, 0].astype(int), expected, atol=2 if data.startswith(b"\xff\xd8") else 0)


def test_decode_keeps_a_palette_apart():
    assert decode(palette_with_transparency()).tolist() == [[[10, 200, 30], [250, 20, 40]]]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    list(enumerate(["RG BW", "GR WB", "WB GR", "BW RG", "RB GW", "BR WG", "WG BR", "GW RB"], start=1)),
)
def test_decode_shows_the_photo_upright(orientation, expected):
    colors = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
    stored = np.kron(np.array([[colors[x] for x in row] for row in ("RG", "BW")]), np.ones((8, 16, 1))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode(encoded(Image.fromarray(stored), "JPEG", exif=exif, quality=95, subsampling=0))
    height, width, _ = photo.shape
    assert (height, width) == ((16, 32) if orientation <= 4 else (32, 16))
    corners = photo[[[4], [-4]], [4, -4]].astype(int)
    shown = [[min(colors, key=lambda x: abs(corner - colors[x]).sum()) for corner in row] for row in corners]
    assert " ".join("".join(row) for row in shown) == expected


@pytest.mark.parametrize("jpeg", [JPEG, PROGRESSIVE, PREVIEWED], ids=["baseline", "progressive", "with a preview"])
def test_decode_refuses_a_jpeg_cut_off_anywhere(jpeg):
    assert decode(jpeg).shape == (40, 60, 3)
    for length in [*range(2, len(jpeg), 97), len(jpeg) - 2, len(jpeg) - 1]:
        with pytest.raises(ValueError, match=f"^expected a whole JPEG, got {length:,} bytes of one that was cut off$"):
            decode(jpeg[:length])


@pytest.mark.parametrize(
    "trailer",
    [
        pytest.param(b"\0" * 100, id="padding"),
        pytest.param(b"SEFT MotionPhoto \xff\xda \xff\xc4 mp4", id="a film with bytes like a JPEG's"),
        pytest.param(JPEG[:500], id="a second picture that is cut off"),
    ],
)
def test_decode_ignores_what_follows_a_whole_jpeg(trailer):
    np.testing.assert_array_equal(decode(JPEG + trailer), decode(JPEG))


def test_decode_takes_restart_markers_and_fill_bytes_for_no_end():
    restarting = encoded(NOISE, "JPEG", restart_marker_blocks=1)
    assert b"\xff\xd0" in restarting
    assert decode(restarting).shape == (40, 60, 3)
    assert decode(JPEG[:-2] + b"\xff\xff\xff\xd9").shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected the bytes of a photo, got none"),
        (b"no photo", "expected a photo that OpenCV can decode, got 8 bytes of something else"),
        (b"<html>404</html>" * 100, "expected a photo that OpenCV can decode, got 1,600 bytes of something else"),
        (PNG[:3000], "expected a photo that OpenCV can decode, got 3,000 bytes of something else"),
        (PNG[:-12], f"expected a photo that OpenCV can decode, got {len(PNG) - 12:,} bytes of something else"),
        (png_that_claims(50_000, 50_000), "expected a photo of at most 200,000,000 pixels, got a larger one"),
        (jpeg_that_claims(50_000, 50_000), "expected a photo of at most 200,000,000 pixels, got a larger one"),
    ],
    ids=["empty", "text", "html", "half a PNG", "PNG without end", "huge PNG", "huge JPEG"],
)
def test_decode_refuses(data, message):
    with pytest.raises(ValueError) as error:
        decode(data)
    assert str(error.value) == message


def test_decode_refuses_by_the_header_what_would_fill_the_memory(tmp_path):
    # In a process of its own: OpenCV takes the limit while it is imported, and memory is counted from the start.
    (tmp_path / "huge.png").write_bytes(png_that_claims(20_000, 20_000))  # 1.2 GB
    code = f"""
import resource
from carflavor.image import decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(open({str(tmp_path / "huge.png")!r}, "rb").read())
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)  # kB
"""
    root = Path(carflavor.__file__).parents[1]
    # Without the variable that this process has exported already.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "expected a photo of at most 200,000,000 pixels, got a larger one\nTrue\n"


def test_encode_jpeg_keeps_the_channels():
    photo = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    np.testing.assert_allclose(decode(encode_jpeg(photo))[8, 8].astype(int), [200, 100, 50], atol=2)


def numbered(height, width):
    """A photo whose first channel holds the row of each pixel and whose second the column."""
    rows, columns = np.indices((height, width))
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("box", "margin", "first", "last"),
    [
        ((40, 30, 60, 50), 0, [30, 40], [49, 59]),
        ((40, 30, 60, 50), 16, [14, 24], [65, 75]),
        ((3, 5, 60, 50), 16, [0, 0], [65, 75]),
        ((40, 30, 95, 79), 16, [14, 24], [79, 99]),
        ((-7, -1, 200, 90), 16, [0, 0], [79, 99]),
        ((99, 79, 100, 80), 2, [77, 97], [79, 99]),
        # 250 + 16 in the file's own type would be 10.
        (np.array([40, 30, 95, 70], np.uint8), 250, [0, 0], [79, 99]),
        (np.array([0, 30, 60, 50], np.uint16), 16, [14, 0], [65, 75]),
    ],
)
def test_cut_out_adds_the_margin_as_far_as_the_photo_reaches(box, margin, first, last):
    crop = cut_out(numbered(80, 100), box, margin)
    assert crop[0, 0, :2].tolist() == first
    assert crop[-1, -1, :2].tolist() == last


@pytest.mark.parametrize(
    "box", [(40, 30, 40, 50), (40, 50, 60, 30), (100, 0, 120, 10), (0, 80, 10, 90), (-20, 0, 0, 10), (0, -9, 5, 0)]
)
def test_cut_out_refuses_a_box_without_pixels(box):
    with pytest.raises(ValueError) as error:
        cut_out(numbered(80, 100), box, 16)
    assert str(error.value) == (
        f"expected a box with x1 < x2 and y1 < y2 inside the photo of 100 x 80 pixels, got {box}"
    )


def test_squash_averages_what_it_reduces():
    photo = np.zeros((2, 4, 3), np.uint8)
    photo[..., 0] = [[0, 10, 20, 30], [40, 50, 60, 70]]
    assert squash(photo, 2)[..., 0].tolist() == [[5, 25], [45, 65]]
    assert squash(photo, 1)[..., 0].tolist() == [[35]]
    assert squash(photo, 1).shape == (1, 1, 3)


def test_squash_leaves_a_photo_of_that_size_alone():
    photo = numbered(6, 6)
    assert squash(photo, 6) is photo
