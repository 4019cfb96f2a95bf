"""A bound on how far one step moves a layer's pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from sogrid.structured import Factored, matrixwise, scalar, vectorwise

__all__ = ["BOUND_EXAMPLES", "bounded", "moved", "shrunk"]

BOUND_EXAMPLES = 16
"""A minibatch's change is bounded on so many of its examples."""


def bounded(
    dw: Tensor | Factored,
    db: Tensor | None,
    h: Tensor,
    max_change: float | Tensor | None,
    positions: int = 1,
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb), shrunk if need be until the pre-activations change by κ at most, in root mean square.

    §6.1 asks a layer's pre-activations to move by −λg; when λ is too large they leave the region where g
    means anything, units saturate, and the loss never moves again. The bound is on
    rms_{i,j} (ΔW h_i + Δb)_j, has the scale of a pre-activation, and leaves the direction alone.

    Args:
        dw: ΔW, ``[..., o, i]``.
        db: Δb, ``[..., o]`` or ``None``.
        h: Inputs of the layer, ``[..., n·s, i]``, of which the first 16 examples count.
        max_change: κ; ``None`` for no bound.
        positions: s, rows of an example.
    """
    if max_change is None:
        return dw, db
    return shrunk(dw, db, *moved(dw, db, h[..., : BOUND_EXAMPLES * positions, :]), max_change)


def moved(dw: Tensor | Factored, db: Tensor | None, h: Tensor) -> tuple[Tensor, int]:
    """‖ΔW h_i + Δb‖ over all rows i and units, ``[...]``, and over how many numbers that is.

    Args:
        dw: ΔW, ``[..., o, i]``.
        db: Δb, ``[..., o]`` or ``None``.
        h: Rows, ``[..., n, i]``.
    """
    change = dw @ h.mT
    if db is not None:
        change = change + db.unsqueeze(-1)
    return torch.linalg.vector_norm(change, dim=(-2, -1)), change.shape[-2] * change.shape[-1]


def shrunk(
    dw: Tensor | Factored,
    db: Tensor | None,
    size: Tensor,
    count: int | Tensor,
    max_change: float | Tensor,
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb) of which that is the size, of so many numbers, shrunk if their root mean square is above κ."""
    size, most = scalar(size), scalar(max_change) * scalar(count) ** 0.5
    if isinstance(size, Tensor):
        share = (most / size).clamp(max=1)
    elif size <= most:
        return dw, db
    else:
        share = most / size
    return matrixwise(share) * dw, None if db is None else vectorwise(share) * db
