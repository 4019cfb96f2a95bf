r"""The exact Hessian of the empirical risk, dense.

Thesis §3.1.1; §3.1.4 splits it into the Gauss-Newton term and a remainder,
∂²R/∂θ² = (1/n) Σ_i [J_iᵀ ∂²ℓ_i J_i + Σ_k (∂ℓ_i/∂f_k) ∂²f_k/∂θ²].
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import jacrev

from sogrid.curvature.jacobian import evaluate, parameter_vector
from sogrid.losses import Loss

__all__ = ["hessian"]


def hessian(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """H = ∂²R/∂θ² of the mean risk R = (1/n) Σ_i ℓ_i (Thesis §3.1.1, eq. (1.2.1)).

    Always the mean over examples of the per-example loss, whatever ``loss.reduction`` says; no other
    factor is hidden (no ½, no n). For a risk that sums, multiply by n.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, cut where the model's output is; H itself does not depend on the cut.
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[P, P]``, parameters ordered as in :func:`~sogrid.curvature.parameter_vector`.

    Example:
        >>> import torch
        >>> from sogrid.losses import Quadratic
        >>> hessian(nn.Linear(1, 1), Quadratic(), torch.tensor([[3.0]]), torch.zeros(1, 1)).tolist()
        [[18.0, 6.0], [6.0, 2.0]]
    """

    def risk(theta: Tensor) -> Tensor:
        return loss.value(evaluate(model, theta, x), y).mean(-1)

    return jacrev(jacrev(risk))(parameter_vector(model))
