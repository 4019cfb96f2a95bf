r"""The Kronecker structure of a layer's block, dense: exact as a sum, approximate as one product.

For layer parameters θ = [vec(W); b] (columns stacked; see :func:`sogrid.curvature.to_thesis_order`),
h̃ = [h; 1] and M = J_aᵀ D J_a, the layer's part of J_θ is h̃ᵀ ⊗ J_a, so that its block is exactly
(1/n) Σ_i h̃_i h̃_iᵀ ⊗ M_i (eq. (6.2.2)). KFAC replaces the mean of products by A ⊗ B, the product of
means (§6.4.1); equal when h̃ or M is the same for all examples.

With targets, D = ∂²ℓ/∂f² and everything here is Gauss-Newton at the cut of the loss; without (``y``
None), D = D(f) and everything is the Fisher, which needs no labels.

Thesis §5.5, §6.2, §6.4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sogrid.curvature.jacobian import evaluate, parameter_vector, preactivation_jacobian
from sogrid.losses import Loss

__all__ = ["kronecker_factors", "kronecker_sum", "preactivation_curvature"]


def preactivation_curvature(
    model: nn.Module, layer: str, loss: Loss, x: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's h̃_i and M_i = J_aᵀ D_i J_a, the curvature of ℓ_i in its pre-activations (§5.5).

    Args:
        model: A module from ``[n, ...]`` to ``[n, k]`` that treats examples separately.
        layer: Name of an ``nn.Linear``.
        loss: The loss, cut where the model's output is.
        x: Inputs, ``[n, ...]``.
        y: Targets for Gauss-Newton, D = ∂²ℓ/∂f²; None for the Fisher, D = D(f).

    Returns:
        ``h̃: [n, n_in + 1]`` (``[n, n_in]`` without a bias) and ``M: [n, n_out, n_out]``, one
        un-normalised matrix per example.

    Raises:
        KeyError: If the model has no module of that name.
        TypeError: If that module is not an ``nn.Linear``.
        ValueError: If the layer is not applied exactly once to a matrix ``[n, n_in]``.
    """
    h, J = preactivation_jacobian(model, layer, x)
    f = evaluate(model, parameter_vector(model), x)
    D = loss.fisher(f) if y is None else loss.hessian(f, y)
    if model.get_submodule(layer).bias is not None:
        h = torch.cat([h, h.new_ones(len(h), 1)], -1)
    return h, J.mT @ D @ J


def kronecker_factors(
    model: nn.Module, layer: str, loss: Loss, x: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KFAC's factors A = (1/n) Σ h̃_i h̃_iᵀ and B = (1/n) Σ J_aᵀ D_i J_a (Thesis eq. (6.2.3), §6.4.1).

    A ⊗ B approximates the layer's block in the order [vec(W); b]. The thesis's G_in is A ⊗ αI.

    Args:
        model: A module from ``[n, ...]`` to ``[n, k]`` that treats examples separately.
        layer: Name of an ``nn.Linear``.
        loss: The loss, cut where the model's output is.
        x: Inputs, ``[n, ...]``.
        y: Targets for Gauss-Newton; None for the Fisher.

    Returns:
        ``A: [n_in + 1, n_in + 1]`` (``[n_in, n_in]`` without a bias) and ``B: [n_out, n_out]``.

    Raises:
        KeyError: If the model has no module of that name.
        TypeError: If that module is not an ``nn.Linear``.
        ValueError: If the layer is not applied exactly once to a matrix ``[n, n_in]``.

    Example:
        >>> from sogrid.losses import Quadratic
        >>> A, B = kronecker_factors(nn.Linear(1, 1), "", Quadratic(), torch.tensor([[3.0]]))
        >>> A.tolist(), B.tolist()
        ([[9.0, 3.0], [3.0, 1.0]], [[2.0]])
    """
    h, M = preactivation_curvature(model, layer, loss, x, y)
    return h.mT @ h / len(h), M.mean(0)


def kronecker_sum(model: nn.Module, layer: str, loss: Loss, x: Tensor, y: Tensor | None = None) -> Tensor:
    """(1/n) Σ_i h̃_i h̃_iᵀ ⊗ (J_aᵀ D_i J_a): the layer's block, exactly (Thesis eq. (6.2.2)).

    Args:
        model: A module from ``[n, ...]`` to ``[n, k]`` that treats examples separately.
        layer: Name of an ``nn.Linear``.
        loss: The loss, cut where the model's output is.
        x: Inputs, ``[n, ...]``.
        y: Targets for Gauss-Newton; None for the Fisher.

    Returns:
        ``[m, m]``, m = n_out·(n_in + 1) (n_out·n_in without a bias), in the order [vec(W); b].

    Raises:
        KeyError: If the model has no module of that name.
        TypeError: If that module is not an ``nn.Linear``.
        ValueError: If the layer is not applied exactly once to a matrix ``[n, n_in]``.
    """
    h, M = preactivation_curvature(model, layer, loss, x, y)
    terms = [torch.kron(torch.outer(h_i, h_i), M_i) for h_i, M_i in zip(h, M, strict=True)]
    return torch.stack(terms).mean(0)
