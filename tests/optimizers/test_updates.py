"""Each optimizer's step against its formula, written again with loops and dense matrices, and its limits."""

import pytest
import references
import torch
from torch import nn

from sogrid.losses import CrossEntropyAtLogits, CrossEntropyAtProbabilities, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN, Newton

ROUNDING = 1e-11
n, n_in, n_hidden, n_out = 30, 5, 6, 3


def network(seed=0, **options):
    torch.manual_seed(seed)
    return MLP([n_in, n_hidden, n_out], "tanh", dtype=torch.float64, **options)


def batch(seed=1, classes=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, n_in, generator=generator, dtype=torch.float64) + 0.3
    y = torch.randn(n, n_out, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, n_out, (n,), generator=generator) if classes else y


def per_example(model, loss, x, y):
    """{layer: (h, g)} by one backward pass per example, with un-normalised g."""
    found = {}
    for i in range(len(x)):
        h, pre = x[i : i + 1], []
        for module in model:
            if isinstance(module, nn.Linear):
                pre.append((module, h, module(h)))
                h = pre[-1][2]
            else:
                h = module(h)
        grads = torch.autograd.grad(loss.value(h, y[i : i + 1]).sum(), [a for _, _, a in pre])
        for (module, inputs, _), g in zip(pre, grads, strict=True):
            found.setdefault(module, []).append((inputs[0].detach(), g[0]))
    return {m: tuple(torch.stack(part) for part in zip(*pairs, strict=True)) for m, pairs in found.items()}


def step(optimizer, model, loss, x, y):
    """Take one step; {layer: (ΔW, Δb)}."""
    before = {m: [p.detach().clone() for p in m.parameters()] for m in model if isinstance(m, nn.Linear)}
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    return {m: torch.cat([(m.weight - w[0]).flatten(), (m.bias - w[1])]).detach() for m, w in before.items()}


def flat(dw, db):
    return torch.cat([dw.flatten(), db])


def assert_steps(found, expected, tolerance=ROUNDING):
    assert found.keys() == expected.keys()
    for module in found:
        assert references.relative_error(found[module], expected[module]) < tolerance


@pytest.mark.parametrize("correction", [False, True])
def test_centered_gradient_descent_is_algorithm_3(correction):
    model, (x, y), loss = network(), batch(), Quadratic()
    expected = {}
    for module, (h, g) in per_example(model, loss, x, y).items():
        mean = h.mean(0)
        dw = -0.1 * sum(torch.outer(gi, hi - mean) for gi, hi in zip(g, h, strict=True)) / n
        db = -0.1 * g.mean(0) - (dw @ mean if correction else 0)
        expected[module] = flat(dw, db)
    optimizer = CenteredGradientDescent(model, 0.1, bias_correction=correction, max_change=None)
    assert_steps(step(optimizer, model, loss, x, y), expected)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("alpha", [0.7, "heuristic"])
def test_acp_is_algorithm_4_with_statistics_of_their_own_minibatch(alpha, correction):
    """C (and the heuristic α) from S, the mean from B."""
    model, (x, y), (xs, ys), loss = network(), batch(1), batch(2), Quadratic()
    statistics = per_example(model, loss, xs, ys)
    expected = {}
    for module, (h, g) in per_example(model, loss, x, y).items():
        hs, gs = statistics[module]
        a = max(float(v) ** 2 for v in gs.flatten()) if alpha == "heuristic" else alpha
        C = sum(torch.outer(hi - hs.mean(0), hi - hs.mean(0)) for hi in hs) / n
        P = torch.linalg.inv(C + 0.2 / a * torch.eye(len(C), dtype=C.dtype))
        mean = h.mean(0)
        dw = -0.1 / a * sum(torch.outer(gi, hi - mean) for gi, hi in zip(g, h, strict=True)) / n @ P
        expected[module] = flat(dw, -0.1 / a * g.mean(0) - (dw @ mean if correction else 0))
    optimizer = ACP(model, 0.1, 0.2, output_curvature=alpha, bias_correction=correction, max_change=None)
    optimizer.refresh(lambda: loss(model(xs), ys))
    assert_steps(step(optimizer, model, loss, x, y), expected)


CURVATURES = ["fisher_exact", "gauss_newton_probabilities", "empirical_fisher"]


@pytest.mark.parametrize("loss", [CrossEntropyAtLogits(), CrossEntropyAtProbabilities()])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("pi_correction", [False, True])
def test_kfac_is_the_product_of_its_damped_factors(curvature, loss, pi_correction):
    """Cut at the logits or at the probabilities, the Fisher's step is the same."""
    at_logits = isinstance(loss, CrossEntropyAtLogits)
    model = network(output="identity" if at_logits else "softmax")
    (x, y), damping, expected = batch(classes=True), 0.03, {}
    outcomes = {c: per_example(model, loss, x, torch.full((n,), c)) for c in range(n_out)}
    p = model(x).detach() if not at_logits else model(x).detach().softmax(-1)
    for module, (h, g) in per_example(model, loss, x, y).items():
        tilde = torch.cat([h, torch.ones(n, 1, dtype=h.dtype)], 1)
        A = tilde.mT @ tilde / n
        if curvature == "fisher_exact":  # the expectation over labels, enumerated
            B = (
                sum(
                    (outcomes[c][module][1] * p[:, c : c + 1]).mT @ outcomes[c][module][1]
                    for c in range(n_out)
                )
                / n
            )
        else:
            B = g.mT @ g / n
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt() if pi_correction else 1.0
        A = A + pi * damping**0.5 * torch.eye(len(A), dtype=A.dtype)
        B = B + damping**0.5 / pi * torch.eye(len(B), dtype=A.dtype)
        G = g.mT @ tilde / n
        S = -0.1 * torch.linalg.solve(references.kron(A, B), references.vec(G)).view(len(A), len(B)).mT
        expected[module] = flat(S[:, :-1], S[:, -1])
    options = {"curvature": curvature, "pi_correction": pi_correction, "max_change": None}
    optimizer = KFAC(model, 0.1, damping, loss=loss, **options)
    assert_steps(step(optimizer, model, loss, x, y), expected)


def test_kfac_is_exact_on_deep_linear_networks_with_the_quadratic_loss():
    """J does not depend on the example: F_l = A ⊗ B for every layer, and Fisher = Gauss-Newton."""
    torch.manual_seed(0)
    model = MLP([n_in, n_hidden, n_out], "identity", dtype=torch.float64)
    (x, y), loss = batch(), Quadratic()
    fisher = references.fisher(model, "Quadratic", x)
    options = {"curvature": "fisher_exact", "pi_correction": False, "max_change": None}
    optimizer = KFAC(model, 1.0, 1e-10, loss=loss, **options)
    gradients = {}
    loss(model(x), y).backward()
    for module in (model.linear1, model.linear2):
        gradients[module] = flat(module.weight.grad, module.bias.grad)
    steps, start = step(optimizer, model, loss, x, y), 0
    for module, gradient in gradients.items():
        block = fisher[start : start + len(gradient), start : start + len(gradient)]
        start += len(gradient)
        # the gradient is in the block's range, and F Δ = −λ ∇R there; ε leaves an error of order √ε
        assert references.relative_error(block @ steps[module], -gradient) < 1e-4


@pytest.mark.parametrize("kind", [ACP, NaturalNN])
def test_infinite_damping_gives_the_centred_gradient(kind):
    """ε → ∞ with λ/ε fixed: ΔW is the centred gradient's step, with an error of order ‖C‖/ε."""
    model, (x, y), loss = network(), batch(), Quadratic()
    pairs = per_example(model, loss, x, y)
    found = step(kind(model, 1e8, 1e8, max_change=None), model, loss, x, y)
    for module, (h, g) in pairs.items():
        dw = -(g.mT @ (h - h.mean(0)) / n).flatten()
        assert references.relative_error(found[module][: dw.numel()], dw) < 1e-7


def test_whitened_inputs_give_sgd():
    """Zero mean and identity covariance: ACP with ε = 0, α = 1 takes SGD's step in the first layer."""
    model, (x, y), loss = network(), batch(), Quadratic()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.mT @ x / n)
    x = x @ vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    first = model.linear1
    h, g = per_example(model, loss, x, y)[first]
    optimizer = ACP(model, 0.1, 0.0, params=first.parameters(), max_change=None)
    found = step(optimizer, model, loss, x, y)[first]
    assert references.relative_error(found, flat(-0.1 * g.mT @ h / n, -0.1 * g.mean(0))) < ROUNDING


def test_amortisation_uses_the_statistics_of_the_last_refresh():
    """With N = 3, updates 1 and 2 use the covariance of update 0; with N = 1 always their own."""
    for every in (1, 3):
        model, loss = network(), Quadratic()
        optimizer = ACP(model, 0.1, 0.2, refresh_every=every)
        inverse = None
        for update in range(5):
            x, y = batch(update)
            if update % every == 0:
                C = torch.cov(x.mT, correction=0)
                inverse = torch.linalg.inv(C + 0.2 * torch.eye(n_in, dtype=C.dtype))
            step(optimizer, model, loss, x, y)
            used = optimizer.state[model.linear1.weight]["inverse"]
            assert references.relative_error(used, inverse) < ROUNDING


def test_averaged_statistics_are_those_of_the_mixed_population():
    """ρ = ½ after two refreshes: as if the two minibatches were one."""
    model, loss = network(), Quadratic()
    optimizer = ACP(model, 0.0, 0.2, refresh_every=1, averaging=0.5)
    (x1, y1), (x2, y2) = batch(1), batch(2)
    step(optimizer, model, loss, x1, y1)
    step(optimizer, model, loss, x2 + 1, y2)
    C = torch.cov(torch.cat([x1, x2 + 1]).mT, correction=0)
    wanted = torch.linalg.inv(C + 0.2 * torch.eye(n_in, dtype=C.dtype))
    used = optimizer.state[model.linear1.weight]["inverse"]
    assert references.relative_error(used, wanted) < ROUNDING


def test_newton_solves_a_quadratic_in_one_step():
    """A linear model, the quadratic loss: Hessian = Gauss-Newton = Fisher, and one step is the optimum."""
    x, y = batch()
    design = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    optimum = torch.linalg.lstsq(design, y).solution.mT
    for curvature in ("hessian", "gauss_newton", "fisher"):
        for reduction in ("mean", "sum"):
            torch.manual_seed(0)
            model = nn.Linear(n_in, n_out, dtype=torch.float64)
            loss = Quadratic(reduction)
            optimizer = Newton(model, loss=loss, curvature=curvature)
            loss(model(x), y).backward()
            optimizer.step()
            found = torch.cat([model.weight, model.bias[:, None]], 1).detach()
            assert references.relative_error(found, optimum) < 1e-10


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher"])
def test_newton_step_is_the_damped_solve(curvature):
    """Against matrices from per-example backward passes; the model is cut at the probabilities."""
    model, (x, y), loss = network(output="softmax"), batch(classes=True), CrossEntropyAtProbabilities()
    rows = torch.eye(n_out, dtype=torch.float64)[y]
    name = "CrossEntropyAtProbabilities"
    matrix = {
        "hessian": lambda: references.hessian(model, name, x, rows),
        "gauss_newton": lambda: references.gauss_newton(model, name, x, rows),
        "fisher": lambda: references.fisher(model, name, x),
    }[curvature]()
    loss(model(x), y).backward()  # no optimizer is watching yet: cleared below
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = -0.5 * torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=matrix.dtype), gradient)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = Newton(model, 0.5, 0.1, loss=loss, curvature=curvature)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert references.relative_error(after - before, expected) < 1e-9
