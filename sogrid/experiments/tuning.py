"""Hyperparameter searches: the same budget and domain for every method (Thesis §4.1, §4.2).

A search is an Optuna study whose trials are short training runs; its criterion is the training risk after
a fixed number of updates (§4.1). A trial that diverges counts as the worst. Every trial has its own seed.
The study lives in Optuna's storage, so that a search that was stopped goes on, and several processes or
machines may share it; what is kept for good is its record.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import (
    BaseStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    fail_stale_trials,
)
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import Task
from sogrid.experiments.records import provenance
from sogrid.experiments.search import BiasedRandomSampler
from sogrid.experiments.training import run

__all__ = ["SAMPLERS", "Search", "SearchError", "best_so_far", "chosen", "open_storage", "search"]

HEARTBEAT = 60
POLL = 1.0
ATTEMPTS = 10


class SearchError(ValueError):
    """A study cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Search:
    """What a search does.

    Attributes:
        method: Key of :data:`~sogrid.experiments.benchmarks.METHODS`.
        domain: ``{hyperparameter: (low, high)}``, on a log scale.
        trials: How many runs; a grid needs a power of the number of hyperparameters.
        updates: Of each run; the criterion is the training loss after them.
        evaluate_on: The criterion is a mean over this many of the first training examples.
        sampler: Key of :data:`SAMPLERS`.
        seed: Of the proposals; trial t trains with seed 1000 · (seed + 1) + t.
    """

    method: str
    domain: dict[str, tuple[float, float]]
    trials: int
    updates: int
    evaluate_on: int
    sampler: str = "biased"
    seed: int = 0


def _grid(plan: Search, seed: int) -> optuna.samplers.BaseSampler:
    """Log-spaced values, ends included, as many for each hyperparameter."""
    points = round(plan.trials ** (1 / len(plan.domain)))
    if points ** len(plan.domain) != plan.trials:
        raise SearchError(f"a grid over {len(plan.domain)} hyperparameters cannot have {plan.trials} trials")
    steps = [i / max(points - 1, 1) for i in range(points)]
    values = {k: [low ** (1 - t) * high**t for t in steps] for k, (low, high) in plan.domain.items()}
    values = {k: [min(max(v, low), high) for v in values[k]] for k, (low, high) in plan.domain.items()}
    return optuna.samplers.GridSampler(values, seed=plan.seed)  # its own: it must deal the same cards again


SAMPLERS = {
    "grid": _grid,
    "random": lambda plan, seed: optuna.samplers.RandomSampler(seed % 2**32),
    "biased": lambda plan, seed: BiasedRandomSampler(seed),
}
"""Grid and random search are Optuna's own."""


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage at a database URL; the trial of a worker that died is tried again, once.

    Raises:
        SearchError: If the database cannot be reached.
    """
    heartbeat = {"heartbeat_interval": HEARTBEAT, "grace_period": 3 * HEARTBEAT}
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(ATTEMPTS):
        try:
            with _quiet():
                heartbeat["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback(max_retry=1)
                return RDBStorage(url, engine_kwargs=patience, **heartbeat)
        except Exception as error:  # of SQLAlchemy, of the driver, of Optuna's own checks
            if attempt < ATTEMPTS - 1 and re.search("already exists|unique constraint", str(error), re.I):
                time.sleep(0.2 * (attempt + 1))  # others are making the tables of a new database
                continue
            raise SearchError(f"the storage {_shown(url)} cannot be used: {_first_line(error)}") from error
    raise AssertionError("unreachable")


def _shown(url: str) -> str:
    """A database URL without its password."""
    return re.sub(r"//([^:/@]*):[^/]*@", r"//\1:***@", url)


def _first_line(error: BaseException) -> str:
    """What a database says; SQLAlchemy's statements and links come after it."""
    while isinstance(error, OptunaError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on each trial and on what it calls experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def search(
    task: Task,
    plan: Search,
    *,
    storage: BaseStorage,
    name: str,
    alone: bool = False,
    progress: str | None = None,
) -> dict[str, Any]:
    """Make, continue or join a search, and return it as a record keeps it.

    Args:
        task: The benchmark, its data on the device to use.
        plan: What to do.
        storage: Of :func:`open_storage`.
        name: Of the study in the storage.
        alone: Nobody else is at this study, so that trials which never ended are tried again at once.
        progress: Title of a progress bar over the trials, or ``None``.

    Returns:
        The plan's entries but for the number of trials; ``"trials"``, one list for each hyperparameter, the
        trials' ``loss`` (``None`` where it diverged), ``second`` (of training) and ``seed``, in the order
        they began; and ``"provenance"``.

    Raises:
        SearchError: If the study is of another plan, or its storage fails.
    """
    identity = {**asdict(plan), "task": task.name, "data": getattr(task.data, "checksum", None)}
    try:
        with _quiet():
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            _claim(study, identity)
            if alone:
                _try_again(study)
            _optimize(study, task, plan, progress)
            columns = _columns(study, plan)
    except (SQLAlchemyError, OptunaError) as error:
        raise SearchError(
            f"the storage of the study {name!r} failed: {_first_line(error)}. The trials it holds are kept: "
            "run the same again when it works"
        ) from error
    outcome = {k: v for k, v in asdict(plan).items() if k != "trials"}
    return {**outcome, "trials": columns, "provenance": provenance(task.train[0].device)}


def _claim(study: optuna.Study, identity: dict[str, Any]) -> None:
    """Note whose study this is, or refuse another's."""
    identity = json.loads(json.dumps(identity))
    found = study.user_attrs.get("plan")
    if found is None:
        study.set_user_attr("plan", identity)
        return
    for key, value in identity.items():
        if found.get(key) != value:
            raise SearchError(
                f"the study {study.study_name!r} has another {key}: {found.get(key)} instead of {value}; use "
                "another storage, or delete that study"
            )


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _try_again(study: optuna.Study) -> None:
    """Queue the trials that were cut off, with the hyperparameters that they had.

    Without this, a grid would lack them, and other searches be short of what takes long.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials()
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in repeated:
            RetryHeartbeatStaleTrialCallback()(study, trial)


def _optimize(study: optuna.Study, task: Task, plan: Search, progress: str | None) -> None:
    begun = []

    def objective(trial: Trial) -> float:
        if not begun:
            # Each process draws from a stream of its own: a sampler begins anew wherever it is made.
            study.sampler = SAMPLERS[plan.sampler](plan, 100_003 * plan.seed + trial.number)
        begun.append(trial.number)
        settings = {k: trial.suggest_float(k, *ends, log=True) for k, ends in plan.domain.items()}
        seed = 1000 * (plan.seed + 1) + trial.number
        options = {"updates": plan.updates, "points": [plan.updates], "evaluate_on": plan.evaluate_on}
        curve = run(task, plan.method, settings, seed=seed, progress=None, **options)
        trial.set_user_attr("second", (curve["second"] or [None])[-1])
        trial.set_user_attr("seed", seed)
        return curve["train"][-1] if curve["status"] == "finished" else math.inf

    study.sampler = SAMPLERS[plan.sampler](plan, 0)
    title = {"desc": progress, "disable": progress is None, "leave": False}
    with tqdm(total=plan.trials, initial=min(len(_finished(study)), plan.trials), **title) as bar:
        while (wanted := _missing(study, plan.trials)) is not None:
            if wanted:
                study.optimize(objective, n_trials=1)
                state = f"best={study.best_value:.3g}"
            else:
                time.sleep(POLL)
                fail_stale_trials(study)
                state = "other workers are at the last trials"
            bar.update(min(len(_finished(study)), plan.trials) - bar.n)
            bar.set_postfix_str(state)


def _missing(study: optuna.Study, count: int) -> bool | None:
    """Whether a trial is to be made; False if only others' are awaited, None if all is done.

    The first trials count, however long they take, so that all who share a study see the same ones.
    """
    trials = study.get_trials(deepcopy=False)
    done = [trial.number for trial in trials if trial.state == TrialState.COMPLETE]
    if len(done) < count:
        return True
    open_ = {trial.state for trial in trials[: done[count - 1]] if not trial.state.is_finished()}
    return TrialState.WAITING in open_ if open_ else None


def _columns(study: optuna.Study, plan: Search) -> dict[str, list]:
    """The finished trials, as many as were asked for: workers that share a study may make a few more."""
    trials = _finished(study)[: plan.trials]
    columns = {name: [_short(trial.params[name]) for trial in trials] for name in plan.domain}
    columns["loss"] = [_short(trial.value) if math.isfinite(trial.value) else None for trial in trials]
    return columns | {key: [trial.user_attrs[key] for trial in trials] for key in ("second", "seed")}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def chosen(found: dict[str, Any]) -> dict[str, float]:
    """The hyperparameters of a search's best trial.

    Args:
        found: As :func:`search` returns it.

    Raises:
        SearchError: If every trial diverged.
    """
    trials = found["trials"]
    losses = [math.inf if loss is None else loss for loss in trials["loss"]]
    best = min(range(len(losses)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise SearchError(f"every trial of {found['method']} diverged: search another domain")
    return {name: trials[name][best] for name in found["domain"]}


def best_so_far(found: dict[str, Any]) -> list[float]:
    """The best loss among a search's first 1, 2, … trials; infinite until one has finished."""
    return list(accumulate((math.inf if loss is None else loss for loss in found["trials"]["loss"]), min))
