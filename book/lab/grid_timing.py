"""What a grid as one batch spares: the loop over its configurations, timed against it.

Both take turns in one process, so that a busy machine slows them alike; medians over rounds are compared. An
update is a whole one with its share of the refresh, one in 100 updates::

    python -m lab.grid_timing [--device cuda]
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.profiler import profile

from lab.timing import elapsed_ms
from sogrid.experiments.benchmarks import BATCH, METHODS, REFRESH_EVERY, Task
from sogrid.experiments.grid import pooled_digits, train_grid, training_grid
from sogrid.networks import MLP

__all__ = ["grid_memory", "grid_times"]

SETTINGS = {"lr": 1e-3, "damping": 0.1, "scale": 16.0}


def configurations(method: str, count: int) -> list[dict[str, float]]:
    """Settings of a method, each with a learning rate and a damping of its own."""
    own = {key: SETTINGS[key] for key in (*METHODS[method].settings, "scale")}
    return [{key: value * 1.01**k for key, value in own.items()} for k in range(count)]


def grid_times(
    method: str, *, task: Task | None = None, count: int = 64, batch: int = BATCH, rounds: int = 15
) -> dict[str, Any]:
    """Milliseconds per update of a grid, and of a loop over its configurations.

    Args:
        method: Key of :data:`~sogrid.experiments.benchmarks.METHODS`.
        task: Default :func:`~sogrid.experiments.grid.pooled_digits`.
        count: K.
        batch: Examples per update, and per statistics minibatch.
        rounds: Each times one update, and one refresh, of both.

    Returns:
        ``grid_ms``, ``loop_ms`` and their ``ratio``.
    """
    task = pooled_digits() if task is None else task
    settings, x, y = configurations(method, count), task.train[0][:batch], task.train[1][:batch]
    grid = training_grid(task, method, settings, [0] * count)
    pairs = [METHODS[method].build(task, own, torch.Generator().manual_seed(0), x.device) for own in settings]

    def loop() -> None:
        for model, optimizer in pairs:
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()

    def refresh_loop() -> None:
        for model, optimizer in pairs:
            optimizer.refresh(lambda m=model: task.loss(m(x), y))

    works = {"grid": lambda: grid.update(x, y), "loop": loop}
    refreshes = {"grid": lambda: grid.refresh(x, y), "loop": refresh_loop}
    ms: dict[str, list[float]] = {"grid": [], "loop": [], "grid refresh": [], "loop refresh": []}
    for _ in range(rounds + 2):
        if grid.keeps_statistics:
            for name, work in refreshes.items():
                ms[f"{name} refresh"].append(elapsed_ms(work, x))
        for name, work in works.items():
            ms[name].append(elapsed_ms(work, x))
    cost = {name: median(values[2:]) if values else 0.0 for name, values in ms.items()}
    grid_ms, loop_ms = (cost[n] + cost[f"{n} refresh"] / REFRESH_EVERY for n in ("grid", "loop"))
    return {"method": method, "grid_ms": grid_ms, "loop_ms": loop_ms, "ratio": loop_ms / grid_ms}


def grid_memory(method: str, count: int, *, task: Task | None = None, batch: int = BATCH) -> int:
    """The most bytes that the CPU allocator holds while ``count`` configurations are trained."""
    task = pooled_digits() if task is None else task
    with profile(profile_memory=True) as profiled:
        train_grid(task, method, configurations(method, count), updates=2, points=[], batch=batch)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def wide(width: int, digits: Task) -> Task:
    """The same digits, and an autoencoder 64-``width``-``width``-64."""
    sizes, sigmoid = [64, width, width, 64], {"activation": "sigmoid", "output": "sigmoid"}
    return Task(
        f"width {width}",
        digits.data,
        digits.train,
        digits.test,
        lambda **options: MLP(sizes, **sigmoid, **options),
        digits.loss,
    )


def main() -> None:
    """Print what a grid of 64 spares by method, by minibatch and by width, its memory, and a whole run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["methods", "batches", "widths", "memory", "run"], default=None)
    parser.add_argument("--device", default="cpu", help="where, e.g. cuda (default: cpu)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.only == "memory" and device.type != "cpu":
        parser.error("memory is counted on the CPU alone")
    task = pooled_digits().to(device)
    print(f"{torch.get_num_threads()} threads")
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))

    def show(title: str, row: dict[str, Any]) -> None:
        print(
            f"{title:34} grid {row['grid_ms']:8.2f} ms, loop {row['loop_ms']:8.1f} ms: {row['ratio']:5.1f}×"
        )

    asked = lambda part: options.only in (None, part)  # noqa: E731
    for method in METHODS if asked("methods") else ():
        if METHODS[method].normalization is None and METHODS[method].tuned_as is None:
            show(f"{method}, batch {BATCH}", grid_times(method, task=task, rounds=options.rounds))
    for batch in (50, 100) if asked("batches") else ():
        show(f"acp, batch {batch}", grid_times("acp", task=task, batch=batch, rounds=options.rounds))
    for width in (64, 128, 256, 512, 1024) if asked("widths") else ():
        row = grid_times("acp", task=wide(width, task), count=8, rounds=max(3, options.rounds // 3))
        show(f"acp, 8 networks {width} wide", row)
    for count in (16, 32, 64, 128) if asked("memory") and device.type == "cpu" else ():
        print(f"acp, K = {count}: {grid_memory('acp', count) / 1e6:.1f} MB")
    for batch in (50, 100, 200) if asked("run") else ():
        plan = {"updates": 200, "points": [25, 50, 100, 200], "evaluate_on": 500, "batch": batch}
        train = lambda plan=plan: train_grid(task, "acp", configurations("acp", 64), **plan)  # noqa: E731
        ms = elapsed_ms(train, task.train[0])
        print(f"acp, 64 networks, 200 updates, batch {batch}: {ms / 1e3:.2f} s")


if __name__ == "__main__":
    main()
