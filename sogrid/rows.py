"""What a layer saw, as rows of its linear map a = W h + b, and where statistics of rows meet others.

Index letters: n example, s position at which the layer's weight is used (token, patch, time step, or one of
several uses in a forward pass; one for a plain layer), i input, o output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sogrid.statistics import Statistics

__all__ = ["Rows", "share"]


class Rows(NamedTuple):
    """One layer's view of a minibatch. Leading dimensions, as in a grid of configurations, come before n.

    Attributes:
        h: Inputs, ``[n, s, i]``.
        g: Per-example, un-normalised gradients at the output, ``[n, s, o]``.
        probes: Vectors at the model's output pulled back to the layer's, ``[n, s, o]`` each.
        examples: n of the loss. Means over examples are over this number, whatever the number of rows.
        biased: Whether the layer has a bias that is trained.
    """

    h: Tensor
    g: Tensor
    probes: tuple[Tensor, ...] = ()
    examples: int = 0
    biased: bool = True

    @property
    def inputs(self) -> Tensor:
        """One row for each use, ``[n·s, i]``."""
        return self.h.flatten(-3, -2)

    @property
    def outputs(self) -> Tensor:
        """The gradients there, ``[n·s, o]``."""
        return self.g.flatten(-3, -2)

    @property
    def pulled(self) -> list[Tensor]:
        """The probes there, ``[n·s, o]`` each."""
        return [probe.flatten(-3, -2) for probe in self.probes]

    @property
    def product(self) -> Tensor:
        """Σ g hᵀ / n, ``[o, i]``: the gradient of the mean loss. The contract of every layer rule."""
        return torch.einsum("...nso,...nsi->...oi", self.g, self.h) / self.examples


def share(found: Statistics, older: Statistics | None, decay: float) -> Statistics:
    """What is kept of new statistics: the only place where they meet those of earlier minibatches.

    Args:
        found: Of this minibatch; with several processes, of all (:func:`sogrid.ranks.joined`).
        older: What was kept before, if anything.
        decay: ρ, its weight.
    """
    if decay == 0:
        return found
    found = found.dense()
    return found if older is None else older.blend(found, decay)
