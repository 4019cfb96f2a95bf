"""Runs that survive: killed, stopped, damaged, foreign, full, read-only."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from children import Child
from searched import leave_searches
from torch import nn

from sogrid.experiments import checkpoints, training
from sogrid.experiments import reproduce as module
from sogrid.experiments.benchmarks import METHODS, Task
from sogrid.experiments.checkpoints import FOLDER, Checkpoint, CheckpointError, Interrupted, StopSignals
from sogrid.experiments.records import Record
from sogrid.experiments.reproduce import AE, EXPERIMENTS, Curves, Profile, reproduce
from sogrid.experiments.training import Minibatches, run, train
from sogrid.losses import CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP

FIG = "fig6_2_mnist_autoencoder"
VALUES = {"lr": 0.01, "damping": 0.5, "scale": 4.0}
OPTIONS = dict(seed=1, updates=23, points=range(0, 24, 2), batch=20)


@pytest.fixture
def task():
    x = torch.rand(70, 6, generator=torch.Generator().manual_seed(0))
    build = lambda **options: MLP([6, 5, 6], "sigmoid", "sigmoid", **options)  # noqa: E731
    return Task("tiny", None, (x, x), (x[:10], x[:10]), build, Quadratic())


@pytest.fixture
def often(monkeypatch):
    """Statistics are refreshed every third update."""
    monkeypatch.setattr("sogrid.experiments.benchmarks.REFRESH_EVERY", 3)


def settings(method):
    return {key: VALUES[key] for key in (*METHODS[method].settings, "scale")}


def losses(run):
    keys = ("update", "train", "test", "train_error", "test_error", "status", "reason")
    return {key: run[key] for key in keys}


class Stop(Exception):
    """Something that ends a run from outside."""


def stopped_at(monkeypatch, update, act):
    """Let ``act`` happen in the middle of an update."""
    original, count = torch.Tensor.backward, [0]

    def backward(self, *args, **options):
        count[0] += 1
        if count[0] == update:
            act()
        return original(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def interrupt(task, path, monkeypatch, method="standard_sgd", update=9, **changes):
    """A run that receives SIGINT in the course of an update, and leaves its checkpoint."""
    with monkeypatch.context() as patch:
        stopped_at(patch, update, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted) as stop, Checkpoint(path) as checkpoint:
            run(task, method, settings(method), checkpoint=checkpoint, **{**OPTIONS, **changes})
    return stop.value


def resume(task, path, method="standard_sgd", **changes):
    with Checkpoint(path) as checkpoint:
        return run(task, method, settings(method), checkpoint=checkpoint, **{**OPTIONS, **changes})


# Resuming


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [0, 1000])
def test_every_method_resumes_bit_for_bit(task, method, every, often, tmp_path, monkeypatch):
    """Stopped three times in the middle of an update, across epochs (of three) and refreshes."""
    straight = run(task, method, settings(method), **OPTIONS)
    monkeypatch.setattr(checkpoints, "EVERY", every)
    path = tmp_path / FOLDER / "run.pt"
    for passes in (2, 5, 9):  # backward passes, of which a refresh has its own
        torch.rand(3)  # another global stream
        interrupt(task, path, monkeypatch, method, passes)
    found = resume(task, path, method)
    assert losses(found) == losses(straight)
    assert len(found["resumed"]) == 3
    assert found["resumed"][0].keys() == {"update", "date", "commit", "processor"}
    assert "resumed" not in straight
    assert not path.parent.exists()


def test_a_model_that_draws_from_the_global_stream_resumes_too(task, tmp_path, monkeypatch):
    def build(**options):
        return nn.Sequential(MLP([6, 5, 6], "sigmoid", **options), nn.Dropout(0.5))

    task = Task("dropout", None, task.train, task.test, build, task.loss)
    torch.manual_seed(5)
    straight = run(task, "standard_sgd", settings("standard_sgd"), **OPTIONS)
    torch.manual_seed(5)
    interrupt(task, tmp_path / "run.pt", monkeypatch)
    torch.manual_seed(6)
    assert losses(resume(task, tmp_path / "run.pt")) == losses(straight)


def test_the_error_rates_of_a_classifier_go_on(task, tmp_path, monkeypatch):
    x, y = task.train[0], torch.arange(70) % 3
    build = lambda **options: MLP([6, 5, 3], **options)  # noqa: E731
    task = Task("labels", None, (x, y), (x[:10], y[:10]), build, CrossEntropyAtLogits())
    straight = run(task, "standard_sgd", settings("standard_sgd"), **OPTIONS)
    interrupt(task, tmp_path / "run.pt", monkeypatch)
    assert losses(resume(task, tmp_path / "run.pt")) == losses(straight)
    assert len(straight["test_error"]) == len(straight["update"])


def test_seconds_go_on(task, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "perf_counter", lambda: now[0])

    class Second(torch.optim.SGD):
        def step(self, closure=None):
            now[0] += 1
            super().step(closure)

    def part():
        model = task.network(generator=torch.Generator().manual_seed(0))
        with Checkpoint(tmp_path / "run.pt") as checkpoint:
            return train(model, Second(model.parameters(), 0.1), task, checkpoint=checkpoint, **OPTIONS)

    with monkeypatch.context() as patch:
        stopped_at(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match="SIGTERM after update 7 of 23"):
            part()
    now[0] = 1000.0
    assert part().second == list(range(0, 23, 2))


def test_minibatches_go_on_in_the_middle_of_an_epoch():
    one = Minibatches(10, 3, torch.Generator().manual_seed(0))
    for _ in range(5):
        next(one)
    state = one.state_dict()
    two = Minibatches(10, 3, torch.Generator().manual_seed(9))
    two.load_state_dict(state)
    for _ in range(7):
        assert next(one).tolist() == next(two).tolist()


def test_saving_costs_nothing_until_it_is_due(task, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: saves.append(state["update"]))
    resume(task, tmp_path / "run.pt")
    assert saves == []
    monkeypatch.setattr(checkpoints, "EVERY", 0)
    resume(task, tmp_path / "run.pt")
    assert saves == list(range(1, 24))


def test_an_error_keeps_the_state_and_the_end_deletes_it(task, tmp_path, monkeypatch):
    path = tmp_path / FOLDER / "run.pt"
    monkeypatch.setattr(checkpoints, "EVERY", 0)

    def fail():
        raise Stop

    with monkeypatch.context() as patch:
        stopped_at(patch, 4, fail)
        with pytest.raises(Stop):
            resume(task, path)
    assert path.exists()
    with pytest.raises(Stop), Checkpoint(path) as checkpoint:  # noqa: PT012
        run(task, "standard_sgd", settings("standard_sgd"), checkpoint=checkpoint, **OPTIONS)
        raise Stop  # before the result is safe
    assert path.exists()
    resume(task, path)
    assert not path.parent.exists()


# Signals


def test_the_first_signal_waits_and_the_second_acts(task, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stop = interrupt(task, tmp_path / "run.pt", monkeypatch)
    assert stop.number == signal.SIGINT
    assert "stopped by SIGINT after update 9 of 23" in str(stop)
    assert f"{tmp_path / 'run.pt'}" in str(stop)
    assert signal.getsignal(signal.SIGINT) is before

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stopped_at(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt) as second, Checkpoint(tmp_path / "other.pt") as checkpoint:
        run(task, "standard_sgd", settings("standard_sgd"), checkpoint=checkpoint, **OPTIONS)
    assert not isinstance(second.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_nobody_took_acts_at_the_end():
    reached = []
    with pytest.raises(KeyboardInterrupt), StopSignals():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGINT, before)


# Refusals


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated, altered"),
        (lambda raw: raw[:30], "truncated, altered"),
        (lambda raw: b"", "truncated, altered"),
        (lambda raw: raw[:-500] + bytes([raw[-500] ^ 1]) + raw[-499:], "truncated, altered"),
        (lambda raw: raw + b"\0", "truncated, altered"),
        (lambda raw: b"{}", "truncated, altered"),
        (lambda raw: checkpoints._header(b"zip?") + b"zip?", "no checkpoint that can be read"),
    ],
)
def test_damage_is_refused_and_left(task, tmp_path, monkeypatch, damage, finding):
    path = tmp_path / "run.pt"
    interrupt(task, path, monkeypatch)
    content = damage(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=finding) as error:
        resume(task, path)
    assert str(error.value).startswith(f"{path} is")
    assert "Delete it" in str(error.value)
    assert path.read_bytes() == content


def test_nothing_in_a_checkpoint_is_executed(task, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state": Evil()}, tmp_path / "payload")
    payload = (tmp_path / "payload").read_bytes()
    (tmp_path / "run.pt").write_bytes(checkpoints._header(payload) + payload)
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        resume(task, tmp_path / "run.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"seed": 2}, r"plan is \{'seed': 1\}, not \{'seed': 2\}"),
        ({"updates": 24}, r"plan is \{'updates': 23\}, not \{'updates': 24\}"),
        ({"batch": 10}, "plan is .*'batch': 20"),
        ({"points": [1]}, "plan is .*'points'"),
        ({"method": "bn"}, "method is standard_sgd, not bn"),
    ],
)
def test_another_run_is_refused(task, tmp_path, monkeypatch, changes, finding):
    path = tmp_path / "run.pt"
    interrupt(task, path, monkeypatch)
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=finding) as error:
        resume(task, path, **changes)
    assert "go back to what it was made with" in str(error.value)
    assert path.read_bytes() == content
    resume(task, path)


def test_other_settings_data_versions_code_and_threads_are_refused(task, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    interrupt(task, path, monkeypatch)

    def refused(match):
        with pytest.raises(CheckpointError, match=match):
            resume(task, path)

    with monkeypatch.context() as patch:
        patch.setitem(VALUES, "lr", 0.02)
        refused("settings is .*0.01.*, not .*0.02|optimizer is .*lr")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        refused("versions is .*torch.*9.9")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        refused("threads is 1, not 64")
    with monkeypatch.context() as patch:
        patch.setattr(training, "source_digest", lambda: "0")
        refused("sources is")

    class Data:
        checksum = "abc"

    other = Task(task.name, Data(), task.train, task.test, task.network, task.loss)
    with pytest.raises(CheckpointError, match="data is None, not abc"):
        resume(other, path)


def test_another_optimizer_in_ones_own_loop_is_refused(task, tmp_path, monkeypatch):
    """A state_dict would bring its hyperparameters along unnoticed."""

    def part(lr):
        model = task.network(generator=torch.Generator().manual_seed(0))
        with Checkpoint(tmp_path / "run.pt") as checkpoint:
            return train(model, ACP(model, lr), task, checkpoint=checkpoint, **OPTIONS)

    with monkeypatch.context() as patch:
        stopped_at(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            part(0.1)
    with pytest.raises(CheckpointError, match=r"optimizer is \{'lr': '0.1'\}, not \{'lr': '0.2'\}"):
        part(0.2)
    assert part(0.1).update[-1] == 22


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Of the code that is in ``tmp_path`` now."""
    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path)

    def fresh():
        checkpoints.source_digest.cache_clear()
        return checkpoints.source_digest()

    yield fresh
    checkpoints.source_digest.cache_clear()


def test_comments_do_not_change_the_code_but_numbers_do(tmp_path, digest):
    def of(text):
        (tmp_path / "losses.py").write_text(text)
        return digest()

    plain = of("ONE = 1\n\ndef f(x):\n    return 2 * x\n")
    text = '"""Module."""\nONE = 1\n"""A number."""\ndef f(x):\n    """Twice."""\n    return 2 * x  # two\n'
    assert of(text) == plain
    assert of("ONE = 1\n\ndef f(x):\n    return 3 * x\n") != plain


def test_all_code_counts_that_numbers_come_from(tmp_path, digest):
    counts = ["networks.py", "layers/new.py", "optimizers/new.py", "experiments/training.py"]
    found = [digest()]
    for name in [*counts, "cli.py", "__main__.py", "experiments/records.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1")
        found.append(digest())
    assert len(set(found[: len(counts) + 1])) == len(counts) + 1
    assert len(set(found[len(counts) :])) == 1


def test_what_is_edited_under_a_run_is_not_its_code(tmp_path, digest):
    once = digest()
    (tmp_path / "two.py").write_text("two = 2")
    assert checkpoints.source_digest() == once != digest()


# Disks


def test_a_full_disk_leaves_the_last_good_state(task, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    straight = run(task, "standard_sgd", settings("standard_sgd"), **OPTIONS)
    interrupt(task, path, monkeypatch)
    content = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(checkpoints, "EVERY", 0)
        with pytest.raises(
            CheckpointError, match=r"run\.pt cannot be written: No space left on device.*intact"
        ):
            resume(task, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["run.pt"]
    assert losses(resume(task, path)) == losses(straight)


def test_a_folder_that_cannot_be_written_to_is_found_before_the_run(task, tmp_path, monkeypatch):
    """A file in its place, for root; a read-only folder, for others."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(CheckpointError, match=r"taken cannot be written to.*Choose another folder"):
        resume(task, tmp_path / "taken" / "run.pt")
    (tmp_path / "locked").mkdir(mode=0o555)
    if not os.access(tmp_path / "locked", os.W_OK):
        with pytest.raises(CheckpointError, match=r"locked.*cannot be written to.*Permission denied"):
            resume(task, tmp_path / "locked" / "run.pt")


def test_one_process_at_a_time(task, tmp_path):
    with Checkpoint(tmp_path / "run.pt"):
        with pytest.raises(CheckpointError, match="another process is at this run"):
            resume(task, tmp_path / "run.pt")
        resume(task, tmp_path / "another.pt")
    resume(task, tmp_path / "run.pt")


def test_what_a_killed_process_left_half_written_is_cleared_away(task, tmp_path):
    (tmp_path / ".run.pt.x1y2").write_bytes(b"half")
    (tmp_path / "run.pt.lock").write_bytes(b"")
    resume(task, tmp_path / "run.pt")
    assert os.listdir(tmp_path) == []


# SIGKILL

UPDATES, KILLS = 300, 10
SMALL = ("standard_sgd", "acp", "kfac")


def small_experiment(patch):
    """Three methods on a small autoencoder of the embedded digits, two refreshes apart from the first."""

    def small(benchmark, profile, device):
        digits = module.data.load("mnist", source="embedded", subset=module.SMOKE_EXAMPLES)
        x, test = digits.train[0][:, 300:340], digits.test[0][:50, 300:340]
        build = lambda **options: MLP([40, 20, 5, 20, 40], "sigmoid", "sigmoid", **options)  # noqa: E731
        return Task(benchmark, digits, (x, x), (test, test), build, Quadratic())

    smoke = Profile({AE: UPDATES}, 2, {AE: 4}, (1, 1), (1, 1, 1), full=False, evaluate_on=50)
    patch(module.PROFILES, "smoke", smoke)
    patch(module.EXPERIMENTS, FIG, Curves("fig6_2", AE, SMALL))
    patch(vars(module), "_task", small)


CHILD = """
import sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
from test_checkpoints import FIG, small_experiment
from sogrid.experiments import checkpoints, training
from sogrid.experiments.reproduce import reproduce
small_experiment(dict.__setitem__)
checkpoints.EVERY = 0.02
training.source_digest = lambda: "made once, not by each of them"
def slowly(*_):
    time.sleep(0.001)
    print(flush=True)
register_optimizer_step_post_hook(slowly)
reproduce(FIG, out=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_a_run_killed_ten_times_gives_the_same_curves(tmp_path, monkeypatch):
    """SIGKILL at ten random points of the fresh process that takes it up, through all three methods."""
    rng, path = random.Random(3), (Path(__file__).parent,)
    out, straight_out = tmp_path / "killed", tmp_path / "straight"
    searched = [leave_searches(folder, AE, methods=SMALL, lr=0.05).name for folder in (out, straight_out)]
    survived = []
    for _ in range(KILLS):
        with Child(CHILD, out, path=path) as child:
            for _ in range(rng.randrange(20, 100)):  # updates; in all, fewer than a run needs
                assert child.stdout.readline(), "it ended on its own"
            time.sleep(rng.uniform(0, 0.005))
            child.kill()
            assert child.wait() == -signal.SIGKILL
        for file in out.glob("fig*.json"):
            survived.append(len(Record.read(file)["runs"]))
    assert survived == sorted(survived)
    with Child(CHILD, out, path=path) as child:
        assert child.communicate()[1] == ""
    small_experiment(monkeypatch.setitem)
    straight = reproduce(FIG, out=straight_out, progress=False)
    found = Record.read(out / f"{FIG}.smoke.json")
    assert [run["method"] for run in found["runs"]] == list(SMALL)
    assert list(map(losses, found["runs"])) == list(map(losses, straight["runs"]))
    assert sum(len(run.get("resumed", ())) for run in found["runs"]) >= KILLS // 2
    assert sorted(p.name for p in out.iterdir()) == [f"{FIG}.smoke.json", searched[0]]


def test_a_checkpoint_holds_no_path_of_the_machine(task, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    interrupt(task, path, monkeypatch)
    for folder in (tmp_path, Path(checkpoints.__file__).parents[2]):
        assert str(folder).encode() not in path.read_bytes()
    found = resume(task, path)
    assert json.loads(json.dumps(found["resumed"])) == found["resumed"]


def test_the_experiments_own_settings_are_untouched():
    assert set(EXPERIMENTS[FIG].methods) > set(SMALL)
