"""Records: whole or not at all, verified, continued, refused when foreign."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from children import Child

import sogrid
from sogrid.experiments import records
from sogrid.experiments.records import RESULTS, Record, RecordError, alone, provenance, write_atomically

SETTINGS = {"profile": "smoke", "updates": 3}


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    record.add({"method": "a", "train": [1.5, 0.1]})
    record.add({"method": "b", "train": [2.5]})
    content = Record.read(tmp_path / "r.json")
    assert content["experiment"] == "fig"
    assert content["settings"] == SETTINGS
    assert [run["train"] for run in content["runs"]] == [[1.5, 0.1], [2.5]]


def test_an_interrupted_experiment_keeps_its_runs(tmp_path):
    Record(tmp_path / "r.json", "fig", SETTINGS).add({"method": "a", "seed": 0})
    again = Record(tmp_path / "r.json", "fig", SETTINGS)
    assert again.find(method="a", seed=0) is not None
    assert again.find(method="a", seed=1) is None


@pytest.mark.parametrize(
    ("experiment", "settings"), [("other", SETTINGS), ("fig", {**SETTINGS, "profile": "laptop"})]
)
def test_a_record_of_something_else_is_refused_and_kept(tmp_path, experiment, settings):
    path = tmp_path / "r.json"
    Record(path, "fig", SETTINGS).add({"method": "a"})
    before = path.read_bytes()
    with pytest.raises(
        RecordError, match=r"experiment: fig, not other|settings: .*smoke.*, not .*laptop"
    ) as error:
        Record(path, experiment, settings)
    assert "updates" not in str(error.value), "only what differs is said"
    assert path.read_bytes() == before


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    Record(path, "fig", SETTINGS).add({"method": "a", "train": [1.0]})
    good = path.read_text()
    for bad in (
        good[: len(good) // 2],
        good.replace("1.0", "0.9"),
        "[]",
        json.dumps({"format": 99}),
        json.dumps({"format": 1}),
        *(good.replace("1.0", constant) for constant in ("NaN", "Infinity", "-Infinity")),
        "[" * 100_000,
        "",
    ):
        path.write_text(bad)
        with pytest.raises(RecordError, match=r"r\.json"):
            Record.read(path)
    with pytest.raises(RecordError, match="there is no record"):
        Record.read(tmp_path / "missing.json")


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    record.add({"method": "a"})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RecordError, match=r"r\.json cannot be written: No space left on device.*intact"):
            record.add({"method": "b"})
    assert [run["method"] for run in Record.read(tmp_path / "r.json")["runs"]] == ["a"]
    record.add({"method": "b"})
    assert [run["method"] for run in Record.read(tmp_path / "r.json")["runs"]] == ["a", "b"]


def test_a_folder_that_is_none_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"file.r\.json cannot be written"):
        Record(tmp_path / "file" / "r.json", "fig", SETTINGS).add({"method": "a"})


def test_two_who_add_lose_nothing_of_each_other(tmp_path):
    one, two = (Record(tmp_path / "r.json", "fig", SETTINGS) for _ in range(2))
    one.add({"method": "a"})
    two.add({"method": "b"})
    one.add({"method": "c"})
    assert [run["method"] for run in Record.read(tmp_path / "r.json")["runs"]] == ["a", "b", "c"]
    assert one.find(method="b") is not None


ADD = """
import sys
from sogrid.experiments.records import Record
record = Record(sys.argv[1], "fig", {})
for i in range(20):
    record.add({"who": sys.argv[2], "i": i})
"""


def test_a_run_that_several_may_bring_is_added_once(tmp_path):
    """Workers who share a search: the second to come finds it there."""
    one, two = (Record(tmp_path / "r.json", "fig", SETTINGS) for _ in range(2))
    one.add({"method": "a", "date": 1}, once={"method": "a"})
    two.add({"method": "a", "date": 2}, once={"method": "a"})
    two.add({"method": "b", "date": 2}, once={"method": "b"})
    assert [run["date"] for run in Record.read(tmp_path / "r.json")["runs"]] == [1, 2]
    assert two.content == Record.read(tmp_path / "r.json")


def test_two_processes_at_once_lose_nothing_of_each_other(tmp_path):
    workers = [Child(ADD, tmp_path / "r.json", who) for who in "ab"]
    assert [worker.communicate(60) for worker in workers] == [("", ""), ("", "")]
    runs = Record.read(tmp_path / "r.json")["runs"]
    assert sorted((run["who"], run["i"]) for run in runs) == [(who, i) for who in "ab" for i in range(20)]
    assert os.listdir(tmp_path) == ["r.json"]


def test_one_is_alone_at_a_time_also_while_the_lock_comes_and_goes(tmp_path):
    """Every holder removes the lock, and the folder when it is the last to leave."""
    path, inside, done = tmp_path / "folder" / "r", [], []

    def work():
        for _ in range(50):
            with alone(path) as is_alone:
                inside.append(1)
                done.append((is_alone, len(inside)))
                inside.pop()
            with suppress(OSError):
                path.parent.rmdir()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert done == 200 * [(True, 1)]
    assert os.listdir(tmp_path) == []


def test_the_lock_is_removed_before_it_is_released(tmp_path, monkeypatch):
    """After that it may be the next one's, and a third one would find none."""

    def remove(path):
        monkeypatch.undo()
        with pytest.raises(TimeoutError), alone(tmp_path / "r", 0.01):
            pass
        os.unlink(path)

    monkeypatch.setattr(os, "unlink", remove)
    with alone(tmp_path / "r"):
        pass
    assert os.listdir(tmp_path) == []


def test_who_does_not_wait_is_told_that_another_is_there(tmp_path):
    with alone(tmp_path / "r"), pytest.raises(TimeoutError), alone(tmp_path / "r", 0.01):
        pass
    with alone(tmp_path / "r", 0.01) as is_alone:
        assert is_alone


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:flock not supported:UserWarning")
def test_a_file_system_without_locks_takes_records(tmp_path, monkeypatch, number):
    """ENOSYS is filelock's own matter: it uses a file whose being there is the lock."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".r.json.x1y2").write_bytes(b"of a process that writes at this moment")
    with alone(tmp_path / "r.json") as is_alone:
        assert is_alone == (number == errno.ENOSYS)
    Record(tmp_path / "r.json", "fig", SETTINGS).add({"method": "a"})
    left = {"r.json"} if number == errno.ENOSYS else {"r.json", ".r.json.x1y2"}
    assert set(os.listdir(tmp_path)) == left


def test_adding_does_not_bring_back_runs_that_were_dropped(tmp_path):
    """As one does who starts a record anew."""
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    record.add({"method": "old"})
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    record.content["runs"] = []
    record.add({"method": "new"})
    assert [run["method"] for run in Record.read(tmp_path / "r.json")["runs"]] == ["new"]


def test_step_times_are_replaced_and_the_runs_kept(tmp_path):
    one, two = (Record(tmp_path / "r.json", "fig", SETTINGS) for _ in range(2))
    one.add({"method": "a"})
    two.set_clock({"rows": [1]})
    assert [run["method"] for run in two.content["runs"]] == ["a"]
    one.add({"method": "b"})
    content = Record.read(tmp_path / "r.json")
    assert content["clock"] == {"rows": [1]}
    assert [run["method"] for run in content["runs"]] == ["a", "b"]
    Record(tmp_path / "r.json", "fig", SETTINGS).set_clock({"rows": [2]})
    content = Record.read(tmp_path / "r.json")
    assert content["clock"] == {"rows": [2]}
    assert len(content["runs"]) == 2


def test_a_list_of_numbers_takes_one_line(tmp_path):
    text = "a [1,  2] \n   [ b"
    Record(tmp_path / "r.json", "fig", SETTINGS).add({"train": [1.5, 2.0], "why": text, "none": []})
    assert ' "train": [ 1.5, 2.0 ],\n' in (tmp_path / "r.json").read_text()
    assert Record.read(tmp_path / "r.json")["runs"] == [{"train": [1.5, 2.0], "why": text, "none": []}]


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".r.json.x1y2").write_bytes(b"half")
    Record(tmp_path / "r.json", "fig", SETTINGS).add({"method": "a"})
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_file_changed_into_something_else_meanwhile_is_left(tmp_path):
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    (tmp_path / "r.json").write_text("something else")
    with pytest.raises(RecordError, match="cannot be read"):
        record.add({"method": "a"})
    assert (tmp_path / "r.json").read_text() == "something else"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_the_books_records_are_whole(path):
    assert Record.read(path)["runs"]


def test_a_run_that_is_no_json_is_refused_and_nothing_is_lost(tmp_path):
    record = Record(tmp_path / "r.json", "fig", SETTINGS)
    record.add({"method": "a"})
    with pytest.raises(ValueError, match=r"JSON|range"):
        record.add({"train": [float("nan")]})
    assert [run["method"] for run in Record.read(tmp_path / "r.json")["runs"]] == ["a"]
    assert len(record.content["runs"]) == 1


def test_provenance_names_date_commit_versions_and_machine():
    found = provenance()
    assert set(found) == {"date", "commit", "versions", "machine"}
    assert found["versions"]["torch"].startswith("2.")
    assert found["machine"]["threads"] >= 1


def test_the_commit_is_that_of_the_first_call(monkeypatch):
    """What runs is what was imported; and Git takes its time."""
    first = provenance()
    monkeypatch.setattr(records.subprocess, "run", None)
    assert provenance() == first


def test_a_repository_that_only_holds_an_installed_copy_is_not_the_sources(tmp_path):
    installed = tmp_path / "venv" / "sogrid" / "experiments" / "records.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(records.__file__, installed)
    (tmp_path / ".gitignore").write_text("venv\n")
    me = ["-c", "user.name=me", "-c", "user.email=me@here"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "mine"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    found = subprocess.run(
        [sys.executable, "-c", f"import runpy; print(runpy.run_path({str(installed)!r})['_commit']())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "unknown"


def test_a_change_anywhere_in_the_package_marks_the_commit(monkeypatch):
    asked = []

    def git(command, *, cwd, **options):
        asked.append((command[1], cwd))
        return SimpleNamespace(stdout="")

    monkeypatch.setattr(records.subprocess, "run", git)
    records._commit.__wrapped__()
    assert ("status", Path(sogrid.__file__).parent) in asked
