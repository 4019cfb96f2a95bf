"""``max_change``: the bound on how far a step moves a layer's pre-activations."""

import pytest
import torch
from torch import nn

from sogrid.bound import BOUND_EXAMPLES, bounded
from sogrid.losses import Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN, UpdatedBackprop
from sogrid.optimizers.kfac import KFACMethod

METHODS = {
    "centred": lambda model, **o: CenteredGradientDescent(model, **o),
    "acp": lambda model, **o: ACP(model, damping=0.01, **o),
    "nnn": lambda model, **o: NaturalNN(model, damping=0.01, **o),
    "kfac": lambda model, **o: KFAC(model, damping=0.01, loss=Quadratic(), **o),
    "ubp": lambda model, **o: UpdatedBackprop(model, loss=Quadratic(), **o),
}


@pytest.fixture
def x(generator):
    return torch.rand(40, 12, dtype=torch.float64, generator=generator)


def network(bias=True):
    """Biases are trained, not there, or "frozen"."""
    torch.manual_seed(3)
    model = MLP([12, 15, 4, 12], "sigmoid", "sigmoid", scale=16.0, dtype=torch.float64)
    for module in model:
        if isinstance(module, nn.Linear):
            if bias == "frozen":
                module.bias.requires_grad_(False)
            elif not bias:
                module.bias = None
    return model


def inputs(model, x):
    """What enters each linear layer."""
    found = []
    for module in model:
        if isinstance(module, nn.Linear):
            found.append((module, x.detach()))
        x = module(x)
    return found


def step(method, x, *, lr=10.0, bias=True, **options):
    """Layer → (h, ΔW, Δb) of one step."""
    model = network(bias)
    optimizer = METHODS[method](model, lr=lr, **options)
    before = [(h, m, m.weight.detach().clone(), None if m.bias is None else m.bias.detach().clone())
              for m, h in inputs(model, x)]  # fmt: skip
    optimizer.zero_grad()
    Quadratic()(model(x), x).backward()
    optimizer.step()
    return [(h, m.weight.detach() - w, None if b is None else m.bias.detach() - b) for h, m, w, b in before]


def rms(h, dw, db, examples=BOUND_EXAMPLES):
    """rms_{i,j} (ΔW h_i + Δb)_j by a loop over examples."""
    rows = [dw @ row + (0 if db is None else db) for row in h[:examples]]
    return torch.stack(rows).square().mean().sqrt()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_step_is_shrunk_to_the_bound_and_keeps_its_direction(method, gradients, bias, x):
    free = step(method, x, bias=bias, gradients=gradients, max_change=None)
    shrunk = step(method, x, bias=bias, gradients=gradients, max_change=0.05)
    for (h, dw, db), (_, dw_free, db_free) in zip(shrunk, free, strict=True):
        assert rms(h, dw_free, db_free) > 0.05
        assert rms(h, dw, db).item() == pytest.approx(0.05, rel=1e-12)
        if method == "ubp" and dw is not shrunk[-1][1]:
            continue  # what comes down from a shorter step has another direction, see below
        share = 0.05 / rms(h, dw_free, db_free)
        torch.testing.assert_close(dw, share * dw_free, rtol=1e-9, atol=1e-15)
        if bias:
            torch.testing.assert_close(db, share * db_free, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_a_small_step_is_left_alone(method, gradients, x):
    options = {"lr": 1e-6, "gradients": gradients}
    for (_, dw, db), (_, dw_free, db_free) in zip(
        step(method, x, max_change=1.0, **options), step(method, x, max_change=None, **options), strict=True
    ):
        torch.testing.assert_close(dw, dw_free, rtol=1e-6, atol=1e-18)
        torch.testing.assert_close(db, db_free, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("bias", [True, False, "frozen"])
@pytest.mark.parametrize("kappa", [0.05, None])
def test_updated_backpropagation_passes_down_the_gradient_after_the_step_it_makes(gradients, bias, kappa, x):
    """Algorithm 2 by a Jacobian for each example, each layer's step shrunk before the next is decided."""
    model, lr = network(bias), 5.0
    modules = list(model)
    h, changes = [x], []
    for module in modules:
        h.append(module(h[-1]).detach())
    dh = 2 * (h[-1] - x)  # and D = 2
    for at in reversed(range(0, len(modules), 2)):
        layer, entered, a = modules[at], h[at], h[at + 1]
        slope = h[at + 2] * (1 - h[at + 2])
        g = slope * dh
        dw = -lr * torch.stack([torch.outer(*pair) for pair in zip(g, entered, strict=True)]).mean(0)
        db = -lr * g.mean(0) if bias is True else None
        if kappa is not None:
            share = (kappa / rms(entered, dw, db)).clamp(max=1)
            assert share < 1 or changes, "else nothing is tested"
            dw, db = share * dw, share * db if bias is True else None
        changes.append((dw, db))
        above = torch.nn.Sequential(*modules[at + 1 :])
        jacobians = [torch.func.jacrev(above)(row) for row in a]
        moved = [dw @ row + (0 if db is None else db) for row in entered]
        w = layer.weight.detach()
        dh = torch.stack([
            (w + dw).T @ g[i] + w.T @ (j.T @ (2 * j @ moved[i])) for i, j in enumerate(jacobians)
        ])  # fmt: skip
    found = step("ubp", x, lr=lr, bias=bias, gradients=gradients, max_change=kappa)
    for (_, dw, db), (dw_expected, db_expected) in zip(found, changes[::-1], strict=True):
        torch.testing.assert_close(dw, dw_expected.detach(), rtol=1e-9, atol=1e-13)
        if bias:
            expected = torch.zeros_like(db) if db_expected is None else db_expected.detach()
            torch.testing.assert_close(db, expected, rtol=1e-9, atol=1e-13)


def test_each_layer_is_bounded_by_itself(x):
    """A layer whose step is small is not shrunk because another's is large."""
    free = [rms(*layer).item() for layer in step("acp", x, max_change=None)]
    kappa = sorted(free)[1] * 0.99
    found = [rms(*layer).item() for layer in step("acp", x, max_change=kappa)]
    assert found == pytest.approx([min(f, kappa) for f in free], rel=1e-9)
    assert min(found) < 0.9 * kappa


def test_the_bound_is_a_group_s_and_may_change_while_training(x):
    model = network()
    linear = [m for m in model if isinstance(m, nn.Linear)]
    groups = [{"params": m.parameters()} for m in linear]
    groups[0]["max_change"] = 0.01
    optimizer = ACP(model, 10.0, 0.01, params=groups)
    for kappa in (0.01, 0.02):
        optimizer.param_groups[0]["max_change"] = torch.tensor(kappa)
        before = [m.weight.detach().clone() for m in linear], linear[0].bias.detach().clone()
        optimizer.zero_grad()
        Quadratic()(model(x), x).backward()
        optimizer.step()
        dw, db = linear[0].weight.detach() - before[0][0], linear[0].bias.detach() - before[1]
        assert rms(x, dw, db).item() == pytest.approx(kappa, rel=1e-6)  # a float32 tensor's
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["max_change"] == torch.tensor(0.02)


@pytest.mark.parametrize("kappa", [0.05, 1e6])
def test_the_share_is_the_same_as_a_number_and_as_a_tensor(kappa, generator):
    """One network's κ is a number; those of a grid, or on an accelerator, are tensors."""
    dw, db, h = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((5, 7), (5,), (20, 7)))
    one = bounded(dw.clone(), db.clone(), h, kappa)
    of_grid = bounded(dw[None].clone(), db[None].clone(), h[None], torch.tensor([kappa], dtype=torch.float64))
    for alone, batched in zip(one, of_grid, strict=True):
        torch.testing.assert_close(alone, batched[0], rtol=1e-14, atol=0)
    assert torch.equal(one[0], dw) == (kappa == 1e6)


@pytest.mark.parametrize("batched", [False, True])
def test_a_change_that_is_not_a_number_is_not_applied_in_silence(batched):
    """ΔW and h are finite; their product, ∞ − ∞, is not."""
    dw, h = torch.tensor([[1e30, -1e30]]), torch.tensor([[1e30, 1e30]])
    lead = (None,) if batched else ()
    change, _ = bounded(dw[lead], None, h[lead], torch.ones(1) if batched else 1.0)
    assert change.isnan().all()


def test_only_the_first_examples_count(generator):
    h = torch.randn(100, 5, dtype=torch.float64, generator=generator)
    dw, db = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 5), (3,)))
    small, small_b = bounded(dw, db, h, 0.1)
    assert rms(h, small, small_b).item() == pytest.approx(0.1)
    assert rms(h, small, small_b, 100).item() != pytest.approx(0.1, rel=1e-3)
    stacked = bounded(torch.stack([dw, 2 * dw]), torch.stack([db, 2 * db]), torch.stack([h, h]), 0.1)
    torch.testing.assert_close(stacked[0], torch.stack([small, small]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_change", [None, 0.1])
def test_probes_are_pulled_back_for_statistics_alone(x, max_change, monkeypatch):
    """A bound keeps inputs at every update, which must not cost a backward pass for KFAC's probes."""
    pulled, probe = [], KFACMethod.probe
    monkeypatch.setattr(KFACMethod, "probe", lambda *a: lambda f, *b: pulled.append(f) or probe(*a)(f, *b))
    model = network()
    optimizer = KFAC(model, 0.1, 0.1, loss=Quadratic(), refresh_every=3, max_change=max_change)
    for _ in range(7):
        optimizer.zero_grad()
        Quadratic()(model(x), x).backward()
        optimizer.step()
    assert len(pulled) == 3


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_a_wrong_bound_is_named(wrong):
    with pytest.raises(ValueError, match=r"max_change \(κ\) must be positive"):
        ACP(network(), 0.1, max_change=wrong)
