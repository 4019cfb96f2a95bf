"""The networks: shapes, initial distribution, and mean-only batch normalisation."""

import math

import pytest
import torch
from references import relative_error
from torch import nn

from sogrid.networks import MLP, MeanOnlyBatchNorm, cifar10_classifier, initialize_, mnist_autoencoder

RTOL = 1e-12  # of the norm, float64 rounding
SIGMAS = 5.0  # statistical tolerance: five standard errors


# --- shapes ----------------------------------------------------------------------------------------


def linear_shapes(model):
    return [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)]


def test_mnist_autoencoder_is_the_theses():
    model = mnist_autoencoder()
    assert linear_shapes(model) == [
        (1000, 784),
        (500, 1000),
        (250, 500),
        (30, 250),
        (250, 30),
        (500, 250),
        (1000, 500),
        (784, 1000),
    ]
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    assert [type(m) for m in model] == [nn.Linear, nn.Sigmoid] * 8
    f = model(torch.rand(3, 784))
    assert f.shape == (3, 784)
    assert 0 < f.min() < f.max() < 1


def test_cifar10_classifier_is_the_theses():
    model = cifar10_classifier()
    assert linear_shapes(model) == [(100, 3072), *[(100, 100)] * 7, (10, 100)]
    assert sum(p.numel() for p in model.parameters()) == 379_010
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU] * 8 + [nn.Linear, nn.Identity]
    assert model(torch.rand(2, 3072)).shape == (2, 10)


def test_cifar10_classifier_at_the_probabilities():
    logits, softmax = (
        cifar10_classifier(output=output, generator=torch.Generator().manual_seed(0))
        for output in ("identity", "softmax")
    )
    x = torch.rand(2, 3072)
    torch.testing.assert_close(softmax(x), logits(x).softmax(-1))


def test_layers_are_named_and_ordered():
    model = MLP([3, 4, 5, 2], "tanh", "softmax", normalization="mean_only")
    assert [name for name, _ in model.named_children()] == [
        *("linear1", "norm1", "act1", "linear2", "norm2", "act2", "linear3", "act3"),
    ]
    assert model.linear1.bias is None
    assert model.linear3.bias is not None
    assert isinstance(model.norm1, MeanOnlyBatchNorm)
    assert isinstance(MLP([3, 4, 2], normalization="batch").norm1, nn.BatchNorm1d)


def test_a_network_computes_activation_of_affine_maps(draw):
    """§1.4.1: f = f₂(W₂ f₁(W₁ x + b₁) + b₂)."""
    model = MLP([3, 4, 2], "tanh", "sigmoid", dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p)
    x = draw(5, 3)
    h = torch.tanh(x @ model.linear1.weight.T + model.linear1.bias)
    expected = torch.sigmoid(h @ model.linear2.weight.T + model.linear2.bias)
    assert relative_error(model(x), expected) < RTOL


def test_activations_can_be_factories():
    model = MLP([2, 3, 1], nn.ELU, lambda: nn.Softplus(beta=2))
    assert isinstance(model.act1, nn.ELU)
    assert model.act2.beta == 2


def test_dtype_reaches_every_tensor():
    model = MLP([2, 3, 1], normalization="mean_only", dtype=torch.float64)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float64}


# --- initialisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 8.0])
@pytest.mark.parametrize(("init", "fan"), [("glorot", 300 + 500), ("he", 300)])
def test_initial_weights_are_uniform_with_the_stated_variance(init, fan, scale, generator):
    """§2.4.2: W ~ U(−r, r), r = √(3·variance), N = 150,000 weights.

    Standard errors: σ/√N of the mean, and √0.8·σ²/√N of the variance (kurtosis 1.8). A uniform sample
    comes within r·20/N of its bound except with probability e⁻¹⁰.
    """
    weight = MLP([300, 500], init=init, scale=scale, generator=generator, dtype=torch.float64).linear1.weight
    variance, N = scale / fan, weight.numel()
    bound = math.sqrt(3 * variance)
    assert abs(weight.mean()) < SIGMAS * math.sqrt(variance / N)
    assert abs(weight.var() / variance - 1) < SIGMAS * math.sqrt(0.8 / N)
    assert bound * (1 - 20 / N) < weight.abs().max() <= bound
    share = (weight.abs() < bound / 2).double().mean()
    assert abs(share - 0.5) < SIGMAS * 0.5 / math.sqrt(N)


def test_initial_biases_are_zero_and_other_parameters_untouched():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    nn.init.constant_(model[1].weight, 7.0)
    before = model[2].weight.clone()
    assert initialize_(model) is model
    assert not model[0].bias.any()
    assert (model[1].weight == 7).all()
    assert not torch.equal(model[2].weight, before)


def test_initialisation_follows_its_generator():
    first, again, other = (
        MLP([3, 4, 2], generator=torch.Generator().manual_seed(seed)).linear2.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- mean-only batch normalisation -----------------------------------------------------------------


def test_mean_only_norm_centres_the_minibatch_and_adds_its_bias(draw):
    norm = MeanOnlyBatchNorm(3, dtype=torch.float64)
    nn.init.normal_(norm.bias)
    a = draw(7, 3) + 5
    out = norm(a)
    assert relative_error(out, a - a.mean(0) + norm.bias) < RTOL
    assert relative_error(out.mean(0), norm.bias) < RTOL


def test_mean_only_norm_is_a_layer_of_centred_inputs(draw):
    """§6.3.1: a = W (h − h̄) + b."""
    W, norm, h = draw(3, 4), MeanOnlyBatchNorm(3, dtype=torch.float64), draw(7, 4) + 2
    nn.init.normal_(norm.bias)
    assert relative_error(norm(h @ W.T), (h - h.mean(0)) @ W.T + norm.bias) < RTOL


def test_mean_only_norm_evaluates_with_the_running_mean(draw):
    norm = MeanOnlyBatchNorm(3, momentum=0.25, dtype=torch.float64)
    first, second = draw(7, 3) + 1, draw(5, 3) - 2
    norm(first)
    norm(second)
    expected = 0.75 * (0.25 * first.mean(0)) + 0.25 * second.mean(0)
    assert relative_error(norm.running_mean, expected) < RTOL
    assert not norm.running_mean.requires_grad
    norm.eval()
    before = norm.running_mean.clone()
    x = draw(1, 3)
    assert relative_error(norm(x), x - expected) < RTOL
    assert torch.equal(norm.running_mean, before)
    assert set(norm.state_dict()) == {"bias", "running_mean"}


def test_mean_only_norm_gradient_is_the_centred_gradient(draw):
    """THESIS row 30 with its caveat.

    With g_i the gradient at the layer's output: ∂/∂W is Σ g_i (h_i − h̄)ᵀ, ∂/∂b is Σ g_i, and the
    signal sent down is centred too, Wᵀ (g_i − ḡ) instead of Wᵀ g_i.
    """
    W, g, h = draw(3, 4).requires_grad_(), draw(7, 3) + 1, (draw(7, 4) + 2).requires_grad_()
    norm = MeanOnlyBatchNorm(3, dtype=torch.float64)
    dW, db, dh = torch.autograd.grad((norm(h @ W.T) * g).sum(), [W, norm.bias, h])
    h, W = h.detach(), W.detach()
    assert relative_error(dW, g.T @ (h - h.mean(0))) < RTOL
    assert relative_error(db, g.sum(0)) < RTOL
    assert relative_error(dh, (g - g.mean(0)) @ W) < RTOL
    assert relative_error(dh, g @ W) > 0.1
    assert relative_error(dW, g.T @ h) > 0.1


# --- bad arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3]}, "at least two positive widths"),
        ({"sizes": [3, 0, 2]}, "at least two positive widths"),
        ({"sizes": [3, 2, 2], "activation": "swish"}, "activation must be one of"),
        ({"sizes": [3, 2], "output": "swish"}, "activation must be one of"),
        ({"sizes": [3, 2], "normalization": "layer"}, "normalization must be None or one of"),
        ({"sizes": [3, 2], "init": "lecun"}, "init must be 'glorot' or 'he'"),
        ({"sizes": [3, 2], "scale": 0}, "must be positive"),
        ({"sizes": [3, 2], "scale": float("nan")}, "must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)
