"""Which photos of a training set are kept aside for validation."""

import numpy as np


def choose_validation(labels, groups, share, seed):
    """Takes a share of each class, at least one photo of every class that has two, and never a part of a group.

    Where no two photos are of one group, this is a draw by class. Groups that hold more of a class than its share are
    left for training, unless nothing else of that class could be taken. Something of every class is left in any case.

    Args:
        labels: int array (N,), classes from 0.
        groups: int array (N,), the group of each photo.
        share: Share of each class, between 0 and 1.
        seed: Seed of the draw.

    Returns:
        bool array (N,), True for validation.
    """
    random = np.random.default_rng(seed)
    labels = np.asarray(labels)
    _, groups = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    totals = np.bincount(labels)
    wanted = np.minimum(np.maximum(np.rint(share * totals).astype(int), 1), totals - 1)
    chosen, taken = np.zeros(len(labels), bool), np.zeros_like(totals)

    def take(group, limits):
        """Takes a group, unless more of a class than its limit would be taken."""
        rows = members[group]
        counts = np.bincount(labels[rows], minlength=len(totals))
        if not chosen[rows[0]] and np.all((taken + counts <= limits) | (counts == 0)):
            chosen[rows] = True
            np.add(taken, counts, out=taken)

    draws = {}
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        draws[label] = list(dict.fromkeys(groups[rows].tolist()))
    for label, draw in draws.items():
        for group in draw:
            if taken[label] < wanted[label]:
                take(group, wanted)
    for label, draw in draws.items():
        for group in sorted(draw, key=lambda group: len(members[group])):
            if not taken[label]:
                take(group, totals - 1)
    return chosen
