"""What a step on convolutions takes: patches of one layer at a time, of few examples between refreshes."""

import gc
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, EKFAC, KFAC

N, CHANNELS, SIDE = 64, 6, 10
LOSS = CrossEntropyAtLogits()
INPUT = N * CHANNELS * SIDE**2 * 4
"""Bytes of a layer's input, in float32."""
PATCHES = INPUT * 9
METHODS = {
    "acp": (lambda model, **o: ACP(model, 1.0, **o), 2.5),
    "kfac": (lambda model, **o: KFAC(model, 1.0, loss=LOSS, **o), 4.0),
    "kfac, reduced": (lambda model, **o: KFAC(model, 1.0, loss=LOSS, shared="reduce", **o), 2.0),
    "ekfac": (lambda model, **o: EKFAC(model, 1.0, loss=LOSS, **o), 4.0),
}
"""Their peak at a refresh, in patches of the largest layer."""


def network(depth):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AvgPool2d(SIDE), nn.Flatten(), nn.Linear(CHANNELS, 3))


def held():
    """Bytes of the tensors that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def most(work):
    """Bytes at the peak, beyond what there was, as torch's allocator on the CPU has it."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
    finally:
        gc.enable()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    levels = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return max(levels)


def measured(method, depth, updates=1, **options):
    """(kept after the backward pass, most in the step) of the last update; the first refreshes."""
    model = network(depth)
    x, y = torch.randn(N, CHANNELS, SIDE, SIDE), torch.arange(N) % 3
    optimizer = METHODS[method][0](model, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # which a step keeps
    for _ in range(updates - 1):
        LOSS(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    before = held()
    LOSS(model(x), y).backward()
    return held() - before, most(optimizer.step)


@pytest.mark.parametrize("method", METHODS)
def test_a_refresh_has_the_patches_of_one_layer_at_a_time(method):
    """A fifth of them, which four more layers have in statistics, is far from those of one more."""
    (_, two), (_, six) = measured(method, 2), measured(method, 6)
    assert two < METHODS[method][1] * PATCHES
    assert six - two < 0.2 * PATCHES


@pytest.mark.parametrize("method", ["acp", "kfac"])
def test_between_refreshes_a_bound_keeps_16_examples_and_their_patches(method):
    """Beside the mean inputs, no bound keeps nothing."""
    kept, peak = measured(method, 4, updates=2)
    without, least = measured(method, 4, updates=2, max_change=None)
    inputs = 4 * INPUT * 16 / N
    assert inputs <= kept - without < 1.1 * inputs
    assert peak < 2.5 * PATCHES * 16 / N
    assert least < 0.1 * PATCHES


@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_minibatch_is_held_after_the_step(method, gradients):
    make, _ = METHODS[method]
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = make(model, gradients=gradients, refresh_every=1)
    for _ in range(2):
        x = torch.randn(500, 1, 4) if "reduced" in method else torch.randn(500, 4)
        optimizer.zero_grad()
        LOSS(model(x).flatten(0, -2), torch.arange(500) % 3).backward()
        optimizer.step()
        del x
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    assert not [x.shape for x in tensors if 500 in x.shape]


def test_a_forward_pass_has_no_patches():
    """The mean input of all patches is that of the mean image's."""
    model, x = network(1), torch.randn(N, CHANNELS, SIDE, SIDE)
    least = most(lambda: model(x))
    optimizer = ACP(model, 1.0, max_change=None, refresh_every=None)
    assert most(lambda: model(x)) - least < INPUT / 2
    optimizer.close()
