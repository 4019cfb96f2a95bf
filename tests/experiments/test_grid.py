"""A grid is its configurations' own runs: same losses to rounding, whatever happens to the others."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch

from sogrid.experiments.benchmarks import METHODS, Method, Task
from sogrid.experiments.grid import StackedMLP, pooled_digits, train_grid
from sogrid.experiments.training import run
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN, UpdatedBackprop

ROUNDING = 1e-11
N, WIDTH, CLASSES = 120, 12, 3
PLAN = {"updates": 9, "points": range(10)}
REFRESH = {"refresh_every": 4, "gradients": "factored"}


@cache
def task(kind: str, dtype: torch.dtype = torch.float64) -> Task:
    """A regression whose outputs may overflow, or a classification, 12-8-5-·."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (N,), generator=generator) if kind == "classes" else x.roll(1, -1)
    network = partial(MLP, [WIDTH, 8, 5, CLASSES if kind == "classes" else WIDTH], "tanh", dtype=dtype)
    loss = CrossEntropyAtLogits() if kind == "classes" else Quadratic()
    return Task(kind, None, (x[20:], y[20:]), (x[:20], y[:20]), network, loss)


def method(kind, *settings, **options):
    """A method of one's own; losses are given to those that ask for one, and bounds are a setting."""
    takes_loss, options = kind in (KFAC, UpdatedBackprop), {"max_change": None, **options}
    build = lambda model, loss, s: kind(model, **(options | s), **({"loss": loss} if takes_loss else {}))  # noqa: E731
    return Method(build, settings=settings or ("lr", "damping"))


CASES = {
    "sgd": METHODS["standard_sgd"],
    "centred": method(CenteredGradientDescent, "lr", gradients="factored"),
    "acp": method(ACP, output_curvature="heuristic", bias_correction=False, **REFRESH),
    "acp, α each": method(ACP, "lr", "damping", "output_curvature", **REFRESH),
    "acp, exact": method(ACP, "lr", "damping", "output_curvature", tikhonov="exact", **REFRESH),
    "acp, exact heuristic": method(ACP, output_curvature="heuristic", tikhonov="exact", **REFRESH),
    "acp, averaged": method(ACP, averaging=0.7, **REFRESH),
    "acp, one damping": method(ACP, "lr", damping=0.3, **REFRESH),
    "acp, bounded": method(ACP, "lr", "damping", "max_change", **REFRESH),
    "acp, rank 2": method(ACP, rank=2, **REFRESH),
    "nnn": method(NaturalNN, **REFRESH),
    "kfac": method(KFAC, pi_correction=True, **REFRESH),
    "kfac, two draws": method(KFAC, samples=2, seed=5, pi_correction=False, **REFRESH),
    "kfac, exact": method(KFAC, curvature="fisher_exact", pi_correction=True, **REFRESH),
    "kfac, empirical": method(KFAC, curvature="empirical_fisher", averaging=0.5, **REFRESH),
    "ubp": method(UpdatedBackprop, "lr", gradients="factored"),
    "ubp, hessian": method(UpdatedBackprop, "lr", curvature="hessian", gradients="factored"),
    "ubp, bounded": method(UpdatedBackprop, "lr", "max_change", gradients="factored"),
    "ubp, none": method(UpdatedBackprop, "lr", curvature="none", gradients="factored"),
}
VALUES = {
    "lr": [0.01, 0.03, 0.002],
    "damping": [0.1, 1.0, 0.5],
    "output_curvature": [1.0, 0.5, 3.0],
    "max_change": [1e-3, 1e-2, 10.0],
    "scale": [2.0, 0.5, 8.0],
}
HUGE = {torch.float32: 1e30, torch.float64: 1e200}


def settings(case: Method, count=3, **more) -> list[dict]:
    return [{k: VALUES[k][i] for k in (*case.settings, "scale")} | more for i in range(count)]


def alone(problem, case, configurations, seeds, monkeypatch, **plan):
    """Each by the ordinary loop."""
    monkeypatch.setitem(METHODS, "case", case)
    return [
        run(problem, "case", own, seed=seed, progress=None, **PLAN, **plan)
        for own, seed in zip(configurations, seeds, strict=True)
    ]


def assert_same(curves, runs):
    for curve, expected in zip(curves, runs, strict=True):
        assert curve.update == expected["update"]
        assert curve.status == expected["status"]
        for name in ("train", "test", "train_error", "test_error"):
            assert getattr(curve, name) == pytest.approx(expected[name], rel=ROUNDING)


def halves(*factors, without=()):
    """For each case half of the combinations of two-valued factors, for its neighbour the other half.

    Of three factors, each pair of values meets in every case.
    """
    places = list(product(range(2), repeat=len(factors)))
    return [
        pytest.param(name, *values, id="-".join([name, *map(str, values)]))
        for number, name in enumerate(name for name in CASES if name not in without)
        for place in places
        if sum(place) % 2 == number % 2
        for values in [[factor[i] for factor, i in zip(factors, place, strict=True)]]
    ]


@pytest.mark.parametrize(
    ("case", "kind", "batch", "seeds"),
    halves(["regression", "classes"], [5, 40], [(0, 0, 0), (3, 1, 3)]),
)
def test_each_of_a_grid_is_its_own_run(case, kind, batch, seeds, monkeypatch):
    """With three refreshes, at every update; a batch of 5 keeps statistics thin; orders shared, or own."""
    problem, case = task(kind), CASES[case]
    curves = train_grid(problem, case, settings(case), seeds=seeds, batch=batch, **PLAN)
    assert_same(curves, alone(problem, case, settings(case), seeds, monkeypatch, batch=batch))
    assert all(curve.status == "finished" for curve in curves)
    assert all(curve.train[0] != curve.train[-1] for curve in curves)


OUTSIDE = "bn", "mean_only_bn", "momentum", "adam", "muon"


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OUTSIDE])
def test_a_grid_of_one_is_the_single_network(name, monkeypatch):
    """Every method of the thesis's figures that a chain without normalisation can have."""
    for kind in ("regression", "classes"):
        problem, case = task(kind), METHODS[name]
        curves = train_grid(problem, name, settings(case, 1), seeds=2, batch=40, **PLAN)
        assert_same(curves, alone(problem, case, settings(case, 1), [2], monkeypatch, batch=40))


BOUNDED = [name for name in CASES if "bounded" in name]  # these cannot diverge


@pytest.mark.parametrize(
    ("case", "batch", "dtype"), halves([5, 40], [torch.float32, torch.float64], without=BOUNDED)
)
def test_who_diverges_disturbs_nobody(case, batch, dtype, monkeypatch):
    """The others are the same bits as beside a sane one; it is reported where its own run would be."""
    problem, case = task("regression", dtype), CASES[case]
    sane = settings(case)
    mad = {**sane[0], "lr": HUGE[dtype]}
    plan = {"seeds": [0, 0, 4, 0], "batch": batch, **PLAN}
    curves, expected = (train_grid(problem, case, [sane[0], k, *sane[1:]], **plan) for k in (mad, sane[0]))
    lost = curves.pop(1)
    assert [(c.train, c.test) for c in curves] == [(c.train, c.test) for c in (expected[0], *expected[2:])]
    assert all(curve.status == "finished" for curve in curves)
    (expected,) = alone(problem, case, [mad], [0], monkeypatch, batch=batch)
    assert lost.status == expected["status"] == "diverged"
    assert lost.reason.startswith("update ")
    assert lost.update == expected["update"]


@pytest.mark.parametrize("batch", [5, 40])
def test_what_cannot_be_inverted_is_reported_and_disturbs_nobody(batch):
    """A pixel that never changes, and no damping: the first layer's covariance is singular."""
    problem = task("regression")
    x, y = problem.train
    problem = replace(problem, train=(x.clone().index_fill_(1, torch.tensor(3), 0.0), y))
    sane = settings(CASES["acp, one damping"], 2)
    sane = [{**own, "damping": 0.1 * (k + 1)} for k, own in enumerate(sane)]
    curves, expected = (
        train_grid(problem, "acp_fixedalpha", [{**sane[0], "damping": d}, *sane], batch=batch, **PLAN)
        for d in (0.0, 0.3)
    )
    assert [c.status for c in curves] == ["diverged", "finished", "finished"]
    assert curves[0].reason == "update 1: a damped matrix is not positive definite, or not finite"
    assert curves[0].update == [0]
    assert [c.train for c in curves[1:]] == [c.train for c in expected[1:]]


@pytest.mark.parametrize("case", ["sgd", "acp", "kfac", "ubp"])
def test_a_loss_that_sums_means_what_it_means_alone(case, monkeypatch):
    """SGD's step is that of the sum; the other methods take the mean's."""
    build = {
        "acp": lambda m, loss, s: ACP(m, **s, reduction="sum", output_curvature="heuristic", **REFRESH),
        **{name: CASES[name].optimizer for name in ("sgd", "kfac", "ubp")},
    }[case]
    problem, case = (
        replace(task("classes"), loss=CrossEntropyAtLogits("sum")),
        replace(CASES[case], optimizer=build),
    )
    curves = train_grid(problem, case, settings(case), batch=40, **PLAN)
    assert_same(curves, alone(problem, case, settings(case), [0] * 3, monkeypatch, batch=40))


def test_a_grid_ends_when_nobody_is_left():
    case = CASES["sgd"]
    curves = train_grid(
        task("regression"), case, settings(case, lr=1e200), updates=10**9, points=[0, 50], batch=40
    )
    assert [curve.update for curve in curves] == [[0]] * 3


def test_a_stack_of_networks_is_its_networks():
    networks = [task("regression").network(scale=s, generator=torch.Generator()) for s in (1.0, 4.0)]
    stack, x = StackedMLP(networks), task("regression").train[0]
    for inputs in (x, torch.stack([x, x])):
        expected = torch.stack([network(x) for network in networks])
        assert torch.allclose(stack(inputs), expected, rtol=1e-14, atol=0)
    seen = stack.trace(x)
    pulled = seen.pull(torch.ones_like(seen.f))
    for k, network in enumerate(networks):
        a = network.linear1(x).detach().requires_grad_()
        network[1:](a).sum().backward()
        assert torch.allclose(pulled[0][k], a.grad, rtol=1e-12, atol=1e-15)
    assert not any(w.requires_grad for w in stack.weights)


def test_pooled_digits_are_means_of_nine_pixels():
    digits = pooled_digits()
    image, small = digits.data.train[0][7].view(28, 28), digits.train[0][7].view(8, 8)
    assert digits.train[0].shape == (10_000, 64)
    assert small[3, 4] == pytest.approx(float(image[11:14, 14:17].mean()))


MORE = {"momentum": 0.5}, {"weight_decay": 0.01}, {"maximize": True}, {"refresh_every": "adaptive"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bn", {}, "without|chains of linear layers"),
        ("adagrad", {}, "method must be one of"),
        ("adam", {}, "no update"),
        ("standard_sgd", {"seeds": [1]}, "as many seeds"),
        (Method(lambda m, loss, s: torch.optim.SGD(m.parameters(), **s, momentum=0.5)), {}, "momentum"),
        *((Method(lambda m, loss, s, own=own: ACP(m, **s, **own)), {}, next(iter(own))) for own in MORE),
        (Method(lambda m, loss, s: EKFAC(m, **s, loss=loss)), {}, "EKFAC has no update"),
        (Method(lambda m, loss, s: torch.optim.Adam(m.parameters(), **s)), {}, "Adam has no update"),
        (Method(lambda m, loss, s: ACP(m, **s, params=m.linear1.parameters())), {}, "all weights and biases"),
    ],
)
def test_what_a_grid_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        train_grid(task("regression"), name, settings(CASES["sgd"]), **options, **PLAN)


def test_a_grid_refuses_configurations_of_several_kinds():
    build = lambda model, loss, s: ACP(model, 0.1, output_curvature=s["lr"], **REFRESH)  # noqa: E731
    mixed = [{"lr": alpha, "scale": 1.0} for alpha in (1.0, "heuristic")]
    with pytest.raises(ValueError, match="share output_curvature"):
        train_grid(task("regression"), Method(build), mixed, **PLAN)
