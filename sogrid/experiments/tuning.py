"""Hyperparameter searches: the same budget and domain for every method (Thesis §4.1, §4.2).

A search is an Optuna study whose trials are short training runs; its criterion is the training risk after
a fixed number of updates (§4.1). A trial that diverges counts as the worst. Every trial has its own seed.

A search looks far at the price of one that looks near, by successive halving: on its way each trial is
compared, at the same update, with all that came as far, and goes on only if it is in the better half. What
it had reached when it was stopped is its cost to Algorithm 1: a pessimistic one, so that trials rank first
by how far they got. The setting that is chosen is the best of a few finalists, run again with other seeds.

A search for a target asks how soon: a trial ends where its loss is that, and its cost is the updates until
then. One that never gets there costs more than all its updates, by as much as its loss is above the target.

The study lives in Optuna's storage, so that a search that was stopped goes on, and several processes or
machines may share it; what is kept for good is its record.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote, unquote

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, TrialPruned, UpdateFinishedTrialError
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.storages import (
    BaseStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
    fail_stale_trials,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import METHODS, Method, Task
from sogrid.experiments.records import provenance
from sogrid.experiments.search import BiasedRandomSampler
from sogrid.experiments.training import evaluation_points, run, updates_to

__all__ = [
    "SAMPLERS",
    "Search",
    "SearchError",
    "best_so_far",
    "chosen",
    "open_storage",
    "search",
    "sqlite_url",
    "updates_spent",
]

HEARTBEAT = 60
POLL = 1.0
ATTEMPTS = 10
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
RUNS_AGAIN = 2
"""More runs of each finalist."""


class SearchError(ValueError):
    """A study cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Search:
    """What a search does.

    Attributes:
        method: Key of :data:`~sogrid.experiments.benchmarks.METHODS`, or of another table.
        domain: ``{hyperparameter: (low, high)}``, on a log scale.
        trials: How many runs; a grid needs a power of the number of hyperparameters.
        updates: Of each run; the criterion is the training loss after them.
        evaluate_on: The criterion is a mean over this many of the first training examples.
        sampler: Key of :data:`SAMPLERS`.
        seed: Of the proposals; trial t trains with seed 1000 · (seed + 1) + t.
        halvings: How often a trial is compared on its way, after updates / 2ᵏ for k = ``halvings``, …, 2, 1.
        finalists: How many of the best, those that got farthest first, are run twice more, with seeds of
            their own.
        target: A training loss, if the criterion is the updates until then.
        first: A setting that is tried before what the sampler proposes, as an earlier search may know one.
    """

    method: str
    domain: dict[str, tuple[float, float]]
    trials: int
    updates: int
    evaluate_on: int
    sampler: str = "biased"
    seed: int = 0
    halvings: int = 0
    finalists: int = 0
    target: float | None = None
    first: dict[str, float] | None = None

    @property
    def rungs(self) -> list[int]:
        """The updates after which a trial may be stopped."""
        return [self.updates // 2**self.halvings * 2**k for k in range(self.halvings)]


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
                heartbeat["heartbeat_stale_trial_callback"] = partial(_retry, max_retry=1)
                return RDBStorage(url, engine_kwargs=patience, **heartbeat)
        except Exception as error:  # of SQLAlchemy, of the driver, of Optuna's own checks
            if attempt < ATTEMPTS - 1 and re.search("already exists|unique constraint", str(error), re.I):
                time.sleep(0.2 * (attempt + 1))  # others are making the tables of a new database
                continue
            raise SearchError(f"the storage {_shown(url)} cannot be used: {_first_line(error)}") from error
    raise AssertionError("unreachable")


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, whatever is in its name."""
    return f"sqlite:///{quote(str(path), safe='/ :')}"


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
    methods: Mapping[str, Method] = METHODS,
) -> dict[str, Any]:
    """Make, continue or join a search, and return it as a record keeps it.

    Args:
        task: The benchmark, its data on the device to use.
        plan: What to do.
        storage: Of :func:`open_storage`.
        name: Of the study in the storage.
        alone: Nobody else is at this study, so that trials which never ended are tried again at once.
        progress: Title of a progress bar over the trials, or ``None``.
        methods: The table that has the plan's method.

    Returns:
        The plan's entries but for the number of trials; ``"trials"``, one list for each hyperparameter, the
        trials' ``loss`` (with a target, the cost in updates; ``None`` where it diverged), ``second`` (of
        training) and ``seed``, in the order they began, with halvings also the ``update`` at which each
        ended; ``"finals"`` if there are any: the number of each finalist among the trials (``trial``), the
        best first, and the ``loss`` of its other runs; and ``"provenance"``, with the commits of trials that
        were made before it.

    Raises:
        SearchError: If the plan cannot be carried out, the study is of another one, or its storage fails.
    """
    _check(plan)
    made_by = provenance(task.train[0].device)
    enter = partial(_enter, storage, task, plan, alone)
    blind = replace(task, test=tuple(part[:1] for part in task.test))  # a search does not look there
    found = {key: value for key, value in asdict(plan).items() if key != "trials" and value is not None}
    fit = lambda settings, **options: run(blind, plan.method, settings, methods=methods, **options)  # noqa: E731
    try:
        with _quiet():
            study = enter(name, plan.rungs)
            if plan.first and len(_finished(study)) < plan.trials:
                study.enqueue_trial(plan.first, skip_if_exists=True)
            sampler = partial(SAMPLERS[plan.sampler], plan)
            objective = partial(_trial, fit, plan, made_by["commit"])
            _optimize(study, plan.trials, sampler, objective, 100_003 * plan.seed, progress)
            found["trials"] = _columns(study, plan)
            if plan.first and not _tried(found, plan.first):
                del found["first"]
            if best := _ranked(found)[: plan.finalists]:
                again = lambda i: enter(f"{name}.again{i}", setting=_settings(found, i))  # noqa: E731
                found["finals"] = _finals(again, fit, plan, found, best, progress)
    except (SQLAlchemyError, OptunaError) as error:
        raise SearchError(
            f"the storage of the study {name!r} failed: {_first_line(error)}. The trials it holds are kept: "
            "run the same again when it works"
        ) from error
    if others := _commits(study, plan) - {made_by["commit"]}:
        made_by["trials_also_of"] = sorted(others)
    return {**found, "provenance": made_by}


def _check(plan: Search) -> None:
    """Refuse what would end after hours, or in something else than was meant."""
    for key, least in (("trials", 1), ("updates", 1), ("halvings", 0), ("finalists", 0), ("seed", 0)):
        value = getattr(plan, key)
        if not isinstance(value, int) or value < least:
            raise SearchError(f"a search needs {key} to be a whole number from {least} on, got {value!r}")
    if not plan.domain:
        raise SearchError("a search needs a domain: {hyperparameter: (low, high)}")
    for key, (low, high) in plan.domain.items():
        if not 0 < low <= high < math.inf:
            raise SearchError(f"the domain of {key} must be positive, its lower end first, got {low}, {high}")
    if plan.sampler not in SAMPLERS:
        raise SearchError(f"sampler must be one of {', '.join(SAMPLERS)}, got {plan.sampler!r}")
    if plan.updates < 2**plan.halvings:
        raise SearchError(f"{plan.updates} updates cannot be halved {plan.halvings} times")
    if plan.target is not None and not plan.target > 0:
        raise SearchError(f"the target must be a positive loss, got {plan.target}")
    for key, value in (plan.first or {}).items():
        low, high = plan.domain.get(key, (math.inf, math.inf))
        if not low <= value <= high:
            raise SearchError(f"first has {key}={value}, which is not in the domain {plan.domain}")


def _enter(
    storage: BaseStorage,
    task: Task,
    plan: Search,
    alone: bool,
    name: str,
    rungs: list[int] | None = None,
    setting: dict[str, float] | None = None,
) -> optuna.Study:
    """A study of the plan or a setting, new or as it was left; with rungs, the worse half ends at each."""
    pruner = SuccessiveHalvingPruner(rungs[0], 2) if rungs else NopPruner()
    study = optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)
    free = {"first", "finalists", *(["trials"] if plan.sampler != "grid" else [])}  # it may go on with more
    own = {key: value for key, value in asdict(plan).items() if key not in free}
    if setting is not None:
        own["setting"] = setting
    _claim(study, storage, {**own, "task": task.name, "data": getattr(task.data, "checksum", None)})
    if alone:
        _try_again(study)
    return study


def _claim(study: optuna.Study, storage: BaseStorage, identity: dict[str, Any]) -> None:
    """Note whose study this is, or refuse another's."""
    identity = json.loads(json.dumps(identity))
    begun = bool(study.get_trials(deepcopy=False))  # asked first: whoever makes one has claimed it before
    found = study.user_attrs.get("plan")
    if found is None and (begun or study.direction != StudyDirection.MINIMIZE):
        raise SearchError(f"the study {study.study_name!r} is of something else; use another storage")
    if found is None:
        study.set_user_attr("plan", identity)
        return
    for key, value in identity.items():
        if found.get(key) != value:
            file = re.fullmatch("sqlite:///(.*)", unquote(getattr(storage, "url", "")))
            way_out = f"move {file[1]} away" if file else "use another storage"
            raise SearchError(
                f"the study {study.study_name!r} has another {key}: {found.get(key)} instead of {value}; "
                f"{way_out}, or delete that study and those that its name begins"
            )


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def _retry(study: optuna.Study, trial: FrozenTrial, max_retry: int | None = None) -> None:
    """Queue a trial's hyperparameters once more; it is compared anew, also where the old one has been.

    What the old one came to there is still among what others are compared with.
    """
    trial, attributes = copy(trial), trial.system_attrs.items()
    trial.system_attrs = {k: v for k, v in attributes if not k.startswith("completed_rung")}
    RetryHeartbeatStaleTrialCallback(max_retry)(study, trial)


def _try_again(study: optuna.Study) -> None:
    """Queue the trials that were cut off, with the hyperparameters that they had.

    Without this, a grid would lack them, and other searches be short of what takes long.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    _queue_failed(study)


def _queue_failed(study: optuna.Study, numbers: Container[int] | None = None) -> None:
    """Queue the trials that failed, or those of some numbers, unless they have been."""
    trials = study.get_trials()
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    for trial in trials:
        wanted = numbers is None or trial.number in numbers
        if wanted and trial.state == TrialState.FAIL and trial.number not in repeated:
            _retry(study, trial)


def _optimize(
    study: optuna.Study,
    count: int,
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    objective: Callable[[Trial], float],
    seed: int,
    progress: str | None,
) -> None:
    begun = []

    def first(trial: Trial) -> float:
        if not begun:
            # Each process draws from a stream of its own: a sampler begins anew wherever it is made.
            study.sampler = sampler(seed + trial.number)
        begun.append(trial.number)
        return objective(trial)

    study.sampler = sampler(0)
    title = {"desc": progress, "disable": progress is None, "leave": False}
    with tqdm(total=count, initial=min(len(_finished(study)), count), **title) as bar:
        while (wanted := _missing(study, count)) is not None:
            if wanted:
                try:
                    study.optimize(first, n_trials=1)
                except BaseException as error:
                    _queue_failed(study, begun[-1:])
                    if not _given_up(error):
                        raise
                state = f"best={min((trial.value for trial in _finished(study)), default=math.nan):.3g}"
            else:
                time.sleep(POLL)
                fail_stale_trials(study)
                state = "other workers are at the last trials"
            bar.update(min(len(_finished(study)), count) - bar.n)
            bar.set_postfix_str(state)


def _given_up(error: BaseException) -> bool:
    """Whether a trial could not be told because others took its worker for dead, while it was asleep."""
    return isinstance(error, UpdateFinishedTrialError) or str(error).startswith("Cannot tell a FAIL trial")


def _trial(fit: Callable, plan: Search, commit: str, trial: Trial) -> float:
    trial.set_user_attr("commit", commit)
    settings = {k: trial.suggest_float(k, *ends, log=True) for k, ends in plan.domain.items()}
    return _cost(fit, plan, settings, trial, 1000 * (plan.seed + 1) + trial.number, plan.rungs)


def _cost(
    fit: Callable, plan: Search, settings: dict[str, float], trial: Trial, seed: int, rungs: list[int]
) -> float:
    """The criterion; a trial that was stopped on its way is of what it reported last."""
    target = -math.inf if plan.target is None else plan.target
    if plan.target is None:
        points, so_far = [*rungs, plan.updates], lambda loss: loss
    else:
        points = evaluation_points(plan.updates, per_decade=16, also=rungs)[1:]
        so_far = lambda loss: plan.updates * loss / target  # noqa: E731

    def go_on(update: int, loss: float) -> bool:
        if loss <= target:
            return False
        if update not in rungs:
            return True
        trial.report(so_far(loss), update)
        return not trial.should_prune()

    options = {"updates": plan.updates, "points": points, "evaluate_on": plan.evaluate_on}
    curve = fit(settings, seed=seed, progress=None, go_on=go_on, **options)
    trial.set_user_attr("second", (curve["second"] or [None])[-1])
    trial.set_user_attr("seed", seed)
    if rungs:
        trial.set_user_attr("update", (curve["update"] or [None])[-1])
    if curve["status"] == "diverged":
        return math.inf
    if curve["train"][-1] <= target:
        cost = updates_to(curve["update"], curve["train"], target)
        if rungs and curve["update"][-1] <= rungs[-1]:  # it is the better half where it will not be seen
            trial.report(cost, rungs[-1])
            trial.should_prune()
        return cost
    if curve["status"] == "stopped":
        raise TrialPruned
    return so_far(curve["train"][-1])


def _finals(
    enter: Callable[[int], optuna.Study],
    fit: Callable,
    plan: Search,
    found: dict[str, Any],
    best: list[int],
    progress: str | None,
) -> dict[str, list]:
    """Run the trials ``best`` again, each as a grid search over its repetitions."""
    grid = {"again": list(range(RUNS_AGAIN))}

    def runs(number: int) -> list[float]:
        def objective(trial: Trial) -> float:
            again = trial.suggest_int("again", 0, RUNS_AGAIN - 1)
            seed = 1000 * (plan.seed + 1) + 500 + RUNS_AGAIN * number + again
            return _cost(fit, plan, _settings(found, number), trial, seed, [])

        def sampler(seed: int) -> optuna.samplers.BaseSampler:
            return optuna.samplers.GridSampler(grid, seed=plan.seed)

        study, title = enter(number), None if progress is None else f"{progress}, trial {number} again"
        made = lambda: {trial.params["again"]: trial.value for trial in _finished(study)}  # noqa: E731
        while len(losses := made()) < RUNS_AGAIN:  # two workers may make the same one
            _optimize(study, max(RUNS_AGAIN, len(_finished(study)) + 1), sampler, objective, 0, title)
        return [losses[again] for again in grid["again"]]

    again = {number: runs(number) for number in best}
    order = sorted(best, key=lambda number: (again[number].count(math.inf), fmean(again[number])))
    short = [[_short(loss) if math.isfinite(loss) else None for loss in again[number]] for number in order]
    return {"trial": order, "loss": short}


def _missing(study: optuna.Study, count: int) -> bool | None:
    """Whether a trial is to be made; False if only others' are awaited, None if all is done.

    The first trials count, however long they take, so that all who share a study see the same ones.
    """
    trials = study.get_trials(deepcopy=False)
    done = [trial.number for trial in trials if trial.state in FINISHED]
    if len(done) < count:
        return True
    open_ = {trial.state for trial in trials[: done[count - 1]] if not trial.state.is_finished()}
    return TrialState.WAITING in open_ if open_ else None


def _commits(study: optuna.Study, plan: Search) -> set[str]:
    """Those whose code made the trials, as far as they have noted it."""
    noted = (trial.user_attrs.get("commit") for trial in _finished(study)[: plan.trials])
    return {commit for commit in noted if commit}


def _columns(study: optuna.Study, plan: Search) -> dict[str, list]:
    """The finished trials, as many as were asked for: workers that share a study may make a few more."""
    trials = _finished(study)[: plan.trials]
    columns = {name: [_short(trial.params[name]) for trial in trials] for name in plan.domain}
    columns["loss"] = [_short(trial.value) if math.isfinite(trial.value) else None for trial in trials]
    more = ("second", "seed", *(("update",) if plan.halvings else ()))
    return columns | {key: [trial.user_attrs[key] for trial in trials] for key in more}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _ends(found: dict[str, Any]) -> list[int | None]:
    """The last update of each trial."""
    return found["trials"].get("update") or [found.get("updates", 0)] * len(found["trials"]["loss"])


def _reached(found: dict[str, Any]) -> list[int | None]:
    """The same, but that what got to a target has got to the end."""
    last, soon = found.get("updates", 0), "target" in found
    pairs = zip(_ends(found), found["trials"]["loss"], strict=True)
    return [last if soon and cost is not None and cost <= last else end for end, cost in pairs]


def _ranked(found: dict[str, Any]) -> list[int]:
    """The trials that did not diverge: those that got farther first, and the better of these."""
    ends, losses = _reached(found), found["trials"]["loss"]
    return sorted(
        (i for i, loss in enumerate(losses) if loss is not None), key=lambda i: (-ends[i], losses[i])
    )


def _tried(found: dict[str, Any], setting: dict[str, float]) -> bool:
    """Whether a setting, perhaps of some hyperparameters only, is among the trials."""
    trials = zip(*(found["trials"][name] for name in setting), strict=True)
    return tuple(map(_short, setting.values())) in trials


def _settings(found: dict[str, Any], number: int) -> dict[str, float]:
    return {name: found["trials"][name][number] for name in found["domain"]}


def chosen(found: dict[str, Any]) -> dict[str, float]:
    """The hyperparameters of a search's best finalist, or else of its best trial.

    The best finalist is that of the least mean loss in the runs that were made again: in its trial it may
    have been lucky. One that diverged comes after those that did not.

    Args:
        found: As :func:`search` returns it.

    Raises:
        SearchError: If every trial diverged.
    """
    best = found["finals"]["trial"] if "finals" in found else _ranked(found)
    if not best:
        raise SearchError(f"every trial of {found['method']} diverged: search another domain")
    return _settings(found, best[0])


def best_so_far(found: dict[str, Any]) -> list[float]:
    """The best loss among a search's first 1, 2, … trials; infinite until one has got to the last update."""
    pairs = zip(found["trials"]["loss"], _reached(found), strict=True)
    arrived = (math.inf if loss is None or end < found.get("updates", 0) else loss for loss, end in pairs)
    return list(accumulate(arrived, min))


def updates_spent(found: dict[str, Any]) -> int:
    """The updates of all trials of a search, as far as they were evaluated, and of its finalists' runs."""
    last, soon = found.get("updates", 0), "target" in found
    finals = (cost for some in found.get("finals", {}).get("loss", []) for cost in some)
    again = sum(round(min(cost, last)) if soon and cost is not None else last for cost in finals)
    return sum(end or 0 for end in _ends(found)) + again
