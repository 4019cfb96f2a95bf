"""What torch keeps private, in one place; each with what serves where a version has it no more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from types import CodeType
from typing import Any

import torch
from torch import nn

__all__ = [
    "after_backward",
    "breaking_graphs",
    "graph_task",
    "recompile",
    "transformed",
    "will_execute",
    "without_autocast",
]


def _of(owner: Any, name: str, instead: Callable) -> Callable:
    return getattr(owner, name, instead)


graph_task: Callable[[], int] = _of(torch._C, "_current_graph_task_id", lambda: -1)
"""The number of the backward pass that is running, −1 outside any."""

will_execute: Callable[[Any], bool] = _of(torch._C, "_will_engine_execute_node", lambda node: True)
"""Whether the backward pass that is running comes to a node; a ``RuntimeError`` at the leaves of
``torch.autograd.grad``."""

after_backward: Callable[[Callable[[], None]], None] = _of(
    getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback", lambda call: None
)
"""Have something called when the backward pass that is running is over."""

_interpreters = _of(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)

breaking_graphs: Callable[[Callable], Callable] = _of(torch, "_disable_dynamo", torch.compiler.disable)
"""A function at which ``torch.compile`` breaks its graph; dynamo is not imported for it."""


def recompile(modules: Iterable[nn.Module]) -> None:
    """Have ``torch.compile`` look again at modules that it compiled before they had hooks, if it did."""
    if (dynamo := sys.modules.get("torch._dynamo")) is None:
        return
    reset = _of(dynamo.eval_frame, "reset_code", lambda code: None)
    inline = _of(dynamo.external_utils, "wrap_inline", lambda function: function)  # what wraps torch's own
    functions = [getattr(module.forward, "__func__", module.forward) for module in modules]
    codes = [getattr(function, "__code__", None) for function in functions]
    for code in {*codes, *inline.__code__.co_consts}:
        if isinstance(code, CodeType):
            reset(code)


def transformed() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return _interpreters() is not None


def _autocast_off() -> AbstractContextManager:
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


without_autocast: Callable[[], AbstractContextManager] = _of(torch._C, "_DisableAutocast", _autocast_off)
"""A context in which no operation is autocast, on any device."""
