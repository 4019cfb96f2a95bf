"""What one layer saw: its uses in the passes whose gradients have come, as rows of its linear map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.autograd import CaptureError
from sogrid.layers import Rule
from sogrid.rows import Rows

__all__ = ["LayerRecord", "Pass", "RootRecord", "Seen", "Use", "join"]


class Seen:
    """A tensor of the model's own, detached, as it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        """See the class."""
        self.tensor, self._version = tensor, tensor._version

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written into it since."""
        return self.tensor._version == self._version


@dataclass(eq=False, slots=True, weakref_slot=True)
class Pass:
    """One forward pass of the model.

    Attributes:
        examples: Of the loss: as many as the model's output has, or its input; ``None`` while it is not known
            or where parts of the model are called on their own.
        over: Whether a gradient has come back, or will not.
    """

    examples: int | None = None
    over: bool = False


@dataclass(eq=False, slots=True)
class Use:
    """One use of a layer. The graph holds it, so it must not hold the graph.

    Attributes:
        name: Of the layer, in the model.
        layer: The layer.
        rule: Of its kind.
        forward: The pass.
        examples: How many the layer was given.
        kept: Whether it is kept for statistics.
        input: What went in, if rows are wanted.
        some: The first examples of it, if only these are.
        mean: Over the rows of the input, ``[..., i]``, if ``.grad`` is formed.
        rows: How many these are.
        output: What came out, if the graph is cut above.
        probes: What was pulled back to its output.
    """

    name: str
    layer: nn.Module
    rule: Rule
    forward: Pass
    examples: int
    kept: bool
    input: Seen | None
    some: Tensor | None
    mean: Tensor | None
    rows: int
    output: Seen | None
    probes: list[Tensor] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight, and of all that is recorded."""
        return self.layer.weight.dtype

    @property
    def first(self) -> Tensor | None:
        """The first examples of what went in at least, if any are kept."""
        return self.some if self.input is None else self.input.tensor

    def require_input(self) -> None:
        """Refuse an input that was changed in place."""
        if not self.input.unchanged:
            raise CaptureError(
                f"the input of layer {self.name!r} was changed in place after its backward pass, and "
                "factored gradients need it until step(): give each minibatch a tensor of its own"
            )

    def positions(self, values: Tensor) -> Tensor:
        """What is shaped like the output, as rows ``[n, s, o]``."""
        return self.rule.outputs(self.layer, values)

    def pulled(self, k: int, like: Tensor) -> Tensor:
        """The k-th probe as rows; zero where the model's output does not depend on this use."""
        return self.positions(self.probes[k] if self.probes else torch.zeros_like(like))


@dataclass(slots=True)
class LayerRecord:
    """What one layer saw since its gradient was last cleared.

    Attributes:
        unseen: Why a part of ``.grad`` is of no pass that was seen, if it is.
        version: That ``.grad`` has if nobody but the passes that were seen has written to it.
        moved: That the bias had when the latest gradient came.
        made: Gives the ``.grad`` that the first backward pass made where there was none before, if it is
            there still.
    """

    unseen: str = ""
    version: int = 0
    moved: int = 0
    made: Callable[[], Tensor | None] | None = None
    _uses: dict[Use, Tensor | None] = field(default_factory=dict, repr=False)
    _task: int = field(default=-1, repr=False)  # the backward pass of the latest gradient

    def __bool__(self) -> bool:
        """Whether a gradient has arrived."""
        return bool(self._uses)

    @property
    def count(self) -> int:
        """Examples of the loss whose gradient arrived.

        A layer may see parts of them, or several rows of each; where nothing but the layer's uses is known,
        uses of as many examples are of the same.
        """
        if len(self._uses) == 1:
            (use,) = self._uses
            return use.forward.examples or use.examples
        sizes: dict[Pass, list[int]] = {}
        for use in self._uses:
            sizes.setdefault(use.forward, []).append(use.examples)
        return sum(
            forward.examples or (some[0] if len({*some}) == 1 else sum(some))
            for forward, some in sizes.items()
        )

    @property
    def passes(self) -> int:
        """Those whose gradient arrived."""
        return len({use.forward for use in self._uses})

    @property
    def shapes(self) -> list[tuple]:
        """Those of what is kept of the inputs, and how many rows they gave, by forward pass."""
        if len(self._uses) == 1:
            (use,) = self._uses
            return [] if use.first is None else [(use.first.shape, use.rows)]
        kept = self._kept("first").values()
        return [tuple((use.first.shape, use.rows) for use in some) for some in kept]

    @property
    def inputs(self) -> list[Tensor]:
        """The layer's input in each use that is kept, such as ``[n, n_in]``."""
        return [use.input.tensor for use in self._uses if use.input is not None]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients at the pre-activations, such as ``[n, n_out]``, scaled as the loss was reduced."""
        return [g for g in self._uses.values() if g is not None]

    @property
    def probes(self) -> list[list[Tensor]]:
        """For each use that is kept, the vectors that were pulled back to it."""
        return [use.probes for use in self._uses if use.input is not None]

    @property
    def mean(self) -> Tensor:
        """The mean input ``[i]``, over examples and positions."""
        parts = [use for use in self._uses if use.mean is not None]
        if len(parts) == 1:
            return parts[0].mean
        return sum(use.rows * use.mean for use in parts) / sum(use.rows for use in parts)

    @property
    def complete(self) -> bool:
        """Whether every use was kept."""
        return all(use.kept for use in self._uses)

    def _kept(self, what: str = "input") -> dict[Pass, list[Use]]:
        """The uses whose input is there, or the first of it, by forward pass."""
        passes: dict[Pass, list[Use]] = {}
        for use in self._uses:
            if getattr(use, what) is not None:
                passes.setdefault(use.forward, []).append(use)
        return passes

    def rows(self) -> Rows:
        """All that was kept, with the gradients scaled as the loss was reduced; none where the graph was cut.

        Raises:
            CaptureError: If an input was changed in place meanwhile.
        """
        uses = list(self._kept().values())
        for use in (use for some in uses for use in some):
            use.require_input()
        h, parts = _stack([[use.rule.inputs(use.layer, use.input.tensor) for use in some] for some in uses])
        if any(g is None for g in self._uses.values()):
            return Rows(h, None, (), self.count, parts=parts)
        g, _ = _stack([[use.positions(self._uses[use]) for use in some] for some in uses])
        probes = (
            _stack([[use.pulled(k, self._uses[use]) for use in some] for some in uses])[0]
            for k in range(max(len(use.probes) for use in self._uses))
        )
        return Rows(h, g, tuple(probes), self.count, parts=parts)

    def require_examples_first(self, or_rows: bool) -> None:
        """Refuse inputs whose first dimension is of something else, as of time, or of several rows for each.

        Args:
            or_rows: These may count as examples.
        """
        for use in self._uses:
            n, shape = use.forward.examples, use.input.tensor.shape
            turned = isinstance(use.layer, nn.Linear) and use.examples != n and n in shape[1:-1]
            if turned or not (or_rows or n is None or use.examples <= n):
                raise CaptureError(
                    f"layer {use.name!r} saw an input of shape {tuple(shape)} where the model's output is of "
                    f"{n} examples, and this optimizer has to tell one example's rows from another's: give "
                    "the layer the examples first, [n, positions, features], or use KFAC with shared='expand'"
                )

    def factors(self) -> tuple[Tensor, Tensor]:
        """(h, g) of all rows, ``[n·s, ·]`` each, of a layer whose inputs and outputs are rows as they are.

        Raises:
            CaptureError: If an input was changed in place meanwhile.
        """
        for use in self._uses:
            use.require_input()
        h = [use.input.tensor.flatten(0, -2) for use in self._uses]
        return join(h), join([g.flatten(0, -2) for g in self._uses.values()])

    def require_first(self) -> None:
        """Refuse uses of whose inputs nothing is there for a bound."""
        for use in self._uses:
            if use.first is None:
                raise CaptureError(
                    f"layer {use.name!r}: max_change was given after its forward pass, which kept nothing "
                    "for a bound: call zero_grad() and run it again"
                )

    def some_inputs(self, examples: int) -> Tensor:
        """Rows ``[·, i]`` of the first examples at least, in all uses."""
        if len(self._uses) == 1:
            (use,) = self._uses
            return use.rule.inputs(use.layer, use.first[:examples]).flatten(-3, -2)
        seen, passes = 0, []
        for uses in self._kept("first").values():
            if seen < examples:
                some = [use.rule.inputs(use.layer, use.first[: examples - seen]) for use in uses]
                passes.append(some)
                seen += some[0].shape[-3]
        h, _ = _stack(passes)
        return h.flatten(-3, -2)

    def preactivations(self) -> Tensor:
        """The outputs of all uses; computed again where they were not kept or are changed."""
        seen = [(use.layer, use.output, use.input.tensor) for use in self._uses]
        return join([a.tensor if a is not None and a.unchanged else layer(h) for layer, a, h in seen])

    def add(self, use: Use, grad: Tensor | None) -> None:
        """Count a use, once: further gradients through it add to its first, as they do in ``.grad``."""
        if use in self._uses:
            if grad is not None and self._uses[use] is not None:
                self._uses[use] = self._uses[use] + grad
            return
        self._uses[use] = grad if use.input is not None else None


@dataclass(eq=False)
class RootRecord:
    """The model's own first input, output and output gradient, of one forward pass.

    Attributes:
        versions: Those of the parameters then.
    """

    input: Any
    output: Tensor
    versions: list[int]
    grad: Tensor | None = None


def join(passes: list[Tensor], dim: int = 0) -> Tensor:
    """One tensor ``[n, ·]`` of all passes; not a copy if there is one."""
    return passes[0] if len(passes) == 1 else torch.cat(passes, dim)


def _stack(passes: list[list[Tensor]]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """``[n, s, ·]`` of the uses in each forward pass: positions side by side, passes one after the other.

    Uses of other numbers of examples are apart. Where numbers of positions differ all is one block of
    positions, and the parts of it are told; see :class:`~sogrid.rows.Rows`.
    """
    parts: list[Tensor] = []
    for uses in passes:
        apart = len({use.shape[-3] for use in uses}) > 1
        parts += uses if apart else [join(uses, -2)]
    if len({part.shape[-2] for part in parts}) == 1:
        return join(parts, -3), ()
    block = torch.cat([part.flatten(-3, -2).unsqueeze(-3) for part in parts], -2)
    return block, tuple((part.shape[-3], part.shape[-2]) for part in parts)
