"""Figures that a reader steers: with ipywidgets in JupyterLab, without a kernel in the built book.

::

    from lab.explorers import second_order_by_eye

    second_order_by_eye()

:mod:`lab.explorers.core` says how one is made.
"""

from lab.explorers.core import At, Explorer, First, Out, Short, Times, say, select, slider, toggle
from lab.explorers.damping import damping_and_alpha
from lab.explorers.interaction import hyperparameter_interaction
from lab.explorers.kfac import kfac_damping
from lab.explorers.landscape import live_landscape
from lab.explorers.race import race
from lab.explorers.regression import regression_line
from lab.explorers.replay import search_replay
from lab.explorers.second_order import second_order_by_eye
from lab.explorers.whitening import whitening_by_hand

__all__ = [
    "At",
    "Explorer",
    "First",
    "Out",
    "Short",
    "Times",
    "damping_and_alpha",
    "hyperparameter_interaction",
    "kfac_damping",
    "live_landscape",
    "race",
    "regression_line",
    "say",
    "search_replay",
    "second_order_by_eye",
    "select",
    "slider",
    "toggle",
    "whitening_by_hand",
]
