r"""One small layer on which the steps of ACP's relatives are compared, on the page *Since 2017*.

The layer a = W h + b has a tanh and a linear layer above it, and the quadratic loss; its inputs have a mean
of a length that is asked for, and nothing else of the task depends on that: as the mean grows, the bias moves
so that the pre-activations stay. Every matrix is exact, over all examples.

Index letters: n example, i input, o output of the layer, k output of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sogrid.kronecker import bordered, homogeneous, homogeneous_gradient, vec
from sogrid.statistics import input_moments, output_factor

__all__ = ["Layer", "draw", "share"]


class Layer(NamedTuple):
    """What a layer saw, in float64.

    Attributes:
        h: Inputs, ``[n, i]``.
        g: Gradients of each example's loss at the pre-activations, ``[n, o]``.
        rows: S J_a with SᵀS the second derivative of the loss in the output, ``[n, k, o]``.
    """

    h: Tensor
    g: Tensor
    rows: Tensor

    @property
    def grad_w(self) -> Tensor:
        """∇W, ``[o, i]``."""
        return self.g.mT @ self.h / len(self.h)

    @property
    def grad_b(self) -> Tensor:
        """∇b, ``[o]``."""
        return self.g.mean(0)

    @property
    def mean_h(self) -> Tensor:
        """h̄, ``[i]``."""
        return self.h.mean(0)

    @property
    def C(self) -> Tensor:
        """Covariance of the inputs, ``[i, i]``."""
        return input_moments(self.h)[1]

    @property
    def M(self) -> Tensor:
        """Their second moment, ``[i, i]``."""
        return input_moments(self.h, centered=False)[1]

    @property
    def A(self) -> Tensor:
        """That of h̃ = [h; 1], ``[i + 1, i + 1]``."""
        return bordered(self.C, self.mean_h)

    @property
    def B(self) -> Tensor:
        """KFAC's output factor, ``[o, o]``."""
        return output_factor(self.rows.unbind(1))

    @property
    def G(self) -> Tensor:
        """The exact Gauss-Newton block in the thesis's order [vec(W); b], ``[(i + 1)·o, (i + 1)·o]``."""
        jacobian = torch.einsum("ni,nko->nkio", homogeneous(self.h), self.rows).flatten(-2)
        return torch.einsum("nkp,nkq->pq", jacobian, jacobian) / len(self.h)


def draw(mean: float, seed: int = 0, n: int = 300, sizes: tuple[int, int, int] = (6, 4, 3)) -> Layer:
    """A layer of random weights and inputs, whose targets come from a teacher near by.

    Args:
        mean: Length of the inputs' mean, where their standard deviation is about one.
        seed: Of everything else.
        n: Examples.
        sizes: Inputs and outputs of the layer, and outputs of the network.
    """
    n_in, n_out, k = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    deviations, direction = normal(n, n_in) @ normal(n_in, n_in) / n_in**0.5, normal(n_in)
    deviations = deviations - deviations.mean(0)
    h = deviations + mean * direction / direction.norm()
    teacher, above = normal(n_out, n_in) / n_in**0.5, normal(k, n_out) / n_out**0.5
    W, shift = teacher + 0.5 * normal(n_out, n_in) / n_in**0.5, 0.3 * normal(n_out)
    y = torch.tanh(deviations @ teacher.mT) @ above.mT + 0.1 * normal(n, k)
    hidden = torch.tanh(deviations @ W.mT + shift)  # of W h + b with b = shift − W h̄
    slopes = above * (1 - hidden.square()).unsqueeze(1)
    g = torch.einsum("nko,nk->no", slopes, 2 * (hidden @ above.mT - y))
    return Layer(h, g, 2**0.5 * slopes)


def share(layer: Layer, dw: Tensor, db: Tensor, apart: bool = False) -> float:
    r"""The decrease of the quadratic model along a step, as a share of that along the exact one.

    Both of their best length. With the gradient v and the Gauss-Newton block G this is
    (vᵀd)² / (dᵀGd · vᵀG⁻¹v): the squared cosine of the angle between d and the exact step, measured by G.

    Args:
        layer: The layer.
        dw: ΔW up to its length, ``[o, i]``.
        db: Δb likewise, ``[o]``.
        apart: Whether weights and bias each have a best length of their own.
    """
    v, parts = vec(homogeneous_gradient(layer.grad_w, layer.grad_b)), [(dw, db)]
    if apart:
        parts = [(dw, 0 * db), (0 * dw, db)]
    d = torch.stack([vec(homogeneous_gradient(w, b)) for w, b in parts], -1)
    along, best = v @ d, v @ torch.linalg.solve(layer.G, v)
    return float(along @ torch.linalg.solve(d.mT @ layer.G @ d, along) / best)
