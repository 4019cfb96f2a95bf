"""KFAC as other libraries have it, to be timed beside ours.

Each is driven by its public interface, as its documentation says, with factors of the same curvature as
ours: for the quadratic loss of one sampled target for each example, for cross-entropy of the observed
labels. None is a dependency of sogrid; ``make bench`` installs them beside it, see ``pyproject.toml``.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import version

import torch
from torch import Tensor, nn

from lab.timing import Contestant
from sogrid.losses import Loss, Quadratic

__all__ = ["PEERS", "Peer"]

NEVER = 2**62
MAPS = nn.Linear, nn.Conv2d


class Peer(Contestant):
    """An optimizer of another library; its import is the first thing that its constructor does.

    Args:
        model: A network of linear layers and convolutions; what else it has, SGD trains.
        loss: Its training loss, a mean over the minibatch.
        lr: Learning rate.
        damping: As the library understands it.
    """

    keeps_statistics = True
    distribution: str
    """Name of the package that is installed."""

    def __init__(self, model: nn.Module, loss: Loss, *, lr: float, damping: float) -> None:
        """See the class."""
        super().__init__(model, torch.optim.SGD(model.parameters(), lr), loss)
        self.damping, self.sampled = damping, isinstance(loss, Quadratic)
        self.others = [
            m for m in model.modules() if not isinstance(m, MAPS) and [*m.parameters(recurse=False)]
        ]
        self.connect()

    @property
    def preconditioned(self) -> list[nn.Parameter]:
        """The parameters of linear layers and convolutions; SGD alone trains the others."""
        layers = [m for m in self.model.modules() if isinstance(m, MAPS)]
        return [p for layer in layers for p in layer.parameters()]

    @abstractmethod
    def connect(self) -> None:
        """Import the library and make what is needed of it.

        Raises:
            ImportError: If it is not installed, or something that it needs is not.
        """

    @classmethod
    def version(cls) -> str:
        """Of the installed package."""
        return version(cls.distribution)


class Preconditioned(Peer):
    """One that changes ``.grad``, and leaves the rest to SGD."""

    def update(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.precondition()
        self.optimizer.step()

    @abstractmethod
    def precondition(self) -> None:
        """Multiply every ``.grad`` by the inverse."""


class ASDL(Peer):
    """``KfacGradientMaker``, which makes the forward and backward pass, and refreshes in it.

    A bias is multiplied by the output factor alone.
    """

    distribution = "asdfghjkl"
    refresh_updates = True

    def connect(self) -> None:
        from asdl.precondition import KfacGradientMaker, PreconditioningConfig

        config = PreconditioningConfig(
            damping=self.damping, preconditioner_upd_interval=NEVER, ignore_modules=self.others
        )
        fisher = "fisher_mc" if self.sampled else "fisher_emp"
        loss = "mse" if self.sampled else "cross_entropy"
        self.maker = KfacGradientMaker(self.model, config, fisher_type=fisher, loss_type=loss)

    def update(self, x: Tensor, y: Tensor, step: int = 1) -> None:
        self.optimizer.zero_grad()
        self.maker.load_state_dict({"step": step})
        self.maker.config.data_size = len(x)
        output = self.maker.setup_model_call(self.model, x)
        self.maker.setup_loss_call(_Criterion(self.loss), output, y)
        self.maker.setup_logits_repr(output)
        self.maker.forward_and_backward()
        self.optimizer.step()

    def refresh(self, x: Tensor, y: Tensor) -> None:
        self.update(x, y, step=0)


class _Criterion(nn.Module):
    """A loss of ours whose reduction may be set, as in torch's modules."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.kind, self.reduction = type(loss), loss.reduction

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.kind(self.reduction)(f, y)


class SINGD(Peer):
    """``SINGD`` with its defaults but for the momentum of the step, which nobody here has.

    It refreshes, in the course of an update, from the update's own gradients: the empirical Fisher.
    """

    distribution = "singd"
    refresh_updates = True
    structure = "dense"

    def connect(self) -> None:
        from singd.optim.optimizer import SINGD as Optimizer

        (group,) = self.optimizer.param_groups
        self.optimizer = Optimizer(
            self.model,
            lr=group["lr"],
            momentum=0.0,
            damping=self.damping,
            structures=(self.structure, self.structure),
            warn_unsupported=False,
        )
        rest = [p for module in self.others for p in module.parameters(recurse=False)]
        self.rest = torch.optim.SGD(rest, group["lr"]) if rest else None

    def update(self, x: Tensor, y: Tensor, every: int = NEVER) -> None:
        for group in self.optimizer.param_groups:
            group["T"] = every
        if self.rest is not None:
            self.rest.zero_grad()
        super().update(x, y)
        if self.rest is not None:
            self.rest.step()

    def refresh(self, x: Tensor, y: Tensor) -> None:
        self.update(x, y, every=1)


class DiagonalSINGD(SINGD):
    """The same with diagonal factors."""

    structure = "diagonal"


class Curvlinops(Preconditioned):
    """``KFACInverseLinearOperator``: the factors once at a refresh, a product with the gradient in a step."""

    distribution = "curvlinops-for-pytorch"

    def connect(self) -> None:
        import curvlinops

        self.library = curvlinops

    def refresh(self, x: Tensor, y: Tensor) -> None:
        factors = self.library.KFACLinearOperator(
            self.model,
            nn.MSELoss() if self.sampled else nn.CrossEntropyLoss(),
            self.preconditioned,
            [(x, y)],
            fisher_type="mc" if self.sampled else "empirical",
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=1,
        )
        inverse = self.library.KFACInverseLinearOperator(factors, damping=(self.damping, self.damping))
        self.inverse = inverse
        self._product()

    def precondition(self) -> None:
        for parameter, direction in zip(self.preconditioned, self._product(), strict=True):
            parameter.grad = direction

    def _product(self) -> list[Tensor]:
        """With the gradients, or with the parameters before there are any: the first one inverts."""
        return self.inverse @ [p.detach() if p.grad is None else p.grad for p in self.preconditioned]


class NNGeometry(Preconditioned):
    """``PMatKFAC`` of ``FIM``: inverted at a refresh, a product with the gradient in a step."""

    distribution = "nngeometry"

    def connect(self) -> None:
        from nngeometry.metrics import FIM
        from nngeometry.object import PMatKFAC, PVector

        self.fisher, self.kind, self.vector = FIM, PMatKFAC, PVector

    def refresh(self, x: Tensor, y: Tensor) -> None:
        def surprise(x: Tensor, y: Tensor) -> Tensor:
            f = self.model(x)
            return self.loss.value(f, self.loss.sample(f.detach()) if self.sampled else y).unsqueeze(1)

        examples = x.clone(), y
        matrix = self.fisher(self.model, examples, self.kind, variant="regression", function=surprise)
        self.inverse = matrix.inverse(self.damping)

    def precondition(self) -> None:
        natural = self.inverse.mv(self.vector.from_model_grad(self.model)).to_dict()
        for layer, parameters in self.vector.from_model(self.model).to_dict().items():
            for parameter, direction in zip(parameters, natural[layer], strict=True):
                parameter.grad = direction


PEERS: dict[str, type[Peer]] = {
    "asdfghjkl": ASDL,
    "singd": SINGD,
    "singd diagonal": DiagonalSINGD,
    "curvlinops": Curvlinops,
    "nngeometry": NNGeometry,
}
"""By the names of their rows."""
