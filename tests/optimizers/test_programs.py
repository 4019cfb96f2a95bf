"""Programs as people write them, small: each trains under ACP and KFAC, by either kind of gradients."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sogrid.losses import BinaryCrossEntropyAtLogits, CrossEntropyAtLogits, Quadratic
from sogrid.optimizers import ACP, KFAC

METHODS = {"acp": ACP, "kfac": KFAC}
LOSS = CrossEntropyAtLogits()


def every(table):
    return pytest.mark.parametrize("name", table)


EITHER = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("gradients", ["matrix", "factored"]),
]


def either(test):
    for mark in EITHER:
        test = mark(test)
    return test


def make(method, model, gradients, loss=LOSS, lr=10.0, **options):
    """The line of the README."""
    own = {"loss": loss} if method == "kfac" else {}
    return METHODS[method](model, lr, gradients=gradients, **own, **options)


def minibatches(x, y, size, epochs):
    """Shuffled, anew in each epoch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for some in torch.randperm(len(x), generator=generator).split(size):
            yield x[some], y[some]


# --- images ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The network of PyTorch's MNIST example, narrow: two convolutions, dropout, log-probabilities."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, 1), nn.Conv2d(6, 8, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.1), nn.Dropout(0.2)
        self.fc1, self.fc2 = nn.Linear(128, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), 1)


class BasicBlock(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(after), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


def resnet18(width=4):
    """Its layers, strides and kernels: a stem, four stages of two blocks, a head."""
    stages, before = [], width
    for k in range(4):
        after = width * 2**k
        stages += [BasicBlock(before, after, 1 + (k > 0)), BasicBlock(after, after, 1)]
        before = after
    stem = nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 4))


class ViT(nn.Module):
    """A convolution of patches, a class token, places, and encoder layers whose attention is written out."""

    def __init__(self, width=16, heads=2, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 3, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.ModuleList(Encoder(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h[:, 0]))


class Encoder(nn.Module):
    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.c_proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def pictures(n=96, side=12):
    """Four patterns, each at some place, under noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(4, side, side, generator=generator)
    y = torch.arange(n) % 4
    return (patterns[y] + torch.randn(n, side, side, generator=generator)).unsqueeze(1), y


IMAGES = {
    "mnist": (Net, {}),
    "resnet-18": (resnet18, {"other": "adamw"}),
    "vit": (ViT, {"other": "adamw"}),
}


@every(IMAGES)
@either
def test_classifiers_of_images(name, method, gradients):
    torch.manual_seed(0)
    build, options = IMAGES[name]
    model = build()
    optimizer = make(method, model, gradients, **options)
    losses = []
    for x, y in minibatches(*pictures(), 32, epochs=8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.6 * losses[0]


# --- language ----------------------------------------------------------------------------------------


def text(length=600):
    """Characters with a period that is not one: what follows depends on two that came before."""
    generator, found = torch.Generator().manual_seed(0), [0, 1]
    for noise in torch.rand(length, generator=generator).tolist():
        found.append((2 * found[-1] + found[-2] + (noise < 0.1)) % 7)
    tokens = torch.tensor(found)
    windows = tokens.unfold(0, 13, 6)
    return windows[:, :-1], windows[:, 1:]


class GPT(nn.Module):
    """Like nanoGPT: the head's weight is the embedding's, and forward returns (logits, loss)."""

    def __init__(self, width=16):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(7, width),
                "wpe": nn.Embedding(12, width),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList(Encoder(width, 2, causal=True) for _ in range(2)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, 7, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1])))
        for block in parts.h:
            x = block(x)
        logits, loss = self.lm_head(parts.ln_f(x)), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


@either
def test_a_gpt_with_tied_weights_that_returns_its_loss(method, gradients):
    torch.manual_seed(0)
    model, losses = GPT(), []
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 1e-4},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    with pytest.raises(ValueError, match=r"weight and bias of layer 'transformer.h.0.c_attn' are in diff"):
        make(method, model, gradients, params=groups, other="adamw")
    with pytest.warns(UserWarning, match="'transformer.wte', 'lm_head'.*share a parameter") as said:
        optimizer = make(method, model, gradients, output=0, other="adamw", other_lr=1e-2, weight_decay=1e-4)
    assert len(said) == 1
    assert "lm_head" not in {layer.name for layer in optimizer._layers}
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in minibatches(*text(), 32, epochs=40):
            optimizer.zero_grad()
            _, loss = model(x, y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]


class RNNModel(nn.Module):
    """An embedding, an LSTM, and the layer that scores what follows."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(7, 8), nn.LSTM(8, 16), nn.Linear(16, 7)

    def forward(self, x, hidden=None):
        h, hidden = self.rnn(self.encoder(x.mT), hidden)
        return self.decoder(h).transpose(0, 1), hidden


@either
def test_the_output_layer_of_a_recurrent_language_model(method, gradients):
    """In the loop of PyTorch's word language model: the state goes on, its graph does not."""
    torch.manual_seed(0)
    model, hidden, losses = RNNModel(), None, []
    optimizer = make(method, model, gradients, output=0, other="adamw", other_lr=3e-2)
    assert {layer.name for layer in optimizer._layers} == {"decoder"}
    for x, y in [(x, y) for x, y in minibatches(*text(), 32, epochs=14) if len(x) == 32]:
        optimizer.zero_grad()
        scores, hidden = model(x, hidden)
        hidden = tuple(h.detach() for h in hidden)
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]


# --- two models, two calls ---------------------------------------------------------------------------


@either
def test_a_gan_with_two_optimizers(method, gradients):
    """In the loop of PyTorch's DCGAN: passes of the one go through the other, gradients are the model's."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(True), nn.Linear(16, 2))
    d = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2, True), nn.Linear(16, 1))
    for_d = make(method, d, gradients, BinaryCrossEntropyAtLogits(), lr=1.0)
    for_g = make(method, g, gradients, Quadratic(), lr=1.0)  # KFAC's metric: distances of what it makes
    criterion, wanted = nn.BCEWithLogitsLoss(), torch.tensor([2.0, -1.0])
    start = (g(torch.randn(500, 4)).mean(0) - wanted).norm().item()
    for _ in range(120):
        real, fake = wanted + 0.5 * torch.randn(64, 2), g(torch.randn(64, 4))
        d.zero_grad()
        criterion(d(real), torch.ones(64, 1)).backward()
        criterion(d(fake.detach()), torch.zeros(64, 1)).backward()
        for_d.step()
        g.zero_grad()
        criterion(d(fake), torch.ones(64, 1)).backward()
        for_g.step()
    assert (g(torch.randn(500, 4)).mean(0) - wanted).norm() < 0.4 * start


@pytest.mark.parametrize("joined", [False, True], ids=["two calls", "one call"])
@either
def test_a_contrastive_pair(method, gradients, joined):
    """As in SimCLR: two views of an example through one network, apart or side by side, and one loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = make(method, model, gradients, Quadratic(), max_change=0.1)
    x, losses = torch.randn(32, 10), []
    for _ in range(100):
        views = [x + 0.3 * torch.randn(32, 10) for _ in range(2)]
        optimizer.zero_grad()
        one, two = model(torch.cat(views)).chunk(2) if joined else map(model, views)
        scores = F.normalize(one, dim=1) @ F.normalize(two, dim=1).mT / 0.2
        loss = F.cross_entropy(scores, torch.arange(32))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5


@either
def test_a_cell_that_is_unrolled_and_a_decoder_that_goes_on_from_what_it_said(method, gradients):
    """Layers of a forward pass that are used at each step, on what they gave."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.score = nn.Linear(7 + 12, 12), nn.Linear(12, 7)

        def forward(self, x):
            h, said, found = x.new_zeros(len(x), 12), F.one_hot(x[:, 0], 7).float(), []
            h = h.float()
            for _ in range(x.shape[1]):
                h = torch.tanh(self.cell(torch.cat([said, h], 1)))
                found.append(self.score(h))
                said = found[-1].softmax(1)
            return torch.stack(found, 1)

    torch.manual_seed(0)
    model, losses = Decoder(), []
    optimizer = make(method, model, gradients)
    for _ in range(40):
        x = torch.arange(28).view(-1, 1) % 7 + torch.arange(4)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x % 7).flatten(0, 1), (x % 7).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
