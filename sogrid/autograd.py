"""What autograd is asked, and what layers hand on in the place of their outputs.

With *factored* gradients a layer's output is handed on through a function that forms no weight gradient;
with the graph *cut* the model's output is handed on with nothing below. Both take parameters along, and
give them no gradient: autograd then still runs the node that would have added to ``.grad``, which is how
a gradient that accumulates is known (:func:`accumulates`). One that has a ``.grad`` even so, a layer's bias
or the model's last parameter, tells whether gradients were cleared since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from sogrid.private import graph_task, transformed, will_execute

__all__ = [
    "CaptureError",
    "accumulates",
    "depends",
    "edges_to",
    "in_backward",
    "pull",
    "recording",
    "tensors",
    "without_graph",
    "without_weight",
]

Key = TypeVar("Key", bound=Hashable)
Hearer = Callable[[Tensor], None]


class CaptureError(RuntimeError):
    """A layer was used in a way whose curvature sogrid does not know."""


def recording() -> bool:
    """Whether autograd records, and not for a ``torch.func`` transform, a trace or an export."""
    if not torch.is_grad_enabled():
        return False
    return not (transformed() or torch.jit.is_tracing() or torch.compiler.is_exporting())


def in_backward() -> bool:
    """Whether a backward pass is running, in which a checkpoint may compute a part of the model again."""
    return graph_task() != -1


def accumulates(parameter: Tensor) -> bool:
    """Whether the backward pass that is running adds to the parameter's ``.grad``."""
    return parameter.requires_grad and _runs(get_gradient_edge(parameter).node)


def _runs(node: Node) -> bool:
    """Whether the backward pass that is running adds what comes to this node to a ``.grad``."""
    try:
        return will_execute(node)
    except RuntimeError:  # autograd.grad() was asked for this very parameter
        return False


def pull(output: Tensor, vector: Tensor, edges: dict[Key, GradientEdge | None]) -> dict[Key, Tensor]:
    """Jᵀv at every edge that ``output`` depends on; the graph and every ``.grad`` stay as they were."""
    edges = {key: edge for key, edge in edges.items() if edge is not None}
    if not edges or not output.requires_grad:
        return {}
    grads = torch.autograd.grad(output, list(edges.values()), vector, retain_graph=True, allow_unused=True)
    return {key: grad.detach() for key, grad in zip(edges, grads, strict=True) if grad is not None}


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dictionaries of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)


def depends(values: Iterable[Tensor], nodes: Container[Node]) -> bool:
    """Whether autograd has computed one of the values from what these nodes gave."""
    return any(node in nodes for node in _walk([x.grad_fn for x in values], set()))


def edges_to(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> Counter[Tensor]:
    """How often each parameter is used between a model's inputs and its outputs."""
    found: Counter[Tensor] = Counter()
    for node in _walk([x.grad_fn for x in outputs], {x.grad_fn for x in inputs}):
        for below, _ in node.next_functions:
            if (parameter := getattr(below, "variable", None)) is not None:
                found[parameter] += 1
    return found


def _walk(nodes: list[Node | None], ends: set[Node | None]) -> Iterator[Node]:
    """Nodes and all below them, once each, without those of ``ends`` and what is below those alone."""
    ends = {None, *ends}
    while nodes:
        if (node := nodes.pop()) not in ends:
            ends.add(node)
            yield node
            nodes += [below for below, _ in node.next_functions]


class _WithoutWeight(torch.autograd.Function):
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
        grad_b = g.sum(tuple(range(g.dim() - 1)), dtype=weight.dtype) if for_bias else None
        return None, g @ weight.to(g.dtype) if for_h else None, None, grad_b, None


class _Cut(torch.autograd.Function):
    """The output of a model, as it is, with nothing below but a gradient for its last parameter.

    It is zero, and no number where that at the output is not finite, as a ``GradScaler`` must know.
    """

    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.count, ctx.last = len(parameters), parameters[-1]
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, g):
        return None, *[None] * (ctx.count - 1), torch.zeros_like(ctx.last) + 0 * g.sum()


def without_weight(layer: nn.Linear, h: Tensor, output: Tensor) -> tuple[Tensor, list[Hearer]]:
    """A linear layer's output, and whom its backward pass will call with the gradient there.

    Args:
        layer: Whose weight gets no gradient; its bias does.
        h: Its input.
        output: Its output.
    """
    heard: list[Hearer] = []
    return _WithoutWeight.apply(output.detach(), h, layer.weight, layer.bias, heard), heard


def without_graph(model: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A model's output, of which only the gradient there can be had."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise CaptureError(
            "the model's input needs a gradient, and this optimizer with gradients='factored' ends the graph "
            "at the model's output: detach the input, or use gradients='matrix'"
        )
    return _Cut.apply(output.detach(), *(p for p in model.parameters() if p.requires_grad))
