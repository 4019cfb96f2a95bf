r"""Natural neural networks, NNN (Thesis §6.4.2; Desjardins et al. 2015).

A layer is written a = V U (h − μ) + d with μ = E[h] and U = (Cov h + εI)^(−1/2), and V, d are trained
by gradient descent; every N updates μ and U are estimated again and V, d are changed so that the
function stays what it was (a rule the thesis leaves out).

In the original parameters W = VU, b = d − VUμ one such step is

    ΔW = −λ [∇W − ∇b μᵀ] (C + εI)⁻¹,    Δb = −λ ∇b − ΔW μ

which is eqs. (6.2.4) and (6.2.5) with α = 1 (THESIS row 28): **NNN is ACP** with the bias term and
the stored mean, and so :class:`NaturalNN` is written; re-whitening then costs the function nothing at
all. :class:`WhitenedLinear` is the layer as published, for reading and for the proof.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sogrid.factorize import inverse_square_root
from sogrid.optimizers.acp import ACP
from sogrid.optimizers.layerwise import StatisticsOptions
from sogrid.statistics import input_moments

__all__ = ["NaturalNN", "WhitenedLinear"]


class WhitenedLinear(nn.Module):
    """The layer a = V U (h − μ) + d, starting as a copy of a linear layer's function (μ = 0, U = I).

    Args:
        layer: ``nn.Linear`` with a bias.

    Raises:
        ValueError: If the layer has no bias.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """See the class."""
        super().__init__()
        if layer.bias is None:
            raise ValueError("WhitenedLinear needs a layer with a bias")
        self.weight = nn.Parameter(layer.weight.detach().clone())  # V
        self.bias = nn.Parameter(layer.bias.detach().clone())  # d
        where = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.register_buffer("mean", torch.zeros(layer.in_features, **where))  # μ
        self.register_buffer("whitening", torch.eye(layer.in_features, **where))  # U

    def forward(self, h: Tensor) -> Tensor:
        """``h: [n, n_in]`` to ``[n, n_out]``."""
        return linear((h - self.mean) @ self.whitening, self.weight, self.bias)

    @torch.no_grad()
    def canonical(self) -> tuple[Tensor, Tensor]:
        """(W, b) of the same function: W = V U, b = d − W μ."""
        weight = self.weight @ self.whitening
        return weight, self.bias - weight @ self.mean

    @torch.no_grad()
    def rewhiten(self, h: Tensor, damping: float | Tensor) -> None:
        """Re-estimate μ and U on ``h: [n, n_in]``, keeping the function: V ← W U'⁻¹, d ← b + W μ'.

        Raises:
            FactorizationError: If Cov(h) + damping · I is not positive definite.
        """
        weight, bias = self.canonical()
        mean, covariance = input_moments(h)
        whitening = inverse_square_root(covariance, damping)
        self.weight.copy_(torch.linalg.solve(whitening, weight, left=False))
        self.bias.copy_(bias + weight @ mean)
        self.mean.copy_(mean)
        self.whitening.copy_(whitening)


class NaturalNN(ACP):
    """Natural neural network for the layers of a model, in their original parameters; see the module.

    Args:
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: Learning rate λ.
        damping: ε ≥ 0, added to the covariance that whitens.
        **options: As of :class:`~sogrid.optimizers.acp.ACP`; a refresh is a re-whitening.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 0.1,
        **options: Unpack[StatisticsOptions],
    ) -> None:
        """See the class."""
        super().__init__(model, lr, damping, bias_correction=True, stored_mean=True, **options)
