"""The experiments of the thesis, as data, and the one call that runs them.

A template in ``book/experiments/`` names an experiment and a profile; the record it leaves is what the
book redraws the figure from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sogrid.experiments import data
from sogrid.experiments.benchmarks import BATCH, REFRESH_EVERY, Task, mnist_task
from sogrid.experiments.checkpoints import FOLDER, Checkpoint
from sogrid.experiments.records import Record
from sogrid.experiments.reference import thesis_values
from sogrid.experiments.training import evaluation_points, run

__all__ = ["EXPERIMENTS", "PROFILES", "Experiment", "Profile", "record_path", "reproduce"]


@dataclass(frozen=True)
class Profile:
    """How much of an experiment is run.

    Attributes:
        updates: Parameter updates of each run.
        full: On the full data set, or on a few of the embedded digits.
        evaluate_on: The training curve is a mean over this many of the first training examples.
    """

    updates: int
    full: bool
    evaluate_on: int


PROFILES = {
    "smoke": Profile(12, full=False, evaluate_on=400),
    "laptop": Profile(2_000, full=True, evaluate_on=10_000),
    "thesis": Profile(300_000, full=True, evaluate_on=60_000),
}
SMOKE_EXAMPLES = 400


@dataclass(frozen=True)
class Experiment:
    """One figure of the thesis.

    Attributes:
        figure: Key of :func:`~sogrid.experiments.reference.thesis_values`.
        dataset: ``"mnist"`` or ``"cifar10"``.
        task: The benchmark on that data.
        settings: Method → hyperparameters.
        chosen: How the hyperparameters were chosen.
    """

    figure: str
    dataset: str
    task: Callable[[data.Dataset], Task]
    settings: dict[str, dict[str, Any]]
    chosen: str


EXPERIMENTS = {
    "fig6_2_mnist_autoencoder": Experiment(
        "fig6_2",
        "mnist",
        mnist_task,
        {
            "acp_fixedalpha": {"lr": 0.5, "damping": 0.5, "output_curvature": 1.0, "scale": 32.0},
            "acp": {"lr": 0.15, "damping": 0.1, "scale": 64.0},
            "nnn2": {"lr": 0.3, "damping": 0.3, "scale": 32.0},
            "kfac": {"lr": 0.1, "damping": 0.1, "scale": 32.0},
            "bn": {"lr": 0.1, "scale": 4.0},
            "standard_sgd": {"lr": 0.1, "scale": 48.0},
        },
        chosen="by hand",
    ),
}


def record_path(out: str | Path, experiment: str, profile: str) -> Path:
    """Where :func:`reproduce` leaves its record."""
    return Path(out) / f"{experiment}.{profile}.json"


def reproduce(
    experiment: str,
    *,
    profile: str = "smoke",
    seed: int = 0,
    device: str = "cpu",
    out: str | Path = "out",
    progress: bool = True,
) -> dict[str, Any]:
    """Run an experiment, or what is missing of it, and return the content of its record.

    The record is ``<out>/<experiment>.<profile>.json``. It is written after each method, and methods
    that it already holds (same settings and seed) are not run again. A method under way leaves its state
    in ``<out>/.checkpoints/`` every half minute and at SIGINT or SIGTERM; called again after that, or
    after the process was killed, it goes on to the curve it would have given, bit for bit on the CPU.
    Other seeds may be run by other processes at the same time.

    Args:
        experiment: Key of :data:`EXPERIMENTS`.
        profile: Key of :data:`PROFILES`.
        seed: Of weights, data order and statistics.
        device: Where to train.
        out: Folder of the record.
        progress: Show a bar for each method.

    Raises:
        CheckpointError: If a checkpoint is damaged, of another run (settings, data, versions, code), or
            cannot be written, or another process is at the same run.
        DataError: If the profile needs the full data set and it is not there.
        Interrupted: By SIGINT or SIGTERM.
        RecordError: If the file is damaged, holds another experiment, or cannot be written.
        ValueError: For an unknown experiment or profile.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {list(EXPERIMENTS)}, got {experiment!r}")
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {list(PROFILES)}, got {profile!r}")
    plan, scale = EXPERIMENTS[experiment], PROFILES[profile]
    if scale.full:
        digits = data.load(plan.dataset, device=device)
        if "subset" in digits.variant:
            raise data.DataError(
                f"profile {profile!r} needs the full data set, not the {digits.variant}: set SOGRID_DATA or "
                f"run sogrid.experiments.data.load({plan.dataset!r}, source='download') once"
            )
    else:
        digits = data.load(plan.dataset, source="embedded", subset=SMOKE_EXAMPLES, device=device)
    settings = {
        "profile": profile,
        "updates": scale.updates,
        "batch": BATCH,
        "refresh_every": REFRESH_EVERY,
        "evaluate_on": scale.evaluate_on,
        "data": {"variant": digits.variant, "checksum": digits.checksum},
        "hyperparameters": plan.chosen,
    }
    path = record_path(out, experiment, profile)
    record = Record(path, experiment, settings)
    thesis_points = [int(u) - 1 for u in thesis_values(plan.figure)["curves"]["train_mse_by_update"]["x"]]
    points = evaluation_points(scale.updates, also=thesis_points)
    options = {"updates": scale.updates, "points": points, "evaluate_on": scale.evaluate_on}
    task = plan.task(digits)
    for number, (method, chosen) in enumerate(plan.settings.items(), start=1):
        place = path.parent / FOLDER / f"{path.stem}.{method}.seed{seed}.pt"
        if record.find(method=method, settings=chosen, seed=seed) is not None:
            continue
        with Checkpoint(place) as checkpoint:
            record = Record(path, experiment, settings)  # as it is now that no one else is at this run
            if record.find(method=method, settings=chosen, seed=seed) is None:
                title = f"{method} ({number} of {len(plan.settings)})" if progress else None
                run_options = {**options, "progress": title, "checkpoint": checkpoint}
                record.add(run(task, method, chosen, seed=seed, **run_options))
    return record.content
