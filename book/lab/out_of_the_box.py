"""Out of the box: the README's line on six tasks, with nothing tuned, beside Adam with its defaults.

``python -m lab out-of-the-box`` runs every line of :data:`LINES` on every task of :data:`TASKS` from three
seeds, each in the loop of the README, and leaves a record. A line is text: what the page shows is what runs.

Five tasks need no data but what is in the project: its digits, and the prose of these pages for the language
model. The network of CIFAR-10 gets CIFAR-10 if it is there, and else the digits in its format; the record
says which.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sogrid.experiments import data
from sogrid.experiments.records import Record, provenance
from sogrid.experiments.reproduce import as_cifar10
from sogrid.experiments.training import Minibatches, evaluation_points
from sogrid.factorize import FactorizationError
from sogrid.losses import CrossEntropyAtLogits, Loss, Quadratic
from sogrid.networks import cifar10_classifier, mnist_autoencoder
from sogrid.optimizers import ACP, KFAC, NaturalNN

__all__ = ["LINES", "SEEDS", "TASKS", "Task", "out_of_the_box", "verdict"]

LINES = {
    "acp": "ACP(model, lr=1.0, other_lr=0.1)",
    "kfac": "KFAC(model, lr=1.0, other_lr=0.1, loss=loss)",
    "nnn2": "NaturalNN(model, lr=1.0, other_lr=0.1)",
    "adam": "torch.optim.Adam(model.parameters())",
}
"""What is compared. ``other_lr`` counts where a model has norms or embeddings, here in the transformer."""

SEEDS = (1, 2, 3)
EVALUATE_ON = 2_000
CONTEXT = 64

Examples = tuple[str, Tensor, Tensor]


@cache
def digits(normalised: bool = False) -> Examples:
    """(variant, pixels, classes) of the embedded digits; normalised by the mean and deviation of all pixels."""
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


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        title: In the book.
        examples: Gives (variant, x, y).
        network: Builds it, from torch's own random numbers.
        updates: How many.
        batch: Examples of an update.
        loss: What is trained, and compared.
    """

    title: str
    examples: Callable[[], Examples]
    network: Callable[[], nn.Module]
    updates: int = 300
    batch: int = 100
    loss: Loss = CrossEntropyAtLogits()

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
