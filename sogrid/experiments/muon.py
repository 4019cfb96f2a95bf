"""Muon for a whole network: torch's for the matrices, its Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAndAdam"]


class MuonAndAdam(torch.optim.Optimizer):
    """``torch.optim.Muon`` for matrices, which is all it takes, and ``torch.optim.Adam`` for the rest.

    One learning rate serves both: Muon's step is scaled to the root mean square of an Adam step
    (``adjust_lr_fn="match_rms_adamw"``). No weight decay.

    Args:
        params: Parameters, among them at least one matrix and one that is none.
        lr: Learning rate of both.
        momentum: Muon's, which is Nesterov's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """See the class."""
        params = list(params)
        matrices = [p for p in params if p.dim() == 2]
        rest = [p for p in params if p.dim() != 2]
        muon = torch.optim.Muon(
            matrices, lr=lr, momentum=momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.parts = [muon, torch.optim.Adam(rest, lr=lr)]
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """As in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of the two."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
