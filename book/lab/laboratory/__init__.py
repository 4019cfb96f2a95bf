"""The Laboratory: two methods train side by side in the reader's browser, from the same weights.

::

    from lab.laboratory import laboratory

    laboratory()

Its HTML carries all that it needs (the digits, the arithmetic, the view), so that it runs in a page opened
from the disk, and in JupyterLab: ``engine.js`` computes, ``runner.js`` trains, as a worker if the browser
allows it, and ``view.js`` draws. What they are handed, the tables below, is all that is decided in Python.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from lab.explorers.core import short
from lab.laboratory.tasks import LEVELS, TASKS, digits, one_of_each
from lab.plotting import color, looks

__all__ = ["Laboratory", "laboratory"]

HERE = Path(__file__).parent
SCRIPTS = "engine.js", "runner.js", "view.js"
STATISTICS, ALL = ("damping", "every"), ("bound", "momentum")
NONE = "none"


@dataclass(frozen=True)
class Method:
    """A method that can be picked.

    Attributes:
        look: Of its curves, by :func:`lab.plotting.looks`.
        name: In the menu.
        engine: Its name in ``engine.js``.
        uses: Options that matter to it, beside λ.
        digits: Options to begin with on the digits.
        crescents: The same on the crescents.
    """

    look: str
    name: str
    engine: str
    uses: tuple[str, ...]
    digits: dict[str, float]
    crescents: dict[str, float]


METHODS = {
    "sgd": Method("standard_sgd", "SGD", "sgd", ALL, {"lr": 1}, {"lr": 0.3}),
    "momentum": Method(
        *("momentum", "SGD with momentum", "sgd", ALL),
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9},
    ),
    "adam": Method("adam", "Adam", "adam", (), {"lr": 0.01}, {"lr": 0.01}),
    "centred": Method(
        "centered_gradient_descent", "centred gradient descent", "centred", ALL, {"lr": 3}, {"lr": 0.3}
    ),
    "acp": Method(
        *("acp", "ACP", "acp", (*STATISTICS, "alpha", *ALL)),
        {"lr": 1, "damping": 0.1},
        {"lr": 0.1, "damping": 0.01},
    ),
    "kfac": Method(
        *("kfac", "KFAC", "kfac", (*STATISTICS, *ALL)),
        {"lr": 1, "damping": 0.1},
        {"lr": 0.1, "damping": 0.01},
    ),
    "nnn": Method(
        *("nnn2", "natural neural network", "nnn", (*STATISTICS, *ALL)),
        {"lr": 1, "damping": 0.1},
        {"lr": 0.1, "damping": 0.01},
    ),
}
"""What the menus offer."""

SIZES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
SLIDERS = {
    "lr": ("learning rate λ", [*SIZES, 30, 100, 300], 1),
    "damping": ("damping ε", SIZES, 0.1),
    "alpha": ("output curvature α", ["heuristic", *SIZES[2:]], 1),
    "every": ("refresh every N", [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], 20),
    "bound": ("bound κ", [0.01, 0.03, 0.1, 0.3, 1, NONE], NONE),
    "momentum": ("momentum", [0, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99], 0),
}
"""Option → what it is called, the values of its slider, and the one to begin with."""

MENUS = {
    "task": ("task", {"digits": "autoencoder of digits", "crescents": "two crescents"}, "digits"),
    "batch": ("minibatch", {n: f"{n} examples" for n in (20, 50, 100, 200)}, 100),
    "speed": (
        "speed",
        {0: "as fast as it can", 100: "100 updates/s", 20: "20 updates/s", 4: "4 updates/s"},
        0,
    ),
    "seed": ("weights", {n: f"draw {n}" for n in range(1, 6)}, 1),
}
"""Menus of both lanes."""

LANES = {"A": "sgd", "B": "acp"}

_numbers = count()


@dataclass(frozen=True)
class Laboratory:
    """As the last line of a cell it is the cell's output; see :mod:`lab.laboratory`."""

    key: str = field(default_factory=lambda: f"sogrid-laboratory-{next(_numbers)}")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/html": self.html(), "text/plain": "The Laboratory: two methods train side by side."}

    def html(self) -> str:
        """All of it, for a page of the book or an output of JupyterLab."""
        lanes = "".join(self._lane(name, method) for name, method in LANES.items())
        menus = "".join(self._menu(name, *menu) for name, menu in MENUS.items())
        scripts = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
        content = json.dumps(self.content(), ensure_ascii=False, separators=(",", ":"))
        page = (HERE / "page.html").read_text(encoding="utf-8")
        parts = {"key": self.key, "menus": menus, "lanes": lanes, "scripts": scripts}
        parts |= {"content": content.replace("<", "\\u003c"), "style": self.style()}
        for name, part in parts.items():
            page = page.replace(f"[[{name}]]", part)
        return page

    @staticmethod
    def style() -> str:
        """The style sheet."""
        return (HERE / "laboratory.css").read_text(encoding="utf-8")

    @staticmethod
    def content() -> dict[str, Any]:
        """What the scripts are handed: tasks with their examples, methods, and the values of the sliders."""
        crescents, pixels = TASKS["crescents"](), digits().reshape(-1, 2)
        examples = np.concatenate([crescents.x, crescents.y], 1)
        packed = (LEVELS * pixels[:, 0] + pixels[:, 1]).astype(np.uint8)
        data = {
            "digits": {"levels": LEVELS, "show": one_of_each(), "packed": _base64(packed)},
            "crescents": {"columns": 3, "floats": _base64(examples.astype("<f4"))},
        }
        shapes = ("sizes", "hidden", "output", "loss")
        return {
            "tasks": {
                name: {shape: getattr(make(), shape) for shape in shapes} | data[name]
                for name, make in TASKS.items()
            },
            "methods": {
                name: {
                    **{"name": method.name, "color": color(method.look), "dash": looks(method.look).dash},
                    **{"engine": method.engine, "uses": ["lr", *method.uses]},
                    **{"digits": method.digits, "crescents": method.crescents},
                }
                for name, method in METHODS.items()
            },
            "values": {name: values for name, (_, values, _) in SLIDERS.items()},
            "words": {name: [_word(v) for v in values] for name, (_, values, _) in SLIDERS.items()},
            "start": {name: values.index(start) for name, (_, values, start) in SLIDERS.items()},
        }

    def _menu(self, name: str, label: str, choices: dict[Any, str], start: Any) -> str:
        key = f"{self.key}-{name}"
        options = "".join(
            f'<option value="{value}"{" selected" if value == start else ""}>{html.escape(words)}</option>'
            for value, words in choices.items()
        )
        select = f'<select id="{key}" data-menu="{name}">{options}</select>'
        return f'<div><label for="{key}">{label}</label>{select}</div>'

    def _lane(self, name: str, start: str) -> str:
        key = f"{self.key}-{name}"
        choices = {method: row.name for method, row in METHODS.items()}
        sliders = "".join(self._slider(key, option, *row) for option, row in SLIDERS.items())
        return (
            f'<section class="lane" data-lane="{name}" aria-label="Run {name}"><div class="title">'
            f'<svg viewBox="0 0 40 10" aria-hidden="true"><line x1="1" y1="5" x2="39" y2="5"/></svg>'
            f"{self._menu(name, f'run {name}', choices, start)}</div>"
            f'<canvas class="picture" role="img" aria-label=""></canvas>'
            f'<p class="reading">–</p><canvas class="meters" role="img" aria-label=""></canvas>'
            f'<div class="lost" role="alert"></div><div class="sliders">{sliders}</div></section>'
        )

    @staticmethod
    def _slider(lane: str, name: str, label: str, values: list, start: Any) -> str:
        key = f"{lane}-{name}"
        return (
            f'<div><label for="{key}">{label}</label><output for="{key}">{_word(start)}</output>'
            f'<input type="range" id="{key}" data-option="{name}" min="0" max="{len(values) - 1}" step="1" '
            f'value="{values.index(start)}" aria-valuetext="{_word(start)}"></div>'
        )


def laboratory() -> Laboratory:
    """Two methods, two networks, one computer: the reader's."""
    return Laboratory()


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else short(value)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
