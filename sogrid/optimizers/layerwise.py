"""The shell of the methods that treat each layer alone: refresh statistics, then step.

A method fills in three verbs, each on plain tensors: *measure* a statistics minibatch, *invert* what
was measured, and *update* one layer from its gradient (:class:`sogrid.method.LayerMethod`). Where a
statistics minibatch has few rows its matrices are never formed
(:func:`sogrid.statistics.second_moment`); ``repr`` tells where.

Per-example quantities are of the loss as it was when ``backward`` ran. What a ``GradScaler`` multiplied it
by is divided out; a factor of your own is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.bound import BOUND_EXAMPLES, bounded
from sogrid.capture import CaptureError, LayerRecord
from sogrid.method import LayerMethod
from sogrid.parameters import Layer, check_count, check_hyperparameter
from sogrid.private import without_autocast
from sogrid.rows import share
from sogrid.shell import MOMENTUM, LayerOptimizer, LayerOptions
from sogrid.statistics import Statistics, refresh_due
from sogrid.structured import ThinInverse, scalar

__all__ = ["Layerwise", "StatisticsOptions"]

SHIFT, KEPT = "_shift", "statistics_"

State = dict[str, Any]


class StatisticsOptions(LayerOptions, total=False):
    """Options of every method that keeps statistics; see :class:`Layerwise`."""

    refresh_every: int | None
    averaging: float
    rank: int | None


class Layerwise(LayerOptimizer):
    """Steps each layer by a method of its own; see the module docstring.

    Args:
        method: The three verbs.
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: Learning rate λ.
        hyperparameters: The method's own, kept in the parameter groups.
        refresh_every: N: statistics are refreshed before every N-th update, from that update's own
            minibatch unless :meth:`refresh` was called for it. ``None``: only by :meth:`refresh`.
        averaging: ρ in [0, 1): weight of the old statistics when they are refreshed.
        rank: k, for methods that invert matrices: of each only the k leading eigendirections count, the
            others get the damping alone, which then has to be positive. A step is cheaper; what would not
            become so (fewer than k examples, or a formed matrix of width 2k or less) stays whole. A
            refresh costs an eigendecomposition for each matrix, for which an accelerator's host waits.
            ``None``: all directions, exact.
        **options: Those of :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.
    """

    saved = (*LayerOptimizer.saved, "method", "refresh_every", "averaging")

    def __init__(
        self,
        method: LayerMethod,
        model: nn.Module,
        lr: float | Tensor,
        hyperparameters: dict[str, Any],
        *,
        refresh_every: int | None = 20,
        averaging: float = 0.0,
        rank: int | None = None,
        **options,
    ) -> None:
        """See the class."""
        self._require_model(model)
        if refresh_every is not None:
            check_count("refresh_every (N)", refresh_every)
        check_hyperparameter("averaging (ρ)", averaging, below=1.0)
        self.method, self.refresh_every, self.averaging = method, refresh_every, averaging
        super().__init__(model, lr, {**hyperparameters, "rank": rank, "refreshed": -1}, **options)

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
        return self.gradients == "factored" or any(map(self.method.needs_gradients, self.param_groups))

    # -- refresh ---------------------------------------------------------------------------------------

    @property
    def refresh_due(self) -> bool:
        """Whether the next step would refresh the statistics from its own minibatch."""
        group = self.param_groups[0]
        fresh = not self.uses_statistics or group["refreshed"] == group["updates"]
        return not fresh and refresh_due(group["updates"], self.refresh_every)

    def _stale(self) -> set[str]:
        """Layers that the next step would refresh: all if that is due, else those it could not update."""
        if not self.uses_statistics or self.refresh_every is None:
            return set()
        due = self.refresh_due
        return {layer.name for layer in self._layers if due or not self._fits(layer)}

    def _fits(self, layer: Layer) -> bool:
        """Whether a layer has statistics, taken while its bias was trained or not, as it is now."""
        return self.state.get(layer.weight, {}).get("biased") == (layer.trained_bias is not None)

    def _wanted(self):
        wanted, stale = super()._wanted(), self._stale()
        return replace(wanted, rows=wanted.rows | stale, probe=self._probe() if stale else None)

    def _probe(self):
        return self.method.probe(self.param_groups[0]["updates"])

    def refresh(self, closure: Callable[[], Tensor]) -> None:
        """Refresh the statistics from a minibatch of their own (Algorithm 4, line 4), if there are any.

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
        self._noted.require_finite()
        with torch.enable_grad():
            records = self._capture.collect(closure, self._probe())
        if not records:
            raise CaptureError("the closure given to refresh ran no watched layer in training mode")
        with torch.no_grad(), without_autocast():
            states = self._refreshed(records)
        self._adopt(states)
        self._capture.wanted = self._wanted()

    def _refreshed(self, records: dict[str, LayerRecord]) -> dict[Tensor, State]:
        """New states from kept records, layer by layer; changes nothing."""
        seen = ((layer, records.get(layer.name)) for layer in self._layers)
        return {
            layer.weight: self._refreshed_state(layer, record)
            for layer, record in seen
            if record is not None and record.count
        }

    def _refreshed_state(self, layer: Layer, record: LayerRecord) -> State:
        name, biased, group = (
            f"layer {layer.name!r}",
            layer.trained_bias is not None,
            self.param_groups[layer.home],
        )
        if not record.complete:
            raise CaptureError(
                f"{name}: its statistics became due, or its bias was frozen or unfrozen, after "
                "its forward pass: call zero_grad() and run it again, or call refresh(closure)"
            )
        rows = record.rows()
        if self.method.needs_gradients(group):
            self._require_scale()
        scale = (record.count if self.reduction == "mean" else 1) / self._loss_scale
        rows = rows._replace(g=rows.g * scale, biased=biased)
        self._require_finite({name: [rows.g]})
        older = self._kept(layer, rows.h) if self.averaging > 0 else None
        found = share(self.method.measure(rows, group), older, self.averaging)
        state: State = {"biased": biased}
        if self.averaging > 0:
            kept = found._asdict().items()
            state |= {KEPT + key: value for key, value in kept if value is not None}
        return state | _flat(self.method.invert(found, group, name))

    def _kept(self, layer: Layer, like: Tensor) -> Statistics | None:
        """The statistics that are to be averaged with, if they fit."""
        old = self.state.get(layer.weight, {})
        keys = [key for key in Statistics._fields if KEPT + key in old]
        if not keys or not self._fits(layer):
            return None
        return Statistics(**{key: old[KEPT + key].to(like) for key in keys})

    def _adopt(self, states: dict[Tensor, State]) -> None:
        for weight, state in states.items():
            kept = {key: value for key, value in self.state[weight].items() if key == MOMENTUM}
            self.state[weight] = state | kept
        for group in self.param_groups:
            group["refreshed"] = self.param_groups[0]["updates"]

    # -- step ------------------------------------------------------------------------------------------

    def _prepare(self, ready):
        if stale := self._stale():
            self._adopt(self._refreshed({name: self._capture.records[name] for name in stale}))
        for layer, *_ in ready:
            self._check_state(layer)

    def _changes(self, ready):
        for layer, record, factored in ready:
            state, group = _packed(self.state.get(layer.weight, {})), self.param_groups[layer.home]
            gradient = factored or self._matrices(layer, record)
            change = self.method.update(gradient, state, group)
            if group["max_change"] is not None:
                h, positions = record.some_inputs(BOUND_EXAMPLES)
                change = bounded(*change, h, group["max_change"], positions)
            yield layer, change

    def _check_state(self, layer: Layer) -> None:
        if self.uses_statistics and not self._fits(layer):
            raise CaptureError(
                f"layer {layer.name!r} has no statistics, or its bias was frozen or unfrozen since: call "
                "refresh(closure) before this step"
                + ("" if self.refresh_every is None else ", or zero_grad() before its forward pass")
            )
        dtype, device = layer.weight.dtype, layer.weight.device
        for key, value in self.state.get(layer.weight, {}).items():
            if isinstance(value, Tensor) and (value.dtype, value.device) != (dtype, device):
                raise ValueError(
                    f"layer {layer.name!r} is {dtype} on {device}, its {key} {value.dtype} on "
                    f"{value.device}: the model was moved after the optimizer had refreshed; call "
                    "refresh(closure), or optimizer.load_state_dict(optimizer.state_dict())"
                )


def _flat(state: dict[str, Tensor | ThinInverse]) -> dict[str, Tensor]:
    """A thin inverse as two tensors, Q and δ: torch loads and moves nothing else."""
    flat = {}
    for key, value in state.items():
        thin = isinstance(value, ThinInverse)
        flat |= {key: value.factor, key + SHIFT: value.shift} if thin else {key: value}
    return flat


def _packed(state: dict[str, Tensor]) -> dict[str, float | Tensor | ThinInverse]:
    """The tensors of :func:`_flat` put together again."""
    packed = {key: scalar(value) for key, value in state.items()}
    for key in [key for key in packed if key.endswith(SHIFT)]:
        whole = key.removesuffix(SHIFT)
        packed[whole] = ThinInverse(packed[whole], packed[key])
    return packed
