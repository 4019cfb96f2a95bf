"""What tests of the book share."""

import pytest

from lab import kernels


@pytest.fixture(scope="session")
def quick_kernels():
    """Kernels that start at once, see ``lab.kernels``."""
    with kernels.warm():
        yield
