"""Networks that are not the thesis's, small enough to train on a page, and what is refused of them.

Page *In your own network*: :data:`TASKS` are trained by :data:`LINES`, as text, in the ordinary loop of
:func:`lab.out_of_the_box.fit`; :func:`parts` tells who trains what; :data:`REFUSED` are lines that end in an
error, whose message is caught when the page is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from torch import nn

from lab.out_of_the_box import Block, Examples, Task, Transformer, digits, fit, prose
from lab.plotting import figure, style
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, KFAC, UpdatedBackprop

__all__ = ["LINES", "REFUSED", "TASKS", "curves", "parts", "refusal", "table", "train"]

LINES = {
    "acp_bounded": "ACP(model, lr=10.0, other='adamw')",
    "kfac_bounded": "KFAC(model, lr=10.0, loss=loss, other='adamw')",
    "adam": "torch.optim.AdamW(model.parameters())",
}
"""By the look of their curves."""


def cnn() -> nn.Module:
    """Two convolutions without bias, each with a batch norm, and a linear layer."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 10)),
    )


def transformer() -> nn.Module:
    """A character model of one block, 32 wide."""
    return Transformer(width=32, heads=2, blocks=1)


def _some(examples: Examples, count: int) -> Examples:
    variant, x, y = examples
    return variant, x[:count], y[:count]


TASKS = {
    "cnn": Task("digits, CNN", lambda: _some(digits(), 1_000), cnn),
    "transformer": Task("prose, transformer", lambda: _some(prose(), 300), transformer, batch=16),
}


def train(updates: int, seed: int = 1) -> dict[tuple[str, str], dict[str, Any]]:
    """Every line on every task: (task, method) → update and train, as of :func:`lab.out_of_the_box.fit`."""
    return {(t, m): fit(task, line, seed, updates) for t, task in TASKS.items() for m, line in LINES.items()}


def curves(runs: dict[tuple[str, str], dict[str, Any]]) -> go.Figure:
    """The training loss by update, a panel for each task."""
    traces, layout, words = [], {}, []
    for i, (name, task) in enumerate(TASKS.items()):
        number = "" if i == 0 else str(i + 1)
        axes, losses = {"xaxis": f"x{number}", "yaxis": f"y{number}"}, []
        for method in LINES:
            run = runs[name, method]
            look = style(method) | ({"name": "AdamW"} if method == "adam" else {})
            look |= {"mode": "lines", "showlegend": i == 0}
            traces.append(go.Scatter(x=run["update"], y=run["train"], **axes, **look))
            losses += run["train"]
            words.append(f"{task.title}, {look['name']}: {run['train'][-1]:.3g}")
        left = 0.54 * i
        layout[f"xaxis{number}"] = {
            **{"title": f"update<br>{task.title}", "domain": [left, left + 0.46], "anchor": f"y{number}"},
        }
        layout[f"yaxis{number}"] = {
            **{"type": "log", "dtick": "D2", "anchor": f"x{number}"},
            **{"range": [math.log10(0.8 * min(losses)), math.log10(1.3 * max(losses))]},
        }
    alt = "Training loss by update, falling on both tasks for every line; the last losses. " + "; ".join(
        words
    )
    return figure(traces, alt=alt, height=440, **layout)


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, str, str, int]]:
    """(module, its kind, who trains it, how many numbers) of every module that has parameters of its own.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
        >>> parts(model, ACP(model, 0.1, other="sgd"))
        [('0', 'Embedding', 'SGD', 15), ('1', 'Linear', 'ACP', 8)]
    """
    inner = optimizer._inner
    by = {True: type(optimizer).__name__, False: "plain SGD" if inner is None else type(inner).__name__}
    trains = {p: by[group["preconditioned"]] for group in optimizer.param_groups for p in group["params"]}
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p in trains]
        if own:
            whose = " and ".join(dict.fromkeys(trains[p] for p in own))
            rows.append((name, type(module).__name__, whose, sum(p.numel() for p in own)))
    return rows


class Refused(NamedTuple):
    """Lines that end in an error.

    Attributes:
        what: In words, to begin a line.
        code: The lines; they know torch, nn, the optimizers, ``loss``, ``x``, ``y``, and a small ``model``.
        why: What would go wrong.
    """

    what: str
    code: str
    why: str


class Dictionary(nn.Sequential):
    """Whose forward returns a dictionary."""

    def forward(self, x):
        """Two entries."""
        f = super().forward(x)
        return {"logits": f, "size": f.square().mean()}


class Standardised(nn.Linear):
    """A layer that rescales its weight."""

    def forward(self, x):
        """With a weight of norm one."""
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Tied(nn.Module):
    """A weight that is used outside its layer, transposed."""

    def __init__(self) -> None:
        """See the class."""
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        """There and back."""
        return nn.functional.linear(self.layer(x), self.layer.weight.T)


BACKWARD = "loss(model(x), y).backward()\n"
REFUSED = (
    Refused(
        "A parameter that is no layer's, and nobody to train it",
        "ACP(Block(4, 1), lr=10.0)",
        "A norm or an embedding is no linear map of features, and any learning rate would be a guess.",
    ),
    Refused(
        "An output that is not told",
        "model = Dictionary(nn.Linear(4, 3))\noptimizer = KFAC(model, lr=10.0, loss=loss)\nmodel(x)",
        "KFAC draws targets where the loss begins.",
    ),
    Refused(
        "A pass that was not seen",
        "optimizer = ACP(model, lr=10.0)\nmodel.eval()\n" + BACKWARD + "optimizer.step()",
        "Without its inputs a gradient cannot be centred.",
    ),
    Refused(
        "A weight that is used outside its layer",
        "model = Tied()\noptimizer = ACP(model, lr=10.0)\nmodel(x)",
        "There it has other inputs, of another covariance.",
    ),
    Refused(
        "A layer that computes something else",
        "model = nn.Sequential(Standardised(4, 3))\noptimizer = ACP(model, lr=10.0)\nmodel(x)",
        "Its gradient is not g hᵀ.",
    ),
    Refused(
        "Clipping a gradient that is left as factors",
        "optimizer = ACP(model, lr=10.0, gradients='factored')\n"
        + BACKWARD
        + "nn.utils.clip_grad_norm_(model.parameters(), 1e-3)\noptimizer.step()",
        "The clipped `.grad` is that of the biases alone. `max_change` bounds the step.",
    ),
    Refused(
        "Weight and bias in different groups",
        "ACP(model, lr=10.0, params=[{'params': [p]} for p in model.parameters()])",
        "One step moves both, by one learning rate.",
    ),
    Refused(
        "Weights in half precision",
        "ACP(model.bfloat16(), lr=10.0)",
        "A covariance with eight significant bits cannot be inverted. `torch.autocast` is welcome.",
    ),
    Refused(
        "A gradient that is not finite",
        "optimizer = ACP(model, lr=10.0)\nloss(model(x / 0), y).backward()\noptimizer.step()",
        "One step of it would end the run; on a GPU it is named at the next refresh.",
    ),
    Refused(
        "Updated backpropagation beside a chain",
        "UpdatedBackprop(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), lr=0.1, loss=loss)",
        "It passes the updated gradient down by formulas of linear layers and activations.",
    ),
)


def refusal(code: str) -> str:
    """The error in which lines end.

    Args:
        code: The lines, of :data:`REFUSED`.

    Raises:
        AssertionError: If they do not.
    """
    torch.manual_seed(0)
    known = {"ACP": ACP, "KFAC": KFAC, "UpdatedBackprop": UpdatedBackprop, "torch": torch, "nn": nn}
    known |= {"Block": Block, "Dictionary": Dictionary, "Standardised": Standardised, "Tied": Tied}
    known |= {"model": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))}
    known |= {"loss": CrossEntropyAtLogits(), "x": torch.randn(8, 4), "y": torch.arange(8) % 3}
    try:
        exec(code, known)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"nothing is refused in {code!r}")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown; what is in a cell may have bars and line breaks."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |"

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])
