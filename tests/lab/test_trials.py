"""How studies search, compare and record; whether the records of the book are whole."""

import json
import math

import pytest

import lab.trials
from lab import cli
from lab.contest import contest
from lab.published import PUBLISHED
from lab.refreshing import refreshing
from lab.trials import Study, paired, tuned
from sogrid.experiments import data
from sogrid.experiments.records import RecordError


def test_the_best_of_the_search_runs_from_the_other_seeds():
    asked = []

    def run(settings, seeds):
        asked.append(list(zip([s["x"] for s in settings], seeds, strict=True)))
        return [
            {"loss": None if s["x"] == 1 else (s["x"] - 2) ** 2 + seed}
            for s, seed in zip(settings, seeds, strict=True)
        ]

    found = tuned(run, [{"x": x} for x in (1, 2, 5)], seeds=(7, 8), search_seeds=(0, 10))
    assert asked == [[(1, 0), (2, 0), (5, 0), (1, 10), (2, 10), (5, 10)], [(2, 7), (2, 8)]]
    assert found.settings == {"x": 2}
    assert found.searched == [math.inf, 5.0, 14.0]
    assert found.losses == [7, 8]
    json.dumps(found.entry(), allow_nan=False)
    with pytest.raises(ValueError, match="every setting of the grid diverged"):
        tuned(run, [{"x": 1}], seeds=(7, 8), search_seeds=(0, 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda out: contest(methods=["sgd"], out=out, progress=False),
        lambda out: PUBLISHED.record(out, progress=False),
        lambda out: refreshing(out=out, progress=False),
    ],
    ids=["contest", "published", "refreshing"],
)
def test_what_is_said_of_mnist_is_not_made_of_a_part_of_it(make, tmp_path, monkeypatch):
    monkeypatch.delenv("SOGRID_DATA", raising=False)
    monkeypatch.setattr(data, "_cache_folder", lambda name: tmp_path / "cache")
    with pytest.raises(data.DataError, match="needs the full data set, not the MNIST, embedded subset"):
        make(tmp_path / "out")
    assert not list(tmp_path.rglob("*.json"))


FIRST = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]
WORSE = [1.2 * v + 0.01 * (i % 2) for i, v in enumerate(FIRST)]


def test_who_is_ahead():
    sign, ratio, p = paired(FIRST, WORSE)
    assert sign == 1
    assert ratio == pytest.approx(1.2, abs=0.01)
    assert paired(FIRST, WORSE, sided=1)[2] == pytest.approx(p / 2)
    assert paired(WORSE, FIRST)[:2] == (-1, pytest.approx(1 / ratio))
    assert paired(FIRST, FIRST[::-1])[0] == 0
    assert paired([math.inf, *FIRST[1:]], WORSE)[0] == 0
    assert paired(FIRST, [math.inf, *WORSE[1:]])[0] == 1
    assert paired([math.inf] * 3, [1.0] * 3)[0] == 0


def test_a_record_is_gone_on_with(tmp_path, monkeypatch):
    done = []
    study = Study("s", {"a": [1]}, [{"k": 1}, {"k": 2}], lambda k: done.append(k) or {"loss": k})
    study.record(tmp_path, progress=False)
    content = study.record(tmp_path, progress=False)
    assert done == [1, 2]
    assert [run["loss"] for run in content["runs"]] == [1, 2]
    monkeypatch.setattr(lab.trials, "RESULTS", tmp_path)
    assert study.read() == content
    with pytest.raises(RecordError, match="another settings"):
        Study("s", {"a": [2]}, [], print).read()
    with pytest.raises(RecordError):
        Study("t", {}, [], print).read()


def test_an_unknown_study_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "nothing"])
    assert "newton-muon" in capsys.readouterr().err
