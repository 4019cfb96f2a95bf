"""Convolutions without groups: a linear map of patches, one position a place (Grosse & Martens 2016)."""

from torch import nn
from torch.nn.functional import pad, unfold

from sogrid.layers import rule


@rule(nn.Conv2d)
class Conv2d:
    """i = channels · kernel, s = height · width of the output.

    The patches take kernel-size times the memory of the input; they are made where they are needed, for
    one layer at a time.
    """

    factors = False  # with so many positions the gradient's factors are larger than the gradient

    def refusal(self, layer):  # noqa: D102
        return "a convolution with groups is not one linear map" if layer.groups > 1 else None

    def unfit(self, layer, x):  # noqa: D102
        fits = x.dim() == 4 and x.numel()
        return None if fits else "[examples, channels, height, width] with at least one example"

    def inputs(self, layer, x):  # noqa: D102
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return unfold(pad(x, _margins(layer), mode), layer.kernel_size, layer.dilation, 0, layer.stride).mT

    def outputs(self, layer, g):  # noqa: D102
        return g.flatten(2).mT

    def matrix(self, layer, weight):  # noqa: D102
        return weight.flatten(1)


def _margins(layer: nn.Conv2d) -> list[int]:
    """What is padded left, right, above and below."""
    margins: list[int] = []
    for side in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[side] * (layer.kernel_size[side] - 1)
            margins += [total // 2, total - total // 2]
        else:
            width = 0 if layer.padding == "valid" else layer.padding[side]
            margins += [width, width]
    return margins
