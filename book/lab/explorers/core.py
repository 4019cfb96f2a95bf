r"""What every explorer is made of: a state, and a picture that depends on it by looking things up.

An explorer has *controls*, each with a list of values; a *state* is one index for each of them. Its picture
is ordinary plotly (traces, layout, a sentence), except that some leaves say where to look in an array that
was computed beforehand:

======================  =============================================================================
``At(v, "lr", "eps")``  ``v[state of lr, state of eps]``; a place may also be given by another leaf
``First(v, n)``         the first n of v
``Times(a, b)``         their product
``Short(v)``            a number as text, with about three digits
``Out("name", …)``      an entry of what the explorer's *formula* returns, if it has one
======================  =============================================================================

:func:`resolve` fills them in for a state, here and (the same few lines of JavaScript, in
``book/_assets/js/sogrid-explorers.js``) in the built book, where no Python runs. Only a formula is written
twice, in Python and in ``js/sogrid-formulas.js``, and the browser tests compare the two; so use it only
where arrays would be too large. An explorer of one's own::

    lr = [0.01, 0.1, 1.0]
    loss = np.array([np.exp(-rate * np.arange(50)) for rate in lr])
    Explorer(
        alt="Loss by update, for a learning rate that can be chosen.",
        controls=[slider("lr", "learning rate λ", lr)],
        traces=[{"type": "scatter", "y": At(loss, "lr"), "mode": "lines"}],
        layout={"xaxis": {"title": "update"}, "yaxis": {"title": "loss", "range": [0, 1]}},
        text=say("After 50 updates the loss is {loss}.", loss=Short(At(loss[:, -1], "lr"))),
    )
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from string import Formatter
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lab.plotting import COLORS, HEIGHT, figure, in_book

__all__ = [
    "At",
    "Control",
    "Explorer",
    "First",
    "Out",
    "Short",
    "Times",
    "resolve",
    "ring",
    "say",
    "select",
    "short",
    "slider",
    "toggle",
]

FLOAT, INTEGERS = "f4", ("u1", "u2", "i4")


# Controls


@dataclass(frozen=True)
class Control:
    """One thing that the reader can set: a native form element in the book, an ipywidget in JupyterLab.

    Attributes:
        name: What :class:`At` refers to.
        label: What the reader sees.
        values: What a formula gets, one for each position.
        words: What the reader sees of them.
        start: Position at first.
        kind: ``"range"``, ``"select"`` or ``"check"``.
        plays: Whether a button beside it moves a slider to its end, step by step.
    """

    name: str
    label: str
    values: tuple
    words: tuple[str, ...]
    start: int
    kind: str
    plays: bool = False


def slider(
    name: str,
    label: str,
    values: Sequence[float],
    start: float | None = None,
    words: Sequence[str] | None = None,
    plays: bool = False,
) -> Control:
    """A slider over ascending values, at first at the one nearest to ``start`` (default: the last).

    Args:
        name: See :class:`~lab.explorers.core.Control`.
        label: See :class:`~lab.explorers.core.Control`.
        values: Numbers.
        start: A number.
        words: What the reader sees of the values; default the numbers.
        plays: See :class:`~lab.explorers.core.Control`.
    """
    values = tuple(float(v) for v in values)
    nearest = values[-1] if start is None else min(values, key=lambda v: abs(v - start))
    words = tuple(words or map(short, values))
    return Control(name, label, values, words, values.index(nearest), "range", plays)


def select(name: str, label: str, words: Sequence[str], start: str | None = None) -> Control:
    """A menu of words."""
    words = tuple(words)
    return Control(name, label, words, words, 0 if start is None else words.index(start), "select")


def toggle(name: str, label: str, start: bool = False) -> Control:
    """A checkbox; its positions are off and on."""
    return Control(name, label, (False, True), ("off", "on"), int(start), "check")


# Leaves


@dataclass(frozen=True, eq=False)
class At:
    """``values`` (an array, or nested lists) at the positions that controls, or other leaves, give."""

    values: Any
    by: tuple

    def __init__(self, values: Any, *by: Any) -> None:
        """See the class."""
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "by", by)


@dataclass(frozen=True, eq=False)
class First:
    """The first ``count`` of ``values``."""

    values: Any
    count: Any


@dataclass(frozen=True, eq=False)
class Times:
    """Product of numbers and one-dimensional arrays of one length."""

    factors: tuple

    def __init__(self, *factors: Any) -> None:
        """See the class."""
        object.__setattr__(self, "factors", factors)


@dataclass(frozen=True, eq=False)
class Short:
    """A number as text: see :func:`~lab.explorers.core.short`."""

    value: Any


@dataclass(frozen=True, eq=False)
class Out:
    """An entry of the formula's result, nested dictionaries, by its path."""

    path: tuple[str, ...]

    def __init__(self, *path: str) -> None:
        """See the class."""
        object.__setattr__(self, "path", path)


Leaf = At | First | Times | Short | Out


def short(value: float) -> str:
    """A number with about three significant digits, the same text in Python and in JavaScript.

    >>> short(1234.5), short(12.345), short(0.1), short(0.00012345), short(0), short(float("nan"))
    ('1234', '12.3', '0.1', '0.000123', '0', '–')
    """
    value = float(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    digits, size = 2, abs(value)
    while 0 < size < 1 and digits < 8:
        size, digits = size * 10, digits + 1
    while size >= 10 and digits > 0:
        size, digits = size / 10, digits - 1
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def resolve(node: Any, state: dict[str, int], out: dict[str, Any]) -> Any:
    """A part of a picture with its leaves filled in.

    Args:
        node: A leaf, or dictionaries and lists of such.
        state: Position of every control.
        out: Result of the formula.
    """
    go_on = lambda part: resolve(part, state, out)  # noqa: E731
    match node:
        case At():
            value = go_on(node.values) if isinstance(node.values, Leaf) else node.values
            for place in node.by:
                value = value[state[place] if isinstance(place, str) else int(go_on(place))]
            return go_on(value)
        case First():
            return go_on(node.values)[: int(go_on(node.count))]
        case Times():
            return math.prod(np.float64(go_on(factor)) for factor in node.factors)
        case Short():
            return short(go_on(node.value))
        case Out():
            for name in node.path:
                out = out[name]
            return out
        case dict():
            return {key: go_on(value) for key, value in node.items()}
        case list():
            return [go_on(value) for value in node]
    return node


def say(template: str, **leaves: Any) -> list[Any]:
    """Pieces of a sentence: its text, and leaves where it has their names in braces.

    >>> say("loss {loss}.", loss=Out("loss"))
    ['loss ', Out(path=('loss',)), '.']
    """
    parts = Formatter().parse(template)
    pieces = [piece for text, name, _, _ in parts for piece in (text, name and leaves[name])]
    return [piece for piece in pieces if piece]


def ring(x: Any, y: Any, size: float = 22) -> dict[str, Any]:
    """A trace: one place, ringed."""
    return {
        "type": "scatter",
        "x": [x],
        "y": [y],
        "mode": "markers",
        "marker": {"symbol": "circle-open", "size": size, "color": COLORS["pink"], "line": {"width": 3}},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _compact(node: Any) -> Any:
    """The same picture with arrays in float32, or the smallest integers, that both views draw."""
    match node:
        case np.ndarray():
            if node.dtype.kind in "biu":
                low, high = (int(f(initial=0)) for f in (node.min, node.max))
                fits = (k for k in INTEGERS if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
                return node.astype(next(fits))
            with np.errstate(over="ignore"):
                return node.astype(FLOAT)
        case At():
            return At(_compact(node.values), *map(_compact, node.by))
        case First():
            return First(_compact(node.values), _compact(node.count))
        case Times():
            return Times(*map(_compact, node.factors))
        case Short():
            return Short(_compact(node.value))
        case dict():
            return {key: _compact(value) for key, value in node.items()}
        case list() | tuple():
            return [_compact(value) for value in node]
        case np.generic():
            return node.item()
    return node


class _Encoder:
    """JSON of a picture: arrays as base64, each once; leaves as ``{"$": kind, …}``."""

    def __init__(self) -> None:
        self.arrays: list[dict[str, Any]] = []
        self._numbers: dict[bytes, int] = {}

    def __call__(self, node: Any) -> Any:
        """The same, of JSON values."""
        match node:
            case np.ndarray():
                entry = {
                    "type": node.dtype.str[1:],
                    "shape": list(node.shape),
                    "data": base64.b64encode(np.ascontiguousarray(node).tobytes()).decode(),
                }
                key = f"{entry}".encode()
                if key not in self._numbers:
                    self._numbers[key] = len(self.arrays)
                    self.arrays.append(entry)
                return {"$": "array", "of": self._numbers[key]}
            case At():
                return {"$": "at", "of": self(node.values), "by": [self(place) for place in node.by]}
            case First():
                return {"$": "first", "of": self(node.values), "count": self(node.count)}
            case Times():
                return {"$": "times", "of": [self(factor) for factor in node.factors]}
            case Short():
                return {"$": "short", "of": self(node.value)}
            case Out():
                return {"$": "out", "path": list(node.path)}
            case dict():
                return {key: self(value) for key, value in node.items()}
            case list() | tuple():
                return [self(value) for value in node]
            case float():
                return node if math.isfinite(node) else None
        return node


# The explorer and its two views


class Explorer:
    """A picture that the reader can steer; as the last line of a cell it is the cell's output.

    Args:
        alt: What the explorer shows, in a sentence or two, for screen readers.
        controls: See :func:`slider`, :func:`select`, :func:`toggle`. One with a single value is not shown.
        traces: Plotly traces, as dictionaries.
        layout: Plotly's layout.
        text: What is seen, as :func:`say` gives it; it is read out when it changes.
        formula: ``formula(values, data)``, from ``{control: value}`` to what :class:`Out` finds; the page
            has a function of the same name.
        data: What the formula needs besides: dictionaries, lists and numbers.
        handle: Two sliders, horizontal and vertical, that can also be set by dragging a point.
    """

    _numbers = count()

    def __init__(
        self,
        *,
        alt: str,
        controls: Sequence[Control],
        traces: list[dict[str, Any]],
        layout: dict[str, Any],
        text: Sequence[Any],
        formula: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None,
        data: Any = None,
        handle: tuple[str, str] | None = None,
    ) -> None:
        """See the class."""
        self.alt = " ".join(alt.split())
        self.controls = {control.name: control for control in controls}
        self.traces, self.layout, self.text = (_compact(part) for part in (traces, layout, list(text)))
        self.formula, self.data, self.handle = formula, data, handle

    @property
    def start(self) -> dict[str, int]:
        """The state at first."""
        return {name: control.start for name, control in self.controls.items()}

    def at(self, **state: int) -> dict[str, Any]:
        """The picture, ``{"traces", "layout", "text"}``, in a state; what is not named is as at the start.

        Raises:
            KeyError: For a name that is no control.
        """
        if unknown := state.keys() - self.controls.keys():
            raise KeyError(f"no such control: {', '.join(unknown)}")
        state = self.start | state
        values = {name: control.values[state[name]] for name, control in self.controls.items()}
        out = self.formula(values, self.data) if self.formula else {}
        parts = {"traces": self.traces, "layout": self.layout, "text": self.text}
        parts = {name: resolve(part, state, out) for name, part in parts.items()}
        return parts | {"text": "".join(map(str, parts["text"]))}

    def figure(self, **state: int) -> go.Figure:
        """The same as a plotly figure."""
        picture = self.at(**state)
        return figure(picture["traces"], alt=self.alt, **picture["layout"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if in_book():
            return {"text/html": self.html(), "text/plain": self.alt}
        return self.widget()._repr_mimebundle_(include=include, exclude=exclude)

    def widget(self) -> Any:
        """The view for JupyterLab: ipywidgets beside a live figure."""
        from lab.explorers.widgets import View

        return View(self)

    def html(self) -> str:
        """The view for the built book: form elements, and the data that its script draws."""
        key, encode = f"sogrid-explorer-{next(self._numbers)}", _Encoder()
        base = figure([], alt=self.alt).to_dict()["layout"]
        layout = {k: v for k, v in (base | self.layout).items() if k not in ("height", "meta")}
        content = {
            "controls": {name: control.values for name, control in self.controls.items()},
            "words": {name: control.words for name, control in self.controls.items()},
            "traces": encode(self.traces),
            "layout": encode(layout),
            "text": encode(self.text),
            "formula": self.formula.__name__ if self.formula else None,
            "data": self.data,
            "handle": self.handle,
            "arrays": encode.arrays,
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        label = html.escape(self.alt)
        fields = "".join(_field(key, control) for control in self.controls.values())
        height = f"--sogrid-height: {self.layout.get('height', HEIGHT):g}px"
        return (
            f'<div class="sogrid-explorer" id="{key}" style="{height}">'
            f'<div class="sogrid-controls" role="group" aria-label="Controls">{fields}</div>'
            f'<div class="sogrid-stage"><div class="sogrid-plot" role="img" aria-label="{label}"></div></div>'
            f'<p class="sogrid-result" role="status">{html.escape(self.at()["text"])}</p>'
            f'<script type="application/json">{text}</script>'
            f"<noscript><p>{label}</p></noscript></div>"
        )


def _field(key: str, control: Control) -> str:
    """A labelled form element, with what it is set to beside it."""
    label, name = html.escape(control.label), f'data-control="{control.name}" id="{key}-{control.name}"'
    heading = f'<label for="{key}-{control.name}">{label}</label>'
    if len(control.words) == 1:
        return f'<input type="hidden" data-control="{control.name}" value="0">'
    word = html.escape(control.words[control.start])
    if control.kind == "check":
        box = f'<input type="checkbox" {name}{" checked" * control.start}>'
        return f'<div class="sogrid-check">{box}{heading}</div>'
    if control.kind == "select":
        options = "".join(
            f"<option{' selected' * (i == control.start)}>{html.escape(o)}</option>"
            for i, o in enumerate(control.words)
        )
        return f"<div>{heading}<select {name}>{options}</select></div>"
    longest = max(map(len, control.words))
    play = '<button type="button" class="sogrid-play">Play</button>' if control.plays else ""
    return (
        f"<div>{heading}"
        f'<output for="{key}-{control.name}" style="min-width: {longest}ch">{word}</output>{play}'
        f'<input type="range" {name} min="0" max="{len(control.words) - 1}" value="{control.start}" '
        f'aria-valuetext="{word}" autocomplete="off"></div>'
    )
