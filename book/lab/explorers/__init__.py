"""Figures that a reader steers: with ipywidgets in JupyterLab, without a kernel in the built book.

::

    from lab.explorers import second_order_by_eye

    second_order_by_eye()

:mod:`lab.explorers.core` says how one is made.
"""

from lab.explorers.core import At, Explorer, First, Out, Short, Times, say, select, slider, toggle
from lab.explorers.damping import damping_and_alpha
from lab.explorers.interaction import hyperparameter_interaction
from lab.explorers.landscape import live_landscape
from lab.explorers.race import race
from lab.explorers.replay import search_replay
from lab.explorers.second_order import second_order_by_eye

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
