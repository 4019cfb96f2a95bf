"""``python -m lab``: what it prints, and its exit status; that of ``bench`` is in test_bench.py."""

import subprocess
import sys

import pytest
from searched import leave_searches

import sogrid.cli
from lab import cli
from sogrid.experiments import reproduce as module
from sogrid.experiments.records import Record
from sogrid.experiments.reproduce import AE, CIFAR, Curves, Profile

FIG = "fig6_2_mnist_autoencoder"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The smoke profile with two updates of one method, whose hyperparameters have been searched."""
    updates = {AE: 2, CIFAR: 2}
    profile = Profile(updates, 2, updates, (2, 1), (1, 4, 1), full=False, evaluate_on=50)
    monkeypatch.setitem(module.PROFILES, "smoke", profile)
    monkeypatch.setattr(module, "SMOKE_EXAMPLES", 200)
    monkeypatch.setitem(module.EXPERIMENTS, FIG, Curves("fig6_2", AE, ("standard_sgd",)))
    leave_searches(tmp_path, AE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["clock", "fig4_1"], "figure 'fig4_1' is unknown; there are: fig5_1"),
        (["clock", "fig6_2", "--methods", "bn"], "unrecognized arguments: --methods"),
        (["clock", "fig6"], "could be any of: fig6_1"),
        (["clock", "fig6_2", "--profile", "huge"], "--profile must be one of"),
        (["clock", "fig6_2", "--device", "banana"], "--device 'banana' cannot be used here"),
        (["clock"], "required: FIG"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_usage_is_2_and_named(wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(wrong)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_clock_puts_step_times_into_the_record(tiny, tmp_path, capsys, monkeypatch):
    rows = [{"method": "standard_sgd", "update_ms": 2.0, "quartiles_ms": [1.5, 2.5], "refresh_ms": 0.0}]
    monkeypatch.setattr("lab.timing.step_times", lambda *args, **options: rows)
    arguments = ["fig6_2", "--out", str(tmp_path), "--quiet"]
    assert sogrid.cli.main(["reproduce", *arguments]) == 0
    capsys.readouterr()
    assert cli.main(["clock", *arguments]) == 0
    head, row, _, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[1] == "method"
    assert row.split() == ["standard_sgd", "2.00", "1.50", "to", "2.50", "1.00", "0.0"]
    path = tmp_path / f"{FIG}.smoke.json"
    assert last == f"record: {path}"
    assert Record.read(path)["clock"]["rows"] == rows
    assert sogrid.cli.main(["records", "verify", str(path)]) == 0
    assert sogrid.cli.main(["reproduce", *arguments]) == 0
    assert Record.read(path)["clock"]["rows"] == rows


def test_clock_without_a_record_is_one_line_and_1(tmp_path, capsys):
    assert cli.main(["clock", "fig6_2", "--out", str(tmp_path), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lab: there is no record {tmp_path / FIG}.smoke.json")
    assert f"python -m sogrid reproduce {FIG} --profile smoke --out {tmp_path} first" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [["clock", "fig6_2"], ["bench"], ["out-of-the-box"], ["refreshing"], ["contest"], ["study", "gan"]],
)
@pytest.mark.parametrize("below", ["", "further/down"])
def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_run(command, below, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--out", str(tmp_path / "taken" / below)])
    assert stop.value.code == 2
    assert f"{tmp_path / 'taken'} is a file" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ([], ["clock", "bench"]),
        (["clock"], ["FIG", "--profile", "--device", "--out", "idle machine", "laptop"]),
        (["bench"], ["--parts", "--rounds", "--device", "--out", "--quiet", "idle machine"]),
    ],
)
def test_help(arguments, texts, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in texts)
    assert max(map(len, out.splitlines())) <= 110


def test_the_program_helps_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "lab", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m lab ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert "torch" not in imported
