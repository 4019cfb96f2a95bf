"""Several processes with a minibatch between them: what they tell each other, by :mod:`torch.distributed`.

Each rank has examples of its own; the ``.grad`` that it starts from is the mean over the R ranks of what each
found, as :class:`~torch.nn.parallel.DistributedDataParallel` leaves it. So ranks have weights, the same for
gradients, mean inputs and statistics: 1/R each where the loss is a mean over a rank's examples, n_r/N where
it is their sum. For a sum, or with as many examples on every rank, that is the joint minibatch as one process
sees it, the ranks' parts one after the other. Every rank makes every step.

Nobody changes anything before all have agreed (:meth:`Ranks.together`), and every message is a sum, in which
a rank may fill a place of its own, so that what follows from it is the same to the bit on all ranks. Only
inverses are sent by the one rank that computed them (:meth:`Ranks.divided`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sogrid.statistics import Statistics
from sogrid.structured import Gram, add_outer

__all__ = ["Ranks", "joined", "require_whole", "unwrapped"]

SHARDED = (
    ", and a layer's step needs its whole weight and gradient: wrap the model in "
    "torch.nn.parallel.DistributedDataParallel, or train what is sharded with another optimizer and leave it "
    "out by params=..."
)

T = TypeVar("T")


class Ranks:
    """The processes of a group, as they are now.

    Args:
        group: ``None``: the default group, if there is one. ``False``: this process alone.

    Raises:
        ValueError: If this process is not in the group.

    Attributes:
        size: R; 1 without a group.
        rank: Of this process.
        device: That of the numbers which they tell each other.
    """

    device: torch.device | str = "cpu"

    def __init__(self, group: Any = None) -> None:
        """See the class."""
        several = group is not False and distributed.is_available() and distributed.is_initialized()
        self._group = group
        self.size = distributed.get_world_size(group) if several else 1
        self.rank = distributed.get_rank(group) if several else 0
        if self.rank < 0:
            raise ValueError("this process is not in the process_group that the optimizer was given")

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor, summed over the ranks."""
        return _at_once(tensors, partial(distributed.all_reduce, group=self._group))

    def together(
        self, work: Callable[[], T], told: Callable[[T | None], tuple[Sequence[float], Sequence[Tensor]]]
    ) -> tuple[T, list[list[float]], list[Tensor]]:
        """What each rank does alone, then the numbers that each tells, by rank, and the sums of its tensors.

        An error of one is an error of all, of the same type, before any goes on. For the numbers an
        accelerator's host waits.

        Args:
            work: What may fail.
            told: From its result, ``None`` if it failed, to numbers and tensors, as many and of the same
                shapes on every rank.
        """
        done = error = None
        try:
            done = work()
        except Exception as found:
            error = found
        own, tensors = told(done)
        own = torch.tensor([error is not None, *own], dtype=torch.float32, device=self.device)
        numbers = own.new_zeros(len(own), self.size)
        numbers[:, self.rank] = own
        numbers, *tensors = self.sum([numbers, *tensors])
        failed, *numbers = numbers.tolist()
        if any(failed):
            self._raise(error, failed.index(1))
        return done, numbers, tensors

    def _raise(self, error: Exception | None, first: int) -> None:
        """This rank's own error, or that of the first which has one."""
        kind, message = self._gathered((type(error), str(error)))[first]
        if error is None:
            try:
                error = kind(f"rank {first}: {message}")
            except TypeError:  # it takes more than a message
                error = RuntimeError(f"rank {first}: {kind.__name__}: {message}")
        raise error

    def _gathered(self, thing: Any) -> list[Any]:
        """What each rank has, by rank."""
        things = [None] * self.size
        distributed.all_gather_object(things, thing, self._group)
        return things

    def divided(
        self, jobs: Sequence[Callable[[], dict[str, Tensor]]], costs: Sequence[float], like: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """What jobs give, each done by one rank and sent to the others.

        Args:
            jobs: The same on every rank.
            costs: Of each; the ranks have about as much to do.
            like: Tensors of the type and on the device of what each gives.
        """
        owners = _balanced(costs, self.size)
        done, *_ = self.together(
            lambda: {k: job() for k, job in enumerate(jobs) if owners[k] == self.rank}, lambda _: ((), ())
        )
        shapes = {k: {name: tensor.shape for name, tensor in own.items()} for k, own in done.items()}
        results = [{} for _ in jobs]
        for rank, found in enumerate(self._gathered(shapes)):
            names = [(k, name, shape) for k, named in found.items() for name, shape in named.items()]
            own = [
                done[k][name] if rank == self.rank else like[k].new_empty(shape) for k, name, shape in names
            ]
            send = partial(distributed.broadcast, group_src=rank, group=self._group)
            for (k, name, _), tensor in zip(names, _at_once(own, send), strict=True):
                results[k][name] = tensor.clone()  # not a part of the message
        return results


def _at_once(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> list[Tensor]:
    """Tensors as a collective leaves them, which has those of one type and device in one message."""
    found, kinds = list(tensors), {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
    for indices in kinds.values():
        message = torch.cat([tensors[index].flatten() for index in indices])
        collective(message)
        parts = message.split([tensors[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part.view(tensors[index].shape)
    return found


def _balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each job: the dearest first, to whoever has least to do."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def joined(ranks: Ranks, found: Sequence[Statistics], weights: Sequence[Sequence[float]]) -> list[Statistics]:
    """Statistics of the minibatch of all ranks, a mixture of theirs: C = Σ w (C_r + (h̄_r − h̄)(h̄_r − h̄)ᵀ).

    Factors of the output side are averaged; of a number, which is a bound, the largest counts. A matrix stays
    known by its rows where those of all ranks are fewer than its width.

    Args:
        ranks: Who has a part.
        found: This rank's, of each layer; where rows are centred, their sum is zero.
        weights: w of each layer, by rank, up to a factor.
    """
    own = [weight[ranks.rank] / sum(weight) for weight in weights]
    matrices = [matrix for one in found for matrix in one[1:] if matrix is not None]
    means = [w * one.mean for w, one in zip(own, found, strict=True)]
    _, rows, means = ranks.together(lambda: None, lambda _: (list(map(_rows, matrices)), means))
    rows = iter([list(map(int, by_rank)) for by_rank in rows])
    parts = []
    for one, mean, w in zip(found, means, own, strict=True):
        parts.append(_part(ranks, one.covariance, w, next(rows), one.mean - mean))
        if one.output is not None:
            count, bound = next(rows), _is_bound(one)
            parts.append(_place(ranks, one.output) if bound else _part(ranks, one.output, w, count))
    sums = ranks.sum([part.rows if isinstance(part, Gram) else part for part in parts])
    whole = iter([Gram(s) if isinstance(part, Gram) else s for part, s in zip(parts, sums, strict=True)])
    joint = []
    for one, mean in zip(found, means, strict=True):
        covariance, output = next(whole), None if one.output is None else next(whole)
        joint.append(Statistics(mean, covariance, output.amax(0) if _is_bound(one) else output))
    return joint


def _is_bound(statistics: Statistics) -> bool:
    """Whether what is kept of the output side is no matrix, ``[..., o, o]``, but a number, ``[...]``."""
    output = statistics.output
    return isinstance(output, Tensor) and output.dim() < statistics.mean.dim()


def _place(ranks: Ranks, value: Tensor) -> Tensor:
    """What a rank adds to a list of what each has."""
    places = value.new_zeros(ranks.size, *value.shape)
    places[ranks.rank] = value
    return places


def _rows(matrix: Tensor | Gram) -> int:
    """How many it is known by; of a whole matrix its width, with which no sum is below that."""
    matrix = matrix.rows if isinstance(matrix, Gram) else matrix
    return matrix.shape[-2] if matrix.dim() > 1 else 0


def _part(
    ranks: Ranks, matrix: Tensor | Gram, weight: float, rows: list[int], shift: Tensor | None = None
) -> Tensor | Gram:
    """What a rank adds to a matrix, whole or as rows: one or the other on all."""
    thin, first = isinstance(matrix, Gram), sum(rows[: ranks.rank])
    if not (thin and sum(rows) < matrix.rows.shape[-1]):
        matrix = matrix.dense() if thin else matrix
        return weight * (matrix if shift is None else add_outer(matrix, shift))
    *maps, n, width = matrix.rows.shape
    part = matrix.rows.new_zeros(*maps, sum(rows), width)
    about = matrix.rows if shift is None else matrix.rows + shift.unsqueeze(-2) * n**-0.5
    part[..., first : first + n, :] = weight**0.5 * about
    return Gram(part)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that a wrapper for several processes, or of ``torch.compile``, runs.

    Raises:
        TypeError: For ``nn.DataParallel``, which runs copies, and for shards.
    """
    while isinstance(model, DistributedDataParallel) or type(model).__name__ == "OptimizedModule":
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    for module in model.modules():
        if isinstance(module, DataParallel):
            raise TypeError(
                "nn.DataParallel runs copies of the layers, which nobody watches: use one process for each "
                "device and torch.nn.parallel.DistributedDataParallel"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(f"FullyShardedDataParallel shards the model{SHARDED}")
    return model


def require_whole(name: str, parameter: Tensor) -> None:
    """Refuse a part of a parameter.

    Raises:
        TypeError: If it is sharded.
    """
    if hasattr(parameter, "full_tensor"):
        raise TypeError(f"{name} is a DTensor: it is sharded (fully_shard, tensor parallel){SHARDED}")
