"""Records: whole or not at all, verified, continued, refused when foreign."""

import json
import os

import pytest

from sogrid.experiments.records import Record, RecordError, provenance, write_atomically

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


@pytest.mark.parametrize(("experiment", "settings"), [("other", SETTINGS), ("fig", {"profile": "laptop"})])
def test_a_record_of_something_else_is_refused_and_kept(tmp_path, experiment, settings):
    path = tmp_path / "r.json"
    Record(path, "fig", SETTINGS).add({"method": "a"})
    before = path.read_bytes()
    with pytest.raises(RecordError, match="holds another"):
        Record(path, experiment, settings)
    assert path.read_bytes() == before


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    Record(path, "fig", SETTINGS).add({"method": "a", "train": [1.0]})
    good = path.read_text()
    for bad in (good[: len(good) // 2], good.replace("1.0", "0.9"), "[]", json.dumps({"format": 99}), ""):
        path.write_text(bad)
        with pytest.raises(RecordError, match=r"r\.json"):
            Record.read(path)
    with pytest.raises(RecordError, match="cannot be read"):
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
