"""The ledger of claims: what the docstrings of the tests of claims say, and what the tests measured.

A test of a claim says in the first paragraph of its docstring which rows of THESIS.md §4 and which errata of
§7 it judges, where the claim stands, and the verdict: ``Row 5, E7, §3.1.4, FALSE: what is claimed; …``.
``true`` and ``caveat`` are the other verdicts. ``make claims`` runs the tests and writes the book's ledger.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from sogrid.experiments.records import Record, provenance

ROWS = range(1, 35)
ERRATA = range(1, 31)
FILES = ("test_thesis_claims.py", "test_thesis_claims_errata.py", "test_thesis_claims_optimizers.py")
PATH = Path(__file__).parents[1] / "book" / "results" / "claims.json"
EXPERIMENT, SETTINGS = "claims", {"precision": "float64"}
ROUNDING = 1e-8
"""Relative errors below are equality: rounding, through a matrix inverse at the worst."""

FIRST = re.compile(
    r"(?P<keys>(?:Row|E)[ ]?\d+(?:, (?:Row |E)\d+)*)"
    r"(?:, (?P<where>[^:]+?))?, (?P<verdict>true|caveat|FALSE): (?P<claim>.+)"
)


def parse(docstring: str | None) -> dict | None:
    """Rows, errata, place, verdict and claim of a docstring; None if it judges none."""
    first = " ".join((docstring or "").strip().split("\n\n")[0].split())
    found = FIRST.fullmatch(first)
    if found is None:
        return None
    keys = found["keys"].split(", ")
    return {
        "rows": [int(key[4:]) for key in keys if key.startswith("Row ")],
        "errata": [int(key[1:]) for key in keys if key.startswith("E")],
        "where": found["where"],
        "verdict": found["verdict"].lower(),
        "claim": found["claim"],
    }


def summary(measured: list[tuple[str, float]]) -> dict:
    """Of a test's numbers: the largest that is rounding, the range of the others, and those with a name."""
    errors = [value for what, value in measured if what == "relative error"]
    apart = [value for value in errors if value >= ROUNDING and math.isfinite(value)]
    named: dict[str, list[float]] = {}
    for what, value in measured:
        if what != "relative error":
            named.setdefault(what, []).append(value)
    return {
        "equal": max((_short(v) for v in errors if v < ROUNDING), default=None),
        "apart": [_short(min(apart)), _short(max(apart))] if apart else None,
        "misfits": math.inf in errors,  # shapes differ, or not finite
        "measured": {what: [_short(min(values)), _short(max(values))] for what, values in named.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.2g}")


class Recorder:
    """Pytest plugin: writes the ledger when all tests have passed."""

    def __init__(self, path: Path) -> None:
        self.path, self.claims, self.measured = path, {}, {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            claim = parse(item.function.__doc__) if hasattr(item, "function") else None
            if claim is not None:
                self.claims[f"{item.path.name}::{item.originalname}"] = claim

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            name = re.sub(r"\[.*", "", report.nodeid).rsplit("/", 1)[-1]
            self.measured.setdefault(name, []).extend(report.user_properties)

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus != 0:
            return
        claims = [
            {**claim, "test": name, **summary(self.measured[name])}
            for name, claim in sorted(self.claims.items(), key=_order)
        ]
        self.path.unlink(missing_ok=True)
        Record(self.path, EXPERIMENT, SETTINGS).add({"provenance": provenance(), "claims": claims})


def _order(entry: tuple[str, dict]) -> tuple:
    _, claim = entry  # tests of one row stay in the order of their file
    return min(claim["rows"], default=99), min(claim["errata"], default=99) if not claim["rows"] else 0


def read(path: Path) -> list[dict]:
    """The claims of a ledger."""
    (run,) = Record.read(path)["runs"]
    return run["claims"]
