"""Hyperparameters for the figures, without a search: a record as ``tune`` leaves it."""

from sogrid.experiments.benchmarks import METHODS
from sogrid.experiments.records import Record, provenance
from sogrid.experiments.reproduce import search_path

VALUES = {"lr": 0.01, "damping": 0.5, "scale": 4.0}


def leave_searches(out, benchmark, *, methods=None, profile="smoke", **values):
    """Write ``search_<benchmark>.<profile>.json``: for each method two trials, the second one better."""
    record = Record(
        search_path(out, benchmark, profile),
        f"search_{benchmark}",
        {"profile": profile, "benchmark": benchmark, "trials": 2, "updates": 4},
    )
    runs = []
    for method in methods or [name for name in METHODS if METHODS[name].tuned_as is None]:
        best = {key: (VALUES | values)[key] for key in METHODS[method].searched}
        trials = {key: [2 * value, value] for key, value in best.items()}
        trials |= {"loss": [None, 1.0], "second": [None, 0.1], "seed": [1000, 1001]}
        run = {"method": method, "domain": {key: [value / 2, 2 * value] for key, value in best.items()}}
        run |= {"updates": 4, "evaluate_on": 10, "sampler": "biased", "seed": 0, "trials": trials}
        runs.append({**run, "provenance": provenance()})
    *record.content["runs"], last = runs
    record.add(last)  # and with it the others, in one write
    return record.path
