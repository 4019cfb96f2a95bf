"""``capturable=True``: what a CUDA graph holds of an update has to stay where it is. Here without one."""

import copy

import pytest
import torch
from optimizer_list import assert_close, assert_same, batch, network, parameters, train
from torch import nn

from sogrid import watching
from sogrid.capture import CaptureError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN
from sogrid.optimizers.adaptive import ADAPTIVE

LOSS = CrossEntropyAtLogits()
KINDS = {
    "acp": lambda model, **o: ACP(model, 1.0, **o),
    "acp, heuristic": lambda model, **o: ACP(model, 1e-2, output_curvature="heuristic", **o),
    "nnn": lambda model, **o: NaturalNN(model, 1.0, **o),
    "kfac": lambda model, **o: KFAC(model, 1.0, loss=LOSS, curvature="fisher_exact", **o),
    "ekfac": lambda model, **o: EKFAC(model, 1.0, loss=LOSS, curvature="fisher_exact", **o),
}
FREE = {"refresh_every": None, "momentum": 0.5}


def refresh(model, optimizer, seed, n=12):
    x, y = batch(seed, n)
    optimizer.refresh(lambda: LOSS(model(x), y))


def held(optimizer):
    """Where everything is that a step reads and keeps."""
    return [
        value.data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_a_refresh_writes_where_the_step_reads(kind, gradients):
    models = network(), network()
    optimizers = [
        KINDS[kind](m, capturable=c, gradients=gradients, **FREE)
        for m, c in zip(models, (True, False), strict=True)
    ]
    for seed in (1, 2, 3):
        for model, optimizer in zip(models, optimizers, strict=True):
            refresh(model, optimizer, 10 + seed)
            train(model, optimizer, 2, first=seed)
        if seed == 1:
            places = held(optimizers[0])
        assert held(optimizers[0]) == places
    assert_close(*map(parameters, models), rtol=1e-9)


def test_two_refreshes_without_a_step_between_draw_other_targets():
    model = network()
    optimizer = KFAC(model, 1.0, loss=LOSS, capturable=True, **FREE)
    found = []
    for _ in range(2):
        refresh(model, optimizer, 1)
        found.append(optimizer.state[model[0].weight]["b_inverse"].clone())
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_loaded_is_written_to_alone(kind):
    model, other = network(), network()
    first, second = (KINDS[kind](m, capturable=True, **FREE) for m in (model, other))
    refresh(model, first, 1)
    train(model, first)
    second.load_state_dict(first.state_dict())
    before = [dict(s) for s in copy.deepcopy(list(first.state.values()))]
    refresh(other, second, 2)
    train(other, second)
    assert_same([dict(s) for s in first.state.values()], before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_after_the_model_was_moved(kind):
    model = network(dtype=torch.float32)
    optimizer = KINDS[kind](model, capturable=True, **FREE)
    x, y = batch(1, dtype=torch.float32)
    optimizer.refresh(lambda: LOSS(model(x), y))
    train(model, optimizer)
    model.double()
    refresh(model, optimizer, 1)
    train(model, optimizer)


def test_a_layer_that_is_first_seen_leaves_the_others_where_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.ask = nn.Linear(4, 3), nn.Linear(4, 3), False
            self.double()

        def forward(self, x):
            return self.one(x) + (self.other(x) if self.ask else 0)

    model = Model()
    optimizer = KINDS["acp"](model, capturable=True, **FREE)
    refresh(model, optimizer, 1)
    place = optimizer.state[model.one.weight]["inverse"].data_ptr()
    model.ask = True
    refresh(model, optimizer, 2)
    assert optimizer.state[model.one.weight]["inverse"].data_ptr() == place
    assert "inverse" in optimizer.state[model.other.weight]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 2, ADAPTIVE])
def test_outside_a_graph_a_capturable_step_is_any_other(kind, every):
    found = []
    for capturable in (False, True):
        model = network()
        optimizer = KINDS[kind](model, capturable=capturable, refresh_every=every)
        for seed in range(12):
            train(model, optimizer, first=1 + seed % 3)
        found.append(parameters(model))
        if every == 1:
            refresh(model, optimizer, 1)
            assert not optimizer.refresh_due
    assert_close(*found, rtol=1e-9)


def test_statistics_of_another_shape_are_refused_and_nothing_is_written():
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    optimizer = KINDS["acp"](model, capturable=True, **FREE)
    refresh(model, optimizer, 1)
    before = [
        {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for s in optimizer.state.values()
    ]
    with pytest.raises(CaptureError, match="as many examples"):
        refresh(model, optimizer, 2, n=13)
    with pytest.raises(CaptureError, match="as many examples"):
        refresh(model, optimizer, 2, n=64)  # no longer thin
    after = [{k: v for k, v in s.items() if isinstance(v, torch.Tensor)} for s in optimizer.state.values()]
    assert_same(after, before)


def test_what_cannot_be_captured_is_refused(monkeypatch):
    def captured(kind, **options):
        model = network()
        optimizer = kind(model, **options)
        if options.get("refresh_every", 1) is None and "lr" not in options:
            refresh(model, optimizer, 1)
        if options.pop("warm", False):
            train(model, optimizer)
        x, y = batch(1)
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        monkeypatch.setattr(watching, "capturing", lambda: True)
        before = parameters(model)
        try:
            optimizer.step()
        except RuntimeError:
            assert_same(parameters(model), before)
            raise
        finally:
            monkeypatch.undo()
        return optimizer

    with pytest.raises(RuntimeError, match="capturable=True"):
        captured(KINDS["acp"], **FREE)
    with pytest.raises(RuntimeError, match="refresh_every=None"):
        captured(KINDS["acp"], capturable=True)
    with pytest.raises(RuntimeError, match="make a step before"):
        captured(KINDS["acp"], capturable=True, **FREE)
    model = network()
    optimizer = KINDS["acp"](model, capturable=True, **FREE)
    refresh(model, optimizer, 1)
    train(model, optimizer)
    monkeypatch.setattr(watching, "capturing", lambda: True)
    train(model, optimizer)
    monkeypatch.undo()
    model = network()
    optimizer = CenteredGradientDescent(model, 0.1, capturable=True)
    train(model, optimizer)
    monkeypatch.setattr(watching, "capturing", lambda: True)
    train(model, optimizer)
