"""Explorers in Python: what a state shows, both views, and the mathematics behind them."""

import ast
import base64
import html
import json
import math
import re
import textwrap

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from book.explorer_records import (
    DOMAIN,
    EXPLORERS,
    LANDSCAPE,
    curves_record,
    explorer,
    halved,
    plain,
    search,
    search_record,
    some_states,
)

from lab.explorers import (
    At,
    Explorer,
    First,
    Out,
    Short,
    Times,
    core,
    damping_and_alpha,
    hyperparameter_interaction,
    kfac_damping,
    live_landscape,
    race,
    regression_line,
    search_replay,
    second_order_by_eye,
    select,
    slider,
    toggle,
    whitening_by_hand,
)
from lab.explorers.core import resolve, short
from lab.explorers.damping import ALPHAS, CURVATURE, DAMPINGS, RATES
from lab.explorers.kfac import DAMPINGS as EPSILONS
from lab.explorers.kfac import EIGENVALUES
from lab.explorers.landscape import RECORD, SETTINGS, record_landscape, train_landscape
from lab.explorers.race import break_even, seconds_per_update
from lab.explorers.regression import DATA as WISHES
from lab.explorers.regression import cloud, regression_lines
from lab.explorers.replay import acceptance_maps
from lab.explorers.second_order import DATA, MINIMUM, curvature, second_order_steps
from lab.explorers.whitening import DATA as INPUTS
from lab.explorers.whitening import whitening
from sogrid.curvature import empirical_fisher, fisher, gauss_newton, hessian
from sogrid.experiments.records import Record

EVERY = pytest.mark.parametrize("name", EXPLORERS)
RELEVANT = {"race": {"axis": 1}, "interaction": {"search": 1}}
"""Where every control matters: KFAC's cost does by second, and the damping for a method that has one."""


# Leaves and states


def test_leaves():
    v = np.arange(6.0).reshape(2, 3)
    state, out = {"a": 1, "b": 2}, {"p": {"q": [7.0]}}
    assert resolve(At(v, "a", "b"), state, out) == 5
    assert resolve(At(v, At([0, 1], "a")), state, out).tolist() == [3, 4, 5]
    assert resolve(At(["no", Short(1.25)], "a"), state, out) == "1.25"
    assert resolve(First(At(v, "a"), At([0, 2], "a")), state, out).tolist() == [3, 4]
    assert resolve(Times(2, At(v, "a")), state, out).tolist() == [6, 8, 10]
    assert resolve({"x": [Out("p", "q"), 1]}, state, out) == {"x": [[7.0], 1]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-1.5, "−1.5"), (999.6, "1000"), (1e-12, "0"), (math.inf, "∞"), (0.05, "0.05"), (20.0, "20")],
)
def test_short(value, text):
    assert short(value) == text


def test_controls_start_where_they_are_told():
    assert slider("a", "a", [1, 2, 4], 2.9).start == 1
    assert slider("a", "a", [1, 2, 4]).start == 2
    assert select("a", "a", ["x", "y"], "y").start == 1
    assert toggle("a", "a", True).start == 1


def test_an_explorer_refuses_an_unknown_control():
    with pytest.raises(KeyError, match="no such control: speed"):
        explorer("damping").at(speed=1)


@EVERY
def test_every_control_changes_the_picture(name):
    found = explorer(name)
    base = RELEVANT.get(name, {})
    for control in found.controls.values():
        states = [base | {control.name: i} for i in range(len(control.words))]
        pictures = [json.dumps(plain(found.at(**state))) for state in states]
        assert len(set(pictures)) > len(pictures) // 2


@EVERY
def test_a_picture_is_valid_plotly(name):
    found = explorer(name)
    for state in some_states(found, 10):
        fig = found.figure(**state)
        assert fig.layout.meta["alt"]
        assert found.at(**state)["text"]


def test_the_modules_example_is_an_explorer():
    example = textwrap.dedent(core.__doc__.split("An explorer of one's own::")[1])
    *setup, last = ast.parse(example).body
    names = {"np": np, "At": At, "Short": Short, "Explorer": Explorer, "slider": slider, "say": core.say}
    exec(compile(ast.Module(setup, []), "example", "exec"), names)
    found = eval(compile(ast.Expression(last.value), "example", "eval"), names)
    assert found.at(lr=0)["text"] == "After 50 updates the loss is 0.613."
    assert len(found.html()) < 5000


# The view of the book


@EVERY
def test_book_view_is_labelled_small_and_whole(name, monkeypatch):
    monkeypatch.setenv("SOGRID_BOOK", "1")
    found = explorer(name)
    bundle = found._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    page = bundle["text/html"]
    assert len(page) < 200_000
    assert "<script src" not in page
    assert "http" not in page
    for control in found.controls.values():
        ids = re.findall(rf'data-control="{control.name}" id="([^"]+)"', page)
        assert len(ids) == 1
        assert f'for="{ids[0]}"' in page
    assert 'role="status"' in page
    content = json.loads(re.search('<script type="application/json">(.*?)</script>', page).group(1))
    assert all(entry["type"] in ("f4", "u1", "u2", "i4") for entry in content["arrays"])
    for entry in content["arrays"]:
        size = np.frombuffer(base64.b64decode(entry["data"]), entry["type"]).size
        assert size == math.prod(entry["shape"])


def test_two_views_of_a_page_have_their_own_names():
    first, second = (re.search('id="([^"]+)"', explorer("damping").html()).group(1) for _ in range(2))
    assert first != second


def test_an_array_that_is_used_twice_is_written_once():
    v = np.linspace(0, 1, 50)
    found = Explorer(alt="a", controls=[], traces=[{"x": v, "y": v.copy()}], layout={}, text=["t"])
    assert found.html().count('"type":"f4"') == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["race", "replay", "interaction"])
def test_records_of_the_final_size_stay_small(kind):
    if kind == "race":
        found = race(curves_record(points=60), "fig6_2")
    else:
        runs = [search(sampler=s, seed=n, count=64) for n in range(20) for s in ("grid", "random", "biased")]
        make = search_replay if kind == "replay" else hyperparameter_interaction
        found = make(search_record(*runs))
    assert len(found.html()) < 200_000


# The view of JupyterLab


@EVERY
def test_jupyterlab_view_follows_every_control(name, monkeypatch):
    monkeypatch.delenv("SOGRID_BOOK", raising=False)
    found = explorer(name)
    view = found.widget()
    assert "application/vnd.jupyter.widget-view+json" in view._repr_mimebundle_()
    for control, position in RELEVANT.get(name, {}).items():
        view.controls[control].value = position
    for control, widget in view.controls.items():
        assert widget.description == found.controls[control].label
        count, begin, seen = len(found.controls[control].words), widget.value, set()
        for i in sorted({0, 1, count // 2, count - 1}):
            widget.value = bool(i) if found.controls[control].kind == "check" else i
            assert view.state[control] == i
            _assert_shows(view, found, view.state)
            seen.add(json.dumps(plain(view.figure.to_dict()["data"])) + view.result.value)
        assert len(seen) > 1
        widget.value = begin


def _assert_shows(view, found, state):
    expected = found.figure(**state)
    drawn = [{k: v for k, v in trace.items() if k != "uid"} for trace in view.figure.to_dict()["data"]]
    assert plain(drawn) == plain(expected.to_dict()["data"])
    assert view.figure.layout.xaxis == expected.layout.xaxis
    assert view.figure.layout.yaxis == expected.layout.yaxis
    assert html.unescape(view.result.value) == found.at(**state)["text"]


def test_jupyterlab_view_is_live_where_anywidget_is(monkeypatch):
    pytest.importorskip("anywidget", reason="plotly's FigureWidget needs anywidget")
    assert isinstance(explorer("damping").widget().figure, go.FigureWidget)


def test_outside_the_book_an_explorer_is_a_widget(monkeypatch):
    monkeypatch.delenv("SOGRID_BOOK", raising=False)
    assert "text/html" not in explorer("damping")._repr_mimebundle_()


# Second order by eye


@pytest.mark.parametrize("w", [(0.5, 0.6), (-0.75, 0.75), (2.0, -1.0), (0.0, 0.0)])
def test_matrices_are_the_packages(w):
    """The network as the package has it; its two weights are the first and the third parameter."""
    from sogrid.losses import BinaryCrossEntropyAtProbabilities
    from sogrid.networks import MLP

    model = MLP([1, 1, 1], "tanh", "sigmoid", dtype=torch.float64)
    x, y = (torch.tensor(DATA[k], dtype=torch.float64)[:, None] for k in ("x", "y"))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (w[0], 0.0, w[1], 0.0), strict=True):
            parameter.fill_(value)
    loss = BinaryCrossEntropyAtProbabilities("mean")
    value, gradient, matrices = curvature(np.array(w), x[:, 0].numpy(), y[:, 0].numpy())
    assert value == pytest.approx(loss(model(x), y).item(), rel=1e-12)
    loss(model(x), y).backward()
    theirs = [float(parameter.grad) for parameter in model.parameters()]
    np.testing.assert_allclose(gradient, [theirs[0], theirs[2]], atol=1e-12)
    weights = np.ix_([0, 2], [0, 2])
    for name, matrix in {
        "newton": hessian(model, loss, x, y),
        "gauss_newton": gauss_newton(model, loss, x, y),
        "natural": fisher(model, loss, x),
    }.items():
        np.testing.assert_allclose(matrices[name], matrix.detach().numpy()[weights], atol=1e-12)
    same = empirical_fisher(model, loss, x, y).detach().numpy()[weights]  # §3.4
    np.testing.assert_allclose(matrices["gauss_newton"], same, atol=1e-12)


def test_the_marked_places_are_stationary():
    x, y = (np.array(DATA[k]) for k in ("x", "y"))
    for w in ([0, 0], MINIMUM[:2], MINIMUM[2:]):
        assert abs(curvature(np.array(w, float), x, y)[1]).max() < 1e-4
    assert np.linalg.eigvalsh(curvature(np.zeros(2), x, y)[2]["newton"])[0] < 0
    assert np.linalg.eigvalsh(curvature(np.array(MINIMUM[:2]), x, y)[2]["newton"])[0] > 0


def test_steps_solve_the_damped_system():
    values = {"w1": 0.5, "w2": 0.6, "lr": 0.7, "damping": 0.03, "steps": 1}
    out = second_order_steps(values, DATA)
    w = np.array([0.5, 0.6])
    _, gradient, matrices = curvature(w, *(np.array(DATA[k]) for k in ("x", "y")))
    for name in ("newton", "gauss_newton", "natural"):
        expected = w - 0.7 * np.linalg.solve(matrices[name] + 0.03 * np.eye(2), gradient)
        np.testing.assert_allclose([out[name]["x"][1], out[name]["y"][1]], expected, rtol=1e-10)
    expected = w - 0.7 * gradient
    np.testing.assert_allclose([out["gradient"]["x"][1], out["gradient"]["y"][1]], expected, rtol=1e-12)


def test_newton_without_damping_goes_to_the_saddle_and_the_natural_gradient_does_not():
    values = {"w1": -0.1, "w2": -0.1, "lr": 1.0, "damping": 0.0, "steps": 10}
    out = second_order_steps(values, DATA)
    assert out["indefinite"] == 1
    assert np.hypot(out["newton"]["x"][-1], out["newton"]["y"][-1]) < 1e-6
    damped = second_order_steps({**values, "damping": 0.1}, DATA)
    assert damped["natural"]["loss"] < 0.9 * out["newton"]["loss"]


def test_second_order_says_what_it_shows():
    found = second_order_by_eye()
    assert "not positive definite" in found.at()["text"]
    grid = found.controls["w1"].values
    near = {"w1": grid.index(1.25), "w2": grid.index(1.5)}
    assert found.at(**near)["text"].startswith("The Hessian is positive definite")


# Damping and α


def test_damping_draws_acps_factor_and_its_share():
    c = np.array([5.0, 1.0, 0.1, 0.01])
    found = damping_and_alpha(c)
    state = {"damping": DAMPINGS.index(0.1), "alpha": 8, "lr": RATES.index(0.5)}
    damping, alpha, lr = 0.1, ALPHAS[8], 0.5
    acp, sgd, _, share, sgd_share, best = found.at(**state)["traces"]
    factor = lr / alpha / (c + damping / alpha)
    np.testing.assert_allclose(acp["y"], factor, rtol=1e-6)
    np.testing.assert_allclose(sgd["y"], lr, rtol=1e-6)
    np.testing.assert_allclose(share["y"], CURVATURE * c * factor, rtol=1e-6)
    np.testing.assert_allclose(sgd_share["y"], CURVATURE * c * lr, rtol=1e-6)
    assert best["y"][0] == pytest.approx(1)


def test_damping_share_is_what_an_update_of_the_package_removes():
    """One ACP step of a linear layer along an eigendirection, from the package."""
    from sogrid.optimizers import acp_inverse, acp_update

    generator = torch.Generator().manual_seed(0)
    h = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    h = (h - h.mean(0)) * torch.tensor([2.0, 1.0, 0.3])
    C = h.mT @ h / len(h)
    c, U = torch.linalg.eigh(C)
    damping, alpha, lr = 0.1, 0.5, 0.2
    for i in range(3):
        error = U[:, i][None]
        g = 2 * h @ error.mT
        dW, _ = acp_update(
            g.mT @ h / len(h), g.mean(0), h.mean(0), acp_inverse(h.mean(0), C, damping / alpha),
            lr=lr, output_curvature=alpha,
        )  # fmt: skip
        removed = -float((dW * error).sum())
        share = CURVATURE * float(c[i]) * lr / alpha / (float(c[i]) + damping / alpha)
        assert removed == pytest.approx(share, rel=1e-9)


def test_damping_says_when_it_diverges():
    found = damping_and_alpha(np.array([5.0, 1.0]))
    assert "ACP diverges" in found.at(damping=0, alpha=0, lr=len(RATES) - 1)["text"]
    assert "diverges" not in found.at(lr=0)["text"]


# The line of the local criterion


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_lines_are_the_packages_updates(damping):
    """ACP with the bias term, and SGD, of a layer with one input and one output."""
    from sogrid.optimizers import acp_inverse, acp_update
    from sogrid.statistics import input_moments

    values = {"mean": 1.5, "wish": -0.4, "spread": 0.4, "damping": damping}
    h, wish = (torch.tensor(v)[:, None] for v in cloud(1.5, -0.4, 0.4))
    g, (mean, C) = -wish, input_moments(h)
    gradients = g.mT @ h / len(h), g.mean(0)
    solution = acp_update(*gradients, mean, acp_inverse(mean, C, damping), lr=1.0, bias_correction=True)
    out = regression_lines(values, WISHES)
    for name, (dW, db) in {"descent": (-gradients[0], -gradients[1]), "solution": solution}.items():
        heights = [float(dW * end + db) for end in WISHES["ends"]]
        np.testing.assert_allclose(out[name]["y"], heights, rtol=1e-10)
        assert out[name]["miss"] == pytest.approx(float((h * dW + db - wish).square().mean()), rel=1e-10)
    assert float(mean) == pytest.approx(1.5, abs=1e-3)


def test_only_gradient_descents_slope_depends_on_where_the_cloud_is():
    found = regression_line()
    near, far = (found.at(mean=i)["traces"] for i in (20, 45))
    slopes = [[trace["y"][1] - trace["y"][0] for trace in traces[1:3]] for traces in (near, far)]
    assert slopes[0][1] == pytest.approx(slopes[1][1])
    assert abs(slopes[0][0] - slopes[1][0]) > 1
    assert "worse than nothing" in found.at()["text"]


# KFAC's damping


def test_kfac_damping_says_what_is_left_and_in_how_many_directions():
    from sogrid.optimizers import kfac_inverses

    a, b = np.array([4.0, 1.0, 0.01]), np.array([1.0, 0.02])
    found = kfac_damping(a, b)
    eps = EPSILONS[8]
    for pi in (0, 1):
        inverses = kfac_inverses(
            torch.diag(torch.tensor(a)), torch.diag(torch.tensor(b)), eps, pi_correction=bool(pi)
        )
        left_a, left_b = (v.diagonal().numpy() * w for v, w in zip(inverses, (a, b), strict=True))
        few, many = (np.outer(left_a, left_b) >= 0.5).sum(), (np.outer(a, b) >= eps).sum()
        text = found.at(a=15, b=7, damping=8, pi=pi)["text"]
        assert text.endswith(f"left in {many} of the layer's 6 directions, and in {few} if split.")
        ratio = float(np.sqrt(a.mean() / b.mean())) if pi else 1.0
        p, q = EIGENVALUES[15], EIGENVALUES[7]
        share = p / (p + ratio * eps**0.5) * q / (q + eps**0.5 / ratio)
        assert f"leaves {short(100 * p * q / (p * q + eps))}% of" in text
        assert f"split damping {short(100 * share)}%" in text


def test_kfac_dampings_lines_are_where_the_share_is_left():
    found = kfac_damping(np.array([4.0, 1.0]), np.array([1.0, 0.02]))
    eps, pi = EPSILONS[4], np.sqrt(2.5 / 0.51)
    _, exact, split, labels, _ = found.at(damping=4, pi=1)["traces"]
    x, y = (np.asarray(exact[k], float).reshape(3, -1)[:, :-1] for k in "xy")
    left = np.broadcast_to([[0.1], [0.5], [0.9]], x.shape)
    np.testing.assert_allclose(x * y / (x * y + eps), left, rtol=1e-5)
    x, y = (np.asarray(split[k], float).reshape(3, -1)[:, :-1] for k in "xy")
    left = np.broadcast_to([[0.1], [0.5], [0.9]], x.shape)
    np.testing.assert_allclose(x / (x + pi * eps**0.5) * y / (y + eps**0.5 / pi), left, rtol=1e-4)
    assert labels["text"] == ["10%", "50%", "90%"]


# Whitening


def test_whitening_is_the_packages_layer_trained_by_gradient_descent():
    """A layer with the quadratic loss, and ``WhitenedLinear`` of it, by autograd."""
    from sogrid.losses import Quadratic
    from sogrid.optimizers import WhitenedLinear

    values = {"mean1": 2.0, "mean2": 1.0, "correlation": 0.7, "damping": 0.1, "lr": 0.1}
    out = whitening(values, INPUTS)
    h = torch.tensor([out["h"]["x"], out["h"]["y"]], dtype=torch.float64).T
    plain = torch.nn.Linear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(INPUTS["error"][:2]))
        plain.bias.fill_(INPUTS["error"][2])
    white = WhitenedLinear(plain)
    white.rewhiten(h, 0.1)
    effective = (h - white.mean) @ white.whitening
    found = np.array([out["white"]["x"], out["white"]["y"]]).T
    np.testing.assert_allclose(found, effective.detach().numpy(), atol=1e-10)
    target, loss = torch.zeros(len(h), 1, dtype=torch.float64), Quadratic("mean")
    for name, layer in (("h", plain), ("white", white)):
        optimizer, losses = torch.optim.SGD(layer.parameters(), 0.1), []
        for _ in range(INPUTS["updates"] + 1):
            optimizer.zero_grad()
            losses.append(loss(layer(h), target))
            losses[-1].backward()
            optimizer.step()
        np.testing.assert_allclose(
            out[name]["loss"], [float((v / losses[0]).detach()) for v in losses], rtol=1e-9
        )


def test_whitened_inputs_are_learned_in_one_step_of_a_half():
    found = whitening_by_hand()
    rates = found.controls["lr"].values
    assert found.at(lr=rates.index(0.5))["text"].endswith(" 1 with U(h − μ).")
    assert "(it diverges)" in found.at(lr=len(rates) - 1)["text"]


# Hyperparameter interaction


def test_interaction_shows_the_first_trials_and_rings_the_best():
    run = search(count=12)
    found = hyperparameter_interaction(search_record(run))
    for shown in (1, 5, 12):
        landscape, trials, ring = found.at(shown=shown - 1)["traces"]
        np.testing.assert_allclose(trials["x"], run["trials"]["lr"][:shown], rtol=1e-6)
        losses = [math.inf if v is None else v for v in run["trials"]["loss"][:shown]]
        assert np.asarray(landscape["z"]).shape == (32, 32)
        if math.isfinite(min(losses)):
            assert ring["x"][0] == pytest.approx(run["trials"]["lr"][int(np.argmin(losses))], rel=1e-6)


def test_a_stopped_trial_is_told_and_not_the_best():
    run = halved(search(count=12))
    found = hyperparameter_interaction(search_record(run))
    losses, ends = ([v or math.inf for v in run["trials"][key]] for key in ("loss", "update"))
    assert min(losses) != min(losses[::2])
    _, trials, ring = found.at(shown=11)["traces"]
    assert ring["x"][0] == pytest.approx(run["trials"]["lr"][losses.index(min(losses[::2]))], rel=1e-6)
    stopped = [end == 200 for end in ends]
    assert [symbol == 100 for symbol in trials["marker"]["symbol"]] == stopped
    assert f"{sum(stopped)} stopped on the way" in found.at(shown=11)["text"]
    assert trials["customdata"][0][2] == 400
    assert "stopped" not in hyperparameter_interaction(search_record(search())).at(shown=11)["text"]


def test_interaction_keeps_to_a_window_of_the_third_hyperparameter():
    found = explorer("interaction")
    run = search("acp", updates=400, count=12, domain={**DOMAIN, "damping": [0.001, 1.0]})
    opacity = found.at(search=1, budget=0, window=1)["traces"][1]["marker"]["opacity"]
    assert (np.array(opacity) == 1).tolist() == [v <= 0.01 for v in run["trials"]["damping"]]


def test_interaction_offers_only_what_the_records_hold():
    found = hyperparameter_interaction(search_record(search()))
    assert [c.name for c in found.controls.values() if len(c.words) > 1] == ["shown"]
    assert "window" not in found.widget().controls


def test_interaction_survives_searches_of_which_one_diverged():
    bad = search("bn")
    bad["trials"]["loss"] = [None] * 12
    found = hyperparameter_interaction(search_record(search(), bad))
    text = found.at(search=1)["text"]
    assert "12 diverged" in text
    with pytest.raises(ValueError, match="diverged"):
        hyperparameter_interaction(search_record(bad))


def test_explorers_refuse_records_of_another_kind():
    with pytest.raises(ValueError, match="no search"):
        hyperparameter_interaction(curves_record())
    with pytest.raises(ValueError, match="no learning curves"):
        race(search_record(search()))
    with pytest.raises(ValueError, match="no biased"):
        search_replay(search_record(search()))


# Race


def test_race_by_second_moves_only_kfac_with_its_cost():
    found = race(curves_record())
    state = {"axis": 1, "budget": 20}
    cheap, dear = (found.at(**state, cost=i)["traces"] for i in (0, 14))
    for a, b in zip(cheap, dear, strict=True):
        moved = not np.array_equal(a["x"], b["x"])
        assert moved == (a["legendgroup"] in ("kfac", "kfac_nat"))


def test_race_shows_evaluations_within_the_budget():
    record = curves_record()
    found, cost = race(record), seconds_per_update(record)
    assert cost["kfac"] == pytest.approx(0.0244)
    budget = found.controls["budget"]
    for axis in (0, 1):
        for i in range(len(budget.words)):
            for trace in found.at(axis=axis, budget=i)["traces"][1::2]:
                edge = found.at(axis=axis, budget=i)["layout"]["shapes"][0]["x0"]
                assert max(trace["x"]) <= edge * (1 + 1e-5) or len(trace["x"]) == 1


def test_race_without_a_clock_takes_the_runs_own_seconds():
    own, clock = (seconds_per_update(curves_record(clock=c)) for c in (False, True))
    assert own == pytest.approx(clock)


def test_race_leaves_out_what_was_never_evaluated():
    record = curves_record()
    for run in record["runs"]:
        if run["method"] == "acp":
            run.update(update=[], second=[], train=[], test=[])
    record["runs"][-1]["train"] = []
    found = race(record)
    assert {trace["legendgroup"] for trace in found.at()["traces"]} == {"kfac", "kfac_nat", "standard_sgd"}


def test_race_names_the_order_at_the_budget():
    found = race(curves_record())
    last = len(found.controls["budget"].words) - 1
    by_update = found.at(axis=0, budget=last)["text"]
    assert by_update.index("KFAC") < by_update.index("ACP")


def test_race_opens_by_seconds_and_says_how_cheap_kfac_must_be():
    """Below the cost of its sentence KFAC leads, above it does not; what was not run is not claimed."""
    found = race(curves_record())
    costs = found.controls["cost"].values
    asked = 0
    for budget in range(0, len(found.controls["budget"].words), 5):
        (limit,) = re.findall(r"KFAC leads here below ([\d.]+)%", found.at(budget=budget)["text"]) or [None]
        if limit is None:
            continue
        for i, cost in enumerate(costs):
            text = found.at(budget=budget, cost=i)["text"]
            if abs(100 * cost - float(limit)) > 1:
                assert ("s: KFAC" in text) == (100 * cost < float(limit))
                asked += 1
    assert asked > 20
    record = curves_record()
    for run in record["runs"]:
        if run["method"].startswith("kfac"):
            run["train"] = [2 * v + 100 for v in run["train"]]
    text = race(record).at()["text"]
    assert text.endswith(
        "However cheap, KFAC does not lead here within the 2,000 updates that it was run for."
    )


@pytest.mark.parametrize("budget", [0.5, 5.0, 20.0])
def test_break_even_is_where_the_race_turns(budget):
    record = curves_record(seeds=1)
    runs = {run["method"]: run for run in record["runs"]}
    kfac = runs["kfac"]
    u, loss = np.array(kfac["update"]), np.array(kfac["train"])
    rivals = [(np.array(runs[m]["second"]), runs[m]["train"]) for m in ("acp", "standard_sgd")]
    limit = break_even(u, loss, rivals, budget)
    goal = min(max(v for v in r[1][int((r[0] <= budget).sum()) - 1 :]) for r in rivals)
    for cost, leads in ((limit * 0.999, True), (limit * 1.001, False)):
        assert (loss[u * cost <= budget][-1] < goal) == leads


def test_break_even_of_what_never_leads():
    u = np.array([0, 1, 2])
    assert math.isnan(break_even(u, u * 0 + 5.0, [(np.array([0, 1]), [3, 2])], 1.0))


# Search replay


def test_acceptance_maps_are_algorithm_1s():
    from sogrid.experiments.search import Acceptance, winsorise

    run = search(sampler="biased", count=10)
    maps = acceptance_maps(run, 8)
    lr, scale = (np.log10(run["trials"][k]) for k in ("lr", "scale"))
    points = np.stack([(lr + 3) / 4, scale / 3], 1)
    costs = [math.inf if v is None else v for v in run["trials"]["loss"]]
    assert (maps[0] == 100).all()
    for n in (3, 9):
        keep = Acceptance(points[:n], winsorise(costs[:n]))
        for i, j in ((0, 0), (2, 5), (7, 3)):
            assert maps[n, j, i] == round(100 * keep(np.array([(i + 0.5) / 8, (j + 0.5) / 8])))


def test_replay_shows_the_trials_so_far_of_both():
    runs = {s: search(sampler=s) for s in ("random", "biased")}
    found = search_replay(search_record(*runs.values()))
    picture = found.at(trial=4)
    left, _, _, right, ring = picture["traces"][:5]
    np.testing.assert_allclose(left["x"], runs["random"]["trials"]["lr"][:5], rtol=1e-6)
    np.testing.assert_allclose(right["x"], runs["biased"]["trials"]["lr"][:5], rtol=1e-6)
    assert ring["x"][0] == pytest.approx(runs["biased"]["trials"]["lr"][4], rel=1e-6)
    assert picture["text"].startswith("Trial 5 of 12")
    assert picture["traces"][-1]["z"].shape == (1, 65)


def test_replays_trials_play(monkeypatch):
    found = explorer("replay")
    assert found.html().count('class="sogrid-play"') == 1
    monkeypatch.delenv("SOGRID_BOOK", raising=False)
    view = found.widget()
    (play,) = (w for w in view.children[0].children if type(w).__name__ == "Play")
    play.value = 3
    assert view.state["trial"] == 3


# Live landscape


def test_the_landscapes_live_view_trains_what_its_book_view_looks_up():
    found = explorer("landscape")
    live = found.widget().explorer
    assert live is found.live
    assert live.formula is not None
    assert found.formula is None
    for state in some_states(found, 6):
        assert plain(live.at(**state)) == plain(found.at(**state))


def test_a_landscapes_sliders_wait_until_they_are_let_go():
    controls = explorer("landscape").widget().controls
    assert not any(controls[name].continuous_update for name in ("damping", "batch", "updates"))


def test_a_landscape_draws_its_record_and_rings_the_best(tmp_path):
    record = record_landscape(tmp_path / "r.json", LANDSCAPE)
    found = live_landscape(record)
    state = {"method": 1, "damping": 1, "batch": 0, "updates": 1}
    (run,) = (r for r in record["runs"] if (r["method"], r["damping"], r["batch"]) == ("acp", 1.0, 20))
    losses = np.array(run["train"], dtype=float).reshape(2, 2, 3)[1]
    grid, ring = found.at(**state)["traces"]
    np.testing.assert_allclose(grid["z"], np.log10(losses), rtol=1e-6)
    up, across = np.unravel_index(np.nanargmin(losses), losses.shape)
    assert (ring["x"], ring["y"]) == ([across], [up])
    text = found.at(**state)["text"]
    assert text.startswith(f"Best loss {short(losses[up, across])} with λ {short(LANDSCAPE['lr'][across])}, ")
    assert "no damping" not in text
    assert found.at(**{**state, "method": 0})["text"].endswith("This optimizer has no damping.")


def test_a_landscape_leaves_blank_what_diverged(tmp_path):
    record = record_landscape(tmp_path / "r.json", LANDSCAPE)
    for run in record["runs"]:
        run["train"][-1] = run["train"][2] = None
    found = live_landscape(record)
    blank = np.isnan([found.at(updates=i)["traces"][0]["z"] for i in (0, 1)])
    assert np.argwhere(blank).tolist() == [[0, 0, 2], [1, 1, 2]]
    assert "1 diverged" in found.at()["text"]
    record["runs"][0]["train"] = [None] * len(record["runs"][0]["train"])
    assert "6 diverged" in live_landscape(record).at(method=0, batch=0)["text"]


def test_a_landscapes_record_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    path, few = tmp_path / "r.json", {**LANDSCAPE, "batch": [20], "methods": ["standard_sgd", "acp"]}
    whole = record_landscape(path, few)
    assert [run["damping"] for run in whole["runs"]] == [None, 0.001, 1.0]
    monkeypatch.setattr("lab.explorers.landscape.train_landscape", None)
    assert record_landscape(path, few) == whole


def test_the_books_landscape_is_whole_small_and_what_the_code_trains():
    """One of its grids trained again, for as long as rounding cannot have mattered yet."""
    record = Record.read(RECORD)
    settings = {k: v for k, v in record["settings"].items() if k != "data"}
    assert settings == SETTINGS
    found = live_landscape()
    assert len(found.html()) < 200_000
    assert found.at()["traces"][0]["z"].shape == (8, 8)
    run = next(r for r in record["runs"] if (r["method"], r["damping"], r["batch"]) == ("acp", 0.1, 50))
    early = {**settings, "updates": settings["updates"][:1]}
    losses = train_landscape(early, "acp", 0.1, 50)[0]
    recorded = np.array(run["train"], dtype=float).reshape(-1, 8, 8)[0]
    np.testing.assert_allclose(losses[:, :4], recorded[:, :4], rtol=2e-3)
