"""What cannot be done is refused clearly, changes nothing, and training can go on afterwards."""

import re

import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_IN,
    OPTIMIZERS,
    REFRESHING,
    assert_close,
    assert_same,
    batch,
    each,
    network,
    parameters,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from sogrid.capture import CaptureError
from sogrid.factorize import FactorizationError
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.optimizers import ACP, EKFAC, KFAC, NaturalNN, Newton, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
NOT_UBP = [m for m in OPTIMIZERS if m.kind is not UpdatedBackprop]
WITHOUT_CHAIN = [m for m in LAYERWISE if m.kind is not UpdatedBackprop]


def snapshot(model, optimizer):
    """Everything that a failure must leave as it was."""
    state = optimizer.state_dict()
    return parameters(model), {
        "state": dict(state["state"]),
        "groups": [dict(g) for g in state["param_groups"]],
    }


def assert_refused(model, optimizer, error, message):
    """``step`` raises, changes nothing bitwise, and does so again if repeated."""
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
        assert_same(snapshot(model, optimizer), before)


def assert_trains_on(model, optimizer, reference, undisturbed):
    """After the failure both continue alike."""
    train(model, optimizer, 3, first=2)
    train(reference, undisturbed, 3, first=2)
    assert_same(parameters(model), parameters(reference))


@pytest.fixture
def pair(method):
    """Two identical trainings, one update old: one to be disturbed, one for comparison."""
    made = []
    for _ in range(2):
        model = network()
        optimizer = method(model)
        train(model, optimizer)
        optimizer.zero_grad()
        made += [model, optimizer]
    return made


# --- passes that were not seen ---------------------------------------------------------------------


@each(OPTIMIZERS)
def test_gradients_of_an_evaluation_pass(method, pair):
    model, optimizer, *_ = pair
    x, y = batch(9)
    LOSS(model.eval()(x), y).backward()
    model.train()
    assert_refused(model, optimizer, CaptureError, "seen.*(eval|training) mode")
    assert_trains_on(*pair)


@each(OPTIMIZERS)
def test_gradients_written_by_hand(method, pair):
    model, optimizer, *_ = pair
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert_refused(model, optimizer, CaptureError, "not seen|were not seen")
    assert_trains_on(*pair)


@each(OPTIMIZERS)
def test_a_closed_optimizer(method, pair):
    model, optimizer, *_ = pair
    optimizer.close()
    x, y = batch(9)
    LOSS(model(x), y).backward()
    assert_refused(model, optimizer, CaptureError, "not seen|were not seen")


@each(OPTIMIZERS)
def test_a_second_step_on_the_same_gradients(method, pair):
    model, optimizer, *_ = pair
    x, y = batch(9)
    LOSS(model(x), y).backward()
    optimizer.step()
    with pytest.raises(CaptureError):
        optimizer.step()


@each(LAYERWISE)
def test_no_gradient_at_all(method):
    """As in torch, a step without gradients does nothing; statistics are taken when there are some."""
    model, reference = network(), network()
    optimizer = method(model)
    before = parameters(model)
    if method.kind is UpdatedBackprop:
        with pytest.raises(CaptureError, match="every layer must"):
            optimizer.step()
    else:
        optimizer.step()
        optimizer.step()
    assert_same(parameters(model), before)
    train(model, optimizer)
    train(reference, method(reference))
    if not method.samples:  # whose draws depend on the number of the update
        assert_same(parameters(model), parameters(reference))


@each(WITHOUT_CHAIN)
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_half_a_gradient(method, pair, missing):
    model, optimizer, *_ = pair
    x, y = batch(9)
    LOSS(model(x), y).backward()
    getattr(model[2], missing).grad = None
    assert_refused(
        model, optimizer, CaptureError, f"layer '2': the .* has a gradient but the {missing} has none"
    )
    assert_trains_on(*pair)


# --- layers used in ways whose curvature is not known ----------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(N_IN, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()
        self.reentrant = None

    def forward(self, x):
        h = self.enter(x).tanh()
        if self.reentrant is None:
            h = self.again(h).tanh()
        else:
            h = checkpoint(lambda h: self.again(h).tanh(), h, use_reentrant=self.reentrant)
        return self.leave(h)


@each(WITHOUT_CHAIN)
def test_a_reentrant_checkpoint_is_refused_and_the_other_kind_works(method):
    model, reference = Shared(), Shared()
    reference.load_state_dict(model.state_dict())
    optimizer, undisturbed = method(model), method(reference)
    model.reentrant = True
    # the probes of the Fisher are pulled through the checkpoint
    exact = method.kind in (KFAC, EKFAC) and method.options.get("curvature", "fisher").startswith("fisher")
    error, message = (
        (RuntimeError, "use_reentrant") if exact else (CaptureError, "'again'.*use_reentrant=False")
    )
    with pytest.raises(error, match=message):
        train(model, optimizer)
    model.reentrant = False
    assert_trains_on(model, optimizer, reference, undisturbed)


@each(OPTIMIZERS)
def test_an_empty_minibatch(method, pair):
    model, optimizer, *_ = pair
    before = snapshot(model, optimizer)
    if method.layerwise:
        with pytest.raises(CaptureError, match=r"layer '0' got an input of shape \(0, 4\)"):
            model(torch.empty(0, N_IN).double())
    assert_same(snapshot(model, optimizer), before)
    assert_trains_on(*pair)


@each(OPTIMIZERS)
def test_an_exception_in_the_forward_pass(method, pair):
    model, optimizer, *_ = pair
    handle = model[1].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model(batch(9)[0])
    handle.remove()
    assert_trains_on(*pair)


@each(OPTIMIZERS)
def test_an_exception_in_the_backward_pass(method, pair):
    model, optimizer, *_ = pair

    def explode(grad):
        raise ZeroDivisionError

    handle = model[1].register_forward_hook(lambda m, i, output: output.register_hook(explode) and None)
    x, y = batch(9)
    with pytest.raises(ZeroDivisionError):
        LOSS(model(x), y).backward()
    handle.remove()
    assert_trains_on(*pair)


# --- numbers that are not finite -------------------------------------------------------------------


@each(OPTIMIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("refresh", ["at the first update", "later"])
def test_a_loss_that_is_not_finite(method, value, refresh):
    """Parameters, state and statistics stay bitwise the same; the optimizer goes on."""
    model, reference = network(), network()
    optimizer, undisturbed = method(model), method(reference)
    if refresh == "later":
        train(model, optimizer)
        train(reference, undisturbed)
    optimizer.zero_grad()
    x, y = batch(9)
    (LOSS(model(x), y) * value).backward()
    assert_refused(model, optimizer, FloatingPointError, "the gradient is not finite.*nothing was changed")
    assert_trains_on(model, optimizer, reference, undisturbed)


@each(LAYERWISE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite(method, value):
    """Also infinity behind a saturated activation, where the loss and the gradient of the bias are finite."""
    model, reference = network(activation=nn.Sigmoid), network(activation=nn.Sigmoid)
    optimizer, undisturbed = method(model), method(reference)
    x, y = batch(9)
    x[3, 2] = value
    LOSS(model(x), y).backward()
    if value == float("inf"):
        assert torch.isfinite(model[0].bias.grad).all()
    assert_refused(model, optimizer, FloatingPointError, "layer '[02]'")
    assert_trains_on(model, optimizer, reference, undisturbed)


# --- matrices that cannot be factorised ------------------------------------------------------------


def singular_batch(model, dtype=torch.float64):
    """The covariance of the minibatch is singular, whatever a processor's rounding makes of it."""
    x, y = batch(9, 3, dtype)
    x[:, 0] = 0
    return LOSS(model(x), y)


def named_damping(error):
    return float(re.search(r"damping \(ε\) ≥ (\S+)$", str(error.value)).group(1))


DAMPED = [
    ("acp", ACP, {}),
    ("acp, exact", ACP, {"tikhonov": "exact"}),
    ("acp, heuristic", ACP, {"output_curvature": "heuristic"}),
    ("acp, α = 0.01", ACP, {"output_curvature": 0.01}),
    ("acp, α = 10⁶", ACP, {"output_curvature": 1e6}),
    ("nnn", NaturalNN, {}),
]


@pytest.mark.parametrize(("kind", "options"), [d[1:] for d in DAMPED], ids=[d[0] for d in DAMPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_small_a_damping_names_the_layer_and_one_that_helps(kind, options, dtype):
    """A failed step changes nothing, keeps its gradients, and succeeds with the damping that was named."""
    model = network(dtype=dtype)
    optimizer = kind(model, 0.1, damping=0.0, **options)
    singular_batch(model, dtype).backward()
    with pytest.raises(FactorizationError) as error:
        optimizer.step()
    assert_refused(model, optimizer, FactorizationError, "layer '0'.*would have helped")
    optimizer.param_groups[0]["damping"] = named_damping(error)
    before = parameters(model)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all((a != b).any() for a, b in zip(parameters(model), before, strict=True))


@each([m for m in REFRESHING if m.kind not in (KFAC, EKFAC) and "damping" in m.options])
def test_training_goes_on_after_a_failed_refresh_with_a_higher_damping(method):
    """By step or by closure; the old statistics and their schedule stay."""
    model, reference = network(), network()
    optimizer, undisturbed = method(model, refresh_every=None), method(reference, refresh_every=None)
    for m, o in ((model, optimizer), (reference, undisturbed)):
        o.refresh(lambda: LOSS(m(batch(5)[0]), batch(5)[1]))  # noqa: B023
        train(m, o)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0]["damping"] = -0.9  # nothing forbids to write it there
    with pytest.raises(FactorizationError, match="layer '0'"):
        optimizer.refresh(lambda: singular_batch(model))
    optimizer.param_groups[0]["damping"] = 0.5
    assert_same(snapshot(model, optimizer), before)
    optimizer.refresh(lambda: singular_batch(model))
    undisturbed.refresh(lambda: singular_batch(reference))
    assert_trains_on(model, optimizer, reference, undisturbed)


def test_a_matrix_that_fails_in_float32_is_retried_in_float64():
    """Equal inputs and a damping below float32's resolution."""
    x = batch(dtype=torch.float32)[0][:, :1].expand(-1, N_IN).contiguous()
    model = nn.Linear(N_IN, 2)
    optimizer = ACP(model, 0.1, damping=1e-9)
    optimizer.refresh(lambda: model(x).square().mean())
    deviation = x - x.mean(0)
    covariance = deviation.mT @ deviation / len(x)
    identity = 1e-9 * torch.eye(N_IN)
    assert torch.linalg.cholesky_ex(covariance + identity)[1] != 0
    inverse = (covariance.double() + identity).inverse()
    assert_close([optimizer.state[model.weight]["inverse"].double()], [inverse], 1e-6)


@pytest.mark.parametrize("pi_correction", [True, False])
@pytest.mark.parametrize("factor", ["input", "output"])
def test_kfac_names_the_layer_the_factor_and_a_damping_that_helps(factor, pi_correction):
    torch.manual_seed(0)
    n_in, n_out, n = (6, 2, 3) if factor == "input" else (2, 6, 4)  # one factor is singular
    model = nn.Sequential(nn.Linear(n_in, n_out)).double()
    options = {"curvature": "empirical_fisher", "pi_correction": pi_correction}
    optimizer = KFAC(model, 0.1, damping=1e-300, loss=Quadratic(), **options)
    before = parameters(model)
    Quadratic()(model(torch.randn(n, n_in).double()), 9 * torch.randn(n, n_out).double()).backward()
    with pytest.raises(FactorizationError, match=f"layer '0', {factor} factor") as error:
        optimizer.step()
    assert_refused(model, optimizer, FactorizationError, "would have helped")
    optimizer.param_groups[0]["damping"] = named_damping(error)
    optimizer.step()
    assert all((a != b).any() for a, b in zip(parameters(model), before, strict=True))


def test_newton_at_a_singular_matrix_changes_nothing():
    model = nn.Sequential(nn.Linear(N_IN, 1)).double()
    optimizer = Newton(model, damping=0.0, loss=Quadratic())
    x = torch.zeros(5, N_IN).double()
    Quadratic()(model(x), torch.ones(5, 1).double()).backward()
    assert_refused(model, optimizer, FloatingPointError, "singular matrix.*raise the damping")
    optimizer.param_groups[0]["damping"] = 0.1
    optimizer.step()


# --- a model that moved ----------------------------------------------------------------------------


@each(REFRESHING)
def test_a_model_that_changed_its_dtype_is_refused_by_name(method):
    """And both ways out that the message names do help."""
    for way_out in ("load_state_dict", "refresh"):
        model = network(dtype=torch.float32)
        optimizer = method(model, refresh_every=100)
        train(model, optimizer)
        model.double()
        optimizer.zero_grad()
        x, y = batch(9)
        LOSS(model(x), y).backward()
        assert_refused(
            model, optimizer, ValueError, r"layer '0' is torch\.float64 on cpu, its \w+ torch\.float32"
        )
        if way_out == "refresh":
            optimizer.refresh(lambda: LOSS(model(x), y))  # noqa: B023
        else:
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
        optimizer.step()
        assert {p.dtype for p in model.parameters()} == {torch.float64}


@each(REFRESHING)
def test_statistics_on_another_device_are_refused_by_name(method):
    """The meta device stands for an accelerator."""
    model = network()
    optimizer = method(model, refresh_every=100)
    train(model, optimizer)
    state, before = optimizer.state[model[2].weight], parameters(model)
    key = next(key for key in state if key.endswith(("inverse", "basis")))
    state[key] = state[key].to("meta")
    with pytest.raises(ValueError, match=rf"layer '2' is .* on cpu, its {key} .* on meta"):
        train(model, optimizer)
    assert_same(parameters(model), before)
    optimizer.refresh(lambda: LOSS(model(batch(9)[0]), batch(9)[1]))
    train(model, optimizer)


@each(OPTIMIZERS)
def test_a_model_that_moves_before_the_first_step(method):
    one, two = network(dtype=torch.float32), network()
    first, second = method(one), method(two)
    one.double()
    two.load_state_dict(one.state_dict())
    train(one, first, 2)
    train(two, second, 2)
    assert_same(parameters(one), parameters(two))
