"""The experiments of the thesis, as data, and the call that runs, resumes or completes one.

A template in ``book/experiments/`` names an experiment and a profile; the record it leaves is what the
book redraws the figure from. Learning curves (Figs. 5.1, 6.1 to 6.3) use the hyperparameters that
:func:`tune` found; Figs. 2.2 and 4.1 are searches themselves; one experiment of ours asks how wide the
range of good learning rates is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from optuna.storages import BaseStorage

from sogrid.experiments import data
from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, METHODS, REFRESH_EVERY, Task
from sogrid.experiments.checkpoints import FOLDER, Checkpoint
from sogrid.experiments.records import RESULTS, Record, RecordError
from sogrid.experiments.reference import thesis_values
from sogrid.experiments.training import evaluation_points, run
from sogrid.experiments.tuning import Search, SearchError, chosen, open_storage, search, sqlite_url

__all__ = [
    "COMPARISONS",
    "EXPERIMENTS",
    "PROFILES",
    "Curves",
    "Profile",
    "Searches",
    "Sweep",
    "record_path",
    "reproduce",
    "search_path",
    "tune",
]


@dataclass(frozen=True)
class Profile:
    """How much of an experiment is run.

    Attributes:
        updates: Of each run of a learning curve: ``{benchmark, or a figure of it: parameter updates}``.
        trials: Of each search of hyperparameters.
        trial_updates: Of each of its trials that is not stopped before: ``{benchmark: parameter updates}``.
        landscape: Random trials of Fig. 2.2, and their updates.
        searches: Searches by each sampler of Fig. 4.1, their trials, and the updates of a trial.
        sweep: Learning rates of a sweep, and the updates at each.
        full: On the full data set, or on a few of the embedded digits.
        evaluate_on: The training curve is a mean over this many of the first training examples.
        halvings: Of each search, see :class:`~sogrid.experiments.tuning.Search`. Three, so that trials of the
            autoencoder are first compared after 375 updates: after 187, SGD is still on the plateau of the
            mean image, and what is about to leave it looks worse than what is not.
        finalists: Of each search, likewise.
    """

    updates: dict[str, int]
    trials: int
    trial_updates: dict[str, int]
    landscape: tuple[int, int]
    searches: tuple[int, int, int]
    sweep: tuple[int, int] = (13, 300)
    full: bool = True
    evaluate_on: int = 10_000
    halvings: int = 0
    finalists: int = 0


AE, CIFAR, SMALL = "mnist_autoencoder", "cifar10_classifier", "mnist_small_autoencoder"
LAPTOP = Profile(
    {AE: 10_000, CIFAR: 20_000, "fig5_1": 5_000}, 60, {AE: 3_000, CIFAR: 5_000}, (200, 5_000), (20, 64, 300),
    halvings=3, finalists=3,
)  # fmt: skip
PROFILES = {
    "smoke": Profile(
        {AE: 5, CIFAR: 5}, 2, {AE: 4, CIFAR: 4}, (4, 4), (2, 4, 4), (2, 4), full=False, evaluate_on=400,
        halvings=1, finalists=1,
    ),
    "laptop": LAPTOP,
    "long": replace(LAPTOP, updates={AE: 100_000, CIFAR: 50_000}, sweep=(3, 5_000)),
    "thesis": Profile(
        {AE: 300_000, CIFAR: 50_000}, 100, {AE: 5_000, CIFAR: 5_000}, (200, 5_000), (100, 100, 5_000),
        evaluate_on=50_000, halvings=3, finalists=3,
    ),
}  # fmt: skip
SMOKE_EXAMPLES = 400
VARIANTS = 5
"""Variants of a method that have not been searched are trained for a fifth of its updates."""


@dataclass(frozen=True)
class Curves:
    """A figure of learning curves.

    Attributes:
        figure: Key of :func:`~sogrid.experiments.reference.thesis_values`.
        benchmark: Key of :data:`~sogrid.experiments.benchmarks.BENCHMARKS`.
        methods: Keys of :data:`~sogrid.experiments.benchmarks.METHODS`; a variant that takes all its
            hyperparameters from another is trained for a fifth of the updates.
    """

    figure: str
    benchmark: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Searches:
    """A figure of hyperparameter searches with SGD.

    Attributes:
        figure: Its number in the thesis.
        benchmark: Key of :data:`~sogrid.experiments.benchmarks.BENCHMARKS`.
        domain: Of the searches.
        samplers: Keys of :data:`~sogrid.experiments.tuning.SAMPLERS`.
        plan: From a profile: searches by each sampler, trials of each, updates of a trial.
    """

    figure: str
    benchmark: str
    domain: dict[str, tuple[float, float]]
    samplers: tuple[str, ...]
    plan: Callable[[Profile], tuple[int, int, int]]


@dataclass(frozen=True)
class Sweep:
    """Short runs at log-spaced learning rates, everything else as the search chose it.

    Attributes:
        benchmark: Key of :data:`~sogrid.experiments.benchmarks.BENCHMARKS`.
        methods: Keys of :data:`~sogrid.experiments.benchmarks.METHODS`.
        rates: The smallest and the largest.
    """

    benchmark: str
    methods: tuple[str, ...]
    rates: tuple[float, float]


LANDSCAPE = BENCHMARKS[SMALL].domain
EXPERIMENTS: dict[str, Curves | Searches | Sweep] = {
    "fig2_2_learning_rate_and_scale": Searches(
        "fig2_2", SMALL, LANDSCAPE, ("random",), lambda profile: (1, *profile.landscape)
    ),
    "fig4_1_three_searches": Searches(
        "fig4_1", SMALL, LANDSCAPE, ("grid", "random", "biased"), lambda profile: profile.searches
    ),
    "fig5_1_updated_backpropagation": Curves(
        "fig5_1",
        AE,
        (
            *("standard_sgd", "jaco_update", "jaco_update_hessian", "jaco_update_without"),
            "jaco_update_bounded",
        ),
    ),
    "fig6_1_centering": Curves(
        "fig6_1", AE, ("standard_sgd", "mean_only_bn", "centered_gradient_descent", "acp_fixedalpha")
    ),
    "fig6_2_mnist_autoencoder": Curves(
        "fig6_2", AE, ("acp_fixedalpha", "acp", "nnn2", "kfac", "bn", "standard_sgd")
    ),
    "fig6_3_cifar10": Curves(
        "fig6_3", CIFAR, ("acp_fixedalpha", "acp", "nnn2", "kfac", "kfac_nat", "bn", "standard_sgd")
    ),
    "learning_rates": Sweep(
        AE,
        (
            *("acp_fixedalpha", "nnn2", "kfac", "jaco_update"),
            *("acp_bounded", "nnn2_bounded", "kfac_bounded", "jaco_update_bounded"),
        ),
        (0.1, 1000.0),
    ),
}
COMPARISONS = {
    "low_rank": Curves("fig6_3", CIFAR, ("acp_low_rank", "nnn2_low_rank", "kfac_low_rank")),
}
"""Learning curves that no figure of the thesis has, for the page on costs."""


def record_path(out: str | Path, experiment: str, profile: str) -> Path:
    """Where :func:`reproduce` leaves its record."""
    return Path(out) / f"{experiment}.{profile}.json"


def search_path(out: str | Path, benchmark: str, profile: str) -> Path:
    """Where :func:`tune` leaves its record."""
    return record_path(out, f"search_{benchmark}", profile)


@dataclass(frozen=True)
class _Job:
    """One run of a record: how it is recognised there, and how it is made."""

    key: dict[str, Any]
    place: str
    make: Callable[[str | None, Checkpoint | None], dict[str, Any]]
    shared: bool = False  # several processes may be at it
    varied: tuple[str, ...] = ()  # hyperparameters in which runs of a record differ by design

    def kept(self, run: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters that all runs of a method should share."""
        return {name: value for name, value in run.get("settings", {}).items() if name not in self.varied}


def reproduce(
    experiment: str,
    *,
    profile: str = "smoke",
    seed: int = 0,
    device: str = "cpu",
    out: str | Path = "out",
    methods: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Run an experiment, or what is missing of it, and return the content of its record.

    The record is ``<out>/<experiment>.<profile>.json``. It is written after each run, and runs that it
    already holds (same method, settings and seed) are not made again; nor are those that another figure's
    record in ``out`` holds of the same benchmark at the same scale. A run under way leaves its state
    in ``<out>/.checkpoints/`` every half minute and at SIGINT or SIGTERM; called again after that, or
    after the process was killed, it goes on to the curve it would have given, bit for bit on the CPU.
    A search (Figs. 2.2 and 4.1) keeps its trials, makes the one under way anew, and draws others than it
    would have after that.
    Other seeds or methods may be run by other processes at the same time.

    Args:
        experiment: Key of :data:`EXPERIMENTS` or :data:`COMPARISONS`.
        profile: Key of :data:`PROFILES`.
        seed: Of weights, data order and statistics; of searches, the first of their seeds.
        device: Where to train.
        out: Folder of the record.
        methods: Only these of the figure's methods (or samplers); default all.
        progress: Show a bar for each run.

    Raises:
        CheckpointError: If a checkpoint is damaged, of another run (settings, data, versions, code), or
            cannot be written, or another process is at the same run.
        DataError: If the profile needs the full data set and it is not there.
        Interrupted: By SIGINT or SIGTERM.
        RecordError: If the file is damaged, holds another experiment or a method's runs with other
            hyperparameters, or cannot be written.
        SearchError: If there are no hyperparameters for a method, or a study is of another plan.
        ValueError: For an unknown experiment, profile or method, and a seed out of range.
    """
    plans = EXPERIMENTS | COMPARISONS
    _require(experiment=(experiment, plans), profile=(profile, PROFILES))
    plan = plans[experiment]
    known = plan.samplers if isinstance(plan, Searches) else plan.methods
    for method in methods:
        _require(method=(method, known))
    if not 0 <= seed < 2**31:  # torch and NumPy are given thousands of times that
        raise ValueError(f"the seed must be from 0 to {2**31 - 1}, got {seed}")
    task = _task(plan.benchmark, profile, device)
    path = record_path(out, experiment, profile)
    wanted = [m for m in known if m in methods or not methods]
    if isinstance(plan, Searches):
        settings, jobs = _searches(plan, task, profile, seed, wanted, path)
    else:
        make = _curves if isinstance(plan, Curves) else _sweep
        settings, jobs = make(plan, task, profile, seed, wanted, Path(out))
    return _complete(path, experiment, settings, jobs, progress)


def tune(
    benchmark: str,
    *,
    profile: str = "smoke",
    device: str = "cpu",
    out: str | Path = "out",
    methods: Sequence[str] = (),
    storage: str | None = None,
    begin_with: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Search the hyperparameters of a benchmark's methods, and return the content of the record.

    Every method gets the same number of trials by biased random search, over the same domain; what they cost
    is kept low by successive halving, and the best few are run again with other seeds. The record is
    ``<out>/search_<benchmark>.<profile>.json``; :func:`reproduce` with the same ``out`` uses it.

    Args:
        benchmark: ``"mnist_autoencoder"`` or ``"cifar10_classifier"``.
        profile: Key of :data:`PROFILES`.
        device: Where to train.
        out: Folder of the record.
        methods: Only these; default all that the benchmark's figures compare.
        storage: Database URL of the studies, for several machines ``postgresql+psycopg://…``; default an
            SQLite file beside the record.
        begin_with: Record of an earlier search: what it chose for a method, or for what that is a variant of,
            is among the method's trials; hyperparameters that it lacks are drawn.
        progress: Show a bar for each method.

    Raises:
        CheckpointError: If another process is at the same search, with an SQLite file.
        DataError: If the profile needs the full data set and it is not there.
        RecordError: If the file is damaged, holds another experiment, or cannot be written.
        SearchError: If the storage cannot be used, or holds a study of another plan; or if the record to
            begin with is of something else, or has a setting outside the domain.
        ValueError: For an unknown benchmark, profile or method.
    """
    known = tuned_methods()
    _require(benchmark=(benchmark, known), profile=(profile, PROFILES))
    for method in methods:
        _require(method=(method, known[benchmark]))
    scale, domain = PROFILES[profile], BENCHMARKS[benchmark].domain
    task = _task(benchmark, profile, device)
    path, storage = search_path(out, benchmark, profile), storage or None
    settings = {
        **_common(task, profile),
        "trials": scale.trials,
        "updates": scale.trial_updates[benchmark],
        "halvings": scale.halvings,
        "finalists": scale.finalists,
        "domain": {key: list(ends) for key, ends in domain.items()},
    }
    earlier = None if begin_with is None else Record.read(begin_with)
    if earlier is not None and earlier["experiment"] != f"search_{benchmark}":
        raise SearchError(f"{begin_with} is no record of a search on {benchmark}, to begin with")
    plans = []
    for method in (m for m in known[benchmark] if m in methods or not methods):
        own = {key: ends for key, ends in domain.items() if key in METHODS[method].searched}
        size = (scale.trials, scale.trial_updates[benchmark], scale.evaluate_on)
        first = None if earlier is None else _first(earlier, method, own)
        common = {"halvings": scale.halvings, "finalists": scale.finalists, "first": first}
        plans.append(Search(method, own, *size, **common))
    jobs = _search_jobs(plans, task, path, storage)
    return _complete(path, f"search_{benchmark}", settings, jobs, progress)


def _first(
    found: dict[str, Any], method: str, domain: dict[str, tuple[float, float]]
) -> dict[str, float] | None:
    """What a record of searches has chosen for a method, if it has, of the hyperparameters in a domain."""
    try:
        best = {key: value for key, value in _chosen(found, method).items() if key in domain}
    except SearchError:  # it has not, or all diverged
        return None
    for key, value in best.items():
        low, high = domain[key]
        if not low <= value <= high:
            raise SearchError(
                f"the search of {method} cannot begin with {key} = {value:g}, outside its domain "
                f"({low:g} to {high:g}): begin with another record, or without one"
            )
    return best


def tuned_methods() -> dict[str, list[str]]:
    """Benchmark → the methods that its figures compare and that have hyperparameters of their own."""
    found: dict[str, list[str]] = {}
    for plan in (EXPERIMENTS | COMPARISONS).values():
        for method in () if isinstance(plan, Searches) else plan.methods:
            names = found.setdefault(plan.benchmark, [])
            if method not in names and METHODS[method].searched:
                names.append(method)
    return found


def _require(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


def _task(benchmark: str, profile: str, device: str) -> Task:
    """The benchmark on the data that the profile needs."""
    plan = BENCHMARKS[benchmark]
    if not PROFILES[profile].full:
        digits = data.load("mnist", source="embedded", subset=SMOKE_EXAMPLES, device=device)
        return plan.task(digits if plan.dataset == "mnist" else as_cifar10(digits))
    return plan.task(data.load_whole(plan.dataset, device=device))


def as_cifar10(digits: data.Dataset) -> data.Dataset:
    """Digits in the format of CIFAR-10, none of which may be shipped: framed, and three times the same."""

    def colour(images: torch.Tensor) -> torch.Tensor:
        framed = torch.nn.functional.pad(images.unflatten(1, (28, 28)), (2, 2, 2, 2))
        return framed.flatten(1).repeat(1, 3)

    sets = {key: (colour(x), y) for key, (x, y) in (("train", digits.train), ("test", digits.test))}
    return replace(digits, variant=f"{digits.variant}, in the format of CIFAR-10", **sets)


def _common(task: Task, profile: str) -> dict[str, Any]:
    """Settings that every record has."""
    return {
        "profile": profile,
        "benchmark": task.name,
        "batch": BATCH,
        "refresh_every": REFRESH_EVERY,
        "evaluate_on": PROFILES[profile].evaluate_on,
        "data": {"variant": task.data.variant, "checksum": task.data.checksum},
    }


def _curves(
    plan: Curves, task: Task, profile: str, seed: int, methods: Sequence[str], out: Path
) -> tuple[dict[str, Any], list[_Job]]:
    scale, found = PROFILES[profile], _tuned(plan.benchmark, profile, out, plan.methods)
    updates = scale.updates.get(plan.figure, scale.updates[plan.benchmark])
    points, jobs = _points(plan.benchmark, updates), []
    for method in methods:
        last = updates if METHODS[method].searched else updates // VARIANTS
        options = {"updates": last, "points": [point for point in points if point <= last]}
        options |= {"evaluate_on": scale.evaluate_on, "seed": seed}
        best = _chosen(found, method, out)
        make = partial(_train, task, method, best, options)
        key = {"method": method, "settings": best, "seed": seed}
        jobs.append(_Job(key, f"{method}.seed{seed}", make))
    how = f"by biased random search ({_budget(**found['settings'])})"
    return {**_common(task, profile), "updates": updates, "hyperparameters": how}, jobs


def _budget(trials: int, updates: int, halvings: int = 0, finalists: int = 0, **others: Any) -> str:
    """What each method's search had, in words."""
    length = f"{'up to ' * bool(halvings)}{updates:,} updates for each method"
    return f"{trials} trials of {length}" + f", the best {finalists} run again" * bool(finalists)


def _sweep(
    plan: Sweep, task: Task, profile: str, seed: int, methods: Sequence[str], out: Path
) -> tuple[dict[str, Any], list[_Job]]:
    count, updates = PROFILES[profile].sweep
    found, jobs, (low, high) = _tuned(plan.benchmark, profile, out, plan.methods), [], plan.rates
    options = {"updates": updates, "points": [updates], "seed": seed}  # an evaluation costs many updates
    options["evaluate_on"] = PROFILES[profile].evaluate_on
    for method in methods:
        for i in range(count):
            lr = float(f"{low * (high / low) ** (i / (count - 1)):.6g}")
            settings = {**_chosen(found, method, out), "lr": lr}
            make = partial(_train, task, method, settings, options)
            key = {"method": method, "settings": settings, "seed": seed}
            jobs.append(_Job(key, f"{method}.lr{lr}.seed{seed}", make, varied=("lr",)))
    how = "by biased random search, except the learning rate"
    return {**_common(task, profile), "updates": updates, "hyperparameters": how}, jobs


def _chosen(found: dict[str, Any], method: str, out: str | Path = "out") -> dict[str, float]:
    """The hyperparameters that a record of searches has for a method, or for what it is a variant of.

    What is missing is to be searched in ``out``.
    """
    entry, settings = METHODS[method], found["settings"]
    best = next((chosen(run) for run in found["runs"] if run["method"] == method), None)
    if best is None and entry.tuned_as is not None:
        best = _chosen(found, entry.tuned_as, out)
    if best is None:
        raise SearchError(
            f"the hyperparameters of {method} on {settings['benchmark']} have not been searched: run "
            f"python -m sogrid search {settings['benchmark']} --profile {settings['profile']} --out {out} "
            f"--methods {method} first"
        )
    return best if entry.lr is None else {**best, "lr": entry.lr}


def _train(task: Task, method: str, settings: dict, options: dict, title: str | None, checkpoint: Checkpoint):
    return run(task, method, settings, progress=title, checkpoint=checkpoint, **options)


def _points(benchmark: str, updates: int) -> list[int]:
    """When curves are evaluated: the same for a benchmark and a length, with the thesis's points."""
    theirs = set()
    for plan in EXPERIMENTS.values():
        if isinstance(plan, Curves) and plan.benchmark == benchmark:
            curves = thesis_values(plan.figure)["curves"].items()
            axes = [curve["x"] for name, curve in curves if name.endswith("by_update")]
            # The axes of Figs. 6.1 and 6.2 begin at update 1.
            theirs |= {int(u) - (u % 10 == 1) for axis in axes for u in axis}
    return evaluation_points(updates, also={*theirs, updates // VARIANTS})


def _tuned(benchmark: str, profile: str, out: Path, methods: Sequence[str]) -> dict[str, Any]:
    """The record of the searches: the user's own of this profile, or at laptop scale, or the book's.

    The book has a second one, of shorter searches, beside its own: for figures of which some methods have
    only that.
    """
    places = [search_path(out, benchmark, profile), search_path(out, benchmark, "laptop")]
    places.append(search_path(RESULTS, benchmark, "laptop"))
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise SearchError(
            f"the hyperparameters of {benchmark} have not been searched: "
            f"run python -m sogrid search {benchmark} --profile {profile} --out {out}"
        )
    found, short = Record.read(place), search_path(place.parent, benchmark, "short")
    searched = {run["method"] for run in found["runs"]}
    whole = all({method, METHODS[method].tuned_as} & searched for method in methods)
    return found if whole or not short.exists() else Record.read(short)


def _searches(
    plan: Searches, task: Task, profile: str, seed: int, samplers: Sequence[str], path: Path
) -> tuple[dict[str, Any], list[_Job]]:
    searches, trials, updates = plan.plan(PROFILES[profile])
    settings = {**_common(task, profile), "trials": trials, "updates": updates, "searches": searches}
    plans = [
        Search("standard_sgd", plan.domain, trials, updates, PROFILES[profile].evaluate_on, sampler, seed + k)
        for k in range(searches)
        for sampler in samplers
    ]
    return settings, _search_jobs(plans, task, path, None)


def _search_jobs(plans: list[Search], task: Task, path: Path, url: str | None) -> list[_Job]:
    """Searches in one storage, by default an SQLite file beside the record; in another, workers may join."""

    @cache
    def storage() -> BaseStorage:
        if url is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        return open_storage(url or sqlite_url(path.with_suffix(".sqlite3")))

    def make(plan: Search, name: str, title: str | None, checkpoint: Checkpoint | None) -> dict[str, Any]:
        return search(task, plan, storage=storage(), name=name, alone=url is None, progress=title)

    jobs = []
    for plan in plans:
        place = f"{plan.method}.{plan.sampler}{plan.seed}"
        key = {"method": plan.method, "sampler": plan.sampler, "seed": plan.seed}
        jobs.append(_Job(key, place, partial(make, plan, f"{path.stem}.{place}"), shared=url is not None))
    return jobs


def _complete(
    path: Path, experiment: str, settings: dict[str, Any], jobs: list[_Job], progress: bool
) -> dict[str, Any]:
    """Make the runs that the record lacks, or take them from another figure's."""
    record = Record(path, experiment, settings)
    for job in jobs:
        _require_same(record, job)
    for number, job in enumerate(jobs, start=1):
        if record.find(**job.key) is not None:
            continue
        place = Checkpoint(path.parent / FOLDER / f"{path.stem}.{job.place}.pt")
        with nullcontext() if job.shared else place as checkpoint:
            record = Record(path, experiment, settings)  # as it is now that no one else is at this run
            if record.find(**job.key) is None:
                title = f"{job.place} ({number} of {len(jobs)})" if progress else None
                record.add(_elsewhere(path, settings, job.key) or job.make(title, checkpoint), once=job.key)
    return record.content


def _require_same(record: Record, job: _Job) -> None:
    """A search made again may choose anew; a record has one choice for each method.

    Raises:
        RecordError: If the record has the method's runs with another.
    """
    method, ours = job.key["method"], job.kept(job.key)
    for theirs in (job.kept(found) for found in record.content["runs"] if found["method"] == method):
        if theirs != ours:
            raise RecordError(
                f"{record.path} has runs of {method} with {theirs}, and its search has chosen {ours} since: "
                f"choose another folder, or move the record away"
            )


def _elsewhere(path: Path, settings: dict[str, Any], key: dict[str, Any]) -> dict[str, Any] | None:
    """The same run in the record of another figure, made at the same scale."""
    for other in sorted(path.parent.glob("fig*.json")):
        with suppress(RecordError):
            content = Record.read(other)
            if other != path and content["settings"] == settings:
                found = Record(other, content["experiment"], settings).find(**key)
                if found is not None:
                    return found
    return None
