r"""Kronecker-factored approximate curvature, KFAC (Thesis §6.4.1; Martens & Grosse 2015).

Of the exact sum of Kronecker products (1/n) Σ h̃h̃ᵀ ⊗ JᵀDJ (eq. 6.2.2) KFAC keeps the product of the
means, A ⊗ B with A = E[h̃h̃ᵀ], B = E[JᵀDJ], and steps by

    [ΔW, Δb] = −λ B⁻¹ [∇W, ∇b] A⁻¹

Which curvature B stands for is a name, never a default guessed from the loss:

* ``"fisher_exact"``: the rows of S, SᵀS = D(f), pulled back one by one: as many backward passes as the
  network has outputs (the thesis's natural-gradient KFAC);
* ``"fisher_sampled"``: gradients for targets drawn from the model, an unbiased estimate of the same;
* ``"gauss_newton_probabilities"``: E[g gᵀ] with the observed labels, which for one-hot cross-entropy
  is the Gauss-Newton matrix cut at the probabilities (Thesis §3.4);
* ``"empirical_fisher"``: the same computation for any loss, under the name it then deserves.

Damping: the thesis does not say. ε is split over the two factors, A + π√ε I and B + (√ε/π) I, with
π = √(mean eigenvalue of A / mean eigenvalue of B) or, without ``pi_correction``, π = 1. Neither is
A ⊗ B + εI, which does not factor (THESIS row 25).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor, nn

from sogrid.capture import CaptureError
from sogrid.factorize import naming_the_damping, tikhonov_inverse
from sogrid.kronecker import homogeneous, homogeneous_gradient, kronecker_solve
from sogrid.losses import CrossEntropyAtLogits, CrossEntropyAtProbabilities, Loss
from sogrid.method import LayerMethod
from sogrid.optimizers.layerwise import Layerwise, StatisticsOptions
from sogrid.parameters import check_count, check_hyperparameter
from sogrid.rows import SHARED
from sogrid.statistics import Statistics, input_rows, output_rows, second_moment
from sogrid.structured import Factored, Gram, ThinInverse, mean_eigenvalue, quadratic_form

__all__ = ["KFAC", "KFACMethod", "kfac_inverses", "kfac_update", "output_vectors"]

CURVATURES = ("fisher_exact", "fisher_sampled", "gauss_newton_probabilities", "empirical_fisher")
MOST_EXACT_OUTPUTS = 128

MOST_PASSES = 1 << 12
"""Of an update: the streams of one process end where those of the next begin."""


def output_vectors(f: Tensor, *, loss: Loss, samples: int | None, seed: int) -> Iterator[Tensor]:
    """Vectors v at the output f, ``[n, k]`` each, with Σ v vᵀ = D(f): exactly, or in expectation.

    Args:
        f: The network's output, ``[n, k]``.
        loss: Tells D(f) and how to draw targets.
        samples: Draws per example; ``None`` for the k exact rows.
        seed: Of the draws.

    Raises:
        ValueError: If exact rows are asked of more than 128 outputs.
    """
    if samples is None:
        if f.shape[-1] > MOST_EXACT_OUTPUTS:
            raise ValueError(
                f"the exact Fisher of {f.shape[-1]} outputs needs that many backward passes: "
                "use curvature='fisher_sampled'"
            )
        yield from loss.fisher_factor(f).unbind(-2)
        return
    generator = torch.Generator(f.device).manual_seed(seed)
    for _ in range(samples):
        yield loss.score(f, loss.sample(f, generator)) * samples**-0.5


def kfac_inverses(
    a: Tensor | Gram,
    b: Tensor | Gram,
    damping: float | Tensor,
    pi_correction: bool = True,
    name: str = "matrix",
    rank: int | None = None,
) -> tuple[Tensor | ThinInverse, Tensor | ThinInverse]:
    """(A + π√ε I)⁻¹ ``[..., i, i]`` and (B + (√ε/π) I)⁻¹ ``[..., o, o]``.

    Args:
        a: A, ``[..., i, i]`` (i counts the homogeneous coordinate), or its rows.
        b: B, ``[..., o, o]``, or its rows.
        damping: ε, a number or ``[...]``.
        pi_correction: Balance the split by the factors' mean eigenvalues.
        name: Named in errors.
        rank: Of both factors, after π; see :func:`~sogrid.factorize.tikhonov_inverse`.

    Raises:
        FactorizationError: If a damped factor is not positive definite.
    """
    root = damping**0.5
    if pi_correction:
        mean_a, mean_b = mean_eigenvalue(a), mean_eigenvalue(b)
        tiny = torch.finfo(mean_a.dtype).tiny
        pi = (mean_a.clamp(min=tiny) / mean_b.clamp(min=tiny)).sqrt().clamp(1e-6, 1e6)
    else:
        pi = 1.0
    with naming_the_damping(lambda shift: (shift / pi) ** 2):
        a_inverse = tikhonov_inverse(a, root * pi, f"{name}, input factor", rank)
    with naming_the_damping(lambda shift: (shift * pi) ** 2):
        b_inverse = tikhonov_inverse(b, root / pi, f"{name}, output factor", rank)
    return a_inverse, b_inverse


def kfac_update(
    grad_w: Tensor | Factored,
    grad_b: Tensor | None,
    a_inverse: Tensor | ThinInverse,
    b_inverse: Tensor | ThinInverse,
    *,
    lr: float | Tensor,
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb) = −λ B⁻¹ [∇W, ∇b] A⁻¹.

    Args:
        grad_w: ∇W of the mean loss, ``[..., o, i]``; if it is factored, ΔW may be.
        grad_b: ∇b, ``[..., o]`` or ``None``.
        a_inverse: ``[..., i + 1, i + 1]``, or ``[..., i, i]`` without a bias.
        b_inverse: ``[..., o, o]``.
        lr: λ, a number or ``[...]``.
    """
    gradient = grad_w if grad_b is None else homogeneous_gradient(grad_w, grad_b)
    step = kronecker_solve(a_inverse, b_inverse, gradient, -lr)
    return (step, None) if grad_b is None else (step[..., :-1], step[..., -1])


class KFACMethod(LayerMethod):
    """KFAC as verbs.

    Args:
        loss: What the training loss is.
        curvature: What the output factor stands for; see the module.
        samples: Draws per example for ``"fisher_sampled"``.
        seed: Of the draws.
        shared: How positions become statistics; see :mod:`sogrid.rows`.

    Raises:
        ValueError: For a curvature that does not go with the loss, and for another ``shared``.
    """

    uses_mean = False

    def __init__(self, loss: Loss, curvature: str, samples: int, seed: int, shared: str = "expand") -> None:
        """See the class."""
        if curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {CURVATURES}, got {curvature!r}")
        categorical = isinstance(loss, CrossEntropyAtLogits | CrossEntropyAtProbabilities)
        if curvature == "gauss_newton_probabilities" and not categorical:
            raise ValueError(
                f"E[g gᵀ] is the Gauss-Newton matrix only for one-hot cross-entropy, not for {loss!r}: use "
                "'fisher_sampled' (for the quadratic loss the two matrices are the same)"
            )
        if shared not in SHARED:
            raise ValueError(f"shared must be one of {SHARED}, got {shared!r}")
        check_count("samples", samples)
        self.loss, self.curvature, self.samples, self.seed = loss, curvature, samples, seed
        self.shared = shared
        if shared == "reduce":
            self.by_example, self.rows_are_examples = True, False

    def check(self, group):  # noqa: D102
        check_hyperparameter("damping (ε)", group["damping"], positive=True)

    def needs_gradients(self, group):  # noqa: D102
        return not self.curvature.startswith("fisher")

    def probe(self, updates, rank=0):  # noqa: D102
        if not self.curvature.startswith("fisher"):
            return None
        samples = self.samples if self.curvature == "fisher_sampled" else None

        def vectors(f: Tensor, earlier: int = 0) -> Iterator[Tensor]:
            # Each pass of an update, of each process, has its own; on the CPU 32 bits of a seed count.
            stream = (rank * MOST_PASSES + earlier) * 2_654_435_761
            seed = (self.seed * 1_000_003 + updates + stream) % 2**63
            return output_vectors(f, loss=self.loss, samples=samples, seed=seed)

        return vectors

    def measure(self, rows, group):  # noqa: D102
        rows = rows.reduced if self.shared == "reduce" else rows
        if not self.curvature.startswith("fisher"):
            passes = [rows.outputs]
        elif rows.probes:
            passes = rows.pulled
        else:
            raise CaptureError(
                "KFAC saw the layers but not the model's output, where the Fisher's targets are drawn: call "
                "the model itself, not its parts, and train with it the layers that its output depends on"
            )
        h = homogeneous(rows.inputs) if rows.biased else rows.inputs
        mean, inputs = input_rows(h, centered=False)
        return Statistics(mean, second_moment(inputs), second_moment(output_rows(passes, rows.examples)))

    def keeps(self, group):  # noqa: D102
        return {"a_inverse", "b_inverse"}

    def invert(self, statistics, group, name):  # noqa: D102
        _, a, b = statistics
        inverses = kfac_inverses(a, b, group["damping"], group["pi_correction"], name, group["rank"])
        return dict(zip(("a_inverse", "b_inverse"), inverses, strict=True))

    def quadratic_form(self, h, mean_h, biased, state, group):  # noqa: D102
        return quadratic_form(homogeneous(h) if biased else h, state["a_inverse"])

    def update(self, gradient, state, group):  # noqa: D102
        return kfac_update(gradient.w, gradient.b, state["a_inverse"], state["b_inverse"], lr=group["lr"])


class KFAC(Layerwise):
    """KFAC for the layers of a model.

    Args:
        model: See :class:`~sogrid.shell.LayerOptimizer`. Call the model itself, not its
            parts, and give it the layers up to the loss: its output is where the Fisher's targets are drawn.
            If it returns more than that, say which by ``output``; classes are its last dimension (of torch's
            ``[n, classes, positions]``: ``output=lambda f: f.movedim(1, -1)``).
        lr: Learning rate λ.
        damping: ε > 0: √ε is added to both factors, or shared between them by ``pi_correction``.
        loss: What the training loss is, as an object of :mod:`sogrid.losses`; its reduction counts. With
            class weights, ignored targets or a penalty the Fisher would still be of this one; that is refused
            where examples' gradients are used and tell it (:meth:`~sogrid.losses.Loss.require_target`).
        curvature: What the output factor B stands for: ``"fisher_sampled"`` (``samples`` more backward
            passes at a refresh), ``"fisher_exact"`` (one more for each output, at most 128; of a sequence of
            outputs all at once, exact where these do not depend on each other's inputs),
            ``"gauss_newton_probabilities"`` or ``"empirical_fisher"`` (none); see the module.
        samples: Draws per example for ``"fisher_sampled"``.
        pi_correction: Balance the damping between the two factors. Where gradients vanish, as below many
            sigmoid layers, the inputs then get nearly all of it.
        seed: Of the draws; each refresh, each minibatch accumulated in it, and each rank have streams of
            their own, and a resumed run repeats them.
        shared: How a layer's positions (tokens, pixels, several uses) become statistics: ``"expand"`` takes
            each for an example, ``"reduce"`` an example's together; :mod:`sogrid.rows` says when each is
            exact. Where a network pools over positions before its loss, try ``"reduce"``; its rows are fewer.
        **options: ``refresh_every``, ``averaging``, ``rank`` and ``output``, see
            :class:`~sogrid.optimizers.layerwise.Layerwise`; ``other_lr``, ``params``, ``gradients`` and
            ``max_change``, see :class:`~sogrid.shell.LayerOptimizer`.

    Raises:
        TypeError: If ``loss`` is not a :class:`~sogrid.losses.Loss`, and as in
            :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: For a curvature that does not go with the loss, and as there.
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
        pi_correction: bool = False,
        seed: int = 0,
        shared: str = "expand",
        **options: Unpack[StatisticsOptions],
    ) -> None:
        """See the class."""
        self._require_loss(loss)
        method, own = (
            KFACMethod(loss, curvature, samples, seed, shared),
            {"damping": damping, "pi_correction": pi_correction},
        )
        super().__init__(method, model, lr, own, reduction=loss.reduction, **options)
