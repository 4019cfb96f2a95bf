"""A step is made of what is in ``.grad``, of examples of the loss, of passes that were seen; or refused.

Each test is a kind of program that was once silently wrong.
"""

import copy
import gc
import warnings

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
    named,
    network,
    parameters,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

from sogrid.capture import CaptureError
from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Quadratic,
)
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN, Newton, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
ANY_MODEL = [m for m in LAYERWISE if m.kind is not UpdatedBackprop]
SAME_DRAWS = [m for m in ANY_MODEL if not m.samples]
ROUTES = pytest.mark.parametrize("gradients", ["matrix", "factored"])
FEW = [named(name) for name in ("centred", "acp", "kfac, exact fisher", "nnn")]


def unchanged(model, optimizer, error, match):
    """``step`` raises, and nothing moves; after ``zero_grad`` the optimizer trains on."""
    before = parameters(model)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert_same(parameters(model), before)
    optimizer.zero_grad()


# --- examples of the loss ----------------------------------------------------------------------------


class Flattened(nn.Module):
    """Rows in the place of examples and tokens, pooled after; an expert sees a part of the rows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows, self.expert, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()
        for parameter in self.parameters():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, x):
        h = torch.tanh(self.rows(x.flatten(0, 1)))
        mask = x.flatten(0, 1)[:, 0] > 0.4
        h = h.index_put((mask,), torch.tanh(self.expert(h[mask])))
        return self.head(h.view(*x.shape[:2], -1).mean(1))


class InADictionary(Flattened):
    def forward(self, x):
        f = super().forward(x)
        return {"loss": f.sum(), "logits": f}


class InATuple(Flattened):
    def forward(self, x):
        return super().forward(x), None, x


@each(SAME_DRAWS)
@pytest.mark.parametrize("kind", [Flattened, InADictionary, InATuple], ids=lambda k: k.__name__)
@ROUTES
def test_mean_and_sum_give_one_step_whatever_rows_a_layer_sees(method, kind, gradients):
    """Also those of a layer that sees a part of the minibatch, of models that return more than a tensor."""
    x = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    y, steps = torch.arange(12) % 3, []
    for reduction in ("mean", "sum"):
        model = kind()
        told = {InADictionary: {"output": "logits"}, InATuple: {"output": 0}}.get(kind, {})
        optimizer = method(model, loss=reduction, gradients=gradients, **(told if method.draws else {}))
        f = model(x)
        f = f["logits"] if isinstance(f, dict) else f[0] if isinstance(f, tuple) else f
        CrossEntropyAtLogits(reduction)(f, y).backward()
        optimizer.step()
        steps.append([p - q for p, q in zip(parameters(model), parameters(kind()), strict=True)])
    assert_close(*steps)
    assert all(step.any() for step in steps[0])


class Loop(nn.Module):
    """Called on what it gave: the same examples each time."""

    def __init__(self, inside):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(4, 4).double()
        self.inside = inside

    def forward(self, h, state=None):
        if self.inside:
            for _ in range(4):
                h = h + 0.5 * torch.tanh(self.f(h))
            return h
        return h + 0.5 * torch.tanh(self.f(h))


@each([m for m in SAME_DRAWS if not m.takes_loss])
@ROUTES
def test_a_model_that_is_called_on_what_it_gave(method, gradients):
    """As one that has the loop inside, whose step is known; by keyword and in a nest of tensors too."""
    results = []
    for inside, call in [
        (True, lambda m, h: m(h)),
        (False, lambda m, h: m(h)),
        (False, lambda m, h: m(h=h)),
        (False, lambda m, h: m(h, state={"h": [h]})),
    ]:
        model = Loop(inside)
        optimizer = method(model, loss=Quadratic(), gradients=gradients)
        for seed in range(2):
            h, _ = batch(seed)
            optimizer.zero_grad()
            for _ in range(1 if inside else 4):
                h = call(model, h)
            Quadratic()(h, torch.ones_like(h)).backward()
            optimizer.step()
        results.append(parameters(model))
    for found in results[1:]:
        assert_close(found, results[0])


@each([m for m in OPTIMIZERS if m.kind in (Newton, UpdatedBackprop) or m.name == "kfac, exact fisher"])
def test_a_model_that_is_called_on_what_it_gave_has_no_one_output(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    optimizer = method(model, loss=Quadratic())
    with pytest.raises(CaptureError, match="put the loop into the model's forward"):
        model(model(batch()[0]))
    optimizer.close()


@each([m for m in SAME_DRAWS if not m.bounded])
@ROUTES
def test_calls_on_what_others_gave_are_other_examples(method, gradients):
    """A second call before the first is pulled back, on inputs with a graph of their own, as in a GAN."""
    results = []
    for joined in (True, False):
        model, below = network(), nn.Linear(N_IN, N_IN).double()
        nn.init.eye_(below.weight)
        nn.init.zeros_(below.bias)
        optimizer = method(model, gradients=gradients, loss="sum")
        (x, y), (u, v) = batch(1), batch(2, 7)
        sum_ = CrossEntropyAtLogits("sum")
        if joined:
            sum_(model(torch.cat([x, u])), torch.cat([y, v])).backward()
        else:
            f = model(x)
            (sum_(model(below(u)), v) + sum_(f, y)).backward()
        optimizer.step()
        results.append(parameters(model))
    assert_close(*results)


@ROUTES
@pytest.mark.parametrize("rows", [16, 8, 4])
def test_a_call_on_a_part_of_what_the_model_gave_is_of_the_same_examples(rows, gradients):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    options = {"max_change": None, "bias_correction": False, "gradients": gradients}
    optimizer = CenteredGradientDescent(model, lr=1.0, reduction="sum", **options)
    before = model[0].bias.detach().clone()
    h = model(torch.randn(16, 4).double())
    (h[rows:].square().sum() + model(h[:rows]).square().sum()).backward()
    grad = model[0].bias.grad.clone()
    optimizer.step()
    assert_close([before - model[0].bias.detach()], [grad / 16], 1e-12)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_model_that_returns_its_loss(shape):
    """As one number, or as a vector of one, which ``nn.DataParallel`` wants."""

    class WithItsLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(x).square().sum().reshape(shape)

    model = WithItsLoss()
    optimizer = CenteredGradientDescent(
        model, lr=1.0, reduction="sum", max_change=None, bias_correction=False
    )
    before = model.layer.bias.detach().clone()
    model(torch.randn(16, 4).double()).sum().backward()
    grad = model.layer.bias.grad.clone()
    optimizer.step()
    assert_close([before - model.layer.bias.detach()], [grad / 16], 1e-12)


@each([m for m in FEW if m.name != "kfac, exact fisher"])
def test_a_bound_that_comes_after_the_forward_pass_is_for_the_next(method):
    model = network()
    optimizer = method(model, refresh_every=5) if method.refreshes else method(model)
    train(model, optimizer)
    optimizer.zero_grad()
    x, y = batch()
    LOSS(model(x), y).backward()
    optimizer.param_groups[0]["max_change"] = 0.1
    unchanged(model, optimizer, CaptureError, "max_change was given after its forward pass.*zero_grad")
    train(model, optimizer)


class Tokens(nn.Module):
    """One function of tokens ``[n, t, i]``, whose layer is given them in one of three ways."""

    def __init__(self, how):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer, self.head, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how
        self.double()
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        if self.how == "flat":
            z = self.layer(x.flatten(0, 1)).view(*x.shape[:2], -1)
        elif self.how == "time first":
            z = self.layer(x.transpose(0, 1)).transpose(0, 1)
        else:
            z = self.layer(x)
        return self.head(z.tanh().mean(1))


@pytest.mark.parametrize("how", ["flat", "time first"])
@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        (KFAC, {"shared": "expand"}, ()),
        (KFAC, {"shared": "reduce"}, ("flat", "time first")),
        (EKFAC, {}, ("time first",)),
    ],
)
def test_who_must_know_which_rows_are_one_examples_has_them_first(kind, options, refused, how):
    """Others make the same step however the rows come."""
    x, y = torch.randn(16, 7, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(16) % 3

    def step(how):
        model = Tokens(how)
        own = {"curvature": "empirical_fisher", "max_change": None, **options}
        optimizer = kind(model, lr=0.1, loss=LOSS, **own)
        LOSS(model(x), y).backward()
        if how in refused:
            unchanged(model, optimizer, CaptureError, r"'layer' saw an input of shape .* of 16 examples")
        else:
            optimizer.step()
        return parameters(model)

    whole = step("examples first")
    if how not in refused and kind is KFAC:
        assert_close(step(how), whole, 1e-12)
    else:
        step(how)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("how", ["accumulated", "in one closure"])
def test_parts_of_a_minibatch_have_draws_of_their_own(kind, micro, how):
    """The Fisher at the output is 2 I: of one draw, repeated, the factor would have the rank ``micro``."""
    model = network()
    optimizer = kind(model, lr=0.1, loss=Quadratic(), averaging=1e-12)
    x, _ = batch(n=32)
    y = torch.randn(32, N_OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = list(zip(x.split(micro), y.split(micro), strict=True))
    if how == "accumulated":
        for a, b in parts:
            ((model(a) - b).square().sum() / 32).backward()
        optimizer.step()
    else:
        optimizer.refresh(lambda: sum((model(a) - b).square().sum() / 32 for a, b in parts))
    factor = optimizer.state[model[2].weight]["statistics_output"]
    assert 0.3 < torch.linalg.eigvalsh(factor).min() < torch.linalg.eigvalsh(factor).max() < 6


# --- what is in .grad --------------------------------------------------------------------------------

CLEAR = {
    "model, to None": lambda m: m.zero_grad(),
    "model, to zeros": lambda m: m.zero_grad(set_to_none=False),
    "by hand, in place": lambda m: [p.grad.zero_() for p in m.parameters() if p.grad is not None],
    "by hand, times zero": lambda m: [p.grad.mul_(0) for p in m.parameters() if p.grad is not None],
    "by hand, other tensors": lambda m: [
        setattr(p, "grad", torch.zeros_like(p)) for p in m.parameters() if p.grad is not None
    ],
}


@each(LAYERWISE)
@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("skipped", [1.0, float("inf")], ids=["skipped", "skipped, infinite"])
@ROUTES
def test_a_batch_whose_gradient_was_cleared_elsewhere_does_not_count(method, clear, skipped, gradients):
    """By whatever clears it, with the first of the updates and a later one; as if it had never been."""
    if skipped != 1.0 and clear == "by hand, times zero":
        pytest.skip("infinity times zero is no zero")
    if method.kind is UpdatedBackprop and gradients == "factored" and clear == "by hand, other tensors":
        pytest.skip("its .grad is zeros in any case")
    one, two = network(), network()
    for model in (one, two):
        optimizer = method(model, gradients=gradients)
        for seed in (1, 2):
            optimizer.zero_grad()
            if model is two:
                x, y = batch(8, 7)
                (LOSS(model(x), y) * skipped).backward()
                CLEAR[clear](model)
            x, y = batch(seed)
            LOSS(model(x), y).backward()
            optimizer.step()
    assert_close(parameters(two), parameters(one), 1e-14)


@each(FEW)
@pytest.mark.parametrize("zero", ["gradient", "input"])
@ROUTES
def test_examples_count_whose_gradient_is_zero(method, zero, gradients):
    """A margin that is met, black pixels; whether their part of the minibatch is the first or not."""
    (x, y), steps = batch(n=12), []
    x = x.clone()
    twice = method.name != "kfac, exact fisher" and zero == "gradient"  # a second use, in the same backward
    weights = torch.ones(12, dtype=x.dtype)
    if zero == "input":
        x[:4] = 0
    else:
        weights[:4] = 0
    for parts in ([range(12)], [range(4), range(4, 12)], [range(4, 12), range(4)]):
        model = network()
        optimizer = method(model, gradients=gradients)
        for part in map(list, parts):
            value = (LOSS.value(model(x[part]), y[part]) * weights[part]).sum() / 12
            if twice:
                value = value + (LOSS.value(model(-x[part]), y[part]) * weights[part]).sum() / 12
            value.backward()
        optimizer.step()
        steps.append(parameters(model))
    assert_close(steps[1], steps[0], 1e-12)
    assert_close(steps[2], steps[0], 1e-12)


@each(LAYERWISE)
@ROUTES
def test_the_habit_of_clearing_by_the_model_after_another_models_pass(method, gradients):
    """DCGAN: D.zero_grad(), a step of D, then a pass of the generator through D, whose gradients pile up."""
    one, two = network(), network()
    for model in (one, two):
        optimizer = method(model, gradients=gradients)
        for seed in range(3):
            model.zero_grad()
            x, y = batch(seed)
            LOSS(model(x), y).backward()
            optimizer.step()
            if model is two:
                model.zero_grad()
                u, v = batch(seed + 10, 5)
                LOSS(model(u), v).backward()
    assert_close(parameters(two), parameters(one), 1e-14)


@each(LAYERWISE)
@ROUTES
@pytest.mark.parametrize("how", ["clip", "bound of the norm is far", "by hand"])
def test_factors_cannot_be_clipped(method, gradients, how):
    if gradients == "matrix":
        pytest.skip("where clipping means what it means in torch")
    model = network()
    optimizer = method(model, gradients=gradients)
    x, y = batch()
    LOSS(model(x), y).backward()
    if how == "by hand":
        [p.grad.mul_(0.5) for p in model.parameters() if p.grad is not None]
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3 if how == "clip" else 1e9)
    unchanged(model, optimizer, CaptureError, "clipped.*max_change")
    train(model, optimizer)


@pytest.mark.parametrize("update", [0, 1])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian", "none"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("change", ["clip", "penalty", "mask"])
def test_updated_backpropagation_refuses_any_layers_changed_gradient(change, layer, curvature, update):
    """A clipped one at once; what is added within ``backward`` below the top in the first update."""
    model = network()
    optimizer = UpdatedBackprop(model, lr=0.1, loss=LOSS, curvature=curvature, max_change=None)
    train(model, optimizer, steps=update)
    x, y = batch()
    weight = model[layer].weight
    handle = weight.register_hook(lambda grad: 0 * grad) if change == "mask" else None
    loss = LOSS(model(x), y) + (weight.square().sum() if change == "penalty" else 0)
    optimizer.zero_grad()
    loss.backward()
    if change == "clip":
        nn.utils.clip_grad_norm_(weight, 1e-6)
    if update and layer == 0 and change != "clip":
        return  # not looked for
    unchanged(model, optimizer, CaptureError, "cannot honour gradient clipping, penalties")
    if handle is not None:
        handle.remove()
    train(model, optimizer)


def test_updated_backpropagation_of_examples_that_cancel_is_no_clipping():
    """In single precision the sum of gradients then is all rounding."""
    model = network(dtype=torch.float32)
    optimizer = UpdatedBackprop(model, lr=0.1, loss=Quadratic(), curvature="none")
    x = torch.randn(20, N_IN, generator=torch.Generator().manual_seed(0))
    f = model(x).detach()
    y = torch.cat([f[:10] + 1, f[:10] - 1])
    Quadratic()(model(torch.cat([x[:10], x[:10]])), y).backward()
    optimizer.step()


@each(ANY_MODEL)
def test_a_gradient_that_nobody_cleared_after_a_step(method):
    """torch adds to it; what it was of is forgotten."""
    model = network()
    optimizer = method(model)
    train(model, optimizer)
    x, y = batch(2)
    LOSS(model(x), y).backward()
    unchanged(model, optimizer, CaptureError, r"layer '0'.*earlier update: call zero_grad\(\)")


@each(ANY_MODEL)
@ROUTES
def test_a_part_of_the_gradient_is_of_an_evaluation_pass(method, gradients):
    for order in ("before", "after"):
        model = network()
        optimizer = method(model, gradients=gradients)
        (x, y), (u, v) = batch(1), batch(2)
        for evaluation in (True, False) if order == "before" else (False, True):
            model.train(not evaluation)
            LOSS(model(u if evaluation else x), v if evaluation else y).backward()
        model.train()
        unchanged(model, optimizer, CaptureError, "layer '0'.*(evaluation|eval) mode")


class Tied(nn.Module):
    """A decoder that is the encoder transposed, or takes its bias."""

    def __init__(self, what):
        super().__init__()
        self.encoder, self.out, self.what = nn.Linear(4, 4), nn.Linear(4, 3), what
        self.double()

    def forward(self, x):
        h = torch.tanh(self.encoder(x))
        return self.out(
            F.linear(h, self.encoder.weight.t()) if self.what == "weight" else h + self.encoder.bias
        )


@each(ANY_MODEL)
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_parameter_that_is_used_outside_its_layer(method, what):
    model = Tied(what)
    optimizer = method(model)
    with pytest.raises(CaptureError, match=f"the {what} of layer 'encoder' is used outside"):
        model(batch()[0])
    optimizer.close()
    plain = [{"params": model.encoder.parameters(), "preconditioned": False, "lr": 0.1}]
    train(model, method(model, params=[*plain, {"params": model.out.parameters()}]))


@each(ANY_MODEL)
@ROUTES
@pytest.mark.parametrize("when", ["before the step", "before the backward pass", "between two passes"])
def test_calls_with_other_parameters_do_not_count(method, when, gradients):
    one, two = network(), network()
    others = {name: torch.randn_like(p).requires_grad_() for name, p in two.named_parameters()}

    def elsewhere(model):
        u, v = batch(9)
        LOSS(torch.func.functional_call(model, others, (u,)), v).backward()

    for model in (one, two):
        optimizer = method(model, gradients=gradients)
        for seed in (1, 2):
            optimizer.zero_grad()
            x, y = batch(seed)
            value = LOSS(model(x), y)
            if model is two and when == "before the backward pass":
                elsewhere(model)
            value.backward()
            if model is two and when == "before the step":
                elsewhere(model)
            if when == "between two passes":
                if model is two:
                    elsewhere(model)
                u, v = batch(seed + 5, 7)
                LOSS(model(u), v).backward()
            optimizer.step()
    assert_same(parameters(two), parameters(one))
    assert all(p.grad is not None for p in others.values())


class Parts(nn.Module):
    """Of which one did not run, but has a gradient of zeros."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = network(), network(1)

    def forward(self, x):
        return self.used(x)


@each(ANY_MODEL)
@ROUTES
def test_a_gradient_of_zeros_is_a_step_of_nothing(method, gradients):
    alone, model = network(), Parts()
    train(alone, method(alone, gradients=gradients), 3)
    optimizer = method(model, gradients=gradients)
    before = parameters(model.idle)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        optimizer.zero_grad()
        (LOSS(model(x), y) + 0 * sum(p.sum() for p in model.idle.parameters())).backward()
        optimizer.step()
    assert_same(parameters(model.idle), before)
    assert_close(parameters(model.used), parameters(alone))


@each([m for m in SAME_DRAWS if "fisher_exact" not in m.options.values() and not m.bounded])
@ROUTES
def test_parts_that_are_called_on_their_own_twice(method, gradients):
    """On as many examples and on others, before one backward pass."""
    joint = network()
    optimizer = method(joint, gradients=gradients, loss="sum")
    sum_ = CrossEntropyAtLogits("sum")
    (x, y), (u, v) = batch(1), batch(2, 7)
    sum_(joint(torch.cat([x, u])), torch.cat([y, v])).backward()
    optimizer.step()
    model = network()
    optimizer = method(model, gradients=gradients, loss="sum")
    f, g = (model[2](torch.tanh(model[0](part))) for part in (x, u))
    (sum_(f, y) + sum_(g, v)).backward()
    optimizer.step()
    assert_close(parameters(model), parameters(joint))


# --- one owner ---------------------------------------------------------------------------------------


@each(LAYERWISE)
def test_an_optimizer_that_was_replaced_stops(method):
    """Though a scheduler holds it; whichever route the next one takes."""
    for gradients in ("matrix", "factored"):
        alone, model = network(), network()
        old = method(model, gradients="factored")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(old, 0.9)
        x, y = batch(7)
        LOSS(model(x), y).backward()
        model.zero_grad()
        train(alone, method(alone, gradients=gradients), 2)
        train(model, method(model, gradients=gradients), 2)
        assert_same(parameters(model), parameters(alone))
        assert scheduler.optimizer is old
        old.close()


@each(LAYERWISE)
def test_an_optimizer_of_torch_beside_one_that_takes_the_gradients_away(method):
    model = network()
    held = method(model, gradients="factored")
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"gradients='factored'.*close\(\)") as caught:
        train(model, sgd, 5)
    assert len(caught) == 1
    assert all(record.count <= 12 for record in held._capture.records.values())
    held.close()
    before = parameters(model)
    train(model, sgd)
    assert all((p != q).any() for p, q in zip(before, parameters(model), strict=True))


@each(LAYERWISE)
@ROUTES
def test_ordinary_loops_do_not_warn(method, gradients):
    """Skipped batches, weights that are decayed or clamped by hand after a step."""
    model = network()
    optimizer = method(model, gradients=gradients)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            train(model, optimizer, first=seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-1, 1)
            x, y = batch(seed + 10)
            LOSS(model(x), y).backward()
            optimizer.zero_grad()


def test_gone_optimizers_of_the_tests_above_have_left_nothing():
    from sogrid.hooks import watched

    gc.collect()
    assert not watched()


# --- layers that are no W h + b ------------------------------------------------------------------------


class Equalised(nn.Linear):
    def forward(self, h):
        return F.linear(h, self.weight * 0.3, self.bias * 0.01)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class ScaledBias(nn.Linear):
    def forward(self, h):
        return F.linear(h, self.weight, 2 * self.bias)


class Masked(nn.Linear):
    def forward(self, h):
        return F.linear(h, self.weight * (torch.arange(self.in_features) > 1), self.bias)


class Named(nn.Linear):
    """The plain map."""

    def forward(self, h):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(h)


class Adapted(nn.Linear):
    """With a term beside it, which the gradient of W does not know of, and noise of its own."""

    def forward(self, h):
        return super().forward(h) + F.dropout(h.sum(-1, keepdim=True), 0.5)


@each(FEW)
@pytest.mark.parametrize("kind", [Equalised, ScaledBias, Masked], ids=lambda k: k.__name__)
@ROUTES
def test_a_layer_that_computes_something_else_is_refused_by_name(method, kind, gradients):
    model = nn.Sequential(kind(N_IN, N_OUT)).double()
    optimizer = method(model, gradients=gradients)
    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match=rf"layer '0' \({kind.__name__}\) computes something else"):
        model(batch()[0])
    assert torch.equal(torch.get_rng_state(), state)
    optimizer.close()


def test_a_convolution_that_computes_something_else_is_refused_by_name():
    model = nn.Sequential(Standardised(1, 2, 3), nn.Flatten())
    optimizer = ACP(model, 0.1)
    with pytest.raises(CaptureError, match=r"layer '0' \(Standardised\)"):
        model(torch.randn(4, 1, 5, 5))
    optimizer.close()


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Gated(nn.Linear):
    def forward(self, x, gate):
        return gate * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(SamePadding(3, 4, 3, stride=2), [torch.randn(5, 3, 8, 8)]), (Gated(4, 3), [torch.randn(5, 4), 2.0])],
    ids=["padding", "arguments"],
)
def test_a_layer_that_cannot_be_compared_is_refused_by_name(layer, inputs):
    model = nn.ModuleList([layer])
    model.forward = lambda *inputs: layer(*inputs)
    optimizer = ACP(model, 0.1)
    with pytest.raises(CaptureError, match=rf"layer '0' \({type(layer).__name__}\) computes something else"):
        model(*inputs)
    optimizer.close()


@each(FEW)
def test_a_subclass_of_the_plain_map_is_trained(method):
    plain, model = nn.Sequential(nn.Linear(N_IN, N_OUT)).double(), nn.Sequential(Named(N_IN, N_OUT)).double()
    model.load_state_dict(plain.state_dict())
    for one in (plain, model):
        train(one, method(one), 3)
    assert_same(parameters(model), parameters(plain))
    adapted = nn.Sequential(Adapted(N_IN, N_OUT)).double()
    train(adapted, method(adapted), 2)


# --- methods that run the model again --------------------------------------------------------------------

AGAIN = [m for m in OPTIMIZERS if m.kind in (Newton, UpdatedBackprop)]


@each(AGAIN)
@pytest.mark.parametrize("shrink", ["parameter", "data"])
def test_weights_that_were_changed_since_the_pass(method, shrink):
    for index in (0, 2):
        model = network()
        optimizer = method(model)
        x, y = batch()
        LOSS(model(x), y).backward()
        with torch.no_grad():
            (model[index].weight.data if shrink == "data" else model[index].weight).mul_(0.99)
        unchanged(model, optimizer, CaptureError, "weights|changed")
        train(model, optimizer)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x, scale=1):
        return self.network(x) * scale


class Counting(Scaled):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.network(x) / self.calls


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher"])
def test_newton_refuses_what_it_cannot_run_again(curvature):
    (x, y), noisy = batch(), nn.Sequential(*network(), nn.Dropout(0.5))
    for model, call in [
        (noisy, lambda m: m(x)),
        (Scaled(), lambda m: m(x, 3)),
        (Scaled(), lambda m: m(x, scale=3)),
        (Counting(), lambda m: m(x)),
    ]:
        optimizer = Newton(model, damping=1.0, loss=LOSS, curvature=curvature)
        LOSS(call(model), y).backward()
        before = parameters(model)
        state, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
        with pytest.raises(CaptureError, match="run again"):
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(dict(model.named_buffers()), buffers)
        assert_same(parameters(model), before)
    model = nn.Sequential(network(), nn.Dropout(0.5), nn.BatchNorm1d(3).double())
    optimizer = Newton(model, damping=1.0, loss=LOSS, curvature=curvature)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LOSS(model(x), y).backward()
    model.eval()
    with pytest.raises(CaptureError, match="mode"):
        optimizer.step()


def test_newton_trains_with_batch_norm_and_a_scale_that_is_one():
    for model in (nn.Sequential(network(), nn.BatchNorm1d(3).double()), Scaled()):
        optimizer = Newton(model, damping=1.0, loss=LOSS, curvature="gauss_newton")
        before = parameters(model)
        train(model, optimizer, 2)
        assert any((p != q).any() for p, q in zip(before, parameters(model), strict=True))


@each([m for m in OPTIMIZERS if m.kind is Newton])
def test_newton_refuses_a_penalty_and_takes_a_clipped_gradient(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    (LOSS(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())).backward()
    unchanged(model, optimizer, CaptureError, "penalty")
    LOSS(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


# --- losses that are not the declared one ------------------------------------------------------------------

WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
OTHER_LOSSES = {
    "class weights": lambda f, y: F.cross_entropy(f, y, weight=WEIGHTS),
    "ignored index": lambda f, y: F.cross_entropy(f, y.where(y > 0, -100)),
    "times two": lambda f, y: 2 * F.cross_entropy(f, y),
    "sum in the place of mean": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "label smoothing, which is a target": lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2),
}


@each([m for m in OPTIMIZERS if m.takes_loss and not m.draws])
@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_loss_that_is_not_the_declared_one(method, name):
    model = network()
    optimizer = method(model)
    x, y = batch()
    OTHER_LOSSES[name](model(x), y).backward()
    if "which is a target" in name:
        optimizer.step()
    else:
        unchanged(model, optimizer, ValueError, "not that of CrossEntropyAtLogits.*for any target")


def test_targets_that_are_none():
    f = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64)
    for loss, good, bad in [
        (CrossEntropyAtProbabilities(), [[0.0, 1.0, 0.0]], [[0.0, 2.0, 0.0]]),
        (CrossEntropyAtLogits(), [[0.3, 0.3, 0.4]], [[-0.2, 1.0, 0.2]]),
        (BinaryCrossEntropyAtLogits(), [[0.0, 1.0, 1.0]], [[0.0, 1.5, 1.0]]),
        (BinaryCrossEntropyAtProbabilities(), [[1.0, 1.0, 0.0]], [[-0.1, 1.0, 0.0]]),
    ]:
        good, bad = (torch.tensor(y, dtype=torch.float64) for y in (good, bad))
        loss.require_target(f, loss.target(f, loss.gradient(f, good)))
        with pytest.raises(ValueError, match=type(loss).__name__):
            loss.require_target(f, bad)
    Quadratic().require_target(f, 100 * f)


# --- precision -----------------------------------------------------------------------------------------


def scaled_steps(method, gradients, scale, n=3, **options):
    """Steps with a loss that a ``GradScaler`` scales, in full precision."""
    model = network(dtype=torch.float32)
    optimizer = method(model, gradients=gradients, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2, enabled=scale != 1)
    for seed in range(n):
        x, y = batch(seed, dtype=torch.float32)
        optimizer.zero_grad()
        scaler.scale(LOSS(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer, scaler


@each(LAYERWISE)
@ROUTES
def test_a_scaled_loss_gives_the_same_steps(method, gradients):
    """Statistics of the examples' gradients and factors too."""
    expected, _, _ = scaled_steps(method, gradients, 1)
    found, _, scaler = scaled_steps(method, gradients, 2.0**12)
    assert scaler.get_scale() > 2.0**12
    assert_close(parameters(found), parameters(expected), 1e-5)


@each([m for m in OPTIMIZERS if m.kind is Newton])
def test_newton_takes_a_scaled_loss(method):
    model, twin = network(), network()
    for one, scale in ((model, 256.0), (twin, 1.0)):
        optimizer, scaler = method(one), torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        x, y = batch()
        scaler.scale(LOSS(one(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_close(parameters(model), parameters(twin), 1e-9)


@each(LAYERWISE)
@ROUTES
def test_a_scale_that_overflows_skips_the_step(method, gradients):
    model, optimizer, scaler = scaled_steps(method, gradients, 2.0**12, 1)
    before = parameters(model)
    x, y = batch(dtype=torch.float32)
    optimizer.zero_grad()
    (scaler.scale(LOSS(model(x), y)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**12
    assert_same(parameters(model), before)


OF_EXAMPLES = ("acp, heuristic", "kfac, gauss", "kfac, empirical", "ekfac, empirical", "ubp")
NEED_SCALE = [m for m in LAYERWISE if m.name.startswith(OF_EXAMPLES)]


@each(LAYERWISE)
@ROUTES
def test_gradients_that_were_unscaled_before(method, gradients):
    """And clipped, as in the recipe of torch: where examples' gradients count, their scale is unknown."""
    expected = network(dtype=torch.float32)
    model = network(dtype=torch.float32)
    for one, scale in ((expected, 1.0), (model, 1024.0)):
        optimizer = method(one, gradients=gradients)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        x, y = batch(dtype=torch.float32)
        scaler.scale(LOSS(one(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        if gradients == "factored" or method in NEED_SCALE:
            with pytest.raises(CaptureError, match="unscale"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
    assert_close(parameters(model), parameters(expected), 1e-4)


@each(LAYERWISE)
def test_weights_that_were_made_bfloat16(method):
    model = network(dtype=torch.float32)
    optimizer = method(model)
    model.to(torch.bfloat16)
    x, y = batch(dtype=torch.bfloat16)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(TypeError, match=r"layer '0' has become torch\.bfloat16.*autocast"):
        optimizer.step()


@each(FEW)
def test_sparse_inputs(method):
    model = network()
    optimizer = method(model)
    with pytest.raises(CaptureError, match=r"layer '0'.*needs a dense one"):
        model(batch()[0].to_sparse())
    optimizer.close()


# --- checkpoints and compilation ---------------------------------------------------------------------------


@each(OPTIMIZERS)
def test_the_state_of_another_optimizer(method):
    model = network()
    optimizer = method(model)
    others = [
        torch.optim.Adam,
        torch.optim.SGD,
        lambda p: ACP(model, 0.1),
        lambda p: KFAC(model, 0.1, loss=LOSS),
    ]
    if method.kind is not Newton:
        others.append(lambda p: Newton(model, loss=LOSS))
    for other in others:
        made = other(model.parameters())
        state = made.state_dict()
        if type(made) is method.kind or (method.kind is NaturalNN and type(made) is ACP):
            continue
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"another optimizer than {type(optimizer).__name__}"):
            optimizer.load_state_dict(state)
        assert_same(optimizer.state_dict(), before)


@each(LAYERWISE)
@ROUTES
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_torchs_distributed_checkpoint(method, gradients, momentum):
    """Which asks a fresh optimizer for a step of nothing."""

    def make(model):
        optimizer = method(model, gradients=gradients)
        optimizer.param_groups[0]["momentum"] = momentum
        return optimizer

    model = network()
    optimizer = make(model)
    before = parameters(model)
    fresh = get_optimizer_state_dict(model, optimizer)
    assert fresh["state"].keys() == dict(model.named_parameters()).keys()
    assert optimizer.param_groups[0]["lr"] == method.options["lr"]
    assert optimizer.param_groups[0]["updates"] == 0
    assert_same(parameters(model), before)
    train(model, optimizer, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = make(resumed)
    set_optimizer_state_dict(resumed, other, state)
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, 2, first=8)
    assert_same(parameters(resumed), parameters(model))


@pytest.mark.parametrize("kind", [ACP, CenteredGradientDescent])
@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
@ROUTES
def test_a_model_that_was_compiled_and_run_before_the_optimizer_was_made(kind, how, gradients):
    alone, model = network(), network()
    train(alone, kind(alone, 0.1, gradients=gradients), 2)
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager") if how == "wrapped" else model
    if how != "wrapped":
        (model[0] if how == "a part" else model).compile(backend="aot_eager")
    x, y = batch()
    LOSS(called(x), y).backward()
    optimizer = kind(model, 0.1, gradients=gradients)
    for seed in (1, 2):
        x, y = batch(seed)
        optimizer.zero_grad()
        LOSS(called(x), y).backward()
        optimizer.step()
    assert_close(parameters(model), parameters(alone), 1e-12)
    torch._dynamo.reset()


def test_a_watched_perceptron_of_three_layers_is_compiled_to_three_graphs():
    """One break a layer, and no warning, as the README says; unwatched it is one."""
    model = nn.Sequential(*(part for i in (4, 5, 6) for part in (nn.Linear(i, i + 1), nn.Tanh())))
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    for made, expected in ((lambda: None, 1), (lambda: ACP(model, 0.1), 3)):
        optimizer = made()
        torch._dynamo.reset()
        graphs.clear()
        model.zero_grad()
        with warnings.catch_warnings(record=True) as told:
            warnings.resetwarnings()
            torch.compile(model, backend=count)(torch.randn(8, 4)).sum().backward()
        assert not told
        assert len(graphs) == expected
        if optimizer is not None:
            optimizer.step()
            optimizer.close()
    torch._dynamo.reset()
