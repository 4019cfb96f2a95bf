r"""Losses of the thesis, with everything second-order methods need of them.

Index letters: n example, k network output. Every loss is a sum over outputs and, after reduction,
a mean (or a sum) over examples. Where the network's output *f* is cut is part of a loss's name: *at
probabilities* means f has passed the softmax or sigmoid, *at logits* means it has not. The Fisher
matrix does not depend on the cut; the Gauss-Newton matrix does (Thesis §3.4, erratum E9).

Thesis §1.2.1, Tables 3.I and 3.II, Appendices A and B. Table 3.I prints the Hessian of the quadratic
loss as I; for ‖f − y‖² it is 2I (erratum E3), and 2I is what this module returns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, one_hot, softplus

REDUCTIONS = ("mean", "sum")

__all__ = [
    "BinaryCrossEntropyAtLogits",
    "BinaryCrossEntropyAtProbabilities",
    "CrossEntropyAtLogits",
    "CrossEntropyAtProbabilities",
    "Loss",
    "Quadratic",
]


def check_reduction(reduction: str) -> str:
    """Return ``reduction`` if it is ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: For anything else.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


class Loss:
    """One example's loss ℓ(f, y), its derivatives in f, and the model p(y|f) it belongs to.

    Tensors are ``f: [..., n, k]`` and targets ``y: [..., n, k]``; leading dimensions broadcast. Calling
    the object gives the reduced loss, so it can be used wherever a torch loss module is.

    Subclasses give the per-example formulas; the second-derivative matrices they need are either
    diagonal or small, and :meth:`hessian_product` never forms them.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over examples.
    """

    def __init__(self, reduction: str = "mean") -> None:
        """See the class."""
        self.reduction = check_reduction(reduction)

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        """Reduced loss over the examples: a scalar, or one per leading dimension.

        Raises:
            ValueError: If the shapes of outputs and targets do not belong together.
        """
        if f.dim() < 2:
            raise ValueError(
                f"outputs are [n, k], k numbers for each of n examples, got {tuple(f.shape)}: leave out a "
                "squeeze(-1), or give outputs and targets an unsqueeze(-1)"
            )
        self._require_shapes(f, y)
        value = self.value(f, y)
        return value.mean(-1) if self.reduction == "mean" else value.sum(-1)

    def __repr__(self) -> str:
        """Class name and reduction."""
        return f"{type(self).__name__}(reduction={self.reduction!r})"

    def _require_shapes(self, f: Tensor, y: Tensor) -> None:
        if y.shape[-2:] != f.shape[-2:]:
            raise ValueError(
                f"outputs {tuple(f.shape)} and targets {tuple(y.shape)} must have the same shape"
            )

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """Loss of each example, ``[..., n]``."""
        raise NotImplementedError

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """∂ℓ/∂f of each example, ``[..., n, k]``."""
        raise NotImplementedError

    def hessian_product(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """∂²ℓ/∂f² times ``v: [..., n, k]``, without forming the matrix."""
        raise NotImplementedError

    def hessian(self, f: Tensor, y: Tensor) -> Tensor:
        """∂²ℓ/∂f² of each example, ``[..., n, k, k]`` (Table 3.I, Appendix A)."""
        return _columns(lambda v: self.hessian_product(f, y, v), f)

    def fisher_product(self, f: Tensor, v: Tensor) -> Tensor:
        """D(f) times ``v: [..., n, k]``, where D(f) = E_{y~p(y|f)}[s sᵀ], s = ∂ log p/∂f."""
        raise NotImplementedError

    def fisher(self, f: Tensor) -> Tensor:
        """D(f) of each example, ``[..., n, k, k]`` (Table 3.II, Appendix B)."""
        return _columns(lambda v: self.fisher_product(f, v), f)

    def fisher_factor(self, f: Tensor) -> Tensor:
        """S with SᵀS = D(f), ``[..., n, k, k]``: its rows, pulled back, give the exact Fisher."""
        raise NotImplementedError

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw y ~ p(y|f), shaped like a target, ``[..., n, k]``."""
        raise NotImplementedError

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """−∂ log p(y|f)/∂f, ``[..., n, k]``; equal to :meth:`gradient` for the cross-entropies."""
        return self.gradient(f, y)

    def target(self, f: Tensor, gradient: Tensor) -> Tensor:
        """The y for which ``gradient`` is ∂ℓ/∂f: the inverse of :meth:`gradient` in y.

        It lets an optimizer that has seen f and the backpropagated gradient evaluate the exact
        second derivative without being handed the targets.
        """
        raise NotImplementedError

    def require_target(self, f: Tensor, y: Tensor) -> None:
        """Refuse what :meth:`target` found if no target of this loss is such; believed on an accelerator.

        It is not one if the training loss is another than was declared: with weights of classes, an index
        that is ignored, a factor above one. A factor below one, or of squared errors, cannot be told.

        Args:
            f: Outputs, ``[..., n, k]``; their dtype is that in which the gradient was computed.
            y: Targets, ``[..., n, k]``.

        Raises:
            ValueError: If the targets are none.
        """
        few = max(1e-3, 16 * torch.finfo(f.dtype).eps)
        if y.is_cpu and not self._are_targets(y, few):
            raise ValueError(
                f"the gradient at the model's output is not that of {self!r} for any target: the training "
                "loss must be this one, without weights of classes, ignored targets or a factor of its own"
            )

    def _are_targets(self, y: Tensor, few: float) -> bool:
        return True


def _probable(y: Tensor, few: float) -> bool:
    """Whether numbers are in [0, 1]; those that are not finite are no matter here."""
    return not ((y < -few) | (y > 1 + few)).any()


def _columns(product, f: Tensor) -> Tensor:
    """Assemble ``[..., n, k, k]`` matrices from a product with vectors, one column at a time."""
    identity = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    return torch.stack([product(e.expand_as(f)) for e in identity], -1)


def _uniform(f: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in the shape of f, float32 at least.

    Compared with NaN they are not smaller: outputs that diverged draw *something*, where torch's own
    samplers would raise or, on an accelerator, end the process.
    """
    dtype = torch.promote_types(f.dtype, torch.float32)
    return torch.rand(f.shape, dtype=dtype, device=f.device, generator=generator)


class Quadratic(Loss):
    r"""ℓ = ‖f − y‖², summed over outputs, without ½ (Thesis §1.2.1).

    The model is y ~ N(f, σ²I). With the default σ² = ½ the Fisher term D = I/σ² equals the Hessian
    2I, so Fisher and Gauss-Newton matrices coincide (the thesis's Table 3.II prints σ² = 1).

    Args:
        reduction: ``"mean"`` or ``"sum"`` over examples.
        variance: σ² of the Gaussian model.

    Raises:
        ValueError: If ``variance`` is not positive.

    Example:
        >>> loss = Quadratic()
        >>> loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        5.0
        >>> loss.hessian(torch.zeros(1, 2), torch.zeros(1, 2))[0].tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    def __init__(self, reduction: str = "mean", variance: float = 0.5) -> None:
        """See the class."""
        super().__init__(reduction)
        if not variance > 0:
            raise ValueError(f"variance (σ²) must be positive, got {variance}")
        self.variance = variance

    def value(self, f, y):  # noqa: D102
        return (f - y).square().sum(-1)

    def gradient(self, f, y):  # noqa: D102
        return 2 * (f - y)

    def hessian_product(self, f, y, v):  # noqa: D102
        return 2 * v

    def fisher_product(self, f, v):  # noqa: D102
        return v / self.variance

    def fisher_factor(self, f):  # noqa: D102
        return torch.diag_embed(torch.full_like(f, self.variance**-0.5))

    def sample(self, f, generator=None):  # noqa: D102
        noise = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return f + self.variance**0.5 * noise

    def score(self, f, y):  # noqa: D102
        return (f - y) / self.variance

    def target(self, f, gradient):  # noqa: D102
        return f - gradient / 2


class BinaryCrossEntropyAtProbabilities(Loss):
    """ℓ = −Σ_k y log f + (1−y) log(1−f), f = Bernoulli probabilities (k independent outputs)."""

    def value(self, f, y):  # noqa: D102
        return -(torch.xlogy(y, f) + torch.special.xlog1py(1 - y, -f)).sum(-1)

    def gradient(self, f, y):  # noqa: D102
        return (1 - y) / (1 - f) - y / f

    def hessian_product(self, f, y, v):  # noqa: D102
        return (y / f.square() + (1 - y) / (1 - f).square()) * v

    def fisher_product(self, f, v):  # noqa: D102
        return v / (f * (1 - f))

    def fisher_factor(self, f):  # noqa: D102
        return torch.diag_embed((f * (1 - f)).rsqrt())

    def sample(self, f, generator=None):  # noqa: D102
        return (_uniform(f, generator) < f).to(f.dtype)

    def target(self, f, gradient):  # noqa: D102
        return f - gradient * f * (1 - f)

    def _are_targets(self, y, few):
        return _probable(y, few)


class BinaryCrossEntropyAtLogits(Loss):
    """The same loss with f = logits; probabilities are sigmoid(f)."""

    def value(self, f, y):  # noqa: D102
        return (softplus(f) - y * f).sum(-1)

    def gradient(self, f, y):  # noqa: D102
        return f.sigmoid() - y

    def hessian_product(self, f, y, v):  # noqa: D102
        return self.fisher_product(f, v)

    def fisher_product(self, f, v):  # noqa: D102
        return f.sigmoid() * (-f).sigmoid() * v

    def fisher_factor(self, f):  # noqa: D102
        return torch.diag_embed((0.5 * (logsigmoid(f) + logsigmoid(-f))).exp())

    def sample(self, f, generator=None):  # noqa: D102
        return (_uniform(f, generator) < f.sigmoid()).to(f.dtype)

    def target(self, f, gradient):  # noqa: D102
        return f.sigmoid() - gradient

    def _are_targets(self, y, few):
        return _probable(y, few)


class _Categorical(Loss):
    """What the two categorical cuts share: targets as class indices, one-hot rows or soft rows."""

    def _require_shapes(self, f, y):
        rows, classes = y.shape[-2:] == f.shape[-2:], y.shape[-1:] == f.shape[-2:-1]
        if not rows and (y.is_floating_point() or not classes):
            raise ValueError(
                f"outputs {tuple(f.shape)} need targets {tuple(f.shape[:-1])} (classes, as integers) or "
                f"{tuple(f.shape)} (rows), got {tuple(y.shape)} of {y.dtype}"
            )

    def _rows(self, f: Tensor, y: Tensor) -> Tensor:
        """Targets as rows ``[..., n, k]``; integers of the shape of f are rows already."""
        if y.is_floating_point():
            return y
        if y.shape == f.shape:
            return y.to(f.dtype)
        return one_hot(y.long(), f.shape[-1]).to(f.dtype)

    def _probabilities(self, f: Tensor) -> Tensor:
        raise NotImplementedError

    def _are_targets(self, y, few):
        return _probable(y, few) and not ((y.sum(-1) - 1).abs() > few).any()

    def sample(self, f, generator=None):
        p = self._probabilities(f)
        steps = p.to(torch.promote_types(p.dtype, torch.float32)).cumsum(-1)
        drawn = (steps[..., :-1] <= _uniform(f[..., :1], generator) * steps[..., -1:]).sum(-1)
        return self._rows(f, drawn)


class CrossEntropyAtProbabilities(_Categorical):
    """ℓ = −Σ_k y_k log f_k, f = class probabilities, treated as free variables (Thesis §3.4).

    Targets are class indices ``[..., n]`` or rows ``[..., n, k]``. For one-hot targets the Hessian
    diag(y/f²) is the outer product of the gradient with itself, so the Gauss-Newton matrix cut here
    is the *empirical Fisher* (THESIS rows 9–13).
    """

    def _probabilities(self, f):
        return f

    def value(self, f, y):  # noqa: D102
        return -torch.xlogy(self._rows(f, y), f).sum(-1)

    def gradient(self, f, y):  # noqa: D102
        return -self._rows(f, y) / f

    def hessian_product(self, f, y, v):  # noqa: D102
        return self._rows(f, y) / f.square() * v

    def fisher_product(self, f, v):  # noqa: D102
        return v / f

    def fisher_factor(self, f):  # noqa: D102
        return torch.diag_embed(f.rsqrt())

    def target(self, f, gradient):  # noqa: D102
        return -gradient * f


class CrossEntropyAtLogits(_Categorical):
    """The same loss with f = logits; probabilities are softmax(f).

    Targets are class indices ``[..., n]`` or rows ``[..., n, k]`` that sum to one. Hessian and Fisher
    term are both diag(p) − p pᵀ: the Gauss-Newton matrix cut here is the Fisher.
    """

    def _probabilities(self, f):
        return f.softmax(-1)

    def value(self, f, y):  # noqa: D102
        return -(self._rows(f, y) * log_softmax(f, -1)).sum(-1)

    def gradient(self, f, y):  # noqa: D102
        return f.softmax(-1) - self._rows(f, y)

    def hessian_product(self, f, y, v):  # noqa: D102
        return self.fisher_product(f, v)

    def fisher_product(self, f, v):  # noqa: D102
        p = f.softmax(-1)
        return p * (v - (p * v).sum(-1, keepdim=True))

    def fisher_factor(self, f):  # noqa: D102
        p = f.softmax(-1)
        root = p.sqrt()
        return torch.diag_embed(root) - root.unsqueeze(-1) * p.unsqueeze(-2)

    def target(self, f, gradient):  # noqa: D102
        return f.softmax(-1) - gradient
