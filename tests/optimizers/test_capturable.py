"""``capturable=True``: what a CUDA graph holds of an update has to stay where it is. Here without one."""

import pytest
import torch
from optimizer_list import assert_close, assert_same, batch, network, parameters, train
from torch import nn

from sogrid import watching
from sogrid.capture import CaptureError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN

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
