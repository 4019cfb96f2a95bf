"""An ordinary torch training loop, with an optimizer of sogrid in it: it behaves as with ``torch.optim``."""

import math
import sys
import threading
from itertools import pairwise

import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_IN,
    N_OUT,
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
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from sogrid.capture import CaptureError
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.optimizers import ACP, KFAC, Newton

LOSS = CrossEntropyAtLogits()
FROM_GRAD = [m for m in OPTIMIZERS if m.starts_from_grad]


def backward(model, seed=1, loss=LOSS, n=N):
    x, y = batch(seed, n)
    value = loss(model(x), y)
    value.backward()
    return value


def changes(model, before):
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


# --- the loop --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Any module will do: named children, a skip connection, a dictionary, a layer without bias."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(N_IN, 8, bias=False)
        self.blocks = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(8, N_OUT))

    def forward(self, x, *, scale=1.0):
        h = self.start(x)
        for block in self.blocks.values():
            h = h + block(h).tanh()
        return self.head(h) * scale


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def acp(model):
    return ACP(model, lr=0.1)


def kfac(model):
    return KFAC(model, lr=0.1, loss=CrossEntropyAtLogits())


@pytest.mark.parametrize("make", [sgd, acp, kfac], ids=lambda f: f.__name__)
def test_one_line_makes_any_loop_second_order(make):
    torch.manual_seed(3)
    model = Residual()
    optimizer = make(model)
    x, _ = batch(n=60, dtype=torch.float32)
    y = x[:, :N_OUT].argmax(1)
    before, losses = parameters(model), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all((change != 0).any() for change in changes(model, before))


@each(OPTIMIZERS)
def test_decreases_a_convex_function_at_every_step(method):
    """Linear regression, or multinomial logistic regression for the method that needs a cross-entropy."""
    x = batch(n=40)[0] - 0.5
    y = 2 * x[:, :N_OUT]
    loss = Quadratic()
    if method.options.get("curvature") == "gauss_newton_probabilities":
        loss, y = LOSS, y.argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N_IN, N_OUT)).double()
    optimizer = method(model, loss=loss, **({} if method.kind is Newton else {"lr": 0.03}))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]


@each(OPTIMIZERS)
def test_closure(method):
    one, two = network(), network()
    first, second = method(one), method(two)
    for seed in (1, 2, 3):

        def closure():
            second.zero_grad()
            return backward(two, seed)  # noqa: B023

        first.zero_grad()
        expected = backward(one, seed)
        first.step()
        with torch.no_grad():  # as a Lightning loop may
            found = second.step(closure)
        assert_same(found.item(), expected.item())
        assert_same(parameters(two), parameters(one))


@each(OPTIMIZERS)
def test_gradients_may_be_cleared_on_the_model_or_between_forward_and_backward(method):
    one, two, three = network(), network(), network()
    train(one, method(one), 3)
    second, third = method(two), method(three)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        two.zero_grad()
        LOSS(two(x), y).backward()
        second.step()
        value = LOSS(three(x), y)
        third.zero_grad()
        value.backward()
        third.step()
    assert_same(parameters(two), parameters(one))
    assert_same(parameters(three), parameters(one))


@each(OPTIMIZERS)
@pytest.mark.parametrize("clear", ["model", "optimizer", "optimizer, to zeros"])
def test_a_skipped_step_leaves_no_trace(method, clear):
    """As after a spoiled batch, whose gradients are thrown away."""
    one, two = network(), network()
    train(one, method(one), 2)
    optimizer = method(two)
    for seed in (1, 2):
        optimizer.zero_grad()
        backward(two, 8, n=7)
        (two if clear == "model" else optimizer).zero_grad(set_to_none="zeros" not in clear)
        backward(two, seed)
        optimizer.step()
    assert_same(parameters(two), parameters(one))


@each(OPTIMIZERS)
def test_zero_grad_to_zeros(method):
    one, two = network(), network()
    train(one, method(one), 3)
    optimizer = method(two)
    for seed in (1, 2, 3):
        optimizer.zero_grad(set_to_none=False)
        backward(two, seed)
        optimizer.step()
    assert_same(parameters(two), parameters(one))


@each(OPTIMIZERS)
def test_zero_learning_rate_changes_nothing(method):
    model = network()
    before = parameters(model)
    train(model, method(model, lr=0.0), 3)
    assert_same(parameters(model), before)


@each(OPTIMIZERS)
def test_a_batch_of_one(method):
    """Its inputs do not deviate from their mean: the centred weight updates vanish."""
    model = network()
    optimizer = method(model)
    before = parameters(model)
    backward(model, n=1)
    optimizer.step()
    for change, bias in zip(changes(model, before), [False, True] * 2, strict=True):
        assert torch.isfinite(change).all()
        if bias or not method.name.startswith(("centred", "acp", "nnn")) or "exact" in method.name:
            assert (change != 0).any()
        else:
            assert change.abs().max() < 1e-15


@each(OPTIMIZERS)
def test_step_hooks_of_torch_are_called(method):
    model, seen = network(), []
    optimizer = method(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


# --- hyperparameters -------------------------------------------------------------------------------


@each(LAYERWISE)
def test_groups_have_hyperparameters_of_their_own(method):
    """Each of two layers moves as in a run in which both have its learning rate and damping."""
    tuned = "damping" in method.options or method.kind is KFAC
    settings = [{"lr": 0.02}, {"lr": 0.3}]
    if tuned:
        settings = [{"lr": 0.02, "damping": 0.4}, {"lr": 0.3, "damping": 2.0}]
    model = network()
    before = parameters(model)
    groups = [{"params": model[i].parameters()} | s for i, s in zip((0, 2), settings, strict=True)]
    train(model, method(model, params=groups))
    for layer, setting in enumerate(settings):
        reference = network()
        train(reference, method(reference, **setting))
        own = slice(2 * layer, 2 * layer + 2)
        if method.starts_from_grad or layer == 1:
            assert_same(parameters(model)[own], parameters(reference)[own])
        else:  # the gradient of the lower layer has seen the update of the upper one
            assert all(
                (a != b).any()
                for a, b in zip(parameters(model)[own], parameters(reference)[own], strict=True)
            )
            other = network()
            train(other, method(other, lr=settings[1]["lr"]))
            ratio = settings[0]["lr"] / settings[1]["lr"]
            assert_close(changes(model, before)[own], [ratio * c for c in changes(other, before)[own]])


@each(OPTIMIZERS)
def test_tensor_hyperparameters_equal_numbers(method):
    one, two = network(), network()
    numbers = {"lr": 0.07} | {k: v for k, v in method.options.items() if k == "damping"}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    if method.kind is KFAC and method.bounded:
        tensors["damping"] = torch.tensor(0.1, dtype=torch.float64)  # the default
    train(one, method(one, **numbers), 3)
    train(two, method(two, **tensors), 3)
    assert_close(parameters(two), parameters(one), 1e-14)


def test_output_curvature_may_be_a_tensor():
    one, two = network(), network()
    train(one, ACP(one, 0.1, output_curvature=0.3, tikhonov="exact"), 3)
    train(two, ACP(two, 0.1, output_curvature=torch.tensor(0.3, dtype=torch.float64), tikhonov="exact"), 3)
    assert_close(parameters(two), parameters(one), 1e-14)


def halving(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch), [0.1, 0.05, 0.025, 0.0125]


def stepwise(optimizer):
    return StepLR(optimizer, step_size=2, gamma=0.1), [0.1, 0.1, 0.01, 0.01]


def one_cycle(optimizer):
    options = {"max_lr": 0.2, "total_steps": 4, "pct_start": 0.5, "cycle_momentum": False}
    options |= {"anneal_strategy": "linear", "div_factor": 4, "final_div_factor": 10}
    return OneCycleLR(optimizer, **options), [0.05, 0.2, 0.1025, 0.005]


@each(OPTIMIZERS)
@pytest.mark.parametrize("schedule", [halving, stepwise, one_cycle], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_learning_rate_schedulers(method, schedule, kind):
    model, reference = network(), network()
    lr = 0.1 if kind == "number" else torch.tensor(0.1, dtype=torch.float64)
    optimizer, manual = method(model, lr=lr), method(reference)
    scheduler, rates = schedule(optimizer)
    for seed, rate in enumerate(rates, 1):
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(rate, rel=1e-12)
        manual.param_groups[0]["lr"] = rate
        train(model, optimizer, first=seed)
        train(reference, manual, first=seed)
        scheduler.step()
    assert_close(parameters(model), parameters(reference))


# --- gradients -------------------------------------------------------------------------------------


@each([m for m in LAYERWISE if not m.samples])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_gradients_equal_one_large_batch(method, reduction):
    """Through a refresh from the accumulated minibatches too."""
    one, two = network(), network()
    loss = CrossEntropyAtLogits(reduction)
    whole, parts = method(one, loss=loss), method(two, loss=loss)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        whole.zero_grad()
        loss(one(x), y).backward()
        whole.step()
        parts.zero_grad()
        for i in range(0, N, 4):
            part = loss(two(x[i : i + 4]), y[i : i + 4])
            (part / 3 if reduction == "mean" else part).backward()
        parts.step()
    assert_close(parameters(two), parameters(one))


@each([m for m in OPTIMIZERS if m.samples])
def test_accumulated_gradients_with_sampled_statistics(method):
    """Draws differ with the batch, so the statistics come from one of their own."""
    one, two = network(), network()
    whole, parts = method(one), method(two)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        for optimizer, model in ((whole, one), (parts, two)):
            s, t = batch(10 + seed)
            optimizer.refresh(lambda: LOSS(model(s), t))  # noqa: B023
            optimizer.zero_grad()
        LOSS(one(x), y).backward()
        for i in range(0, N, 4):
            (LOSS(two(x[i : i + 4]), y[i : i + 4]) / 3).backward()
        whole.step()
        parts.step()
    assert_close(parameters(two), parameters(one))


@each([m for m in OPTIMIZERS if m.kind.__name__ == "Newton"])
def test_newton_accumulates(method):
    one, two = network(), network()
    train(one, method(one))
    x, y = batch()
    optimizer = method(two)
    for i in range(0, N, 4):
        (LOSS(two(x[i : i + 4]), y[i : i + 4]) / 3).backward()
    optimizer.step()
    assert_close(parameters(two), parameters(one))


@each([m for m in LAYERWISE if not m.samples])
def test_a_model_called_twice_is_the_concatenated_batch(method):
    """A siamese network: two forward passes, one backward pass, also when statistics are refreshed."""
    one, two = network(), network()
    whole, halves = method(one), method(two)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        whole.zero_grad()
        LOSS(one(x), y).backward()
        whole.step()
        halves.zero_grad()
        left, right = two(x[:6]), two(x[6:])
        (0.5 * (LOSS(left, y[:6]) + LOSS(right, y[6:]))).backward()
        halves.step()
    assert_close(parameters(two), parameters(one))


@each([m for m in LAYERWISE if not m.samples])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_losses_on_one_forward_pass(method, reduction):
    """``backward`` once for each is ``backward`` of their sum; examples are not counted twice."""
    one, two = network(), network()
    loss = CrossEntropyAtLogits(reduction)
    x, y = batch()
    first, second = method(one, loss=loss), method(two, loss=loss)
    loss(one(x), y).backward()
    first.step()
    f = two(x)
    (0.7 * loss(f, y)).backward(retain_graph=True)
    (0.3 * loss(f, y)).backward()
    second.step()
    assert_close(parameters(two), parameters(one))


@each([m for m in FROM_GRAD if not m.bounded])
def test_gradient_clipping_scales_the_step(method):
    one, two = network(), network()
    first, second = method(one), method(two)
    before = parameters(one)
    backward(one)
    first.step()
    backward(two)
    norm = torch.nn.utils.clip_grad_norm_(two.parameters(), 0.01)
    assert norm > 0.02
    second.step()
    factor = 0.01 / (norm + 1e-6)  # torch's
    assert_close(changes(two, before), [factor * change for change in changes(one, before)])


@each([m for m in OPTIMIZERS if not m.starts_from_grad])
def test_gradient_clipping_is_refused_where_the_step_is_not_made_from_grad(method):
    model = network()
    optimizer, before = method(model), parameters(model)
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(CaptureError, match="clipping"):
        optimizer.step()
    assert_same(parameters(model), before)
    train(model, optimizer)


@each([m for m in FROM_GRAD if m.layerwise])
def test_penalties_on_the_parameters_are_part_of_the_gradient(method):
    """Weight decay in the loss equals weight decay added to .grad, as in torch."""
    one, two = network(), network()
    first, second = method(one), method(two)
    x, y = batch()
    (LOSS(one(x), y) + 0.05 * sum(p.square().sum() for p in one.parameters())).backward()
    LOSS(two(x), y).backward()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.grad += 0.1 * parameter
    first.step()
    second.step()
    assert_close(parameters(two), parameters(one))


@each(LAYERWISE)
def test_mean_and_sum_losses_give_the_same_step_when_declared(method):
    """To rounding, the heuristic α and the Kronecker factors of KFAC included."""
    one, two = network(), network()
    train(one, mean := method(one, loss="mean"), 3)
    train(two, total := method(two, loss="sum"), 3, loss=CrossEntropyAtLogits("sum"))
    assert_close(parameters(two), parameters(one))
    for a, b in zip(mean.state.values(), total.state.values(), strict=True):
        assert a.keys() == b.keys()
        tensors = [key for key in a if isinstance(a[key], torch.Tensor)]
        assert_close([b[key] for key in tensors], [a[key] for key in tensors])


@each([m for m in OPTIMIZERS if not m.layerwise])
def test_newton_takes_the_same_step_from_mean_and_sum(method):
    one, two = network(), network()
    train(one, method(one, loss="mean"), 3)
    train(two, method(two, loss="sum"), 3, loss=CrossEntropyAtLogits("sum"))
    assert_close(parameters(two), parameters(one))


@each([m for m in REFRESHING if m.starts_from_grad and not m.bounded])
def test_declaring_the_wrong_reduction_is_not_the_same_step(method):
    """So the test above compares something."""
    one, two = network(), network()
    train(one, method(one, loss="mean"))
    train(two, method(two, loss="sum"))
    with pytest.raises(AssertionError):
        assert_close(parameters(two), parameters(one), 1e-3)


# --- the forward pass ------------------------------------------------------------------------------


def evaluate_without_gradients(model):
    model.eval()
    with torch.no_grad():
        model(batch(50)[0])
    model.train()


def evaluate_with_gradients(model):
    model.eval()
    model(batch(50)[0])
    model.train()


def predict_in_training_mode(model):
    with torch.no_grad():
        model(batch(50)[0])


def look_at_the_input(model):
    x = batch(50)[0].requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


EVALUATIONS = [
    evaluate_without_gradients,
    evaluate_with_gradients,
    predict_in_training_mode,
    look_at_the_input,
]


@each(OPTIMIZERS)
@pytest.mark.parametrize("evaluate", EVALUATIONS, ids=lambda f: f.__name__)
def test_evaluation_leaves_statistics_and_updates_alone(method, evaluate):
    """Before, between and after the passes of every update, also of those at which a refresh is due."""
    one, two = network(), network()
    train(one, first := method(one), 3)
    second = method(two)
    for seed in (1, 2, 3):
        evaluate(two)
        second.zero_grad()
        x, y = batch(seed)
        value = LOSS(two(x), y)
        evaluate(two)
        value.backward()
        evaluate(two)
        second.step()
    assert_same(parameters(two), parameters(one))
    assert_same(second.state_dict(), first.state_dict())


@each(OPTIMIZERS)
def test_in_place_activations_equal_out_of_place(method):
    one = network(activation=nn.ReLU)
    two = network(activation=lambda: nn.ReLU(inplace=True))
    train(one, first := method(one), 3)
    train(two, second := method(two), 3)
    assert_same(parameters(two), parameters(one))
    assert_same(second.state_dict(), first.state_dict())


def traced(model):
    return torch.jit.trace(model, batch()[0])


def exported(model):
    return torch.export.export(model, (batch()[0],)).module()


@each(OPTIMIZERS)
@pytest.mark.parametrize("convert", [traced, exported], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_in_training_may_be_converted(method, convert):
    """Nothing of the optimizer enters the graph, and nothing of the conversion the update."""
    one, two = network(), network()
    train(one, method(one), 2)
    optimizer = method(two)
    for seed in (1, 2):
        optimizer.zero_grad()
        x, y = batch(seed)
        LOSS(two(x), y)
        assert_close([convert(two)(x)], [two(x)])
        two.zero_grad()
        value = LOSS(two(x), y)
        value.backward()
        optimizer.step()
    assert_same(parameters(two), parameters(one))


@each([m for m in FROM_GRAD if m.layerwise])
def test_hooks_of_the_user_are_respected(method):
    """A forward hook that changes the output, a backward hook, and a hook on a gradient."""
    model, reference = network(), network()

    class Doubled(nn.Module):
        def forward(self, h):
            return (2 * h).tanh()

    reference[1] = Doubled()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    seen = []
    model[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[2].weight.register_hook(lambda grad: seen.append("weight"))
    train(model, method(model), 2)
    train(reference, method(reference), 2)
    assert_close(parameters(model), parameters(reference))
    assert set(seen) == {"backward", "weight"}  # KFAC's probes run backward hooks more often


def test_models_train_at_once_in_several_threads():
    def work(found):
        for _ in range(5):
            model = network()
            optimizer = KFAC(model, 0.1, loss=LOSS, refresh_every=2)
            train(model, optimizer, 4)
            found.append(parameters(model))

    work(expected := [])
    results = [[] for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(found,)) for found in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for found in results:
        assert_same(found, expected)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()[:2]
        self.used, self.unused = network(3)[2], network(4)[2]

    def forward(self, x):
        return self.used(self.body(x))


@each([m for m in OPTIMIZERS if m.kind.__name__ != "UpdatedBackprop"])
def test_unused_layers_are_left_untouched(method):
    one, two = TwoHeads(), TwoHeads()
    del two.unused
    before = parameters(one.unused)
    train(one, first := method(one), 5)
    train(two, second := method(two), 5)
    assert_same(parameters(one.unused), before)
    if method.layerwise:
        assert one.unused.weight not in first.state
        assert_same(parameters(one.body) + parameters(one.used), parameters(two))
        assert_same(list(first.state.values()), list(second.state.values()))
    else:
        assert_close(parameters(one.body) + parameters(one.used), parameters(two))


@each([m for m in LAYERWISE if m.kind.__name__ != "UpdatedBackprop"])
def test_a_layer_that_joins_later_takes_its_statistics_from_its_first_minibatch(method):
    """Between refreshes, and without making the other layers refresh."""

    class Switching(TwoHeads):
        second = False

        def forward(self, x):
            return (self.unused if self.second else self.used)(self.body(x))

    one, two = Switching(), Switching()
    options = {"refresh_every": 4} if method.refreshes else {}
    train(one, first := method(one, **options), 1)
    train(two, second := method(two, **options), 1)
    before = first.state.get(one.body[0].weight, {}).copy()
    one.second = True
    train(one, first, 1, first=2)
    assert_same(first.state.get(one.body[0].weight, {}), before)
    if method.refreshes:
        two.second = True
        x, y = batch(2)
        second.refresh(lambda: LOSS(two(x), y))
        for key, value in second.state[two.unused.weight].items():
            if not method.samples or "b_" not in key:
                assert_same(first.state[one.unused.weight][key], value)


class Alternating(TwoHeads):
    """Whose heads take turns."""

    update = 0

    def forward(self, x):
        return (self.unused if self.update % 2 else self.used)(self.body(x))


@each([m for m in REFRESHING if m.kind.__name__ != "UpdatedBackprop"])
def test_a_layer_that_has_no_part_in_a_refresh_has_its_own_later(method):
    model = Alternating()
    optimizer, refreshed = method(model, refresh_every=4), []
    for model.update in range(12):
        before = dict(optimizer.state)
        train(model, optimizer, 1, first=model.update + 1)
        weights = {"body": model.body[0].weight, "even": model.used.weight, "odd": model.unused.weight}
        now = [name for name, w in weights.items() if optimizer.state.get(w) is not before.get(w)]
        refreshed.append(" ".join(now))
    at = {update: names for update, names in enumerate(refreshed) if names}
    assert at == {k + j: name for k in (0, 4, 8) for j, name in ((0, "body even"), (1, "odd"))}


@each([m for m in REFRESHING if m.kind.__name__ != "UpdatedBackprop"])
def test_a_layer_that_was_frozen_has_new_statistics_when_it_goes_on(method):
    model = network()
    optimizer = method(model, refresh_every=4)
    for update in range(8):
        model[0].requires_grad_(update in (0, 6, 7))
        before = optimizer.state.get(model[0].weight)
        train(model, optimizer, 1, first=update + 1)
        assert (optimizer.state[model[0].weight] is not before) == (update in (0, 6))


# --- precision -------------------------------------------------------------------------------------


AUTOCAST = [m for m in OPTIMIZERS if m.starts_from_grad]


@each(AUTOCAST)
@pytest.mark.parametrize("around", ["the forward pass", "everything"])
def test_autocast_of_the_forward_pass(method, around):
    """Weights stay float32; the step is that of float32 to the accuracy of bfloat16."""
    rtol = 0.1
    one, two = network(dtype=torch.float32), network(dtype=torch.float32)
    before = parameters(one)
    train(one, method(one))
    optimizer = method(two)
    x, y = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSS(two(x).float(), y)
        if around == "everything":
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    if around == "the forward pass":
        value.backward()
        optimizer.step()
    assert {p.dtype for p in two.parameters()} == {torch.float32}
    for state in optimizer.state.values():
        assert {value.dtype for value in state.values() if isinstance(value, torch.Tensor)} == {torch.float32}
    assert_close(changes(two, before), changes(one, before), rtol)


@each([m for m in OPTIMIZERS if not m.starts_from_grad])
def test_autocast_is_refused_where_the_step_is_not_made_from_grad(method):
    model = network(dtype=torch.float32)
    optimizer, before = method(model), parameters(model)
    x, y = batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSS(model(x).float(), y)
    value.backward()
    with pytest.raises(CaptureError, match="autocast"):
        optimizer.step()
    assert_same(parameters(model), before)


GRADIENT_STATISTICS = ("acp, heuristic", "kfac, gauss-newton", "kfac, empirical fisher")


@each([m for m in LAYERWISE if m.starts_from_grad])
def test_gradient_scaler(method):
    """The scale, a power of two, is not noticed; statistics made of gradients need a closure without it."""
    one, two = network(dtype=torch.float32), network(dtype=torch.float32)
    train(one, method(one), 3)
    optimizer, scaler = method(two), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in (1, 2, 3):
        x, y = batch(seed, dtype=torch.float32)
        if method.name in GRADIENT_STATISTICS and optimizer.refresh_due:
            optimizer.refresh(lambda: LOSS(two(x), y))  # noqa: B023
        optimizer.zero_grad()
        scaler.scale(LOSS(two(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(parameters(two), parameters(one))


@each(LAYERWISE)
def test_gradient_scaler_skips_the_step_of_an_overflow(method):
    model = network(dtype=torch.float32)
    optimizer, scaler = method(model), torch.amp.GradScaler("cpu")
    x, y = batch(dtype=torch.float32)
    before = parameters(model)
    scaler.scale(LOSS(model(x), y) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(parameters(model), before)
    train(model, optimizer)
    assert all((change != 0).any() for change in changes(model, before))
