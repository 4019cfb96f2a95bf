"""Damped linear algebra: Tikhonov solve and inverse, inverse square root, conjugate gradient.

All matrices are symmetric ``[..., m, m]``; leading dimensions broadcast. One of low rank may be given
by its rows (:class:`Gram`), and its inverse is then *thin* (:class:`ThinInverse`): neither is formed.
What they multiply, the gradient of a weight, may be given by its factors (:class:`Factored`). All of
these multiply by ``@``, so that an equation reads the same for them and for matrices, and what is
cheaper is decided here.

On an accelerator the Tikhonov forms read nothing back to the host: a factorisation that fails there
yields NaN, which no loss survives unseen. On the CPU, where looking is free, a failure is retried in
float64 and then raised; :func:`failures_are_nan` has it NaN there too. What decomposes into eigenvectors
(:func:`truncated`, the inverse square root) and conjugate gradient do make the host wait.

A hyperparameter is a number, or a tensor ``[...]`` with one for each leading dimension, as in a grid of
configurations; :func:`matrixwise` and :func:`vectorwise` shape it for what it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Factored",
    "FactorizationError",
    "Gram",
    "ThinInverse",
    "add_outer",
    "add_to",
    "conjugate_gradient",
    "failures_are_nan",
    "inverse_square_root",
    "matrixwise",
    "mean_eigenvalue",
    "naming_the_damping",
    "scalar",
    "shift_diagonal",
    "tikhonov_inverse",
    "tikhonov_solve",
    "truncated",
    "vectorwise",
]


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
        >>> thin = tikhonov_inverse(Gram(torch.ones(1, 3)), 1.0)
        >>> (torch.tensor([[4.0, 0.0, 0.0]]) @ thin).tolist()
        [[3.0, -1.0, -1.0]]
    """

    factor: Tensor
    shift: float | Tensor

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """X P of ``x: [..., k, m]``, in two thin products."""
        return self.shrink_(x / matrixwise(self.shift))

    def shrink_(self, x: Tensor) -> Tensor:
        """X (I − δ QᵀQ) of ``x: [..., k, m]``, what remains of P when δ is divided out; a matrix in place."""
        image = (x @ self.factor.mT).mul_(matrixwise(self.shift))
        if image.dim() > 2:
            return x - image @ self.factor  # which may broadcast
        return x.addmm_(image, self.factor, alpha=-1)  # spares a pass over x

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


class FactorizationError(RuntimeError):
    """A damped matrix is not positive definite, even in float64.

    Attributes:
        shift: What added to the diagonal would have helped, if anything.
    """

    def __init__(self, message: str, shift: float | None = None) -> None:
        """See the class."""
        super().__init__(message)
        self.shift = shift


@contextmanager
def naming_the_damping(damping: Callable[[float], float | Tensor]) -> Iterator[None]:
    """Inside, errors also name ε: ``damping`` tells which ε gives a shift of the diagonal."""
    try:
        yield
    except FactorizationError as error:
        if error.shift is None:
            raise
        needed = float(torch.as_tensor(damping(error.shift)).max())
        raise FactorizationError(f"{error}: damping (ε) ≥ {needed:.1e}", error.shift) from None


_failures_are_nan: ContextVar[bool] = ContextVar("failures_are_nan", default=False)


@contextmanager
def failures_are_nan() -> Iterator[None]:
    """Inside, what cannot be inverted is NaN on the CPU as elsewhere, and its neighbours are as without it.

    Of a stack of matrices that is the failing one alone. A thin inverse does not become a dense one then.
    """
    token = _failures_are_nan.set(True)
    try:
        yield
    finally:
        _failures_are_nan.reset(token)


def shift_diagonal(matrix: Tensor, damping: float | Tensor) -> Tensor:
    """``matrix + damping · I`` as a new tensor, for a number or a tensor ``[...]`` of leading dimensions."""
    if isinstance(damping, Tensor) and damping.dim() > 0:
        leading = (matrix[..., 0, 0] + damping).shape
        matrix, damping = matrix.expand(*leading, *matrix.shape[-2:]), damping.unsqueeze(-1)
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping)
    return shifted


def _by_cholesky(
    solve: Callable[[Tensor], Tensor], matrix: Tensor, damping: float | Tensor, name: str
) -> Tensor:
    """``solve(L)``, L Lᵀ = ``matrix + damping · I``; see the module docstring for failures."""
    factor, sound = _cholesky(shift_diagonal(matrix, damping))
    solution = solve(factor).to(matrix.dtype)
    if matrix.device.type != "cpu" or bool(sound.all()):
        return solution
    shifted = shift_diagonal(matrix.double(), damping)
    factor, definite = _cholesky(shifted)
    if not (_failures_are_nan.get() or bool(definite.all())):
        _require_finite(shifted, name)
        raise _indefinite(torch.linalg.eigvalsh(shifted), matrix.dtype, damping, name)
    return torch.where(sound[..., None, None], solution, solve(factor).to(matrix.dtype))


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor, NaN where it fails, and where it does not.

    LAPACK reports a NaN pivot, but not always an infinite one.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    sound = (info == 0) & torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
    if matrix.device.type != "cpu" or not bool(sound.all()):
        factor = torch.where(sound[..., None, None], factor, torch.nan)
    return factor, sound


def _require_finite(matrix: Tensor, name: str) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise FactorizationError(f"{name}: the matrix to factorise, or its damping, is NaN or infinite")


def _indefinite(
    eigenvalues: Tensor, dtype: torch.dtype, damping: float | Tensor, name: str
) -> FactorizationError:
    """The error for eigenvalues ``[..., m]`` of a damped matrix, given in ``dtype``, that is not definite.

    The shift named is enough: it lifts the smallest eigenvalue above rounding, and is rounded up.
    """
    largest, smallest = eigenvalues.abs().amax(-1), eigenvalues.amin(-1)
    rounding = 8 * eigenvalues.shape[-1] * torch.finfo(dtype).eps * largest
    missing = (rounding - smallest).clamp(min=torch.finfo(dtype).tiny)
    needed = 1.1 * float((missing + torch.as_tensor(damping, dtype=missing.dtype)).max())
    shift = float(torch.as_tensor(damping).max())
    message = (
        f"{name}: with a shift of {shift:.3g} the matrix is not positive definite (smallest eigenvalue "
        f"{float(smallest.min()):.3g}); a shift of {needed:.1e} or more would have helped"
    )
    return FactorizationError(message, needed)


def truncated(matrix: Tensor | Gram, rank: int, name: str = "matrix") -> Tensor | Gram:
    """The nearest positive semi-definite matrix of that rank at most, by its rows (Eckart & Young 1936).

    It keeps the directions of the largest eigenvalues, which are what a damped inverse differs from I/δ in:
    with P and P_k the inverses of all and of this, ‖P_k − P‖₂ = σ/(δ(σ + δ)) for the first σ left out.

    Args:
        matrix: ``[..., m, m]``, positive semi-definite. Of one known by its rows, their small product is
            decomposed.
        rank: k. A matrix that would not become cheaper to multiply by is returned as it is: one of k rows or
            fewer, or a formed one that is not wider than 2k.
        name: Named in the error.

    Raises:
        FactorizationError: On the CPU, if the matrix is not finite (NaN elsewhere; see the module docstring).
    """
    known = isinstance(matrix, Gram)
    square = matrix.rows @ matrix.rows.mT if known else matrix
    if square.shape[-1] <= (rank if known else 2 * rank):
        return matrix
    if square.device.type == "cpu" and not _failures_are_nan.get():
        _require_finite(square, name)
    sound = torch.isfinite(square).flatten(-2).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(sound, square, 0))
    values, top = values[..., -rank:], vectors[..., -rank:].mT
    rows = top @ matrix.rows if known else top * values.clamp(min=0).sqrt().unsqueeze(-1)
    return Gram(torch.where(sound, rows, torch.nan))


def tikhonov_inverse(
    matrix: Tensor | Gram, damping: float | Tensor, name: str = "matrix", rank: int | None = None
) -> Tensor | ThinInverse:
    """(matrix + damping · I)⁻¹ of a positive semi-definite matrix (Thesis §3.1.3).

    Args:
        matrix: ``[..., m, m]``. A :class:`Gram` matrix has a :class:`ThinInverse`, unless the damping is
            lost in its rounding: a failure, at which on the CPU it is formed and inverted like any other.
        damping: ε ≥ 0, a number or a tensor ``[...]``: one for all, or one for each leading dimension.
        name: Named in the error, usually the layer.
        rank: Of the matrix only so many directions count; see :func:`truncated`. ``None``: all.

    Raises:
        FactorizationError: On the CPU, if the damped matrix is not positive definite even in float64;
            the message says which damping would have helped.

    Example:
        >>> tikhonov_inverse(torch.tensor([[1.0]]), 3.0).tolist()
        [[0.25]]
    """
    if rank is not None:
        matrix = truncated(matrix, rank, name)
    if isinstance(matrix, Gram):
        return _thin_inverse(matrix, damping, name)
    return _by_cholesky(torch.cholesky_inverse, matrix, damping, name)


def _thin_inverse(matrix: Gram, damping: float | Tensor, name: str) -> Tensor | ThinInverse:
    rows = matrix.rows
    gram = rows @ rows.mT
    shift = (torch.ones_like(rows[..., 0, 0]) * damping).to(rows.dtype)  # as_tensor would sync
    lower, info = torch.linalg.cholesky_ex(shift_diagonal(gram, shift))
    rounding = torch.finfo(rows.dtype).eps * torch.linalg.matrix_norm(gram, torch.inf)
    sound = (info == 0) & (shift > rounding)  # RRᵀ may be definite without δ, RᵀR never is
    surely = rows.device.type == "cpu" and bool(sound.all())
    if rows.device.type == "cpu" and not (surely or _failures_are_nan.get()):
        return tikhonov_inverse(matrix.dense(), damping, name)
    factor = torch.linalg.solve_triangular(lower, rows, upper=False) / shift.sqrt()[..., None, None]
    if not surely:
        factor = torch.where(sound[..., None, None], factor, torch.nan)
    return ThinInverse(factor, shift)


def tikhonov_solve(matrix: Tensor, rhs: Tensor, damping: float | Tensor, name: str = "matrix") -> Tensor:
    """Solve (matrix + damping · I) X = rhs, for ``rhs: [..., m, c]``; see :func:`tikhonov_inverse`."""
    return _by_cholesky(lambda L: torch.cholesky_solve(rhs.to(L.dtype), L), matrix, damping, name)


def inverse_square_root(matrix: Tensor, damping: float | Tensor = 0.0, name: str = "matrix") -> Tensor:
    """The symmetric (matrix + damping · I)^(−1/2), by eigendecomposition (Thesis §6.4.2).

    Raises:
        FactorizationError: On the CPU, if an eigenvalue of the damped matrix is not positive.
    """
    shifted = shift_diagonal(matrix, damping)
    if matrix.device.type == "cpu":
        _require_finite(shifted, name)
    values, vectors = torch.linalg.eigh(shifted)
    if matrix.device.type == "cpu" and not bool((values > 0).all()):
        raise _indefinite(values.double(), matrix.dtype, damping, name)
    return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    tolerance: float = 1e-10,
    iterations: int | None = None,
) -> Tensor:
    """Solve M x = rhs for a positive definite M known only through its products with vectors.

    Args:
        product: v ↦ M v.
        rhs: ``[m]``.
        tolerance: Stop when the residual norm is this fraction of ‖rhs‖ (read on the host).
        iterations: At most this many products; default m.

    Raises:
        FactorizationError: If a direction of non-positive curvature is met.
    """
    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction, rho = residual, residual @ residual
    goal = float(rho) * tolerance**2
    for _ in range(rhs.numel() if iterations is None else iterations):
        if float(rho) <= goal:
            break
        image = product(direction)
        curvature = direction @ image
        if not float(curvature) > 0:
            raise FactorizationError(f"conjugate gradient met curvature {float(curvature):.3g} ≤ 0")
        alpha = rho / curvature
        x = x + alpha * direction
        residual = residual - alpha * image
        rho, previous = residual @ residual, rho
        direction = residual + (rho / previous) * direction
    return x
