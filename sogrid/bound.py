"""A bound on how far one step moves a layer's pre-activations.

§6.1 asks a layer's pre-activations to move by −λg; when λ is too large they leave the region where g means
anything, units saturate, and the loss never moves again. The bound is on rms_{i,j} (ΔW h_i + Δb)_j, has the
scale of a pre-activation, and leaves the direction alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sogrid.structured import Change, Factored, add_product, matrixwise, scalar, vectorwise

__all__ = ["BOUND_EXAMPLES", "bounded", "moved", "shrunk"]

BOUND_EXAMPLES = 16
"""A minibatch's change is bounded on so many of its examples."""


def bounded(
    dw: Tensor | Factored,
    db: Tensor | None,
    h: Tensor,
    max_change: float | Tensor | None,
) -> Change:
    """(ΔW, Δb), shrunk if need be until the pre-activations change by κ at most, in root mean square.

    Args:
        dw: ΔW, ``[..., o, i]``, to be written to, as is Δb.
        db: Δb, ``[..., o]`` or ``None``.
        h: Inputs of the layer, ``[..., n, i]``, of which the first 16 count.
        max_change: κ, or κ ``[...]``; ``None`` for no bound.
    """
    if max_change is None:
        return dw, db
    (change,) = shrunk([(dw, db)], [moved(dw, db, h[..., :BOUND_EXAMPLES, :])], [max_change])
    return change


def moved(dw: Tensor | Factored, db: Tensor | None, h: Tensor) -> tuple[Tensor, int]:
    """‖ΔW h_i + Δb‖ over all rows i and units, ``[...]``, and over how many numbers that is.

    Args:
        dw: ΔW, ``[..., o, i]``.
        db: Δb, ``[..., o]`` or ``None``.
        h: Rows, ``[..., n, i]``.
    """
    if db is None or isinstance(dw, Factored):
        change = dw @ h.mT if db is None else dw @ h.mT + db.unsqueeze(-1)
    else:
        change = add_product(db.unsqueeze(-1), dw, h.mT)
    return torch.linalg.vector_norm(change, dim=(-2, -1)), change.shape[-2] * change.shape[-1]


def shrunk(
    changes: Sequence[Change],
    sizes: Sequence[tuple[Tensor, int | Tensor]],
    bounds: Sequence[float | Tensor],
) -> list[Change]:
    """Changes, shrunk where the root mean square of what they move is above κ. No host waits for it.

    Args:
        changes: (ΔW, Δb) each, to be written to.
        sizes: What :func:`moved` tells of each.
        bounds: κ of each, a number or ``[...]``.
    """
    norms, counts = zip(*sizes, strict=True)
    most = [scalar(bound) * count**0.5 for bound, count in zip(bounds, counts, strict=True)]
    if any(isinstance(bound, Tensor) for bound in most):
        shares = [norm / bound for norm, bound in zip(norms, most, strict=True)]
    else:
        shares = torch._foreach_div(norms, most)
    torch._foreach_clamp_min_(shares, 1.0)
    torch._foreach_reciprocal_(shares)
    found, parts, factors = [], [], []
    for (dw, db), share in zip(changes, shares, strict=True):
        if isinstance(dw, Factored):
            dw = matrixwise(share) * dw
        else:
            parts.append(dw)
            factors.append(matrixwise(share))
        if db is not None:
            parts.append(db)
            factors.append(vectorwise(share))
        found.append((dw, db))
    if parts:
        torch._foreach_mul_(parts, factors)
    return found
