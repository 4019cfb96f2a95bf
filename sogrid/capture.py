"""The package's only hooks: what enters each linear layer and what comes back to it.

For a layer ``a = W h + b``, one forward and backward pass gives the inputs ``h: [n, n_in]`` and the
gradients at the pre-activations ``[n, n_out]`` (the two arrows of Thesis Fig. 2.1).

The hooks are torch's *global* module hooks, one pair for the whole process, which look each module up
in a weak table. Nothing is attached to the model, so copies, pickles and ``torch.save`` of it carry
nothing of ours, and a capture that is closed or collected is gone without a trace. The gradient is
taken by a tensor hook on the layer's output, which autograd runs on the value before any in-place
activation. Forward passes in evaluation mode or without gradients are not seen at all, and gradients
that ``torch.autograd.grad`` computes for other ends, without adding to any ``.grad``, are forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["Capture", "CaptureError", "LayerRecord", "RootRecord"]

_listeners: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Capture]] = weakref.WeakKeyDictionary()
_handles: list = []


class CaptureError(RuntimeError):
    """A layer was used in a way whose curvature sogrid does not know."""


@dataclass
class LayerRecord:
    """What one layer saw since its gradient was last cleared.

    Attributes:
        count: Examples whose gradient arrived.
        input_sum: Σ h over them, ``[n_in]``.
        inputs: The inputs ``[n, n_in]`` of each backward pass (empty unless the capture keeps them).
        grads: The gradients at the pre-activations ``[n, n_out]``, scaled as the loss was reduced.
        rows: For each backward pass, the pulled-back probe vectors ``[n, n_out]``.
    """

    count: int = 0
    input_sum: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    rows: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, h: Tensor, grad: Tensor, rows: list[Tensor], keep: bool) -> LayerRecord:
        """One backward pass; whole tensors only if ``keep``."""
        record = cls(len(h), h.sum(0))
        return cls(record.count, record.input_sum, [h], [grad], [rows]) if keep else record

    def extend(self, later: LayerRecord) -> None:
        """Add another backward pass."""
        self.count += later.count
        self.input_sum = later.input_sum if self.input_sum is None else self.input_sum + later.input_sum
        self.inputs += later.inputs
        self.grads += later.grads
        self.rows += later.rows


@dataclass
class RootRecord:
    """The model's own input, output and output gradient, of one backward pass."""

    input: Tensor
    output: Tensor
    grad: Tensor


class _Pass:
    """One forward pass through the model: which layers it met, and how to reach them again."""

    def __init__(self) -> None:
        self.layers: dict[str, tuple[Tensor, object]] = {}  # name -> (input, gradient edge)
        self.rows: dict[str, list[Tensor]] = {}
        self.input: Tensor | None = None
        self.pulled = False  # some gradient has come back


def _mark(parameter: Tensor) -> tuple[int, int] | None:
    """Tells whether ``.grad`` has been written since."""
    return None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


class _Backward:
    """One run of autograd's engine: what arrived, and which ``.grad`` there was before."""

    def __init__(self, task: int = -1, parameters: Iterable[Tensor] = ()) -> None:
        self.task = task
        self.before = {parameter: _mark(parameter) for parameter in parameters}
        self.layers: list[tuple[str, Tensor, LayerRecord]] = []
        self.roots: list[RootRecord] = []

    def accumulated(self, parameter: Tensor) -> bool:
        return _mark(parameter) != self.before.get(parameter)


class Capture:
    """Listen to the linear layers of a model during training passes.

    Use it as a context manager in a page, or own it and :meth:`close` it in an optimizer.

    Args:
        model: The module whose forward is called.
        layers: Name → layer; default every ``nn.Linear`` of the model.
        keep: Keep whole inputs and gradients, not only their counts and sums.

    Attributes:
        probe: ``None``, or a function from the model's output ``[n, k]`` to vectors ``[n, k]`` that are
            pulled back to every layer right after the forward pass (the graph is kept).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> with Capture(model) as capture:
        ...     model(torch.ones(5, 2)).sum().backward()
        >>> [tuple(capture.records[name].grads[0].shape) for name in ("0", "2")]
        [(5, 3), (5, 1)]
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Linear] | None = None, *, keep: bool = True
    ) -> None:
        """See the class."""
        if layers is None:
            layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.keep = keep
        self.probe: Callable[[Tensor], Iterable[Tensor]] | None = None
        self._model = weakref.ref(model)
        self._names = weakref.WeakKeyDictionary({layer: name for name, layer in layers.items()})
        self._paused = False
        self._pass = _Pass()
        self.clear()
        for module in {model, *layers.values()}:
            _listeners.setdefault(module, weakref.WeakSet()).add(self)
        if not _handles:
            _handles.append(register_module_forward_pre_hook(_before))
            _handles.append(register_module_forward_hook(_after, with_kwargs=True))
        weakref.finalize(self, _tidy).atexit = False

    def clear(self) -> None:
        """Forget what has been seen."""
        self._records = {name: LayerRecord() for name in self._names.values()}
        self._roots: list[RootRecord] = []
        self._backward = _Backward()

    @property
    def records(self) -> dict[str, LayerRecord]:
        """Name → what the layer saw in the backward passes that built its ``.grad``."""
        self._settle()
        return self._records

    @property
    def roots(self) -> list[RootRecord]:
        """The model's own input, output and gradient at each backward pass, if ``keep``."""
        self._settle()
        return self._roots

    def close(self) -> None:
        """Stop listening, for good."""
        for listeners in _listeners.values():
            listeners.discard(self)
        _tidy()

    def __enter__(self) -> Capture:
        """The capture itself."""
        return self

    def __exit__(self, *_) -> None:
        """Close."""
        self.close()

    def pull(self, output: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """Jᵀv at every layer of the latest pass: ``vector`` at ``output``, ``[n, n_out]`` each.

        Leaves the graph, the records and every ``.grad`` as they were. Layers that ``output`` does not
        depend on are absent.
        """
        edges = {name: edge for name, (_, edge) in self._pass.layers.items()}
        self._paused = True
        try:
            grads = torch.autograd.grad(
                output, list(edges.values()), vector, retain_graph=True, allow_unused=True
            )
        finally:
            self._paused = False
        return {name: grad for name, grad in zip(edges, grads, strict=True) if grad is not None}

    def collect(self, loss: Tensor) -> dict[str, LayerRecord]:
        """Records of the latest pass alone, its gradients taken from ``loss`` without touching ``.grad``."""
        records = {}
        latest = self._pass
        for name, grad in self.pull(loss, torch.ones_like(loss)).items():
            h, rows = latest.layers[name][0], latest.rows.get(name, [])
            records[name] = LayerRecord.of(h, grad, rows, keep=True)
        return records

    def _begin(self, module: nn.Module) -> None:
        """The model's forward starts: a new pass."""
        if module is self._model() and torch.is_grad_enabled() and module.training:
            self._pass = _Pass()

    def _running(self) -> _Backward:
        """The backward pass that is running; one that opens onto cleared gradients forgets the past."""
        task = torch._C._current_graph_task_id()
        if task != self._backward.task:
            self._settle()
            parameters = list(self._model().parameters())
            if all(parameter.grad is None for parameter in parameters):
                self.clear()
            self._backward = _Backward(task, parameters)
        return self._backward

    def _settle(self) -> None:
        """Keep what a finished backward pass brought, where it did add to ``.grad``."""
        done, self._backward = self._backward, _Backward()
        for name, weight, record in done.layers:
            if done.accumulated(weight):
                self._records[name].extend(record)
        if done.roots and any(map(done.accumulated, done.before)):
            self._roots += done.roots

    def _end(self, module: nn.Module, inputs: tuple, output) -> None:
        """A watched layer, or the model itself, has computed its output."""
        if self._paused or not (torch.is_grad_enabled() and module.training):
            return
        if module in self._names:
            self._see_layer(self._names[module], module, inputs[0], output)
        if module is self._model() and isinstance(output, Tensor) and output.requires_grad:
            self._see_root(inputs, output)

    def _see_layer(self, name: str, layer: nn.Module, h: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            return
        if h.dim() != 2 or not len(h):
            raise CaptureError(
                f"layer {name!r} got an input of shape {tuple(h.shape)}; sogrid needs [examples, features] "
                "with at least one example: flatten the other dimensions before the layer"
            )
        if name in self._pass.layers:
            if not self._pass.pulled:
                raise CaptureError(
                    f"layer {name!r} was applied twice in one forward pass (shared weights or activation "
                    "checkpointing); its curvature is not a sum over examples: leave it to torch's SGD"
                )
            self._pass = _Pass()
        here, me = self._pass, weakref.ref(self)
        h = h.detach().to(layer.weight.dtype)
        here.layers[name] = (h, get_gradient_edge(output))

        def arrived(grad: Tensor) -> None:
            capture = me()
            if capture is None or capture._paused:
                return
            here.pulled = True
            record = LayerRecord.of(h, grad.detach().to(h.dtype), here.rows.get(name, []), capture.keep)
            capture._running().layers.append((name, layer.weight, record))

        output.register_hook(arrived)

    def _see_root(self, inputs: tuple, output: Tensor) -> None:
        here, me = self._pass, weakref.ref(self)
        if self.probe is not None:
            for vector in self.probe(output.detach()):
                for name, row in self.pull(output, vector).items():
                    here.rows.setdefault(name, []).append(row.detach())
        if not self.keep:
            return
        x, f = inputs[0], output.detach()

        def arrived(grad: Tensor) -> None:
            capture = me()
            if capture is not None and not capture._paused:
                capture._running().roots.append(RootRecord(x, f, grad.detach()))

        output.register_hook(arrived)


def _before(module: nn.Module, args: tuple) -> None:
    for capture in list(_listeners.get(module, ())):
        capture._begin(module)


def _after(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    for capture in list(_listeners.get(module, ())):
        capture._end(module, args or tuple(kwargs.values()), output)


def _tidy() -> None:
    """Drop empty entries, and the process-wide hooks with the last listener."""
    for module in [m for m, captures in _listeners.items() if not list(captures)]:
        del _listeners[module]
    if not _listeners:
        while _handles:
            _handles.pop().remove()
