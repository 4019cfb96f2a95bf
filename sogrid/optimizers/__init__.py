"""The optimizers of the thesis: each file is a pure update function and a thin ``torch.optim`` class.

========================================  ==========================================
class                                     thesis
========================================  ==========================================
:class:`Newton`                           §3.1, §3.2 (dense reference)
:class:`UpdatedBackprop`                  §5, Algorithm 2
:class:`CenteredGradientDescent`          §6.3.1, Algorithm 3
:class:`ACP`                              §6.3.2, Algorithm 4
:class:`KFAC`                             §6.4.1
:class:`NaturalNN`                        §6.4.2
:class:`EKFAC`                            its author's later work
========================================  ==========================================

SGD, momentum, Nesterov, RMSProp and Adam (§2.2, §2.4.3) are torch's own, in ``torch.optim``.
"""

from sogrid.optimizers.acp import ACP, acp_inverse, acp_update
from sogrid.optimizers.centered import CenteredGradientDescent, centered_gradient, centered_update
from sogrid.optimizers.ekfac import EKFAC, ekfac_moments, ekfac_update
from sogrid.optimizers.kfac import KFAC, kfac_inverses, kfac_update
from sogrid.optimizers.natural_nn import NaturalNN, WhitenedLinear
from sogrid.optimizers.newton import Newton, newton_update
from sogrid.optimizers.updated_backprop import UpdatedBackprop, updated_backprop_update

__all__ = [
    "ACP",
    "EKFAC",
    "KFAC",
    "CenteredGradientDescent",
    "NaturalNN",
    "Newton",
    "UpdatedBackprop",
    "WhitenedLinear",
    "acp_inverse",
    "acp_update",
    "centered_gradient",
    "centered_update",
    "ekfac_moments",
    "ekfac_update",
    "kfac_inverses",
    "kfac_update",
    "newton_update",
    "updated_backprop_update",
]
