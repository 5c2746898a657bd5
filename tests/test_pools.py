import errno
import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest

from carflavor.data.build import Build
from carflavor.data.pools import Pool, create_pool


def square(value, size=8):
    return np.full((size, size, 3), value, np.uint8)


def both(value):
    return {"box": square(value), "full": square(100 + value)}


@pytest.fixture
def pool(tmp_path):
    with create_pool(tmp_path / "pool.h5", ("box", "full"), 8, 10) as pool:
        yield pool


def fill(pool):
    for row in range(len(pool)):
        pool.write(row, both(row))


def test_rows_are_read_by_hdf5_as_they_were_written(pool):
    assert (len(pool), pool.crops, pool.image_size) == (10, ("box", "full"), 8)
    for row in (9, 0, 4):
        pool.write(row, both(row))
    with h5py.File(pool.path, "r") as file:
        assert file["images/box"].shape == (10, 8, 8, 3) and file["images/box"].chunks == (1, 8, 8, 3)
        for row in (9, 0, 4):
            np.testing.assert_array_equal(file["images/box"][row], square(row))
            np.testing.assert_array_equal(file["images/full"][row], square(100 + row))
    np.testing.assert_array_equal(pool.read(4)["full"], square(104))


def test_a_pool_that_is_opened_again_has_its_rows(pool):
    pool.write(3, both(3))
    with Pool(pool.path) as again:
        assert (len(again), again.crops, again.image_size) == (10, ("box", "full"), 8)
        np.testing.assert_array_equal(again.read(3)["box"], square(3))


def test_one_crop(tmp_path):
    with create_pool(tmp_path / "pool.h5", ("full",), 4, 2) as pool:
        pool.write(1, {"full": square(7, 4)})
        assert list(pool.read(1)) == ["full"]


def write_some(pool, rows):
    with pool:
        for row in rows:
            pool.write(row, both(row))


def test_processes_write_to_one_pool(pool):
    assert len(pickle.dumps(pool)) < 2000
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_some, args=(pool, range(start, 10, 2))) for start in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [int(pool.read(row)["box"][0, 0, 0]) for row in range(10)] == list(range(10))


@pytest.mark.parametrize(
    ("kept", "order"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ([0, 2, 3, 5, 8, 9], [0, 8, 2, 3, 9, 5]),
        ([8, 9], [8, 9]),
        ([4], [4]),
        ([0, 1, 2], [0, 1, 2]),
    ],
)
def test_close_up_fills_gaps_from_the_end_and_may_be_repeated(pool, kept, order):
    fill(pool)
    for _ in range(2):
        assert pool.close_up(np.array(kept)).tolist() == order
        with h5py.File(pool.path, "r") as file:
            assert file["images/box"][: len(kept), 0, 0, 0].tolist() == order
            assert file["images/full"][: len(kept), 0, 0, 0].tolist() == [100 + row for row in order]


@pytest.mark.parametrize("image", [square(1, 9), square(1).astype(np.float32), square(1)[..., 0]])
def test_other_arrays_are_refused(pool, image):
    with pytest.raises(ValueError, match=r"^Expected uint8 images of shape \(8, 8, 3\). Received: "):
        pool.write(0, {"box": image, "full": image})


def test_room_on_the_disk_is_taken_at_once(tmp_path):
    with create_pool(tmp_path / "pool.h5", ("full",), 64, 50) as pool:
        assert os.stat(pool.path).st_blocks * 512 >= 50 * 64 * 64 * 3


def test_a_pool_is_never_written_over(tmp_path):
    with create_pool(tmp_path / "pool.h5", ("full",), 4, 2) as old:
        old.write(0, {"full": square(1, 4)})
        with create_pool(tmp_path / "pool.h5", ("full",), 4, 2) as new:
            new.write(0, {"full": square(2, 4)})
            old.write(0, {"full": square(3, 4)})
            assert new.read(0)["full"].max() == 2


def test_a_disk_that_fails_behind_the_decoding_ends_the_build(tmp_path, monkeypatch):
    def fail(pool):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(Pool, "synchronise", fail)
    with Build(tmp_path / "build", {}, {"train": 600}, ("full",), 4) as build:
        build.add([{"split": "train", "row": row} for row in range(600)])
        with pytest.raises(OSError, match="the disk is broken"):
            build.finish({}, ["red"], {})
