r"""The Gauss-Newton matrix, dense: G = (1/n) Σ_i J_iᵀ ∂²ℓ_i/∂f² J_i.

G depends on what is called the output f. Cut *at the probabilities* (the thesis), one-hot
cross-entropy gives the mean outer product of per-example gradients, today's *empirical Fisher*
(§3.4, erratum E9). Cut *at the logits* (today's "GGN"), it gives the Fisher. Two names here, never an
unqualified one: a loss's class says where it cuts.

Thesis §3.1.4, Table 3.I, §3.4.
"""

from __future__ import annotations

from torch import Tensor, nn

from sogrid.curvature.jacobian import evaluate, parameter_vector, per_example_jacobian, pull_back
from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Loss,
)

__all__ = ["gauss_newton", "gauss_newton_at_logits", "gauss_newton_at_probabilities"]


def gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """G = (1/n) Σ_i J_θ(x_i)ᵀ ∂²ℓ_i/∂f² J_θ(x_i), cut where ``model`` ends and ``loss`` begins.

    Thesis §3.1.4. The mean over examples, whatever ``loss.reduction`` says.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss; its class names the cut (``...AtProbabilities``, ``...AtLogits``).
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[P, P]``, parameters ordered as in :func:`~sogrid.curvature.parameter_vector`.

    Example:
        >>> import torch
        >>> from sogrid.losses import Quadratic
        >>> gauss_newton(nn.Linear(1, 1), Quadratic(), torch.tensor([[3.0]]), torch.zeros(1, 1)).tolist()
        [[18.0, 6.0], [6.0, 2.0]]
    """
    f = evaluate(model, parameter_vector(model), x)
    return pull_back(per_example_jacobian(model, x), loss.hessian(f, y))


def gauss_newton_at_logits(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Gauss-Newton of a classifier that returns logits, cut at the logits (elsewhere: "the GGN").

    Equal to the Fisher matrix, and independent of the labels (THESIS row 12).

    Args:
        model: A module from ``[n, ...]`` to logits ``[n, k]``.
        loss: ``CrossEntropyAtLogits`` or ``BinaryCrossEntropyAtLogits``.
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[P, P]``.

    Raises:
        TypeError: If ``loss`` is not cut at the logits.
    """
    _links(loss)
    return gauss_newton(model, loss, x, y)


def gauss_newton_at_probabilities(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Gauss-Newton of the *same* classifier, cut after the softmax or sigmoid, as in the thesis.

    For one-hot labels, or one Bernoulli output, it equals the empirical Fisher (Thesis eq. (3.4.1),
    rows 9–13); for soft labels or several Bernoulli outputs it does not.

    Args:
        model: A module from ``[n, ...]`` to logits ``[n, k]``; the non-linearity is added here.
        loss: ``CrossEntropyAtLogits`` or ``BinaryCrossEntropyAtLogits``, as the model's own loss; its
            counterpart at the probabilities is used.
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[P, P]``.

    Raises:
        TypeError: If ``loss`` is not cut at the logits.
    """
    link, at_probabilities = _links(loss)
    return gauss_newton(nn.Sequential(model, link), at_probabilities, x, y)


def _links(loss: Loss) -> tuple[nn.Module, Loss]:
    """The output non-linearity a loss at the logits contains, and the loss that is left without it."""
    if isinstance(loss, CrossEntropyAtLogits):
        return nn.Softmax(-1), CrossEntropyAtProbabilities(loss.reduction)
    if isinstance(loss, BinaryCrossEntropyAtLogits):
        return nn.Sigmoid(), BinaryCrossEntropyAtProbabilities(loss.reduction)
    raise TypeError(f"needs a model of logits and its loss cut at the logits, got {type(loss).__name__}")
