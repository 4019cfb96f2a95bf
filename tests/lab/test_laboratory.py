"""The Laboratory computes what sogrid does: the golden file, and the engine where Node is installed.

What a browser makes of it is in ``tests/book/test_laboratory.py``.
"""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lab.laboratory import HERE, METHODS, SCRIPTS, SLIDERS, laboratory
from lab.laboratory.reference import DEFAULTS, GOLDEN_FILE, RUNS, losses
from lab.laboratory.tasks import LEVELS, TASKS, Stream, digits, one_of_each

GOLDEN = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
NODE = shutil.which("node")
FEW = 24
NAMES = [f"{i}-{task}-{options.get('method', 'sgd')}" for i, (task, options) in enumerate(RUNS)]


@pytest.mark.parametrize("number", range(len(RUNS)), ids=NAMES)
def test_golden_losses_are_those_of_sogrid(number):
    task, options = RUNS[number]
    golden = GOLDEN["runs"][number]
    assert golden["task"] == task
    assert golden["options"] == DEFAULTS | options
    assert losses(task, options, FEW) == pytest.approx(golden["losses"][:FEW], rel=1e-4)


def test_every_method_is_compared_on_both_tasks():
    compared = {(run["task"], run["options"]["method"]) for run in GOLDEN["runs"]}
    assert compared == {(task, method.engine) for task in TASKS for method in METHODS.values()}
    assert all(len(run["losses"]) == GOLDEN["updates"] == 100 for run in GOLDEN["runs"])
    varied = {
        key for run in GOLDEN["runs"] for key, value in run["options"].items() if value != DEFAULTS[key]
    }
    assert varied == DEFAULTS.keys()


@pytest.fixture(scope="module")
def engine(draw_once):
    """What the engine computes in Node."""
    if NODE is None:
        pytest.skip("no Node on the PATH")
    runs = [run | {"updates": FEW // 2} for run in GOLDEN["runs"]]
    shapes = ("sizes", "hidden", "output", "loss")
    tasks = {
        name: {shape: getattr(make(), shape) for shape in shapes}
        | {"x": make().x.tolist(), "y": make().y.tolist()}
        for name, make in TASKS.items()
    }
    content = {
        **{"source": (HERE / "engine.js").read_text(encoding="utf-8"), "tasks": tasks, "runs": runs},
        **{"seed": GOLDEN["seed"], **draw_once},
    }
    harness = Path(__file__).with_name("laboratory.mjs")
    done = subprocess.run(
        [NODE, str(harness)], input=json.dumps(content), capture_output=True, text=True, timeout=120
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def draw_once():
    """Matrices of odd and even sizes to multiply, and some to invert."""
    normal = np.random.default_rng(2017).standard_normal
    rows = [(normal((n, m)), 10.0**-n) for n, m in ((1, 1), (2, 5), (7, 4), (6, 6))]
    return {
        "products": [
            (normal((n, k)).tolist(), normal((k, m)).tolist())
            for n, k, m in ((1, 1, 1), (2, 3, 4), (5, 4, 3), (7, 1, 9))
        ],
        "inverses": [((R.T @ R).tolist(), shift) for R, shift in rows] + [([[1.0, 2.0], [2.0, 1.0]], 0.5)],
    }


def test_the_engine_multiplies_matrices(engine, draw_once):
    for (a, b), found in zip(draw_once["products"], engine["products"], strict=True):
        np.testing.assert_allclose(found, np.array(a) @ b, rtol=1e-5, atol=1e-6)


def test_the_engine_inverts_what_is_positive_definite(engine, draw_once):
    *sound, indefinite = zip(draw_once["inverses"], engine["inverses"], strict=True)
    for (matrix, shift), found in sound:
        shifted = np.float32(matrix) + shift * np.eye(len(matrix))
        np.testing.assert_allclose(found @ shifted, np.eye(len(matrix)), atol=1e-3)
    assert indefinite[1] == [[None, None], [None, None]]  # NaN


@pytest.mark.parametrize("number", range(len(RUNS)), ids=NAMES)
def test_the_engine_trains_as_sogrid_does(engine, number):
    golden = GOLDEN["runs"][number]["losses"][: FEW // 2]
    assert engine["losses"][number] == pytest.approx(golden, rel=1e-4)


def test_streams_are_uniform_and_normal():
    stream = Stream(3, 1)
    uniform, normal = stream.uniform(10_000), stream.normal(10_000)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.003)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.03)
    assert np.corrcoef(uniform[:-1], uniform[1:])[0, 1] == pytest.approx(0, abs=0.03)
    assert not set(Stream(3, 2).uniform(100)) & set(uniform)


def test_digits_are_pooled_and_balanced():
    assert digits().shape == (1000, 196)
    assert digits().max() == LEVELS - 1
    assert len(set(one_of_each())) == 10


def test_page_and_engine_are_small():
    """150 kB at most for what computes and draws; the digits come on top."""
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "laboratory.css"))
    assert len(gzip.compress(code.encode())) < 20_000
    assert len(gzip.compress(laboratory().html().encode())) < 100_000


def test_menus_begin_with_values_that_sliders_have():
    for method in METHODS.values():
        for options in (method.digits, method.crescents):
            assert all(value in SLIDERS[name][1] for name, value in options.items())


def test_two_of_them_on_a_page_are_two():
    first, second = laboratory(), laboratory()
    assert first.key != second.key
    assert f'id="{first.key}"' in first.html()
    assert "[[" not in first.html().split("<script", 1)[0]
