"""``output``: which part of what a model returns its output is, for draws and for the number of examples."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from optimizer_list import REFRESHING, assert_close, assert_same, each, named, network, parameters
from torch import nn

from sogrid.capture import Capture, CaptureError
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import KFAC, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
DRAWING = [m for m in REFRESHING if m.draws]


class Returns(nn.Module):
    """A network whose output is a part of what it returns."""

    def __init__(self, pack):
        super().__init__()
        self.inner, self.pack = network(), pack

    def forward(self, x):
        return self.pack(self.inner(x))


def as_dictionary(f):
    return {"loss": f.sum(), "logits": f}


def as_tuple(f):
    return None, f.sum(), f


def as_object(f):
    return SimpleNamespace(logits=f)


def first(returned):
    return returned["logits"]


PACKS = {
    "key": (as_dictionary, "logits", lambda returned: returned["logits"]),
    "index": (as_tuple, 2, lambda returned: returned[2]),
    "attribute": (as_object, "logits", lambda returned: returned.logits),
    "function": (as_dictionary, first, first),
}


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64) + 0.5
    return x[:, : network()[0].in_features], torch.randint(3, (8,), generator=generator)


def train(model, optimizer, part=lambda f: f, steps=3):
    for seed in range(steps):
        x, y = batch(seed)
        optimizer.zero_grad()
        LOSS(part(model(x)), y).backward()
        optimizer.step()


@each(REFRESHING)
@pytest.mark.parametrize("how", PACKS)
@pytest.mark.parametrize("gradients", ["matrix", "factored"])
def test_the_step_is_that_of_a_model_that_returns_it_alone(method, how, gradients):
    pack, output, part = PACKS[how]
    plain, packed = network(), Returns(pack)
    train(plain, method(plain, gradients=gradients))
    optimizer = method(packed, gradients=gradients, output=output)
    train(packed, optimizer, part)
    assert_same(parameters(packed), parameters(plain))
    pairs = [copy.deepcopy((packed, optimizer)), pickle.loads(pickle.dumps((packed, optimizer)))]
    for one, its in [*pairs, (packed, optimizer)]:
        x, y = batch(7)
        its.refresh(lambda one=one, x=x, y=y: LOSS(part(one(x)), y))
        train(one, its, part)
    for one, _ in pairs:
        assert_same(parameters(one), parameters(packed))


@each(DRAWING)
@pytest.mark.parametrize(
    ("pack", "words"),
    [(as_dictionary, "a dict with 'loss', 'logits'"), (as_tuple, "a tuple of 3"), (as_object, "a SimpleN")],
)
def test_what_is_not_told_is_asked_for(method, pack, words):
    model = Returns(pack)
    optimizer = method(model)
    with pytest.raises(CaptureError, match=f"the model returned {words}.*output='logits'"):
        model(batch()[0])
    optimizer.close()


@pytest.mark.parametrize(
    ("pack", "output", "words"),
    [
        (as_dictionary, "scores", "a dict with 'loss', 'logits', which has no 'scores'"),
        (as_tuple, 3, "a tuple of 3, which has no 3"),
        (as_tuple, "logits", "a tuple of 3, which has no 'logits'"),
        (as_object, 0, "a SimpleNamespace, which has no 0"),
        (as_tuple, 0, "a tuple of 3, of which output=0 is a NoneType"),
    ],
)
def test_what_is_told_and_is_not_there(pack, output, words):
    model = Returns(pack)
    optimizer = KFAC(model, 0.1, loss=LOSS, output=output)
    with pytest.raises(CaptureError, match=words):
        model(batch()[0])
    optimizer.close()


@each([m for m in REFRESHING if not m.draws])
def test_methods_that_draw_nothing_need_not_be_told(method):
    model, twin = Returns(as_tuple), network()
    train(model, method(model), lambda returned: returned[2])
    train(twin, method(twin))
    assert_close(parameters(model), parameters(twin))


@each([named("kfac, empirical fisher"), named("ekfac, empirical"), named("acp, heuristic")])
def test_a_function_may_make_every_token_an_example(method):
    """The mean is then over tokens, and a token's gradient that of its own loss."""
    tokens = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(30) % 3
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    optimizer = method(model, output=lambda f: f.flatten(0, 1))
    LOSS(model(tokens).flatten(0, 1), y).backward()
    optimizer.step()
    alone = method(twin)
    LOSS(twin(tokens.flatten(0, 1)), y).backward()
    alone.step()
    if method.kind is KFAC or "acp" in method.name:
        assert_close(parameters(model), parameters(twin))
    else:  # two tokens of a sentence have products in its moments
        assert all(p.isfinite().all() for p in parameters(model))


class Tied(nn.Module):
    """A weight that is used outside its layer, in a model that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return nn.functional.linear(self.layer(x).tanh(), self.layer.weight), x


def test_weights_used_outside_their_layers_are_found_below_any_part():
    with Capture(model := Tied()), pytest.raises(CaptureError, match=r"'layer' is used outside"):
        model(torch.ones(2, 3, dtype=torch.float64))


def test_updated_backpropagation_knows_its_output():
    with pytest.raises(TypeError, match="output"):
        UpdatedBackprop(network(), 0.1, loss=LOSS, output=0)
