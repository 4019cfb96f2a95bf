"""What every optimizer that watches a model shares: its capture, and how copies are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.capture import Capture
from sogrid.losses import Loss

__all__ = ["CapturingOptimizer", "check_count", "check_hyperparameter"]


def check_hyperparameter(
    name: str, value: Any, *, positive: bool = False, below: float | None = None
) -> None:
    """Refuse what is not a finite number in range; 0-d tensors count, those on a device are trusted.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is negative, NaN, infinite, zero where ``positive``, or not below ``below``.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise TypeError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
    elif not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    low = number > 0 if positive else number >= 0
    if not (low and number < (float("inf") if below is None else below)):
        wanted = ("positive" if positive else "zero or more") + (
            "" if below is None else f" and below {below}"
        )
        raise ValueError(f"{name} must be {wanted} and finite, got {number}")


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a positive integer.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


class CapturingOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that listens to a model through :mod:`sogrid.capture`.

    Hooks belong to the capture, never to the model: they are gone when the optimizer is closed or
    deleted, and copies and pickles, which carry the model along, watch their own.
    """

    saved: tuple[str, ...] = ("model",)
    """Attributes that copies and pickles carry."""

    model: nn.Module
    _capture: Capture | None = None

    def _bind(self) -> None:
        """Make the capture, from ``model`` and ``param_groups``."""
        raise NotImplementedError

    def _arm(self) -> None:
        """Tell the capture what the next pass must leave behind."""

    def _require_model(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} needs the model itself (its layers are watched), got "
                f"{type(model).__name__}: write {type(self).__name__}(model, ...), not model.parameters()"
            )

    @staticmethod
    def _require_loss(loss: Any) -> None:
        if not isinstance(loss, Loss):
            raise TypeError(
                "loss must be an object of sogrid.losses, e.g. CrossEntropyAtLogits('mean') beside "
                f"torch.nn.CrossEntropyLoss(), got {loss!r}"
            )

    @staticmethod
    def _require_finite(gradients: dict[str, list[Tensor]]) -> None:
        """Look for NaN and infinity where looking is free (on an accelerator they spread visibly).

        Args:
            gradients: By the place that an error names.
        """
        found = [tensor for tensors in gradients.values() for tensor in tensors if tensor.is_cpu]
        sums = [tensor if tensor.dim() == 1 else tensor.sum().view(1) for tensor in found]
        if not sums or math.isfinite(torch.cat(sums).sum().item()):
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
            FloatingPointError: On the CPU, if a gradient is not finite. No error changes a parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._C._DisableAutocast():
            self._step()
        return loss

    def _step(self) -> None:
        """The update itself, from the gradients and what the capture has seen."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also forgets what the cleared gradients had seen."""
        super().zero_grad(set_to_none)
        self._capture.clear()
        self._arm()

    def close(self) -> None:
        """Stop watching the model. Deleting the optimizer does the same."""
        self._capture.close()

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch."""
        super().load_state_dict(state_dict)
        self._capture.clear()
        self._arm()

    def __getstate__(self) -> dict:
        """What copies and pickles carry: never a hook."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.saved}}

    def __setstate__(self, state: dict) -> None:
        """Restore, and watch the restored model."""
        super().__setstate__(state)
        if "model" in state:
            self._bind()
