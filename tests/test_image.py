import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import carflavor
from carflavor import image
from carflavor.image import EncodedPhoto, cut_out, decode, encode_jpeg, is_grey, read_size, squash

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
COLORS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
# Red and green over blue and white, and how they are shown by orientation.
FOUR_COLORS = Image.fromarray(
    np.kron(np.array([[COLORS[x] for x in row] for row in ("RG", "BW")]), np.ones((8, 16, 1))).astype(np.uint8)
)
ORIENTATIONS = list(enumerate(["RG BW", "GR WB", "WB GR", "BW RG", "RB GW", "BR WG", "WG BR", "GW RB"], start=1))
# The same as a HEIC, which nothing here can write: by pillow-heif 1.8.1 with quality 30, chroma 444 and orientation 5.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWl4AAAAAG1pZjFoZWl4bWlhZgAAAZJtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAA"
    "AERAAAEAAQAAAAABtgABAAAAAAAAAEAAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAABEmlwcnAAAADw"
    "aXBjbwAAAHdodmNDAQQIAAAAnjgAAAAAHvAA/P/4+AAADwNgAAEAF0ABDAH//wQIAAADAJ44AAADAAAeugJAYQABACpCAQEECAAAAwCeOAAAAwAA"
    "HpAEECCy3S3SXNwENBgQAAADAZAAAAMAEIBiAAEACEQBwHAwYDEgAAAAE2NvbHJuY2x4AAEADQAGgAAAABRpc3BlAAAAAAAAAEAAAABAAAAAKGNs"
    "YXAAAAAgAAAAAQAAABAAAAAB////4AAAAAL////QAAAAAgAAABBwaXhpAAAAAAMICAgAAAAJaXJvdAMAAAAJaW1pcgEAAAAaaXBtYQAAAAAAAAAB"
    "AAEHgQIDBYSGhwAAAEhtZGF0AAAAPCgBrGSGlEEgL1dV+qd43SWjR+6XVxN8cGyCo2PdPimWt7lcXWM57xjub3+rm9AyWusVKDvyM4xARN5L3A=="
)


def encoded(picture, file_format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded_by_opencv(extension, pixels, *options):
    return cv2.imencode(extension, np.array(pixels), options)[1].tobytes()


def encoded_16_bits(extension, pixels):
    return encoded_by_opencv(extension, np.array(pixels, np.uint16))


def plain(color, mode="RGB", size=(16, 16)):
    return Image.new(mode, size, color)


def animated(file_format, **options):
    return encoded(plain((10, 200, 30)), file_format, save_all=True, append_images=[plain((250, 20, 40))], **options)


def palette_with_transparency(file_format="PNG"):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 200, 30, 250, 20, 40])
    picture.putdata([0, 1])
    return encoded(picture, file_format, transparency=0)


def ycck_jpeg(color):
    """Stores ink as brightness and colour differences, which Adobe's marker tells from plain ink."""
    jpeg = bytearray(encoded(plain(color, "CMYK"), "JPEG", quality=95))
    jpeg[jpeg.index(b"Adobe") + 11] = 2
    return bytes(jpeg)


def with_exif_preview(jpeg):
    """Puts a whole smaller JPEG into an EXIF segment, as cameras do."""
    preview = encoded(NOISE.resize((16, 12)), "JPEG")
    entries = struct.pack("<HHII", 0x201, 4, 1, 44) + struct.pack("<HHII", 0x202, 4, 1, len(preview))
    first, second = struct.pack("<HI", 0, 14), struct.pack("<H", 2) + entries + struct.pack("<I", 0)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + first + second + preview
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def png_chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *before_pixels, pixels=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *before_pixels, png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_that_claims(width, height):
    return JPEG[: JPEG_FRAME + 5] + struct.pack(">HH", height, width) + JPEG[JPEG_FRAME + 9 :]


def tiff(*tags):
    """A TIFF of one deflated strip, 60 x 40 pixels unless the tags, (number, value), say otherwise."""
    strip = zlib.compress(bytes([10, 200, 30]) * 60 * 40)
    tags = [(256, 60), (257, 40), *tags, (259, 8), (262, 2), (273, 8), (277, 3), (278, 40), (279, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags, key=lambda tag: tag[0]))
    # Three times 8 bits, behind the directory.
    behind = 8 + len(strip) + 2 + 12 * (len(tags) + 1) + 4
    entries = entries[:24] + struct.pack("<HHII", 258, 3, 3, behind) + entries[24:]
    directory = struct.pack("<H", len(tags) + 1) + entries + struct.pack("<I", 0) + struct.pack("<HHH", 8, 8, 8)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def patched(data, position, form, *values):
    data = bytearray(data)
    struct.pack_into(form, data, position, *values)
    return bytes(data)


def gif(width, height, frame_width, frame_height):
    """Two colours in turn, without compression: a code that starts anew before each pair of pixels."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([10, 200, 30, 250, 20, 40])
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0)
    return screen + frame + b"\x02\x02\x44\x01\0;"


def heic_with(orientation):
    """Turns the HEIC: `irot` in quarters to the left, then `imir`, where a property of its picture names it."""
    quarters, mirrored = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    data = patched(HEIC, HEIC.index(b"irot") + 4, "B", quarters)
    return data if mirrored else data.replace(b"\x84\x86\x87", b"\x84\x86\x05")


def refusal(data, max_pixels=image.MAX_PIXELS):
    with pytest.raises(ValueError) as error:
        decode(data, max_pixels)
    return str(error.value)


def damaged(file_format, data):
    return f"expected a whole {file_format}, got {len(data):,} bytes of one that is cut off, damaged or of a rare kind"


JPEG = encoded(NOISE, "JPEG")
JPEG_FRAME = JPEG.index(b"\xff\xc0")
PROGRESSIVE = encoded(NOISE, "JPEG", progressive=True)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") :][:10]  # its header
PREVIEWED = with_exif_preview(JPEG)
PNG = encoded(NOISE, "PNG")
# 60 x 40 pixels in each format.
PHOTOS = {
    "JPEG": JPEG,
    "PNG": PNG,
    "WebP": encoded(NOISE, "WEBP"),
    "lossless WebP": encoded(NOISE, "WEBP", lossless=True),
    "extended WebP": encoded(NOISE, "WEBP", xmp=b"<x/>"),
    "BMP": encoded(NOISE, "BMP"),
    "TIFF": encoded(NOISE, "TIFF"),
    "deflated TIFF": encoded(NOISE, "TIFF", compression="tiff_adobe_deflate"),
    "GIF": encoded(NOISE, "GIF"),
    "AVIF": encoded(NOISE, "AVIF", speed=10),
}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encoded(Image.new("L", (16, 16), 100), "JPEG"), [100, 100, 100], id="grey JPEG"),
        # Ink, not light: Pillow writes it inverted, as Adobe does.
        pytest.param(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), [255, 0, 0], id="CMYK JPEG red"),
        pytest.param(
            encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 155)), "JPEG"), [100, 100, 100], id="CMYK JPEG grey"
        ),
        pytest.param(ycck_jpeg((76, 84, 255, 0)), [255, 0, 0], id="YCCK JPEG red"),
        pytest.param(animated("MPO"), [10, 200, 30], id="MPO"),
        pytest.param(encoded(Image.new("L", (2, 2), 100), "PNG"), [100, 100, 100], id="grey PNG"),
        pytest.param(encoded(Image.new("1", (2, 2), 1), "PNG"), [255, 255, 255], id="one-bit PNG"),
        pytest.param(encoded(Image.new("RGBA", (2, 2), (10, 200, 30, 0)), "PNG"), [10, 200, 30], id="alpha PNG"),
        pytest.param(encoded(Image.new("LA", (2, 2), (77, 0)), "PNG"), [77, 77, 77], id="grey alpha PNG"),
        pytest.param(palette_with_transparency(), [10, 200, 30], id="palette PNG"),
        pytest.param(animated("PNG"), [10, 200, 30], id="animated PNG"),
        # OpenCV takes channels as BGR.
        pytest.param(encoded_16_bits(".png", [[[0x1234, 0x8000, 0xFF80]]]), [255, 128, 18], id="16-bit PNG"),
        pytest.param(encoded_16_bits(".png", [[[0x1234, 0x8000, 0xFF80, 0]]]), [255, 128, 18], id="16-bit alpha PNG"),
        pytest.param(encoded_16_bits(".png", [[0x80FF]]), [128, 128, 128], id="16-bit grey PNG"),
        pytest.param(encoded_16_bits(".tiff", [[[0x1234, 0x8000, 0xFF80]]]), [255, 128, 18], id="16-bit TIFF"),
        pytest.param(encoded_16_bits(".tiff", [[0x80FF]]), [128, 128, 128], id="16-bit grey TIFF"),
        pytest.param(tiff(), [10, 200, 30], id="TIFF"),
        pytest.param(
            # Two of the four bytes are the value, and the others anything.
            tiff().replace(struct.pack("<HHII", 256, 4, 1, 60), struct.pack("<HHIHH", 256, 3, 1, 60, 0xFFFF)),
            [10, 200, 30],
            id="TIFF of 16-bit sizes",
        ),
        pytest.param(encoded(plain(1, "1"), "TIFF", compression="group4"), [255, 255, 255], id="fax TIFF"),
        pytest.param(palette_with_transparency("TIFF"), [10, 200, 30], id="palette TIFF"),
        pytest.param(encoded(plain((0, 255, 255, 0), "CMYK"), "TIFF"), [255, 0, 0], id="CMYK TIFF"),
        pytest.param(animated("TIFF", compression="tiff_lzw"), [10, 200, 30], id="TIFF of two pages"),
        pytest.param(encoded(plain((10, 200, 30)), "BMP"), [10, 200, 30], id="BMP"),
        pytest.param(encoded(plain(100, "L"), "BMP"), [100, 100, 100], id="grey BMP"),
        pytest.param(
            b"BM" + struct.pack("<IHHIIHHHH", 38, 0, 0, 26, 12, 1, 3, 1, 24) + bytes([30, 200, 10, 0] * 3),
            [10, 200, 30],
            id="BMP of OS/2",
        ),
        pytest.param(encoded(plain((10, 200, 30)), "WEBP", lossless=True), [10, 200, 30], id="WebP"),
        pytest.param(
            encoded(plain((10, 200, 30, 0), "RGBA"), "WEBP", lossless=True, exact=True), [10, 200, 30], id="alpha WebP"
        ),
        pytest.param(animated("WEBP", lossless=True), [10, 200, 30], id="animated WebP"),
        pytest.param(palette_with_transparency("GIF"), [10, 200, 30], id="GIF"),
        pytest.param(animated("GIF"), [10, 200, 30], id="animated GIF"),
        pytest.param(encoded(plain((10, 200, 30)), "AVIF", speed=10), [10, 200, 30], id="AVIF"),
        pytest.param(encoded(plain((10, 200, 30, 9), "RGBA"), "AVIF", speed=10), [10, 200, 30], id="alpha AVIF"),
        pytest.param(animated("AVIF", speed=10), [10, 200, 30], id="animated AVIF"),
        pytest.param(
            encoded_by_opencv(".avif", np.full((16, 16, 3), (1023, 512, 0), np.uint16), cv2.IMWRITE_AVIF_DEPTH, 10),
            [0, 128, 255],
            id="10-bit AVIF",
        ),
    ],
)
def test_decode_gives_8_bit_rgb(data, expected):
    photo = decode(data)
    assert photo.dtype == np.uint8
    assert photo.shape[2] == 3
    # A JPEG is exact to a step or two.
    lossy = data.startswith(b"\xff\xd8") or data[4:8] == b"ftyp"
    np.testing.assert_allclose(photo[0, 0].astype(int), expected, atol=2 if lossy else 0)


def test_decode_keeps_a_palette_apart():
    for file_format in ("PNG", "GIF", "TIFF"):
        assert decode(palette_with_transparency(file_format)).tolist() == [[[10, 200, 30], [250, 20, 40]]]


def test_decode_takes_a_bmp_from_the_top_and_from_the_bottom():
    rows = decode(PHOTOS["BMP"])
    np.testing.assert_array_equal(decode(patched(PHOTOS["BMP"], 22, "<i", -40)), rows[::-1])


def shown(photo):
    """Names the colours of the four corners."""
    corners = photo[[[4], [-4]], [4, -4]].astype(int)
    nearest = [[min(COLORS, key=lambda x: abs(corner - COLORS[x]).sum()) for corner in row] for row in corners]
    return " ".join("".join(row) for row in nearest)


@pytest.mark.parametrize(("orientation", "expected"), ORIENTATIONS)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4", "speed": 10}),
    ],
)
def test_decode_shows_the_photo_upright(file_format, options, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode(encoded(FOUR_COLORS, file_format, exif=exif, **options))
    assert photo.shape == ((16, 32, 3) if orientation <= 4 else (32, 16, 3))
    assert shown(photo) == expected


@pytest.mark.parametrize(("orientation", "expected"), ORIENTATIONS)
def test_decode_shows_a_heic_upright(orientation, expected):
    pytest.importorskip("pillow_heif")
    photo = decode(heic_with(orientation))
    assert photo.shape == ((16, 32, 3) if orientation <= 4 else (32, 16, 3))
    assert shown(photo) == expected


def test_decode_says_what_a_heic_needs(monkeypatch):
    monkeypatch.setattr(image, "pillow_heif", None)
    assert refusal(HEIC) == (
        "expected a photo of another format, got a HEIC, which needs `pip install 'carflavor[heic]'`"
    )


@pytest.mark.parametrize("jpeg", [JPEG, PROGRESSIVE, PREVIEWED], ids=["baseline", "progressive", "with a preview"])
def test_decode_refuses_a_jpeg_cut_off_anywhere(jpeg):
    assert decode(jpeg).shape == (40, 60, 3)
    for length in [*range(2, len(jpeg), 97), len(jpeg) - 2, len(jpeg) - 1]:
        with pytest.raises(ValueError, match=f"^expected a whole JPEG, got {length:,} bytes of one that was cut off$"):
            decode(jpeg[:length])


@pytest.mark.parametrize("name", [name for name in PHOTOS if name != "JPEG"])
def test_decode_refuses_a_photo_cut_off_anywhere(name):
    data = PHOTOS[name]
    assert decode(data).shape == (40, 60, 3)
    for length in [*range(16, 64), *range(64, len(data), 397), len(data) - 2, len(data) - 1]:
        assert refusal(data[:length]) == damaged(name.split()[-1], data[:length])


def test_decode_refuses_a_heic_cut_off_anywhere():
    pytest.importorskip("pillow_heif")
    for length in [*range(16, len(HEIC), 37), len(HEIC) - 1]:
        assert refusal(HEIC[:length]) == damaged("HEIC", HEIC[:length])


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


def test_decode_takes_a_progressive_jpeg_of_as_many_scans_as_any_encoder_writes():
    assert PROGRESSIVE.count(b"\xff\xda") == 10
    assert decode(PROGRESSIVE[:-2] + 90 * LAST_SCAN + b"\xff\xd9").shape == (40, 60, 3)
    message = "expected a JPEG of at most 100 scans, got one of more"
    assert refusal(PROGRESSIVE[:-2] + 91 * LAST_SCAN + b"\xff\xd9") == message
    # Behind a marker that has no length: libjpeg goes on right behind it.
    assert refusal(PROGRESSIVE[:-2] + b"\xff\x02\xff\xff" + 91 * LAST_SCAN + b"\xff\xd9") == message


NO_PHOTO = "expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got {:,} bytes of something else"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "expected the bytes of a photo, got none", id="empty"),
        pytest.param(b"no photo", NO_PHOTO.format(8), id="text"),
        pytest.param(b"<html>404</html>" * 100, NO_PHOTO.format(1600), id="html"),
        pytest.param(b"\0\0\0\x18ftypmp42" + b"\0" * 12, NO_PHOTO.format(24), id="film"),
        pytest.param(b"II+\0\x08\0\0\0", NO_PHOTO.format(8), id="BigTIFF"),
        pytest.param(PNG[:3000], damaged("PNG", PNG[:3000]), id="half a PNG"),
        pytest.param(PNG[:-12], damaged("PNG", PNG[:-12]), id="PNG without end"),
        pytest.param(
            png(50_000, 50_000),
            "expected a photo of at most 200,000,000 pixels, got one of 50,000 x 50,000",
            id="huge PNG",
        ),
        pytest.param(
            jpeg_that_claims(50_000, 40_000),
            "expected a photo of at most 200,000,000 pixels, got one of 50,000 x 40,000",
            id="huge JPEG",
        ),
    ],
)
def test_decode_refuses(data, message):
    assert refusal(data) == message


@pytest.mark.parametrize("extension", [".jp2", ".ras", ".ppm", ".hdr", ".pfm"])
def test_decode_refuses_what_no_camera_writes(extension):
    data = encoded_by_opencv(
        extension, np.zeros((64, 64, 3), np.float32 if extension in (".hdr", ".pfm") else np.uint8)
    )
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (64, 64, 3)
    assert refusal(data) == NO_PHOTO.format(len(data))


@pytest.mark.parametrize("name", [*PHOTOS, "HEIC"])
def test_decode_takes_the_pixels_that_it_is_told(name):
    data, width, height = (heic_with(1), 32, 16) if name == "HEIC" else (PHOTOS[name], 60, 40)
    if name == "HEIC":
        pytest.importorskip("pillow_heif")
    if name == "AVIF":
        message = "expected a photo of another format, got an AVIF, whose header need not tell its size"
        assert refusal(data, max_pixels=image.MAX_PIXELS - 1) == message
        return
    most = width * height * 3 // 2 if "TIFF" in name else width * height
    assert decode(data, max_pixels=most).shape == (height, width, 3)
    assert refusal(data, max_pixels=most - 1) == (
        f"expected a photo of at most {width * height - 1:,} pixels, got one of {width} x {height}"
    )


def test_decode_takes_a_large_png_and_refuses_one_that_goes_on_after_its_pixels():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (600, 700, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in noise)
    data = png(700, 600, pixels=rows)
    assert len(data) > 1_000_000
    np.testing.assert_array_equal(decode(data), noise)
    bomb = png(700, 600, pixels=rows + bytes(50_000_000))
    assert refusal(bomb) == "expected a PNG of 2,522,400 bytes once unpacked, got more"


def test_decode_takes_never_more_than_max_pixels():
    message = "expected a photo of at most 200,000,000 pixels, got one of 20,000 x 10,001"
    assert refusal(png(20_000, 10_001), max_pixels=10**12) == message


@pytest.mark.parametrize(
    ("file_format", "data"),
    [
        pytest.param("JPEG", jpeg_that_claims(0, 40), id="JPEG without columns"),
        pytest.param("JPEG", b"\xff\xd8\xff\xd9", id="JPEG without a picture"),
        pytest.param("PNG", png(0, 40), id="PNG without columns"),
        pytest.param("PNG", png(2_000_000, 1, pixels=b"\0" * 6_000_001), id="PNG wider than libpng reads"),
        pytest.param("GIF", gif(0, 0, 1, 1), id="GIF without a screen"),
        pytest.param("BMP", patched(PHOTOS["BMP"], 18, "<i", -60), id="BMP of negative width"),
        pytest.param("BMP", patched(PHOTOS["BMP"], 18, "<ii", 6000, 4000), id="BMP of fewer bytes than pixels"),
        pytest.param("TIFF", encoded_by_opencv(".tiff", np.zeros((4, 4, 3), np.float32)), id="TIFF of floats"),
        pytest.param("TIFF", tiff((338, 0), (284, 7)), id="TIFF of an unknown order"),
        pytest.param(
            "AVIF", patched(PHOTOS["AVIF"], PHOTOS["AVIF"].index(b"mdat") + 4, "8s", b""), id="AVIF with a hole"
        ),
        # Two sizes in one file.
        pytest.param(
            "JPEG", JPEG[:JPEG_FRAME] + JPEG[JPEG_FRAME : JPEG_FRAME + 19] + JPEG[JPEG_FRAME:], id="two frames"
        ),
        pytest.param("PNG", png(60, 40, png(1, 1)[8:33], pixels=b"\0" * 181 * 40), id="two PNG headers"),
        pytest.param("WebP", patched(PHOTOS["extended WebP"], 24, "6s", b""), id="WebP larger than its canvas"),
        pytest.param("GIF", gif(1, 1, 2, 2), id="GIF larger than its screen"),
        pytest.param("TIFF", tiff((256, 4000)), id="TIFF of a second, larger width"),
    ],
)
def test_decode_refuses_a_damaged_photo(file_format, data):
    assert refusal(data) == damaged(file_format, data)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        # To who takes 0x01 for a segment with a length, it hides the frame from the one behind it.
        pytest.param(
            JPEG[:JPEG_FRAME] + b"\xff\x01\0\x13" + JPEG[JPEG_FRAME:] + jpeg_that_claims(1, 1)[JPEG_FRAME:],
            "60 x 40",
            id="JPEG of a hidden frame",
        ),
        pytest.param(JPEG[:-2] + jpeg_that_claims(1, 1)[JPEG_FRAME:], "60 x 40", id="JPEG of a second frame"),
        pytest.param(tiff((256, 1)), "60 x 40", id="TIFF of a second, smaller width"),
        pytest.param(tiff((256, 4000)), "4,000 x 40", id="TIFF of a second, larger width"),
    ],
)
def test_decode_goes_by_the_size_that_takes_memory(data, size):
    most = "666" if data.startswith(b"II") else "1,000"
    assert refusal(data, max_pixels=1000) == f"expected a photo of at most {most} pixels, got one of {size}"


def test_decode_hands_opencv_what_makes_the_picture_of_a_png(monkeypatch):
    handed, imdecode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: handed.append(data.tobytes()) or imdecode(data, flags))
    exif = png_chunk(b"eXIf", b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 3, 0))
    bomb = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"\0" * 2_000_000))
    rows = b"\0" + bytes([10, 200, 30, 250, 20, 40])
    assert decode(png(2, 1, bomb, exif, png_chunk(b"acTL", bytes(8)), pixels=rows) + bomb).tolist() == [
        [[250, 20, 40], [10, 200, 30]]
    ]
    assert handed == [png(2, 1, exif, pixels=rows)]


@pytest.mark.parametrize("error", [cv2.error("libpng"), MemoryError(), RuntimeError(), OverflowError()], ids=repr)
def test_decode_turns_what_decoders_raise_into_a_refusal(monkeypatch, error):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: raised(error))
    assert refusal(PNG) == damaged("PNG", PNG)


def test_decode_can_be_interrupted(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: raised(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        decode(PNG)


def raised(error):
    raise error


def test_decode_leaves_the_limit_of_pillow_alone(monkeypatch):
    # Over which Pillow warns, and over twice as much refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(PHOTOS["AVIF"]).shape == (40, 60, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_decode_gives_threads_the_same():
    alone = [decode(data) for data in PHOTOS.values()]
    with ThreadPoolExecutor(4) as threads:
        for photo, expected in zip(threads.map(decode, [*PHOTOS.values()] * 4), alone * 4, strict=True):
            np.testing.assert_array_equal(photo, expected)


def test_decode_refuses_by_the_header_what_would_fill_the_memory(tmp_path):
    bombs = {
        "huge.png": png(20_000, 20_000),  # 1.2 GB
        # OpenCV makes room for 4 GB before it looks whether they are there, and for a tile of 1 GB.
        "chunk.png": PNG[:33] + struct.pack(">I4s", 0xFFFF_FF00, b"IEND"),
        "tile.tif": tiff((322, 16_000), (323, 16_000), (324, 8), (325, 20)),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    # In a process of its own: OpenCV takes the limit while it is imported, and memory is counted from the start.
    code = f"""
import resource
from carflavor.image import decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in {list(bombs)}:
    try:
        decode(open({str(tmp_path)!r} + "/" + name, "rb").read())
    except ValueError as error:
        print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)  # kB
"""
    root = Path(carflavor.__file__).parents[1]
    # Without the variable that this process has exported already.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "expected a photo of at most 200,000,000 pixels, got one of 20,000 x 20,000",
        "True",
        damaged("PNG", bombs["chunk.png"]),
        "True",
        "expected a TIFF with tiles of at most 4,096 pixels a side, got larger ones",
        "True",
    ]


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


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "AVIF"])
def test_read_size(file_format):
    data = encoded(NOISE, file_format)
    assert read_size(data) == (60, 40)
    with pytest.raises(ValueError, match="^expected a JPEG, PNG, .* got 8 bytes without the header of one$"):
        read_size(data[:8])


def test_read_size_is_that_of_the_file():
    exif = Image.Exif()
    exif[274] = 6  # shown upright, it is 40 x 60
    assert read_size(encoded(NOISE, "JPEG", exif=exif)) == (60, 40)


def test_read_size_refuses_what_is_no_photo():
    with pytest.raises(ValueError, match="got 8 bytes without the header of one$"):
        read_size(b"no photo")


# --- cut_square


def stripes(width, height):
    """A JPEG whose left half is dark and right half bright."""
    photo = np.full((height, width, 3), 40, np.uint8)
    photo[:, width // 2 :] = 200
    return encode_jpeg(photo)


@pytest.mark.parametrize(
    ("width", "height", "box", "scale"),
    [
        (640, 480, None, 2),
        (640, 447, None, 1),  # half of it would be less than 7/8 of 256
        (640, 448, None, 2),
        (1200, 900, None, 4),
        (4000, 3000, None, 8),
        (1200, 900, (0, 0, 500, 447), 1),  # what is cut out decides
        (1200, 900, (0, 0, 500, 448), 2),
    ],
)
def test_cut_square_decodes_no_more_of_a_jpeg_than_it_needs(monkeypatch, width, height, box, scale):
    shapes, imdecode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: shapes.append((photo := imdecode(*args)).shape) or photo)
    encoded_photo = EncodedPhoto(stripes(width, height))
    square = encoded_photo.cut_square(256, box, margin=16)
    assert shapes == [(-(-height // scale), -(-width // scale), 3)]
    assert square.shape == (256, 256, 3)
    assert encoded_photo.size == (height, width)


def test_cut_square_finds_the_box_in_what_was_decoded():
    """Of 600 columns from 200 to 799 in 1200 are 400 dark; with the margin 416 of 632."""
    jpeg = stripes(1200, 900)
    for margin, dark in ((0, 400 / 600), (16, 416 / 632)):
        square = EncodedPhoto(jpeg).cut_square(128, (200, 100, 800, 800), margin)
        found = (square[64, :, 0] < 120).mean()
        assert abs(found - dark) < 1 / 128


def test_cut_square_gives_nearly_what_the_whole_photo_gives():
    rows, columns = np.mgrid[0:768, 0:1024]
    photo = np.stack([columns / 4, rows / 3, 128 + 100 * np.sin(columns / 40) * np.cos(rows / 30)], -1).astype(np.uint8)
    jpeg = encode_jpeg(photo, 95)
    whole = cv2.resize(decode(jpeg), (256, 256), interpolation=cv2.INTER_AREA).astype(int)
    difference = np.abs(EncodedPhoto(jpeg).cut_square(256).astype(int) - whole)
    assert difference.mean() < 1 and difference.max() <= 6


@pytest.mark.parametrize(("orientation", "is_turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_cut_square_knows_the_size_as_shown(orientation, is_turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = EncodedPhoto(encoded(Image.new("RGB", (640, 480), (9, 90, 9)), "JPEG", exif=exif))
    photo.cut_square(100)
    assert photo.size == ((640, 480) if is_turned else (480, 640))
    # A box that only the upright photo has room for.
    assert photo.cut_square(100, (0, 500, 400, 640) if is_turned else (500, 0, 640, 400)).shape == (100, 100, 3)


def test_cut_square_refuses_a_box_beside_a_reduced_photo():
    with pytest.raises(ValueError, match="inside the photo of 1200 x 900 pixels, got \\(1300, 0, 1900, 800\\)"):
        EncodedPhoto(stripes(1200, 900)).cut_square(64, (1300, 0, 1900, 800))


def test_cut_square_refuses_a_damaged_jpeg():
    jpeg = bytearray(stripes(640, 480))
    jpeg[2:300] = bytes(298)
    with pytest.raises(ValueError, match="expected a whole JPEG"):
        EncodedPhoto(bytes(jpeg)).cut_square(64)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_cut_square_of_other_colours(mode):
    photo = EncodedPhoto(encoded(Image.new("RGB", (640, 480), (90, 90, 90)).convert(mode), "JPEG"))
    assert np.abs(photo.cut_square(64).astype(int) - 90).max() <= 2


# --- squash


def test_squash_takes_means_where_it_halves():
    """Two of four columns, then one of two: the mean of each four."""
    photo = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    assert squash(photo, 4)[0, :, 0].tolist() == [15, 55, 95, 135]


def test_squash_does_not_alias():
    """Columns of black and white in turn are grey from afar; taking every fourth would make them black or white."""
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[:, ::2] = 255
    assert set(squash(photo, 16).ravel().tolist()) == {128}


def test_squash_leaves_no_whole_column_out():
    """Of an odd number the last one goes; every other has its part."""
    for column in range(66):
        photo = np.zeros((67, 67, 3), np.uint8)
        photo[:, column] = 255
        assert squash(photo, 32).max() > 0


def test_is_grey_sees_through_three_channels():
    grey = np.repeat(np.arange(0, 200, 2, dtype=np.uint8).reshape(10, 10, 1), 3, axis=2).repeat(4, 0).repeat(4, 1)
    assert is_grey(grey) is True
    assert is_grey(decode(encoded(Image.fromarray(grey), "JPEG"))) is True
    tinted = grey.copy()
    tinted[30:34, 8:16, 2] += 3
    assert is_grey(tinted) is False
