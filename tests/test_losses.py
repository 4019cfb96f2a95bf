"""Every formula of the losses against its definition: autograd, enumerated outcomes, torch's losses."""

import pytest
import references
import torch
from references import relative_error
from torch.nn import functional as F

from sogrid.losses import (
    BinaryCrossEntropyAtLogits,
    BinaryCrossEntropyAtProbabilities,
    CrossEntropyAtLogits,
    CrossEntropyAtProbabilities,
    Loss,
    Quadratic,
)

RTOL = 1e-12  # of the norm, float64 rounding
LOSSES = [
    Quadratic(),
    Quadratic(variance=0.37),
    BinaryCrossEntropyAtProbabilities(),
    BinaryCrossEntropyAtLogits(),
    CrossEntropyAtProbabilities(),
    CrossEntropyAtLogits(),
]
CATEGORICAL = [CrossEntropyAtProbabilities(), CrossEntropyAtLogits()]
every_loss = pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda loss: f"{loss}{vars(loss).get('variance', '')}"
)
categorical = pytest.mark.parametrize("loss", CATEGORICAL, ids=str)


def name(loss):
    return type(loss).__name__


def variance(loss):
    return getattr(loss, "variance", 0.5)


def outputs(loss, z):
    """Turn real numbers into outputs of the kind the loss expects."""
    if not name(loss).endswith("AtProbabilities"):
        return z
    return z.softmax(-1) if isinstance(loss, CrossEntropyAtProbabilities) else z.sigmoid()


@pytest.fixture
def pair(loss, draw, generator):
    """Outputs f [5, 3] and hard targets y [5, 3] drawn from the loss's own model."""
    f = outputs(loss, draw(5, 3))
    return f, loss.sample(f, generator)


@pytest.fixture
def soft_pair(loss, draw):
    """Outputs and *soft* targets: rows that sum to one, strictly inside (0, 1)."""
    return outputs(loss, draw(5, 3)), draw(5, 3).softmax(-1)


# --- value and derivatives -------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("targets", ["pair", "soft_pair"])
def test_value_gradient_and_hessian_are_autograds(loss, targets, request):
    """Table 3.I and Appendix A, with 2I for the quadratic loss (erratum E3)."""
    f, y = request.getfixturevalue(targets)
    for i in range(len(f)):

        def ell(f_i, i=i):
            return references.example_loss(name(loss), f_i, y[i])

        assert relative_error(loss.value(f, y)[i], ell(f[i])) < RTOL
        assert relative_error(loss.gradient(f, y)[i], references.gradient_in_output(ell, f[i])) < RTOL
        assert relative_error(loss.hessian(f, y)[i], references.hessian_in_output(ell, f[i])) < RTOL


@every_loss
def test_hessian_product_is_the_matrix_times_the_vector(loss, pair, draw):
    f, y = pair
    v = draw(5, 3)
    expected = torch.einsum("nkl,nl->nk", loss.hessian(f, y), v)
    assert relative_error(loss.hessian_product(f, y, v), expected) < RTOL


@pytest.mark.parametrize(
    ("loss", "torchs"),
    [
        (
            Quadratic(),
            lambda f, y, reduction: F.mse_loss(f, y, reduction="sum") / (5 if reduction == "mean" else 1),
        ),
        (BinaryCrossEntropyAtLogits(), F.binary_cross_entropy_with_logits),
        (BinaryCrossEntropyAtProbabilities(), F.binary_cross_entropy),
        (CrossEntropyAtLogits(), F.cross_entropy),
        (
            CrossEntropyAtProbabilities(),
            lambda f, y, reduction: F.cross_entropy(f.log(), y, reduction=reduction),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reductions_are_torchs_over_examples_and_a_sum_over_outputs(loss, torchs, pair):
    """torch's binary losses also average over the k = 3 outputs; ours sum over them."""
    f, y = pair
    outputs_averaged = 3 if name(loss).startswith("Binary") else 1
    mean, total = type(loss)("mean")(f, y), type(loss)("sum")(f, y)
    assert relative_error(mean, outputs_averaged * torchs(f, y, reduction="mean")) < RTOL
    assert relative_error(total, torchs(f, y, reduction="sum")) < RTOL


@pytest.mark.parametrize(
    ("at_logits", "at_probabilities", "link"),
    [
        (BinaryCrossEntropyAtLogits(), BinaryCrossEntropyAtProbabilities(), torch.sigmoid),
        (CrossEntropyAtLogits(), CrossEntropyAtProbabilities(), lambda z: z.softmax(-1)),
    ],
    ids=["binary", "categorical"],
)
def test_the_two_cuts_are_one_function_of_the_logits(at_logits, at_probabilities, link, draw):
    """Same value and gradient through the link; D(f) pulled through the link is the same Fisher term."""
    z, y = draw(5, 3), draw(5, 3).softmax(-1)
    p = link(z)
    S = torch.stack([torch.func.jacrev(link)(z_i) for z_i in z])
    assert relative_error(at_logits.value(z, y), at_probabilities.value(p, y)) < RTOL
    through = torch.einsum("nkl,nk->nl", S, at_probabilities.gradient(p, y))
    assert relative_error(at_logits.gradient(z, y), through) < RTOL
    assert relative_error(at_logits.fisher(z), S.mT @ at_probabilities.fisher(p) @ S) < RTOL
    assert relative_error(S.mT @ at_probabilities.hessian(p, y) @ S, at_logits.hessian(z, y)) > 1e-2


# --- the model p(y|f) ------------------------------------------------------------------------------


@every_loss
def test_fisher_is_the_expected_outer_product_of_scores(loss, pair):
    """Table 3.II and Appendix B: all outcomes enumerated; exact quadrature for the Gaussian."""
    f, _ = pair
    for f_i, D in zip(f, loss.fisher(f), strict=True):
        assert relative_error(D, references.fisher_in_output(name(loss), f_i, variance(loss))) < RTOL


@every_loss
def test_fisher_product_and_factor(loss, pair, draw):
    """D v, and SᵀS = D."""
    f, _ = pair
    v, D, S = draw(5, 3), loss.fisher(f), loss.fisher_factor(f)
    assert relative_error(loss.fisher_product(f, v), torch.einsum("nkl,nl->nk", D, v)) < RTOL
    assert relative_error(S.mT @ S, D) < RTOL


@every_loss
def test_score_is_minus_the_gradient_of_the_log_likelihood(loss, pair):
    f, y = pair
    for i in range(len(f)):
        s = references.gradient_in_output(
            lambda f_i, i=i: references.log_likelihood(name(loss), f_i, y[i], variance(loss)), f[i]
        )
        assert relative_error(loss.score(f, y)[i], -s) < RTOL


@every_loss
@pytest.mark.parametrize("targets", ["pair", "soft_pair"])
def test_target_inverts_the_gradient(loss, targets, request):
    f, y = request.getfixturevalue(targets)
    assert relative_error(loss.target(f, loss.gradient(f, y)), y) < RTOL


@every_loss
def test_sample_has_the_models_moments(loss, draw, generator):
    """SAMPLES draws; means and covariances within SIGMAS standard errors (at most ½ each, or σ²√2)."""
    SAMPLES, SIGMAS = 100_000, 5.0
    f = outputs(loss, draw(3))
    y = loss.sample(f.expand(SAMPLES, 3), generator)
    assert y.shape == (SAMPLES, 3)
    assert y.dtype == f.dtype
    if isinstance(loss, Quadratic):
        mean, covariance, spread = f, loss.variance * torch.eye(3), loss.variance * 2**0.5
    else:
        mean = references.PROBABILITIES[name(loss)](f)
        covariance = torch.diag(mean * (1 - mean))
        if name(loss).startswith("CrossEntropy"):
            covariance = torch.diag(mean) - torch.outer(mean, mean)
        spread = 0.5
    tolerance = SIGMAS * max(spread, variance(loss) ** 0.5) / SAMPLES**0.5
    assert (y.mean(0) - mean).abs().max() < tolerance
    assert (torch.cov(y.T) - covariance).abs().max() < tolerance
    s = loss.score(f.expand(SAMPLES, 3), y)
    assert relative_error(s.mT @ s / SAMPLES, loss.fisher(f[None])[0]) < 0.05  # measured below 0.02


@every_loss
def test_sample_follows_its_generator(loss, draw):
    f = outputs(loss, draw(50, 3))
    first, again, other = (loss.sample(f, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("loss", LOSSES[2:], ids=str)
def test_sample_gives_labels_of_the_models_kind(loss, draw, generator):
    y = loss.sample(outputs(loss, draw(200, 3)), generator)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    if name(loss).startswith("CrossEntropy"):
        assert torch.equal(y.sum(-1), torch.ones(200, dtype=y.dtype))
    else:
        assert len(y.sum(-1).unique()) == 4  # independent bits: 0 to 3 of them set


# --- targets and shapes ----------------------------------------------------------------------------


@categorical
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_indices_and_integer_rows_mean_one_hot_rows(loss, dtype, draw):
    """Square outputs, n = k, where a misread target would broadcast silently."""
    f = outputs(loss, draw(3, 3))
    index = torch.tensor([2, 0, 2])
    rows = F.one_hot(index, 3)
    for method in (loss.value, loss.gradient, loss.hessian, loss.score, loss):
        expected = method(f, rows.double())
        assert torch.equal(method(f, index.to(dtype)), expected)
        assert torch.equal(method(f, rows.to(dtype)), expected)


@every_loss
def test_leading_dimensions_are_independent_problems(loss, draw, generator):
    f = outputs(loss, draw(2, 4, 5, 3))
    y, v = loss.sample(f, generator), draw(2, 4, 5, 3)
    assert y.shape == f.shape
    calls = {
        "value": lambda f, y, v: loss.value(f, y),
        "gradient": lambda f, y, v: loss.gradient(f, y),
        "hessian": lambda f, y, v: loss.hessian(f, y),
        "hessian_product": loss.hessian_product,
        "fisher": lambda f, y, v: loss.fisher(f),
        "fisher_factor": lambda f, y, v: loss.fisher_factor(f),
        "fisher_product": lambda f, y, v: loss.fisher_product(f, v),
        "score": lambda f, y, v: loss.score(f, y),
        "target": lambda f, y, v: loss.target(f, v),
        "reduced": lambda f, y, v: loss(f, y),
    }
    for label, call in calls.items():
        many = call(f, y, v)
        for a in range(2):
            for b in range(4):
                one = call(f[a, b], y[a, b], v[a, b])
                torch.testing.assert_close(many[a, b], one, rtol=RTOL, atol=0.0, msg=label)


@every_loss
def test_targets_without_leading_dimensions_broadcast(loss, draw, generator):
    f = outputs(loss, draw(4, 5, 3))
    y = loss.sample(f[0], generator)
    assert torch.equal(loss(f, y), loss(f, y.expand(4, 5, 3)))
    assert torch.equal(loss.gradient(f, y), loss.gradient(f, y.expand(4, 5, 3)))


@categorical
def test_class_indices_broadcast_over_leading_dimensions(loss, draw):
    f, index = outputs(loss, draw(4, 5, 3)), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(loss(f, index), loss(f, F.one_hot(index, 3).double()))


# --- edges -----------------------------------------------------------------------------------------


def test_logit_losses_stay_finite_at_extreme_logits():
    """float32, ±1000: values are exact, gradients are p − y, and nothing overflows."""
    f = torch.tensor([[1000.0, -1000.0]])
    y = torch.tensor([[0.0, 1.0]])
    for loss, value in ((CrossEntropyAtLogits(), 2000.0), (BinaryCrossEntropyAtLogits(), 2000.0)):
        assert loss(f, y).item() == value
        assert loss.gradient(f, y).tolist() == [[1.0, -1.0]]
        assert torch.equal(loss.hessian(f, y), torch.zeros(1, 2, 2))
        assert torch.isfinite(loss.fisher_factor(f)).all()


def test_probability_losses_take_a_certain_right_answer_as_zero():
    f = y = torch.tensor([[0.0, 1.0]])
    assert BinaryCrossEntropyAtProbabilities()(f, y) == 0
    assert CrossEntropyAtProbabilities()(f, y) == 0


@every_loss
def test_float32_in_float32_out(loss, pair):
    f, y = (t.float() for t in pair)
    for result in (
        loss(f, y),
        loss.gradient(f, y),
        loss.hessian(f, y),
        loss.fisher(f),
        loss.fisher_factor(f),
    ):
        assert result.dtype == torch.float32
    assert loss.sample(f).dtype == torch.float32


def test_bad_arguments():
    with pytest.raises(ValueError, match="reduction must be one of"):
        Quadratic("none")
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"variance .* must be positive"):
            Quadratic(variance=bad)


@every_loss
def test_targets_of_another_shape_are_refused_not_broadcast(loss):
    """Outputs [5, 1] and targets [5] would silently make [5, 5]."""
    f, y = torch.full((5, 1), 0.5), torch.zeros(5)
    if isinstance(loss, CrossEntropyAtLogits | CrossEntropyAtProbabilities):
        f, y = torch.full((5, 3), 1 / 3), torch.zeros(5, 2)
    with pytest.raises(ValueError, match="targets"):
        loss(f, y)


@every_loss
def test_outputs_without_a_dimension_of_outputs_are_refused(loss):
    """``net(x).squeeze(-1)``: n outputs would be those of one example, and a mean a sum."""
    with pytest.raises(ValueError, match="unsqueeze"):
        loss(torch.full((5,), 0.5), torch.zeros(5))


@pytest.mark.parametrize("loss", [CrossEntropyAtLogits(), CrossEntropyAtProbabilities()], ids=repr)
@pytest.mark.parametrize("k", [3, 5])
def test_class_indices_that_are_not_integers_are_refused(loss, k):
    with pytest.raises(ValueError, match="integers"):
        loss(torch.full((5, k), 1 / k), torch.zeros(5))


def test_repr_names_the_reduction():
    assert repr(CrossEntropyAtLogits("sum")) == "CrossEntropyAtLogits(reduction='sum')"


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, f: loss.value(f, f),
        lambda loss, f: loss.gradient(f, f),
        lambda loss, f: loss.hessian(f, f),
        lambda loss, f: loss.fisher(f),
        lambda loss, f: loss.fisher_factor(f),
        lambda loss, f: loss.sample(f),
        lambda loss, f: loss.target(f, f),
    ],
)
def test_the_base_class_has_no_formulas(call):
    with pytest.raises(NotImplementedError):
        call(Loss(), torch.zeros(2, 2))
