"""Changed copies of the training photos: `train-augmented.h5` beside `train.h5`."""

import logging
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version

import cv2
import mlflow
import numpy as np
from PIL import __version__ as pillow_version

import carflavor
from carflavor import report, tracking
from carflavor.data.copies import Copying, find_views
from carflavor.data.locations import resolve_output
from carflavor.data.operations import Operations
from carflavor.data.processes import map_in_processes
from carflavor.data.records import AUGMENTED, RecordFile
from carflavor.data.shards_on_spark import write_shards_on_spark
from carflavor.limits import count_cores
from carflavor.locking import lock, open_work_folder
from carflavor.preprocess import open_split, sample_records
from carflavor.progress import progress_bar
from carflavor.spark import check_master, check_visible, open_session

# Each changes where the car is, its colours, or what of it is seen, as far as photos of cars differ. None upside down:
# no photo is. `shift`, `zoom` and `pad` are left to `crop`, which moves and enlarges.
DEFAULT_OPERATIONS = "crop,flip,rotate,color,blur,erase"
WORK_FOLDER = ".augment"  # beside the record files
_BYTES_A_SHARD = (
    50_000_000  # some hundred copies: little is lost with a task, and a hundred thousand files are not made
)
_SHEET_PHOTOS = 8
_SHEET_COPIES = 5
_BOX_COLOR = (255, 200, 0)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AugmentConfig:
    """Parameters of the step; the same names stand in MLproject.

    Attributes:
        data: Folder with `train.h5`, or `sample`.
        copies: Copies of each photo.
        operations: What is done to each copy, see `carflavor.data.operations.Operations`.
        seed: Seed of everything random.
        workers: Processes that make copies; 0 for one a core. Not used with `master`.
        master: Spark master, as `carflavor.spark.check_master` takes it, or empty.
    """

    data: str = "sample"
    copies: int = 1
    operations: str = DEFAULT_OPERATIONS
    seed: int = 0
    workers: int = 0
    master: str = ""


def augment(config):
    """Writes `train-augmented.h5` beside `train.h5` and logs what went into it.

    Args:
        config: `AugmentConfig`.

    Returns:
        `Path` of the file.

    Raises:
        ValueError: If a parameter or the data is not what is expected.
    """
    with tracking.step_run("augment", config):
        path, summary = write_augmented(config)
        mlflow.set_tag(tracking.RECORDS_TAG, str(path.parent))
        mlflow.log_metrics({name: summary[name] for name in ("photos", "copies", "photos_per_second", "bytes")})
        mlflow.log_dict(summary["settings"], "data.json")
        figures = _draw_sheets(path, config.copies)
        for crop, figure in figures.items():
            mlflow.log_figure(figure, f"copies_{crop}.png")
        mlflow.log_text(_render_report(summary, figures), "report.html")
        _logger.info("%s photos, %s of them copies: %s", f"{summary['photos']:,}", f"{summary['copies']:,}", path)
    return path


def write_augmented(config):
    """Writes `train-augmented.h5`; no MLflow run.

    The file gets its name when it is whole. What a killed process has done is kept in a hidden folder beside it, and
    the next one with the same photos and settings goes on there.

    Args:
        config: `AugmentConfig`.

    Returns:
        `Path` of the file, and a dict with the numbers of `photos`, `copies` among them, copies a second as
        `photos_per_second`, `bytes`, and the `settings` in the file.

    Raises:
        ValueError: If a parameter or the data is not what is expected.
    """
    operations = Operations(config.operations)
    check_master(config.master)
    folder = sample_records() if config.data == "sample" else resolve_output(config.data, "data")
    path = folder / f"{AUGMENTED}.h5"
    started = time.perf_counter()
    with (
        open_split(config.data, "train") as originals,
        lock(folder / WORK_FOLDER / "lock", f"Another process augments the photos in {folder}"),
    ):
        if not len(originals):
            raise ValueError(f"{originals.path}: expected photos to copy, got none")
        settings = {
            **originals.settings,
            "augmentation": {
                "operations": str(operations),
                "copies": config.copies,
                "seed": config.seed,
                "originals_digest": originals.digest(),
                "opencv": cv2.__version__,
                "pillow": pillow_version,
                "numpy": version("numpy"),
            },
        }
        key = [carflavor.__version__, _BYTES_A_SHARD, settings]
        copy_bytes = config.copies * len(originals.crops) * 3 * originals.image_size**2
        copying = Copying(
            originals=str(originals.path),
            folder=str(open_work_folder(folder / WORK_FOLDER, key, "The photos")),
            operations=str(operations),
            copies=config.copies,
            seed=config.seed,
            photos_a_shard=max(1, _BYTES_A_SHARD // copy_bytes),
        )
        made = _write_shards(config, copying, len(originals), folder)
        seconds = time.perf_counter() - started
        photos = len(originals) * (1 + config.copies)
        with progress_bar("gather", photos) as progress:
            copying.gather(path, _count_shards(copying, len(originals)), settings, progress.update)
        # A network drive keeps the lock, which is open, and so its folder.
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    summary = {
        "photos": photos,
        "copies": len(originals) * config.copies,
        "photos_per_second": round(made / max(seconds, 1e-9), 1),
        "bytes": path.stat().st_size,
        "settings": settings,
    }
    return path, summary


def _count_shards(copying, photos):
    return -(-photos // copying.photos_a_shard)


def _write_shards(config, copying, photos, folder):
    """Writes the shards that are not there; returns the number of copies in them."""
    numbers = range(_count_shards(copying, photos))
    left = [number for number in numbers if not copying.find_shard(number).is_file()]
    sizes = [min(copying.photos_a_shard, photos - number * copying.photos_a_shard) for number in numbers]
    total, made = photos * config.copies, sum(sizes[number] for number in left) * config.copies
    if not left:
        return 0
    if made < total:
        _logger.info("Going on after %s of %s copies", f"{total - made:,}", f"{total:,}")
    with progress_bar("augment", total, total - made) as progress:
        if config.master:
            with open_session(config.master, "augment") as session:
                check_visible(session, folder, "data")
                write_shards_on_spark(
                    session,
                    copying,
                    left,
                    lambda written: progress.update(sum(sizes[number] for number in written) * config.copies),
                )
        else:
            workers = min(config.workers or count_cores(), max(len(left), 1))
            for written in map_in_processes(copying.write_shard, left, workers):
                progress.update(written)
    return made


def _draw_sheets(path, copies):
    """Draws originals beside their copies; returns a dict of crop name -> `Figure`."""
    figures = {}
    with RecordFile(path) as file:
        photos = len(file) // (1 + copies)
        shown = min(copies, _SHEET_COPIES)
        groups = max(1, (1 + _SHEET_COPIES) // (1 + shown))  # in a row of the sheet
        for crop in file.crops:
            pictures, captions = [], []
            for row in np.linspace(0, photos - 1, min(_SHEET_PHOTOS * groups, photos)).astype(int):
                view = find_views(file, row)[crop]
                for copy in range(1 + shown):
                    place = row if copy == 0 else photos + row * copies + copy - 1
                    picture = report.unsquash(file.images(crop)[place], view.size)
                    if crop == "full":
                        picture = _draw_box(picture, file.boxes[place], view.size)
                    pictures.append(picture)
                    captions.append(f"copy {copy}" if copy else file.class_names[file.labels[row]])
            figures[crop] = report.photo_grid_figure(pictures, captions, columns=(1 + shown) * groups)
    return figures


def _draw_box(picture, box, size):
    scale = picture.shape[1] / size[1]
    x1, y1, x2, y2 = (round(scale * value) for value in box.tolist())
    return cv2.rectangle(picture.copy(), (x1, y1), (x2 - 1, y2 - 1), _BOX_COLOR, max(1, picture.shape[1] // 100))


def _render_report(summary, figures):
    augmentation = summary["settings"]["augmentation"]
    headline = [(name, f"{summary[name]:,}") for name in ("photos", "copies", "bytes")]
    headline += [("copies a second", f"{summary['photos_per_second']:,}")]
    texts = {
        "box": "The car, cut out. First the original, then its copies.",
        "full": "The whole photo, in the shape that it had, with the box that the record file has for it.",
    }
    sections = [report.Section(f"Originals and copies, crop={crop}", texts[crop], figures[crop]) for crop in figures]
    table = [{"setting": name, "value": str(value)} for name, value in augmentation.items()]
    sections.append(report.Section("Settings", table=table))
    return report.render_report("What augment wrote", headline, sections)
