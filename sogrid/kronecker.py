"""Kronecker products, vec, and the bordered matrix that keeps weights and biases apart.

Index letters: i layer input, o layer output. ``vec`` stacks columns, as in the thesis, so that
vec(A X B) = (Bᵀ ⊗ A) vec(X) (Thesis §6.2). Leading dimensions broadcast.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sogrid.structured import Factored, ThinInverse, product

__all__ = [
    "bordered",
    "bordered_inverse",
    "homogeneous",
    "homogeneous_gradient",
    "kronecker_product",
    "kronecker_solve",
    "unvec",
    "vec",
]


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns of ``[..., o, i]`` into ``[..., o·i]``.

    Example:
        >>> vec(torch.tensor([[1, 3], [2, 4]])).tolist()
        [1, 2, 3, 4]
    """
    return matrix.mT.flatten(-2)


def unvec(vector: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`vec` for a matrix with ``rows`` rows."""
    return vector.unflatten(-1, (-1, rows)).mT


def kronecker_product(a: Tensor, b: Tensor, vector: Tensor) -> Tensor:
    """(A ⊗ B) v for ``a: [i, i]``, ``b: [o, o]``, ``vector: [o·i]``, never forming A ⊗ B."""
    return vec(b @ unvec(vector, b.shape[-1]) @ a.mT)


def kronecker_solve(
    a_inverse: Tensor | ThinInverse,
    b_inverse: Tensor | ThinInverse,
    gradient: Tensor | Factored,
    scale: float | Tensor = 1.0,
) -> Tensor | Factored:
    """(A ⊗ B)⁻¹ vec(G) as a matrix, scaled: s B⁻¹ G A⁻¹, for ``gradient: [..., o, i]`` (Thesis §6.2.1)."""
    return product(scale, b_inverse @ gradient, a_inverse)


def homogeneous(h: Tensor) -> Tensor:
    """h̃ = [h; 1]: ``[..., n, i]`` to ``[..., n, i + 1]``."""
    return torch.cat([h, torch.ones_like(h[..., :1])], -1)


def homogeneous_gradient(grad_w: Tensor | Factored, grad_b: Tensor) -> Tensor | Factored:
    """[∇W, ∇b], ``[..., o, i + 1]``; of factors, gᵀ[h; 1], whose last column is ∇b."""
    if isinstance(grad_w, Factored):
        return replace(grad_w, right=homogeneous(grad_w.right))
    return torch.cat([grad_w, grad_b.unsqueeze(-1)], -1)


def bordered(covariance: Tensor, mean: Tensor) -> Tensor:
    """A = E[h̃ h̃ᵀ] = [[C + h̄h̄ᵀ, h̄], [h̄ᵀ, 1]] from ``[..., i, i]`` and ``[..., i]``."""
    column = mean.unsqueeze(-1)
    top = torch.cat([covariance + column @ column.mT, column], -1)
    bottom = torch.cat([column.mT, torch.ones_like(column[..., :1, :])], -1)
    return torch.cat([top, bottom], -2)


def bordered_inverse(covariance_inverse: Tensor, mean: Tensor) -> Tensor:
    """A⁻¹ = [[C⁻¹, −C⁻¹h̄], [−h̄ᵀC⁻¹, 1 + h̄ᵀC⁻¹h̄]] (Thesis §6.2.2, THESIS row 19)."""
    column = mean.unsqueeze(-1)
    right = -covariance_inverse @ column
    top = torch.cat([covariance_inverse, right], -1)
    bottom = torch.cat([right.mT, 1 - column.mT @ right], -1)
    return torch.cat([top, bottom], -2)
