"""What the hooks see, what they must not see, and that they leave nothing behind."""

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as torch_hooks
from torch.utils.checkpoint import checkpoint

from sogrid.capture import LOOKS, Capture, CaptureError, Wanted
from sogrid.hooks import watched

RTOL = 1e-12  # float64 rounding


def close(a, b):
    torch.testing.assert_close(a, b, rtol=RTOL, atol=RTOL)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    if watched():
        gc.collect()  # tracebacks
    assert not watched()
    assert not torch_hooks._global_forward_hooks
    assert not torch_hooks._global_forward_pre_hooks


class Net(nn.Module):
    """Three layers a, b, c, with everything a test may want to do to them."""

    def __init__(self, activation=torch.tanh, checkpointed="", reentrant=False, norm=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(2) if norm else nn.Identity()
        self.activation, self.checkpointed, self.reentrant = activation, checkpointed, reentrant
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        for name in "abc":

            def part(h, name=name):
                return self.activation(getattr(self, name)(h))

            inside = name in self.checkpointed
            x = checkpoint(part, x, use_reentrant=self.reentrant) if inside else part(x)
        return self.norm(x)


@pytest.fixture
def x(draw):
    return draw(6, 3)


def probed(capture, probe):
    """Have the capture pull back other vectors."""
    capture.wanted = replace(capture.wanted, probe=probe and (lambda f, _: probe(f)))


def by_hand(model, x, loss):
    """{name: (h, g)} by autograd alone, for the tanh or ReLU network."""
    h, found = x, {}
    for name in "abc":
        a = getattr(model, name)(h)
        found[name] = (h.detach(), a)
        h = model.activation(a)
    grads = torch.autograd.grad(loss(h), [a for _, a in found.values()])
    return {name: (h, g) for (name, (h, _)), g in zip(found.items(), grads, strict=True)}


def mean_square(f):
    return f.square().mean()


def assert_records(capture, expected):
    assert capture.records.keys() == expected.keys()
    for name, (h, g) in expected.items():
        record = capture.records[name]
        assert record.count == len(h)
        close(record.mean, h.mean(0))
        close(torch.cat(record.inputs), h)
        close(torch.cat(record.grads), g)


# --- what is seen ----------------------------------------------------------------------------------


def test_inputs_and_gradients_are_those_of_autograd(x):
    model = Net()
    expected = by_hand(model, x, mean_square)
    with Capture(model) as capture:
        mean_square(model(x)).backward()
    assert_records(capture, expected)
    (root,) = capture.roots
    close(root.input, x)
    close(root.output, model(x).detach())
    close(root.grad, 2 * root.output / root.output.numel())


def test_unless_rows_are_wanted_only_counts_and_means_remain(x):
    model = Net()
    expected = by_hand(model, x, mean_square)
    with Capture(model, wanted=Wanted()) as capture:
        mean_square(model(x)).backward()
    for name, record in capture.records.items():
        assert (record.count, record.inputs, record.grads, record.probes) == (len(x), [], [], [])
        close(record.mean, expected[name][0].mean(0))
    assert capture.roots == []


def test_layers_can_be_chosen(x):
    model = Net()
    with Capture(model, {"middle": model.b}) as capture:
        model(x).sum().backward()
    assert list(capture.records) == ["middle"]
    assert capture.records["middle"].count == len(x)


def test_gradients_accumulate_over_backward_passes(x):
    model = Net()
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as capture:
        for part in x.split(2):
            model(part).square().sum().backward()
    assert_records(capture, expected)
    assert len(capture.roots) == 3


def test_model_called_twice_and_one_backward_is_the_concatenated_batch(x):
    model = Net()
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as capture:
        first, second = model(x[:2]), model(x[2:])
        (first.square().sum() + second.square().sum()).backward()
    for name, record in capture.records.items():
        assert record.count == len(x)
        order = [0, 1] if len(record.inputs[0]) == 2 else [1, 0]
        for found, kind in ((record.inputs, 0), (record.grads, 1)):
            close(torch.cat([found[i] for i in order]), expected[name][kind])


def test_one_forward_and_two_backwards_count_once_and_add(x):
    model = Net()
    expected = by_hand(model, x, lambda f: mean_square(f) + f.sum())
    with Capture(model) as capture:
        f = model(x)
        mean_square(f).backward(retain_graph=True)
        f.sum().backward()
    assert_records(capture, expected)
    (root,) = capture.roots
    close(root.grad, 2 * root.output / root.output.numel() + 1)


def test_in_place_activations_change_nothing(x):
    expected = by_hand(Net(torch.relu), x, mean_square)
    model = Net(torch.relu_)
    with Capture(model) as capture:
        probed(capture, lambda f: [torch.ones_like(f)])
        mean_square(model(x)).backward()
    assert_records(capture, expected)
    ones = by_hand(Net(torch.relu), x, torch.sum)
    for name, record in capture.records.items():
        close(record.probes[0][0], ones[name][1])


def test_output_changed_in_place_by_the_user(x):
    model = Net(nn.functional.softplus)
    logits = model(x).detach()
    with Capture(model) as capture:
        model(x).sigmoid_().sum().backward()
    (root,) = capture.roots
    close(root.output, logits)
    close(root.grad, logits.sigmoid() * (-logits).sigmoid())


def test_input_buffer_may_be_filled_again_before_the_records_are_used(x):
    model, buffer = Net(), torch.empty_like(x[:3])
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as capture:
        for part in x.split(3):
            buffer.copy_(part)
            model(buffer).square().sum().backward()
        buffer.zero_()
    assert_records(capture, expected)
    close(torch.cat([root.input for root in capture.roots]), x)


def test_probes_are_pulled_back_for_the_layers_that_are_kept(x, draw):
    model, vectors = Net(), [draw(6, 2), draw(6, 2)]
    with Capture(model) as capture:
        capture.wanted = Wanted(rows={"a", "c"}, probe=lambda f, _: vectors)
        model(x).sum().backward()
    for i, vector in enumerate(vectors):
        expected = by_hand(model, x, lambda f, v=vector: (f * v).sum())
        for name in "ac":
            close(capture.records[name].probes[0][i], expected[name][1])
    assert capture.records["b"].count == 6
    assert capture.records["b"].probes == []


def test_probes_are_not_asked_for_when_nothing_is_kept(x):
    model = Net()
    with Capture(model, wanted=Wanted(probe=lambda f, _: pytest.fail("asked"))):
        model(x).sum().backward()


def test_pull_is_the_transposed_jacobian_and_leaves_everything_alone(x, draw):
    model, vector = Net(), draw(6, 2)
    with Capture(model) as capture:
        f = model(x)
        pulled = capture.pull(f, vector)
        assert all(p.grad is None for p in model.parameters())
        assert all(record.count == 0 for record in capture.records.values())
        mean_square(f).backward()  # the graph is still there
    expected = by_hand(model, x, lambda f: (f * vector).sum())
    for name, (_, g) in expected.items():
        close(pulled[name], g)
    assert_records(capture, by_hand(model, x, mean_square))


def test_layers_that_the_output_does_not_depend_on_are_absent(x):
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "other": nn.Linear(3, 2)}).double()
    model.forward = lambda x: (model["other"](x), model["used"](x))[1]
    with Capture(model) as capture:
        f = model(x)
        assert list(capture.pull(f, torch.ones_like(f))) == ["used"]
        f.sum().backward()
    assert capture.records["other"].count == 0


@pytest.mark.parametrize("checkpointed", ["a", "b", "c", "abc"])
def test_checkpointed_layers_are_seen_once(x, checkpointed):
    model = Net(checkpointed=checkpointed)
    with Capture(model) as capture:
        probed(capture, lambda f: [torch.ones_like(f)])
        mean_square(model(x)).backward()
    assert_records(capture, by_hand(model, x, mean_square))
    ones = by_hand(model, x, torch.sum)
    for name, record in capture.records.items():
        close(record.probes[0][0], ones[name][1])


def test_a_checkpoint_around_the_whole_model(x):
    model = Net()
    with Capture(model) as capture:
        mean_square(checkpoint(model, x, use_reentrant=False)).backward()
    assert_records(capture, by_hand(model, x, mean_square))
    assert len(capture.roots) == 1


@pytest.mark.parametrize("checkpointed", ["a", "b", "abc"])
def test_reentrant_checkpoint_is_refused_by_name(x, checkpointed):
    model = Net(checkpointed=checkpointed, reentrant=True)
    with Capture(model), pytest.raises(CaptureError, match=f"'{checkpointed[-1]}'.*use_reentrant=False"):
        mean_square(model(x.requires_grad_())).backward()


def test_parts_of_the_model_may_be_called_on_their_own(x):
    model = Net()
    with Capture(model) as capture:
        for _ in range(2):
            model.a(x).sum().backward()
        model(x).sum().backward()
    assert [capture.records[name].count for name in "abc"] == [18, 6, 6]


def test_a_model_in_eval_mode_with_one_layer_in_training_mode(x):
    """Fine-tuning: frozen, deterministic body, trained head."""
    model = Net().eval()
    model.c.train()
    with Capture(model) as capture:
        probed(capture, lambda f: [torch.ones_like(f)])
        for _ in range(2):
            model(x)  # thrown away
            mean_square(model(x)).backward()
    assert [capture.records[name].count for name in "abc"] == [0, 0, 12]
    close(capture.records["c"].probes[0][0], by_hand(model, x, torch.sum)["c"][1])


def test_a_model_that_is_one_layer(x):
    model = nn.Linear(3, 2).double()
    with Capture(model) as capture:
        model(x).sum().backward()
    close(capture.records[""].inputs[0], x)
    close(capture.roots[0].grad, torch.ones(6, 2).double())


def test_keyword_arguments_no_arguments_and_outputs_that_are_not_tensors(x):
    layer = nn.Linear(3, 2).double()
    with Capture(layer) as capture:
        layer(input=x).sum().backward()
        close(capture.records[""].inputs[0], x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.layer = nn.Parameter(x.clone()), layer

        def forward(self, twice=False):
            f = self.layer(self.start)
            return {"out": f} if twice else f

    model = Odd()
    with Capture(model) as capture:
        model().sum().backward()
        model(twice=True)["out"].sum().backward()
    assert capture.records["layer"].count == 12
    assert len(capture.roots) == 1


def test_a_compiled_model_is_watched_like_any_other(x):
    model = Net()
    with Capture(model) as capture, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mean_square(torch.compile(model, backend="aot_eager")(x)).backward()
    assert not caught
    assert_records(capture, by_hand(model, x, mean_square))
    torch._dynamo.reset()


# --- what is not seen ------------------------------------------------------------------------------


def eval_mode(model, x):
    model.eval()
    model(x).sum().backward()
    model.train()


def without_gradients(model, x):
    with torch.no_grad():
        model(x)


def inference(model, x):
    with torch.inference_mode():
        model(x)


def per_example_gradients(model, x):
    named = dict(model.named_parameters())
    vmap(grad(lambda p, one: functional_call(model, p, (one,)).sum()), (None, 0))(named, x)


def jacobian(model, x):
    torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(dict(model.named_parameters()))


def gradient_of_the_input(model, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x, create_graph=True)


def gradient_returned(model, x):
    torch.autograd.grad(model(x).sum(), list(model.parameters()))


def gradient_for_the_input_only(model, x):
    x = x.clone().requires_grad_()
    model(x).sum().backward(inputs=[x])


def a_copy_of_the_model(model, x):
    copy.deepcopy(model)(x).sum().backward()


def a_forward_pass_alone(model, x):
    model(x)


UNSEEN = [
    eval_mode,
    without_gradients,
    inference,
    per_example_gradients,
    jacobian,
    gradient_of_the_input,
    gradient_returned,
    gradient_for_the_input_only,
    a_copy_of_the_model,
    a_forward_pass_alone,
]


@pytest.mark.parametrize("between", UNSEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before", "between forward and backward", "after"])
def test_not_seen(x, draw, between, when):
    """At each moment of a training pass, on top of gradients that are already there."""
    model, other = Net(), draw(5, 3)
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as capture:
        model(x[:2]).square().sum().backward()
        if when == "before":
            between(model, other)
        loss = model(x[2:]).square().sum()
        if when == "between forward and backward":
            between(model, other)
        loss.backward()
        if when == "after":
            between(model, other)
    assert_records(capture, expected)


def test_a_gradient_penalty_does_not_count_examples_twice(x):
    model = Net()
    with Capture(model) as capture:
        x = x.requires_grad_()
        f = model(x)
        (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        (mean_square(f) + slope.square().sum()).backward()
    for record in capture.records.values():
        assert record.count == len(x)
        close(record.mean, record.inputs[0].mean(0))


def test_frozen_layers_are_not_watched(x):
    model = Net()
    model.b.requires_grad_(False)
    with Capture(model) as capture:
        model(x).sum().backward()
        model.b(x.new_ones(2, 3, 4).requires_grad_())  # nor checked
    assert [capture.records[name].count for name in "abc"] == [6, 0, 6]


def clear_nothing(model, capture):
    model.zero_grad()


def clear_by_hand(model, capture):
    for parameter in model.parameters():
        parameter.grad = None


def clear_records(model, capture):
    model.zero_grad(set_to_none=False)
    capture.clear()


@pytest.mark.parametrize("clear", [clear_nothing, clear_by_hand, clear_records], ids=lambda f: f.__name__)
@pytest.mark.parametrize("norm", [False, True])
def test_records_are_forgotten_with_the_gradients_they_were_for(x, draw, clear, norm):
    """Also when a parameter above the watched layers gets its new gradient first."""
    model = Net(norm=norm)
    with Capture(model) as capture:
        mean_square(model(draw(5, 3))).backward()
        clear(model, capture)
        mean_square(model(x)).backward()
    assert [record.count for record in capture.records.values()] == [6, 6, 6]
    assert [len(root.output) for root in capture.roots] == [6]


def test_gradients_cleared_between_forward_and_backward(x):
    model = Net()
    with Capture(model) as capture:
        loss = mean_square(model(x))
        model.zero_grad()
        capture.clear()
        loss.backward()
    assert_records(capture, by_hand(model, x, mean_square))


# --- collect ---------------------------------------------------------------------------------------


def test_collect_is_separate_from_the_training_pass(x, draw):
    model, other = Net(), draw(5, 3)
    with Capture(model, wanted=(wanted := Wanted())) as capture:
        training = model(x)
        collected = capture.collect(lambda: mean_square(model(other)), lambda f, _: [torch.ones_like(f)])
        assert all(p.grad is None for p in model.parameters())
        assert all(record.count == 0 for record in capture.records.values())
        mean_square(training).backward()
    expected, ones = (by_hand(model, other, loss) for loss in (mean_square, torch.sum))
    for name, (h, g) in expected.items():
        close(collected[name].inputs[0], h)
        close(collected[name].grads[0], g)
        close(collected[name].probes[0][0], ones[name][1])
        assert capture.records[name].count == len(x)
        assert capture.records[name].inputs == []
    assert capture.wanted is wanted


def test_collect_takes_every_pass_of_its_closure(x):
    model = Net()
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as capture:
        records = capture.collect(lambda: sum(model(part).square().sum() for part in x.split(2)))
    for name, (h, g) in expected.items():
        assert records[name].count == len(x)
        close(torch.cat(records[name].inputs), h)
        close(torch.cat(records[name].grads), g)


def test_collect_that_fails_leaves_the_capture_as_it_was(x):
    model = Net()
    with Capture(model, wanted=(wanted := Wanted())) as capture:
        with pytest.raises(ZeroDivisionError):
            capture.collect(lambda: model(x).sum() / (1 // 0), lambda f, _: [f])
        with pytest.raises(TypeError, match="scalar loss"):
            capture.collect(lambda: model(x))
        assert capture.wanted is wanted
        mean_square(model(x)).backward()
        assert [record.count for record in capture.records.values()] == [6, 6, 6]


def test_collect_of_nothing_is_empty(x):
    model = Net()
    with Capture(model) as capture:
        assert capture.collect(lambda: model.eval()(x).sum()) == {}
        with torch.no_grad():
            assert capture.collect(lambda: model.train()(x).sum()) == {}


# --- factored gradients ------------------------------------------------------------------------------


def factors_only(model):
    """A capture of the whole model that leaves no ``.grad``."""
    return Capture(model, wanted=Wanted(factored=set(model.parameters())))


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, torch.relu_])
def test_factors_without_a_gradient(x, activation):
    model = Net(activation)
    expected = by_hand(Net(torch.relu if activation is torch.relu_ else activation), x, mean_square)
    with factors_only(model) as capture:
        f = model(x)
        torch.autograd.grad(f.sum(), f, retain_graph=True)
        capture.pull(f, torch.ones_like(f))
        mean_square(f).backward()
    assert all(model.get_submodule(name).weight.grad is None for name in capture.records)
    for name, (h, g) in expected.items():
        record = capture.records[name]
        assert record.count == 6
        close(getattr(model, name).bias.grad, g.sum(0))
        close(record.rows().inputs, h)
        close(record.rows().outputs, g)


def test_factors_are_not_copies(x):
    model = Net()
    with factors_only(model) as capture:
        mean_square(model(x)).backward()
    assert capture.records["a"].inputs[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("checkpointed", ["a", "b", "c", "abc"])
def test_factors_of_checkpointed_layers(x, checkpointed):
    model = Net(checkpointed=checkpointed)
    with factors_only(model) as capture:
        mean_square(model(x)).backward()
    assert all(model.get_submodule(name).weight.grad is None for name in capture.records)
    for name, (h, g) in by_hand(model, x, mean_square).items():
        close(capture.records[name].rows().inputs, h)
        close(capture.records[name].rows().outputs, g)


@pytest.mark.parametrize(
    "between", [f for f in UNSEEN if f is not gradient_of_the_input], ids=lambda f: f.__name__
)
def test_factors_of_what_is_not_seen(x, draw, between):
    """As with matrices; asking for a weight's gradient finds none."""
    model, other = Net(), draw(5, 3)
    expected = by_hand(model, x, lambda f: f.square().sum())
    with factors_only(model) as capture:
        loss = model(x).square().sum()
        if between is gradient_returned:
            with pytest.raises(RuntimeError, match="not have been used"):
                between(model, other)
        else:
            between(model, other)
        loss.backward()
    for name, (h, g) in expected.items():
        close(capture.records[name].rows().inputs, h)
        close(capture.records[name].rows().outputs, g)


def test_factors_of_some_layers(x):
    """Any other layer, and a bias, gets its gradient as ever."""
    model, twin = Net(), Net()
    mean_square(twin(x)).backward()
    with Capture(model, wanted=Wanted(factored={model.b.weight, model.c.weight})):
        mean_square(model(x)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["b.weight", "c.weight"]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            close(p.grad, q.grad)


def test_a_capture_of_matrices_beside_one_of_factors(x):
    """Whichever of the two is first."""
    expected = by_hand(Net(), x, mean_square)
    for order in (Capture, factors_only), (factors_only, Capture):
        model = Net()
        with order[0](model) as one, order[1](model) as other:
            mean_square(model(x)).backward()
        for capture in (one, other):
            for name, (h, g) in expected.items():
                close(capture.records[name].rows().inputs, h)
                close(capture.records[name].rows().outputs, g)


def test_a_graph_that_is_cut_at_the_output(x, draw):
    model, alone = Net(), by_hand(Net(), x, mean_square)
    with Capture(model, wanted=Wanted(rows=set("abc"), cut=True, roots=True)) as capture:
        f = model(x)
        assert capture.pull(f, torch.ones_like(f)) == {}
        torch.autograd.grad(mean_square(f), f)
        mean_square(f).backward()
    *others, last = model.parameters()
    assert all(p.grad is None for p in others)
    assert not last.grad.any()
    (root,) = capture.roots
    close(root.grad, 2 * root.output / root.output.numel())
    for name, (h, _) in alone.items():
        record, layer = capture.records[name], getattr(model, name)
        close(record.rows().inputs, h)
        assert (record.count, record.grads, record.rows().g) == (6, [], None)
        close(record.preactivations(), layer(h))


# --- captures and each other -----------------------------------------------------------------------


def test_two_captures_do_not_see_each_other_pull(x):
    """Also not on top of gradients that are already there."""
    model = Net()
    expected = by_hand(model, x, lambda f: f.square().sum())
    with Capture(model) as one, Capture(model, {"a": model.a}) as two:
        probed(two, lambda f: [torch.ones_like(f), f])
        for part in x.split(3):
            loss = model(part).square().sum()
            two.collect(lambda: model(x).sum())
            loss.backward()
            one.collect(lambda: model(x).sum(), lambda f, _: [f])
    assert_records(one, expected)
    assert_records(two, {"a": expected["a"]})


def test_closing_one_capture_keeps_the_other(x):
    model = Net()
    with Capture(model) as kept:
        gone = Capture(model)
        loss = model(x).sum()
        gone.close()
        loss.backward()
        model(x).sum().backward()
    assert kept.records["a"].count == 12
    assert gone.records["a"].count == 6  # the pass it was open for


def test_closing_twice_is_closing_once():
    capture = Capture(Net())
    capture.close()
    capture.close()
    assert not watched()


def test_collected_captures_take_their_hooks_along(x):
    model = Net()
    capture = Capture(model)
    loss = model(x).sum()
    assert len(watched()) == 4
    del capture
    assert not watched()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("__getstate__" in vars(module) for module in model.modules())
    loss.backward()
    assert model.a.weight.grad is not None


# --- the models of others, and copies ----------------------------------------------------------------


def test_other_models_have_no_hook_and_compile_whole(x):
    other = Net()
    with Capture(Net()):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        close(compiled(x), other(x))
    torch._dynamo.reset()


def test_copies_and_pickles_have_the_hooks_of_the_user_alone(x):
    model, kept = Net(), []
    handle = model.a.register_forward_hook(print)
    with Capture(model):
        model.b.register_forward_pre_hook(print, with_kwargs=True)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model.a)):
            for name, module in copied.named_modules():
                assert "__getstate__" not in vars(module)
                kept.append((name, len(module._forward_hooks), len(module._forward_pre_hooks)))
        assert b"sogrid" not in pickle.dumps(model)
        handle.remove()
        assert len(model.a._forward_hooks) == 1
    assert not model.a._forward_hooks
    whole = [("", 0, 0), ("a", 1, 0), ("b", 0, 1), ("c", 0, 0), ("norm", 0, 0)]
    assert kept == [*whole, *whole, ("", 1, 0)]


def test_a_module_with_a_state_of_its_own_keeps_it(x):
    class Counted(nn.Linear):
        def __getstate__(self):
            return {**super().__getstate__(), "copies": vars(self).get("copies", 0) + 1}

    layer = Counted(3, 2)
    with Capture(layer):
        twin = copy.deepcopy(layer)
    assert twin.copies == 1
    assert not twin._forward_hooks


def test_hooks_come_before_those_of_the_user(x):
    """A hook that changes the output changes what comes after the layer, not the layer."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with Capture(model) as capture:
        model(x).sum().backward()
    close(capture.records["0"].grads[0], torch.full((6, 2), 2.0, dtype=torch.float64))


# --- errors ----------------------------------------------------------------------------------------


def test_several_uses_of_other_numbers_of_examples(x):
    """The examples are those of the model where it is called, and all of them where parts are."""
    layer = nn.Linear(3, 3).double()
    model = nn.ModuleList([layer])
    model.forward = lambda x: layer(x).sum() + layer(x[:2]).sum()
    for called, count in ((model, 6), (model.forward, 8)):
        with Capture(model) as capture:
            model.zero_grad()
            called(x).backward()
            record = capture.records["0"]
            assert record.count == count
            close(record.rows().inputs.sum(0), x.sum(0) + x[:2].sum(0))
            close(record.rows().product * count, layer.weight.grad)


def test_a_layer_that_sees_no_example_of_a_minibatch_is_not_used(x):
    """An expert that is not asked."""
    layer, expert = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    model = nn.ModuleList([layer, expert])
    model.forward = lambda x: layer(x).sum() + expert(layer(x)[:0]).sum()
    with Capture(model) as capture:
        model(x).backward()
    assert [bool(record) for record in capture.records.values()] == [True, False]
    assert not expert.weight.grad.any()


@pytest.mark.parametrize("shape", [(3,), (0, 3), (0, 5, 3), (2, 0, 3)])
def test_inputs_that_are_not_examples_by_features_are_refused_by_name(shape):
    model = Net()
    with Capture(model), pytest.raises(CaptureError, match=r"layer 'a' got an input of shape \(.*needs \[ex"):
        model(torch.ones(shape).double())


@pytest.mark.parametrize("before", ["nothing", "an evaluation", "one in each update"])
@pytest.mark.parametrize("joins", [0, 1])
def test_what_is_not_the_plain_map_is_told_at_its_first_use_in_training(before, joins):
    """Whatever passes of the model there were before."""

    class Scaled(nn.Linear):
        def forward(self, h):
            return nn.functional.linear(h, self.weight * 3, self.bias)

    class Switching(nn.Module):
        now = 0

        def __init__(self):
            super().__init__()
            self.fine, self.other = nn.Linear(3, 2), Scaled(3, 2)

        def forward(self, h):
            return self.fine(h) if self.now < joins else self.other(h)

    model = Switching()
    with Capture(model, wanted=Wanted()) as capture:
        for model.now in range(joins + 1):
            if before == "one in each update" or (before == "an evaluation" and not model.now):
                model.eval()
                model(torch.ones(4, 3))
                model.train()
            refused = pytest.raises(CaptureError, match=r"'other' \(Scaled\) computes something else")
            with refused if model.now == joins else nullcontext():
                model(torch.ones(4, 3)).sum().backward()
        assert not capture.records["other"]


def test_a_weight_used_elsewhere_is_told_in_the_first_pass_that_its_layer_has_a_part_in():
    class Tied(nn.Module):
        now = 0

        def __init__(self):
            super().__init__()
            self.fine, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, h):
            h = self.fine(h)
            return nn.functional.linear(self.tied(h), self.tied.weight) if self.now else h

    model = Tied()
    with Capture(model, wanted=Wanted()):
        model(torch.ones(4, 3)).sum().backward()
        model.now = 1
        with pytest.raises(CaptureError, match="the weight of layer 'tied' is used outside"):
            model(torch.ones(4, 3))


def test_a_weight_used_elsewhere_in_a_model_that_is_one_layer_is_looked_for_again():
    class Late(nn.Linear):
        penalised = False

        def forward(self, h):
            out = super().forward(h)
            return out + 0 * nn.functional.linear(h, self.weight) if self.penalised else out

    def train(passes):
        for _ in range(passes):
            model(torch.ones(4, 3)).sum().backward()

    model = Late(3, 2)
    with Capture(model, wanted=Wanted()):
        train(1)
        model.penalised = True
        with pytest.raises(CaptureError, match="is used outside"):
            train(LOOKS)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(rows={"a", "b"})], ids=["means", "rows"])
def test_parts_that_never_get_a_gradient_keep_no_graph(x, wanted):
    model = Net()
    with Capture(model, wanted=wanted) as capture:
        for _ in range(9):
            model.b(torch.tanh(model.a(x)))
        assert len(capture._uses) == 2
        model.a(x).sum().backward()
        assert capture.records["a"].count == len(x)


def test_an_exception_in_forward_leaves_everything_usable(x):
    model = Net()
    with Capture(model) as capture:
        for break_at in "abc":
            getattr(model, break_at).in_features = "broken"
            with pytest.raises(RuntimeError):
                model(x[:, :2])
            with pytest.raises(ZeroDivisionError):
                Net.forward(model, 1 // 0)
        mean_square(model(x)).backward()
    assert_records(capture, by_hand(model, x, mean_square))


def test_an_exception_in_the_block_closes_the_capture(x):
    with pytest.raises(ZeroDivisionError), Capture(Net()):
        raise ZeroDivisionError


def test_an_exception_in_the_probe_reaches_the_user_and_nothing_else(x):
    model = Net()

    def broken(f):
        raise ZeroDivisionError

    with Capture(model) as capture:
        probed(capture, broken)
        with pytest.raises(ZeroDivisionError):
            model(x)
        probed(capture, None)
        mean_square(model(x)).backward()
    assert_records(capture, by_hand(model, x, mean_square))


# --- memory ----------------------------------------------------------------------------------------


def backward(f):
    f.sum().backward()


def twice(f):
    f.sum().backward(retain_graph=True)
    f.sum().backward()


def abandon(f):
    pass


@pytest.mark.parametrize("finish", [backward, twice, abandon], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", ["abc", ""])
def test_the_graph_is_freed_without_the_garbage_collector(x, finish, rows):
    """A hook that held the graph that holds the hook would leak every activation, for good."""
    alive = []

    class Remembered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.token = set()
            alive.append(weakref.ref(ctx.token))
            return h.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    model = Net(lambda h: Remembered.apply(h).tanh())
    gc.collect()
    gc.disable()
    try:
        ones = Wanted(rows=set(rows), probe=lambda f, _: [torch.ones_like(f)])
        with Capture(model, wanted=ones) as capture:
            for _ in range(3):
                finish(model(x))
                model.zero_grad()
                capture.clear()
            assert [token() for token in alive[:6]] == [None] * 6  # the latest pass can be pulled back
    finally:
        gc.enable()


def test_models_are_freed_with_their_captures(x):
    model = Net()
    capture = Capture(model)
    model(x).sum().backward()
    reference = weakref.ref(model)
    del model, capture
    gc.collect()
    assert reference() is None
