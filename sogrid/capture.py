"""The package's only hooks: what enters each linear layer and what comes back to it.

For a layer ``a = W h + b``, one forward and backward pass gives the inputs ``h: [n, n_in]`` and the
gradients at the pre-activations ``[n, n_out]`` (the two arrows of Thesis Fig. 2.1).

The hooks are torch's *global* module hooks, one pair for the whole process, which ask every capture
whether it knows the module. Nothing is attached to the model, so copies, pickles and ``torch.save`` of
it carry nothing of ours, and a capture that is closed or collected is gone without a trace. The
gradient is taken by a tensor hook on the layer's output, which autograd runs on the value before any
in-place activation.

With *factored* gradients that is all a backward pass leaves: the layer's output is handed on through an
autograd function that forms no weight gradient, its ``.grad`` stays ``None``, and the record holds the
factors g and h of ∇W = (1/n) gᵀh.

A record says what ``.grad`` is made of, or would be. So these are not seen at all: forward passes in
evaluation mode, without gradients or inside a ``torch.func`` transform, a trace or an export; the
repeated forward pass of an activation checkpoint; and gradients that ``torch.autograd.grad`` returns
instead of adding them to ``.grad``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["Capture", "CaptureError", "LayerRecord", "RootRecord"]

_listeners: tuple[weakref.ref[Capture], ...] = ()
_handles: list = []
_lock = threading.RLock()


class CaptureError(RuntimeError):
    """A layer was used in a way whose curvature sogrid does not know."""


class _Seen:
    """A tensor of the model's own, detached, as it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, tensor._version

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written into it since."""
        return self.tensor._version == self._version


@dataclass(eq=False)
class _Use:
    """What one layer saw in one forward pass. The graph holds it, so it must not hold the graph."""

    name: str
    count: int
    dtype: torch.dtype
    kept: bool  # for statistics
    input_sum: Tensor | None  # where gradients are matrices
    inputs: _Seen | None  # where gradients are factored, or else a copy if the pass is kept
    output: _Seen | None  # where the graph is cut above
    rows: list[Tensor] = field(default_factory=list)
    over: bool = False  # a gradient has come back, or will not


@dataclass
class LayerRecord:
    """What one layer saw since its gradient was last cleared.

    Attributes:
        count: Examples whose gradient arrived.
        input_sum: Σ h over them, ``[n_in]``, if the layer's gradient is a matrix.
        inputs: The inputs ``[n, n_in]`` of each forward pass, of those that were kept; if the layer's
            gradient is factored, of all, and the model's own tensors.
        grads: The gradients at the pre-activations ``[n, n_out]``, scaled as the loss was reduced.
        rows: For each of these passes, the pulled-back probe vectors ``[n, n_out]``.
    """

    count: int = 0
    input_sum: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    rows: list[list[Tensor]] = field(default_factory=list)
    _places: dict[_Use, int] = field(default_factory=dict, repr=False)
    _task: int = -1  # the backward pass of the latest gradient

    @property
    def complete(self) -> bool:
        """Whether every pass was kept."""
        return all(use.kept for use in self._places)

    def examples(self) -> tuple[Tensor, Tensor | None]:
        """(h, g) of all passes, one after the other; no g where the graph was cut above.

        Raises:
            CaptureError: If a factored gradient's h was changed in place meanwhile.
        """
        for use in self._places:
            if use.inputs is not None and not use.inputs.unchanged:
                raise CaptureError(
                    f"the input of layer {use.name!r} was changed in place after its backward pass, and "
                    "factored gradients need it until step(): give each minibatch a tensor of its own"
                )
        return join(self.inputs), join(self.grads) if self.grads else None

    def outputs(self, layer: nn.Linear) -> Tensor:
        """The pre-activations of all passes; computed again where they were not kept or are changed."""
        seen = [(use.output, use.inputs.tensor) for use in self._places]
        return join([a.tensor if a is not None and a.unchanged else layer(h) for a, h in seen])

    def add(self, use: _Use, grad: Tensor | None) -> None:
        """Count a pass, once: further gradients through it add to its first, as they do in ``.grad``."""
        if use in self._places:
            if use.inputs is not None and grad is not None:
                place = self._places[use]
                self.grads[place] = self.grads[place] + grad
            return
        self._places[use] = len(self.grads)
        self.count += use.count
        if use.input_sum is not None:
            self.input_sum = use.input_sum if self.input_sum is None else self.input_sum + use.input_sum
        if use.inputs is not None:
            self.inputs.append(use.inputs.tensor)
            self.rows.append(use.rows)
        if use.inputs is not None and grad is not None:
            self.grads.append(grad)


@dataclass(eq=False)
class RootRecord:
    """The model's own first input, output and output gradient, of one forward pass."""

    input: Tensor
    output: Tensor
    grad: Tensor | None = None


def join(passes: list[Tensor]) -> Tensor:
    """One tensor ``[n, ·]`` of all passes; not a copy if there is one."""
    return passes[0] if len(passes) == 1 else torch.cat(passes)


class Capture:
    """Listen to the linear layers of a model during training passes.

    Use it as a context manager in a page, or own it and :meth:`close` it in an optimizer.

    Args:
        model: The module whose forward is called.
        layers: Name → layer; default every ``nn.Linear`` of the model.
        keep: Keep whole inputs and gradients, not only their counts and sums.

    Attributes:
        records: Name → :class:`LayerRecord`.
        roots: The model's own input, output and gradient of each pass, if ``keep_roots``.
        keep: Names of the layers whose whole inputs and gradients coming passes keep.
        keep_roots: Whether coming passes keep the roots.
        factored: Weights whose gradient coming passes leave as factors, and biases that go with them:
            no ``.grad`` is made.
        cut: Whether the graph of coming passes ends at the model's output: whoever owns the capture
            needs the gradient there, what it kept of the layers, and nothing else.
        probe: ``None``, or a function from the model's output ``[n, k]`` to vectors ``[n, k]`` that are
            pulled back to every kept layer right after the forward pass (the graph stays).

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
        self.keep: set[str] = set(layers) if keep else set()
        self.keep_roots = keep
        self.factored: Container[Tensor] = frozenset()
        self.cut = False
        self.probe: Callable[[Tensor], Iterable[Tensor]] | None = None
        self._model = model
        self._names = {layer: name for name, layer in layers.items()}
        self._known = {model, *self._names}
        # the latest pass; in collect(), all
        self._passes: list[dict[str, tuple[_Use, GradientEdge | None]]] = [{}]
        self._collecting = False
        self._task = -1
        self.clear()
        global _listeners
        with _lock:
            _listeners = (*_listeners, weakref.ref(self))
            if not _handles:
                _handles.append(register_module_forward_pre_hook(_before))
                _handles.append(register_module_forward_hook(_after, with_kwargs=True))
        weakref.finalize(self, _tidy).atexit = False

    def clear(self) -> None:
        """Forget what has been seen."""
        for use, _ in self._passes[-1].values():
            use.over = True
        self.records = {name: LayerRecord() for name in self._names.values()}
        self.roots: list[RootRecord] = []

    def close(self) -> None:
        """Stop listening, for good."""
        global _listeners
        with _lock:
            _listeners = tuple(ref for ref in _listeners if ref() is not self)
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
        uses = dict(self._passes[-1].values())
        return {use.name: grad for use, grad in _pull(output, vector, uses).items()}

    def collect(
        self, closure: Callable[[], Tensor], probe: Callable[[Tensor], Iterable[Tensor]] | None = None
    ) -> dict[str, LayerRecord]:
        """Records of the passes that a closure makes, alone and kept; no ``.grad`` is touched.

        Args:
            closure: Runs the model forward and returns a scalar loss.
            probe: In place of the capture's own.

        Raises:
            TypeError: If the closure returns anything else.
        """
        before = self._passes, self.keep, self.keep_roots, self.probe
        self._passes, self.keep, self.keep_roots, self.probe = [{}], set(self.records), False, probe
        self._collecting = True
        try:
            loss = closure()
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise TypeError(f"the closure must return the scalar loss, got {loss!r}")
            uses = {use: edge for layers in self._passes for use, edge in layers.values()}
            records: dict[str, LayerRecord] = {}
            for use, grad in _pull(loss, torch.ones_like(loss), uses).items():
                records.setdefault(use.name, LayerRecord()).add(use, grad)
            return records
        finally:
            self._collecting = False
            self._passes, self.keep, self.keep_roots, self.probe = before

    def _begin(self) -> None:
        """The model's forward starts: a new pass."""
        if not self._collecting:
            self._passes.clear()
        self._passes.append({})

    def _watches(self, module: nn.Module) -> bool:
        return module in self._names and module.training and module.weight.requires_grad

    def _roots(self, module: nn.Module) -> bool:
        return module is self._model and (module.training or bool(self._passes[-1])) and not _in_backward()

    def _see_layer(self, layer: nn.Linear, h: Tensor, output: Tensor, heard: list | None) -> None:
        """A watched layer has computed its output; ``heard`` by the function that handed it on, if any."""
        name = self._names[layer]
        count = h.shape[0] if h.dim() == 2 else 0
        if not count:
            raise CaptureError(
                f"layer {name!r} got an input of shape {tuple(h.shape)}; sogrid needs [examples, features] "
                "with at least one example: flatten the other dimensions before the layer"
            )
        latest = self._passes[-1]
        if _in_backward():
            if name in latest:  # an activation checkpoint computes again what was seen
                return
            raise CaptureError(
                f"layer {name!r} was first seen in a backward pass: give torch.utils.checkpoint "
                "use_reentrant=False, and call the model in training mode"
            )
        if name in latest:
            if not any(use.over for use, _ in latest.values()):
                raise CaptureError(
                    f"layer {name!r} was applied twice in one forward pass; its curvature is not a sum over "
                    "examples: leave it to torch's SGD"
                )
            self._begin()  # parts of the model are called on their own
        weight, kept, me = layer.weight, name in self.keep, weakref.ref(self)
        matrix, dtype, h = not (self.cut or weight in self.factored), weight.dtype, h.detach()
        if h.dtype != dtype or (kept and matrix):
            # a copy, as the user's buffer may be filled again; without one, versions tell
            h = h.to(dtype, copy=kept and matrix)
        use = _Use(
            name,
            count,
            dtype,
            kept,
            h.sum(0) if matrix else None,
            _Seen(h) if kept or not matrix else None,
            _Seen(output.detach()) if self.cut else None,
        )
        self._passes[-1][name] = use, None if self.cut else GradientEdge(output.grad_fn, output.output_nr)
        if self.cut:
            return

        def arrived(grad: Tensor) -> None:
            if (capture := me()) is not None:
                capture._record(use, weight).add(use, grad.detach().to(dtype))

        if heard is None:
            output.register_hook(lambda grad: arrived(grad) if _accumulates(weight) else None)
        else:
            heard.append(arrived)

    def _record(self, use: _Use, weight: Tensor) -> LayerRecord:
        """Where a gradient that arrives belongs: a new record if none of ``.grad`` is older."""
        task, record = torch._C._current_graph_task_id(), self.records[use.name]
        if use.input_sum is not None and weight.grad is None and task != record._task:
            record = self.records[use.name] = LayerRecord()
        record._task, use.over = task, True
        return record

    def _see_root(self, inputs: tuple, output: Tensor) -> None:
        uses = {use: edge for use, edge in self._passes[-1].values() if use.kept}
        if self.probe is not None and uses:
            for vector in self.probe(output.detach()):
                for use, row in _pull(output, vector, uses).items():
                    use.rows.append(row)
        if not self.keep_roots:
            return
        x = next(iter(inputs), None)
        x = x.detach().clone() if isinstance(x, Tensor) and not self.cut else x
        root, me = RootRecord(x, output.detach().clone()), weakref.ref(self)
        below = [use for use, _ in self._passes[-1].values()] if self.cut else []

        def arrived(grad: Tensor) -> None:
            capture = me()
            if capture is not None and any(map(_accumulates, capture._model.parameters())):
                capture._add_root(root, grad.detach(), bool(below))
                for use in below:
                    capture._record(use, None).add(use, None)

        output.register_hook(arrived)

    def _add_root(self, root: RootRecord, grad: Tensor, stays: bool) -> None:
        """As :meth:`_record` and :meth:`LayerRecord.add`, for the model's output."""
        task = torch._C._current_graph_task_id()
        if not stays and task != self._task and all(p.grad is None for p in self._model.parameters()):
            self.roots = []
        self._task = task
        if root in self.roots:
            root.grad = root.grad + grad
        else:
            root.grad = grad
            self.roots.append(root)


def _pull(output: Tensor, vector: Tensor, edges: dict[_Use, GradientEdge]) -> dict[_Use, Tensor]:
    """Jᵀv at every edge that ``output`` depends on, in the dtype of the layer's weights."""
    edges = {use: edge for use, edge in edges.items() if edge is not None}
    if not edges or not output.requires_grad:
        return {}
    grads = torch.autograd.grad(output, list(edges.values()), vector, retain_graph=True, allow_unused=True)
    pairs = zip(edges, grads, strict=True)
    return {use: grad.detach().to(use.dtype) for use, grad in pairs if grad is not None}


def _accumulates(parameter: Tensor) -> bool:
    """Whether the backward pass that is running adds to the parameter's ``.grad``."""
    return parameter.requires_grad and _runs(get_gradient_edge(parameter).node)


def _runs(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that is running adds what comes to this node to a ``.grad``."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad() was asked for this very parameter
        return False


def _watching() -> bool:
    """Whether autograd records, and not for a ``torch.func`` transform, a trace or an export."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return torch.is_grad_enabled() and not (transformed or traced)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _untraced(hook: Callable) -> Callable:
    """A compiled model breaks its graph at this hook, and is watched like any other."""
    disabled = torch._disable_dynamo(hook)

    @functools.wraps(hook)
    def call(*args):
        return (disabled if torch.compiler.is_dynamo_compiling() else hook)(*args)

    return call


@_untraced
def _before(module: nn.Module, args: tuple) -> None:
    for ref in _listeners:
        capture = ref()
        if capture is not None and module is capture._model and _watching() and not _in_backward():
            capture._begin()


@_untraced
def _after(module: nn.Module, args: tuple, kwargs: dict, output) -> Tensor | None:
    """Tell every capture; return another output if a capture wants no gradients below it."""
    captures = []
    for ref in _listeners:
        capture = ref()
        if capture is not None and module in capture._known:
            captures.append(capture)
    if not (captures and isinstance(output, Tensor) and output.requires_grad and _watching()):
        return None
    inputs, handed_on, heard = args or tuple(kwargs.values()), output, None
    watching = [capture for capture in captures if capture._watches(module)]
    factored = [capture.factored for capture in watching if module.weight in capture.factored]
    if factored:
        handed_on, heard = _without_weight_gradient(module, inputs[0], output, factored)
    if any(c.cut and c._roots(module) for c in captures):
        handed_on = _without_graph(module, inputs, handed_on)
    for capture in watching:
        capture._see_layer(module, inputs[0], handed_on, heard)
    for capture in captures:
        if capture._roots(module):
            capture._see_root(inputs, handed_on)
    return None if handed_on is output else handed_on


def _tidy() -> None:
    """Take the process-wide hooks away with the last listener."""
    global _listeners
    with _lock:
        _listeners = tuple(ref for ref in _listeners if ref() is not None)
        if not _listeners:
            while _handles:
                _handles.pop().remove()


# --- outputs handed on ------------------------------------------------------------------------------
# Both functions take parameters along, and give them no gradient: autograd then still runs the node
# that would have added to .grad, which is how a gradient that accumulates is known (see _accumulates).


class _Factored(torch.autograd.Function):
    """The output of a linear layer, as it is, with a backward pass that forms no weight gradient."""

    @staticmethod
    def forward(ctx, output, h, weight, bias, heard):
        ctx.heard = heard
        ctx.save_for_backward(h, weight)  # h for autograd's own check of in-place changes
        ctx.mark_dirty(output)  # not a view of it, which in-place activations could not change
        return output

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise CaptureError(
                "create_graph=True needs a second derivative, which factored gradients do not have: give the "
                "optimizer gradients='matrix'"
            )
        if _runs(ctx.next_functions[2][0]):
            for arrived in ctx.heard:
                arrived(g)
        _, weight = ctx.saved_tensors
        _, for_h, _, for_bias, _ = ctx.needs_input_grad
        return None, g @ weight.to(g.dtype) if for_h else None, None, g.sum(0) if for_bias else None, None


class _Cut(torch.autograd.Function):
    """The output of a model, as it is, with nothing below."""

    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.count = len(parameters)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, g):
        return None, *[None] * ctx.count


def _without_weight_gradient(
    layer: nn.Linear, h: Tensor, output: Tensor, factored: list[Container[Tensor]]
) -> tuple[Tensor, list[Callable[[Tensor], None]]]:
    """The output, and whom its backward pass will call with the gradient there."""
    if getattr(layer.forward, "__func__", None) is not nn.Linear.forward:
        raise CaptureError(
            f"{type(layer).__name__} computes something else than nn.Linear, so its gradient may have no "
            "such factors: give the optimizer gradients='matrix'"
        )
    bias = layer.bias  # one that is trained elsewhere gets its gradient as ever
    if bias is not None and (not bias.requires_grad or any(bias in some for some in factored)):
        bias = None
    heard: list[Callable[[Tensor], None]] = []
    return _Factored.apply(output.detach(), h, layer.weight, bias, heard), heard


def _without_graph(model: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise CaptureError(
            "the model's input needs a gradient, and this optimizer with gradients='factored' ends the graph "
            "at the model's output: detach the input, or use gradients='matrix'"
        )
    return _Cut.apply(output.detach(), *(p for p in model.parameters() if p.requires_grad))
