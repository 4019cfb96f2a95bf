r"""The networks of the thesis: multilayer perceptrons, and the two of its benchmarks.

A layer computes ``a = W h + b``, then optionally a normalisation of a, then ``h = activation(a)``
(Thesis §1.4.1). Weights are drawn uniformly *with a given variance*: s/(n_in + n_out) for the Glorot
family, s/n_in for the He family, so W ~ U(−r, r) with r = √(3·variance); s is a hyperparameter that
the thesis tunes (§2.4.2; classical Glorot is s = 2). Biases start at zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "MeanOnlyBatchNorm", "cifar10_classifier", "initialize_", "mnist_autoencoder"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(dim=-1),
}
"""Activations by name; any factory of modules can be given instead."""


class MeanOnlyBatchNorm(nn.Module):
    """Subtract the minibatch mean of each unit and add a learned bias (Thesis §6.3.1).

    After a bias-free linear layer this is ``a = W (h − h̄) + b``. In evaluation mode a running mean
    replaces the minibatch mean.

    Args:
        features: Number of units.
        momentum: Weight of the newest minibatch in the running mean.
        device: Where to put the parameters.
        dtype: Their dtype.
    """

    def __init__(self, features: int, momentum: float = 0.1, device=None, dtype=None) -> None:
        """See the class."""
        super().__init__()
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(features, device=device, dtype=dtype))

    def forward(self, a: Tensor) -> Tensor:
        """Centre ``a: [n, features]``."""
        if not self.training:
            return a - self.running_mean + self.bias
        mean = a.mean(-2)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
        return a - mean + self.bias


NORMALIZATIONS = {"batch": nn.BatchNorm1d, "mean_only": MeanOnlyBatchNorm}


class MLP(nn.Sequential):
    """A multilayer perceptron with modules linear1, (norm1), act1, linear2, and so on.

    Args:
        sizes: Widths from input to output, at least two, e.g. ``[784, 100, 10]``.
        activation: Name in :data:`ACTIVATIONS` or a module factory, for the hidden layers.
        output: The same for the last layer.
        normalization: ``None``, ``"batch"`` or ``"mean_only"``, applied to the hidden layers' a; a
            normalised layer has its bias in the normalisation.
        init: ``"glorot"`` or ``"he"`` (see :func:`initialize_`).
        scale: s of the initialisation.
        generator: Source of randomness of the initial weights.
        device: Where to put the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: For an unknown activation, normalisation or initialisation, or too few sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Callable[[], nn.Module] = "sigmoid",
        output: str | Callable[[], nn.Module] = "identity",
        *,
        normalization: str | None = None,
        init: str = "glorot",
        scale: float = 2.0,
        generator: torch.Generator | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """See the class."""
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes needs at least two positive widths, got {list(sizes)}")
        if normalization is not None and normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be None or one of {sorted(NORMALIZATIONS)}, got {normalization!r}"
            )
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        last = len(sizes) - 1
        where = {"device": device, "dtype": dtype}
        for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
            normalize = normalization if i < last else None
            parts[f"linear{i}"] = nn.Linear(n_in, n_out, bias=normalize is None, **where)
            if normalize is not None:
                parts[f"norm{i}"] = NORMALIZATIONS[normalize](n_out, **where)
            parts[f"act{i}"] = _activation(activation if i < last else output)
        super().__init__(parts)
        initialize_(self, init, scale, generator)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A module, or for a slice an ``nn.Sequential`` that shares them."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _activation(activation: str | Callable[[], nn.Module]) -> nn.Module:
    if callable(activation):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]()


@torch.no_grad()
def initialize_(
    model: nn.Module,
    init: str = "glorot",
    scale: float = 2.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Draw every ``nn.Linear`` weight uniformly with the family's variance; zero the biases.

    Args:
        model: Changed in place and returned.
        init: ``"glorot"``: variance s/(n_in + n_out); ``"he"``: variance s/n_in (Thesis §2.4.2).
        scale: s, positive.
        generator: Source of randomness.

    Raises:
        ValueError: For an unknown family or a scale that is not positive.

    Example:
        >>> layer = initialize_(torch.nn.Linear(300, 100), "glorot", scale=4.0)
        >>> bool((layer.weight.var() - 4 / 400).abs() < 1e-3)
        True
    """
    if init not in ("glorot", "he"):
        raise ValueError(f"init must be 'glorot' or 'he', got {init!r}")
    if not scale > 0:
        raise ValueError(f"scale (s) must be positive, got {scale}")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            n_out, n_in = module.weight.shape
            variance = scale / (n_in + n_out if init == "glorot" else n_in)
            bound = (3 * variance) ** 0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    return model


def mnist_autoencoder(**options) -> MLP:
    """The sigmoid autoencoder 784-1000-500-250-30-250-500-1000-784 (Thesis §4.1.1).

    Outputs are sigmoid too, in the pixels' range [0, 1]. The thesis does not say whether the code
    layer is linear; here it is a sigmoid like the others.

    Args:
        **options: Passed to :class:`MLP`.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    return MLP(sizes, **{"activation": "sigmoid", "output": "sigmoid", **options})


def cifar10_classifier(**options) -> MLP:
    """The ReLU classifier 3072-8×100-10 (Thesis §4.1.2), cut at the logits by default.

    Pass ``output="softmax"`` for the thesis's cut at the probabilities.

    Args:
        **options: Passed to :class:`MLP`.
    """
    return MLP([3072, *[100] * 8, 10], **{"activation": "relu", "init": "he", **options})
