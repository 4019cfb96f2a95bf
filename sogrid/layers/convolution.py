"""Convolutions: a linear map of patches, one position a place (Grosse & Martens 2016); each group is one."""

from torch import nn
from torch.nn.functional import pad

from sogrid.layers import rule


@rule(nn.Conv1d)
@rule(nn.Conv2d)
@rule(nn.Conv3d)
class Convolution:
    """i = channels · kernel, s = places of the output; with groups these come first, ``[groups, n, s, i]``.

    The patches take kernel-size times the memory of the input. They are made where they are needed, for one
    layer at a time, and not kept: at a refresh up to four times those of the largest layer are there at once
    (its patches, with their ones, scaled, and its matrices), at a bounded step twice those of 16 examples,
    and for the mean input those of one.
    """

    factors = False  # with so many positions the gradient's factors are larger than the gradient

    def unfit(self, layer, x):  # noqa: D102
        sides = ("depth", "height", "width")[-len(layer.kernel_size) :]
        fits = x.dim() == 2 + len(sides) and x.numel()
        return None if fits else f"[examples, channels, {', '.join(sides)}] with at least one example"

    def inputs(self, layer, x):  # noqa: D102
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, dims = pad(x, _margins(layer), mode), len(layer.kernel_size)
        sides = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        for dim, (size, dilation, stride) in enumerate(sides, 2):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x.unflatten(1, (layer.groups, -1))  # [n, groups, channels, *places, *kernel]
        x = x.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        return _of_groups(x.flatten(2 + dims).flatten(2, 1 + dims))

    def mean(self, layer, x):  # noqa: D102
        return self.inputs(layer, x.mean(0, keepdim=True)).mean((-3, -2))  # patches are linear in x

    def outputs(self, layer, g):  # noqa: D102
        return _of_groups(g.unflatten(1, (layer.groups, -1)).flatten(3).permute(1, 0, 3, 2))

    def matrix(self, layer, weight):  # noqa: D102
        return _of_groups(weight.unflatten(0, (layer.groups, -1)).flatten(2))

    def vector(self, layer, bias):  # noqa: D102
        return _of_groups(bias.unflatten(0, (layer.groups, -1)))


def _of_groups(x):
    """Without the dimension of the groups if there is one only."""
    return x.squeeze(0) if len(x) == 1 else x


def _margins(layer: nn.Module) -> list[int]:
    """What is padded before and after each side, the last side first."""
    margins: list[int] = []
    for side in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[side] * (layer.kernel_size[side] - 1)
            margins += [total // 2, total - total // 2]
        else:
            width = 0 if layer.padding == "valid" else layer.padding[side]
            margins += [width, width]
    return margins
