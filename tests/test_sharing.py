"""Layers whose weight is shared over positions, as matrices: both factorisations against the exact block.

Blocks are of θ = vec[W, b] (columns stacked), exact by ``torch.func``. The quadratic loss has D = 2I.
"""

import pytest
import torch
from references import relative_error
from torch import nn
from torch.func import functional_call, jacrev, vmap

from sogrid.capture import Capture, Wanted
from sogrid.kronecker import homogeneous, vec
from sogrid.layers import rule_of
from sogrid.losses import Quadratic
from sogrid.optimizers import ACP, EKFAC, KFAC
from sogrid.optimizers.ekfac import EKFACMethod, ekfac_moments
from sogrid.optimizers.kfac import KFACMethod
from sogrid.rows import SHARED, Rows

ROUNDING = 1e-11
S, I, O = 5, 4, 3


class Pool(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def network(*modules):
    torch.manual_seed(0)
    return nn.Sequential(*(module() if isinstance(module, type) else module for module in modules)).double()


def tokens(activation=nn.Identity, pooled=False):
    """Two layers on each token; the loss is of every token, or of the mean of their outputs."""
    return network(nn.Linear(I, 6), activation, nn.Linear(6, O), *([Pool] if pooled else []))


def rows_of(model, x, method):
    """Name → rows, with what the method draws at the output."""
    names = [name for name, module in model.named_modules() if rule_of(module) is not None]
    with Capture(model, wanted=Wanted(rows=names, probe=method.probe(0))) as capture:
        model(x).square().sum().backward()
        biased = {name: model.get_submodule(name).bias is not None for name in names}
        return {name: capture.records[name].rows()._replace(biased=biased[name]) for name in names}


def factors(rows, shared):
    """(A, B), whole."""
    method = KFACMethod(Quadratic(), "fisher_exact", 1, 0, shared)
    _, a, b = method.measure(rows, {}).dense()
    return a, b


def exact_block(model, name, x, curvature="fisher_exact"):
    """(1/n) Σ JᵀDJ of a layer, with all of its positions; or (1/n) Σ ggᵀ, for targets of zero."""
    layer = model.get_submodule(name)
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def output(theta, one):
        whole = parameters | {f"{name}.{key}": value for key, value in theta.items()}
        f = functional_call(model, whole, one.unsqueeze(0)).flatten()
        return f if curvature == "fisher_exact" else f.square().sum().view(1) / 2**0.5

    theta = {key: p.detach() for key, p in layer.named_parameters()}
    jacobian = vmap(jacrev(output), (None, 0))(theta, x)
    parts = [jacobian["weight"].flatten(3)] + [jacobian[k].unsqueeze(-1) for k in ("bias",) if k in jacobian]
    J = vec(torch.cat(parts, -1))
    return 2 * torch.einsum("nkp,nkq->pq", J, J) / len(x)


def assert_exact(model, x, shared, otherwise=False):
    """Every layer's block is A ⊗ B, or none is."""
    for name, rows in rows_of(model, x, KFACMethod(Quadratic(), "fisher_exact", 1, 0)).items():
        error = relative_error(torch.kron(*factors(rows, shared)), exact_block(model, name, x))
        assert error > 1e-2 if otherwise else error < ROUNDING


@pytest.mark.parametrize("n", [1, 7])
def test_expand_is_exact_for_linear_networks_on_each_token(n):
    model, x = tokens(), draw(n, S, I)
    assert_exact(model, x, "expand")
    assert_exact(model, x, "reduce", otherwise=True)


@pytest.mark.parametrize("n", [1, 7])
def test_reduce_is_exact_for_linear_networks_that_pool(n):
    model, x = tokens(pooled=True), draw(n, S, I)
    assert_exact(model, x, "reduce")
    assert_exact(model, x, "expand", otherwise=True)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("n", [1, 6])
def test_either_is_exact_for_one_input_repeated(shared, n):
    """At every position of every example, of a network that is not linear."""
    x = draw(I).expand(n, S, I)
    assert_exact(tokens(nn.Tanh, pooled=shared == "reduce"), x, shared)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("pooled", [False, True])
def test_either_is_exact_for_one_example_at_one_position(shared, pooled):
    assert_exact(tokens(nn.Tanh, pooled=pooled), draw(1, 1, I), shared)


@pytest.mark.parametrize("shared", SHARED)
def test_either_is_exact_for_linear_networks_without_positions(shared):
    assert_exact(network(nn.Linear(I, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, O)), draw(9, I), shared)


@pytest.mark.parametrize("groups", [1, 2])
def test_reduce_is_exact_for_a_linear_convolutional_network_that_pools(groups):
    """Each group has a block of its own, of its channels alone."""
    model = network(nn.Conv2d(4, 6, (2, 3), padding=1, groups=groups), nn.AvgPool2d((5, 4)), nn.Flatten())
    x = draw(5, 4, 4, 4)
    rows = rows_of(model, x, KFACMethod(Quadratic(), "fisher_exact", 1, 0))["0"]
    (a, b), width = factors(rows, "reduce"), 4 // groups * 6 + 1
    exact = exact_block(model, "0", x).view(width, 6, width, 6)
    for group in range(groups):
        own = slice(6 // groups * group, 6 // groups * (group + 1))
        found = torch.kron(*(m[group] if groups > 1 else m for m in (a, b)))
        assert relative_error(found, exact[:, own, :, own].flatten(2).flatten(0, 1)) < ROUNDING
    expanded = torch.kron(*(m[0] if groups > 1 else m for m in factors(rows, "expand")))
    assert relative_error(expanded, exact[:, : 6 // groups, :, : 6 // groups].flatten(2).flatten(0, 1)) > 0.1


@pytest.mark.parametrize("shared", SHARED)
def test_the_factors_are_means_written_out(shared):
    """Position by position, of rows at random."""
    h, g = draw(6, S, I), draw(6, S, O, seed=1)
    a, b = torch.zeros(I + 1, I + 1, dtype=h.dtype), torch.zeros(O, O, dtype=h.dtype)
    for h_n, g_n in zip(homogeneous(h), g, strict=True):
        if shared == "expand":
            for h_s, g_s in zip(h_n, g_n, strict=True):
                a, b = a + torch.outer(h_s, h_s) / (6 * S), b + torch.outer(g_s, g_s) / 6
        else:
            mean, total = sum(h_n) / S, sum(g_n)
            a, b = a + torch.outer(mean, mean) / 6, b + torch.outer(total, total) / 6
    found = factors(Rows(h, g, (g,), 6), shared)
    assert relative_error(found[0], a) < ROUNDING
    assert relative_error(found[1], b) < ROUNDING


def test_passes_with_other_numbers_of_positions_have_their_examples():
    """Sentences of two lengths: reduced, and in the moments of EKFAC, as each alone."""
    model, short, long = tokens(), draw(2, 3, I), draw(4, 6, I, seed=1)
    method = EKFACMethod(Quadratic(), "empirical_fisher", 1, 0)
    with Capture(model) as capture:
        (model(short).square().sum() + model(long).square().sum()).backward()
        both = capture.records["0"].rows()
    one, other = (rows_of(model, x, method)["0"] for x in (long, short))  # as gradients come
    n = both.examples
    assert (n, len(both.blocks)) == (6, 2)
    for found, expected in zip(both.blocks, (one, other), strict=True):
        assert relative_error(found.h, expected.h) == relative_error(found.g, expected.g) == 0
    reduced = both.reduced
    assert relative_error(reduced.h, torch.cat([one.reduced.h, other.reduced.h])) < ROUNDING
    assert relative_error(reduced.g, torch.cat([one.reduced.g, other.reduced.g])) < ROUNDING
    bases = torch.linalg.eigh(draw(I + 1, I + 1).cov())[1], torch.linalg.eigh(draw(6, 6).cov())[1]
    apart = sum(ekfac_moments(homogeneous(rows.h), rows.g, *bases) for rows in (one, other)) / n
    found = method.moments(both, dict(zip(("a_basis", "b_basis"), bases, strict=True)), {})
    assert relative_error(found, apart) < ROUNDING


NONLINEAR = {
    "tokens, pooled": lambda: (tokens(nn.Tanh, pooled=True), (S, I)),
    "images": lambda: (
        network(
            nn.Conv2d(2, 3, 3), nn.Tanh, nn.Conv2d(3, 4, 2, stride=2), nn.Tanh, nn.Flatten, nn.LazyLinear(2)
        ),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("curvature", ["fisher_exact", "empirical_fisher"])
def test_ekfac_is_nearer_to_the_exact_block_than_kfac(name, shared, curvature):
    """And its moments are the block's diagonal in the basis."""
    model, shape = NONLINEAR[name]()
    x = draw(8, *shape)
    model(x)
    method, nearer = EKFACMethod(Quadratic(), curvature, 1, 0, shared), []
    for layer, rows in rows_of(model, x, EKFACMethod(Quadratic(), "fisher_exact", 1, 0)).items():
        found = method.measure(rows, {}).dense()
        state, exact = method.invert(found, {}, layer), exact_block(model, layer, x, curvature)
        basis, moments = torch.kron(state["a_basis"], state["b_basis"]), vec(method.moments(rows, state, {}))
        assert relative_error(moments, (basis.mT @ exact @ basis).diagonal()) < ROUNDING
        theirs, ours = torch.kron(*found[1:]), basis @ moments.diag() @ basis.mT
        ours, theirs = (torch.dist(m, exact) for m in (ours, theirs))
        assert ours <= theirs + ROUNDING * exact.norm()  # either may be exact, as at the top
        nearer.append(ours < 0.99 * theirs)
    assert any(nearer)


def test_the_exact_fisher_of_a_sequence_pulls_back_all_positions_at_once():
    """So an example's gradient has products of positions, which the block of a loss for each has not."""
    model, x = tokens(nn.Tanh), draw(8, S, I)
    method = EKFACMethod(Quadratic(), "fisher_exact", 1, 0)
    rows = rows_of(model, x, method)["0"]
    state, exact = method.invert(method.measure(rows, {}), {}, "0"), exact_block(model, "0", x)
    basis = torch.kron(state["a_basis"], state["b_basis"])
    moments = vec(method.moments(rows, state, {}))
    assert relative_error(moments, (basis.mT @ exact @ basis).diagonal()) > 0.1


@pytest.mark.parametrize("name", ["tokens", "images"])
def test_acp_is_the_least_squares_of_all_positions(name):
    """Eqs. (6.2.4) and (6.2.5) without damping: every use moves by −sλ/α g, as nearly as one W and b can."""
    model = {
        "tokens": lambda: network(nn.Linear(I, O), nn.Tanh),
        "images": lambda: network(nn.Conv2d(2, 3, 2), nn.Tanh),
    }[name]()
    x, layer = draw(12, *{"tokens": (S, I), "images": (2, 4, 4)}[name]), model[0]
    before = torch.cat([layer.weight.flatten(1), layer.bias.unsqueeze(-1)], -1).detach()
    with Capture(model) as capture:
        model(x).square().sum().backward()
        rows = capture.records["0"].rows()
    moves = -0.1 / 0.7 * rows.h.shape[-2] * rows.outputs
    expected = torch.linalg.lstsq(homogeneous(rows.inputs), moves).solution.mT
    model.zero_grad()
    optimizer = ACP(model, 0.1, 0.0, output_curvature=0.7, max_change=None)
    (model(x).square().sum() / 12).backward()
    optimizer.step()
    after = torch.cat([layer.weight.flatten(1), layer.bias.unsqueeze(-1)], -1).detach()
    assert relative_error(after - before, expected) < 1e-9
    a = sum(torch.outer(h, h) for h in homogeneous(rows.inputs)) / len(rows.inputs)
    block = torch.kron(0.7 * a, torch.eye(3).double())  # A ⊗ αI of eq. (6.2.3), its inverse times ∇
    gradient = torch.cat([rows.product, rows.outputs.sum(0).unsqueeze(-1) / 12], -1)
    assert relative_error(vec(after - before), -0.1 * torch.linalg.solve(block, vec(gradient))) < 1e-9


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_another_word(kind):
    with pytest.raises(ValueError, match=r"shared must be one of .*'reduce'.*got 'sum'"):
        kind(tokens(), 0.1, loss=Quadratic(), shared="sum")


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_the_step_is_that_of_the_word(kind):
    """From the public class: with pooling *reduce* is exact, so one undamped step solves the layer's part."""
    x, steps = draw(20, S, I), {}
    for shared in SHARED:
        model = network(nn.Linear(I, O), Pool)
        before = torch.cat([model[0].weight, model[0].bias.unsqueeze(-1)], -1).detach()
        options = {"curvature": "fisher_exact", "shared": shared, "max_change": None}
        optimizer = kind(model, 1.0, 1e-12, loss=Quadratic(), **options)
        model(x).square().sum(1).mean().backward()
        optimizer.step()
        after = torch.cat([model[0].weight, model[0].bias.unsqueeze(-1)], -1).detach()
        steps[shared] = (after - before) / before.norm()
        if shared == "reduce":
            assert relative_error(after - before, -before) < 1e-4  # the targets are zero
    assert (steps["expand"] - steps["reduce"]).norm() > 0.1
