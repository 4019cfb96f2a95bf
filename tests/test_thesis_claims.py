"""One test per claim of the thesis on losses, curvature and networks; false claims are pinned as false.

Row numbers are those of THESIS.md §4 (numerical verification), E numbers those of its §7 (errata). The
claims on optimizers are in ``test_thesis_claims_optimizers.py``. Tolerances are relative to the norm of
the reference, in float64; magnitudes of false claims are measured on our own cases, the thesis check's
value in parentheses.
"""

import pytest
import references
import torch
from cases import case
from references import kron, measured, relative_error, vec

from sogrid.curvature import (
    empirical_fisher,
    fisher,
    gauss_newton,
    gauss_newton_at_logits,
    gauss_newton_at_probabilities,
    hessian,
    kl_divergence,
    kronecker_factors,
    kronecker_sum,
    layer_blocks,
    parameter_vector,
    per_example_gradient,
    per_example_jacobian,
    preactivation_curvature,
    preactivation_jacobian,
    to_thesis_order,
)
from sogrid.losses import (
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Quadratic,
)
from sogrid.networks import MLP

RTOL = 1e-11  # of the norm, float64 rounding
THREE_LOSSES = ["tanh regression", "one Bernoulli output at the probability", "softmax at probabilities"]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def remainder(model, loss, x, y):
    """(1/n) Σ_i Σ_k (∂ℓ_i/∂f_k) ∂²f_k/∂θ², the second term of §3.1.4, by double backward passes."""
    total = 0.0
    for x_i, g_i in zip(x, loss.gradient(model(x), y).detach(), strict=True):
        first = references.flat_gradient(g_i @ model(x_i[None])[0], model, create_graph=True)
        total = total + torch.stack([references.flat_gradient(p, model, retain_graph=True) for p in first])
    return total / len(x)


def linear_softmax(logit):
    """Three classes, one input x = 1, no hidden layer: logits (t, 0, 0), label 0."""
    layer = torch.nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[logit], [0.0], [0.0]]))
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    return layer, CrossEntropyAtLogits(), x, y


@pytest.fixture(scope="module")
def trained():
    """The softmax case after 300 steps of gradient descent: all labels learned, mean p_true = .997."""
    model, loss, x, y = case("softmax at logits")
    descent = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(300):
        descent.zero_grad()
        loss(model(x), y).backward()
        descent.step()
    return model, loss, x, y


# --- chapter 3, Tables 3.I and 3.II ----------------------------------------------------------------


def test_hessian_of_the_quadratic_loss_is_not_the_identity_but_twice_it(draw):
    """Row 1, E3, Table 3.I, FALSE: the second derivative of ‖f − y‖² is I; it is 2I."""
    f, y = draw(3), draw(3)
    H = references.hessian_in_output(lambda f: references.example_loss("Quadratic", f, y), f)
    assert relative_error(eye(3), H) == pytest.approx(0.5, rel=RTOL)
    assert relative_error(H, 2 * eye(3)) < RTOL
    assert torch.equal(Quadratic().hessian(f[None], y[None])[0], 2 * eye(3))
    g = references.gradient_in_output(lambda f: references.example_loss("Quadratic", f, y), f)
    assert relative_error(g, 2 * (f - y)) < RTOL  # the gradient A.1 prints, inconsistent with I


def test_hessians_of_the_cross_entropies_are_as_printed(draw):
    """Row 2, Table 3.I, true: y/f² + (1−y)/(1−f)² and diag(y/f²), f treated as free variables."""
    f, y = draw(3).softmax(0), draw(3).softmax(0)
    binary, categorical = (
        references.hessian_in_output(lambda f, name=name: references.example_loss(name, f, y), f)
        for name in ("BinaryCrossEntropyAtProbabilities", "CrossEntropyAtProbabilities")
    )
    assert relative_error(binary, torch.diag(y / f**2 + (1 - y) / (1 - f) ** 2)) < RTOL
    assert relative_error(categorical, torch.diag(y / f**2)) < RTOL
    assert relative_error(BinaryCrossEntropyAtProbabilities().hessian(f[None], y[None])[0], binary) < RTOL
    assert relative_error(CrossEntropyAtProbabilities().hessian(f[None], y[None])[0], categorical) < RTOL


@pytest.mark.parametrize("name", THREE_LOSSES)
def test_hessian_is_gauss_newton_plus_a_remainder_that_is_not_small(name):
    """Row 3, §3.1.4, true: the Hessian is Gauss-Newton plus a remainder, for the three losses.

    At a random start the remainder is 72–120 % of H (78–106 %).
    """
    model, loss, x, y = case(name)
    H, R = hessian(model, loss, x, y), remainder(model, loss, x, y)
    assert relative_error(gauss_newton(model, loss, x, y) + R, H) < RTOL
    assert 0.6 < measured(R.norm() / H.norm(), "remainder, of the norm of H") < 1.3


def test_gauss_newton_is_exact_where_the_quadratic_loss_is_zero():
    """Row 4, E7, §3.1.4, true: Gauss-Newton is the Hessian where ∂ℓ/∂f = 0: quadratic loss, f = y."""
    model, loss, x, y = case("tanh regression, targets reached")
    assert loss.gradient(model(x), y).abs().max() == 0
    assert relative_error(gauss_newton(model, loss, x, y), hessian(model, loss, x, y)) < RTOL
    away = case("tanh regression")
    assert relative_error(gauss_newton(*away), hessian(*away)) > 0.5


def test_gauss_newton_is_exact_at_soft_targets_reached_although_the_gradient_is_not_zero():
    """Row 4, E7, §3.1.4, caveat: at f = y, ∂ℓ/∂f = −1 in every class; the remainder vanishes as Σ f_k = 1."""
    model, loss, x, y = case("softmax at probabilities, soft labels")
    reached = model(x).detach()
    assert torch.equal(loss.gradient(reached, reached), -torch.ones_like(reached))
    H = hessian(model, loss, x, reached)
    assert relative_error(gauss_newton(model, loss, x, reached), H) < RTOL
    assert remainder(model, loss, x, reached).norm() < RTOL * H.norm()
    assert relative_error(gauss_newton(model, loss, x, y), hessian(model, loss, x, y)) > 0.5


@pytest.mark.parametrize(
    ("logit", "p_true", "ratio"),
    [
        (1.604, "0.71", "0.36"),
        (3.604, "0.95", "0.051"),
        (5.604, "0.993", "0.0070"),
        (7.604, "0.999", "0.00095"),
    ],
)
def test_gauss_newton_at_probabilities_does_not_improve_near_the_optimum(logit, p_true, ratio):
    """Row 5, E7, §3.1.4, FALSE: Gauss-Newton improves as the label is learned; ‖G‖/‖H‖ falls to zero.

    The check's table, reproduced. Closed form for k = 3: G = (1−p)²·3/2 in norm and
    H ≈ (1−p)·√(9p² + 1)/2. At the logits, with no hidden layer, Gauss-Newton is exact.
    """
    model, loss, x, y = linear_softmax(logit)
    p = model(x).softmax(-1)[0, 0].item()
    G, H = gauss_newton_at_probabilities(model, loss, x, y), hessian(model, loss, x, y)
    value = measured((G.norm() / H.norm()).item(), "‖G‖/‖H‖")
    assert f"{p:.{len(p_true) - 2}f}" == p_true
    assert f"{value:.{len(ratio) - 2}f}" == ratio
    assert value == pytest.approx(3 * (1 - p) / (9 * p**2 + 1) ** 0.5, rel=1e-9)
    assert relative_error(gauss_newton_at_logits(model, loss, x, y), H) < RTOL


def test_gauss_newton_near_the_optimum_is_of_second_order_and_the_hessian_of_first():
    """Row 5, §3.1.4, FALSE: at the probabilities G = O((1−p)²) and H = O(1−p), as ∂ℓ/∂f → −1/p, not 0."""
    sizes = []
    for logit in (8.0, 9.0):
        model, loss, x, y = linear_softmax(logit)
        p = model(x).softmax(-1)
        G, H = gauss_newton_at_probabilities(model, loss, x, y), hessian(model, loss, x, y)
        sizes.append(torch.stack([1 - p[0, 0], G.norm(), H.norm()]).log())
        assert CrossEntropyAtProbabilities().gradient(p, y).norm() > 1
    change = sizes[1] - sizes[0]
    orders = [
        measured((change[i] / change[0]).item(), f"order of {name}") for i, name in ((1, "G"), (2, "H"))
    ]
    assert orders == pytest.approx([2.0, 1.0], abs=0.01)


def test_neither_cut_is_exact_after_training(trained):
    """Row 5, §3.1.4, caveat: trained to a mean p_true = .997, Gauss-Newton is exact at neither cut.

    Residual 99.7 % of H at the probabilities, 27 % at the logits (100 % and about 75 %). At the logits
    the order of H is kept.
    """
    model, loss, x, y = trained
    assert model(x).softmax(-1).gather(1, y[:, None]).mean() > 0.99
    H = hessian(model, loss, x, y)
    at_p, at_logits = (
        cut(model, loss, x, y) for cut in (gauss_newton_at_probabilities, gauss_newton_at_logits)
    )
    assert at_p.norm() < 0.01 * H.norm()
    assert relative_error(at_p, H) > 0.98
    assert 0.5 < at_logits.norm() / H.norm() < 1.5
    assert 0.1 < relative_error(at_logits, H) < 0.9


def test_gaussian_fisher_has_one_over_the_variance():
    """Row 6, B.1, true: the Gaussian's Fisher matrix is (1/n) Σ JᵀJ/σ².

    With D = I, as Table 3.II prints, it is 63 % off at σ² = .37.
    """
    model, loss, x, _ = case("tanh regression, σ² = .37")
    J, F = references.jacobian(model, x), fisher(model, loss, x)
    plain = torch.einsum("nkp,nkq->pq", J, J) / len(x)
    assert relative_error(F, plain / 0.37) < RTOL
    assert relative_error(plain, F) == pytest.approx(1 - 0.37, rel=1e-10)


def test_bernoulli_and_categorical_fishers_are_as_printed():
    """Row 7, Table 3.II, true: D = 1/(f(1−f)) and diag(1/f), against all outcomes enumerated."""
    model, loss, x, _ = case("three Bernoulli outputs at the probabilities")
    f = model(x).detach()
    D = [torch.diag(1 / (f_i * (1 - f_i))) for f_i in f]
    F = references.quadratic_form_mean(references.jacobian(model, x), D)
    assert relative_error(F, references.fisher(model, "BinaryCrossEntropyAtProbabilities", x)) < RTOL
    assert relative_error(fisher(model, loss, x), F) < RTOL
    model, loss, x, _ = case("softmax at probabilities")
    D = [torch.diag(1 / f_i) for f_i in model(x).detach()]
    F = references.quadratic_form_mean(references.jacobian(model, x), D)
    assert relative_error(F, references.fisher(model, "CrossEntropyAtProbabilities", x)) < RTOL
    assert relative_error(fisher(model, loss, x), F) < RTOL


def test_fisher_does_not_depend_on_the_cut_although_its_middle_term_does():
    """Row 7, Table 3.II, true: at the logits D = diag p − p pᵀ is not diagonal, and F is the same matrix."""
    at_p, at_logits = case("softmax at probabilities"), case("softmax at logits")
    at_logits.model.load_state_dict(at_p.model.state_dict())
    p = at_p.model(at_p.x).detach()
    D = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert relative_error(at_logits.loss.fisher(at_logits.model(at_p.x).detach()), D) < RTOL
    assert (D - torch.diag_embed(D.diagonal(dim1=1, dim2=2))).norm() > 0.1 * D.norm()
    F = fisher(at_p.model, at_p.loss, at_p.x)
    assert relative_error(fisher(at_logits.model, at_logits.loss, at_p.x), F) < RTOL


def test_fisher_is_gauss_newton_for_the_quadratic_loss_with_matched_conventions():
    """Row 8, Table 3.III, caveat: Fisher = Gauss-Newton for ‖f − y‖² if σ² = ½, not Table 3.II's 1."""
    model, loss, x, y = case("tanh regression")
    G = gauss_newton(model, loss, x, y)
    assert relative_error(fisher(model, loss, x), G) < RTOL
    assert relative_error(2 * fisher(model, Quadratic(variance=1.0), x), G) < RTOL
    assert relative_error(fisher(model, Quadratic(variance=1.0), x), G) == pytest.approx(0.5, rel=RTOL)


# --- §3.4: Gauss-Newton as an outer product of gradients -------------------------------------------


def test_gauss_newton_of_one_example_is_the_outer_product_of_its_gradient():
    """Row 9, eq. (3.4.1), true: G = g gᵀ for one example, one-hot y and f = probabilities; rank one, PSD."""
    model, loss, x, y = case("softmax at probabilities")
    for i in range(len(x)):
        x_i, y_i = x[i : i + 1], y[i : i + 1]
        g = references.flat_gradient(-model(x_i)[0, y_i].log().sum(), model)
        G = gauss_newton(model, loss, x_i, y_i)
        assert relative_error(G, torch.outer(g, g)) < RTOL
        assert torch.linalg.matrix_rank(G, hermitian=True) == 1
        assert torch.linalg.eigvalsh(G)[0] > -RTOL * G.norm()


def test_second_derivative_is_plus_the_squared_gradient():
    """E8, §3.4, FALSE: (∂²ℓ/∂f²)_tt = −(∂ℓ/∂f)_t²; the sign is plus, and y must be one-hot."""
    f, y = (
        torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
    )

    def ell(f):
        return references.example_loss("CrossEntropyAtProbabilities", f, y)

    H, g = references.hessian_in_output(ell, f), references.gradient_in_output(ell, f)
    assert relative_error(H, torch.diag(g**2)) < RTOL
    assert relative_error(-torch.diag(g**2), H) == pytest.approx(2.0, rel=RTOL)


def test_soft_labels_break_the_outer_product():
    """Row 10, E8, §3.4, FALSE: G = g gᵀ for soft labels too; y_k² = y_k is needed.

    Error 28 to 98 % per example here (9 %).
    """
    model, loss, x, y = case("softmax at probabilities, soft labels")
    for i in range(len(x)):
        x_i, y_i = x[i : i + 1], y[i : i + 1]
        G = gauss_newton(model, loss, x_i, y_i)
        assert relative_error(empirical_fisher(model, loss, x_i, y_i), G) > 0.05
        assert torch.linalg.matrix_rank(G, hermitian=True) == 2  # three classes that sum to one


def test_outer_product_holds_for_one_bernoulli_output_and_not_for_several():
    """Row 11, §3.4, caveat: G = g gᵀ for one Bernoulli output (rank 1), not for K of them (rank K).

    Error above 100 % of G per example (83 %).
    """
    model, loss, x, y = case("one Bernoulli output at the probability")
    assert relative_error(empirical_fisher(model, loss, x, y), gauss_newton(model, loss, x, y)) < RTOL
    model, loss, x, y = case("three Bernoulli outputs at the probabilities")
    for i in range(len(x)):
        G, E = (M(model, loss, x[i : i + 1], y[i : i + 1]) for M in (gauss_newton, empirical_fisher))
        assert relative_error(E, G) > 0.5
        assert torch.linalg.matrix_rank(G, hermitian=True) == 3
        assert torch.linalg.matrix_rank(E, hermitian=True) == 1


def test_outer_product_fails_at_the_logits_where_gauss_newton_is_the_fisher():
    """Row 12, E9, §3.4, FALSE: G = g gᵀ for f = logits; there G is the Fisher matrix, to rounding.

    Error 58 to 85 % per example (290 %).
    """
    model, loss, x, y = case("softmax at logits")
    for i in range(len(x)):
        x_i, y_i = x[i : i + 1], y[i : i + 1]
        G = gauss_newton(model, loss, x_i, y_i)
        assert relative_error(G, empirical_fisher(model, loss, x_i, y_i)) > 0.3
        assert relative_error(G, references.fisher(model, "CrossEntropyAtLogits", x_i)) < RTOL


def test_gauss_newton_depends_on_what_is_called_the_output():
    """Row 12, E9, §3.4, FALSE: one network, one Hessian, one G; there are two, by what is called f."""
    model, loss, x, y = case("softmax at logits")
    at_p, at_logits = (
        cut(model, loss, x, y) for cut in (gauss_newton_at_probabilities, gauss_newton_at_logits)
    )
    assert relative_error(at_p, at_logits) > 0.3
    with_softmax = torch.nn.Sequential(model, torch.nn.Softmax(-1))
    H = hessian(with_softmax, CrossEntropyAtProbabilities(), x, y)
    assert relative_error(H, hessian(model, loss, x, y)) < RTOL


def test_batch_gauss_newton_is_the_mean_of_outer_products_not_the_outer_product_of_the_mean():
    """Row 13, E9, §3.4, caveat: a batch's G is the mean of g_i g_iᵀ (empirical Fisher), not ḡ ḡᵀ: not free.

    The mean gradient alone is 76 % off (70 %).
    """
    model, loss, x, y = case("softmax at probabilities")
    rows = references.rows(y, 3, x.dtype)
    g = references.per_example_gradient(model, "CrossEntropyAtProbabilities", x, rows)
    G = gauss_newton(model, loss, x, y)
    assert relative_error(G, sum(torch.outer(g_i, g_i) for g_i in g) / len(g)) < RTOL
    assert relative_error(torch.outer(g.mean(0), g.mean(0)), G) > 0.3


def test_gauss_newton_averaged_over_the_models_labels_is_the_fisher():
    """Row 13, §3.4, true: Σ_y p(y given x) G(x, y) = F, and the same of the empirical Fisher."""
    model, loss, x, _ = case("softmax at probabilities")
    for matrix in (gauss_newton, empirical_fisher):
        total = 0.0
        for i, f_i in enumerate(model(x).detach()):
            for c, p in enumerate(f_i):
                total = total + p * matrix(model, loss, x[i : i + 1], torch.tensor([c])) / len(x)
        assert relative_error(total, fisher(model, loss, x)) < RTOL


@pytest.mark.parametrize("name", THREE_LOSSES)
@pytest.mark.parametrize("matrix", [gauss_newton, fisher])
def test_quadratic_form_is_the_mean_squared_change_of_the_outputs(name, matrix, draw):
    """Row 14, §3.3.2, true: ΔᵀMΔ = (1/n) Σ ⟨D_i Δf_i, Δf_i⟩, Δf_i = J_θ(x_i) Δ; the 1/n is there."""
    model, loss, x, y = case(name)
    f = model(x).detach()
    delta = draw(len(parameter_vector(model)))
    df = references.jacobian(model, x) @ delta
    if matrix is fisher:
        M, D_df = fisher(model, loss, x), loss.fisher_product(f, df)
    else:
        M, D_df = gauss_newton(model, loss, x, y), loss.hessian_product(f, y, df)
    form = delta @ M @ delta
    assert relative_error(form, (D_df * df).sum(-1).mean()) < RTOL


# --- §3.2: KL divergence and natural gradient ------------------------------------------------------


@pytest.mark.parametrize("name", [*THREE_LOSSES, "softmax at logits"])
def test_kl_is_half_the_quadratic_form_of_the_fisher_in_both_orders(name, draw):
    """Row 15, E5, §3.2.1, FALSE: KL = ΔᵀFΔ to second order; it is half of that, in both orders.

    KL/ΔᵀFΔ → ½ linearly; tanh: .508, .5008, .50008 (.5055, .5006, .5001) at steps .1, .01, .001. The
    printed expansion is off by 100 % in the limit.
    """
    model, loss, x, _ = case(name)
    delta = draw(len(parameter_vector(model)))
    delta = delta / delta.norm()
    form = delta @ fisher(model, loss, x) @ delta
    for reverse in (False, True):
        for step in (1e-1, 1e-2, 1e-3):
            ratio = kl_divergence(model, loss, x, step * delta, reverse) / (step**2 * form)
            assert abs(ratio - 0.5) < step  # linear, whatever the direction
            assert abs(ratio - 1) > 0.4
    measured(ratio, "KL / ΔᵀFΔ at step .001")
    forward, backward = (kl_divergence(model, loss, x, 1e-1 * delta, r) for r in (False, True))
    # the orders differ beyond second order, except for a Gaussian of fixed variance
    assert (forward == backward) == isinstance(loss, Quadratic)


def test_natural_gradient_is_the_argmin_in_both_printed_forms():
    """Row 16, §3.2.2, true: −λ(I + λF/ε)⁻¹∇R = −ε(F + (ε/λ)I)⁻¹∇R: ε is the step, ε/λ the damping."""
    model, loss, x, y = case("softmax at probabilities")
    g, F = per_example_gradient(model, loss, x, y).mean(0), fisher(model, loss, x)
    rate, step = 0.7, 0.05  # λ, ε

    def objective(d):
        return d @ g + d @ d / (2 * rate) + d @ F @ d / (2 * step)

    first = -rate * torch.linalg.solve(eye(len(g)) + rate / step * F, g)
    second = -step * torch.linalg.solve(F + step / rate * eye(len(g)), g)
    assert relative_error(first, second) < RTOL
    assert references.gradient_in_output(objective, first).norm() < RTOL * g.norm()
    assert torch.linalg.eigvalsh(references.hessian_in_output(objective, first))[0] > 1  # so a minimum
    for damping in (1e-1, 1e1):
        other = -step * torch.linalg.solve(F + damping * eye(len(g)), g)
        assert objective(other) > objective(first)


# --- §5.2: the updated gradient --------------------------------------------------------------------


def test_updated_gradient_in_columns_is_exact_to_second_order(draw):
    """E10, §5.2, FALSE: rows added to columns; (W+ΔW)ᵀ g_a + WᵀH_a(ΔW h + Δb) is right to second order.

    The printed rows g_aᵀΔW and (ΔW h + Δb)ᵀH_a W are the transposes. Order of the error: 2 with the
    curvature term, 1 without it.
    """
    upper = MLP([3, 4, 2], "tanh", dtype=torch.float64)
    h, y, W, b = draw(5), draw(2), draw(3, 5), draw(3)
    dW, db = draw(3, 5), draw(3)

    def ell(a):
        return references.example_loss("Quadratic", upper(a[None])[0], y)

    def gradient_below(W, b):
        return references.gradient_in_output(lambda h: ell(W @ h + b), h)

    g = references.gradient_in_output(ell, W @ h + b)
    H = references.hessian_in_output(ell, W @ h + b).detach()
    errors = []
    for step in (2e-3, 1e-3):
        exact = gradient_below(W + step * dW, b + step * db)
        first = (W + step * dW).T @ g
        second = W.T @ H @ (step * dW @ h + step * db)
        assert first.shape == second.shape == h.shape
        errors.append(torch.stack([(exact - first - second).norm(), (exact - first).norm()]))
    with_curvature, without = torch.log2(errors[0] / errors[1]).tolist()
    assert measured(with_curvature, "order of the error") == pytest.approx(2.0, abs=0.05)
    assert measured(without, "without the curvature term") == pytest.approx(1.0, abs=0.05)
    assert relative_error(g[None] @ dW, (dW.T @ g)[None]) < RTOL
    assert relative_error(g[None] @ dW, (dW.T @ g)[:, None]) == float("inf")
    v = dW @ h + db
    assert relative_error(v[None] @ H @ W, (W.T @ H @ v)[None]) < RTOL


# --- chapter 6 -------------------------------------------------------------------------------------


def test_gradients_of_the_local_criterion_lack_a_factor_two(draw):
    """Row 18, E11, eqs. (6.1.1) (6.1.2), FALSE: the criterion's gradients; they are twice that, harmless."""
    h, g, dW, db = draw(7, 4), draw(7, 3), draw(3, 4), draw(3)
    rate, damping = 0.3, 0.1  # λ, ε

    def criterion(dW, db):
        return (h @ dW.T + db + rate * g).square().sum(1).mean() + damping * dW.square().sum()

    exact_W = references.gradient_in_output(lambda dW: criterion(dW, db), dW)
    exact_b = references.gradient_in_output(lambda db: criterion(dW, db), db)
    residual = h @ dW.T + db + rate * g
    printed_W = residual.T @ h / len(h) + damping * dW
    printed_b = residual.mean(0)
    assert relative_error(2 * printed_W, exact_W) < RTOL
    assert relative_error(2 * printed_b, exact_b) < RTOL
    assert relative_error(printed_W, exact_W) == pytest.approx(0.5, rel=RTOL)
    # harmless: (6.1.3), the zero in Δb, is the same
    zero = -rate * g.mean(0) - dW @ h.mean(0)
    assert references.gradient_in_output(lambda db: criterion(dW, db), zero).norm() < RTOL


def test_vec_of_a_product_is_a_kronecker_product_times_vec(draw):
    """Row 19, §6.2, true: vec(AXB) = (Bᵀ ⊗ A) vec X; with row stacking it is not."""
    A, X, B = draw(3, 4), draw(4, 5), draw(5, 2)
    assert relative_error(kron(B.T, A) @ vec(X), vec(A @ X @ B)) < RTOL
    assert relative_error(kron(B.T, A) @ X.reshape(-1), (A @ X @ B).reshape(-1)) > 0.1


def test_layer_jacobian_is_a_kronecker_product():
    """Row 19, E1, eq. (6.2.1), true: J_θ = [hᵀ 1] ⊗ J_a for θ = [vec W; b]; and J_a^W = hᵀ ⊗ I."""
    model, _, x, _ = case("softmax at probabilities")
    J = references.jacobian(model, x)[:, :, :16]  # linear1: 4×3 weights and 4 biases
    h, J_a = preactivation_jacobian(model, "linear1", x)
    for i in range(len(x)):
        row = torch.cat([h[i], torch.ones(1, dtype=x.dtype)])[None]
        thesis = torch.stack([to_thesis_order(model.linear1, J_k) for J_k in J[i]])
        assert relative_error(kron(row, J_a[i]), thesis) < RTOL
    a = per_example_jacobian(model.linear1, x)
    for i in range(len(x)):
        thesis = torch.stack([to_thesis_order(model.linear1, a_k) for a_k in a[i]])
        assert relative_error(thesis[:, :12], kron(x[i : i + 1], eye(4))) < RTOL
        assert relative_error(thesis[:, 12:], eye(4)) < RTOL


@pytest.mark.parametrize("name", [*THREE_LOSSES, "softmax at logits", "relu regression"])
def test_layer_block_is_a_sum_of_kronecker_products(name):
    """Row 19, eq. (6.2.2), true: G_block = (1/n) Σ [h̃h̃ᵀ] ⊗ (J_aᵀ D J_a), exactly."""
    model, loss, x, y = case(name)
    for layer, block in layer_blocks(
        model,
        references.gauss_newton(
            model, type(loss).__name__, x, references.rows(y, model(x).shape[1], x.dtype)
        ),
    ).items():
        thesis = to_thesis_order(model.get_submodule(layer), block)
        assert relative_error(kronecker_sum(model, layer, loss, x, y), thesis) < RTOL


def test_inverse_of_a_kronecker_product_is_the_product_of_inverses(draw):
    """Row 19, §6.2.1, true: (A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹."""
    A, B = draw(4, 4) + 4 * eye(4), draw(3, 3) + 4 * eye(3)
    expected = torch.linalg.inv(kron(A, B))
    assert relative_error(kron(torch.linalg.inv(A), torch.linalg.inv(B)), expected) < RTOL


def test_block_inverse_of_the_input_factor_contains_the_inverse_covariance(draw):
    """Row 19, §6.2.2, true: A⁻¹ = [[C⁻¹, −C⁻¹h̄], [−h̄ᵀC⁻¹, 1 + h̄ᵀC⁻¹h̄]], if C is invertible."""
    h = draw(20, 4) + 1
    A, mean = second_moment(h), h.mean(0)
    inverse = torch.linalg.inv(covariance(h))
    v = (inverse @ mean)[:, None]
    corner = (1 + mean @ inverse @ mean)[None, None]
    expected = torch.cat([torch.cat([inverse, -v], 1), torch.cat([-v.T, corner], 1)])
    assert relative_error(torch.linalg.inv(A), expected) < 1e-10  # condition number below 1e3
    few = draw(4, 4)  # n <= n_in: the covariance is singular
    assert torch.linalg.matrix_rank(covariance(few), hermitian=True) == 3


def second_moment(h):
    """A = (1/n) Σ h̃ h̃ᵀ."""
    ones = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    return ones.T @ ones / len(h)


def covariance(h):
    """C, divisor n."""
    return (h - h.mean(0)).T @ (h - h.mean(0)) / len(h)


def test_damping_the_covariance_is_not_damping_the_input_factor(generator):
    """Row 22, E16, §6.3.2, FALSE: damping A by d = ε/α is C + dI; the corner 1 + d is dropped.

    50 inputs U(.5, 1.5)^6: the step is 10, 80 and 191 % off at d = 1e-3, 1e-2, 1e-1 (5.6, 52, 207 %).
    Exact: M + dI − h̄h̄ᵀ/(1+d), centring by h̄/(1+d), Δb divided by 1+d. The thesis's form is exact for
    damping W only.
    """
    h = torch.rand(50, 6, dtype=torch.float64, generator=generator) + 0.5
    g = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    A, mean, C = second_moment(h), h.mean(0), covariance(h)
    gradient = g.T @ torch.cat([h, torch.ones(50, 1, dtype=h.dtype)], 1) / 50
    errors = []
    for d in (1e-3, 1e-2, 1e-1):
        step = gradient @ torch.linalg.inv(A + d * eye(7))
        dW = g.T @ (h - mean) / 50 @ torch.linalg.inv(C + d * eye(6))
        thesis = torch.cat([dW, (g.mean(0) - dW @ mean)[:, None]], 1)
        errors.append(relative_error(thesis, step))
        S = A[:-1, :-1] + d * eye(6) - torch.outer(mean, mean) / (1 + d)
        dW = g.T @ (h - mean / (1 + d)) / 50 @ torch.linalg.inv(S)
        exact = torch.cat([dW, ((g.mean(0) - dW @ mean) / (1 + d))[:, None]], 1)
        assert relative_error(exact, step) < 1e-10  # condition number up to 1e4
        weights_only = torch.diag(torch.tensor([1.0] * 6 + [0.0], dtype=h.dtype))
        assert relative_error(thesis, gradient @ torch.linalg.inv(A + d * weights_only)) < 1e-10
    assert 0.005 < errors[0] < errors[1] < errors[2]  # other draws: 12 to 200 % at d = 1e-1
    assert 0.1 < errors[2] < 4.0


def test_kfac_step_is_the_inverse_kronecker_product_times_the_gradient(draw):
    """Row 25, §6.4.1, true: (A ⊗ B)⁻¹ vec G = vec(B⁻¹ G A⁻¹), G = [∇W, ∇b]."""
    root_A, root_B, G = draw(8, 5), draw(6, 3), draw(3, 5)
    A, B = root_A.T @ root_A, root_B.T @ root_B
    step = torch.linalg.inv(B) @ G @ torch.linalg.inv(A)
    assert relative_error(vec(step), torch.linalg.solve(kron(A, B), vec(G))) < 1e-10  # condition < 1e4


def test_kfac_damping_does_not_factor():
    """Row 25, §6.4.1, caveat: damping does not factor, (A + √εI) ⊗ (B + √εI) is not A ⊗ B + εI.

    The step is 69 % off (35 %).
    """
    model, loss, x, y = case("softmax at logits")
    A, B = kronecker_factors(model, "linear1", loss, x)
    g = per_example_gradient(model, loss, x, y).mean(0)[:16]
    g = to_thesis_order(model.linear1, g)
    damping = 1e-2
    exact = torch.linalg.solve(kron(A, B) + damping * eye(16), g)
    factored = torch.linalg.solve(kron(A + damping**0.5 * eye(4), B + damping**0.5 * eye(4)), g)
    assert relative_error(factored, exact) > 0.1


@pytest.mark.parametrize("layer", ["linear1", "linear2"])
def test_kfac_factor_for_one_hot_cross_entropy_is_the_mean_outer_product_of_gradients(layer):
    """Row 26, E9, §6.4.1, true: B = (1/n) Σ g gᵀ, g = ∇_a ℓ_i: Kronecker-factored *empirical* Fisher."""
    model, loss, x, y = case("softmax at probabilities")
    gradients = []  # of one example at a time, at the layer's output a
    for x_i, y_i in zip(x, y, strict=True):
        h = x_i[None]
        for name, module in model.named_children():
            h = module(h)
            if name == layer:
                a = h
        gradients.append(torch.autograd.grad(-h[0, y_i].log(), a)[0][0])
    expected = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    _, B = kronecker_factors(model, layer, loss, x, y)
    assert relative_error(B, expected) < RTOL
    _, natural = kronecker_factors(model, layer, loss, x)
    assert relative_error(B, natural) > 0.1


def test_output_curvature_is_carried_down_by_the_layer_jacobian():
    """§5.5, true: M_{l−1} = Jᵀ M_l J with J = ∂a_l/∂a_{l−1} = W_l diag(f'_{l−1}); f' = 1 − tanh²."""
    model, loss, x, y = case("tanh regression")
    _, M1 = preactivation_curvature(model, "linear1", loss, x, y)
    h, M2 = preactivation_curvature(model, "linear2", loss, x, y)
    slope = 1 - h[:, :-1] ** 2
    J = model.linear2.weight.detach() * slope[:, None, :]
    assert relative_error(J.mT @ M2 @ J, M1) < RTOL


def test_mean_only_batch_norm_has_the_centred_gradient():
    """Row 30, §6.3.1, true: with mean-only batch norm ∂R/∂W = (1/n) Σ g_i (h_i − h̄)ᵀ, in every layer.

    It also centres the backpropagated signal, which Algorithm 3 does not: the layer below receives
    Wᵀ(g_i − ḡ).
    """
    loss, generator = Quadratic(), torch.Generator().manual_seed(0)
    model = MLP([4, 5, 3, 2], "tanh", normalization="mean_only", generator=generator, dtype=torch.float64)
    torch.nn.init.constant_(model.norm1.bias, 1.0)  # so that h₁ has a mean to subtract
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator) + 1
    y = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    seen, h = {}, x
    for name, module in model.named_children():
        seen[f"{name} in"] = h
        h = module(h)
        seen[f"{name} out"] = h
    tensors = [model.linear1.weight, model.linear2.weight, *(seen[f"norm{i} out"] for i in (1, 2))]
    dW1, dW2, g1, g2 = torch.autograd.grad(loss(h, y), tensors, retain_graph=True)
    (sent_down,) = torch.autograd.grad(loss(h, y), seen["linear2 in"])
    for dW, g, h in ((dW1, g1, seen["linear1 in"]), (dW2, g2, seen["linear2 in"])):
        assert relative_error(dW, g.T @ (h - h.mean(0))) < RTOL  # g carries the 1/n of the mean loss
        assert relative_error(dW, g.T @ h) > 0.1
    assert relative_error(sent_down, (g2 - g2.mean(0)) @ model.linear2.weight) < RTOL
    assert relative_error(sent_down, g2 @ model.linear2.weight) > 0.1


# --- Appendices A and B ----------------------------------------------------------------------------


def test_gaussian_score_has_a_plus_sign():
    """E20, B.1, FALSE: ∂ log p/∂θ = −(1/σ²)(y − f)ᵀJ; the sign is plus (harmless in the product)."""
    model, loss, x, y = case("tanh regression, σ² = .37")
    J, f = references.jacobian(model, x), model(x).detach()
    for i in range(len(x)):
        log_p = references.log_likelihood("Quadratic", model(x[i : i + 1])[0], y[i], 0.37)
        score = references.flat_gradient(log_p, model)
        assert relative_error(score, (y[i] - f[i]) @ J[i] / 0.37) < RTOL
        assert relative_error(-(y[i] - f[i]) @ J[i] / 0.37, score) == pytest.approx(2.0, rel=RTOL)
        assert relative_error(J[i].T @ -loss.score(f[i : i + 1], y[i : i + 1])[0], score) < RTOL


def test_categorical_score_products_are_diagonal_only_for_one_hot_labels():
    """E21, B.3, FALSE: the score's product is diag(y²/f²); for one-hot y only. The score is the row (y/f)ᵀJ.

    Its expectation over the model's one-hot labels is diag(1/f). For soft y the diagonal is off by more
    than half of the outer product.
    """
    f = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for y, p in references.outcomes("CrossEntropyAtProbabilities", f):
        s = references.gradient_in_output(
            lambda f, y=y: references.log_likelihood("CrossEntropyAtProbabilities", f, y), f
        )
        assert relative_error(s, y / f) < RTOL
        assert relative_error(torch.diag(y**2 / f**2), torch.outer(s, s)) < RTOL
        expected += p * torch.outer(s, s)
    assert relative_error(expected, torch.diag(1 / f)) < RTOL
    soft = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    s = soft / f
    assert relative_error(torch.diag(soft**2 / f**2), torch.outer(s, s)) > 0.4


def test_parameter_gradient_is_a_column_of_jacobian_transpose_times_output_gradient():
    """E7, §3.1.4, FALSE: ∇_θ ℓ = J_θᵀ times a row; it is J_θᵀ ∂ℓ/∂f with both as columns."""
    model, loss, x, y = case("softmax at logits")
    J = references.jacobian(model, x)
    rows = references.rows(y, 3, x.dtype)
    exact = references.per_example_gradient(model, "CrossEntropyAtLogits", x, rows)
    column = J.mT @ loss.gradient(model(x).detach(), y)[:, :, None]
    assert relative_error(column[:, :, 0], exact) < RTOL
    row = loss.gradient(model(x).detach(), y)[0][None]  # [1, k], as Appendix A writes it
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        J[0].mT @ row
    measured(float("inf"))
