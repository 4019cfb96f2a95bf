"""Does it hold in 2026? The thesis's methods against today's, to one loss, by the rules below.

These were committed before any of the runs that they are for:

1. The task is the thesis's autoencoder on the whole of MNIST; the target is the training loss 18.9, which SGD
   as our first search tuned it has after about 2,000 updates. Losses are of the first 2,000 examples.
2. Every method gets the same search: :data:`TRIALS` trials of at most 2,000 updates by biased random search,
   whose criterion is the updates until the target; the worse half ends at each of three comparisons, and the
   best of three finalists, each run twice more, is chosen. Every range of a method is as wide as that of the
   same name of any other: three decades for a rate and a damping, two for a bound, one and a half for the
   scale of the initial weights, and for 1 − m, m the momentum. Rates are constant, and no weight decays.
3. The setting runs from ten fresh seeds, all for 500 updates, after which their losses are compared; what is
   not at the target by then goes on until it is, at most to update 2,000. A method that misses the target
   from one seed has no time.
4. Seconds are updates times what one costs, clocked interleaved on an idle machine.
5. "A needs fewer updates than B" is said if a one-sided Welch test of the logarithms says p < 0.01, "is
   sooner" likewise of seconds.
6. From the first of the seeds each setting goes on to the losses 10, 5 and 3, at most to update 10,000: one
   run, which settles nothing. (This rule was added when the runs of rule 3 were there, and before its own.)

``python -m lab contest`` searches and runs what is missing, ``--clock`` measures what updates cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import plotly.graph_objects as go
import torch
from scipy.stats import ttest_ind
from torch import Tensor

from lab.plotting import COLORS, figure
from lab.rivals import FOOF, NewtonMuon
from lab.timing import Contestant, minibatch, race
from lab.trials import is_smoke
from sogrid.experiments import data
from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, Method, Task
from sogrid.experiments.muon import MuonAndAdam
from sogrid.experiments.records import Record, RecordError, alone, provenance
from sogrid.experiments.reproduce import SMOKE_EXAMPLES
from sogrid.experiments.training import evaluation_points, run, updates_to
from sogrid.experiments.tuning import Search, chosen, open_storage, search, sqlite_url
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN

__all__ = [
    "METHODS",
    "clock",
    "contest",
    "curves",
    "dots",
    "ends_of",
    "later",
    "letter",
    "mean_time",
    "p_words",
    "prices",
    "report",
    "runs",
    "setting_words",
    "taking_part",
    "times",
    "verdict",
]

BENCHMARK, REFRESH_EVERY, LEVEL = "mnist_autoencoder", 20, 0.01
PACKAGE = "pytorch_optimizer"
SEEDS = tuple(range(401, 411))


@dataclass(frozen=True)
class Scale:
    """How much of it.

    Attributes:
        target: A training loss.
        updates: The most, of trials and runs.
        all: Those that all runs make.
        trials: Of each search; this and the next three are :class:`~sogrid.experiments.tuning.Search`'s.
        halvings: On the way.
        finalists: Run again.
        evaluate_on: Examples.
        seeds: Of the runs.
        later: Losses below the target, to the last of which the run of the first seed goes on.
        longest: The most updates of that.
    """

    target: float = 18.9
    updates: int = 2_000
    all: int = 500
    trials: int = 40
    halvings: int = 3
    finalists: int = 3
    evaluate_on: int = 2_000
    seeds: tuple[int, ...] = SEEDS
    later: tuple[float, ...] = (10.0, 5.0, 3.0)
    longest: int = 10_000


SCALES = {"laptop": Scale(), "smoke": Scale(90.0, 2, 1, 2, 1, 1, 100, SEEDS[:2], longest=3)}
TRIALS = SCALES["laptop"].trials
DOMAIN = {
    "damping": (1e-3, 1.0),
    "max_change": (3e-3, 0.3),
    "friction": (0.03, 1.0),
    "scale": (4.0, 128.0),
}
"""``friction`` is 1 − m. The range of a rate is that of :data:`RATES`, around where such rates are in use."""
LETTERS = {"lr": "λ", "damping": "ε", "max_change": "κ", "friction": "1 − m", "scale": "scale"}


def _ours(kind: Callable) -> Callable:
    """As far as its bound lets it, with a heavy ball."""
    options = {"lr": 10.0, "refresh_every": REFRESH_EVERY, "gradients": "factored"}

    def build(model, loss, s):
        own = {"damping": s["damping"], "max_change": s["max_change"], "momentum": 1 - s["friction"]}
        return kind(model, **own, **options, **({"loss": loss} if kind is KFAC else {}))

    return build


def _theirs(kind: Callable, second: float | None = None, **fixed: Any) -> Callable:
    """One that takes parameters, and has a momentum or, as Adam's kin, two β."""

    def build(model, loss, s):
        momentum = 1 - s["friction"]
        own = {"momentum": momentum} if second is None else {"betas": (momentum, second)}
        return kind(model.parameters(), lr=s["lr"], **own, **fixed)

    return build


def _sgd(model, loss, s):
    return torch.optim.SGD(model.parameters(), s["lr"])


def _centred(model, loss, s):
    options = {"max_change": None, "momentum": 1 - s["friction"], "gradients": "factored"}
    return CenteredGradientDescent(model, s["lr"], **options)


def _newton_muon(model, loss, s):
    options = {"momentum": 1 - s["friction"], "ridge": s["damping"], "refresh_every": REFRESH_EVERY}
    return NewtonMuon(model, s["lr"], **options)


def _packaged(name: str, **fixed: Any) -> Callable:
    """An optimizer of a package of the extra `bench`, which need not be there."""

    def kind(parameters, **options):
        return getattr(import_module(PACKAGE), name)(parameters, weight_decay=0.0, **fixed, **options)

    return kind


_momentum, _muon = _theirs(torch.optim.SGD), _theirs(MuonAndAdam)
_adamw = _theirs(torch.optim.AdamW, 0.999, weight_decay=0.0)
_soap = _theirs(_packaged("SOAP"), 0.95)
_shampoo = _theirs(
    _packaged(
        "ScalableShampoo",
        start_preconditioning_step=REFRESH_EVERY,
        preconditioning_compute_steps=REFRESH_EVERY,
        graft_type=3,  # the length of RMSProp's step
        moving_average_for_momentum=True,
        use_svd=True,
    ),
    0.999,
)
BALL, BOUNDED = ("lr", "friction"), ("damping", "max_change", "friction")
METHODS = {
    "sgd": Method(_sgd, "SGD"),
    "momentum": Method(_momentum, "momentum", dash="dash", settings=BALL),
    "acp": Method(_ours(ACP), "ACP", "orange", settings=BOUNDED),
    "kfac": Method(_ours(KFAC), "KFAC", "blue", settings=BOUNDED),
    "muon": Method(_muon, "Muon", "brown", settings=BALL),
    "nnn": Method(_ours(NaturalNN), "NNN", "green", settings=BOUNDED),
    "adamw": Method(_adamw, "AdamW", dash="dot", settings=BALL),
    "foof": Method(_ours(FOOF), "FOOF", "orange", "dash", settings=BOUNDED),
    "newton_muon": Method(_newton_muon, "Newton-Muon", "brown", "dash", settings=("damping", *BALL)),
    "centred": Method(_centred, "centred gradient", "purple", settings=BALL),
    "soap": Method(_soap, "SOAP", "pink", settings=BALL),
    "shampoo": Method(_shampoo, "Shampoo", "pink", "dash", settings=BALL),
}
"""Who takes part. Ours and FOOF have λ = 10, since the bound is what is searched. SOAP and Shampoo are of one
package: the first turns its basis every ten updates; the second has blocks of 512 (Anil et al., 2020), new
roots every 20, and steps as long as RMSProp's."""

PACKAGED = ("soap", "shampoo")
REFRESH_THEMSELVES = {"newton_muon", *PACKAGED}
SMALL, LARGE = (3e-5, 3e-2), (3e-3, 3.0)
RATES = {"sgd": LARGE, "momentum": (1e-3, 1.0), "centred": LARGE}
RATES |= dict.fromkeys(("muon", "adamw", "newton_muon", *PACKAGED), SMALL)


def _plan(method: str, scale: Scale = SCALES["laptop"]) -> Search:
    domain = {**DOMAIN, "lr": RATES.get(method)}
    own = {name: domain[name] for name in METHODS[method].searched}
    options = {"halvings": scale.halvings, "finalists": scale.finalists, "target": scale.target}
    return Search(method, own, scale.trials, scale.updates, scale.evaluate_on, **options)


def contest(
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    out: str | Path = "out",
    profile: str = "laptop",
    progress: bool = True,
) -> dict[str, Any]:
    """Search and run what is missing, and return the content of ``<out>/contest.json``.

    What was begun of a search is in ``<out>/contest.sqlite3``; with the same ``out`` it goes on.

    Args:
        methods: Keys of :data:`METHODS`.
        seeds: Of the runs.
        out: Folder of the record.
        profile: ``"laptop"``, or ``"smoke"`` for a moment on the embedded digits, two of the seeds, and
            ``<out>/contest.smoke.json``.
        progress: Show bars.

    Raises:
        DataError: If MNIST is not there.
        ModuleNotFoundError: If a method's package is not.
        RecordError: If the record is damaged, of other settings, or cannot be written.
        SearchError: If the storage cannot be used, or holds a search of other rules.
        ValueError: For another profile, method or seed.
    """
    smoke = is_smoke(profile)
    scale = SCALES[profile]
    for name, asked, known in (("method", methods, METHODS), ("seed", seeds, sorted({*SEEDS, *scale.seeds}))):
        if isinstance(asked, str) or not set(asked) <= set(known):
            raise ValueError(f"every {name} must be one of {list(known)}, got {asked!r}")
    if not set(methods).isdisjoint(PACKAGED):
        import_module(PACKAGE)  # now, and not after hours
    task, record = _task(smoke), _record(out, profile)
    Path(out).mkdir(parents=True, exist_ok=True)
    for method in methods:
        key = {"part": "search", "method": method}
        with alone(record.path.with_suffix(f".{method}")):  # another process may be at it: its result is ours
            record = _record(out, profile)
            found = record.find(**key)
            if found is not None and not _by_the_rules(found, _plan(method, scale)):
                raise RecordError(f"{record.path} has a search of {method} by other rules: move it away")
            if found is None:
                storage = open_storage(sqlite_url(record.path.with_suffix(".sqlite3")))
                wanted = {"storage": storage, "name": method, "methods": METHODS, "alone": True}
                found = search(task, _plan(method, scale), progress=method if progress else None, **wanted)
                record.add({**key, **found}, once=key)
    options = {"methods": METHODS, "evaluate_on": scale.evaluate_on}
    jobs = [("run", seed, scale.updates) for seed in scale.seeds if seed in seeds]
    jobs += [("longer", seed, scale.longest) for seed in scale.seeds[:1] if seed in seeds]
    for part, seed, updates in jobs:
        options |= {"updates": updates, "points": evaluation_points(updates, per_decade=16, also=[scale.all])}
        for method in methods:
            key = {"part": part, "method": method, "seed": seed}
            with alone(record.path.with_suffix(f".{part}.{method}{seed}")):
                record = _record(out, profile)
                found = record.find(**key)
                if part == "longer" and found is not None and not _as_far(found, scale):
                    raise RecordError(
                        f"{record.path} has a longer run of {method} by other rules: move it away"
                    )
                if found is None:
                    settings = chosen(record.find(part="search", method=method))
                    title = f"{method}, seed {seed}" if progress else None
                    until = _Until(scale.target if part == "run" else scale.later[-1], scale.all)
                    found = run(task, method, settings, seed=seed, progress=title, go_on=until, **options)
                    record.add({**key, **found}, once=key)
    return record.content


def _by_the_rules(found: dict[str, Any], plan: Search) -> bool:
    """Whether a search of a record is what the plan would have made."""
    wanted = asdict(plan)
    made = {key: found.get(key) for key in wanted} | {"trials": len(found["trials"]["loss"])}
    return json.dumps(made) == json.dumps(wanted)


def _as_far(run_: dict[str, Any], scale: Scale) -> bool:
    """Whether a longer run went on as long as it has to."""
    if run_["status"] == "diverged" or run_["update"][-1] == scale.longest:
        return True
    return run_["train"][-1] <= scale.later[-1] and run_["update"][-1] >= scale.all


class _Until:
    """Whether a run goes on: all do to some update, and from there to the target."""

    def __init__(self, target: float, all_: int) -> None:
        self.target, self.all, self.there = target, all_, False

    def __call__(self, update: int, loss: float) -> bool:
        self.there |= loss <= self.target
        return update < self.all or not self.there


def _task(smoke: bool = False) -> Task:
    embedded = {"source": "embedded", "subset": SMOKE_EXAMPLES}
    task = BENCHMARKS[BENCHMARK].task(data.load("mnist", **embedded) if smoke else data.load_whole("mnist"))
    count = SCALES["smoke" if smoke else "laptop"].evaluate_on
    return replace(task, test=tuple(part[:count] for part in task.test))


def _record(out: str | Path, profile: str = "laptop") -> Record:
    scale = SCALES[profile]
    settings = {"benchmark": BENCHMARK, "target": scale.target, "updates": [scale.all, scale.updates]}
    settings |= {"trials": scale.trials, "evaluate_on": scale.evaluate_on, "batch": BATCH}
    name = "contest.smoke" if profile == "smoke" else "contest"
    return Record(Path(out) / f"{name}.json", "contest", settings | {"refresh_every": REFRESH_EVERY})


class _Amortised(Contestant):
    """One whose updates differ, since it refreshes what it keeps by itself."""

    amortised = True


class _Float32Muon(Contestant):
    """Muon without bfloat16, which some processors have no unit for."""

    def update(self, x: Tensor, y: Tensor) -> None:
        with mock.patch.object(Tensor, "bfloat16", lambda tensor: tensor):
            super().update(x, y)


def clock(
    *, out: str | Path = "out", rounds: int = 2 * REFRESH_EVERY, progress: bool = True
) -> list[dict[str, Any]]:
    """Measure what an update of each method that has been searched costs, at its setting, into the record.

    Raises:
        RecordError: If no method has been, and see :func:`contest`.
    """
    task, record, contestants = _task(), _record(out), {}
    for found in (entry for entry in record.content["runs"] if entry["part"] == "search"):
        name = found["method"]
        make = partial(METHODS[name].build, task, chosen(found))
        kind = _Amortised if name in REFRESH_THEMSELVES else Contestant
        contestants[name] = kind(*make(torch.Generator().manual_seed(0)), task.loss)
        if name == "muon":
            contestants["muon float32"] = _Float32Muon(*make(torch.Generator().manual_seed(0)), task.loss)
    if not contestants:
        raise RecordError(f"{record.path} has no search yet: there is nothing to time")
    batch = minibatch(next(iter(contestants.values())))
    rows = race(contestants, batch, rounds=rounds, progress=progress, refresh_every=REFRESH_EVERY)
    record.set_clock({"rounds": rounds, "rows": rows, "provenance": provenance()})
    return rows


def prices(content: dict[str, Any]) -> dict[str, float]:
    """Seconds of an update by method; of Muon in the cheaper of two precisions.

    Raises:
        RecordError: If one that takes part has not been timed.
    """
    found = {row["method"]: row["update_ms"] / 1e3 for row in content.get("clock", {"rows": []})["rows"]}
    if "muon float32" in found:
        found["muon"] = min(found["muon"], found.pop("muon float32"))
    if missing := [method for method in _whole(content) if method not in found]:
        raise RecordError(f"no prices of {', '.join(missing)}: run python -m lab contest --clock")
    return found


def runs(content: dict[str, Any], method: str, part: str = "run") -> list[dict[str, Any]]:
    """Those of a method's fresh seeds; or, of the part ``"longer"``, that of the first one which goes on."""
    return [run for run in content["runs"] if run["part"] == part and run["method"] == method]


def times(
    content: dict[str, Any], method: str, loss: float | None = None, part: str = "run"
) -> list[float | None]:
    """Updates until a training loss (default the target), by seed; ``None`` where it is not reached."""
    loss = content["settings"]["target"] if loss is None else loss
    return [updates_to(run["update"], run["train"], loss) for run in runs(content, method, part)]


def verdict(
    content: dict[str, Any], a: str, b: str, loss: float | None = None, *, seconds: bool = False
) -> float:
    """The p of the one-sided test that ``a`` needs less than ``b``; 1 where a seed of ``a`` is lost.

    A lost seed of ``b`` counts with all of its updates, which is less than it needs. One seed is no test: 1.
    """
    ours, theirs = (times(content, method, loss) for method in (a, b))
    if None in ours or min(map(len, (ours, theirs))) < 2:
        return 1.0
    cost = prices(content) if seconds else {a: 1.0, b: 1.0}
    last = content["settings"]["updates"][1]
    ours, theirs = (
        [math.log(cost[method] * (last if t is None else max(t, 1))) for t in found]
        for method, found in ((a, ours), (b, theirs))
    )
    return float(ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue)


def taking_part(content: dict[str, Any]) -> list[str]:
    """The methods that have run from all seeds that any has; the soonest first, those without a time last."""
    means = {method: mean_time(content, method) for method in _whole(content)}
    return sorted(means, key=lambda method: math.inf if means[method] is None else means[method])


def _whole(content: dict[str, Any]) -> list[str]:
    seeds = {method: {run["seed"] for run in runs(content, method)} for method in METHODS}
    return [method for method in METHODS if seeds[method] == set().union(*seeds.values()) != set()]


def mean_time(content: dict[str, Any], method: str, *, seconds: bool = False) -> float | None:
    """Mean over seeds of the updates until the target, or of their seconds; ``None`` if a seed is lost."""
    found = times(content, method)
    if None in found or not found:
        return None
    return fmean(found) * (prices(content)[method] if seconds else 1)


def dots(content: dict[str, Any], *, seconds: bool = False) -> go.Figure:
    """When each method is at the target: a dot for each seed, a bar at the mean."""
    traces, told = [], []
    for method in taking_part(content):
        row, mean = METHODS[method], mean_time(content, method, seconds=seconds)
        price = prices(content)[method] if seconds else 1
        there = [price * t for t in times(content, method) if t is not None]
        look = {"showlegend": False, "mode": "markers"}
        dot = {"color": COLORS[row.color], "opacity": 0.5, "size": 9}
        traces.append(go.Scatter(x=there, y=[row.name] * len(there), name=row.name, marker=dot, **look))
        if mean is not None:
            bar = {"color": COLORS[row.color], "symbol": "line-ns-open", "size": 22, "line": {"width": 3}}
            traces.append(go.Scatter(x=[mean], y=[row.name], name=f"{row.name}, mean", marker=bar, **look))
        told.append(f"{row.name} {'not from every seed' if mean is None else f'{mean:.3g}'}")
    unit, target = "seconds" if seconds else "updates", content["settings"]["target"]
    return figure(
        traces,
        alt=f"{unit.capitalize()} until a training loss of {target:g}, a dot for each seed. "
        f"Means: {', '.join(told)}.",
        xaxis={"title": f"{unit} to {target:g}", "type": "log", "dtick": "D2"},
        yaxis={"autorange": "reversed", "ticksuffix": " "},
        height=120 + 34 * len(told),
    )


def curves(content: dict[str, Any]) -> go.Figure:
    """The training loss by update, a line for each seed."""
    traces, told = [], []
    for method in taking_part(content):
        row, ends = METHODS[method], ends_of(content, method)
        for k, run_ in enumerate(runs(content, method)):
            look = {"color": COLORS[row.color], "dash": row.dash, "width": 1}
            own = {"name": row.name, "legendgroup": method, "showlegend": k == 0, "line": look}
            traces.append(go.Scatter(x=run_["update"][1:], y=run_["train"][1:], mode="lines", **own))
        told.append(f"{row.name} {fmean(ends):.3g}")
    end = content["settings"]["updates"][0]
    return figure(
        traces,
        alt=f"Training loss by update, a line for each seed. After {end} updates, means: {', '.join(told)}.",
        xaxis={"title": "updates", "type": "log"},
        yaxis={"title": "training loss", "type": "log", "dtick": "D2"},
    )


def ends_of(content: dict[str, Any], method: str) -> list[float]:
    """The losses of a method's seeds after the updates that all make; infinite where one diverged."""
    all_ = content["settings"]["updates"][0]
    pairs = (dict(zip(run["update"], run["train"], strict=True)) for run in runs(content, method))
    return [pair.get(all_, math.inf) for pair in pairs]


def report(content: dict[str, Any], rival: str = "muon") -> list[tuple[str, ...]]:
    """Rows of a table, the first one the head; means over seeds ± standard deviations.

    Raises:
        RecordError: See :func:`prices`.
    """
    sgd, cost = mean_time(content, "sgd", seconds=True), prices(content)
    head = (
        "",
        "updates",
        "of SGD's price",
        "sooner than SGD",
        f"loss at {content['settings']['updates'][0]}",
        "in updates: p",
        "in seconds: p",
    )
    rows = [head]
    for method in taking_part(content):
        found, ends = times(content, method), ends_of(content, method)
        lost = found.count(None)
        reached = f"{lost} of {len(found)} lost" if lost else _spread(found, ".0f")
        own = mean_time(content, method, seconds=True)
        sooner = "" if own is None or sgd is None else f"{sgd / own:.1f} times"
        tests = ["", ""]
        if method != rival and rival in taking_part(content):
            found_p = [verdict(content, method, rival, seconds=seconds) for seconds in (False, True)]
            tests = [p_words(p).removeprefix("= ") for p in found_p]
        loss = "diverged" if math.inf in ends else _spread(ends, ".2f")
        price = f"{cost[method] / cost['sgd']:.2f}" if "sgd" in cost else ""
        rows.append((METHODS[method].name, reached, price, sooner, loss, *tests))
    return rows


def _spread(values: Sequence[float], digits: str) -> str:
    return f"{fmean(values):{digits}}" + (f" ± {stdev(values):{digits}}" if len(values) > 1 else "")


def later(content: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table, the first one the head: updates to the losses below the target, in one longer run.

    In brackets, where SGD gets there too: how many times sooner than it, in seconds.
    """
    cost, losses = prices(content), SCALES["laptop"].later
    rows = [("", *(f"to {loss:g}" for loss in losses), "lowest")]
    sgd = {loss: t for loss in losses for t in times(content, "sgd", loss, "longer")}
    for method in (method for method in taking_part(content) if runs(content, method, "longer")):
        [run_], cells = runs(content, method, "longer"), []
        for loss in losses:
            [found] = times(content, method, loss, "longer")
            cells.append("–" if found is None else f"{found:,.0f}")
            if found and sgd.get(loss) and method != "sgd":
                cells[-1] += f" ({sgd[loss] * cost['sgd'] / (found * cost[method]):.1f} ×)"
        cells.append(f"{min(run_['train']):.3g}" if run_["train"] else "diverged")
        rows.append((METHODS[method].name, *cells))
    return rows


def p_words(p: float) -> str:
    """What is told of a p, which is not a number where there was nothing to test.

    Example:
        >>> p_words(0.0123), p_words(4.4e-6)
        ('= 0.012', '< 10⁻⁵')
    """
    if not p < 1e-3:
        return f"= {p:.2g}"
    return "< 10⁻" + str(min(math.floor(-math.log10(max(p, 1e-99))), 9)).translate(SUPERSCRIPTS)


SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def setting_words(content: dict[str, Any], method: str) -> str:
    """The chosen setting in the book's letters."""
    found = next(r for r in content["runs"] if r["part"] == "search" and r["method"] == method)
    return ", ".join(f"{letter(method, name)} {value:.3g}" for name, value in chosen(found).items())


def letter(method: str, name: str) -> str:
    """The book's letter of a hyperparameter; Newton-Muon's damping is relative to its matrix's diagonal."""
    return "γ" if (method, name) == ("newton_muon", "damping") else LETTERS[name]
