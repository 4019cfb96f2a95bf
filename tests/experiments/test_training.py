"""The training loop: data order, evaluation points, statistics minibatches, divergence, clocks."""

import pytest
import torch
from torch import nn

from sogrid.experiments import training
from sogrid.experiments.benchmarks import METHODS, Task
from sogrid.experiments.training import Minibatches, evaluation_points, run, train, updates_to
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP
from sogrid.shell import LayerOptimizer


@pytest.fixture
def task():
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))
    build = lambda **options: MLP([6, 5, 6], "sigmoid", "sigmoid", **options)  # noqa: E731
    return Task("tiny", None, (x, x), (x[:10], x[:10]), build, Quadratic())


def test_evaluation_points_hold_both_ends_and_what_else_is_asked():
    points = evaluation_points(1000, per_decade=3, also=[600, 5000])
    assert points[0] == 0
    assert points[-1] == 1000
    assert 600 in points
    assert 5000 not in points
    assert points == sorted(set(points))
    assert evaluation_points(1) == [0, 1]


def test_the_first_crossing_counts_even_if_the_loss_rises_again():
    updates, losses = [0, 1, 10, 100], [9.0, 8.0, 1.0, 5.0]
    assert 1 < updates_to(updates, losses, 2.0) < 10
    assert updates_to(updates, losses, 0.5) is None
    assert updates_to(updates, losses, 9.0) == 0
    assert updates_to([0, 1, 10], [9.0, 1.0, 0.5], 2.0) == 1
    assert updates_to([0, 1, 10], [9.0, 3.0, 0.0], 2.0) == 10
    assert updates_to([0, 1, 10], [9.0, 3.0, 0.0], 0.0) == 10


def test_every_epoch_shows_each_example_once_in_a_new_order():
    batches = Minibatches(10, 3, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    with pytest.raises(ValueError, match="at least that many"):
        next(Minibatches(2, 3, torch.Generator()))


def test_a_run_is_plain_gradient_descent_on_its_data_order(task):
    """The loop against three lines of torch."""
    settings = {"lr": 0.1, "scale": 4.0}
    found = run(task, "standard_sgd", settings, seed=3, updates=7, points=[0, 7], batch=20)
    model = task.network(scale=4.0, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    order = Minibatches(60, 20, torch.Generator().manual_seed(3))
    for _ in range(7):
        x = task.train[0][next(order)]
        optimizer.zero_grad()
        (model(x) - x).square().sum(1).mean().backward()
        optimizer.step()
    x = task.train[0]
    assert found["train"][-1] == pytest.approx((model(x) - x).square().sum(1).mean().item(), rel=1e-6)
    assert found["update"] == [0, 7]
    assert found["status"] == "finished"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_itself(task, method):
    values = {"lr": 0.01, "damping": 0.5, "scale": 4.0}
    settings = {key: values[key] for key in (*METHODS[method].settings, "scale")}
    options = dict(seed=1, updates=6, points=[0, 3, 6], batch=20)
    one, two = (run(task, method, settings, **options) for _ in range(2))
    assert one["train"] == two["train"]
    assert one["train"] != run(task, method, settings, **{**options, "seed": 2})["train"]


@pytest.mark.parametrize("method", METHODS)
def test_the_thesis_s_methods_do_not_move_with_the_package_s_defaults(task, method):
    """No bound, Algorithms 3 and 4 as printed, the same √ε for both factors; but for our own variants."""
    values = {"lr": 0.01, "damping": 0.5, "scale": 4.0}
    settings = {key: values[key] for key in (*METHODS[method].settings, "scale")}
    _, optimizer = METHODS[method].build(task, settings, torch.Generator().manual_seed(0))
    group, bounded = optimizer.param_groups[0], "bounded" in method
    if isinstance(optimizer, LayerOptimizer):
        assert group["max_change"] == (0.1 if bounded else None)
        assert group["momentum"] == 0
        assert group.get("damping", 0.5) == 0.5
        assert group.get("bias_correction", False) == method.startswith(("nnn", "acp_bounded"))
        assert group.get("pi_correction", False) is False
        assert getattr(optimizer, "refresh_every", None) in (100, None)


def test_statistics_come_from_minibatches_of_their_own(task):
    """Refreshes at updates 0, 3, 6 see another order than the updates do."""
    model = task.network()
    optimizer = ACP(model, 0.01, 1.0, refresh_every=3)
    seen, refresh = [], optimizer.refresh

    def spy(closure):
        seen.append(optimizer.param_groups[0]["updates"])
        refresh(closure)

    optimizer.refresh = spy
    train(model, optimizer, task, updates=8, points=[8], seed=0, batch=20)
    assert seen == [0, 3, 6]


@pytest.mark.parametrize("lr", [1e30, float("inf")])
def test_divergence_ends_the_run_and_is_recorded(task, lr):
    model = MLP([6, 5, 6], "relu")
    optimizer = torch.optim.SGD(model.parameters(), lr)
    curve = train(model, optimizer, task, updates=50, points=range(51), seed=0, batch=20)
    assert curve.status == "diverged"
    assert curve.reason.startswith("update ")
    assert curve.update[-1] < 50
    assert len(curve.update) == len(curve.train) == len(curve.test) == len(curve.second)
    assert all(v == v and v != float("inf") for v in curve.train)


def test_evaluation_stops_the_clock(task, monkeypatch):
    """Ten seconds of evaluation by a fake clock leave no trace in the training seconds."""
    now = [0.0]
    monkeypatch.setattr(training, "perf_counter", lambda: now[0])
    original = training.evaluate

    def slow(*args, **options):
        now[0] += 10
        return original(*args, **options)

    monkeypatch.setattr(training, "evaluate", slow)
    model = task.network()

    class Second(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 1
            super().step(closure)

    points = [0, 1, 2, 5]
    curve = train(model, Second(model.parameters(), 0.1), task, updates=5, points=points, seed=0, batch=20)
    assert curve.second == [0, 1, 2, 5]
    assert now[0] == 5 + 2 * 10 * len(points), "training set and test set, at each point"


def test_the_curve_has_the_points_that_are_asked_for_and_no_other(task):
    """Nothing is evaluated at update 0 unless 0 is a point."""
    options = dict(updates=4, seed=0, batch=20)
    for points in ([4], [0, 4], [2, 3], []):
        model = task.network()
        curve = train(model, torch.optim.SGD(model.parameters(), 0.1), task, points=points, **options)
        assert curve.update == points
        assert len(curve.second) == len(curve.train) == len(curve.test) == len(points)


def test_a_run_goes_on_as_long_as_it_is_to(task):
    """It is asked at each point but for the start, with the loss there; at a no the curve ends."""
    asked, settings = [], {"lr": 0.1, "scale": 4.0}

    def go_on(update, loss):
        asked.append((update, loss))
        return update < 4

    options = dict(seed=3, updates=8, points=[0, 2, 4, 8], batch=20)
    whole = run(task, "standard_sgd", settings, **options)
    found = run(task, "standard_sgd", settings, go_on=go_on, **options)
    assert (found["status"], found["reason"]) == ("stopped", "update 4: told to")
    assert found["update"] == [0, 2, 4]
    assert found["train"] == whole["train"][:3]
    assert asked == list(zip([2, 4], whole["train"][1:3], strict=True))
    assert run(task, "standard_sgd", settings, go_on=lambda *_: True, **options)["train"] == whole["train"]


def test_a_classifier_has_error_rates_and_an_autoencoder_has_none(task):
    """Against a loop over the examples, by hand."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2))
    build = lambda **options: MLP([4, 5, 3], **options)  # noqa: E731
    classify = Task("tiny", None, (x, y), (x[:7], y[:7]), build, CrossEntropyAtLogits())
    model = build(generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    curve = train(model, optimizer, classify, updates=6, points=[0, 6], seed=0, batch=20, evaluate_on=30)
    wrong = [
        int(max(range(3), key=model(a).tolist().__getitem__)) != int(b) for a, b in zip(x, y, strict=True)
    ]
    assert curve.train_error[-1] == pytest.approx(sum(wrong[:30]) / 30)
    assert curve.test_error[-1] == pytest.approx(sum(wrong[:7]) / 7)
    assert len(curve.train_error) == len(curve.test_error) == 2
    found = run(task, "standard_sgd", {"lr": 0.1, "scale": 4.0}, seed=0, updates=2, points=[2], batch=20)
    assert found["train_error"] == found["test_error"] == []


def test_evaluation_leaves_mode_and_statistics_alone(task):
    model = task.network(normalization="batch")
    before = model.norm1.running_mean.clone()
    training.evaluate(model, task.loss, *task.test)
    assert model.training
    assert torch.equal(model.norm1.running_mean, before)


def test_wrong_methods_and_settings_are_named(task):
    options = dict(seed=0, updates=1, points=[1], batch=20)
    with pytest.raises(ValueError, match="standard_sgd"):
        run(task, "sgd", {}, **options)
    with pytest.raises(ValueError, match="damping"):
        run(task, "acp", {"lr": 0.1, "scale": 1.0}, **options)


def test_progress_bars_are_silent_unless_asked(task, capsys):
    model = nn.Sequential(nn.Linear(6, 6))
    train(model, torch.optim.SGD(model.parameters(), 0.01), task, updates=2, points=[2], seed=0, batch=20)
    assert capsys.readouterr().err == ""
