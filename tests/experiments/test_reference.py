from itertools import pairwise

import pytest

from sogrid.experiments.reference import thesis_values

FIGURES = ("fig5_1", "fig6_1", "fig6_2", "fig6_3")
LEGENDS = {
    "standard_sgd",
    "centered_gradient_descent",
    "mean_only_bn",
    "bn",
    "acp_fixedalpha",
    "acp",
    "nnn2",
    "kfac",
    "kfac_nat",
    "jaco_update",
}


@pytest.mark.parametrize("figure", FIGURES)
def test_every_method_has_every_value(figure):
    values = thesis_values(figure)
    methods = values["methods"]
    assert "standard_sgd" in methods
    assert len(set(methods)) == len(methods)
    assert list(values["headline"]) == methods
    assert len({frozenset(row) for row in values["headline"].values()}) == 1, "same columns for all methods"
    for curve in values["curves"].values():
        assert list(curve["y"]) == methods
        assert all(a < b for a, b in pairwise(curve["x"]))
        for y in curve["y"].values():
            assert len(y) == len(curve["x"])
            assert all(value is None or 0 <= value < 300 for value in y)


def test_methods_are_the_legends():
    assert set().union(*(thesis_values(figure)["methods"] for figure in FIGURES)) == LEGENDS


@pytest.mark.parametrize("figure", FIGURES[1:])
def test_ratios_follow_from_the_total_times(figure):
    headline = thesis_values(figure)["headline"]
    for row in headline.values():
        expected = row["total_seconds"] / headline["standard_sgd"]["total_seconds"]
        assert row["ratio_to_sgd"] == pytest.approx(expected, rel=0.01)  # printed with three digits


def test_figures_6_1_and_6_2_share_their_common_curves():
    one, two = (thesis_values(figure)["curves"]["test_mse_by_second"]["y"] for figure in FIGURES[1:3])
    assert {m: one[m] for m in one.keys() & two.keys()} == {m: two[m] for m in one.keys() & two.keys()}
    assert one.keys() & two.keys() == {"standard_sgd", "acp_fixedalpha"}


def test_known_values():
    ae, cifar, ubp = (thesis_values(figure) for figure in ("fig6_2", "fig6_3", "fig5_1"))
    assert ae["curves"]["train_mse_by_update"]["y"]["acp"][:4] == [271, 35.9, 12.0, 8.10]
    assert ae["headline"]["nnn2"]["total_seconds"] == 13941
    assert ae["headline"]["standard_sgd"]["seconds_to_train_mse_2"] is None
    assert cifar["curves"]["train_cross_entropy_by_update"]["y"]["kfac_nat"][-2:] == [None, None]
    assert cifar["headline"]["kfac_nat"]["seconds_to_train_error_1_percent"] == 81
    assert ubp["curves"]["train_mse_by_update"]["y"]["jaco_update"][-1] == 17.3
    assert ubp["headline"]["jaco_update"] == {"ratio_to_sgd": 10}


def test_unknown_figure_raises():
    with pytest.raises(ValueError, match=r"figure must be one of .*fig6_3.*got 'fig7_1'"):
        thesis_values("fig7_1")


def test_values_are_the_callers_own():
    thesis_values("fig6_1")["methods"].clear()
    assert thesis_values("fig6_1")["methods"]
