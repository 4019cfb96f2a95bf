r"""Natural neural networks, NNN (Thesis §6.4.2; Desjardins et al. 2015).

A layer is written a = V U (h − μ) + d with μ = E[h] and U = (Cov h + εI)^(−1/2), and V, d are trained
by gradient descent; every N updates μ and U are estimated again and V, d are changed so that the
function stays what it was (a rule the thesis leaves out).

In the original parameters W = VU, b = d − VUμ one such step is

    ΔW = −λ [∇W − ∇b μᵀ] (C + εI)⁻¹,    Δb = −λ ∇b − ΔW μ

which is eqs. (6.2.4) and (6.2.5) with α = 1 (THESIS row 28): **NNN is ACP** with the bias term and
the stored mean. :class:`NaturalNN` takes that step; re-whitening then costs the function nothing at
all. :class:`WhitenedLinear` is the layer as published, for reading and for the proof.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sogrid.linalg import inverse_square_root, naming_the_damping, tikhonov_inverse
from sogrid.optimizers.acp import acp_update
from sogrid.optimizers.base import check_hyperparameter
from sogrid.optimizers.layerwise import Layerwise
from sogrid.statistics import Statistics, input_moments, input_rows, second_moment

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


class NaturalNN(Layerwise):
    """Natural neural network for the linear layers of a model, in their original parameters.

    It equals :class:`~sogrid.optimizers.acp.ACP` with α = 1, the bias term, and the mean of the statistics
    minibatch in place of the update's own; see the module.

    Args:
        model: See :class:`~sogrid.optimizers.layerwise.Layerwise`.
        lr: Learning rate λ.
        damping: ε ≥ 0, added to the covariance that whitens.
        reduction: How the training loss is reduced over examples: ``"mean"`` or ``"sum"``.
        refresh_every: N, updates between re-whitenings; ``None``: only by ``refresh``.
        averaging: ρ in [0, 1), weight of the old statistics at a refresh.
        other_lr: Learning rate of plain SGD for parameters outside linear layers.
        params: What to train, as in torch; default all trainable parameters.
        gradients: ``"matrix"`` or ``"factored"``; see :class:`~sogrid.optimizers.layerwise.Layerwise`.
        max_change: κ, a bound on the change of pre-activations; see there.
        rank: Only so many leading directions of each matrix of the statistics count; see there. ``None``:
            all, exact.

    Raises:
        ValueError: As in :class:`~sogrid.optimizers.layerwise.Layerwise`.
    """

    uses_mean = False

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 1.0,
        *,
        reduction: str = "mean",
        refresh_every: int | None = 100,
        averaging: float = 0.0,
        other_lr: float | Tensor | None = None,
        params=None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = None,
        rank: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            model,
            lr,
            damping=damping,
            reduction=reduction,
            refresh_every=refresh_every,
            averaging=averaging,
            other_lr=other_lr,
            params=params,
            gradients=gradients,
            max_change=max_change,
            rank=rank,
        )

    def check_hyperparameters(self, group):  # noqa: D102
        super().check_hyperparameters(group)
        check_hyperparameter("damping (ε)", group["damping"])

    def measure(self, batch, group):  # noqa: D102
        mean, rows = input_rows(batch.h, batch.has_bias)
        return Statistics(mean, second_moment(rows))

    def invert(self, statistics, group, name):  # noqa: D102
        with naming_the_damping(float):
            inverse = tikhonov_inverse(statistics.covariance, group["damping"], name, group["rank"])
        return {"inverse": inverse, "mean": statistics.mean}

    def update(self, grad_w, grad_b, mean_h, state, group):  # noqa: D102
        return acp_update(
            grad_w, grad_b, state["mean"], state["inverse"], lr=group["lr"], bias_correction=True
        )
