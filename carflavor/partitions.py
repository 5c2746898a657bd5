"""Predictions in parts: each is a Parquet file that one task writes, which reads its photos and keeps its model."""

import functools
import os
import pickle
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.exceptions import MlflowException

import carflavor
from carflavor.data.on_spark import SentStore
from carflavor.data.shards import writing_whole
from carflavor.limits import read_number
from carflavor.scoring import BOX_COLUMNS, check_size, failed_row

# Little is lost with a task, and the tenth of a second that Spark takes for one counts little; of very many photos the
# parts are larger, for whoever reads them would rather not open ten thousand files.
_FEWEST_PHOTOS, _MOST_PHOTOS, _PARTS = 512, 1024, 400
# Photos that go through the network together, for each core: with more of them what a layer hands to the next no longer
# fits into the core's cache. EfficientNet-Lite0 in bfloat16 takes 5.0 ms a photo with 8, 5.3 with 16, 5.4 with 32.
_PHOTOS_A_CORE = 8
# The engine, and what of a photo is too large.
ANSWERS_DEPEND_ON = ("CARFLAVOR_ENGINE", "CARFLAVOR_ALLOW_FALLBACK", "CARFLAVOR_MAX_PHOTO_")
_PHOTO = [("photo", pa.string())]
_BOX = [(name, pa.int64()) for name in BOX_COLUMNS]
_ANSWER = [
    ("label", pa.string()),
    ("prob", pa.float64()),
    ("class_id", pa.int64()),
    ("top_k", pa.list_(pa.struct([("label", pa.string()), ("prob", pa.float64())]))),
    ("error", pa.string()),
]


@dataclass(frozen=True)
class Scoring:
    """How photos are scored in parts. It goes to the processes and machines that write them.

    Which photos are in a part, and which of them go through the network together, depends on the list of photos alone.
    So do the answers: who writes a part, and how many others write, changes nothing.

    Attributes:
        folder: Path of the folder for the parts.
        model: Path of the model directory.
        manifest_sha256: SHA-256 that its `manifest.json` must have.
        store: `carflavor.data.on_spark.SentStore` of the photos.
        parts: Tuple of the packed names and boxes of each part. A task is sent all of it, and opens its own.
        top_k: Number of classes in `top_k`.
        min_prob: Probability under which the label is `unknown`.
        environment: Tuple of names and values of the variables that change answers, those of `ANSWERS_DEPEND_ON`, where
            the step runs: a session of Spark that was there already has workers with variables of their own.
    """

    folder: str
    model: str
    manifest_sha256: str
    store: SentStore
    parts: tuple
    top_k: int
    min_prob: float
    environment: tuple

    def find_shard(self, number):
        """Returns the `Path` of a part. What is there under this name is whole."""
        return Path(self.folder) / name_part(number)

    def write_shard(self, number):
        """Scores the photos of a part and writes it.

        Args:
            number: Number of the part, from 0.

        Returns:
            The same number.

        Raises:
            ValueError: If the model is not the one that was checked, or cannot be run here.
            OSError: If the part cannot be written.
        """
        names, boxes = pickle.loads(zlib.decompress(self.parts[number]))
        cores = _count_cores()
        classifier = _load_once(self.model, self.manifest_sha256, cores, self.environment)
        answers = self._score(classifier, self.store.open(), names, boxes, _PHOTOS_A_CORE * cores)
        for row, name in enumerate(names):
            answers[row]["photo"] = name
            if boxes and boxes[row]:
                answers[row] |= zip(BOX_COLUMNS, boxes[row], strict=True)
        schema = pa.schema(_PHOTO + (_BOX if boxes else []) + _ANSWER)
        with writing_whole(self.find_shard(number)) as partial:
            pq.write_table(pa.Table.from_pylist(answers, schema), partial)
        return number

    def _score(self, classifier, store, names, boxes, batch_size):
        """Returns the answers, a list of dicts, in the order of the names."""
        answers, batch = [None] * len(names), []

        def score_batch():
            rows, photos = zip(*batch, strict=True)
            own = [boxes[row] for row in rows] if boxes else None
            found = classifier.predict_rows(photos, own, self.top_k, self.min_prob, on_error="report")
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
            batch.clear()

        rows_of = {}
        for row, name in enumerate(names):
            rows_of.setdefault(name, []).append(row)
        for name, content in store.read_many(rows_of):
            for row in rows_of[name]:
                try:
                    if isinstance(content, OSError):
                        raise content
                    # Not with the others of its batch: several that are far too large may be more than memory holds.
                    check_size(len(content), classifier.limits.photo_bytes)
                except (ValueError, OSError) as error:
                    answers[row] = failed_row(getattr(error, "strerror", None) or str(error))
                    continue
                batch.append((row, content))
                if len(batch) == batch_size:
                    score_batch()
        if batch:
            score_batch()
        return answers


def name_part(number):
    """Returns the file name of a part, from its number."""
    return f"part-{number:05d}.parquet"


def cut_parts(photos):
    """Returns the `parts` of a `Scoring`, and the list of their sizes.

    Args:
        photos: `carflavor.data.unlabelled.PhotoList`.
    """
    count = len(photos.names)
    size = min(max(-(-count // _PARTS), _FEWEST_PHOTOS), _MOST_PHOTOS)
    size = -(-size // _PHOTOS_A_CORE) * _PHOTOS_A_CORE  # whole batches
    slices = [slice(first, first + size) for first in range(0, count, size)]
    parts = [(photos.names[rows], photos.boxes and photos.boxes[rows]) for rows in slices]
    return tuple(zlib.compress(pickle.dumps(part), 1) for part in parts), [len(names) for names, _ in parts]


@functools.lru_cache(1)
def _load_once(model, manifest_sha256, threads, environment):
    """Returns the `CarClassifier`: one a process, whatever number of parts it writes."""
    for name in read_environment():
        del os.environ[name]
    os.environ.update(environment)
    # TensorFlow reads these once, and by itself takes all cores; OpenVINO is told.
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, str(threads))
    try:
        return carflavor.load_model(model, expected_sha256=manifest_sha256, threads=threads)
    except MlflowException as error:
        raise ValueError(error.message) from error


def read_environment():
    """Returns a dict of the variables that change answers."""
    return {name: value for name, value in os.environ.items() if name.startswith(ANSWERS_DEPEND_ON)}


def _count_cores():
    """Returns the cores that Spark gives this task; a process without Spark has one, as there is one a core."""
    cores = 1
    if "pyspark" in sys.modules:
        from pyspark import TaskContext

        if context := TaskContext.get():
            cores = context.cpus()
    return read_number("CARFLAVOR_THREADS", cores)
