"""Changed copies of the photos of a record file, written in shards, and gathered into one file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carflavor.data.operations import Change, Operations
from carflavor.data.records import RecordFile, RecordWriter

_LEAST_VISIBLE = 0.5  # of the car's box, as share of its area
_TRIES = 20  # to draw a change that leaves so much of it


@dataclass(frozen=True)
class View:
    """What a stored square shows.

    Attributes:
        size: `(height, width)` in pixels of the original photo.
        box: `(x1, y1, x2, y2)`, 0-based half-open: where the car is in it.
    """

    size: tuple
    box: tuple


@dataclass(frozen=True)
class Copying:
    """How copies are made. Small, and the same for each shard: it goes to the processes and machines that write them.

    A copy depends on its original, the operations, the seed and its own number, and on nothing else.

    Attributes:
        originals: Path of the record file with the photos.
        folder: Path of the folder for the shards, which are record files themselves.
        operations: Text for `carflavor.data.operations.Operations`.
        copies: Copies of each photo.
        seed: Seed of everything random.
        photos_a_shard: Originals whose copies go into one shard.
    """

    originals: str
    folder: str
    operations: str
    copies: int
    seed: int
    photos_a_shard: int

    def find_shard(self, number):
        """Returns the `Path` of a shard. What is there under this name is whole."""
        return Path(self.folder) / f"{number}.h5"

    def write_shard(self, number):
        """Writes the copies of some photos; returns how many.

        Args:
            number: Number of the shard, from 0.
        """
        operations = Operations(self.operations)
        first = number * self.photos_a_shard
        with RecordFile(self.originals) as originals:
            rows = range(first, min(first + self.photos_a_shard, len(originals)))
            path, crops = self.find_shard(number), originals.crops
            with RecordWriter(path, crops, originals.image_size, originals.class_names, {}) as writer:
                for row in rows:
                    for copy in range(1, self.copies + 1):
                        writer.append(**make_copy(originals, row, operations, copy, self.seed))
        return len(rows) * self.copies

    def gather(self, path, shards, settings, on_photo):
        """Writes a record file of the originals and after them the copies, those of one photo beside each other.

        Args:
            path: Path of the file.
            shards: Number of shards.
            settings: What made the file, for JSON.
            on_photo: Function that is called after each photo.
        """
        with RecordFile(self.originals) as first:
            with RecordWriter(path, first.crops, first.image_size, first.class_names, settings) as writer:
                _append_all(first, writer, on_photo)
                for number in range(shards):
                    with RecordFile(self.find_shard(number)) as shard:
                        _append_all(shard, writer, on_photo)


def make_copy(records, row, operations, copy, seed):
    """Makes one copy of one photo.

    The same change is done to all its squares, each as a picture of its own: the `box` square turns about its own
    centre. To cut it anew out of a changed photo would undo every shift and zoom, for the cut follows the car; and the
    photo itself is there as a small square at most.

    Args:
        records: `RecordFile` with the photo.
        row: Its row.
        operations: `Operations`.
        copy: Number of the copy, from 1.
        seed: Seed of everything random.

    Returns:
        Dict of what `RecordWriter.append` takes. `size` is the original's, `box` where the car is in the whole photo.
    """
    source = records.sources[row]
    views = find_views(records, row)
    words = np.frombuffer(hashlib.sha256(source.encode()).digest(), np.uint32)
    change = _draw_change(operations, views.values(), np.random.default_rng([seed, copy, *words]))
    size = tuple(records.sizes[row].tolist())
    return {
        "images": {crop: change.apply(records.images(crop)[row], views[crop].size) for crop in records.crops},
        "label": records.labels[row],
        "source": f"{source}#copy{copy}",
        "size": size,
        "box": change.move_box(views["full"].box, size),
    }


def find_views(records, row):
    """Returns a dict of crop name -> `View` for `box` and `full`, stored or not."""
    height, width = size = tuple(records.sizes[row].tolist())
    x1, y1, x2, y2 = records.boxes[row].tolist()
    x1, y1, x2, y2 = box = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x1 >= x2 or y1 >= y2:
        # The squares of whole photos are written whatever their box is.
        return dict.fromkeys(("box", "full"), View(size, (0, 0, width, height)))
    margin = records.settings["crop_margin"]
    left, top = max(x1 - margin, 0), max(y1 - margin, 0)
    cut_size = min(y2 + margin, height) - top, min(x2 + margin, width) - left
    return {"box": View(cut_size, (x1 - left, y1 - top, x2 - left, y2 - top)), "full": View(size, box)}


def _draw_change(operations, views, random):
    for _ in range(_TRIES):
        change = operations.draw(random)
        if all(change.visible_share(view.box, view.size) >= _LEAST_VISIBLE for view in views):
            return change
    return Change(edits=change.edits)


def _append_all(records, writer, on_photo):
    images = {crop: records.images(crop) for crop in records.crops}
    columns = zip(records.labels, records.sources, records.sizes, records.boxes, strict=True)
    for row, (label, source, size, box) in enumerate(columns):
        writer.append({crop: images[crop][row] for crop in images}, label, source, size, box)
        on_photo()
