"""Matrices by their structure: of few rows, of few factors, an inverse that is thin. None is formed.

One of low rank may be given by its rows (:class:`Gram`), and its damped inverse is then *thin*
(:class:`ThinInverse`); what they multiply, the gradient of a weight, may be given by its factors
(:class:`Factored`). All of these multiply by ``@``, so that an equation reads the same for them and for
matrices, and what is cheaper is decided here. Leading dimensions broadcast.

A hyperparameter is a number, or a tensor ``[...]`` with one for each leading dimension, as in a grid of
configurations; :func:`matrixwise` and :func:`vectorwise` shape it for what it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Change",
    "Factored",
    "Gram",
    "ThinInverse",
    "add_outer",
    "add_product",
    "add_to",
    "is_one",
    "matrixwise",
    "mean_eigenvalue",
    "product",
    "quadratic_form",
    "scalar",
    "shift_diagonal",
    "vectorwise",
]


Change = tuple["Tensor | Factored", "Tensor | None"]
"""(ΔW, Δb) of one layer, new tensors that may be written to."""


def matrixwise(value: float | Tensor) -> float | Tensor:
    """A hyperparameter ``[...]`` as a factor ``[..., 1, 1]`` of matrices; numbers are one for all."""
    return value[..., None, None] if isinstance(value, Tensor) and value.dim() else value


def vectorwise(value: float | Tensor) -> float | Tensor:
    """The same as a factor ``[..., 1]`` of vectors."""
    return value[..., None] if isinstance(value, Tensor) and value.dim() else value


def scalar(value: float | Tensor) -> float | Tensor:
    """A tensor without dimensions as a number, where reading it makes nobody wait: on the CPU.

    Arithmetic of such tensors is as slow as that of small matrices.
    """
    return value.item() if isinstance(value, Tensor) and value.is_cpu and value.dim() == 0 else value


def is_one(value: float | Tensor) -> bool:
    """Whether a factor can be left out; one on a device is not looked at."""
    return not isinstance(value, Tensor) and value == 1


class Gram(NamedTuple):
    """RᵀR, ``[..., m, m]``, known by its rows R.

    Attributes:
        rows: R, ``[..., n, m]``.
    """

    rows: Tensor

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.rows.mT @ self.rows


class ThinInverse(NamedTuple):
    """P = (RᵀR + δI)⁻¹ = I/δ − QᵀQ, ``[..., m, m]``, which multiplies matrices from either side by ``@``.

    With L Lᵀ = RRᵀ + δI, of the size of R's few rows, Q = L⁻¹R/√δ (Woodbury).

    Attributes:
        factor: Q, ``[..., n, m]``.
        shift: δ, a number or ``[...]``.

    Example:
        >>> from sogrid.factorize import tikhonov_inverse
        >>> thin = tikhonov_inverse(Gram(torch.ones(1, 3)), 1.0)
        >>> (torch.tensor([[4.0, 0.0, 0.0]]) @ thin).tolist()
        [[3.0, -1.0, -1.0]]
    """

    factor: Tensor
    shift: float | Tensor

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """X P of ``x: [..., k, m]``, in two thin products."""
        return self.times(x)

    def times(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """``scale · X P`` of ``x: [..., k, m]``."""
        return add_product(x, x @ self.factor.mT, self.factor, scale / self.shift, -scale)

    def shrink_(self, x: Tensor) -> Tensor:
        """X (I − δ QᵀQ) of ``x: [..., k, m]``, what remains of P when δ is divided out; a matrix in place."""
        image = x @ self.factor.mT
        if x.dim() == 2 and not isinstance(self.shift, Tensor):
            return x.addmm_(image, self.factor, alpha=-self.shift)  # spares a pass over x
        return add_product(x, image, self.factor, alpha=-self.shift)

    def __matmul__(self, x: Tensor) -> Tensor:
        """P X of ``x: [..., m, k]``."""
        return NotImplemented if isinstance(x, Factored) else (x.mT @ self).mT

    def dense(self) -> Tensor:
        """The matrix itself."""
        return shift_diagonal(-self.factor.mT @ self.factor, 1 / self.shift)


@dataclass(slots=True, eq=False)
class Factored:
    """G = s Lᵀ(R − 1μᵀ), ``[..., o, i]``, known by its factors, like a weight's gradient (1/n) gᵀh.

    Multiples and centring cost nothing. A product multiplies a factor where that is cheaper than
    forming G first, and stays factored while its rank n is below its width. :func:`add_to` is the end.

    Attributes:
        left: L, ``[..., n, o]``.
        right: R, ``[..., n, i]``.
        scale: s, a number or a tensor that broadcasts with the factors.
        mean: μ, ``[..., i]``, or ``None`` for zero.

    Example:
        >>> gradient = Factored(torch.ones(1, 2), torch.tensor([[1.0, 0.0, 2.0]]), 0.5)
        >>> (2 * gradient @ torch.eye(3)).dense().tolist()
        [[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]]
    """

    left: Tensor
    right: Tensor
    scale: float | Tensor = 1.0
    mean: Tensor | None = None

    __array_ufunc__ = None  # a NumPy number leaves the product to us

    def __rmul__(self, factor: float | Tensor) -> Factored:
        """A multiple."""
        return Factored(self.left, self.right, factor * self.scale, self.mean)

    def __matmul__(self, x: Tensor | ThinInverse) -> Factored | Tensor:
        """G X of ``x: [..., i, k]``."""
        first = _factor_first(*self.left.shape[-2:], x)
        if isinstance(x, ThinInverse):  # its 1/δ costs nothing in the scale
            scale = self.scale / matrixwise(x.shift)
            if not first:
                return x.shrink_(Factored(self.left, self.right, scale, self.mean).dense())
            product = Factored(self.left, x.shrink_(self._deviations(fresh=True)), scale)
        else:
            if not first:
                return self.dense() @ x
            product = Factored(self.left, self._deviations() @ x, self.scale)
        return product if product.left.shape[-2] < product.right.shape[-1] else product.dense()

    def __rmatmul__(self, x: Tensor | ThinInverse) -> Factored | Tensor:
        """X G of ``x: [..., k, o]``."""
        x_t = x if isinstance(x, ThinInverse) else x.mT
        if not _factor_first(*self.right.shape[-2:], x_t):
            return x @ self.dense()
        product = Factored(self.left @ x_t, self.right, self.scale, self.mean)
        return product if product.left.shape[-2] < product.left.shape[-1] else product.dense()

    def __getitem__(self, index: tuple) -> Factored | Tensor:
        """Columns: ``[..., :k]`` is factored, ``[..., k]`` a tensor ``[..., o]``."""
        right = self._deviations()[index]
        if isinstance(index[-1], slice):
            return Factored(self.left, right, self.scale)
        return Factored(self.left, right.unsqueeze(-1), self.scale).dense().squeeze(-1)

    @property
    def mT(self) -> Factored:
        """Gᵀ."""
        return Factored(self._deviations(), self.left, self.scale)

    def centered(self, mean: Tensor) -> Factored:
        """The same with another μ."""
        return Factored(self.left, self.right, self.scale, mean)

    def dense(self) -> Tensor:
        """The matrix itself."""
        if max(self.left.dim(), self.right.dim()) > 2:
            return self.scale * self.left.mT @ self._deviations()
        return self.add_to(self.left.new_empty(self.left.shape[-1], self.right.shape[-1]), beta=0)

    def add_to(self, matrix: Tensor, beta: int = 1) -> Tensor:
        """``beta · matrix + G`` in the place of ``matrix: [o, i]``."""
        left, scale = self.left, scalar(self.scale)
        if isinstance(scale, Tensor):
            left, scale = left * scale, 1.0
        few = left.shape[-2] <= left.shape[-1]  # centre R, or else what it was multiplied into
        matrix.addmm_(left.mT, self._deviations() if few else self.right, beta=beta, alpha=scale)
        if not few and self.mean is not None:
            matrix.addr_(left.sum(-2), self.mean, alpha=-scale)
        return matrix

    def _deviations(self, fresh: bool = False) -> Tensor:
        """R − 1μᵀ; R itself if that is all and it need not be a tensor of one's own."""
        if self.mean is not None:
            return self.right - self.mean.unsqueeze(-2)
        return self.right.clone() if fresh else self.right


def _factor_first(n: int, o: int, x: Tensor | ThinInverse) -> bool:
    """Whether Lᵀ(R X) takes no more multiplications than (LᵀR) X, for factors of n rows and o rows of G.

    For a square X, thin or dense, that is so if n ≤ o.
    """
    if isinstance(x, ThinInverse):
        q, i = x.factor.shape[-2:]
        k, row = i, 2 * q * i
    else:
        i, k = x.shape[-2:]
        row = i * k
    return n * (row + o * k) <= o * (n * i + row)


def add_product(
    c: Tensor, x: Tensor, y: Tensor, beta: float | Tensor = 1.0, alpha: float | Tensor = 1.0
) -> Tensor:
    """β C + α X Y, for ``x: [..., k, j]``, ``y: [..., j, m]``, and what broadcasts with their product.

    By one kernel for matrices and for stacks of them, if the factors are numbers; those that are tensors take
    one more each.
    """
    if isinstance(beta, Tensor):
        c, beta = matrixwise(beta) * c, 1.0
    if isinstance(alpha, Tensor):
        x, alpha = matrixwise(alpha) * x, 1.0
    dims, most = {c.dim(), x.dim(), y.dim()}, torch.finfo(x.dtype).max
    fits = abs(beta) <= most and abs(alpha) <= most
    if dims == {2} and fits:
        return torch.addmm(c, x, y, beta=beta, alpha=alpha)
    if dims == {3} and fits and len(x) == len(y):
        return torch.baddbmm(c, x, y, beta=beta, alpha=alpha)
    product = (x if alpha == 1 else alpha * x) @ y
    return product if beta == 0 else product + (c if beta == 1 else beta * c)


def product(scale: float | Tensor, x: Tensor | Factored, y: Tensor | ThinInverse) -> Tensor | Factored:
    """``scale · X Y`` for a square ``y``, in as few passes as there are."""
    if isinstance(x, Factored) or isinstance(scale, Tensor):
        return matrixwise(scale) * x @ y
    if isinstance(y, ThinInverse):
        return y.times(x, scale)
    return add_product(x, x, y, 0, scale)


def quadratic_form(x: Tensor, y: Tensor | ThinInverse) -> Tensor:
    """Mean of x_iᵀ Y x_i over the rows of ``x: [..., n, m]``, ``[...]``."""
    return ((x @ y) * x).sum(-1).mean(-1)


def add_to(matrix: Tensor, change: Tensor | Factored) -> None:
    """``matrix += change``, in place; factors are multiplied straight into ``[o, i]``."""
    if isinstance(change, Factored) and matrix.dim() == 2:
        change.add_to(matrix)
    else:
        matrix.add_(change.dense() if isinstance(change, Factored) else change)


def add_outer(matrix: Tensor | Gram, vector: Tensor, weight: float | Tensor = 1.0) -> Tensor | Gram:
    """``matrix + weight · v vᵀ``, weight ≥ 0, for ``vector: [..., m]``; a Gram matrix takes one more row."""
    if isinstance(matrix, Gram):
        # abs: below zero by a wrong damping, refused when inverted
        row = (vectorwise(abs(weight) ** 0.5) * vector).unsqueeze(-2)
        return Gram(torch.cat([matrix.rows.expand(*row.shape[:-2], -1, -1), row], -2))
    return matrix + matrixwise(weight) * (vector.unsqueeze(-1) * vector.unsqueeze(-2))


def mean_eigenvalue(matrix: Tensor | Gram) -> Tensor:
    """Trace over m, ``[...]``."""
    if isinstance(matrix, Gram):
        return matrix.rows.square().sum((-2, -1)) / matrix.rows.shape[-1]
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def shift_diagonal(matrix: Tensor, damping: float | Tensor) -> Tensor:
    """``matrix + damping · I`` as a new tensor, for a number or a tensor ``[...]`` of leading dimensions."""
    if isinstance(damping, Tensor) and damping.dim() > 0:
        leading = (matrix[..., 0, 0] + damping).shape
        matrix, damping = matrix.expand(*leading, *matrix.shape[-2:]), damping.unsqueeze(-1)
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    return shifted
