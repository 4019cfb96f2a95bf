"""The shell that every layerwise method shares: walk the linear layers, refresh, step.

A method fills in three verbs, each on plain tensors: *measure* a statistics minibatch, *invert* what
was measured, and *update* one layer from its gradient. Everything a ``torch.optim.Optimizer`` owes its
user is here, once. Where a statistics minibatch has few rows its matrices are never formed
(:func:`sogrid.statistics.second_moment`); ``repr`` tells where.

The step starts from ``.grad``, so gradient clipping, accumulation and loss penalties mean what they
mean in torch. Per-example quantities come from :mod:`sogrid.capture`; those made of gradients are of
the loss as it was when ``backward`` ran, so a loss that a ``GradScaler`` scaled needs
:meth:`Layerwise.refresh` with the unscaled one.

With ``gradients="factored"`` it starts from the factors of ∇W = (1/n) gᵀh, which have rank n: autograd
does not form the product, the equation multiplies its factors, and the one product that is formed goes
straight into the weight (:class:`sogrid.linalg.Factored`). The step is the same to rounding and costs
little more than SGD's. What works on ``.grad`` does not work then; see :class:`Layerwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sogrid.capture import Capture, CaptureError, LayerRecord, join
from sogrid.linalg import Factored, ThinInverse, add_to, matrixwise, scalar, vectorwise
from sogrid.losses import check_reduction
from sogrid.optimizers.base import CapturingOptimizer, check_count, check_hyperparameter
from sogrid.statistics import Statistics, refresh_due

__all__ = ["Layerwise", "StatisticsBatch", "bounded"]

BOUND_EXAMPLES = 16
"""A minibatch's change is bounded on so many of its examples."""

Gradients = tuple[Tensor | Factored, Tensor | None, Tensor | None]
"""∇W and ∇b of the mean loss over the examples a layer saw, and their mean input."""


class Watched(NamedTuple):
    """A layer whose step is the method's.

    Attributes:
        name: In the model.
        module: The layer.
        weight: Its weight when the optimizer was made.
        bias: Its bias, if that is to be trained.
        home: Index of their parameter group.
    """

    name: str
    module: nn.Linear
    weight: nn.Parameter
    bias: nn.Parameter | None
    home: int

    @property
    def trained_bias(self) -> nn.Parameter | None:
        """The bias if it is trained now; if not, the layer's inputs are not centred."""
        return self.bias if self.bias is not None and self.bias.requires_grad else None


Ready = tuple[Watched, LayerRecord, Gradients | None]
"""A layer to step, what it saw, and its gradient if that is factored."""


class StatisticsBatch(NamedTuple):
    """One layer's view of a statistics minibatch.

    Attributes:
        h: Inputs, ``[n, n_in]``.
        g: Per-example, un-normalised gradients at the pre-activation, ``[n, n_out]``.
        rows: Probe vectors pulled back to the pre-activation, ``[n, n_out]`` each.
        has_bias: Whether the layer has a trainable bias.
    """

    h: Tensor
    g: Tensor
    rows: list[Tensor]
    has_bias: bool


def bounded(
    dw: Tensor | Factored, db: Tensor | None, h: Tensor, max_change: float | Tensor | None
) -> tuple[Tensor | Factored, Tensor | None]:
    """(ΔW, Δb), shrunk if need be until the pre-activations change by κ at most, in root mean square.

    §6.1 asks a layer's pre-activations to move by −λg; when λ is too large they leave the region where g
    means anything, units saturate, and the loss never moves again. The bound is on
    rms_{i,j} (ΔW h_i + Δb)_j, has the scale of a pre-activation, and leaves the direction alone.

    Args:
        dw: ΔW, ``[..., o, i]``.
        db: Δb, ``[..., o]`` or ``None``.
        h: Inputs of the layer, ``[..., n, i]``, of which the first 16 count.
        max_change: κ; ``None`` for no bound.
    """
    if max_change is None:
        return dw, db
    change = dw @ h[..., :BOUND_EXAMPLES, :].mT
    if db is not None:
        change = change + db.unsqueeze(-1)
    size = scalar(torch.linalg.vector_norm(change, dim=(-2, -1)))
    most = scalar(max_change) * (change.shape[-2] * change.shape[-1]) ** 0.5
    if isinstance(size, Tensor):
        share = (most / size).clamp(max=1)
    elif size <= most:
        return dw, db
    else:
        share = most / size
    return matrixwise(share) * dw, None if db is None else vectorwise(share) * db


SHIFT = "_shift"


def _flat(state: dict[str, Tensor | ThinInverse]) -> dict[str, Tensor]:
    """A thin inverse as two tensors, Q and δ: torch loads and moves nothing else."""
    flat = {}
    for key, value in state.items():
        thin = isinstance(value, ThinInverse)
        flat |= {key: value.factor, key + SHIFT: value.shift} if thin else {key: value}
    return flat


def _packed(state: dict[str, Tensor]) -> dict[str, float | Tensor | ThinInverse]:
    """The tensors of :func:`_flat` put together again."""
    packed = {key: scalar(value) for key, value in state.items()}
    for key in [key for key in packed if key.endswith(SHIFT)]:
        whole = key.removesuffix(SHIFT)
        packed[whole] = ThinInverse(packed[whole], packed[key])
    return packed


class Layerwise(CapturingOptimizer):
    """Base of the layerwise optimizers; see the module docstring.

    Args:
        model: The module that is trained, itself, not its parameters. Its ``nn.Linear`` layers are
            preconditioned.
        lr: Learning rate λ.
        reduction: How the training loss is reduced over examples: ``"mean"`` or ``"sum"``. Declared,
            never guessed; both give the same step, that of the mean over the examples a layer saw.
        refresh_every: N: statistics are refreshed before every N-th update, from that update's own
            minibatch unless :meth:`refresh` was called for it. ``None``: only by :meth:`refresh`.
        averaging: ρ in [0, 1): weight of the old statistics when they are refreshed.
        other_lr: Learning rate of plain SGD for parameters outside linear layers (norms, embeddings,
            convolutions), unless their group has an ``lr``. ``None``: such parameters are an error.
        params: What to train, as in torch: parameters or groups of them with hyperparameters of their
            own; default all trainable parameters. A layer's weight and bias go in one group; a bias left
            out or frozen stays as it is, and the layer's inputs are then not centred. In a group with
            ``preconditioned=False`` everything is trained by plain SGD.
        gradients: ``"matrix"``: the step starts from ``.grad``. ``"factored"``: it starts from the
            factors g and h of each layer's gradient, and the ``.grad`` of the layers' parameters stays
            ``None``: faster, but gradient clipping, ``GradScaler``, distributed averaging and
            ``create_graph=True`` do not work. A ``.grad`` that appears anyway, from a penalty on a weight
            say, is an error. Passes accumulate until ``step()`` or this optimizer's own
            ``zero_grad()``, and until then the minibatch must not be changed in place.
        max_change: κ > 0, the largest change of a layer's pre-activations in one step, in root mean square
            over (the first 16 of) the minibatch and the layer's units; a larger step is shrunk, the whole
            layer's alike. ``None``: no bound, as in the thesis. Kept in the parameter groups, so it may
            decay like a learning rate. Cheap with factored gradients.
        rank: k, for methods that invert matrices: of each only the k leading eigendirections count, the
            others get the damping alone, which then has to be positive. A step is cheaper; what would not
            become so (fewer than k examples, or a formed matrix of width 2k or less) stays whole. A
            refresh costs an eigendecomposition for each matrix, for which an accelerator's host waits.
            ``None``: all directions, exact.
        **hyperparameters: The method's own, kept in the parameter groups.

    Raises:
        TypeError: If ``model`` is not a module, or a weight is neither float32 nor float64.
        ValueError: For hyperparameters out of range, and for parameters that cannot be
            preconditioned; the message names the module.
    """

    uses_statistics = True
    """Whether the method has anything to refresh."""

    uses_mean = True
    """Whether the update uses the minibatch's own mean input."""

    gradients = "matrix"

    saved: tuple[str, ...] = ("model", "reduction", "refresh_every", "averaging", "other_lr", "gradients")
    """Attributes that copies and pickles carry."""

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        reduction: str = "mean",
        refresh_every: int | None = 100,
        averaging: float = 0.0,
        other_lr: float | Tensor | None = None,
        params: Iterable | None = None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = None,
        **hyperparameters,
    ) -> None:
        """See the class."""
        self._require_model(model)
        if refresh_every is not None:
            check_count("refresh_every (N)", refresh_every)
        check_hyperparameter("averaging (ρ)", averaging, below=1.0)
        if other_lr is not None:
            check_hyperparameter("other_lr", other_lr)
        if gradients not in ("matrix", "factored"):
            raise ValueError(f"gradients must be 'matrix' or 'factored', got {gradients!r}")
        self.model = model
        self.reduction = check_reduction(reduction)
        self.refresh_every = refresh_every
        self.averaging = averaging
        self.other_lr = other_lr
        self.gradients = gradients
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        defaults = {
            "lr": lr,
            "max_change": max_change,
            **hyperparameters,
            "preconditioned": True,
            "updates": 0,
            "refreshed": -1,
        }
        super().__init__(params, defaults)
        self._bind()

    def __repr__(self) -> str:
        """As in torch, and the routes: of each layer's inverses, and of ΔW in the last step."""
        routes = []
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            kinds = ["thin" if key + SHIFT in state else "dense" for key in state if key.endswith("inverse")]
            routes += [f"{layer.name} {'/'.join(kinds)}"] if kinds else []
        lines = f"inverses: {', '.join(routes)}\n" if routes else ""
        if self.gradients == "factored":
            taken = ", ".join(f"{name} {route}" for name, route in self._routes.items())
            lines += f"gradients: {taken or 'factored'}\n"
        return super().__repr__()[:-1] + lines + ")"

    # -- which parameters belong to which layer ------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, as in torch; parameters outside linear layers go to a plain SGD group."""
        before = len(self.param_groups)
        super().add_param_group({**param_group})
        try:
            group = self.param_groups[-1]
            self.check_hyperparameters(group)
            if group["preconditioned"]:
                self._split_others(group, param_group.get("lr", self.other_lr))
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
        if group.get("rank") is not None:
            check_count("rank", group["rank"])

    def _owners(self) -> dict[Tensor, list[tuple[str, nn.Module]]]:
        owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(parameter, []).append((name, module))
        return owners

    def _split_others(self, group: dict, lr: float | Tensor | None) -> None:
        """Move what is no linear layer's to a group of its own, or refuse; ``lr`` if that is all there is."""
        owners, layer_parameters, others = self._owners(), [], []
        for parameter in group["params"]:
            if parameter not in owners:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not in the model given to "
                    f"{type(self).__name__}"
                )
            (name, module), *more = owners[parameter]
            kind = type(module).__name__
            linear = isinstance(module, nn.Linear)
            if not linear or (parameter is not module.weight and parameter is not module.bias):
                if self.other_lr is None:
                    raise ValueError(
                        f"module {name!r} ({kind}) has parameters that are no nn.Linear's weight or bias: "
                        "pass other_lr=... to train them by plain SGD, or leave them out with params=..."
                    )
                others.append(parameter)
                continue
            if more:
                names = [name, *(n for n, _ in more)]
                raise ValueError(f"modules {names} share a parameter: its curvature is not one layer's")
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"layer {name!r} is lazy: run one forward pass before making the optimizer")
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"layer {name!r} is {parameter.dtype}; sogrid needs float32 or float64 weights"
                )
            layer_parameters.append(parameter)
        group["params"] = layer_parameters
        if not layer_parameters:  # the whole group is plain
            group.update(params=others, lr=lr, preconditioned=False)
        elif others:
            super().add_param_group({**group, "params": others, "lr": self.other_lr, "preconditioned": False})

    def _bind(self) -> None:
        """Find the layers of the preconditioned groups and listen to them."""
        owners, layers = self._owners(), {}
        home = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        for group in self.param_groups:
            for parameter in group["params"] if group["preconditioned"] else ():
                name, layer = owners[parameter][0]
                layers[name] = layer
        for name, layer in layers.items():
            if layer.weight not in home:
                raise ValueError(
                    f"the bias of layer {name!r} is to be trained but its weight is not: freeze the bias "
                    "too, or put it in a group with preconditioned=False"
                )
            if home.get(layer.bias, home[layer.weight]) != home[layer.weight]:
                raise ValueError(f"weight and bias of layer {name!r} are in different parameter groups")
        if self._capture is not None:
            self._capture.close()
        self._layers = [
            Watched(name, m, m.weight, m.bias if m.bias in home else None, home[m.weight])
            for name, m in layers.items()
        ]
        self._given = set(home)
        self._routes: dict[str, str] = {}
        self._capture = Capture(self.model, layers)
        self._arm()

    # -- the verbs of a method -----------------------------------------------------------------------

    def measure(self, batch: StatisticsBatch, group: dict) -> Statistics:
        """Statistics of one layer on a statistics minibatch."""
        raise NotImplementedError

    def invert(self, statistics: Statistics, group: dict, name: str) -> dict[str, Tensor | ThinInverse]:
        """What the update needs of the statistics, kept in the layer's state."""
        raise NotImplementedError

    def update(
        self,
        grad_w: Tensor | Factored,
        grad_b: Tensor | None,
        mean_h: Tensor | None,
        state: dict,
        group: dict,
    ) -> tuple[Tensor | Factored, Tensor | None]:
        """(ΔW, Δb) of one layer from the gradients of the mean loss and the minibatch's mean input."""
        raise NotImplementedError

    def probe(self) -> Callable[[Tensor], Iterable[Tensor]] | None:
        """Vectors at the model's output to pull back when statistics are taken, if any."""
        return None

    # -- refresh ---------------------------------------------------------------------------------------

    @property
    def refresh_due(self) -> bool:
        """Whether the next step would refresh the statistics from its own minibatch."""
        group = self.param_groups[0]
        fresh = not self.uses_statistics or group["refreshed"] == group["updates"]
        return not fresh and refresh_due(group["updates"], self.refresh_every)

    def _wanted(self) -> set[str]:
        """Layers that the next step would refresh: all if that is due, else those it could not update."""
        if not self.uses_statistics or self.refresh_every is None:
            return set()
        due = self.refresh_due
        return {layer.name for layer in self._layers if due or not self._fits(layer)}

    def _fits(self, layer: Watched) -> bool:
        """Whether a layer has statistics, taken while its bias was trained or not, as it is now."""
        return self.state.get(layer.weight, {}).get("biased") == (layer.trained_bias is not None)

    def refresh(self, closure: Callable[[], Tensor]) -> None:
        """Refresh the statistics from a minibatch of their own (Algorithm 4, line 4), if there are any.

        Args:
            closure: Runs the model forward, in training mode, and returns the loss, reduced as
                declared. It must not call ``backward``; no ``.grad`` is touched.

        Raises:
            CaptureError: If the closure did not run the model, or a layer was used in an unsupported way.
            FactorizationError: If a damped matrix cannot be inverted; the old statistics stay.
            TypeError: If the closure returns no scalar loss.
        """
        if not self.uses_statistics:
            return
        with torch.enable_grad():
            records = self._capture.collect(closure, self.probe())
        if not records:
            raise CaptureError("the closure given to refresh ran no watched layer in training mode")
        with torch.no_grad(), torch._C._DisableAutocast():
            states = self._refreshed(records)
        self._adopt(states)
        self._arm()

    def _refreshed(self, records: dict[str, LayerRecord]) -> dict[Tensor, dict[str, Tensor]]:
        """New states from kept records; changes nothing."""
        states = {}
        for layer in self._layers:
            record, name = records.get(layer.name), f"layer {layer.name!r}"
            if record is None or not record.count:
                continue
            if not record.complete:
                raise CaptureError(
                    f"{name}: its statistics became due, or its bias was frozen or unfrozen, after "
                    "its forward pass: call zero_grad() and run it again, or call refresh(closure)"
                )
            has_bias, group = layer.trained_bias is not None, self.param_groups[layer.home]
            scale = record.count if self.reduction == "mean" else 1
            passes = zip(*record.rows, strict=True)
            h, g = record.examples()
            batch = StatisticsBatch(
                h,
                g * scale,
                [torch.cat(r) for r in passes],
                has_bias,
            )
            self._require_finite({name: [batch.g]})
            statistics = self.measure(batch, group)
            old, state = self.state.get(layer.weight, {}), {"biased": has_bias}
            if self.averaging > 0:
                statistics = statistics.dense()
                keys = [key for key in Statistics._fields if "statistics_" + key in old]
                if keys and self._fits(layer):
                    previous = Statistics(**{key: old["statistics_" + key].to(batch.h) for key in keys})
                    statistics = previous.blend(statistics, self.averaging)
                kept = statistics._asdict().items()
                state |= {"statistics_" + key: value for key, value in kept if value is not None}
            states[layer.weight] = state | _flat(self.invert(statistics, group, name))
        return states

    def _adopt(self, states: dict[Tensor, dict[str, Tensor]]) -> None:
        for weight, state in states.items():
            self.state[weight] = state
        for group in self.param_groups:
            group["refreshed"] = self.param_groups[0]["updates"]

    def _arm(self) -> None:
        """Tell the capture what the next pass must leave behind."""
        bounds = [group["max_change"] for group in self.param_groups]
        bound = {layer.name for layer in self._layers if bounds[layer.home] is not None}
        wanted = self._wanted()
        self._capture.keep = wanted | bound
        self._capture.keep_roots = False
        self._capture.factored = self._given if self.gradients == "factored" else frozenset()
        self._capture.probe = self.probe() if wanted else None

    # -- step ------------------------------------------------------------------------------------------

    def _ready(self) -> Iterator[Ready]:
        """The layers that hold a gradient, each checked for what a step needs."""
        factored = self.gradients == "factored"
        for layer in self._layers:
            name, module, bias = layer.name, layer.module, layer.trained_bias
            if module.weight is not layer.weight or (bias is not None and module.bias is not bias):
                raise CaptureError(
                    f"layer {name!r} has another weight or bias than when the optimizer was made, as after "
                    "load_state_dict(..., assign=True): make a new optimizer"
                )
            record = self._capture.records[name]
            grads = {"weight": layer.weight.grad} | ({} if bias is None else {"bias": bias.grad})
            held = [kind for kind, grad in grads.items() if grad is not None]
            if factored and held:
                raise CaptureError(
                    f"layer {name!r}: the {held[0]} has a .grad, which gradients='factored' would not "
                    "use: it is of a pass that was not seen (in eval mode?) or of a penalty on the "
                    "parameter; call zero_grad() and the model in training mode, or use "
                    "gradients='matrix'"
                )
            if held and len(held) < len(grads):
                (missing,) = grads.keys() - held
                raise CaptureError(f"layer {name!r}: the {held[0]} has a gradient but the {missing} has none")
            if held and not record.count:
                raise CaptureError(
                    f"layer {name!r} has a gradient but its forward pass was not seen: it ran in eval mode, "
                    "its weight was used outside the layer, or the optimizer was closed"
                )
            if held:
                yield layer, record, None
            elif factored and record.count:
                yield layer, record, self._factors(layer, record)

    def _factors(self, layer: Watched, record: LayerRecord) -> Gradients | None:
        """A layer's factored gradient and what goes with it."""
        h, g = record.examples()
        grad_b = None if layer.trained_bias is None else g.sum(0)
        mean_h = h.mean(0) if self.uses_mean else None
        if self.reduction == "mean":
            return Factored(g, h), grad_b, mean_h
        return Factored(g, h, 1 / record.count), grad_b if grad_b is None else grad_b / record.count, mean_h

    def _looked_over(self, layer: Watched, record: LayerRecord, factors: Gradients | None) -> list[Tensor]:
        """Where a NaN or infinity of a layer's gradient would show."""
        if factors is None:
            return [p.grad for p in (layer.weight, layer.trained_bias) if p is not None]
        grad_w, grad_b, mean_h = factors
        return [grad_w.left if grad_b is None else grad_b, grad_w.right if mean_h is None else mean_h]

    def _matrices(self, layer: Watched, record: LayerRecord) -> Gradients:
        """``.grad`` of the mean loss, not to be written to, and the mean input."""
        scale = 1 if self.reduction == "mean" else record.count
        grads = [None if p is None else p.grad for p in (layer.weight, layer.trained_bias)]
        grad_w, grad_b = (grad if grad is None or scale == 1 else grad / scale for grad in grads)
        return grad_w, grad_b, record.input_sum / record.count

    def _step(self) -> None:
        ready, records = list(self._ready()), self._capture.records
        self._require_finite({f"layer {layer.name!r}": self._looked_over(layer, *r) for layer, *r in ready})
        wanted = self._wanted()
        if wanted:
            self._adopt(self._refreshed({name: records[name] for name in wanted}))
        for layer, *_ in ready:
            self._check_state(layer)
        for layer, (dw, db) in self._changes(ready):
            self._routes[layer.name] = "factored" if isinstance(dw, Factored) else "formed"
            add_to(layer.weight, dw)
            if db is not None:
                layer.bias.add_(db)
        self._step_others(max((record.count for _, record, _ in ready), default=1))
        for group in self.param_groups:
            group["updates"] += 1
        self._capture.clear()
        self._arm()

    def _changes(
        self, ready: list[Ready]
    ) -> Iterator[tuple[Watched, tuple[Tensor | Factored, Tensor | None]]]:
        """Each layer's (ΔW, Δb), within its bound, one layer at a time."""
        for layer, record, factors in ready:
            state, group = _packed(self.state.get(layer.weight, {})), self.param_groups[layer.home]
            change = self.update(*(factors or self._matrices(layer, record)), state, group)
            if group["max_change"] is not None:
                change = bounded(*change, join(record.inputs), group["max_change"])
            yield layer, change

    def _check_state(self, layer: Watched) -> None:
        if self.uses_statistics and not self._fits(layer):
            raise CaptureError(
                f"layer {layer.name!r} has no statistics, or its bias was frozen or unfrozen since: call "
                "refresh(closure) before this step"
                + ("" if self.refresh_every is None else ", or zero_grad() before its forward pass")
            )
        dtype, device = layer.weight.dtype, layer.weight.device
        for key, value in self.state.get(layer.weight, {}).items():
            if isinstance(value, Tensor) and (value.dtype, value.device) != (dtype, device):
                raise ValueError(
                    f"layer {layer.name!r} is {dtype} on {device}, its {key} {value.dtype} on "
                    f"{value.device}: the model was moved after the optimizer had refreshed; call "
                    "refresh(closure), or optimizer.load_state_dict(optimizer.state_dict())"
                )

    def _step_others(self, count: int) -> None:
        """Plain SGD, with the gradient of the mean loss, outside the preconditioned groups."""
        scale = 1 if self.reduction == "mean" else 1 / count
        for group in self.param_groups:
            for parameter in () if group["preconditioned"] else group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * scale * parameter.grad)
