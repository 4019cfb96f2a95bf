"""Torch's contract, once: what an optimizer that watches a model owes its user.

:class:`Watching` has a capture, a ``step`` that changes nothing when it raises, copies and pickles.
:class:`LayerOptimizer` has parameter groups whose parameters are layers', and reads their gradients. What the
step is, is the method's (:mod:`sogrid.optimizers`).

The step starts from ``.grad``, so gradient clipping, accumulation and loss penalties mean what they
mean in torch. With ``gradients="factored"`` it starts from the factors of ∇W = (1/n) gᵀh, which have rank n:
autograd does not form the product, the equation multiplies its factors, and the one product that is formed
goes straight into the weight (:class:`sogrid.structured.Factored`). The step is the same to rounding and
costs little more than SGD's. What works on ``.grad`` does not work then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from sogrid.capture import UNKNOWN, Capture, CaptureError, LayerRecord, Wanted
from sogrid.finite import Noted
from sogrid.losses import Loss, check_reduction
from sogrid.method import Change, Gradient
from sogrid.parameters import Layer, check_hyperparameter, find_layers, owners, split_off_others
from sogrid.private import without_autocast
from sogrid.structured import Factored, add_to, is_one, scalar

__all__ = ["MOMENTUM", "LayerOptimizer", "LayerOptions", "Ready", "Watching"]

MOMENTUM = "momentum"
"""Where a parameter's state holds its velocity."""

GROUP_KEYS = {
    *("params", "param_names", "name"),
    *("initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"),
}
"""What a parameter group may hold beside options: torch's own keys, and those of its schedulers."""


class Watching(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that listens to a model through :mod:`sogrid.capture`.

    Hooks belong to the capture: they are gone when the optimizer is closed or deleted, and copies and
    pickles, which carry the model along, watch their own.
    """

    saved: tuple[str, ...] = ("model",)
    """Attributes that copies and pickles carry."""

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
        """Look for NaN and infinity where looking is free; on an accelerator they are noted, and read later.

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
            FloatingPointError: On the CPU, if a gradient is not finite. On an accelerator only at the next
                refresh, and then the step has been made; no other error changes a parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not getattr(self, "found_inf", 0):  # a GradScaler's
            with without_autocast():
                self._step()
        self._forget()
        return loss

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
                "GradScaler.unscale_: call scaler.step(optimizer) without unscale_ (max_change bounds the step "
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

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch. Hyperparameters that a state of an earlier version lacks have their defaults."""
        known = self.param_groups[0].keys() & self.defaults.keys()
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for key in known - group.keys():
                group[key] = self.defaults[key]
        self._forget()

    def __getstate__(self) -> dict:
        """What copies and pickles carry: never a hook."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.saved}}

    def __setstate__(self, state: dict) -> None:
        """Restore, and watch the restored model."""
        super().__setstate__(state)
        if "model" in state:
            self._bind()


class LayerOptions(TypedDict, total=False):
    """Options that every optimizer of layers takes; see :class:`LayerOptimizer`."""

    reduction: str
    other_lr: float | Tensor | None
    params: Iterable | None
    gradients: str
    max_change: float | Tensor | None
    momentum: float | Tensor
    nesterov: bool
    weight_decay: float | Tensor
    decay_bias: bool
    maximize: bool


class Ready(NamedTuple):
    """A layer to step, what it saw, and its gradient if that is factored."""

    layer: Layer
    record: LayerRecord
    factored: Gradient | None


class LayerOptimizer(Watching):
    """An optimizer whose parameters are those of layers.

    Args:
        model: The module that is trained, itself, not its parameters. Its layers that have a rule
            (:mod:`sogrid.layers`: ``nn.Linear``, ``nn.Conv2d``) are preconditioned.
        lr: Learning rate λ.
        hyperparameters: The method's own, kept in the parameter groups.
        reduction: How the training loss is reduced over examples: ``"mean"`` or ``"sum"``. Declared,
            never guessed; both give the same step, that of the mean over the examples a layer saw.
        other_lr: Learning rate of plain SGD for parameters outside these layers (norms, embeddings),
            unless their group has an ``lr``. ``None``: such parameters are an error.
        params: What to train, as in torch: parameters or groups of them with hyperparameters of their
            own; default all trainable parameters. A layer's weight and bias go in one group; a bias left
            out or frozen stays as it is, and the layer's inputs are then not centred. In a group with
            ``preconditioned=False`` everything is trained by plain SGD.
        gradients: ``"matrix"``: the step starts from ``.grad``. ``"factored"``: it starts from the
            factors g and h of each linear layer's gradient, and the ``.grad`` of its parameters stays
            ``None``: faster, but gradient clipping, ``GradScaler``, distributed averaging and
            ``create_graph=True`` do not work. A ``.grad`` that appears anyway, from a penalty on a weight
            say, is an error. Passes accumulate until ``step()`` or this optimizer's own
            ``zero_grad()``, and until then the minibatch must not be changed in place. Convolutions have
            a ``.grad`` as ever.
        max_change: κ > 0, the largest change of a layer's pre-activations in one step, in root mean square
            over (the first 16 examples of) the minibatch and the layer's units; a larger step is shrunk,
            the whole layer's alike, so that a large λ is no risk, and κ the length of a step. ``None``: no
            bound, as in the thesis. Kept in the parameter groups, so it may decay like a learning rate. Cheap
            with factored gradients.
        momentum: m in [0, 1), of the heavy ball v ← m v + Δ over the (bounded) steps Δ; with it a layer may
            move by κ/(1 − m).
        nesterov: Step by Δ + m v, as in :class:`torch.optim.SGD`.
        weight_decay: w ≥ 0, decoupled as in :class:`torch.optim.AdamW`: what is trained shrinks by λw first.
        decay_bias: Whether biases, and other parameters of one dimension, shrink too.
        maximize: Climb.

    Raises:
        TypeError: If ``model`` is not a module, a weight is neither float32 nor float64, or a parameter
            group has a key that no option has.
        ValueError: For hyperparameters out of range, and for parameters that cannot be
            preconditioned; the message names the module.
    """

    saved = ("model", "reduction", "other_lr", "gradients")

    gradients = "matrix"

    uses_mean = True
    """Whether the step uses the minibatch's own mean input."""

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        hyperparameters: dict[str, Any],
        *,
        reduction: str = "mean",
        other_lr: float | Tensor | None = None,
        params: Iterable | None = None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = 0.03,
        momentum: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
        decay_bias: bool = False,
        maximize: bool = False,
    ) -> None:
        """See the class."""
        self._require_model(model)
        if other_lr is not None:
            check_hyperparameter("other_lr", other_lr)
        if gradients not in ("matrix", "factored"):
            raise ValueError(f"gradients must be 'matrix' or 'factored', got {gradients!r}")
        self.model, self.other_lr, self.gradients = model, other_lr, gradients
        self.reduction = check_reduction(reduction)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        defaults = {"lr": lr, "max_change": max_change, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "decay_bias": decay_bias, "maximize": maximize}
        super().__init__(params, {**defaults, **hyperparameters, "preconditioned": True, "updates": 0})
        self._bind()

    def __repr__(self) -> str:
        """As in torch, and with factored gradients how each ΔW was made in the last step."""
        lines = self._lines()
        if self.gradients == "factored":
            taken = ", ".join(f"{name} {route}" for name, route in self._routes.items())
            lines += f"gradients: {taken or 'factored'}\n"
        return super().__repr__()[:-1] + lines + ")"

    def _lines(self) -> str:
        """What ``repr`` tells beside the groups."""
        return ""

    # -- parameter groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, as in torch; parameters outside layers with a rule go to a plain SGD group."""
        keys = param_group.keys() if isinstance(param_group, dict) else set()
        if unknown := keys - self.defaults.keys() - GROUP_KEYS:
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(map(repr, sorted(unknown)))}; a parameter "
                f"group may have {', '.join(sorted(self.defaults.keys() - {'updates', 'refreshed'}))}"
            )
        before = len(self.param_groups)
        super().add_param_group({**param_group})
        try:
            group = self.param_groups[-1]
            self.check_hyperparameters(group)
            if group["preconditioned"]:
                self._split(group, param_group.get("lr", self.other_lr))
            if self._capture is not None:
                self._bind()
        except Exception:
            del self.param_groups[before:]
            raise

    def check_hyperparameters(self, group: dict) -> None:
        """Validate one group's hyperparameters.

        Raises:
            TypeError: If one is not a number.
            ValueError: If one is out of range.
        """
        check_hyperparameter("lr (λ)", group["lr"])
        if group["max_change"] is not None:
            check_hyperparameter("max_change (κ)", group["max_change"], positive=True)
        check_hyperparameter("momentum", group["momentum"], below=1.0)
        check_hyperparameter("weight_decay", group["weight_decay"])
        if group["nesterov"] and not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above zero")

    def _split(self, group: dict, lr: float | Tensor | None) -> None:
        """Move what is no layer's to a group of its own, or refuse; ``lr`` if that is all there is."""
        found, names = (
            owners(self.model),
            dict(zip(group["params"], group.get("param_names", ()), strict=False)),
        )
        others = split_off_others(group, found, type(self).__name__)
        if others and self.other_lr is None:
            name, module = found[others[0]][0]
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has parameters that are no preconditioned "
                "layer's weight or bias: pass other_lr=... to train them by plain SGD, or leave them out by "
                "params=..."
            )
        if not group["params"]:  # the whole group is plain
            group.update(params=others, lr=lr, preconditioned=False)
            return
        if names:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        if others:
            plain = {**group, "params": others, "lr": self.other_lr, "preconditioned": False}
            super().add_param_group(plain | ({"param_names": [names[p] for p in others]} if names else {}))

    def _bind(self) -> None:
        """Find the layers of the preconditioned groups and listen to them."""
        layers = find_layers(self.param_groups, owners(self.model))
        if self._capture is not None:
            self._capture.close()
        self._layers, self._routes, self._noted = layers, {}, Noted()
        self._factored = {layer.weight for layer in layers if layer.rule.factors and layer.bias is not None}
        self._capture = Capture(self.model, {layer.name: layer.module for layer in layers}, self._wanted())

    def load_state_dict(self, state_dict: dict) -> None:  # noqa: D102
        super().load_state_dict(state_dict)
        self._noted = Noted()

    def _wanted(self) -> Wanted:
        bounds = [group["max_change"] for group in self.param_groups]
        return Wanted(
            rows={layer.name for layer in self._layers if bounds[layer.home] is not None},
            means=self.uses_mean,
            factored=self._factored if self.gradients == "factored" else frozenset(),
        )

    @property
    def refresh_due(self) -> bool:
        """Whether the next step would refresh statistics; a method without any has none to refresh."""
        return False

    def refresh(self, closure: Callable[[], Tensor]) -> None:
        """Refresh the statistics, if the method keeps any."""

    # -- gradients ---------------------------------------------------------------------------------

    def _ready(self) -> Iterator[Ready]:
        """The layers that hold a gradient, each checked for what a step needs."""
        for layer in self._layers:
            if not layer.unchanged:
                raise CaptureError(
                    f"layer {layer.name!r} has another weight or bias than when the optimizer was made, as "
                    "after load_state_dict(..., assign=True): make a new optimizer"
                )
            if layer.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"layer {layer.name!r} has become {layer.weight.dtype}; sogrid needs float32 or float64 "
                    "weights, and torch.autocast for other precisions"
                )
            record = self._capture.records[layer.name]
            if self._held(layer, record):
                factored = self._capture.factors(layer.module)
                yield Ready(layer, record, self._factors(layer, record) if factored else None)

    def _held(self, layer: Layer, record: LayerRecord) -> bool:
        """Whether a layer has a ``.grad``, whole and of passes that were seen; one of zeros is none."""
        where, bias = f"layer {layer.name!r}", layer.trained_bias
        factored = self._capture.factors(layer.module)
        grads = {"weight": layer.weight.grad} | ({} if bias is None else {"bias": bias.grad})
        held = {kind: grad for kind, grad in grads.items() if grad is not None}
        if factored and "weight" in held:
            raise CaptureError(
                f"{where}: the weight has a .grad, which gradients='factored' would not use: it is of a pass "
                "that was not seen (in eval mode?) or of a penalty on the weight; call zero_grad() and the "
                "model in training mode, or use gradients='matrix'"
            )
        whole = len(held) == len(grads) - factored
        if not held or not ((whole and record) or any(grad.any() for grad in held.values())):
            return False
        if not whole:
            (missing,) = grads.keys() - held.keys()
            raise CaptureError(f"{where}: the {next(iter(held))} has a gradient but the {missing} has none")
        if not record:
            raise CaptureError(
                f"{where} has a gradient but its forward pass was not seen: it ran in eval mode, its weight "
                "was used outside the layer, the optimizer was closed, or the model had been compiled and run "
                "before the optimizer was made (then make the optimizer first, or call torch.compiler.reset())"
            )
        if record.unseen:
            raise CaptureError(
                f"{where}: a part of its gradient is of a pass that is not known: {record.unseen}"
            )
        return True

    def _factors(self, layer: Layer, record: LayerRecord) -> Gradient:
        """A layer's factored gradient of the mean loss."""
        h, g = record.factors()
        grad_b, grad = g.sum(0), layer.bias.grad
        if record.version not in (UNKNOWN, grad._version) or not _equal(grad, grad_b, g):
            raise CaptureError(
                f"layer {layer.name!r}: the .grad of the bias is not what the backward pass left there (was it "
                "clipped, unscaled, penalised?), and gradients='factored' has none of the weight: bound the "
                "step with max_change, or use gradients='matrix'"
            )
        scale = 1 / ((1 if self.reduction == "mean" else record.count) * self._loss_scale)
        mean_h = h.mean(0) if self.uses_mean else None
        return Gradient(Factored(g, h, scale), grad_b if is_one(scale) else scale * grad_b, mean_h)

    def _matrices(self, layer: Layer, record: LayerRecord) -> Gradient:
        """``.grad`` as that of the mean loss."""
        scale = (1 if self.reduction == "mean" else record.count) * self._loss_scale
        grads = [None if p is None else p.grad for p in (layer.weight, layer.trained_bias)]
        grad_w, grad_b = (grad if grad is None or is_one(scale) else grad / scale for grad in grads)
        mean_h = record.mean if self.uses_mean else None
        return Gradient(layer.rule.matrix(layer.module, grad_w), grad_b, mean_h)

    def _looked_over(self, ready: Ready) -> list[Tensor]:
        """Where a NaN or infinity of a layer's gradient would show."""
        layer, _, factored = ready
        if factored is None:
            return [p.grad for p in (layer.weight, layer.trained_bias) if p is not None]
        w, b, mean_h = factored
        return [w.left if b is None else b, w.right if mean_h is None else mean_h]

    # -- step --------------------------------------------------------------------------------------

    def _changes(self, ready: list[Ready]) -> Iterator[tuple[Layer, Change]]:
        """Each layer's (ΔW, Δb), within its bound."""
        raise NotImplementedError

    def _prepare(self, ready: list[Ready]) -> None:
        """What comes before the first change: the last chance to refuse."""

    def _step(self) -> None:
        ready = list(self._ready())
        gradients = {f"layer {one.layer.name!r}": self._looked_over(one) for one in ready}
        self._require_finite(gradients)
        self._noted.note(self.param_groups[0]["updates"], gradients)
        if self.refresh_due or self._noted.due:
            self._noted.require_finite()
        self._prepare(ready)
        for layer, (dw, db) in self._changes(ready):
            self._routes[layer.name] = "factored" if isinstance(dw, Factored) else "formed"
            group = self.param_groups[layer.home]
            self._move(layer.weight, dw, group, layer)
            if db is not None:
                self._move(layer.bias, db, group)
        self._step_others(max((record.count for _, record, _ in ready), default=1))
        for group in self.param_groups:
            group["updates"] += 1

    def _step_others(self, count: int) -> None:
        """Plain SGD, with the gradient of the mean loss, outside the preconditioned groups."""
        scale = 1 / ((1 if self.reduction == "mean" else count) * self._loss_scale)
        for group in self.param_groups:
            for parameter in () if group["preconditioned"] else group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, -group["lr"] * scale * parameter.grad, group)

    def _move(
        self, parameter: Tensor, change: Tensor | Factored, group: dict, layer: Layer | None = None
    ) -> None:
        """θ ← (1 − λw) θ + v with v ← m v + Δ, in place; Δ of a layer's weight is a matrix."""

        def add(tensor: Tensor) -> None:
            add_to(tensor if layer is None else layer.rule.matrix(layer.module, tensor), change)

        momentum, decay = group["momentum"], group["weight_decay"]
        if group["maximize"]:
            change = -1 * change
        if _on(decay) and (parameter.dim() > 1 or group["decay_bias"]):
            parameter.mul_(1 - group["lr"] * decay)
        if not _on(momentum):
            add(parameter)
            return
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        add(state[MOMENTUM].mul_(momentum))
        if group["nesterov"]:
            add(parameter)
            parameter.add_(state[MOMENTUM] * momentum)
        else:
            parameter.add_(state[MOMENTUM])


def _equal(bias: Tensor, found: Tensor, g: Tensor) -> bool:
    """Whether a bias's gradient is what the rows of its layer give, to rounding; believed on an accelerator."""
    if not bias.is_cpu:
        return True
    few = 16 * torch.finfo(g.dtype).eps * len(g) ** 0.5
    return bool(((bias - found).abs() <= few * g.abs().sum(0)).all()) or not found.isfinite().all()


def _on(value: float | Tensor) -> bool:
    """Whether a hyperparameter is set; one on a device is not looked at."""
    return isinstance(value, Tensor) or value != 0
