"""The shell of every optimizer of layers: parameter groups, gradients, and how a change is made.

What the step is, is the method's (:mod:`sogrid.optimizers`); what an optimizer owes its user in torch is that
of all which watch a model (:mod:`sogrid.watching`).

The step starts from ``.grad``, so gradient clipping, accumulation and loss penalties mean what they
mean in torch. With ``gradients="factored"`` it starts from the factors of ∇W = (1/n) gᵀh, which have rank n:
autograd does not form the product, the equation multiplies its factors, and the one product that is formed
goes straight into the weight (:class:`sogrid.structured.Factored`). The step is the same to rounding and
costs little more than SGD's. What works on ``.grad`` does not work then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from sogrid.capture import LOOKS, UNKNOWN, Capture, CaptureError, LayerRecord, Wanted
from sogrid.finite import Noted
from sogrid.losses import check_reduction
from sogrid.method import Gradient
from sogrid.others import Factory, link, made, step
from sogrid.parameters import Layer, check_hyperparameter, find_layers, owners, split_off_others
from sogrid.ranks import Ranks, require_whole
from sogrid.structured import Change, Factored, add_to, is_one
from sogrid.watching import GROUP_KEYS, MOMENTUM, Watching

__all__ = ["AT_ONCE", "LayerOptimizer", "LayerOptions", "Ready", "near"]

AT_ONCE = 2**24
"""The changes of about so many weights are there at once; more take fewer operations, and more memory."""

View = Callable[[Tensor], Tensor]


class LayerOptions(TypedDict, total=False):
    """Options that every optimizer of layers takes; see :class:`LayerOptimizer`."""

    reduction: str
    other: str | Callable | None
    other_lr: float | Tensor | None
    params: Iterable | None
    gradients: str
    max_change: float | Tensor | None
    momentum: float | Tensor
    nesterov: bool
    weight_decay: float | Tensor
    decay_bias: bool
    maximize: bool
    capturable: bool
    process_group: Any


class Ready(NamedTuple):
    """A layer to step.

    Attributes:
        layer: The layer.
        record: What it saw.
        factored: Its gradient, if that is factored; with several ranks the own share of it.
        mean_h: h̄ of the minibatch, of all ranks; ``None`` where the method does not use it.
        counts: Examples of the minibatch, by rank, once these have told each other.
    """

    layer: Layer
    record: LayerRecord
    factored: Gradient | None
    mean_h: Tensor | None
    counts: Sequence[float] = ()

    @property
    def count(self) -> float:
        """Examples of a rank on average, the divisor of a sum whose ``.grad`` was averaged over ranks."""
        return sum(self.counts) / len(self.counts) if self.counts else self.record.count


class LayerOptimizer(Watching):
    """An optimizer whose parameters are those of layers.

    Args:
        model: The module that is trained, itself, not its parameters. Its layers that have a rule
            (:mod:`sogrid.layers`: linear layers and convolutions) are preconditioned.
        lr: Learning rate λ.
        hyperparameters: The method's own, kept in the parameter groups.
        reduction: How the training loss is reduced over examples: ``"mean"`` or ``"sum"``. Declared,
            never guessed; both give the same step, that of the mean over the examples a layer saw.
        other: What trains parameters outside these layers (norms, embeddings): ``"adamw"``, ``"sgd"`` or a
            function from parameters to a ``torch.optim.Optimizer``, with its own defaults; ``None``: plain
            SGD with ``other_lr`` and the momentum and decay of their group.
        other_lr: Its learning rate, unless their group has an ``lr``. ``None``: that of ``other``, and
            without one such parameters are an error.
        params: What to train, as in torch: parameters or groups of them with hyperparameters of their
            own; default all trainable parameters. A layer's weight and bias go in one group; a bias left
            out or frozen stays as it is, and the layer's inputs are then not centred. In a group with
            ``preconditioned=False`` everything is trained by ``other``.
        gradients: ``"matrix"``: the step starts from ``.grad``. ``"factored"``: it starts from the
            factors g and h of each linear layer's gradient, and the ``.grad`` of its weight stays ``None``:
            faster for wide linear layers on a CPU, but what works on ``.grad`` is refused: clipping,
            ``GradScaler.unscale_`` (not ``GradScaler``), a penalty on a weight, ``create_graph=True``. The
            ``.grad`` of the bias is formed, and tells whether gradients were cleared or changed; layers
            without one, and convolutions, have a ``.grad`` as ever. Until ``step()`` the minibatch must not
            be changed in place.
        max_change: κ > 0, the largest change of a layer's pre-activations in one step, in root mean square
            over (the first 16 examples of) the minibatch and the layer's units; a larger step is shrunk,
            the whole layer's alike (each group's, of a convolution with groups, which are layers side by
            side), so that a large λ is no risk, and κ the length of a step. ``None``: no bound, as in the
            thesis. Kept in the parameter groups, so it may decay like a learning rate. Cheap with factored
            gradients.
        momentum: m in [0, 1), of the heavy ball v ← m v + Δ over the (bounded) steps Δ; with it a layer may
            move by κ/(1 − m).
        nesterov: Step by Δ + m v, as in :class:`torch.optim.SGD`.
        weight_decay: w ≥ 0, decoupled as in :class:`torch.optim.AdamW`: what is trained shrinks by λw first,
            which with the λ of a bounded step is much: at λ = 10, w = 0.0001 is a thousandth an update.
        decay_bias: Whether biases, and other parameters of one dimension, shrink too.
        maximize: Climb.
        capturable: Whether a CUDA graph may hold an update, after one was made without. Nothing of it is then
            read back to the host, so gradients that are not finite go unseen, and a refresh writes where the
            graph reads. A replay counts no updates and refreshes nothing: give ``refresh_every=None`` and
            call ``refresh`` between replays; a learning rate that is to change is a tensor on the device.
        process_group: The processes that share each minibatch and hold the mean of their gradients, as
            ``DistributedDataParallel`` leaves it; see :mod:`sogrid.ranks`. ``None``: that of the model, if it
            is so wrapped, else torch's default group, when there is one at a step. ``False``: this process
            steps alone. A copy or pickle has ``None`` again, or ``False``.

    Raises:
        TypeError: If ``model`` is not a module, or sharded, a weight is neither float32 nor float64, or a
            parameter group has a key that no option has.
        ValueError: For hyperparameters out of range, and for parameters that cannot be
            preconditioned; the message names the module.
    """

    saved = ("model", "reduction", "other_lr", "gradients", "capturable", "_inner")

    _inner: torch.optim.Optimizer | None = None

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
        other: str | Factory | None = None,
        other_lr: float | Tensor | None = None,
        params: Iterable | None = None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = 0.03,
        momentum: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
        decay_bias: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        process_group: Any = None,
    ) -> None:
        """See the class."""
        self.model = self._require_model(model)
        if other_lr is not None:
            check_hyperparameter("other_lr", other_lr)
        if gradients not in ("matrix", "factored"):
            raise ValueError(f"gradients must be 'matrix' or 'factored', got {gradients!r}")
        self.other_lr, self.gradients, self.capturable = other_lr, gradients, capturable
        self._inner = made(other, other_lr)
        self.reduction = check_reduction(reduction)
        self._join(model, process_group)
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
        """Add a group, as in torch; parameters outside layers with a rule go to a group of their own."""
        keys = param_group.keys() if isinstance(param_group, dict) else set()
        if unknown := keys - self._known_keys():
            known = self._known_keys() - GROUP_KEYS - {"updates", "refreshed"}
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(map(repr, sorted(unknown)))}; a parameter "
                f"group may have {', '.join(sorted(known))}"
            )
        before = len(self.param_groups)
        plain = self._inner is not None and "preconditioned" in keys and not param_group["preconditioned"]
        super().add_param_group(
            {**(self._plain(self.defaults | param_group) if plain else {}), **param_group}
        )
        try:
            group = self.param_groups[-1]
            self._require_whole(group["params"])
            self.check_hyperparameters(group)
            if group["preconditioned"]:
                self._split(group, param_group)
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
        if not any(isinstance(group[key], Tensor) for key in ("lr", "weight_decay")):
            shrinks = group["lr"] * group["weight_decay"]
            if shrinks >= 1:
                raise ValueError(
                    f"lr · weight_decay must be below one: a step would shrink weights by {shrinks} times "
                    "what they are"
                )
        if group["nesterov"] and not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            raise ValueError("nesterov needs a momentum above zero")

    def _known_keys(self) -> set[str]:
        return super()._known_keys() | (set() if self._inner is None else self._inner.defaults.keys())

    def _link(self) -> None:
        link(self._inner, self)

    def _split(self, group: dict, given: dict) -> None:
        """Move what is no layer's to a group of its own, or refuse; if that is all, as it was given."""
        found = owners(self.model)
        names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
        left = split_off_others(group, found, type(self).__name__)
        if left and self.other_lr is None and self._inner is None:
            kinds = {name: type(module).__name__ for p in left for name, module in found[p]}
            raise ValueError(
                f"{', '.join(f'{name!r} ({kind})' for name, kind in kinds.items())}: parameters that are no "
                "one preconditioned layer's weight or bias. Train them by other='adamw', other_lr=1e-3 (or "
                "another optimizer), by plain SGD with other_lr=..., or leave them out by params=..."
            )
        if tied := [[name for name, _ in found[p]] for p in left if len(found[p]) > 1]:
            warnings.warn(
                f"modules {', '.join(map(str, tied))} share a parameter: it is no one layer's, and is "
                "trained with the other parameters",
                stacklevel=2,
            )
        inner = self._plain(group)
        if not group["params"]:  # the whole group is plain
            group.update(inner | given | {"params": left, "preconditioned": False})
            return
        if names:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        if left:
            plain = {**group, **inner, "params": left, "preconditioned": False}
            super().add_param_group(plain | ({"param_names": [names[p] for p in left]} if names else {}))

    def _plain(self, group: dict) -> dict:
        """What a group of other parameters has of its own; the sign of its steps is the layers'.

        Raises:
            ValueError: If it is to climb, and who trains it cannot.
        """
        inner = {"lr": self.other_lr} if self._inner is None else self._inner.defaults
        if not group["maximize"]:
            return inner
        if self._inner is not None and "maximize" not in inner:
            raise ValueError(
                f"maximize=True: {type(self._inner).__name__}, which trains the other parameters, has no "
                "such option; minimize the negative"
            )
        return inner | {"maximize": True}

    def _bind(self) -> None:
        """Find the layers of the preconditioned groups and listen to them."""
        layers = find_layers(self.param_groups, owners(self.model))
        if self._capture is not None:
            self._capture.close()
        self._layers, self._routes, self._noted = layers, {}, Noted()
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._link()
        self._factored = {layer.weight for layer in layers if layer.rule.factors and layer.bias is not None}
        self._capture = Capture(self.model, {layer.name: layer.module for layer in layers}, self._wanted())
        self._capture.take_over()

    def load_state_dict(self, state_dict: dict) -> None:  # noqa: D102
        super().load_state_dict(state_dict)
        self._noted = Noted()

    def _wanted(self) -> Wanted:
        bounds = [group["max_change"] for group in self.param_groups]
        return Wanted(
            some={layer.name for layer in self._layers if bounds[layer.home] is not None},
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

    def _ready(self, ranks: Ranks) -> Iterator[Ready]:
        """The layers that hold a gradient, each checked for what a step needs."""
        for layer in self._layers:
            if not layer.unchanged:
                require_whole(f"the weight of layer {layer.name!r}", layer.module.weight)
                raise CaptureError(
                    f"layer {layer.name!r} has another weight or bias than when the optimizer was made, as "
                    "after load_state_dict(..., assign=True): make a new optimizer"
                )
            if layer.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"layer {layer.name!r} has become {layer.weight.dtype}; sogrid needs float32 or float64 "
                    "weights, and torch.autocast for other precisions"
                )
            record, factored = self._capture.records[layer.name], self._capture.factors(layer.module)
            if self._held(layer, record, factored):
                if self.param_groups[layer.home]["max_change"] is not None:
                    record.require_first()
                gradient = self._factors(layer, record, ranks) if factored else None
                mean_h = record.mean if self.uses_mean and not factored else None
                yield Ready(layer, record, gradient, mean_h if gradient is None else gradient.mean_h)

    def _held(self, layer: Layer, record: LayerRecord, factored: bool) -> bool:
        """Whether a layer has a ``.grad``, whole and of passes that were seen; one of zeros is none."""
        weight, bias = layer.weight.grad, layer.trained_bias
        if factored and weight is not None and not weight.any():
            weight = None  # DistributedDataParallel has filled it
        found = weight is not None, bias is not None and bias.grad is not None
        wanted = not factored, bias is not None
        if found == wanted and record and not record.unseen:
            return True
        grads = [grad for grad in (weight, None if bias is None else bias.grad) if grad is not None]
        if not (found == wanted and record) and not any(grad.any() for grad in grads):
            return False
        where = f"layer {layer.name!r}"
        if factored and found[0]:
            raise CaptureError(
                f"{where}: the weight has a .grad, which gradients='factored' would not use: it is of a pass "
                "that was not seen (in eval mode?) or of a penalty on the weight; call zero_grad() and the "
                "model in training mode, or use gradients='matrix'"
            )
        if found != wanted:
            has, none = ("weight", "bias") if found[0] else ("bias", "weight")
            raise CaptureError(f"{where}: the {has} has a gradient but the {none} has none")
        if not record:
            raise CaptureError(
                f"{where} has a gradient but its forward pass was not seen: it ran in eval mode or before "
                "this optimizer was made, its weight was used outside the layer, or the optimizer was closed "
                "(a later one with gradients='factored' closes it)"
            )
        raise CaptureError(f"{where}: a part of its gradient is of a pass that is not known: {record.unseen}")

    def _factors(self, layer: Layer, record: LayerRecord, ranks: Ranks) -> Gradient:
        """A layer's factored gradient of the mean loss."""
        (h, g), grad_b = record.factors(), layer.bias.grad
        if ranks.size > 1:  # .grad is a mean over them
            grad_b = g.sum(0)
        else:
            replaced = record.made is not None and record.made() is not grad_b
            intact = record.version in (UNKNOWN, grad_b._version) and not replaced
            if intact and grad_b.is_cpu and self.param_groups[0]["updates"] % LOOKS == 0:
                intact = near(grad_b, g.sum(0), g.abs().sum(0), len(g))
            self._require_intact(f"layer {layer.name!r}: the .grad of the bias", intact)
        scale = 1 / ((1 if self.reduction == "mean" else record.count) * self._loss_scale)
        mean_h = h.mean(0) if self.uses_mean else None
        return Gradient(Factored(g, h, scale), grad_b if is_one(scale) else scale * grad_b, mean_h)

    @staticmethod
    def _require_intact(whose: str, intact: bool) -> None:
        if not intact:
            raise CaptureError(
                f"{whose} is not what the backward pass left there (was it clipped, unscaled, penalised?), "
                "and gradients='factored' has no other: bound the step with max_change, or use "
                "gradients='matrix'"
            )

    def _matrices(self, ready: Ready) -> Gradient:
        """``.grad`` as that of the mean loss."""
        layer = ready.layer
        scale = (1 if self.reduction == "mean" else ready.count) * self._loss_scale
        grads = [None if p is None else p.grad for p in (layer.weight, layer.trained_bias)]
        grad_w, grad_b = (grad if grad is None or is_one(scale) else grad / scale for grad in grads)
        return Gradient(layer.as_matrix(grad_w), layer.as_vector(grad_b), ready.mean_h)

    def _looked_over(self, ready: Ready) -> list[Tensor]:
        """Where a NaN or infinity of a layer's gradient would show."""
        if ready.factored is None:
            return [p.grad for p in (ready.layer.weight, ready.layer.trained_bias) if p is not None]
        w, b, mean_h = ready.factored
        return [w.left if b is None else b, w.right if mean_h is None else mean_h]

    # -- step --------------------------------------------------------------------------------------

    def _looked(self, ranks: Ranks) -> list[Ready]:
        """The layers to step, looked over."""
        ready = list(self._ready(ranks))
        gradients = {f"layer {one.layer.name!r}": self._looked_over(one) for one in ready}
        gradients |= self._gradients_of_others()
        self._require_finite(gradients)
        if not self.capturable:
            self._noted.note(self.param_groups[0]["updates"], gradients)
        if self.refresh_due or self._noted.due:
            self._noted.require_finite()
        return ready

    def _gradients_of_others(self) -> dict[str, list[Tensor]]:
        """As :meth:`_looked_over`, of the parameters outside the preconditioned groups."""
        found = {}
        for k, p in enumerate(self._others()):
            value = p.grad._values() if p.grad.is_sparse else p.grad
            if value.numel():
                found[f"parameter {self._names.get(p, f'{k} of the others')!r}"] = [value]
        return found

    def _others(self) -> list[Tensor]:
        """The parameters outside the preconditioned groups that hold a gradient."""
        plain = (group["params"] for group in self.param_groups if not group["preconditioned"])
        return [p for p in chain.from_iterable(plain) if p.grad is not None]

    def _prepare(self, ranks: Ranks) -> list[Ready]:
        """The layers to step and whatever they need, of the minibatch of all ranks; changes no parameter."""
        return self._looked(ranks)

    def _changes(self, ready: list[Ready], ranks: Ranks) -> Iterator[tuple[Layer, Change]]:
        """(ΔW, Δb) of each layer, the same on all ranks, which tell each other nothing after the first."""
        raise NotImplementedError

    def _step(self) -> None:
        ranks = self._ranks()
        ready = self._prepare(ranks)
        moves: dict[int, list[tuple[Tensor, Tensor | Factored, View]]] = {}
        numbers = 0
        waiting = True
        for layer, (dw, db) in self._changes(ready, ranks):
            if waiting:  # who refuses, here or there, does so before anything moves
                self._step_others(ready, ranks)
                waiting = False
            self._routes[layer.name] = "factored" if isinstance(dw, Factored) else "formed"
            some = moves.setdefault(layer.home, [])
            some.append((layer.weight, dw, layer.as_matrix))
            if db is not None:
                some.append((layer.bias, db, layer.as_vector))
            numbers += layer.weight.numel()
            if numbers >= AT_ONCE:
                self._move_all(moves)
                numbers = 0
            del dw, db, some
        if waiting:
            self._step_others(ready, ranks)
        self._move_all(moves)
        for group in self.param_groups:
            group["updates"] += bool(ready or not self._layers)

    def _step_others(self, ready: list[Ready], ranks: Ranks) -> None:
        """Outside the preconditioned groups: plain SGD, or ``other``, with the gradient of the mean loss."""
        count = 1
        if self.reduction == "sum":
            if self._layers and not ready and self._others():
                raise CaptureError(
                    "reduction='sum': how many examples the other parameters' gradients are of is known from "
                    "the layers, of which none has a gradient: train one of them, or reduce the loss by its "
                    "mean"
                )
            count = max((one.count for one in ready), default=1 / ranks.size)
        scale = 1 / (count * self._loss_scale)
        if self._inner is not None:
            step(self._inner, scale)
            return
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None and not group["preconditioned"]]
            self._move([(p, -group["lr"] * scale * p.grad, torch.detach) for p in held], group)

    def _move_all(self, moves: dict[int, list[tuple[Tensor, Tensor | Factored, View]]]) -> None:
        """Make changes, by group, and let go of them."""
        for home, some in moves.items():
            self._move(some, self.param_groups[home])
        moves.clear()

    def _move(self, moves: list[tuple[Tensor, Tensor | Factored, View]], group: dict) -> None:
        """θ ← (1 − λw) θ + v with v ← m v + Δ, in place, for all (θ, Δ, view); Δ is shaped like view(θ)."""
        if not moves:
            return
        momentum, decay = group["momentum"], group["weight_decay"]
        parameters, changes, views = zip(*moves, strict=True)
        if group["maximize"]:
            changes = [-1 * change for change in changes]
        shrinking = [p for p in parameters if _on(decay) and (p.dim() > 1 or group["decay_bias"])]
        if shrinking:
            torch._foreach_mul_(shrinking, 1 - group["lr"] * decay)
        if not _on(momentum):
            _add(parameters, changes, views)
            return
        for parameter in parameters:
            if MOMENTUM not in self.state[parameter]:
                self.state[parameter][MOMENTUM] = torch.zeros_like(parameter)
        velocities = [self.state[parameter][MOMENTUM] for parameter in parameters]
        torch._foreach_mul_(velocities, momentum)
        _add(velocities, changes, views)
        if group["nesterov"]:
            _add(parameters, changes, views)
            velocities = torch._foreach_mul(velocities, momentum)
        torch._foreach_add_(parameters, velocities)


def _add(tensors: Sequence[Tensor], changes: Sequence[Tensor | Factored], views: Sequence[View]) -> None:
    """Add to each tensor, by a view, what is shaped like that; factors are multiplied straight into it."""
    formed: tuple[list, list] = [], []
    for tensor, change, view in zip(tensors, changes, views, strict=True):
        if isinstance(change, Factored):
            add_to(view(tensor), change)
            continue
        place = view(tensor)
        if place.data_ptr() != tensor.data_ptr():  # a copy, as of a kernel in torch.channels_last
            whole = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            view(whole).copy_(change)
            place, change = tensor, whole
        formed[0].append(place)
        formed[1].append(change)
    if formed[0]:
        torch._foreach_add_(*formed)


def near(bias: Tensor, found: Tensor, size: Tensor, rows: int) -> bool:
    """Whether a bias's gradient is that found, a sum of so many rows whose absolute values have that sum."""
    few = 16 * torch.finfo(found.dtype).eps * rows**0.5
    return bool(((bias - found).abs() <= few * size).all()) or not found.isfinite().all()


def _on(value: float | Tensor) -> bool:
    """Whether a hyperparameter is set; one on a device is not looked at."""
    return isinstance(value, Tensor) or value != 0
