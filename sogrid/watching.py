"""Torch's contract with whoever watches a model: steps, states, copies, and when all of it is refused.

A step changes nothing when it raises. Copies and pickles bring a copy of the model and watch that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.capture import Capture, CaptureError, Wanted
from sogrid.losses import Loss
from sogrid.private import without_autocast
from sogrid.ranks import Ranks, require_whole, unwrapped
from sogrid.structured import scalar

__all__ = ["GROUP_KEYS", "MOMENTUM", "TRAINED", "Watching", "capturing"]

MOMENTUM = "momentum"
"""Where a parameter's state holds its velocity."""

TRAINED = "trained"
"""What a checkpoint has of a parameter without a state."""

GROUP_KEYS = {
    *("params", "param_names", "name"),
    *("initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"),
}
"""Torch's own keys of parameter groups, and those of its schedulers."""


def capturing() -> bool:
    """Whether what is begun now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Watching(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that listens to a model through :mod:`sogrid.capture`.

    Hooks belong to the capture: they are gone when the optimizer is closed or deleted, and copies and
    pickles, which carry the model along, watch their own.
    """

    saved: tuple[str, ...] = ("model",)
    """Attributes that copies and pickles carry."""

    process_group: Any = None
    """Who else has a part of the minibatch; see :class:`~sogrid.shell.LayerOptimizer`."""

    several_ranks = True
    """Whether the step is defined for a minibatch that several processes share."""

    capturable = False
    """Whether a CUDA graph may hold the step."""

    model: nn.Module
    _capture: Capture | None = None

    def _bind(self) -> None:
        """Make the capture, from ``model`` and ``param_groups``."""
        raise NotImplementedError

    def _wanted(self) -> Wanted:
        """What the next passes must leave behind."""
        raise NotImplementedError

    def _step(self) -> None:
        """The update itself, from the gradients and what the capture has seen."""
        raise NotImplementedError

    def _require_model(self, model: Any) -> nn.Module:
        """The module itself, without what is wrapped around it."""
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} needs the model itself (its layers are watched), got "
                f"{type(model).__name__}: write {type(self).__name__}(model, ...), not model.parameters()"
            )
        return unwrapped(model)

    def _join(self, model: nn.Module, process_group: Any) -> None:
        """Take part in a process group: by default that of a model wrapped for several processes."""
        if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = model.process_group
        self.process_group = process_group
        self._ranks()

    def _ranks(self) -> Ranks:
        """The processes that share the minibatch now; a group may begin after the optimizer was made."""
        ranks = Ranks(self.process_group)
        if ranks.size == 1:
            return ranks
        if not self.several_ranks:
            raise NotImplementedError(
                f"{type(self).__name__} steps by one process's minibatch, and {ranks.size} processes share "
                "this one: their parameters would drift apart. Use ACP, KFAC, NaturalNN or "
                "CenteredGradientDescent, or say process_group=False if each process trains its own model"
            )
        ranks.device = next(self.model.parameters()).device
        return ranks

    def _require_whole(self, parameters: Iterable[Tensor]) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter in parameters:
            require_whole(f"parameter {names.get(parameter)!r}", parameter)

    @staticmethod
    def _require_loss(loss: Any) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(
                "loss must be an object of sogrid.losses, e.g. CrossEntropyAtLogits('mean') beside "
                f"torch.nn.CrossEntropyLoss(), got {loss!r}"
            )

    @staticmethod
    def _require_finite(gradients: dict[str, list[Tensor]]) -> None:
        """Look for NaN and infinity where looking is free; on an accelerator they are noted, and read later.

        Args:
            gradients: By the place that an error names.
        """
        found = [tensor for tensors in gradients.values() for tensor in tensors if tensor.is_cpu]
        if not found or math.isfinite(torch.stack(torch._foreach_norm(found)).sum().item()):
            return
        for where, tensors in gradients.items():
            if not all(tensor.isfinite().all() for tensor in tensors if tensor.is_cpu):
                raise FloatingPointError(
                    f"{where}: the gradient is not finite, so the loss diverged or overflowed; nothing was "
                    "changed. Skip the batch with zero_grad(), lower lr or raise the damping"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that holds a gradient, at full precision inside autocast too.

        Args:
            closure: As in torch: clears the gradients, computes the loss, calls ``backward``, returns it.

        Raises:
            CaptureError: If the forward pass that a gradient belongs to was not seen.
            FactorizationError: If a damped matrix cannot be inverted.
            FloatingPointError: On the CPU, if a gradient is not finite. On an accelerator only at the next
                refresh, and then the step has been made; no other error changes a parameter.
        """
        self._require_capturable(self.capturable, "give it capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not getattr(self, "found_inf", 0):  # a GradScaler's
            with without_autocast():
                self._step()
        self._forget()
        return loss

    def _require_capturable(self, condition: bool, otherwise: str) -> None:
        """Refuse to be captured in a CUDA graph."""
        if not condition and capturing():
            raise RuntimeError(f"{type(self).__name__} is captured in a CUDA graph: {otherwise}")

    @property
    def _loss_scale(self) -> float | Tensor:
        """What a ``GradScaler`` multiplied the loss by, if it left the division to this optimizer."""
        scale = getattr(self, "grad_scale", 1.0)
        return 1.0 if scale is None else scalar(scale)

    def _require_scale(self) -> None:
        """Refuse gradients of examples whose scale nobody knows."""
        if getattr(self, "grad_scale", 1.0) is None:
            raise CaptureError(
                f"{type(self).__name__} needs the gradient of each example, and those were seen before "
                "GradScaler.unscale_: call scaler.step(optimizer) without unscale_ (max_change bounds a step "
                "in the place of clipping), or before it refresh(closure) with the loss as it is"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also forgets what the cleared gradients had seen."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        """Begin the next update: nothing has been seen of it."""
        self._capture.clear()
        self._capture.wanted = self._wanted()

    def close(self) -> None:
        """Stop watching the model. Deleting the optimizer does the same."""
        self._capture.close()

    def state_dict(self) -> dict:
        """As in torch; every parameter has a state, as :mod:`torch.distributed.checkpoint` requires."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for index in group["params"]:
                state["state"].setdefault(index, {TRAINED: True})
        return state

    def _known_keys(self) -> set[str]:
        """What a parameter group may hold."""
        return {*self.defaults, *GROUP_KEYS}

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch. Hyperparameters that a state of an earlier version lacks have their defaults.

        Raises:
            ValueError: If the state is that of another optimizer; nothing was changed.
        """
        known = self.param_groups[0].keys() & self.defaults.keys()
        usual = self._known_keys().union(*self.param_groups)  # a user may have added one
        for group in state_dict["param_groups"]:
            strange, needed = group.keys() - usual, {"updates", "damping"} & known
            if strange or not needed <= group.keys():
                raise ValueError(
                    f"this is the state of another optimizer than {type(self).__name__}: its groups have "
                    f"{', '.join(sorted(group.keys() - {'params'}))}"
                )
        super().load_state_dict(state_dict)
        for parameter, state in list(self.state.items()):
            if TRAINED in state:
                del self.state[parameter]
            else:  # what is written to, and was another's
                written = state.keys() if self.capturable else state.keys() & {MOMENTUM}
                state |= {key: state[key].clone() for key in written if isinstance(state[key], Tensor)}
        for group in self.param_groups:
            for key in known - group.keys():
                group[key] = self.defaults[key]
        self._link()
        self._forget()

    def _link(self) -> None:
        """Look at the groups and the state as they are now."""

    def __getstate__(self) -> dict:
        """What copies and pickles carry: never a hook, nor a process group, but that there is to be none."""
        group = False if self.process_group is False else None
        kept = {name: getattr(self, name) for name in self.saved}
        return {**super().__getstate__(), **kept, "process_group": group}

    def __setstate__(self, state: dict) -> None:
        """Restore, and watch the restored model."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch adds, and a group added later would have
        if "model" in state:
            self._bind()
