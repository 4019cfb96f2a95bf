"""The cost table: what is counted and measured, and the peers that take part."""

import re
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lab import bench as module
from lab import cli, timing
from lab.bench import (
    bench,
    compiled,
    costs,
    flops,
    growth,
    latest,
    memory,
    operations,
    report,
)
from lab.out_of_the_box import Transformer
from lab.peers import PEERS
from lab.timing import Contestant, contestant, minibatch, race
from sogrid import cli as records
from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, REFRESH_EVERY, Task
from sogrid.experiments.muon import MuonAndAdam
from sogrid.experiments.records import Record
from sogrid.experiments.reproduce import AE, CIFAR
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import KFAC

SGD = "standard_sgd"
MODULES = "asdl.precondition", "singd.optim.optimizer", "curvlinops", "nngeometry.metrics"


@pytest.fixture
def small(monkeypatch):
    """Both benchmarks with networks of five units, and growth of three."""
    for name, sizes, output in ((AE, [6, 5, 6], "sigmoid"), (CIFAR, [6, 5, 10], "identity")):
        network = lambda sizes=sizes, output=output, **o: MLP(sizes, output=output, **o)  # noqa: E731
        monkeypatch.setitem(timing.BENCHMARKS, name, replace(BENCHMARKS[name], network=network))
    small = {
        "narrow": module.NETWORKS["narrow"],
        "convolutions": module.Network(
            lambda: nn.Sequential(
                nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 9, 9), nn.Flatten(), nn.Linear(18, 10)
            ),
            module.NETWORKS["convolutions"].minibatch,
        ),
        "transformer": module.Network(
            lambda: nn.Sequential(Transformer(width=4, heads=1, blocks=1), nn.Flatten(0, 1)),
            module.NETWORKS["transformer"].minibatch,
        ),
    }
    monkeypatch.setattr(module, "NETWORKS", small)
    monkeypatch.setattr(timing, "WARM_UP", 1)


@pytest.fixture
def few(monkeypatch):
    """Of ours and torch's, three."""
    monkeypatch.setattr(
        module, "CONTESTANTS", dict.fromkeys(module.CONTESTANTS, (SGD, "adam", "acp_fixedalpha"))
    )


@pytest.fixture
def no_peers(monkeypatch):
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)


def task(sizes, loss=None):
    output = "identity" if isinstance(loss, CrossEntropyAtLogits) else "sigmoid"
    network = lambda **options: MLP(sizes, **{"output": output, **options})  # noqa: E731
    return Task("case", None, None, None, network, loss or Quadratic())


# FLOPs


def documented(method, sizes, n, q):
    """The table of the module's docstring."""
    layers, total = list(zip(sizes[1:], sizes, strict=False)), 0
    for k, (o, i) in enumerate(layers):
        total += (6 if k and method != "jaco_update" else 4) * n * o * i
        if method in ("acp", "acp_fixedalpha", "nnn2"):
            total += min(n, o) * (4 * q * i if q < i else 2 * i**2)
        if method == "kfac":
            i += 1
            total += min(n, o) * (4 * q * i if q < i else 2 * i**2)
            total += min(n, i) * (4 * q * o if q < o else 2 * o**2)
        if method == "jaco_update" and k:
            total += 2 * n * o * i + 4 * n**2 * (i + o) + sum(4 * n * a * b for a, b in layers[k + 1 :])
    return total


@pytest.mark.parametrize("method", [SGD, "centered_gradient_descent", "acp", "nnn2", "kfac", "jaco_update"])
@pytest.mark.parametrize(("n", "q"), [(20, 20), (20, 7), (35, 20), (20, 60)])
def test_an_update_makes_the_products_that_are_documented(method, n, q):
    sizes = [64, 48, 40, 64]
    entry = contestant(task(sizes), method)
    if entry.keeps_statistics:
        entry.refresh(*minibatch(entry, q))
    counted = flops(lambda: entry.update(*minibatch(entry, n)))
    biases = 4 * n * sum(sizes) if method in ("nnn2", "kfac") else 0  # Δb is a product of its own
    if method == "jaco_update":  # which runs a few examples again
        counted -= 2 * min(n, 4) * sum(i * o for i, o in pairwise(sizes))
    assert 0 <= counted - documented(method, sizes, n, q) <= biases


def test_products_are_those_of_sgd():
    entry = contestant(task([64, 48, 40, 64]), SGD)
    batch = minibatch(entry, 20)
    products = module.Products(entry.model, 20)
    assert products.flops == flops(lambda: products.update(*batch)) == flops(lambda: entry.update(*batch))


def test_muon_and_adam_are_torchs():
    torch.manual_seed(0)
    model, twin = (MLP([4, 3, 2], generator=torch.Generator().manual_seed(0)) for _ in range(2))
    ours = MuonAndAdam(model.parameters(), lr=0.01)
    weights, biases = ([p for p in twin.parameters() if p.dim() == d] for d in (2, 1))
    theirs = [
        torch.optim.Muon(weights, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(biases, lr=0.01),
    ]
    for _ in range(3):
        x = torch.randn(5, 4)
        for net, optimizers in ((model, [ours]), (twin, theirs)):
            net.zero_grad()
            net(x).square().sum().backward()
            [optimizer.step() for optimizer in optimizers]
    for p, p_twin in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, p_twin, rtol=0, atol=0)
    assert {id(p) for g in ours.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


# Rounds


class Ticking(Contestant):
    """Its updates take so many seconds of a clock that stands still otherwise, its refreshes thrice that."""

    keeps_statistics = True

    def __init__(self, now, seconds, refresh_updates=False):
        self.now, self.seconds, self.refresh_updates = now, seconds, refresh_updates
        self.seen = {}

    def update(self, x, y):
        self.seen["update"] = len(x)
        self.now[0] += self.seconds

    def refresh(self, x, y):
        self.seen["refresh"] = len(x)
        self.now[0] += 3 * self.seconds


def test_a_refresh_that_is_an_update_too_counts_as_what_it_adds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    entries = {"alone": Ticking(now, 1), "both": Ticking(now, 1, refresh_updates=True)}
    batch, statistics = ((torch.ones(n, 1), torch.ones(n, 1)) for n in (5, 7))
    alone, both = race(entries, batch, statistics, rounds=4)
    assert (alone["refresh_ms"], both["refresh_ms"]) == (3000, 2000)
    assert alone["update_ms"] == 1000 + 3000 / REFRESH_EVERY
    assert both["update_ms"] == 1000 + 2000 / REFRESH_EVERY
    assert entries["both"].seen == {"update": 5, "refresh": 7}


# Memory


def test_memory_is_what_the_tensors_say():
    case = task([300, 200, 300])
    entry = contestant(case, SGD)
    batch, parameters = minibatch(entry, 40), module._bytes(entry.model.parameters())
    for method, copies in ((SGD, 0), ("momentum", 1), ("adam", 2)):
        entry, held, peak = memory(lambda method=method: contestant(case, method), batch)
        own = module._bytes(module._tensors(entry.optimizer.state_dict()))
        assert own == pytest.approx(copies * parameters, abs=100)
        assert held == pytest.approx(own, abs=2000)
        assert peak >= held + parameters, "gradients are there in between"


def test_memory_of_ours_is_its_statistics_and_what_the_capture_keeps():
    case = task([300, 200, 300])
    batch = minibatch(contestant(case, SGD), 40)
    entry, held, _ = memory(lambda: contestant(case, "acp matrix"), batch)
    thin = 4 * 40 * (300 + 200)
    assert module._bytes(module._tensors(entry.optimizer.state_dict())) == pytest.approx(thin, rel=0.01)
    assert thin <= held <= 2.5 * thin


# Operations


@pytest.mark.parametrize("examples", [20, 200])
def test_operations_of_a_step(examples):
    """Statistics of 20 rows are thin throughout, of 200 in wide layers."""
    found = operations(examples)
    for part in (AE, CIFAR):
        assert found["SGD", part] == 1
        assert 40 <= found["Adam", part] <= 46
        assert found["ACP", part] <= 46
        assert found["KFAC", part] <= 60
        assert found["ACP, bounded", part] <= 70
        assert found["KFAC, bounded", part] <= 70


# The cost table


@pytest.mark.parametrize("part", ["convolutions", "narrow", "transformer"])
def test_networks_of_other_layers_have_rows_without_a_rate(small, part):
    """With as many peers as can run them, which here is most; the report prints what there is."""
    table = costs(part, rounds=2)
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == {*module.BESIDE, *PEERS} - set(table["skipped"])
    assert table["gemm_gflops"] is None
    for name, row in rows.items():
        assert row["update_ms"] > 0
        assert row["gemm_share"] is None
        assert (row["state_bytes"] is None) == (name in PEERS)
        assert row["flop"] >= rows[SGD]["flop"]
    machine = {"processor": "one", "threads": 1, "device": "cpu"}
    run = {"part": part, **table, "provenance": {"date": "today", "machine": machine}}
    title, *_ = report({"runs": [run]})
    assert title == f"{part} (today, one, 1 threads)"


@pytest.mark.parametrize("part", ["convolutions", "narrow", "transformer"])
def test_rows_of_other_layers_train_all_parameters(small, part):
    make, _, batch = module._of_network(part, "cpu")
    for entry in (build() for build in make.values()):
        for group in entry.optimizer.param_groups:
            group["lr"] = 0.1
        before = [p.detach().clone() for p in entry.model.parameters()]
        if entry.keeps_statistics:
            entry.refresh(*batch)
        entry.update(*batch)
        assert not any(torch.equal(p, q) for p, q in zip(entry.model.parameters(), before, strict=True))


@pytest.mark.parametrize(("part", "peers"), [(AE, PEERS), (CIFAR, PEERS), ("low_rank", {})])
def test_every_method_has_a_row_and_every_peer_one_or_a_reason(small, part, peers):
    table = costs(part, rounds=2)
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == {*module.CONTESTANTS[part], *peers} - set(table["skipped"])
    assert set(table["skipped"]) <= set(peers)
    assert set(table["peers"]) == set(peers) - set(table["skipped"])
    assert rows[SGD]["ratio"] == 1
    assert rows[SGD]["state_bytes"] == 0
    assert table["gemm_gflops"] > 0
    for name, row in rows.items():
        assert row["update_ms"] > 0
        assert row["gemm_share"] > 0
        assert row["flop"] >= rows[SGD]["flop"] if name != "jaco_update" else row["flop"] > 0
        assert (row["state_bytes"] is None) == (name in PEERS)
        assert 0 <= row["held_bytes"] <= row["peak_bytes"]


def test_a_peer_that_is_not_there_is_skipped_by_name_with_the_reason(small, few, no_peers, tmp_path):
    content = bench(parts=[AE], rounds=2, out=tmp_path, progress=False)
    (run,) = content["runs"]
    assert Record.read(tmp_path / "bench.json") == content
    assert set(run["skipped"]) == set(PEERS)
    assert run["skipped"]["singd"].startswith("ModuleNotFoundError: ")
    assert "singd" in run["skipped"]["singd"]
    (title, rows), (other, reasons) = report(content).items()
    assert title.startswith("mnist_autoencoder: GEMM ")
    assert [row[0] for row in rows[1:]] == list(module.CONTESTANTS[AE])
    assert other == "mnist_autoencoder: skipped"
    assert dict(reasons) == run["skipped"]


def test_a_peer_that_fails_is_skipped_too(small, few, no_peers, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(module.PEERS, "singd", broken)
    assert costs(AE, rounds=2)["skipped"]["singd"] == "RuntimeError: no such kernel"


# Peers


def peer(name, model, loss, **options):
    """A peer, or the test is skipped with the reason."""
    try:
        return PEERS[name](model, loss, **options)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def examples(loss, n=64):
    x = torch.rand(n, 20, generator=torch.Generator().manual_seed(0))
    return x, x if isinstance(loss, Quadratic) else x[:, :10].argmax(1)


def network(loss):
    sizes, output = ([20, 15, 20], "sigmoid") if isinstance(loss, Quadratic) else ([20, 15, 10], "identity")
    return MLP(sizes, output=output, scale=4.0, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [Quadratic(), CrossEntropyAtLogits()], ids=repr)
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_moves_the_parameters_and_the_loss_falls(name, loss):
    model, (x, y) = network(loss), examples(loss)
    entry = peer(name, model, loss, lr=0.05, damping=0.1)
    start, old = loss(model(x), y).item(), [p.detach().clone() for p in model.parameters()]
    entry.refresh(x, y)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)]
    assert all(moved) if entry.refresh_updates else not any(moved)
    for _ in range(20):
        entry.update(x, y)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
    assert loss(model(x), y).item() < 0.95 * start


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["asdfghjkl", "curvlinops", "nngeometry"])
def test_a_peer_takes_the_step_of_kfac(name):
    """Ours, damped in the peer's way; ASDL has no column for the bias in its input factor."""
    loss, damping, lr = CrossEntropyAtLogits(), 0.3, 0.05
    first, (x, y) = network(loss).double(), examples(loss)
    x, steps = x.double(), []

    def restart(model):
        model.load_state_dict(first.state_dict())

    model, theirs = network(loss).double(), network(loss).double()
    restart(theirs)
    entry = peer(name, theirs, loss, lr=lr, damping=damping)
    entry.refresh(x, y)
    restart(theirs)
    entry.update(x, y)
    restart(model)
    plain = name == "curvlinops"
    options = {"curvature": "gauss_newton_probabilities", "pi_correction": not plain, "refresh_every": None}
    optimizer = KFAC(model, lr, damping**2 if plain else damping, loss=loss, max_change=None, **options)
    optimizer.refresh(lambda: loss(model(x), y))
    loss(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    if name == "asdfghjkl":
        steps = _without_bias_column(first, loss, x, y, grads, lr, damping)
    else:
        steps = [p.detach() - q for p, q in zip(model.parameters(), first.parameters(), strict=True)]
    for p, q, step in zip(theirs.parameters(), first.parameters(), steps, strict=True):
        torch.testing.assert_close(p.detach() - q.detach(), step.detach(), rtol=1e-6, atol=1e-9)


def _without_bias_column(model, loss, x, y, grads, lr, damping):
    """−λ B⁻¹ ∇W A⁻¹ and −λ B⁻¹ ∇b, with damping split between A and B by π."""
    h, steps = x, []
    for k in range(0, len(model), 2):
        a = model[k](h).detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(model[k + 1 :](a), y) * len(x), a)
        factors = [(rows.mT @ rows).detach() / len(x) for rows in (h, g)]
        means = [factor.trace() / len(factor) for factor in factors]
        pi = (means[0] / means[1]).sqrt()
        shifts = damping**0.5 * pi, damping**0.5 / pi
        a_inverse, b_inverse = (
            torch.linalg.inv(factor + shift * torch.eye(len(factor), dtype=factor.dtype))
            for factor, shift in zip(factors, shifts, strict=True)
        )
        steps += [-lr * b_inverse @ grads[k] @ a_inverse, -lr * b_inverse @ grads[k + 1]]
        h = model[k + 1](a).detach()
    return steps


def test_what_make_bench_installs_has_every_peer():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.split("==", package)[0] for package in project["optional-dependencies"]["bench"]}
    assert {kind.distribution for kind in PEERS.values()} <= names


# Growth


def test_growth_goes_along_one_axis_at_a_time(small, monkeypatch):
    seen, inner = [], module.race

    def watched(entries, batch, statistics, **options):
        model = entries["acp"].model
        seen.append((model[0].out_features, len(model) // 2, len(batch[0]), len(statistics[0])))
        return inner(entries, batch, statistics, **options)

    monkeypatch.setattr(module, "race", watched)
    monkeypatch.setattr(module, "GROWTH", {"width": 4, "depth": 2, "batch": 8, "statistics": 6})
    points = {"width": (3, 4), "depth": (3,), "batch": (5,), "statistics": (7,)}
    rows = growth(points=points, rounds=2)["rows"]
    assert seen == [(3, 2, 8, 6), (4, 2, 8, 6), (4, 3, 8, 6), (4, 2, 5, 6), (4, 2, 8, 7)]
    assert [(row["axis"], row["at"]) for row in rows] == [(a, at) for a, ats in points.items() for at in ats]
    assert all(set(row["ratio"]) == {"acp", "kfac"} and row["sgd_ms"] > 0 for row in rows)


# torch.compile


def test_compiled_updates_race_with_their_plain_selves(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda update, dynamic: update)
    found = compiled(rounds=2)
    assert [row["method"] for row in found["rows"]] == list(module.COMPILED)
    for row in found["rows"]:
        assert row["ratio"] == row["compiled_ms"] / row["update_ms"] > 0
    assert found["skipped"] == {}


def test_what_cannot_be_compiled_is_skipped_with_the_reason(small, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda update, dynamic: fail)
    assert compiled(rounds=2) == {
        "rows": [],
        "skipped": dict.fromkeys(module.COMPILED, "RuntimeError: no compiler"),
    }


# The record


def test_parts_are_added_and_the_last_of_each_counts(small, few, no_peers, tmp_path, capsys, monkeypatch):
    arguments = ["bench", "--rounds", "2", "--out", str(tmp_path), "--quiet"]
    monkeypatch.setattr(growth, "__kwdefaults__", {**growth.__kwdefaults__, "points": {"width": (3,)}})
    monkeypatch.setattr(torch, "compile", lambda update, dynamic: update)
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = Record.read(tmp_path / "bench.json")
    assert [run["part"] for run in content["runs"]] == list(module.PARTS)
    for run in content["runs"]:
        assert run["provenance"]["machine"]["threads"] == torch.get_num_threads()
        assert run["rounds"] == 2
    assert content["settings"] == {"batch": BATCH, "refresh_every": REFRESH_EVERY}
    for title in (
        "mnist_autoencoder: GEMM",
        "cifar10_classifier: GEMM",
        "low_rank: GEMM",
        "growth of",
        "compile:",
    ):
        assert f"\n{title}" in f"\n{out}"
    assert re.search(r"acp_fixedalpha .* 1\.25 ", out)
    assert out.endswith(f"record: {tmp_path / 'bench.json'}\n")
    assert cli.main([*arguments, "--parts", "growth"]) == 0
    again = Record.read(tmp_path / "bench.json")
    assert [run["part"] for run in again["runs"]] == [*module.PARTS, "growth"]
    assert latest(again)["growth"] == again["runs"][-1]
    assert records.main(["records", "show", str(tmp_path / "bench.json")]) == 0
    assert records.main(["records", "list", str(tmp_path / "bench.json")]) == 0


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="part must be one of"):
        bench(parts=["cost"], out=tmp_path)
    for wrong, message in (
        (["--parts", "cost"], "--parts: there are mnist_autoencoder"),
        (["--rounds", "1"], "--rounds must be 2 or more"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
