"""The shell of the methods that treat each layer alone: refresh statistics, then step.

A method fills in three verbs, each on plain tensors: *measure* a statistics minibatch, *invert* what
was measured, and *update* one layer from its gradient (:class:`sogrid.method.LayerMethod`). Where a
statistics minibatch has few rows its matrices are never formed
(:func:`sogrid.statistics.second_moment`); ``repr`` tells where.

Per-example quantities are of the loss as it was when ``backward`` ran. What a ``GradScaler`` multiplied it
by is divided out; a factor of your own is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.capture import CaptureError, LayerRecord
from sogrid.method import LayerMethod
from sogrid.optimizers.adaptive import ADAPTIVE, DUE, FRESH, MISSED, Adaptive, inverting
from sogrid.optimizers.batches import KEPT, SHIFT, flat, packed
from sogrid.optimizers.joint import Looked, Measured
from sogrid.parameters import Layer, check_count, check_hyperparameter
from sogrid.private import without_autocast
from sogrid.ranks import Ranks, joined
from sogrid.rows import Rows, share
from sogrid.shell import LayerOptimizer, LayerOptions
from sogrid.statistics import Statistics, refresh_due
from sogrid.watching import MOMENTUM

__all__ = ["Layerwise", "StatisticsOptions"]

State = dict[str, Any]

MEASURED = "measured"
"""Where a layer's state keeps at which update its statistics were taken."""


class StatisticsOptions(LayerOptions, total=False):
    """Options of every method that keeps statistics; see :class:`Layerwise`."""

    refresh_every: int | str | None
    refresh_share: float
    averaging: float
    rank: int | None
    output: str | int | Callable | None


class Layerwise(Adaptive):
    """Steps each layer by a method of its own; see the module docstring.

    Args:
        method: The three verbs.
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: Learning rate λ.
        hyperparameters: The method's own, kept in the parameter groups.
        refresh_every: N: statistics are refreshed before every N-th update, from that update's own
            minibatch unless :meth:`refresh` was called for it; those of a layer that has no part in that
            update, at its next one. ``"adaptive"``: a layer's when they have drifted, see
            :mod:`sogrid.optimizers.adaptive`. ``None``: only by :meth:`refresh`.
        refresh_share: Of the time, about what adaptive refreshes may take.
        averaging: ρ in [0, 1): weight of the old statistics when they are refreshed.
        rank: k, for methods that invert matrices: of each only the k leading eigendirections count, the
            others get the damping alone, which then has to be positive. A step is cheaper; what would not
            become so (fewer than k examples, or a formed matrix of width 2k or less) stays whole. A
            refresh costs an eigendecomposition for each matrix, for which an accelerator's host waits.
            ``None``: all directions, exact.
        output: Where a model returns a tuple, a dictionary or an object: which part is its output, with an
            entry for each example of the loss, as an index, a key, a name, or a function of what it returns
            (``lambda f: f.flatten(0, 1)``: every token is an example). ``None``: all of it.
        **options: Those of :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.
    """

    saved = (*LayerOptimizer.saved, "method", "refresh_every", "refresh_share", "averaging", "output")

    def __init__(
        self,
        method: LayerMethod,
        model: nn.Module,
        lr: float | Tensor,
        hyperparameters: dict[str, Any],
        *,
        refresh_every: int | str | None = 20,
        refresh_share: float = 0.1,
        averaging: float = 0.0,
        rank: int | None = None,
        output: str | int | Callable[[Any], Tensor] | None = None,
        **options,
    ) -> None:
        """See the class."""
        self._require_model(model)
        if refresh_every is not None and refresh_every != ADAPTIVE:
            check_count("refresh_every (N)", refresh_every)
        check_hyperparameter("refresh_share", refresh_share, positive=True, below=1.0)
        check_hyperparameter("averaging (ρ)", averaging, below=1.0)
        self.method, self.averaging, self.output = method, averaging, output
        self.refresh_every, self.refresh_share = refresh_every, refresh_share
        own = {"rank": rank, "refreshed": -1, "schedule": None}
        super().__init__(model, lr, {**hyperparameters, **own}, **options)

    def _lines(self) -> str:
        """How each layer's inverses are held."""
        routes = []
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            kinds = ["thin" if key + SHIFT in state else "dense" for key in state if key.endswith("inverse")]
            routes += [f"{layer.name} {'/'.join(kinds)}"] if kinds else []
        return f"inverses: {', '.join(routes)}\n" if routes else ""

    @property
    def uses_statistics(self) -> bool:
        """Whether the method has anything to refresh."""
        return self.method.uses_statistics

    @property
    def uses_mean(self) -> bool:
        """Whether the method uses the minibatch's own mean input."""
        return self.method.uses_mean

    def check_hyperparameters(self, group: dict) -> None:  # noqa: D102
        super().check_hyperparameters(group)
        if group["rank"] is not None:
            check_count("rank", group["rank"])
        self.method.check(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell a ``GradScaler`` to leave the division to the step, which needs to know by what."""
        return self.gradients == "factored" or self._needs_gradients

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch.

        Raises:
            ValueError: If the state is that of another optimizer; nothing was changed.
        """
        for group in state_dict["param_groups"]:
            needed = self.method.keeps({**self.defaults, **group})
            for state in (state_dict["state"].get(index, {}) for index in group["params"]):
                if "biased" in state and not needed <= state.keys():
                    raise ValueError(
                        f"this is the state of another optimizer than {type(self).__name__}: of a layer it "
                        f"has {', '.join(sorted(state))}, and not {', '.join(sorted(needed - state.keys()))}"
                    )
        super().load_state_dict(state_dict)

    # -- refresh ---------------------------------------------------------------------------------------

    @property
    def refresh_due(self) -> bool:
        """Whether the next step would refresh the statistics from its own minibatch."""
        return bool(self._due())

    def _due(self) -> set[str]:
        """Layers whose statistics the next step would renew."""
        group = self.param_groups[0]
        if not self.uses_statistics or group["refreshed"] == group["updates"]:
            return set()
        if self.refresh_every == ADAPTIVE and group["updates"]:
            return self._drifted()
        if not refresh_due(group["updates"], 1 if self.refresh_every == ADAPTIVE else self.refresh_every):
            return set()
        return {layer.name for layer in self._layers}

    def _stale(self) -> set[str]:
        """Layers that the next step would refresh: due, late, or such that it could not update them."""
        if not self.uses_statistics or self.refresh_every is None:
            return set()
        late = {layer.name for layer in self._layers if not self._fits(layer) or self._late(layer)}
        return self._due() | late

    def _late(self, layer: Layer) -> bool:
        """Whether a layer's statistics are older than the latest refresh by a fixed schedule."""
        group, every = self.param_groups[0], self.refresh_every
        measured = self.state[layer.weight].get(MEASURED, group["refreshed"])
        return every != ADAPTIVE and group["updates"] // every > measured // every

    def _fits(self, layer: Layer) -> bool:
        """Whether a layer has statistics, taken while its bias was trained or not, as it is now."""
        return self.state.get(layer.weight, {}).get("biased") == (layer.trained_bias is not None)

    def _wanted(self):
        wanted, stale = super()._wanted(), self._stale()
        roots = bool(stale) and self.method.loss is not None and self._needs_gradients
        probe = self._probe() if stale else None
        some = wanted.some if self.refresh_every != ADAPTIVE else {layer.name for layer in self._layers}
        return replace(
            wanted, rows=wanted.rows | stale, some=some, probe=probe, roots=roots, output=self.output
        )

    @property
    def _needs_gradients(self) -> bool:
        return any(map(self.method.needs_gradients, self.param_groups))

    def _probe(self):
        return self.method.probe(self.param_groups[0]["updates"], self._ranks().rank)

    def refresh(self, closure: Callable[[], Tensor]) -> None:
        """Refresh the statistics from a minibatch of their own (Algorithm 4, line 4), if there are any.

        Those of the layers that are due, or of all that it runs if none is.

        Args:
            closure: Runs the model forward, in training mode, and returns the loss, reduced as
                declared. It must not call ``backward``; no ``.grad`` is touched.

        Raises:
            CaptureError: If the closure did not run the model, or a layer was used in an unsupported way.
            FactorizationError: If a damped matrix cannot be inverted; the old statistics stay.
            FloatingPointError: On an accelerator, if a gradient since the last refresh was not finite.
            TypeError: If the closure returns no scalar loss.
        """
        if not self.uses_statistics:
            return

        def looked() -> Looked:
            self._noted.require_finite()
            with torch.enable_grad():
                records = self._capture.collect(closure, self._probe())
            if not records:
                raise CaptureError("the closure given to refresh ran no watched layer in training mode")
            names = records.keys() & (due or records.keys())
            return [], self._measured({name: records[name] for name in names})

        due, ranks = self._due(), self._ranks()
        with torch.no_grad():
            _, measured = self._together(looked, ranks)
            with without_autocast():
                states = self._refreshed(measured, ranks)
        self._adopt(states)
        self._pass_over(due, states, 0.0)
        if self.capturable:  # so that no two refreshes draw the same
            for group in self.param_groups:
                group["updates"] += 1
                group["refreshed"] = group["updates"]
        self._capture.wanted = self._wanted()

    def _measured(self, records: dict[str, LayerRecord]) -> Iterator[Measured]:
        """Statistics of kept records, layer by layer."""
        for layer in self._layers:
            record = records.get(layer.name)
            if record is not None and record.count:
                yield Measured(layer, self._measure(layer, record), (record.count,), record)

    def _measure(self, layer: Layer, record: LayerRecord) -> Statistics:
        name, group = f"layer {layer.name!r}", self.param_groups[layer.home]
        if not record.complete:
            raise CaptureError(
                f"{name}: its statistics became due, or its bias was frozen or unfrozen, after "
                "its forward pass: call zero_grad() and run it again, or call refresh(closure)"
            )
        if self.method.needs_gradients(group):
            self._require_scale()
        rows = self._rows(layer, record)
        self._require_finite({name: [rows.g]})
        return self.method.measure(rows, group)

    def _rows(self, layer: Layer, record: LayerRecord) -> Rows:
        if self.method.by_example:
            record.require_examples_first(self.method.rows_are_examples)
        rows, scale = record.rows(), (record.count if self.reduction == "mean" else 1) / self._loss_scale
        return rows._replace(g=rows.g * scale, biased=layer.trained_bias is not None)

    def _refreshed(self, measured: Iterable[Measured], ranks: Ranks) -> dict[Tensor, State]:
        """New states from statistics, whose inverses the ranks share out; changes nothing."""
        if ranks.size == 1:
            states = {}
            for layer, own, counts, record in measured:
                found, state = self._blended(layer, own)
                state |= self._inverted(layer, found)
                state |= self._moments(layer, record, state)
                states[layer.weight] = state | self._work(layer, found, state, record, counts)
            return states
        if not measured:
            return {}
        layers, own, counts, records = zip(*measured, strict=True)
        whole = joined(ranks, own, list(map(self._shares, counts)))
        found, states = zip(*map(self._blended, layers, whole), strict=True)
        jobs = [partial(self._inverted, *job) for job in zip(layers, found, strict=True)]
        weights = [layer.weight for layer in layers]
        inverses = ranks.divided(jobs, list(map(inverting, found)), weights)
        states = [state | inverse for state, inverse in zip(states, inverses, strict=True)]
        moments = map(self._moments, layers, records, states)
        states = [state | own for state, own in zip(states, self._mean(ranks, counts, moments), strict=True)]
        costs = self._of_ranks(list(map(self._work, layers, found, states, records, counts)), ranks)
        return {weight: state | cost for weight, state, cost in zip(weights, states, costs, strict=True)}

    def _moments(self, layer: Layer, record: LayerRecord, state: State) -> State:
        """What the method wants of a minibatch in the basis that was found."""
        if not self.method.uses_moments:
            return {}
        group = self.param_groups[layer.home]
        return {"moments": self.method.moments(self._rows(layer, record), packed(state), group)}

    def _mean(self, ranks: Ranks, counts: Sequence[Sequence[float]], own: Iterable[State]) -> list[State]:
        """States of means over examples, of the minibatch of all ranks."""
        shares = [self._shares(by_rank) for by_rank in counts]
        parts = [
            {key: share[ranks.rank] / sum(share) * value for key, value in state.items()}
            for share, state in zip(shares, own, strict=True)
        ]
        sums = iter(ranks.sum([value for part in parts for value in part.values()]))
        return [{key: next(sums) for key in part} for part in parts]

    def _blended(self, layer: Layer, found: Statistics) -> tuple[Statistics, State]:
        """Statistics as they are kept, and the state that keeps them."""
        older = self._kept(layer) if self.averaging > 0 else None
        found = share(found, older, self.averaging)
        state: State = {"biased": layer.trained_bias is not None}
        if self.averaging > 0:
            kept = found._asdict().items()
            state |= {KEPT + key: value for key, value in kept if value is not None}
        return found, state

    def _inverted(self, layer: Layer, found: Statistics) -> dict[str, Tensor]:
        group = self.param_groups[layer.home]
        return flat(self.method.invert(found, group, f"layer {layer.name!r}"))

    def _kept(self, layer: Layer) -> Statistics | None:
        """The statistics that are to be averaged with, if they fit."""
        old = self.state.get(layer.weight, {})
        keys = [key for key in Statistics._fields if KEPT + key in old]
        if not keys or not self._fits(layer):
            return None
        return Statistics(**{key: old[KEPT + key].to(layer.weight) for key in keys})

    def _adopt(self, states: dict[Tensor, State]) -> None:
        held = {}
        for weight, state in states.items():
            old = self.state[weight]
            state = {**state, MEASURED: self.param_groups[0]["updates"]}
            held[weight] = state | {key: old[key].to(weight) for key in old.keys() & {MOMENTUM}}
        self.state.update(self._written(held) if self.capturable else held)
        self._pay([layer.name for layer in self._layers if layer.weight in states])
        for group in self.param_groups:
            group["refreshed"] = self.param_groups[0]["updates"]

    def _written(self, states: dict[Tensor, State]) -> dict[Tensor, State]:
        """States in the place of those that are there, where a CUDA graph reads."""
        old = {weight: self.state[weight] for weight in states}
        if any("biased" in old[weight] and _shapes(old[weight]) != _shapes(states[weight]) for weight in old):
            raise CaptureError(
                "a layer's statistics have another shape than those a CUDA graph may read: refresh "
                "from as many examples each time"
            )
        for weight, state in states.items():
            there = old[weight]
            for key in {FRESH, DUE, MISSED} & there.keys():
                del there[key]
            for key, value in state.items():
                fits = key in there and isinstance(value, Tensor) and there[key].dtype == value.dtype
                fits = fits and there[key].device == value.device
                there[key] = there[key].copy_(value) if fits else value
        return old

    # -- step ------------------------------------------------------------------------------------------

    def _prepare(self, ranks):
        stale = self._stale()
        self._require_capturable(
            self.refresh_every is None and not stale,
            "replays refresh nothing, so give it refresh_every=None and call refresh(closure) between them",
        )

        def looked() -> Looked:
            ready = self._looked(ranks)
            for one in ready:
                if one.layer.name not in stale:
                    self._require_state(one.layer)
            if stale:
                self._require_loss_as_declared()
            return ready, self._measured({name: self._capture.records[name] for name in stale})

        ready, measured = self._together(looked, ranks)
        if stale:
            states = self._refreshed(measured, ranks)
            self._adopt(states)
            self._pass_over(stale, states, 0.5)
        if ready:
            self._look([one for one in ready if one.layer.name not in stale], ranks)
        return ready

    def _require_loss_as_declared(self) -> None:
        """Refuse another loss than the method's where it can be told, and its scale is known."""
        loss = self.method.loss
        if loss is None or not self._needs_gradients or getattr(self, "grad_scale", 1.0) is None:
            return
        for root in self._capture.roots:
            scale = (len(root.output) if self.reduction == "mean" else 1) / self._loss_scale
            loss.require_target(root.output, loss.target(root.output, root.grad * scale))

    def _change(self, batch):
        first, *_ = batch.ready
        gradient = batch.gradient(self._matrices if first.factored is None else attrgetter("factored"))
        return self.method.update(gradient, batch.state, self.param_groups[batch.home])

    def _require_state(self, layer: Layer) -> None:
        if self.uses_statistics and not self._fits(layer):
            raise CaptureError(
                f"layer {layer.name!r} has no statistics, or its bias was frozen or unfrozen since: call "
                "refresh(closure) before this step"
                + ("" if self.refresh_every is None else ", or zero_grad() before its forward pass")
            )

    def _check_state(self, layer):
        dtype, device = layer.weight.dtype, layer.weight.device
        for key, value in self.state.get(layer.weight, {}).items():
            if isinstance(value, Tensor) and (value.dtype, value.device) != (dtype, device):
                raise ValueError(
                    f"layer {layer.name!r} is {dtype} on {device}, its {key} {value.dtype} on "
                    f"{value.device}: the model was moved after the optimizer had refreshed; call "
                    "refresh(closure), or optimizer.load_state_dict(optimizer.state_dict())"
                )


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if isinstance(value, Tensor) and key != FRESH}
