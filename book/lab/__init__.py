"""What the book draws with and measures with; it is no part of ``sogrid``, which never imports it.

=============================================  =========================================
:mod:`lab.plotting`, :mod:`lab.figures`        the style of figures, and those that pages share
:mod:`lab.verdicts`                            the thesis's conclusions, judged from records
:mod:`lab.explorers`                           figures that a reader steers
:mod:`lab.out_of_the_box`                      the defaults, on six tasks, beside Adam's
:mod:`lab.own_network`                         networks that are not the thesis's, and what is refused
:mod:`lab.timing`, :mod:`lab.bench`            what an update costs, beside
:mod:`lab.peers`                               other libraries' optimizers
:mod:`lab.kernels`                             notebooks of a process that has imported torch
=============================================  =========================================
"""

from sogrid.extras import need

need(__name__, "book", "numpy", "plotly", "tqdm", "ipywidgets")
