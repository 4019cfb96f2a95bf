"""What every test starts from: one seed, one thread (its children too), float32 as torch's default dtype.

Exact comparisons ask for float64 themselves: through ``cases.build`` or the ``draw`` fixture. What a test
measures (``references.measured``) is kept for ``pytest --ledger FILE``, see ``ledger.py``.
"""

import os
import signal
from pathlib import Path

import children
import ledger
import pytest
import references
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of child processes
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore


def pytest_addoption(parser):
    parser.addoption("--ledger", type=Path, metavar="FILE", help="record what the tests of claims measure")


def pytest_configure(config):
    if hasattr(os, "fork") and not hasattr(config, "workerinput"):  # one for all workers of pytest-xdist
        config.add_cleanup(children.Server().stop)
    if config.getoption("--ledger"):
        config.pluginmanager.register(ledger.Recorder(config.getoption("--ledger")))


@pytest.fixture(autouse=True)
def _seeded():
    """Seed torch, and undo any change of the default dtype."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _measured(request):
    """Keep what the test measures."""
    references.MEASURED.clear()
    yield
    request.node.user_properties.extend(references.MEASURED)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(2017)


@pytest.fixture
def draw(generator):
    """``draw(*shape)``: standard normal float64 numbers from the fixed seed."""
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
