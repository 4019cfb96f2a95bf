"""When statistics are refreshed, from which minibatch, and what a refresh must leave alone."""

import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_IN,
    OPTIMIZERS,
    REFRESHING,
    N,
    assert_close,
    assert_same,
    batch,
    each,
    network,
    parameters,
    train,
)
from torch import nn

from sogrid.capture import CaptureError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, KFAC, NaturalNN

LOSS = CrossEntropyAtLogits()


def closure(model, seed, n=N):
    x, y = batch(seed, n)
    return lambda: LOSS(model(x), y)


def states(optimizer, model):
    return [optimizer.state.get(model[i].weight, {}) for i in (0, 2)]


# --- when ------------------------------------------------------------------------------------------


@each(REFRESHING)
@pytest.mark.parametrize("every", [1, 3])
def test_refreshes_before_updates_0_n_2n_and_no_other(method, every):
    model = network()
    optimizer = method(model, refresh_every=every)
    refreshed, previous = [], [{}, {}]
    for update in range(8):
        assert optimizer.refresh_due == (update % every == 0)
        train(model, optimizer, first=update + 1)
        if any(a is not b for a, b in zip(states(optimizer, model), previous, strict=True)):
            refreshed.append(update)
        previous = states(optimizer, model)
    assert refreshed == list(range(0, 8, every))


@each(REFRESHING)
def test_a_refresh_by_closure_replaces_the_one_that_is_due(method):
    model = network()
    optimizer = method(model, refresh_every=3)
    for update in range(7):
        if optimizer.refresh_due:
            optimizer.refresh(closure(model, 20 + update))
            assert not optimizer.refresh_due
            before = states(optimizer, model)
        train(model, optimizer, first=update + 1)
        assert all(a is b for a, b in zip(states(optimizer, model), before, strict=True))


@each(REFRESHING)
def test_refreshing_by_closure_on_the_training_minibatch_is_the_automatic_refresh(method):
    one, two = network(), network()
    train(one, method(one, refresh_every=2), 4)
    optimizer = method(two, refresh_every=2)
    for seed in (1, 2, 3, 4):
        if optimizer.refresh_due:
            optimizer.refresh(closure(two, seed))
        train(two, optimizer, first=seed)
    assert_close(parameters(two), parameters(one), 1e-13)


@each(REFRESHING)
@pytest.mark.parametrize("early", [0, 1, 5])
def test_an_extra_refresh_does_not_shift_the_schedule(method, early):
    model = network()
    optimizer = method(model, refresh_every=4)
    due = []
    for update in range(9):
        if update == early:
            optimizer.refresh(closure(model, 30))
        if optimizer.refresh_due:
            due.append(update)
        train(model, optimizer)
    assert due == [update for update in (0, 4, 8) if update != early]


@each(REFRESHING)
def test_without_a_schedule_the_user_is_asked_to_refresh(method):
    model = network()
    before = parameters(model)
    optimizer = method(model, refresh_every=None)
    assert not optimizer.refresh_due
    with pytest.raises(CaptureError, match=r"layer '0'.*call refresh\(closure\) before this step$"):
        train(model, optimizer)
    assert_same(parameters(model), before)
    optimizer.refresh(closure(model, 9))
    first = states(optimizer, model)
    train(model, optimizer, 5)
    assert all(a is b for a, b in zip(states(optimizer, model), first, strict=True))
    assert all((a != b).any() for a, b in zip(parameters(model), before, strict=True))


@each([m for m in LAYERWISE if not m.refreshes])
def test_methods_without_statistics_have_nothing_to_refresh(method):
    model = network()
    optimizer = method(model)
    assert not optimizer.refresh_due
    optimizer.refresh(lambda: pytest.fail("called"))
    train(model, optimizer, 2)
    assert not optimizer.state


@each(REFRESHING)
def test_refresh_every_may_be_changed_between_updates(method):
    model = network()
    optimizer = method(model, refresh_every=100)
    train(model, optimizer, 3)
    optimizer.refresh_every = 1
    before = states(optimizer, model)
    train(model, optimizer)
    assert all(a is not b for a, b in zip(states(optimizer, model), before, strict=True))


@each([m for m in REFRESHING if not m.bounded])
def test_a_refresh_that_became_due_after_the_forward_pass_is_refused_by_name(method):
    """Half of the minibatch would be missing from the statistics."""
    model = network()
    optimizer = method(model, refresh_every=100)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    closure(model, 4)().backward()
    optimizer.refresh_every = 1
    before = parameters(model)
    with pytest.raises(CaptureError, match=r"layer '0': its statistics became due"):
        optimizer.step()
    assert_same(parameters(model), before)
    train(model, optimizer)


# --- from which minibatch --------------------------------------------------------------------------


def test_acp_uses_the_covariance_of_its_own_minibatch_and_the_mean_of_the_training_one():
    """Algorithm 4: C from S, the mean from B."""
    model = network()
    before = parameters(model)
    s, _ = batch(7, 50)
    x, _ = batch(1)
    optimizer = ACP(model, 0.2, damping=0.5, bias_correction=False, max_change=None)
    optimizer.refresh(closure(model, 7, 50))
    closure(model, 1)().backward()
    optimizer.step()
    inverse = (torch.cov(s.mT, correction=0) + 0.5 * torch.eye(N_IN).double()).inverse()
    grad_w, grad_b = model[0].weight.grad, model[0].bias.grad
    assert_close([model[0].weight - before[0]], [-0.2 * (grad_w - torch.outer(grad_b, x.mean(0))) @ inverse])
    assert_close([model[0].bias - before[1]], [-0.2 * grad_b])


def test_nnn_uses_the_mean_of_its_own_minibatch():
    model = network()
    before = parameters(model)
    s, _ = batch(7, 50)
    optimizer = NaturalNN(model, 0.2, damping=0.5, max_change=None)
    optimizer.refresh(closure(model, 7, 50))
    closure(model, 1)().backward()
    optimizer.step()
    inverse = (torch.cov(s.mT, correction=0) + 0.5 * torch.eye(N_IN).double()).inverse()
    dw = -0.2 * (model[0].weight.grad - torch.outer(model[0].bias.grad, s.mean(0))) @ inverse
    assert_close([model[0].weight - before[0]], [dw])
    assert_close([model[0].bias - before[1]], [-0.2 * model[0].bias.grad - dw @ s.mean(0)])


@each([m for m in REFRESHING if not m.samples])
def test_a_closure_may_run_the_model_on_several_minibatches(method):
    one, two = network(), network()
    first, second = method(one), method(two)
    x, y = batch(9)
    first.refresh(closure(one, 9))
    second.refresh(lambda: (LOSS(two(x[:3]), y[:3]) * 3 + LOSS(two(x[3:]), y[3:]) * 9) / N)
    train(one, first)
    train(two, second)
    assert_close(parameters(two), parameters(one))


@each([m for m in OPTIMIZERS if m.samples])
def test_sampled_targets_depend_on_the_seed_and_the_update_alone(method):
    def run(seed, disturb):
        model = network()
        optimizer = method(model, seed=seed, refresh_every=1)
        factors = []
        for update in range(3):
            if disturb:
                torch.manual_seed(update)
                torch.randn(5)
            train(model, optimizer, first=1)
            factors.append(optimizer.state[model[2].weight]["b_inverse"])
        return factors

    assert_same(run(5, disturb=True), run(5, disturb=False))
    assert (run(5, False)[0] != run(6, False)[0]).any()
    frozen = network()
    optimizer = method(frozen, lr=0.0, refresh_every=1)
    train(frozen, optimizer)
    first = optimizer.state[frozen[2].weight]["b_inverse"]
    train(frozen, optimizer)
    assert (optimizer.state[frozen[2].weight]["b_inverse"] != first).any()  # a stream of its own


@each([m for m in OPTIMIZERS if m.samples])
@pytest.mark.parametrize("together", [False, True])
def test_passes_of_one_update_draw_targets_of_their_own(method, together):
    """Also those of which the gradients come in one backward pass."""
    model = network()
    optimizer = method(model)
    x, y = batch(n=64)
    losses = []
    for _ in range(3):
        losses.append(LOSS(model(x), y))
        if not together:
            losses.pop().backward()
    if together:
        sum(losses).backward()
    first, *others = [probes[0] for probes in optimizer._capture.records["2"].probes]
    assert len(others) == 2
    assert all((first != other).any() for other in others)
    assert (others[0] != others[1]).any()


@each(REFRESHING)
def test_a_layer_that_was_never_used_keeps_no_other_from_a_closure(method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = network(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    model = Model()
    optimizer = method(model, refresh_every=20)
    train(model, optimizer, 3)
    before = states(optimizer, model.used)
    optimizer.refresh(closure(model, 7))
    assert all(a is not b for a, b in zip(states(optimizer, model.used), before, strict=True))


def test_sampling_does_not_disturb_the_global_stream():
    model = network()
    optimizer = KFAC(model, 0.1, loss=LOSS, refresh_every=1)
    torch.manual_seed(1)
    train(model, optimizer, 2)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert_same(after, torch.rand(3))


# --- what is left alone ----------------------------------------------------------------------------


@each(REFRESHING)
def test_refresh_touches_no_gradient_no_parameter_and_no_record(method):
    """Between two accumulated backward passes, and under ``no_grad`` outside."""
    one, two = network(), network()
    first, second = (method(model) for model in (one, two))
    x, y = batch()
    for model, optimizer in ((one, first), (two, second)):
        if model is one:
            optimizer.refresh(closure(model, 9, 20))
        for part in (slice(0, 4), slice(4, 12)):
            (LOSS(model(x[part]), y[part]) / 2).backward()
            if model is two and part.start == 0:
                grads, before = [p.grad.clone() for p in model.parameters()], parameters(model)
                with torch.no_grad():
                    optimizer.refresh(closure(model, 9, 20))
                assert_same([p.grad for p in model.parameters()], grads)
                assert_same(parameters(model), before)
        optimizer.step()
    assert_same(parameters(two), parameters(one))


@each(REFRESHING)
def test_refresh_without_gradients_makes_none(method):
    model = network()
    optimizer = method(model)
    optimizer.refresh(closure(model, 9))
    assert all(p.grad is None for p in model.parameters())


@each(REFRESHING)
def test_refresh_between_forward_and_backward(method):
    one, two = network(), network()
    first, second = (method(model) for model in (one, two))
    first.refresh(closure(one, 9))
    closure(one, 1)().backward()
    loss = closure(two, 1)()
    second.refresh(closure(two, 9))
    loss.backward()
    first.step()
    second.step()
    assert_same(parameters(two), parameters(one))


# --- closures that are wrong -----------------------------------------------------------------------


@each(REFRESHING)
def test_bad_closures_are_refused_and_change_nothing(method):
    one, two = network(), network()
    train(one, method(one, refresh_every=2), 3)
    optimizer = method(two, refresh_every=2)
    train(two, optimizer)
    x, y = batch()

    def crash():
        two(x)
        raise ZeroDivisionError

    def in_eval_mode():
        two.eval()
        try:
            return LOSS(two(x), y)
        finally:
            two.train()

    def without_gradients():
        with torch.no_grad():
            return LOSS(two(x), y)

    bad = [
        (lambda: None, TypeError, "scalar loss, got None"),
        (lambda: LOSS(two(x), y).item(), TypeError, "scalar loss"),
        (lambda: LOSS.value(two(x), y), TypeError, "scalar loss"),
        (crash, ZeroDivisionError, None),
        (in_eval_mode, CaptureError, "ran no watched layer in training mode"),
        (without_gradients, CaptureError, "ran no watched layer in training mode"),
        (lambda: torch.ones((), requires_grad=True), CaptureError, "ran no watched layer"),
        (
            lambda: LOSS(two[2](two[1](two[0](x)[:0])), y[:0]),
            CaptureError,
            "layer '2' got an input",
        ),
        (lambda: LOSS(two(x * torch.nan), y), FloatingPointError, "layer '0'"),
    ]
    before, state = parameters(two), optimizer.state_dict()
    for wrong, error, message in bad:
        with pytest.raises(error, match=message):
            optimizer.refresh(wrong)
        assert_same(parameters(two), before)
        assert_same(optimizer.state_dict(), state)
        assert all(p.grad is not None for p in two.parameters())
    train(two, optimizer, 2, first=2)
    assert_same(parameters(two), parameters(one))


def test_kfac_needs_to_see_the_output_where_targets_are_drawn():
    model = network()
    optimizer = KFAC(model, 0.1, loss=LOSS)
    x, y = batch()
    LOSS(model[2](model[1](model[0](x))), y).backward()
    with pytest.raises(CaptureError, match="call the model itself, not its parts"):
        optimizer.step()
    empirical = KFAC(model, 0.1, loss=LOSS, curvature="empirical_fisher")
    model.zero_grad()
    LOSS(model[2](model[1](model[0](x))), y).backward()
    empirical.step()


def test_exact_fisher_of_many_outputs_is_refused():
    model = nn.Linear(3, 200)
    optimizer = KFAC(model, 0.1, loss=LOSS, curvature="fisher_exact")
    with pytest.raises(ValueError, match=r"200 outputs.*fisher_sampled"):
        optimizer.refresh(lambda: model(torch.ones(2, 3)).sum())
