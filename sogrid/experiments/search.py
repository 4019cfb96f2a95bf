"""Biased random search as an Optuna sampler (Thesis §4.2, Algorithm 1).

Random search that looks harder where it has found something: a proposal, uniform over the domain, is kept
with a probability that grows as the nearest finished run gets better. Storage, resumption, plots and many
workers are Optuna's, and so are the searches it is compared with (``RandomSampler``, ``GridSampler``).

Symbols: c the criterion, lower is better; z a point of the unit cube; p the probability of keeping it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.spatial import KDTree

__all__ = ["Acceptance", "BiasedRandomSampler", "UnitCube", "winsorise"]


def winsorise(costs: Sequence[float] | np.ndarray, outlier: float = 10.0) -> np.ndarray:
    r"""The costs with infinities and outliers replaced by the nearest cost that is neither.

    One diverged run of :math:`10^{12}` as :math:`c_\max` gives every ordinary run p ≈ 1, and the search is
    random again. A cost is an outlier if it lies more than ``outlier`` times as far above the best as the
    median does: :math:`c > c_\min + 10\,(\mathrm{median} - c_\min)`. Best and median are those of the
    distinct finite costs; the rule holds as long as fewer than half of these are outliers (infinities may be
    any number). It leaves costs that are spread evenly, or normally, as they are.

    Args:
        costs: Lower is better; ``inf`` for a diverged run. ``[n]``
        outlier: How many times the median's distance; ``math.inf`` keeps every finite cost, as printed.

    Returns:
        Finite costs (all zero if none was finite). ``[n]``

    >>> winsorise([1, 2, 3, 1e12, math.inf, -math.inf]).tolist()
    [1.0, 2.0, 3.0, 3.0, 3.0, 1.0]
    """
    costs = np.asarray(costs, dtype=np.float64)
    finite = np.unique(costs[np.isfinite(costs)])
    if not len(finite):
        return np.zeros_like(costs)
    small = _summable(finite)
    spread = np.median(small) - small[0]
    fence = small[0] + outlier * spread if spread > 0 else small[0]
    return np.clip(costs, finite[0], finite[small <= fence][-1])


def _summable(costs: np.ndarray) -> np.ndarray:
    """Finite costs, all times one power of two if their sums and differences would overflow."""
    huge = np.abs(costs).max(initial=0.0) > 2.0**960
    return np.ldexp(costs, -128) if huge else costs


class UnitCube:
    """Coordinates of a search space in which a uniform draw is random search and distance has a meaning.

    - A float: its place in the range, on a log scale if the parameter has one.
    - An integer, or a float with a step: the range is cut in equal parts, one for each value, and a value
      is at the middle of its part. An integer on a log scale v fills log(v - ½) to log(v + ½).
    - A categorical parameter: any two choices are as far apart as the two ends of a range, 1, whatever
      their order. (It takes one coordinate for each choice: 1/√2 for the chosen, 0 for the others.)

    The distance is Euclidean over all of these, so that its square counts the mismatched choices.

    Args:
        space: Parameter names and their Optuna distributions.
    """

    def __init__(self, space: Mapping[str, Any]) -> None:
        """See the class."""
        self.space = dict(space)

    def params(self, u: np.ndarray) -> dict[str, Any]:
        """The parameter values that a uniform draw stands for; ``u``: ``[parameters]``, in [0, 1)."""
        return {name: _value(d, x) for (name, d), x in zip(self.space.items(), u.tolist(), strict=True)}

    def point(self, params: Mapping[str, Any]) -> np.ndarray:
        """Where parameter values lie: ``[dimensions]``, one for a number, one for each choice."""
        return np.concatenate([_place(d, params[name]) for name, d in self.space.items()])


def _ticks(d: BaseDistribution) -> int:
    """The number of equally likely values of a distribution; 0 if it is continuous, or logarithmic."""
    if isinstance(d, CategoricalDistribution):
        return len(d.choices)
    return 0 if d.log or d.step is None else round((d.high - d.low) / d.step) + 1


def _ends(d: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """The two ends of a range without ticks, in its own scale."""
    half = 0.5 if isinstance(d, IntDistribution) else 0.0
    return (math.log(d.low - half), math.log(d.high + half)) if d.log else (d.low, d.high)


def _value(d: BaseDistribution, u: float) -> Any:
    if n := _ticks(d):
        k = min(int(u * n), n - 1)
        return d.choices[k] if isinstance(d, CategoricalDistribution) else min(d.low + k * d.step, d.high)
    low, high = _ends(d)
    x = low + u * (high - low)
    x = math.exp(x) if d.log else x
    return min(max(round(x) if isinstance(d, IntDistribution) else x, d.low), d.high)


def _place(d: BaseDistribution, value: Any) -> np.ndarray:
    if isinstance(d, CategoricalDistribution):
        return np.eye(len(d.choices))[int(d.to_internal_repr(value))] / math.sqrt(2)
    if n := _ticks(d):
        return np.array([(round((value - d.low) / d.step) + 0.5) / n])
    low, high = _ends(d)
    x = math.log(value) if d.log else value
    return np.array([(x - low) / (high - low) if high > low else 0.5])


class Acceptance:
    r"""The probability of keeping a proposal, given the runs so far.

    .. math::

        p(z) = \frac{c_\max - c(z)}{c_\max - c_\min}

    where c(z), the 1-nearest-neighbour surrogate, is the cost of the run nearest to z (Thesis §4.2, Alg. 1).
    Where several runs are equally near (repeated runs, or choices that nobody tried), it is their mean.
    While there are fewer than two distinct costs the printed p is 0/0; it is taken as 1.

    Args:
        points: Where the runs were made. ``[n, dimensions]``
        costs: What they gave, finite, lower is better. ``[n]``

    >>> p = Acceptance(np.array([[0.0], [0.5], [1.0]]), np.array([10.0, 11.0, 14.0]))
    >>> p(np.array([0.2])), p(np.array([0.4])), p(np.array([0.9]))
    (1.0, 0.75, 0.0)
    """

    def __init__(self, points: np.ndarray, costs: np.ndarray) -> None:
        """See the class."""
        self.costs = costs = _summable(costs)
        self.c_min, self.c_max = (costs.min(), costs.max()) if len(costs) else (0.0, 0.0)
        self.tree = KDTree(points) if self.c_max > self.c_min else None

    def __call__(self, z: np.ndarray) -> float:
        """The probability p(z) for ``z``: ``[dimensions]``."""
        if self.tree is None:
            return 1.0
        distance, _ = self.tree.query(z)
        nearest = self.tree.query_ball_point(z, distance * (1 + 1e-9) + 1e-12)
        return float((self.c_max - self.costs[nearest].mean()) / (self.c_max - self.c_min))


class BiasedRandomSampler(optuna.samplers.BaseSampler):
    """Algorithm 1 of the thesis (§4.2) for Optuna: ``create_study(sampler=BiasedRandomSampler(seed=0))``.

    Proposals are uniform in :class:`UnitCube`, and kept with the probability :class:`Acceptance`. All that
    the sampler knows is in the study, so a search that is resumed, or shared by many workers, needs nothing
    else. Where the thesis is silent:

    - **Parameters.** Those that all completed trials have in common, with the same range, are drawn together
      by Algorithm 1. Others (the first trial's, those of one branch of a conditional space, those whose
      range changes) are drawn one by one by Optuna's ``RandomSampler``.
    - **Diverged runs.** Optuna fails a trial that returns NaN, and failed trials are ignored: the search
      would come back to where runs diverge. *Return* ``math.inf`` *instead*: it counts as the worst run, and
      :func:`winsorise` keeps it, and other outliers, from hiding the differences between the rest.
    - **Pruned trials** count with the last value they reported, if they did. It is early, hence pessimistic:
      where values fall, trials rank first by how far they got, and nothing is extrapolated.
    - **Running trials** are ignored: proposals are random, so parallel workers do not propose the same.
    - **Maximisation** changes the sign of the criterion. Several criteria are refused.

    Args:
        seed: Of the proposals, and of the ``RandomSampler``. One worker with a seed repeats itself; Optuna
            reseeds when ``n_jobs`` is not 1.
        outlier: See :func:`winsorise`.
        max_proposals: After so many that were rejected, the likeliest of them is taken, with a warning.

    Raises:
        ValueError: If ``outlier`` is less than 1 or ``max_proposals`` is not positive.

    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(sampler=BiasedRandomSampler(seed=0))
    >>> study.optimize(lambda t: abs(math.log(t.suggest_float("lr", 1e-5, 1, log=True) / 0.01)), n_trials=50)
    >>> 0.009 < study.best_params["lr"] < 0.011
    True
    """

    def __init__(
        self, seed: int | None = None, *, outlier: float = 10.0, max_proposals: int = 10_000
    ) -> None:
        """See the class."""
        if not outlier >= 1:
            raise ValueError(f"outlier must be at least 1, not {outlier}: the median run is no outlier")
        if max_proposals < 1:
            raise ValueError(f"max_proposals must be positive, not {max_proposals}")
        self.seed = seed
        self.outlier = outlier
        self.max_proposals = max_proposals
        self._random = optuna.samplers.RandomSampler(None if seed is None else seed % 2**32)

    @cached_property
    def _rng(self) -> np.random.Generator:
        """Made at the first proposal, so that workers forked from one process without a seed differ."""
        return np.random.default_rng(None if self.seed is None else self.seed % 2**64)

    def reseed_rng(self) -> None:
        """Forget the seed; Optuna calls this for each thread of ``n_jobs``."""
        self._rng = np.random.default_rng()
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that Algorithm 1 draws: those common to all completed trials."""
        return intersection_search_space(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Algorithm 1: propose until one is kept."""
        _refuse_many_criteria(study)
        if not search_space:
            return {}
        cube = UnitCube(search_space)
        acceptance = self._acceptance(study, cube)
        likeliest, best = -1.0, {}
        for _ in range(self.max_proposals):
            params = cube.params(self._rng.random(len(search_space)))
            p = acceptance(cube.point(params))
            if self._rng.random() < p:
                return params
            if p > likeliest:
                likeliest, best = p, params
        warnings.warn(
            f"{self.max_proposals} proposals were rejected: good runs fill too small a part of the domain. "
            f"Trial {trial.number} takes the likeliest of them (p = {likeliest:.2g}). "
            "A smaller domain, or a larger max_proposals, helps.",
            stacklevel=2,
        )
        return best

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Random search for a parameter that Algorithm 1 does not draw."""
        _refuse_many_criteria(study)
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _acceptance(self, study: Study, cube: UnitCube) -> Acceptance:
        """From the finished trials that have a value and the cube's parameters."""
        runs = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            if trial.value is not None
            and all(trial.distributions.get(name) == d for name, d in cube.space.items())
        ]
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        points = np.array([cube.point(trial.params) for trial in runs])
        return Acceptance(points, winsorise([sign * trial.value for trial in runs], self.outlier))


def _refuse_many_criteria(study: Study) -> None:
    if len(study.directions) > 1:
        raise ValueError(
            f"biased random search compares runs by one criterion, and this study has "
            f"{len(study.directions)}: give create_study one direction, or use another sampler"
        )
