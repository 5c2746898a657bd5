"""What is wrong with a dataset: findings by kind, from what its layout says and what decoding its photos has told."""

import posixpath
from collections import Counter
from dataclasses import dataclass

import numpy as np

from carflavor.data import duplicates
from carflavor.data.layouts import Photo
from carflavor.data.layouts.dataset import is_named_as, is_photo
from carflavor.limits import Limits


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        meaning: What was found, and what it does to a model.
        advice: What to do about it.
    """

    meaning: str
    advice: str


# Pixels. Of what has less, one pixel becomes seven or more of the 224 that networks see.
TINY_SIDE = 32
# What a served model takes by default: nobody will send it photos that are larger.
HUGE_PIXELS = Limits.photo_pixels
# The least imbalance of the datasets on which remedies for it are studied, 10 to 200: Cui et al., 2019,
# https://arxiv.org/abs/1901.05555
MAX_IMBALANCE = 10

# By the words of `fail_on`, what harms most first.
KINDS = {
    "leak": Kind(
        "Test photos that show the picture of a photo that is learned from: accuracy comes out too high.",
        "Remove them from one side.",
    ),
    "conflict": Kind(
        "Photos of one picture under different labels: no more than one of these is right.",
        "Correct the labels, or remove the photos.",
    ),
    "unreadable": Kind(
        "Photos that cannot be decoded. preprocess stops at them.",
        "Fetch them again or remove them, or set skip_unreadable=true.",
    ),
    "truncated": Kind(
        "Those of the unreadable ones that begin like a photo, and are cut off or damaged.",
        "Fetch them again: a copy or download has ended early.",
    ),
    "missing": Kind("Labels without a photo.", "Bring the files, or remove the labels."),
    "unlabelled": Kind("Photos beside the labelled ones that no label names. They are not used.", "Label them."),
    "box": Kind(
        "Boxes without area, or that reach beyond the photo: what is cut out is not the car.",
        "Correct them. Was the photo scaled or turned since, or is the box x, y, width, height?",
    ),
    "absent_class": Kind(
        "Classes without a photo in a split: they cannot be learned, or cannot be measured.",
        "Add photos, or remove the class.",
    ),
    "duplicate": Kind(
        "Photos whose files are equal (SHA-256), whatever they are called: they count twice.",
        "Keep one of each group.",
    ),
    "near_duplicate": Kind(
        "Photos that show one picture: equal, encoded again, scaled, brighter or mirrored. preprocess keeps them "
        "on one side of the validation split.",
        "Keep one of each group, unless you want them.",
    ),
    "extension": Kind(
        "Files that end as those of another format do. They are read all the same, by other programs perhaps not.",
        "Rename them.",
    ),
    "tiny": Kind(
        f"Photos, or boxes of cars, whose shorter side has less than {TINY_SIDE} pixels: too few to tell cars apart.",
        "Remove them, or find larger ones.",
    ),
    "huge": Kind(
        f"Photos of more than {HUGE_PIXELS / 1e6:.0f} million pixels, which a served model refuses; slow to decode.",
        "Scale them down, with their boxes.",
    ),
    "grey": Kind(
        "Photos without colours, however they are stored.",
        "Nothing where they are few. Many in one class would be what it is recognised by.",
    ),
    "imbalance": Kind(
        f"Classes with less than one training photo for {MAX_IMBALANCE} of the largest: they are named too rarely.",
        "Add photos, or train with class_weights.",
    ),
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A labelled photo and what is known of it."""

    photo: Photo
    split: str
    class_name: str
    known: dict
    group: int

    @property
    def is_readable(self):
        return "error" not in self.known

    @property
    def hash(self):
        return duplicates.stack_hashes([self.known])[0]

    def describe(self, **details):
        return {"photo": self.photo.name, "split": self.split, "class": self.class_name, **details}


def parse_fail_on(text):
    """Reads kinds of findings, separated by commas.

    Returns:
        Tuple of keys of `KINDS`.

    Raises:
        ValueError: If there is another word.
    """
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not set(words) <= KINDS.keys():
        raise ValueError(f"Expected fail_on to be some of {', '.join(KINDS)}, with commas. Received: fail_on={text!r}")
    return words


def say_refusal(findings, fail_on, place, report):
    """Says which of the kinds that should fail were found, in a sentence.

    Args:
        findings: What `find_all` returns.
        fail_on: What `parse_fail_on` returns.
        place: What to call the dataset.
        report: `Path` of the page that shows the findings.

    Returns:
        The sentence, or None where there are none of them.
    """
    found = [f"{kind} {len(findings[kind]):,}" for kind in KINDS if kind in fail_on and findings[kind]]
    if not found:
        return None
    return f"{place}: expected no findings of fail_on={','.join(fail_on)}, got {', '.join(found)}; see {report}"


def count_findings(summary):
    """Returns the number of findings of each kind in what `summarise` returned, as metrics of a run."""
    return {f"audit_{kind}": found["count"] for kind, found in summary["findings"].items()}


def say_counts(findings):
    """Says in a line what was found."""
    return ", ".join(f"{kind} {len(items):,}" for kind, items in findings.items() if items) or "nothing"


def find_all(dataset, splits, facts, groups, names):
    """Looks for everything that may be wrong with a dataset.

    Args:
        dataset: `carflavor.data.layouts.Dataset`.
        splits: Dict of split -> list of `Photo`: all of the dataset's.
        facts: List of dicts, what `carflavor.data.decoding.decode_photos` yields of each photo of `dataset.photos`.
        groups: int array, what `carflavor.data.duplicates.group_near_duplicates` returns for them.
        names: Names of all files of the store.

    Returns:
        Dict of each kind, in the order of `KINDS`, -> list of items, dicts for JSON: `photo`, `split` and `class` as
        far as they are known, and what is peculiar to the kind, such as `detail`, a text.
    """
    split_of = {photo.name: split for split, photos in splits.items() for photo in photos}
    rows = [
        _Row(photo, split_of[photo.name], dataset.class_names[photo.label], known, int(group))
        for photo, known, group in zip(dataset.photos, facts, groups, strict=True)
    ]
    found = {kind: [] for kind in KINDS}
    missing = set(dataset.missing)
    for row in rows:
        if row.photo.name in missing:
            found["missing"].append(row.describe())
        for kind, details in _check_photo(row, row.photo.name in missing):
            found[kind].append(row.describe(**details))
    found["grey"] = _find_grey(rows)
    found["unlabelled"] = [{"photo": name} for name in _find_unlabelled(splits, names)]
    counts = _count_photos(splits, dataset, facts)
    found["absent_class"] = _find_absent_classes(splits, dataset.class_names, counts)
    found["imbalance"] = _find_imbalance(dataset.class_names, counts)
    return found | _find_copies([row for row in rows if row.is_readable])


def summarise(dataset, splits, facts, findings):
    """Puts together what a report says of a dataset for machines.

    Args:
        dataset: As `find_all` takes it.
        splits: Likewise.
        facts: Likewise.
        findings: What it returned.

    Returns:
        Dict for JSON: numbers of photos that have labels, of those that can be read, of near-duplicates, and all
        findings. A number that needs labelled test photos is None where there are none.
    """
    counts = _count_photos(splits, dataset, facts)
    groups = {}
    for item in findings["near_duplicate"]:
        groups.setdefault(item["group"], []).append(item)
    return {
        "labelled_photos": len(dataset.photos),
        "photos": sum(map(sum, counts.values())),
        "photos_by_split": {split: sum(values) for split, values in counts.items()},
        "near_duplicate_groups": len(groups),
        "near_duplicate_groups_with_different_labels": sum(_differ(group) for group in groups.values()),
        "near_duplicate_photos": len(findings["near_duplicate"]),
        "near_duplicate_test_photos": None if dataset.test is None else len(findings["leak"]),
        "warnings": list(dataset.warnings),
        "photos_by_class": [
            {"class": name, **{split: values[label] for split, values in counts.items()}}
            for label, name in enumerate(dataset.class_names)
        ],
        "findings": {kind: {"count": len(items), "items": items} for kind, items in findings.items()},
    }


def _count_photos(splits, dataset, facts):
    """Returns the number of photos that can be read in each class, a dict of split -> list of int."""
    readable = {photo.name for photo, known in zip(dataset.photos, facts, strict=True) if "error" not in known}
    counts = {}
    for split, photos in splits.items():
        labels = [photo.label for photo in photos if photo.name in readable]
        counts[split] = np.bincount(np.array(labels, int), minlength=len(dataset.class_names)).tolist()
    return counts


def _differ(group):
    return len({item["class"] for item in group}) > 1


def _check_photo(row, is_missing):
    """Yields kinds and details of what is wrong with a photo by itself."""
    known, size, box = row.known, row.known.get("size"), row.photo.box
    # One with a size was decoded, and only its box cannot be cut out.
    if not row.is_readable and not size and not is_missing:
        yield "unreadable", {"detail": known["error"]}
        # The words of carflavor.image, by which no size and no other limit is meant.
        if known.get("format") and "cut off" in known["error"]:
            yield "truncated", {"detail": known["error"]}
    # Of a photo inside a table, the name is only a name.
    if row.photo.row is None and known.get("format") and not is_named_as(row.photo.file, known["format"]):
        yield "extension", {"detail": f"is in fact {known['format']}"}
    wrong = box and _judge_box(box, size)
    if wrong:
        yield "box", {"detail": wrong, "box": list(box), "size": size}
    if size:
        height, width = size
        if min(size) < TINY_SIDE:
            yield "tiny", {"detail": f"{width:,} x {height:,} px"}
        elif box and not wrong and min(sides := (box[2] - box[0], box[3] - box[1])) < TINY_SIDE:
            yield "tiny", {"detail": f"box of {sides[0]:,} x {sides[1]:,} px", "box": list(box), "size": size}
        if width * height > HUGE_PIXELS:
            yield "huge", {"detail": f"{width:,} x {height:,} px"}


def _judge_box(box, size):
    """Says what is wrong with a box, or returns None. Of a photo without a size only the box itself is looked at."""
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        return f"has no area, from ({x1:,}, {y1:,}) to ({x2:,}, {y2:,})"
    if size is None:
        return None
    height, width = size
    if not (max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
        return f"lies outside the photo of {width:,} x {height:,} px"
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    return f"reaches {beyond:,} px beyond the photo of {width:,} x {height:,} px" if beyond > 0 else None


def _find_grey(rows):
    grey = [row for row in rows if row.known.get("grey")]
    by_class, all_by_class = (Counter(row.class_name for row in some) for some in (grey, rows))
    # How many of a class are is what there is to judge.
    return [
        row.describe(detail=f"{by_class[row.class_name]:,} of {all_by_class[row.class_name]:,} of its class")
        for row in sorted(grey, key=lambda row: -by_class[row.class_name])
    ]


def _find_unlabelled(splits, names):
    """Returns the photos in or below the folders in which all labelled ones of a split are.

    Not those elsewhere: the figure of a README, another copy of the dataset, or test photos that have no labels.
    """
    labelled = {photo.file for photos in splits.values() for photo in photos}
    # Photos inside tables lie in no folder.
    parents = [{posixpath.dirname(photo.file) for photo in photos if photo.row is None} for photos in splits.values()]
    # With a slash at its end, but for the top.
    folders = tuple(posixpath.join(posixpath.commonpath(some), "") for some in parents if some)
    return [name for name in names if is_photo(name) and name not in labelled and name.startswith(folders)]


def _find_absent_classes(splits, class_names, counts):
    labelled = {split: Counter(photo.label for photo in photos) for split, photos in splits.items()}
    return [
        {
            "class": name,
            "split": split,
            "detail": f"none of its {labelled[split][label]:,} photos can be read"
            if labelled[split][label]
            else "no photo has its label",
        }
        for label, name in enumerate(class_names)
        for split in splits
        if not counts[split][label]
    ]


def _find_imbalance(class_names, counts):
    learned = np.sum([values for split, values in counts.items() if split != "test"], axis=0)
    largest = int(learned.argmax())
    return [
        {
            "class": class_names[label],
            "photos": int(learned[label]),
            "detail": f"{class_names[largest]} has {learned[largest]:,}",
        }
        for label in np.argsort(learned, kind="stable")
        if 0 < learned[label] * MAX_IMBALANCE < learned[largest]
    ]


def _find_copies(rows):
    """Returns the findings about photos that are like others; all photos here can be read."""
    groups = {}
    for row in rows:
        # A photo of one grey is near nothing, and may have equals all the same.
        key = ("near", row.group) if row.hash.any() else ("equal", row.known["sha256"])
        groups.setdefault(key, []).append(row)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    found = {"conflict": [], "duplicate": [], "near_duplicate": []}
    number_of = {}
    for number, ((likeness, _), group) in enumerate(groups.items(), start=1):
        number_of |= {row.photo.name: number for row in group}
        same = Counter(row.known["sha256"] for row in group)
        items = [row.describe(group=number, **_compare(row, group[0])) for row in group]
        if _differ(items):
            found["conflict"] += items
        if likeness == "near":
            found["near_duplicate"] += items
        found["duplicate"] += [
            row.describe(group=number, sha256=row.known["sha256"]) for row in group if same[row.known["sha256"]] > 1
        ]
    return {"leak": _find_leaks(rows, number_of)} | found


def _find_leaks(rows, number_of):
    """Returns the test photos with an equal or near-duplicate that is learned from, and of those the nearest."""
    learned = [row for row in rows if row.split != "test"]
    test = [row for row in rows if row.split == "test"]
    by_sha256 = {}
    for row in learned:
        by_sha256.setdefault(row.known["sha256"], row)
    stacked = [duplicates.stack_hashes([row.known for row in some]) for some in (test, learned)]
    items = []
    for row, nearest in zip(test, duplicates.find_nearest(*stacked), strict=True):
        copy = by_sha256.get(row.known["sha256"]) or (learned[nearest] if nearest >= 0 else None)
        if copy:
            group = number_of[row.photo.name]
            items.append(row.describe(group=group, **_compare(row, copy), copy_of=copy.describe()))
    return items


def _compare(row, other):
    """Returns how alike two photos are."""
    if row is other:
        return {"bits": 0, "mirrored": False, "equal": True}
    bits, mirrored = duplicates.compare_hashes(row.hash, other.hash)
    return {"bits": bits, "mirrored": mirrored, "equal": row.known["sha256"] == other.known["sha256"]}
