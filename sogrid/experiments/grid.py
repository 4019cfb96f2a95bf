r"""A grid as one batch: K configurations of one method, trained at once.

K networks of one shape are one network whose weights carry a leading dimension, ``[K, o, i]``; inputs are
``[n, d]``, shared, or ``[K, n, d]``, and hyperparameters ``[K]``. The method's verbs (:mod:`sogrid.method`)
are those of a single network: they broadcast. Every configuration keeps the
weights, the data order and the losses of its own run by :func:`~sogrid.experiments.training.run`, to
rounding, and one that diverges disturbs no other.

Where it pays: a step of a small network costs the calls it makes, and K of them together make no more. On
two cores, 64 autoencoders 64-32-16-32-64 train by ACP 14 times faster than one after the other at batch 200,
and 33 times at batch 50; 200 updates of all take a second. Where not: once the products of one step keep the
machine busy. Eight autoencoders 64-w-w-64 at batch 200 gain 3.2 times for w = 128, 1.3 for 512 and nothing
for 1024: there a loop is as fast and takes an eighth of the memory, which is linear in K
(``python -m lab.grid_timing`` measures all of these).

Index letters: K configuration, n example, i layer input, o layer output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from sogrid.bound import bounded
from sogrid.experiments import data
from sogrid.experiments.benchmarks import BATCH, METHODS, Task
from sogrid.experiments.benchmarks import Method as Row
from sogrid.experiments.training import Curve, Minibatches
from sogrid.factorize import failures_are_nan
from sogrid.losses import Loss, Quadratic
from sogrid.method import Gradient, LayerMethod
from sogrid.networks import MLP
from sogrid.optimizers.adaptive import ADAPTIVE
from sogrid.optimizers.layerwise import Layerwise
from sogrid.optimizers.updated_backprop import Chain, UpdatedBackprop, UpdatedBackpropMethod
from sogrid.rows import Rows, share
from sogrid.statistics import Statistics, refresh_due
from sogrid.structured import Change, Factored, add_to, matrixwise, vectorwise

__all__ = ["Grid", "Pass", "StackedMLP", "pooled_digits", "train_grid", "training_grid"]

OVERFLOWN, INDEFINITE, UNBOUNDED = range(3)
REASONS = (
    "the minibatch loss is not finite",
    "a damped matrix is not positive definite, or not finite",
    "the evaluated loss is not finite",
)
MORE_THAN_A_STEP = "momentum", "weight_decay", "maximize"


def pooled_digits(**options) -> Task:
    """The sigmoid autoencoder 64-32-16-32-64 on the embedded digits at 8 × 8 pixels, means of 3 × 3.

    Args:
        **options: Passed to :class:`~sogrid.networks.MLP`, before what a method asks of it.
    """
    digits = data.load("mnist", source="embedded")
    x, x_test = (
        avg_pool2d(images.unflatten(-1, (28, 28))[:, 2:-2, 2:-2], 3).flatten(1)
        for images in (digits.train[0], digits.test[0])
    )

    def network(**more) -> MLP:
        return MLP([64, 32, 16, 32, 64], **{"activation": "sigmoid", "output": "sigmoid", **options, **more})

    return Task("pooled_digits", digits, (x, x), (x_test, x_test), network, Quadratic())


class Pass(NamedTuple):
    """What a forward pass leaves behind, layer by layer.

    Attributes:
        inputs: h, ``[K, n, i]`` each; the first is the shared ``[n, i]`` if the data were.
        preactivations: a, ``[K, n, o]`` each, the leaves of a graph that ends at f.
        f: The output, ``[K, n, k]``.
    """

    inputs: list[Tensor]
    preactivations: list[Tensor]
    f: Tensor

    def pull(self, v: Tensor) -> list[Tensor]:
        """Each layer's g, ``[K, n, o]``: v at the output, such as ∂ℓ/∂f, pulled back per example."""
        return list(torch.autograd.grad(self.f, self.preactivations, v, retain_graph=True))


class StackedMLP:
    """K multilayer perceptrons of one shape, without normalisation.

    Args:
        networks: Whose weights and biases are copied.

    Raises:
        ValueError: If one is not a chain of linear layers with biases, each followed by one activation.
    """

    def __init__(self, networks: Sequence[MLP]) -> None:
        """See the class."""
        chains = [list(network) for network in networks]
        layers = [chain[::2] for chain in chains]
        plain = all(isinstance(layer, nn.Linear) and layer.bias is not None for c in layers for layer in c)
        if not plain or any(isinstance(f, nn.Linear) or [*f.parameters()] for f in chains[0][1::2]):
            raise ValueError("a grid trains chains of linear layers with biases, each with its activation")
        columns = list(zip(*layers, strict=True))
        self.weights = [torch.stack([layer.weight.detach() for layer in column]) for column in columns]
        self.biases = [torch.stack([layer.bias.detach() for layer in column]) for column in columns]
        self.activations: list[nn.Module] = chains[0][1::2]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs ``[K, n, k]`` for ``x: [n, d]`` or ``[K, n, d]``."""
        for w, b, f in zip(self.weights, self.biases, self.activations, strict=True):
            x = f(_affine(x, w, b))
        return x

    @torch.enable_grad()
    def trace(self, x: Tensor) -> Pass:
        """The same with what updates are made of; no weight is in the graph."""
        inputs, preactivations = [], []
        for w, b, f in zip(self.weights, self.biases, self.activations, strict=True):
            inputs.append(x.detach())
            preactivations.append(_affine(x, w, b).requires_grad_())
            x = f(preactivations[-1])
        return Pass(inputs, preactivations, x)


def _affine(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(b.unsqueeze(-2), h.expand(len(w), -1, -1), w.mT)


class _Order:
    """Minibatches of K runs, each in the order of its own seed; one for all if the seeds are equal."""

    def __init__(self, n: int, batch: int, seeds: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(seeds))
        self.streams = [Minibatches(n, batch, torch.Generator().manual_seed(seed)) for seed in distinct]
        self.own = torch.tensor([distinct.index(seed) for seed in seeds])

    def __next__(self) -> Tensor:
        taken = [next(stream) for stream in self.streams]
        return taken[0] if len(taken) == 1 else torch.stack(taken)[self.own]


class GradientDescent(LayerMethod):
    """torch's plain SGD as a method; its rate is that of the loss as it is reduced."""

    uses_statistics = False

    def __init__(self, reduction: str) -> None:
        """See the class."""
        self.reduction = reduction

    def update(self, gradient, state, group):
        rate = group["lr"] if self.reduction == "mean" else group["lr"] / gradient.w.scale
        return -matrixwise(rate) * gradient.w, -vectorwise(rate) * gradient.b


class Grid:
    """K configurations under way: their networks, their method, and who is still alive.

    Args:
        networks: One for each.
        optimizers: Their own, of one kind; what is a number in their parameter groups may differ. Only
            their method and hyperparameters are used.
        loss: Training loss.

    Raises:
        ValueError: If they cannot be trained together.
    """

    def __init__(
        self, networks: Sequence[MLP], optimizers: Sequence[torch.optim.Optimizer], loss: Loss
    ) -> None:
        """See the class."""
        self.stack, self.loss, first = StackedMLP(networks), loss, optimizers[0]
        groups, like = [optimizer.param_groups[0] for optimizer in optimizers], self.stack.weights[0]
        self.method = _method(first, groups, loss)
        if len(groups[0]["params"]) < 2 * len(self.stack.weights):
            raise ValueError("a grid trains all weights and biases, in one parameter group")
        keys = groups[0].keys() - {"params"}
        self.group = {key: _together(key, [group[key] for group in groups], like) for key in keys}
        self.group |= {"updates": 0, "refreshed": -1}
        self.refresh_every = getattr(first, "refresh_every", None)
        self.averaging = getattr(first, "averaging", 0.0)
        self.statistics: list[Statistics | None] = [None] * len(self.stack.weights)
        self.state: list[dict[str, Any]] = [{} for _ in self.stack.weights]
        self.alive = torch.ones(len(networks), dtype=torch.bool, device=like.device)
        self.lost = torch.zeros(2, len(networks), dtype=torch.long, device=like.device)  # when, and why

    def mark(self, sound: Tensor, reason: int) -> None:
        """Those alive that are not ``sound: [K]`` are lost; nothing is read back to the host."""
        news = torch.stack([torch.full_like(self.lost[0], v) for v in (self.group["updates"], reason)])
        self.lost = torch.where(self.alive & ~sound, news, self.lost)
        self.alive = self.alive & sound

    @property
    def keeps_statistics(self) -> bool:
        """Whether there is anything to refresh."""
        return isinstance(self.method, LayerMethod) and self.method.uses_statistics

    @property
    def refresh_due(self) -> bool:
        """Whether the next update wants statistics first."""
        fresh = self.group["refreshed"] == self.group["updates"]
        return self.keeps_statistics and not fresh and refresh_due(self.group["updates"], self.refresh_every)

    @torch.no_grad()
    def refresh(self, x: Tensor, y: Tensor) -> None:
        """Measure and invert, layer by layer."""
        seen = self.stack.trace(x.expand(len(self.alive), -1, -1))
        f, probe = seen.f.detach(), self.method.probe(self.group["updates"])
        vectors = [] if probe is None else zip(*map(probe, f), strict=True)  # as each alone
        g = seen.pull(self.loss.gradient(f, y))
        pulled = [seen.pull(torch.stack(v)) for v in vectors]
        for layer, (h, g_layer) in enumerate(zip(seen.inputs, g, strict=True)):
            probes = tuple(_rows(some[layer]) for some in pulled)
            found = self.method.measure(Rows(_rows(h), _rows(g_layer), probes, f.shape[-2]), self.group)
            self.statistics[layer] = found = share(found, self.statistics[layer], self.averaging)
            with failures_are_nan():
                self.state[layer] |= self.method.invert(found, self.group, f"layer {layer + 1}")
            for value in self.state[layer].values():
                for part in value if isinstance(value, tuple) else (value,):
                    self.mark(part.isfinite().reshape(len(self.alive), -1).all(1), INDEFINITE)
        self.group["refreshed"] = self.group["updates"]

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """One update of every configuration."""
        seen = self.stack.trace(x)
        f = seen.f.detach()
        self.mark(self.loss(f, y).isfinite(), OVERFLOWN)
        for layer, (dw, db) in enumerate(self._changes(seen, self.loss.gradient(f, y))):
            add_to(self.stack.weights[layer], dw)
            self.stack.biases[layer] += db
        self.group["updates"] += 1

    def _changes(self, seen: Pass, grad_f: Tensor) -> Iterator[Change]:
        """(ΔW, Δb) of each layer, within the bound."""
        stack, group, f = self.stack, self.group, seen.f.detach()
        if isinstance(self.method, UpdatedBackpropMethod):
            a = [a.detach() for a in seen.preactivations]
            chain = Chain(seen.inputs, a, stack.weights, stack.biases, stack.activations, f, grad_f)
            yield from self.method.update(chain, [group] * len(stack.weights))
            return
        for h, g, state in zip(seen.inputs, seen.pull(grad_f), self.state, strict=True):
            gradient = Gradient(Factored(g, h, 1 / f.shape[-2]), g.mean(-2), h.mean(-2))
            yield bounded(*self.method.update(gradient, state, group), h, group.get("max_change"))

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, examples: int = 250) -> tuple[Tensor, Tensor]:
        """Mean loss and error rate (of labels; else NaN) of each configuration, ``[K]``."""
        values, errors = 0.0, torch.zeros_like(self.alive, dtype=x.dtype)
        for a, b in zip(x.split(examples), y.split(examples), strict=True):
            f = self.stack(a)
            values = values + self.loss.value(f, b).sum(-1)
            errors = errors + ((f.argmax(-1) != b).sum(-1) if b.dim() == 1 else torch.nan)
        return values / len(x), errors / len(x)


def _rows(x: Tensor) -> Tensor:
    """One position for each example: ``[K, n, ·]`` to ``[K, n, 1, ·]``."""
    return x.unsqueeze(-2)


def _method(
    optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], loss: Loss
) -> LayerMethod | UpdatedBackpropMethod:
    """What a kind of optimizer does in a step, if it does nothing else."""
    more = [key for key in MORE_THAN_A_STEP if any(group.get(key) for group in groups)]
    more += ["refresh_every"] * (getattr(optimizer, "refresh_every", None) == ADAPTIVE)
    if more:
        raise ValueError(f"a grid has no {more[0]} as this {type(optimizer).__name__} has: leave it out")
    if isinstance(optimizer, torch.optim.SGD):
        return GradientDescent(loss.reduction)
    known = isinstance(optimizer, Layerwise | UpdatedBackprop)
    if known and not getattr(optimizer.method, "uses_moments", False):
        return optimizer.method
    raise ValueError(f"{type(optimizer).__name__} has no update that a grid could take")


def _together(key: str, values: Sequence[Any], like: Tensor) -> Any:
    """A hyperparameter of K configurations: what they share, or numbers ``[K]``."""
    if all(value == values[0] for value in values):
        return values[0]
    if key == "rank" or any(value is None or isinstance(value, str | bool) for value in values):
        raise ValueError(f"the configurations of a grid share {key}, got {sorted(set(map(str, values)))}")
    return torch.tensor([float(value) for value in values], dtype=torch.float64).to(like)


def training_grid(
    task: Task, method: str | Row, settings: Sequence[dict[str, Any]], seeds: Sequence[int]
) -> Grid:
    """The grid that :func:`train_grid` trains, with nothing done yet."""
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if not settings or len(seeds) != len(settings):
        raise ValueError(f"a grid needs settings and as many seeds, got {len(settings)} and {len(seeds)}")
    method = METHODS[method] if isinstance(method, str) else method
    pairs = [
        method.build(task, own, torch.Generator().manual_seed(seed), task.train[0].device)
        for own, seed in zip(settings, seeds, strict=True)
    ]
    return Grid(*zip(*pairs, strict=True), task.loss)


def train_grid(
    task: Task,
    method: str | Row,
    settings: Sequence[dict[str, Any]],
    *,
    seeds: int | Sequence[int] = 0,
    updates: int,
    points: Iterable[int],
    batch: int = BATCH,
    evaluate_on: int = 10_000,
) -> list[Curve]:
    """Train K configurations at once; each curve is that of its own run, to rounding.

    Args:
        task: Data, network and loss, on any device. The network must be a plain chain; see
            :class:`StackedMLP`.
        method: Key of :data:`~sogrid.experiments.benchmarks.METHODS`, but for batch normalisation, or a
            method of one's own.
        settings: K dictionaries of hyperparameters, the initialisation's ``scale`` among them.
        seeds: Of weights, data order and statistics minibatches: one for all, which then see the same
            data, or one for each.
        updates: How many.
        points: When to evaluate, in updates done.
        batch: Examples per update, and per statistics minibatch.
        evaluate_on: The training curve uses this many of the first training examples.

    Returns:
        K curves. Their seconds are those of the whole grid. The curve of a configuration that diverged ends
        before that, with a reason.

    Raises:
        ValueError: For an unknown method, settings it does not take, or a network that is no plain chain.

    Example:
        >>> grid = [{"lr": lr, "scale": 16.0} for lr in (0.01, 0.1)]
        >>> slow, fast = train_grid(pooled_digits(), "standard_sgd", grid, updates=20, points=[0, 20])
        >>> slow.train[0] == fast.train[0], slow.train[1] > fast.train[1]
        (True, True)
    """
    seeds = [seeds] * len(settings) if isinstance(seeds, int) else list(seeds)
    (x, y), points = task.train, set(points)
    grid = training_grid(task, method, settings, seeds)
    order, statistics_order = (_Order(len(x), batch, [s + shift for s in seeds]) for shift in (0, 1_000_003))
    curves, clock, some = [Curve() for _ in settings], 0.0, (x[:evaluate_on], y[:evaluate_on])
    if 0 in points:
        _look(grid, task, some, curves, 0, clock)
    for done in range(1, updates + 1):
        start = perf_counter()
        if grid.refresh_due:
            i = next(statistics_order)
            grid.refresh(x[i], y[i])
        i = next(order)
        grid.update(x[i], y[i])
        if done in points and x.device.type != "cpu":
            torch.accelerator.synchronize()
        clock += perf_counter() - start
        if done in points:
            _look(grid, task, some, curves, done, clock)
            if not grid.alive.any():
                break
    for curve, alive, when, why in zip(curves, grid.alive.tolist(), *grid.lost.tolist(), strict=True):
        if not alive:
            curve.status, curve.reason = "diverged", f"update {when + (why != UNBOUNDED)}: {REASONS[why]}"
    return curves


def _look(
    grid: Any, task: Task, some: tuple[Tensor, Tensor], curves: list[Curve], done: int, second: float
) -> None:
    """Evaluate every configuration after so many updates, and add a point to the curves of those alive."""
    (train, train_error), (test, test_error) = (grid.evaluate(*part) for part in (some, task.test))
    grid.mark(train.isfinite() & test.isfinite(), UNBOUNDED)
    columns = {"train": train, "test": test}
    if task.classifies:
        columns |= {"train_error": train_error, "test_error": test_error}
    columns = {name: column.tolist() for name, column in columns.items()}
    for k in grid.alive.nonzero().flatten().tolist():
        for name, value in {"update": done, "second": round(second, 4), **columns}.items():
            getattr(curves[k], name).append(value[k] if name in columns else value)
