"""Statistics of a layer over one minibatch, and how they are carried from one to the next.

For a layer ``a = W h + b``: the mean h̄ and the covariance C of its inputs (divisor n), and one factor
or scalar for its outputs. Second-order methods *refresh* them now and then and use them at every
step (Thesis §6.3.2, amortisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sogrid.structured import Gram

__all__ = [
    "Statistics",
    "input_moments",
    "input_rows",
    "output_factor",
    "output_rows",
    "refresh_due",
    "second_moment",
    "squared_gradient_bound",
]


def input_rows(h: Tensor, centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean h̄ ``[..., i]`` of ``h: [..., n, i]`` and rows R = (h − h̄)/√n, so that C = RᵀR (Thesis §6.1).

    Without centring (a layer that has no bias) the mean is zero and RᵀR the second moment.
    """
    mean = h.mean(-2) if centered else torch.zeros_like(h[..., 0, :])
    scale = h.shape[-2] ** -0.5
    return mean, (h - mean.unsqueeze(-2)).mul_(scale) if centered else h * scale


def output_rows(passes: Sequence[Tensor], examples: int | None = None) -> Tensor:
    """R = g/√n of the rows ``[..., n·s, o]`` of all passes, so that B = RᵀR.

    Args:
        passes: Gradients, or vectors pulled back, at a layer's output.
        examples: n; default as many as each pass has rows.
    """
    return torch.cat(tuple(passes), -2) * (examples or passes[0].shape[-2]) ** -0.5


def input_moments(h: Tensor, centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean ``[..., i]`` and covariance ``[..., i, i]`` of ``h: [..., n, i]``; see :func:`input_rows`."""
    mean, rows = input_rows(h, centered)
    return mean, Gram(rows).dense()


def output_factor(passes: Sequence[Tensor]) -> Tensor:
    """B = (1/n) Σ_passes Σ_i g_i g_iᵀ, ``[..., o, o]``, from per-example rows ``[..., n, o]`` each.

    With the rows of S, SᵀS = D(f), pulled back to the layer this is E[Jᵀ D J] (Thesis §6.4.1).
    """
    return Gram(output_rows(passes)).dense()


def second_moment(rows: Tensor) -> Tensor | Gram:
    """RᵀR of ``rows: [..., n, m]``, kept as its rows where they are fewer (n < m).

    A product with the inverse then costs 2nm instead of m² for each row it multiplies, and the inverse
    itself n³ + n²m instead of m³, in nm numbers of memory instead of m².
    """
    n, m = rows.shape[-2:]
    return Gram(rows) if n < m else Gram(rows).dense()


def squared_gradient_bound(g: Tensor) -> Tensor:
    """α = max_{i,j} (g_i)_j² of per-example gradients ``[..., n, o]`` (Thesis §6.3.2's heuristic)."""
    return g.square().amax((-2, -1))


def refresh_due(updates: int, every: int | None) -> bool:
    """Whether statistics are refreshed before update number ``updates`` (from zero)."""
    return every is not None and updates % every == 0


class Statistics(NamedTuple):
    """One layer's statistics.

    Attributes:
        mean: h̄, ``[i]``.
        covariance: C, ``[i, i]``, or its rows; see :func:`second_moment`.
        output: What the method keeps of the output side: a factor ``[o, o]`` or its rows, a scalar, or
            ``None``.
    """

    mean: Tensor
    covariance: Tensor | Gram
    output: Tensor | Gram | None = None

    def dense(self) -> Statistics:
        """The same with every matrix formed, as blending needs."""
        return Statistics(*(part.dense() if isinstance(part, Gram) else part for part in self))

    def blend(self, newer: Statistics, decay: float) -> Statistics:
        """Exponential average: weight ``decay`` on self, ``1 − decay`` on ``newer``.

        Inputs are blended as a mixture of two populations, so C stays the covariance about the blended
        mean: C = ρC₁ + (1−ρ)C₂ + ρ(1−ρ)(h̄₁−h̄₂)(h̄₁−h̄₂)ᵀ.
        """
        shift = (newer.mean - self.mean).unsqueeze(-1)
        covariance = decay * self.covariance + (1 - decay) * newer.covariance
        output = newer.output
        if output is not None and self.output is not None:
            output = decay * self.output + (1 - decay) * output
        return Statistics(
            decay * self.mean + (1 - decay) * newer.mean,
            covariance + decay * (1 - decay) * shift @ shift.mT,
            output,
        )
