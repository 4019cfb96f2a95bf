"""Layer rules: how a module is a linear map a = W h + b, used at some positions of each example.

A rule is all that the package knows of a kind of layer. Whoever has one is preconditioned by every
method, bounded, refreshed and resumed; the contract that a rule must pass is ``tests/test_layers.py``:
``g`` and ``h`` as rows have the product ``matrix(weight.grad)``.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

__all__ = ["RULES", "Rule", "rule", "rule_of"]


class Rule(Protocol):
    """What a kind of layer has to say, in functions on plain tensors.

    Index letters: n example, s position, i input, o output of the linear map.
    """

    kind: type[nn.Module]
    """Whose ``forward`` is the map."""

    factors: bool
    """Whether its weight's gradient may be left as factors, without autograd forming it."""

    def unfit(self, layer: nn.Module, x: Tensor) -> str | None:
        """What shape of input the layer needs, if this is another, or has no example."""

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The input ``[n, …]`` as ``[n, s, i]``; several maps side by side are a dimension before n."""

    def mean(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The mean of :meth:`inputs` over examples and positions, ``[i]``, likewise."""

    def outputs(self, layer: nn.Module, g: Tensor) -> Tensor:
        """What is shaped like the output ``[n, …]`` as ``[n, s, o]``, likewise."""

    def matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight, or what is shaped like it, as a view ``[o, i]``, likewise."""

    def vector(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """The bias, or what is shaped like it, as a view ``[o]``, likewise."""


RULES: dict[type[nn.Module], Rule | None] = {}
"""By kind of module; subclasses have the rule of their kind, or none."""


def rule(kind: type[nn.Module]):
    """Class decorator: the rule of this kind of module."""

    def register(own: type[Rule]) -> type[Rule]:
        RULES[kind] = own()
        RULES[kind].kind = kind
        return own

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module, if there is one for its kind."""
    return next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)


from sogrid.layers import convolution, linear  # noqa: E402, F401
