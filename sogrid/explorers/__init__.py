"""Figures that a reader steers: with ipywidgets in JupyterLab, without a kernel in the built book.

::

    from sogrid.explorers import second_order_by_eye

    second_order_by_eye()

:mod:`sogrid.explorers.core` says how one is made.
"""

from sogrid.explorers.core import At, Explorer, First, Out, Short, Times, say, select, slider, toggle
from sogrid.explorers.damping import damping_and_alpha
from sogrid.explorers.interaction import hyperparameter_interaction
from sogrid.explorers.landscape import live_landscape
from sogrid.explorers.race import race
from sogrid.explorers.replay import search_replay
from sogrid.explorers.second_order import second_order_by_eye

__all__ = [
    "At",
    "Explorer",
    "First",
    "Out",
    "Short",
    "Times",
    "damping_and_alpha",
    "hyperparameter_interaction",
    "live_landscape",
    "race",
    "say",
    "search_replay",
    "second_order_by_eye",
    "select",
    "slider",
    "toggle",
]
