"""The contract of every layer rule: as rows, a layer is the linear map whose gradient autograd finds.

A new kind of layer joins ``NETWORKS`` and is then tested at once, by itself and under every method.
"""

import copy
from functools import partial

import pytest
import torch
from references import relative_error
from torch import nn

from sogrid.capture import Capture
from sogrid.layers import RULES, rule_of
from sogrid.losses import Quadratic
from sogrid.optimizers import ACP, EKFAC, KFAC, CenteredGradientDescent, NaturalNN

N = 6
ROUNDING = 1e-12


class Cell(nn.Module):
    """An Elman cell on five steps: one layer used five times in a forward pass."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(3 + 4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = self.cell(torch.cat([step, h], 1)).tanh()
        return self.head(h)


class Attention(nn.Module):
    """One head, of four linear layers on tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4, bias=name != "k") for name in "qkvo")

    def forward(self, x):
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def convolutional(*shape, channels=(2, 3), **options):
    """A convolution and a linear layer above it, on sequences, images or volumes of 6 × 7 × 4."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 1]
    convolution, size = kind(*channels, shape, **options), (channels[0], *(6, 7, 4)[: len(shape)])
    width = convolution(torch.zeros(1, *size)).numel()
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2)), size


def perceptron():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


NETWORKS = {
    "linear": lambda: (perceptron(), (5,)),
    "linear, without bias": lambda: (nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3)), (5,)),
    "linear, on tokens": lambda: (perceptron(), (7, 5)),
    "linear, on pixels": lambda: (perceptron(), (2, 3, 5)),
    "linear, used five times": lambda: (Cell(), (5, 3)),
    "linear, in attention": lambda: (Attention(), (7, 4)),
    "conv2d": partial(convolutional, 3, 3),
    "conv2d, padded": partial(convolutional, 3, 2, padding=(1, 2)),
    "conv2d, strided": partial(convolutional, 2, 3, stride=(2, 1), padding=1),
    "conv2d, dilated": partial(convolutional, 2, 3, dilation=(3, 2), bias=False),
    "conv2d, same": partial(convolutional, 2, 3, padding="same"),
    "conv2d, same, dilated": partial(convolutional, 2, 4, padding="same", dilation=(1, 2)),
    "conv2d, valid": partial(convolutional, 3, 3, padding="valid"),
    "conv2d, circular": partial(convolutional, 1, 3, padding=(0, 1), padding_mode="circular"),
    "conv2d, reflected": partial(convolutional, 3, 3, padding=(2, 1), padding_mode="reflect"),
    "conv2d, replicated": partial(convolutional, 2, 3, padding=(1, 2), padding_mode="replicate"),
    "conv2d, groups": partial(convolutional, 3, 2, channels=(4, 6), groups=2, padding=1),
    "conv2d, groups, without bias": partial(convolutional, 2, 2, channels=(6, 3), groups=3, bias=False),
    "conv2d, depthwise": partial(convolutional, 3, 3, channels=(3, 6), groups=3, stride=2),
    "conv1d": partial(convolutional, 3, padding=1),
    "conv1d, strided, dilated, groups": partial(
        convolutional, 2, channels=(4, 4), stride=2, dilation=3, groups=2
    ),
    "conv1d, circular": partial(convolutional, 4, padding=2, padding_mode="circular"),
    "conv1d, same": partial(convolutional, 4, padding="same"),
    "conv3d": partial(convolutional, 2, 3, 2, padding=(0, 1, 1)),
    "conv3d, strided, replicated": partial(
        convolutional, 3, 2, 2, stride=(2, 1, 2), padding=1, padding_mode="replicate"
    ),
    "conv3d, depthwise, dilated": partial(
        convolutional, 2, 2, 2, channels=(2, 4), groups=2, dilation=(1, 2, 1)
    ),
}
METHODS = {
    "acp": partial(ACP, damping=0.3),
    "acp, exact": partial(ACP, damping=0.3, tikhonov="exact", output_curvature="heuristic", averaging=0.5),
    "kfac": partial(KFAC, damping=0.3, curvature="empirical_fisher", loss=Quadratic()),
    "kfac, reduced": partial(
        KFAC, damping=0.3, curvature="empirical_fisher", loss=Quadratic(), shared="reduce"
    ),
    "ekfac": partial(EKFAC, damping=0.3, curvature="empirical_fisher", loss=Quadratic()),
    "nnn": partial(NaturalNN, damping=0.3, rank=2),
    "centred": CenteredGradientDescent,
}


def every(table):
    return pytest.mark.parametrize("name", table)


def make(name):
    """(network, inputs) of a row."""
    torch.manual_seed(0)
    network, shape = NETWORKS[name]()
    return network.double(), torch.randn(N, *shape, dtype=torch.float64) + 0.5


def loss(f):
    return f.square().flatten(1).sum(1).mean()


def train(network, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_every_rule_has_a_network():
    assert {kind for name in NETWORKS for kind in map(type, make(name)[0].modules())} >= {
        kind for kind in RULES if RULES[kind]
    }


@every(NETWORKS)
def test_rows_multiply_to_the_gradient_that_autograd_finds(name):
    network, x = make(name)
    with Capture(network) as capture:
        loss(network(x)).backward()
    assert len(capture.records) == sum(rule_of(module) is not None for module in network.modules())
    for layer, record in capture.records.items():
        module, rows = network.get_submodule(layer), record.rows()
        assert rows.examples == record.count == N
        gradient = rule_of(module).matrix(module, module.weight.grad)
        assert gradient.data_ptr() == module.weight.grad.data_ptr()
        assert relative_error(N * rows.product, gradient) < ROUNDING
        assert relative_error(record.mean, rows.inputs.mean(-2)) < ROUNDING
        if module.bias is not None:
            bias = rule_of(module).vector(module, module.bias.grad)
            assert bias.data_ptr() == module.bias.grad.data_ptr()
            assert relative_error(rows.outputs.sum(-2), bias) < ROUNDING


@every(NETWORKS)
def test_rows_are_the_linear_map_of_the_layer(name):
    """Including the order of positions, which a product does not show."""
    network, x = make(name)
    outputs = {}
    for layer, module in network.named_modules():
        if rule_of(module) is not None:
            module.register_forward_hook(
                lambda module, inputs, output, layer=layer: (
                    outputs.setdefault(layer, (inputs[0], output)) and None
                )
            )
    network(x)
    for layer, (h, a) in outputs.items():
        module = network.get_submodule(layer)
        rule = rule_of(module)
        found = rule.inputs(module, h) @ rule.matrix(module, module.weight).mT.unsqueeze(-3)
        if module.bias is not None:
            found = found + rule.vector(module, module.bias)[..., None, None, :]
        assert relative_error(found, rule.outputs(module, a)) < ROUNDING


@every(NETWORKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bound", [None, 0.05])
def test_every_method_steps_every_layer_by_either_route(name, method, bound):
    network, x = make(name)
    twin, before = copy.deepcopy(network), loss(network(x))
    options = {"lr": 0.02, "max_change": bound}
    if METHODS[method] is not CenteredGradientDescent:
        options["refresh_every"] = 2
    optimizer = METHODS[method](network, **options)
    found = train(network, optimizer, x)
    assert loss(network(x)) < before
    factored = METHODS[method](twin, **options, gradients="factored")
    assert relative_error(train(twin, factored, x), found) < 1e-11
    copied = copy.deepcopy((network, optimizer))
    assert torch.equal(train(*copied, x), train(network, optimizer, x))


@every([name for name in NETWORKS if name != "linear, used five times"])
@pytest.mark.parametrize("method", METHODS)
def test_minibatches_accumulate(name, method):
    network, x = make(name)
    twin = copy.deepcopy(network)
    whole = train(network, METHODS[method](network, lr=0.02), x, 1)
    optimizer = METHODS[method](twin, lr=0.02)
    for part in x.split([2, 4]):
        (loss(twin(part)) * len(part) / N).backward()
    optimizer.step()
    found = torch.cat([p.detach().flatten() for p in twin.parameters()])
    assert relative_error(found, whole) < 1e-11


def seen_on_tokens():
    """A linear layer on tokens, its input, and h ``[n, s, i]`` and g ``[n, s, o]`` by autograd alone."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).double(), torch.randn(N, 7, 5, dtype=torch.float64) + 0.5
    a = layer(x)
    (g,) = torch.autograd.grad(loss(a.tanh()), a)
    return nn.Sequential(layer, nn.Tanh()), x, x, N * g


def assert_step(network, optimizer, x, dw, db):
    layer = network[0]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    train(network, optimizer, x, 1)
    assert relative_error(layer.weight.detach() - weight, dw) < 1e-11
    assert relative_error(layer.bias.detach() - bias, db) < 1e-11


def test_kfac_averages_inputs_over_positions_and_sums_outputs_over_them():
    """Its *expand* form (Eschenhagen et al. 2023): A over all n·s uses, B over the n examples."""
    network, x, h, g = seen_on_tokens()
    tilde = torch.cat([h, torch.ones(N, 7, 1, dtype=h.dtype)], -1)
    a = sum(torch.outer(v, v) for v in tilde.reshape(-1, 6)) / (7 * N)
    b = sum(torch.outer(v, v) for v in g.reshape(-1, 3)) / N
    gradient = sum(torch.outer(u, v) for u, v in zip(g.reshape(-1, 3), tilde.reshape(-1, 6), strict=True)) / N
    root = 0.3**0.5
    inverses = [torch.linalg.inv(m + root * torch.eye(len(m), dtype=m.dtype)) for m in (b, a)]
    change = -0.1 * inverses[0] @ gradient @ inverses[1]
    optimizer = METHODS["kfac"](network, lr=0.1, max_change=None)
    assert_step(network, optimizer, x, change[:, :-1], change[:, -1])


def test_acp_centres_over_examples_and_positions():
    """Eqs. (6.2.4) and (6.2.5) with the mean and the covariance of all n·s inputs."""
    network, x, h, g = seen_on_tokens()
    rows, outputs = h.reshape(-1, 5), g.reshape(-1, 3)
    mean = rows.mean(0)
    covariance = sum(torch.outer(v - mean, v - mean) for v in rows) / len(rows)
    centred = sum(torch.outer(u, v - mean) for u, v in zip(outputs, rows, strict=True)) / N
    dw = -0.1 * centred @ torch.linalg.inv(covariance + 0.3 * torch.eye(5, dtype=h.dtype))
    db = -0.1 * outputs.sum(0) / N - dw @ mean
    assert_step(network, ACP(network, 0.1, 0.3, max_change=None), x, dw, db)


def step(network, method, x):
    """What one step changes, of each parameter."""
    before = [p.detach().clone() for p in network.parameters()]
    train(network, METHODS[method](network, lr=0.1), x, 1)
    return [(p.detach() - b).flatten() for p, b in zip(network.parameters(), before, strict=True)]


def assert_same_step(one, other, method):
    for a, b in zip(step(*one[:1], method, one[1]), step(*other[:1], method, other[1]), strict=True):
        assert relative_error(a, b) < ROUNDING


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_that_covers_its_input_is_a_linear_layer(method):
    torch.manual_seed(0)
    x = torch.randn(N, 2, 3, 4, dtype=torch.float64)
    conv, linear = nn.Conv2d(2, 5, (3, 4)).double(), nn.Linear(24, 5).double()
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    assert_same_step((conv, x), (linear, x.flatten(1)), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_of_one_pixel_is_a_linear_layer_on_pixels(method):
    torch.manual_seed(0)
    x = torch.randn(N, 4, 2, 3, dtype=torch.float64)
    conv, linear = nn.Conv2d(4, 5, 1).double(), nn.Linear(4, 5).double()
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    assert_same_step((conv, x), (linear, x.permute(0, 2, 3, 1)), method)


@pytest.mark.parametrize("method", METHODS)
def test_several_uses_are_one_use_on_as_many_positions(method):
    class Apart(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.stack([self.layer(part) for part in x.unbind(1)], 1).tanh()

    torch.manual_seed(0)
    x, layer = torch.randn(N, 3, 4, dtype=torch.float64), nn.Linear(4, 5).double()
    whole = nn.Sequential(copy.deepcopy(layer), nn.Tanh())
    assert_same_step((Apart(layer), x), (whole, x), method)


@pytest.mark.parametrize("method", METHODS)
def test_passes_with_other_numbers_of_positions_accumulate(method):
    """Sentences of two lengths are as many rows, of as many examples."""
    network, _ = make("linear, on tokens")
    short, long = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    optimizer = METHODS[method](network, lr=0.02, max_change=0.1)
    with Capture(network) as capture:
        (loss(network(short)) / 3 + loss(network(long)) * 2 / 3).backward()
        rows, mean = capture.records["0"].rows(), capture.records["0"].mean
    assert (rows.examples, len(rows.inputs)) == (6, 2 * 3 + 4 * 6)
    assert relative_error(mean, torch.cat([short.flatten(0, 1), long.flatten(0, 1)]).mean(0)) < ROUNDING
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert after.isfinite().all()
    assert (after != before).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_with_groups_is_as_many_convolutions(method):
    """Each with the step that it has alone, whatever the others are."""

    class Apart(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(2, 3, 2).double() for _ in range(2))
            for part, w, b in zip(self.parts, whole.weight.chunk(2), whole.bias.chunk(2), strict=True):
                part.load_state_dict({"weight": w, "bias": b})

        def forward(self, x):
            pairs = zip(self.parts, x.chunk(2, 1), strict=True)
            return torch.cat([part(channels) for part, channels in pairs], 1).tanh()

    torch.manual_seed(0)
    x, whole = torch.randn(N, 4, 3, 4, dtype=torch.float64), nn.Conv2d(4, 6, 2, groups=2).double()
    apart = step(Apart(whole), method, x)
    weight, bias = step(nn.Sequential(whole, nn.Tanh()), method, x)
    assert relative_error(weight, torch.cat(apart[::2])) < ROUNDING
    assert relative_error(bias, torch.cat(apart[1::2])) < ROUNDING


@pytest.mark.parametrize("shape", [(2, 6, 7), (0, 2, 6, 7)])
def test_images_that_are_no_batch_are_refused_by_name(shape):
    network, _ = make("conv2d")
    with (
        Capture(network),
        pytest.raises(RuntimeError, match=r"layer '0' got an input of shape.*\[examples, ch"),
    ):
        network[0](torch.zeros(shape, dtype=torch.float64))
