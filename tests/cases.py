"""A dozen tiny (network, loss, data) cases, labelled by what is exact on them.

``exact`` names identities that hold on a case to rounding; tests assert them there, and assert that
they *fail* on every other case, so a label cannot be wrong in either direction:

* ``HESSIAN``: Hessian = Gauss-Newton; ``HESSIAN_BLOCKS``: so do their layer blocks.
* ``FISHER``: Gauss-Newton = Fisher.
* ``EMPIRICAL``: Gauss-Newton = empirical Fisher.
* ``KFAC``: every layer's Fisher block = A ⊗ B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Loss,
    Quadratic,
)
from sogrid.networks import MLP

HESSIAN = "hessian = gauss-newton"
HESSIAN_BLOCKS = "hessian blocks = gauss-newton blocks"
FISHER = "gauss-newton = fisher"
EMPIRICAL = "gauss-newton = empirical fisher"
KFAC = "fisher blocks = kronecker products"


class Built(NamedTuple):
    """A case made concrete: ``model(x)`` is ``[n, k]``, ``y`` a target of ``loss``."""

    model: nn.Module
    loss: Loss
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Case:
    """One case; ``why`` says what is exact on it, ``exact`` the same for machines.

    Args:
        name: Test id.
        why: What is special, in a sentence.
        network: Makes the module, in float32, from a generator.
        loss: The loss, cut where the network ends.
        targets: Makes targets from (f, generator).
        exact: Labels above.
        n: Number of examples.
        repeat: Use one input for all examples.
        seed: Of parameters and data.
    """

    name: str
    why: str
    network: Callable[[torch.Generator], nn.Module]
    loss: Loss
    targets: Callable[[Tensor, torch.Generator], Tensor]
    exact: frozenset[str] = frozenset()
    n: int = 5
    repeat: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """The name, for messages."""
        return self.name


def real(f: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian targets."""
    return torch.randn(f.shape, generator=generator, dtype=f.dtype)


def pixels(f: Tensor, generator: torch.Generator) -> Tensor:
    """Targets in [0, 1]."""
    return torch.rand(f.shape, generator=generator, dtype=f.dtype)


def bits(f: Tensor, generator: torch.Generator) -> Tensor:
    """Targets in {0, 1}."""
    return torch.randint(2, f.shape, generator=generator).to(f.dtype)


def classes(f: Tensor, generator: torch.Generator) -> Tensor:
    """Class indices ``[n]``."""
    return torch.randint(f.shape[-1], f.shape[:-1], generator=generator)


def soft(f: Tensor, generator: torch.Generator) -> Tensor:
    """Rows that sum to one, far from one-hot."""
    return torch.softmax(real(f, generator), -1)


def reached(f: Tensor, generator: torch.Generator) -> Tensor:
    """Targets equal to the outputs: ∂ℓ/∂f = 0 for the quadratic loss."""
    return f.clone()


def mlp(sizes, activation, output="identity", bias=True):
    """Factory of an MLP whose biases are random, not zero; without biases if ``bias`` is False."""

    def make(generator: torch.Generator) -> nn.Module:
        model = MLP(sizes, activation, output, scale=4.0, generator=generator)
        for module in model:
            if isinstance(module, nn.Linear):
                if bias:
                    nn.init.normal_(module.bias, std=0.5, generator=generator)
                else:
                    module.bias = None
        return model

    return make


CASES = [
    Case(
        "linear regression",
        "f is linear in θ and D constant: all four matrices but the empirical Fisher coincide",
        mlp([3, 2], "identity"),
        Quadratic(),
        real,
        frozenset({HESSIAN, HESSIAN_BLOCKS, FISHER, KFAC}),
    ),
    Case(
        "tanh regression",
        "quadratic loss with σ² = ½: D = 2I on both sides, so Gauss-Newton = Fisher",
        mlp([3, 4, 2], "tanh"),
        Quadratic(),
        real,
        frozenset({FISHER}),
    ),
    Case(
        "tanh regression, σ² = .37",
        "the same with a Gaussian of another variance: Fisher = Gauss-Newton / (2σ²)",
        mlp([3, 4, 2], "tanh"),
        Quadratic(variance=0.37),
        real,
    ),
    Case(
        "tanh regression, targets reached",
        "∂ℓ/∂f = 0, so the remainder of the Hessian vanishes",
        mlp([3, 4, 2], "tanh"),
        Quadratic(),
        reached,
        frozenset({HESSIAN, HESSIAN_BLOCKS, FISHER}),
    ),
    Case(
        "sigmoid autoencoder",
        "the thesis's benchmark, tiny: sigmoid outputs, quadratic loss, targets in [0, 1]",
        mlp([4, 3, 4], "sigmoid", "sigmoid"),
        Quadratic(),
        pixels,
        frozenset({FISHER}),
    ),
    Case(
        "relu regression",
        "f is piecewise linear in each layer's parameters: blocks of the Hessian are Gauss-Newton's",
        mlp([3, 5, 2], "relu"),
        Quadratic(),
        real,
        frozenset({HESSIAN_BLOCKS, FISHER}),
    ),
    Case(
        "deep linear",
        "J_a and D do not depend on x, so Fisher blocks are Kronecker products",
        mlp([3, 4, 3, 2], "identity"),
        Quadratic(),
        real,
        frozenset({HESSIAN_BLOCKS, FISHER, KFAC}),
    ),
    Case(
        "softmax at probabilities",
        "one-hot labels: Gauss-Newton is the empirical Fisher",
        mlp([3, 4, 3], "tanh", "softmax"),
        CrossEntropyAtProbabilities(),
        classes,
        frozenset({EMPIRICAL}),
    ),
    Case(
        "softmax at probabilities, soft labels",
        "not one-hot: Gauss-Newton is neither Fisher",
        mlp([3, 4, 3], "tanh", "softmax"),
        CrossEntropyAtProbabilities(),
        soft,
    ),
    Case(
        "softmax at logits",
        "the same network and labels cut before the softmax: Gauss-Newton is the Fisher",
        mlp([3, 4, 3], "tanh"),
        CrossEntropyAtLogits(),
        classes,
        frozenset({FISHER}),
    ),
    Case(
        "softmax at logits, one input",
        "all inputs equal: h̃ and J_a are constants, so Fisher blocks are Kronecker products",
        mlp([3, 4, 3], "tanh"),
        CrossEntropyAtLogits(),
        classes,
        frozenset({FISHER, KFAC}),
        repeat=True,
    ),
    Case(
        "one Bernoulli output at the probability",
        "rank one per example, and y² = y: Gauss-Newton is the empirical Fisher",
        mlp([3, 4, 1], "tanh", "sigmoid"),
        BinaryCrossEntropyAtProbabilities(),
        bits,
        frozenset({EMPIRICAL}),
    ),
    Case(
        "three Bernoulli outputs at the probabilities",
        "Gauss-Newton has rank 3 per example, the empirical Fisher rank 1",
        mlp([3, 4, 3], "tanh", "sigmoid"),
        BinaryCrossEntropyAtProbabilities(),
        bits,
    ),
    Case(
        "three Bernoulli outputs at the logits",
        "∂²ℓ/∂f² = p(1−p) does not depend on y: Gauss-Newton is the Fisher",
        mlp([3, 4, 3], "relu"),
        BinaryCrossEntropyAtLogits(),
        bits,
        frozenset({HESSIAN_BLOCKS, FISHER}),
    ),
    Case(
        "without biases",
        "layers whose h̃ is h",
        mlp([3, 4, 2], "sigmoid", bias=False),
        Quadratic(),
        real,
        frozenset({FISHER}),
    ),
]
"""The shared list; ``pytest.mark.parametrize("case", CASES, ids=str)``."""


def build(case: Case, dtype: torch.dtype = torch.float64) -> Built:
    """Make a case's model and data, the same on every call."""
    generator = torch.Generator().manual_seed(case.seed)
    model = case.network(generator).to(dtype)
    n_in = next(model.parameters()).shape[1]
    x = torch.randn(1 if case.repeat else case.n, n_in, generator=generator, dtype=dtype)
    x = x.expand(case.n, n_in).contiguous()
    with torch.no_grad():
        y = case.targets(model(x), generator)
    return Built(model, case.loss, x, y)


def case(name: str) -> Built:
    """Build one case by name."""
    return build(next(c for c in CASES if c.name == name))
