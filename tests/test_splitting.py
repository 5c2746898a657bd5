import numpy as np
import pytest

from carflavor.data.splitting import choose_validation


def choose(labels, groups, share=0.1, seed=0):
    return np.flatnonzero(choose_validation(labels, groups, share, seed)).tolist()


@pytest.mark.parametrize(
    ("share", "seed", "rows"),
    [
        (0.1, 0, [4, 19, 22, 28]),
        (0.1, 1, [1, 10, 23, 27]),
        (0.3, 0, [2, 4, 6, 13, 16, 19, 22, 23, 28]),
    ],
)
def test_without_near_duplicates_the_choice_is_that_of_version_0_1(share, seed, rows):
    # 20 photos, 7, 2 and 1. The rows are those of the draw before there were groups, written down.
    labels = [0] * 20 + [1] * 7 + [2] * 2 + [3]
    assert choose(labels, np.arange(30), share, seed) == rows
    # How groups are numbered does not count.
    assert choose(labels, np.arange(30)[::-1] * 7, share, seed) == rows


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_shares_hold(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, 400)
    # 40 pairs and 10 triplets, most of them of several classes.
    groups = np.concatenate([np.arange(290), np.repeat(np.arange(300, 340), 2), np.repeat(np.arange(400, 410), 3)])
    random.shuffle(groups)
    chosen = choose_validation(labels, groups, 0.1, seed)
    assert not set(groups[chosen]) & set(groups[~chosen])
    for label in range(10):
        assert chosen[labels == label].sum() == round(0.1 * (labels == label).sum())
    np.testing.assert_array_equal(chosen, choose_validation(labels, groups, 0.1, seed))


def test_another_seed_chooses_others():
    labels, groups = [0] * 40, np.repeat(np.arange(20), 2)
    choices = {tuple(choose(labels, groups, seed=seed)) for seed in range(10)}
    assert len(choices) > 5
    assert {len(choice) for choice in choices} == {4}


@pytest.mark.parametrize(
    ("labels", "groups", "rows"),
    [
        # A class of one group cannot give one away, nor can a class of one photo.
        ([0, 0, 0, 1], [5, 5, 5, 6], []),
        # Two photos of different groups can.
        ([0, 0, 0], [0, 1, 1], [0]),
        # All groups are larger than the share: the smallest goes.
        ([0] * 9, [0, 0, 0, 0, 1, 1, 2, 2, 2], [4, 5]),
        # The smallest group of class 0 holds all of class 1: the other one goes.
        ([0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [3, 4, 5]),
        # Both would take all of a class: nothing goes.
        ([0, 0, 1, 0, 0, 2], [0, 0, 0, 1, 1, 1], []),
        # One picture under two labels is a share of both classes.
        ([0, 1, 0, 1], [0, 0, 1, 1], [0, 1]),
    ],
)
def test_something_of_every_class_is_taken_and_left(labels, groups, rows):
    assert choose(labels, groups) == rows
