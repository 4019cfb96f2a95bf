"""What the record of every study in the book has to be."""


def require_whole(study):
    """Whole, of one thread, of the settings that the code has now, and of seeds that no search has seen."""
    content = study.read()
    found = [{name: run[name] for name in study.keys[0]} for run in content["runs"]]
    assert sorted(map(str, found)) == sorted(map(str, study.keys))
    settings = content["settings"]
    assert not {*settings["seeds"]} & {*settings.get("search_seeds", ())}
    for run in content["runs"]:
        if "runs" in run:
            assert len(run["runs"]) == len(content["settings"]["seeds"]) >= 10
            assert run["provenance"]["machine"]["threads"] == 1
    return content
