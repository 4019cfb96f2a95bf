"""Every optimizer of the package with its main options, in one list, and a tiny task to run them on.

A new optimizer joins ``OPTIMIZERS`` and is then tested at once by everything in ``tests/optimizers``
that is parametrized over the list, or over the sublists chosen by what a method does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sogrid.losses import CrossEntropyAtLogits, Loss
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN, Newton, UpdatedBackprop
from sogrid.optimizers.layerwise import Layerwise
from sogrid.shell import LayerOptimizer

N, N_IN, N_HIDDEN, N_OUT = 12, 4, 5, 3


@dataclass(frozen=True)
class Method:
    """One optimizer with options; calling it makes it for a model.

    Args:
        name: Test id.
        kind: The class.
        options: Its keyword arguments.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module, *, loss: Loss | str = "mean", **options) -> torch.optim.Optimizer:
        """Make it, for a loss or its reduction; ``options`` go before the listed ones."""
        loss = CrossEntropyAtLogits(loss) if isinstance(loss, str) else loss
        declared = {"loss": loss} if self.takes_loss else {"reduction": loss.reduction}
        return self.kind(model, **(self.options | declared | options))

    @property
    def takes_loss(self) -> bool:
        return self.kind in (KFAC, EKFAC, UpdatedBackprop, Newton)

    @property
    def layerwise(self) -> bool:
        return issubclass(self.kind, LayerOptimizer)

    @property
    def refreshes(self) -> bool:
        """Whether it keeps statistics."""
        return issubclass(self.kind, Layerwise) and self.kind is not CenteredGradientDescent

    @property
    def starts_from_grad(self) -> bool:
        """Whether the step is made from ``.grad``, as clipping needs."""
        return self.kind is not UpdatedBackprop

    @property
    def bounded(self) -> bool:
        """Whether a step is shrunk, and so not linear in anything, and the inputs kept at every update."""
        return self.layerwise and "max_change" not in self.options

    @property
    def draws(self) -> bool:
        """Whether it pulls back what the Fisher has at the model's output."""
        return self.kind in (KFAC, EKFAC) and self.options.get("curvature", "fisher").startswith("fisher")

    @property
    def samples(self) -> bool:
        return self.draws and self.options.get("curvature") != "fisher_exact"


PLAIN: dict[str, Any] = {"lr": 0.1, "max_change": None}
HALF = {**PLAIN, "damping": 0.5}
ALGORITHM_4 = {**HALF, "bias_correction": False}
SHARED = {**PLAIN, "damping": 1.0, "pi_correction": True}
OPTIMIZERS = [
    Method("centred", CenteredGradientDescent, {**PLAIN, "bias_correction": False}),
    Method("centred, bias corrected", CenteredGradientDescent, PLAIN),
    Method("acp", ACP, ALGORITHM_4),
    Method("acp, bias corrected", ACP, HALF),
    Method("acp, heuristic", ACP, {**ALGORITHM_4, "output_curvature": "heuristic"}),
    Method("acp, exact Tikhonov", ACP, {**ALGORITHM_4, "tikhonov": "exact"}),
    Method("acp, averaging", ACP, {**ALGORITHM_4, "averaging": 0.6, "refresh_every": 2}),
    Method("acp, rank 2", ACP, {**ALGORITHM_4, "rank": 2, "averaging": 0.6}),
    Method("acp, as it comes", ACP, {"lr": 10.0}),
    Method("acp, adaptive", ACP, {**HALF, "refresh_every": "adaptive"}),
    Method("kfac, exact fisher", KFAC, {**SHARED, "curvature": "fisher_exact"}),
    Method("kfac, sampled fisher", KFAC, {**SHARED, "curvature": "fisher_sampled", "refresh_every": 2}),
    Method("kfac, gauss-newton", KFAC, {**SHARED, "curvature": "gauss_newton_probabilities"}),
    Method("kfac, empirical fisher", KFAC, {**SHARED, "curvature": "empirical_fisher", "averaging": 0.5}),
    Method("kfac, as it comes", KFAC, {"lr": 10.0}),
    Method("ekfac", EKFAC, {**HALF, "curvature": "fisher_exact"}),
    Method("ekfac, empirical", EKFAC, {**HALF, "curvature": "empirical_fisher"}),
    Method("nnn", NaturalNN, HALF),
    Method("ubp", UpdatedBackprop, PLAIN),
    Method("ubp, hessian", UpdatedBackprop, {**PLAIN, "curvature": "hessian"}),
    Method("newton", Newton, {"damping": 1.0}),
    Method("newton, gauss-newton", Newton, {"damping": 1.0, "curvature": "gauss_newton"}),
    Method("newton, fisher", Newton, {"damping": 1.0, "curvature": "fisher"}),
]
LAYERWISE = [m for m in OPTIMIZERS if m.layerwise]
REFRESHING = [m for m in OPTIMIZERS if m.refreshes]


def each(methods: list[Method]):
    """``@each(OPTIMIZERS)``: run the test for every method."""
    return pytest.mark.parametrize("method", methods, ids=lambda m: m.name)


def named(name: str) -> Method:
    """One method by name."""
    (method,) = (m for m in OPTIMIZERS if m.name == name)
    return method


def network(seed: int = 0, dtype: torch.dtype = torch.float64, activation=nn.Tanh) -> nn.Sequential:
    """A perceptron with one hidden layer, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(N_IN, N_HIDDEN), activation(), nn.Linear(N_HIDDEN, N_OUT)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(seed: int = 1, n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs whose mean is not zero, and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, N_IN, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), torch.randint(N_OUT, (n,), generator=generator)


def train(model, optimizer, steps: int = 1, *, loss: Loss | None = None, first: int = 1) -> None:
    """The ordinary loop, on batches ``first``, ``first + 1``, …"""
    loss = CrossEntropyAtLogits() if loss is None else loss
    dtype = next(model.parameters()).dtype
    for seed in range(first, first + steps):
        x, y = batch(seed, dtype=dtype)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def parameters(model) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found, expected) -> None:
    """Bit for bit: two nests of lists, dictionaries, numbers and tensors."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(found, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_close(found, expected, rtol: float = 1e-11) -> None:
    """Lists of tensors, each to ``rtol`` of its norm: float64 rounding."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.linalg.vector_norm(a - b) <= rtol * torch.linalg.vector_norm(b)
