"""What came through: the inputs of each watched layer and the gradients that come back to it.

For a layer ``a = W h + b``, one forward and backward pass gives the inputs h and the gradients at the
pre-activations (the two arrows of Thesis Fig. 2.1), which a record holds together as rows of the layer's
linear map (:mod:`sogrid.rows`, :mod:`sogrid.layers`). The gradient is taken by a tensor hook on the
layer's output, which autograd runs on the value before any in-place activation. A layer that is used
several times in one forward pass has several positions.

With *factored* gradients rows are all that a backward pass leaves: the ``.grad`` of the weight stays
``None``.

A record says what ``.grad`` is made of, or would be. So these are not seen at all: forward passes without
gradients, with other parameters (``torch.func.functional_call``) or inside a ``torch.func`` transform, a
trace or an export; the repeated forward pass of an activation checkpoint; and gradients that
``torch.autograd.grad`` returns instead of adding them to ``.grad``. A record is as old as its ``.grad``:
when that is cleared, by whomever, so is the record. What reaches ``.grad`` past the record, from a pass in
evaluation mode or a use of the weight outside its layer, is noted there.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from sogrid.autograd import (
    CaptureError,
    Hearer,
    accumulates,
    depends,
    edges_to,
    in_backward,
    pull,
    tensors,
    without_graph,
    without_weight,
)
from sogrid.bound import BOUND_EXAMPLES
from sogrid.hooks import listen, listeners
from sogrid.layers import Rule, rule_of
from sogrid.private import after_backward, graph_task
from sogrid.uses import LayerRecord, Pass, RootRecord, Seen, Use

__all__ = ["Capture", "CaptureError", "LayerRecord", "RootRecord", "Wanted"]

Probe = Callable[[Tensor, int], Iterable[Tensor]]

LOOKS = 100
"""Once in so many passes the graph is searched for uses of weights outside their layers."""

UNKNOWN = -1
"""A version that no tensor has."""


@dataclass(frozen=True)
class Wanted:
    """What coming passes must leave behind.

    Attributes:
        rows: Names of the layers whose inputs and gradients are kept.
        some: Names of those of whose inputs the first examples are kept, for a bound.
        means: Whether the mean input of a layer is kept, one vector, where ``.grad`` is formed.
        factored: Weights whose gradient is left as factors, with their biases: the ``.grad`` of the bias,
            which has to be trained, tells how old the factors are; the weight has none.
        cut: Whether the graph ends at the model's output: whoever owns the capture needs the gradient
            there, the layers' inputs and outputs, and nothing else.
        roots: Whether the model's own input, output and gradient are kept.
        probe: A function from the model's output ``[n, k]``, and from how many passes of the update came
            before, to vectors ``[n, k]`` that are pulled back to every layer in ``rows`` right after the
            forward pass (the graph stays), or ``None``.
        output: Which part of what the model returns that is, and has an entry for each example of the loss:
            a key, an index, an attribute's name, or a function of it; ``None``: all of it.
    """

    rows: Container[str] = frozenset()
    some: Container[str] = frozenset()
    means: bool = True
    factored: Container[Tensor] = frozenset()
    cut: bool = False
    roots: bool = False
    probe: Probe | None = None
    output: str | int | Callable[[Any], Tensor] | None = None


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
        version: As a record's, for the model's last parameter; so is ``made``.
        asked: Whether a forward pass of the model is running, and is of any example.
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
        self._parameters = {layer: (layer.weight, layer.bias) for layer in self._rules}
        self._uses: dict[Use, GradientEdge | None] = {}  # in the latest forward pass; in collect(), in all
        self._latest: dict[str, list[Use]] = {}
        self._root: GradientEdge | None = None  # the latest output, if roots are wanted
        self._pass, self._task = Pass(), -1
        self._running = self._collecting = False
        self._collected, self._probed = 0, weakref.WeakSet()
        self._trained, self._searched = Counter(), set()  # uses by layer, and passes of the model by None
        self.version, self.made, self.asked, self._warned = 0, None, False, False
        self.clear()
        self._end = listen(self, model, self._rules, _begins, _ends)

    def clear(self) -> None:
        """Forget what has been seen."""
        if self._pass.over:
            self._uses, self._latest, self._root = {}, {name: [] for name in self._latest}, None
        self._pass.over = True
        self.records = {name: LayerRecord() for name, _ in self._rules.values()}
        self.roots: list[RootRecord] = []

    def close(self) -> None:
        """Stop listening, for good."""
        self._end()

    def take_over(self) -> None:
        """End others that leave the gradient of one of these layers as factors: a gradient has one owner."""
        for layer in self._rules:
            for other in listeners(layer):
                if other is not self and (other.wanted.cut or layer.weight in other.wanted.factored):
                    other.close()

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
        before = self._uses, self._latest, self._pass, self._root, self.wanted
        self._uses, self._latest, self._collecting, self._collected, self.asked = {}, {}, True, 0, False
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
            self._uses, self._latest, self._pass, self._root, self.wanted = before

    # -- what the hooks tell -----------------------------------------------------------------------

    def begins(self, inputs: tuple) -> None:
        """A forward pass of the model starts; on what the last one gave, it is of the same examples."""
        self._running = True
        edges = [*self._uses.values(), self._root]
        if any(edges) and not self._pass.over:
            nodes = {edge.node for edge in edges if edge is not None}
            if depends(tensors(inputs), nodes):
                self._require(
                    self.wanted.probe is None and not self.wanted.roots,
                    "the model was called on what it had computed, and this optimizer needs the one output "
                    "that the loss is a function of: put the loop into the model's forward",
                )
                return
        self._begin()
        self.asked = any(x.numel() for x in tensors(inputs))

    def _begin(self) -> None:
        if not self._collecting:
            self._uses = {}
        self._latest, self._pass, self._root, self.asked = {}, Pass(), None, False

    @staticmethod
    def _require(condition: bool, otherwise: str) -> None:
        if not condition:
            raise CaptureError(otherwise)

    def watches(self, module: nn.Module) -> bool:
        """Whether a module is a layer, with the parameters that it had, to be trained."""
        if module not in self._rules:
            return False
        (weight, bias), now = self._parameters[module], module._parameters
        return now.get("weight") is weight and now.get("bias") is bias and weight.requires_grad

    def factors(self, layer: nn.Module) -> bool:
        """Whether a layer's weight goes without a gradient."""
        if not self.wanted.factored:
            return False
        weight, bias = self._parameters[layer]
        return weight in self.wanted.factored and bias is not None and bias.requires_grad

    def ends(self) -> bool:
        """Whether the forward pass of the model that is over counts."""
        return (self._model.training or bool(self._latest)) and not in_backward()

    def require_map(self, layer: nn.Module, x: Tensor) -> None:
        """Refuse inputs that no rule knows, and a layer whose gradient is not that of its kind."""
        name, rule = self._rules[layer]
        needed = rule.unfit(layer, x) if x.layout == torch.strided else "a dense one"
        if needed is not None:
            raise CaptureError(
                f"layer {name!r} got an input of shape {tuple(x.shape)}; sogrid needs {needed}"
            )
        if getattr(layer.forward, "__func__", None) is rule.kind.forward:
            return
        what = f"layer {name!r} ({type(layer).__name__}) computes something else than {rule.kind.__name__}"
        self._require(
            not self.factors(layer),
            f"{what} may, and gradients='factored' cannot tell: give the optimizer gradients='matrix'",
        )
        self._trained[layer] += 1
        self._require(
            self._trained[layer] % LOOKS != 1 or _is_map(layer, rule, x),
            f"{what}: train it in a parameter group with preconditioned=False",
        )

    def _require_owner(self, record: LayerRecord, layer: nn.Module) -> None:
        """Warn, once, if something else steps what this capture leaves without a gradient.

        Its last gradients have not been used, and the one parameter that has a ``.grad`` has moved since.
        """
        _, bias = self._parameters[layer]
        left = bias is not None and (self.wanted.cut or self.factors(layer))
        if left and record and not self._warned and bias._version != record.moved:
            self._warned = True
            warnings.warn(
                "parameters moved while an optimizer with gradients='factored' held their gradients, which "
                "others do not get: if another optimizer trains this model now, close() that one",
                stacklevel=2,
            )

    def see_unseen(self, layer: nn.Module, output: Tensor) -> None:
        """A layer has computed its output in evaluation mode."""
        me, (name, _), weight = weakref.ref(self), self._rules[layer], layer.weight

        def arrived(grad: Tensor) -> None:
            if (capture := me()) is not None and accumulates(weight):
                capture._record(name, layer).unseen = "it ran in evaluation mode"

        if not in_backward():
            output.register_hook(arrived)

    def see_layer(self, layer: nn.Module, x: Tensor, output: Tensor, heard: list[Hearer] | None) -> None:
        """A watched layer has computed its output; ``heard`` by the function that handed it on, if any."""
        name, rule = self._rules[layer]
        earlier = self._latest.get(name)
        if in_backward():
            if earlier is not None:  # an activation checkpoint computes again what was seen
                return
            raise CaptureError(
                f"layer {name!r} was first seen in a backward pass: give torch.utils.checkpoint "
                "use_reentrant=False, and call the model in training mode"
            )
        if earlier is not None and self._pass.over:
            self._begin()  # parts of the model are called on their own
        elif earlier and not (self._running or self._collecting or self.wanted.roots):
            for use in earlier:  # likewise, and no gradient may ever come: keep no graph
                del self._uses[use]
            earlier.clear()
        if self.wanted.cut or self.wanted.factored:
            self._require_owner(self.records[name], layer)
        use = self._use(name, layer, rule, x.detach(), output)
        self._latest.setdefault(name, []).append(use)
        self._uses[use] = None if self.wanted.cut else GradientEdge(output.grad_fn, output.output_nr)
        if not self.wanted.cut:
            self._hear(use, output, heard)

    def _use(self, name: str, layer: nn.Module, rule: Rule, x: Tensor, output: Tensor) -> Use:
        """What a use leaves behind."""
        wanted, kept, examples = self.wanted, name in self.wanted.rows, x.shape[0]
        weight, _ = self._parameters[layer]
        formed, dtype = not (wanted.cut or self.factors(layer)), weight.dtype
        if x.dtype != dtype or (kept and formed):
            # a copy, as the user's buffer may be filled again; without one, versions tell
            x = x.to(dtype, copy=kept and formed)
        bounded = formed and not kept and name in wanted.some
        some = x[:BOUND_EXAMPLES].clone() if bounded else None
        mean = rule.mean(layer, x) if formed and wanted.means else None
        rows = output.numel() // weight.shape[0]
        seen = Seen(x) if kept or not formed else None
        after = Seen(output.detach()) if wanted.cut else None
        return Use(name, layer, rule, self._pass, examples, kept, seen, some, mean, rows, after)

    def _hear(self, use: Use, output: Tensor, heard: list[Hearer] | None) -> None:
        """Have the gradient at a use's output recorded when it comes."""
        me, weight = weakref.ref(self), self._parameters[use.layer][0]

        def arrived(grad: Tensor) -> None:
            if (capture := me()) is not None:
                use.forward.over = True
                grad = None if use.input is None else grad.detach().to(weight.dtype)
                capture._record(use.name, use.layer).add(use, grad)

        if heard is None:
            output.register_hook(lambda grad: arrived(grad) if accumulates(weight) else None)
        else:
            heard.append(arrived)

    def _record(self, name: str, layer: nn.Module) -> LayerRecord:
        """Where a gradient that arrives belongs: a new record if what ``.grad`` held was cleared."""
        task, record, (weight, bias) = graph_task(), self.records[name], self._parameters[layer]
        held = bias if self.factors(layer) else weight
        if task == record._task:
            if record.version != UNKNOWN:  # until the pass is over: it is added to in another order
                record.version = UNKNOWN
                _note_made(record, held)
        elif not self.wanted.cut:
            grad = held.grad
            if record if grad is None else record and _cleared(grad, record.version, record.made):
                record = self.records[name] = LayerRecord()
            elif grad is None:
                record.unseen = ""
            elif not (record or record.unseen) and grad.is_cpu and grad.any():
                record.unseen = "it holds a gradient of an earlier update: call zero_grad()"
            record.version = 0 if grad is None else grad._version + 1
            if grad is None and held.is_cpu:
                _note_made(record, held)
        record._task, record.moved = task, bias._version if bias is not None else 0
        return record

    def see_root(self, inputs: tuple, output: Any) -> None:
        """The model's own forward pass is over."""
        latest = [use for uses in self._latest.values() for use in uses]
        self._trained[None] += 1
        if self._trained[None] % LOOKS == 1 or self._latest.keys() - self._searched:
            self._look_for_others(inputs, output)
            self._searched |= self._latest.keys()
        output = _part(output, self.wanted.output)
        # a loss may be one number; a later call in the same pass may be of a part of the examples
        sizes = [len(x) for x in (*tensors(output), *tensors(inputs)) if x.dim() and x.shape != (1,)]
        if self._pass.examples is None:
            self._pass.examples = sizes[0] if sizes else None
        kept = {use: self._uses[use] for use in latest if use.kept}
        probed = self.wanted.probe is not None and kept
        self._require(
            not probed or isinstance(output, Tensor),
            f"the model returned {_outline(output)}, and this optimizer draws targets at its output: say "
            "which part that is, as by output='logits', output=0 or a function",
        )
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if probed:
            for vector in self.wanted.probe(output.detach(), self._earlier()):
                for use, pulled in pull(output, vector, kept).items():
                    use.probes.append(pulled.to(use.dtype))
        if not self.wanted.roots:
            return
        self._root = GradientEdge(output.grad_fn, output.output_nr)
        x, cut = next(iter(inputs), None), self.wanted.cut
        x = x.detach().clone() if isinstance(x, Tensor) and not cut else x
        versions = [parameter._version for parameter in self._model.parameters()]
        root, me = RootRecord(x, output.detach().clone(), versions), weakref.ref(self)
        below, forward = latest if cut else [], self._pass

        def arrived(grad: Tensor) -> None:
            capture = me()
            if capture is not None and any(map(accumulates, capture._model.parameters())):
                forward.over = True
                capture._add_root(root, grad.detach(), bool(below))
                for use in below:
                    capture._record(use.name, use.layer).add(use, None)

        output.register_hook(arrived)

    def _earlier(self) -> int:
        """How many passes of the update or the closure came before: their gradient is there, or may come."""
        if self._collecting:
            self._collected += 1
            return self._collected - 1
        coming, found = sum(not forward.over for forward in self._probed), 0
        self._probed.add(self._pass)
        for layer, (name, _) in self._rules.items():
            if record := self.records[name]:
                grad = self._parameters[layer][self.factors(layer)].grad
                if grad is not None and not _cleared(grad, record.version, record.made):
                    found = max(found, record.passes)
        return found + coming

    def _look_for_others(self, inputs: tuple, output: Any) -> None:
        """Refuse a weight or bias that is used outside its layer."""
        edges = edges_to(tensors(output), tensors(inputs))
        for layer, (name, _) in self._rules.items():
            uses = len(self._latest.get(name, ()))
            for kind, parameter in zip(("weight", "bias"), self._parameters[layer], strict=True):
                self._require(
                    not (uses and parameter is not None and edges[parameter] > uses),
                    f"the {kind} of layer {name!r} is used outside the layer too, where it has other inputs: "
                    "train it in a parameter group with preconditioned=False",
                )

    def _add_root(self, root: RootRecord, grad: Tensor, cut: bool) -> None:
        """As :meth:`_record` and :meth:`LayerRecord.add`, for the model's output."""
        task, parameters = graph_task(), [p for p in self._model.parameters() if p.requires_grad]
        if task != self._task:
            held, last = [p.grad for p in parameters if p.grad is not None], parameters[-1].grad
            if cut and (last is None or last._version != self.version):
                self.clear()
            elif not cut and self.roots and all(_cleared(grad, self.version, self.made) for grad in held):
                self.roots = []
            self.version = 0 if last is None else last._version + 1
            if last is None and parameters[-1].is_cpu:
                _note_made(self, parameters[-1])
        self._task = task
        if root in self.roots:
            root.grad = root.grad + grad
        else:
            root.grad = grad
            self.roots.append(root)


def _part(output: Any, which: Any) -> Any:
    """What ``output=`` says of what a model has returned."""
    if which is None:
        return output
    try:
        if callable(which):
            found = which(output)
        elif isinstance(which, str) and not isinstance(output, Mapping):
            found = getattr(output, which)
        else:
            found = output[which]
    except (LookupError, AttributeError, TypeError) as error:
        raise CaptureError(f"the model returned {_outline(output)}, which has no {which!r}") from error
    if not isinstance(found, Tensor):
        raise CaptureError(
            f"the model returned {_outline(output)}, of which output={which!r} is {_outline(found)}"
        )
    return found


def _outline(value: Any) -> str:
    """What a value is made of, for errors."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _note_made(record: LayerRecord | Capture, parameter: Tensor) -> None:
    """Note the ``.grad`` that this backward pass makes."""

    def note() -> None:
        grad = parameter.grad
        record.made = None if grad is None else weakref.ref(grad)
        if record.version == UNKNOWN and grad is not None:
            record.version = grad._version

    after_backward(note)


def _cleared(grad: Tensor, version: int, made: Callable[[], Tensor | None] | None) -> bool:
    """Whether nothing is left in a ``.grad`` that would have this version had nobody else written to it.

    Zeros are looked for where something else has been written, for which an accelerator's host waits; on the
    CPU also in a tensor that nothing was ever added to, unless it is the one that was made.
    """
    if grad._version == version and (version or not grad.is_cpu or (made is not None and made() is grad)):
        return False
    return not grad.any()


def _is_map(layer: nn.Module, rule: Rule, x: Tensor) -> bool:
    """Whether the gradients of W and b are those of W h + b, whatever else is added to it."""
    trained = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    with torch.random.fork_rng():
        try:
            output = layer.forward(x.detach())
        except TypeError:  # it takes more than its input
            return False
        g = torch.arange(output.numel(), device=x.device).cos().view_as(output).to(output.dtype)
        found = torch.autograd.grad(output, trained, g, allow_unused=True)
    h, g = (rows.to(layer.weight.dtype) for rows in (rule.inputs(layer, x.detach()), rule.outputs(layer, g)))
    if h.shape[:-1] != g.shape[:-1]:  # as where a convolution pads by itself
        return False
    expected = torch.einsum("...nso,...nsi->...oi", g, h), g.sum((-3, -2))
    return all(
        grad is not None and (grad - right.reshape_as(grad)).abs().max() <= 0.02 * right.abs().max()
        for grad, right in zip(found, expected, strict=False)
    )


def _begins(captures: list[Capture], module: nn.Module, inputs: tuple) -> None:
    if not in_backward():
        for capture in captures:
            if module is capture._model:
                capture.begins(inputs)


def _ends(captures: list[Capture], module: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
    """Tell every capture; return another output if one of them wants no gradients below it."""
    handed_on, heard = output, None
    watching = [capture for capture in captures if capture.watches(module)]
    if watching and not (inputs and inputs[0].numel()):  # an expert that is not asked?
        watching = [capture for capture in watching if not capture.asked]
    if watching and not module.training:
        for capture in watching:
            capture.see_unseen(module, output)
        watching = []
    for capture in watching:
        capture.require_map(module, inputs[0])
    if watching and any(capture.factors(module) for capture in watching):
        handed_on, heard = without_weight(module, inputs[0], output)
    rooted = [capture for capture in captures if module is capture._model]
    if rooted:
        for capture in rooted:
            capture.asked = capture._running = False
        rooted = [capture for capture in rooted if capture.ends()]
        if isinstance(output, Tensor) and any(capture.wanted.cut for capture in rooted):
            handed_on = without_graph(module, inputs, handed_on)
    for capture in watching:
        capture.see_layer(module, inputs[0], handed_on, heard)
    for capture in rooted:
        capture.see_root(inputs, handed_on)
    return None if handed_on is output else handed_on
