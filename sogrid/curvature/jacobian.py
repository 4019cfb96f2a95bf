r"""Per-example Jacobians of the network's output, dense: the J of JᵀDJ.

Index letters: n example, k output, P parameters of the whole model, i/o a layer's inputs/outputs.

θ, everywhere in this package, is the concatenation of ``p.reshape(-1)`` over
``model.named_parameters()``: torch's row-major order, weight before bias, frozen parameters included.
The thesis stacks columns instead, θ = [vec(W); b]; :func:`sogrid.curvature.to_thesis_order` converts.

These functions are meant for small networks and for tests: memory is n·k·P numbers.

Thesis §3.1.4 (J_θ), §3.3.1 (the common form), §6.2 (J_a).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from sogrid.losses import Loss

__all__ = [
    "evaluate",
    "parameter_vector",
    "per_example_gradient",
    "per_example_jacobian",
    "preactivation_jacobian",
    "pull_back",
]


def parameter_vector(model: nn.Module) -> Tensor:
    """θ: all parameters of ``model`` in one detached vector ``[P]``, in torch's row-major order.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> _ = nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        >>> parameter_vector(model).tolist()
        [1.0, 1.0, 0.0]
    """
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def evaluate(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    """f_θ(x): the output of ``model`` with its parameters replaced by ``theta``.

    The model is not changed: its buffers (running means) are read, and written only in a copy.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        theta: Parameters, ``[P]``, ordered as in :func:`parameter_vector`.
        x: Inputs, ``[n, ...]``.

    Returns:
        ``[n, k]``.

    Raises:
        ValueError: If the output is not a matrix with one row per example.
    """
    state = {name: b.clone() for name, b in model.named_buffers()}
    named = dict(model.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    state |= {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
    f = functional_call(model, state, (x,))
    if f.ndim != 2 or len(f) != len(x):
        raise ValueError(f"the model must map {len(x)} examples to [n, k], got {list(f.shape)}")
    return f


def per_example_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J_θ(x_i) = ∂f_θ(x_i)/∂θ for every example (Thesis §3.1.4).

    If the model mixes examples (batch normalisation in training mode), row i is still the derivative
    of output i in the parameters, with the minibatch x held fixed.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        x: Inputs, ``[n, ...]``.

    Returns:
        ``[n, k, P]``, parameters ordered as in :func:`parameter_vector`.

    Example:
        >>> per_example_jacobian(nn.Linear(2, 1), torch.tensor([[3.0, 5.0]])).tolist()
        [[[3.0, 5.0, 1.0]]]
    """
    return jacrev(lambda theta: evaluate(model, theta, x))(parameter_vector(model))


def per_example_gradient(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """∇_θ ℓ_i = J_θ(x_i)ᵀ ∂ℓ_i/∂f, one un-normalised row per example (Thesis §3.1.4).

    The gradient of the mean risk is the mean of the rows, whatever ``loss.reduction`` is.

    Args:
        model: Any module from ``[n, ...]`` to ``[n, k]``.
        loss: The loss, cut where the model's output is.
        x: Inputs, ``[n, ...]``.
        y: Targets of ``loss``.

    Returns:
        ``[n, P]``.
    """
    f = evaluate(model, parameter_vector(model), x)
    return torch.einsum("nkp,nk->np", per_example_jacobian(model, x), loss.gradient(f, y))


def pull_back(J: Tensor, D: Tensor) -> Tensor:
    """(1/n) Σ_i J_iᵀ D_i J_i: the form Gauss-Newton and Fisher share (Thesis eq. (3.3.1)).

    Printed J D Jᵀ in §3.2.3–3.3.1; the shapes require Jᵀ D J (erratum E6).

    Args:
        J: Jacobians, ``[n, k, P]``.
        D: Middle terms, ``[n, k, k]``.

    Returns:
        ``[P, P]``; a mean over examples.

    Example:
        >>> pull_back(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 1)).tolist()
        [[5.0, 1.0], [1.0, 2.0]]
    """
    return torch.einsum("nkp,nkl,nlq->pq", J, D, J) / len(J)


class _Shifted(nn.Module):
    """A layer whose pre-activation is a = layer(h) + shift; remembers h and counts its calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.shift: Tensor | None = None
        self.inputs: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        self.inputs.append(h)
        a = self.layer(h)
        return a if self.shift is None else a + self.shift


def preactivation_jacobian(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer's inputs h and J_a = ∂f/∂a, the Jacobian in its pre-activations (Thesis §6.2).

    Works on a copy of the model in which the layer computes a = W h + b + δ_i, and differentiates in
    δ_i at 0. With them the layer's part of J_θ(x_i) is [hᵀ 1] ⊗ J_a (eq. (6.2.1)).

    Args:
        model: A module from ``[n, ...]`` to ``[n, k]`` that treats examples separately.
        layer: Name of an ``nn.Linear`` in ``model.named_modules()``.
        x: Inputs, ``[n, ...]``.

    Returns:
        ``h: [n, n_in]`` and ``J_a: [n, k, n_out]``.

    Raises:
        KeyError: If the model has no module of that name.
        TypeError: If that module is not an ``nn.Linear``.
        ValueError: If the layer is not applied exactly once to a matrix ``[n, n_in]``.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise KeyError(f"no module named {layer!r}; the model has {sorted(modules)}")
    if not isinstance(modules[layer], nn.Linear):
        raise TypeError(f"layer {layer!r} must be an nn.Linear, got {type(modules[layer]).__name__}")
    model = copy.deepcopy(model)
    target = model.get_submodule(layer)
    shifted = _Shifted(target)
    for name in [name for name, m in model.named_modules(remove_duplicate=False) if m is target]:
        if name:
            model.set_submodule(name, shifted)
        else:
            model = shifted
    theta = parameter_vector(model)
    evaluate(model, theta, x)
    if len(shifted.inputs) != 1 or shifted.inputs[0].ndim != 2:
        shapes = [list(h.shape) for h in shifted.inputs]
        raise ValueError(f"layer {layer!r} must be applied once, to [n, n_in]; it was applied to {shapes}")
    h = shifted.inputs[0]

    def output(shift: Tensor) -> Tensor:
        shifted.shift = shift
        return evaluate(model, theta, x)

    J = jacrev(output)(h.new_zeros(len(h), shifted.layer.out_features))  # [n, k, n, n_out]
    return h, J.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
