"""Momentum, decay, groups, schedules and states, as a user of ``torch.optim`` expects them."""

import io

import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_IN,
    N_OUT,
    assert_close,
    assert_same,
    batch,
    each,
    named,
    network,
    parameters,
    train,
)
from torch import nn

from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
ANY_MODEL = [m for m in LAYERWISE if m.kind is not UpdatedBackprop]
ROUTES = pytest.mark.parametrize("gradients", ["matrix", "factored"])


def made(method, model, **options):
    """With options that every parameter group takes, also where the constructor does not offer them."""
    own = {key: options.pop(key) for key in ("gradients", "max_change", "params") if key in options}
    optimizer = method(model, **own)
    for group in optimizer.param_groups:
        group.update(options)
        optimizer.check_hyperparameters(group)
    return optimizer


def differences(after, before):
    return [p - q for p, q in zip(after, before, strict=True)]


@each(LAYERWISE)
@ROUTES
@pytest.mark.parametrize("bound", [None, 0.02])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_a_heavy_ball_over_the_steps(method, gradients, bound, nesterov):
    """v ← m v + Δ of the step Δ that is made, within its bound, at the same weights; through refreshes."""
    model, m = network(), 0.8
    optimizer = made(method, model, gradients=gradients, max_change=bound, momentum=m, nesterov=nesterov)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(4):
        before = parameters(model)
        plain = network()
        plain.load_state_dict(model.state_dict())
        one = method(plain, gradients=gradients, max_change=bound)
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group.update(momentum=0.0, nesterov=False)
        one.load_state_dict(state)
        train(plain, one, first=seed)
        steps = differences(parameters(plain), before)
        velocity = [m * v + step for v, step in zip(velocity, steps, strict=True)]
        moves = [s + m * v for s, v in zip(steps, velocity, strict=True)] if nesterov else velocity
        train(model, optimizer, first=seed)
        assert_close(differences(parameters(model), before), moves, 1e-9)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_plain_groups_are_torchs_sgd(options):
    model, twin = network(), network()
    plain = [{"params": model.parameters(), "preconditioned": False, "lr": 0.1, "momentum": 0.9, **options}]
    train(model, ACP(model, 0.1, params=plain), 5)
    train(twin, torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, **options), 5)
    assert_close(parameters(model), parameters(twin))


@each(LAYERWISE)
@ROUTES
@pytest.mark.parametrize("decay_bias", [False, True])
def test_decay_shrinks_what_is_trained_by_its_rate_alone(method, gradients, decay_bias):
    """Before the step, and beside it: as in AdamW."""
    model, twin = network(), network()
    train(model, made(method, model, gradients=gradients, weight_decay=0.03, decay_bias=decay_bias))
    train(twin, method(twin, gradients=gradients))
    shrunk = [
        p - method.options["lr"] * 0.03 * q * (q.dim() > 1 or decay_bias)
        for p, q in zip(parameters(twin), parameters(network()), strict=True)
    ]
    assert_close(parameters(model), shrunk)


def test_decay_of_other_parameters():
    """A table of embeddings shrinks like a weight, the scale of a norm like a bias."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    before = parameters(model)
    optimizer = ACP(model, 0.1, other_lr=0.2, weight_decay=0.5)
    LOSS(model(torch.arange(4)), torch.arange(4) % 3).backward()
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.step()
    for p, q, share in zip(parameters(model), before, [0.9, 1, 1, 0.95, 1], strict=True):
        torch.testing.assert_close(p, share * q)


@each(ANY_MODEL)
@ROUTES
def test_climbing_is_descending_the_negative(method, gradients):
    if method.takes_loss:
        pytest.skip("which is not the negative")
    model, twin = network(), network()
    train(model, made(method, model, gradients=gradients, maximize=True), 3)
    optimizer = method(twin, gradients=gradients)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        optimizer.zero_grad()
        (-LOSS(twin(x), y)).backward()
        optimizer.step()
    assert_close(parameters(model), parameters(twin))


@pytest.mark.parametrize("name", ["acp", "acp, as it comes", "kfac, as it comes", "ekfac"])
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_last_is_a_layout_alone(name, groups):
    """Of such a kernel no matrix is a view."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(4, 6, 3, groups=groups), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=groups)),
            *(nn.Tanh(), nn.Conv2d(6, 6, 1), nn.Flatten()),
        )
        model = model.double().to(memory_format=layout)
        before = parameters(model)
        optimizer = named(name)(model, momentum=0.5, nesterov=True, weight_decay=0.01)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(5, 4, 5, 5, generator=generator, dtype=torch.float64).to(memory_format=layout)
            optimizer.zero_grad()
            CrossEntropyAtLogits()(model(x), torch.arange(5)).backward()
            optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        found.append(parameters(model))
    assert_close(*found, rtol=1e-9)


@pytest.mark.parametrize("name", ["ubp", "ubp, hessian"])
def test_updated_backpropagation_does_not_climb(name):
    with pytest.raises(ValueError, match="cannot maximize"):
        made(named(name), network(), maximize=True)


@each(LAYERWISE)
@pytest.mark.parametrize("key", ["betas", "dampening", "weight_dacay", "Lr"])
def test_a_key_that_no_option_has(method, key):
    model = network()
    with pytest.raises(TypeError, match=f"has no option '{key}'; a parameter group may have .*weight_decay"):
        method(model, params=[{"params": model.parameters(), key: 0.1}])


@each(LAYERWISE)
@pytest.mark.parametrize(
    ("key", "value"),
    [("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1.0), ("weight_decay", float("nan"))],
)
def test_hyperparameters_out_of_range(method, key, value):
    model = network()
    with pytest.raises(ValueError, match=key):
        method(model, params=[{"params": model.parameters(), key: value}])


def test_a_decay_that_leaves_nothing():
    with pytest.raises(ValueError, match=r"a step would shrink weights by 10\.0 times what they are"):
        ACP(network(), 10.0, weight_decay=1.0)


def test_nesterov_needs_a_momentum():
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        ACP(network(), 0.1, nesterov=True)


@each(ANY_MODEL)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=2),
    ],
    ids=["one cycle", "cyclic", "lambda", "swa"],
)
def test_schedules(method, schedule):
    """Those that move the momentum do; a state that they have written to resumes."""
    model = network()
    optimizer = method(model, momentum=0.5)
    scheduler = schedule(optimizer)
    rates, momenta = [], []
    for seed in range(6):
        train(model, optimizer, first=seed)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert len(set(rates)) > 1
    cycles = isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR | torch.optim.lr_scheduler.CyclicLR)
    assert (len(set(momenta)) > 1) == cycles
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = method(resumed)
    other.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, 2, first=9)
    assert_same(parameters(resumed), parameters(model))


@each(LAYERWISE)
@ROUTES
def test_a_state_with_momentum_goes_through_a_file_of_weights_only(method, gradients):
    model = network()
    optimizer = made(method, model, gradients=gradients, momentum=0.7)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(5)
    other = method(resumed, gradients=gradients)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, 3, first=7)
    assert_same(parameters(resumed), parameters(model))


def test_named_parameters_keep_their_names_when_a_group_is_split():
    model = nn.Sequential(nn.Linear(N_IN, 5), nn.LayerNorm(5), nn.Linear(5, N_OUT)).double()
    optimizer = ACP(model, 0.1, other_lr=0.05, params=model.named_parameters())
    owned = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [owned[p] for p in group["params"]]
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 2)
    copy = ACP(model, 0.1, other_lr=0.05, params=model.named_parameters())
    copy.load_state_dict(optimizer.state_dict())
