"""``other``: what trains the parameters outside layers with a rule, within one optimizer."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_list import LAYERWISE, assert_close, assert_same, each, named, parameters
from torch import nn

from sogrid.capture import CaptureError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, CenteredGradientDescent, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
METHODS = [m for m in LAYERWISE if m.kind is not UpdatedBackprop]


class Language(nn.Module):
    """Embeddings, a norm and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(5)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.hidden(self.table(x)).mean(1))))

    @property
    def rest(self):
        return [*self.table.parameters(), *self.norm.parameters()]


def train(model, *optimizers, steps=3, loss=LOSS, first=0):
    for seed in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randint(7, (12, 4), generator=generator), torch.randint(3, (12,), generator=generator)
        model.zero_grad()
        loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


OTHERS = {
    "adamw": ({"other": "adamw", "other_lr": 0.01}, lambda p: torch.optim.AdamW(p, lr=0.01)),
    "adamw, its own rate": ({"other": "adamw"}, torch.optim.AdamW),
    "sgd": ({"other": "sgd", "other_lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "made": (
        {"other": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5)},
        lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
    ),
}


@each(METHODS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_it_is_two_optimizers_beside_each_other(method, other, loss):
    options, alone = OTHERS[other]
    model, twin = Language(), Language()
    reduced = CrossEntropyAtLogits(loss)
    train(model, method(model, loss=loss, **options), loss=reduced)
    layers = [*twin.hidden.parameters(), *twin.head.parameters()]
    inner = alone(twin.rest)
    if loss == "sum":
        inner.register_step_pre_hook(lambda *_: [p.grad.div_(12) for p in twin.rest] and None)
    train(twin, method(twin, loss=loss, params=layers), inner, loss=reduced)
    assert_close(parameters(model), parameters(twin))


def test_schedules_groups_and_defaults_of_its_own():
    model = Language()
    groups = [
        {"params": [*model.hidden.parameters(), *model.norm.parameters()], "weight_decay": 0.2},
        {"params": model.head.parameters()},
        {"params": model.table.parameters(), "preconditioned": False, "lr": 0.5, "betas": (0.5, 0.6)},
    ]
    optimizer = ACP(model, 0.1, other="adamw", other_lr=0.01, params=groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.1, 0.01, 0.1, 0.5]
    assert [group.get("betas") for group in optimizer.param_groups] == [None, (0.9, 0.999), None, (0.5, 0.6)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in rates]
    before = [p.detach().clone() for p in model.rest]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer)
    assert_same([p.detach() for p in model.rest], before)


def test_a_group_without_a_layer_keeps_what_it_was_given():
    model = Language()
    groups = [{"params": model.rest, "weight_decay": 0.0, "lr": 0.3}, {"params": model.hidden.parameters()}]
    plain, _ = ACP(model, 0.1, other="adamw", params=groups).param_groups
    assert (plain["weight_decay"], plain["lr"], plain["betas"]) == (0.0, 0.3, (0.9, 0.999))
    groups[0].pop("lr")
    plain, _ = ACP(model, 0.1, other_lr=0.2, params=groups).param_groups
    assert (plain["weight_decay"], plain["lr"]) == (0.0, 0.2)


@each([named("acp"), named("kfac, exact fisher"), named("centred")])
@pytest.mark.parametrize("other", ["adamw", "sgd"])
def test_states_copies_and_pickles_know_one_optimizer(method, other):
    model = Language()
    optimizer = method(model, other=other, other_lr=0.01)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    resumed = Language()
    again = method(resumed, other=other, other_lr=0.3)
    for one, state in zip((resumed, again), torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(state)
    pairs = [
        (resumed, again),
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
        (model, optimizer),
    ]
    for one, its in pairs:
        train(one, its, first=5)
    for one, _ in pairs:
        assert_same(parameters(one), parameters(model))


class Transformer(nn.Module):
    """A small language model: torch's own encoder, and a head whose weight is the table's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.place = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, x):
        h = self.table(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.encoder(h)).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.cell, self.head = nn.Embedding(7, 4), kind(4, 5, batch_first=True), nn.Linear(5, 7)
        self.double()

    def forward(self, x):
        return self.head(self.cell(self.table(x))[0]).mean(1)


@each([m for m in METHODS if not m.samples])
@pytest.mark.parametrize(
    "make",
    [Transformer, lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.GRU)],
    ids=["transformer", "lstm", "gru"],
)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
@pytest.mark.filterwarnings("ignore:modules .* share a parameter")
def test_weights_that_bypass_their_layers_are_the_others(method, make, gradients):
    model = make()
    optimizer = method(model, other="adamw", other_lr=0.01, gradients=gradients)
    x = torch.randint(7, (16, 5), generator=torch.Generator().manual_seed(0))
    y, losses = x[:, 0], []
    for _ in range(20):
        optimizer.zero_grad()
        value = LOSS(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.1
    trained = {layer.name for layer in optimizer._layers}
    assert trained == ({"encoder.linear1", "encoder.linear2"} if make is Transformer else {"head"})


def test_what_is_left_is_listed_with_the_line_to_write():
    with pytest.raises(
        ValueError, match=r"'table' \(Embedding\), 'norm' \(LayerNorm\).*other='adamw', other_lr="
    ):
        ACP(Language(), 0.1)


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        ("adam", ValueError, "adamw.*sgd"),
        (3, ValueError, "function"),
        (lambda p: p, TypeError, "no torch.optim"),
    ],
)
def test_what_is_no_optimizer(other, error, match):
    with pytest.raises(error, match=match):
        ACP(Language(), 0.1, other=other)


def test_the_state_with_another_other():
    model = Language()
    state = ACP(model, 0.1, other="adamw").state_dict()
    with pytest.raises(ValueError, match="another optimizer"):
        ACP(model, 0.1, other_lr=0.1).load_state_dict(state)


def test_a_model_without_layers_is_the_others():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.LayerNorm(12)).double()
    model = nn.Sequential(model, nn.Unflatten(1, (4, 3)))
    optimizer = ACP(model, 0.1, other="adamw", other_lr=0.01)
    twin = copy.deepcopy(model)
    for one, its in ((model, optimizer), (twin, torch.optim.AdamW(twin.parameters(), lr=0.01))):
        one(torch.arange(28).view(7, 4) % 7).square().mean().backward()
        its.step()
    assert_same(parameters(model), parameters(twin))


CLIMBERS = {"none": {"other_lr": 0.1}, **{name: options for name, (options, _) in OTHERS.items()}}


@pytest.mark.parametrize("other", CLIMBERS)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_to_maximize_a_loss_is_to_minimize_its_negative(other, where):
    """For the layers and for all other parameters, whoever trains them."""
    found = []
    for sign in (1, -1):
        model = Language()
        climb = {"maximize": True} if sign == 1 else {}
        options = {"lr": 0.1, "max_change": None, **CLIMBERS[other]}
        if where == "group":
            options["params"] = [{"params": list(model.parameters()), **climb}]
        else:
            options |= climb
        optimizer = ACP(model, **options)
        train(model, optimizer, loss=lambda f, y, sign=sign: sign * LOSS(f, y))
        found.append(parameters(model))
    assert_close(*found, 1e-12)


def test_who_cannot_climb_is_refused():
    class Descent(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        def step(self):
            raise AssertionError

    for params in (None, "group"):
        model = Language()
        own = {} if params is None else {"params": [{"params": list(model.parameters())}]}
        with pytest.raises(
            ValueError, match="Descent, which trains the other parameters, has no such option"
        ):
            ACP(model, 0.1, other=Descent, maximize=True, **own)


class Scaled(nn.Module):
    """Its output is finite, the gradient of its scale is not."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layer(x) + self.scale.sqrt()


@pytest.mark.parametrize("other", CLIMBERS)
def test_a_gradient_that_is_not_finite_is_refused_whoever_it_belongs_to(other):
    model = Scaled()
    optimizer = ACP(model, 0.1, **CLIMBERS[other])
    before = parameters(model)
    model(torch.randn(8, 4)).square().mean().backward()
    with pytest.raises(FloatingPointError, match="parameter 'scale': the gradient is not finite"):
        optimizer.step()
    assert_same(parameters(model), before)


def test_of_parameters_outside_the_model_each_is_looked_at():
    model, outside = nn.Linear(4, 1), [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": list(model.parameters())}, {"params": outside, "preconditioned": False}]
    optimizer = ACP(model, 0.1, other_lr=0.1, params=groups)
    for infinite in outside:
        optimizer.zero_grad()
        (model(torch.randn(8, 4)).square().mean() + sum(p.sum() for p in outside)).backward()
        infinite.grad[0] = float("inf")
        with pytest.raises(FloatingPointError, match=r"of the others.*not finite"):
            optimizer.step()


@pytest.mark.parametrize("kind", [ACP, CenteredGradientDescent])
def test_what_the_other_optimizer_refuses_leaves_the_layers_where_they_were(kind):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    optimizer = kind(model, 0.1, other="adamw", other_lr=0.1)
    before = parameters(model)
    model(torch.arange(8)).square().mean().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(parameters(model), before)


@pytest.mark.parametrize("other", CLIMBERS)
def test_of_a_sum_over_nobody_knows_how_many_examples_nothing_is_trained(other):
    """While all layers are frozen."""
    model = Language()
    optimizer = ACP(model, 0.1, reduction="sum", **CLIMBERS[other])
    for layer in (model.hidden, model.head):
        layer.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"how many examples .* train one of them, or reduce"):
        train(model, optimizer, steps=1, loss=CrossEntropyAtLogits("sum"))
