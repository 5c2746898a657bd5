"""Photos into HDF5 record files: `train.h5`, `validation.h5` and `test.h5`."""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np

import carflavor
from carflavor import report, tracking
from carflavor.data import duplicates, layouts, records, sample
from carflavor.data.build import Build
from carflavor.data.decoding import Task, decode_photos
from carflavor.data.locations import data_home, resolve_input, resolve_output
from carflavor.data.splitting import choose_validation
from carflavor.data.stores import Store, open_store
from carflavor.limits import count_cores
from carflavor.progress import progress_bar

CROP_CHOICES = {"box": ("box",), "full": ("full",), "both": ("box", "full")}
CROP_MARGIN = 16  # pixels, as foamliu/Car-Recognition (pre_process.py) cuts the cars
VALIDATION_SHARE = 0.1
WORK_FOLDER = ".preprocess"  # below `out`
# The sample's photos are small, and its first run should be quick.
SAMPLE_IMAGE_SIZE = 128
# How record files call their source when it is the sample; no folder's name, as somebody's folder may be called sample.
EMBEDDED_SAMPLE = "embedded sample"
_PHOTOS_A_PROCESS = 1000  # to start one takes two seconds, in which another one decodes as many
_SHEET_PHOTOS = 24
_SHEET_GROUPS = 12

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
        seed: Seed of the validation split.
        workers: Processes that decode; 0 for one a core.
        out: Folder to write to. Empty for one under `carflavor.data.locations.data_home()`.
    """

    source: str = "sample"
    layout: str = "auto"
    crop: str = "both"
    image_size: int = 256
    skip_unreadable: bool = False
    seed: int = 0
    workers: int = 0
    out: str = ""


def preprocess(config):
    """Writes the record files of a dataset and logs what went into them.

    Args:
        config: `PreprocessConfig`.

    Returns:
        `Path` of the folder with `train.h5`, `validation.h5`, `test.h5` (absent without labels for the test photos),
        `report.json` and `report.html`.

    Raises:
        ValueError: If the source has no known layout or a photo cannot be read.
    """
    with tracking.step_run("preprocess", config):
        out, summary = write_records(config)
        mlflow.set_tag(tracking.RECORDS_TAG, str(out))
        mlflow.log_metrics({name: summary[name] for name in _METRICS if summary[name] is not None})
        mlflow.log_artifact(out / "report.json")
        mlflow.log_artifact(out / "report.html")
        _logger.info("Record files: %s", out)
    return out


def sample_records():
    """Returns the folder with the record files of the embedded sample, writing them on the first call."""
    out = data_home() / f"sample-{carflavor.__version__}" / "records"
    if not all((out / f"{split}.h5").is_file() for split in records.SPLITS):
        write_records(PreprocessConfig(image_size=SAMPLE_IMAGE_SIZE, out=str(out)))
    return out


def _sample_photos():
    folder = data_home() / f"sample-{carflavor.__version__}" / "photos"
    if not folder.is_dir():
        _logger.info("Drawing the embedded sample in %s", folder)
        try:
            sample.write_sample(folder)
        except OSError:
            # Two first runs at once: the other one was quicker.
            if not folder.is_dir():
                raise
    return folder


def _default_out(config, store):
    # Two folders of one name in different places must not write over each other.
    place = hashlib.sha256(store.place.encode()).hexdigest()[:8]
    return data_home() / "records" / ("sample" if config.source == "sample" else f"{store.name}-{place}")


def write_records(config):
    """Writes `train.h5`, `validation.h5`, `test.h5`, `report.json` and `report.html`; no MLflow run.

    The record files get their names together, when the last photo is in. What a killed process has done is kept beside
    them, in a hidden folder, and the next one with the same source and settings goes on there.

    Args:
        config: `PreprocessConfig`.

    Returns:
        `Path` of the folder with the files, and the content of `report.json` as dict.

    Raises:
        ValueError: If the source has no known layout or a photo cannot be read.
    """
    if config.crop not in CROP_CHOICES:
        raise ValueError(f"Expected crop to be one of {', '.join(CROP_CHOICES)}. Received: crop={config.crop!r}")
    out = resolve_output(config.out, "out") if config.out else None
    store = Store(_sample_photos()) if config.source == "sample" else open_store(config.source, "source")
    out = out or _default_out(config, store)
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
        # The name alone: the same photos in another place are the same data.
        "source": EMBEDDED_SAMPLE if config.source == "sample" else store.name,
        "source_digest": dataset.digest,
        "crop_margin": CROP_MARGIN,
        "interpolation": "halving and INTER_LINEAR",
        "validation_share": VALIDATION_SHARE,
        "near_duplicate_distance": duplicates.MAX_DISTANCE,
        "seed": config.seed,
    }
    started = time.perf_counter()
    by_pool = {"train": dataset.train} | ({} if dataset.test is None else {"test": dataset.test})
    crops = CROP_CHOICES[config.crop]
    key = {
        "carflavor": carflavor.__version__,
        "files": store.fingerprint(),
        "crops": crops,
        "image_size": config.image_size,
        "settings": settings,
    }
    rows = {split: len(photos) for split, photos in by_pool.items()}
    with Build(out / WORK_FOLDER, key, rows, crops, config.image_size) as build:
        if build.starts_over:
            _logger.warning("The source or a setting is not what it was when %s was begun: starting over", out)
        _decode(config, store, by_pool, build)
        photos = [*dataset.train, *(dataset.test or [])]
        hashes = _collect_hashes(by_pool, build)
        groups = duplicates.group_near_duplicates(hashes)
        splits = _split(store, dataset, groups, config.seed)
        skipped = _finish(by_pool, splits, build, dataset.class_names, settings)
        build.publish(splits)
        summary = _summarise(out, splits, skipped, time.perf_counter() - started, settings)
        summary |= _summarise_near_duplicates(out, splits, photos, hashes, groups)
        _logger.info("%s", _describe_near_duplicates(summary))
        _write_reports(out, summary)
        build.remove()
    return out, summary


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


def _decode(config, store, by_pool, build):
    """Brings all photos into their pools."""
    tasks = [
        Task(split, row, photo)
        for split, photos in by_pool.items()
        for row, photo in enumerate(photos)
        if (split, row) not in build.done
    ]
    total = sum(map(len, by_pool.values()))
    if done := total - len(tasks):
        _logger.info("Going on after %s of %s photos", f"{done:,}", f"{total:,}")
    workers = config.workers or min(count_cores(), 1 + len(tasks) // _PHOTOS_A_PROCESS)
    with progress_bar("preprocess", total, done) as progress:
        for entries in decode_photos(tasks, store, build.pools, CROP_MARGIN, workers):
            errors = [entry for entry in entries if "error" in entry]
            build.add([entry for entry in entries if config.skip_unreadable or "error" not in entry])
            if errors and not config.skip_unreadable:
                first = errors[0]
                place = f"{store.place}/{by_pool[first['split']][first['row']].place}"
                raise ValueError(f"{place}: {first['error']}. Leave such photos out with skip_unreadable=true")
            progress.update(len(entries))


def _collect_hashes(by_pool, build):
    """Returns the hashes of photos by which near-duplicates are found, uint64 (N, 4); zeros of those left out."""
    rows = [(split, row) for split, photos in by_pool.items() for row in range(len(photos))]
    return np.array([build.done[place].get("hash", [0] * 4) for place in rows], np.uint64)


def _finish(by_pool, splits, build, class_names, settings):
    """Makes record files of the pools; returns what was left out, a list of dicts."""
    places = {photo.name: (split, row) for split, photos in by_pool.items() for row, photo in enumerate(photos)}
    files, skipped = {}, []
    for split, photos in splits.items():
        kept = []
        for photo in photos:
            pool, row = places[photo.name]
            known = build.done[pool, row]
            if "error" in known:
                skipped.append({"photo": photo.name, "split": split, "reason": known["error"]})
            else:
                kept.append({"row": row, "label": photo.label, "source": photo.name} | known)
        if not kept:
            raise ValueError(f"Expected at least one readable photo for {split}.h5, got none of {len(photos):,}")
        files[split] = ("test" if split == "test" else "train", kept)
    build.finish(files, class_names, settings)
    return skipped


def _summarise(out, splits, skipped, seconds, settings):
    counts, size = {}, 0
    for split in splits:
        with records.RecordFile(out / f"{split}.h5") as file:
            class_names = file.class_names
            counts[split] = np.bincount(file.labels, minlength=len(class_names)).tolist()
            size += file.path.stat().st_size
    photos = sum(sum(values) for values in counts.values())
    return {
        "source": settings["source"],
        "photos": photos,
        "skipped": len(skipped),
        "seconds": round(seconds, 2),
        "photos_per_second": round((photos + len(skipped)) / max(seconds, 1e-9), 1),
        "bytes": size,
        "photos_by_split": {split: sum(values) for split, values in counts.items()},
        "photos_by_class": [
            {"class": name, **{split: values[row] for split, values in counts.items()}}
            for row, name in enumerate(class_names)
        ],
        "settings": settings,
        "skipped_photos": skipped,
    }


def _summarise_near_duplicates(out, splits, photos, hashes, groups):
    """Returns what the reports say of the near-duplicates among the photos that were written."""
    rows_by_name = {photo.name: row for row, photo in enumerate(photos)}
    rows, by_group = {}, {}
    for split in splits:
        with records.RecordFile(out / f"{split}.h5") as file:
            rows[split] = [rows_by_name[name] for name in file.sources]
            for row, name, label in zip(rows[split], file.sources, file.labels, strict=True):
                photo = {"photo": name, "split": split, "class": file.class_names[label]}
                by_group.setdefault(int(groups[row]), []).append(photo)
    found = [by_group[group] for group in sorted(by_group) if len(by_group[group]) > 1]
    found = [[{"group": number, **photo} for photo in group] for number, group in enumerate(found, start=1)]
    differing = [group for group in found if len({photo["class"] for photo in group}) > 1]
    test_photos = None
    if "test" in splits:
        learned = hashes[[*rows["train"], *rows["validation"]]]
        test_photos = int(duplicates.have_near_duplicates(hashes[rows["test"]], learned).sum())
    return {
        "near_duplicate_groups": len(found),
        "near_duplicate_groups_with_different_labels": len(differing),
        "near_duplicate_photos": sum(len(group) for group in found),
        "near_duplicate_test_photos": test_photos,
        "near_duplicates": [photo for group in found for photo in group],
        "near_duplicates_with_different_labels": [photo for group in differing for photo in group],
    }


def _describe_near_duplicates(summary):
    if not summary["near_duplicates"]:
        return "Near-duplicates: none"
    text = (
        f"Near-duplicates: {summary['near_duplicate_photos']:,} photos in {summary['near_duplicate_groups']:,} groups; "
        f"groups with different labels: {summary['near_duplicate_groups_with_different_labels']:,}"
    )
    if summary["near_duplicate_test_photos"] is not None:
        text += f"; test photos with one in train or validation: {summary['near_duplicate_test_photos']:,}"
    return text


def _write_reports(out, summary):
    headline = [("photos", f"{summary['photos']:,}"), ("left out", f"{summary['skipped']:,}")]
    headline += [(split, f"{count:,}") for split, count in summary["photos_by_split"].items()]
    headline += [("near-duplicates", f"{summary['near_duplicate_photos']:,}")]
    headline += [("photos a second", f"{summary['photos_per_second']:,}"), ("bytes", f"{summary['bytes']:,}")]
    sections = [
        report.Section("Photos of the training split", figure=_contact_sheet(out)),
        report.Section("Photos left out", table=summary["skipped_photos"])
        if summary["skipped_photos"]
        else report.Section("Photos left out", text="None: every photo was read."),
        *_near_duplicate_sections(out, summary),
        report.Section("Photos by class", table=summary["photos_by_class"]),
    ]
    report.write_report(out / "report.html", "What preprocess wrote", headline, sections)
    partial = out / f".report.json.{os.getpid()}"
    partial.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, out / "report.json")


def _contact_sheet(out):
    with records.RecordFile(out / "train.h5") as file:
        rows = np.linspace(0, len(file) - 1, min(_SHEET_PHOTOS, len(file))).astype(int)
        photos = [file.images(file.crops[0])[row] for row in rows]
        captions = [file.class_names[file.labels[row]] for row in rows]
    return report.photo_grid_figure(photos, captions, columns=6)


def _near_duplicate_sections(out, summary):
    if not summary["near_duplicates"]:
        return [report.Section("Near-duplicates", text="None: no two photos show one picture.")]
    text = (
        f"{_describe_near_duplicates(summary)}.\nNo group is in training and in validation. Of some groups two photos "
        f"are shown; report.json lists them all."
    )
    sections = [report.Section("Near-duplicates", text=text, figure=_near_duplicate_sheet(out, summary))]
    if summary["near_duplicates_with_different_labels"]:
        text = "Where it is one picture, no more than one of its labels is right."
        table = summary["near_duplicates_with_different_labels"]
        sections.append(report.Section("Near-duplicates with different labels", text=text, table=table))
    return sections


def _near_duplicate_sheet(out, summary):
    """Shows two photos of some groups side by side, first of those whose labels differ."""
    groups, shown = {}, []
    for photo in [*summary["near_duplicates_with_different_labels"], *summary["near_duplicates"]]:
        groups.setdefault(photo["group"], []).append(photo)
    for first, *others in list(groups.values())[:_SHEET_GROUPS]:
        shown += [first, next((photo for photo in others if photo["class"] != first["class"]), others[0])]
    squares = {}
    for split in {photo["split"] for photo in shown}:
        with records.RecordFile(out / f"{split}.h5") as file:
            for name in {photo["photo"] for photo in shown if photo["split"] == split}:
                # The whole photo where it is there: that is what was compared.
                squares[name] = file.images(file.crops[-1])[file.sources.index(name)]
    captions = [f"group {photo['group']}, {photo['split']}\n{photo['photo']}\n{photo['class']}" for photo in shown]
    return report.photo_grid_figure([squares[photo["photo"]] for photo in shown], captions, columns=4)


def open_split(data, split, parameter="data"):
    """Opens a record file of what the user calls `data`.

    Args:
        data: `sample`, or a folder with record files as path or URI.
        split: `train`, `validation` or `test`.
        parameter: What the user calls it.

    Returns:
        `RecordFile`.
    """
    folder = sample_records() if data == "sample" else resolve_input(data, parameter, [f"{split}.h5"])
    path = Path(folder) / f"{split}.h5"
    if not path.is_file():
        raise ValueError(f"{parameter}: expected {path}, which preprocess writes, got nothing")
    file = records.RecordFile(path)
    missing = {"source", "crop_margin"} - set(file.settings)
    if missing:
        raise ValueError(f"{path}: expected settings with {' and '.join(sorted(missing))}, got none")
    return file
