"""Curvature of small networks, dense and slow: the ground truth the optimizers are tested against.

============  ================================================  ==========================================
thesis        what                                              here
============  ================================================  ==========================================
§3.1.1        Hessian of the risk                               :func:`hessian`
§3.1.4, §3.4  Gauss-Newton, cut where the loss is               :func:`gauss_newton` and its two named cuts
§3.2          Fisher: exact, sampled, empirical; KL divergence  :func:`fisher`, :func:`kl_divergence`
§3.1.5        layer blocks and their inverse                    :func:`block_diagonal`
§6.2, §6.4.1  Kronecker factors of a block                      :func:`kronecker_factors`
============  ================================================  ==========================================

All matrices are means over examples, and index θ as :func:`parameter_vector` does.
"""

from sogrid.curvature.blocks import (
    block_diagonal,
    block_inverse,
    condition_number,
    layer_blocks,
    layer_indices,
    to_thesis_order,
)
from sogrid.curvature.fisher import empirical_fisher, fisher, kl_divergence, sampled_fisher
from sogrid.curvature.gauss_newton import (
    gauss_newton,
    gauss_newton_at_logits,
    gauss_newton_at_probabilities,
)
from sogrid.curvature.hessian import hessian
from sogrid.curvature.jacobian import (
    evaluate,
    parameter_vector,
    per_example_gradient,
    per_example_jacobian,
    preactivation_jacobian,
    pull_back,
)
from sogrid.curvature.kronecker_factors import kronecker_factors, kronecker_sum, preactivation_curvature

__all__ = [
    "block_diagonal",
    "block_inverse",
    "condition_number",
    "empirical_fisher",
    "evaluate",
    "fisher",
    "gauss_newton",
    "gauss_newton_at_logits",
    "gauss_newton_at_probabilities",
    "hessian",
    "kl_divergence",
    "kronecker_factors",
    "kronecker_sum",
    "layer_blocks",
    "layer_indices",
    "parameter_vector",
    "per_example_gradient",
    "per_example_jacobian",
    "preactivation_curvature",
    "preactivation_jacobian",
    "pull_back",
    "sampled_fisher",
    "to_thesis_order",
]
