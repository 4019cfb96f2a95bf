"""The two benchmarks of the thesis and the methods it compares on them (Thesis §4.1, §6.5).

Minibatches of 200; second-order statistics are refreshed every 100 updates from 200 other examples.
Methods go by the names of the thesis's legends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.experiments.data import Dataset
from sogrid.experiments.muon import MuonAndAdam
from sogrid.losses import CrossEntropyAtLogits, Loss, Quadratic
from sogrid.networks import MLP, cifar10_classifier, mnist_autoencoder
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN, UpdatedBackprop

__all__ = ["BATCH", "BENCHMARKS", "METHODS", "REFRESH_EVERY", "Benchmark", "Method", "Task"]

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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Task:
        """The same with its examples elsewhere, or in another precision (labels stay what they are)."""

        def there(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, dtype if t.is_floating_point() else None) for t in pair)

        return replace(self, train=there(self.train), test=there(self.test))

    @property
    def classifies(self) -> bool:
        """Whether outputs are scores of classes, so that there is an error rate."""
        return isinstance(self.loss, CrossEntropyAtLogits)


@dataclass(frozen=True)
class Benchmark:
    """A network, its data and its loss, before the data are there.

    Attributes:
        name: Short name.
        dataset: ``"mnist"`` or ``"cifar10"``.
        network: Builds the network from MLP options.
        loss: Training loss and evaluation criterion.
        domain: Where hyperparameters are searched, on a log scale and the same for every method:
            ``{name: (low, high)}``.
    """

    name: str
    dataset: str
    network: Callable[..., nn.Module]
    loss: Loss
    domain: dict[str, tuple[float, float]]

    def task(self, data: Dataset) -> Task:
        """The benchmark on its data; an autoencoder's targets are its inputs."""
        train, test = data.train, data.test
        if isinstance(self.loss, Quadratic):
            train, test = (train[0], train[0]), (test[0], test[0])
        return Task(self.name, data, train, test, self.network, self.loss)


def _small_autoencoder(**options) -> MLP:
    return MLP([784, 100, 30, 100, 784], **{"activation": "sigmoid", "output": "sigmoid", **options})


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mnist_autoencoder",
            "mnist",
            mnist_autoencoder,
            Quadratic(),
            {"lr": (3e-3, 3.0), "damping": (1e-3, 1.0), "max_change": (3e-3, 0.3), "scale": (4.0, 128.0)},
        ),
        Benchmark(
            "cifar10_classifier",
            "cifar10",
            cifar10_classifier,
            CrossEntropyAtLogits(),
            {"lr": (1e-4, 1.0), "damping": (1e-4, 1.0), "max_change": (3e-3, 0.3), "scale": (0.5, 8.0)},
        ),
        Benchmark(
            "mnist_small_autoencoder",
            "mnist",
            _small_autoencoder,
            Quadratic(),
            {"lr": (1e-3, 10.0), "scale": (1.0, 1000.0)},
        ),
    )
}
"""The thesis's two (§4.1.1 and §4.1.2), and an autoencoder 784-100-30-100-784 for thousands of runs."""


@dataclass(frozen=True)
class Method:
    """How a method of the thesis is built and what it looks like.

    Attributes:
        optimizer: ``(model, loss, settings) -> optimizer``.
        name: In the legends of the book.
        color: Of its curves, by the name that it has in the book's palette; variants of a method share it.
        dash: Of its curves, as plotly names it.
        normalization: What its network adds, see :class:`~sogrid.networks.MLP`.
        settings: Names of the hyperparameters it takes, beside the initialisation's ``scale``.
        optional: Names of those that it takes besides, if they are given.
        tuned_as: The method whose hyperparameters it takes over, if it is a variant of one.
        lr: Its learning rate, if any large one does. Such a method is searched for the rest of its
            hyperparameters, optional ones included; until then it takes over those of ``tuned_as``.
    """

    optimizer: Callable[[nn.Module, Loss, dict[str, Any]], torch.optim.Optimizer]
    name: str = ""
    color: str = "grey"
    dash: str = "solid"
    normalization: str | None = None
    settings: tuple[str, ...] = ("lr",)
    optional: tuple[str, ...] = ()
    tuned_as: str | None = None
    lr: float | None = None

    @property
    def searched(self) -> tuple[str, ...]:
        """The hyperparameters that a search finds for it; none for a variant that takes over all of them."""
        if self.tuned_as is not None and self.lr is None:
            return ()
        own = (*self.settings, *self.optional, "scale")
        return tuple(name for name in own if name != "lr" or self.lr is None)

    def build(self, task: Task, settings: dict[str, Any], generator: torch.Generator, device="cpu"):
        """(network, optimizer) for a task, with weights drawn on the CPU from ``generator``.

        A learning rate that the method has itself may be left out of the settings.

        Raises:
            ValueError: If ``settings`` lacks or adds a hyperparameter.
        """
        wanted = {*self.settings, "scale"}
        settings = settings if self.lr is None else {"lr": self.lr, **settings}
        if set(settings) - {*self.optional} != wanted:
            raise ValueError(f"this method takes the settings {sorted(wanted)}, got {sorted(settings)}")
        network = task.network(
            normalization=self.normalization, scale=settings["scale"], generator=generator
        ).to(device)
        own = {key: value for key, value in settings.items() if key != "scale"}
        return network, self.optimizer(network, task.loss, own)


PRINTED = {"max_change": None}
AS_ALGORITHMS = {"bias_correction": False, **PRINTED}
GRADIENTS = {"gradients": "factored"}
STATISTICS = {"refresh_every": REFRESH_EVERY, **GRADIENTS}


def _sgd(model, loss, settings):
    return torch.optim.SGD(model.parameters(), **settings)


def _momentum(model, loss, settings):
    return torch.optim.SGD(model.parameters(), **settings, momentum=0.9)


def _adaptive(optimizer):
    return lambda model, loss, s: optimizer(model.parameters(), **s)


def _centered(model, loss, settings):
    return CenteredGradientDescent(model, **settings, **AS_ALGORITHMS, **GRADIENTS)


def _acp(alpha, **options):
    fixed = {"output_curvature": alpha, **AS_ALGORITHMS, **options, **STATISTICS}
    return lambda model, loss, s: ACP(model, **{**fixed, **s})


def _nnn(**options):
    fixed = {**PRINTED, **options, **STATISTICS}
    return lambda model, loss, s: NaturalNN(model, **{**fixed, **s})


def _kfac(curvature=None, **options):
    """KFAC with √ε added to both factors: the thesis does not say how it damps.

    By default with the Gauss-Newton matrix: for one-hot cross-entropy E[g gᵀ], for the quadratic loss
    (whose Gauss-Newton and Fisher matrices are the same) from one sampled target for each example.
    """

    def build(model, loss, settings):
        usual = "fisher_sampled" if isinstance(loss, Quadratic) else "gauss_newton_probabilities"
        fixed = {"loss": loss, "pi_correction": False, "curvature": curvature or usual}
        return KFAC(model, **fixed, **STATISTICS, **{**PRINTED, **options, **settings})

    return build


def _ubp(curvature, **options):
    fixed = {"curvature": curvature, **PRINTED, **options, **GRADIENTS}
    return lambda model, loss, s: UpdatedBackprop(model, loss=loss, **{**fixed, **s})


BOUND, LOW_RANK, UNBIASED = {"max_change": 0.1}, {"rank": 100}, {"bias_correction": True}
DAMPED: dict[str, Any] = {"settings": ("lr", "damping")}
AS_ACP, AS_NNN, AS_KFAC = ({**DAMPED, "tuned_as": name} for name in ("acp_fixedalpha", "nnn2", "kfac"))
BOUNDED: dict[str, Any] = {"optional": ("max_change",)}
SEARCHED: dict[str, Any] = {**BOUNDED, "lr": 10.0}
METHODS = {
    "standard_sgd": Method(_sgd, "SGD"),
    "bn": Method(_sgd, "batch norm", "brown", normalization="batch"),
    "mean_only_bn": Method(_sgd, "mean-only batch norm", "brown", "dash", normalization="mean_only"),
    "centered_gradient_descent": Method(_centered, "centred gradient descent", "purple"),
    "acp_fixedalpha": Method(_acp(1.0), "ACP, fixed α", "orange", "dash", **DAMPED),
    "acp": Method(_acp("heuristic"), "ACP, heuristic α", "orange", **DAMPED),
    "nnn2": Method(_nnn(), "NNN", "green", **DAMPED),
    "kfac": Method(_kfac(), "KFAC", "blue", **DAMPED),
    "kfac_nat": Method(_kfac("fisher_exact"), "KFAC, Fisher", "blue", "dash", **DAMPED),
    "jaco_update": Method(_ubp("gauss_newton"), "updated backpropagation", "pink"),
    "jaco_update_hessian": Method(
        _ubp("hessian"), "the same with the true Hessian", "pink", "dash", tuned_as="jaco_update"
    ),
    "jaco_update_without": Method(
        _ubp("none"), "the same without second term", "pink", "dot", tuned_as="jaco_update"
    ),
    "acp_bounded": Method(
        _acp(1.0, **UNBIASED, **BOUND), "ACP, bounded", "orange", "dot", **AS_ACP, **SEARCHED
    ),
    "nnn2_bounded": Method(_nnn(**BOUND), "NNN, bounded", "green", "dot", **AS_NNN, **SEARCHED),
    "kfac_bounded": Method(_kfac(**BOUND), "KFAC, bounded", "blue", "dot", **AS_KFAC, **SEARCHED),
    "jaco_update_bounded": Method(
        _ubp("gauss_newton", **BOUND),
        "updated backpropagation, bounded",
        "pink",
        "dashdot",
        tuned_as="jaco_update",
        **SEARCHED,
    ),
    "acp_bounded_low_rank": Method(
        _acp(1.0, **UNBIASED, **BOUND, **LOW_RANK),
        "ACP, bounded, rank 100",
        "orange",
        "longdashdot",
        **DAMPED,
        **BOUNDED,
        tuned_as="acp_bounded",
    ),
    "nnn2_bounded_low_rank": Method(
        _nnn(**BOUND, **LOW_RANK),
        "NNN, bounded, rank 100",
        "green",
        "longdashdot",
        **DAMPED,
        **BOUNDED,
        tuned_as="nnn2_bounded",
    ),
    "kfac_bounded_low_rank": Method(
        _kfac(**BOUND, **LOW_RANK),
        "KFAC, bounded, rank 100",
        "blue",
        "longdashdot",
        **DAMPED,
        **BOUNDED,
        tuned_as="kfac_bounded",
    ),
    "acp_low_rank": Method(_acp(1.0, **LOW_RANK), "ACP, fixed α, rank 100", "orange", "longdash", **AS_ACP),
    "nnn2_low_rank": Method(_nnn(**LOW_RANK), "NNN, rank 100", "green", "longdash", **AS_NNN),
    "kfac_low_rank": Method(_kfac(**LOW_RANK), "KFAC, rank 100", "blue", "longdash", **AS_KFAC),
    "momentum": Method(_momentum, "SGD with momentum", dash="dash"),
    "adam": Method(_adaptive(torch.optim.Adam), "Adam", dash="dot"),
    "muon": Method(_adaptive(MuonAndAdam), "Muon", dash="dashdot"),
}
"""The methods of Figs. 5.1 to 6.3, by the thesis's legends, and three of torch's to compare them with.

A fixed α of ACP is 1: with (λ, ε) free it is redundant, since only λ/α and ε/α matter. Variants are
ours: of updated backpropagation with the true Hessian in the place of Gauss-Newton, and with no second
term; of all second-order methods with a bound on a step (ACP then with the bias term of eq. 6.2.5; λ is 10,
as any large one does, see the experiment ``learning_rates``); of the amortised ones with statistics of rank
100, half that of their minibatches. All are searched over the same domain, bounded ones by their bound in
the place of λ.
"""
