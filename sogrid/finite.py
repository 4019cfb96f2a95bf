"""Gradients that are not finite, on an accelerator: noted on the device at every step, read now and then.

On the CPU looking is free, and a step that would start from NaN or infinity is refused
(:class:`sogrid.watching.Watching`). On an accelerator the host would have to wait for the answer, at every
step, so the step is made, and the error comes with the next refresh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MOST_UNREAD", "Noted", "read"]

MOST_UNREAD = 100
"""Steps after which a method that does not refresh, or not as often, has them read."""


def read(sizes: Tensor) -> list[float]:
    """The numbers of a tensor: the one place where a step's host waits for an accelerator."""
    return sizes.tolist()


class Noted:
    """The largest elements of the gradients of the last steps, which NaN and infinity exceed."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._steps: list[tuple[int, Sequence[str], Tensor]] = []

    def note(self, update: int, gradients: dict[str, list[Tensor]]) -> None:
        """Keep one number of each tensor that is on an accelerator, which nobody waits for.

        Args:
            update: That is under way, from zero.
            gradients: By the place that an error names.
        """
        found = [(where, t) for where, ts in gradients.items() for t in ts if not t.is_cpu]
        if found:
            places, tensors = zip(*found, strict=True)
            first, *others = torch._foreach_norm(tensors, math.inf)
            sizes = torch.stack([first, *(size.to(first) for size in others)])
            self._steps.append((update, places, sizes))

    @property
    def due(self) -> bool:
        """Whether so many steps are unread that the host had better wait."""
        return len(self._steps) >= MOST_UNREAD

    def require_finite(self) -> None:
        """Read what was noted, and forget it.

        Raises:
            FloatingPointError: At the first gradient that was not finite; the parameters have moved by it.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        sizes = iter(read(torch.cat([sizes for *_, sizes in steps])))
        for update, places, _ in steps:
            for where, size in zip(places, sizes):  # noqa: B905
                if not math.isfinite(size):
                    raise FloatingPointError(
                        f"{where}: the gradient of update {update + 1} was not finite, so the loss diverged "
                        "or overflowed, and the parameters have moved by it: go back to a checkpoint, and "
                        "lower max_change or lr, or raise the damping"
                    )
