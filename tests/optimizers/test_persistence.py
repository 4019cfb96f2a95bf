"""Checkpoints, copies, pickles, and what is left when an optimizer is gone."""

import copy
import gc
import io
import pickle
import tracemalloc
import weakref
from itertools import pairwise

import pytest
import torch
import torch._dynamo  # as the first optimizer does, frames of whose construction then stay
from children import Child
from optimizer_list import (
    LAYERWISE,
    OPTIMIZERS,
    REFRESHING,
    assert_same,
    batch,
    each,
    named,
    network,
    parameters,
    train,
)
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.optim.lr_scheduler import StepLR

from sogrid.hooks import watched
from sogrid.losses import CrossEntropyAtLogits
from sogrid.optimizers import ACP, EKFAC, KFAC, NaturalNN, UpdatedBackprop

LOSS = CrossEntropyAtLogits()
BEFORE, AFTER = 3, 5  # updates; a refresh of those that refresh every second lies on both sides


def hooks(model) -> int:
    """What of ours is on a model; nothing ever is on others."""
    assert not torch_hooks._global_forward_hooks
    assert not torch_hooks._global_forward_pre_hooks
    modules = list(model.modules())
    found = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    assert bool(found) == any("__getstate__" in vars(m) for m in modules) == bool(watched())
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    if watched():
        gc.collect()  # tracebacks, patched steps
    assert not watched()


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- checkpoints -----------------------------------------------------------------------------------

RESUME = """
import sys, torch
from optimizer_list import OPTIMIZERS, network, train
torch.set_num_threads(1)
checkpoints = torch.load(sys.argv[1], weights_only=True)
torch.manual_seed(987)
torch.rand(7)
results = {}
for method in OPTIMIZERS:
    saved, model = checkpoints[method.name], network(seed=77)
    optimizer = method(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, int(sys.argv[3]), first=int(sys.argv[2]) + 1)
    results[method.name] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every optimizer, continued from its checkpoint in another process."""
    path = tmp_path_factory.mktemp("resume") / "checkpoints.pt"
    checkpoints = {}
    for method in OPTIMIZERS:
        model = network()
        optimizer = method(model)
        train(model, optimizer, BEFORE)
        checkpoints[method.name] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoints, path)
    with Child(RESUME, path, BEFORE, AFTER) as child:
        _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return torch.load(path, weights_only=True)


@each(OPTIMIZERS)
def test_a_new_process_continues_bit_for_bit(method, resumed):
    """Across a refresh, with averaging, and with targets drawn from the model."""
    model = network()
    optimizer = method(model)
    train(model, optimizer, BEFORE + AFTER)
    found = resumed[method.name]
    assert_same(list(found["model"].values()), parameters(model))
    assert_same(found["optimizer"], optimizer.state_dict())


@each(OPTIMIZERS)
def test_a_checkpoint_resumes_whatever_the_global_stream_is(method):
    straight, model = network(), network()
    train(straight, method(straight), BEFORE + AFTER)
    optimizer = method(model)
    train(model, optimizer, BEFORE)
    other = network(seed=5)
    resumed = method(other)
    train(other, resumed, 2, first=50)  # a state of its own, to be replaced
    other.load_state_dict(through_a_file(model.state_dict()))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    torch.manual_seed(123)
    train(other, resumed, AFTER, first=BEFORE + 1)
    assert_same(parameters(other), parameters(straight))


@each(OPTIMIZERS)
def test_a_checkpoint_is_tensors_and_plain_values_only(method):
    model = network()
    optimizer = method(model)
    train(model, optimizer)
    state = optimizer.state_dict()
    loaded = through_a_file(state)
    assert_same(loaded, state)
    assert set(loaded) == {"state", "param_groups"}


@each(OPTIMIZERS)
def test_a_checkpoint_is_independent_of_later_training_once_saved(method):
    model = network()
    optimizer = method(model)
    train(model, optimizer)
    saved = through_a_file(optimizer.state_dict())
    train(model, optimizer, 3)
    model.load_state_dict(network().state_dict())
    optimizer.load_state_dict(saved)
    again = optimizer.state_dict()
    assert_same(again, saved)


@each(REFRESHING)
def test_a_checkpoint_keeps_the_schedule_of_refreshes(method):
    model = network()
    optimizer = method(model, refresh_every=4)
    train(model, optimizer, 3)
    other = network()
    resumed = method(other, refresh_every=4)
    assert resumed.refresh_due
    resumed.load_state_dict(optimizer.state_dict())
    due = []
    for _ in range(6):
        due.append(resumed.refresh_due)
        train(other, resumed)
    assert due == [False, True, False, False, False, True]


def test_a_checkpoint_of_tensor_rates_and_their_scheduler():
    def make():
        model = network()
        optimizer = ACP(model, torch.tensor(0.1, dtype=torch.float64))
        return model, optimizer, StepLR(optimizer, 2, gamma=0.5)

    def run(model, optimizer, scheduler, steps, first):
        for i in range(steps):
            train(model, optimizer, first=first + i)
            scheduler.step()

    straight = make()
    run(*straight, 7, 1)
    start, resumed = make(), make()
    run(*start, 3, 1)
    for old, new in zip(start, resumed, strict=True):
        new.load_state_dict(through_a_file(old.state_dict()))
    run(*resumed, 4, 4)
    assert_same(parameters(resumed[0]), parameters(straight[0]))


def test_a_checkpoint_without_averaging_may_be_continued_with_it():
    model = network()
    optimizer = ACP(model, 0.1, refresh_every=2)
    train(model, optimizer, 3)
    averaging = ACP(model, 0.1, refresh_every=2, averaging=0.5)
    averaging.load_state_dict(optimizer.state_dict())
    train(model, averaging, 4)
    assert "statistics_mean" in averaging.state[model[0].weight]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(EKFAC, KFAC), (KFAC, EKFAC), (ACP, NaturalNN), (ACP, KFAC)],
    ids=lambda k: k.__name__,
)
def test_a_checkpoint_of_another_optimizer_is_refused_and_changes_nothing(theirs, ours):
    """Also one whose groups have no key that is not known, as those of EKFAC for KFAC."""

    def make(kind):
        optimizer = kind(model, 0.1, **({"loss": LOSS} if issubclass(kind, KFAC | EKFAC) else {}))
        train(model, optimizer)
        return optimizer

    model = network()
    saved = make(theirs).state_dict()
    optimizer = make(ours)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="state of another optimizer"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)
    train(model, optimizer)


@each(OPTIMIZERS)
def test_a_key_of_the_users_own_is_kept(method):
    model = network()
    optimizer = method(model)
    optimizer.param_groups[0]["of_the_user"] = 2.0
    train(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["of_the_user"] == 2.0
    train(model, optimizer)


def test_a_checkpoint_of_another_model_is_refused():
    optimizer = ACP(network(), 0.1)
    other = ACP(nn.Linear(3, 2), 0.1)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


# --- copies ----------------------------------------------------------------------------------------


def by_deepcopy(pair):
    return copy.deepcopy(pair)


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@each([method for method in LAYERWISE if method.kind is not UpdatedBackprop])
def test_a_group_added_to_a_copy_has_no_other_keys(method):
    model = network()
    optimizer = copy.deepcopy(method(model, params=list(model[0].parameters())))
    optimizer.add_param_group({"params": list(optimizer.model[2].parameters())})
    groups = [{"params": list(model[k].parameters())} for k in (0, 2)]
    method(model, params=groups).load_state_dict(optimizer.state_dict())


@each(OPTIMIZERS)
@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle], ids=lambda f: f.__name__)
def test_a_copy_of_model_and_optimizer_continues_bit_for_bit_on_its_own(method, duplicate):
    model = network()
    optimizer = method(model)
    train(model, optimizer, BEFORE)
    before = parameters(model)
    model_copy, optimizer_copy = duplicate((model, optimizer))
    assert optimizer_copy.model is model_copy
    train(model_copy, optimizer_copy, AFTER, first=BEFORE + 1)
    assert_same(parameters(model), before)
    train(model, optimizer, AFTER, first=BEFORE + 1)
    assert_same(parameters(model_copy), parameters(model))
    assert_same(optimizer_copy.state_dict(), optimizer.state_dict())
    del model, optimizer
    train(model_copy, optimizer_copy)


@each(OPTIMIZERS)
def test_a_copy_of_the_optimizer_alone_brings_a_copy_of_the_model(method):
    model = network()
    optimizer = copy.deepcopy(method(model))
    train(optimizer.model, optimizer)
    assert_same(parameters(model), parameters(network()))
    assert (optimizer.model[0].weight != model[0].weight).any()


@each(OPTIMIZERS)
def test_a_copy_of_the_model_alone_is_a_plain_model(method):
    """It carries no hook, pickles without the package, and its use does not disturb the optimizer."""
    one, two = network(), network()
    train(one, method(one), 3)
    optimizer = method(two)
    for seed in (1, 2, 3):
        plain = copy.deepcopy(two)
        assert b"sogrid" not in pickle.dumps(two)
        for module in plain.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "__getstate__" not in vars(module)
        optimizer.zero_grad()
        x, y = batch(seed)
        value = LOSS(two(x), y)
        LOSS(plain(batch(60)[0]), batch(60)[1]).backward()
        torch.optim.SGD(plain.parameters(), 0.1).step()
        value.backward()
        optimizer.step()
    assert_same(parameters(two), parameters(one))


@each(OPTIMIZERS)
def test_a_copy_in_the_middle_of_a_pass_sees_no_half_of_it(method):
    model = network()
    optimizer = method(model)
    x, y = batch()
    value = LOSS(model(x), y)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    value.backward()
    optimizer.step()
    train(model_copy, optimizer_copy)
    assert_same(parameters(model_copy), parameters(model))


def test_an_average_of_the_model_may_be_kept():
    model = network()
    optimizer = ACP(model, 0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    for seed in (1, 2):
        train(model, optimizer, first=seed)
        average.update_parameters(model)
    reference = network()
    train(reference, ACP(reference, 0.1), 2)
    assert_same(parameters(model), parameters(reference))
    average(batch()[0]).sum().backward()


# --- the end of an optimizer -----------------------------------------------------------------------


@each(OPTIMIZERS)
def test_closing_removes_the_hooks(method):
    model = network()
    optimizer = method(model)
    assert hooks(model) == (4 if method.layerwise else 2)
    optimizer.close()
    assert hooks(model) == 0
    optimizer.close()


@each(OPTIMIZERS)
def test_deleting_removes_the_hooks_without_the_garbage_collector(method):
    gc.collect()
    gc.disable()
    try:
        model = network()
        optimizer = method(model)
        train(model, optimizer, 2)
        reference = weakref.ref(optimizer)
        del optimizer
        assert reference() is None
        assert hooks(model) == 0
    finally:
        gc.enable()


@each(OPTIMIZERS)
def test_deleting_an_optimizer_with_a_scheduler_removes_the_hooks(method):
    """Torch's scheduler makes a cycle of it, so here the collector is needed."""
    model = network()
    optimizer = method(model)
    scheduler = StepLR(optimizer, 1)
    train(model, optimizer)
    del optimizer, scheduler
    gc.collect()
    assert hooks(model) == 0


@each(OPTIMIZERS)
def test_a_construction_that_fails_leaves_no_hook(method):
    model = network()
    with pytest.raises(ValueError, match="lr"):
        method(model, lr=-1.0)
    assert hooks(model) == 0


@each(LAYERWISE)
def test_the_next_optimizer_takes_over(method):
    """As when a loop goes from one phase to the next, with or without closing the first."""
    model, reference = network(), network()
    first = ACP(model, 0.1)
    train(model, first, 2)
    reference.load_state_dict(model.state_dict())
    train(model, method(model), 2)
    first.close()
    train(reference, method(reference), 2)
    assert_same(parameters(model), parameters(reference))


@each(OPTIMIZERS)
def test_two_optimizers_of_two_models_at_once(method):
    """As in a GAN: passes interleave, and one model's output is the other's input."""
    one, two, alone = (
        network(),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        network(),
    )
    train(alone, method(alone), 3)
    first, second = method(one), method(two)
    for seed in (1, 2, 3):
        x, y = batch(seed)
        second.zero_grad()
        LOSS(two(one(x).detach()), y).backward()
        second.step()
        first.zero_grad()
        value = LOSS(one(x), y)
        LOSS(two(one(x).detach()), y).backward() if not method.layerwise else None
        value.backward()
        first.step()
    assert_same(parameters(one), parameters(alone))


# --- memory ----------------------------------------------------------------------------------------

STEPS = 300


@each([named("kfac, sampled fisher"), named("ubp")])
def test_hundreds_of_steps_leak_nothing(method):
    """Half of the steps' passes are thrown away; less than one object or 100 bytes per step remain."""
    model = network()
    optimizer = method(model)
    x, y = batch()

    def steps(count):
        for i in range(count):
            optimizer.zero_grad()
            value = LOSS(model(x), y)
            if i % 2:
                value.backward()
                optimizer.step()
            if method.refreshes and i % 50 == 0:
                optimizer.refresh(lambda: LOSS(model(x), y))

    def tensors():
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    steps(20)
    objects = tensors()
    tracemalloc.start()
    sizes = []
    for _ in range(4):  # of which torch's own pools, which fill up, make some grow
        steps(STEPS)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert tensors() - objects < 20
    assert min(after - before for before, after in pairwise(sizes)) < 100 * STEPS


def test_records_do_not_outlive_the_step():
    model = network()
    for optimizer in (
        ACP(model, 0.1),
        KFAC(model, 0.1, loss=LOSS, curvature="fisher_exact", refresh_every=1),
    ):
        train(model, optimizer)
        for record in optimizer._capture.records.values():
            assert (record.count, record.inputs, record.grads, record.probes) == (0, [], [], [])
        assert optimizer._capture.roots == []
