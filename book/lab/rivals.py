r"""Two living relatives of ACP, FOOF and Newton-Muon, as optimizers to compare with; and some in a grid.

Both multiply the gradient of a weight by the inverse of the second moment M = E[h hᵀ] of the layer's inputs,
where ACP centres the gradient and has their covariance C = M − h̄h̄ᵀ; the bias is no part of it. What that
does to a step is on the page *When does centring pay?*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from sogrid.experiments.muon import MuonAndAdam
from sogrid.factorize import tikhonov_inverse
from sogrid.method import LayerMethod
from sogrid.optimizers.centered import bias_update, centered_gradient
from sogrid.optimizers.layerwise import Layerwise, StatisticsOptions
from sogrid.parameters import check_count, check_hyperparameter
from sogrid.statistics import Statistics, input_rows, second_moment
from sogrid.structured import (
    Factored,
    ThinInverse,
    matrixwise,
    mean_eigenvalue,
    product,
    quadratic_form,
    vectorwise,
)

__all__ = [
    "FOOF",
    "AdamMethod",
    "FOOFMethod",
    "InGrid",
    "NewtonMuon",
    "NewtonMuonMethod",
    "foof_update",
    "msgn",
    "newton_schulz",
    "ridged_inverse",
]


def foof_update(
    grad_w: Tensor | Factored,
    grad_b: Tensor | None,
    inverse: Tensor | ThinInverse,
    *,
    lr: float | Tensor,
) -> tuple[Tensor | Factored, Tensor | None]:
    """ΔW = −λ ∇W (M + εI)⁻¹ and Δb = −λ ∇b.

    Args:
        grad_w: ∇W of the mean loss, ``[..., o, i]``; if it is factored, ΔW may be.
        grad_b: ∇b, ``[..., o]`` or ``None``.
        inverse: ``[..., i, i]``.
        lr: λ, a number or ``[...]``.
    """
    return product(-lr, grad_w, inverse), None if grad_b is None else -vectorwise(lr) * grad_b


class FOOFMethod(LayerMethod):
    """FOOF as verbs: ACP's with a mean of zero, and the bias apart."""

    uses_mean = False

    def check(self, group):  # noqa: D102
        check_hyperparameter("damping (ε)", group["damping"])

    def measure(self, rows, group):  # noqa: D102
        mean, inputs = input_rows(rows.inputs, centered=False)
        return Statistics(mean, second_moment(inputs))

    def invert(self, statistics, group, name):  # noqa: D102
        return {"inverse": tikhonov_inverse(statistics.covariance, group["damping"], name, group["rank"])}

    def quadratic_form(self, h, mean_h, biased, state, group):  # noqa: D102
        return quadratic_form(h, state["inverse"])

    def update(self, gradient, state, group):  # noqa: D102
        return foof_update(gradient.w, gradient.b, state["inverse"], lr=group["lr"])


class FOOF(Layerwise):
    """Gradient descent on neurons (Benzing 2022, arXiv 2201.12250) for the layers of a model.

    The formula is the paper's, whose networks have no biases: one is left to its gradient. Statistics come
    now and then from a minibatch, as ACP's do. For a running average of them there is ``averaging``.

    Args:
        model: See :class:`~sogrid.shell.LayerOptimizer`.
        lr: Learning rate λ.
        damping: ε, added to the second moment of the inputs.
        **options: Those of :class:`~sogrid.optimizers.layerwise.Layerwise`.

    Raises:
        TypeError: See :class:`~sogrid.shell.LayerOptimizer`.
        ValueError: See there.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        damping: float | Tensor = 0.1,
        **options: Unpack[StatisticsOptions],
    ) -> None:
        """See the class."""
        super().__init__(FOOFMethod(), model, lr, {"damping": damping}, **options)


def msgn(matrix: Tensor) -> Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ: the nearest matrix whose singular values are all one.

    Example:
        >>> msgn(torch.tensor([[3.0, 0.0], [0.0, -0.2]])).round().tolist()
        [[1.0, 0.0], [0.0, -1.0]]
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def ridged_inverse(moment: Tensor, ridge: float = 0.2) -> Tensor:
    """(M + γI)⁻¹ of ``moment: [i, i]``, with γ = ``ridge`` times the mean of its diagonal."""
    return tikhonov_inverse(moment, (ridge * moment.diagonal().mean()).item() + 1e-8)


class NewtonMuon(MuonAndAdam):
    """Newton-Muon (Du & Su 2026, arXiv 2604.01472): Muon of ∇W (M + γI)⁻¹ for every linear layer's weight.

    M is a running average of the second moment of the layer's inputs, of which one minibatch in
    ``refresh_every`` is seen; momentum and orthogonalisation are those of ``torch.optim.Muon``, and Adam has
    what is no matrix. Unlike the authors', whose first refresh is after ``refresh_every`` updates, it takes
    the first minibatch's M as it is.

    Args:
        model: Whose matrices are the weights of linear layers.
        lr: Learning rate of both.
        refresh_every: Updates between two refreshes.
        averaging: Weight of the old M at a refresh.
        ridge: γ, in multiples of the mean of M's diagonal.
        momentum: Muon's.

    Raises:
        ValueError: If another parameter is a matrix, or a hyperparameter is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        refresh_every: int = 64,
        averaging: float = 0.95,
        ridge: float = 0.2,
        momentum: float = 0.95,
    ) -> None:
        """See the class."""
        check_count("refresh_every", refresh_every)
        check_hyperparameter("averaging", averaging, below=1.0)
        check_hyperparameter("ridge (γ)", ridge, positive=True)
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        weights = {layer.weight for layer in self.layers}
        if any(p.dim() == 2 and p not in weights for p in model.parameters()):
            raise ValueError("Newton-Muon trains the matrices of linear layers, and the model has others")
        super().__init__(model.parameters(), lr, momentum)
        self.refresh_every, self.averaging, self.ridge = refresh_every, averaging, ridge
        self.updates, self._seen = 0, {}
        self.moments: dict[int, Tensor] = {}
        self.inverses: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda layer, inputs, index=index: self._see(index, inputs[0]))

    def _see(self, index: int, h: Tensor) -> None:
        if self.updates % self.refresh_every == 0 and self.layers[index].training and torch.is_grad_enabled():
            self._seen[index] = h.detach().flatten(0, -2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """As in torch; ``.grad`` of the weights is preconditioned in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, h in self._seen.items():
            moment = h.mT @ h / len(h)
            moment = torch.lerp(moment, self.moments.get(index, moment), self.averaging)
            self.moments[index], self.inverses[index] = moment, ridged_inverse(moment, self.ridge)
        self._seen.clear()
        for index, inverse in self.inverses.items():
            if (grad := self.layers[index].weight.grad) is not None:
                grad.copy_(grad @ inverse)
        super().step()
        self.updates += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the two, and the statistics."""
        own = {"updates": self.updates, "moments": dict(self.moments), "inverses": dict(self.inverses)}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch."""
        super().load_state_dict(state_dict)
        self.updates = state_dict["updates"]
        self.moments, self.inverses = dict(state_dict["moments"]), dict(state_dict["inverses"])


# -- in a grid -------------------------------------------------------------------------------------------


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """About msgn of ``matrix: [..., o, i]``, by the iteration of ``torch.optim.Muon``, in its own precision.

    Singular values end between a half and one and a half.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / matrixwise(torch.linalg.matrix_norm(x).clamp(min=1e-7))
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def _adam(
    gradient: Tensor, memory: dict[str, Tensor], name: str, updates: int, beta: float | Tensor = 0.9
) -> Tensor:
    """m̂ / (√v̂ + 1e-8) of torch's Adam; its two averages are kept in ``memory``."""
    first, second = (memory.get(name + which, torch.zeros_like(gradient)) for which in (".m", ".v"))
    memory[name + ".m"] = first = beta * first + (1 - beta) * gradient
    memory[name + ".v"] = second = torch.lerp(gradient.square(), second, 0.999)
    unbiased = second / (1 - 0.999 ** (updates + 1))
    return first / (1 - beta ** (updates + 1)) / (unbiased.sqrt() + 1e-8)


class NewtonMuonMethod(FOOFMethod):
    """Newton-Muon, centred or not, as the verbs of a grid; its rate falls to zero at update ``horizon``.

    Centred, it is the same optimizer of the layer a = W (h − h̄) + b: Muon has the centred gradient times the
    inverse of the covariance, Adam the bias, and Δb = Δb(Adam) − ΔW h̄. A step is no linear function of the
    gradient, and has a memory, so this is nothing for :class:`~sogrid.optimizers.layerwise.Layerwise`.
    """

    def __init__(self, centred: bool) -> None:
        """See the class."""
        self.centred = self.uses_mean = centred

    def check(self, group):  # noqa: D102
        check_hyperparameter("ridge (γ)", group["ridge"], positive=True)

    def measure(self, rows, group):  # noqa: D102
        mean, inputs = input_rows(rows.inputs, self.centred)
        return Statistics(mean, second_moment(inputs))

    def invert(self, statistics, group, name):  # noqa: D102
        moment = statistics.covariance
        shift = group["ridge"] * mean_eigenvalue(moment) + 1e-8
        return {"inverse": tikhonov_inverse(moment, shift, name)}

    def update(self, gradient, state, group):  # noqa: D102
        rate, mean = group["lr"] * (1 - group["updates"] / group["horizon"]), gradient.mean_h
        w = centered_gradient(gradient.w, gradient.b, mean) if self.centred else gradient.w
        w = product(1.0, w, state["inverse"])
        w = w.dense() if isinstance(w, Factored) else w
        state["momentum"] = kept = torch.lerp(w, state.get("momentum", torch.zeros_like(w)), 0.95)
        size = 0.2 * max(w.shape[-2:]) ** 0.5
        dw = -matrixwise(rate * size) * newton_schulz(torch.lerp(w, kept, 0.95))
        return dw, bias_update(
            _adam(gradient.b, state, "bias", group["updates"]), dw, mean, rate, self.centred
        )


class AdamMethod(LayerMethod):
    """torch's Adam as the verb of a grid, with a β₁ of its own."""

    uses_statistics = uses_mean = False

    def update(self, gradient, state, group):  # noqa: D102
        w = gradient.w.dense() if isinstance(gradient.w, Factored) else gradient.w
        parts = [(w, "weight", matrixwise), (gradient.b, "bias", vectorwise)]
        return tuple(
            -wise(group["lr"]) * _adam(part, state, name, group["updates"], wise(group["beta"]))
            for part, name, wise in parts
        )


class InGrid(Layerwise):
    """What a grid takes a method and its hyperparameters from; it makes no step itself.

    Args:
        method: Its verbs.
        model: As ever.
        lr: Learning rate.
        refresh_every: As ever.
        max_change: As ever, but none by default.
        **own: The method's hyperparameters.
    """

    def __init__(
        self,
        method: LayerMethod,
        model: nn.Module,
        lr: float,
        *,
        refresh_every: int = 20,
        max_change: float | None = None,
        **own: Any,
    ) -> None:
        """See the class."""
        super().__init__(method, model, lr, own, refresh_every=refresh_every, max_change=max_change)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Nothing.

        Raises:
            TypeError: Always.
        """
        raise TypeError("this method is for a grid: sogrid.experiments.grid")
