"""Out of the box: the README's line on six tasks, the same on all, beside Adam with its defaults.

``python -m lab out-of-the-box`` runs every line of :data:`LINES` on every task of :data:`TASKS` from three
seeds, in an ordinary training loop, and leaves a record. A line is text: what the page shows is what runs.

Five tasks need no data but what is in the project: its digits, and the prose of these pages for the language
model. The network of CIFAR-10 gets CIFAR-10 if it is there, and else the digits in its format; the record
says which.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lab.plotting import figure, looks, style
from lab.verdicts import CAVEAT, FAILS, HOLDS
from sogrid.experiments import data
from sogrid.experiments.records import Record, provenance
from sogrid.experiments.reproduce import as_cifar10
from sogrid.experiments.training import Minibatches, evaluation_points
from sogrid.factorize import FactorizationError
from sogrid.losses import CrossEntropyAtLogits, Loss, Quadratic
from sogrid.networks import cifar10_classifier, mnist_autoencoder
from sogrid.optimizers import ACP, KFAC, NaturalNN

__all__ = ["LINES", "SEEDS", "TASKS", "Task", "ends", "fit", "out_of_the_box", "verdict"]

LINES = {
    "acp_bounded": "ACP(model, lr=10.0, other_lr=0.1)",
    "nnn2_bounded": "NaturalNN(model, lr=10.0, other_lr=0.1)",
    "kfac_bounded": "KFAC(model, lr=10.0, other_lr=0.1, loss=loss)",
    "acp_fixedalpha": "ACP(model, lr=0.1, other_lr=0.1, bias_correction=False, max_change=None, "
    "refresh_every=100)",
    "adam": "torch.optim.Adam(model.parameters())",
}
"""Our defaults, ACP as Algorithm 4 prints it, and Adam, by the look of their curves.

``other_lr`` counts where a model has norms or embeddings, here in the transformer alone.
"""

ADAM = "adam"
UPDATES = 300
SEEDS = (1, 2, 3)
EVALUATE_ON = 2_000
CONTEXT = 64

Examples = tuple[str, Tensor, Tensor]


@cache
def digits(normalised: bool = False) -> Examples:
    """(variant, pixels, classes) of the embedded digits, as they are or with mean 0 and deviation 1."""
    found = data.load("mnist", source="embedded")
    x, y = found.train
    return found.variant, (x - x.mean()) / x.std() if normalised else x, y


@cache
def pictures() -> Examples:
    """CIFAR-10, or digits in its format."""
    try:
        found = data.load("cifar10")
    except data.DataError:
        found = as_cifar10(data.load("mnist", source="embedded"))
    return found.variant, *found.train


@cache
def prose() -> Examples:
    """(variant, characters, those that follow them), ``[n, 64]`` each, of the pages of this book."""
    pages = sorted(Path(__file__).parents[1].rglob("*.ipynb"))
    cells = [cell for page in pages for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    codes = torch.tensor([ord(c) for c in text if c == "\n" or " " <= c <= "~"])
    tokens = (codes - 31).clamp(min=0)  # a line break is 0
    windows = tokens[: (len(tokens) - 1) // CONTEXT * CONTEXT + 1]
    return "the prose of these pages", windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        """See the class."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.values_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, s, width]`` to the same; a position sees those before it."""
        parts = self.queries_keys_values(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.movedim(-3, 0).transpose(-3, -2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.values_out(seen.transpose(-3, -2).flatten(-2))
        return x + self.perceptron(self.norm2(x))


class Transformer(nn.Module):
    """A character model: embeddings of characters and places, two blocks, a norm and a linear layer."""

    def __init__(self, characters: int = 96, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        """See the class."""
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Characters ``[n, s]`` to scores of those that follow, ``[n, s, characters]``."""
        places = torch.arange(x.shape[-1], device=x.device)
        return self.scores(self.norm(self.blocks(self.characters(x) + self.places(places))))


def perceptron() -> nn.Module:
    """784-256-256-10, with torch's own initialisation."""
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    )


def convolutions() -> nn.Module:
    """Two convolutions with pooling, and a linear layer."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 10)),
    )


CROSS_ENTROPY = CrossEntropyAtLogits()


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        title: In the book.
        examples: Gives (variant, x, y).
        network: Builds it, from torch's own random numbers.
        batch: Examples of an update.
        loss: What is trained, and compared.
    """

    title: str
    examples: Callable[[], Examples]
    network: Callable[[], nn.Module]
    batch: int = 100
    loss: Loss = CROSS_ENTROPY

    def risk(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The training loss of a minibatch, a mean over positions too where there are any."""
        f = model(x)
        return self.loss(f.flatten(0, -2), y.flatten(0, f.dim() - 2))


TASKS = {
    "digits": Task("digits, perceptron", digits, perceptron),
    "normalised": Task("digits, normalised", partial(digits, True), perceptron),
    "cifar10": Task("CIFAR-10, the thesis's network", pictures, cifar10_classifier),
    "convolutions": Task("digits, convolutions", digits, convolutions),
    "transformer": Task("prose, transformer", prose, Transformer, batch=16),
    "autoencoder": Task(
        "digits, the thesis's autoencoder",
        lambda: (digits()[0], digits()[1], digits()[1]),
        mnist_autoencoder,
        loss=Quadratic(),
    ),
}
"""The six, by name."""


@cache
def checksum(task: str) -> str:
    """SHA-256 of a task's examples."""
    digest = hashlib.sha256()
    for part in TASKS[task].examples()[1:]:
        digest.update(part.numpy())
    return digest.hexdigest()


def fit(
    task: Task, line: str, seed: int, updates: int = UPDATES, progress: str | None = None
) -> dict[str, Any]:
    """Train a task's network with an optimizer that one line makes.

    Args:
        task: What to do.
        line: Of :data:`LINES`; it knows ``model``, ``loss`` and our optimizers.
        seed: Of the weights and of the order of the examples.
        updates: How many.
        progress: Title of a progress bar, or ``None``.

    Returns:
        ``update`` and ``train``, the loss on the first 2,000 training examples; ``status``, ``"finished"`` or
        ``"diverged"``, and the ``reason`` of the latter.
    """
    _, x, y = task.examples()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.network()
    known = {"torch": torch, "ACP": ACP, "KFAC": KFAC, "NaturalNN": NaturalNN}
    optimizer = eval(line, known | {"model": model, "loss": task.loss})
    order = Minibatches(len(x), task.batch, torch.Generator().manual_seed(seed))
    points, found = evaluation_points(updates, per_decade=4), {"update": [], "train": []}
    title = {"desc": progress, "disable": progress is None, "leave": False}
    for done in tqdm(range(updates + 1), **title):
        if done in points:
            with torch.no_grad():
                value = task.risk(model.eval(), x[:EVALUATE_ON], y[:EVALUATE_ON]).item()
            model.train()
            if not math.isfinite(value):
                return {**found, "status": "diverged", "reason": f"update {done}: the loss is not finite"}
            found["update"].append(done)
            found["train"].append(value)
        if done < updates:
            i = next(order)
            optimizer.zero_grad()
            task.risk(model, x[i], y[i]).backward()
            try:
                optimizer.step()
            except (FloatingPointError, FactorizationError) as error:
                return {**found, "status": "diverged", "reason": f"update {done + 1}: {error}"}
    return {**found, "status": "finished", "reason": ""}


def out_of_the_box(
    *,
    tasks: Sequence[str] = tuple(TASKS),
    seeds: Sequence[int] = SEEDS,
    updates: int = UPDATES,
    out: str | Path = "out",
    progress: bool = True,
) -> dict[str, Any]:
    """Run every line on tasks, or what is missing, and return the content of ``<out>/out_of_the_box.json``.

    Args:
        tasks: Of :data:`TASKS`.
        seeds: Each is a run.
        updates: Of each run.
        out: Folder of the record, which is written after each run.
        progress: Show bars.

    Raises:
        RecordError: If the record is damaged, of other lines or sizes, or cannot be written.
        ValueError: For an unknown task.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task must be one of {tuple(TASKS)}, got {name!r}")
    settings = {"lines": LINES, "updates": updates, "evaluate_on": EVALUATE_ON}
    record = Record(Path(out) / "out_of_the_box.json", "out_of_the_box", settings)
    for name in tasks:
        task = TASKS[name]
        data_used = {"variant": task.examples()[0], "checksum": checksum(name)}
        for seed in seeds:
            for method, line in LINES.items():
                key = {"task": name, "method": method, "seed": seed, "data": data_used}
                if record.find(**key) is None:
                    title = f"{task.title}: {looks(method).name}, seed {seed}" if progress else None
                    run = fit(task, line, seed, updates, title)
                    record.add({**key, "batch": task.batch, **run, "provenance": provenance()}, once=key)
    return record.content


def by_seed(content: dict[str, Any], task: str, method: str) -> list[dict[str, Any]]:
    """The runs of a method on a task, one for each seed.

    If there are some on other data, as on other prose, those are taken that more runs are on, or the last.
    """
    on_task = [run for run in content["runs"] if run["task"] == task]
    many = Counter(run["data"]["checksum"] for run in reversed(on_task)).most_common(1)
    runs = [r for r in on_task if r["method"] == method and r["data"]["checksum"] == many[0][0]]
    return sorted(runs, key=lambda run: run["seed"])


def _tasks(content: dict[str, Any]) -> list[str]:
    """Those that a record has, in order."""
    return [name for name in TASKS if any(run["task"] == name for run in content["runs"])]


def ends(content: dict[str, Any], task: str, method: str) -> list[float]:
    """The last training loss of each seed, infinite where a run diverged."""
    runs = by_seed(content, task, method)
    return [run["train"][-1] if run["status"] == "finished" else math.inf for run in runs]


def verdict(content: dict[str, Any], task: str, method: str) -> str:
    """Whether a method ends at or below Adam: from every seed, with a caveat in the mean alone, or not."""
    ours, adam = (ends(content, task, name) for name in (method, ADAM))
    if math.inf in ours:
        return FAILS
    if all(a <= b for a, b in zip(ours, adam, strict=True)):
        return HOLDS
    return CAVEAT if sum(ours) <= sum(adam) else FAILS


def report(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table, the first one the head: the last losses of the seeds, and the verdict."""
    rows = [("task", "method", "last training losses", "at or below Adam")]
    for task, method in ((t, m) for t in _tasks(content) for m in LINES if by_seed(content, t, m)):
        losses = _losses(ends(content, task, method))
        found = "" if method == ADAM else verdict(content, task, method)
        rows.append((TASKS[task].title, looks(method).name, losses, found))
    return rows


def curves(content: dict[str, Any]) -> go.Figure:
    """The training loss by update: a panel for each task, a line for each seed, both axes logarithmic."""
    traces, layout, words = [], {}, []
    for i, task in enumerate(_tasks(content)):
        number, (row, column) = "" if i == 0 else str(i + 1), divmod(i, 2)
        axes, losses = {"xaxis": f"x{number}", "yaxis": f"y{number}"}, []
        for method in LINES:
            for k, run in enumerate(by_seed(content, task, method)):
                look = {"mode": "lines", **style(method), "showlegend": i == k == 0}
                traces.append(go.Scatter(x=run["update"][1:], y=run["train"][1:], **axes, **look))
                losses += run["train"]
        words.append(f"{TASKS[task].title}: {', '.join(_spoken(content, task, m) for m in LINES)}")
        left, top = 0.58 * column, 1 - 0.35 * row
        title = {"title": "<br>".join(["update", *wrap(TASKS[task].title, 18)]), "type": "log", "dtick": 1}
        layout[f"xaxis{number}"] = {**title, "domain": [left, left + 0.42], "anchor": f"y{number}"}
        start = max(run["train"][0] for run in by_seed(content, task, ADAM))  # what diverges leaves the panel
        shown = [math.log10(0.8 * min(losses)), math.log10(2 * start)]
        layout[f"yaxis{number}"] = {
            **{"type": "log", "dtick": 1, "exponentformat": "power", "range": shown},
            **{"domain": [top - 0.23, top], "anchor": f"x{number}"},
        }
    alt = "Training loss by update; the last losses, by seed. " + "; ".join(words)
    return figure(traces, alt=alt, height=940, **layout)


def _spoken(content: dict[str, Any], task: str, method: str) -> str:
    return f"{looks(method).name} {_losses(ends(content, task, method))}"


def _losses(values: list[float]) -> str:
    return ", ".join("diverged" if value == math.inf else f"{value:.3g}" for value in values)
