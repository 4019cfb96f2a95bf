"""What an update costs, as a ratio to SGD: ``python -m sogrid.experiments.timing [OUT]``.

All methods run in one process, one after the other in each round, so that a busy or throttled machine
slows them alike; medians over rounds are compared. An update is everything a step does: clearing the
gradients, forward, backward, the optimizer, and its share of the refresh (one in 100 updates, timed on
its own). Data are random: values do not matter for time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.experiments.benchmarks import BATCH, REFRESH_EVERY
from sogrid.experiments.records import Record, provenance
from sogrid.losses import CrossEntropyAtLogits, Loss, Quadratic
from sogrid.networks import cifar10_classifier, mnist_autoencoder
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN, UpdatedBackprop

__all__ = ["time_optimizers"]

ROUNDS, WARM_UP = 30, 3

OPTIMIZERS: dict[str, Callable[[nn.Module, Loss], torch.optim.Optimizer]] = {
    "standard_sgd": lambda model, loss: torch.optim.SGD(model.parameters(), 1e-4),
    "adam": lambda model, loss: torch.optim.Adam(model.parameters(), 1e-6),
    "centered_gradient_descent": lambda model, loss: CenteredGradientDescent(model, 1e-4),
    "acp_fixedalpha": lambda model, loss: ACP(model, 1e-4, refresh_every=None),
    "acp": lambda model, loss: ACP(model, 1e-8, output_curvature="heuristic", refresh_every=None),
    "nnn2": lambda model, loss: NaturalNN(model, 1e-4, refresh_every=None),
    "kfac": lambda model, loss: KFAC(model, 1e-6, loss=loss, refresh_every=None),
    "jaco_update": lambda model, loss: UpdatedBackprop(model, 1e-4, loss=loss),
}
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Loss]] = {
    "mnist_autoencoder": (mnist_autoencoder, Quadratic()),
    "cifar10_classifier": (cifar10_classifier, CrossEntropyAtLogits()),
}


def time_optimizers(network: str, rounds: int = ROUNDS, device: str = "cpu") -> list[dict[str, Any]]:
    """Milliseconds per update of every optimizer on a benchmark's network, batch 200.

    Args:
        network: ``"mnist_autoencoder"`` or ``"cifar10_classifier"``.
        rounds: Each times one update, and one refresh, of every optimizer.
        device: Where.

    Returns:
        For each optimizer: ``update_ms`` (median, refresh share included), ``quartiles_ms`` of the step,
        ``refresh_ms`` (median of one refresh) and ``ratio`` to SGD's ``update_ms``.
    """
    build, loss = NETWORKS[network]
    contestants = {}
    for name, make in OPTIMIZERS.items():
        model = build(generator=torch.Generator().manual_seed(0)).to(device)
        contestants[name] = model, make(model, loss)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(BATCH, model[0].in_features, generator=generator).to(device)
    y = torch.randint(0, 10, (BATCH,), generator=generator).to(device)
    y = x if network == "mnist_autoencoder" else y
    steps, refreshes = ({name: [] for name in contestants} for _ in range(2))
    for i in range(WARM_UP + rounds):
        for name, (model, optimizer) in contestants.items():
            if getattr(optimizer, "uses_statistics", False):
                cost = _clock(lambda m=model, o=optimizer: o.refresh(lambda: loss(m(x), y)), x)
                refreshes[name].append(cost) if i >= WARM_UP else None
            cost = _clock(lambda m=model, o=optimizer: _update(m, o, loss, x, y), x)
            steps[name].append(cost) if i >= WARM_UP else None
    rows = []
    for name in contestants:
        refresh = median(refreshes[name]) if refreshes[name] else 0.0
        low, _, high = quantiles(steps[name], n=4)
        update = median(steps[name]) + refresh / REFRESH_EVERY
        row = {"optimizer": name, "update_ms": update, "quartiles_ms": [low, high], "refresh_ms": refresh}
        rows.append({**row, "ratio": update / (rows[0]["update_ms"] if rows else update)})
    return rows


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def _clock(work: Callable[[], None], x: Tensor) -> float:
    """Milliseconds, with the device drained before and after."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    start = perf_counter()
    work()
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return 1e3 * (perf_counter() - start)


def main(out: str = "out") -> None:
    """Time both networks, print the table, and add it to ``<out>/step_times.json``."""
    record = Record(f"{out}/step_times.json", "step_times", {"batch": BATCH, "refresh_every": REFRESH_EVERY})
    for network in NETWORKS:
        rows = time_optimizers(network)
        print(f"\n{network}: ms per update, ratio to SGD, ms per refresh")
        for row in rows:
            print("  {optimizer:26} {update_ms:8.2f} {ratio:6.2f} {refresh_ms:8.1f}".format_map(row))
        record.add({"network": network, "rounds": ROUNDS, "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main(*sys.argv[1:])
