"""sogrid: the optimizers of *Factorized second order methods in neural networks* (T. George, 2017).

==============================  =====================================================
thesis                          module
==============================  =====================================================
§1.4, §2.4.2 networks           :mod:`sogrid.networks`
§1.2, Appendices A, B losses    :mod:`sogrid.losses`
Fig. 2.1 the two passes         :mod:`sogrid.capture`
§3 curvature, dense             :mod:`sogrid.curvature`
§3, §5, §6 optimizers           :mod:`sogrid.optimizers`
§3.1.3 Tikhonov, §6.2 Kronecker :mod:`sogrid.linalg`, :mod:`sogrid.kronecker`
§4, §5.4, §6.5 experiments      :mod:`sogrid.experiments`
==============================  =====================================================
"""
