r"""Eigenvalue-corrected Kronecker factorisation, EKFAC (George et al. 2018, by the thesis's author).

KFAC's A ⊗ B = (U_A ⊗ U_B)(Λ_A ⊗ Λ_B)(U_A ⊗ U_B)ᵀ has the eigenvalues of a product of means. EKFAC keeps the
basis and takes in the place of these the second moments of the examples' gradients along it,

    S = E[(U_Bᵀ G_n U_A)²],    [ΔW, Δb] = −λ U_B [U_Bᵀ [∇W, ∇b] U_A / (S + ε)] U_Aᵀ

elementwise, G_n = Σ_s g h̃ᵀ of example n. Of all matrices that are diagonal in this basis it is the nearest
to the exact block E[vec(G_n) vec(G_n)ᵀ], in Frobenius norm, so never further from it than KFAC. ε is added to
the block itself (Tikhonov), as the factors never are inverted.

Basis and second moments are those of the statistics minibatch; an average over earlier ones (``averaging``)
is of the factors alone, since each basis has moments of its own.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from sogrid.factorize import eigenvectors
from sogrid.kronecker import homogeneous, homogeneous_gradient
from sogrid.losses import Loss
from sogrid.optimizers.kfac import KFACMethod
from sogrid.optimizers.layerwise import Layerwise, StatisticsOptions
from sogrid.structured import Factored, matrixwise

__all__ = ["EKFAC", "EKFACMethod", "ekfac_moments", "ekfac_update"]

MOST = 2**24
"""Numbers that gradients of examples may take at once."""


def ekfac_moments(h: Tensor, g: Tensor, a_basis: Tensor, b_basis: Tensor) -> Tensor:
    """Σ_n (U_Bᵀ G_n U_A)², ``[..., o, i]``, with G_n = Σ_s g h̃ᵀ.

    Args:
        h: h̃, ``[..., n, s, i]``, with its homogeneous coordinate if there is a bias.
        g: ``[..., n, s, o]``.
        a_basis: U_A, ``[..., i, i]``, eigenvectors as columns.
        b_basis: U_B, ``[..., o, o]``.
    """
    h, g = h @ a_basis.unsqueeze(-3), g @ b_basis.unsqueeze(-3)
    if h.shape[-2] == 1:  # a product of two vectors, whose square is that of their squares
        return g.squeeze(-2).square().mT @ h.squeeze(-2).square()
    few = max(1, MOST // (g.shape[-1] * h.shape[-1]))
    parts = zip(g.split(few, -3), h.split(few, -3), strict=True)
    return sum((some_g.mT @ some_h).square().sum(-3) for some_g, some_h in parts)


def ekfac_update(
    grad_w: Tensor | Factored,
    grad_b: Tensor | None,
    a_basis: Tensor,
    b_basis: Tensor,
    moments: Tensor,
    *,
    lr: float | Tensor,
    damping: float | Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(ΔW, Δb) = −λ U_B [U_Bᵀ [∇W, ∇b] U_A / (S + ε)] U_Aᵀ.

    Args:
        grad_w: ∇W of the mean loss, ``[..., o, i]``, or its factors.
        grad_b: ∇b, ``[..., o]`` or ``None``.
        a_basis: U_A, ``[..., i + 1, i + 1]``, or ``[..., i, i]`` without a bias.
        b_basis: U_B, ``[..., o, o]``.
        moments: S, ``[..., o, i + 1]`` or ``[..., o, i]``.
        lr: λ, a number or ``[...]``, as is ε.
        damping: ε.
    """
    gradient = grad_w if grad_b is None else homogeneous_gradient(grad_w, grad_b)
    along = b_basis.mT @ gradient @ a_basis
    along = along.dense() if isinstance(along, Factored) else along
    step = -matrixwise(lr) * (b_basis @ (along / (moments + matrixwise(damping))) @ a_basis.mT)
    return (step, None) if grad_b is None else (step[..., :-1], step[..., -1])


class EKFACMethod(KFACMethod):
    """EKFAC as verbs: KFAC's statistics, their eigenvectors, the moments along these."""

    uses_moments = by_example = True

    def check(self, group):  # noqa: D102
        super().check(group)
        if group["rank"] is not None:
            raise ValueError("EKFAC has no rank: it inverts no factor")

    def keeps(self, group):  # noqa: D102
        return {"a_basis", "b_basis", "moments"}

    def invert(self, statistics, group, name):  # noqa: D102
        _, a, b = statistics
        return {
            "a_basis": eigenvectors(a, f"{name}, input factor"),
            "b_basis": eigenvectors(b, f"{name}, output factor"),
        }

    def moments(self, rows, state, group):  # noqa: D102
        bases, total = (state["a_basis"], state["b_basis"]), 0
        for block in rows.blocks:
            passes = block.probes if self.curvature.startswith("fisher") else (block.g,)
            h = homogeneous(block.h) if rows.biased else block.h
            total = total + sum(ekfac_moments(h, g, *bases) for g in passes)
        return total / rows.examples

    def quadratic_form(self, h, mean_h, biased, state, group):  # noqa: D102
        along = (homogeneous(h) if biased else h) @ state["a_basis"]
        moments = state["moments"].mean(-2, keepdim=True)
        return (along.square() / (moments + matrixwise(group["damping"]))).sum(-1).mean(-1)

    def update(self, gradient, state, group):  # noqa: D102
        bases = state["a_basis"], state["b_basis"], state["moments"]
        return ekfac_update(gradient.w, gradient.b, *bases, lr=group["lr"], damping=group["damping"])


class EKFAC(Layerwise):
    """EKFAC for the layers of a model.

    Its step multiplies by two bases from either side, about twice what KFAC's does; no ``rank``.

    Args:
        model: See :class:`~sogrid.optimizers.kfac.KFAC`.
        lr: Learning rate λ.
        damping: ε > 0, added to the second moments.
        loss: What the training loss is.
        curvature: As in :class:`~sogrid.optimizers.kfac.KFAC`. With the exact Fisher of a sequence of outputs
            the moments have products of its positions; the sampled one has none in expectation.
        samples: As there.
        seed: As there.
        shared: As there; it is of the basis alone, the moments are exact for either, where a layer has the
            examples first. What is flattened to ``[n·positions, i]`` counts as so many examples.
        **options: ``refresh_every``, ``averaging`` and ``output``, see
            :class:`~sogrid.optimizers.layerwise.Layerwise`; all others but ``reduction``, see
            :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: As :class:`~sogrid.optimizers.kfac.KFAC`.
        ValueError: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 0.1,
        *,
        loss: Loss,
        curvature: str = "fisher_sampled",
        samples: int = 1,
        seed: int = 0,
        shared: str = "expand",
        **options: Unpack[StatisticsOptions],
    ) -> None:
        """See the class."""
        self._require_loss(loss)
        method = EKFACMethod(loss, curvature, samples, seed, shared)
        super().__init__(method, model, lr, {"damping": damping}, reduction=loss.reduction, **options)
