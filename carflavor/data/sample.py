"""The embedded sample: drawn photos in the layout of the Stanford Cars devkit.

The first run of the project needs no download, and goes through the reader that real data goes through.
"""

import io
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import scipy.io
from numpy.lib.recfunctions import drop_fields

from carflavor.data.drawing import CLASS_NAMES, draw_photo
from carflavor.image import encode_jpeg

TRAIN_PER_CLASS = 112
TEST_PER_CLASS = 28


def write_sample(folder, train_per_class=TRAIN_PER_CLASS, test_per_class=TEST_PER_CLASS, seed=0):
    """Writes the sample as a Stanford Cars folder: `cars_train/`, `cars_test/` and `devkit/`.

    The same seed gives the same bytes, and a photo does not depend on how many others are drawn.

    Args:
        folder: Where to write; must not exist or be empty. It appears only when whole.
        train_per_class: Number of training photos of each model.
        test_per_class: Number of test photos of each model.
        seed: Non-negative int.

    Raises:
        FileExistsError: If the folder holds anything.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"The sample is written into a new or empty folder. Received: {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        names = np.empty((1, len(CLASS_NAMES)), object)
        names[0] = CLASS_NAMES
        (partial / "devkit").mkdir()
        _write_mat(partial / "devkit" / "cars_meta.mat", class_names=names)
        train = _write_split(partial / "cars_train", train_per_class, seed, 0)
        test = _write_split(partial / "cars_test", test_per_class, seed, 1)
        _write_mat(partial / "devkit" / "cars_train_annos.mat", annotations=train)
        _write_mat(partial / "devkit" / "cars_test_annos_withlabels.mat", annotations=test)
        _write_mat(partial / "devkit" / "cars_test_annos.mat", annotations=drop_fields(test, "class"))
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write_split(folder, per_class, seed, split):
    """Writes the photos of a split in shuffled order; returns their annotations, a `(1, N)` struct array."""
    folder.mkdir()
    photos = [(class_id, index) for class_id in range(len(CLASS_NAMES)) for index in range(per_class)]
    np.random.default_rng([seed, split]).shuffle(photos)
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    annotations = np.empty((1, len(photos)), [(field, object) for field in fields])
    for number, (class_id, index) in enumerate(photos):
        image, (x1, y1, x2, y2) = draw_photo(class_id, np.random.default_rng([seed, split, class_id, index]))
        fname = f"{number + 1:05d}.jpg"
        (folder / fname).write_bytes(encode_jpeg(image))
        # 1-based and inclusive, in the smallest unsigned type: what readers of the original must cope with.
        numbers = (x1 + 1, y1 + 1, x2, y2, class_id + 1)
        annotations[0, number] = (*(np.array(value, np.min_scalar_type(value)) for value in numbers), fname)
    return annotations


def _write_mat(path, **variables):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables)
    # The first 116 bytes are free text; scipy puts the time there, and the same seed would give other bytes.
    buffer.seek(0)
    buffer.write(b"MATLAB 5.0 MAT-file, carflavor sample".ljust(116))
    path.write_bytes(buffer.getvalue())
