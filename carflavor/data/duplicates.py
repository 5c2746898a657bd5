"""Near-duplicates: photos that show one picture, re-encoded, rescaled, brightened or mirrored.

A picture that stands in two splits is learned from one and asked for in the other. Photos are compared by a perceptual
hash: 256 bits for the signs of the coarse waves in a photo's brightness, of which small changes flip few.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import cv2
import imagehash
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from carflavor.data.records import CROPS
from carflavor.limits import count_cores
from carflavor.progress import progress_bar

# Near-duplicates differ in at most so many of the 256 bits. Chosen on the 4,874 `cars_train` photos of Stanford's
# crops: of 11.9 million pairs as they are, and as many with one photo mirrored, all up to 60 bits were looked at.
#
#     bits that differ                0    20-28    42    48    52-56    58-60
#     pairs (mirrored among them)     5    5 (1)    1     1     8 (5)    5 (2)
#     that show one picture           5    5        1     0     3        0
#
# With the 1,635 test crops, on which nothing was chosen, there are nine pairs more within the limit: nine pictures. No
# two of 2,160 rendered cars or of the sample's 896 drawings are closer than 64.
# 99 of 100 copies differ in at most 10 bits after JPEG of quality 20 or scaling to 90 %, 18 after halving the size, 20
# after a gamma of 0.7, 27 where 1 % is cut off on each side; where 2 % is, half of them pass 34. Tighter crops are not
# found: SIFT and an affine fit found 30 pairs of one picture among those photos, whose boxes were drawn one by one, and
# 11 of them are within 42 bits.
# imagehash's other hashes tell less. Other cars differ in 4 of phash's 64 bits, in 16 of whash's 256. dhash finds the
# copies as well, but re-encoding flips up to 60 of its 256 bits in a drawing, whose ground is flat.
MAX_DISTANCE = 36
_HASH_SIDE = 16
# Mirroring turns the sign of every other wave across the photo, and with it those bits: 99 of 100 mirrored photos come
# within 22 bits of that. They count as copies, for training flips photos at random.
_MIRRORED = np.uint64(0x5555_5555_5555_5555)
# Pixels of the side to a coefficient. imagehash takes 4, which finds the same pairs and takes a third longer.
_PIXELS_PER_BIT = 2
_REDUCED_SIDE = _HASH_SIDE * _PIXELS_PER_BIT
# Grey levels; the least of those photos has 11. Below, steps of a level or two are left, alike in every grey wall.
_MIN_DEVIATION = 3.0
_ROWS_AT_ONCE = 64
# Of a tile of comparisons, to stay in the cache.
_TILE_SIDE = 512
_MAX_PAIRS = 1_000_000


def hash_photo(photo):
    """Computes the perceptual hash of a photo.

    Args:
        photo: uint8 RGB array of shape `(height, width, 3)`, or grey of shape `(height, width)`.

    Returns:
        uint64 array of shape `(4,)`. Zeros, which no photo has, where it is all of one grey: nothing can be told then.
    """
    return hash_reduced(reduce_photo(photo))


def reduce_photo(photo):
    """Returns what is left of a photo, as `hash_photo` takes it, for its hash: uint8 grey of shape `(32, 32)`."""
    grey = photo if photo.ndim == 2 else cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    # imagehash would reduce the whole photo with Pillow, which takes four times as long.
    return cv2.resize(grey, (_REDUCED_SIDE, _REDUCED_SIDE), interpolation=cv2.INTER_AREA)


def hash_reduced(grey):
    """Returns what `hash_photo` does, of what `reduce_photo` returns."""
    if cv2.meanStdDev(grey)[1].item() < _MIN_DEVIATION:
        return np.zeros(4, np.uint64)
    bits = imagehash.phash(_Grey(grey), _HASH_SIDE, _PIXELS_PER_BIT).hash
    return np.packbits(bits).view(np.uint64)


class _Grey:
    """What imagehash needs of a Pillow image that has its mode and size already: half of its time went into copies."""

    def __init__(self, pixels):
        self._pixels = pixels

    def convert(self, mode):
        return self

    def resize(self, size, resample):
        return self._pixels


def stack_hashes(facts):
    """Returns the hashes of photos as uint64 (N, 4), zeros where there is none.

    Args:
        facts: List of dicts as `carflavor.data.decoding.decode_photos` yields them.
    """
    digits = "".join(known.get("hash", "00" * 32) for known in facts)
    return np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 4)


def group_near_duplicates(hashes):
    """Puts photos into groups: near-duplicates, and near-duplicates of near-duplicates, are in one.

    Takes time as the square of the photos (20,000 in 2 seconds, 100,000 in 50), memory as their number.

    Args:
        hashes: uint64 array of shape `(N, 4)`, rows as `hash_photo` returns them.

    Returns:
        int array (N,): the group of each photo, numbered in the order of their first photos. A photo without
        near-duplicates is alone in its group.
    """
    known = np.flatnonzero(hashes.any(axis=1))
    # Equal hashes are one node: a thousand copies of one photo would be half a million pairs.
    nodes, node = np.unique(hashes[known], axis=0, return_inverse=True)
    component, pending, count = np.arange(len(nodes)), [], 0
    for pairs, _ in _near_pairs(nodes, nodes, symmetric=True):
        pending.append(pairs)
        count += len(pairs)
        # The frames of a film are all near each other: more pairs than memory holds.
        if count > _MAX_PAIRS:
            component, pending, count = _connect(component, pending), [], 0
    groups = np.arange(len(hashes))
    groups[known] = len(hashes) + _connect(component, pending)[node]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def have_near_duplicates(hashes, others):
    """Says which photos have a near-duplicate among others.

    Args:
        hashes: uint64 array of shape `(N, 4)`, rows as `hash_photo` returns them.
        others: uint64 array of shape `(M, 4)`.

    Returns:
        bool array (N,).
    """
    return find_nearest(hashes, others) >= 0


def find_nearest(hashes, others):
    """Finds the near-duplicate of each photo among others that differs least from it.

    Args:
        hashes: uint64 array of shape `(N, 4)`, rows as `hash_photo` returns them.
        others: uint64 array of shape `(M, 4)`.

    Returns:
        int array (N,): rows of `others`, the first of several that are equally near; -1 where there is none.
    """
    nearest, least = np.full(len(hashes), -1), np.full(len(hashes), MAX_DISTANCE + 1)
    known, known_others = np.flatnonzero(hashes.any(axis=1)), np.flatnonzero(others.any(axis=1))
    for pairs, bits in _near_pairs(hashes[known], others[known_others]):
        # The nearest of each row last, as that is the one that an assignment with a row given twice leaves there.
        order = np.lexsort((-pairs[:, 1], -bits))
        rows, candidates, bits = known[pairs[order, 0]], known_others[pairs[order, 1]], bits[order]
        nearer = (bits < least[rows]) | (bits == least[rows]) & (candidates < nearest[rows])
        nearest[rows[nearer]], least[rows[nearer]] = candidates[nearer], bits[nearer]
    return nearest


def compare_hashes(first, second):
    """Says how many of the 256 bits of two hashes differ, and whether that is with one of the photos mirrored.

    Args:
        first: uint64 array of shape `(4,)`, as `hash_photo` returns it.
        second: Likewise.

    Returns:
        int, the less of both ways, and bool.
    """
    bits, mirrored = (int(np.bitwise_count(first ^ second ^ mask).sum()) for mask in (np.uint64(0), _MIRRORED))
    return min(bits, mirrored), mirrored < bits


def near_duplicates(records, others):
    """Says which photos of a record file have a near-duplicate in any of some others.

    What is compared are the stored squares of the whole photos where all files have them, else those of the boxes.

    Args:
        records: `RecordFile` of N photos.
        others: List of `RecordFile`.

    Returns:
        bool array (N,).

    Raises:
        ValueError: If there is no crop that all files hold.
    """
    files = [records, *others]
    common = [crop for crop in reversed(CROPS) if all(crop in file.crops for file in files)]
    if not common:
        held = "; ".join(f"{file.path} has {', '.join(file.crops)}" for file in files)
        raise ValueError(f"Expected record files with a crop in common, to find near-duplicates. Received: {held}")
    with progress_bar("near-duplicates", sum(len(file) for file in files)) as progress:
        hashes = [_hash_records(file, common[0], progress) for file in files]
    return have_near_duplicates(hashes[0], np.concatenate([np.zeros((0, 4), np.uint64), *hashes[1:]]))


def _hash_records(records, crop, progress):
    hashes, images = np.zeros((len(records), 4), np.uint64), records.images(crop)
    for start in range(0, len(records), _ROWS_AT_ONCE):
        photos = images[start : start + _ROWS_AT_ONCE]
        hashes[start : start + len(photos)] = [hash_photo(photo) for photo in photos]
        progress.update(len(photos))
    return hashes


def _near_pairs(hashes, others, symmetric=False):
    """Yields rows of `hashes` (N, 4) and of `others` (M, 4) that are at most `MAX_DISTANCE` apart.

    They come as pairs of an int array (P, 2) and the bits that differ, an int array (P,).

    If `symmetric`, a pair may be yielded one way round only.
    """
    rows, cores = np.ascontiguousarray(hashes.T), count_cores()
    tiles = (
        (columns, top, left)
        for columns in (np.ascontiguousarray(others.T ^ mask) for mask in (np.uint64(0), _MIRRORED))
        for top in range(0, len(hashes), _TILE_SIDE)
        for left in range(top if symmetric else 0, len(others), _TILE_SIDE)
    )
    # NumPy holds no lock while it counts. Some tiles at a time: were all photos alike, all their pairs would wait here.
    with ThreadPoolExecutor(cores) as threads:
        while some := list(itertools.islice(tiles, 8 * cores)):
            for pairs, bits in threads.map(lambda tile: _compare_tiles(rows, *tile), some):
                if len(pairs):
                    yield pairs, bits


def _compare_tiles(rows, columns, top, left):
    """Compares hashes (4, N) from `top` on with others (4, M) from `left` on; returns what `_near_pairs` yields."""
    above, beside = rows[:2, top : top + _TILE_SIDE, None], columns[:2, None, left : left + _TILE_SIDE]
    # The first 128 bits rule out all but a few. Their counts fit into 8 bits; 256 would wrap to 0.
    counts = np.bitwise_count(above[0] ^ beside[0]) + np.bitwise_count(above[1] ^ beside[1])
    pairs = np.argwhere(counts <= MAX_DISTANCE) + (top, left)
    counts = np.bitwise_count(rows[:, pairs[:, 0]] ^ columns[:, pairs[:, 1]]).sum(axis=0, dtype=int)
    is_near = counts <= MAX_DISTANCE
    return pairs[is_near], counts[is_near]


def _connect(component, pairs):
    """Returns the components (N,) of N nodes after some pairs of nodes, arrays (P, 2), are connected, too."""
    edges = component[np.concatenate([np.zeros((0, 2), int), *pairs])]
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(component), len(component)))
    return connected_components(graph, directed=False)[1][component]
