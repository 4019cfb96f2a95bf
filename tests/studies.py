"""What every study's record in the book has to be."""

from lab.trials import SEARCH_SEEDS, SEEDS


def require_whole(study):
    """The record in the book is of these settings, whole, of one thread, and of enough seeds."""
    content = study.read()
    found = [{name: run[name] for name in study.keys[0]} for run in content["runs"]]
    assert sorted(map(str, found)) == sorted(map(str, study.keys))
    for run in content["runs"]:
        if "runs" in run:
            assert len(run["runs"]) == len(SEEDS)
            assert run["provenance"]["machine"]["threads"] == 1
    assert not {*SEEDS} & {*SEARCH_SEEDS}
    return content
