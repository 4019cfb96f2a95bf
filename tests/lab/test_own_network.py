"""Page *In your own network*: its tasks train, every parameter has a trainer, its errors are raised."""

import re

import pytest

from lab.own_network import LINES, REFUSED, TASKS, curves, parts, refusal, table, train
from sogrid.optimizers import ACP


def test_every_line_trains_every_task_a_little():
    runs = train(updates=3)
    assert set(runs) == {(task, method) for task in TASKS for method in LINES}
    assert all(run["status"] == "finished" for run in runs.values())
    assert all(run["train"][-1] < run["train"][0] for run in runs.values())
    fig = curves(runs)
    assert len(fig.data) == len(runs)
    assert "digits, CNN, AdamW:" in fig.layout.meta["alt"]


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_is_trained_by_one(task):
    model = TASKS[task].network()
    rows = parts(model, ACP(model, 0.1, other="adamw"))
    assert sum(size for *_, size in rows) == sum(p.numel() for p in model.parameters())
    by_kind = {kind: by for _, kind, by, _ in rows}
    assert by_kind.pop("Linear") == "ACP"
    assert by_kind.pop("Conv2d", "ACP") == "ACP"
    assert set(by_kind.values()) == {"AdamW"}
    plain = parts(model, ACP(model, 0.1, other_lr=0.1))
    assert {by for _, kind, by, _ in plain if kind in by_kind} == {"plain SGD"}


WORDS = [
    r"ValueError: 'norm1' \(LayerNorm\).*other='adamw'",
    "CaptureError: the model returned a dict with 'logits'",
    "CaptureError: .*eval mode",
    "CaptureError: .*used outside the layer",
    "CaptureError: .*something else",
    "CaptureError: .*was it clipped",
    "ValueError: .*different parameter groups",
    "TypeError: .*bfloat16",
    "FloatingPointError: .*not finite",
    "ValueError: .*breaks the chain",
]


@pytest.mark.parametrize(
    ("case", "words"), list(zip(REFUSED, WORDS, strict=True)), ids=[c.what for c in REFUSED]
)
def test_what_is_refused_says_so(case, words):
    assert re.match(words, refusal(case.code))


def test_what_is_not_refused_is_an_error():
    with pytest.raises(AssertionError, match="nothing is refused"):
        refusal("ACP(model, lr=10.0)")


def test_a_table_survives_bars_and_lines():
    assert table(["a", "b"], [["x | y", "1\n2"]]) == "| a | b |\n|---|---|\n| x \\| y | 1<br>2 |"
