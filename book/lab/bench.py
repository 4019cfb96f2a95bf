"""The cost table: what an update costs, in time and memory, ours beside torch's and the peers'.

Everything is measured in one process, in interleaved rounds (:func:`~lab.timing.race`):
``python -m lab bench``, or ``make bench``, which also installs the peers; with ``--device cuda``
on a GPU, which has a record of its own. Its parts:

* *costs* of the two benchmarks' networks: milliseconds per update with the share of the refresh, the ratio to
  SGD, memory, and the share of the machine's GEMM rate that a step reaches on its own FLOPs; and a third such
  table, *low rank*, of the methods with and without the option ``rank``;
* *costs* of three small networks, *convolutions*, *narrow* (eight layers of 64) and *transformer*
  (characters, tokens are examples): our rows with ``other="sgd"`` and, unless they say otherwise, the bound
  that they come with, no share of a GEMM rate;
* *growth* of ACP's and KFAC's ratio to SGD with width, depth, batch and statistics batch, or on an
  accelerator with the width alone, which there has to be larger;
* *compile*: whether ``torch.compile`` of the update pays.

FLOPs are those of the matrix products that one update (not the refresh) really makes, counted by torch's
dispatcher: two for each multiplication, nothing for elementwise work. For a layer of o × i weights, n
examples, and q rows of statistics these are

======================  ==============================================================================
SGD, centred GD         6noi: forward, ∇W, and the gradient passed on, which the first layer spares (4noi)
ACP, NNN                and the factor h times P, if n ≤ o, else ∇W times P: 4qi (thin, q < i) or 2i²
                        for each of its n or o rows
KFAC                    the same with i + 1 for i, and g times B⁻¹, if n ≤ i, else the gradient times it:
                        4qo (thin, q < o) or 2o² for each of n or i + 1 rows
UBP                     4noi: forward and ΔW; and but for the first layer 2noi + 4n²(i + o) to pass on the
                        updated gradient, and 4noi of each layer above, twice swept through
======================  ==============================================================================

where factors are multiplied first because that is cheaper (:class:`~sogrid.structured.Factored`). The GEMM
rate is that of float32; Muon's Newton-Schulz products are in bfloat16, so it may reach more than all of it.

Memory is counted too: *state* is the bytes of the tensors in ``state_dict``; *held* is what the allocator
holds beyond the parameters after a refresh and an update, gradients cleared, which also sees what a peer
keeps elsewhere; *peak* is the most it held meanwhile.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lab.out_of_the_box import CONTEXT, Transformer, convolutions
from lab.peers import PEERS
from lab.timing import ROUNDS, SETTINGS, Contestant, contestant, minibatch, race
from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, LOW_RANK, REFRESH_EVERY, Task
from sogrid.experiments.records import Record, provenance
from sogrid.experiments.reproduce import AE, CIFAR
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, EKFAC, KFAC

__all__ = [
    "PARTS",
    "aim",
    "bench",
    "bench_path",
    "compiled",
    "costs",
    "flops",
    "growth",
    "memory",
    "operations",
    "report",
]

aten = torch.ops.aten

SGD = "standard_sgd"
TORCH = (SGD, "momentum", "adam", "muon")
OURS = ("centered_gradient_descent", "acp_fixedalpha", "acp", "nnn2", "kfac")
BOUNDED = ("acp_bounded", "nnn2_bounded", "kfac_bounded")
BOTH = tuple(f"{name}_low_rank" for name in BOUNDED)
RANKED = tuple(f"{name} rank {LOW_RANK['rank']}" for name in (*OURS[1:], *BOUNDED))
MATRIX = ("acp matrix", "kfac matrix")
CONTESTANTS = {
    AE: (*TORCH, *OURS, "jaco_update", *BOUNDED, *BOTH, "jaco_update_bounded", *MATRIX),
    CIFAR: (*TORCH, *OURS, "kfac_nat", *BOUNDED, *MATRIX),
    "low_rank": (SGD, *OURS[1:], *BOUNDED, *RANKED),
}
"""Of each cost table. ``matrix``: the step starts from ``.grad``, as that of every peer. The exact Fisher of
784 outputs would be as many backward passes: it is on the classifier alone. So is the part ``low_rank``;
on the autoencoder the bounded methods have rows with a rank."""

Entry = Callable[[], Contestant]


@dataclass(frozen=True)
class Network:
    """A network of other layers than the benchmarks'.

    Attributes:
        build: Makes it.
        minibatch: Makes (x, y).
    """

    build: Callable[[], nn.Module]
    minibatch: Callable[[torch.Generator], tuple[Tensor, Tensor]]


def _pixels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(BATCH, 784, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def _characters(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(96, size, generator=generator) for size in ((16, CONTEXT), (16 * CONTEXT,)))


def _narrow() -> nn.Module:
    """Eight layers so small that an update is the beginning of operations."""
    return nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(64, 64), nn.Tanh())))


NETWORKS = {
    "convolutions": Network(convolutions, _pixels),
    "narrow": Network(
        _narrow, lambda g: (torch.randn(32, 64, generator=g), torch.randint(64, (32,), generator=g))
    ),
    "transformer": Network(lambda: nn.Sequential(Transformer(), nn.Flatten(0, 1)), _characters),
}

BESIDE = {
    SGD: lambda model, lr, **_: torch.optim.SGD(model.parameters(), lr),
    "adam": lambda model, lr, **_: torch.optim.Adam(model.parameters(), lr),
    "acp_fixedalpha unbounded": lambda model, loss, **o: ACP(model, **o, max_change=None),
    "acp_bounded": lambda model, loss, **o: ACP(model, **o),
    "kfac unbounded": lambda model, **o: KFAC(model, **o, max_change=None),
    "kfac_bounded": lambda model, **o: KFAC(model, **o),
    "kfac_bounded reduced": lambda model, **o: KFAC(model, **o, shared="reduce"),
    "EKFAC": lambda model, **o: EKFAC(model, **o),
    "acp_bounded factored": lambda model, loss, **o: ACP(model, **o, gradients="factored"),
    "kfac_bounded factored": lambda model, **o: KFAC(model, **o, gradients="factored"),
}
"""Optimizers of these, by row; ours bounded, as they come, if they do not say otherwise, and refreshed as in
the benchmarks."""

AIMS = {
    AE: {
        "centered_gradient_descent": 1.08,
        **{"acp_fixedalpha": 1.25, "acp_bounded": 1.25, "acp": 1.30, "nnn2": 1.30, "nnn2_bounded": 1.30},
        **{"kfac": 1.55, "kfac_bounded": 1.55, "jaco_update": 3.6, "jaco_update_bounded": 3.6},
    },
    "narrow": {"acp_fixedalpha unbounded": 1.4, "kfac unbounded": 1.5},
    CIFAR: {
        **{"acp_fixedalpha": 1.60, "acp_bounded": 1.60, "acp": 1.60, "nnn2": 1.70, "nnn2_bounded": 1.70},
        **{"kfac": 1.90, "kfac_bounded": 1.90},
    },
}
"""Ratios to SGD that this package has set itself; see :func:`aim`."""

GROWTH = {"width": 512, "depth": 4, "batch": 200, "statistics": 200}
POINTS = {
    "width": (128, 256, 512, 1024),
    "depth": (2, 4, 8, 16),
    "batch": (50, 100, 200, 400, 800),
    "statistics": (50, 100, 200, 400, 800),
}
POINTS_ACCELERATED = {"width": (512, 1024, 2048, 4096, 8192)}
GROWN = (SGD, "acp", "kfac")

COMPILED = ("acp", "acp matrix", "kfac", "kfac matrix")

PARTS = (AE, CIFAR, "low_rank", *NETWORKS, "growth", "compile")

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler announces itself otherwise


class Products(Contestant):
    """The matrix products of an SGD step, at its shapes and with nothing else: the GEMM rate.

    Args:
        model: Its linear layers count.
        batch: n.
        device: Where.
    """

    def __init__(self, model: nn.Module, batch: int = BATCH, device: str = "cpu") -> None:
        """See the class."""
        super().__init__(model, None, None)
        self.products, self.flops = [], 0
        for k, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
            n_out, n_in = layer.weight.shape
            h, g, w = (torch.rand(s, device=device) for s in ((batch, n_in), (batch, n_out), (n_out, n_in)))
            pairs = [(h, w.mT), (g.mT, h), (g, w)][: 3 if k else 2]
            self.products += [(a, b, torch.empty(len(a), b.shape[1], device=device)) for a, b in pairs]
            self.flops += 2 * len(pairs) * batch * n_in * n_out

    def update(self, x: Tensor, y: Tensor) -> None:
        for a, b, out in self.products:
            torch.mm(a, b, out=out)


def aim(part: str, method: str) -> float | None:
    """The ratio to SGD that a row of a cost table should not exceed, if any: whatever its rank.

    Example:
        >>> aim("low_rank", "acp rank 100")
        1.6
    """
    return AIMS.get(_benchmark(part), {}).get(method.partition(" rank ")[0].removesuffix("_low_rank"))


def _benchmark(part: str) -> str:
    """Whose network a cost table is about."""
    return CIFAR if part == "low_rank" else part


def flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that ``work`` makes; see the module.

    Example:
        >>> flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    with _Counter() as counter:
        work()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up torch's formulas. Its ``FlopCounterMode`` also follows modules, which UBP's step forbids."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        formula = flop_registry.get(aten.addmm if operation is aten.addmm_ else operation)
        self.total += formula(*args, **kwargs, out_val=out) if formula else 0
        return out


class _Operations(TorchDispatchMode):
    """Counts what begins, and is no view."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


COUNTED = {
    "SGD": lambda model, loss: torch.optim.SGD(model.parameters(), 0.1, foreach=True),
    "Adam": lambda model, loss: torch.optim.Adam(model.parameters(), foreach=True),
    "ACP": lambda model, loss: ACP(model, 0.1, max_change=None),
    "ACP, bounded": lambda model, loss: ACP(model, 0.1),
    "KFAC": lambda model, loss: KFAC(model, 0.1, loss=loss, max_change=None),
    "KFAC, bounded": lambda model, loss: KFAC(model, 0.1, loss=loss),
}


def operations(examples: int = BATCH) -> dict[tuple[str, str], int]:
    """How many operations a step dispatches between refreshes, by optimizer and benchmark, without views.

    Args:
        examples: Of a minibatch, and of the statistics: the thinner these, the more products.
    """
    found = {}
    for (name, make), part in product(COUNTED.items(), (AE, CIFAR)):
        loss = BENCHMARKS[part].loss
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BENCHMARKS[part].network()
            x = torch.rand(examples, next(model.parameters()).shape[1])
        optimizer = make(model, loss)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), x if part == AE else torch.arange(examples) % 10).backward()
            with _Operations() as counter:
                optimizer.step()
        found[name, part] = counter.total
    return found


def memory(make: Callable[[], Contestant], batch: tuple[Tensor, Tensor]) -> tuple[Contestant, int, int]:
    """A contestant, and the bytes that it *held* and had at its *peak*, on its device; see the module.

    Args:
        make: Makes it.
        batch: ``(x, y)`` of its refresh and its update.
    """
    gc.collect()  # what is freed meanwhile would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        entry = make()
        if entry.keeps_statistics:
            entry.refresh(*batch)
        entry.update(*batch)
        entry.zero_grad()
        gc.collect()
    kind = batch[0].device.type.upper()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type().name == kind]
    levels = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    parameters = _bytes(entry.model.parameters())
    return entry, levels[-1] - parameters, max(levels) - parameters


@contextmanager
def _frozen() -> Iterator[None]:
    """Inside, garbage is sought only among what is made inside, which is quick."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of tensors, each counted once."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    """Those in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def costs(part: str, *, rounds: int = ROUNDS, device: str = "cpu", progress: bool = False) -> dict[str, Any]:
    """A cost table of a network.

    Args:
        part: ``"mnist_autoencoder"``, ``"cifar10_classifier"`` or a key of :data:`NETWORKS`, with the peers,
            or ``"low_rank"``.
        rounds: See :func:`~lab.timing.race`.
        device: Where.
        progress: Show a bar.

    Returns:
        ``"rows"`` of :func:`~lab.timing.race` with, added: ``ratio`` to SGD's ``update_ms``;
        ``flop``; ``gemm_share``; ``state_bytes`` (``None`` for a peer, which has it elsewhere),
        ``held_bytes`` and ``peak_bytes``, all three beyond the parameters. ``"gemm_gflops"``: the rate of
        ``torch.mm`` at the shapes of the network's forward and backward products, and like ``gemm_share``
        ``None`` for other networks. ``"peers"``: their versions. ``"skipped"``:
        why peers are missing, by name.
    """
    make, peers, batch = _of_network(part, device) if part in NETWORKS else _of_benchmark(part, device)
    entries, facts, skipped, versions = {}, {}, {}, {}

    def enter(name: str, make: Entry) -> None:
        entry, held, peak = memory(make, batch)
        own = None if name in PEERS else _bytes(_tensors(entry.optimizer.state_dict()))
        facts[name] = {"flop": flops(lambda: entry.update(*batch)), "state_bytes": own}
        facts[name] |= {"held_bytes": held, "peak_bytes": peak}
        entries[name] = entry

    first = make[SGD]()
    first.update(*batch)  # what libraries keep from their first call is nobody's memory
    gemm = {} if part in NETWORKS else {"gemm": Products(first.model, device=device)}
    with warnings.catch_warnings(action="ignore"), _frozen():  # the peers use what torch deprecates
        for name, entry in make.items():
            enter(name, entry)
        for name, entry in peers.items():
            try:
                enter(name, entry)
                versions[name] = PEERS[name].version()
            except Exception as error:  # whatever goes wrong in another's code is that row's affair
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows = race({**gemm, **entries}, batch, rounds=rounds, progress=progress)
    rate = gemm["gemm"].flops / rows.pop(0)["update_ms"] if gemm else None
    sgd = next(row["update_ms"] for row in rows if row["method"] == SGD)
    for row in rows:
        row |= {"ratio": row["update_ms"] / sgd, **facts[row["method"]]}
        step = row["update_ms"] - row["refresh_ms"] / REFRESH_EVERY
        row["gemm_share"] = row["flop"] / step / rate if gemm else None
    rate = rate / 1e6 if gemm else None
    return {"rows": rows, "gemm_gflops": rate, "peers": versions, "skipped": skipped}


Race = tuple[dict[str, Entry], dict[str, Entry], tuple[Tensor, Tensor]]
"""What makes our rows and torch's, what makes the peers', and the minibatch."""

HYPER = {key: SETTINGS[key] for key in ("lr", "damping")}


def _of_benchmark(part: str, device: str) -> Race:
    plan, peers = BENCHMARKS[_benchmark(part)], PEERS if part in BENCHMARKS else {}
    task = Task(plan.name, None, None, None, plan.network, plan.loss)
    ours = {name: partial(contestant, task, name, device) for name in CONTESTANTS[part]}
    theirs = {
        name: lambda kind=kind: kind(contestant(task, SGD, device).model, plan.loss, **HYPER)
        for name, kind in peers.items()
    }
    return ours, theirs, minibatch(ours[SGD](), device=device)


def _of_network(part: str, device: str) -> Race:
    network, loss = NETWORKS[part], CrossEntropyAtLogits()
    options = {"other": "sgd", "other_lr": HYPER["lr"], "refresh_every": None}

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return network.build().to(device)

    def enter(make: Callable[..., torch.optim.Optimizer]) -> Contestant:
        model = build()
        return Contestant(model, make(model, loss=loss, **HYPER, **options), loss)

    ours = {name: partial(enter, make) for name, make in BESIDE.items()}
    theirs = {name: lambda kind=kind: kind(build(), loss, **HYPER) for name, kind in PEERS.items()}
    x, y = network.minibatch(torch.Generator().manual_seed(1))
    return ours, theirs, (x.to(device), y.to(device))


def growth(
    *,
    points: dict[str, Sequence[int]] | None = None,
    rounds: int = ROUNDS,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """How the ratio to SGD of the same size grows, along one axis at a time.

    Args:
        points: Axis → where; the others stay as in ``GROWTH``: a sigmoid network of ``depth`` square layers,
            the examples of an update and those of a refresh. Default ``POINTS``, on an accelerator
            ``POINTS_ACCELERATED``.
        rounds: See :func:`~lab.timing.race`.
        device: Where.
        progress: Show a bar for each point.

    Returns:
        ``"rows"``: axis, ``at``, ``sgd_ms``, and ``ratio``, by method. ``"base"``: ``GROWTH``.
    """
    if points is None:
        points = POINTS if torch.device(device).type == "cpu" else POINTS_ACCELERATED
    rows = []
    for axis, values in points.items():
        for at in values:
            size = {**GROWTH, axis: at}
            widths = [size["width"]] * (size["depth"] + 1)
            network = lambda widths=widths, **options: MLP(widths, output="sigmoid", **options)  # noqa: E731
            task = Task(f"{axis} {at}", None, None, None, network, Quadratic())
            entries = {name: contestant(task, name, device) for name in GROWN}
            batch, statistics = (minibatch(entries[SGD], size[k], device) for k in ("batch", "statistics"))
            sgd, *others = race(entries, batch, statistics, rounds=rounds, progress=progress)
            ratio = {row["method"]: row["update_ms"] / sgd["update_ms"] for row in others}
            rows.append({"axis": axis, "at": at, "sgd_ms": sgd["update_ms"], "ratio": ratio})
    return {"rows": rows, "base": GROWTH}


def compiled(*, rounds: int = ROUNDS, device: str = "cpu", progress: bool = False) -> dict[str, Any]:
    """Whether ``torch.compile`` of ``update``, the equation itself, pays: each method beside itself compiled.

    On the CIFAR-10 network, where a step is least of all matrix products. A graph is made for each layer.

    Args:
        rounds: See :func:`~lab.timing.race`.
        device: Where.
        progress: Show a bar.

    Returns:
        ``"rows"``: method, ``update_ms``, ``compiled_ms`` and their ``ratio``, less than one if it pays.
        ``"skipped"``: why a method is missing, by name.
    """
    plan = BENCHMARKS[CIFAR]
    task = Task(CIFAR, None, None, None, plan.network, plan.loss)
    entries, skipped = {}, {}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings(action="ignore"):
        for name in COMPILED:
            plain, entry = contestant(task, name, device), contestant(task, name, device)
            batch = minibatch(entry, device=device)
            method = entry.optimizer.method
            method.update = torch.compile(method.update, dynamic=False)
            try:
                entry.refresh(*batch)
                entry.update(*batch)
            except Exception as error:  # no C++ compiler, say
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                entries |= {name: plain, f"{name} compiled": entry}
        times = race(entries, batch, rounds=rounds, progress=progress)
    rows = []
    for plain, other in zip(times[::2], times[1::2], strict=True):
        row = {"method": plain["method"], "update_ms": plain["update_ms"], "compiled_ms": other["update_ms"]}
        rows.append({**row, "ratio": row["compiled_ms"] / row["update_ms"]})
    return {"rows": rows, "skipped": skipped}


def bench_path(out: str | Path, device: str = "cpu") -> Path:
    """Where :func:`bench` leaves its record: of a CPU in ``bench.json``, of a GPU in ``bench.cuda.json``.

    Example:
        >>> bench_path("out", "cuda:0").name
        'bench.cuda.json'
    """
    kind = torch.device(device).type
    return Path(out) / ("bench.json" if kind == "cpu" else f"bench.{kind}.json")


def bench(
    *,
    parts: Sequence[str] = PARTS,
    rounds: int = ROUNDS,
    device: str = "cpu",
    out: str | Path = "out",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the cost table, or parts of it, and return the content of its record, :func:`bench_path`.

    Each part is added to the record when it is done, with machine, date, and the load that it began under; of
    a part that is there more than once, the last counts.

    Args:
        parts: Of :data:`PARTS`.
        rounds: See :func:`~lab.timing.race`.
        device: Where.
        out: Folder of the record.
        progress: Show bars.

    Raises:
        RecordError: If the record is damaged or cannot be written.
        ValueError: For an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, got {part!r}")
    record = Record(bench_path(out, device), "bench", {"batch": BATCH, "refresh_every": REFRESH_EVERY})
    options = {"rounds": rounds, "device": device, "progress": progress}
    for part in (part for part in PARTS if part in parts):
        run = {"part": part}
        with suppress(AttributeError, OSError):  # Windows has no such thing
            run["load"] = round(os.getloadavg()[0], 2)
        if part in ("growth", "compile"):
            run |= {"growth": growth, "compile": compiled}[part](**options)
        else:
            run |= costs(part, **options)
        record.add({**run, "rounds": rounds, "provenance": provenance(device)})
    return record.content


def latest(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a record, the last of each."""
    return {run["part"]: run for run in content["runs"]}


def report(content: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The tables of a record, to be printed: title → rows of cells, the first one the head."""
    tables = {}
    for part, run in ((part, run) for part, run in latest(content).items() if part in PARTS):
        machine = run["provenance"]["machine"]
        where = f"{run['provenance']['date']}, {machine['processor']}, {machine['threads']} threads"
        where += "" if machine["device"] == "cpu" else f", {machine['device']}"
        load = f", load {run['load']}" if "load" in run else ""
        show = {"growth": _growth_table, "compile": _compile_table}
        title, rows = show.get(part, _cost_table)(run)
        tables[f"{title} ({where}{load})"] = rows
        if run.get("skipped"):
            tables[f"{part}: skipped"] = list(run["skipped"].items())
    return tables


def _cost_table(run: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    head = "method, ms per update, quartiles, ratio, aim, ms per refresh, GFLOP, of GEMM rate"
    rows = [tuple(f"{head}, state MB, held MB, peak MB".split(", "))]
    for row in run["rows"]:
        own = row["state_bytes"]
        rows.append(
            (
                row["method"],
                f"{row['update_ms']:.2f}",
                "{:.2f} to {:.2f}".format(*row["quartiles_ms"]),
                f"{row['ratio']:.2f}",
                str(aim(run["part"], row["method"]) or ""),
                f"{row['refresh_ms']:.1f}",
                f"{row['flop'] / 1e9:.2f}",
                "" if row["gemm_share"] is None else f"{row['gemm_share']:.2f}",
                "" if own is None else f"{own / 1e6:.1f}",
                f"{row['held_bytes'] / 1e6:.1f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
            )
        )
    rate = "" if run["gemm_gflops"] is None else f": GEMM {run['gemm_gflops']:.0f} GFLOP/s"
    return f"{run['part']}{rate}", rows


def _growth_table(run: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    rows = [("axis", "at", "SGD ms", *(f"{name} ratio" for name in run["rows"][0]["ratio"]))]
    for row in run["rows"]:
        ratios = (f"{ratio:.2f}" for ratio in row["ratio"].values())
        rows.append((row["axis"], str(row["at"]), f"{row['sgd_ms']:.2f}", *ratios))
    base = ", ".join(f"{axis} {at}" for axis, at in run["base"].items())
    return f"growth of the ratio to SGD, else {base}", rows


def _compile_table(run: dict[str, Any]) -> tuple[str, list[tuple[str, ...]]]:
    rows = [("method", "ms per update", "compiled", "ratio")]
    numbers = ("update_ms", "compiled_ms", "ratio")
    rows += [(row["method"], *(f"{row[key]:.2f}" for key in numbers)) for row in run["rows"]]
    return f"compile: torch.compile of the update on {CIFAR}", rows
