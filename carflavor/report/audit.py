"""What a report shows of the findings about a dataset."""

from dataclasses import dataclass

import numpy as np

from carflavor.data.audit import KINDS
from carflavor.report.page import Section
from carflavor.report.photos import PhotoPair, outline_box, photo_grid_figure, photo_pairs_figure

# Kinds whose photos are told apart by looking at them; those of the others cannot be shown, or are no photos.
_PICTURED = ("unlabelled", "box", "extension", "tiny", "huge", "grey")
_GROUPED = ("conflict", "duplicate", "near_duplicate")
_MAX_PHOTOS = 12
_MAX_PAIRS = 12
_MAX_TABLE_ROWS = 30
_GRID_COLUMNS = 6
_NO_PHOTO = np.full((3, 4, 3), 255, np.uint8)


@dataclass(frozen=True)
class _Shown:
    """What is shown of a kind.

    Attributes:
        pairs: List of pairs of items.
        above: Number of groups that other kinds have shown already.
    """

    pairs: list
    above: int


def pick_photos(findings):
    """Returns the set of names of those photos whose thumbnails `build_audit_sections` shows."""
    names = {item["photo"] for kind in _PICTURED for item in findings[kind][:_MAX_PHOTOS]}
    return names | {item["photo"] for shown in _pick_pairs(findings).values() for pair in shown.pairs for item in pair}


def build_audit_sections(findings, thumbnails):
    """Builds an overview, and a section for each kind that was found.

    Args:
        findings: What `carflavor.data.audit.find_all` returns.
        thumbnails: Dict of name -> uint8 RGB array, of the photos that `pick_photos` names.

    Returns:
        List of `Section`, the overview first.
    """
    found = {kind: items for kind, items in findings.items() if items}
    shown = _pick_pairs(findings)
    sections = [_build_overview(found)]
    for kind, items in found.items():
        text, figure, table = KINDS[kind].meaning, None, None
        if kind in shown:
            text += f"\n{_say_groups(kind, items, shown[kind])}"
            if shown[kind].pairs:
                figure = photo_pairs_figure([_draw_pair(kind, pair, thumbnails) for pair in shown[kind].pairs])
                table = [_tabulate(*pair) for pair in shown[kind].pairs]
        elif kind in _PICTURED:
            text += _say_limit(items, _MAX_PHOTOS)
            figure = _draw_photos(items[:_MAX_PHOTOS], thumbnails)
        else:
            text += _say_limit(items, _MAX_TABLE_ROWS)
            table = items[:_MAX_TABLE_ROWS]
        sections.append(Section(f"{kind}: {len(items):,}", text, figure, table))
    return sections


def _build_overview(found):
    text = "Each kind is shown below; report.json lists every photo. " if found else ""
    if absent := [kind for kind in KINDS if kind not in found]:
        text += f"Looked for and not found: {', '.join(absent)}."
    table = [
        {"kind": kind, "count": len(items), "what it means": KINDS[kind].meaning, "what to do": KINDS[kind].advice}
        for kind, items in found.items()
    ]
    return Section("What was found", text, table=table)


def _say_limit(items, limit):
    return f"\n{limit} of {len(items):,} are shown." if len(items) > limit else ""


def _pick_pairs(findings):
    """Returns a dict of kind -> `_Shown`. A group is shown once, where it matters most."""
    leaks = findings["leak"][:_MAX_PAIRS]
    shown = {"leak": _Shown([(item, item["copy_of"]) for item in leaks], 0)}
    numbers = {item["group"] for item in leaks}
    for kind in _GROUPED:
        groups = {}
        for item in findings[kind]:
            groups.setdefault(item["group"], []).append(item)
        new = [number for number in groups if number not in numbers]
        pairs = [_pick_two(kind, groups[number]) for number in new[:_MAX_PAIRS]]
        shown[kind] = _Shown(pairs, len(groups) - len(new))
        numbers.update(new[:_MAX_PAIRS])
    return shown


def _say_groups(kind, items, shown):
    if kind == "leak":
        return f"Each is beside the photo that it is most like.{_say_limit(items, _MAX_PAIRS)}"
    places = {"above": shown.above, "here": len(shown.pairs)}
    places = " and ".join(f"{count:,} {place}" for place, count in places.items() if count)
    groups = len({item["group"] for item in items})
    return (
        f"{len(items):,} photos in {groups:,} {'group' if groups == 1 else 'groups'}. "
        f"Shown: {places}, with two photos each."
    )


def _pick_two(kind, group):
    """Returns the first photo of a group and the one beside which it says most."""
    if kind == "duplicate":
        # Near-duplicates of each other may each have their equals.
        return group[0], next(item for item in group[1:] if item["sha256"] == group[0]["sha256"])
    others = [item for item in group[1:] if item["class"] != group[0]["class"]] or group[1:]
    return group[0], next((item for item in others if not item["equal"]), others[0])


def _draw_pair(kind, pair, thumbnails):
    first, second = pair
    alike = first if kind == "leak" else second
    if kind == "duplicate" or alike["equal"]:
        between = "equal files"
    else:
        between = f"{alike['bits']} of 256\nbits differ" + ("\nmirrored" if alike["mirrored"] else "")
    photos = tuple(thumbnails.get(item["photo"], _NO_PHOTO) for item in pair)
    return PhotoPair(photos, tuple(f"{item['class']}\n{item['split']}: {item['photo']}" for item in pair), between)


def _tabulate(first, second):
    # As in the captions, but as text that can be copied.
    return {
        "photo": first["photo"],
        "its class": first["class"],
        "like": second["photo"],
        "class of that": second["class"],
    }


def _draw_photos(items, thumbnails):
    photos, captions = [], []
    for item in items:
        photo = thumbnails.get(item["photo"], _NO_PHOTO)
        if item.get("box") and item["size"]:
            photo = outline_box(photo, item["box"], item["size"])
        photos.append(photo)
        name = ": ".join(item[word] for word in ("split", "photo") if word in item)
        captions.append("\n".join(line for line in (item.get("class"), name, item.get("detail")) if line))
    return photo_grid_figure(photos, captions, _GRID_COLUMNS)
