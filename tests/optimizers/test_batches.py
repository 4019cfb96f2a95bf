"""Layers of one shape are stepped as one; ``tests/lab/test_bench.py`` counts the operations of a step."""

import copy
import weakref

import pytest
import torch
from optimizer_list import assert_close, assert_same, parameters
from torch import nn

from sogrid import shell
from sogrid.losses import Quadratic
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN, batches
from sogrid.optimizers.adaptive import ADAPTIVE

KINDS = {
    "centred": lambda model, **o: CenteredGradientDescent(model, **o),
    "acp": lambda model, **o: ACP(model, refresh_every=3, **o),
    "acp, heuristic": lambda model, **o: ACP(model, refresh_every=3, output_curvature="heuristic", **o),
    "acp, averaging": lambda model, **o: ACP(model, refresh_every=3, averaging=0.5, **o),
    "acp, adaptive": lambda model, **o: ACP(model, refresh_every=ADAPTIVE, **o),
    "nnn": lambda model, **o: NaturalNN(model, refresh_every=3, **o),
    "kfac": lambda model, **o: KFAC(model, loss=Quadratic(), refresh_every=3, **o),
    "kfac, rank": lambda model, **o: KFAC(model, loss=Quadratic(), refresh_every=3, rank=2, **o),
    "ekfac": lambda model, **o: EKFAC(model, loss=Quadratic(), refresh_every=3, **o),
}
WIDTH, N = 6, 20


class Alike(nn.Module):
    """Layers of one shape that may, and that may not, be stepped as one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.chain = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.free = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        self.frozen, self.tokens = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1)
        )
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.frozen.bias.requires_grad_(False)
        self.double()

    def forward(self, x):
        for layer in [*self.chain, *self.free, self.frozen]:
            x = torch.tanh(layer(x))
        x = x + torch.tanh(self.tokens(x.unsqueeze(1).repeat(1, 3, 1))).mean(1)
        x = x + self.convolutions(x.view(-1, 2, 3, 1).repeat(1, 1, 1, 3)).mean(3).flatten(1)
        return x + self.grouped(x[:, :4].unsqueeze(-1)).flatten(1).repeat(1, 2)[:, :WIDTH]


def update(model, optimizer, seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) + 0.5
    optimizer.zero_grad()
    Quadratic()(model(x), x).backward()
    optimizer.step()


def groups(model, lr):
    """A layer of the chain in a group of its own."""
    first = set(model.chain[0].parameters())
    return [
        {"params": [p for p in model.parameters() if p not in first and p.requires_grad]},
        {"params": list(first), "lr": lr / 2, "max_change": 0.01},
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("bound", [None, 0.03])
def test_the_step_is_that_of_each_layer_alone(kind, gradients, bound, monkeypatch):
    lr = 1e-3 if bound is None else 1.0
    options = {"lr": lr, "gradients": gradients, "max_change": bound, "momentum": 0.5, "weight_decay": 1e-3}
    found = []
    for small in (batches.SMALL, 0):
        monkeypatch.setattr(batches, "SMALL", small)
        model = Alike()
        optimizer = KINDS[kind](model, params=groups(model, lr), **options)
        for seed, n in enumerate((N, N, N, 7, N, N, N)):  # 7: the last minibatch of an epoch
            update(model, optimizer, seed, n)
        found.append(parameters(model))
    assert_close(*found, rtol=1e-8)


class Strided(nn.Module):
    """Kernels of one shape on one input, of other strides: with as many inputs they have other rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.all, self.some = nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(1, 2, 3, padding=1, stride=2)
        self.double()

    def forward(self, x):
        x = x.unsqueeze(1)
        return torch.cat([self.all(x).mean(1), self.some(x).flatten(1)[:, :2]], 1)[:, :WIDTH]


class Again(nn.Module):
    """One layer is used twice in a pass, the other once in each of two passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x):
        return self.twice(self.twice(x)).tanh() + self.both(x) if x.sum() > 0 else self.both(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("build", [Strided, Again])
def test_layers_of_one_shape_with_other_rows(kind, gradients, build, monkeypatch):
    found = []
    for small in (batches.SMALL, 0):
        monkeypatch.setattr(batches, "SMALL", small)
        model = build()
        optimizer = KINDS[kind](model, lr=0.1, gradients=gradients)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            x = torch.rand(N, WIDTH, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            for sign in (1, -1) if build is Again else (1,):
                f = model(sign * x)
                Quadratic()(f, x[:, : f.shape[1]]).backward()
            optimizer.step()
        found.append(parameters(model))
    assert_close(*found, rtol=1e-8)


class Pooled(nn.Module):
    """One layer sees an example a row, the other in another pass five rows an example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x):
        return self.one(x) if x.sum() > 0 else self.other(x).unflatten(0, (-1, 5)).sum(1)


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_a_sum_over_other_numbers_of_examples(gradients, monkeypatch):
    found = []
    for small in (batches.SMALL, 0):
        monkeypatch.setattr(batches, "SMALL", small)
        model = Pooled()
        optimizer = ACP(model, 0.1, reduction="sum", gradients=gradients, max_change=None)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.rand(N, WIDTH, dtype=torch.float64, generator=generator)
            optimizer.zero_grad()
            for sign in (1, -1):
                model(sign * x).square().sum().backward()
            optimizer.step()
        found.append(parameters(model))
    assert_close(*found, rtol=1e-8)


@pytest.mark.parametrize("kind", ["acp", "kfac", "kfac, rank", "ekfac"])
def test_states_of_a_batch_are_parts_of_its_stack_and_no_copies(kind):
    model = Alike()
    optimizer = KINDS[kind](model, lr=1.0)
    update(model, optimizer, 0)
    states = [optimizer.state[layer.weight] for layer in model.chain]
    for key, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert len({state[key].untyped_storage().data_ptr() for state in states}) == 1


def storages(optimizer, layers):
    return [
        value.untyped_storage()
        for layer in layers
        for value in optimizer.state[layer.weight].values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("kind", ["acp", "kfac", "kfac, rank", "ekfac"])
def test_layers_that_only_some_minibatches_ask_keep_no_stack_alive(kind):
    class Experts(nn.ModuleList):
        def forward(self, x):
            return sum(self[k](x) for k in self.asked)

    torch.manual_seed(0)
    model = Experts(nn.Linear(WIDTH, WIDTH) for _ in range(6)).double()
    optimizer = KINDS[kind](model, lr=0.1)
    optimizer.refresh_every = None
    model.asked = range(6)
    optimizer.refresh(lambda: Quadratic()(model(torch.ones(N, WIDTH).double()), torch.ones(N, WIDTH)))
    first = sum(storage.nbytes() for storage in storages(optimizer, model))
    for seed, model.asked in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1], [2, 4], [5])):
        update(model, optimizer, seed)
        held = {storage.data_ptr(): storage.nbytes() for storage in storages(optimizer, model)}
        assert sum(held.values()) == first


@pytest.mark.parametrize("kind", ["acp", "kfac", "kfac, rank", "ekfac"])
def test_a_minibatch_of_another_size_has_the_same_stacks(kind):
    """Where a CUDA graph of the usual ones reads."""
    model = Alike()
    optimizer = KINDS[kind](model, lr=0.1, gradients="factored")
    optimizer.refresh_every = 10
    places = []
    for seed, n in enumerate((N, 7, N)):
        update(model, optimizer, seed, n)
        places.append([storage.data_ptr() for storage in storages(optimizer, model.chain)])
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("kind", ["acp", "kfac", "ekfac"])
def test_a_step_reads_the_states_as_they_are(kind):
    """Written to in place, replaced, loaded from a copy."""
    model = Alike()
    optimizer = KINDS[kind](model, lr=1.0)
    update(model, optimizer, 0)
    key = next(key for key in optimizer.state[model.chain[1].weight] if key.endswith(("inverse", "basis")))
    other = copy.deepcopy(model)
    loaded = KINDS[kind](other, lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.state[model.chain[1].weight][key].mul_(2)
    state = loaded.state[other.chain[1].weight]
    loaded.state[other.chain[1].weight] = state | {key: 2 * state[key]}
    before = parameters(model)
    update(model, optimizer, 1)
    update(other, loaded, 1)
    assert_same(parameters(other), parameters(model))
    assert not torch.equal(before[2], model.chain[1].weight)


@pytest.mark.parametrize("kind", ["centred", "acp", "kfac", "ekfac"])
@pytest.mark.parametrize("bound", [None, 0.03])
def test_changes_of_a_large_model_are_not_there_at_once(kind, bound, monkeypatch):
    monkeypatch.setattr(batches, "SMALL", 0)
    found = []
    for at_once in (shell.AT_ONCE, 1):
        monkeypatch.setattr(shell, "AT_ONCE", at_once)
        model, changes, alive = Alike(), [], []
        optimizer = KINDS[kind](model, lr=0.01, max_change=bound, momentum=0.5)

        def watched(one, change=optimizer._change, changes=changes, alive=alive):
            alive.append(sum(ref() is not None for ref in changes))
            dw, db = change(one)
            changes.append(weakref.ref(dw))
            return dw, db

        optimizer._change = watched
        for seed in range(3):
            update(model, optimizer, seed)
        found.append(parameters(model))
    assert_same(*found)
    assert not any(alive)
