"""The book's ledger of claims: complete, up to date, and what the tests measure."""

import json
import re

import ledger
import pytest
from children import Child
from ledger import ERRATA, FILES, PATH, ROUNDING, ROWS

from sogrid.experiments.records import Record

NOT_BY_NUMBERS = {
    24: "a symbol that is not defined: §3.1.5 writes C for the risk R, which only reading shows"
}
"""Errata without a test, and why."""

PYTEST = "import pytest, sys; sys.exit(pytest.main())"


@pytest.fixture(scope="module")
def claims():
    return ledger.read(PATH)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The ledger of the tests as they are now, in a process of their own."""
    path = tmp_path_factory.mktemp("ledger") / "claims.json"
    tests = [str(PATH.parents[2] / "tests" / name) for name in FILES]
    with Child(PYTEST, "-q", "-p", "no:cacheprovider", "--ledger", path, *tests) as child:
        out, _ = child.communicate(timeout=300)
    assert child.returncode == 0, out[-3000:]
    return ledger.read(path)


def test_every_row_and_every_erratum_has_a_test(claims):
    assert {row for claim in claims for row in claim["rows"]} == set(ROWS)
    errata = {number for claim in claims for number in claim["errata"]}
    assert errata | set(NOT_BY_NUMBERS) == set(ERRATA)
    assert not errata & set(NOT_BY_NUMBERS), "it has a test after all"


def test_every_claim_says_where_it_stands(claims):
    assert all(claim["where"] and claim["claim"].rstrip() for claim in claims)


def test_what_was_measured_supports_the_verdict(claims):
    """A true claim has an error that is rounding, or numbers with a name; a false one, a difference."""
    for claim in claims:
        seen = claim["equal"] is not None or claim["measured"]
        if claim["verdict"] != "true":
            seen = seen or claim["apart"] or claim["misfits"]
        assert seen, claim["test"]


def test_ledger_is_up_to_date(claims, fresh):
    """Same tests, places, words and verdicts; errors that are rounding stay so, the others to 10 %."""
    words = ("test", "rows", "errata", "where", "verdict", "claim", "misfits")
    assert [[c[w] for w in words] for c in claims] == [[c[w] for w in words] for c in fresh], (
        "run make claims"
    )
    for old, new in zip(claims, fresh, strict=True):
        assert (old["equal"] is None) == (new["equal"] is None), old["test"]
        assert max(old["equal"] or 0.0, new["equal"] or 0.0) < ROUNDING
        assert (old["apart"] or []) == pytest.approx(new["apart"] or [], rel=0.1), old["test"]
        assert old["measured"].keys() == new["measured"].keys()
        for what, ends in old["measured"].items():
            assert ends == pytest.approx(new["measured"][what], rel=0.1, abs=1e-10), (old["test"], what)


def test_nothing_is_written_when_a_test_fails(tmp_path):
    (tmp_path / "test_one.py").write_text(
        'def test_it():\n    """Row 1, §1, true: no."""\n    assert False\n'
    )
    (tmp_path / "conftest.py").write_text((PATH.parents[2] / "tests" / "conftest.py").read_text())
    path = tmp_path / "claims.json"
    options = ["-q", "--ledger", path, "--rootdir", tmp_path, "-c", "/dev/null", "-o"]
    options += [f"pythonpath={PATH.parents[2] / 'tests'}", tmp_path / "test_one.py"]
    with Child(PYTEST, *options) as child:
        out, err = child.communicate(timeout=300)
    assert "1 failed" in out, out + err
    assert not path.exists()


def test_numbers_are_summarised():
    found = ledger.summary(
        [("relative error", 1e-16), ("relative error", 0.5), ("relative error", 2.0), ("order", 1.99)]
    )
    assert found == {"equal": 1e-16, "apart": [0.5, 2.0], "misfits": False, "measured": {"order": [2.0, 2.0]}}
    assert ledger.summary([("relative error", float("inf"))])["misfits"]


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("Row 5, E7, §3.1.4, FALSE: no; yes.\n\n    More.", ([5], [7], "§3.1.4", "false", "no; yes.")),
        ("Row 18, E11, (6.1.1) (6.1.2), true: a\n    b.", ([18], [11], "(6.1.1) (6.1.2)", "true", "a b.")),
        ("E8, §3.4, caveat: x: y.", ([], [8], "§3.4", "caveat", "x: y.")),
    ],
)  # fmt: skip
def test_docstrings_are_parsed(docstring, found):
    assert tuple(ledger.parse(docstring).values()) == found


@pytest.mark.parametrize("docstring", [None, "", "§5.5, true: no row.", "Row 5: no verdict.", "Other text."])
def test_docstrings_that_judge_no_row_are_not_parsed(docstring):
    assert ledger.parse(docstring) is None


def test_no_docstring_is_nearly_in_the_format():
    """A docstring that begins as a claim's is one."""
    for name in FILES:
        text = (PATH.parents[2] / "tests" / name).read_text(encoding="utf-8")
        for docstring in re.findall(r'def test_.*?\n    """(.*?)"""', text, flags=re.S):
            assert not re.match(r"(Row|E)s? ?\d", docstring) or ledger.parse(docstring), docstring


def test_ledger_names_its_machine():
    (run,) = Record.read(PATH)["runs"]
    assert run["provenance"]["versions"]["torch"]
    assert json.dumps(run["claims"])
