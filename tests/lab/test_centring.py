"""When does centring pay? The theorem of the page in float64, and how its experiment judges."""

import math

import pytest
import references
import torch
from studies import require_whole

from lab.centring import (
    CASES,
    CENTRING,
    METHODS,
    NEWTON_MUON,
    ORTHOGONALISED,
    Comparison,
    MeanTwice,
    OwnCovariance,
    PreviousMean,
    by_damping,
    centred,
    distances,
    mean_shares,
    orthogonalised,
    ratios,
    recorded,
    verdict,
)
from lab.rivals import foof_update
from sogrid.method import Gradient
from sogrid.optimizers import ACP
from sogrid.optimizers.acp import acp_inverse, acp_update
from sogrid.structured import Factored

ROUNDING = 1e-10
n, n_in, n_out, lr = 40, 5, 3, 0.7


class Seen:
    """Inputs and gradients of a layer, and everything that the theorem names, by loops."""

    def __init__(self, draw, mean, damping=0.0):
        self.h, self.g = draw(n, n_in), draw(n, n_out) + 0.5
        self.h = self.h - self.h.mean(0) + mean
        self.grad_w = sum(torch.outer(g, h) for g, h in zip(self.g, self.h, strict=True)) / n
        self.grad_b, self.mean = self.g.mean(0), self.h.mean(0)
        self.M = sum(torch.outer(h, h) for h in self.h) / n
        self.C = self.M - torch.outer(self.mean, self.mean)
        self.d, eye = damping, torch.eye(n_in, dtype=torch.float64)
        self.P = torch.linalg.inv(self.C + damping * eye)
        self.m2 = float(self.mean @ self.P @ self.mean)
        self.gamma = self.grad_w - torch.outer(self.grad_b, self.mean)
        self.centred = acp_update(
            self.grad_w, self.grad_b, self.mean, self.P, lr=lr, output_curvature=1.0, bias_correction=True
        )
        self.apart = foof_update(self.grad_w, self.grad_b, torch.linalg.inv(self.M + damping * eye), lr=lr)

    def with_constant(self, penalty):
        """−λ [∇W, ∇b] (A + diag(d, …, d, penalty))⁻¹."""
        tilde = torch.cat([self.h, torch.ones(n, 1, dtype=torch.float64)], 1)
        shift = torch.diag(torch.tensor([self.d] * n_in + [penalty], dtype=torch.float64))
        gradient = torch.cat([self.grad_w, self.grad_b[:, None]], 1)
        step = -lr * gradient @ torch.linalg.inv(tilde.mT @ tilde / n + shift)
        return step[:, :-1], step[:, -1]

    def missed(self, step):
        """Mean over examples of ‖ΔW h + Δb + λg‖², the local criterion without damping."""
        dw, db = step
        return sum((dw @ h + db + lr * g).square().sum() for h, g in zip(self.h, self.g, strict=True)) / n


def error(found, expected):
    return references.relative_error(*(torch.cat([p.flatten() for p in step]) for step in (found, expected)))


@pytest.fixture(params=[0.0, 0.3])
def seen(request, draw):
    return Seen(draw, 1.0 + draw(n_in), request.param)


def test_with_the_constant_uncentred_is_centred(seen):
    """Part 1: h̃ = [h; 1], damping that spares the bias."""
    assert error(seen.with_constant(0.0), seen.centred) < ROUNDING


def test_damping_the_constant_too_is_the_exact_form_of_acp(seen):
    inverse = acp_inverse(seen.mean, seen.C, seen.d, "exact")
    options = {"lr": lr, "output_curvature": 1.0, "bias_correction": True, "corner": seen.d}
    exact = acp_update(seen.grad_w, seen.grad_b, seen.mean, inverse, **options)
    assert error(seen.with_constant(seen.d), exact) < ROUNDING
    assert (error(exact, seen.centred) < ROUNDING) == (seen.d == 0)


def test_without_it_the_weights_take_over_the_bias(seen):
    """Part 2: ΔW(uncentred) = ΔW(centred) + Δb(centred) h̄ᵀP / (1 + m²)."""
    dw, db = seen.centred
    expected = dw + torch.outer(db, seen.mean @ seen.P) / (1 + seen.m2)
    assert references.relative_error(seen.apart[0], expected) < ROUNDING
    assert references.relative_error(dw, expected) > 0.1


def test_the_mean_moves_twice(seen):
    """Part 3: the mean pre-activation moves by −λ ḡ, or by that and what the weights do of it."""
    dw, db = seen.centred
    assert references.relative_error(dw @ seen.mean + db, -lr * seen.grad_b) < ROUNDING
    dw, db = seen.apart
    again = (seen.gamma @ seen.P @ seen.mean + seen.m2 * seen.grad_b) / (1 + seen.m2)
    assert references.relative_error(dw @ seen.mean + db, -lr * (seen.grad_b + again)) < ROUNDING


def test_by_another_mean_it_moves_further(seen, draw):
    """Centred by μ: by −λ[(1 + δᵀPδ) ḡ + ΓPδ], δ = h̄ − μ."""
    apart = draw(n_in)
    options = {"lr": lr, "bias_correction": True}
    dw, db = acp_update(seen.grad_w, seen.grad_b, seen.mean - apart, seen.P, **options)
    expected = -lr * ((1 + apart @ seen.P @ apart) * seen.grad_b + seen.gamma @ seen.P @ apart)
    assert references.relative_error(dw @ seen.mean + db, expected) < ROUNDING


def test_far_from_zero_it_moves_exactly_twice(draw):
    far = Seen(draw, 1e5 * (1.0 + draw(n_in)))
    dw, db = far.apart
    assert references.relative_error(dw @ far.mean + db, -2 * lr * far.grad_b) < 1e-3


def test_how_far_each_fit_misses(draw):
    """Part 3: excess of the local criterion, with the bias by its gradient and without one."""
    seen = Seen(draw, 1.0 + draw(n_in))
    q = seen.grad_b - seen.gamma @ seen.P @ seen.mean
    least = seen.missed(seen.centred)
    own = q.square().sum() * seen.m2 / (1 + seen.m2) ** 2 + (seen.grad_b - q / (1 + seen.m2)).square().sum()
    excess = seen.missed(seen.apart) - least
    assert references.relative_error(excess, lr**2 * own) < ROUNDING
    without = seen.missed((seen.apart[0], torch.zeros(n_out, dtype=torch.float64))) - least
    assert references.relative_error(without, lr**2 * q.square().sum() / (1 + seen.m2)) < ROUNDING


def test_no_mean_no_difference(draw):
    seen = Seen(draw, 0.0, 0.2)
    assert error(seen.apart, seen.centred) < ROUNDING


def spectrum(seen, preconditioner):
    tilde = torch.cat([seen.h, torch.ones(n, 1, dtype=torch.float64)], 1)
    return torch.linalg.eigvals(preconditioner @ tilde.mT @ tilde / n)


def test_condition_number_of_a_linear_layer(draw):
    """Part 4: eigenvalues 1 ± ρ, ρ² = m²/(1 + m²), all others 1; centred, all are 1."""
    seen = Seen(draw, 1.0 + draw(n_in))
    apart = torch.block_diag(torch.linalg.inv(seen.M), torch.ones(1, 1, dtype=torch.float64))
    found = spectrum(seen, apart).real.sort().values
    rho = math.sqrt(seen.m2 / (1 + seen.m2))
    expected = torch.tensor([1 - rho, *[1.0] * (n_in - 1), 1 + rho], dtype=torch.float64)
    assert references.relative_error(found, expected) < ROUNDING
    condition = float(found[-1] / found[0])
    assert condition == pytest.approx((1 + rho) ** 2 * (1 + seen.m2))
    assert 1 + seen.m2 <= condition <= 4 * (1 + seen.m2)


def test_printed_algorithm_4_takes_two_steps(draw):
    """Without the bias term the error is not zero after one step of λ = 1, but after two."""
    seen = Seen(draw, 1.0 + draw(n_in))
    W, b, target = draw(n_out, n_in), draw(n_out), seen.h @ draw(n_in, n_out) + draw(n_out)
    sizes = []
    for _ in range(2):
        g = seen.h @ W.mT + b - target  # of ½‖a − y‖²
        dw, db = acp_update(g.mT @ seen.h / n, g.mean(0), seen.mean, seen.P, lr=1.0, output_curvature=1.0)
        W, b = W + dw, b + db
        sizes.append(float((seen.h @ W.mT + b - target).norm() / target.norm()))
    assert sizes[0] > 0.1
    assert sizes[1] < ROUNDING


# -- the experiment --------------------------------------------------------------------------------------


def comparison(centred, uncentred):
    losses = {"centred": centred, "uncentred": uncentred}
    return Comparison("tanh", {}, losses, {name: [1.0, 2.0] for name in METHODS})


CENTRED = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02]


def test_verdicts():
    assert (
        verdict(comparison(CENTRED, [1.2 * v + 0.01 * (i % 2) for i, v in enumerate(CENTRED)]))[0] == "pays"
    )
    word, ratio, p = verdict(comparison(CENTRED, [0.8 * v + 0.01 * (i % 2) for i, v in enumerate(CENTRED)]))
    assert word == "costs"
    assert 0.79 < ratio < 0.83
    assert p < 0.01
    assert verdict(comparison(CENTRED, CENTRED[::-1]))[0] == "no difference shown"


def test_who_diverges_is_not_ahead():
    uncentred = [1.2 * v + 0.01 * (i % 2) for i, v in enumerate(CENTRED)]
    assert verdict(comparison([math.inf, *CENTRED[1:]], uncentred))[0] == "no difference shown"
    assert verdict(comparison(CENTRED, [math.inf, *uncentred[1:]]))[0] == "pays"


def test_all_are_searched_alike():
    few = {"updates": 3, "bounds": (0.05, 0.1), "dampings": (0.1, 1.0), "seeds": (1, 2), "search_seeds": (3,)}
    found = {method: centred("tanh", method, **few) for method in METHODS}
    assert all(len(t.searched) == 4 and len(t.losses) == 2 for t in found.values())
    assert len({t.losses[0] for t in found.values()}) == len(METHODS)


def test_the_record_is_whole():
    found = recorded(require_whole(CENTRING))
    assert [c.case for c in found] == list(CASES)
    assert all(c.losses.keys() == c.settings.keys() == METHODS.keys() for c in found)
    assert ratios(found).layout.meta["alt"]
    assert len(by_damping(found).data) == len(CASES)
    assert min(found[0].by_damping["centred"]) == min(CENTRING.read()["runs"][0]["searched"])


class Layer:
    """A layer's minibatches, as a method of :data:`METHODS` sees them."""

    def __init__(self, draw):
        self.draw, self.inverse = draw, torch.linalg.inv(torch.cov(draw(20, n_in).mT))
        self.state = {"inverse": self.inverse}
        self.group = ACP(torch.nn.Linear(n_in, n_out), lr, damping=0.0).param_groups[0]

    def step(self, method):
        """(h, g, ΔW, Δb) of an update."""
        h, g = self.draw(n, n_in) + 1, self.draw(n, n_out) + 0.5
        gradient = Gradient(Factored(g, h, 1 / n), g.mean(0), h.mean(0))
        dw, db = method.update(gradient, self.state, self.group)
        return h, g, dw.dense() if isinstance(dw, Factored) else dw, db


def test_the_mean_twice(draw):
    layer = Layer(draw)
    h, g, dw, db = layer.step(MeanTwice())
    assert references.relative_error(dw @ h.mean(0) + db, -2 * lr * g.mean(0)) < ROUNDING


def test_the_mean_of_the_update_before(draw):
    layer, method = Layer(draw), PreviousMean()
    before = layer.step(method)[0]
    h, g, *found = layer.step(method)
    means = g.mT @ h / n, g.mean(0), before.mean(0)
    assert error(found, acp_update(*means, layer.inverse, lr=lr, bias_correction=True)) < ROUNDING


def test_the_covariance_of_the_update_itself(draw):
    """Mean and covariance of one minibatch: the least-squares fit to −λg on it, by torch.linalg.lstsq."""
    h, g, dw, db = Layer(draw).step(OwnCovariance())
    tilde = torch.cat([h, torch.ones(n, 1, dtype=h.dtype)], 1)
    fit = torch.linalg.lstsq(tilde, -lr * g).solution
    assert error((dw, db), (fit[:-1].mT, fit[-1])) < ROUNDING


def test_shares_of_the_mean():
    """With much damping all of a step is the mean's that damping does not reach; moved twice, it has more."""
    small, large = (mean_shares("tanh", damping, seeds=(1, 2)) for damping in (0.001, 1e6))
    assert small.keys() == METHODS.keys()
    assert all(0 < share <= 1 for shares in small.values() for share in shares)
    assert all(twice > once for twice, once in zip(small["twice"], small["centred"], strict=True))
    assert min(large["centred"]) > 0.999 > max(small["centred"])


def test_cases_differ_in_their_means():
    """m² of the first layer's inputs: none without the pixels' mean, and most of dark digits on white."""
    first = {case: distances(case, 0.1)[0] for case in CASES}
    assert first["tanh, no mean"] < 0.1 < 5 < first["tanh"] < first["tanh, inverted"]


# -- Newton-Muon -----------------------------------------------------------------------------------------


def test_both_newton_muons_are_searched_alike():
    few = {"updates": 3, "rates": (0.05, 0.1), "ridges": (1.0,), "seeds": (1, 2), "search_seeds": (3,)}
    found = {method: orthogonalised("ReLU", method, **few) for method in ORTHOGONALISED}
    assert all(len(t.searched) == len(t.losses) == 2 for t in found.values())
    assert found["centred"].losses != found["uncentred"].losses


def test_the_record_of_newton_muon_is_whole():
    found = recorded(require_whole(NEWTON_MUON))
    assert [c.case for c in found] == list(CASES)
    assert all(verdict(c, sided=1)[2] >= 0 for c in found)
    assert ratios(found, sided=1).layout.meta["alt"]
