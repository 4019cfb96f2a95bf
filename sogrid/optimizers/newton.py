r"""Newton, Gauss-Newton and natural-gradient steps with the dense matrix (Thesis §3.1, §3.2).

Δθ = −λ (M + εI)⁻¹ ∇R, with M the Hessian (eq. 3.1.1), the Gauss-Newton matrix (§3.1.4) or the Fisher
(§3.2.2). The reference that the factorized methods approximate: cubic in the number of parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sogrid.capture import Capture, CaptureError, Wanted
from sogrid.curvature import fisher, gauss_newton, hessian
from sogrid.losses import Loss
from sogrid.parameters import check_hyperparameter
from sogrid.structured import shift_diagonal
from sogrid.watching import Watching

__all__ = ["Newton", "newton_update"]

MATRICES = {
    "hessian": hessian,
    "gauss_newton": gauss_newton,
    "fisher": lambda model, loss, x, y: fisher(model, loss, x),
}


def newton_update(
    gradient: Tensor, matrix: Tensor, *, lr: float | Tensor = 1.0, damping: float | Tensor = 0.0
) -> Tensor:
    """Δθ = −λ (M + εI)⁻¹ ∇R, ``[..., P]``; M may be indefinite (a saddle then attracts).

    The natural gradient of §3.2.2, −ε'(F + (ε'/λ')I)⁻¹∇R, is this with λ = ε' and ε = ε'/λ'.

    Args:
        gradient: ∇R, ``[..., P]``.
        matrix: M, ``[..., P, P]``.
        lr: λ.
        damping: ε.

    Example:
        >>> newton_update(torch.tensor([2.0, 4.0]), torch.diag(torch.tensor([1.0, 4.0]))).tolist()
        [-2.0, -1.0]
    """
    solution, _ = torch.linalg.solve_ex(shift_diagonal(matrix, damping), gradient.unsqueeze(-1))
    return -lr * solution.squeeze(-1)


def _held_block(model: nn.Module, matrix: Tensor) -> Tensor:
    """Rows and columns of the parameters that hold a gradient, by slices: masks make the host wait."""
    sizes = [p.numel() for p in model.parameters()]
    held = [p.grad is not None for p in model.parameters()]
    for dim in (0, 1):
        matrix = torch.cat([m for m, h in zip(matrix.split(sizes, dim), held, strict=True) if h], dim)
    return matrix


class Newton(Watching):
    """Dense second-order steps for a small model, in an ordinary training loop.

    The minibatch and its targets are recovered from the model's input, output and output gradient.

    A pass that the matrix would not be of, since the model is random or its weights or mode have changed, and
    a gradient with other parts than the loss's are refused on the CPU and ignored elsewhere.

    Args:
        model: The module that is trained; one input tensor ``[n, ...]``, one output ``[n, k]``.
        loss: What the training loss is, as an object of :mod:`sogrid.losses`; *Gauss-Newton* is cut
            where this loss is cut. Another is refused as far as the gradient at the output tells
            (:meth:`~sogrid.losses.Loss.require_target`).
        lr: λ; 1 is the full Newton step.
        damping: ε ≥ 0.
        curvature: ``"hessian"``, ``"gauss_newton"`` or ``"fisher"``.
        process_group: ``False``: this process steps alone, and needs to.

    Raises:
        NotImplementedError: With several processes, here or at a step.
        TypeError: If ``model`` is not a module or ``loss`` not a :class:`~sogrid.losses.Loss`.
        ValueError: For hyperparameters out of range.
    """

    saved = ("model", "loss", "curvature")

    _step_supports_amp_scaling = True
    several_ranks = False

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        damping: float | Tensor = 0.0,
        *,
        loss: Loss,
        curvature: str = "hessian",
        process_group: Any = None,
    ) -> None:
        """See the class."""
        self.model = self._require_model(model)
        self._require_loss(loss)
        if curvature not in MATRICES:
            raise ValueError(f"curvature must be one of {sorted(MATRICES)}, got {curvature!r}")
        check_hyperparameter("lr (λ)", lr)
        check_hyperparameter("damping (ε)", damping)
        self.loss, self.curvature = loss, curvature
        self._require_whole(self.model.parameters())
        self._join(model, process_group)
        super().__init__(self.model.parameters(), {"lr": lr, "damping": damping})
        self._bind()

    def _bind(self) -> None:
        self._capture = Capture(self.model, {}, self._wanted())

    def _wanted(self) -> Wanted:
        return Wanted(roots=True)

    def add_param_group(self, param_group: dict) -> None:
        """Refused after the first: the matrix is that of the whole model, with one λ and one ε."""
        if self.param_groups:
            raise ValueError("Newton has one matrix for the whole model, hence one parameter group")
        super().add_param_group(param_group)

    def _step(self) -> None:
        self._ranks()
        roots = self._capture.roots
        if not roots:
            raise CaptureError(
                "the model's forward and backward pass were not seen: call the model in training mode"
            )
        self._require_scale()
        x, f, grad_f = (torch.cat([getattr(r, key) for r in roots]) for key in ("input", "output", "grad"))
        mean, scale = self.loss.reduction == "mean", self._loss_scale
        y = self.loss.target(f, grad_f * ((len(f) if mean else 1) / scale))
        self.loss.require_target(f, y)
        (group,) = self.param_groups
        held = [p for p in group["params"] if p.grad is not None]
        gradient = torch.cat([p.grad.flatten() for p in held]) / ((1 if mean else len(f)) * scale)
        self._require_finite({"model": [gradient]})
        if f.is_cpu:
            self._require_known(x, f, y, held, gradient)
        matrix = MATRICES[self.curvature](self.model, self.loss, x, y)
        if len(held) < len(group["params"]):
            matrix = _held_block(self.model, matrix)
        change = newton_update(gradient, matrix, lr=group["lr"], damping=group["damping"])
        self._require_finite({"Newton step (singular matrix? raise the damping)": [change]})
        for parameter, part in zip(held, change.split([p.numel() for p in held]), strict=True):
            parameter.add_(part.view_as(parameter))

    @torch.enable_grad()
    def _require_known(self, x: Tensor, f: Tensor, y: Tensor, held: list[Tensor], gradient: Tensor) -> None:
        """Refuse a pass that the matrix would not be of: the model is run again, and must do the same."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.random.fork_rng(devices=[]):
            again = torch.func.functional_call(self.model, buffers, (x,))
        few = torch.finfo(f.dtype).eps ** 0.5
        if again.shape != f.shape or (again - f).abs().max() > 8 * few * f.abs().max():
            raise CaptureError(
                "the model, run again on its input, gives another output than it gave: Newton needs one that "
                "is a function of one input alone (no dropout, no further arguments, no state), and weights "
                "and mode as they were in the pass"
            )
        value = self.loss(again, y)
        own = torch.cat([g.flatten() for g in torch.autograd.grad(value, held, materialize_grads=True)])
        own = own / (1 if self.loss.reduction == "mean" else len(f))
        across = own * (gradient @ own / (own @ own).clamp(min=torch.finfo(own.dtype).tiny)) - gradient
        if across.norm() > 64 * few * gradient.norm():
            raise CaptureError(
                f"the gradient is not that of {self.loss!r} alone, of which the matrix would be (a penalty "
                "on weights?)"
            )
