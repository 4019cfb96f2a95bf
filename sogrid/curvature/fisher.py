r"""The Fisher information matrix, dense, and the Kullback-Leibler divergence it is the metric of.

Three matrices that are often confused, with s = ∂ log p_θ(y|x)/∂θ:

* :func:`fisher`: y averaged *exactly* over the model, inputs over the data. The thesis calls it the
  "empirical FIM" (§3.2.4) because the inputs are empirical; it is today's Fisher.
* :func:`sampled_fisher`: the same with y drawn from the model.
* :func:`empirical_fisher`: y observed. Not a Fisher matrix; one-hot Gauss-Newton at the probabilities.

Thesis §3.2, Table 3.II, Appendix B. The thesis's expansion of the KL divergence lacks ½ (erratum E5):
KL(p_θ‖p_θ+Δ) = ½ ΔᵀFΔ + o(‖Δ‖²), in both orders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from sogrid.curvature.jacobian import evaluate, parameter_vector, per_example_jacobian, pull_back
from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Loss,
    Quadratic,
)

__all__ = ["empirical_fisher", "fisher", "kl_divergence", "sampled_fisher"]


def fisher(model: nn.Module, loss: Loss, x: Tensor) -> Tensor:
    """F = (1/n) Σ_i J_θ(x_i)ᵀ D(f_i) J_θ(x_i), D(f) = E_{y~p(y|f)}[s sᵀ] (Thesis §3.2.3, Table 3.II).

    The expectation over y is exact. F does not depend on where the output is cut, nor on any label.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, whose model p(y|f) is meant: Gaussian, Bernoulli or categorical.
        x: Inputs, ``[n, ...]``.

    Returns:
        ``[P, P]``, a mean over examples, parameters ordered as in
        :func:`~sogrid.curvature.parameter_vector`.

    Example:
        >>> from sogrid.losses import Quadratic
        >>> fisher(nn.Linear(1, 1), Quadratic(variance=2.0), torch.tensor([[4.0]])).tolist()
        [[8.0, 2.0], [2.0, 0.5]]
    """
    f = evaluate(model, parameter_vector(model), x)
    return pull_back(per_example_jacobian(model, x), loss.fisher(f))


def sampled_fisher(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The unbiased estimate of :func:`fisher` that draws y ~ p(y|f_i) ``samples`` times per example.

    F̂ = (1/(n·samples)) Σ_i Σ_j (J_iᵀ s_ij)(J_iᵀ s_ij)ᵀ, of rank at most n·samples.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, whose model p(y|f) is sampled.
        x: Inputs, ``[n, ...]``.
        samples: Number of draws per example, at least one.
        generator: Source of randomness.

    Returns:
        ``[P, P]``.

    Raises:
        ValueError: If ``samples`` is less than one.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    f = evaluate(model, parameter_vector(model), x)
    many = f.expand(samples, *f.shape)
    s = loss.score(many, loss.sample(many, generator))
    return pull_back(per_example_jacobian(model, x), torch.einsum("snk,snl->nkl", s, s) / samples)


def empirical_fisher(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """(1/n) Σ_i s_i s_iᵀ with s_i = ∂ log p_θ(y_i|x_i)/∂θ at the *observed* labels (Thesis eq. (3.4.1)).

    For the cross-entropies, and for the quadratic loss with its default σ² = ½, s_i = −∇_θ ℓ_i: the
    mean outer product of per-example gradients, which is not the outer product of the mean gradient
    (THESIS row 13).

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, whose model p(y|f) is meant.
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[P, P]``.
    """
    f = evaluate(model, parameter_vector(model), x)
    s = loss.score(f, y)
    return pull_back(per_example_jacobian(model, x), s.unsqueeze(-1) * s.unsqueeze(-2))


def kl_divergence(model: nn.Module, loss: Loss, x: Tensor, delta: Tensor, reverse: bool = False) -> Tensor:
    """(1/n) Σ_i KL(p_θ(y|x_i) ‖ p_θ+Δ(y|x_i)), exact (Thesis §3.2.1); ≈ ½ ΔᵀFΔ (erratum E5).

    Gaussian: ‖f − f'‖²/(2σ²). Bernoulli and categorical: Σ p log(p/p').

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, whose model p(y|f) is meant.
        x: Inputs, ``[n, ...]``.
        delta: Δ, ``[P]``, ordered as in :func:`~sogrid.curvature.parameter_vector`.
        reverse: Swap the two distributions: KL(p_θ+Δ ‖ p_θ).

    Returns:
        A scalar, in nats.

    Raises:
        TypeError: If no model is known for ``loss``.

    Example:
        >>> from sogrid.losses import Quadratic
        >>> move = torch.tensor([1.0, 0.0])
        >>> kl_divergence(nn.Linear(1, 1), Quadratic(), torch.tensor([[2.0]]), move).round(decimals=3).item()
        4.0
    """
    theta = parameter_vector(model)
    f, moved = evaluate(model, theta, x), evaluate(model, theta + delta, x)
    if reverse:
        f, moved = moved, f
    if isinstance(loss, Quadratic):
        return (f - moved).square().sum(-1).mean() / (2 * loss.variance)
    log_p, log_q = _log_probabilities(loss, f), _log_probabilities(loss, moved)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum((-2, -1)).mean()


def _log_probabilities(loss: Loss, f: Tensor) -> Tensor:
    """Outcomes' log p, ``[n, variables, outcomes]``: k binary variables or one k-way one."""
    if isinstance(loss, BinaryCrossEntropyAtLogits):
        return torch.stack([logsigmoid(f), logsigmoid(-f)], -1)
    if isinstance(loss, BinaryCrossEntropyAtProbabilities):
        return torch.stack([f.log(), torch.log1p(-f)], -1)
    if isinstance(loss, CrossEntropyAtLogits):
        return log_softmax(f, -1).unsqueeze(-2)
    if isinstance(loss, CrossEntropyAtProbabilities):
        return f.log().unsqueeze(-2)
    raise TypeError(f"no model p(y|f) is known for {type(loss).__name__}")
