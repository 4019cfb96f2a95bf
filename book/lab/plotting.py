r"""The book's figures: one style, one label each, and one renderer for two places.

Import the module and every plotly figure of the notebook takes the style (template ``"sogrid"``) and
the renderer (``"sogrid"``), unless another was asked for first (in ``plotly.io``, or in the environment
variable ``PLOTLY_RENDERER``):

* in JupyterLab, a figure is plotly's own mime bundle, as it is by default;
* in the built book, it is an HTML element with the figure's JSON inside and nothing else. The site's
  script ``sogrid-book.js`` draws it, in the colours of the page's theme, with one plotly.js for the
  whole site.

A method has the same colour and dash on every page. The seven colours keep a contrast of 3:1 on the
light and on the dark page, and stay apart for red- and green-blind readers; variants of one method
share its colour and differ by dash. Axes have no title inside: captions say what a figure shows.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import PlotlyRenderer

__all__ = ["COLORS", "SAMPLERS", "Look", "color", "figure", "in_book", "looks", "style"]

COLORS = {
    "grey": "#6c6c6c",
    "brown": "#836525",
    "purple": "#8b45c7",
    "green": "#07aa67",
    "orange": "#e77415",
    "blue": "#1754fb",
    "pink": "#f548b8",
}
"""The palette. Luminance between 0.13 and 0.30; ΔE of at least 20 in normal, red- and green-blind sight."""


class Look(NamedTuple):
    """How the curves of something are named and drawn."""

    name: str
    color: str
    dash: str


SAMPLERS = {
    "grid": Look("grid search", "grey", "solid"),
    "random": Look("random search", "blue", "solid"),
    "biased": Look("biased random search", "orange", "solid"),
}
"""The searches of Fig. 4.1; the looks of methods are in their rows, see :func:`looks`."""

HEIGHT = 400
"""Height of a figure in pixels, unless its layout says otherwise."""

_INK, _GRID = "#7a7a7a", "rgba(128, 128, 128, 0.25)"
_DIGITS = 7


def in_book() -> bool:
    """Whether this kernel works for a static page (the book's Sphinx extension sets ``SOGRID_BOOK=1``)."""
    return os.environ.get("SOGRID_BOOK") == "1"


def looks(method: str) -> Look:
    """The look of a method, from its row in :data:`sogrid.experiments.benchmarks.METHODS`, or of a search.

    Raises:
        KeyError: If it is neither.

    Example:
        >>> looks("kfac")
        Look(name='KFAC', color='blue', dash='solid')
    """
    if method in SAMPLERS:
        return SAMPLERS[method]
    from sogrid.experiments.benchmarks import METHODS  # with it torch, which the style alone needs not

    row = METHODS[method]
    return Look(row.name, row.color, row.dash)


def color(method: str, opacity: float = 1.0) -> str:
    """Colour of a method, or of the palette, as plotly reads it.

    Raises:
        KeyError: If it is neither.

    Example:
        >>> color("acp"), color("acp", 0.2)
        ('#e77415', 'rgba(231, 116, 21, 0.2)')
    """
    code = COLORS.get(method) or COLORS[looks(method).color]
    if opacity == 1:
        return code
    red, green, blue = bytes.fromhex(code[1:])
    return f"rgba({red}, {green}, {blue}, {opacity:g})"


def style(method: str) -> dict[str, Any]:
    """Trace properties of a method: ``go.Scatter(x=x, y=y, **style("acp"))``.

    Raises:
        KeyError: If it is neither a method nor a search.
    """
    name, _, dash = looks(method)
    line = {"color": color(method), "dash": dash}
    return {"name": name, "legendgroup": method, "line": line, "marker": {"color": color(method)}}


def figure(data: Any, *, alt: str, **layout: Any) -> go.Figure:
    """A figure in the book's style that can be read without being seen.

    Args:
        data: A plotly figure (it is copied), or traces.
        alt: What the figure shows, in a sentence or two, for screen readers and where nothing is drawn.
        layout: Updates of the layout, e.g. ``xaxis_title="update"``, ``yaxis_type="log"``.

    Returns:
        The figure; as the last line of a cell it is the cell's output.

    Raises:
        ValueError: If ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError("a figure needs an alt text that says what it shows")
    fig = go.Figure(data)
    fig.update_layout(template="sogrid", meta={"alt": " ".join(alt.split())})
    return fig.update_layout(**layout)


def compact(value: Any) -> Any:
    """Plotly JSON with shorter numbers: float64 arrays in float32, other floats to seven digits.

    Values that are not finite become ``None`` (JSON has none of them, plotly leaves a gap).

    Example:
        >>> compact({"x": [0.1 + 0.2, 1, float("nan")]})
        {'x': [0.3, 1, None]}
    """
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return compact(value.tolist())
    if isinstance(value, np.generic):
        return compact(value.item())
    if isinstance(value, list | tuple):
        return [compact(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("dtype") == "f8" and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), np.float64)
        with np.errstate(over="ignore"):
            short = array.astype(np.float32)
        if np.array_equal(np.isfinite(short), np.isfinite(array)):
            return {**value, "dtype": "f4", "bdata": base64.b64encode(short.tobytes()).decode()}
    return {k: compact(v) for k, v in value.items()}


class BookRenderer(PlotlyRenderer):
    """Plotly's mime bundle for JupyterLab; in the book, the figure's JSON in an HTML element."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Bundle of one figure, with its alt text as plain text.

        Raises:
            ValueError: For a figure without alt text, in the book.
        """
        layout = dict(fig_dict.get("layout", {}))
        alt = (layout.get("meta") or {}).get("alt", "")
        if not in_book():
            return {**super().to_mimebundle(fig_dict), "text/plain": alt or "a figure"}
        if not alt:
            raise ValueError('this figure has no alt text: lab.plotting.figure(fig, alt="…")')
        height = layout.pop("height", None) or HEIGHT
        for name in ("width", "meta"):
            layout.pop(name, None)
        content = compact({"data": fig_dict["data"], "layout": layout})
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        label = html.escape(alt)
        return {
            "text/html": (
                f'<div class="sogrid-figure" style="--sogrid-height: {height:g}px">'
                f'<div class="sogrid-plot" role="img" aria-label="{label}"></div>'
                f'<script type="application/json">{text}</script>'
                f"<noscript><p>{label}</p></noscript></div>"
            ),
            "text/plain": alt,
        }


def _template() -> go.layout.Template:
    axis = {
        "automargin": True,
        "gridcolor": _GRID,
        "linecolor": _INK,
        "showline": True,
        "tickcolor": _INK,
        "ticks": "outside",
        "title": {"font": {"size": 14}, "standoff": 8},
        "zeroline": False,
    }
    return go.layout.Template(
        layout={
            "colorway": [COLORS[c] for c in ("blue", "orange", "green", "purple", "brown", "pink", "grey")],
            "colorscale": {"sequential": "Cividis", "sequentialminus": "Cividis", "diverging": "RdBu"},
            "font": {"color": _INK, "family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 14},
            "height": HEIGHT,
            "hoverlabel": {"align": "left"},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "margin": {"b": 48, "l": 56, "r": 16, "t": 16},
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": _INK},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "xaxis": axis,
            "yaxis": axis,
        },
        data={"scatter": [{"line": {"width": 2}}]},
    )


pio.templates["sogrid"] = _template()
pio.renderers["sogrid"] = BookRenderer()
if pio.templates.default == "plotly":
    pio.templates.default = "sogrid"
if in_book() or (pio.renderers.default == "plotly_mimetype" and "PLOTLY_RENDERER" not in os.environ):
    pio.renderers.default = "sogrid"
