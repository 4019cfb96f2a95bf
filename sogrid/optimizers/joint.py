"""What several processes do together before a step; one process does nothing of it.

The rules are those of :mod:`sogrid.ranks`. At a step the ranks tell each other, in one message, how many
examples each layer saw and their mean input; at a refresh, in a few more, the statistics and the inverses.
Factored gradients, of which each rank has its own factors, take a message for the changes that they give, and
a bound takes one for its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sogrid import shell
from sogrid.bound import BOUND_EXAMPLES, moved, shrunk
from sogrid.capture import CaptureError
from sogrid.method import Gradient
from sogrid.optimizers.batches import Batch, Batches, is_small
from sogrid.parameters import Layer
from sogrid.private import without_autocast
from sogrid.ranks import Ranks
from sogrid.shell import LayerOptimizer, Ready, near
from sogrid.statistics import Statistics
from sogrid.structured import Change, Factored
from sogrid.uses import LayerRecord

__all__ = ["Joint", "Looked", "Measured"]


class Measured(NamedTuple):
    """What was measured of a layer.

    Attributes:
        layer: The layer.
        statistics: Of the statistics minibatch; with several ranks of the own part of it.
        counts: Its examples, by rank.
        record: What they were measured of.
    """

    layer: Layer
    statistics: Statistics
    counts: Sequence[float]
    record: LayerRecord


Looked = tuple[Iterable[Ready], Iterable[Measured]]
"""Layers to step, and layers whose statistics are due."""


class Joint(LayerOptimizer):
    """An optimizer that treats each layer alone, of a minibatch that several processes may share."""

    def _change(self, batch: Batch) -> Change:
        """The step of a batch of layers, without its bound: linear in their gradients."""
        raise NotImplementedError

    def _check_state(self, layer: Layer) -> None:
        """Refuse a state that a layer's update cannot use."""

    def _bind(self) -> None:
        super()._bind()
        self._batches = Batches(numbers=not self.capturable)

    def _shares(self, counts: Sequence[float]) -> Sequence[float]:
        """What ranks with so many examples count for in the mean of their gradients, up to a factor."""
        return [1.0] * len(counts) if self.reduction == "mean" else counts

    def _together(self, looked: Callable[[], Looked], ranks: Ranks) -> Looked:
        """What a rank has looked at, with the counts and mean inputs of the minibatch of all ranks.

        Raises:
            CaptureError: If a layer has a gradient on some ranks only, or not the same one. What one of them
                raises, all do.
        """
        if ranks.size == 1:
            return looked()

        def look() -> list[dict[str, Ready | Measured]]:
            both = looked()
            with without_autocast():
                return [{one.layer.name: one for one in found} for found in both]

        def told(found: list[dict[str, Ready | Measured]] | None) -> tuple[list[float], list[Tensor]]:
            ready, measured = found or ({}, {})
            witnesses = dict(zip(ready, _witnesses(list(ready.values()), ranks), strict=True))
            numbers, means = [], []
            for layer in self._layers:
                one, other = ready.get(layer.name), measured.get(layer.name)
                numbers += one.count if one else 0, other.counts[0] if other else 0
                numbers.append(witnesses.get(layer.name, 0))
                if self.uses_mean:
                    *maps, _, width = layer.as_matrix(layer.weight).shape
                    mean = one.mean_h if one else layer.weight.new_zeros(*maps, width)
                    means.append(mean if self.reduction == "mean" else numbers[-3] * mean)
            return numbers, means

        (ready, measured), numbers, means = ranks.together(look, told)
        triples, sums = zip(*[iter(numbers)] * 3, strict=True), iter(means)
        for layer, (counts, others, witness) in zip(self._layers, triples, strict=True):
            mean = next(sums, None)
            _require_everywhere(layer, counts)
            _require_everywhere(layer, others)
            _require_averaged(layer, witness)
            if layer.name in ready:
                ready[layer.name] = self._of_all(ready[layer.name], counts, mean)
            if layer.name in measured:
                measured[layer.name] = measured[layer.name]._replace(counts=others)
        return list(ready.values()), list(measured.values())

    def _of_all(self, own: Ready, counts: Sequence[float], mean: Tensor | None) -> Ready:
        """A layer with the counts of all ranks, and the sum over them of mean inputs, each by its share."""
        if mean is not None:
            mean = mean / sum(self._shares(counts))
        whole, gradient = own._replace(counts=counts, mean_h=mean), own.factored
        if gradient is not None:
            share = 1.0 if self.reduction == "mean" else own.count / whole.count
            gradient = Gradient(share * gradient.w, share * gradient.b, mean)
        return whole._replace(factored=gradient)

    def _changes(self, ready, ranks):
        """(ΔW, Δb) of each layer, within its bound; all that ranks tell each other comes before the first."""
        batches = self._batches.of(ready, self.state, self._check_state)
        self._require_capturable(not self._batches.new, "make a step before, from as many examples")
        for some in [batches] if ranks.size > 1 else _portions(batches):
            yield from self._changes_at_once(some, ranks)

    def _changes_at_once(self, batches: list[Batch], ranks: Ranks) -> Iterator[tuple[Layer, Change]]:
        if ranks.size > 1 and any(batch.ready[0].factored is not None for batch in batches):
            changes = self._averaged(batches, ranks)
        else:
            changes = list(map(self._change, batches))
        for batch, change in zip(batches, self._within_bounds(batches, changes, ranks), strict=True):
            yield from batch.split(change)

    def _within_bounds(self, batches: list[Batch], changes: list[Change], ranks: Ranks) -> list[Change]:
        """The changes, shrunk where their parameter group has a bound."""
        bounds = [self.param_groups[batch.home]["max_change"] for batch in batches]
        within = [k for k, bound in enumerate(bounds) if bound is not None]
        if not within:
            return changes
        sizes = [_moved(batches[k], changes[k], ranks) for k in within]
        if ranks.size > 1:
            sums = ranks.sum(
                [torch.stack([size.square(), size.new_full(size.shape, count)]) for size, count in sizes]
            )
            sizes = [(squares.sqrt(), count) for squares, count in sums]
        shrinking = shrunk([changes[k] for k in within], sizes, [bounds[k] for k in within])
        for k, change in zip(within, shrinking, strict=True):
            changes[k] = change
        return changes

    def _averaged(self, batches: list[Batch], ranks: Ranks) -> list[Change]:
        """Changes, of which those by factored gradients are the means of what ranks find by their factors.

        With them go the sums of these over examples, which tell whether ``.grad`` is what they give.
        """
        ready = [batch.ready[0] for batch in batches]
        factored = [k for k, one in enumerate(ready) if one.factored is not None]

        def told(changes: list[Change] | None) -> tuple[list[float], list[Tensor]]:
            tensors = []
            for k in factored:
                layer, g = ready[k].layer, ready[k].factored.w.left
                if changes is None:
                    tensors += map(torch.zeros_like, (layer.weight, *[layer.bias] * 3))
                else:
                    dw, db = changes[k]
                    tensors += dw.dense() if isinstance(dw, Factored) else dw, db, g.sum(0), g.abs().sum(0)
            return [], tensors

        changes, _, sums = ranks.together(lambda: list(map(self._change, batches)), told)
        means = iter([total / ranks.size for total in sums])
        for k, dw, db, found, size in zip(factored, *[means] * 4, strict=True):
            layer, rows = ready[k].layer, sum(ready[k].counts)
            grad = layer.bias.grad
            intact = not grad.is_cpu or near(grad, found, size, rows)
            self._require_intact(f"layer {layer.name!r}: the .grad of the bias", intact)
            changes[k] = dw, db
        return changes


def _portions(batches: list[Batch]) -> Iterator[list[Batch]]:
    """Batches whose changes are there at once, and not those of the whole model if that is large."""
    some, numbers = [], 0
    for batch in batches:
        some.append(batch)
        numbers += sum(one.layer.weight.numel() for one in batch.ready)
        if numbers >= shell.AT_ONCE:
            yield some
            some, numbers = [], 0
    yield some


def _witnesses(ready: list[Ready], ranks: Ranks) -> list[float]:
    """One number of the ``.grad`` of each layer, as it is there: no rounding makes it another."""
    if not ready:
        return []
    held = [layer.weight if layer.trained_bias is None else layer.bias for layer, *_ in ready]
    return torch.stack([p.grad.flatten()[0].float().to(ranks.device) for p in held]).tolist()


def _require_everywhere(layer: Layer, counts: Sequence[float]) -> None:
    if any(counts) and not all(counts):
        where = [rank for rank, count in enumerate(counts) if count]
        raise CaptureError(
            f"layer {layer.name!r} has a gradient, or statistics that are due, on ranks {where} only: every "
            "rank has to use every layer, and to start from the same state"
        )


def _require_averaged(layer: Layer, witness: Sequence[float]) -> None:
    if len({value for value in witness if not math.isnan(value)}) > 1:
        raise CaptureError(
            f"layer {layer.name!r}: its .grad is not the same on every rank: train the model through "
            "torch.nn.parallel.DistributedDataParallel, the last backward pass not under no_sync(), or say "
            "process_group=False if each process trains a model of its own"
        )


def _moved(batch: Batch, change: Change, ranks: Ranks) -> tuple[Tensor, int]:
    """:func:`~sogrid.bound.moved` over those of the minibatch's first examples that are here."""
    counts, examples = batch.ready[0].counts, BOUND_EXAMPLES
    if counts:
        examples = int(min(counts[ranks.rank], BOUND_EXAMPLES - sum(counts[: ranks.rank])))
    if examples <= 0:
        return change[0].new_zeros(change[0].shape[:-2]), 0
    first, *others = batch.ready
    rows = first.record.some_inputs(examples)
    if not others:
        return moved(*change, rows)
    if is_small(rows.numel(), first.layer.weight):
        return moved(*change, torch.stack([rows, *(one.record.some_inputs(examples) for one in others)]))
    del rows  # patches, which are made for one layer at a time
    sizes, counts = zip(
        *(
            moved(*own, one.record.some_inputs(examples))
            for one, (_, own) in zip(batch.ready, batch.split(change), strict=True)
        ),
        strict=True,
    )
    return torch.stack(sizes), counts[0]
