"""What ``import sogrid`` offers."""

import subprocess
import sys

import pytest

import sogrid


@pytest.mark.parametrize("name", sogrid.__all__)
def test_public_names_are_those_of_their_modules(name):
    value = getattr(sogrid, name)
    assert value.__name__ == name
    assert name in dir(sogrid)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="'Sgd'"):
        sogrid.Sgd  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, sogrid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
