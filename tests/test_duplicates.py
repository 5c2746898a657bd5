import cv2
import numpy as np
import pytest

from carflavor.data import duplicates
from carflavor.data.drawing import draw_photo
from carflavor.data.duplicates import (
    MAX_DISTANCE,
    compare_hashes,
    find_nearest,
    group_near_duplicates,
    hash_photo,
    have_near_duplicates,
    near_duplicates,
)
from carflavor.data.records import RecordFile, RecordWriter
from carflavor.image import decode, encode_jpeg, squash


def draw(number):
    return draw_photo(number % 8, np.random.default_rng([7, number]))[0]


def scale(photo, factor):
    return cv2.resize(photo, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def brighten(photo):
    return cv2.convertScaleAbs(photo, alpha=1.1, beta=10)


def flip(photo):
    return np.ascontiguousarray(photo[:, ::-1])


def flip_bits(hashed, count):
    """Returns a hash of which the first `count` bits are other ones."""
    bits = np.unpackbits(hashed.view(np.uint8))
    bits[:count] ^= 1
    return np.packbits(bits).view(np.uint64)


@pytest.fixture(scope="module")
def random_hashes():
    return np.random.default_rng(0).integers(0, 2**64, (1500, 4), dtype=np.uint64)


def test_hash_of_a_pattern():
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    # As str(imagehash.phash(Image.fromarray(pattern), 16, 2)) writes it.
    pattern = ((x * x + 3 * x * y + 5 * y) % 251).astype(np.uint8)
    assert hash_photo(pattern).tobytes().hex() == "8120000607fe0ff41fa00e0f3e3e287cae78be632ee75c676cce0fccaacd3dc9"


@pytest.mark.parametrize(
    "copy",
    [
        lambda photo: decode(encode_jpeg(photo, 40)),
        lambda photo: scale(photo, 0.9),
        lambda photo: decode(encode_jpeg(scale(photo, 0.5), 80)),
        lambda photo: np.repeat(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
        brighten,
        flip,
        lambda photo: decode(encode_jpeg(flip(scale(photo, 0.9)), 60)),
        lambda photo: squash(photo, 128),
    ],
    ids=["jpeg", "90 %", "half and jpeg", "grey", "brighter", "mirrored", "mirrored, 90 % and jpeg", "square"],
)
def test_copies_are_found_and_other_drawings_are_not(copy):
    photos = [draw(number) for number in range(40)]
    hashes = np.array([hash_photo(photo) for photo in [*photos, *map(copy, photos)]])
    assert group_near_duplicates(hashes).tolist() == [*range(40), *range(40)]


def test_photos_of_one_grey_are_near_nothing():
    random = np.random.default_rng(0)
    greys = [np.full((90, 120, 3), level, np.uint8) for level in (0, 120, 130, 255)]
    noise = [120 + random.integers(0, 6, (90, 120, 3)).astype(np.uint8) for _ in range(4)]
    backdrops = [np.uint8(np.linspace(level, level + 9, 120)) + np.zeros((90, 1), np.uint8) for level in (50, 60, 200)]
    hashes = np.array([hash_photo(photo) for photo in [*greys, *greys, *noise, *backdrops]])
    assert not hashes.any()
    assert group_near_duplicates(hashes).tolist() == list(range(15))
    assert not have_near_duplicates(hashes, hashes).any()


def test_the_distance_decides(random_hashes):
    first = random_hashes[0]
    hashes = np.array(
        [first, flip_bits(first, MAX_DISTANCE + 1), flip_bits(first, MAX_DISTANCE), flip_bits(first, 256)]
    )
    # The second is a bit from the third, so all three are of one group, but it is no near-duplicate of the first.
    assert group_near_duplicates(hashes).tolist() == [0, 0, 0, 1]
    assert group_near_duplicates(hashes[[0, 1, 3]]).tolist() == [0, 1, 2]
    assert have_near_duplicates(hashes, hashes[:1]).tolist() == [True, False, True, False]
    assert have_near_duplicates(hashes, hashes[:0]).tolist() == [False] * 4
    assert have_near_duplicates(hashes[:0], hashes).tolist() == []
    assert group_near_duplicates(hashes[:0]).tolist() == []


def test_the_nearest_is_found(random_hashes):
    hashes = random_hashes[:1200].copy()
    others = np.array(
        [
            *random_hashes[1200:1400],
            flip_bits(hashes[3], 30),
            flip_bits(hashes[3], 20),
            flip_bits(hashes[3], 20),
            flip_bits(hashes[1100], MAX_DISTANCE + 1),
            np.zeros(4, np.uint64),
            *random_hashes[1400:],
            *np.repeat(random_hashes[1300:1301], 500, axis=0),
            # In another tile than the first ones.
            flip_bits(hashes[3], 25),
            hashes[700],
        ]
    )
    hashes[5] = 0
    nearest = find_nearest(hashes, others)
    assert {row: nearest[row].item() for row in np.flatnonzero(nearest >= 0)} == {3: 201, 700: len(others) - 1}


def test_bits_that_differ():
    photo, other = draw(0), draw(1)
    first, mirrored = hash_photo(photo), hash_photo(flip(photo))
    assert compare_hashes(first, first) == (0, False)
    assert compare_hashes(first, flip_bits(first, 7)) == (7, False)
    bits, is_mirrored = compare_hashes(first, mirrored)
    assert bits <= MAX_DISTANCE and is_mirrored
    assert compare_hashes(first, hash_photo(other))[0] > MAX_DISTANCE


@pytest.mark.parametrize("max_pairs", [0, 1_000_000])
def test_groups_among_many_photos(random_hashes, monkeypatch, max_pairs):
    monkeypatch.setattr(duplicates, "_MAX_PAIRS", max_pairs)
    hashes = random_hashes.copy()
    # From one end to the other, over the edges of the tiles; equal, near and by way of another.
    hashes[1499] = hashes[3]
    hashes[600] = flip_bits(hashes[3], 30)
    hashes[511] = flip_bits(hashes[3], 60)
    hashes[512] = flip_bits(hashes[900], 20)
    groups = group_near_duplicates(hashes)
    rows = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    assert [found for found in rows.values() if len(found) > 1] == [[3, 511, 600, 1499], [512, 900]]
    assert list(rows) == list(range(1496))
    assert np.flatnonzero(have_near_duplicates(hashes[:700], hashes[700:])).tolist() == [3, 512, 600]


def write_records(path, photos, crops=("box", "full")):
    """Writes photos as record file; squares of their boxes are photos that nobody else has."""
    with RecordWriter(path, crops, 64, ["a"], {"source": "drawings", "crop_margin": 16}) as writer:
        for row, photo in enumerate(photos):
            own = draw(1000 + sum(map(ord, path.name)) + row)
            images = {"box": squash(own, 64), "full": squash(photo, 64)}
            writer.append({crop: images[crop] for crop in crops}, 0, f"{row}.jpg", (1, 1), (0, 0, 1, 1))
    return RecordFile(path)


@pytest.fixture
def files(tmp_path):
    test = [draw(0), draw(1), scale(draw(2), 0.9), flip(draw(3)), draw(4), np.full((90, 120, 3), 99, np.uint8)]
    train = [draw(10), brighten(draw(0)), draw(3), np.full((90, 120, 3), 99, np.uint8)]
    validation = [draw(11), draw(2)]
    with (
        write_records(tmp_path / "test.h5", test) as test,
        write_records(tmp_path / "train.h5", train) as train,
        write_records(tmp_path / "validation.h5", validation) as validation,
    ):
        yield test, train, validation


def test_near_duplicates_of_record_files(files):
    test, train, validation = files
    assert near_duplicates(test, [train, validation]).tolist() == [True, False, True, True, False, False]
    assert near_duplicates(test, [train]).tolist() == [True, False, False, True, False, False]
    assert near_duplicates(validation, [train]).tolist() == [False, False]
    assert near_duplicates(test, []).tolist() == [False] * 6


def test_a_crop_that_all_files_have_is_compared(files, tmp_path):
    test, train, _ = files
    with write_records(tmp_path / "full.h5", [draw(1), draw(20)], ["full"]) as full:
        assert near_duplicates(test, [full]).tolist() == [False, True, False, False, False, False]
        assert near_duplicates(full, [test, train]).tolist() == [True, False]
    with RecordWriter(tmp_path / "box.h5", ["box"], 64, ["a"], {}) as writer:
        writer.append({"box": test.images("box")[4]}, 0, "4.jpg", (1, 1), (0, 0, 1, 1))
    with RecordFile(tmp_path / "box.h5") as box, RecordFile(tmp_path / "full.h5") as full:
        assert near_duplicates(test, [train, box]).tolist() == [False, False, False, False, True, False]
        with pytest.raises(ValueError) as error:
            near_duplicates(test, [box, full])
    assert str(error.value) == (
        f"Expected record files with a crop in common, to find near-duplicates. Received: {tmp_path}/test.h5 has box, "
        f"full; {tmp_path}/box.h5 has box; {tmp_path}/full.h5 has full"
    )
