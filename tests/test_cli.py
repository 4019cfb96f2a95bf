"""``python -m sogrid``: what it prints, and its exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sogrid import cli
from sogrid.experiments import reproduce as module
from sogrid.experiments.checkpoints import FOLDER
from sogrid.experiments.records import RESULTS, Record
from sogrid.experiments.reproduce import EXPERIMENTS, Experiment, Profile

FIG = "fig6_2_mnist_autoencoder"
ROOT = Path(cli.__file__).parents[1]


def sogrid(*arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "SOGRID_DATA"} | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "sogrid", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture
def tiny(monkeypatch):
    """The smoke profile with two updates of one method."""
    monkeypatch.setitem(module.PROFILES, "smoke", Profile(2, full=False, evaluate_on=50))
    monkeypatch.setattr(module, "SMOKE_EXAMPLES", 200)
    plan = EXPERIMENTS[FIG]
    few = {"standard_sgd": plan.settings["standard_sgd"]}
    monkeypatch.setitem(
        module.EXPERIMENTS, FIG, Experiment(plan.figure, plan.dataset, plan.task, few, plan.chosen)
    )


@pytest.fixture
def record(tmp_path):
    run = {"method": "acp", "settings": {"lr": 0.1}, "seed": 0, "update": [0, 1200], "second": [0, 2.5]}
    run |= {"train": [3.0, 1.0], "test": [3.0, 2.0], "status": "diverged", "reason": "update 1201: too much"}
    run["provenance"] = {"date": "2026-01-02", "commit": "abc", "versions": {}, "machine": {"threads": 1}}
    run["resumed"] = [{"update": 1000, "date": "2026-01-01", "commit": "abd", "processor": "Z80"}]
    path = tmp_path / "r.json"
    Record(path, "fig", {"profile": "smoke", "updates": 1200}).add(run)
    return path


# reproduce


def test_reproduce_leaves_a_record_and_says_where(tiny, tmp_path, capsys):
    assert cli.main(["reproduce", "fig6_2", "--seed", "3", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / f"{FIG}.smoke.json"
    assert f"record: {path}" in out
    assert "standard_sgd" in out
    assert "standard_sgd (1 of 1):" in err
    assert "0/2 [" in err, "a bar"
    assert [run["seed"] for run in Record.read(path)["runs"]] == [3]
    assert cli.main(["reproduce", FIG, "--seed", "3", "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(Record.read(path)["runs"]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["fig9"], "FIG 'fig9' is unknown; there are: fig"),
        (["fig6_2", "--profile", "huge"], "--profile must be one of smoke, laptop, thesis"),
        (["fig6_2", "--seed", "three"], "invalid int value: 'three'"),
        (["fig6_2", "--device", "banana"], "--device 'banana' cannot be used here"),
        (["fig6_2", "--device", "meta"], "--device 'meta' cannot be used here"),
        (["fig6_2", "--prof", "smoke"], "unrecognized arguments: --prof"),
        ([], "required: FIG"),
    ],
)
def test_wrong_usage_is_2_and_named(wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *wrong])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_ambiguous_beginning_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setitem(module.EXPERIMENTS, "fig6_9", None)
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "fig6"])
    assert f"could be any of: {FIG}, fig6_9" in capsys.readouterr().err


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sogrid: ")
    return err


def test_our_errors_are_one_line_and_1(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / f"{FIG}.smoke.json"
    path.write_text("{")
    arguments = ["reproduce", "fig6_2", "--out", str(tmp_path), "--quiet"]
    assert cli.main(arguments) == 1
    assert f"{path} cannot be read as a record" in one_line(capsys)
    path.unlink()
    place = tmp_path / FOLDER / f"{FIG}.smoke.standard_sgd.seed0.pt"
    place.parent.mkdir()
    place.write_bytes(b"sogrid")
    assert cli.main(arguments) == 1
    assert f"{place} is truncated" in one_line(capsys)
    monkeypatch.setenv("SOGRID_DATA", str(tmp_path / "nowhere"))
    assert cli.main([*arguments, "--profile", "laptop"]) == 1
    assert cli.main(["reproduce", "fig6_2", "--out", str(place), "--quiet"]) == 1


def test_other_errors_keep_their_traceback(tiny, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(module, "run", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(["reproduce", "fig6_2", "--out", str(tmp_path), "--quiet"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The runs of an uninterrupted ``reproduce fig6_2``."""
    out = tmp_path_factory.mktemp("straight")
    with sogrid("reproduce", "fig6_2", "--out", out, "--quiet") as child:
        assert child.communicate(timeout=120)[1] == ""
    return Record.read(out / f"{FIG}.smoke.json")["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_state_that_the_same_command_takes_up(number, straight, tmp_path):
    with sogrid("reproduce", "fig6_2", "--out", tmp_path) as child:
        seen = ""
        while "kfac (4 of 6)" not in seen:
            seen += child.stderr.read(1)
            assert child.poll() is None
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert out == ""
    last = err.rstrip().splitlines()[-1]
    assert last.startswith(f"sogrid: stopped by {number.name} after update ")
    assert "Traceback" not in err
    kept = tmp_path / FOLDER / f"{FIG}.smoke.kfac.seed0.pt"
    assert str(kept) in last
    assert kept.exists()
    with sogrid("reproduce", "fig6_2", "--out", tmp_path, "--quiet") as child:
        assert child.communicate(timeout=120)[1] == ""
    runs = Record.read(tmp_path / f"{FIG}.smoke.json")["runs"]
    assert [(run["train"], run["test"]) for run in runs] == [(run["train"], run["test"]) for run in straight]
    assert [("resumed" in run) for run in runs] == [False, False, False, True, False, False]
    assert os.listdir(tmp_path) == [f"{FIG}.smoke.json"]


# records


def test_the_books_records_verify(capsys):
    assert cli.main(["records", "verify"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(list(RESULTS.glob("*.json"))) > 0
    assert all(line.startswith("ok  ") for line in out)


def test_verify_names_every_damaged_file(record, tmp_path, capsys):
    (tmp_path / "a.json").write_text(record.read_text().replace("1200", "1300"))
    (tmp_path / "b.json").write_text("[]")
    assert cli.main(["records", "verify", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == f"ok  {record}  (1 runs)\n"
    assert f"sogrid: {tmp_path / 'a.json'} was changed" in err
    assert f"sogrid: {tmp_path / 'b.json'} is not a sogrid record" in err
    assert cli.main(["records", "verify", str(record)]) == 0


def test_list_is_one_line_for_each(record, tmp_path, capsys):
    assert cli.main(["records", "list", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["file", "experiment", "profile", "runs", "last"]
    assert out[1].split() == [str(record), "fig", "smoke", "1", "2026-01-02"]
    assert cli.main(["records", "list"]) == 0
    assert f"{FIG}.laptop.json" in capsys.readouterr().out


def test_show_holds_settings_ends_and_provenance(record, capsys):
    assert cli.main(["records", "show", str(record)]) == 0
    out = capsys.readouterr().out
    expected = ("fig", "1,200", "2.5", "diverged (update 1201: too much)", "lr 0.1", "abc", "threads 1")
    for text in (*expected, "run 1 was resumed; up to update 1,000: 2026-01-01, commit abd, Z80"):
        assert text in out
    assert cli.main(["records", "show", str(RESULTS / "step_times.json")]) == 0
    assert "mnist_autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["list", "verify", "show"])
def test_what_is_not_there_is_named(verb, tmp_path, capsys):
    assert cli.main(["records", verb, str(tmp_path / "none.json")]) == 1
    assert "none.json" in one_line(capsys)
    assert cli.main(["records", verb, str(tmp_path)]) == 1
    assert str(tmp_path) in one_line(capsys)


# As a program


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ([], ["reproduce", "records", "examples:", "exit status"]),
        (["reproduce"], ["FIG", "--profile", "--seed", "--device", "--out", "smoke", "laptop", "thesis"]),
        (["records"], ["list", "show", "verify"]),
        (["records", "verify"], ["FILE", "default: those of the book"]),
    ],
)
def test_help(arguments, texts, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in texts)
    assert max(map(len, out.splitlines())) <= 110


def test_help_needs_no_torch():
    code = "import sys, sogrid.cli\ntry: sogrid.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_the_program():
    with sogrid() as child:
        assert "required: COMMAND" in child.communicate()[1]
    assert child.returncode == 2
    with sogrid("records", "verify", "none.json") as child:
        assert child.communicate() == ("", "sogrid: none.json: no such file or folder\n")
    assert child.returncode == 1
    with sogrid("records", "verify") as child:
        assert "Error" not in "".join(child.communicate())
    assert child.returncode == 0
