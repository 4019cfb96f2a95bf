"""Every optimizer on an accelerator that tolerates no host tensor, no transfer and no waiting host.

The cases run in one process of their own (see :mod:`fake_accelerator`), once for the whole module;
each is reported as a test here. To see one alone: ``python tests/test_device.py "ACP, exact"``.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from unittest import mock

import fake_accelerator
import pytest
import torch
from fake_accelerator import DeviceFault, Generator, Reading, accelerator, preparing
from filelock import FileLock
from torch import Tensor, nn

from lab.grid_timing import configurations
from sogrid.experiments.grid import Grid, pooled_digits, train_grid
from sogrid.factorize import inverse_square_root, tikhonov_inverse
from sogrid.finite import Noted
from sogrid.kronecker import bordered, bordered_inverse, homogeneous
from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Loss,
    Quadratic,
)
from sogrid.networks import MLP
from sogrid.optimizers import (
    ACP,
    KFAC,
    CenteredGradientDescent,
    NaturalNN,
    Newton,
    UpdatedBackprop,
    acp_inverse,
    acp_update,
    kfac_inverses,
    kfac_update,
)
from sogrid.optimizers.acp import ACPMethod
from sogrid.optimizers.kfac import KFACMethod, output_vectors
from sogrid.statistics import (
    Statistics,
    input_moments,
    input_rows,
    output_factor,
    output_rows,
    second_moment,
    squared_gradient_bound,
)
from sogrid.structured import Factored, ThinInverse

CASES: dict[str, Callable[[], None]] = {}

OUTPUTS = {CrossEntropyAtProbabilities: "softmax", BinaryCrossEntropyAtProbabilities: "sigmoid"}
LOSSES = [
    Quadratic(),
    BinaryCrossEntropyAtLogits(),
    BinaryCrossEntropyAtProbabilities(),
    CrossEntropyAtLogits("sum"),
    CrossEntropyAtProbabilities(),
]
inplace_relu = functools.partial(nn.ReLU, inplace=True)

Make = Callable[..., torch.optim.Optimizer]


def train(
    make: Make,
    loss: Loss | None = None,
    *,
    steps: int = 2,
    watch: Callable[[torch.optim.Optimizer, nn.Module], None] | None = None,
    host_scalars: bool = False,
    threaded: bool = False,
    sizes: tuple[int, ...] = (4, 5, 3, 3),
    **network,
) -> None:
    """A training loop on the accelerator: ordinary steps, a refresh by closure, a step with a closure."""
    loss = loss or Quadratic()
    with accelerator(host_scalars=host_scalars, threaded=threaded) as device:
        network.setdefault("output", OUTPUTS.get(type(loss), "identity"))
        with preparing():
            model = MLP(sizes, device=device, **network)
        optimizer = make(model)

        def minibatch() -> Tensor:
            x, f = torch.randn(8, sizes[0], device=device), torch.rand(8, sizes[-1], device=device)
            hard = isinstance(loss, CrossEntropyAtLogits | CrossEntropyAtProbabilities)
            return loss(model(x), f.argmax(-1) if hard else f)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = minibatch()
            value.backward()
            return value

        for _ in range(steps):
            closure()
            optimizer.step()
        if getattr(optimizer, "uses_statistics", False):
            optimizer.refresh(minibatch)
            closure()
            optimizer.step()
        minibatch().backward()  # accumulate
        minibatch().backward()
        optimizer.step()
        optimizer.step(closure)
        assert all(p.device == device and p.dtype == torch.float32 for p in model.parameters())
        if watch is not None:
            watch(optimizer, model)


def case(name: str):
    """Register a function under a name."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES
        CASES[name] = function
        return function

    return register


# --- every optimizer -------------------------------------------------------------------------------

ACPS = {
    "ACP": {},
    "ACP, heuristic": {"output_curvature": "heuristic"},
    "ACP, exact": {"tikhonov": "exact"},
    "ACP, exact, heuristic": {"tikhonov": "exact", "output_curvature": "heuristic"},
    "ACP, averaging": {"averaging": 0.5, "output_curvature": "heuristic", "bias_correction": True},
    "ACP, averaging, exact": {"averaging": 0.5, "tikhonov": "exact", "reduction": "sum"},
}
for _name, _options in ACPS.items():
    CASES[_name] = functools.partial(
        train, functools.partial(ACP, lr=0.1, damping=0.1, refresh_every=2, **_options)
    )
for _loss in LOSSES:  # each with what KFAC and updated backpropagation ask of it
    _kind = type(_loss).__name__
    for _curvature in ("fisher_exact", "fisher_sampled"):
        _make = functools.partial(
            KFAC, lr=0.1, damping=0.1, loss=_loss, curvature=_curvature, samples=2, refresh_every=2
        )
        CASES[f"KFAC, {_curvature}, {_kind}"] = functools.partial(train, _make, _loss)
    _make = functools.partial(UpdatedBackprop, lr=0.1, loss=_loss)
    CASES[f"UpdatedBackprop, {_kind}"] = functools.partial(train, _make, _loss)
for _curvature in ("hessian", "none"):
    _make = functools.partial(UpdatedBackprop, lr=0.1, loss=LOSSES[3], curvature=_curvature)
    CASES[f"UpdatedBackprop, {_curvature}"] = functools.partial(train, _make, LOSSES[3])
for _curvature, _loss in (("gauss_newton_probabilities", LOSSES[4]), ("empirical_fisher", LOSSES[1])):
    _make = functools.partial(KFAC, lr=0.1, damping=0.1, loss=_loss, curvature=_curvature)
    CASES[f"KFAC, {_curvature}"] = functools.partial(train, _make, _loss)
for _curvature in ("gauss_newton", "hessian", "fisher"):
    _make = functools.partial(Newton, lr=0.1, damping=0.1, loss=LOSSES[0], curvature=_curvature)
    CASES[f"Newton, {_curvature}"] = functools.partial(train, _make)

EVERY: dict[str, Make] = {
    "ACP": functools.partial(ACP, lr=0.1, damping=0.1, refresh_every=2, output_curvature="heuristic"),
    "KFAC": functools.partial(KFAC, lr=0.1, damping=0.1, refresh_every=2, averaging=0.5, loss=Quadratic()),
    "NaturalNN": functools.partial(NaturalNN, lr=0.1, damping=0.1, refresh_every=2, averaging=0.5),
    "CenteredGradientDescent": functools.partial(CenteredGradientDescent, lr=0.1, bias_correction=True),
    "UpdatedBackprop": functools.partial(UpdatedBackprop, lr=0.1, loss=Quadratic()),
    "Newton": functools.partial(Newton, lr=0.1, damping=0.1, loss=Quadratic()),
}
CASES["NaturalNN"] = functools.partial(train, EVERY["NaturalNN"])
CASES["CenteredGradientDescent"] = functools.partial(train, EVERY["CenteredGradientDescent"])
for _name, _make in EVERY.items():
    CASES[f"{_name}, backward in the engine's thread, in-place ReLU"] = functools.partial(
        train, _make, threaded=True, activation=inplace_relu
    )


@case("KFAC, no π")
def _():
    train(functools.partial(KFAC, lr=0.1, damping=0.1, loss=Quadratic(), pi_correction=False))


@case("Newton, one layer frozen")
def _():
    """The rows and columns of what is trained are cut out without a mask."""

    def make(model):
        model.linear2.requires_grad_(False)
        return EVERY["Newton"](model)

    train(make)


# --- what users do around a step -------------------------------------------------------------------

LAYERWISE = {name: EVERY[name] for name in ("ACP", "KFAC", "NaturalNN", "CenteredGradientDescent")}


def norms(name: str, normalization: str) -> None:
    """Layers without biases, and norm layers trained by plain SGD."""
    train(functools.partial(LAYERWISE[name], other_lr=0.05), normalization=normalization)


def groups(name: str) -> None:
    """Groups with hyperparameters of their own, one of them plain, one added late."""

    def make(model):
        first = {"params": model.linear1.parameters(), "lr": 0.2}
        plain = {"params": model.linear2.parameters(), "preconditioned": False}
        optimizer = LAYERWISE[name](model, params=[first, plain])
        optimizer.add_param_group({"params": model.linear3.parameters()})
        return optimizer

    train(make)


def tensors(name: str, on_host: bool) -> None:
    """Hyperparameters as 0-d tensors on the device, or on the host; a scheduler moves one of them."""

    def make(model):
        device = model.linear1.weight.device
        number = torch.tensor if on_host else lambda value: torch.full((), value, device=device)
        options = {"lr": number(0.1), "other_lr": number(0.05)}
        if name != "CenteredGradientDescent":
            options["damping"] = number(0.1)
        optimizer = LAYERWISE[name](model, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    train(make, host_scalars=on_host, normalization="batch")


def clipped(name: str) -> None:
    """torch's own clipping before every step."""

    def clip(optimizer, *_) -> None:
        nn.utils.clip_grad_norm_(optimizer.model.parameters(), 1.0)

    def make(model):
        optimizer = LAYERWISE[name](model)
        optimizer.register_step_pre_hook(clip)
        return optimizer

    train(make)


def resume(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """A state_dict taken and loaded, and a deep copy, without leaving the device."""
    optimizer.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    weight = model.linear1.weight
    for one in (optimizer, twin):
        one.zero_grad()
        one.model(torch.randn(8, weight.shape[1], device=weight.device)).square().mean().backward()
        one.step()


def resumed(name: str) -> None:
    """See :func:`resume`."""
    train(LAYERWISE[name], watch=resume)


for _name, _norm in zip(LAYERWISE, ("batch", "mean_only", "batch", "mean_only"), strict=True):
    CASES[f"{_name}, {_norm}"] = functools.partial(norms, _name, _norm)
    CASES[f"{_name}, tensors on the device"] = functools.partial(tensors, _name, False)
    CASES[f"{_name}, tensors on the host"] = functools.partial(tensors, _name, True)
    CASES[f"{_name}, resumed"] = functools.partial(resumed, _name)
CASES["ACP, groups"] = functools.partial(groups, "ACP")  # the shell's, whatever the method
CASES["KFAC, clipped"] = functools.partial(clipped, "KFAC")


@case("ACP, exact, tensors on the device")
def _():
    """float64, which must not spread to a float32 model."""

    def make(model):
        number = functools.partial(torch.full, (), device=model.linear1.weight.device, dtype=torch.float64)
        return ACP(model, number(0.1), number(0.1), output_curvature=number(2.0), tikhonov="exact")

    train(make)


@case("ACP, exact, tensors on the host")
def _():
    def make(model):
        return ACP(model, torch.tensor(0.1), torch.tensor(0.1), tikhonov="exact")

    train(make, host_scalars=True)


@case("Newton, tensors on the device")
def _():
    def make(model):
        number = functools.partial(torch.full, (), device=model.linear1.weight.device)
        return Newton(model, number(0.1), number(0.1), loss=Quadratic())

    train(make)


@case("sampled targets are seeded by refresh, from the seed and the count of updates alone")
def _():
    """Every generator is made on the device; a second run repeats the seeds of the first."""

    def seeds(seed):
        make = functools.partial(KFAC, lr=0.1, loss=Quadratic(), seed=seed, refresh_every=2)
        train(make)
        return list(Generator.seeds)

    first = seeds(0)
    assert len(first) > 2
    assert len(set(first)) > 2
    assert seeds(0) == first
    assert not set(seeds(1)) & set(first)
    seeds(2**63 - 1)  # any 64-bit seed will do


# --- gradients that are not finite -------------------------------------------------------------------


def steps_read(make: Make, steps: int, planted: int = -1) -> list[int]:
    """Train a model of two layers, and return how many numbers were read, each time.

    Args:
        make: Of the optimizer.
        steps: How many.
        planted: Which of the numbers read in the last step is NaN.
    """
    with accelerator() as device:
        with preparing():
            model = MLP((4, 5, 3), device=device)
        optimizer = make(model)
        for step in range(steps):
            if step == steps - 1:
                Reading.planted.add(planted)
            optimizer.zero_grad()
            model(torch.randn(8, 4, device=device)).square().mean().backward()
            optimizer.step()
        return list(Reading.counts)


@case("a NaN is named by layer and update at the next refresh, and nothing is read before")
def _():
    """A weight and a bias in each of two layers are four numbers of a step."""
    make = functools.partial(ACP, lr=0.1, refresh_every=3)
    assert steps_read(make, 3) == [4]
    assert steps_read(make, 4) == [4, 12]
    with pytest.raises(FloatingPointError, match=r"layer 'linear2': the gradient of update 3 was not finite"):
        steps_read(make, 4, planted=4 + 3)


@case("a method that does not refresh is read after a hundred steps")
def _():
    make = functools.partial(CenteredGradientDescent, lr=0.1)
    assert steps_read(make, 101) == [400]
    with pytest.raises(FloatingPointError, match=r"layer 'linear1': the gradient of update 1 was not finite"):
        steps_read(make, 100, planted=0)


@case("nothing is read of steps that a graph may hold")
def _():
    for make in (CenteredGradientDescent, ACP, functools.partial(KFAC, loss=Quadratic()), NaturalNN):
        options = {} if make is CenteredGradientDescent else {"refresh_every": None}

        def prepared(model, make=make, options=options):
            optimizer = make(model, lr=0.1, capturable=True, **options)
            x = torch.randn(8, 4, device=model.linear1.weight.device)
            optimizer.refresh(lambda: model(x).square().mean())
            return optimizer

        assert steps_read(prepared, 103) == []


@case("how far layers have drifted is read at looks, all at once")
def _():
    """At a refresh of both layers their four gradients, then two pairs of forms at each look."""
    make = functools.partial(ACP, lr=0.1, refresh_every="adaptive")
    assert steps_read(make, 12) == [4, 4, 4]  # of which updates 3 and 7 are looks


@case("a refresh by closure reads the steps before it, and a state that is loaded forgets them")
def _():
    def watch(optimizer, model):
        device = model.linear1.weight.device
        closure = lambda: model(torch.randn(8, 4, device=device)).square().mean()  # noqa: E731
        Reading.planted.add(0)
        with pytest.raises(FloatingPointError, match="layer 'linear1'"):
            optimizer.refresh(closure)
        optimizer.refresh(closure)
        for loaded in (True, False):
            closure().backward()
            optimizer.step()
            if loaded:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.refresh(closure)
        with pytest.raises(FloatingPointError, match="layer 'linear1'"):
            optimizer.refresh(closure)

    train(functools.partial(ACP, lr=0.1), watch=watch)


# --- thin inverses, of layers wider than twice the minibatch -----------------------------------------

WIDE = (20, 40, 30)
THIN: dict[str, Make] = {
    "ACP": functools.partial(ACP, lr=0.1, damping=0.1, refresh_every=2, output_curvature="heuristic"),
    "ACP, exact": functools.partial(ACP, lr=0.1, damping=0.1, refresh_every=2, tikhonov="exact"),
    "KFAC": functools.partial(KFAC, lr=0.1, damping=0.1, refresh_every=2, loss=Quadratic()),
    "KFAC, no π": functools.partial(KFAC, lr=0.1, loss=Quadratic(), pi_correction=False),
    "NaturalNN": functools.partial(NaturalNN, lr=0.1, damping=0.1, refresh_every=2),
}


def thin(make: Make, number: Callable[[nn.Module], float | Tensor] = lambda _: 0.1, **options) -> None:
    """Every inverse is thin; its damping may be a tensor."""

    def watch(optimizer, model):
        assert "linear2 thin" in repr(optimizer)
        assert "dense" not in repr(optimizer)

    train(lambda model: make(model, damping=number(model)), sizes=WIDE, watch=watch, **options)


for _name, _make in THIN.items():
    CASES[f"thin: {_name}, resumed"] = functools.partial(train, _make, sizes=WIDE, watch=resume)
    CASES[f"thin: {_name}, a tensor on the device"] = functools.partial(
        thin, _make, lambda m: torch.full((), 0.1, device=m.linear1.weight.device, dtype=torch.float64)
    )
    CASES[f"thin: {_name}, a tensor on the host"] = functools.partial(
        thin, _make, lambda _: torch.tensor(0.1), host_scalars=True
    )


# --- factored gradients ------------------------------------------------------------------------------


def factored(make: Make, **options) -> None:
    """No layer's weight gets a ``.grad``."""

    def watch(optimizer, model):
        assert optimizer.gradients == "factored"
        assert all(module.weight.grad is None for module in model if isinstance(module, nn.Linear))

    train(functools.partial(make, gradients="factored"), watch=watch, **options)


def rated(make: Make, on_host: bool, model: nn.Module, **options) -> torch.optim.Optimizer:
    """With a learning rate that is a tensor."""
    device = model.linear1.weight.device
    lr = torch.tensor(0.1) if on_host else torch.full((), 0.1, device=device, dtype=torch.float64)
    return make(model, **(options | {"lr": lr}))


FACTORED = {name: make for name, make in EVERY.items() if name != "Newton"}
for _name, _make in FACTORED.items():
    CASES[f"factored: {_name}, bounded"] = functools.partial(
        factored, functools.partial(_make, max_change=0.1), sizes=WIDE
    )
    CASES[f"factored: {_name}, engine's thread, in-place ReLU"] = functools.partial(
        factored, _make, threaded=True, activation=inplace_relu
    )
    for _on_host in (False, True):
        _where = "host" if _on_host else "device"
        CASES[f"factored: {_name}, a rate on the {_where}"] = functools.partial(
            factored, functools.partial(rated, _make, _on_host), sizes=WIDE, host_scalars=_on_host
        )
for _name, _make in THIN.items():
    CASES[f"factored, thin: {_name}, resumed"] = functools.partial(
        train, functools.partial(_make, gradients="factored"), sizes=WIDE, watch=resume
    )


# --- the pure functions, on a grid -----------------------------------------------------------------


@case("update functions on a grid")
def _():
    """K configurations as a leading dimension."""
    with accelerator() as device:
        h, g = torch.randn(6, 8, 4, device=device), torch.randn(6, 8, 3, device=device)
        grad_w, grad_b = g.mT @ h / 8, g.mean(-2)
        mean, covariance = input_moments(h)
        statistics = Statistics(mean, covariance, squared_gradient_bound(g))
        statistics = statistics.blend(statistics, 0.5)
        damping = torch.rand(6, device=device)
        dw, db = acp_update(grad_w, grad_b, mean, acp_inverse(mean, covariance, 0.1, "exact"), lr=0.1)
        inverses = kfac_inverses(bordered(covariance, mean), output_factor([g]), damping)
        kw, kb = kfac_update(grad_w, grad_b, *inverses, lr=0.1)
        assert dw.shape == kw.shape == (6, 3, 4)
        assert db.shape == kb.shape == (6, 3)
        inverse = bordered_inverse(tikhonov_inverse(covariance, damping), mean)
        assert inverse.device == device


@case("update functions on a grid, thin")
def _():
    with accelerator() as device:
        h, g = torch.randn(6, 8, 40, device=device), torch.randn(6, 8, 30, device=device)
        grad_w, grad_b = g.mT @ h / 8, g.mean(-2)
        mean, rows = input_rows(h)
        damping = torch.rand(6, device=device)
        dw, db = acp_update(grad_w, grad_b, mean, acp_inverse(mean, second_moment(rows), damping), lr=0.1)
        a, b = input_rows(homogeneous(h), centered=False)[1], output_rows([g])
        inverses = kfac_inverses(second_moment(a), second_moment(b), damping)
        assert all(isinstance(inverse, ThinInverse) for inverse in inverses)
        kw, kb = kfac_update(grad_w, grad_b, *inverses, lr=0.1)
        assert dw.shape == kw.shape == (6, 30, 40)
        assert db.shape == kb.shape == (6, 30)
        gradient = Factored(g, h, 1 / 8)
        dw, db = acp_update(
            gradient, grad_b, mean, acp_inverse(mean, second_moment(rows), damping), lr=damping
        )
        kw, kb = kfac_update(gradient, grad_b, *inverses, lr=damping)
        assert dw.dense().shape == kw.dense().shape == (6, 30, 40)
        assert db.shape == kb.shape == (6, 30)


def _grid(method: Callable, batch: int) -> None:
    """Two configurations: a refresh and an update, with nothing said to the host about who diverged."""
    with accelerator() as device:
        with preparing():
            networks = [MLP((40, 5, 3), "sigmoid", device=device) for _ in range(2)]
            optimizers = [method(network, 0.1 * (k + 1)) for k, network in enumerate(networks)]
            grid = Grid(networks, optimizers, Quadratic())
        for shape in ((batch, 40), (2, batch, 40)):
            x, y = torch.randn(shape, device=device), torch.randn(*shape[:-1], 3, device=device)
            if grid.keeps_statistics:
                grid.refresh(x, y)
            grid.update(x, y)
        assert grid.evaluate(x[0], y[0])[0].shape == (2,)
        assert grid.alive.device == grid.lost.device == device


for _name, _method in {
    "sgd": lambda m, lr: torch.optim.SGD(m.parameters(), lr),
    "centred": CenteredGradientDescent,
    "acp": lambda m, lr: ACP(m, lr, lr, output_curvature="heuristic"),
    "acp, exact": lambda m, lr: ACP(m, lr, lr, tikhonov="exact", max_change=lr),
    "nnn": lambda m, lr: NaturalNN(m, lr, lr),
    "kfac": lambda m, lr: KFAC(m, lr, lr, loss=Quadratic()),
    "ubp": lambda m, lr: UpdatedBackprop(m, lr, loss=Quadratic()),
}.items():
    for _batch in (4, 100):
        case(f"a grid of {_name}, batch {_batch}")(functools.partial(_grid, _method, _batch))


# --- the detector ----------------------------------------------------------------------------------


def must_fault(function: Callable, *arguments) -> None:
    with pytest.raises(DeviceFault):
        function(*arguments)


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "a CPU eye": lambda m: m + torch.eye(len(m)),
    ".item()": lambda m: m.sum().item(),
    "if tensor:": lambda m: m if m.sum() > 0 else -m,
    "a CPU inverse": lambda m: torch.linalg.inv_ex(m.cpu())[0].to(m.device),
    "linalg.cholesky": torch.linalg.cholesky,
    "linalg.inv": torch.linalg.inv,
    "linalg.solve": lambda m: torch.linalg.solve(m, m),
    "linalg.eigh": torch.linalg.eigh,
    "inverse_square_root": inverse_square_root,
    "a Python number made a tensor": lambda m: torch.tensor(0.1, device=m.device),
    "a list made a tensor": lambda m: m.new_tensor([1.0, 2.0]),
    "a list as index": lambda m: m[[0, 1]],
    "a CPU index": lambda m: m[torch.arange(2)],
    "a CPU scalar": lambda m: m * torch.tensor(2.0),
    "a CPU generator": lambda m: torch.randn(3, device=m.device, generator=torch.Generator()),
    "a mask": lambda m: m[m > 0],
    "a mask assigned to": lambda m: m.clone().index_put_((m > 0,), m[0, 0]),
    "nonzero": lambda m: m.nonzero(),
    "tolist": lambda m: m.tolist(),
    "equal": lambda m: torch.equal(m, m),
    "copy_ to the host": lambda m: torch.empty(m.shape).copy_(m),
    "copy_ from the host": lambda m: m.copy_(torch.zeros(m.shape)),
}


def planted_in_step(fault: Callable[[Tensor], object]) -> None:
    """In the update of a real optimizer."""

    class Faulty(ACPMethod):
        def update(self, gradient, state, group):
            fault(state["inverse"])
            return super().update(gradient, state, group)

    def make(model):
        optimizer = ACP(model, lr=0.1)
        optimizer.method = Faulty()
        return optimizer

    must_fault(train, make)


for _name, _fault in PLANTED.items():
    CASES[f"caught: {_name}"] = functools.partial(planted_in_step, _fault)


@case("caught: a scalar copied, where host scalars are allowed")
def _():
    with accelerator(host_scalars=True) as device:
        value = torch.tensor(2.0)
        torch.ones(3, device=device).mul_(value)
        must_fault(value.to, device)
        must_fault(torch.ones((), device=device).copy_, value)
        must_fault(torch.ones((), device=device).item)
        must_fault(lambda: torch.ones(3, device=device)[torch.arange(2)])


@case("caught: in a refresh")
def _():
    class Faulty(KFACMethod):
        def measure(self, rows, group):
            return super().measure(rows._replace(g=rows.g.cpu()), group)

    def make(model):
        optimizer = KFAC(model, lr=0.1, loss=Quadratic(), curvature="empirical_fisher")
        optimizer.method = Faulty(Quadratic(), "empirical_fisher", 1, 0)
        return optimizer

    must_fault(train, make)


@case("a clean function passes")
def _():
    """The detector accepts the free forms of what it rejects."""
    with accelerator() as device:
        m = torch.randn(3, 3, device=device)
        factor, info = torch.linalg.cholesky_ex(m + torch.eye(3, device=device))
        torch.where(info == 0, factor, torch.nan)
        torch.linalg.inv_ex(m)
        m[torch.arange(2, device=device)]
        m.masked_fill(m > 0, 0.0)
        torch.randn(3, device=device, generator=torch.Generator(device).manual_seed(1))
        assert torch.Generator().manual_seed(1).device.type == "cpu"


ABORTS = "a fault in a backward hook"


@case(ABORTS)  # the last, as it ends its process
def _():
    with accelerator() as device:
        layer = nn.Linear(3, 2, device=device)
        output = layer(torch.randn(5, 3, device=device))
        output.register_hook(lambda g: g.sum().item() and None)
        output.sum().backward()


# --- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def report(tmp_path_factory, worker_id) -> dict[str, str]:
    """What came of the cases, which one worker runs for all."""
    shared = (
        tmp_path_factory.getbasetemp().parent if worker_id != "master" else tmp_path_factory.mktemp("report")
    )
    path = shared / "fake_accelerator.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(fake_accelerator.run_apart(__file__, CASES)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [name for name in CASES if name != ABORTS])
def test_on_the_fake_accelerator(name, report):
    assert not report[name], report[name]


def test_a_fault_in_a_backward_hook_is_not_lost(report):
    assert "DeviceFault: aten._local_scalar_dense.default: the host waits" in report[ABORTS]


def test_sampled_targets_depend_on_their_seed_alone():
    """On a device with numbers: the same draws from the same seed, whatever torch's own state is."""
    f, draws = torch.randn(6, 3), []
    for global_seed, seed in [(0, 7), (1, 7), (1, 8)]:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        draws.append(torch.stack(list(output_vectors(f, loss=Quadratic(), samples=2, seed=seed))))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


class Elsewhere(Tensor):
    """On a device with numbers."""

    is_cpu = False


def test_the_first_gradient_that_is_not_finite_is_named():
    noted, whole = Noted(), {"a": [torch.full((2,), -1e38)], "b": [torch.zeros(2, 3), torch.ones(3).double()]}
    everywhere = {where: [t.as_subclass(Elsewhere) for t in tensors] for where, tensors in whole.items()}
    noted.note(0, everywhere)
    noted.require_finite()
    for update, wrong in enumerate((0.0, float("nan"), float("-inf"))):
        everywhere["b"][1][1] = wrong
        noted.note(update, everywhere)
    with pytest.raises(FloatingPointError, match="b: the gradient of update 2 was not finite"):
        noted.require_finite()
    noted.require_finite()


def read_at_a_refresh(sizes: Tensor) -> list[float]:
    """The one wait, where torch would raise."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return sizes.tolist()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
everywhere = pytest.mark.parametrize(
    ("make", "sizes"),
    [(make, (4, 5, 3)) for make in EVERY.values()]
    + [(make, WIDE) for make in THIN.values()]
    + [(functools.partial(make, gradients="factored"), WIDE) for make in FACTORED.values()],
    ids=[*EVERY, *(f"thin: {name}" for name in THIN), *(f"factored: {name}" for name in FACTORED)],
)


@needs_gpu
@everywhere
@mock.patch("sogrid.finite.read", read_at_a_refresh)
def test_a_gpu_never_makes_the_host_wait(make, sizes):
    """What the fake one cannot see: kernels that wait inside. torch raises where the host would."""
    model = MLP(sizes, device="cuda")
    optimizer = make(model)
    x, y = torch.randn(8, sizes[0], device="cuda"), torch.randn(8, sizes[-1], device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # libraries wait when first loaded
        try:
            optimizer.zero_grad()
            Quadratic()(model(x), y).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@needs_gpu
def test_a_gpu_run_that_goes_nan_is_noticed_at_the_next_refresh():
    model = MLP((4, 5, 3), device="cuda")
    optimizer = ACP(model, lr=0.1, refresh_every=5)

    def step(x: float) -> None:
        optimizer.zero_grad()
        model(torch.full((8, 4), x, device="cuda")).square().mean().backward()
        optimizer.step()

    for x in (0.0, 1.0, 0.0, float("nan"), 1.0):
        step(x)
    with pytest.raises(FloatingPointError, match="the gradient of update 4 was not finite"):
        step(0.0)


@needs_gpu
@everywhere
def test_a_gpu_gives_the_numbers_of_the_cpu(make, sizes):
    """In float64, after four updates. KFAC is exact, as each device would draw its own targets."""
    if make.func is KFAC:
        make = functools.partial(make, curvature="fisher_exact")
    ends = {}
    for device in ("cpu", "cuda"):
        model = MLP(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
        optimizer, generator = make(model), torch.Generator().manual_seed(1)
        for _ in range(4):
            x, y = (torch.randn(8, n, generator=generator).to(device, torch.float64) for n in sizes[::2])
            optimizer.zero_grad()
            Quadratic()(model(x), y).backward()
            optimizer.step()
        ends[device] = [p.detach().cpu() for p in model.parameters()]
    torch.testing.assert_close(ends["cuda"], ends["cpu"], rtol=1e-10, atol=1e-12)


@needs_gpu
@pytest.mark.parametrize("method", ["standard_sgd", "acp", "nnn2", "jaco_update"])
def test_a_gpu_gives_a_grid_the_numbers_of_the_cpu(method):
    """In float64, for three configurations, after ten updates."""
    task, ends = pooled_digits(dtype=torch.float64), {}
    settings = configurations(method, 3)
    for device in ("cpu", "cuda"):
        plan = {"updates": 10, "points": [10], "evaluate_on": 500, "batch": 50}
        ends[device] = train_grid(task.to(device, torch.float64), method, settings, **plan)
    for cpu, gpu in zip(*ends.values(), strict=True):
        assert gpu.train == pytest.approx(cpu.train, rel=1e-10)


if __name__ == "__main__":
    fake_accelerator.main(CASES)
