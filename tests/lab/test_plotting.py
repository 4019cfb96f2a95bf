"""The book's figures: colours that can be told apart, compact numbers, one renderer for two places."""

import base64
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from lab import plotting
from sogrid.experiments import benchmarks, tuning
from sogrid.experiments.reference import thesis_values

VISION = {  # linear RGB as seen, full severity (Machado, Oliveira and Fernandes 2009)
    "normal": np.eye(3),
    "red-blind": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "green-blind": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
}
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
XYZ = np.array([[0.4124, 0.3576, 0.1805], LUMINANCE, [0.0193, 0.1192, 0.9505]])


def linear(code: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    c = np.array(list(bytes.fromhex(code[1:]))) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    t = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: float, b: float) -> float:
    """WCAG contrast of two luminances."""
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@pytest.mark.parametrize("name", plotting.COLORS)
@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_colours_stand_out_on_both_pages(name, page):
    code = plotting.COLORS[name]
    assert contrast(LUMINANCE @ linear(code), LUMINANCE @ linear(page)) >= 3


@pytest.mark.parametrize("name", plotting.COLORS)
def test_lines_stand_out_on_the_dark_page(name):
    """Where the style sheet makes them brighter."""
    css = (Path(plotting.__file__).parents[1] / "_assets/css/sogrid-book.css").read_text(encoding="utf-8")
    (factor,) = re.findall(r"filter: brightness\(([\d.]+)\)", css)
    (page,) = re.findall(r'"dark"\] \{[^}]*--sogrid-paper: (#\w+)', css)
    bright = [min(255, round(float(factor) * v)) for v in bytes.fromhex(plotting.COLORS[name][1:])]
    line, paper = (LUMINANCE @ linear(code) for code in (f"#{bytes(bright).hex()}", page))
    assert contrast(line, paper) >= 4.5


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart(vision):
    seen = [lab(np.array(VISION[vision]) @ linear(code)) for code in plotting.COLORS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 20


def test_methods_differ_by_colour_or_dash():
    looks = {plotting.looks(method)[1:] for method in benchmarks.METHODS}
    assert len(looks) == len(benchmarks.METHODS)
    assert len({plotting.looks(method).name for method in benchmarks.METHODS}) == len(benchmarks.METHODS)


def test_style_is_a_scatter():
    trace = go.Scatter(x=[0], y=[0], **plotting.style("kfac_nat"))
    assert (trace.name, trace.line.color, trace.line.dash) == ("KFAC, Fisher", "#1754fb", "dash")


def test_every_method_that_is_run_or_quoted_has_a_style():
    quoted = {m for f in ("fig5_1", "fig6_1", "fig6_2", "fig6_3") for m in thesis_values(f)["methods"]}
    for method in {*quoted, *benchmarks.METHODS, *tuning.SAMPLERS}:
        name, palette, dash = plotting.looks(method)
        assert name
        assert palette in plotting.COLORS
        assert go.Scatter(line={"dash": dash}).line.dash == dash


def test_what_is_no_method_has_no_style():
    with pytest.raises(KeyError, match="sgd"):
        plotting.style("sgd")


def test_compact_keeps_values_to_float32():
    x = np.linspace(0, 1, 50)
    short = plotting.compact(go.Figure(go.Scatter(x=x)).to_dict())["data"][0]["x"]
    assert short["dtype"] == "f4"
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(short["bdata"]), np.float32), x, rtol=1e-7)


def test_compact_keeps_what_float32_cannot_hold():
    huge = go.Figure(go.Scatter(x=np.array([1.0, 1e60]))).to_dict()
    assert plotting.compact(huge)["data"][0]["x"]["dtype"] == "f8"


def test_figure_needs_an_alt_text():
    with pytest.raises(ValueError, match="alt text"):
        plotting.figure([], alt=" ")


def test_outside_the_book_a_figure_is_plotlys_own(monkeypatch):
    monkeypatch.delenv("SOGRID_BOOK", raising=False)
    fig = plotting.figure([go.Scatter(y=[1, 2])], alt="A line.")
    bundle = pio.renderers["sogrid"].to_mimebundle(fig.to_dict())
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/plain"}
    assert bundle["text/plain"] == "A line."


def test_in_the_book_a_figure_is_labelled_json(monkeypatch):
    monkeypatch.setenv("SOGRID_BOOK", "1")
    trace = go.Scatter(y=[1, 2], name="</script><b>")
    fig = plotting.figure([trace], alt='A "line" that\n rises.', height=300, width=500)
    html = pio.renderers["sogrid"].to_mimebundle(fig.to_dict())["text/html"]
    assert 'role="img" aria-label="A &quot;line&quot; that rises."' in html
    assert "--sogrid-height: 300px" in html
    content = json.loads(re.search('<script type="application/json">(.*?)</script>', html).group(1))
    assert content["data"][0]["name"] == "</script><b>"
    assert not {"height", "width", "meta"} & set(content["layout"])
    assert len(html) < 3000


def test_in_the_book_a_figure_without_alt_text_is_refused(monkeypatch):
    monkeypatch.setenv("SOGRID_BOOK", "1")
    with pytest.raises(ValueError, match="no alt text"):
        pio.renderers["sogrid"].to_mimebundle(go.Figure().to_dict())


@pytest.mark.parametrize(
    ("environment", "first", "expected"),
    [
        ({"SOGRID_BOOK": "1"}, "", "sogrid"),
        ({}, "pio.renderers.default = 'plotly_mimetype'", "sogrid"),
        ({}, "pio.renderers.default = 'json'", "json"),
        ({"PLOTLY_RENDERER": "plotly_mimetype"}, "", "plotly_mimetype"),
    ],
)
def test_default_renderer_is_ours_only_if_no_other_was_asked_for(environment, first, expected):
    code = f"import plotly.io as pio\n{first}\nimport lab.plotting\nprint(pio.renderers.default)"
    clean = {k: v for k, v in os.environ.items() if k not in ("SOGRID_BOOK", "PLOTLY_RENDERER")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected
