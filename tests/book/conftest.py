"""What tests of the book share."""

import pytest
from book.screenshots import chromium

from lab import kernels


@pytest.fixture(scope="session")
def driver():
    """One browser for all tests of a worker; each opens the page that it needs, see ``screenshots.py``."""
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def quick_kernels():
    """Kernels that start at once, see ``lab.kernels``."""
    with kernels.warm():
        yield
