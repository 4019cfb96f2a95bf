"""Which parameters belong to which layer, and what values hyperparameters may have."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sogrid.layers import Rule, rule_of

__all__ = ["Layer", "check_count", "check_hyperparameter", "find_layers", "owners", "split_off_others"]

Owners = dict[Tensor, list[tuple[str, nn.Module]]]


class Layer(NamedTuple):
    """A layer whose step is the method's.

    Attributes:
        name: In the model.
        module: The layer.
        rule: Of its kind.
        weight: Its weight when the optimizer was made.
        bias: Its bias, if that is to be trained.
        home: Index of their parameter group.
    """

    name: str
    module: nn.Module
    rule: Rule
    weight: nn.Parameter
    bias: nn.Parameter | None
    home: int

    @property
    def trained_bias(self) -> nn.Parameter | None:
        """The bias if it is trained now; if not, the layer's inputs are not centred."""
        return self.bias if self.bias is not None and self.bias.requires_grad else None

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight, or what is shaped like it, as the view ``[o, i]`` of its rule."""
        return self.rule.matrix(self.module, weight)

    def as_vector(self, bias: Tensor | None) -> Tensor | None:
        """The bias, or what is shaped like it, as the view ``[o]`` of its rule."""
        return None if bias is None else self.rule.vector(self.module, bias)

    @property
    def unchanged(self) -> bool:
        """Whether the module still has the parameters that it had."""
        module, bias = self.module, self.trained_bias
        return module.weight is self.weight and (bias is None or module.bias is bias)


def owners(model: nn.Module) -> Owners:
    """For each parameter, the modules that have it, with their names."""
    found: Owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(parameter, []).append((name, module))
    return found


def split_off_others(group: dict[str, Any], found: Owners, optimizer: str) -> list[Tensor]:
    """Leave in a group the weights and biases of layers; return the other parameters.

    Args:
        group: Changed in place.
        found: The owners of the model's parameters.
        optimizer: Named in errors.

    Raises:
        TypeError: If a layer's weights are neither float32 nor float64.
        ValueError: If a parameter is not in the model, or of a lazy layer.
    """
    own, others = [], []
    for parameter in group["params"]:
        if parameter not in found:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is not in the model given to {optimizer}"
            )
        (name, module), *more = found[parameter]
        of_a_layer = rule_of(module) is not None and (parameter is module.weight or parameter is module.bias)
        if more or not of_a_layer or len(found.get(module.weight, ())) != 1:  # shared, or computed of others
            others.append(parameter)
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy: run one forward pass before making the optimizer")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"layer {name!r} is {parameter.dtype}; sogrid needs float32 or float64 weights")
        own.append(parameter)
    group["params"] = own
    return others


def find_layers(groups: list[dict[str, Any]], found: Owners) -> list[Layer]:
    """The layers of the preconditioned groups.

    Raises:
        ValueError: If a bias is to be trained without its weight, or in another group.
    """
    home = {p: index for index, group in enumerate(groups) for p in group["params"]}
    preconditioned = (p for group in groups if group["preconditioned"] for p in group["params"])
    layers = []
    for name, module in dict.fromkeys(found[parameter][0] for parameter in preconditioned):
        weight, bias = module.weight, module.bias
        if weight not in home:
            raise ValueError(
                f"the bias of layer {name!r} is to be trained but its weight is not: freeze the bias "
                "too, or put it in a group with preconditioned=False"
            )
        if home.get(bias, home[weight]) != home[weight]:
            raise ValueError(
                f"weight and bias of layer {name!r} are in different parameter groups: a layer is stepped as "
                "one, so put both into one group, whose weight_decay leaves biases alone"
            )
        layers.append(
            Layer(name, module, rule_of(module), weight, bias if bias in home else None, home[weight])
        )
    return layers


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
