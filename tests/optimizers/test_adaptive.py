"""``refresh_every="adaptive"``: when a layer's statistics are renewed, and what of the time that takes."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from optimizer_list import assert_close, assert_same, parameters
from torch import nn

from sogrid.losses import Quadratic
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN
from sogrid.optimizers.adaptive import (
    ADAPTIVE,
    AT_ONCE,
    DRIFT,
    DUE,
    FRESH,
    LONGEST,
    WARM,
    drifted,
    priced,
    taken,
)
from sogrid.optimizers.batches import packed

WIDTHS = (6, 9, 9, 7, 4)
KINDS = {
    "acp": lambda model, **o: ACP(model, **{"lr": 10.0, **o}),
    "nnn": lambda model, **o: NaturalNN(model, **{"lr": 10.0, **o}),
    "kfac": lambda model, **o: KFAC(model, **{"lr": 10.0, "loss": Quadratic(), **o}),
    "ekfac": lambda model, **o: EKFAC(model, **{"lr": 10.0, "loss": Quadratic(), **o}),
}


def network():
    torch.manual_seed(0)
    pairs = pairwise(WIDTHS)
    return nn.Sequential(*(m for i, o in pairs for m in (nn.Linear(i, o), nn.Tanh()))).double()


def update(model, optimizer, seed, scale=1.0):
    """One update; the layers that were refreshed for it."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(24, WIDTHS[0], dtype=torch.float64, generator=generator) + 0.3
    before = {
        name: optimizer.state.get(m.weight) for name, m in model.named_children() if hasattr(m, "weight")
    }
    optimizer.zero_grad()
    Quadratic()(model(x), x[:, : WIDTHS[-1]].square()).backward()
    optimizer.step()
    return [name for name, state in before.items() if optimizer.state[model[int(name)].weight] is not state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_refreshes_stay_within_their_share_and_are_spread(kind, gradients):
    model = network()
    optimizer = KINDS[kind](model, refresh_every=ADAPTIVE, refresh_share=0.2, gradients=gradients)
    spent, times = 0.0, []
    for t in range(150):
        names = update(model, optimizer, t, scale=1 + t % 7)  # whose statistics never fit
        prices = priced({name: optimizer.state[model[int(name)].weight] for name in ("0", "2", "4", "6")})
        now = sum(prices[name] for name in names)
        assert t == 0 or len(names) <= 1 or now <= AT_ONCE
        spent += now
        assert t == 0 or spent <= 0.2 * (t + WARM) + 1e-9
        times += [(t, name) for name in names]
    assert times[:4] == [(0, name) for name in ("0", "2", "4", "6")]
    assert spent > 0.2 * 150, "nothing else was held back"


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_stands_still_is_left_alone_and_looked_at_ever_less(kind):
    model = network()
    optimizer = KINDS[kind](model, refresh_every=ADAPTIVE, lr=0.0)
    refreshed = [update(model, optimizer, 1) for _ in range(80)]
    assert refreshed[0]
    assert not any(refreshed[1:])
    assert optimizer.param_groups[0]["schedule"]["gap"] == LONGEST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [4.0, 0.25])
def test_inputs_that_grow_or_shrink_are_due_at_the_next_look(kind, scale):
    model = network()
    optimizer = KINDS[kind](model, refresh_every=ADAPTIVE, lr=0.0, damping=1e-3)
    for _ in range(10):
        update(model, optimizer, 1)
    look = optimizer.param_groups[0]["schedule"]["look"]
    after = [update(model, optimizer, 1, scale) for _ in range(12)]
    assert not any(after[: look - 9])
    assert any("0" in names for names in after)


@pytest.mark.parametrize("kind", KINDS)
def test_the_quadratic_form_is_that_of_the_dense_inverse(kind):
    model = network()
    optimizer = KINDS[kind](model, refresh_every=None)
    x = torch.randn(24, WIDTHS[0], dtype=torch.float64)
    optimizer.refresh(lambda: Quadratic()(model(x), torch.zeros(24, WIDTHS[-1], dtype=torch.float64)))
    group, state = optimizer.param_groups[0], packed(optimizer.state[model[0].weight])
    h = torch.randn(5, WIDTHS[0], dtype=torch.float64)
    mean_h = h.mean(0) if kind == "acp" else None
    found = optimizer.method.quadratic_form(h, mean_h, True, state, group)
    ones = torch.ones(5, 1, dtype=torch.float64)
    if kind in ("acp", "nnn"):
        mean = h.mean(0) if kind == "acp" else x.mean(0)
        rows, inverse = (
            h - mean,
            torch.linalg.inv(x.T.cov(correction=0) + 0.1 * torch.eye(WIDTHS[0], dtype=h.dtype)),
        )
    else:
        known = torch.cat([x, torch.ones(24, 1, dtype=torch.float64)], 1)
        rows, second = torch.cat([h, ones], 1), known.T @ known / 24
        inverse = torch.linalg.inv(second + math.sqrt(0.1) * torch.eye(WIDTHS[0] + 1, dtype=h.dtype))
        if kind == "ekfac":
            basis, moments = state["a_basis"], state["moments"].mean(0)
            inverse = basis @ torch.diag(1 / (moments + 0.1)) @ basis.T
    expected = torch.stack([row @ inverse @ row for row in rows]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 3, 17])
def test_a_resumed_run_refreshes_when_the_other_does(kind, at):
    model = network()
    optimizer = KINDS[kind](model, refresh_every=ADAPTIVE, momentum=0.5)
    for t in range(at):
        update(model, optimizer, t)
    again = copy.deepcopy(model)
    other = KINDS[kind](again, refresh_every=ADAPTIVE, momentum=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(at, at + 30):
        assert update(model, optimizer, t) == update(again, other, t)
    assert_same(parameters(again), parameters(model))


def test_a_closure_refreshes_what_is_due_or_else_everything():
    model = network()
    optimizer = KINDS["acp"](model, refresh_every=ADAPTIVE, lr=0.0)
    for t in range(3):
        update(model, optimizer, t)
    states = {name: optimizer.state[model[int(name)].weight] for name in ("0", "2", "4", "6")}
    states["2"][DUE] = 1.0
    assert optimizer.refresh_due
    x = torch.randn(24, WIDTHS[0], dtype=torch.float64)
    optimizer.refresh(lambda: model(x).square().mean())
    now = {name: optimizer.state[model[int(name)].weight] for name in states}
    assert [name for name in states if now[name] is not states[name]] == ["2"]
    assert not optimizer.refresh_due
    optimizer.refresh(lambda: model(x).square().mean())
    assert all(optimizer.state[model[int(name)].weight] is not now[name] for name in now)


class Chosen(nn.Module):
    """A layer that only some passes ask, and others that all do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.chosen = nn.Linear(6, 4), nn.Linear(6, 60)
        self.ask = True
        self.double()

    def forward(self, x):
        return self.always(x) + (self.chosen(x)[:, :4] if self.ask else 0)


@pytest.mark.parametrize("left_out", ["frozen", "not asked"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_layer_that_is_due_and_not_used_keeps_no_other_waiting(left_out, closure):
    model = Chosen()
    optimizer = KINDS["acp"](model, refresh_every=ADAPTIVE, lr=0.0)
    generator = torch.Generator().manual_seed(0)

    def step(scale=1.0):
        x = scale * torch.randn(24, 6, dtype=torch.float64, generator=generator)
        due = optimizer.refresh_due
        if closure and due:
            optimizer.refresh(lambda: model(x).square().mean())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return due

    for _ in range(3):
        step()
    state = optimizer.state[model.chosen.weight]
    state |= {DUE: 50.0, "refresh_work": 5 * state["update_work"]}  # the most drifted, and dear
    if left_out == "frozen":
        model.chosen.requires_grad_(False)
        optimizer.zero_grad()
    else:
        model.ask = False
    refreshed = due = 0
    for t in range(200):
        before = optimizer.state[model.always.weight]
        due += step(1 + t % 7)
        refreshed += optimizer.state[model.always.weight] is not before
    assert refreshed > 20
    assert optimizer.state[model.chosen.weight] is state
    assert not closure or due <= refreshed + 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_take_turns_are_all_looked_at(kind):
    """The looks fall on the updates of one of them."""

    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.now = nn.ModuleList(nn.Linear(4, 30) for _ in range(2)), 0

        def forward(self, x):
            return self.heads[self.now](x)

    torch.manual_seed(0)
    model = Alternating().double()
    optimizer, refreshes = KINDS[kind](model, refresh_every=ADAPTIVE, refresh_share=0.5), [0, 0]
    for t in range(60):
        model.now = t % 2
        weight = model.heads[model.now].weight
        before = optimizer.state.get(weight)
        x = (1 + t) * torch.randn(64, 4).double()
        optimizer.zero_grad()
        Quadratic()(model(x), torch.zeros(64, 30).double()).backward()
        optimizer.step()
        refreshes[model.now] += optimizer.state[weight] is not before
    assert min(refreshes) > 2


def test_a_state_of_fixed_refreshes_goes_on_adaptively_and_back():
    model = network()
    optimizer = KINDS["acp"](model, refresh_every=5)
    for t in range(7):
        update(model, optimizer, t)
    adaptive = KINDS["acp"](model, refresh_every=ADAPTIVE)
    adaptive.load_state_dict(optimizer.state_dict())
    for t in range(7, 20):
        update(model, adaptive, t)
    optimizer = KINDS["acp"](model, refresh_every=5)
    optimizer.load_state_dict(adaptive.state_dict())
    assert [bool(update(model, optimizer, t)) for t in range(20, 26)] == [True] + [False] * 4 + [True]


def test_without_a_bound_the_first_examples_are_kept_too():
    one, two = network(), network()
    bounded = KINDS["acp"](one, refresh_every=ADAPTIVE, max_change=1e9, lr=0.1)
    free = KINDS["acp"](two, refresh_every=ADAPTIVE, max_change=None, lr=0.1)
    for t in range(20):
        assert update(one, bounded, t) == update(two, free, t)
    assert_close(parameters(two), parameters(one), 1e-12)


def test_a_step_without_gradients_earns_nothing():
    model = network()
    optimizer = KINDS["acp"](model, refresh_every=ADAPTIVE)
    update(model, optimizer, 0)
    before = dict(optimizer.param_groups[0]["schedule"])
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["schedule"] == before


def test_what_has_drifted():
    below, above = 0.99 * DRIFT, 1.01 * DRIFT
    assert drifted([2.0, 2.0], [2 * below, 2 / below]) == [0.0, 0.0]
    up, down = drifted([2.0, 2.0], [2 * above, 2 / above])
    assert up == pytest.approx(math.log(above))
    assert down == pytest.approx(math.log(above))
    assert drifted([0.0, 0.0, 1.0], [0.0, 1.0, math.nan]) == [0.0, math.inf, math.inf]


def test_the_most_drifted_go_first_within_the_budget():
    def state(far, refresh):
        return {DUE: far, "refresh_work": refresh, "update_work": 1.0}

    states = {"a": state(0.5, 0.8), "b": state(2.0, 0.8), "c": state(1.0, 0.8), "d": state(0.0, 0.1)}
    assert taken(states, 10.0) == ["b", "c"]  # of 0.2 updates each, and half an update at once
    assert taken(states, 0.3) == ["b"]
    assert taken(states, 0.1) == []
    assert taken({"a": state(1.0, 4.0), "b": state(0.5, 0.1)}, 10.0) == ["a"], "one may cost more"


@pytest.mark.parametrize("refused", ["often", 0, 2.5])
def test_no_other_word_stands_for_n(refused):
    with pytest.raises(ValueError, match="refresh_every"):
        ACP(network(), 0.1, refresh_every=refused)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ValueError, match="refresh_share"):
        ACP(network(), 0.1, refresh_every=ADAPTIVE, refresh_share=share)


def test_nothing_is_looked_at_where_nothing_is_refreshed():
    model = network()
    optimizer = CenteredGradientDescent(model, 0.1)
    update(model, optimizer, 0)
    assert FRESH not in optimizer.state[model[0].weight]
