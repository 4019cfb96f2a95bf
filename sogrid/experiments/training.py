"""One training loop for every experiment: curves by update and by second, divergence recorded.

Examples are shuffled anew each epoch; an optimizer that keeps statistics refreshes them from a
minibatch of its own. Seconds count training alone: evaluation and checkpoints stop the clock.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import BATCH, METHODS, Method, Task
from sogrid.experiments.checkpoints import Checkpoint, Interrupted, StopSignals, source_digest
from sogrid.experiments.records import provenance
from sogrid.factorize import FactorizationError
from sogrid.losses import Loss

__all__ = ["Curve", "Minibatches", "evaluation_points", "run", "train", "updates_to"]

PARTS = ("model", "optimizer", "order", "statistics_order")
"""Of a run under way: what has a state of its own."""


@dataclass
class Curve:
    """What a run leaves behind.

    Attributes:
        update: Updates done at each evaluation.
        second: Training seconds spent until then.
        train: Mean loss on (a fixed part of) the training set.
        test: Mean loss on the test set.
        train_error: Error rate where ``train`` was evaluated, for a classifier; else empty.
        test_error: Error rate on the test set.
        status: ``"finished"``, ``"diverged"``, or ``"stopped"`` where it was told to.
        reason: Why it stopped early, in words.
    """

    update: list[int] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    train_error: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    status: str = "finished"
    reason: str = ""


def evaluation_points(updates: int, per_decade: int = 8, also: Iterable[int] = ()) -> list[int]:
    """Log-spaced update counts from 0 to ``updates``, both included, and those of ``also`` in between.

    Example:
        >>> evaluation_points(100, per_decade=2)
        [0, 1, 3, 10, 32, 100]
    """
    decades = math.log10(max(updates, 1))
    steps = max(1, round(decades * per_decade))
    spaced = (round(10 ** (decades * i / steps)) for i in range(steps + 1))
    return sorted({0, updates, *(p for p in (*spaced, *also) if p <= updates)})


def updates_to(updates: Sequence[int], losses: Sequence[float], loss: float) -> float | None:
    """Updates until a curve first comes down to a loss; ``None`` if it never does.

    Between two evaluations the logarithm of the loss is taken to be linear in that of the update. Update 0
    has no logarithm, and neither has a loss of zero: a curve that comes down from the one, or to the other,
    does so at its next point.

    Example:
        >>> round(updates_to([0, 10, 40], [90.0, 80.0, 20.0], 40.0), 6)
        20.0
    """
    for k, (update, value) in enumerate(zip(updates, losses, strict=True)):
        if value <= loss:
            if k == 0 or updates[k - 1] == 0 or value <= 0 or value == loss:
                return float(update)
            share = math.log(losses[k - 1] / loss) / math.log(losses[k - 1] / value)
            return updates[k - 1] * (update / updates[k - 1]) ** share
    return None


class Minibatches:
    """Endless index minibatches, every epoch in a new order; the last n mod batch are left out.

    Args:
        n: Number of examples.
        batch: How many at a time.
        generator: Draws the orders, on the CPU.

    Raises:
        ValueError: If there are fewer than ``batch`` examples.
    """

    def __init__(self, n: int, batch: int, generator: torch.Generator) -> None:
        """See the class."""
        if n < batch:
            raise ValueError(f"a minibatch of {batch} needs at least that many examples, got {n}")
        self.n, self.batch, self.generator = n, batch, generator
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.before, self.taken = self.generator.get_state(), 0
        order = torch.randperm(self.n, generator=self.generator)
        self.order = order[: self.n - self.n % self.batch].split(self.batch)

    def __iter__(self) -> Minibatches:
        return self

    def __next__(self) -> Tensor:
        if self.taken == len(self.order):
            self._start_epoch()
        self.taken += 1
        return self.order[self.taken - 1]

    def state_dict(self) -> dict[str, Any]:
        """The generator before this epoch, and how many of its minibatches were taken."""
        return {"before": self.before, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state of the same n and batch was saved."""
        self.generator.set_state(state["before"])
        self._start_epoch()
        self.taken = state["taken"]


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, batch: int = 2000) -> tuple[float, float]:
    """Mean loss, and error rate (of labels y; else NaN), over ``x: [n, ·]`` in evaluation mode."""
    training = model.training
    model.eval()
    values, errors = 0.0, 0.0
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        f = model(a)
        values += loss.value(f, b).sum()
        errors += (f.argmax(-1) != b).sum() if b.dim() == 1 else math.nan
    model.train(training)
    return float(values) / len(x), float(errors) / len(x)


class _Training:
    """A run under way, and how far it has come.

    Attributes:
        done: Updates.
        clock: Seconds of training.
        curve: The curve so far.
        due: Whether the state was to be saved after the last update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
        batch: int,
        evaluate_on: int,
        seed: int,
    ) -> None:
        """See :func:`train`."""
        self.model, self.optimizer, self.task = model, optimizer, task
        self.some = tuple(part[:evaluate_on] for part in task.train)
        n, self.device = len(task.train[0]), task.train[0].device
        self.order = Minibatches(n, batch, torch.Generator().manual_seed(seed))
        self.statistics_order = Minibatches(n, batch, torch.Generator().manual_seed(seed + 1_000_003))
        self.done, self.clock, self.curve, self.due = 0, 0.0, Curve(), False

    def advance(self, points: list[int], due: Callable[[], bool]) -> bool:
        """One update, and what the points ask for after it; False where the run diverges, and ends."""
        start = perf_counter()
        try:
            self._update()
        except (FloatingPointError, FactorizationError) as error:
            return self._diverged(self.done + 1, str(error))
        self.done += 1
        self.due = due()
        if self.device.type != "cpu" and (self.done in points or self.due):
            torch.accelerator.synchronize()
        self.clock += perf_counter() - start
        if self.done in points and not self.evaluate():
            return self._diverged(self.done, "the evaluated loss is not finite")
        return True

    def _update(self) -> None:
        (x, y), loss = self.task.train, self.task.loss
        if getattr(self.optimizer, "refresh_due", False):
            s = next(self.statistics_order)
            self.optimizer.refresh(lambda: loss(self.model(x[s]), y[s]))
        i = next(self.order)
        self.optimizer.zero_grad()
        value = loss(self.model(x[i]), y[i])
        if value.device.type == "cpu" and not math.isfinite(value.item()):
            raise FloatingPointError(f"the minibatch loss is {value.item()}")
        value.backward()
        self.optimizer.step()

    def _diverged(self, update: int, reason: str) -> bool:
        self.curve.status, self.curve.reason = "diverged", f"update {update}: {reason}"
        return False

    def evaluate(self) -> bool:
        """Add a point to the curve, unless a loss is not finite; whether it was added."""
        curve, task = self.curve, self.task
        (value, error), (test_value, test_error) = (
            evaluate(self.model, task.loss, *examples) for examples in (self.some, task.test)
        )
        if not (math.isfinite(value) and math.isfinite(test_value)):
            return False
        curve.update.append(self.done)
        curve.second.append(round(self.clock, 4))
        curve.train.append(value)
        curve.test.append(test_value)
        if task.classifies:
            curve.train_error.append(error)
            curve.test_error.append(test_error)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        values = {"update": self.done, "clock": self.clock, "curve": asdict(self.curve)}
        states = {name: getattr(self, name).state_dict() for name in PARTS}
        return {**values, **states, "random": _random_state(self.device)}

    def take_up(self, saved: dict[str, Any] | None) -> None:
        """Go on where a checkpoint left off, if there is one."""
        if saved is None:
            return
        self.done, self.clock, self.curve = saved["update"], saved["clock"], Curve(**saved["curve"])
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        _set_random_state(saved["random"], self.device)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    *,
    updates: int,
    points: Iterable[int],
    seed: int,
    batch: int = BATCH,
    evaluate_on: int = 10_000,
    progress: str | None = None,
    checkpoint: Checkpoint | None = None,
    go_on: Callable[[int, float], bool] | None = None,
) -> Curve:
    """Train for a number of updates and return the curve.

    Args:
        model: On the device of the task's data.
        optimizer: Any; one with ``refresh_due`` gets statistics minibatches of its own.
        task: Data and loss.
        updates: How many.
        points: When to evaluate, in updates done.
        seed: Of the data order and of the statistics minibatches.
        batch: Examples per update, and per statistics minibatch.
        evaluate_on: The training curve uses this many of the first training examples.
        progress: Title of a progress bar, or ``None``.
        checkpoint: Where the state is saved every so often and at SIGINT or SIGTERM, and where an earlier
            one is taken up: on the CPU, to the same losses bit for bit; seconds go on counting.
        go_on: Asked at each point, with the updates done and the training loss; if not, the run stops.

    Raises:
        CheckpointError: If the checkpoint is damaged, of another run, or cannot be written.
        Interrupted: If a signal came; the checkpoint holds the state.
    """
    points = sorted(set(points))
    state = _Training(model, optimizer, task, batch, evaluate_on, seed)
    if checkpoint is not None:
        plan = {"updates": updates, "points": points, "seed": seed}
        plan |= {"batch": batch, "evaluate_on": evaluate_on}
        checkpoint.identity |= _identity(model, optimizer, task, plan)
        state.take_up(checkpoint.load())
    title = {"desc": progress, "disable": progress is None, "leave": False}
    with (
        nullcontext() if checkpoint is None else StopSignals() as stop,
        tqdm(total=updates, initial=state.done, mininterval=1.0, **title) as bar,
    ):
        due = lambda: checkpoint is not None and (checkpoint.due or stop.number is not None)  # noqa: E731
        model.train()
        if 0 in points and not state.curve.update:
            state.evaluate()
        while state.done < updates and state.advance(points, due):
            bar.update()
            if state.done in points:
                bar.set_postfix(train=f"{state.curve.train[-1]:.3g}")
                if go_on is not None and not go_on(state.done, state.curve.train[-1]):
                    state.curve.status, state.curve.reason = "stopped", f"update {state.done}: told to"
                    break
            stopped = checkpoint is not None and stop.number is not None
            if state.due or stopped:
                checkpoint.save(state.state_dict())
            if stopped:
                raise _interruption(stop.take(), state.done, updates, checkpoint)
    return state.curve


def _interruption(number: int, done: int, updates: int, checkpoint: Checkpoint) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(
        f"stopped by {name} after update {done:,} of {updates:,}; the state is in {checkpoint.path}: run the "
        "same again to go on from there",
        number,
    )


def _identity(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, plan: dict[str, Any]
) -> dict[str, Any]:
    """All that two runs must share for one to be continued as the other."""
    device = task.train[0].device
    return {
        "task": task.name,
        "data": getattr(task.data, "checksum", None),
        "plan": plan,
        "model": str(model),
        "optimizer": {
            "class": type(optimizer).__name__,
            **{k: str(v) for k, v in optimizer.defaults.items()},
        },
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": provenance(device)["versions"],
        "sources": source_digest(),
    }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's global streams, which a model of one's own may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def run(
    task: Task,
    method: str,
    settings: dict[str, Any],
    *,
    seed: int,
    progress: str | None = "",
    checkpoint: Checkpoint | None = None,
    methods: Mapping[str, Method] = METHODS,
    **options,
) -> dict[str, Any]:
    """Build one of the thesis's methods, train it, and return the run as a record keeps it.

    Args:
        task: The benchmark, its data on the device to use.
        method: Key of ``methods``.
        settings: Its hyperparameters and the initialisation's ``scale``.
        seed: Of weights, data order and statistics minibatches. Targets that an optimizer samples have a seed
            of its own.
        progress: Title of the progress bar, by default the method; ``None`` for no bar.
        checkpoint: See :func:`train`. A run that was taken up says so under ``"resumed"``.
        methods: The table that it is a row of.
        **options: Passed to :func:`train`.

    Raises:
        ValueError: For an unknown method or settings it does not take.
    """
    if method not in methods:
        raise ValueError(f"method must be one of {list(methods)}, got {method!r}")
    device = task.train[0].device
    generator = torch.Generator().manual_seed(seed)
    model, optimizer = methods[method].build(task, settings, generator, device)
    if checkpoint is not None:
        checkpoint.identity |= {"method": method, "settings": settings}
    options |= {"progress": method if progress == "" else progress, "checkpoint": checkpoint}
    curve = train(model, optimizer, task, seed=seed, **options)
    outcome = {"method": method, "settings": settings, "seed": seed, **asdict(curve)}
    outcome["provenance"] = provenance(device)
    if checkpoint is not None and checkpoint.resumed:
        outcome["resumed"] = checkpoint.resumed
    return outcome
