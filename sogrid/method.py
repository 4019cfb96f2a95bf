"""What a layerwise method is: three verbs on plain tensors, whose leading dimensions broadcast.

The shell (:mod:`sogrid.shell`) and the grid of configurations (:mod:`sogrid.experiments.grid`) know no more
of a method than this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from sogrid.losses import Loss
from sogrid.rows import Rows
from sogrid.statistics import Statistics
from sogrid.structured import Change, Factored, ThinInverse

__all__ = ["Gradient", "LayerMethod"]


class Gradient(NamedTuple):
    """One layer's gradient of the mean loss.

    Attributes:
        w: ∇W, ``[..., o, i]``, or its factors; not to be written to.
        b: ∇b, ``[..., o]``; ``None`` for a layer whose bias is not trained.
        mean_h: h̄ of the minibatch, ``[..., i]``; ``None`` where the method does not use it.
    """

    w: Tensor | Factored
    b: Tensor | None
    mean_h: Tensor | None


class LayerMethod:
    """Base of the methods. Hyperparameters are in the parameter group; a method of its own has few."""

    uses_statistics = True
    """Whether there is anything to refresh."""

    uses_mean = True
    """Whether the update uses the minibatch's own mean input."""

    uses_moments = False
    """Whether :meth:`moments` is wanted beside what is inverted."""

    by_example = False
    """Whether a layer has to have the examples first."""

    rows_are_examples = True
    """Whether it may have them flattened, a row being taken for an example."""

    loss: Loss | None = None
    """What the training loss has to be, if that matters."""

    def check(self, group: dict[str, Any]) -> None:
        """Validate a group's hyperparameters.

        Raises:
            TypeError: If one is not a number.
            ValueError: If one is out of range.
        """

    def needs_gradients(self, group: dict[str, Any]) -> bool:
        """Whether statistics are of the examples' gradients, not of inputs and probes alone."""
        return False

    def probe(self, updates: int, rank: int = 0) -> Callable[..., Iterable[Tensor]] | None:
        """What to pull back from the model's output when statistics are taken, if anything.

        It is given the output, and how many passes of the same update came before.

        Args:
            updates: How many were made; draws from the model depend on it.
            rank: Of the process, whose draws are of its own.
        """
        return None

    def measure(self, rows: Rows, group: dict[str, Any]) -> Statistics:
        """Statistics of one layer on a statistics minibatch."""
        raise NotImplementedError

    def invert(
        self, statistics: Statistics, group: dict[str, Any], name: str
    ) -> dict[str, Tensor | ThinInverse]:
        """What the update needs of the statistics, kept in the layer's state; ``name`` is for errors.

        Raises:
            FactorizationError: If a damped matrix cannot be inverted.
        """
        raise NotImplementedError

    def keeps(self, group: dict[str, Any]) -> set[str]:
        """What has to be in a layer's state."""
        return set()

    def moments(self, rows: Rows, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """A mean over examples in the basis that :meth:`invert` found, kept in the state as ``moments``."""
        raise NotImplementedError

    def quadratic_form(
        self, h: Tensor, mean_h: Tensor | None, biased: bool, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """Mean h̃ᵀ P h̃ over rows of a layer's inputs, P the inverse on their side, ``[...]``.

        Args:
            h: ``[..., n, i]``.
            mean_h: h̄ of the whole minibatch, as in :class:`sogrid.method.Gradient`.
            biased: Whether the layer has a bias that is trained.
            state: As for :meth:`update`.
            group: Likewise.
        """
        raise NotImplementedError

    def update(self, gradient: Gradient, state: dict[str, Any], group: dict[str, Any]) -> Change:
        """The step of one layer: for a given mean of the inputs, a linear function of ∇W and ∇b."""
        raise NotImplementedError
