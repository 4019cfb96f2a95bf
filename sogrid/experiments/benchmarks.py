"""The two benchmarks of the thesis and the methods it compares on them (Thesis §4.1, §6.5).

Minibatches of 200; second-order statistics are refreshed every 100 updates from 200 other examples.
Methods go by the names of the thesis's legends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.experiments.data import Dataset
from sogrid.losses import CrossEntropyAtLogits, Loss, Quadratic
from sogrid.networks import cifar10_classifier, mnist_autoencoder
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN

__all__ = ["BATCH", "METHODS", "REFRESH_EVERY", "Method", "Task", "cifar10_task", "mnist_task"]

BATCH = 200
REFRESH_EVERY = 100


@dataclass(frozen=True)
class Task:
    """Data, network and loss of a benchmark.

    Attributes:
        name: Short name.
        data: Where the examples come from.
        train: ``(x, y)``, ``[n, ·]`` each; the autoencoder's y is its x.
        test: The same, held out.
        network: Builds the network from MLP options.
        loss: Training loss and evaluation criterion.
    """

    name: str
    data: Dataset
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    network: Callable[..., nn.Module]
    loss: Loss


def mnist_task(data: Dataset) -> Task:
    """Autoencoder 784-…-30-…-784 with the summed squared error (Thesis §4.1.1)."""
    (train, _), (test, _) = data.train, data.test
    return Task("mnist_autoencoder", data, (train, train), (test, test), mnist_autoencoder, Quadratic())


def cifar10_task(data: Dataset) -> Task:
    """Classifier 3072-8×100-10 with the cross-entropy (Thesis §4.1.2)."""
    return Task("cifar10_classifier", data, data.train, data.test, cifar10_classifier, CrossEntropyAtLogits())


@dataclass(frozen=True)
class Method:
    """How a method of the thesis is built.

    Attributes:
        optimizer: ``(model, loss, settings) -> optimizer``.
        normalization: What its network adds, see :class:`~sogrid.networks.MLP`.
        settings: Names of the hyperparameters it takes, beside the initialisation's ``scale``.
    """

    optimizer: Callable[[nn.Module, Loss, dict[str, Any]], torch.optim.Optimizer]
    normalization: str | None = None
    settings: tuple[str, ...] = ("lr",)

    def build(self, task: Task, settings: dict[str, Any], generator: torch.Generator, device="cpu"):
        """(network, optimizer) for a task, with weights drawn on the CPU from ``generator``.

        Raises:
            ValueError: If ``settings`` lacks or adds a hyperparameter.
        """
        wanted = {*self.settings, "scale"}
        if set(settings) != wanted:
            raise ValueError(f"this method takes the settings {sorted(wanted)}, got {sorted(settings)}")
        network = task.network(
            normalization=self.normalization, scale=settings["scale"], generator=generator
        ).to(device)
        own = {key: value for key, value in settings.items() if key != "scale"}
        return network, self.optimizer(network, task.loss, own)


def _sgd(model, loss, settings):
    return torch.optim.SGD(model.parameters(), **settings)


def _acp(model, loss, settings):
    return ACP(model, **settings, refresh_every=REFRESH_EVERY)


def _kfac(curvature):
    """KFAC with √ε added to both factors: the thesis does not say how it damps."""

    def build(model, loss, settings):
        fixed = {"loss": loss, "curvature": curvature, "pi_correction": False, "refresh_every": REFRESH_EVERY}
        return KFAC(model, **settings, **fixed)

    return build


METHODS = {
    "standard_sgd": Method(_sgd),
    "bn": Method(_sgd, "batch"),
    "mean_only_bn": Method(_sgd, "mean_only"),
    "centered_gradient_descent": Method(lambda model, loss, s: CenteredGradientDescent(model, **s)),
    "acp_fixedalpha": Method(_acp, settings=("lr", "damping", "output_curvature")),
    "acp": Method(
        lambda model, loss, s: _acp(model, loss, {**s, "output_curvature": "heuristic"}),
        settings=("lr", "damping"),
    ),
    "nnn2": Method(
        lambda model, loss, s: NaturalNN(model, **s, refresh_every=REFRESH_EVERY),
        settings=("lr", "damping"),
    ),
    "kfac": Method(_kfac("fisher_sampled"), settings=("lr", "damping")),
}
"""The methods of Figs. 6.1 and 6.2, by the thesis's legend."""
