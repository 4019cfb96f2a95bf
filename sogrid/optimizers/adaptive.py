"""A refresh that knows when: a layer's statistics are renewed once they have drifted (thesis, outlook).

Between refreshes an inverse P ages. What it was made for, q = mean h̃ᵀ P h̃ over rows of inputs, tells by how
much: on the update after a refresh it is what fresh statistics give on examples that they have not seen, and
once it has left that value by a factor, :data:`DRIFT`, the layer is due. q is looked at after one update, and
then after twice as many as the last time if no layer was due, half as many if one was; that of a layer which
has no part in such an update, in its next one.

Refreshes get a share of the time. What each costs is estimated, in updates, by the multiplications of both:
no clock is read, and a run that is repeated is the same. A budget grows by the share at every update and pays
for what is refreshed; at the start it has that of :data:`WARM` updates, to be spent while the network changes
fast, so that after t updates refreshes have taken no more than the share of t + :data:`WARM`. Layers that are
due go on different updates, the most drifted first, as many at once as cost half an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sogrid import finite
from sogrid.bound import BOUND_EXAMPLES
from sogrid.method import LayerMethod
from sogrid.optimizers.batches import KEPT, packed
from sogrid.optimizers.joint import Joint
from sogrid.parameters import Layer
from sogrid.ranks import Ranks
from sogrid.shell import Ready
from sogrid.statistics import Statistics
from sogrid.structured import Gram
from sogrid.uses import LayerRecord

__all__ = [
    "ADAPTIVE",
    "DUE",
    "FRESH",
    "LONGEST",
    "MISSED",
    "WARM",
    "Adaptive",
    "drifted",
    "inverting",
    "priced",
    "taken",
    "work",
]

ADAPTIVE = "adaptive"
"""In the place of N."""

DRIFT = 1.25
"""A layer whose q is so many times what it was fresh, or as many times below, is due."""

WARM, LONGEST, AT_ONCE = 100, 32, 0.5
"""How many updates have their share at the start, are between two looks at most, and a refresh may cost."""

INVERSE, ON_ACCELERATOR = 10.0, 2.0
"""What a multiplication of a factorisation costs in those of a product, and a refresh there, where launches
count: no less than by the records of the benchmarks' networks."""

FRESH, DUE, MISSED, REFRESH, UPDATE = KEPT + "fresh", "due", "missed", "refresh_work", "update_work"
"""Where a layer's state keeps q after its refresh, how far it has drifted since, that a look has missed it,
and what a refresh and an update cost."""

State = dict[str, Any]


class Adaptive(Joint):
    """An optimizer that may refresh by :data:`ADAPTIVE`; other schedules are not touched."""

    method: LayerMethod
    refresh_every: int | str | None
    refresh_share: float

    def _states(self) -> dict[str, State]:
        return {layer.name: self.state.get(layer.weight, {}) for layer in self._layers}

    @property
    def _schedule(self) -> dict[str, float]:
        """The budget, in updates, when to look next, and how long after that."""
        return self.param_groups[0]["schedule"] or {"budget": self.refresh_share * WARM, "look": 1, "gap": 1}

    def _drifted(self) -> set[str]:
        """The layers to refresh now."""
        trained = {layer.name for layer in self._layers if layer.weight.requires_grad}
        states = {name: state for name, state in self._states().items() if name in trained}
        return set(taken(states, self._schedule["budget"]))

    def _pass_over(self, due: Iterable[str], states: Mapping[Tensor, State], left: float) -> None:
        """Have layers that were due and were not seen make room for others."""
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            if layer.name in due and layer.weight not in states and DUE in state:
                state[DUE] *= left

    def _pay(self, names: Iterable[str]) -> None:
        """Take what the refresh of these layers cost from the budget."""
        if self.refresh_every == ADAPTIVE:
            prices, schedule = priced(self._states()), self._schedule
            spent = sum(prices[name] for name in names)
            self.param_groups[0]["schedule"] = {**schedule, "budget": schedule["budget"] - spent}

    def _look(self, ready: Sequence[Ready], ranks: Ranks) -> None:
        """See, now and then, how far layers have drifted that were not refreshed for this update."""
        if self.refresh_every != ADAPTIVE:
            return
        group, schedule = self.param_groups[0], self._schedule
        looking = group["updates"] >= schedule["look"]
        states = {one.layer.name: self.state[one.layer.weight] for one in ready}
        if looking:
            for name, state in self._states().items():
                if FRESH in state and name not in states:
                    state[MISSED] = True
        seen = [one for one in ready if looking or _unseen(states[one.layer.name])]
        forms = list(map(self._quadratic, seen))
        if ranks.size > 1:
            forms = [form / ranks.size for form in ranks.sum(forms)]
        older = []
        for one, form in zip(seen, forms, strict=True):
            state = states[one.layer.name]
            state.pop(MISSED, None)
            if FRESH in state:
                older.append((state, form))
            else:
                state[FRESH] = form
        gap, look = schedule["gap"], schedule["look"]
        due = _due(older)
        if looking:
            gap = max(1, gap // 2) if due else min(2 * gap, LONGEST)
            look = group["updates"] + gap
        group["schedule"] = {"budget": schedule["budget"] + self.refresh_share, "look": look, "gap": gap}

    def _quadratic(self, one: Ready) -> Tensor:
        """The quadratic form of a layer's inputs."""
        layer, h = one.layer, one.record.some_inputs(BOUND_EXAMPLES)
        self._check_state(layer)
        state, group = packed(self.state[layer.weight]), self.param_groups[layer.home]
        return self.method.quadratic_form(h, one.mean_h, layer.trained_bias is not None, state, group).mean()

    def _work(
        self, layer: Layer, found: Statistics, state: State, record: LayerRecord, counts: Sequence[float]
    ) -> State:
        """What an adaptive schedule has to know of a refresh: its cost, as if one process made all of it."""
        if self.refresh_every != ADAPTIVE:
            return {}
        positions = sum(g.numel() for g in record.grads) // (len(layer.weight) * record.count)
        probes = max(map(len, record.probes), default=0)
        shape = len(layer.weight), layer.weight[0].numel()
        return work(found, state, max(1, positions) * round(sum(counts)), shape, probes)

    def _of_ranks(self, costs: list[State], ranks: Ranks) -> list[State]:
        """Costs as all ranks have them, whose examples may have other numbers of positions."""
        if self.refresh_every != ADAPTIVE:
            return costs
        told = [value for cost in costs for value in cost.values()]
        _, by_rank, _ = ranks.together(lambda: None, lambda _: (told, ()))
        means = (sum(values) / ranks.size for values in by_rank)
        return [{key: next(means) for key in cost} for cost in costs]


def _unseen(state: State) -> bool:
    """Whether a layer is to be looked at when it has a part in an update, whichever that is."""
    return FRESH not in state or MISSED in state


def _due(older: Sequence[tuple[State, Tensor]]) -> bool:
    """Whether a layer has drifted, of states and the forms now; its state says how far."""
    if not older:
        return False
    forms = [form for state, now in older for form in (state[FRESH], now)]
    sizes = finite.read(torch.stack([form.to(forms[0].device) for form in forms]))
    for (state, _), far in zip(older, drifted(sizes[::2], sizes[1::2]), strict=True):
        state[DUE] = far
    return any(state[DUE] for state, _ in older)


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
