"""Damped factorisations: the Tikhonov inverse, dense or thin, and the inverse square root.

All matrices are symmetric ``[..., m, m]``, or a :class:`~sogrid.structured.Gram` of their rows; leading
dimensions broadcast.

On an accelerator the Tikhonov forms read nothing back to the host: a factorisation that fails there
yields NaN, which no loss survives unseen. On the CPU, where looking is free, a failure is retried in
float64 and then raised; :func:`failures_are_nan` has it NaN there too. What decomposes into eigenvectors
(:func:`truncated`, the inverse square root) does make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from sogrid.structured import Gram, ThinInverse, shift_diagonal

__all__ = [
    "FactorizationError",
    "eigenvectors",
    "failures_are_nan",
    "inverse_square_root",
    "naming_the_damping",
    "tikhonov_inverse",
    "truncated",
]


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


def tikhonov_inverse(
    matrix: Tensor | Gram, damping: float | Tensor, name: str = "matrix", rank: int | None = None
) -> Tensor | ThinInverse:
    """(matrix + damping · I)⁻¹ of a positive semi-definite matrix (Thesis §3.1.3).

    Args:
        matrix: ``[..., m, m]``. A :class:`~sogrid.structured.Gram` matrix has a
            :class:`~sogrid.structured.ThinInverse`, unless the damping is
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
    return _dense_inverse(matrix, damping, name)


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
        FactorizationError: On the CPU, if the matrix is not finite (NaN elsewhere; see the module docstring);
            anywhere, if LAPACK finds no eigenvectors.
    """
    known = isinstance(matrix, Gram)
    square = matrix.rows @ matrix.rows.mT if known else matrix
    if square.shape[-1] <= (rank if known else 2 * rank):
        return matrix
    if square.device.type == "cpu" and not _failures_are_nan.get():
        _require_finite(square, name)
    sound = torch.isfinite(square).flatten(-2).all(-1)[..., None, None]
    values, vectors = _eigh(torch.where(sound, square, 0), name)
    values, top = values[..., -rank:], vectors[..., -rank:].mT
    rows = top @ matrix.rows if known else top * values.clamp(min=0).sqrt().unsqueeze(-1)
    return Gram(torch.where(sound, rows, torch.nan))


def inverse_square_root(matrix: Tensor, damping: float | Tensor = 0.0, name: str = "matrix") -> Tensor:
    """The symmetric (matrix + damping · I)^(−1/2), by eigendecomposition (Thesis §6.4.2).

    Raises:
        FactorizationError: On the CPU, if an eigenvalue of the damped matrix is not positive.
    """
    shifted = shift_diagonal(matrix, damping)
    if matrix.device.type == "cpu":
        _require_finite(shifted, name)
    values, vectors = _eigh(shifted, name)
    if matrix.device.type == "cpu" and not bool((values > 0).all()):
        raise _indefinite(values.double(), matrix.dtype, damping, name)
    return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


def eigenvectors(matrix: Tensor | Gram, name: str = "matrix") -> Tensor:
    """Those of a symmetric matrix ``[..., m, m]``, as columns; for them an accelerator's host waits.

    Raises:
        FactorizationError: On the CPU, if the matrix is not finite; anywhere, if LAPACK finds none.
    """
    matrix = matrix.dense() if isinstance(matrix, Gram) else matrix
    if matrix.device.type == "cpu":
        _require_finite(matrix, name)
    return _eigh(matrix, name)[1]


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix.

    LAPACK may not converge where many eigenvalues are zero, as of fewer examples than inputs with many
    that are never on, or find vectors of NaN and not say so. A shift that is within rounding moves them all
    alike and turns no eigenvector; float64 is the last resort.
    """
    shift, failure = torch.zeros_like(matrix[..., 0, 0]), "they are not finite"
    for dtype in (*3 * [matrix.dtype], torch.float64):
        try:
            values, vectors = torch.linalg.eigh(shift_diagonal(matrix.to(dtype), shift))
        except torch.linalg.LinAlgError as error:
            failure = error
        else:
            if bool(torch.isfinite(vectors).all()) or not bool(torch.isfinite(matrix).all()):
                return (values - shift.unsqueeze(-1)).to(matrix.dtype), vectors.to(matrix.dtype)
        shift = 4 * shift + torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    raise FactorizationError(f"{name}: no eigenvectors were found: {failure}")


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


def _dense_inverse(matrix: Tensor, damping: float | Tensor, name: str) -> Tensor:
    """Of ``matrix + damping · I``, by L Lᵀ; see the module docstring for failures."""
    factor, sound = _cholesky(shift_diagonal(matrix, damping))
    inverse = torch.cholesky_inverse(factor).to(matrix.dtype)
    if matrix.device.type != "cpu" or bool(sound.all()):
        return inverse
    shifted = shift_diagonal(matrix.double(), damping)
    factor, definite = _cholesky(shifted)
    if not (_failures_are_nan.get() or bool(definite.all())):
        _require_finite(shifted, name)
        raise _indefinite(torch.linalg.eigvalsh(shifted), matrix.dtype, damping, name)
    return torch.where(sound[..., None, None], inverse, torch.cholesky_inverse(factor).to(matrix.dtype))


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
