"""Parameters outside the layers, which an optimizer of torch's kind trains within ours.

Its groups and its state are the outer optimizer's own: schedules, checkpoints and copies know one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sogrid.structured import is_one

__all__ = ["FACTORIES", "Factory", "link", "made", "step"]

Factory = Callable[..., torch.optim.Optimizer]

FACTORIES: dict[str, Factory] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
"""By name, with torch's defaults."""


def made(other: str | Factory | None, lr: float | Tensor | None) -> torch.optim.Optimizer | None:
    """The inner optimizer, still without parameters.

    Args:
        other: A name, or what makes an optimizer from a list of parameters.
        lr: If it is to be given one.

    Raises:
        ValueError: For another name.
        TypeError: If what is made is no optimizer.
    """
    if other is None:
        return None
    factory = FACTORIES.get(other) if isinstance(other, str) else other
    if not callable(factory):
        raise ValueError(
            f"other must be one of {sorted(FACTORIES)} or a function from parameters to an optimizer, such "
            f"as lambda params: torch.optim.RMSprop(params, lr=1e-3), got {other!r}"
        )
    inner = factory([nn.Parameter(torch.zeros(()))], **({} if lr is None else {"lr": lr}))
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"other made a {type(inner).__name__}, which is no torch.optim.Optimizer")
    inner.param_groups.clear()
    return inner


def link(inner: torch.optim.Optimizer | None, outer: torch.optim.Optimizer) -> None:
    """Have the inner optimizer train the groups of the outer one that are not preconditioned."""
    if inner is not None:
        inner.state = outer.state
        inner.param_groups = [group for group in outer.param_groups if not group["preconditioned"]]


def step(inner: torch.optim.Optimizer, scale: float | Tensor) -> None:
    """One step of the inner optimizer from gradients times a factor."""
    held = [(p, p.grad) for group in inner.param_groups for p in group["params"] if p.grad is not None]
    if not is_one(scale):
        for parameter, grad in held:
            parameter.grad = grad * scale
    try:
        if held:
            inner.step()
    finally:
        for parameter, grad in held:
            parameter.grad = grad
