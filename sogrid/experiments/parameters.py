"""Parameters of a papermill template: refused by name when unknown or of the wrong type.

papermill only logs a parameter that a notebook does not have. A template's parameters are annotated in
its cell tagged ``parameters``; the next cell hands its namespace to :func:`checked`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ParameterError", "checked"]

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
NOTEBOOK = {"In", "Out"}


class ParameterError(ValueError):
    """A template was given a parameter that it does not have, or one of the wrong type."""


def checked(namespace: dict[str, Any]) -> dict[str, Any]:
    """The annotated parameters of a notebook's namespace, name → value.

    An ``int`` is taken where a ``float`` is declared.

    Args:
        namespace: ``globals()``, in the cell after the parameters.

    Raises:
        ParameterError: For a plain value whose name is not annotated, or a value whose type is not its
            annotation's; the message names it.

    Example:
        >>> checked({"__annotations__": {"seed": int}, "seed": 3})
        {'seed': 3}
        >>> checked({"__annotations__": {"seed": int}, "seed": 3, "sead": 4})
        Traceback (most recent call last):
        ...
        sogrid.experiments.parameters.ParameterError: unknown parameter 'sead'; there are: seed (int)
    """
    declared = namespace.get("__annotations__", {})
    known = ", ".join(f"{name} ({kind.__name__})" for name, kind in declared.items())
    for name, value in namespace.items():
        plain = isinstance(value, PLAIN) and not name.startswith("_") and name not in NOTEBOOK
        if plain and name not in declared:
            raise ParameterError(f"unknown parameter {name!r}; there are: {known}")
    values = {}
    for name, kind in declared.items():
        value = namespace[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ParameterError(
                f"parameter {name!r} must be {kind.__name__}, got {value!r} ({type(value).__name__})"
            )
        values[name] = value
    return values
