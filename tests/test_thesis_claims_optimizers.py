"""THESIS §4, rows 17, 20–24, 27–29 and 31–34: what the thesis claims of its updates, in float64.

The judges are autograd, dense matrices and per-example loops written here; nothing they use comes
from the code they judge.
"""

import itertools
import math

import pytest
import references
import torch
from torch import nn
from torch.func import jacrev, vmap

from sogrid.losses import CrossEntropyAtLogits, CrossEntropyAtProbabilities, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC, NaturalNN, UpdatedBackprop, WhitenedLinear
from sogrid.optimizers.acp import acp_inverse, acp_update
from sogrid.optimizers.centered import centered_update
from sogrid.optimizers.updated_backprop import gauss_newton_term, hessian_term, updated_backprop_update

ROUNDING = 1e-11
"""Relative error allowed where equality is exact: a few hundred roundings and a small inverse."""

n, n_in, n_out = 40, 6, 4


@pytest.fixture
def layer():
    """Inputs and per-example gradients of one layer: (h, g), with a mean far from zero."""
    generator = torch.Generator().manual_seed(3)
    h = torch.rand(n, n_in, generator=generator, dtype=torch.float64) + 0.5
    g = torch.randn(n, n_out, generator=generator, dtype=torch.float64)
    return h, g


def gradients(h, g):
    """(∇W, ∇b, h̄) by a loop over examples."""
    grad_w = sum(torch.outer(gi, hi) for gi, hi in zip(g, h, strict=True)) / len(h)
    return grad_w, sum(g) / len(g), sum(h) / len(h)


def covariance(h):
    """Covariance, divisor n, by a loop."""
    mean = sum(h) / len(h)
    return sum(torch.outer(hi - mean, hi - mean) for hi in h) / len(h)


def error(value, reference):
    """Relative error of a tensor or of a pair of them."""
    if isinstance(value, tuple):
        value, reference = (torch.cat([p.flatten() for p in pair]) for pair in (value, reference))
    return references.relative_error(value, reference)


def dense_input_step(h, g, lr, alpha, shift, penalize_bias):
    """−λ (A ⊗ αI + shift·α·K)⁻¹ ∇R as matrices, with K = I or I without the bias coordinate."""
    tilde = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    A = tilde.mT @ tilde / len(h)
    K = torch.eye(n_in + 1, dtype=h.dtype)
    if not penalize_bias:
        K[-1, -1] = 0
    matrix = references.kron(A + shift * K, alpha * torch.eye(n_out, dtype=h.dtype))
    grad_w, grad_b, _ = gradients(h, g)
    step = -lr * torch.linalg.solve(matrix, references.vec(torch.cat([grad_w, grad_b[:, None]], 1)))
    step = step.view(n_in + 1, n_out).mT
    return step[:, :-1], step[:, -1]


def test_closed_form_minimises_the_local_criterion(layer):
    """Row 17, E12, §6.1, true: the boxed step minimises ℓ_C; the data term is a mean, so ε is ε."""
    h, g = layer
    lr, damping = 0.3, 0.2
    dw, db = acp_update(
        *gradients(h, g), acp_inverse(h.mean(0), covariance(h), damping), lr=lr, bias_correction=True
    )
    dw.requires_grad_()
    db.requires_grad_()
    criterion = (h @ dw.mT + db + lr * g).square().sum(1).mean() + damping * dw.square().sum()
    for gradient in torch.autograd.grad(criterion, (dw, db)):
        assert references.measured(gradient.abs().max(), "largest slope at the box") < 1e-13
    elsewhere = (h @ (1.01 * dw).mT + db + lr * g).square().sum(1).mean() + damping * (
        1.01 * dw
    ).square().sum()
    assert elsewhere > criterion


def test_acp_with_the_bias_term_is_the_preconditioned_gradient(layer):
    """Row 20, eqs. (6.2.4) (6.2.5), true: they are −λ G_in⁻¹ ∇R; with damping, if the bias is not damped."""
    h, g = layer
    for shift in (0.0, 0.1):
        step = acp_update(
            *gradients(h, g),
            acp_inverse(h.mean(0), covariance(h), shift),
            lr=0.3,
            output_curvature=2.0,
            bias_correction=True,
        )
        assert error(step, dense_input_step(h, g, 0.3, 2.0, shift, penalize_bias=False)) < ROUNDING


def test_tikhonov_rescales(layer):
    """Row 21, §6.3.2, true: A ⊗ αI + εI = (A + (ε/α) I) ⊗ αI: the corner of the damped block is 1 + ε/α."""
    h, _ = layer
    alpha, damping = 2.0, 0.3
    tilde = torch.cat([h, torch.ones(n, 1, dtype=h.dtype)], 1)
    A, eye = tilde.mT @ tilde / n, torch.eye(n_out, dtype=h.dtype)
    left = references.kron(A, alpha * eye) + damping * torch.eye((n_in + 1) * n_out, dtype=h.dtype)
    damped = A + damping / alpha * torch.eye(n_in + 1, dtype=h.dtype)
    assert error(references.kron(damped, alpha * eye), left) < 1e-15
    assert damped[-1, -1] == 1 + damping / alpha


@pytest.mark.parametrize(("shift", "least"), [(1e-3, 0.01), (1e-2, 0.1), (1e-1, 0.5)])
def test_printed_damping_is_not_the_tikhonov_step_and_the_exact_form_is(layer, shift, least):
    """Row 22, E16, §6.3.2, FALSE: adding ε/α to C alone is Tikhonov damping; it damps W but not b.

    With h̄ of size one the difference is large.
    """
    h, g = layer
    exact = dense_input_step(h, g, 0.3, 2.0, shift, penalize_bias=True)
    printed = acp_update(
        *gradients(h, g),
        acp_inverse(h.mean(0), covariance(h), shift),
        lr=0.3,
        output_curvature=2.0,
        bias_correction=True,
    )
    assert error(printed, exact) > least
    ours = acp_update(
        *gradients(h, g),
        acp_inverse(h.mean(0), covariance(h), shift, tikhonov="exact"),
        lr=0.3,
        output_curvature=2.0,
        bias_correction=True,
        corner=shift,
    )
    assert error(ours, exact) < ROUNDING


def test_optimizer_takes_the_exact_tikhonov_step():
    """Row 22, E16, §6.3.2, true: ACP(tikhonov='exact') on a network is −λ (A ⊗ αI + εI)⁻¹ ∇ per layer."""
    torch.manual_seed(0)
    model = MLP([n_in, 5, n_out], "tanh", dtype=torch.float64)
    x = torch.rand(n, n_in, dtype=torch.float64)
    y = torch.randn(n, n_out, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ACP(model, 0.3, 0.2, output_curvature=2.0, tikhonov="exact", max_change=None)
    Quadratic()(model(x), y).backward()
    tilde = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    matrix = references.kron(tilde.mT @ tilde / n, 2 * torch.eye(5, dtype=x.dtype))
    matrix = matrix + 0.2 * torch.eye(len(matrix), dtype=x.dtype)
    grad = torch.cat([model.linear1.weight.grad, model.linear1.bias.grad[:, None]], 1)
    expected = -0.3 * torch.linalg.solve(matrix, references.vec(grad)).view(n_in + 1, 5).mT
    optimizer.step()
    step = torch.cat([model.linear1.weight - before[0], (model.linear1.bias - before[1])[:, None]], 1)
    assert error(step, expected) < ROUNDING


def test_centred_gradient_descent_with_the_bias_term_is_descent_in_centred_coordinates(layer):
    """§6.3.1: a = W (h − h̄) + d, one gradient step in (W, d), seen in (W, b = d − W h̄)."""
    h, g = layer
    mean = h.mean(0)
    w = torch.randn(n_out, n_in, dtype=torch.float64, requires_grad=True)
    d = torch.randn(n_out, dtype=torch.float64, requires_grad=True)
    (((h - mean) @ w.mT + d) * g).sum(1).mean().backward()  # a loss whose gradient at a is g
    after = w - 0.3 * w.grad, d - 0.3 * d.grad
    step = (after[0] - w).detach(), ((after[1] - after[0] @ mean) - (d - w @ mean)).detach()
    assert error(centered_update(*gradients(h, g), lr=0.3, bias_correction=True), step) < ROUNDING


def ascending_layer(offset):
    """Two examples of one input with variance 1 and the given mean."""
    return torch.tensor([[offset + 1.0], [offset - 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(("offset", "ascends"), [(1.9, False), (2.1, True)])
def test_printed_updates_can_ascend_and_the_bias_term_cures_it(offset, ascends):
    """Row 23, E17, Algorithms 3 and 4, caveat: descent not guaranteed; with the bias term of (6.2.5) it is.

    The slope along the update turns positive for some g once ‖C^(−1/2) h̄‖ > 2 (ACP) or ‖h̄‖ > 2. With
    C = 1 both algorithms take the same step. Slope = −λ [u(u + v h̄) + v²], u = centred gradient,
    v = ḡ: as a quadratic form it is indefinite iff h̄² > 4.
    """
    h = ascending_layer(offset)
    mean = h.mean(0)
    worst, worst_corrected = -math.inf, -math.inf
    for angle in torch.linspace(0, math.pi, 181, dtype=torch.float64):
        g = torch.stack([angle.cos() + angle.sin(), angle.sin() - angle.cos()])[:, None]
        grad_w, grad_b, _ = gradients(h, g)
        for correction in (False, True):
            steps = [
                centered_update(grad_w, grad_b, mean, lr=0.1, bias_correction=correction),
                acp_update(
                    grad_w,
                    grad_b,
                    mean,
                    acp_inverse(mean, covariance(h), 0.0),
                    lr=0.1,
                    bias_correction=correction,
                ),
            ]
            slopes = [float((grad_w * dw).sum() + (grad_b * db).sum()) for dw, db in steps]
            if correction:
                worst_corrected = max(worst_corrected, *slopes)
            else:
                worst = max(worst, *slopes)
    if ascends:
        references.measured(worst, "highest slope, as printed")
        references.measured(worst_corrected, "highest slope with the bias term")
    assert (worst > 1e-4) == ascends
    assert worst_corrected <= 1e-14


def test_heuristic_bias_step_explodes_as_gradients_vanish(layer):
    """Row 24, §6.5.3.3, caveat: the heuristic α is unstable because Δb of Algorithm 4 is λg/α ~ λ/g.

    The exact Tikhonov corner makes it vanish with g.
    """
    h, g = layer
    printed, exact, corrected = [], [], []
    for scale in (1.0, 1e-1, 1e-2, 1e-3):
        small = scale * g
        alpha = small.square().max()
        shift = 0.1 / alpha
        plain = acp_inverse(h.mean(0), covariance(h), shift)
        tikhonov = acp_inverse(h.mean(0), covariance(h), shift, tikhonov="exact")
        rates = {"lr": 0.01, "output_curvature": alpha}
        grads = gradients(h, small)
        printed.append(acp_update(*grads, plain, **rates)[1].norm())
        corrected.append(acp_update(*grads, plain, **rates, bias_correction=True)[1].norm())
        exact.append(acp_update(*grads, tikhonov, **rates, bias_correction=True, corner=shift)[1].norm())
    for small, large in itertools.pairwise(printed):
        assert large / small == pytest.approx(10, rel=1e-9)
        references.measured(large / small, "growth of Δb as gradients shrink tenfold")
    assert corrected[-1] > 100 * corrected[0]  # the −ΔW h̄ term alone does not cure it
    assert exact[-1] < exact[0] / 10
    references.measured(exact[-1] / exact[-2], "with the exact corner")


def test_whitening_gives_the_identity_block(layer):
    """Row 27, E22, §6.4.2, true: E[h̃_e h̃_eᵀ] = I without damping; with it the eigenvalues are c/(c + ε)."""
    h, _ = layer
    plain = nn.Linear(n_in, n_out, dtype=torch.float64)
    for damping in (0.0, 0.3):
        whitened = WhitenedLinear(plain)
        whitened.rewhiten(h, damping)
        effective = (h - whitened.mean) @ whitened.whitening
        tilde = torch.cat([effective, torch.ones(n, 1, dtype=h.dtype)], 1)
        values = torch.linalg.eigvalsh(tilde.mT @ tilde / n)
        c = torch.linalg.eigvalsh(covariance(h))
        wanted = torch.cat([c / (c + damping), torch.ones(1, dtype=h.dtype)]).sort().values
        assert error(values, wanted) < ROUNDING


def test_a_gradient_step_of_nnn_is_acp_with_the_bias_term(layer):
    """Row 28, E17, §6.4.2, true: one SGD step in (V, d) is (6.2.4) and (6.2.5), α = 1, same statistics."""
    h, g = layer
    damping, lr = 0.05, 0.3
    whitened = WhitenedLinear(nn.Linear(n_in, n_out, dtype=torch.float64))
    whitened.rewhiten(h, damping)
    before = whitened.canonical()
    (whitened(h) * g).sum(1).mean().backward()  # a loss whose gradient at the pre-activation is g
    torch.optim.SGD(whitened.parameters(), lr).step()
    after = whitened.canonical()
    step = tuple(new - old for new, old in zip(after, before, strict=True))
    expected = acp_update(
        *gradients(h, g), acp_inverse(h.mean(0), covariance(h), damping), lr=lr, bias_correction=True
    )
    assert error(step, expected) < ROUNDING


@pytest.mark.parametrize("damping", [0.05, 1.0])
def test_natural_nn_is_sgd_on_whitened_layers_through_refreshes(damping):
    """Row 28, §6.4.2, true: ten steps of NaturalNN are SGD's on whitened layers, through refreshes.

    Whitening every three, against torch's SGD on WhitenedLinear modules.
    """
    torch.manual_seed(1)
    model = MLP([n_in, 5, n_out], "tanh", dtype=torch.float64)
    whitened = nn.Sequential(WhitenedLinear(model.linear1), nn.Tanh(), WhitenedLinear(model.linear2))
    ours = NaturalNN(model, 0.1, damping, refresh_every=3, max_change=None)
    reference = torch.optim.SGD(whitened.parameters(), 0.1)
    loss = Quadratic()
    for step in range(10):
        x = torch.rand(n, n_in, dtype=torch.float64)
        y = torch.randn(n, n_out, dtype=torch.float64)
        if step % 3 == 0:
            hidden = torch.tanh(model.linear1(x)).detach()
            whitened[0].rewhiten(x, damping)
            whitened[2].rewhiten(hidden, damping)
        for network, optimizer in ((model, ours), (whitened, reference)):
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()
    for mine, theirs in ((model.linear1, whitened[0]), (model.linear2, whitened[2])):
        assert error((mine.weight.detach(), mine.bias.detach()), theirs.canonical()) < ROUNDING


def test_rewhitening_keeps_the_function(layer):
    """Row 29, §6.4.2, true: V ← W U'⁻¹, d ← b + W μ' changes the parameters and not the function."""
    h, _ = layer
    plain = nn.Linear(n_in, n_out, dtype=torch.float64)
    whitened = WhitenedLinear(plain)
    for part in (h, 3 * h[:20] - 1, h[5:30]):
        old = whitened.weight.detach().clone()
        whitened.rewhiten(part, 1e-3)
        assert error(whitened(h).detach(), plain(h).detach()) < ROUNDING
        assert error(whitened.weight.detach(), old) > 0.1


# -- updated backpropagation ---------------------------------------------------------------------------


def chain(activation="tanh", output="identity", loss=None, sizes=(5, 7, 6, 4), seed=0, classes=False):
    """A small MLP with data, its forward quantities, and ∂ℓ/∂f."""
    torch.manual_seed(seed)
    model = MLP(list(sizes), activation, output, dtype=torch.float64)
    x = torch.randn(n, sizes[0], dtype=torch.float64)
    y = torch.randn(n, sizes[-1], dtype=torch.float64)
    if classes:
        y = torch.eye(sizes[-1], dtype=torch.float64)[torch.randint(0, sizes[-1], (n,))]
    loss = loss or Quadratic()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    activations = [m for m in model if not isinstance(m, nn.Linear)]
    inputs, pre, h = [], [], x
    with torch.no_grad():
        for linear, f in zip(layers, activations, strict=True):
            inputs.append(h)
            pre.append(linear(h))
            h = f(pre[-1])
    weights = [linear.weight.detach().clone() for linear in layers]
    biases = [linear.bias.detach().clone() for linear in layers]
    return model, loss, x, y, inputs, pre, weights, biases, activations, h


def jacobian_ubp(inputs, pre, weights, activations, f, y, loss_name, lr, size):
    """Algorithm 2 as printed, with per-example Jacobians: (ΔW, Δb) by layer, means instead of sums."""
    changes = [None] * len(weights)
    dh, J = [], []
    for fi, yi in zip(f, y, strict=True):
        one = lambda v, yi=yi: references.example_loss(loss_name, v, yi)  # noqa: E731
        dh.append(references.gradient_in_output(one, fi))
        D = references.hessian_in_output(one, fi)
        values, vectors = torch.linalg.eigh(D)
        J.append(vectors.mT * values.clamp(min=0).sqrt()[:, None])  # SᵀS = D
    for layer in reversed(range(len(weights))):
        slope = [torch.func.jacrev(activations[layer])(a) for a in pre[layer]]
        da = [s.mT @ d for s, d in zip(slope, dh, strict=True)]
        J = [j @ s for j, s in zip(J, slope, strict=True)]
        dw = -lr * sum(torch.outer(d, h) for d, h in zip(da, inputs[layer], strict=True)) / size
        db = -lr * sum(da) / size
        changes[layer] = (dw, db)
        w = weights[layer]
        dh = [
            (w + dw).mT @ d + w.mT @ (j.mT @ (j @ (dw @ h + db)))
            for d, j, h in zip(da, J, inputs[layer], strict=True)
        ]
        J = [j @ w for j in J]
    return changes


LOSSES = {
    "quadratic": dict(output="sigmoid", loss=Quadratic()),
    "linear output": dict(output="identity", loss=Quadratic()),
    "softmax, probabilities": dict(output="softmax", loss=CrossEntropyAtProbabilities(), classes=True),
    "softmax, logits": dict(output="identity", loss=CrossEntropyAtLogits(), classes=True),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_ubp_without_jacobians_is_ubp(case, activation):
    """Row 33, Algorithm 2, true: JVP, times D, VJP = per-example Jacobians; any activation, any loss."""
    model, loss, x, y, inputs, pre, weights, biases, activations, f = chain(activation, **LOSSES[case])
    term = gauss_newton_term(pre, weights, activations, lambda v: loss.hessian_product(f, y, v))
    ours = updated_backprop_update(
        inputs, pre, weights, activations, loss.gradient(f, y), term, lr=[0.05] * 3
    )
    reference = jacobian_ubp(inputs, pre, weights, activations, f, y, type(loss).__name__, 0.05, n)
    for mine, theirs in zip(ours, reference, strict=True):
        assert error(mine, theirs) < ROUNDING


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES)
def test_optimizer_takes_the_step_of_algorithm_2(case, reduction):
    """Row 33, E18, Algorithm 2, true: the optimizer takes its step, for losses that are sums or means.

    In an ordinary loop, with the targets recovered from the output gradient.
    """
    options = LOSSES[case] | {"loss": type(LOSSES[case]["loss"])(reduction)}
    model, loss, x, y, inputs, pre, weights, biases, activations, f = chain("sigmoid", **options)
    optimizer = UpdatedBackprop(model, 0.05, loss=loss, max_change=None)
    loss(model(x), y).backward()
    optimizer.step()
    reference = jacobian_ubp(inputs, pre, weights, activations, f, y, type(loss).__name__, 0.05, n)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for linear, w, b, theirs in zip(layers, weights, biases, reference, strict=True):
        assert error((linear.weight.detach() - w, linear.bias.detach() - b), theirs) < 1e-9


def updated_gradient_residual(lr, kind, activation, output, loss, classes=False):
    """Error of the predicted ∂ℓ/∂h below the top layer, against the true gradient after its update."""
    model, loss, x, y, inputs, pre, weights, biases, activations, f = chain(
        activation, output, loss, sizes=(5, 6, 4), classes=classes
    )
    term = {
        "gauss_newton": gauss_newton_term(pre, weights, activations, lambda v: loss.hessian_product(f, y, v)),
        "hessian": hessian_term(pre, weights, biases, activations, loss, y),
    }[kind]
    top = len(weights) - 1
    g = torch.autograd.functional.vjp(activations[top], pre[top], loss.gradient(f, y))[1]
    dw, db = -lr * g.mT @ inputs[top] / n, -lr * g.mean(0)
    predicted = g @ (weights[top] + dw) + term(top, inputs[top] @ dw.mT + db) @ weights[top]
    h = inputs[top].clone().requires_grad_()
    out = activations[top](h @ (weights[top] + dw).mT + biases[top] + db)
    (true,) = torch.autograd.grad(loss.value(out, y).sum(), h)
    return float((predicted - true).norm())


def order(residual):
    """Observed order of convergence as the step is halved."""
    coarse, fine = residual(2e-3), residual(1e-3)
    return math.log2(coarse / fine)


def test_the_expansion_with_the_full_hessian_is_second_order():
    """Row 31, E10, §5.2, true: with the full Hessian the expansion is right to second order.

    Halving the step quarters the error.
    """
    for activation, output in (("tanh", "sigmoid"), ("sigmoid", "tanh")):
        found = order(lambda lr: updated_gradient_residual(lr, "hessian", activation, output, Quadratic()))  # noqa: B023
        assert references.measured(found, "order of the error") == pytest.approx(2.0, abs=0.02)


def test_the_expansion_with_gauss_newton_is_first_order_only():
    """Row 32, §5.2, caveat: with Gauss-Newton it is of first order, unless ReLU meets a linear output."""
    curved = order(lambda lr: updated_gradient_residual(lr, "gauss_newton", "tanh", "sigmoid", Quadratic()))
    assert references.measured(curved, "order of the error, curved output") == pytest.approx(1.0, abs=0.05)
    straight = order(
        lambda lr: updated_gradient_residual(lr, "gauss_newton", "relu", "identity", Quadratic())
    )
    assert references.measured(straight, "ReLU, linear output") == pytest.approx(2.0, abs=0.02)


def test_gauss_newton_at_probabilities_can_be_worse_than_nothing():
    """Row 32, §5.2, caveat: cut at the softmax's probabilities, at a random start, worse than no term."""
    options = dict(activation="tanh", output="softmax", loss=CrossEntropyAtProbabilities(), classes=True)
    model, loss, x, y, inputs, pre, weights, biases, activations, f = chain(sizes=(5, 6, 4), **options)
    gn = gauss_newton_term(pre, weights, activations, lambda v: loss.hessian_product(f, y, v))
    true = hessian_term(pre, weights, biases, activations, loss, y)
    v = torch.randn(n, 4, dtype=torch.float64)
    residual = (gn(1, v) - true(1, v)).norm() / true(1, v).norm()
    assert references.measured(residual, "error of the term, of its norm") > 1


@pytest.mark.parametrize(("activation", "least"), [("sigmoid", 5), ("relu", 100)])
def test_updates_explode_towards_the_bottom(activation, least):
    """Row 34, §5.5, true: with a large λ the bottom layer's update grows far beyond the gradient's."""
    sizes = (5, *[8] * 6, 4)
    model, loss, x, y, inputs, pre, weights, biases, activations, f = chain(activation, sizes=sizes)
    term = gauss_newton_term(pre, weights, activations, lambda v: loss.hessian_product(f, y, v))
    grad_f = loss.gradient(f, y)
    options = (inputs, pre, weights, activations, grad_f)
    ubp = updated_backprop_update(*options, term, lr=[5.0] * 7)
    Quadratic()(model(x), y).backward()
    ratio = float(ubp[0][0].norm() / (5.0 * model.linear1.weight.grad.norm()))
    top = float(ubp[-1][0].norm() / (5.0 * model.linear7.weight.grad.norm()))
    assert top == pytest.approx(1, rel=1e-12)
    assert references.measured(ratio, "bottom update over the gradient's") > least


# -- KFAC ------------------------------------------------------------------------------------------------


def block_fisher(model, name, x, parameters):
    """Exact Fisher of a few parameters (thesis order) of a classifier at logits."""
    full = references.fisher(model, name, x)
    index, start = {}, 0
    for key, p in model.named_parameters():
        index[key] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    order = torch.cat([index[parameters[0]].mT.flatten(), index[parameters[1]]])
    return full[order][:, order]


def test_kfac_with_one_repeated_input_is_the_exact_block_step():
    """All inputs one point: the sum of Kronecker products is one product, and KFAC is exact."""
    torch.manual_seed(0)
    model = MLP([5, 6, 3], "tanh", dtype=torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64).expand(8, 5)
    y = torch.randint(0, 3, (8,))
    loss = CrossEntropyAtLogits()
    damping = 1e-2
    options = {"curvature": "fisher_exact", "pi_correction": False, "max_change": None}
    optimizer = KFAC(model, 1.0, damping, loss=loss, **options)
    loss(model(x), y).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    blocks = {
        i: block_fisher(model, "CrossEntropyAtLogits", x, (f"linear{i}.weight", f"linear{i}.bias"))
        for i in (1, 2)
    }
    optimizer.step()
    for i, block in blocks.items():
        w, b = f"linear{i}.weight", f"linear{i}.bias"
        n_out, width = grads[w].shape
        # the block is A ⊗ B; damp its factors as KFAC does
        A = block.view(width + 1, n_out, width + 1, n_out).diagonal(dim1=1, dim2=3).sum(-1)
        A = A / A[-1, -1]
        B = block.view(width + 1, n_out, width + 1, n_out)[-1, :, -1, :]
        assert error(references.kron(A, B), block) < 1e-10
        root = damping**0.5
        damped = references.kron(
            A + root * torch.eye(width + 1, dtype=A.dtype), B + root * torch.eye(n_out, dtype=A.dtype)
        )
        grad = torch.cat([grads[w], grads[b][:, None]], 1)
        expected = -torch.linalg.solve(damped, references.vec(grad)).view(width + 1, n_out).mT
        now = dict(model.named_parameters())
        step = torch.cat([now[w] - before[w], (now[b] - before[b])[:, None]], 1)
        assert error(step.detach(), expected) < 1e-9


def test_kfac_sampled_factor_estimates_the_exact_one():
    """B of sampled targets is unbiased: with 4,000 draws per example it is within 5 %."""
    torch.manual_seed(0)
    model = MLP([5, 6, 3], "tanh", dtype=torch.float64)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))
    loss = CrossEntropyAtLogits()
    inverses = {}
    for curvature, samples in (("fisher_exact", 1), ("fisher_sampled", 4000), ("empirical_fisher", 1)):
        copy = MLP([5, 6, 3], "tanh", dtype=torch.float64)
        copy.load_state_dict(model.state_dict())
        optimizer = KFAC(copy, 0.0, 1.0, loss=loss, curvature=curvature, samples=samples, pi_correction=False)
        loss(copy(x), y).backward()
        optimizer.step()
        inverses[curvature] = optimizer.state[copy.linear1.weight]["b_inverse"]
    factors = {k: torch.linalg.inv(v) - torch.eye(6, dtype=x.dtype) for k, v in inverses.items()}
    preactivations = model.linear1(x).detach()
    J = vmap(jacrev(model[1:]))(preactivations).detach()
    p = model(x).softmax(-1).detach()
    D = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = (J.mT @ D @ J).mean(0)
    assert error(factors["fisher_exact"], exact) < 1e-10
    assert error(factors["fisher_sampled"], exact) < 0.05
    assert error(factors["empirical_fisher"], exact) > 0.05
