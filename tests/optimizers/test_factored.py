"""``gradients="factored"``: the steps are those from ``.grad``, without one; what it refuses and spares."""

import copy
import gc
import importlib.util
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from optimizer_list import (
    LAYERWISE,
    N_HIDDEN,
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
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sogrid.capture import CaptureError
from sogrid.experiments.benchmarks import BENCHMARKS
from sogrid.hooks import watched
from sogrid.losses import CrossEntropyAtLogits, CrossEntropyAtProbabilities, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
ROUNDING = 1e-12
FACTORED = [replace(m, options=m.options | {"gradients": "factored"}) for m in LAYERWISE]
WITHOUT_CHAIN = [m for m in FACTORED if m.kind is not UpdatedBackprop]
UBP = [m for m in FACTORED if m.kind is UpdatedBackprop]


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    if watched():
        gc.collect()  # schedulers, tracebacks
    assert not watched()


def without_grad(model):
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return all(layer.weight.grad is None for layer in layers if layer.bias is not None)


def assert_same_steps(method, make, loop, rtol=ROUNDING, **options):
    """``loop(model, optimizer)`` leaves two equal models at the same parameters, by both routes."""
    model, twin = make(), make()
    optimizer = method(model, **options)
    loop(model, optimizer)
    loop(twin, method(twin, **(options | {"gradients": "matrix"})))
    assert_close(parameters(model), parameters(twin), rtol)
    assert any(not torch.equal(p, q) for p, q in zip(parameters(model), parameters(make()), strict=True))
    return optimizer


def steps(count=3, n=12, loss=LOSS):
    """The ordinary loop on minibatches of n."""

    def loop(model, optimizer):
        for seed in range(count):
            x, y = batch(seed, n)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            if optimizer.gradients == "factored":
                assert without_grad(model)
            optimizer.step()

    return loop


# --- the same steps --------------------------------------------------------------------------------


@each(FACTORED)
@pytest.mark.parametrize("n", [1, 2, N_OUT, N_IN, N_HIDDEN, 12])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_from_matrices(method, n, reduction):
    """With fewer and more examples than each side of the layers; bit for bit repeatable."""
    loop = steps(n=n, loss=CrossEntropyAtLogits(reduction))
    first = assert_same_steps(method, network, loop, loss=reduction)
    again = network()
    loop(again, method(again, loss=reduction))
    assert_same(parameters(again), parameters(first.model))


def wide(bias=True, activation=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias, dtype=torch.float64) for i, o in pairwise([40, 25, 12, 3])]
    return nn.Sequential(layers[0], activation(), layers[1], activation(), layers[2])


def wide_steps(model, optimizer):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(5, 40, generator=generator, dtype=torch.float64) + 0.5
        optimizer.zero_grad()
        LOSS(model(x), torch.randint(3, (5,), generator=generator)).backward()
        optimizer.step()


@each(FACTORED)
def test_steps_with_thin_inverses(method):
    assert_same_steps(method, wide, wide_steps)


@each(WITHOUT_CHAIN)
def test_steps_without_biases(method):
    assert_same_steps(method, lambda: wide(bias=False), wide_steps)


EXACTLY = [
    *(
        replace(named("ubp"), name=f"ubp, {curvature}", options={"lr": 0.1, "curvature": curvature})
        for curvature in ("gauss_newton", "hessian", "none")
    ),
    replace(
        named("acp, heuristic"),
        name="acp, exact, heuristic",
        options={"lr": 0.1, "damping": 0.3, "tikhonov": "exact", "output_curvature": "heuristic"},
    ),
    replace(
        named("kfac, exact fisher"),
        name="kfac, no pi",
        options={"lr": 0.1, "curvature": "fisher_exact", "pi_correction": False},
    ),
]


@each([replace(m, options=m.options | {"gradients": "factored"}) for m in EXACTLY])
@pytest.mark.parametrize("loss", [CrossEntropyAtProbabilities(), Quadratic()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("activation", ["sigmoid", "relu", nn.Softsign])
def test_steps_of_other_options_and_losses(method, loss, activation):
    """Also with an output that mixes units, and activations whose slope is not a factor that is known."""
    softmax = isinstance(loss, CrossEntropyAtProbabilities)

    def make():
        generator = torch.Generator().manual_seed(3)
        output = "softmax" if softmax else "sigmoid"
        return MLP([4, 6, 5, 3], activation, output, scale=4.0, generator=generator).double()

    def loop(model, optimizer):
        for seed in range(3):
            x, y = batch(seed)
            y = y if softmax else nn.functional.one_hot(y, 3).double()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    assert_same_steps(method, make, loop, rtol=1e-11, loss=loss)


@each(FACTORED)
def test_passes_accumulate(method):
    """Two backward passes, one through two forward passes, and one forward pass pulled back twice.

    Of which methods would think, whose loss is declared, that it is twice that.
    """

    def loop(model, optimizer):
        for seed in range(3):
            optimizer.zero_grad()
            (x, y), (u, v), (p, q) = batch(seed), batch(seed + 9, 7), batch(seed + 20, 4)
            (12 / 23 * LOSS(model(x), y)).backward()
            (7 / 23 * LOSS(model(u), v) + 4 / 23 * LOSS(model(p), q)).backward()
            if not method.takes_loss:
                value = LOSS(model(x), y)
                value.backward(retain_graph=True)
                value.backward()
            optimizer.step()

    assert_same_steps(method, network, loop)


@each(FACTORED)
def test_what_is_not_a_training_pass_is_not_counted(method):
    """Evaluation, a pass thrown away, autograd.grad, a refresh, a copy's pass, a cleared pass."""

    def loop(model, optimizer):
        for seed in range(3):
            (x, y), (u, v) = batch(seed), batch(seed + 9, 7)
            LOSS(model(u), v).backward()
            optimizer.zero_grad()
            model(u)
            value = LOSS(model(x), y)
            with torch.no_grad():
                model(u)
            model.eval()(u)
            model.train()
            LOSS(copy.deepcopy(model)(u), v).backward()
            optimizer.refresh(lambda u=u, v=v: LOSS(model(u), v))
            f = model(u)
            torch.autograd.grad(LOSS(f, v), f)
            value.backward()
            optimizer.step()

    assert_same_steps(method, network, loop)


@each(WITHOUT_CHAIN)
def test_gradients_for_the_input_pass_through(method):
    """Of a layer below that is trained otherwise, and of the input itself; asked for alone, not counted."""

    def make():
        below = nn.Linear(N_IN, N_IN).double()
        nn.init.eye_(below.weight)
        nn.init.zeros_(below.bias)
        return nn.ModuleList([below, network()])

    def loop(model, optimizer):
        below, top = model
        sgd = torch.optim.SGD(below.parameters(), 0.1)
        for seed in range(3):
            x, y = batch(seed)
            x.requires_grad_()
            optimizer.zero_grad()
            sgd.zero_grad()
            value = LOSS(top(below(x)), y)
            torch.autograd.grad(value, x, retain_graph=True)
            value.backward(inputs=[x], retain_graph=True)
            value.backward()
            optimizer.step()
            sgd.step()

    def optimizer_of_the_top(model, **options):
        return method(model[1], **options)

    assert_same_steps(optimizer_of_the_top, make, loop)


@each(WITHOUT_CHAIN)
def test_parameter_groups_tensors_and_schedulers(method):
    def loop(model, optimizer):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for seed in range(3):
            train(model, optimizer, first=seed)
            scheduler.step()

    for number in (float, np.float64, lambda value: torch.tensor(value, dtype=torch.float64)):

        def grouped(model, number=number, **options):
            first, last = model[0], model[2]
            groups = [
                {"params": first.parameters(), "lr": number(0.2)},
                {"params": last.parameters(), "lr": number(0.05)},
            ]
            return method(model, params=groups, **options)

        assert_same_steps(grouped, network, loop)


def normed():
    torch.manual_seed(0)
    parts = [nn.Linear(N_IN, 6, bias=False), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, N_OUT)]
    return nn.Sequential(*parts).double()


@each(WITHOUT_CHAIN)
def test_other_parameters_and_in_place_activations(method):
    assert_same_steps(method, normed, steps(), other_lr=0.05)


@each(FACTORED)
def test_in_place_activations(method):
    """The pre-activations are overwritten; UBP needs them."""
    assert_same_steps(method, lambda: network(activation=lambda: nn.ReLU(inplace=True)), steps())


@each(WITHOUT_CHAIN)
@pytest.mark.parametrize("frozen", ["0", "2", "0.bias", "2.bias"])
def test_frozen_parameters_stay(method, frozen):
    """From the start, or from the second update on, with statistics taken anew."""

    def loop(model, optimizer):
        for seed in range(4):
            if seed == 2:
                kept = model.get_submodule(frozen) if "." not in frozen else model.get_parameter(frozen)
                kept.requires_grad_(False)
                before = parameters(model)
                optimizer.zero_grad()
            train(model, optimizer, first=seed)
        held = [name.startswith(frozen) for name, _ in model.named_parameters()]
        pairs = zip(held, parameters(model), before, strict=True)
        assert all(torch.equal(now, then) for fixed, now, then in pairs if fixed)

    assert_same_steps(method, network, loop)


@each(WITHOUT_CHAIN)
def test_a_bias_that_another_optimizer_trains(method):
    def weights_only(model, **options):
        return method(model, params=[model[0].weight, model[2].weight], **options)

    def loop(model, optimizer):
        sgd = torch.optim.SGD([model[0].bias, model[2].bias], 0.1)
        for seed in range(3):
            sgd.zero_grad()
            train(model, optimizer, first=seed)
            sgd.step()

    assert_same_steps(weights_only, network, loop)


@each(WITHOUT_CHAIN)
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part"])
def test_activation_checkpoints(method, whole):
    def loop(model, optimizer):
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            if whole:
                f = checkpoint(model, x, use_reentrant=False)
            else:
                f = model(x)
                f = f + 0 * checkpoint(torch.tanh, f, use_reentrant=False)
            LOSS(f, y).backward()
            optimizer.step()

    assert_same_steps(method, network, loop)


@each([m for m in FACTORED if m.name in ("acp", "kfac, exact fisher", "ubp")])
def test_a_compiled_model(method):
    """By each way on: from layers, with what is pulled back from the output, and cut there."""

    def loop(model, optimizer):
        compiled = torch.compile(model, backend="aot_eager")
        compiled(batch()[0])
        for seed in range(2):
            x, y = batch(seed)
            optimizer.zero_grad()
            LOSS(compiled(x), y).backward()
            optimizer.step()
        torch._dynamo.reset()

    assert_same_steps(method, network, loop)


@each([m for m in FACTORED if m.name in ("centred", "acp", "acp, exact Tikhonov", "kfac, exact fisher")])
def test_a_compiled_update(method):
    """The equation alone is compiled; the other route is not."""

    def loop(model, optimizer):
        if optimizer.gradients == "factored":
            optimizer.method.update = torch.compile(optimizer.method.update, backend="aot_eager")
        wide_steps(model, optimizer)

    with torch._dynamo.config.patch(recompile_limit=64):
        assert_same_steps(method, wide, loop)
    torch._dynamo.reset()


@each(WITHOUT_CHAIN)
def test_torch_func_sees_the_ordinary_layer(method):
    model = network()
    optimizer = method(model)
    x, _ = batch()
    named_parameters = dict(model.named_parameters())
    call = torch.func.functional_call
    jacobian = torch.func.jacrev(lambda p: call(model, p, (x,)))(named_parameters)
    optimizer.close()
    expected = torch.func.jacrev(lambda p: call(model, p, (x,)))(named_parameters)
    assert_same(list(jacobian.values()), list(expected.values()))


def test_autocast_rounds_like_autograd():
    """bfloat16 inside, float32 factors: the two routes differ by bfloat16 rounding."""
    model, twin = network(dtype=torch.float32), network(dtype=torch.float32)
    for one, gradients in ((model, "factored"), (twin, "matrix")):
        optimizer = ACP(one, 0.1, gradients=gradients)
        x, y = batch(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            LOSS(one(x), y).backward()
        optimizer.step()
    assert_close(parameters(model), parameters(twin), 1e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --- persistence, by the tests of every optimizer ----------------------------------------------------

_spec = importlib.util.spec_from_file_location("persistence", Path(__file__).with_name("test_persistence.py"))
persistence = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(persistence)

AS_EVER = [
    persistence.test_a_checkpoint_resumes_whatever_the_global_stream_is,
    persistence.test_a_checkpoint_is_tensors_and_plain_values_only,
    persistence.test_a_copy_of_the_optimizer_alone_brings_a_copy_of_the_model,
    persistence.test_a_copy_of_the_model_alone_is_a_plain_model,
    persistence.test_a_copy_in_the_middle_of_a_pass_sees_no_half_of_it,
    persistence.test_closing_removes_the_hooks,
    persistence.test_deleting_removes_the_hooks_without_the_garbage_collector,
    persistence.test_the_next_optimizer_takes_over,
    persistence.test_two_optimizers_of_two_models_at_once,
]


@each(FACTORED)
@pytest.mark.parametrize("check", AS_EVER, ids=lambda f: f.__name__)
def test_as_ever(method, check):
    check(method)


@each(FACTORED)
@pytest.mark.parametrize(
    "duplicate", [persistence.by_deepcopy, persistence.by_pickle], ids=lambda f: f.__name__
)
def test_copies(method, duplicate):
    check = persistence.test_a_copy_of_model_and_optimizer_continues_bit_for_bit_on_its_own
    check(method, duplicate)


@each([FACTORED[0], *UBP[:1]])
def test_hundreds_of_steps_leak_nothing(method):
    persistence.test_hundreds_of_steps_leak_nothing(method)


@each(FACTORED)
def test_a_state_may_be_continued_by_the_other_route(method):
    model, other = network(), network()
    optimizer = method(model, gradients="matrix")
    train(model, optimizer, 3)
    resumed = method(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.gradients == "factored"
    train(model, optimizer, 3, first=4)
    train(other, resumed, 3, first=4)
    assert_close(parameters(other), parameters(model), ROUNDING)


# --- what is refused -------------------------------------------------------------------------------


def refused(model, optimizer, match):
    before = parameters(model)
    with pytest.raises(CaptureError, match=match):
        optimizer.step()
    assert_same(parameters(model), before)
    optimizer.zero_grad()
    train(model, optimizer)


@each(FACTORED)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_penalty_on_a_parameter(method, kind):
    model = network()
    optimizer = method(model)
    x, y = batch()
    (LOSS(model(x), y) + getattr(model[2], kind).square().sum()).backward()
    refused(
        model, optimizer, f"(layer '2': .*{kind}|the .grad of the model's last).*penal.*gradients='matrix'"
    )


@each(WITHOUT_CHAIN)
@pytest.mark.parametrize("update", [0, 1])
def test_a_gradient_of_the_bias_that_was_replaced(method, update):
    """Which has a version of its own."""
    model = network()
    optimizer = method(model)
    train(model, optimizer, update)
    optimizer.zero_grad()
    x, y = batch()
    LOSS(model(x), y).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * 1e3
    refused(model, optimizer, "is not what the backward pass left there")


@each(FACTORED)
def test_a_gradient_of_an_evaluation_pass(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    LOSS(model.eval()(x), y).backward()
    model.train()
    LOSS(model(x), y).backward()
    refused(model, optimizer, "layer '0': the weight has a .grad.*not seen.*eval mode")


@each(FACTORED)
@pytest.mark.parametrize("where", ["loss", "input"])
def test_numbers_that_are_not_finite(method, where):
    """Infinity behind a saturated activation gives a finite loss."""
    model = network(activation=nn.Sigmoid)
    optimizer = method(model)
    before = parameters(model)
    x, y = batch()
    if where == "input":
        x[3, 2] = float("inf")
    (LOSS(model(x), y) * (float("nan") if where == "loss" else 1)).backward()
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite.*nothing was changed"):
        optimizer.step()
    assert_same(parameters(model), before)
    optimizer.zero_grad()
    train(model, optimizer)


@each(FACTORED)
def test_a_minibatch_overwritten_before_the_step(method):
    """After the backward pass nobody but the version tells; before it, autograd does, if it is asked."""
    model = network()
    optimizer = method(model)
    x, y = batch()
    LOSS(model(x), y).backward()
    x.zero_()
    refused(model, optimizer, "the input of layer '0' was changed in place")


@each(WITHOUT_CHAIN)
def test_a_minibatch_overwritten_before_the_backward_pass(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    value = LOSS(model(x), y)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    optimizer.zero_grad()
    train(model, optimizer)


@each(WITHOUT_CHAIN)
def test_second_derivatives(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    x.requires_grad_()
    with pytest.raises(CaptureError, match=r"create_graph=True.*gradients='matrix'"):
        torch.autograd.grad(LOSS(model(x), y), x, create_graph=True)
    optimizer.zero_grad()
    train(model, optimizer)


@each(WITHOUT_CHAIN)
def test_layers_that_compute_something_else(method):
    class Doubled(nn.Linear):
        def forward(self, h):
            return 2 * super().forward(h)

    model = nn.Sequential(Doubled(N_IN, N_OUT)).double()
    optimizer = method(model)
    with pytest.raises(CaptureError, match=r"Doubled\) computes something else.*gradients='matrix'"):
        train(model, optimizer)


@each(UBP)
def test_ubp_gives_no_gradient_to_the_models_input(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    with pytest.raises(CaptureError, match="input needs a gradient"):
        model(x.requires_grad_())
    train(model, optimizer)


@pytest.mark.parametrize("value", ["matrices", None, True])
def test_other_names(value):
    with pytest.raises(ValueError, match="gradients must be 'matrix' or 'factored'"):
        ACP(network(), 0.1, gradients=value)


# --- the routes ------------------------------------------------------------------------------------


def test_the_route_of_each_layer_shows_in_the_repr():
    """Formed first where the layer has fewer outputs than there are examples."""
    model = network()
    optimizer = ACP(model, 0.1, gradients="factored")
    assert "\ngradients: factored\n" in repr(optimizer)
    steps(1, n=3)(model, optimizer)  # 4 → 5 → 3
    assert "\ngradients: 0 factored, 2 factored\n" in repr(optimizer)
    steps(1, n=4)(model, optimizer)
    assert "\ngradients: 0 formed, 2 formed\n" in repr(optimizer)  # as wide as the input; above n_out
    assert "gradients" not in repr(ACP(network(), 0.1))
    assert "gradients: 0 factored, 2 factored, 4 factored" in repr(
        assert_same_steps(UBP[0], wide, wide_steps)
    )


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made, without those that are changed in place or viewed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.seen |= {tuple(leaf.shape) for leaf in made if leaf.data_ptr() not in given}
        return result


@pytest.mark.parametrize("make", [ACP, NaturalNN, CenteredGradientDescent, KFAC, UpdatedBackprop])
def test_no_large_matrix_is_made(make):
    """Neither n_in × n_in, if the statistics batch is smaller than half, nor a weight's gradient or step."""
    n, widths = 5, [41, 37, 31]
    model = nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(widths)])
    options = {"loss": Quadratic()} if make in (KFAC, UpdatedBackprop) else {}
    optimizer = make(model, lr=0.1, gradients="factored", **options)
    x, y = torch.randn(n, 41), torch.randn(n, 31)
    with Shapes() as shapes:
        for _ in range(2):
            optimizer.zero_grad()
            Quadratic()(model(x), y).backward()
            optimizer.step()
        optimizer.refresh(lambda: Quadratic()(model(x), y))
    for i, o in pairwise(widths):
        assert not shapes.seen & {(i, i), (i + 1, i + 1), (o, o), (o, i), (i, o), (o, i + 1)}


def peak_megabytes(make, refreshes):
    """The most that the CPU allocator holds in three updates, beside the model and the minibatch."""
    plan = BENCHMARKS["mnist_autoencoder"]
    model, x = plan.network(generator=torch.Generator().manual_seed(0)), torch.rand(200, 784)
    optimizer = make(model)
    with profile(profile_memory=True) as profiled:
        for _ in range(3):
            if refreshes:
                optimizer.refresh(lambda: plan.loss(model(x), x))
            optimizer.zero_grad()
            plan.loss(model(x), x).backward()
            optimizer.step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 1e6


def test_acp_needs_less_than_ten_megabytes_beyond_sgd():
    """On the thesis's autoencoder, with old and new statistics at once while they are refreshed."""
    sgd = peak_megabytes(lambda model: torch.optim.SGD(model.parameters(), 1e-3), False)
    acp = peak_megabytes(lambda model: ACP(model, 1e-3, gradients="factored"), True)
    assert sgd > 11  # its gradients alone
    assert acp < sgd + 10
