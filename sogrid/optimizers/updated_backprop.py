r"""Updated backpropagation, UBP (Thesis Chapter 5, Algorithm 2), without Jacobians.

A backward pass that, once a layer's update is decided, sends down the gradient that the layer *will*
have: with g = ∂ℓ/∂a and H = ∂²ℓ/∂a² at the layer (§5.2, shapes as repaired by erratum E10)

    ∂ℓ/∂h  ≈  (W + ΔW)ᵀ g + Wᵀ H (ΔW h + Δb),    H ≈ JᵀDJ

The thesis carries a Jacobian of the output for every example. The same product costs two sweeps
through the layers above: push ΔW h + Δb forward to the output, multiply by D = ∂²ℓ/∂f², pull it back
(equal to rounding, THESIS row 33). D is exact; all curvature is that of the old parameters.

Algorithm 2 sums over the minibatch; here the update is −λ times a *mean*, like that of every other
method of this package, which only rescales λ.

ΔW = −λ (1/n) gᵀh is never formed: both of its products and its sum into the weight are of its factors.
With ``gradients="factored"`` autograd goes no further down than the model's output, as everything below
is computed here. A bound on a layer's step (``max_change``) acts before the gradient below is decided, so
that this is the one after the step that is really made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from sogrid.bound import bounded
from sogrid.capture import LOOKS, UNKNOWN, CaptureError, Wanted
from sogrid.losses import Loss
from sogrid.shell import LayerOptimizer
from sogrid.structured import Change, Factored, matrixwise, vectorwise
from sogrid.uses import LayerRecord, join

__all__ = [
    "Chain",
    "UpdatedBackprop",
    "UpdatedBackpropMethod",
    "gauss_newton_term",
    "hessian_term",
    "updated_backprop_update",
]

Activation = Callable[[Tensor], Tensor]
RANDOM = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU),
)
"""A second run of these would not repeat the first."""


def updated_backprop_update(
    inputs: Sequence[Tensor],
    preactivations: Sequence[Tensor],
    weights: Sequence[Tensor],
    activations: Sequence[Activation],
    grad_f: Tensor,
    curvature: Callable[[int, Tensor], Tensor] | None,
    *,
    lr: Sequence[float | Tensor],
    max_change: Sequence[float | Tensor | None] | None = None,
    biased: Sequence[bool] | None = None,
    slopes: Sequence[Slope] | None = None,
    factored: bool = False,
) -> list[Change]:
    """(ΔW, Δb) of every layer of a chain h_l = f_l(W_l h_{l−1} + b_l), by Algorithm 2.

    Args:
        inputs: h_{l−1} of each layer, ``[n, n_in]``, with the old parameters.
        preactivations: a_l, ``[n, n_out]``.
        weights: W_l, ``[n_out, n_in]``.
        activations: f_l; the last one may mix outputs (softmax).
        grad_f: ∂ℓ/∂f per example, un-normalised, ``[n, n_f]``.
        curvature: ``(l, v) -> H_l v`` for ``v: [n, n_out]``, of ``gauss_newton_term`` or
            ``hessian_term``; ``None`` drops the term.
        lr: λ of each layer, a number or ``[...]``; all tensors may have such leading dimensions.
        max_change: κ of each layer, ``None`` for no bound; see :func:`~sogrid.bound.bounded`.
        biased: Which layers have a bias to train; default all. Δb of another is ``None``.
        slopes: Those of the activations at the pre-activations, if they are there already.
        factored: Leave every ΔW factored.
    """
    slopes = activation_slopes(activations, preactivations) if slopes is None else slopes
    changes: list[Change] = []
    dh = grad_f
    for layer in reversed(range(len(weights))):
        h, w = inputs[layer], weights[layer]
        g = slopes[layer].pull(dh)
        dw = -matrixwise(lr[layer]) / h.shape[-2] * Factored(g, h)
        db = -vectorwise(lr[layer]) * g.mean(-2) if biased is None or biased[layer] else None
        dw, db = bounded(dw, db, h, None if max_change is None else max_change[layer])
        changes.append((dw if factored else dw.dense(), db))
        if layer > 0:
            moved = h @ dw.mT if db is None else h @ dw.mT + db.unsqueeze(-2)
            bend = 0 if curvature is None else curvature(layer, moved)
            dh = (g + bend) @ w + g @ dw
    return changes[::-1]


def gauss_newton_term(
    preactivations: Sequence[Tensor],
    weights: Sequence[Tensor],
    activations: Sequence[Activation],
    output_hessian: Callable[[Tensor], Tensor],
    slopes: Sequence[Slope] | None = None,
) -> Callable[[int, Tensor], Tensor]:
    """``(l, v) -> JᵀDJ v`` at pre-activation l: forward to the output, times D, and back.

    Args:
        preactivations: a_l, ``[n, n_out]``.
        weights: W_l.
        activations: f_l.
        output_hessian: u ↦ D u, ``[n, n_f]``.
        slopes: Those of the activations at the pre-activations, if they are there already.
    """
    slopes = activation_slopes(activations, preactivations) if slopes is None else slopes

    def term(layer: int, v: Tensor) -> Tensor:
        above = range(layer, len(weights))
        for m in above:
            v = slopes[m].push(v if m == layer else v @ weights[m].mT)
        v = output_hessian(v)
        for m in reversed(above):
            v = slopes[m].pull(v)
            if m > layer:
                v = v @ weights[m]
        return v

    return term


ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)


class Slope(NamedTuple):
    """f′(a) of an activation: ``push``: v ↦ f′(a) v, ``pull``: v ↦ f′(a)ᵀ v."""

    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


def activation_slopes(activations: Sequence[Activation], preactivations: Sequence[Tensor]) -> list[Slope]:
    """f_l′(a_l) of each layer, computed once where f_l is known to act on each unit alone."""
    return [_slope(f, a) for f, a in zip(activations, preactivations, strict=True)]


def _slope(activation: Activation, a: Tensor) -> Slope:
    back = vjp(activation, a)[1]
    if isinstance(activation, ELEMENTWISE):
        slope = back(torch.ones_like(a))[0]
        return Slope(slope.mul, slope.mul)
    return Slope(lambda v: jvp(activation, (a,), (v,))[1], lambda v: back(v)[0])


def hessian_term(
    preactivations: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Activation],
    loss: Loss,
    y: Tensor,
) -> Callable[[int, Tensor], Tensor]:
    """``(l, v) -> H v`` with the true Hessian of ℓ at pre-activation l: forward over reverse.

    Args:
        preactivations: a_l, ``[n, n_out]``.
        weights: W_l.
        biases: b_l.
        activations: f_l.
        loss: ℓ.
        y: Targets.
    """

    def term(layer: int, v: Tensor) -> Tensor:
        def risk(a: Tensor) -> Tensor:
            h = activations[layer](a)
            for w, b, f in zip(
                weights[layer + 1 :], biases[layer + 1 :], activations[layer + 1 :], strict=True
            ):
                a = h @ w.mT
                h = f(a if b is None else a + b.unsqueeze(-2))
            return loss.value(h, y).sum()

        return jvp(grad(risk), (preactivations[layer],), (v,))[1]

    return term


class Chain(NamedTuple):
    """What one forward pass through a chain h_l = f_l(W_l h_{l−1} + b_l) left; leading dimensions broadcast.

    Attributes:
        inputs: h_{l−1} of each layer, ``[..., n, n_in]``.
        preactivations: a_l, ``[..., n, n_out]``.
        weights: W_l, ``[..., n_out, n_in]``.
        biases: b_l, ``[..., n_out]``, or ``None``.
        activations: f_l.
        f: The output, ``[..., n, n_f]``.
        grad_f: ∂ℓ/∂f per example, un-normalised.
    """

    inputs: Sequence[Tensor]
    preactivations: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    activations: Sequence[Activation]
    f: Tensor
    grad_f: Tensor


class UpdatedBackpropMethod:
    """Algorithm 2 as one verb: a whole chain is updated, not one layer alone.

    Args:
        loss: What the training loss is.
        curvature: ``"gauss_newton"``, ``"hessian"`` or ``"none"``.

    Raises:
        ValueError: For another curvature.
    """

    def __init__(self, loss: Loss, curvature: str) -> None:
        """See the class."""
        if curvature not in ("gauss_newton", "hessian", "none"):
            raise ValueError(f"curvature must be 'gauss_newton', 'hessian' or 'none', got {curvature!r}")
        self.loss, self.curvature = loss, curvature

    def update(
        self, chain: Chain, groups: Sequence[dict[str, Any]], biased: Sequence[bool] | None = None
    ) -> list[Change]:
        """Factored (ΔW, Δb) of every layer; see :func:`updated_backprop_update`.

        Args:
            chain: The minibatch.
            groups: Of each layer, with its λ and κ.
            biased: Which layers have a bias to train; default all.
        """
        inputs, a, weights, biases, activations, f, grad_f = chain
        slopes, y = activation_slopes(activations, a), self.loss.target(f, grad_f)
        curvature = None
        if self.curvature == "gauss_newton":

            def product(v: Tensor) -> Tensor:
                return self.loss.hessian_product(f, y, v)

            curvature = gauss_newton_term(a, weights, activations, product, slopes)
        elif self.curvature == "hessian":
            curvature = hessian_term(a, weights, biases, activations, self.loss, y)
        lr, bounds = ([group[key] for group in groups] for key in ("lr", "max_change"))
        own = {"lr": lr, "max_change": bounds, "biased": biased, "slopes": slopes}
        return updated_backprop_update(
            inputs, a, weights, activations, grad_f, curvature, **own, factored=True
        )


class UpdatedBackprop(LayerOptimizer):
    """Algorithm 2 for a model that is a chain of linear layers and activations.

    The ordinary loop serves: the targets that the exact D may need are recovered from the gradient at
    the output. Because the step is built from per-example gradients and not from ``.grad``, a ``.grad``
    that was changed (clipping, a hook, a penalty) is refused on the CPU and ignored elsewhere; what changes
    only a lower layer's during ``backward`` is looked for in the first update and in every hundredth.

    Args:
        model: ``nn.Sequential`` (or :class:`~sogrid.networks.MLP`) of linear layers, each followed by
            activations that treat every example alone.
        lr: λ, times the mean over the minibatch.
        loss: What the training loss is, as an object of :mod:`sogrid.losses`; another is refused as far as
            the gradient at the output tells (:meth:`~sogrid.losses.Loss.require_target`).
        curvature: ``"gauss_newton"`` (the thesis's), ``"hessian"``, or ``"none"``.
        params: Parameter groups, as in torch; all layers must be trained.
        gradients: ``"matrix"``: ``backward`` forms every ``.grad``, which the step only compares with its
            own. ``"factored"``: the graph ends at the model's output, and no ``.grad`` is made, nor one of
            the model's input; see :class:`~sogrid.shell.LayerOptimizer`.
        max_change: κ, a bound on the change of pre-activations, ``None`` for none; see there. The gradient
            that is passed down is then that after the bounded step.
        process_group: ``False``: this process steps alone, and needs to. The gradient passed down depends on
            the step of the layer above, so that several processes would have to meet at each layer.

    Raises:
        NotImplementedError: With several processes, here or at a step.
        TypeError: If ``loss`` is not a :class:`~sogrid.losses.Loss`.
        ValueError: If the model is not such a chain, and as in
            :class:`~sogrid.shell.LayerOptimizer`.
    """

    saved = (*LayerOptimizer.saved, "method")

    uses_mean = several_ranks = False

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        loss: Loss,
        curvature: str = "gauss_newton",
        params=None,
        gradients: str = "matrix",
        max_change: float | Tensor | None = 0.03,
        process_group: Any = None,
    ) -> None:
        """See the class."""
        self._require_loss(loss)
        _chain(self._require_model(model))
        self.method = UpdatedBackpropMethod(loss, curvature)
        options = {"params": params, "gradients": gradients, "max_change": max_change}
        options["process_group"] = process_group
        super().__init__(model, lr, {}, reduction=loss.reduction, **options)

    def check_hyperparameters(self, group: dict) -> None:  # noqa: D102
        super().check_hyperparameters(group)
        if group["maximize"]:
            raise ValueError("UpdatedBackprop cannot maximize: the term of second order is the loss's own")

    def _bind(self) -> None:
        _chain(self.model)
        super()._bind()

    def _wanted(self) -> Wanted:
        """Every pass is kept; of the graph only the output is needed, unless ``.grad`` is compared."""
        return Wanted(
            rows={layer.name for layer in self._layers}, roots=True, cut=self.gradients == "factored"
        )

    def _held(self, layer, record, factored):
        """Of a graph that is cut the zeros of the last parameter are all that has a ``.grad``."""
        if self.gradients == "matrix":
            return super()._held(layer, record, factored)
        *_, last = (p for p in self.model.parameters() if p.requires_grad)
        for kind, p in (("weight", layer.weight), ("bias", layer.bias)):
            if p is not None and p is not last and p.grad is not None and p.grad.any():
                raise CaptureError(
                    f"layer {layer.name!r}: the {kind} has a .grad, which gradients='factored' would not "
                    "use: it is of a pass that was not seen (in eval mode?) or of a penalty; use "
                    "gradients='matrix'"
                )
        if last.grad is None or not record:
            return False
        intact = last.grad._version == self._capture.version
        intact = intact and not (last.grad.is_cpu and last.grad.nan_to_num().any())
        self._require_intact("the .grad of the model's last parameter", intact)
        return True

    def _factors(self, layer, record, ranks):
        """Not a layer's own: the chain's, see :meth:`_changes`."""

    def _looked_over(self, ready):
        if self.gradients == "factored":
            return [_inputs(ready.record)]
        return super()._looked_over(ready)

    def _changes(self, ready, ranks):
        if not ready and any(p.grad is not None for p in self.model.parameters()):
            return  # of zeros
        by_module = {one.layer.module: (one.layer, one.record) for one in ready}
        layers, activations = zip(*_chain(self.model), strict=True)
        if len(by_module) != len(layers):
            raise CaptureError(
                "UpdatedBackprop updates a whole chain: every layer must be trained and hold a gradient"
            )
        roots = self._capture.roots
        if not roots:
            raise CaptureError("the model's output was not seen: call the model itself, in training mode")
        watched, seen = zip(*(by_module[layer] for layer in layers), strict=True)
        inputs = [_inputs(record) for record in seen]
        self._require_scale()
        scale = (len(inputs[0]) if self.loss.reduction == "mean" else 1) / self._loss_scale
        f, grad_f = join([r.output for r in roots]), join([r.grad for r in roots]) * scale
        self._require_finite({"the model's output": [grad_f]})
        self.loss.require_target(f, self.loss.target(f, grad_f))
        a = [record.preactivations() for record in seen]
        weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
        now = [parameter._version for parameter in self.model.parameters()]
        _require_same(all(root.versions == now for root in roots))
        if f.is_cpu and self.param_groups[0]["updates"] % LOOKS == 0:
            _require_chain(layers, activations, [*inputs, f])
        if self.gradients == "matrix" and f.is_cpu:
            written = any(
                r.version not in (UNKNOWN, w.weight.grad._version) for w, r in zip(layers, seen, strict=True)
            )
            depth = len(layers) if written or self.param_groups[0]["updates"] % LOOKS == 0 else 1
            g, slopes = grad_f, activation_slopes(activations[-depth:], a[-depth:])
            for layer, slope, h in reversed([*zip(layers[-depth:], slopes, inputs[-depth:], strict=True)]):
                g = slope.pull(g)
                _require_untouched(layer.weight.grad * scale, Factored(g, h))
                g = g @ layer.weight
        changes = self.method.update(
            Chain(inputs, a, weights, biases, activations, f, grad_f),
            [self.param_groups[layer.home] for layer in watched],
            [layer.trained_bias is not None for layer in watched],
        )
        yield from zip(watched, changes, strict=True)

    @property
    def loss(self) -> Loss:
        """What the training loss is."""
        return self.method.loss


def _require_chain(
    layers: Sequence[nn.Linear], activations: Sequence[Activation], seen: list[Tensor]
) -> None:
    """Refuse passes that the layers, as they are now, would not make; a few examples tell, now and then."""
    few = 8 * torch.finfo(seen[-1].dtype).eps ** 0.5
    for layer, f, (h, after) in zip(layers, activations, pairwise(seen), strict=True):
        again, after = f(layer(h[:4])), after[:4]
        same = again.shape == after.shape and (again - after).abs().max() <= few * after.abs().max()
        _require_same(same or not again.isfinite().all())


def _require_same(condition: bool | Tensor) -> None:
    if not condition:
        raise CaptureError(
            "the model does not map a layer's input to what came out of it: weights or mode were changed "
            "since the pass, or its forward does more than its modules"
        )


def _inputs(record: LayerRecord) -> Tensor:
    return record.rows().inputs


def _chain(model: nn.Module) -> list[tuple[nn.Linear, nn.Module]]:
    """(layer, its activation) in order."""
    if not isinstance(model, nn.Sequential):
        raise ValueError("UpdatedBackprop needs an nn.Sequential of linear layers and activations")
    chain: list[tuple[nn.Linear, list[nn.Module]]] = []
    for name, module in model._modules.items():
        if isinstance(module, nn.Linear) and all(module is not layer for layer, _ in chain):
            chain.append((module, []))
        elif not chain or [*module.parameters(), *module.buffers()] or _is_random(module):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) breaks the chain: UpdatedBackprop follows "
                "linear layers, each used once, and parameter-free activations, not random, that treat every "
                "example alone"
            )
        else:
            chain[-1][1].append(module)
    return [(layer, _out_of_place(f)) for layer, f in chain]


def _require_untouched(grad: Tensor, own: Factored) -> None:
    """A layer's gradient is its ``.grad``, unless somebody changed that."""
    error, most = (own.dense() - grad).abs(), 1e-3 * grad.abs().max()
    if bool((error > most).any()):  # where examples cancel, rounding is of their size
        size = Factored(own.left.abs(), own.right.abs(), abs(own.scale)).dense()
        most = most + 16 * torch.finfo(grad.dtype).eps * len(own.left) ** 0.5 * size
    if bool((error > most).any()):
        raise CaptureError(
            "UpdatedBackprop builds its step from per-example gradients, and .grad no longer agrees with "
            "them: it cannot honour gradient clipping, penalties added to the loss, or autocast"
        )


def _is_random(module: nn.Module) -> bool:
    return any(isinstance(part, RANDOM) for part in module.modules())


def _out_of_place(modules: list[nn.Module]) -> nn.Module:
    """One activation from a list of modules, with in-place ones replaced by copies that are not."""
    modules = [copy.copy(m) if getattr(m, "inplace", False) else m for m in modules]
    for module in modules:
        if getattr(module, "inplace", False):
            module.inplace = False
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules) if modules else nn.Identity()
