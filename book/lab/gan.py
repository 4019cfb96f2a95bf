r"""A critic with a natural gradient: a small GAN whose critic has one output (the thesis's outlook).

A generator of points in the plane is trained against eight Gaussians on a ring, always by Adam; the critic by
Adam, ACP, KFAC, or the *exact* natural gradient of all its weights. With one output z an example has one
gradient j_i = ∂z/∂θ, and the Fisher matrix is F = (1/n) Σ p(1 − p) j jᵀ = RᵀR of n rows, so that

    (F + εI)⁻¹ v = (1/ε) (v − Rᵀ (RRᵀ + εI)⁻¹ R v)

needs an n × n system alone. Of a linear layer j is g h̃ᵀ, so RRᵀ is a sum over layers of (h̃h̃ᵀ) ∘ (ggᵀ): no
gradient of an example is ever formed (:func:`natural_steps`).

``python -m lab study gan`` searches all critics on grids of as many settings and runs twenty other seeds, as
one batch each, and clocks an update of one run. What is compared is the mean of the last distances to the
ring (:func:`distance`), by a one-sided test against Adam (:mod:`lab.trials`). Grids and rule come from a
pilot with another seed.

Index letters: K configuration, n example, i input with the constant, o output of a layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import product
from statistics import fmean, median
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from lab.plotting import COLORS, figure, style
from lab.rivals import AdamMethod, InGrid
from lab.trials import FEW_SEEDS, SEARCH_SEEDS, SEEDS, Study, dots, number, paired, tuned
from sogrid.experiments.grid import Grid, Pass
from sogrid.experiments.records import provenance
from sogrid.kronecker import homogeneous
from sogrid.losses import BinaryCrossEntropyAtLogits, Loss
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC
from sogrid.structured import matrixwise, vectorwise

__all__ = [
    "CRITICS",
    "GAN",
    "curves",
    "distance",
    "ends",
    "found_modes",
    "in_time",
    "modes",
    "natural_steps",
    "prices",
    "ratios",
    "ring",
    "trained",
    "verdicts",
]

MODES, RADIUS, SPREAD = 8, 2.0, 0.05
NOISE, WIDTH, BATCH = 4, 32, 64
SAMPLES, DIRECTIONS, EVERY = 500, 32, 50
UPDATES, LAST = 1_000, 5


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Points of eight Gaussians on a circle, ``[count, 2]``."""
    angles = torch.randint(MODES, (count,), generator=generator) * (2 * math.pi / MODES)
    centres = RADIUS * torch.stack([angles.cos(), angles.sin()], -1)
    return centres + SPREAD * torch.randn(count, 2, generator=generator)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Sliced Wasserstein distance of as many points each, ``[..., n, 2]``: mean distance of projections.

    Over 32 directions of the half circle; a projection's points are matched in order.
    """
    angles = torch.arange(DIRECTIONS, dtype=x.dtype) * (math.pi / DIRECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()])
    along = [(points @ directions).sort(-2).values for points in (x, y)]
    return (along[0] - along[1]).abs().mean((-2, -1))


def modes(x: Tensor) -> Tensor:
    """How many of the eight have at least one in 50 of the points ``[..., n, 2]`` within four spreads."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = RADIUS * torch.stack([angles.cos(), angles.sin()], -1).to(x)
    near = (x.unsqueeze(-2) - centres).norm(dim=-1) < 4 * SPREAD
    return (near.double().mean(-2) >= 1 / 50).sum(-1)


def natural_steps(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Tensor,
    residuals: Tensor,
    damping: float | Tensor,
) -> list[Tensor]:
    """(F + εI)⁻¹ v, layer by layer as ``[..., o, i]``, of a network with one output.

    Args:
        inputs: h̃ of each layer, ``[..., n, i]``.
        outputs: g = ∂z/∂a of each layer, ``[..., n, o]``.
        weights: D(z) of each example, ``[..., n]``: p(1 − p).
        residuals: ∂ℓ/∂z of each example, ``[..., n]``, so that v = (1/n) Σ residual · j.
        damping: ε, a number or ``[...]``.
    """
    n, roots = weights.shape[-1], weights.sqrt()
    kernel = sum((h @ h.mT) * (g @ g.mT) for h, g in zip(inputs, outputs, strict=True)) / n
    gram = roots.unsqueeze(-1) * kernel * roots.unsqueeze(-2)
    image = roots * (kernel @ residuals.unsqueeze(-1)).squeeze(-1)  # √n R v
    eye = torch.eye(n, dtype=gram.dtype)
    solved = torch.linalg.solve_ex(gram + matrixwise(damping) * eye, image.unsqueeze(-1)).result.squeeze(-1)
    left = (residuals - roots * solved) / (n * vectorwise(damping))
    return [(g * left.unsqueeze(-1)).mT @ h for h, g in zip(inputs, outputs, strict=True)]


class NaturalCritic(Grid):
    """A grid whose update is the exact natural gradient of all layers together."""

    def _changes(self, seen: Pass, grad_f: Tensor):
        f = seen.f.detach()
        outputs = seen.pull(torch.ones_like(f))
        inputs = [homogeneous(h) for h in seen.inputs]
        weights = (f.sigmoid() * (-f).sigmoid()).squeeze(-1)
        steps = natural_steps(inputs, outputs, weights, grad_f.squeeze(-1), self.group["damping"])
        norm = sum((h @ s.mT * g).sum(-1) for h, s, g in zip(inputs, steps, outputs, strict=True))
        # within the bound: how far the output moves, in root mean square
        shrink = (self.group["bound"] / norm.square().mean(-1).sqrt().clamp(min=1e-30)).clamp(max=1.0)
        for step in steps:
            step = -matrixwise(self.group["lr"] * shrink) * step
            yield step[..., :-1], step[..., -1]


class Fooling(Loss):
    """The generator's loss −log D(G(noise)), whose gradient goes through the critic as it is."""

    def __init__(self, critic: Grid) -> None:
        """See the class."""
        super().__init__()
        self.critic = critic

    def _require_shapes(self, f, y):
        pass

    def value(self, f, y):
        return torch.nn.functional.softplus(-self.critic.stack(f)).squeeze(-1)

    @torch.enable_grad()
    def gradient(self, f, y):
        f = f.detach().requires_grad_()
        return torch.autograd.grad(self.value(f, y).sum(), f)[0]


LOSS = BinaryCrossEntropyAtLogits()


def _adam(model: MLP, s: dict[str, float]) -> InGrid:
    return InGrid(AdamMethod(), model, s["lr"], beta=s["beta"])


def _layerwise(kind: type, **more: Any):
    options = {"refresh_every": 5, "gradients": "factored", **more}
    return lambda model, s: kind(model, 1.0, s["damping"], max_change=s["bound"], **options)


def _natural(model: MLP, s: dict[str, float]) -> InGrid:
    return InGrid(AdamMethod(), model, 1.0, damping=s["damping"], bound=s["bound"])


CRITICS = {
    "Adam": (Grid, _adam),
    "ACP": (Grid, _layerwise(ACP)),
    "KFAC": (Grid, _layerwise(KFAC, loss=LOSS, curvature="fisher_exact")),
    "natural gradient": (NaturalCritic, _natural),
}
"""Who trains the critic. The bound of ACP and KFAC is on each layer's pre-activations, that of the natural
gradient on the output."""

GENERATOR_RATES, DAMPINGS = (1e-3, 3e-3), (0.1, 1.0)
GRIDS = {
    name: [dict(zip(keys, values, strict=True)) for values in product(*axes)]
    for name, keys, axes in (
        ("Adam", ("lr", "beta", "generator"), ((2e-3, 4e-3, 8e-3), (0.0, 0.5))),
        *(
            (name, ("bound", "damping", "generator"), ((0.1, 0.3, 1.0), DAMPINGS))
            for name in ("ACP", "KFAC", "natural gradient")
        ),
    )
    for axes in [(*axes, GENERATOR_RATES)]
}
"""Twelve settings each: of the critic, and of the generator's Adam."""


def _draws(seeds: Sequence[int], shift: int, count: int, batch: int):
    """Real points and two noises of every seed, ``[count, K, batch, ·]``, again and again."""
    distinct = list(dict.fromkeys(seeds))
    own = torch.tensor([distinct.index(seed) for seed in seeds])
    generators = [torch.Generator().manual_seed(seed + shift) for seed in distinct]
    while True:
        real = torch.stack([ring(count * batch, g) for g in generators])[own]
        noises = torch.stack([torch.randn(2 * count * batch, NOISE, generator=g) for g in generators])[own]
        parts = [real, *noises.chunk(2, 1)]
        yield tuple(part.unflatten(1, (count, batch)).transpose(0, 1) for part in parts)


class Game:
    """Generators and critics under way.

    Args:
        critic: Key of :data:`CRITICS`.
        settings: One for each.
        seeds: Likewise: of weights, points and noises.
    """

    def __init__(self, critic: str, settings: Sequence[dict[str, float]], seeds: Sequence[int]) -> None:
        """See the class."""
        kind, build = CRITICS[critic]
        makers = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"activation": "relu", "init": "he"}
        critics = [MLP([2, WIDTH, WIDTH, 1], generator=g, **options) for g in makers]
        generators = [MLP([NOISE, WIDTH, WIDTH, 2], generator=g, **options) for g in makers]
        pairs = list(zip(critics, settings, strict=True))
        self.critic = kind(critics, [build(model, s) for model, s in pairs], LOSS)
        adams = [
            InGrid(AdamMethod(), model, s["generator"], beta=0.5)
            for model, s in zip(generators, settings, strict=True)
        ]
        self.generator = Grid(generators, adams, Fooling(self.critic))
        self.labels = torch.cat([torch.ones(BATCH, 1), torch.zeros(BATCH, 1)])

    @torch.no_grad()
    def update(self, real: Tensor, noise: Tensor, more: Tensor) -> None:
        """One update of the critic, on as many real points as made ones, then one of the generator."""
        x = torch.cat([real, self.generator.stack(noise)], -2)
        y = self.labels.expand(len(x), -1, -1)
        if self.critic.refresh_due:
            self.critic.refresh(x, y)
        self.critic.update(x, y)
        self.generator.update(more, more)


def trained(
    critic: str, settings: Sequence[dict[str, float]], seeds: Sequence[int], updates: int = UPDATES
) -> list[dict[str, Any]]:
    """Curves of a batch of games: distance and modes found, every 50 updates.

    Args:
        critic: Key of :data:`CRITICS`.
        settings: One for each.
        seeds: Likewise.
        updates: Of both players.
    """
    game, draws = Game(critic, settings, seeds), _draws(seeds, 1, EVERY, BATCH)
    real, noise, _ = (part[0] for part in next(_draws(seeds, 2, 1, SAMPLES)))
    distances, found = [], []
    for done in range(0, updates + 1, EVERY):
        made = game.generator.stack(noise)
        distances.append(distance(made, real))
        found.append(modes(made))
        if done < updates:
            for batch in zip(*next(draws), strict=True):
                game.update(*batch)
    ends = torch.stack(distances[-LAST:]).mean(0).tolist()
    columns = zip(torch.stack(distances, 1).tolist(), torch.stack(found, 1).tolist(), ends, strict=True)
    return [
        {
            "distance": [float(f"{v:.4g}") if math.isfinite(v) else None for v in own],
            "modes": counts,
            "loss": end if math.isfinite(end) else None,
        }
        for own, counts, end in columns
    ]


def clock(rounds: int = 30, each: int = 10) -> dict[str, float]:
    """Milliseconds of an update of one game, by critic: medians of interleaved rounds."""
    games = {name: (Game(name, GRIDS[name][:1], [0]), _draws([0], 1, each, BATCH)) for name in CRITICS}
    found: dict[str, list[float]] = {name: [] for name in CRITICS}
    for _ in range(rounds):
        for name, (game, draws) in games.items():
            batches = list(zip(*next(draws), strict=True))
            begun = time.perf_counter()
            for batch in batches:
                game.update(*batch)
            found[name].append(1e3 * (time.perf_counter() - begun) / each)
    return {name: round(median(times), 3) for name, times in found.items()}


def _part(
    part: str, updates: int = UPDATES, tried: int | None = None, **seeds: Sequence[int]
) -> dict[str, Any]:
    """An entry of the record; ``tried``: only so many settings, and the clock's rounds."""
    if part == "clock":
        return {"update_ms": clock() if tried is None else clock(tried), "provenance": provenance()}
    return tuned(
        lambda settings, own: trained(part, settings, own, updates), GRIDS[part][:tried], **seeds
    ).entry()


GAN = Study(
    "gan",
    {
        **{"updates": UPDATES, "every": EVERY, "last": LAST, "batch": BATCH, "samples": SAMPLES},
        **{"grids": GRIDS, "seeds": SEEDS, "search_seeds": SEARCH_SEEDS},
    },
    [{"part": name} for name in (*CRITICS, "clock")],
    _part,
    few={"updates": EVERY, "tried": 2, **FEW_SEEDS},
)
"""A part for each critic, and what updates cost."""


# -- what the record says --------------------------------------------------------------------------------


def ends(content: dict[str, Any]) -> dict[str, list[float]]:
    """By critic: the last distances of each seed."""
    return {
        run["part"]: [number(one["loss"]) for one in run["runs"]] for run in content["runs"] if "runs" in run
    }


def prices(content: dict[str, Any]) -> dict[str, float]:
    """By critic: milliseconds of an update."""
    (found,) = (run["update_ms"] for run in content["runs"] if run["part"] == "clock")
    return found


def in_time(content: dict[str, Any]) -> dict[str, list[float]]:
    """By critic: the mean of the five distances before the time in which the quickest is done."""
    own = prices(content)
    least, found = min(own.values()), {}
    for run in content["runs"]:
        if "runs" in run:
            last = max(int(UPDATES * least / own[run["part"]] / EVERY) + 1, LAST)
            curves = [[number(v) for v in one["distance"][last - LAST : last]] for one in run["runs"]]
            found[run["part"]] = [fmean(values) for values in curves]
    return found


def verdicts(losses: dict[str, list[float]]) -> dict[str, tuple[str, float, float]]:
    """By critic: (ahead of Adam, behind it, or neither shown; Adam's distance over its own; p)."""
    words = {1: "ahead", -1: "behind", 0: "no difference shown"}
    found = {name: paired(own, losses["Adam"], sided=1) for name, own in losses.items() if name != "Adam"}
    return {name: (words[sign], ratio, p) for name, (sign, ratio, p) in found.items()}


def found_modes(content: dict[str, Any]) -> dict[str, float]:
    """By critic: how many of the eight are found in the end, mean over seeds."""
    return {
        run["part"]: fmean(one["modes"][-1] for one in run["runs"])
        for run in content["runs"]
        if "runs" in run
    }


LOOKS = {
    "Adam": style("adam")["line"],
    "ACP": style("acp")["line"],
    "KFAC": style("kfac")["line"],
    "natural gradient": {"color": COLORS["green"]},
}


def ratios(losses: dict[str, list[float]]) -> go.Figure:
    """Adam's distance over the other's, a dot for each seed."""
    told = {name: word for name, (word, *_) in verdicts(losses).items()}
    return dots({name: (losses[name], losses["Adam"]) for name in told}, told, x="distance, Adam / the other")


def curves(content: dict[str, Any], timed: bool = False) -> go.Figure:
    """Median distance to the ring over seeds, by update, or by the time of so many of Adam's."""
    own = prices(content)
    traces, words, title = [], [], "time, in updates with Adam" if timed else "update"
    for run in (run for run in content["runs"] if "runs" in run):
        name = run["part"]
        middle = [
            median(map(number, values))
            for values in zip(*(one["distance"] for one in run["runs"]), strict=True)
        ]
        unit = own[name] / own["Adam"] if timed else 1
        at = [EVERY * k * unit for k in range(len(middle))]
        traces.append(go.Scatter(x=at, y=middle, name=name, mode="lines", line=LOOKS[name]))
        words.append(f"{name} {middle[-1]:.2f}")
    return figure(
        traces,
        alt=f"Distance to the ring by {title}, medians over twenty seeds; at the end {', '.join(words)}",
        xaxis={"title": title},
        yaxis={"title": "distance to the ring", "rangemode": "tozero"},
    )
