"""What is not installed with torch alone: who needs it says so here, by the extra to install."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["MissingExtraError", "need"]


class MissingExtraError(ModuleNotFoundError):
    """An extra of the package has to be installed first; the message has the command."""


def need(user: str, extra: str, *modules: str) -> None:
    """Say what to install, unless all is there.

    Args:
        user: Who needs it.
        extra: Of ``pyproject.toml``.
        modules: Top-level names that are about to be imported. They are sought, and not imported.

    Raises:
        MissingExtraError: If one is not found.

    Example:
        >>> need("this page", "book", "sys", "no_such_module")
        Traceback (most recent call last):
        sogrid.extras.MissingExtraError: this page needs no_such_module: pip install "sogrid[book]"
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        text = f'{user} needs {", ".join(missing)}: pip install "sogrid[{extra}]"'
        raise MissingExtraError(text, name=missing[0])
