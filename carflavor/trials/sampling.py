"""How a sweep chooses what to try next: Optuna's TPE sampler, which alone would try the same values twice."""

import itertools
import math

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler

_MAX_COMBINATIONS = 10_000  # of more, the same one twice is no matter


def list_combinations(ranges):
    """Lists all values that can be tried.

    Args:
        ranges: Dict of parameter name to Optuna distribution.

    Returns:
        List of dicts of parameter name to value; None if there are too many to tell.
    """
    if any(isinstance(distribution, FloatDistribution) for distribution in ranges.values()):
        return None
    values = [_list_values(distribution) for distribution in ranges.values()]
    if math.prod(map(len, values)) > _MAX_COMBINATIONS:
        return None
    return [dict(zip(ranges, combination, strict=True)) for combination in itertools.product(*values)]


def _list_values(distribution):
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return range(distribution.low, distribution.high + 1)


class UntriedSampler(TPESampler):
    """Optuna's TPE sampler, but never the same combination again: with one seed it is the same training.

    Args:
        ranges: Dict of parameter name to Optuna distribution.
        seed: Seed of the choice.
    """

    def __init__(self, ranges, seed=None):
        super().__init__(seed=seed)
        self._ranges = ranges
        self._combinations = list_combinations(ranges)
        self._random = np.random.default_rng(seed)

    def infer_relative_search_space(self, study, trial):
        return self._ranges if self._combinations else super().infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        chosen = super().sample_relative(study, trial, search_space)
        if self._combinations:
            tried = [trial.params for trial in study.get_trials(deepcopy=False)]
            untried = [combination for combination in self._combinations if combination not in tried]
            # Nothing is chosen as long as there is little to choose by.
            if untried and (not chosen or chosen in tried):
                return untried[self._random.integers(len(untried))]
        return chosen
