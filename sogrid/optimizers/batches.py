"""Layers of one shape, stepped as one: small ones cost what it takes to begin an operation, on a GPU or not.

What several layers have is stacked in a leading dimension, which every method broadcasts over. Larger layers,
whose arithmetic is what they cost, stay alone: a stack would only move their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sogrid.method import Gradient
from sogrid.parameters import Layer
from sogrid.shell import Ready
from sogrid.structured import Change, Factored, ThinInverse, scalar
from sogrid.watching import MOMENTUM

__all__ = ["KEPT", "SHIFT", "SMALL", "SMALL_THERE", "Batch", "Batches", "flat", "is_small", "packed"]

SMALL, SMALL_THERE = 2**14, 2**20
"""Gradients of more numbers are not stacked on the CPU, and on an accelerator."""

SHIFT, KEPT = "_shift", "statistics_"

State = dict[str, Any]


class Batch(NamedTuple):
    """One layer, or several of one shape in one parameter group.

    Attributes:
        ready: The layers.
        state: What the method keeps of them; with several stacked in a leading dimension.
    """

    ready: Sequence[Ready]
    state: State

    @property
    def home(self) -> int:
        """Index of their parameter group."""
        return self.ready[0].layer.home

    def stack(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """What each layer has, as one tensor; that of one layer itself."""
        return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.stack(list(tensors))

    def gradient(self, own: Callable[[Ready], Gradient]) -> Gradient:
        """The gradients of all, of one layer's."""
        found = list(map(own, self.ready))
        if len(found) == 1:
            return found[0]
        w, b, mean_h = zip(*found, strict=True)
        if isinstance(w[0], Factored):
            left, right = self.stack([g.left for g in w]), self.stack([g.right for g in w])
            return Gradient(Factored(left, right, w[0].scale), self.stack(b), self.stack(mean_h))
        return Gradient(self.stack(w), self.stack(b), self.stack(mean_h))

    def split(self, change: Change) -> Iterator[tuple[Layer, Change]]:
        """The change of each layer."""
        layers = [one.layer for one in self.ready]
        if len(layers) == 1:
            yield layers[0], change
            return
        dw, db = change
        dw = dw.dense() if isinstance(dw, Factored) else dw
        changes = zip(dw.unbind(), repeat(None) if db is None else db.unbind())  # noqa: B905
        yield from zip(layers, changes, strict=True)


class Batches:
    """How layers fall into batches: the same at every step, until a layer has another state.

    Args:
        numbers: Whether a tensor of one number may be read, where nobody waits for it. What is read is read
            once: no other may be written there.

    Attributes:
        new: Whether the last batches were not those before.
    """

    def __init__(self, numbers: bool = True) -> None:
        """See the class."""
        self._numbers, self.new = numbers, True
        self._seen: list[tuple] = []
        self._states: list[tuple[State | None, State]] = []
        self._found: list[tuple[list[int], State]] = []

    def of(
        self, ready: Sequence[Ready], states: Mapping[Tensor, State], check: Callable[[Layer], None]
    ) -> list[Batch]:
        """The batches of these layers.

        Args:
            ready: The layers.
            states: By weight; those of several layers in one batch become views of its stack.
            check: Called with each layer if a state is new.
        """
        seen = [_like(one) for one in ready]
        own = [states.get(one.layer.weight) for one in ready]
        self.new = seen != self._seen or not all(map(_same, own, self._states))
        if self.new:
            for one in ready:
                check(one.layer)
            kinds: dict[Any, list[int]] = {}
            for k, one in enumerate(ready):
                kinds.setdefault(_kind(one, own[k] or {}), []).append(k)
            stacks = self._stacks()
            self._leave({id(state) for state in own})
            self._found = []
            for ks in kinds.values():
                states = [own[k] or {} for k in ks]
                stack = stacks.get(tuple(map(id, states)))
                self._found.append((ks, _stacked(states, self._numbers) if stack is None else stack))
            self._seen, self._states = seen, [(state, _used(state or {})) for state in own]
        return [Batch([ready[k] for k in ks], state) for ks, state in self._found]

    def _stacks(self) -> dict[tuple[int, ...], State]:
        """The stacks of states that are as they were, by these."""
        stacks = {}
        for ks, stack in self._found:
            known = [self._states[k] for k in ks]
            if all(_same(state, (state, used)) for state, used in known if state is not None):
                stacks[tuple(id(state) for state, _ in known)] = stack
        return stacks

    def _leave(self, here: set[int]) -> None:
        """States that are in no batch now take along what is theirs, and keep no stack of others alive."""
        for state, used in (self._states[k] for ks, _ in self._found if len(ks) > 1 for k in ks):
            if state is not None and id(state) not in here:
                state |= {key: value.clone() for key, value in used.items() if state.get(key) is value}


def _like(one: Ready) -> tuple:
    """What a layer's batch depends on besides its state, and may change from step to step."""
    layer, weight, record = one.layer, one.layer.weight, one.record
    examples = None if one.factored is None else record.count, len(one.counts)
    kind = weight.dtype, weight.device, layer.trained_bias is None
    return layer.name, *kind, *examples, *record.shapes


def _kind(one: Ready, state: State) -> Any:
    """The same for layers that may be stacked; ranks would have to agree on it."""
    layer = one.layer
    shape, (name, *like) = layer.as_matrix(layer.weight).shape, _like(one)
    *maps, o, i = shape
    numbers = o * i if one.factored is None else (o + i) * one.factored.w.left.shape[-2]
    if maps or one.counts or not is_small(numbers, layer.weight):
        return name
    return layer.home, shape, *like, *((key, value.shape) for key, value in _used(state).items())


def _same(state: State | None, known: tuple[State | None, State]) -> bool:
    """Whether a state is the one that is known, and holds the same tensors."""
    before, used = known
    return state is before and all(state.get(key) is value for key, value in used.items())


def is_small(numbers: int, weight: Tensor) -> bool:
    """Whether so many numbers of each layer are soon stacked, where a layer's weight is."""
    return numbers <= (SMALL if weight.is_cpu else SMALL_THERE)


def _used(state: State) -> dict[str, Tensor]:
    """What of a layer's state its update reads."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and key != MOMENTUM and not key.startswith(KEPT)
    }


def _stacked(states: list[State], numbers: bool) -> State:
    """The states of the layers of a batch as one."""
    first, *others = map(_used, states)
    if not others:
        return packed({key: scalar(value) if numbers else value for key, value in first.items()})
    stacked = {}
    for key, value in first.items():
        whole = stacked[key] = torch.stack([state[key] for state in states])
        for state, part in zip(states, whole.unbind(), strict=True):
            state[key] = part
        if numbers and value.dim() == 0 and value.is_cpu and len({*whole.tolist()}) == 1:
            stacked[key] = value.item()
    return packed(stacked)


def flat(state: dict[str, Tensor | ThinInverse]) -> dict[str, Tensor]:
    """A thin inverse as two tensors, Q and δ: torch loads and moves nothing else."""
    parts = {}
    for key, value in state.items():
        thin = isinstance(value, ThinInverse)
        parts |= {key: value.factor, key + SHIFT: value.shift} if thin else {key: value}
    return parts


def packed(state: dict[str, Any]) -> State:
    """The tensors of :func:`flat` put together again."""
    whole = dict(state)
    for key in [key for key in state if key.endswith(SHIFT)]:
        whole[key.removesuffix(SHIFT)] = ThinInverse(state[key.removesuffix(SHIFT)], state[key])
    return whole
