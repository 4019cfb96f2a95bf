"""sogrid: the optimizers of *Factorized second order methods in neural networks* (T. George, 2017).

==============================  =====================================================
thesis                          module
==============================  =====================================================
§1.4, §2.4.2 networks           :mod:`sogrid.networks`
§1.2, Appendices A, B losses    :mod:`sogrid.losses`
Fig. 2.1 the two passes         :mod:`sogrid.capture`
§3 curvature, dense             :mod:`sogrid.curvature`
§3, §5, §6 optimizers           :mod:`sogrid.optimizers`
§3.1.3 Tikhonov, §6.2 Kronecker :mod:`sogrid.structured`, :mod:`sogrid.factorize`, :mod:`sogrid.kronecker`
§4, §5.4, §6.5 experiments      :mod:`sogrid.experiments`
==============================  =====================================================
"""

from importlib import import_module

_HOMES = {
    "sogrid.capture": ("Capture",),
    "sogrid.losses": (
        "BinaryCrossEntropyAtLogits",
        "BinaryCrossEntropyAtProbabilities",
        "CrossEntropyAtLogits",
        "CrossEntropyAtProbabilities",
        "Loss",
        "Quadratic",
    ),
    "sogrid.networks": ("MLP", "cifar10_classifier", "mnist_autoencoder"),
    "sogrid.optimizers": (
        "ACP",
        "EKFAC",
        "KFAC",
        "CenteredGradientDescent",
        "NaturalNN",
        "Newton",
        "UpdatedBackprop",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import a public name when it is first used, so that ``import sogrid`` is quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'sogrid' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names too."""
    return sorted({*globals(), *__all__})
