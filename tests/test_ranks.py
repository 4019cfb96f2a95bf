"""Several processes with one minibatch: gloo on this machine, two processes and three, against one.

Processes are dear, so each group runs every scenario once (:func:`work`) and its tests look at what it wrote.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import signal
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from children import Child
from optimizer_list import Method, assert_close, assert_same, batch, named, network, parameters
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sogrid.autograd import CaptureError
from sogrid.factorize import FactorizationError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, Newton, UpdatedBackprop
from sogrid.optimizers.acp import ACPMethod
from sogrid.ranks import _balanced

PROGRAM = "import sys, test_ranks; test_ranks.work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
TIMEOUT = 60  # seconds; nothing here takes as many
SIZES = {2: [(1, 1), (3, 3)], 3: [(1, 1, 1)]}
"""Examples by rank. Of two every matrix is thin, of six those that were thin on each rank are not."""
METHODS = [
    *("centred", "centred, bias corrected", "acp", "acp, heuristic", "acp, exact Tikhonov"),
    *(
        "acp, averaging",
        "acp, rank 2",
        "acp, adaptive",
        "kfac, exact fisher",
        "kfac, empirical fisher",
        "ekfac",
        "nnn",
    ),
]
OPTIONS = [
    {"gradients": "matrix", "max_change": None, "loss": "mean"},
    {"gradients": "matrix", "max_change": 0.05, "loss": "sum"},
    {"gradients": "factored", "max_change": None, "loss": "sum"},
    {"gradients": "factored", "max_change": 0.05, "loss": "mean"},
]
CASES = [(name, options) for name in METHODS for options in OPTIONS]
SEEDS = range(1, 4)


def make(name: str, model: nn.Module, **options) -> torch.optim.Optimizer:
    method: Method = named(name)
    refreshing = {"refresh_every": 2} if method.refreshes and "adaptive" not in name else {}
    return method(model, **refreshing | options)


def train(model, optimizer, sizes, rank=None, seeds=SEEDS, loss="mean") -> list[torch.Tensor]:
    """Parameters after a step for each seed, by a rank's part of the minibatch, or by all of it."""
    for seed in seeds:
        x, y = batch(seed, n=sum(sizes))
        if rank is not None:
            x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        optimizer.zero_grad()
        CrossEntropyAtLogits(loss)(model(x), y).backward()
        optimizer.step()
    return parameters(model)


def alone(name, sizes, **options):
    """One process on the joint minibatch."""
    model = network()
    return train(model, make(name, model, **options), sizes, loss=options.get("loss", "mean"))


def shared(name, sizes, rank, wrapping=None, **options):
    """A process of several."""
    model = DistributedDataParallel(network(), **wrapping or {})
    return train(model, make(name, model, **options), sizes, rank, loss=options.get("loss", "mean"))


# -- in the processes ------------------------------------------------------------------------------------


def work(rank: int, size: int, folder: str) -> None:
    """All scenarios, one after the other; what each returned or raised is saved."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    early = network()
    optimizer = make("acp", early)
    before = {"an optimizer made before the group": (early, optimizer)}
    store = distributed.FileStore(f"{folder}/store", size)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    results = {}
    for scenario in SCENARIOS[size]:
        try:
            results[scenario.__name__] = scenario(rank, size, before)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
        torch.save(results, f"{folder}/{rank}.new")
        os.replace(f"{folder}/{rank}.new", f"{folder}/{rank}")


def cases(rank, size, before):
    return {
        (name, *options.values(), sizes): shared(name, sizes, rank, **options)
        for name, options in CASES
        for sizes in SIZES[size]
    }


def long_run(rank, size, before):
    """The issue's: 250 steps in float32."""
    model = network(dtype=torch.float32)
    model = model if rank is None else DistributedDataParallel(model)
    optimizer = ACP(model, lr=0.1, damping=0.1, refresh_every=10)
    for seed in range(250):
        x, y = batch(seed % 25, n=8 * size, dtype=torch.float32)
        x, y = (x, y) if rank is None else (x.chunk(size)[rank], y.chunk(size)[rank])
        optimizer.zero_grad()
        CrossEntropyAtLogits()(model(x), y).backward()
        optimizer.step()
    return parameters(model)


def drifting(rank, size, before):
    """Which layers an adaptive schedule refreshes when, and where that leads."""
    found = []
    for gradients in ("matrix", "factored"):
        model = network() if rank is None else DistributedDataParallel(network())
        plain, log = getattr(model, "module", model), []
        optimizer = ACP(model, lr=10.0, damping=1e-3, refresh_every="adaptive", gradients=gradients)
        for seed in range(40):
            states = [optimizer.state.get(plain[i].weight) for i in (0, 2)]
            x, y = batch(seed, n=4 * size)
            x, y = (x, y) if rank is None else (x.chunk(size)[rank], y.chunk(size)[rank])
            optimizer.zero_grad()
            CrossEntropyAtLogits()(model(x * (1 + seed / 8)), y).backward()
            optimizer.step()
            log.append(
                [optimizer.state[plain[i].weight] is not old for i, old in zip((0, 2), states, strict=True)]
            )
        found.append((log, parameters(model)))
    return found


UNEVEN = {2: (5, 2), 3: (4, 1, 2)}
"""Of these some matrices are whole on one rank and thin on another."""


def uneven(rank, size, before):
    """A last minibatch of which ranks have unequal parts."""
    return {
        (name, gradients, loss): shared(
            name, UNEVEN[size], rank, gradients=gradients, loss=loss, max_change=bound
        )
        for name in METHODS
        for gradients in ("matrix", "factored")
        for loss, bound in (("mean", None), ("sum", 0.05))
    }


LENGTHS = ("acp", "kfac, empirical fisher", "ekfac, empirical")


def lengths(rank, size, before):
    """Sequences that are longer on one rank than on the other, and a schedule that looks at what it costs."""
    return {name: of_lengths(name, rank) for name in LENGTHS}


def of_lengths(name, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    model = DistributedDataParallel(model)
    optimizer = named(name)(model, refresh_every="adaptive", lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    for t in range(80):
        s = 3 + (t + 2 * rank) % 5
        x = (1 + t % 7) * torch.randn(8, s, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        CrossEntropyAtLogits()(model(x).mean(1), torch.arange(8) % 3).backward()
        optimizer.step()
    return parameters(model)


WRAPPINGS = [
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True, "broadcast_buffers": False},
]


def wrappings(rank, size, before):
    return {
        (*wrapping, gradients): shared("acp, averaging", (3, 3), rank, wrapping, gradients=gradients)
        for wrapping in WRAPPINGS
        for gradients in ("matrix", "factored")
    }


def made_of(rank, size, before):
    """What an optimizer may be given, and when."""
    early, optimizer = before["an optimizer made before the group"]
    found = {"before the group": train(DistributedDataParallel(early), optimizer, SIZES[size][0], rank)}
    inner = network()
    optimizer = make("acp", inner)
    found["the inner module"] = train(DistributedDataParallel(inner), optimizer, SIZES[size][0], rank)
    outer = DistributedDataParallel(network())
    optimizer = make("acp", outer, process_group=distributed.group.WORLD)
    compiled = torch.compile(outer, backend="eager")
    assert make("acp", compiled).model is outer.module
    make("acp", outer).step()  # without any gradient
    found["a group"] = train(outer, optimizer, SIZES[size][0], rank)
    kept = pickle.loads(pickle.dumps(optimizer))
    assert optimizer.model is outer.module
    assert kept.process_group is None is copy.deepcopy(optimizer).process_group
    found["a pickle"] = train(DistributedDataParallel(kept.model), kept, SIZES[size][0], rank, seeds=[7])
    found["going on"] = train(outer, optimizer, SIZES[size][0], rank, seeds=[7])
    return found


def by_itself(rank, size, before):
    """Each process on a model of its own."""
    model = network(seed=rank)
    optimizer = make("acp", model, process_group=False)
    assert copy.deepcopy(optimizer).process_group is False
    return train(model, optimizer, SIZES[size][1], rank)


def accumulated(rank, size, before):
    """Two backward passes, of which the first is not averaged."""
    return {gradients: accumulate(rank, size, gradients) for gradients in ("matrix", "factored")}


def accumulate(rank, size, gradients):
    model = network() if rank is None else DistributedDataParallel(network())
    optimizer = make("acp", model, gradients=gradients)
    for seeds in ((1, 2), (3, 4)):
        optimizer.zero_grad()
        for seed in seeds:
            x, y = batch(seed, n=3 * size)
            x, y = (x, y) if rank is None else (x.chunk(size)[rank], y.chunk(size)[rank])
            with model.no_sync() if rank is not None and seed == seeds[0] else nullcontext():
                CrossEntropyAtLogits()(model(x), y).backward()
        optimizer.step()
    return parameters(model)


class Mixed(nn.Module):
    """Convolutions, one with groups, a norm that is trained plainly, a layer without bias, and one with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.groups = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.plain, self.last = nn.Linear(8, 5, bias=False), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        h = self.norm(self.groups(torch.tanh(self.conv(x))).flatten(1))
        return self.last(torch.tanh(self.plain(h)))


def mixed(rank, size, before):
    return {
        (gradients, loss): mix(rank, size, gradients, loss)
        for gradients in ("matrix", "factored")
        for loss in ("mean", "sum")
    }


def mix(rank, size, gradients, loss):
    model = Mixed() if rank is None else DistributedDataParallel(Mixed())
    optimizer = ACP(
        *(model, 0.1, 0.3),
        **{"other_lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "max_change": 0.1},
        **{"refresh_every": 2, "averaging": 0.5, "gradients": gradients, "reduction": loss},
        output_curvature="heuristic",
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(4 * size, 1, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (len(x),), generator=generator)
        x, y = (x, y) if rank is None else (x.chunk(size)[rank], y.chunk(size)[rank])
        optimizer.zero_grad()
        CrossEntropyAtLogits(loss)(model(x), y).backward()
        optimizer.step()
    return parameters(model)


def refreshed(rank, size, before):
    """By a minibatch of its own, and of draws that are each rank's own."""
    return {name: refresh(name, rank, size) for name in ("acp, heuristic", "kfac, exact fisher")} | {
        "kfac, sampled fisher": shared("kfac, sampled fisher", SIZES[size][0], rank)
    }


def refresh(name, rank, size):
    model = network() if rank is None else DistributedDataParallel(network())
    optimizer = make(name, model, refresh_every=None)
    x, y = batch(9, n=4 * size)
    x, y = (x, y) if rank is None else (x.chunk(size)[rank], y.chunk(size)[rank])
    optimizer.refresh(lambda: CrossEntropyAtLogits()(model(x), y))
    return train(model, optimizer, SIZES[size][0], rank)


def resumed(rank, size, before):
    """Every rank goes on from the file of the first."""
    model = DistributedDataParallel(network())
    optimizer = make("acp, averaging", model, momentum=0.5)
    train(model, optimizer, SIZES[size][1], rank)
    saved = [copy.deepcopy([model.module.state_dict(), optimizer.state_dict()]) if rank == 0 else None]
    straight = train(model, optimizer, SIZES[size][1], rank, seeds=[4, 5])
    distributed.broadcast_object_list(saved, 0)
    model = network(seed=rank + 5)
    optimizer = make("acp, averaging", model, momentum=0.5)
    model.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    again = train(DistributedDataParallel(model), optimizer, SIZES[size][1], rank, seeds=[4, 5])
    return straight, again


def raised(action) -> tuple[str, str]:
    """The type and text of what an action raises."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def failures(rank, size, before):
    """What goes wrong on one rank is raised on all, and changes nothing; then training goes on."""
    found = {}
    for gradients in ("matrix", "factored"):
        model = DistributedDataParallel(network())
        optimizer = make("acp", model, gradients=gradients)
        old, (x, y) = parameters(model), batch(rank, n=3)

        def attempt(scale=1.0, mode=True, model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            (scale * CrossEntropyAtLogits()(model.train(mode)(x), y)).backward()
            optimizer.step()

        found[gradients, "NaN"] = raised(lambda: attempt(scale=float("nan") if rank else 1.0))
        found[gradients, "evaluation mode"] = raised(lambda: attempt(mode=rank == 0))
        assert_same(parameters(model), old)
        train(model.train(), optimizer, SIZES[size][0], rank)
        found[gradients, "afterwards"] = parameters(model)
    return found


def more_failures(rank, size, before):
    model = DistributedDataParallel(network())
    optimizer = ACP(model, lr=0.1, damping=0.0)
    old = parameters(model)
    found = {"singular": raised(lambda: train(model, optimizer, (2, 2), rank))}
    assert not optimizer.state

    def closure():
        if rank == 1:
            raise KeyError("of the user")
        return model.module(batch()[0]).sum()

    found["closure"] = raised(lambda: optimizer.refresh(closure))
    assert_same(parameters(model), old)
    apart = network()
    found["not wrapped"] = raised(lambda: train(apart, make("acp", apart), (2, 2), rank))
    assert_same(parameters(apart), old)
    clipped = DistributedDataParallel(network())
    optimizer = make("acp", clipped, gradients="factored")

    def clip():
        CrossEntropyAtLogits()(clipped(batch(rank)[0]), batch(rank)[1]).backward()
        nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
        optimizer.step()

    found["clipped"] = raised(clip)
    assert_same(parameters(clipped), old)
    return found


class Sometimes(nn.Module):
    """A layer that is used where it is wanted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x, twice=False):
        return self.second(self.first(x) if twice else x)


def a_layer_of_one_rank(rank, size, before):
    model = DistributedDataParallel(Sometimes(), find_unused_parameters=True)
    optimizer = make("centred", model)
    old = parameters(model)
    CrossEntropyAtLogits()(model(batch()[0], twice=rank == 1), batch()[1]).backward()
    found = raised(optimizer.step)
    assert_same(parameters(model), old)
    return found


def refused(rank, size, before):
    loss, model = CrossEntropyAtLogits(), network()
    options = {"lr": 0.1, "loss": loss}
    for kind in (UpdatedBackprop, Newton):
        train(model, kind(model, **options, process_group=False), (4, 4))
    return [raised(lambda kind=kind: kind(model, **options)) for kind in (UpdatedBackprop, Newton)]


def sharded(rank, size, before):
    """FSDP2, before and after the optimizer is made; and tensor parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    model = fully_shard(network(), mesh=mesh)
    found = [raised(lambda: make("acp", model)), raised(lambda: Newton(model, loss=CrossEntropyAtLogits()))]
    model = network()
    optimizer = make("acp", model)
    fully_shard(model, mesh=mesh)
    found.append(raised(lambda: train(model, optimizer, (2, 2), rank)))
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    found.append(raised(lambda: CenteredGradientDescent(layer, lr=0.1)))
    return found


def killed(rank, size, before):
    """The last rank dies in the middle of a step, when statistics have been shared and changes have not."""
    model = DistributedDataParallel(network())
    optimizer = make("acp", model, gradients="factored", max_change=0.1)
    old, update = parameters(model), ACPMethod.update
    if rank == size - 1:
        ACPMethod.update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        found = raised(lambda: train(model, optimizer, SIZES[size][0], rank))
    finally:
        ACPMethod.update = update
    return found, old, parameters(model)


SCENARIOS = {
    2: [
        *(cases, long_run, drifting, lengths, uneven, wrappings, made_of, by_itself, accumulated, mixed),
        *(refreshed, resumed, failures, more_failures, a_layer_of_one_rank, refused, sharded),
    ],
    3: [cases, drifting, uneven, made_of, killed],
}


# -- here ------------------------------------------------------------------------------------------------


def started(size: int, folder: Path) -> list[Child]:
    return [Child(PROGRAM, rank, size, folder, path=(Path(__file__).parent,)) for rank in range(size)]


def results(size: int, folder: Path) -> list[dict]:
    """What each rank saved."""
    children = started(size, folder)
    texts = [child.communicate(2 * TIMEOUT) for child in children]
    codes = [child.wait() for child in children]
    for child in children:
        child.__exit__()
    expected = [0] * size if size == 2 else [0] * (size - 1) + [-signal.SIGKILL]
    assert codes == expected, texts
    found = [torch.load(folder / str(rank), weights_only=True) for rank in range(size)]
    for result in found:
        for scenario, value in result.items():
            assert not isinstance(value, str), f"{scenario}: {value}"
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return results(3, tmp_path_factory.mktemp("three"))


def of_all(ranks, scenario):
    """What every rank found, which has to be the same to the bit."""
    first, *others = (found[scenario] for found in ranks)
    for other in others:
        assert_same(other, first)
    return first


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_one_process_on_the_joint_minibatch(name, options, two, three):
    for ranks in (two, three):
        found = of_all(ranks, "cases")
        for sizes in SIZES[len(ranks)]:
            assert_close(found[name, *options.values(), sizes], alone(name, sizes, **options), 1e-9)


def test_an_adaptive_schedule_is_that_of_one_process(two, three):
    for ranks in (two, three):
        for (log, after), (expected, alone_after) in zip(
            of_all(ranks, "drifting"), drifting(None, len(ranks), {}), strict=True
        ):
            assert log == expected
            assert 2 < sum(map(sum, log)) < 60
            assert_close(after, alone_after, 1e-8)


def test_250_steps_in_float32_are_those_of_one_process(two):
    assert_close(of_all(two, "long_run"), long_run(None, 2, {}), 1e-5)


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("name", METHODS)
def test_of_a_sum_unequal_parts_count_by_their_examples(name, gradients, two, three):
    for ranks in (two, three):
        sizes = UNEVEN[len(ranks)]
        expected = alone(name, sizes, loss="sum", max_change=0.05, gradients=gradients)
        assert_close(of_all(ranks, "uneven")[name, gradients, "sum"], expected, 1e-9)


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("name", METHODS)
def test_of_a_mean_unequal_parts_count_alike(name, gradients, two, three):
    """As if the examples of the smaller part were there several times."""
    for ranks in (two, three):
        sizes, model = UNEVEN[len(ranks)], network()
        optimizer = make(name, model, gradients=gradients, max_change=None)
        for seed in SEEDS:
            x, y = batch(seed, n=sum(sizes))
            index = torch.cat([part.repeat(20 // len(part)) for part in torch.arange(len(x)).split(sizes)])
            optimizer.zero_grad()
            CrossEntropyAtLogits()(model(x[index]), y[index]).backward()
            optimizer.step()
        assert_close(of_all(ranks, "uneven")[name, gradients, "mean"], parameters(model), 1e-9)


@pytest.mark.parametrize("name", LENGTHS)
def test_an_adaptive_schedule_is_the_same_on_all_ranks(name, two):
    assert all(p.isfinite().all() for p in of_all(two, "lengths")[name])


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("wrapping", WRAPPINGS, ids="-".join)
def test_every_way_of_wrapping_gives_the_same(wrapping, gradients, two):
    assert_close(of_all(two, "wrappings")[*wrapping, gradients], alone("acp, averaging", (3, 3)), 1e-9)


def test_wrapper_or_module_before_or_after(two, three):
    for ranks in (two, three):
        found, expected = of_all(ranks, "made_of"), alone("acp", SIZES[len(ranks)][0])
        for way in ("before the group", "the inner module", "a group"):
            assert_close(found[way], expected, 1e-9)
        assert_close(found["a pickle"], found["going on"])  # a new wrapper may sum in another order


def test_a_process_may_stay_alone(two):
    for rank in range(2):
        model = network(seed=rank)
        assert_same(two[rank]["by_itself"], train(model, make("acp", model), SIZES[2][1], rank))


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_passes_accumulate(gradients, two):
    assert_close(of_all(two, "accumulated")[gradients], accumulate(None, 2, gradients), 1e-9)


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_convolutions_other_parameters_momentum_and_decay(gradients, loss, two):
    assert_close(of_all(two, "mixed")[gradients, loss], mix(None, 2, gradients, loss), 1e-9)


@pytest.mark.parametrize("name", ["acp, heuristic", "kfac, exact fisher"])
def test_statistics_of_a_minibatch_of_their_own(name, two):
    assert_close(of_all(two, "refreshed")[name], refresh(name, None, 2), 1e-9)


def test_draws_differ_between_ranks():
    method, f = KFAC(network(), lr=0.1, loss=CrossEntropyAtLogits()).method, torch.zeros(32, 4)
    drawn = [
        tuple(*next(iter(vectors(f, earlier))).argmin(-1, keepdim=True).mT.tolist())
        for updates, rank in itertools.product(range(9), range(9))
        for vectors in [method.probe(updates, rank)]
        for earlier in range(2)
    ]
    assert len({*drawn}) == 162, "and between the passes of an update"
    assert all(map(torch.equal, method.probe(3)(f), method.probe(3, 0)(f)))


def test_the_state_of_the_first_rank_loads_everywhere(two):
    straight, again = of_all(two, "resumed")
    assert_same(again, straight)


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_an_error_of_one_rank_is_raised_on_all(gradients, two):
    """The workers check that nothing was changed."""
    kinds = {"NaN": FloatingPointError, "evaluation mode": CaptureError}
    for what, kind in kinds.items():
        for rank in range(2):
            found, message = two[rank]["failures"][gradients, what]
            assert found == kind.__name__
            if what == "evaluation mode" and gradients == "matrix":  # others come to all in the mean
                assert message.startswith("rank 1: ") == (rank == 0)
    assert_same(*(found["failures"][gradients, "afterwards"] for found in two))
    assert_close(two[0]["failures"][gradients, "afterwards"], alone("acp", SIZES[2][0]), 1e-9)


def test_errors_of_inverses_closures_and_gradients_are_raised_on_all(two):
    for rank, found in enumerate(two):
        found = found["more_failures"]
        assert found["singular"][0] == FactorizationError.__name__
        assert found["closure"] == ("KeyError", repr("rank 1: 'of the user'" if rank == 0 else "of the user"))
        assert found["not wrapped"][0] == CaptureError.__name__
        assert "not the same on every rank" in found["not wrapped"][1]
        assert found["clipped"][0] == CaptureError.__name__
        assert "clipped" in found["clipped"][1]


def test_a_layer_that_one_rank_uses_is_refused_by_all(two):
    for found in two:
        kind, message = found["a_layer_of_one_rank"]
        assert kind == CaptureError.__name__
        assert "'first'" in message


def test_methods_of_one_process_say_so(two):
    for kind, message in itertools.chain(*(found["refused"] for found in two)):
        assert kind == "NotImplementedError"
        assert "process_group=False" in message


def test_shards_are_refused_by_name(two):
    for found in two:
        assert len(found["sharded"]) == 4
        for kind, message in found["sharded"]:
            assert kind == "TypeError", message
            assert "DTensor" in message
            assert "DistributedDataParallel" in message


def test_when_a_rank_dies_the_others_raise_and_keep_their_parameters(three):
    assert "killed" not in three[2]
    for found in three[:2]:
        (kind, _), old, new = found["killed"]
        assert kind
        assert_same(new, old)


def test_replicas_are_refused():
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        ACP(nn.DataParallel(network()), lr=0.1)


def test_jobs_are_shared_out_by_their_costs():
    assert _balanced([1, 8, 3, 4, 2], 2) == [0, 0, 1, 1, 1]
    assert sorted(_balanced([5] * 6, 3)) == [0, 0, 1, 1, 2, 2]
