"""Layers wider than the minibatch: the thin route takes the dense route's steps, and says so.

The references write every formula again with whole matrices and ``torch.linalg.inv``.
"""

import io
from functools import partial
from itertools import pairwise

import pytest
import references
import torch
from optimizer_list import assert_same, parameters
from torch import nn

from sogrid.factorize import FactorizationError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, KFAC, NaturalNN

ROUNDING = 1e-11
LOSS = CrossEntropyAtLogits()
LR, N, WIDTHS = 0.1, 5, [40, 25, 12, 3]  # KFAC's output factors: thin, thin, dense


def network(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias, dtype=dtype) for i, o in pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def batch(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, WIDTHS[0], generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), torch.randint(WIDTHS[-1], (N,), generator=generator)


def train(model, optimizer, seeds):
    for seed in seeds:
        x, y = batch(seed, next(model.parameters()).dtype)
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


def linear_layers(model):
    return [module for module in model if isinstance(module, nn.Linear)]


# --- the references --------------------------------------------------------------------------------


def per_example(model, x, y):
    """(h, g, rows of the exact Fisher) of every layer, g un-normalised."""
    h, pairs = x, []
    for module in model:
        out = module(h)
        if isinstance(module, nn.Linear):
            pairs.append((h.detach(), out))
        h = out
    preactivations = [a for _, a in pairs]
    pull = partial(torch.autograd.grad, inputs=preactivations, retain_graph=True)
    p = h.detach().softmax(-1)
    scores = [p[:, c : c + 1].sqrt() * (p - torch.eye(3, dtype=p.dtype)[c]) for c in range(3)]
    rows = [pull(h, grad_outputs=score) for score in scores]
    g = pull(LOSS.value(h, y).sum())
    return [(pair[0], g[i], [row[i] for row in rows]) for i, pair in enumerate(pairs)]


def damped_inverse(matrix, damping):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def moment(rows):
    return rows.mT @ rows / N


def tilde(h, bias):
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h


def split(step, bias):
    return (step[:, :-1], step[:, -1]) if bias else (step, None)


def acp(now, then, bias, damping=0.05, output_curvature=1.0, tikhonov="printed", bias_correction=True):
    (h, g, _), (hs, gs, _) = now, then
    alpha = gs.abs().max() ** 2 if output_curvature == "heuristic" else output_curvature
    d = damping / alpha
    if tikhonov == "exact" or not bias:  # of the whole block
        return split(
            -LR / alpha * g.mT @ tilde(h, bias) / N @ damped_inverse(moment(tilde(hs, bias)), d), bias
        )
    dw = -LR / alpha * g.mT @ (h - h.mean(0)) / N @ damped_inverse(moment(hs - hs.mean(0)), d)
    return dw, -LR / alpha * g.mean(0) - (dw @ h.mean(0) if bias_correction else 0)


def natural(now, then, bias, damping=0.05):
    (h, g, _), (hs, *_) = now, then
    mu = hs.mean(0) if bias else torch.zeros_like(hs[0])
    dw = -LR * g.mT @ (h - mu) / N @ damped_inverse(moment(hs - mu), damping)
    return dw, -LR * g.mean(0) - dw @ mu if bias else None


def kfac(now, then, bias, damping=0.05, curvature="fisher_exact", pi_correction=False):
    (h, g, _), (hs, gs, rows) = now, then
    A, B = moment(tilde(hs, bias)), sum(map(moment, rows if curvature == "fisher_exact" else [gs]))
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt() if pi_correction else 1.0
    G = g.mT @ tilde(h, bias) / N
    return split(-LR * damped_inverse(B, damping**0.5 / pi) @ G @ damped_inverse(A, damping**0.5 * pi), bias)


METHODS = {
    "acp": (ACP, acp, {"bias_correction": False}),
    "acp, bias corrected": (ACP, acp, {}),
    "acp, α = 0.3": (ACP, acp, {"output_curvature": 0.3}),
    "acp, heuristic": (ACP, acp, {"output_curvature": "heuristic", "damping": 0.01}),
    "acp, exact": (ACP, acp, {"tikhonov": "exact"}),
    "acp, exact, heuristic": (ACP, acp, {"tikhonov": "exact", "output_curvature": "heuristic"}),
    "nnn": (NaturalNN, natural, {}),
    "kfac": (partial(KFAC, loss=LOSS), kfac, {"curvature": "fisher_exact", "pi_correction": True}),
    "kfac, empirical": (
        partial(KFAC, loss=LOSS),
        kfac,
        {"curvature": "empirical_fisher", "pi_correction": True},
    ),
    "kfac, no π": (partial(KFAC, loss=LOSS), kfac, {"curvature": "empirical_fisher"}),
}
every_method = pytest.mark.parametrize(("kind", "reference", "options"), METHODS.values(), ids=METHODS)


def cut(matrix, rank):
    """The nearest matrix of that rank, from a singular value decomposition."""
    u, s, vt = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ vt[:rank]


# --- the tests -------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_those_of_whole_matrices(kind, reference, options, bias):
    """Five updates with a refresh before every second, from minibatches of five."""
    model, twin, options = network(bias), network(bias), {"damping": 0.05, **options}
    optimizer = kind(model, LR, refresh_every=2, max_change=None, **options)
    start = torch.cat([p.flatten() for p in parameters(twin)])
    for seed in range(5):
        train(model, optimizer, [seed])
        now = per_example(twin, *batch(seed))
        if seed % 2 == 0:
            then = now
        with torch.no_grad():
            for layer, *pair in zip(linear_layers(twin), now, then, strict=True):
                dw, db = reference(*pair, bias, **options)
                layer.weight += dw
                if bias:
                    layer.bias += db
    found, expected = (torch.cat([p.flatten() for p in parameters(m)]) - start for m in (model, twin))
    assert references.relative_error(found, expected) < ROUNDING


@every_method
def test_the_route_shows_in_the_state_and_in_the_repr(kind, reference, options):
    """n < m counts rows: three probes of the exact Fisher are 15, too many for 12 units."""
    model = network()
    optimizer = kind(model, LR, **options)
    assert "inverses" not in repr(optimizer)
    train(model, optimizer, [1])
    if kind in (ACP, NaturalNN):
        routes = "0 thin, 2 thin, 4 thin"
    elif options["curvature"] == "fisher_exact":
        routes = "0 thin/thin, 2 thin/dense, 4 thin/dense"
    else:
        routes = "0 thin/thin, 2 thin/thin, 4 thin/dense"
    assert f"\ninverses: {routes}\n" in repr(optimizer)
    state = optimizer.state[model[0].weight]
    key = "inverse" if kind in (ACP, NaturalNN) else "a_inverse"
    assert len(state[key]) == N + (options.get("tikhonov") == "exact")
    assert state[key + "_shift"].shape == ()
    assert all(type(value) in (torch.Tensor, bool, int) for value in state.values())


@every_method
def test_averaged_statistics_are_of_full_rank_and_take_the_dense_route(kind, reference, options):
    """With next to no weight on the old ones, the steps are those without averaging."""
    model, twin = network(), network()
    averaging = kind(model, LR, averaging=1e-15, refresh_every=1, **options)
    train(model, averaging, [1, 2])
    train(twin, kind(twin, LR, refresh_every=1, **options), [1, 2])
    assert "thin" not in repr(averaging)
    for one, other in zip(parameters(model), parameters(twin), strict=True):
        assert references.relative_error(one, other) < ROUNDING


@every_method
def test_a_checkpoint_of_thin_inverses_continues_bit_for_bit(kind, reference, options):
    """Saved between two refreshes, loaded over statistics of another model."""
    straight, model, other = network(), network(), network()
    train(straight, kind(straight, LR, refresh_every=3, **options), range(7))
    optimizer = kind(model, LR, refresh_every=3, **options)
    train(model, optimizer, range(2))
    resumed = kind(other, LR, refresh_every=3, averaging=0.5, **options)  # dense ones
    train(other, resumed, [20])
    resumed.averaging = 0.0
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.state_dict(), optimizer.state_dict())
    train(other, resumed, range(2, 7))
    assert_same(parameters(other), parameters(straight))


@every_method
def test_thin_inverses_move_with_the_model(kind, reference, options):
    """Refused by name until the state is loaded again, as the dense ones are."""
    model = network(dtype=torch.float32)
    optimizer = kind(model, LR, **options)
    train(model, optimizer, [1])
    model.double()
    with pytest.raises(ValueError, match=r"layer '0' is torch\.float64 on cpu, its \w+ torch\.float32"):
        train(model, optimizer, [2])
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [2])
    assert "thin" in repr(optimizer)


@pytest.mark.parametrize("damping", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind, _, options in METHODS.values() if kind in (ACP, NaturalNN)],
)
def test_without_damping_the_error_names_one_that_gives_a_thin_inverse(kind, options, damping):
    model = network()
    optimizer = kind(model, LR, **(options | {"damping": damping}))
    before = parameters(model)
    with pytest.raises(FactorizationError, match=r"layer '0'.*would have helped.*damping \(ε\) ≥") as error:
        train(model, optimizer, [1])
    assert_same(parameters(model), before)
    optimizer.param_groups[0]["damping"] = float(str(error.value).split("≥ ")[1])
    train(model, optimizer, [1])
    assert "0 thin" in repr(optimizer)
    assert all(bool(torch.isfinite(p).all()) for p in parameters(model))


RANKED = {name: METHODS[name] for name in ("acp", "acp, heuristic", "nnn", "kfac, empirical", "kfac, no π")}


@pytest.mark.parametrize(("kind", "reference", "options"), RANKED.values(), ids=RANKED)
@pytest.mark.parametrize("averaging", [0.0, 1e-15], ids=["of rows", "of a matrix"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_step_of_low_rank_is_that_of_the_matrices_cut(
    monkeypatch, kind, reference, options, averaging, rank
):
    model, twin, options = network(), network(), {"damping": 0.05, **options}
    optimizer = kind(model, LR, rank=rank, averaging=averaging, max_change=None, **options)
    train(model, optimizer, [1])
    assert "dense" not in repr(optimizer) or WIDTHS[-1] <= rank
    whole = damped_inverse
    monkeypatch.setitem(globals(), "damped_inverse", lambda matrix, shift: whole(cut(matrix, rank), shift))
    start, seen = parameters(twin), per_example(twin, *batch(1))
    with torch.no_grad():
        for layer, pair in zip(linear_layers(twin), seen, strict=True):
            dw, db = reference(pair, pair, True, **options)
            layer.weight += dw
            layer.bias += db
    for found, expected, begin in zip(parameters(model), parameters(twin), start, strict=True):
        assert references.relative_error(found - begin, expected - begin) < ROUNDING


@pytest.mark.parametrize(("kind", "reference", "options"), RANKED.values(), ids=RANKED)
def test_a_rank_that_cuts_nothing_changes_no_bit(kind, reference, options):
    model, twin = network(), network()
    train(model, kind(model, LR, rank=N, **options), [1, 2])
    train(twin, kind(twin, LR, **options), [1, 2])
    assert_same(parameters(model), parameters(twin))


def test_a_rank_is_one_parameter_groups():
    model = network()
    groups = [{"params": model[0].parameters(), "rank": 2}, {"params": model[2].parameters()}]
    optimizer = ACP(model, LR, params=groups)
    train(model, optimizer, [1])
    assert [len(optimizer.state[model[k].weight]["inverse"]) for k in (0, 2)] == [2, N]


def test_gradients_are_not_written_to():
    """Without a scale the update gets ``.grad`` itself."""
    for kind, _, options in METHODS.values():
        model = network()
        optimizer = kind(model, LR, **options)
        LOSS(model(batch(1)[0]), batch(1)[1]).backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert_same([p.grad for p in model.parameters()], before)
