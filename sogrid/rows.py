"""What a layer saw, as rows of its linear map a = W h + b, and where statistics of rows meet others.

Index letters: n example, s position at which the layer's weight is used (token, patch, time step, or one of
several uses in a forward pass; one for a plain layer), i input, o output.

A layer that shares its weight over positions has two Kronecker factorisations (Eschenhagen et al. 2023); with
one position they are the same:

* *expand* takes every position for an example: inputs and gradients of all n·s rows. Exact where A ⊗ B is for
  one position, and each has an output and a loss of its own: linear layers on each token, the quadratic loss;
* *reduce* takes an example's positions together: the mean of its inputs, the sum of its gradients
  (:attr:`Rows.reduced`). Exact where A ⊗ B is for these: the same layers, their outputs averaged before the
  loss; and where all positions of an example have one input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sogrid.statistics import Statistics

__all__ = ["SHARED", "Rows", "share"]

SHARED = ("expand", "reduce")
"""How positions become statistics; see the module."""


class Rows(NamedTuple):
    """One layer's view of a minibatch. Leading dimensions, as in a grid of configurations, come before n.

    Attributes:
        h: Inputs, ``[n, s, i]``.
        g: Per-example, un-normalised gradients at the output, ``[n, s, o]``.
        probes: Vectors at the model's output pulled back to the layer's, ``[n, s, o]`` each.
        examples: n of the loss. Means over examples are over this number, whatever the number of rows.
        biased: Whether the layer has a bias that is trained.
        parts: (n, s) of parts with other numbers of positions, whose rows are one after the other, as if all
            were one example's; empty if it is one block.
    """

    h: Tensor
    g: Tensor
    probes: tuple[Tensor, ...] = ()
    examples: int = 0
    biased: bool = True
    parts: tuple[tuple[int, int], ...] = ()

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

    @property
    def blocks(self) -> list[Rows]:
        """The same by example, ``[n, s, ·]`` each, in one block or several of other numbers of positions."""
        if not self.parts:
            return [self]
        h, g, *probes = (_blocks(rows, self.parts) for rows in (self.h, self.g, *self.probes))
        probes = zip(*probes, strict=True) if probes else [()] * len(h)
        whole = self._replace(parts=())
        return [whole._replace(h=a, g=b, probes=c) for a, b, c in zip(h, g, probes, strict=True)]

    @property
    def reduced(self) -> Rows:
        """One position an example, with the mean of its inputs, the sums of its gradients and its probes."""
        blocks = self.blocks
        h = torch.cat([block.h.mean(-2, keepdim=True) for block in blocks], -3)
        g = torch.cat([block.g.sum(-2, keepdim=True) for block in blocks], -3)
        probes = zip(*(block.probes for block in blocks), strict=True)
        probes = tuple(torch.cat([p.sum(-2, keepdim=True) for p in some], -3) for some in probes)
        return self._replace(h=h, g=g, probes=probes, parts=())


def _blocks(rows: Tensor, parts: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """``[1, Σ n·s, ·]`` as ``[n, s, ·]`` of each part."""
    split = rows.squeeze(-3).split([n * s for n, s in parts], -2)
    return [some.unflatten(-2, part) for some, part in zip(split, parts, strict=True)]


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
