"""Requests that no server should stumble over: hostile ones, broken ones, and good ones in rare forms.

    python tests/hostile.py http://127.0.0.1:5001 $(pgrep -f carflavor.server)

sends them one after another to a server that runs with the default limits, and prints a table: what is answered, how
long that takes, how much memory the process takes at its peak beyond what it had before, and how long another caller,
who sends one good photo after the other, has to wait at most. `tests/test_hostile.py` says what all of that may be.
"""

import base64
import json
import struct
import sys
import zlib
from contextlib import suppress
from urllib.parse import urlsplit

import cv2
import numpy as np
import test_image as files
from callers import ASLEEP, CLOSED, HANG_UP, UNANSWERED, Case, run_all
from PIL import Image

MEGABYTE = b" " * 1_000_000


def head(length=None, content_type="application/json", method="POST", path="/invocations", version="1.1", more=""):
    """Returns the head of a request; `more` are whole lines of it."""
    lines = f"{method} {path} HTTP/{version}\r\nHost: cars\r\n{more}"
    if content_type is not None:
        lines += f"Content-Type: {content_type}\r\n"
    if length is not None:
        lines += f"Content-Length: {length}\r\n"
    return f"{lines}\r\n".encode("latin-1")


def post(body, **options):
    """Returns a request with a body: bytes, or what JSON can hold."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(body), **options) + body


def get(path, **options):
    return head(path=path, method="GET", content_type=None, **options)


def as_base64(data):
    return base64.b64encode(data).decode()


def photo(data, params=None, **columns):
    """Returns a request with one photo: bytes, or what stands in place of its base64."""
    image = as_base64(data) if isinstance(data, bytes) else data
    body = {"dataframe_records": [{"image": image, **columns}]}
    return post(body if params is None else body | {"params": params})


def boxed(*box):
    return photo(CAR, **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)))


def raw_box(text):
    """Returns a request with a box that json.dumps would not write."""
    return post(f'{{"inputs": [{{"image": "{as_base64(CAR)}", {text}}}]}}'.encode())


def with_params(**params):
    return photo(CAR, params)


def chunked(pieces):
    yield CHUNKED
    for piece in pieces:
        yield b"%x\r\n" % len(piece) + piece + b"\r\n"
    yield b"0\r\n\r\n"


def trickle(start, seconds):
    """Yields the start of a request, and then a byte a second."""
    yield start
    for _ in range(seconds):
        yield ASLEEP
        yield b" "


def endless(start, part):
    """Yields the start of a request, more of a head than is taken and, where no answer comes, 10 million parts."""
    # In pieces that are read as a whole: a connection that ends with something unread is reset, and its answer lost.
    half = part * (40_000 // len(part))
    for piece in (start, half, half):
        yield piece
        yield ASLEEP / 4
    for _ in range(1000):
        yield part * 10_000


def deflated_zeros(size):
    """Returns a zlib stream of so many zeros, a thousandth of them: the same block again and again."""
    packer = zlib.compressobj(9)
    start = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(bytes(size % 10**6)) + packer.flush()
    return start + block * (size // 10**6 - 1) + end[:-4] + struct.pack(">HH", size % 65_521, 1)


def png_of(width, height, packed, depth=8, color=2, *before_pixels):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *before_pixels, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(files.png_chunk(*chunk) for chunk in chunks)


def encoded(extension, pixels, *options):
    return files.encoded_by_opencv(extension, pixels, *options)


def grey(height, width, channels=3, kind=np.uint8):
    return np.full((height, width, channels), 100, kind)


def jpeg_with(*segments):
    """Returns a good JPEG with segments, (marker, content), before its picture."""
    extra = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    return CAR[:2] + extra + CAR[2:]


def jpeg_of_scans(count, size=(60, 40)):
    """Returns a progressive JPEG with so many scans of a size."""
    progressive = files.encoded(Image.new("RGB", size, (90, 120, 60)), "JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    return progressive[:-2] + last * (count - progressive.count(b"\xff\xda")) + b"\xff\xd9"


def cmyk_of(width, height):
    return files.encoded(Image.new("CMYK", (width, height), (90, 120, 60, 30)), "JPEG", progressive=True)


def largest():
    """Returns the photo that takes the most memory while it is decoded."""
    return files.encoded(Image.new("RGB", (5000, 5000), (90, 120, 60)), "JPEG", progressive=True, subsampling=0)


def bmp_of(width, height):
    """Returns a BMP of one bit a pixel."""
    row = (width + 31) // 32 * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, row * height, 0, 0, 2, 2)
    return b"BM" + struct.pack("<IHHI", 62 + row * height, 0, 0, 62) + header + bytes(8) + bytes(row * height)


def animated(file_format, frames, **options):
    pictures = [Image.new("RGB", (64, 64), (index % 256, 0, 90)) for index in range(frames)]
    return files.encoded(pictures[0], file_format, save_all=True, append_images=pictures[1:], **options)


def looping_tiff():
    """Returns a TIFF whose directory names itself as the next one."""
    data = files.tiff()
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    return files.patched(data, directory + 2 + 12 * entries, "<I", directory)


def turned(jpeg_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return files.encoded(files.FOUR_COLORS, jpeg_format, exif=exif)


def nested(depth):
    return f'{{"inputs": [{{"image": {"[" * depth}1{"]" * depth}}}]}}'.encode()


CAR = files.encoded(files.NOISE, "JPEG")
BODY = json.dumps({"dataframe_records": [{"image": as_base64(CAR)}]}).encode()
GOOD = '"error": null'
NO_PHOTO = "row 0: expected a JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC, got "
NO_BASE64 = "row 0: expected a photo in base64, got a text that is no base64"
FORMS = "expected a JSON object with one of dataframe_records, dataframe_split, inputs, instances, got "
TOO_MANY = "row 0: expected a photo of at most {}, got one of "
PIXELS = TOO_MANY.format("25,000,000 pixels")
FEWER_PIXELS = TOO_MANY.format("16,666,666 pixels")
BOX = "row 0: expected a box of four numbers x1, y1, x2, y2, got "
INSIDE = "row 0: expected a box with x1 < x2 and y1 < y2 inside the photo of 60 x 40 pixels, got "
CHUNKED = head(more="Transfer-Encoding: chunked\r\n")
LONG_HEAD = "expected a head of at most 65,536 bytes, got more"
JSON_ONLY = "expected a body with the Content-Type application/json in UTF-8"
NO_PATH = "expected a path that /openapi.json lists, got another one"
NO_METHOD = "expected the method POST for /invocations, got another one"
BAD_HTTP = "Invalid HTTP request received."


NOT_A_PHOTO = {
    "text as a photo": b"no photo",
    "HTML as a photo": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
    "PDF": b"%PDF-1.7\n1 0 obj\n<< /OpenAction << /S /JavaScript /JS (app.alert(1)) >> >>\nendobj",
    "SVG with an external entity": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg/>',
    "EXE": b"MZ\x90\0\x03" + bytes(200),
    "ELF": b"\x7fELF\x02\x01\x01" + bytes(200),
    "ZIP": b"PK\x03\x04" + bytes(26),
    "film": b"\0\0\0\x18ftypmp42" + bytes(12),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "PSD": b"8BPS\0\x01" + bytes(20),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.",
    "NUL bytes as a photo": bytes(1000),
    "BigTIFF": b"II+\0\x08\0\0\0",
}
NOT_BASE64 = {
    "a URL of a cloud's metadata": "http://169.254.169.254/latest/meta-data/iam/",
    "a file: URL": "file:///etc/passwd",
    "a relative path": "../../../../etc/passwd",
    "rubbish": "!!!!",
    "rubbish in between": "abcd!!!!efgh",
    "one character of base64": "A",
    "letters that base64 has not": "Größe",
    "a lone surrogate": "\ud800AAA",
    "NUL characters": "\0\0\0\0",
    "an emoji": "\U0001f697" * 10,
    "base64 in base64's quotes": '"QUJD"',
    "padding in between": "QQ==QQ==",
    "SQL": "'; DROP TABLE photos; --",
    "a format string": "%s%s%s%n{0.__class__}",
    "a template": "{{7*7}}${jndi:ldap://127.0.0.1/a}",
}
NOT_A_TEXT = {
    "null": (None, "null"),
    "an int": (5, "int"),
    "a float": (1.5, "float"),
    "a truth value": (True, "bool"),
    "a list": ([1, 2, 3], "list"),
    "an object": ({"b64": "QUJD"}, "dict"),
    "the text None": ("None", "null"),
    "the text nan": ("nan", "null"),
}
BOXES = {
    "a box of NaN and numbers": ('"x1": NaN, "y1": 1, "x2": 20, "y2": 20', BOX + "[None, 1.0, 20.0, 20.0]"),
    "an infinite box": ('"x1": 0, "y1": 0, "x2": Infinity, "y2": 20', BOX + "[0.0, 0.0, inf, 20.0]"),
    "a box of minus infinity": ('"x1": -Infinity, "y1": 0, "x2": 9, "y2": 20', BOX + "[-inf, 0.0, 9.0, 20.0]"),
    "a box of 1e999": ('"x1": 0, "y1": 0, "x2": 1e999, "y2": 20', BOX + "[0.0, 0.0, inf, 20.0]"),
    "a box of null and numbers": ('"x1": null, "y1": 1, "x2": 20, "y2": 20', BOX + "[None, 1.0, 20.0, 20.0]"),
    "a box of 500 digits": (f'"x1": 0, "y1": 0, "x2": 1{"0" * 500}, "y2": 20', "int too large to convert to float"),
    "a box of texts": ('"x1": "a", "y1": 0, "x2": 9, "y2": 20', "could not convert string to float: 'a'"),
    "a box of lists": ('"x1": [1], "y1": [2], "x2": [30], "y2": [20]', "setting an array element with a sequence"),
    "a box of objects": ('"x1": {}, "y1": 0, "x2": 9, "y2": 20', "must be a string or a real number, not 'dict'"),
    "half a box": ('"x1": 1, "y1": 2', "expected all of x1, y1, x2, y2 or none, got x1, y1"),
}
BOXES_OUTSIDE = {
    "an inverted box": (30, 30, 10, 10),
    "an empty box": (5, 5, 5, 9),
    "a box far away": (1e9, 1e9, 2e9, 2e9),
    "a box of 1e308": (1e308, 0, 1.5e308, 10),
    "a negative box": (-50, -50, -10, -10),
}
GOOD_BOXES = {
    "a box larger than the photo": (-1e308, -1e308, 1e308, 1e308),
    "a box of one pixel": (59, 39, 60, 40),
    "a box of truth values": (False, False, True, True),
    "a box of fractions": (0.5, 0.25, 59.9, 39.1),
}
BAD_PARAMS = {
    "top_k of 0": ({"top_k": 0}, "expected top_k to be a whole number of at least 1, got 0"),
    "top_k as a text": ({"top_k": "many"}, "Can not safely convert `<class 'str'>` to `DataType.long`"),
    "top_k as a fraction": ({"top_k": 1.5}, "Can not safely convert `<class 'float'>` to `DataType.long`"),
    "top_k as a list": ({"top_k": [1, 2]}, "Value must be a scalar for type"),
    "top_k of null": ({"top_k": None}, "expected top_k to be a whole number of at least 1, got None"),
    "min_prob of 1e308": ({"min_prob": 1e308}, "expected min_prob to be a number from 0 to 1, got 1e+308"),
    "min_prob of 500 digits": ({"min_prob": 10**500}, "expected min_prob to be a number from 0 to 1, got 1000"),
    "min_prob of NaN": ({"min_prob": float("nan")}, "expected min_prob to be a number from 0 to 1, got nan"),
    "on_error as an object": ({"on_error": {"$ne": 1}}, "Value must be a scalar for type"),
}
BODIES = {
    "no JSON": (b"{", "got a body that is no JSON: Expecting property name"),
    "an empty body": (b"", "got a body that is no JSON: Expecting value at 0"),
    "JSON that goes on": (b"{} {}", "got a body that is no JSON: Extra data at 3"),
    "JSON of NUL bytes": (bytes(1000), "got a body that is no JSON: Expecting value at 0"),
    "a list as a body": (b"[]", FORMS + "a list"),
    "null as a body": (b"null", FORMS + "null"),
    "a number as a body": (b"1e999", FORMS + "a number"),
    "an object of nothing": (b"{}", FORMS + "none of them"),
    "a prototype": (b'{"__proto__": {"inputs": []}}', FORMS + "none of them"),
    "two forms": (b'{"inputs": [], "instances": []}', FORMS + "inputs and instances"),
    "no rows": (b'{"dataframe_records": []}', "expected at least one photo, got none"),
    "257 rows": (
        lambda: b'{"inputs": [' + b'{"image": "QQ=="},' * 256 + b"{}]}",
        "at most 256 photos in a request, got 257",
    ),
    "10,000 rows": (
        lambda: b'{"inputs": [' + b'{"image": "QQ=="},' * 9999 + b"{}]}",
        "got a body of 20,001 values or more",
    ),
    "10,000 rows without a value": (
        lambda: b'{"dataframe_split": {"columns": [], "data": [' + b"[]," * 9999 + b"[]]}}",
        "expected at most 256 photos in a request, got a body of 20,0",
    ),
    "100,000 columns": (
        lambda: b'{"inputs": [{' + b",".join(b'"%d":1' % number for number in range(100_000)) + b"}]}",
        "got a body of 100,002 values or more",
    ),
    "16,000 columns without a photo": (
        lambda: b'{"inputs": [{' + b",".join(b'"%d":1' % number for number in range(16_000)) + b"}]}",
        "Model is missing inputs ['image'].",
    ),
    "16,000 different columns in 256 rows": (
        lambda: json.dumps({"inputs": [{f"{row}-{column}": 1 for column in range(62)} for row in range(256)]}).encode(),
        "Model is missing inputs ['image'].",
    ),
    "a column with a name of 10 MB": (
        lambda: b'{"inputs": [{"' + b"x" * 10_000_000 + b'": 1}]}',
        "Model is missing inputs ['image'].",
    ),
    "lists nested 100,000 deep": (lambda: b'{"inputs": ' + b"[" * 100_000, "got a body of 100,001 values or more"),
    "lists nested 10,000 deep": (lambda: b"[" * 10_000, "nested a thousand deep"),
    "objects nested 5,000 deep": (lambda: b'{"inputs":' * 5_000, "nested a thousand deep"),
    "a photo nested 900 deep": (nested(900), "row 0: expected a photo, got list"),
    "a number of 5,000 digits": (
        lambda: b'{"inputs": ' + b"9" * 5_000 + b"}",
        "expected numbers of at most 4,300 digits",
    ),
    "a number of 10 MB": (lambda: b'{"inputs": 0.' + b"9" * 10_000_000 + b"}", "expected inputs to be a list of rows"),
    "a parameter of 10 MB": (
        lambda: b'{"inputs": [{"image": "QQ=="}], "params": {"top_k": "' + b"x" * 10_000_000 + b'"}}',
        "Can not safely convert `<class 'str'>` to `DataType.long`",
    ),
    "an unknown parameter with a name of 10 MB": (
        lambda: b'{"inputs": [{"image": "QQ=="}], "params": {"' + b"x" * 10_000_000 + b'": 1}}',
        NO_PHOTO + "1 bytes of something else",
    ),
    "UTF-16": ('{"inputs": []}'.encode("utf-16"), "expected a JSON object in UTF-8, got a body in another encoding"),
    "UTF-32": ('{"inputs": []}'.encode("utf-32-be"), "got a body that is no JSON: Expecting value at 0"),
    "a byte order mark": (b'\xef\xbb\xbf{"inputs": []}', "got a body that is no JSON: Unexpected UTF-8 BOM"),
    "UTF-8 cut in a letter": (b'{"inputs": "\xc3', "expected a JSON object in UTF-8, got a body in another encoding"),
    "surrogates in UTF-8": (b'{"inputs": "\xed\xa0\x80"}', "expected a JSON object in UTF-8"),
    "24 MB of a text with an emoji in it": (
        lambda: b'{"inputs": [{"image": "\\ud83d\\ude97' + b"A" * 23_900_000 + b'"}]}',
        "expected a body of ASCII",
    ),
    "2 MB of umlauts": (lambda: b'{"inputs": "' + "ü".encode() * 1_000_000 + b'"}', "expected a body of ASCII"),
    "columns of two lengths": (b'{"inputs": {"image": ["QQ==", "QQ=="], "x1": [1]}}', "columns of one length"),
    "rows of two lengths": (
        b'{"dataframe_split": {"columns": ["image"], "data": [["QQ=="], ["QQ==", 1]]}}',
        "expected data of dataframe_split to be a list of rows of 1 values each",
    ),
    "a column twice": (
        b'{"dataframe_split": {"columns": ["image", "image"], "data": [["QQ==", "QQ=="]]}}',
        "expected each column once, got image more than once",
    ),
    "bare texts instead of rows": (b'{"instances": ["QQ=="]}', "expected instances to be a list of rows such as"),
    "params as a list": (b'{"inputs": [{"image": "QQ=="}], "params": [1]}', "expected params to be a JSON object"),
    "an empty photo": (b'{"inputs": [{"image": ""}]}', "row 0: expected a photo in base64, got an empty text"),
    "a photo of white space": (
        b'{"inputs": [{"image": "  "}]}',
        "row 0: expected a photo in base64, got an empty text",
    ),
    "a data: URI without base64": (b'{"inputs": [{"image": "data:image/png,AAAA"}]}', "got one in another encoding"),
    "a path in base64's letters": (b'{"inputs": [{"image": "/etc/passwd"}]}', NO_PHOTO + "8 bytes"),
}
BAD_PHOTOS = {
    "a GIF that is JavaScript": (lambda: b"GIF89a/*" + bytes(30) + b"*/=1;alert(1)//", "expected a whole GIF, got 53"),
    "HTML behind a JPEG's first bytes": (
        lambda: b"\xff\xd8\xff\xe0<html></html>",
        "expected a whole JPEG, got 17 bytes",
    ),
    "half a JPEG": (lambda: CAR[: len(CAR) // 2], "of one that was cut off"),
    "half a PNG": (lambda: files.PNG[:3000], "expected a whole PNG, got 3,000 bytes of one that is cut off, damaged"),
    "half a WebP": (lambda: files.PHOTOS["WebP"][:300], "expected a whole WebP, got 300 bytes"),
    "half a TIFF": (lambda: files.PHOTOS["TIFF"][:3000], "expected a whole TIFF, got 3,000 bytes"),
    "half a GIF": (lambda: files.PHOTOS["GIF"][:900], "expected a whole GIF, got 900 bytes"),
    "half a HEIC": (lambda: files.HEIC[:300], "expected a whole HEIC, got 300 bytes"),
    "an AVIF": (lambda: files.PHOTOS["AVIF"], "got an AVIF, whose header need not tell its size"),
    "a TIFF of a camera's raw data": (
        lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(50),
        "expected a whole TIFF, got 62 bytes",
    ),
    "a PNG of 50,000 x 50,000": (lambda: files.png(50_000, 50_000), PIXELS + "50,000 x 50,000"),
    "a PNG of 4,294,967,295 x 1": (lambda: files.png(2**32 - 1, 1), PIXELS + "4,294,967,295 x 1"),
    "a JPEG of 65,500 x 65,500": (lambda: files.jpeg_that_claims(65_500, 65_500), PIXELS + "65,500 x 65,500"),
    "a GIF of 65,535 x 65,535": (lambda: files.gif(65_535, 65_535, 1, 1), PIXELS + "65,535 x 65,535"),
    "a WebP of 16,777,216 x 256": (
        lambda: files.patched(files.PHOTOS["extended WebP"], 24, "6s", b"\xff\xff\xff\xff\0\0"),
        PIXELS + "16,777,216 x 256",
    ),
    "a lossless WebP of 16,384 x 16,384": (
        lambda: files.patched(files.PHOTOS["lossless WebP"], 21, "<I", 0x0FFFFFFF),
        PIXELS + "16,384 x 16,384",
    ),
    "a BMP of 2,147,483,647 x 1": (
        lambda: files.patched(files.PHOTOS["BMP"], 18, "<ii", 2**31 - 1, 1),
        PIXELS + "2,147,483,647 x 1",
    ),
    "a TIFF of 50,000 x 50,000": (lambda: files.tiff((256, 50_000), (257, 50_000)), FEWER_PIXELS + "50,000 x 50,000"),
    "a TIFF of a giant tile": (
        lambda: files.tiff((322, 16_000), (323, 16_000), (324, 8), (325, 20)),
        "expected a TIFF with tiles of at most 4,096 pixels a side, got larger ones",
    ),
    "a CMYK JPEG of 25 megapixels": (lambda: cmyk_of(5000, 5000), FEWER_PIXELS + "5,000 x 5,000"),
    "an animated WebP of 25 megapixels": (
        lambda: files.encoded(
            Image.new("RGB", (5000, 5000)), "WEBP", save_all=True, append_images=[Image.new("RGB", (5000, 5000), 9)]
        ),
        FEWER_PIXELS + "5,000 x 5,000",
    ),
    "a JPEG of 25 megapixels, 21 scans": (
        lambda: jpeg_of_scans(21, (5000, 5000)),
        "expected a JPEG of at most 20 scans, got one of more",
    ),
    "a JPEG of 1,000 scans": (lambda: jpeg_of_scans(1000), "expected a JPEG of at most 100 scans, got one of more"),
    "a PNG of 12 GB in 12 MB": (
        lambda: png_of(3000, 3000, deflated_zeros(11_900_000_000)),
        "expected a PNG of 54,012,000 bytes once unpacked, got more",
    ),
    "a PNG chunk of 4 GB": (
        lambda: files.PNG[:33] + struct.pack(">I4s", 0xFFFF_FF00, b"IEND"),
        "expected a whole PNG, got 41 bytes",
    ),
    "1.3 million empty PNG chunks": (
        lambda: files.PNG[:33] + files.png_chunk(b"IDAT") * 1_300_000,
        "expected a whole PNG, got 15,600,033 bytes",
    ),
    "4 million empty JPEG segments": (
        lambda: CAR[:2] + b"\xff\xe1\0\2" * 3_900_000,
        "expected a JPEG of at most 10,000 segments, got one of more",
    ),
    "more bytes than a photo may have": (
        lambda: CAR + bytes(17_000_000),
        "expected a photo of at most 16,000,000 bytes",
    ),
}
GOOD_PHOTOS = {
    "greyscale": lambda: files.encoded(Image.new("L", (60, 40), 100), "JPEG"),
    "CMYK": lambda: files.encoded(Image.new("CMYK", (60, 40), (0, 255, 255, 0)), "JPEG"),
    "YCCK": lambda: files.ycck_jpeg((76, 84, 255, 0)),
    "a 16-bit PNG": lambda: encoded(".png", grey(40, 60, kind=np.uint16)),
    "a PNG with alpha": lambda: encoded(".png", grey(40, 60, 4)),
    "a PNG with a palette": files.palette_with_transparency,
    "a PNG of one bit": lambda: files.encoded(Image.new("1", (60, 40), 1), "PNG"),
    "a BMP": lambda: files.PHOTOS["BMP"],
    "a TIFF of two pages": lambda: files.animated("TIFF", compression="tiff_lzw"),
    "a 16-bit TIFF": lambda: encoded(".tiff", grey(40, 60, kind=np.uint16)),
    "a fax": lambda: files.encoded(Image.new("1", (60, 40), 1), "TIFF", compression="group4"),
    "a lossless WebP": lambda: files.PHOTOS["lossless WebP"],
    "an MPO": lambda: files.animated("MPO"),
    "a HEIC": lambda: files.HEIC,
    "one pixel": lambda: encoded(".png", grey(1, 1)),
    "1 x 20,000 pixels": lambda: encoded(".jpg", grey(20_000, 1)),
    "20,000 x 1 pixels": lambda: encoded(".png", grey(1, 20_000)),
    "a BMP of 1,000,000 x 24": lambda: bmp_of(1_000_000, 24),
    "a JPEG that is turned": lambda: turned("JPEG", 6),
    "a TIFF that is turned": lambda: turned("TIFF", 8),
    "an animated GIF of 500 frames": lambda: animated("GIF", 500),
    "an animated WebP of 500 frames": lambda: animated("WEBP", 500, lossless=True, method=0),
    "an animated PNG of 500 frames": lambda: animated("PNG", 500),
    "a JPEG with a ZIP behind it": lambda: CAR + b"PK\x03\x04" + bytes(26) + b"PK\5\6" + bytes(18),
    "a PNG with a JPEG behind it": lambda: files.PNG + CAR,
    "a JPEG with PHP in its comment": lambda: jpeg_with((0xFE, b"<?php system($_GET['c']); ?>")),
    "a JPEG with 12 MB of EXIF": lambda: jpeg_with(*[(0xE1, b"Exif\0\0MM\0*" + bytes(65_000))] * 180),
    "a JPEG with EXIF that names itself": lambda: jpeg_with(
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x69\x87\4\0\1\0\0\0\x08\0\0\0" * 5000)
    ),
    "a TIFF whose directory names itself": looping_tiff,
    "a zTXt bomb of 10 GB": lambda: png_of(
        2, 1, zlib.compress(bytes(7)), 8, 2, (b"zTXt", b"x\0\0" + deflated_zeros(10**10))
    ),
    "an iCCP bomb of 10 GB": lambda: png_of(
        2, 1, zlib.compress(bytes(7)), 8, 2, (b"iCCP", b"x\0\0" + deflated_zeros(10**10))
    ),
    "a PNG that goes on for 900 MB": lambda: png_of(100, 100, deflated_zeros(900_000_000)),
    "a JPEG of 25 megapixels": lambda: encoded(".jpg", grey(5000, 5000)),
    "a JPEG of 25 megapixels, 20 scans": lambda: jpeg_of_scans(20, (5000, 5000)),
    "a JPEG of 5 megapixels, 100 scans": lambda: jpeg_of_scans(100, (2500, 2000)),
    "a CMYK JPEG of 16 megapixels, 18 scans": lambda: cmyk_of(4080, 4080),
    "a progressive JPEG of 25 megapixels in 16 MB": lambda: largest().ljust(15_900_000, b"\0"),
    "a PNG of 25 megapixels": lambda: png_of(5000, 5000, deflated_zeros(5000 * 15_001)),
    "a 16-bit PNG with alpha of 25 megapixels": lambda: png_of(5000, 5000, deflated_zeros(5000 * 40_001), 16, 6),
    "a WebP of 25 megapixels": lambda: encoded(".webp", grey(5000, 5000), cv2.IMWRITE_WEBP_QUALITY, 1),
    "a lossless WebP of 25 megapixels": lambda: encoded(".webp", grey(5000, 5000), cv2.IMWRITE_WEBP_QUALITY, 101),
    "a BMP of 25 megapixels": lambda: bmp_of(5000, 5000),
    "a GIF of 25 megapixels": lambda: files.encoded(Image.new("P", (5000, 5000)), "GIF"),
    "a TIFF of 16 megapixels": lambda: encoded(".tiff", grey(4000, 4160)),
    "a TIFF of 16 megapixels in one strip": lambda: files.encoded(
        Image.new("RGB", (4000, 4160)), "TIFF", compression="tiff_adobe_deflate", strip_size=2**30
    ),
    "a 16-bit TIFF of 16 megapixels": lambda: encoded(".tiff", grey(4000, 4160, 4, np.uint16)),
}
GOOD_TEXTS = {
    "base64 without padding": lambda text: text.rstrip("="),
    "url-safe base64": lambda text: text.replace("+", "-").replace("/", "_"),
    "base64 in lines": lambda text: "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76)),
    "base64 with white space around": lambda text: f" \t\n{text}\n ",
    "a data: URI": lambda text: f"data:image/jpeg;base64,{text}",
    "a data: URI of another type": lambda text: f"DATA:text/html;charset=utf-8;BASE64,{text}",
    "base64 with too much padding": lambda text: text + "==",
}
PATHS = {
    "a wrong path": ("/nothing", 404, NO_PATH),
    "a slash too many": ("//invocations", 404, NO_PATH),
    "a slash at the end": ("/invocations/", 404, NO_PATH),
    "a path in capitals": ("/INVOCATIONS", 404, NO_PATH),
    "a path that climbs": ("/../../../../etc/passwd", 404, NO_PATH),
    "a path that climbs in percents": ("/%2e%2e/%2e%2e/etc/passwd", 404, NO_PATH),
    "a path with a dot": ("/./invocations", 404, NO_PATH),
    "a path with a line break": ("/invocations%0A", 404, NO_PATH),
    "a path with NUL": ("/invocations%00", 404, NO_PATH),
    "another route's path": ("/ping", 405, "expected the method GET or HEAD for /ping"),
    "a path that is no ASCII": ("/ü", 400, BAD_HTTP),
    "a path of 60,000 characters": ("/" + "x" * 60_000, 404, NO_PATH),
    "a path with a query": ("/invocations?x=1&x=%ff", 200, GOOD),
    "a path in percents": ("/%69nvocations", 200, GOOD),
    "a whole URL": ("http://cars/invocations", 200, GOOD),
    "the URL of another server": ("http://169.254.169.254/invocations", 200, GOOD),
}
METHODS = {
    "GET": (405, NO_METHOD),
    "PUT": (405, NO_METHOD),
    "DELETE": (405, NO_METHOD),
    "PATCH": (405, NO_METHOD),
    "OPTIONS": (405, NO_METHOD),
    "TRACE": (405, NO_METHOD),
    "PROPFIND": (405, NO_METHOD),
    "post": (400, BAD_HTTP),
    "HACK": (400, BAD_HTTP),
}
TYPES = {
    "CSV": {"content_type": "text/csv"},
    "Parquet": {"content_type": "application/vnd.apache.parquet"},
    "a form": {"content_type": "application/x-www-form-urlencoded"},
    "a file upload": {"content_type": "multipart/form-data; boundary=x"},
    "no Content-Type": {"content_type": None},
    "JSON in Latin-1": {"content_type": "application/json; charset=latin-1"},
    "a Content-Type of bytes": {"content_type": "application/json\xff"},
}
BAD_LINES = {
    "a Content-Length of -1": "Content-Length: -1\r\n",
    "a Content-Length of letters": "Content-Length: abc\r\n",
    "a Content-Length of 30 digits": f"Content-Length: {10**29}\r\n",
    "two Content-Lengths": "Content-Length: 5\r\nContent-Length: 6\r\n",
    "a length and chunks": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "chunks that are not the last coding": "Transfer-Encoding: chunked, gzip\r\n",
    "a header without a colon": "Nonsense\r\n",
    "a header with a space before the colon": "X-Y : z\r\n",
    "a header with NUL": "X-Y: \0\r\n",
    "a header that is folded": "X-Y: a\r\n b\r\n",
}
GOOD_LINES = {
    "a request id that would be a header": "X-Request-ID: a%0d%0aSet-Cookie:%20a=b\r\n",
    "a request id of 10,000 characters": f"X-Request-ID: {'x' * 10_000}\r\n",
    "a request id of bytes": "X-Request-ID: \xff\xfe\r\n",
    "two request ids": "X-Request-ID: a\r\nX-Request-ID: b\r\n",
    "Expect: 100-continue": "Expect: 100-continue\r\n",
    "headers of a proxy": "X-Forwarded-For: 127.0.0.1\r\nX-Original-URL: /admin\r\nForwarded: for=x\r\n",
    "ranges": f"Range: bytes={','.join('0-' for _ in range(1000))}\r\n",
}
NO_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: cars\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "Redis": b"*1\r\n$8\r\nFLUSHALL\r\n",
    "NUL bytes for a request": bytes(1000),
}


def _good(text_of):
    return lambda: photo(text_of(as_base64(CAR)))


def _from(value):
    return value() if callable(value) else value


def _bare_head(lines):
    return lambda: head(None, more=lines) + b"{}"


def _pairs():
    """Returns 24 MB of base64 of a good photo, white space after each two characters."""
    text = as_base64(CAR + bytes(11_900_000))
    return photo(" ".join(text[start : start + 2] for start in range(0, len(text), 2)))


def _rows_of(form, *rows, **more):
    """Returns a request with rows that are photos in base64: in columns where the form is `columns`."""
    if form == "columns":
        return post({"inputs": {"image": rows}, **more})
    return post({form: [{"image": row} for row in rows], **more})


def _one_long_row(form):
    return lambda: _rows_of(form, as_base64(CAR + bytes(15_000_000)), *[as_base64(CAR)] * 255)


def _upgrade(request_head, protocol):
    return request_head[:-2] + f"Connection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode()


WITNESSED = Case("another caller's photo", lambda: post(BODY), 200, GOOD)
CASES = [
    *(Case(name, lambda data=data: photo(data), 400, NO_PHOTO) for name, data in NOT_A_PHOTO.items()),
    *(Case(name, lambda text=text: photo(text), 400, NO_BASE64) for name, text in NOT_BASE64.items()),
    *(
        Case(f"{name} as a photo", lambda value=value: photo(value), 400, f"row 0: expected a photo, got {kind}")
        for name, (value, kind) in NOT_A_TEXT.items()
    ),
    *(Case(name, lambda build=build: photo(build()), 400, text) for name, (build, text) in BAD_PHOTOS.items()),
    *(Case(name, lambda build=build: photo(build()), 200, GOOD, cheap=False) for name, build in GOOD_PHOTOS.items()),
    *(Case(name, _good(text_of), 200, GOOD) for name, text_of in GOOD_TEXTS.items()),
    *(Case(name, lambda text=text: raw_box(text), 400, message) for name, (text, message) in BOXES.items()),
    *(Case(name, lambda box=box: boxed(*box), 400, INSIDE) for name, box in BOXES_OUTSIDE.items()),
    *(Case(name, lambda box=box: boxed(*box), 200, GOOD) for name, box in GOOD_BOXES.items()),
    Case("a box of NaN", lambda: raw_box('"x1": NaN, "y1": NaN, "x2": NaN, "y2": NaN'), 200, GOOD),
    *(Case(name, lambda params=params: photo(CAR, params), 400, text) for name, (params, text) in BAD_PARAMS.items()),
    Case("an unknown parameter", lambda: with_params(tok_k=5, __class__="x"), 200, GOOD),
    Case("top_k of 500 digits", lambda: with_params(top_k=10**500), 200, GOOD),
    Case(
        "a bad photo that is reported", lambda: photo("!", {"on_error": "report"}), 200, '"error": "expected a photo in'
    ),
    *(Case(name, lambda body=body: post(_from(body)), 400, text) for name, (body, text) in BODIES.items()),
    Case("a body in keys that are there twice", lambda: raw_box('"image": "!"'), 400, NO_BASE64),
    Case("a column that is not known", lambda: photo(CAR, image2=[[[{}]]]), 200, GOOD),
    Case("a request to a language model", lambda: post(BODY[:-1] + b', "messages": [], "prompt": ""}'), 200, GOOD),
    Case("24 MB of white space", lambda: post(b" " * 23_999_900), 400, "got a body that is no JSON: Expecting value"),
    Case(
        "24 MB of escapes", lambda: post(b'{"inputs": "' + b"\\n" * 11_999_000 + b'"}'), 400, "a list of rows such as"
    ),
    Case("24 MB of base64 in pairs", _pairs, 200, GOOD),
    Case("24 MB that are a good photo", lambda: photo(CAR + bytes(15_900_000)), 200, GOOD),
    *(
        Case(f"one long row of 256 in {form}", _one_long_row(form), 200, GOOD)
        for form in ("columns", "inputs", "instances", "dataframe_records")
    ),
    Case(
        "two photos of 25 megapixels in 16 MB",
        lambda: _rows_of("inputs", as_base64(largest().ljust(8_000_000, b"\0")), as_base64(largest().ljust(8_000_000))),
        200,
        GOOD,
    ),
    Case(
        "16 photos of 25 megapixels",
        lambda: _rows_of("inputs", *[as_base64(largest())] * 16),
        200,
        GOOD,
    ),
    Case("100 MB, declared", lambda: (head(100_000_000), *[MEGABYTE] * 100), 413, "at most 24,000,000 bytes, got more"),
    Case("100 MB in chunks", lambda: chunked([MEGABYTE] * 100), 413, "at most 24,000,000 bytes, got more"),
    Case(
        "a million chunks of a byte",
        lambda: CHUNKED + b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n",
        400,
        "got a body that is no JSON: Expecting value",
    ),
    *(Case(f"a body: {name}", lambda o=o: post(b"image\nQQ==\n", **o), 415, JSON_ONLY) for name, o in TYPES.items()),
    *(
        Case(
            f"a body in {coding}",
            lambda coding=coding: post(zlib.compress(bytes(10_000_000)), more=f"Content-Encoding: {coding}\r\n"),
            415,
            "expected a body without Content-Encoding",
        )
        for coding in ("gzip", "br", "identity, gzip")
    ),
    *(
        Case(name, lambda path=path: head(len(BODY), path=path) + BODY, status, text)
        for name, (path, status, text) in PATHS.items()
    ),
    *(Case(f"the method {name}", lambda name=name: head(0, method=name), *answer) for name, answer in METHODS.items()),
    *(Case(name, _bare_head(lines), 400, BAD_HTTP) for name, lines in BAD_LINES.items()),
    *(
        Case(name, lambda lines=lines: head(len(BODY), more=lines) + BODY, 200, GOOD)
        for name, lines in GOOD_LINES.items()
    ),
    *(Case(f"{name} instead of HTTP", lambda data=data: data, 400, BAD_HTTP) for name, data in NO_HTTP.items()),
    Case("HTTP/1.0", lambda: head(len(BODY), version="1.0") + BODY, 200, GOOD),
    Case("HTTP/0.9", lambda: b"GET /\r\n\r\n", 404, NO_PATH),
    Case("a chunk of a negative length", lambda: CHUNKED + b"-5\r\n", 400, ""),
    Case("a chunk of 2^80 bytes", lambda: CHUNKED + b"f" * 20 + b"\r\n", 400, ""),
    Case("a websocket", lambda: _upgrade(get("/invocations"), "websocket"), 405, NO_METHOD),
    Case("a photo with HTTP/2 by upgrade", lambda: _upgrade(head(len(BODY)), "h2c") + BODY, 200, GOOD),
    Case("pages of MLflow's own", lambda: get("/docs"), 404, NO_PATH),
    Case("a path that would be redirected", lambda: get("/ping/"), 404, NO_PATH),
    Case("HTTP/2 by upgrade", lambda: _upgrade(get("/ping"), "h2c"), 200, "\n"),
    Case("a tunnel", lambda: b"CONNECT cars:443 HTTP/1.1\r\nHost: cars\r\n\r\n", 400, ""),
    Case("a path of 100 MB", lambda: endless(b"POST /", b"x" * 10), 400, LONG_HEAD),
    Case("a header of 100 MB", lambda: endless(head()[:-2] + b"X-Y: ", b"x" * 10), 400, LONG_HEAD),
    Case("10 million headers", lambda: endless(head()[:-2], b"X-Y: z\r\n"), 400, LONG_HEAD),
    Case("10 million trailers", lambda: endless(CHUNKED + b"0\r\n", b"X-Y: z\r\n"), 400, LONG_HEAD),
    Case("a chunk with 100 MB of extensions", lambda: endless(CHUNKED + b"1;x=", b"x" * 10), 400, LONG_HEAD),
    Case("three requests at once", lambda: post(b"{}") + photo("!") + photo(CAR), 200, GOOD, answers=3),
    Case("2,000 requests at once", lambda: post(b"{}") * 2_000, 400, FORMS, answers=2_000, cheap=False),
    Case("gone before the request", lambda: [HANG_UP], CLOSED, ""),
    Case("gone in the head", lambda: [head(9)[:40], HANG_UP], CLOSED, ""),
    Case("gone in the body", lambda: [photo(CAR)[:-50], HANG_UP], CLOSED, ""),
    Case("gone before the answer", lambda: [photo(CAR), HANG_UP], CLOSED, ""),
    Case("a slow body", lambda: trickle(head(1000), 45), 408, "expected the whole body within 30 s", slow=True),
    Case("a slow head", lambda: trickle(head(1000)[:-2] + b"X-Y: ", 60), CLOSED, "", slow=True),
    Case(
        "a slow trailer",
        lambda: trickle(CHUNKED + b"0\r\nX: ", 60),
        408,
        "expected the whole body within 30 s",
        slow=True,
    ),
    Case("no request at all", lambda: trickle(b"", 0), CLOSED, "", slow=True),
]


def _shorten(message):
    with suppress(ValueError, KeyError):
        first, *others = json.loads(message)["predictions"]
        return f"{first['label'] or first['error']}{f', and {len(others)} more' if others else ''}"
    return message.removeprefix("1 of 1 photos cannot be scored (rows count from 0): ")[:130]


def main(url, pid):
    parts = urlsplit(url)
    print("| sent | status | answer | seconds | extra memory, MB | longest wait of another, s |")
    print("|---|---|---|---|---|---|")
    for case, outcome, extra, wait in run_all(CASES, WITNESSED, (parts.hostname, parts.port), int(pid)):
        known = "" if outcome.status == case.status and case.message in outcome.message else " **unexpected**"
        answer = json.dumps(_shorten(outcome.message), ensure_ascii=False)[1:-1].replace("|", "\\|")
        status = {CLOSED: "closed", UNANSWERED: "none"}.get(outcome.status, outcome.status)
        print(
            f"| {case.name} | {status}{known} | {answer} | {outcome.seconds:.2f} | {extra / 1e6:.0f} | {wait:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
