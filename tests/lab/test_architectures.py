"""Convolutions and a recurrent cell: what is searched, and the record."""

import torch
from studies import require_whole

from lab.architectures import ARCHITECTURES, LINES, TASKS, Cell, curves, ends, trained, verdict
from sogrid.optimizers import ACP


def test_every_method_has_as_many_lines():
    assert {len(lines) for lines in LINES.values()} == {6}
    assert all(len({*lines}) == 6 for lines in LINES.values())


def test_the_cell_is_a_watched_layer_used_once_a_row():
    torch.manual_seed(0)
    model, (_, x, y) = Cell(), TASKS["recurrent"].examples()
    state = torch.zeros(3, model.width)
    for t in range(8):
        state = model.cell(torch.cat([x[:3, 8 * t : 8 * t + 8], state], 1)).tanh()
    assert torch.allclose(model(x[:3]), model.scores(state))
    optimizer = ACP(model, lr=1.0)
    before = model.cell.weight.detach().clone()
    TASKS["recurrent"].loss(model(x[:50]), y[:50]).backward()
    optimizer.step()
    assert not torch.equal(model.cell.weight, before)


def test_a_part_is_an_entry_of_a_record():
    found = trained("recurrent", "adam", updates=1, seeds=(1,), search_seeds=(2,))
    assert found["settings"]["line"] in LINES["adam"]
    assert len(found["searched"]) == 6
    assert found["runs"][0]["update"] == [0, 1]


def test_the_record_is_whole():
    content = require_whole(ARCHITECTURES)
    for task in TASKS:
        assert ends(content, task).keys() == LINES.keys()
        assert "Adam" in verdict(content, task, "acp_bounded")
    assert curves(content).layout.meta["alt"]
