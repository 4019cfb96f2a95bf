"""``python -m sogrid``: what it prints, and its exit status."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from children import ROOT, program
from searched import leave_searches

from sogrid import cli
from sogrid.experiments import reproduce as module
from sogrid.experiments import tuning
from sogrid.experiments.benchmarks import BENCHMARKS
from sogrid.experiments.checkpoints import FOLDER
from sogrid.experiments.records import RESULTS, Record
from sogrid.experiments.reproduce import AE, CIFAR, Curves, Profile, search_path

FIG = "fig6_2_mnist_autoencoder"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The smoke profile: two updates of one method, on a small network, after a search."""
    updates, network = {AE: 2, CIFAR: 2}, BENCHMARKS["mnist_small_autoencoder"].network
    monkeypatch.setitem(BENCHMARKS, AE, replace(BENCHMARKS[AE], network=network))
    profile = Profile(updates, 2, updates, (2, 1), (1, 4, 1), full=False, evaluate_on=50)
    monkeypatch.setitem(module.PROFILES, "smoke", profile)
    monkeypatch.setattr(module, "SMOKE_EXAMPLES", 200)
    monkeypatch.setitem(module.EXPERIMENTS, FIG, Curves("fig6_2", AE, ("standard_sgd",)))
    leave_searches(tmp_path, AE)


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
    assert "standard_sgd.seed3 (1 of 1):" in err
    assert "0/2 [" in err, "a bar"
    assert [run["seed"] for run in Record.read(path)["runs"]] == [3]
    assert cli.main(["reproduce", FIG, "--seed", "3", "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(Record.read(path)["runs"]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["fig9"], "figure 'fig9' is unknown; there are: fig"),
        (["fig6_2", "--profile", "huge"], "--profile must be one of smoke, laptop, long, thesis"),
        (["fig6_2", "--methods"], "expected at least one argument"),
        (["fig6_2", "--methods", "bn", "adam"], "--methods: there are acp_fixedalpha, acp,"),
        (["fig4_1", "--methods", "bn"], "--methods: there are grid, random, biased, got 'bn'"),
        (["fig6_2", "--seed", "three"], "got three"),
        (["fig4_1", "--seed=-1"], "argument --seed: must be a whole number from 0 to 2147483647, got -1"),
        (["fig4_1", "--seed", "2147483648"], "argument --seed: must be a whole number"),
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["search", "fig6_2"], "benchmark 'fig6_2' is unknown; there are: mnist_autoencoder, cifar10_class"),
        (["search", "cifar10", "--methods", "mean_only_bn"], "got 'mean_only_bn'"),
        (["search", "mnist", "--methods", "jaco_update_hessian"], "got 'jaco_update_hessian'"),
        (["search", "cifar10", "--seed", "1"], "unrecognized arguments: --seed"),
        (["search", "cifar10", "--profile", "huge"], "--profile must be one of"),
        (["search", "cifar10", "--device", "banana"], "--device 'banana' cannot be used here"),
        (["search"], "required: BENCHMARK"),
        (["clock", "fig6_2"], "invalid choice: 'clock'"),
    ],
)
def test_wrong_usage_of_other_commands_is_2_and_named(wrong, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(wrong)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_ambiguous_beginning_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setitem(module.EXPERIMENTS, "fig6_9", None)
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "fig6"])
    err = capsys.readouterr().err
    assert f"could be any of: fig6_1_centering, {FIG}, fig6_3_cifar10, fig6_9" in err


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


@pytest.mark.parametrize("command", [["reproduce", "fig6_2"], ["search", "cifar10"]])
def test_a_file_in_the_place_of_the_folder_is_wrong_usage(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--out", str(tmp_path / "file" / "below")])
    assert stop.value.code == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_other_errors_keep_their_traceback(tiny, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(module, "run", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(["reproduce", "fig6_2", "--out", str(tmp_path), "--quiet"])


def test_methods_are_those_that_are_asked_for(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(module.EXPERIMENTS, FIG, Curves("fig6_2", AE, ("standard_sgd", "bn", "acp")))
    assert cli.main(["reproduce", FIG, "--methods", "acp", "bn", "--out", str(tmp_path), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "standard_sgd" not in out
    assert [run["method"] for run in Record.read(tmp_path / f"{FIG}.smoke.json")["runs"]] == ["bn", "acp"]


def test_a_figure_of_searches_is_a_table_of_what_they_found(tiny, tmp_path, capsys):
    assert cli.main(["reproduce", "fig4_1", "--seed", "2", "--out", str(tmp_path), "--quiet"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "sampler", "seed", "trials", "diverged", "updates", "best", "settings"]
    assert [row.split()[2:5] for row in rows[:3]] == [[s, "2", "4"] for s in ("grid", "random", "biased")]
    (record,) = tmp_path.glob("fig4_1*.json")
    assert rows[-1] == f"record: {record}"
    assert cli.main(["records", "list", str(record)]) == 0
    assert cli.main(["records", "show", str(record)]) == 0
    assert rows[0] in capsys.readouterr().out


# search


def test_search_leaves_a_record_that_reproduce_then_uses(tiny, tmp_path, capsys):
    path = search_path(tmp_path, AE, "smoke")
    path.unlink()
    arguments = ["--methods", "standard_sgd", "mean_only_bn", "--out", str(tmp_path)]
    assert cli.main(["search", "mnist_auto", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "standard_sgd.biased0 (1 of 2)" in err
    assert "mean_only_bn.biased0 (2 of 2)" in err
    assert "2/2" in err
    assert "Warning" not in err
    assert out.endswith(f"record: {path}\n")
    runs = Record.read(path)["runs"]
    assert [run["method"] for run in runs] == ["standard_sgd", "mean_only_bn"]
    assert path.with_suffix(".sqlite3").exists()
    assert cli.main(["search", "mnist_auto", *arguments, "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")
    assert cli.main(["reproduce", FIG, "--out", str(tmp_path), "--quiet"]) == 0
    trials = runs[0]["trials"]
    best = min((loss, lr) for loss, lr in zip(trials["loss"], trials["lr"], strict=True) if loss is not None)
    (run,) = Record.read(tmp_path / f"{FIG}.smoke.json")["runs"]
    assert run["settings"]["lr"] == best[1]


def test_a_storage_that_fails_is_one_line_and_1(tiny, tmp_path, capsys):
    arguments = ["search", "cifar10", "--methods", "bn", "--quiet", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--storage", "banana"]) == 1
    assert "the storage banana cannot be used" in one_line(capsys)
    assert cli.main([*arguments, "--storage", f"sqlite:///{tmp_path}/none/s.sqlite3"]) == 1
    assert "unable to open database file" in one_line(capsys)
    file = search_path(tmp_path, CIFAR, "smoke").with_suffix(".sqlite3")
    file.write_bytes(b"SQLite format 3\0 truncated")
    assert cli.main(arguments) == 1
    assert f"{file} cannot be used" in one_line(capsys)
    assert file.read_bytes() == b"SQLite format 3\0 truncated"


def test_ctrl_c_during_a_search_is_one_line_and_130(tiny, tmp_path, capfd, monkeypatch):
    inner, count = tuning.run, [0]

    def stopping(*args, **options):
        count[0] += 1
        if count[0] == 4:
            signal.raise_signal(signal.SIGINT)
        return inner(*args, **options)

    monkeypatch.setattr(tuning, "run", stopping)
    arguments = ["search", "cifar10", "--methods", "bn", "standard_sgd", "--quiet", "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    out, err = capfd.readouterr()
    assert (out, err) == ("", "\nsogrid: stopped\n")
    assert not (tmp_path / FOLDER).exists()
    path = search_path(tmp_path, CIFAR, "smoke")
    assert [run["method"] for run in Record.read(path)["runs"]] == ["bn"]
    assert cli.main(arguments) == 0
    assert count[0] == 5, "one trial again, and nothing else"
    assert [len(run["trials"]["loss"]) for run in Record.read(path)["runs"]] == [2, 2]


@pytest.mark.slow
def test_two_searches_of_different_methods_at_once_fill_one_record(tmp_path):
    parts = [("bn", "standard_sgd"), ("acp", "acp_fixedalpha")]
    workers = [
        program("search", "mnist_auto", "--out", tmp_path, "--quiet", "--methods", *part) for part in parts
    ]
    ends = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ends
    assert [err for _, err in ends] == ["", ""]
    content = Record.read(search_path(tmp_path, AE, "smoke"))
    assert sorted(run["method"] for run in content["runs"]) == sorted(parts[0] + parts[1])
    assert all(len(run["trials"]["loss"]) == 2 for run in content["runs"])


# Ctrl-C in the course of a figure


THREE = ("reproduce", "fig6_2", "--methods", "acp_fixedalpha", "kfac", "standard_sgd", "--out")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The runs of an uninterrupted ``reproduce``."""
    out = tmp_path_factory.mktemp("straight")
    leave_searches(out, AE)
    with program(*THREE, out, "--quiet") as child:
        assert child.communicate(timeout=300)[1] == ""
    return Record.read(out / f"{FIG}.smoke.json")["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_state_that_the_same_command_takes_up(number, straight, tmp_path):
    searches = leave_searches(tmp_path, AE)
    with program(*THREE, tmp_path) as child:
        seen = ""
        while "kfac.seed0 (2 of 3)" not in seen:
            seen += child.stderr.read(1)
            assert child.poll() is None
        child.send_signal(number)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 128 + number
    assert out == ""
    last = err.rstrip().splitlines()[-1]
    assert last.startswith(f"sogrid: stopped by {number.name} after update ")
    assert "Traceback" not in err
    kept = tmp_path / FOLDER / f"{FIG}.smoke.kfac.seed0.pt"
    assert str(kept) in last
    assert kept.exists()
    with program(*THREE, tmp_path, "--quiet") as child:
        assert child.communicate(timeout=300)[1] == ""
    runs = Record.read(tmp_path / f"{FIG}.smoke.json")["runs"]
    assert [(run["train"], run["test"]) for run in runs] == [(run["train"], run["test"]) for run in straight]
    assert [("resumed" in run) for run in runs] == [False, True, False]
    assert sorted(os.listdir(tmp_path)) == [f"{FIG}.smoke.json", searches.name]


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
        ([], ["reproduce", "search", "records", "examples:", "exit status"]),
        (["reproduce"], ["FIG", "--profile", "--seed", "--methods", "--device", "--out", "--quiet"]),
        (["reproduce"], ["smoke", "laptop", "long", "thesis"]),
        (["search"], ["BENCHMARK", "--profile", "--methods", "--storage", "postgresql", "optuna-dashboard"]),
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


def python(*arguments):
    """The exit status, standard output and error of ``python -m sogrid``."""
    command, options = [sys.executable, "-m", "sogrid", *arguments], dict(capture_output=True, text=True)
    done = subprocess.run(command, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


def test_the_program():
    status, _, err = python()
    assert status == 2
    assert "required: COMMAND" in err
    assert python("records", "verify", "none.json") == (1, "", "sogrid: none.json: no such file or folder\n")


def test_the_program_reads_the_books_records():
    with program("records", "verify") as child:
        out, err = child.communicate()
    assert (child.returncode, err) == (0, "")
    assert out.count("ok  book/results/") == len(list(RESULTS.glob("*.json")))
