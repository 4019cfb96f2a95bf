r"""Centred gradient descent (Thesis §6.3.1, Algorithm 3).

The weight update uses deviations of the layer's inputs from their minibatch mean:
ΔW = −λ (1/n) Σ g_i (h_i − h̄)ᵀ, Δb = −λ ḡ. The printed algorithm leaves out the bias term −ΔW h̄ of
eq. (6.2.5); with it the step is gradient descent in the coordinates h − h̄, and always a descent
direction (without it, not always: THESIS row 23).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sogrid.linalg import Factored, matrixwise, vectorwise
from sogrid.optimizers.layerwise import Layerwise

__all__ = ["CenteredGradientDescent", "centered_gradient", "centered_update"]


def centered_gradient(grad_w: Tensor | Factored, grad_b: Tensor | None, mean_h: Tensor) -> Tensor | Factored:
    """(1/n) Σ g_i (h_i − h̄)ᵀ = ∇W − ∇b h̄ᵀ, ``[..., o, i]``; a layer without bias is not centred.

    Args:
        grad_w: Gradient of the mean loss, ``[..., o, i]``; if it is factored, so is the result.
        grad_b: ``[..., o]`` or ``None``.
        mean_h: h̄, ``[..., i]``.
    """
    if grad_b is None:
        return grad_w
    if isinstance(grad_w, Factored):
        return grad_w.centered(mean_h)
    return torch.addcmul(grad_w, grad_b.unsqueeze(-1), mean_h.unsqueeze(-2), value=-1)


def centered_update(
    grad_w: Tensor | Factored,
    grad_b: Tensor | None,
    mean_h: Tensor,
    *,
    lr: float | Tensor,
    bias_correction: bool = False,
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb) of Algorithm 3.

    Args:
        grad_w: ∇W of the mean loss, ``[..., o, i]``; if it is factored, so is ΔW.
        grad_b: ∇b, ``[..., o]`` or ``None``.
        mean_h: h̄ of the minibatch, ``[..., i]``.
        lr: λ, or λ ``[...]``.
        bias_correction: Add −ΔW h̄ to Δb, as in eq. (6.2.5).

    Example:
        >>> dw, db = centered_update(torch.eye(2), torch.ones(2), torch.tensor([0.0, 1.0]), lr=0.5)
        >>> dw.tolist(), db.tolist()
        ([[-0.5, 0.5], [-0.0, -0.0]], [-0.5, -0.5])
    """
    dw = -matrixwise(lr) * centered_gradient(grad_w, grad_b, mean_h)
    return dw, bias_update(grad_b, dw, mean_h, lr, bias_correction)


def bias_update(
    grad_b: Tensor | None,
    dw: Tensor | Factored,
    mean_h: Tensor,
    rate: float | Tensor,
    correction: bool,
) -> Tensor | None:
    """Δb = −rate · ∇b, and − ΔW h̄ if ``correction`` (eq. 6.2.5)."""
    if grad_b is None:
        return None
    db = -vectorwise(rate) * grad_b
    return db - (dw @ mean_h.unsqueeze(-1)).squeeze(-1) if correction else db


class CenteredGradientDescent(Layerwise):
    """Algorithm 3 for the linear layers of a model.

    Args:
        model: See :class:`~sogrid.optimizers.layerwise.Layerwise`.
        lr: λ.
        bias_correction: Add the term −ΔW h̄ of eq. (6.2.5) to the bias; off in the printed algorithm.
        reduction: See :class:`~sogrid.optimizers.layerwise.Layerwise`.
        other_lr: See there.
        params: See there.
        gradients: See there.
        max_change: See there.

    Raises:
        ValueError: As in :class:`~sogrid.optimizers.layerwise.Layerwise`.
    """

    uses_statistics = False

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        bias_correction: bool = False,
        reduction: str = "mean",
        other_lr: float | Tensor | None = None,
        params=None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            model,
            lr,
            bias_correction=bias_correction,
            reduction=reduction,
            refresh_every=None,
            other_lr=other_lr,
            params=params,
            gradients=gradients,
            max_change=max_change,
        )

    def update(self, grad_w, grad_b, mean_h, state, group):  # noqa: D102
        return centered_update(
            grad_w, grad_b, mean_h, lr=group["lr"], bias_correction=group["bias_correction"]
        )
