"""The model that people call: photos in, a DataFrame of labels and probabilities out."""

import base64
import binascii
import collections
import contextlib
import contextvars
import numbers
import os
import string
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from carflavor import image
from carflavor.limits import Limits, count_cores

# Photos that go through the network together: enough to fill the cores, little memory.
BATCH_SIZE = 32
BOX_COLUMNS = ["x1", "y1", "x2", "y2"]
UNKNOWN = "unknown"
ON_ERROR = ("raise", "report")
# `time.monotonic()` after which nobody waits for an answer any more: what is asked for in this context ends then.
DEADLINE = contextvars.ContextVar("deadline", default=float("inf"))
_WHITE_SPACE = string.whitespace.encode()
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_ROWS_NAMED = 10  # in one error message
# Pixels of photos that are decoded at once. One of 25 million, the largest that is taken by default, needs 230 MB until
# it is a square: four need a third of the 3 GB that a worker of the server has, however many cores there are.
_ROOM = 100_000_000
_SMALL_PHOTO = 4_000_000  # pixels


class CarClassifier:
    """A trained network with all that it needs to answer for a photo.

    Args:
        engine: Callable from uint8 RGB photos `(batch, input_size, input_size, 3)` to float32 probabilities
            `(batch, C)`, with the attribute `input_size`.
        class_names: List of C names in the order of the probabilities.
        crop_margin: Pixels that a box is widened by on each side, as in training.
        image_size: Side in pixels that preprocessing stored photos at. A photo is squashed to it first and then to the
            network's size, so that it reaches the network as a photo of a record file does.
        limits: `carflavor.limits.Limits` of photos; None for the defaults.
        manifest: Dict of what the model directory says of itself; None where there is no directory.
        threads: Threads that decode; None for one a core.

    Attributes:
        decoders: Executor that photos are decoded in.
    """

    def __init__(self, engine, class_names, crop_margin, image_size, limits=None, manifest=None, threads=None):
        self.engine = engine
        self.class_names = class_names
        self.crop_margin = crop_margin
        self.image_size = image_size
        self.limits = limits or Limits()
        self.manifest = manifest or {}
        threads = threads or count_cores()
        self.decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # Of the largest size no more than half as many as threads, but small ones beside them.
        largest = self.limits.photo_pixels
        self._room = _Room(max(largest, min(largest * (threads // 2), _ROOM)) + _SMALL_PHOTO)
        # Who sends many large photos shall not have others wait behind them all. One more than are decoded: no thread
        # waits for the next one.
        self._most_ahead = threads + 1

    @property
    def network(self):
        """The `keras.Model` inside, where Keras is the engine."""
        if not hasattr(self.engine, "network"):
            raise ValueError("Expected a model that Keras runs: carflavor.load_model(..., engine='keras').network")
        return self.engine.network

    def predict(self, photos, boxes=None, top_k=5, min_prob=0.0, on_error="raise"):
        """Says which car each photo shows.

        Args:
            photos: List of paths, bytes of encoded photos, or uint8 RGB arrays of shape `(height, width, 3)`.
            boxes: Optional list, for each photo `(x1, y1, x2, y2)` in pixels, 0-based half-open, or None.
            top_k: Number of classes in `top_k`.
            min_prob: Probability under which the label is `unknown`.
            on_error: `raise`, or `report` to answer for the other photos.

        Returns:
            `pandas.DataFrame`, a row a photo: `label` str, `prob` Float64, `class_id` Int64 (null where unknown),
            `top_k` list of `{"label": str, "prob": float}`, `error` str or None.

        Raises:
            ValueError: If a parameter is not what is expected or, under `raise`, a photo cannot be read; the message
                names the rows.
        """
        rows = self.predict_rows(photos, boxes, top_k, min_prob, on_error)
        columns = {name: [row[name] for row in rows] for name in ("label", "prob", "class_id", "top_k", "error")}
        # Typed here: for one photo, pandas takes longer to change the type of a column than to build the rest.
        columns |= {"prob": pd.array(columns["prob"], "Float64"), "class_id": pd.array(columns["class_id"], "Int64")}
        return pd.DataFrame(columns)

    def predict_rows(self, photos, boxes=None, top_k=5, min_prob=0.0, on_error="raise"):
        """Does what `predict` does; returns a list of dicts, a row a photo, with None for what is null."""
        check_parameters(top_k, min_prob, on_error)
        if isinstance(photos, (str, bytes, os.PathLike)) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
            raise ValueError("expected a list of photos, got one photo that is not in a list")
        photos = list(photos)
        if not photos:
            raise ValueError("expected at least one photo, got none")
        boxes = [None] * len(photos) if boxes is None else list(boxes)
        if len(boxes) != len(photos):
            raise ValueError(f"expected a box or None for each of {len(photos)} photos, got {len(boxes)}")
        probabilities, errors = self._score(photos, boxes)
        if errors and on_error == "raise":
            raise ValueError(name_rows(errors, len(photos)))
        return [
            failed_row(errors[row]) if row in errors else self.describe(probabilities[row], top_k, min_prob)
            for row in range(len(photos))
        ]

    def predict_probabilities(self, photos):
        """Returns float32 probabilities `(len(photos), C)` of uint8 RGB arrays; see `predict` for what is accepted."""
        probabilities, errors = self._score(photos, [None] * len(photos))
        if errors:
            raise ValueError(name_rows(errors, len(photos)))
        return probabilities

    def _score(self, photos, boxes):
        probabilities = np.zeros((len(photos), len(self.class_names)), np.float32)
        errors = {}
        # Batch by batch, so that memory holds the squares of one batch and not those of all photos.
        for start in range(0, len(photos), BATCH_SIZE):
            squares, rows = [], []
            for row, prepared in self._prepare_all(photos, boxes, range(start, min(start + BATCH_SIZE, len(photos)))):
                try:
                    squares.append(prepared.result())
                    rows.append(row)
                except (ValueError, OSError) as error:
                    errors[row] = str(error)
            if squares:
                probabilities[rows] = self.engine(np.stack(squares))
        return probabilities, errors

    def _prepare_all(self, photos, boxes, rows):
        """Yields each row with the future of its square, in order, while the next ones are decoded."""
        ahead = collections.deque()
        for row in rows:
            if len(ahead) == self._most_ahead:
                yield ahead.popleft()
            if time.monotonic() > DEADLINE.get():
                raise TimeoutError("nobody waits for the answer any more")
            ahead.append((row, self.decoders.submit(self.prepare, photos[row], boxes[row])))
        yield from ahead

    def prepare(self, photo, box=None):
        """Returns what the network sees of a photo: uint8 RGB array of shape `(input_size, input_size, 3)`.

        Args:
            photo: As `predict` takes it, or `Base64`.
            box: `(x1, y1, x2, y2)` or None.

        Raises:
            ValueError: If it cannot be read or the box holds nothing of it.
            OSError: If it is a path that cannot be read.
        """
        photo, box = _read(photo, self.limits), _check_box(box)
        if isinstance(photo, image.EncodedPhoto):
            with self._room.take(photo.width * photo.height):
                square = photo.cut_square(self.image_size, box, self.crop_margin)
        else:
            pixels = photo if box is None else image.cut_out(photo, box, self.crop_margin)
            square = image.squash(pixels, self.image_size)
        return image.squash(square, self.engine.input_size)

    def describe(self, probabilities, top_k=5, min_prob=0.0):
        """Returns the row of an answer, a dict, for the (C,) probabilities of a photo."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        best = int(order[0])
        known = probabilities[best] >= min_prob
        return {
            "label": self.class_names[best] if known else UNKNOWN,
            "prob": float(probabilities[best]),
            "class_id": best if known else None,
            "top_k": [{"label": self.class_names[i], "prob": float(probabilities[i])} for i in order],
            "error": None,
        }


class PyfuncModel:
    """What `mlflow.pyfunc` and the scoring server call: a DataFrame with the column `image`.

    Args:
        classifier: `CarClassifier`.
    """

    def __init__(self, classifier):
        self.classifier = classifier

    def get_raw_model(self):
        """Returns the `CarClassifier`."""
        return self.classifier

    def predict(self, model_input, params=None):
        """Answers a DataFrame of photos; see `CarClassifier.predict` for parameters and answer.

        A string is a photo in base64 and never a path: callers of a server must not read its files.

        Args:
            model_input: `pandas.DataFrame` with the column `image` (base64 string; in-process also bytes, uint8 RGB
                array or `pathlib.Path`) and optional columns `x1`, `y1`, `x2`, `y2`.
            params: Optional dict with `top_k`, `min_prob`, `on_error`.

        Returns:
            `pandas.DataFrame` with the index of `model_input`.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, which the scoring server answers with 400 and the message.
        """
        try:
            frame = _check_frame(model_input, self.classifier.limits)
            boxes = frame[BOX_COLUMNS].to_numpy(object) if set(BOX_COLUMNS) <= set(frame.columns) else None
            photos = [Base64(value) if isinstance(value, str) else value for value in frame["image"]]
            answer = self.classifier.predict(photos, boxes, **(params or {}))
        except (ValueError, TypeError) as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        return answer.set_index(frame.index)


@dataclass(frozen=True)
class Base64:
    """A photo in base64, where a plain string would be a path."""

    text: str


def decode_base64(text):
    """Decodes base64 as people send it.

    Line breaks and white space, a `data:...;base64,` prefix, the URL-safe alphabet and missing padding are all seen in
    practice; anything else is an error and not, as in `base64.decodebytes`, silently skipped.

    Args:
        text: str.

    Returns:
        bytes.

    Raises:
        ValueError: If the text is no base64.
    """
    # As most send it: without copies of what may be a long text.
    with contextlib.suppress(ValueError):
        if data := binascii.a2b_base64(text, strict_mode=True):
            return data
    # As bytes: split at white space, a long text could become millions of short ones.
    body = text.encode("utf-8", "surrogatepass").translate(None, _WHITE_SPACE)
    if body[:5].lower() == b"data:":
        head, _, body = body.partition(b",")
        if not head.lower().endswith(b";base64"):
            raise ValueError("expected a data: URI in base64, got one in another encoding")
    if not body:
        raise ValueError("expected a photo in base64, got an empty text")
    body = body.rstrip(b"=").translate(_FROM_URL_SAFE)
    try:
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected a photo in base64, got a text that is no base64") from None


def _check_frame(frame, limits):
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"expected a DataFrame with the column image, got {type(frame).__name__}")
    if "image" not in frame.columns:
        raise ValueError(f"expected a column image, got {', '.join(map(str, frame.columns)) or 'none'}")
    if twice := [name for name in ("image", *BOX_COLUMNS) if list(frame.columns).count(name) > 1]:
        raise ValueError(f"expected each column once, got {twice[0]} more than once")
    if limits.rows is not None and len(frame) > limits.rows:
        raise ValueError(f"expected at most {limits.rows:,} photos in a request, got {len(frame):,}")
    boxes_given = [name for name in BOX_COLUMNS if name in frame.columns]
    if boxes_given and boxes_given != BOX_COLUMNS:
        raise ValueError(f"expected all of x1, y1, x2, y2 or none, got {', '.join(boxes_given)}")
    return frame


class _Room:
    """Lets photos be worked on at once as long as they have no more pixels together than there is room for."""

    def __init__(self, pixels):
        self._all = self._free = pixels
        self._change = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels):
        pixels = min(pixels, self._all)
        with self._change:
            self._change.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._change:
                self._free += pixels
                self._change.notify_all()


def _read(photo, limits):
    """Returns an `EncodedPhoto`, or the array where the photo is one."""
    if isinstance(photo, Base64):
        if photo.text in ("None", "nan"):
            # As which MLflow hands on the null of an `inputs` body; no photo has so short a text.
            raise ValueError("expected a photo, got null")
        # Four characters for three bytes, and room for line breaks: what is longer is not even decoded.
        check_size(len(photo.text) // 2, limits.photo_bytes)
        return _open(decode_base64(photo.text), limits)
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return _open(bytes(photo), limits)
    if isinstance(photo, (str, os.PathLike)):
        check_size(os.path.getsize(photo), limits.photo_bytes)
        return _open(Path(photo).read_bytes(), limits)
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise ValueError(
                f"expected a uint8 RGB array of shape (height, width, 3), got {photo.dtype} of shape {photo.shape}"
            )
        return photo
    missing = photo is None or photo is pd.NA or (isinstance(photo, float) and np.isnan(photo))
    raise ValueError(f"expected a photo, got {'null' if missing else type(photo).__name__}")


def _open(data, limits):
    check_size(len(data), limits.photo_bytes)
    return image.EncodedPhoto(data, limits.photo_pixels)


def check_size(count, limit):
    """Raises a ValueError for the number of bytes of a photo if it is above the limit."""
    if count > limit:
        raise ValueError(f"expected a photo of at most {limit:,} bytes, got {count:,}")


def _check_box(box):
    if box is None:
        return None
    if not isinstance(box, (list, tuple, np.ndarray)):
        raise ValueError(f"expected a box of four numbers x1, y1, x2, y2, got {box!r}")
    values = [None if pd.isna(value) else value for value in box]
    if values == [None] * 4:
        return None
    if len(values) != 4 or not all(isinstance(value, numbers.Real) and abs(value) < np.inf for value in values):
        raise ValueError(f"expected a box of four numbers x1, y1, x2, y2, got {values}")
    return values


def check_parameters(top_k, min_prob, on_error):
    """Raises a ValueError unless the parameters of a request are what `CarClassifier.predict` takes."""
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1:
        raise ValueError(f"expected top_k to be a whole number of at least 1, got {top_k!r:.80}")
    if not isinstance(min_prob, numbers.Real) or not 0 <= min_prob <= 1:
        raise ValueError(f"expected min_prob to be a number from 0 to 1, got {min_prob!r:.80}")
    if on_error not in ON_ERROR:
        raise ValueError(f"expected on_error to be one of {', '.join(ON_ERROR)}, got {on_error!r:.80}")


def failed_row(error):
    """Returns the row of an answer, a dict, for a photo that cannot be scored."""
    return {"label": None, "prob": None, "class_id": None, "top_k": [], "error": error}


def name_rows(errors, total):
    """Returns a sentence for a request that is refused: which rows, from a dict of row to reason, of how many."""
    named = [f"row {row}: {error}" for row, error in sorted(errors.items())[:_ROWS_NAMED]]
    more = f"; and {len(errors) - _ROWS_NAMED} more" if len(errors) > _ROWS_NAMED else ""
    return f"{len(errors)} of {total} photos cannot be scored (rows count from 0): {'; '.join(named)}{more}"
