"""Photos into HDF5 record files: `train.h5`, `validation.h5` and `test.h5`."""

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np

import carflavor
from carflavor import report, tracking
from carflavor.data import duplicates, layouts, records
from carflavor.data.audit import count_findings, find_all, parse_fail_on, say_counts, say_refusal, summarise
from carflavor.data.build import Build
from carflavor.data.decoding import Task, decode_photos
from carflavor.data.locations import data_home, resolve_input, resolve_output
from carflavor.data.on_spark import SentStore, decode_on_spark, refuse_copy
from carflavor.data.sources import default_out, name_source, open_source
from carflavor.data.splitting import choose_validation
from carflavor.data.thumbnails import read_thumbnails
from carflavor.data.virtual import ShardedBuild
from carflavor.progress import progress_bar
from carflavor.spark import check_master, check_visible, open_session

CROP_CHOICES = {"box": ("box",), "full": ("full",), "both": ("box", "full")}
CROP_MARGIN = 16  # pixels, as foamliu/Car-Recognition (pre_process.py) cuts the cars
VALIDATION_SHARE = 0.1
WORK_FOLDER = ".preprocess"  # below `out`
# The sample's photos are small, and its first run should be quick.
SAMPLE_IMAGE_SIZE = 128
_SHEET_PHOTOS = 24

# Of report.json, on the run.
_METRICS = (
    "photos",
    "skipped",
    "photos_per_second",
    "bytes",
    "near_duplicate_groups",
    "near_duplicate_photos",
    "near_duplicate_test_photos",
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        source: Folder of photos, or `sample` for the embedded drawings.
        layout: One of `carflavor.data.layouts.LAYOUTS`.
        crop: `box` (the car with a margin), `full` (the whole photo) or `both`.
        image_size: Side of the stored squares in pixels.
        skip_unreadable: Whether a photo that cannot be read is counted and left out instead of ending the step.
        fail_on: Kinds of findings of `carflavor.data.audit` at which the step fails and no record file gets its name;
            separated by commas.
        seed: Seed of the validation split.
        workers: Processes that decode; 0 for one a core. Not with `master`.
        master: Spark master to decode on. Empty: on this machine.
        gather: Whether the record files hold all pixels. With `master` they may refer to shards beside them instead.
        out: Folder to write to. Empty for one under `carflavor.data.locations.data_home()`.
    """

    source: str = "sample"
    layout: str = "auto"
    crop: str = "both"
    image_size: int = 256
    skip_unreadable: bool = False
    fail_on: str = ""
    seed: int = 0
    workers: int = 0
    master: str = ""
    gather: bool = True
    out: str = ""


def preprocess(config):
    """Writes the record files of a dataset and logs what went into them.

    Args:
        config: `PreprocessConfig`.

    Returns:
        `Path` of the folder with `train.h5`, `validation.h5`, `test.h5` (absent without labels for the test photos),
        `report.json` and `report.html`.

    Raises:
        ValueError: If the source has no known layout or a photo cannot be read; or, once the reports are written and
            logged, if kinds of findings named by `fail_on` were found.
    """
    with tracking.step_run("preprocess", config):
        out, summary, refusal, sheet = _write(config)
        mlflow.log_metrics({name: summary[name] for name in _METRICS if summary[name] is not None})
        mlflow.log_metrics(count_findings(summary))
        mlflow.log_artifact(out / "report.json")
        mlflow.log_artifact(out / "report.html")
        if refusal:
            raise ValueError(refusal)
        # Also by itself, as the pictures of the other steps are: for `mlflow ui` and notebooks.
        mlflow.log_figure(sheet, "photos.png")
        mlflow.set_tag(tracking.RECORDS_TAG, str(out))
        _logger.info("Record files: %s", out)
    return out


def sample_records():
    """Returns the folder with the record files of the embedded sample, writing them on the first call."""
    out = data_home() / f"sample-{carflavor.__version__}" / "records"
    if not all((out / f"{split}.h5").is_file() for split in records.SPLITS):
        write_records(PreprocessConfig(image_size=SAMPLE_IMAGE_SIZE, out=str(out)))
    return out


def write_records(config):
    """Writes `train.h5`, `validation.h5`, `test.h5`, `report.json` and `report.html`; no MLflow run.

    The record files get their names together, when the last photo is in. What a killed process has done is kept beside
    them, in a hidden folder, and the next one with the same source and settings goes on there.

    Args:
        config: `PreprocessConfig`.

    Returns:
        `Path` of the folder with the files, and the content of `report.json` as dict.

    Raises:
        ValueError: As `preprocess` does.
    """
    out, summary, refusal, _ = _write(config)
    if refusal:
        raise ValueError(refusal)
    return out, summary


def _write(config):
    """Returns what `write_records` does, the sentence that refuses the dataset or None, and a `Figure` of photos.

    Where the dataset is refused, only the reports are written, and the figure is None.
    """
    fail_on = parse_fail_on(config.fail_on)
    if config.crop not in CROP_CHOICES:
        raise ValueError(f"Expected crop to be one of {', '.join(CROP_CHOICES)}. Received: crop={config.crop!r}")
    check_master(config.master)
    if not (config.gather or config.master):
        raise ValueError("Expected a Spark master where gather=false, for its tasks write shards. Received: master=''")
    out = resolve_output(config.out, "out") if config.out else None
    store = open_source(config.source)
    out = out or default_out("records", config.source, store)
    if config.master and store.is_stream:
        raise ValueError(
            f"source: expected photos that workers of Spark can read at any place, got {store.place}, which can "
            f"only be read from its start to its end; unpack it, or pack it anew as .tar or .zip"
        )
    refuse_copy(store, config.master)
    dataset = layouts.read_dataset(store, config.layout)
    for warning in dataset.warnings:
        _logger.warning("%s", warning)
    if dataset.test is None and (out / "test.h5").exists():
        raise ValueError(
            f"{out}: expected a folder without test.h5, for {store.place} has no labels for its test photos"
        )
    if dataset.test is None:
        _logger.info("No labels for the test photos in %s: test.h5 is not written", store.place)
    settings = {
        "source": name_source(config.source, store),
        "source_digest": dataset.digest,
        "crop_margin": CROP_MARGIN,
        "interpolation": "halving and INTER_LINEAR",
        "validation_share": VALIDATION_SHARE,
        "near_duplicate_distance": duplicates.MAX_DISTANCE,
        "seed": config.seed,
    }
    started = time.perf_counter()
    crops = CROP_CHOICES[config.crop]
    key = {
        "carflavor": carflavor.__version__,
        "files": store.fingerprint(),
        "crops": crops,
        "image_size": config.image_size,
        "settings": settings,
    }
    rows = {split: len(photos) for split, photos in dataset.splits.items()}
    kind = Build if config.gather else ShardedBuild
    with (
        _open_spark(config, out, store) as spark,
        kind(out / WORK_FOLDER, key, rows, crops, config.image_size) as build,
    ):
        if build.starts_over:
            _logger.warning("The source or a setting is not what it was when %s was begun: starting over", out)
        _decode(config, store, dataset, build, spark)
        facts = [build.done[split, row] for split, number in rows.items() for row in range(number)]
        groups = duplicates.group_near_duplicates(duplicates.stack_hashes(facts))
        splits = _split(store, dataset, groups, config.seed)
        findings = find_all(dataset, splits, facts, groups, store.names)
        _logger.info("Found: %s", say_counts(findings))
        # Before the pools become record files: with other wishes, the next run goes on here.
        refusal = say_refusal(findings, fail_on, store.place, out / "report.html")
        skipped = _list_skipped(splits, dataset, facts)
        if not refusal:
            _finish(dataset, splits, build, settings)
            build.publish(splits)
        seconds = time.perf_counter() - started
        summary = {
            "source": settings["source"],
            "skipped": len(skipped),
            "seconds": round(seconds, 2),
            "photos_per_second": round(len(facts) / max(seconds, 1e-9), 1),
            "bytes": 0 if refusal else _count_bytes(out, splits),
            "settings": settings,
            "skipped_photos": skipped,
            **summarise(dataset, splits, facts, findings),
        }
        thumbnails = read_thumbnails(store, report.pick_photos(findings), dataset.photos)
        sheet = None if refusal else _contact_sheet(out)
        _write_reports(out, summary, report.build_audit_sections(findings, thumbnails), refusal, sheet)
        if not refusal:
            build.remove()
    return out, summary, refusal, sheet


@contextlib.contextmanager
def _open_spark(config, out, store):
    """Yields a Spark session whose workers see photos and record files as this machine does; None without a master."""
    if not config.master:
        yield None
        return
    with open_session(config.master, "preprocess") as spark:
        check_visible(spark, out, source=SentStore(store))
        yield spark


def _split(store, dataset, groups, seed):
    """Returns a dict of split -> photos; a group of near-duplicates is not torn between training and validation."""
    labels = [photo.label for photo in dataset.train]
    chosen = choose_validation(labels, groups[: len(labels)], VALIDATION_SHARE, seed)
    if not chosen.any():
        raise ValueError(
            f"{store.place}: expected two training photos of some class that are no near-duplicates of each other, "
            f"one of them for validation, got none"
        )
    splits = {
        "train": [photo for photo, is_chosen in zip(dataset.train, chosen, strict=True) if not is_chosen],
        "validation": [photo for photo, is_chosen in zip(dataset.train, chosen, strict=True) if is_chosen],
    }
    return splits if dataset.test is None else splits | {"test": dataset.test}


def _decode(config, store, dataset, build, spark):
    """Brings all photos into their pools."""
    splits = dataset.splits

    def refuse(errors):
        for error in errors:
            place = f"{store.place}/{splits[error['split']][error['row']].place}"
            raise ValueError(f"{place}: {error['error']}. Leave such photos out with skip_unreadable=true")

    if not config.skip_unreadable:
        # An earlier run may have left some out.
        build.forget_errors()
        refuse(entry for entry in build.done.values() if "error" in entry)
    tasks = [
        Task(split, row, photo)
        for split, photos in splits.items()
        for row, photo in enumerate(photos)
        if (split, row) not in build.done
    ]
    total = len(dataset.photos)
    if done := total - len(tasks):
        _logger.info("Going on after %s of %s photos", f"{done:,}", f"{total:,}")
    if spark:
        decoded = decode_on_spark(spark, tasks, store, build, CROP_MARGIN)
    else:
        decoded = decode_photos(tasks, store, build.pools, CROP_MARGIN, config.workers)
    with progress_bar("preprocess", total, done) as progress, contextlib.closing(decoded):
        for entries in decoded:
            errors = [entry for entry in entries if "error" in entry]
            build.add([entry for entry in entries if config.skip_unreadable or "error" not in entry])
            if not config.skip_unreadable:
                refuse(errors)
            progress.update(len(entries))


def _list_skipped(splits, dataset, facts):
    """Returns what is left out, a list of dicts."""
    errors = {photo.name: known.get("error") for photo, known in zip(dataset.photos, facts, strict=True)}
    return [
        {"photo": photo.name, "split": split, "reason": errors[photo.name]}
        for split, photos in splits.items()
        for photo in photos
        if errors[photo.name]
    ]


def _finish(dataset, splits, build, settings):
    """Makes record files of the pools."""
    places = {photo.name: (split, row) for split, photos in dataset.splits.items() for row, photo in enumerate(photos)}
    files = {}
    for split, photos in splits.items():
        kept = []
        for photo in photos:
            pool, row = places[photo.name]
            known = build.done[pool, row]
            if "error" not in known:
                kept.append({"row": row, "label": photo.label, "source": photo.name} | known)
        if not kept:
            raise ValueError(f"Expected at least one readable photo for {split}.h5, got none of {len(photos):,}")
        files[split] = ("test" if split == "test" else "train", kept)
    build.finish(files, dataset.class_names, settings)


def _count_bytes(out, splits):
    paths = set()
    for split in splits:
        with records.RecordFile(out / f"{split}.h5") as file:
            paths |= {file.path, *file.shards}
    return sum(path.stat().st_size for path in paths)


def _write_reports(out, summary, audit_sections, refusal, sheet):
    headline = [("photos", f"{summary['photos']:,}"), ("left out", f"{summary['skipped']:,}")]
    headline += [(split, f"{count:,}") for split, count in summary["photos_by_split"].items()]
    headline += [("photos a second", f"{summary['photos_per_second']:,}"), ("bytes", f"{summary['bytes']:,}")]
    overview, *sections = audit_sections
    if refusal:
        first = [report.Section("No record files were written", refusal), overview]
    else:
        first = [overview, report.Section("Photos of the training split", figure=sheet)]
    sections = [
        *first,
        report.Section("Photos left out", table=summary["skipped_photos"])
        if summary["skipped_photos"]
        else report.Section("Photos left out", text="None: every photo was read."),
        *sections,
        report.Section("Photos by class", table=summary["photos_by_class"]),
    ]
    title = "What preprocess refused" if refusal else "What preprocess wrote"
    report.write_report(out / "report.html", title, headline, sections)
    report.write_json(out / "report.json", summary)


def _contact_sheet(out):
    with records.RecordFile(out / "train.h5") as file:
        rows = np.linspace(0, len(file) - 1, min(_SHEET_PHOTOS, len(file))).astype(int)
        photos = [file.images(file.crops[0])[row] for row in rows]
        captions = [file.class_names[file.labels[row]] for row in rows]
    return report.photo_grid_figure(photos, captions, columns=6)


def open_split(data, split, parameter="data"):
    """Opens a record file of what the user calls `data`.

    Args:
        data: `sample`, or a folder with record files as path or URI.
        split: `train`, `validation`, `test`, or `carflavor.data.records.AUGMENTED`.
        parameter: What the user calls it.

    Returns:
        `RecordFile`.
    """
    folder = sample_records() if data == "sample" else resolve_input(data, parameter, [f"{split}.h5"])
    path = Path(folder) / f"{split}.h5"
    if not path.is_file():
        writer = "augment" if split == records.AUGMENTED else "preprocess"
        raise ValueError(f"{parameter}: expected {path}, which {writer} writes, got nothing")
    file = records.RecordFile(path)
    missing = {"source", "crop_margin"} - set(file.settings)
    if missing:
        raise ValueError(f"{path}: expected settings with {' and '.join(sorted(missing))}, got none")
    return file
