"""An explorer's view in JupyterLab: ipywidgets beside a plotly figure that follows them."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

from lab.explorers.core import Control, Explorer

__all__ = ["View"]

PACE = 250
"""Milliseconds of a step when a slider plays, here as in ``js/sogrid-explorers.js``."""


class View(widgets.VBox):
    """Widgets by control (``controls``), and what they change (``figure``, ``result``).

    The figure is a ``FigureWidget`` where anywidget is installed. Where it is not, a plain figure is drawn
    again at each change, which flickers.
    """

    def __init__(self, explorer: Explorer) -> None:
        """See the class."""
        self.explorer = explorer
        self.controls = {c.name: _widget(c) for c in explorer.controls.values() if len(c.words) > 1}
        self.result = widgets.HTML()
        try:
            self.figure = canvas = go.FigureWidget(explorer.figure())
        except ImportError:
            self.figure, canvas = explorer.figure(), widgets.Output()
        self.canvas = canvas
        players = [_player(self.controls[c.name]) for c in explorer.controls.values() if c.plays]
        box = widgets.Box([*self.controls.values(), *players], layout={"flex_flow": "row wrap"})
        super().__init__([box, canvas, self.result])
        for control in self.controls.values():
            control.observe(self._show, "value")
        self._show()

    @property
    def state(self) -> dict[str, int]:
        """Position of every control."""
        return {name: int(control.value) for name, control in self.controls.items()}

    def _show(self, change: Any = None) -> None:
        picture = self.explorer.at(**self.state)
        with self.figure.batch_update():
            for drawn, trace in zip(self.figure.data, picture["traces"], strict=True):
                drawn.update(trace)
            self.figure.update_layout(picture["layout"])
        self.result.value = html.escape(picture["text"])
        if isinstance(self.canvas, widgets.Output):
            data = {"application/vnd.plotly.v1+json": self.figure.to_dict(), "text/plain": self.explorer.alt}
            self.canvas.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)


def _widget(control: Control) -> Any:
    look = {"description": control.label, "style": {"description_width": "initial"}}
    if control.kind == "check":
        return widgets.Checkbox(value=bool(control.start), **look)
    options = [(word, i) for i, word in enumerate(control.words)]
    if control.kind == "select":
        return widgets.Dropdown(options=options, value=control.start, **look)
    return widgets.SelectionSlider(options=options, value=control.start, layout={"width": "24em"}, **look)


def _player(slider: widgets.SelectionSlider) -> widgets.Play:
    """A button that moves a slider to its end, step by step."""
    play = widgets.Play(min=0, max=len(slider.options) - 1, value=slider.index, interval=PACE)
    widgets.link((play, "value"), (slider, "index"))
    return play
