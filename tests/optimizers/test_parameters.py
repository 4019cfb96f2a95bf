"""Which parameters an optimizer trains, how, and which it refuses by name."""

import numpy as np
import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_IN,
    N_OUT,
    OPTIMIZERS,
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
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, Newton, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
WITH_OTHERS = [m for m in LAYERWISE if m.kind is not UpdatedBackprop]
NAN, INF = float("nan"), float("inf")


def hidden_biases_apart(model):
    return [{"params": [model[0].weight, *model[2].parameters()]}, {"params": [model[0].bias]}]


# --- parameters that are not a linear layer's ------------------------------------------------------


class Mixed(nn.Module):
    """Every kind of foreign parameter, around two linear layers."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(7, N_IN)
        self.image = nn.ConvTranspose1d(1, 1, 3, padding=1)
        self.batch = nn.BatchNorm1d(N_IN)
        self.linear1, self.norm, self.linear2 = nn.Linear(N_IN, 6), nn.LayerNorm(6), nn.Linear(6, N_OUT)
        self.scale = nn.Parameter(torch.ones(N_OUT))
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=generator)

    def forward(self, x):
        words = (x.abs() * 10).long()[:, 0] % 7
        h = self.table(words) + self.image(x.unsqueeze(1)).squeeze(1)
        return self.linear2(self.norm(self.linear1(self.batch(h))).tanh()) * self.scale


LINEAR = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
FOREIGN = {
    "table": "Embedding",
    "image": "ConvTranspose1d",
    "batch": "BatchNorm1d",
    "norm": "LayerNorm",
    "": "Mixed",
}


@each(WITH_OTHERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_foreign_parameters_are_trained_by_sgd_with_their_own_rate(method, reduction):
    """By the gradient of the mean loss, whatever the reduction, while linear layers are preconditioned."""
    model, alone, reference = Mixed(), Mixed(), Mixed()
    x, y = batch()
    loss = CrossEntropyAtLogits(reduction)
    optimizer = method(model, loss=loss, other_lr=0.03)
    loss(model(x), y).backward()
    optimizer.step()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.03)
    LOSS(reference(x), y).backward()
    sgd.step()
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(name in LINEAR)
    linear = method(alone, loss=loss)
    loss(alone(x), y).backward()
    linear.step()
    found = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        expected = dict(alone.named_parameters())[name] if name in LINEAR else parameter
        assert_close([found[name]], [expected])


@each(WITH_OTHERS)
def test_foreign_parameters_are_refused_by_name_without_a_rate(method):
    for name, kind in FOREIGN.items():
        model = Mixed()
        for other in FOREIGN:
            if other not in (name, ""):
                model.get_submodule(other).requires_grad_(False)
        model.scale.requires_grad_(name == "")
        with pytest.raises(ValueError, match=rf"'{name}' \({kind}\).*other_lr"):
            method(model)


@each([m for m in OPTIMIZERS if m.kind is UpdatedBackprop])
def test_updated_backprop_refuses_what_is_not_a_chain_by_name(method):
    layers = [nn.LayerNorm(5), nn.BatchNorm1d(5), nn.ConvTranspose1d(1, 1, 1), nn.Sequential(nn.Linear(5, 5))]
    for module in [*layers, nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.RReLU(), nn.Sequential(nn.Dropout())]:
        model = nn.Sequential(nn.Linear(N_IN, 5), module, nn.Linear(5, N_OUT))
        with pytest.raises(ValueError, match=rf"'1' \({type(module).__name__}\) breaks the chain"):
            method(model)
    with pytest.raises(ValueError, match=r"nn\.Sequential"):
        method(nn.Linear(N_IN, N_OUT))


def test_foreign_parameters_follow_schedulers_and_groups():
    model = Mixed()
    optimizer = ACP(model, 0.1, other_lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    assert [group["preconditioned"] for group in optimizer.param_groups] == [True, False]
    before = model.scale.detach().clone()
    model.zero_grad()
    x, y = batch()
    LOSS(model(x), y).backward()
    optimizer.step()
    assert_close([model.scale - before], [-0.01 * model.scale.grad])


def test_a_group_of_foreign_parameters_may_have_a_rate_of_its_own():
    model = nn.Sequential(nn.Linear(N_IN, N_OUT), nn.LayerNorm(N_OUT)).double()
    own = {"params": model[1].parameters(), "lr": 0.5}
    rates = [
        [g["lr"] for g in ACP(model, 0.1, other_lr=0.2, params=groups).param_groups]
        for groups in (
            [{"params": model[0].parameters()}, own],
            [{"params": model[0].parameters()}, {"params": model[1].parameters()}],
            [{"params": list(model.parameters()), "lr": 0.3}],
            None,
        )
    ]
    assert rates == [[0.1, 0.5], [0.1, 0.2], [0.3, 0.2], [0.1, 0.2]]


def test_newton_has_one_group():
    model = network()
    optimizer = Newton(model, loss=LOSS, damping=1.0)
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    train(model, optimizer)


def test_linear_layers_may_be_trained_by_sgd_on_request():
    model, reference = network(), network()
    groups = [{"params": model[0].parameters(), "preconditioned": False}, {"params": model[2].parameters()}]
    train(model, ACP(model, 0.1, params=groups))
    train(reference, torch.optim.SGD(reference.parameters(), 0.1))
    assert_close(parameters(model[0]), parameters(reference[0]))
    assert (model[2].weight != reference[2].weight).any()


def test_two_optimizers_share_a_model():
    model, reference = Mixed(), Mixed()
    train(reference, ACP(reference, 0.1, other_lr=0.02), 3)
    linear = [p for name, p in model.named_parameters() if name in LINEAR]
    foreign = [p for name, p in model.named_parameters() if name not in LINEAR]
    one, two = ACP(model, 0.1, params=linear), torch.optim.SGD(foreign, 0.02)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        one.zero_grad()
        two.zero_grad()
        LOSS(model(x), y).backward()
        two.step()
        one.step()
    assert_close(parameters(model), parameters(reference))


@each([m for m in WITH_OTHERS if m.refreshes])
def test_two_optimizers_of_the_package_share_a_model(method):
    """Each with some of the layers, and neither sees the other pull gradients back."""
    model, reference = network(), network()
    train(reference, method(reference), 3)
    one, two = (method(model, params=list(model[i].parameters())) for i in (0, 2))
    for seed in (1, 2, 3):
        x, y = batch(seed)
        model.zero_grad()
        LOSS(model(x), y).backward()
        if seed == 1 and not (method.samples or "adaptive" in method.name):  # which looks at what comes after
            two.refresh(lambda: LOSS(model(batch(1)[0]), batch(1)[1]))
        one.step()
        two.step()
    assert_close(parameters(model), parameters(reference))


# --- parameters that cannot be preconditioned ------------------------------------------------------


def of_another_model(model):
    return [{"params": [*model.parameters(), nn.Parameter(torch.zeros(2))]}]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (hidden_biases_apart, ValueError, "weight and bias of layer '0' are in different parameter groups"),
        (of_another_model, ValueError, r"shape \(2,\) is not in the model given to ACP"),
        (
            lambda model: [model[0].bias],
            ValueError,
            "bias of layer '0' is to be trained but its weight is not",
        ),
        (lambda model: [], ValueError, "empty parameter list"),
        (lambda model: model[0].weight, TypeError, "iterable of Tensors"),
        (lambda model: [model[0].weight, "bias"], TypeError, "can only optimize Tensors"),
    ],
)
def test_parameters_that_are_refused(params, error, message):
    model = network()
    with pytest.raises(error, match=message):
        ACP(model, 0.1, params=params(model))


def test_a_bias_in_a_plain_group_beside_its_weight_is_refused():
    """It would be trained twice."""
    model = network()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "preconditioned": False}]
    with pytest.raises(ValueError, match="weight and bias of layer '0' are in different parameter groups"):
        ACP(model, 0.1, params=groups)


@each(OPTIMIZERS)
@pytest.mark.parametrize("given", [lambda m: m.parameters(), list, lambda m: m.state_dict(), lambda m: None])
def test_the_model_itself_is_asked_for(method, given):
    with pytest.raises(
        TypeError, match=rf"{method.kind.__name__}\(model, \.\.\.\), not model\.parameters\(\)"
    ):
        method(given(network()))


@each(WITH_OTHERS)
def test_tied_weights_are_refused_by_name(method):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0' \(Linear\), '2' \(Linear\): parameters that are no one"):
        method(model)


def test_weights_tied_to_an_embedding_are_refused_by_name_or_trained_otherwise():
    """With the bias beside them."""
    for order in (["table", "head"], ["head", "table"]):
        modules = {"table": nn.Embedding(7, 3), "middle": nn.Linear(3, 3), "head": nn.Linear(3, 7)}
        model = nn.ModuleDict({name: modules[name] for name in [*order, "middle"]})
        model["head"].weight = model["table"].weight
        with pytest.raises(ValueError, match=r"'table' \(Embedding\)"):
            ACP(model, 0.1)
        with pytest.warns(UserWarning, match="'table'.*share a parameter") as caught:
            optimizer = ACP(model, 0.1, other_lr=0.1)
        assert len(caught) == 1
        layer, rest = (group["params"] for group in optimizer.param_groups)
        assert layer == [*model["middle"].parameters()]
        assert {*rest} == {model["head"].weight, model["head"].bias}


@each(LAYERWISE)
def test_lazy_layers_are_refused_by_name_until_they_are_made(method):
    model = nn.Sequential(nn.LazyLinear(N_OUT)).double()
    with pytest.raises(ValueError, match="layer '0' is lazy"):
        method(model)
    model(batch()[0])
    train(model, method(model))


@each(LAYERWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused_by_name(method, dtype):
    with pytest.raises(TypeError, match=rf"layer '0' is {dtype}; sogrid needs float32 or float64"):
        method(network(dtype=dtype))


def test_parametrized_weights_are_refused_by_name_or_trained_otherwise():
    """With the bias beside them."""
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"'0\.parametrizations\.weight' \(ParametrizationList\)"):
        ACP(model, 0.1)
    optimizer = ACP(model, 0.1, other_lr=0.1)
    assert {*optimizer.param_groups[1]["params"]} == {*model[0].parameters()}
    train(model, optimizer, 2)


class LowRank(nn.Linear):
    """A linear layer with parameters besides its weight and bias."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.down, self.up = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))

    def forward(self, h):
        return super().forward(h) + h @ self.down.mT @ self.up.mT


@each(WITH_OTHERS)
def test_further_parameters_of_a_linear_layer_are_foreign(method):
    model = nn.Sequential(LowRank(N_IN, N_OUT)).double()
    with pytest.raises(ValueError, match=r"'0' \(LowRank\).*other_lr"):
        method(model)
    before = parameters(model)
    train(model, method(model, other_lr=0.05))
    named_before = dict(zip(dict(model[0].named_parameters()), before, strict=True))
    for name in ("down", "up"):
        parameter = getattr(model[0], name)
        assert_close([parameter.detach() - named_before[name]], [-0.05 * parameter.grad])
    assert (model[0].weight != named_before["weight"]).any()


@pytest.mark.parametrize("replaced", ["weight", "bias", ""])
@each([m for m in LAYERWISE if m.kind is not UpdatedBackprop])
def test_a_parameter_that_was_replaced_is_refused_by_name(method, replaced):
    """As by ``load_state_dict(..., assign=True)``: the optimizer would train what it was not given."""
    model = network()
    optimizer = method(model)
    train(model, optimizer)
    new = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(replaced)}
    model.load_state_dict(new, assign=True, strict=False)
    before = parameters(model)
    with pytest.raises(CaptureError, match=r"layer '0' has another weight or bias.*make a new optimizer"):
        train(model, optimizer)
    assert_same(parameters(model), before)


def test_a_weight_that_is_used_outside_its_layer_is_refused_by_name():
    """A linear layer whose forward is never called."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.Linear(4, 2)

        def forward(self, x):
            return nn.functional.linear(x, self.held.weight, self.held.bias)

    model = Holder()
    optimizer = ACP(model, 0.1)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(CaptureError, match=r"layer 'held'.*outside the layer"):
        optimizer.step()


# --- frozen parameters -----------------------------------------------------------------------------


@each(WITH_OTHERS)
@pytest.mark.parametrize("how", ["frozen", "left out", "given but frozen"])
def test_a_bias_that_is_not_trained_is_as_none(method, how):
    """It stays as it is, and the layer's inputs are not centred: the step of a layer that has no bias."""
    model, reference = network(), network()
    shift = model[0].bias.detach().clone()
    weights = [model[0].weight, *model[2].parameters()]
    if how != "left out":
        model[0].bias.requires_grad_(False)
    given = {"frozen": None, "left out": weights, "given but frozen": list(model.parameters())}[how]
    reference[0].bias = None
    reference[0].register_forward_hook(lambda module, args, output: output + shift)
    train(model, method(model, params=given), 3)
    train(reference, method(reference), 3)
    assert_same(model[0].bias.detach(), shift)
    assert_same(parameters(model)[:1] + parameters(model)[2:], parameters(reference))


@each([m for m in OPTIMIZERS if m.kind is UpdatedBackprop])
@pytest.mark.parametrize("how", ["frozen", "left out", "none"])
def test_updated_backprop_moves_weights_as_ever_beside_a_bias_that_is_not_trained(method, how):
    model, reference = network(), network()
    for chain in (model, reference):
        chain[0].bias.data.zero_()
    if how == "none":
        model[0].bias = None
    elif how == "frozen":
        model[0].bias.requires_grad_(False)
    given = [model[0].weight, *model[2].parameters()] if how == "left out" else None
    train(model, method(model, params=given), 1)
    train(reference, method(reference), 1)
    assert_same(model[0].weight.detach(), reference[0].weight.detach())
    assert_same(parameters(model)[-2:], parameters(reference)[-2:])
    if how != "none":
        assert not model[0].bias.any()


@each(LAYERWISE)
def test_a_frozen_weight_with_a_trained_bias_is_refused_by_name(method):
    model = network()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="bias of layer '0' is to be trained but its weight is not"):
        method(model)


@each(LAYERWISE)
def test_a_weight_frozen_later_is_refused_by_name(method):
    model = network()
    optimizer = method(model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(CaptureError, match="layer '0': the bias has a gradient but the weight has none"):
        train(model, optimizer)


@each([m for m in OPTIMIZERS if m.kind is UpdatedBackprop])
def test_updated_backprop_refuses_a_frozen_layer(method):
    model = network()
    model[0].requires_grad_(False)
    optimizer, before = method(model), parameters(model)
    with pytest.raises(CaptureError, match="every layer must be trained"):
        train(model, optimizer)
    assert_same(parameters(model), before)


@each([m for m in OPTIMIZERS if m.kind is not UpdatedBackprop])
def test_a_frozen_layer_is_left_alone(method):
    model = network()
    model[0].requires_grad_(False)
    before = parameters(model)
    train(model, method(model), 3)
    assert_same(parameters(model)[:2], before[:2])
    assert (model[2].weight != before[2]).any()


@each(WITH_OTHERS)
def test_freezing_and_unfreezing_a_layer(method):
    """While frozen it does not move; afterwards it goes on with the statistics it had."""
    model = network()
    optimizer = method(model, **({"refresh_every": 100} if method.refreshes else {}))
    train(model, optimizer)
    model[0].requires_grad_(False)
    before = parameters(model[0])
    train(model, optimizer, 2)
    assert_same(parameters(model[0]), before)
    model[0].requires_grad_(True)
    train(model, optimizer)
    assert all((a != b).any() for a, b in zip(parameters(model[0]), before, strict=True))


@each([m for m in WITH_OTHERS if m.refreshes and not m.bounded])
def test_statistics_taken_with_a_bias_are_not_used_without_it(method):
    model = network()
    optimizer = method(model, refresh_every=100)
    train(model, optimizer)
    model[0].bias.requires_grad_(False)
    model.zero_grad()
    reference = network()
    reference.load_state_dict(model.state_dict())
    x, y = batch()
    LOSS(model(x), y).backward()
    before = parameters(model)
    with pytest.raises(CaptureError, match=r"layer '0'.*its bias was frozen or unfrozen"):
        optimizer.step()
    assert_same(parameters(model), before)
    train(model, optimizer)  # whose zero_grad() makes the minibatch's own statistics ready
    reference[0].bias.requires_grad_(False)
    train(reference, method(reference, refresh_every=100))
    if not method.samples:
        assert_close([model[0].weight], [reference[0].weight])


@each(WITH_OTHERS)
def test_a_layer_is_added_after_unfreezing(method):
    """As in torch, by add_param_group; other layers keep their statistics and their count of updates."""
    model = network()
    model[0].requires_grad_(False)
    options = {"refresh_every": 100} if method.refreshes else {}
    optimizer = method(model, **options)
    train(model, optimizer, 2)
    state = optimizer.state.get(model[2].weight, {}).copy()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})
    before = parameters(model[0])
    train(model, optimizer)
    assert all((a != b).any() for a, b in zip(parameters(model[0]), before, strict=True))
    assert_same(optimizer.state.get(model[2].weight, {}), state)
    assert optimizer.param_groups[0]["updates"] == 3


@each(WITH_OTHERS)
def test_a_failed_add_param_group_loses_nothing(method):
    """Neither the optimizer's state, nor the gradients it has seen, nor the caller's dictionary."""
    model, reference = Mixed(), Mixed()
    for m in (model, reference):
        m.linear1.requires_grad_(False)
    first, second = (method(m, other_lr=0.1) for m in (model, reference))
    train(model, first)
    train(reference, second)
    model.linear1.requires_grad_(True)
    x, y = batch(2)
    for m in (model, reference):
        m.zero_grad()
        LOSS(m(x), y).backward()
    bad = {"params": [model.linear1.bias], "lr": 0.3}
    for group, error in [
        (bad, ValueError),
        ({"params": [model.linear1.weight], "lr": NAN}, ValueError),
        ({"params": [nn.Parameter(torch.ones(1))]}, ValueError),
        ({"params": [model.linear2.weight]}, ValueError),
        ({"params": {model.linear1.weight}}, TypeError),
        ([model.linear1.weight], (TypeError, ValueError)),
    ]:
        with pytest.raises(error):
            first.add_param_group(group)
    assert bad == {"params": [model.linear1.bias], "lr": 0.3}
    assert len(first.param_groups) == 2
    model.linear1.requires_grad_(False)
    first.step()
    second.step()
    assert_same(parameters(model), parameters(reference))


def test_named_parameters_may_be_given():
    model, reference = network(), network()
    train(model, ACP(model, 0.1, params=model.named_parameters()), 2)
    train(reference, ACP(reference, 0.1), 2)
    assert_same(parameters(model), parameters(reference))


# --- hyperparameters -------------------------------------------------------------------------------

BAD_NUMBERS = [-0.1, NAN, INF, True, "0.1", None, [0.1], torch.ones(2), torch.tensor(NAN), 1j]


@each(OPTIMIZERS)
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_bad_learning_rates_are_refused_by_name(method, value):
    with pytest.raises((TypeError, ValueError), match=r"^lr \(λ\) must be"):
        method(network(), lr=value)


@each([m for m in OPTIMIZERS if "damping" in m.options or m.kind is KFAC])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_bad_dampings_are_refused_by_name(method, value):
    with pytest.raises((TypeError, ValueError), match=r"^damping \(ε\) must be"):
        method(network(), damping=value)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ACP, {"output_curvature": 0.0}, r"output_curvature \(α\) must be positive"),
        (ACP, {"output_curvature": -1}, r"output_curvature \(α\) must be positive"),
        (ACP, {"output_curvature": True}, r"output_curvature \(α\) must be a number"),
        (ACP, {"output_curvature": "guess"}, r"output_curvature \(α\) must be a number or 'heuristic'"),
        (ACP, {"curvature_floor": 0.0}, "curvature_floor must be positive"),
        (ACP, {"rank": 0}, "rank must be a positive integer"),
        (KFAC, {"loss": LOSS, "rank": 2.0}, "rank must be a positive integer"),
        (ACP, {"tikhonov": "other"}, "tikhonov must be 'printed' or 'exact'"),
        (ACP, {"averaging": 1.0}, r"averaging \(ρ\) must be zero or more and below 1"),
        (ACP, {"averaging": -0.1}, r"averaging \(ρ\) must be zero or more"),
        (ACP, {"averaging": "0.5"}, r"averaging \(ρ\) must be a number"),
        (ACP, {"other_lr": -1.0}, "other_lr must be zero or more"),
        (ACP, {"refresh_every": 0}, r"refresh_every \(N\) must be a positive integer"),
        (ACP, {"refresh_every": -3}, r"refresh_every \(N\) must be a positive integer"),
        (ACP, {"refresh_every": 2.0}, r"refresh_every \(N\) must be a positive integer"),
        (ACP, {"refresh_every": True}, r"refresh_every \(N\) must be a positive integer"),
        (ACP, {"refresh_every": "3"}, r"refresh_every \(N\) must be a positive integer"),
        (ACP, {"reduction": "none"}, r"reduction must be one of \('mean', 'sum'\)"),
        (CenteredGradientDescent, {"reduction": None}, "reduction must be one of"),
        (KFAC, {"loss": LOSS, "damping": 0.0}, r"damping \(ε\) must be positive"),
        (KFAC, {"loss": LOSS, "curvature": "fisher"}, "curvature must be one of"),
        (KFAC, {"loss": LOSS, "samples": 0}, "samples must be a positive integer"),
        (KFAC, {"loss": LOSS, "samples": True}, "samples must be a positive integer"),
        (KFAC, {"loss": nn.CrossEntropyLoss()}, "loss must be an object of sogrid.losses"),
        (UpdatedBackprop, {"loss": "mean"}, "loss must be an object of sogrid.losses"),
        (UpdatedBackprop, {"loss": LOSS, "curvature": "fisher"}, "curvature must be"),
        (Newton, {"loss": None}, "loss must be an object of sogrid.losses"),
        (Newton, {"loss": LOSS, "curvature": "kfac"}, "curvature must be one of"),
    ],
)
def test_bad_options_are_refused_by_name(make, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(network(), 0.1, **options)


@each(LAYERWISE)
def test_bad_hyperparameters_of_a_group_are_refused_by_name(method):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": -1.0}]
    with pytest.raises(ValueError, match=r"lr \(λ\)"):
        method(model, params=groups)


def test_numbers_of_numpy_and_integers_are_numbers():
    one, two = network(), network()
    train(one, ACP(one, np.float64(0.25), damping=np.float64(1), refresh_every=np.int64(2)), 3)
    train(two, ACP(two, 0.25, damping=1, refresh_every=2), 3)
    assert_same(parameters(one), parameters(two))


def test_zero_damping_is_allowed_where_the_covariance_is_invertible():
    model = network()
    before = parameters(model)
    x, y = batch(n=40)
    optimizer = ACP(model, 0.1, damping=0.0)
    LOSS(model(x), y).backward()
    optimizer.step()
    covariance = torch.cov(x.mT, correction=0)
    expected = (
        -0.1 * (model[0].weight.grad - torch.outer(model[0].bias.grad, x.mean(0))) @ covariance.inverse()
    )
    assert_close([model[0].weight - before[0]], [expected], 1e-9)


def test_newton_without_damping_is_allowed():
    model = nn.Sequential(nn.Linear(N_IN, 1)).double()
    x, _ = batch()
    y = x @ x.new_ones(N_IN, 1)
    optimizer = Newton(model, loss=Quadratic())
    Quadratic()(model(x), y).backward()
    optimizer.step()
    assert_close([model(x)], [y], 1e-9)
