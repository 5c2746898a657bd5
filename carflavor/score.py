"""Photos into Parquet files of predictions, on a Spark cluster or in the processes of one machine."""

import contextlib
import logging
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
from mlflow.exceptions import MlflowException

import carflavor
from carflavor import report, tracking
from carflavor.data.locations import resolve_input, resolve_output
from carflavor.data.on_spark import SentStore, refuse_copy
from carflavor.data.processes import map_in_processes
from carflavor.data.shards import PARTIAL
from carflavor.data.shards_on_spark import write_shards_on_spark
from carflavor.data.sources import default_out, name_source
from carflavor.data.thumbnails import read_thumbnails
from carflavor.data.unlabelled import list_photos
from carflavor.flavor import copy_model, manifest_sha256, read_manifest
from carflavor.limits import count_cores
from carflavor.locking import lock, open_work_folder
from carflavor.partitions import Scoring, cut_parts, name_part, read_environment
from carflavor.progress import progress_bar
from carflavor.scoring import UNKNOWN, check_parameters
from carflavor.spark import check_master, check_visible, open_session

WORK_FOLDER = ".score"  # below `out`
# As Spark and Hadoop mark a folder that is whole; readers of Parquet leave such names out. Theirs is empty.
SUCCESS, _OURS = "_SUCCESS", "carflavor score\n"
_PUBLISHING = "publishing"
PREDICTIONS_TAG = "carflavor.predictions"  # the folder with the predictions of a run
_SHEET_PHOTOS = 24
_ERRORS_LISTED = 100

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        model: Model directory that carflavor wrote, as path, `runs:/...` or `models:/...`.
        photos: What `carflavor.data.unlabelled.list_photos` takes.
        top_k: Number of classes in `top_k`.
        min_prob: Probability under which the label is `unknown`.
        on_error: `report`: a photo that cannot be read is a row with `error`. `raise`: it ends the step.
        workers: Processes that score, one thread each; 0 for one a core. Not used with `master`.
        master: Spark master, as `carflavor.spark.check_master` takes it, or empty.
        out: Folder to write to. Empty for one under `carflavor.data.locations.data_home()`.
    """

    model: str
    photos: str = "sample"
    top_k: int = 5
    min_prob: float = 0.0
    on_error: str = "report"
    workers: int = 0
    master: str = ""
    out: str = ""


def score(config):
    """Writes predictions and logs how many, how fast, and a sheet of photos with their labels.

    Args:
        config: `ScoreConfig`.

    Returns:
        `Path` of the folder with `part-00000.parquet` and so on, a row a photo in the order of the photos.

    Raises:
        ValueError: If there are no photos, or a parameter is not what is expected; or, under `on_error=raise`, if a
            photo cannot be read.
        MlflowException: If the model is none that carflavor wrote.
    """
    with tracking.step_run("score", config):
        out, summary, photos, shown = _write(config)
        sheet = _draw_sheet(photos, shown)
        mlflow.set_tags({tracking.MODEL_TAG: config.model, PREDICTIONS_TAG: str(out)})
        mlflow.log_metrics({name: summary[name] for name in ("photos", "errors", "unknown", "bytes")})
        if summary["photos_per_second"] is not None:
            mlflow.log_metric("photos_per_second", summary["photos_per_second"])
        mlflow.log_dict(summary, "scoring.json")
        if sheet is not None:
            mlflow.log_figure(sheet, "predictions.png")
        mlflow.log_text(_render_report(summary, sheet), "report.html")
        _logger.info(
            "%s photos, %s of them cannot be read: %s", f"{summary['photos']:,}", f"{summary['errors']:,}", out
        )
    return out


def write_predictions(config):
    """Writes the Parquet files; no MLflow run.

    They get their names together, when the last photo is scored, and then replace those of an earlier run. What a
    killed process has done is kept in a hidden folder, and the next one with the same model, photos and settings goes
    on there.

    Args:
        config: `ScoreConfig`.

    Returns:
        `Path` of the folder, and a dict of what went into it.

    Raises:
        ValueError, MlflowException: As `score` does.
    """
    return _write(config)[:2]


def _write(config):
    """Returns what `write_predictions` does, the `PhotoList`, and the rows of some photos to show."""
    check_parameters(config.top_k, config.min_prob, config.on_error)
    check_master(config.master)
    out = resolve_output(config.out, "out") if config.out else None
    model = resolve_input(config.model, "model")
    read_manifest(model)
    photos = list_photos(config.photos)
    refuse_copy(photos.store, config.master, "photos")
    out = out or default_out("predictions", config.photos, photos.store)
    _check_out(out)
    parts, sizes = cut_parts(photos)
    key = {
        "carflavor": carflavor.__version__,
        "model": manifest_sha256(model),
        "photos": photos.digest(),
        "parts": sizes,
        "top_k": config.top_k,
        "min_prob": config.min_prob,
        "environment": read_environment(),
    }
    with lock(out / WORK_FOLDER / "lock", f"Another process writes predictions to {out}"):
        folder = open_work_folder(out / WORK_FOLDER, key, "The model, the photos")
        scoring = Scoring(
            folder=str(folder),
            model=str(_bring_model(model, folder, key["model"])),
            manifest_sha256=key["model"],
            store=SentStore(photos.store, "photos", is_checked=bool(config.master)),
            parts=parts,
            top_k=config.top_k,
            min_prob=config.min_prob,
            environment=tuple(key["environment"].items()),
        )
        seconds, made = _write_parts(config, scoring, photos, sizes, out)
        _publish(folder, out, len(sizes))
        # A network drive keeps what is open on this machine, the lock and the model of a worker, and so their folder.
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    paths = [out / name_part(number) for number in range(len(sizes))]
    summary, shown = _summarise(paths, len(photos.names))
    summary = {
        "model": config.model,
        "manifest_sha256": key["model"],
        "source": name_source(config.photos, photos.store),
        "photos_digest": key["photos"],
        "photos_per_second": round(made / seconds, 1) if made else None,
        "bytes": sum(path.stat().st_size for path in paths),
        **summary,
    }
    return out, summary, photos, shown


def _check_out(out):
    """Refuses a folder with parts of somebody else, which those of this run would replace."""
    is_ours = (out / WORK_FOLDER).is_dir() or ((out / SUCCESS).is_file() and (out / SUCCESS).read_text() == _OURS)
    if not is_ours and (others := sorted(path.name for path in out.glob("part-*.parquet"))):
        raise ValueError(f"out: expected an empty folder or one of an earlier score, got {others[0]} in {out}")


def _bring_model(model, folder, digest):
    """Returns the `Path` of a copy of the model where all workers see it, as they must see this folder."""
    path = folder / "model"
    try:
        read_manifest(path, digest)
    except MlflowException:
        # None, or what was left of one where this folder could not be removed.
        shutil.rmtree(path, ignore_errors=True)
        partial = folder / f"model{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        copy_model(model, partial)
        partial.rename(path)
    return path


def _write_parts(config, scoring, photos, sizes, out):
    """Writes the parts that are not there; returns the seconds that it took, and the number of photos in them."""
    folder = scoring.find_shard(0).parent
    for path in folder.glob(f"*.parquet.*{PARTIAL}"):
        path.unlink(missing_ok=True)
    is_published = (folder / _PUBLISHING).exists()

    def find(number):
        path = scoring.find_shard(number)
        return out / path.name if is_published and not path.is_file() else path

    left = [number for number in range(len(sizes)) if not find(number).is_file()]
    total, made = sum(sizes), sum(sizes[number] for number in left)
    if made < total:
        _logger.info("Going on after %s of %s photos", f"{total - made:,}", f"{total:,}")

    def check(numbers):
        if config.on_error == "raise":
            _refuse_errors(filter(Path.is_file, map(find, sorted(numbers))), photos.store.place)

    check(set(range(len(sizes))) - set(left))
    if not left:
        return 0.0, 0
    with progress_bar("score", total, total - made) as progress:

        def note(numbers):
            progress.update(sum(sizes[number] for number in numbers))
            check(numbers)

        if config.master:
            with open_session(config.master, "score") as session:
                check_visible(session, out, in_order=True, source=scoring.store)
                started = time.perf_counter()
                write_shards_on_spark(session, scoring, left, note)
                return time.perf_counter() - started, made
        started = time.perf_counter()
        workers = min(config.workers or count_cores(), len(left))
        with contextlib.closing(map_in_processes(scoring.write_shard, left, workers)) as written:
            for number in written:
                note({number})
    return time.perf_counter() - started, made


def _refuse_errors(paths, place):
    """Raises a ValueError for the first photo in parts that cannot be read."""
    for path in paths:
        for row in pq.read_table(path, columns=["photo", "error"]).to_pylist():
            if row["error"] is not None:
                raise ValueError(
                    f"photos: {place}: {row['photo']}: {row['error']}. "
                    f"With on_error=report such photos are rows with an error"
                )


def _publish(folder, out, parts):
    """Gives all parts their names in `out`, in the place of those of an earlier run."""
    if not (folder / _PUBLISHING).exists():
        (out / SUCCESS).unlink(missing_ok=True)
        for path in out.glob("part-*.parquet"):
            path.unlink()
        # From here on the parts in `out` are of this run: a process that is killed leaves some there and some here.
        (folder / _PUBLISHING).touch()
    for name in map(name_part, range(parts)):
        if (folder / name).is_file():
            os.replace(folder / name, out / name)
    (out / SUCCESS).write_text(_OURS)


def _summarise(paths, count):
    """Returns what is in the parts: a dict for JSON, and the rows to show, spread evenly over those that were read."""
    wanted = set(np.linspace(0, count - 1, min(_SHEET_PHOTOS, count)).astype(int).tolist())
    labels, errors, shown, first, failed = Counter(), [], [], 0, 0
    for path in paths:
        rows = pq.read_table(path, columns=["photo", "label", "prob", "error"]).to_pylist()
        for number, row in enumerate(rows, start=first):
            if row["error"] is None:
                labels[row["label"]] += 1
                if number in wanted:
                    shown.append(row)
            else:
                failed += 1
                if len(errors) < _ERRORS_LISTED:
                    errors.append({"photo": row["photo"], "error": row["error"]})
        first += len(rows)
    summary = {
        "photos": count,
        "errors": failed,
        "unknown": labels[UNKNOWN],
        "photos_by_label": [{"label": label, "photos": number} for label, number in labels.most_common()],
        "first_errors": errors,
    }
    return summary, shown


def _draw_sheet(photos, rows):
    """Returns a `Figure` of photos with their labels, or None where none of them can be read."""
    thumbnails = read_thumbnails(photos.store, {row["photo"] for row in rows})
    rows = [row for row in rows if row["photo"] in thumbnails]
    if not rows:
        return None
    captions = [f"{row['label']}, {row['prob']:.0%}" for row in rows]
    return report.photo_grid_figure([thumbnails[row["photo"]] for row in rows], captions, columns=6)


def _render_report(summary, sheet):
    headline = [(name, f"{summary[name]:,}") for name in ("photos", "errors", "unknown")]
    if summary["photos_per_second"] is not None:
        headline.append(("photos a second", f"{summary['photos_per_second']:,}"))
    sections = [] if sheet is None else [report.Section("Photos, labels and probabilities", figure=sheet)]
    if summary["photos_by_label"]:
        sections.append(report.Section("Photos by label", table=summary["photos_by_label"]))
    if summary["first_errors"]:
        sections.append(report.Section("Photos that cannot be read, the first ones", table=summary["first_errors"]))
    return report.render_report(f"Predictions for {summary['source']}", headline, sections)
