r"""Amortized covariance preconditioner, ACP (Thesis §6.3.2, Algorithm 4).

Of the Gauss-Newton block of a layer, ACP keeps the input side and replaces the output side by a
scalar: G ≈ A ⊗ αI, A = (1/n) Σ h̃h̃ᵀ (eq. 6.2.3). Inverting the bordered A separates weights from
biases and makes the covariance C of the inputs appear (eqs. 6.2.4, 6.2.5):

    ΔW = −(λ/α) (1/n) Σ g_i (h_i − h̄)ᵀ P,    P = (C + (ε/α) I)⁻¹,    Δb = −(λ/α) ḡ  [− ΔW h̄]

C and, for the heuristic, α = max (g_i)_j² come from a statistics minibatch every N updates; the mean
h̄ is the current minibatch's. Where the thesis is open, this is what we chose:

* the heuristic α is frozen at the refresh, in P and in λ/α alike;
* the bracketed term of eq. (6.2.5) is off by default, as Algorithm 4 prints it (erratum E17);
* the *printed* damping adds ε/α to C only. Tikhonov damping of the whole block, A + (ε/α) I, is
  something else (erratum E16, THESIS rows 21–24): with d = ε/α, P = (M + dI − h̄h̄ᵀ/(1+d))⁻¹ for the
  second moment M, centring by h̄/(1+d), and a bias step divided by 1 + d. ``tikhonov="exact"``
  gives that, with h̄ from the statistics minibatch, bias term included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sogrid.linalg import (
    Factored,
    Gram,
    ThinInverse,
    add_outer,
    matrixwise,
    naming_the_damping,
    tikhonov_inverse,
    vectorwise,
)
from sogrid.optimizers.base import check_hyperparameter
from sogrid.optimizers.centered import bias_update, centered_gradient
from sogrid.optimizers.layerwise import Layerwise, StatisticsBatch
from sogrid.statistics import Statistics, input_rows, second_moment, squared_gradient_bound

__all__ = ["ACP", "acp_inverse", "acp_update"]


def acp_inverse(
    mean_h: Tensor,
    covariance: Tensor | Gram,
    shift: float | Tensor,
    tikhonov: str = "printed",
    name: str = "matrix",
    rank: int | None = None,
) -> Tensor | ThinInverse:
    """P, ``[..., i, i]``: the inverse that multiplies the centred gradient.

    Args:
        mean_h: h̄ of the statistics minibatch, ``[..., i]`` (used by the exact form).
        covariance: C, ``[..., i, i]``, or its rows.
        shift: d = ε/α, a number or ``[...]``.
        tikhonov: ``"printed"``: (C + dI)⁻¹; ``"exact"``: (M + dI − h̄h̄ᵀ/(1+d))⁻¹, M = C + h̄h̄ᵀ.
        name: Named in errors.
        rank: Of the matrix that is shifted; see :func:`~sogrid.linalg.tikhonov_inverse`.

    Raises:
        FactorizationError: If the damped matrix is not positive definite.
    """
    if tikhonov == "exact":
        covariance = add_outer(covariance, mean_h, shift / (1 + shift))
    return tikhonov_inverse(covariance, shift, name, rank)


def acp_update(
    grad_w: Tensor | Factored,
    grad_b: Tensor | None,
    mean_h: Tensor,
    inverse: Tensor | ThinInverse,
    *,
    lr: float | Tensor,
    output_curvature: float | Tensor = 1.0,
    bias_correction: bool = False,
    corner: float | Tensor = 0.0,
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb) of Algorithm 4, eqs. (6.2.4) and (6.2.5).

    Args:
        grad_w: ∇W of the mean loss, ``[..., o, i]``; if it is factored, ΔW may be.
        grad_b: ∇b, ``[..., o]``, or ``None`` for a layer without bias, which is not centred.
        mean_h: h̄, ``[..., i]``.
        inverse: P, ``[..., i, i]``, of :func:`acp_inverse`.
        lr: λ, a number or ``[...]``, as are α and d.
        output_curvature: α.
        bias_correction: Add −ΔW h̄ to Δb (eq. 6.2.5).
        corner: d of the exact Tikhonov form, which divides h̄ and Δb by 1 + d; 0 for the printed form.
    """
    if isinstance(corner, Tensor) or corner:
        mean_h = mean_h / vectorwise(1 + corner)
    dw = -matrixwise(lr / output_curvature) * centered_gradient(grad_w, grad_b, mean_h) @ inverse
    rate = lr / (output_curvature * (1 + corner))
    return dw, bias_update(grad_b, dw, mean_h, rate, bias_correction)


class ACP(Layerwise):
    """Algorithm 4 for the linear layers of a model.

    A minibatch of one has no deviation from its own mean: only biases move (printed form).

    Args:
        model: See :class:`~sogrid.optimizers.layerwise.Layerwise`.
        lr: Learning rate λ; the step is proportional to λ/α.
        damping: ε ≥ 0; ε/α is added to the covariance of the inputs. The larger, the nearer to centred
            gradient descent with learning rate λ/ε. Zero needs an invertible covariance.
        output_curvature: α > 0, or ``"heuristic"``: max of the squared per-example gradients, by layer
            and refresh.
        bias_correction: Add the term −ΔW h̄ of eq. (6.2.5) to the bias; off in the printed algorithm.
        tikhonov: ``"printed"`` or ``"exact"``; see the module. The exact form includes the bias term.
        curvature_floor: Smallest α the heuristic may return.
        reduction: How the training loss is reduced over examples: ``"mean"`` or ``"sum"``.
        refresh_every: N, updates between refreshes of the statistics; ``None``: only by ``refresh``.
        averaging: ρ in [0, 1), weight of the old statistics at a refresh.
        other_lr: Learning rate of plain SGD for parameters outside linear layers.
        params: What to train, as in torch; default all trainable parameters.
        gradients: ``"matrix"`` or ``"factored"``; see :class:`~sogrid.optimizers.layerwise.Layerwise`.
        max_change: κ, a bound on the change of pre-activations; see there.
        rank: Only so many leading directions of each matrix of the statistics count; see there. ``None``:
            all, exact.

    Raises:
        ValueError: As in :class:`~sogrid.optimizers.layerwise.Layerwise`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> optimizer = ACP(model, lr=0.1, damping=0.1)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 1.0,
        *,
        output_curvature: float | Tensor | str = 1.0,
        bias_correction: bool = False,
        tikhonov: str = "printed",
        curvature_floor: float = 1e-12,
        reduction: str = "mean",
        refresh_every: int | None = 100,
        averaging: float = 0.0,
        other_lr: float | Tensor | None = None,
        params=None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = None,
        rank: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            model,
            lr,
            damping=damping,
            output_curvature=output_curvature,
            bias_correction=bias_correction,
            tikhonov=tikhonov,
            curvature_floor=curvature_floor,
            reduction=reduction,
            refresh_every=refresh_every,
            averaging=averaging,
            other_lr=other_lr,
            params=params,
            gradients=gradients,
            max_change=max_change,
            rank=rank,
        )

    def check_hyperparameters(self, group):  # noqa: D102
        super().check_hyperparameters(group)
        check_hyperparameter("damping (ε)", group["damping"])
        check_hyperparameter("curvature_floor", group["curvature_floor"], positive=True)
        if not isinstance(group["output_curvature"], str):
            check_hyperparameter("output_curvature (α)", group["output_curvature"], positive=True)
        elif group["output_curvature"] != "heuristic":
            raise ValueError(
                f"output_curvature (α) must be a number or 'heuristic', got {group['output_curvature']!r}"
            )
        if group["tikhonov"] not in ("printed", "exact"):
            raise ValueError(f"tikhonov must be 'printed' or 'exact', got {group['tikhonov']!r}")

    def measure(self, batch: StatisticsBatch, group):  # noqa: D102
        alpha = None
        if isinstance(group["output_curvature"], str):
            alpha = squared_gradient_bound(batch.g).clamp(min=group["curvature_floor"])
        mean, rows = input_rows(batch.h, batch.has_bias)
        return Statistics(mean, second_moment(rows), alpha)

    def invert(self, statistics, group, name):  # noqa: D102
        mean, covariance, alpha = statistics
        scale = group["output_curvature"] if alpha is None else alpha
        shift = group["damping"] / scale
        with naming_the_damping(lambda shift: shift * scale):
            inverse = acp_inverse(mean, covariance, shift, group["tikhonov"], name, group["rank"])
        state = {"inverse": inverse}
        if group["tikhonov"] == "exact":
            corner = (torch.ones_like(mean[..., 0]) * shift).to(mean.dtype)  # as_tensor would sync
            state |= {"mean": mean, "corner": corner}
        if alpha is not None:
            state["output_curvature"] = alpha
        return state

    def update(self, grad_w, grad_b, mean_h, state, group):  # noqa: D102
        exact = group["tikhonov"] == "exact"
        return acp_update(
            grad_w,
            grad_b,
            state["mean"] if exact else mean_h,
            state["inverse"],
            lr=group["lr"],
            output_curvature=state.get("output_curvature", group["output_curvature"]),
            bias_correction=exact or group["bias_correction"],
            corner=state["corner"] if exact else 0.0,
        )
