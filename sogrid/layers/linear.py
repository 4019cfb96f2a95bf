"""Linear layers, on ``[n, i]`` or, used at many positions, on ``[n, …, i]``: tokens, time steps, pixels."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sogrid.layers import RULES, rule


@rule(nn.Linear)
class Linear:
    """a = W h + b; dimensions between the first and the last are positions."""

    factors = True

    def unfit(self, layer, x):  # noqa: D102
        fits = x.dim() > 1 and x.numel()
        return None if fits else "[examples, ..., features] with at least one example"

    def inputs(self, layer, x):  # noqa: D102
        return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)

    outputs = inputs

    def mean(self, layer, x):  # noqa: D102
        return x.mean(0) if x.dim() == 2 else x.mean(tuple(range(x.dim() - 1)))

    def matrix(self, layer, weight):  # noqa: D102
        return weight

    def vector(self, layer, bias):  # noqa: D102
        return bias


RULES[NonDynamicallyQuantizableLinear] = (
    None  # in nn.MultiheadAttention, which uses its weight and never calls it
)
