"""One test per erratum of THESIS.md §7 that no claim's test covers: the printed form fails, the other holds.

Those that a reader can only read about are judged by arithmetic on what was read off the figures.
"""

import itertools
import math
from fractions import Fraction

import pytest
import references
import torch
from references import measured, relative_error

from sogrid.experiments.reference import thesis_values
from sogrid.losses import BinaryCrossEntropyAtProbabilities
from sogrid.optimizers.acp import acp_inverse, acp_update

RTOL = 1e-12


@pytest.fixture
def layer(draw):
    """(W, h, g): weights, 40 inputs and 40 gradients of a layer of size 6 → 4."""
    return draw(4, 6), draw(40, 6) + 1, draw(40, 4)


def misfit(product) -> float:
    """Infinite if a product's shapes do not fit."""
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product()
    return measured(math.inf)


def test_gradients_are_called_jacobians(layer):
    """E1, §2.1.2, FALSE: g hᵀ is the Jacobian of a in W; it is ℓ's gradient, the Jacobian hᵀ ⊗ I."""
    W, h, g = layer
    jacobian = torch.func.jacrev(lambda v: v.view(6, 4).mT @ h[0])(references.vec(W))
    printed = torch.outer(g[0], h[0])
    assert relative_error(printed, jacobian) == math.inf
    assert relative_error(references.kron(h[:1], torch.eye(4)).double(), jacobian) < RTOL
    assert relative_error(references.vec(printed), jacobian.mT @ g[0]) < RTOL


def test_two_jacobians_are_in_the_wrong_order(layer, draw):
    """E2, §2.4.1, FALSE: ∂h_l/∂h_{l−1} is W diag(f'); W comes first, on the right: diag(f') W.

    A large norm allows an explosion and does not imply one: a nilpotent matrix.
    """
    W, h, _ = layer
    exact = torch.func.jacrev(lambda h: torch.tanh(W @ h))(h[0])
    slope = torch.diag(1 - torch.tanh(W @ h[0]) ** 2)
    misfit(lambda: W @ slope)
    assert relative_error(slope @ W, exact) < RTOL
    large = torch.tensor([[0.0, 100.0], [0.0, 0.0]])
    assert not (large @ large).any()


def test_a_minimum_need_not_be_positive_definite():
    """E4, §3.1.1, FALSE: the Hessian is positive definite at a minimum; semi-definite. Two linear layers."""

    def risk(w):  # the minima of (w₁w₂ − 1)² are a curve
        return (w[0] * w[1] - 1) ** 2

    minimum = torch.ones(2, dtype=torch.float64)
    assert risk(minimum) == 0
    assert references.gradient_in_output(risk, minimum).norm() == 0
    low, high = torch.linalg.eigvalsh(references.hessian_in_output(risk, minimum)).tolist()
    assert measured(abs(low), "lowest eigenvalue at a minimum") < RTOL < measured(high, "highest")


def test_the_damped_model_lacks_a_half(draw):
    """E30, §3.1.3, FALSE: −(H + εI)⁻¹∇f minimises ∇fᵀΔ + ΔᵀHΔ + (ε/2)‖Δ‖²; it does with ½ ΔᵀHΔ."""
    rows, slope, ridge = draw(8, 6), draw(6), 0.3
    H = rows.mT @ rows / 8
    step = -torch.linalg.inv(H + ridge * torch.eye(6).double()) @ slope

    def minimum(half):  # of a quadratic model, by its derivatives at zero
        def model(d):
            return slope @ d + half * d @ H @ d + ridge / 2 * d @ d

        zero = torch.zeros_like(slope)
        gradient = references.gradient_in_output(model, zero)
        return -torch.linalg.solve(references.hessian_in_output(model, zero), gradient)

    assert relative_error(step, minimum(1.0)) > 0.1
    assert relative_error(step, minimum(0.5)) < RTOL


def test_a_transpose_is_in_the_wrong_place(draw):
    """E6, §3.2.3 §3.2.4 (3.3.1), FALSE: F = E[JᵀDJᵀ]; the shapes fit only in JᵀDJ."""
    J, root = draw(3, 7), draw(3, 3)  # three outputs, seven parameters
    misfit(lambda: J.mT @ (root @ root.mT) @ J.mT)
    scores = J.mT @ root  # columns whose outer products average to D
    assert relative_error(J.mT @ (root @ root.mT) @ J, scores @ scores.mT) < RTOL


def moments(h, g):
    deviation = h - h.mean(0)
    return g.mT @ h / len(h), g.mean(0), h.mean(0), deviation.mT @ deviation / len(h)


def test_box_does_not_minimise_a_criterion_that_penalises_the_bias(layer):
    """E12, §6.1.1, caveat: the box is right for a ridge on W alone; for one on b too it is not."""
    _, h, g = layer
    *grads, C = moments(h, g)
    mean = grads[-1]
    rate, ridge = 0.3, 0.2

    def slope(dW, db, bias_ridge):
        dW, db = dW.requires_grad_(), db.requires_grad_()
        value = (h @ dW.mT + db + rate * g).square().sum(1).mean()
        value = value + ridge * dW.square().sum() + bias_ridge * db.square().sum()
        return max(s.abs().max().item() for s in torch.autograd.grad(value, (dW, db)))

    options = {"lr": rate, "bias_correction": True}
    box = acp_update(*grads, acp_inverse(mean, C, ridge), **options)
    both = acp_update(*grads, acp_inverse(mean, C, ridge, tikhonov="exact"), corner=ridge, **options)
    assert measured(slope(*box, 0.0), "slope at the box, ridge on W") < RTOL
    assert measured(slope(*box, ridge), "slope at the box, ridge on b too") > 1e-3
    assert measured(slope(*both, ridge), "slope at the exact form") < RTOL


def test_a_step_is_printed_as_the_gradient(layer):
    """E13, §6.2.2, FALSE: ∇R = −(λ/n) Σ …; that is the step, −λ∇R."""
    W, h, g = layer
    gradient = references.gradient_in_output(lambda W: ((h @ W.mT) * g).sum(1).mean(), W)
    mean = sum(torch.outer(g_i, h_i) for g_i, h_i in zip(g, h, strict=True)) / len(h)
    assert relative_error(-0.3 * mean, gradient) == pytest.approx(1.3, rel=RTOL)
    assert relative_error(mean, gradient) < RTOL


def test_the_update_is_the_solution_and_not_the_gradient_of_the_criterion(layer):
    """E14, §6.2.2, FALSE: the update is eq. (6.1.1)'s; it is the box of §6.1.1 and (6.1.3) over α, ε = 0."""
    _, h, g = layer
    grad_w, grad_b, mean, C = moments(h, g)
    rate, alpha = 0.3, 2.0
    inverse = acp_inverse(mean, C, 0.0)
    step = acp_update(grad_w, grad_b, mean, inverse, lr=rate, output_curvature=alpha, bias_correction=True)
    box = -rate * (g.mT @ (h - mean) / len(h)) @ torch.linalg.inv(C)
    bias = -rate * grad_b - box @ mean
    assert relative_error(rate * grad_w, step[0]) > 0.1  # (6.1.1) where ΔW = Δb = 0
    assert relative_error(box / alpha, step[0]) < 1e-11
    assert relative_error(bias / alpha, step[1]) < 1e-11


def test_the_centred_update_is_printed_without_its_rate(layer):
    """E15, §6.3.1, FALSE: ΔW = (1/n) Σ g (h − h̄)ᵀ; it lacks −λ: as printed it goes uphill."""
    _, h, g = layer
    centred = g.mT @ (h - h.mean(0)) / len(h)
    gradient = g.mT @ h / len(h)
    assert measured((gradient * centred).sum(), "slope along the printed step") > 0
    assert measured((gradient * -0.3 * centred).sum(), "with −λ") < 0


def test_algorithm_4_lacks_the_bias_term_of_the_equation_it_cites(layer):
    """E17, Algorithm 4, FALSE: its line 13 is (6.2.5); −ΔW h̄ is missing."""
    _, h, g = layer
    grad_w, grad_b, mean, C = moments(h, g)
    inverse = acp_inverse(mean, C, 0.1)
    dW, printed = acp_update(grad_w, grad_b, mean, inverse, lr=0.3)
    _, corrected = acp_update(grad_w, grad_b, mean, inverse, lr=0.3, bias_correction=True)
    equation = -0.3 * grad_b - dW @ mean
    assert relative_error(printed, equation) > 0.1
    assert relative_error(corrected, equation) < RTOL


def test_algorithm_2_needs_the_example_on_every_h(layer):
    """E18, Algorithm 2, FALSE: Σ da_i hᵀ, an h without its example; Σ da_i h_iᵀ is the gradient."""
    W, h, g = layer
    gradient = references.gradient_in_output(lambda W: ((h @ W.mT) * g).sum(), W)
    assert relative_error(torch.outer(g.sum(0), h.mean(0)), gradient) > 0.1
    assert relative_error(g.mT @ h, gradient) < RTOL


def test_gauss_newton_is_square(layer):
    """E19, §6.3.2, FALSE: it has the size (n_in+1) × n_out; square, with the side (n_in+1) n_out."""
    _, h, _ = layer
    tilde = torch.cat([h, torch.ones(40, 1, dtype=h.dtype)], 1)
    G = references.kron(tilde.mT @ tilde / 40, torch.eye(4, dtype=h.dtype))
    assert relative_error(torch.zeros(7, 4), G) == math.inf
    assert tuple(G.shape) == (7 * 4, 7 * 4)


def test_the_second_moment_is_not_what_becomes_the_identity(layer):
    """E22, §6.4.2, FALSE: E[hhᵀ] = I is the aim; E[h̃_e h̃_eᵀ] = I of the whitened, centred inputs is."""
    _, h, _ = layer

    def root_inverse(M):
        values, vectors = torch.linalg.eigh(M)
        return vectors / values.sqrt() @ vectors.mT

    def second_moment(h):
        tilde = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        return tilde.mT @ tilde / len(h)

    *_, mean, C = moments(h, h)
    eye = torch.eye(7, dtype=h.dtype)
    assert relative_error(second_moment(h @ root_inverse(h.mT @ h / len(h))), eye) > 0.1
    assert relative_error(second_moment((h - mean) @ root_inverse(C)), eye) < RTOL


FIG_6_2 = {"blue": 1.19, "orange": 1.03}
"""Training errors where two curves of Fig. 6.2 end; its legend: blue ``acp``, orange ``acp_fixedalpha``."""
FIG_6_1_RED = 1.03
"""The same of the red curve of Fig. 6.1, α fixed by legend and caption."""


def test_captions_swap_two_colours():
    """E23, captions of Figs. 6.2 and 6.3, FALSE: blue has the fixed α; orange has, as the legend says."""
    ends = {m: c[-1] for m, c in thesis_values("fig6_2")["curves"]["train_mse_by_update"]["y"].items()}
    red = thesis_values("fig6_1")["curves"]["train_mse_by_update"]["y"]["acp_fixedalpha"][-1]
    assert red == FIG_6_1_RED
    measured(abs(FIG_6_2["blue"] - red) / red)
    measured(abs(FIG_6_2["orange"] - red) / red)
    assert FIG_6_2["blue"] == ends["acp"] != red
    assert FIG_6_2["orange"] == ends["acp_fixedalpha"] == red


def test_which_examples_weigh_more_depends_on_the_matrix():
    """E25, §3.3.2, FALSE: D weighs confident examples more; the Fisher's 1/f does, y/f² weighs bad ones."""
    loss = BinaryCrossEntropyAtProbabilities()
    f = torch.tensor([[0.98], [0.5]], dtype=torch.float64)  # confident, undecided
    weight = {
        "Fisher": loss.fisher(f),
        "Gauss-Newton, right": loss.hessian(f, torch.ones_like(f)),
        "Gauss-Newton, wrong": loss.hessian(f, torch.zeros_like(f)),
        "at the logit": f * (1 - f),
    }
    ratio = {name: measured((w[0] / w[1]).item(), f"weight, {name}") for name, w in weight.items()}
    assert [r > 1 for r in ratio.values()] == [True, False, True, False]


def test_a_claim_by_updates_needs_more_than_seconds():
    """E26, §6.5.3, caveat: Fig. 6.3 shows seconds only; the order survives at any equal number of updates."""
    head = thesis_values("fig6_3")["headline"]
    share = {
        m: head[m]["seconds_to_train_error_1_percent"] / head[m]["total_seconds"]
        for m in ("kfac", "kfac_nat")
    }
    seconds = (
        head["kfac"]["seconds_to_train_error_1_percent"]
        / head["kfac_nat"]["seconds_to_train_error_1_percent"]
    )
    assert measured(seconds, "ratio by seconds") == pytest.approx(3.3, abs=0.05)
    # if both made the same number of updates at a constant pace
    assert measured(share["kfac"] / share["kfac_nat"], "ratio by updates") == pytest.approx(3.84, abs=0.01)


def test_cifar_10_has_fifty_thousand_training_images():
    """E27, §4.1.2, FALSE: 60,000 images, of 80 million tiny ones; 50,000 are trained on, as NNN's gaps show.

    In Fig. 6.3 its points are 115 s and 78 s apart in turn: 3 and 2 refreshes of the 100-update schedule.
    """

    def refreshes(images):
        updates = Fraction(images, 200)
        due = [math.ceil(updates * epoch / 100) for epoch in range(5)]
        return [b - a for a, b in itertools.pairwise(due)]

    observed = [3, 2, 3, 2]
    for images, wanted in ((60_000, 2), (50_000, 4)):
        right = sum(a == b for a, b in zip(refreshes(images), observed, strict=True))
        assert measured(right, f"of four gaps, explained by {images:,} images") == wanted


def test_the_axis_of_figure_4_1_is_a_natural_logarithm():
    """E28, Fig. 4.1, FALSE: its log scale is decimal, like Fig. 2.2's; it is natural: steps of ln √10."""
    ends, steps = (-7.80, 2.56), 9  # ten columns of the grid
    step = (ends[1] - ends[0]) / steps
    assert measured(abs(step / math.log(10**0.5) - 1), "grid step against ln √10") < 1e-3
    assert measured(abs(step / 0.5 - 1), "against log₁₀ √10") > 1


def test_the_baseline_of_figure_5_1_is_not_that_of_figure_6_1():
    """E29, §5.4, caveat: Fig. 5.1 shows gains over SGD, over one that ends 11 times above Fig. 6.1's."""
    ends = [
        thesis_values(figure)["curves"]["train_mse_by_update"]["y"]["standard_sgd"][-1]
        for figure in ("fig5_1", "fig6_1")
    ]
    assert measured(ends[0] / ends[1], "ratio of SGD's final errors") == pytest.approx(11.4, abs=0.1)
