"""A refresh that knows when: a layer's statistics are renewed once they have drifted (thesis, outlook).

Between refreshes an inverse P ages. What it was made for, q = mean h̃ᵀ P h̃ over rows of inputs, tells by how
much: on the update after a refresh it is what fresh statistics give on examples that they have not seen, and
once it has left that value by a factor, :data:`DRIFT`, the layer is due. q is looked at after one update, and
then after twice as many as the last time if no layer was due, half as many if one was.

Refreshes get a share of the time. What each costs is estimated, in updates, by the multiplications of both:
no clock is read, and a run that is repeated is the same. A budget grows by the share at every update and pays
for what is refreshed; at the start it has that of :data:`WARM` updates, to be spent while the network changes
fast, so that after t updates refreshes have taken no more than the share of t + :data:`WARM`. Layers that are
due go on different updates, the most drifted first, as many at once as cost half an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sogrid.optimizers.batches import KEPT
from sogrid.statistics import Statistics
from sogrid.structured import Gram

__all__ = ["ADAPTIVE", "DUE", "FRESH", "LONGEST", "WARM", "drifted", "inverting", "priced", "taken", "work"]

ADAPTIVE = "adaptive"
"""In the place of N."""

DRIFT = 1.25
"""A layer whose q is so many times what it was fresh, or as many times below, is due."""

WARM, LONGEST, AT_ONCE = 100, 32, 0.5
"""Updates: whose share is there at the start; between two looks at most; that refreshes of one cost."""

INVERSE, ON_ACCELERATOR = 10.0, 2.0
"""What a multiplication of a factorisation costs in those of a product, and a refresh there, where launches
count: no less than by the records of the benchmarks' networks."""

FRESH, DUE, REFRESH, UPDATE = KEPT + "fresh", "due", "refresh_work", "update_work"
"""Where a layer's state keeps q after its refresh, how far it has drifted since, and what the two cost."""

State = dict[str, Any]


def inverting(found: Statistics) -> float:
    """Multiplications of inverting a layer's matrices, about: n²m of rows ``[n, m]``, m³ of whole ones."""
    return sum(rows**2 * width for rows, width in _sides(found))


def work(found: Statistics, state: State, rows: int, shape: tuple[int, int], probes: int) -> State:
    """Multiplications of a layer's refresh and of its part of an update, for its state.

    Args:
        found: Its statistics.
        state: Its inverses.
        rows: n·s of the minibatch.
        shape: (o, i) of its weight.
        probes: How many vectors were pulled back to it for the statistics.
    """
    weights = math.prod(shape)
    formed = sum(rows * width**2 for known, width in _sides(found) if known == width)
    inverses = [value.shape[-2:] for value in state.values() if isinstance(value, Tensor) and value.dim() > 1]
    step = sum(weights * known * (1 if known == width else 2) for known, width in inverses)
    slow = ON_ACCELERATOR if not found.mean.is_cpu else 1.0
    refresh = slow * (INVERSE * inverting(found) + formed + 2 * probes * rows * weights)
    return {REFRESH: float(refresh), UPDATE: float(3 * rows * weights + step)}


def _sides(found: Statistics) -> list[tuple[int, int]]:
    matrices = (part.rows if isinstance(part, Gram) else part for part in found[1:] if part is not None)
    return [tuple(part.shape[-2:]) for part in matrices if part.dim() > 1]


def priced(states: Mapping[str, State]) -> dict[str, float]:
    """Updates that the refresh of each layer costs; none of those whose cost is not known."""
    known = {name: state for name, state in states.items() if UPDATE in state}
    update = sum(state[UPDATE] for state in known.values())
    return {name: state[REFRESH] / update for name, state in known.items()}


def taken(states: Mapping[str, State], budget: float) -> list[str]:
    """The layers to refresh at once: the most drifted of those that are due, within the budget."""
    due = sorted((name for name in states if states[name].get(DUE)), key=lambda name: -states[name][DUE])
    prices, names, spent = priced(states), [], 0.0
    for name in due:
        spent += prices.get(name, 0.0)
        if spent > (min(budget, AT_ONCE) if names else budget):
            break
        names.append(name)
    return names


def drifted(fresh: Iterable[float], now: Iterable[float]) -> list[float]:
    """How far each layer has drifted, the logarithm of a factor; zero if that is below :data:`DRIFT`."""
    return [_beyond(before, after) for before, after in zip(fresh, now, strict=True)]


def _beyond(before: float, after: float) -> float:
    if not (before > 0 and after > 0 and math.isfinite(before + after)):
        return 0.0 if before == after else math.inf
    far = abs(math.log(after / before))
    return far if far > math.log(DRIFT) else 0.0
