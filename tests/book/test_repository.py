"""What is in git is small, and CI on GitHub proves what ``.ci/run`` proves."""

import os
import subprocess

import pytest
import yaml
from book.test_pages import ROOT

FILE_BYTES = 1_000_000
LARGE = {"sogrid/experiments/digits/train-images-idx3-ubyte.gz": 1_700_000}
"""The digits that let everything run without a network."""


def test_no_file_in_git_is_large():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("not a git repository")
    files = [name for name in git.stdout.split("\0") if (ROOT / name).is_file()]
    assert len(files) > 100
    assert not [f for f in files if (ROOT / f).stat().st_size > LARGE.get(f, FILE_BYTES)]


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]


def test_the_workflow_runs_what_ci_runs_and_nothing_else(jobs):
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_only_a_book_that_passed_on_main_is_published(jobs):
    publish = jobs["publish"]
    (upload,) = (s for s in jobs["check"]["steps"] if "upload-pages-artifact" in s.get("uses", ""))
    assert upload["with"]["path"] == "_build/html"
    assert publish["needs"] == "check"
    assert publish["if"] == upload["if"] == "github.event_name == 'push' && github.ref == 'refs/heads/main'"
