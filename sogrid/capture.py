"""What came through: the inputs of each watched layer and the gradients that come back to it.

For a layer ``a = W h + b``, one forward and backward pass gives the inputs h and the gradients at the
pre-activations (the two arrows of Thesis Fig. 2.1), which a record holds together as rows of the layer's
linear map (:mod:`sogrid.rows`, :mod:`sogrid.layers`). The gradient is taken by a tensor hook on the
layer's output, which autograd runs on the value before any in-place activation. A layer that is used
several times in one forward pass has several positions.

With *factored* gradients rows are all that a backward pass leaves: the ``.grad`` of the weight stays
``None``.

A record says what ``.grad`` is made of, or would be. So these are not seen at all: forward passes in
evaluation mode, without gradients or inside a ``torch.func`` transform, a trace or an export; the
repeated forward pass of an activation checkpoint; and gradients that ``torch.autograd.grad`` returns
instead of adding them to ``.grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from sogrid.autograd import (
    CaptureError,
    Hearer,
    accumulates,
    in_backward,
    pull,
    without_graph,
    without_weight,
)
from sogrid.hooks import listen
from sogrid.layers import Rule, rule_of
from sogrid.private import graph_task
from sogrid.uses import LayerRecord, RootRecord, Seen, Use

__all__ = ["Capture", "CaptureError", "LayerRecord", "RootRecord", "Wanted"]

Probe = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Wanted:
    """What coming passes must leave behind.

    Attributes:
        rows: Names of the layers whose inputs and gradients are kept.
        means: Whether the mean input of a layer is kept, one vector, where ``.grad`` is formed.
        factored: Weights whose gradient is left as factors, and biases that go with them: no ``.grad``
            is made, and their layers' inputs and gradients are kept.
        cut: Whether the graph ends at the model's output: whoever owns the capture needs the gradient
            there, the layers' inputs and outputs, and nothing else.
        roots: Whether the model's own input, output and gradient are kept.
        probe: A function from the model's output ``[n, k]`` to vectors ``[n, k]`` that are pulled back to
            every layer in ``rows`` right after the forward pass (the graph stays), or ``None``.
    """

    rows: Container[str] = frozenset()
    means: bool = True
    factored: Container[Tensor] = frozenset()
    cut: bool = False
    roots: bool = False
    probe: Probe | None = None


class Capture:
    """Listen to the layers of a model during training passes.

    Use it as a context manager in a page, or own it and :meth:`close` it in an optimizer. Copies and
    pickles of the model carry nothing of it, and one that is closed or collected leaves no trace.

    Args:
        model: The module whose forward is called.
        layers: Name → layer; default every layer of the model that has a rule.
        wanted: What passes leave behind; default the rows of every layer, and the roots.

    Attributes:
        records: Name → :class:`LayerRecord`.
        roots: The model's own input, output and gradient of each pass, if wanted.
        wanted: What coming passes leave behind; may be replaced between passes.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> with Capture(model) as capture:
        ...     model(torch.ones(5, 2)).sum().backward()
        >>> [tuple(capture.records[name].grads[0].shape) for name in ("0", "2")]
        [(5, 3), (5, 1)]
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module] | None = None, wanted: Wanted | None = None
    ) -> None:
        """See the class."""
        if layers is None:
            layers = {name: m for name, m in model.named_modules() if rule_of(m) is not None}
        self.wanted = Wanted(rows=set(layers), roots=True) if wanted is None else wanted
        self._model = model
        self._rules = {layer: (name, rule_of(layer)) for name, layer in layers.items()}
        self._uses: dict[Use, GradientEdge | None] = {}  # in the latest forward pass; in collect(), in all
        self._latest: dict[str, list[Use]] = {}
        self._forward, self._task, self._collecting = 0, -1, False
        self.clear()
        self._end = listen(self, model, self._rules, _begins, _ends)

    def clear(self) -> None:
        """Forget what has been seen."""
        for use in self._uses:
            use.over = True
        self.records = {name: LayerRecord() for name, _ in self._rules.values()}
        self.roots: list[RootRecord] = []

    def close(self) -> None:
        """Stop listening, for good."""
        self._end()

    def __enter__(self) -> Capture:
        """The capture itself."""
        return self

    def __exit__(self, *_) -> None:
        """Close."""
        self.close()

    def pull(self, output: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """Jᵀv at every layer of the latest pass: ``vector`` at ``output``, summed over a layer's uses.

        Leaves the graph, the records and every ``.grad`` as they were. Layers that ``output`` does not
        depend on are absent.
        """
        found: dict[str, Tensor] = {}
        for use, grad in pull(output, vector, self._uses).items():
            found[use.name] = grad if use.name not in found else found[use.name] + grad
        return found

    def collect(self, closure: Callable[[], Tensor], probe: Probe | None = None) -> dict[str, LayerRecord]:
        """Records of the passes that a closure makes, alone and kept; no ``.grad`` is touched.

        Args:
            closure: Runs the model forward and returns a scalar loss.
            probe: In place of the capture's own.

        Raises:
            TypeError: If the closure returns anything else.
        """
        before = self._uses, self._latest, self._forward, self.wanted
        self._uses, self._latest, self._collecting = {}, {}, True
        self.wanted = replace(self.wanted, rows=set(self.records), roots=False, probe=probe)
        try:
            loss = closure()
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise TypeError(f"the closure must return the scalar loss, got {loss!r}")
            records: dict[str, LayerRecord] = {}
            for use, grad in pull(loss, torch.ones_like(loss), self._uses).items():
                records.setdefault(use.name, LayerRecord()).add(use, grad.to(use.dtype))
            return records
        finally:
            self._collecting = False
            self._uses, self._latest, self._forward, self.wanted = before

    # -- what the hooks tell -----------------------------------------------------------------------

    def begins(self) -> None:
        """A forward pass of the model starts."""
        if not self._collecting:
            self._uses = {}
        self._latest = {}
        self._forward += 1

    def watches(self, module: nn.Module) -> bool:
        """Whether a module is a layer whose use counts."""
        return module in self._rules and module.training and module.weight.requires_grad

    def factors(self, weight: Tensor) -> bool:
        """Whether a weight goes without a gradient."""
        return weight in self.wanted.factored

    def ends(self) -> bool:
        """Whether a forward pass of the model that is over counts."""
        return (self._model.training or bool(self._latest)) and not in_backward()

    def see_layer(self, layer: nn.Module, x: Tensor, output: Tensor, heard: list[Hearer] | None) -> None:
        """A watched layer has computed its output; ``heard`` by the function that handed it on, if any."""
        name, rule = self._rules[layer]
        if (needed := rule.unfit(layer, x)) is not None:
            raise CaptureError(
                f"layer {name!r} got an input of shape {tuple(x.shape)}; sogrid needs {needed}"
            )
        earlier = self._latest.get(name, [])
        if in_backward():
            if earlier:  # an activation checkpoint computes again what was seen
                return
            raise CaptureError(
                f"layer {name!r} was first seen in a backward pass: give torch.utils.checkpoint "
                "use_reentrant=False, and call the model in training mode"
            )
        if earlier and any(use.over for uses in self._latest.values() for use in uses):
            self.begins()  # parts of the model are called on their own
            earlier = []
        if any(use.examples != len(x) for use in earlier):
            raise CaptureError(
                f"layer {name!r} got {earlier[0].examples} and then {len(x)} examples in one forward pass: "
                "several uses must be of the same examples"
            )
        use = self._use(name, layer, rule, x.detach(), output)
        self._latest.setdefault(name, []).append(use)
        self._uses[use] = None if self.wanted.cut else GradientEdge(output.grad_fn, output.output_nr)
        if not self.wanted.cut:
            self._hear(use, output, heard)

    def _use(self, name: str, layer: nn.Module, rule: Rule, x: Tensor, output: Tensor) -> Use:
        """What a use leaves behind."""
        wanted, kept = self.wanted, name in self.wanted.rows
        formed, examples = not (wanted.cut or self.factors(layer.weight)), len(x)
        if x.dtype != layer.weight.dtype or (kept and formed):
            # a copy, as the user's buffer may be filled again; without one, versions tell
            x = x.to(layer.weight.dtype, copy=kept and formed)
        mean, rows = None, 0
        if formed and wanted.means:
            h = rule.inputs(layer, x)
            mean, rows = h.mean((0, 1)), h.shape[0] * h.shape[1]
        seen = Seen(x) if kept or not formed else None
        after = Seen(output.detach()) if wanted.cut else None
        return Use(name, layer, rule, self._forward, examples, kept, seen, mean, rows, after)

    def _hear(self, use: Use, output: Tensor, heard: list[Hearer] | None) -> None:
        """Have the gradient at a use's output recorded when it comes."""
        me, weight, dtype = weakref.ref(self), use.layer.weight, use.dtype

        def arrived(grad: Tensor) -> None:
            if (capture := me()) is not None:
                capture._record(use, weight).add(use, grad.detach().to(dtype))

        if heard is None:
            output.register_hook(lambda grad: arrived(grad) if accumulates(weight) else None)
        else:
            heard.append(arrived)

    def _record(self, use: Use, weight: Tensor | None) -> LayerRecord:
        """Where a gradient that arrives belongs: a new record if none of ``.grad`` is older."""
        task, record = graph_task(), self.records[use.name]
        formed = weight is not None and not self.factors(weight)
        if formed and weight.grad is None and task != record._task:
            record = self.records[use.name] = LayerRecord()
        record._task, use.over = task, True
        return record

    def see_root(self, inputs: tuple, output: Tensor) -> None:
        """The model's own forward pass is over."""
        latest = [use for uses in self._latest.values() for use in uses]
        kept = {use: self._uses[use] for use in latest if use.kept}
        if self.wanted.probe is not None and kept:
            for vector in self.wanted.probe(output.detach()):
                for use, pulled in pull(output, vector, kept).items():
                    use.probes.append(pulled.to(use.dtype))
        if not self.wanted.roots:
            return
        x, cut = next(iter(inputs), None), self.wanted.cut
        x = x.detach().clone() if isinstance(x, Tensor) and not cut else x
        root, me = RootRecord(x, output.detach().clone()), weakref.ref(self)
        below = latest if cut else []

        def arrived(grad: Tensor) -> None:
            capture = me()
            if capture is not None and any(map(accumulates, capture._model.parameters())):
                capture._add_root(root, grad.detach(), bool(below))
                for use in below:
                    capture._record(use, None).add(use, None)

        output.register_hook(arrived)

    def _add_root(self, root: RootRecord, grad: Tensor, stays: bool) -> None:
        """As :meth:`_record` and :meth:`LayerRecord.add`, for the model's output."""
        task = graph_task()
        if not stays and task != self._task and all(p.grad is None for p in self._model.parameters()):
            self.roots = []
        self._task = task
        if root in self.roots:
            root.grad = root.grad + grad
        else:
            root.grad = grad
            self.roots.append(root)


def _begins(captures: list[Capture], module: nn.Module) -> None:
    if not in_backward():
        for capture in captures:
            if module is capture._model:
                capture.begins()


def _ends(captures: list[Capture], module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    """Tell every capture; return another output if one of them wants no gradients below it."""
    handed_on, heard = output, None
    watching = [capture for capture in captures if capture.watches(module)]
    factoring = [capture.wanted.factored for capture in watching if capture.factors(module.weight)]
    if factoring:
        handed_on, heard = without_weight(module, inputs[0], output, factoring)
    rooted = [capture for capture in captures if module is capture._model]
    if any(capture.wanted.cut and capture.ends() for capture in rooted):
        handed_on = without_graph(module, inputs, handed_on)
    for capture in watching:
        capture.see_layer(module, inputs[0], handed_on, heard)
    for capture in rooted:
        if capture.ends():
            capture.see_root(inputs, handed_on)
    return None if handed_on is output else handed_on
