r"""Centred gradient descent (Thesis §6.3.1, Algorithm 3).

The weight update uses deviations of the layer's inputs from their minibatch mean:
ΔW = −λ (1/n) Σ g_i (h_i − h̄)ᵀ, Δb = −λ ḡ. The printed algorithm leaves out the bias term −ΔW h̄ of
eq. (6.2.5); with it the step is gradient descent in the coordinates h − h̄, and always a descent
direction (without it, not always: THESIS row 23).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from sogrid.method import LayerMethod
from sogrid.optimizers.layerwise import Layerwise
from sogrid.shell import LayerOptions
from sogrid.structured import Factored, add_product, matrixwise, vectorwise

__all__ = ["CenteredGradientDescent", "CenteredMethod", "bias_update", "centered_gradient", "centered_update"]


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
    if not correction:
        return -vectorwise(rate) * grad_b
    if isinstance(dw, Factored):
        return -vectorwise(rate) * grad_b - (dw @ mean_h.unsqueeze(-1)).squeeze(-1)
    return add_product(grad_b.unsqueeze(-2), mean_h.unsqueeze(-2), dw.mT, -rate, -1).squeeze(-2)


class CenteredMethod(LayerMethod):
    """Algorithm 3 as verbs; there is nothing to measure."""

    uses_statistics = False

    def update(self, gradient, state, group):  # noqa: D102
        return centered_update(*gradient, lr=group["lr"], bias_correction=group["bias_correction"])


class CenteredGradientDescent(Layerwise):
    """Algorithm 3 for the layers of a model.

    Args:
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: λ.
        bias_correction: Add the term −ΔW h̄ of eq. (6.2.5) to the bias; the printed algorithm is without.
        **options: ``reduction``, ``other_lr``, ``params``, ``gradients`` and ``max_change``; see
            :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        bias_correction: bool = True,
        **options: Unpack[LayerOptions],
    ) -> None:
        """See the class."""
        own = {"bias_correction": bias_correction}
        super().__init__(CenteredMethod(), model, lr, own, refresh_every=None, **options)
