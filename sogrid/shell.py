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

from sogrid.capture import Capture, CaptureError, LayerRecord, Wanted
from sogrid.losses import Loss, check_reduction
from sogrid.method import Change, Gradient
from sogrid.parameters import Layer, check_hyperparameter, find_layers, owners, split_off_others
from sogrid.private import without_autocast
from sogrid.structured import Factored, add_to

__all__ = ["LayerOptimizer", "LayerOptions", "Ready", "Watching"]


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
        with without_autocast():
            self._step()
        self._forget()
        return loss

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
            the whole layer's alike. ``None``: no bound, as in the thesis. Kept in the parameter groups, so
            it may decay like a learning rate. Cheap with factored gradients.

    Raises:
        TypeError: If ``model`` is not a module, or a weight is neither float32 nor float64.
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
        max_change: float | Tensor | None = None,
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
        defaults = {"lr": lr, "max_change": max_change, **hyperparameters}
        super().__init__(params, {**defaults, "preconditioned": True, "updates": 0})
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

    def _split(self, group: dict, lr: float | Tensor | None) -> None:
        """Move what is no layer's to a group of its own, or refuse; ``lr`` if that is all there is."""
        found = owners(self.model)
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
        elif others:
            super().add_param_group({**group, "params": others, "lr": self.other_lr, "preconditioned": False})

    def _bind(self) -> None:
        """Find the layers of the preconditioned groups and listen to them."""
        layers = find_layers(self.param_groups, owners(self.model))
        if self._capture is not None:
            self._capture.close()
        self._layers, self._routes = layers, {}
        self._factored = {p for layer in layers if layer.rule.factors for p in (layer.weight, layer.bias)}
        self._capture = Capture(self.model, {layer.name: layer.module for layer in layers}, self._wanted())

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

    def _leaves_factors(self, layer: Layer) -> bool:
        return self.gradients == "factored" and layer.rule.factors

    def _ready(self) -> Iterator[Ready]:
        """The layers that hold a gradient, each checked for what a step needs."""
        for layer in self._layers:
            if not layer.unchanged:
                raise CaptureError(
                    f"layer {layer.name!r} has another weight or bias than when the optimizer was made, as "
                    "after load_state_dict(..., assign=True): make a new optimizer"
                )
            record, held = self._capture.records[layer.name], self._held(layer)
            if held:
                yield Ready(layer, record, None)
            elif self._leaves_factors(layer) and record.count:
                yield Ready(layer, record, self._factors(layer, record))

    def _held(self, layer: Layer) -> bool:
        """Whether a layer has a ``.grad``, whole and of a pass that was seen."""
        name, record, bias = layer.name, self._capture.records[layer.name], layer.trained_bias
        grads = {"weight": layer.weight.grad} | ({} if bias is None else {"bias": bias.grad})
        held = [kind for kind, grad in grads.items() if grad is not None]
        if not held:
            return False
        if self._leaves_factors(layer):
            raise CaptureError(
                f"layer {name!r}: the {held[0]} has a .grad, which gradients='factored' would not "
                "use: it is of a pass that was not seen (in eval mode?) or of a penalty on the "
                "parameter; call zero_grad() and the model in training mode, or use "
                "gradients='matrix'"
            )
        if len(held) < len(grads):
            (missing,) = grads.keys() - held
            raise CaptureError(f"layer {name!r}: the {held[0]} has a gradient but the {missing} has none")
        if not record.count:
            raise CaptureError(
                f"layer {name!r} has a gradient but its forward pass was not seen: it ran in eval mode, "
                "its weight was used outside the layer, or the optimizer was closed"
            )
        return True

    def _factors(self, layer: Layer, record: LayerRecord) -> Gradient:
        """A layer's factored gradient of the mean loss."""
        h, g = record.factors()
        grad_b = None if layer.trained_bias is None else g.sum(0)
        mean_h = h.mean(0) if self.uses_mean else None
        if self.reduction == "mean":
            return Gradient(Factored(g, h), grad_b, mean_h)
        n = record.count
        return Gradient(Factored(g, h, 1 / n), None if grad_b is None else grad_b / n, mean_h)

    def _matrices(self, layer: Layer, record: LayerRecord) -> Gradient:
        """``.grad`` as that of the mean loss."""
        scale = 1 if self.reduction == "mean" else record.count
        grads = [None if p is None else p.grad for p in (layer.weight, layer.trained_bias)]
        grad_w, grad_b = (grad if grad is None or scale == 1 else grad / scale for grad in grads)
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
        self._require_finite({f"layer {one.layer.name!r}": self._looked_over(one) for one in ready})
        self._prepare(ready)
        for layer, (dw, db) in self._changes(ready):
            self._routes[layer.name] = "factored" if isinstance(dw, Factored) else "formed"
            add_to(layer.rule.matrix(layer.module, layer.weight), dw)
            if db is not None:
                layer.bias.add_(db)
        self._step_others(max((record.count for _, record, _ in ready), default=1))
        for group in self.param_groups:
            group["updates"] += 1

    def _step_others(self, count: int) -> None:
        """Plain SGD, with the gradient of the mean loss, outside the preconditioned groups."""
        scale = 1 if self.reduction == "mean" else 1 / count
        for group in self.param_groups:
            for parameter in () if group["preconditioned"] else group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * scale * parameter.grad)
