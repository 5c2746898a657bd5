"""Arbitrary and mutated input to all that answers strangers: an answer comes out, or a refusal in a sentence.

    CARFLAVOR_FUZZ_SECONDS=150 pytest tests/test_fuzz.py -s

gives each test so many seconds of examples that nobody saw before. Without it they are few and always the same.
"""

import asyncio
import base64
import json
import os
import time
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import test_image as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

import carflavor
from carflavor import image
from carflavor.image import decode
from carflavor.scoring import PyfuncModel, decode_base64
from carflavor.server import ScoringApp, ServerLimits
from carflavor.serving.bodies import FORMS, Body, check_body

SECONDS = float(os.environ.get("CARFLAVOR_FUZZ_SECONDS", "0"))
SETTINGS = settings(
    max_examples=1000 if SECONDS else 150,
    derandomize=not SECONDS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PHOTOS = {
    **files.PHOTOS,
    "progressive": files.PROGRESSIVE,
    "previewed": files.PREVIEWED,
    "HEIC": files.HEIC,
    "animated GIF": files.animated("GIF"),
    "animated WebP": files.animated("WEBP"),
    "palette": files.palette_with_transparency(),
    "16 bits": files.encoded_16_bits(".png", [[[1, 2, 3, 4]]]),
    "fax": files.encoded(files.plain(1, "1"), "TIFF", compression="group4"),
    "CMYK": files.encoded(files.plain((0, 255, 255, 0), "CMYK"), "JPEG"),
}
TEXTS = [base64.b64encode(data).decode() for data in (files.JPEG, files.PNG, files.JPEG[:500], b"no photo")]


def fuzz(strategy, check):
    """Calls a function with examples until one fails or time is over."""
    count, end = 0, time.monotonic() + SECONDS

    @SETTINGS
    @given(strategy)
    def check_one(example):
        nonlocal count
        count += 1
        check(example)

    while True:
        check_one()
        if time.monotonic() >= end:
            break
    print(f"\n{count:,} examples")


numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 30, 2**53 + 1, 2**63, 10**400, -(10**400), 1e308])
scalars = st.none() | st.booleans() | numbers | st.text() | st.sampled_from([*TEXTS, "None", "nan"])
names = st.sampled_from(["image", "x1", "y1", "x2", "y2", "columns", "data", "index", "params"]) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)
forms = st.sampled_from(FORMS)
params = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 5) | values,
        "min_prob": st.floats(0, 1) | values,
        "on_error": st.sampled_from(["raise", "report"]) | values,
        "tok_p": values,
    },
)
images = st.sampled_from(TEXTS) | values
boxes = st.fixed_dictionaries({name: numbers for name in ("x1", "y1", "x2", "y2")})
rows = st.one_of(
    st.fixed_dictionaries({"image": images}),
    st.builds(lambda image, box: {"image": image} | box, images, boxes),
    st.dictionaries(names, values, max_size=6),
)


@st.composite
def mutated(draw, seeds):
    """Bytes of a file, some of them replaced, cut out or repeated."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 4, 8, 100, 10_000])))
        # Numbers of 2 or 4 bytes in either order where a file has its sizes and lengths, or anything.
        number = st.sampled_from([0, 1, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF])
        data[start:end] = draw(
            st.binary(max_size=8)
            | st.builds(lambda n, size, order: n.to_bytes(size, order), number, st.sampled_from([2, 4]), orders)
            | st.just(bytes(data[start:end] * 2))
        )
    return bytes(data)


orders = st.sampled_from(["little", "big"])


@pytest.fixture(scope="module")
def pyfunc(openvino_model):
    return PyfuncModel(carflavor.load_model(openvino_model))


@pytest.fixture(scope="module")
def app(openvino_model):
    return ScoringApp(openvino_model, ServerLimits(rows=8))


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


def test_check_body_refuses_by_a_value_error():
    bodies = st.dictionaries(forms | names, values, max_size=3).map(json.dumps).map(str.encode)

    def check(body):
        try:
            checked = check_body(body, 4)
        except ValueError as error:
            assert str(error).startswith("expected ") and len(str(error)) < 400
        else:
            assert 1 <= checked.rows <= 4
            photo, box = checked.single_photo()
            assert photo is None or type(photo) is str
            assert box is None or [type(value) for value in box] == [float] * 4

    fuzz(
        bodies | values.map(json.dumps).map(str.encode) | st.binary() | mutated([b'{"inputs": [{"image": "QQ=="}]}']),
        check,
    )


def test_pyfunc_refuses_by_an_invalid_parameter_value(pyfunc):
    def check(example):
        frame, params = example
        try:
            answer = pyfunc.predict(frame, params)
        except MlflowException as error:
            assert error.error_code == "INVALID_PARAMETER_VALUE"
        else:
            assert len(answer) == len(frame)

    frames = st.lists(rows, max_size=4).map(lambda rows: pd.DataFrame(rows, dtype=object))
    fuzz(st.tuples(frames, params | st.none()), check)


def test_decode_gives_a_photo_or_a_value_error():
    def check(data):
        # An AVIF is taken with the largest limit only.
        limit = image.MAX_PIXELS if b"ftypavi" in data[:16] else 1_000_000
        try:
            photo = decode(data, limit)
        except ValueError as error:
            assert str(error).startswith("expected ")
        else:
            assert (photo.dtype, photo.ndim, photo.shape[2]) == (np.uint8, 3, 3)

    fuzz(mutated(list(PHOTOS.values())) | st.binary(), check)


def test_decode_base64_takes_all_forms_of_what_was_encoded():
    @st.composite
    def encoded(draw):
        data = draw(st.binary(min_size=1))
        text = draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))(data).decode()
        if draw(st.booleans()):
            text = text.rstrip("=")
        for space in draw(st.lists(st.sampled_from([" ", "\t", "\r\n", "\n", "\f\v"]), max_size=4)):
            position = draw(st.integers(0, len(text)))
            text = text[:position] + space + text[position:]
        return data, draw(st.sampled_from(["", " ", "data:;base64,", "DATA:image/jpeg;charset=x;Base64,"])) + text

    def check(example):
        data, text = example
        assert decode_base64(text) == data

    fuzz(encoded(), check)


def test_decode_base64_gives_bytes_or_a_value_error():
    def check(text):
        try:
            assert type(decode_base64(text)) is bytes
        except ValueError as error:
            assert str(error).startswith("expected a ")

    letters = st.text(st.sampled_from("AQgwZz09+/-_= \n,:;data\0é\ud800"))
    fuzz(st.text() | letters | letters.map("data:;base64,".__add__), check)


@st.composite
def requests(draw):
    """Requests with one row in each form, many of them good."""
    form, row = draw(forms), draw(rows)
    content = [row]
    if form == "dataframe_split":
        content = {"columns": list(row), "data": [list(row.values())]}
        if draw(st.booleans()):
            content |= draw(st.dictionaries(names, values, max_size=1))
    elif form == "inputs" and draw(st.booleans()):
        content = {name: [value] for name, value in row.items()}
    request = {form: content}
    if draw(st.booleans()):
        request["params"] = draw(params)
    if not draw(st.integers(0, 9)):
        request |= draw(st.dictionaries(st.sampled_from(["messages", "prompt", "input", "x"]), values, max_size=1))
    return json.dumps(request).encode()


def test_one_photo_is_answered_as_mlflow_answers_it(app, runner):
    """The direct way of `_score_one` and the way through `scoring_server.invocations`, byte for byte."""

    async def ask(body):
        sent = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        await app({"type": "http", "method": "POST", "path": "/invocations", "headers": headers}, receive, send)
        return sent[0]["status"], sent[1]["body"]

    def check(body):
        answer = runner.run(ask(body))
        with mock.patch.object(Body, "single_photo", lambda self: (None, None)):
            assert runner.run(ask(body)) == answer
        assert answer[0] in (200, 400)
        assert answer[0] == 200 or len(json.loads(answer[1])["message"]) <= 1500

    fuzz(requests(), check)
