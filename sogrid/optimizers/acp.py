r"""Amortized covariance preconditioner, ACP (Thesis §6.3.2, Algorithm 4).

Of the Gauss-Newton block of a layer, ACP keeps the input side and replaces the output side by a
scalar: G ≈ A ⊗ αI, A = (1/n) Σ h̃h̃ᵀ (eq. 6.2.3). Inverting the bordered A separates weights from
biases and makes the covariance C of the inputs appear (eqs. 6.2.4, 6.2.5):

    ΔW = −(λ/α) (1/n) Σ g_i (h_i − h̄)ᵀ P,    P = (C + (ε/α) I)⁻¹,    Δb = −(λ/α) ḡ  [− ΔW h̄]

The two are the least-squares fit of ΔW h + Δb to −(λ/α) g, whatever rows it is over. Where a weight is
used at s positions of an example (tokens, patches) the rows are its n·s uses: h̄, C and the exact bias term
are over examples and positions, ∇W and ∇b sum over positions as ever, and each use moves by −(sλ/α) g, as
nearly as one W and b can. The block of such a layer is s times A ⊗ αI; this s is left to λ/α.

C and, for the heuristic, α = max (g_i)_j² come from a statistics minibatch every N updates; the mean
h̄ is the current minibatch's. Where the thesis is open, this is what we chose:

* the heuristic α is frozen at the refresh, in P and in λ/α alike;
* the bracketed term of eq. (6.2.5) is there by default; Algorithm 4 prints the step without (erratum E17);
* the *printed* damping adds ε/α to C only. Tikhonov damping of the whole block, A + (ε/α) I, is
  something else (erratum E16, THESIS rows 21–24): with d = ε/α, P = (M + dI − h̄h̄ᵀ/(1+d))⁻¹ for the
  second moment M, centring by h̄/(1+d), and a bias step divided by 1 + d. ``tikhonov="exact"``
  gives that, with h̄ from the statistics minibatch, bias term included.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from sogrid.factorize import naming_the_damping, tikhonov_inverse
from sogrid.method import LayerMethod
from sogrid.optimizers.centered import bias_update, centered_gradient
from sogrid.optimizers.layerwise import Layerwise, StatisticsOptions
from sogrid.parameters import check_hyperparameter
from sogrid.statistics import Statistics, input_rows, second_moment, squared_gradient_bound
from sogrid.structured import Factored, Gram, ThinInverse, add_outer, product, quadratic_form, vectorwise

__all__ = ["ACP", "ACPMethod", "acp_inverse", "acp_update"]


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
        rank: Of the matrix that is shifted; see :func:`~sogrid.factorize.tikhonov_inverse`.

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
    dw = product(-lr / output_curvature, centered_gradient(grad_w, grad_b, mean_h), inverse)
    rate = lr / (output_curvature * (1 + corner))
    return dw, bias_update(grad_b, dw, mean_h, rate, bias_correction)


class ACPMethod(LayerMethod):
    """Algorithm 4 as verbs.

    Args:
        stored_mean: Centre by the mean of the statistics minibatch in place of the update's own, as the
            exact Tikhonov form does in any case.
    """

    def __init__(self, stored_mean: bool = False) -> None:
        """See the class."""
        self.stored_mean, self.uses_mean = stored_mean, not stored_mean

    def check(self, group):  # noqa: D102
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

    def needs_gradients(self, group):  # noqa: D102
        return isinstance(group["output_curvature"], str)

    def measure(self, rows, group):  # noqa: D102
        alpha = None
        if isinstance(group["output_curvature"], str):
            alpha = squared_gradient_bound(rows.outputs).clamp(min=group["curvature_floor"])
        mean, deviations = input_rows(rows.inputs, rows.biased)
        return Statistics(mean, second_moment(deviations), alpha)

    def keeps(self, group):  # noqa: D102
        exact = group["tikhonov"] == "exact"
        return {"inverse", *["mean"] * (exact or self.stored_mean), *["corner"] * exact}

    def invert(self, statistics, group, name):  # noqa: D102
        mean, covariance, alpha = statistics
        scale = group["output_curvature"] if alpha is None else alpha
        shift, exact = group["damping"] / scale, group["tikhonov"] == "exact"
        with naming_the_damping(lambda shift: shift * scale):
            inverse = acp_inverse(mean, covariance, shift, group["tikhonov"], name, group["rank"])
        state = {"inverse": inverse}
        if exact or self.stored_mean:
            state["mean"] = mean
        if exact:
            state["corner"] = (torch.ones_like(mean[..., 0]) * shift).to(mean.dtype)  # as_tensor would sync
        if alpha is not None:
            state["output_curvature"] = alpha
        return state

    def quadratic_form(self, h, mean_h, biased, state, group):  # noqa: D102
        if biased:
            h = h - state.get("mean", mean_h).unsqueeze(-2)
        return quadratic_form(h, state["inverse"])

    def update(self, gradient, state, group):  # noqa: D102
        exact = group["tikhonov"] == "exact"
        return acp_update(
            gradient.w,
            gradient.b,
            state["mean"] if exact or self.stored_mean else gradient.mean_h,
            state["inverse"],
            lr=group["lr"],
            output_curvature=state.get("output_curvature", group["output_curvature"]),
            bias_correction=exact or group["bias_correction"],
            corner=state["corner"] if exact else 0.0,
        )


class ACP(Layerwise):
    """Algorithm 4 for the layers of a model.

    A minibatch of one has no deviation from its own mean: only biases move (printed form).

    Args:
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: Learning rate λ; the step is proportional to λ/α.
        damping: ε ≥ 0; ε/α is added to the covariance of the inputs. The larger, the nearer to centred
            gradient descent with learning rate λ/ε. Zero needs an invertible covariance.
        output_curvature: α > 0, or ``"heuristic"``: max of the squared per-example gradients, by layer
            (of a convolution with groups, by group) and refresh.
        bias_correction: Add the term −ΔW h̄ of eq. (6.2.5) to the bias, without which the step does not always
            descend; the printed algorithm is without.
        tikhonov: ``"printed"`` or ``"exact"``; see the module. The exact form includes the bias term.
        curvature_floor: Smallest α the heuristic may return.
        stored_mean: Centre by the mean of the statistics minibatch in place of the update's own.
        **options: ``refresh_every``, ``averaging``, ``rank`` and ``output``, see
            :class:`~sogrid.optimizers.layerwise.Layerwise`; ``reduction``, ``other``, ``params``,
            ``gradients`` and ``max_change``, see :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> optimizer = ACP(model, lr=10.0)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 0.1,
        *,
        output_curvature: float | Tensor | str = 1.0,
        bias_correction: bool = True,
        tikhonov: str = "printed",
        curvature_floor: float = 1e-12,
        stored_mean: bool = False,
        **options: Unpack[StatisticsOptions],
    ) -> None:
        """See the class."""
        own = {
            "damping": damping,
            "output_curvature": output_curvature,
            "bias_correction": bias_correction,
            "tikhonov": tikhonov,
            "curvature_floor": curvature_floor,
        }
        super().__init__(ACPMethod(stored_mean), model, lr, own, **options)
