"""The hooks of a watched module: its own, in front of any other, and in no copy or pickle of it.

One module has one set of hooks for all who listen to it. Other models in the process have none, cost
what they did and compile as they did. Copies and pickles are made of what ``__getstate__`` returns, which
Python looks up on the instance first; a watched module has one that leaves the hooks out.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sogrid.autograd import recording
from sogrid.private import breaking_graphs, recompile

__all__ = ["listen", "listeners", "watched"]

HOOKS = {
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
}
"""Where a module keeps the hooks of its forward pass, and which of them want more."""

_lock = threading.RLock()
_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()

Before = Callable[[list, nn.Module, tuple], None]
After = Callable[[list, nn.Module, tuple, Any], Tensor | None]


def watched() -> list[nn.Module]:
    """The modules that have hooks of this package now."""
    return list(_watches)


def listeners(module: nn.Module) -> list[Any]:
    """Who listens to a module."""
    watch = _watches.get(module)
    return [] if watch is None else [one for ref in watch.listeners if (one := ref()) is not None]


def listen(
    listener: Any, model: nn.Module, layers: Iterable[nn.Module], before: Before, after: After
) -> weakref.finalize:
    """Hook a model and layers until the returned finalizer is called or the listener is collected.

    Args:
        listener: Whoever listens; it is not kept alive, nor are the modules.
        model: Whose forward passes begin and end; only those count that autograd records.
        layers: Whose forward passes end.
        before: Called with all listeners, the model and the inputs when a pass begins.
        after: Called with all listeners, the module, the inputs and the output when one is over; may
            return another output.
    """
    modules = [weakref.ref(module) for module in dict.fromkeys((model, *layers))]
    reference = weakref.ref(listener)
    with _lock:
        for module in modules:
            watch = _watches.get(module()) or _Watch(module(), before, after)
            _watches[module()] = watch
            watch.listeners = (*watch.listeners, reference)
        _watches[model].hear_beginnings()
    recompile(model.modules())
    end = weakref.finalize(listener, _stop, reference, modules)
    end.atexit = False
    return end


def _stop(reference: weakref.ref, modules: list[weakref.ref[nn.Module]]) -> None:
    """Forget a listener, and take the hooks away with the last one."""
    with _lock:
        for module in filter(None, (ref() for ref in modules)):
            if (watch := _watches.get(module)) is None:
                continue
            watch.listeners = tuple(other for other in watch.listeners if other is not reference)
            if not watch.listeners:
                watch.remove()
                del _watches[module]


class _Watch:
    """A module's hook at the end of its forward pass, and if it is a model one at the beginning."""

    def __init__(self, module: nn.Module, before: Before, after: After) -> None:
        self.listeners: tuple[weakref.ref, ...] = ()
        self._module, self._functions = weakref.ref(module), (before, after)
        self._handles = [module.register_forward_hook(self._after, prepend=True, with_kwargs=True)]
        module.__dict__["__getstate__"] = self._state

    def hear_beginnings(self) -> None:
        """Be told, from now on, when a forward pass begins."""
        if len(self._handles) == 1:
            hook = self._module().register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            self._handles.append(hook)

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        if (module := self._module()) is not None:
            module.__dict__.pop("__getstate__", None)

    def _state(self) -> Any:
        """What a copy or pickle of the module is made of."""
        module = self._module()
        state = type(module).__getstate__(module)
        if not isinstance(state, dict):
            return state
        ours = {handle.id for handle in self._handles}
        state = {key: value for key, value in state.items() if key != "__getstate__"}
        for key in HOOKS & state.keys():
            state[key] = OrderedDict((id_, hook) for id_, hook in state[key].items() if id_ not in ours)
        return state

    def _heard_by(self, module: nn.Module) -> list:
        """Who listens; nobody to a replica of the module, which shares its hooks."""
        if module is not self._module() or not recording():
            return []
        return [one for ref in self.listeners if (one := ref()) is not None]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_dynamo_compiling():
            _uncompiled(self._begun, module, args, kwargs)
        else:
            self._begun(module, args, kwargs)

    def _begun(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if heard := self._heard_by(module):
            self._functions[0](heard, module, (*args, *kwargs.values()))

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        if torch.compiler.is_dynamo_compiling():
            return _uncompiled(self._over, module, args, kwargs, output)
        return self._over(module, args, kwargs, output)

    def _over(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        if isinstance(output, Tensor) and not output.requires_grad:
            return None
        heard = self._heard_by(module)
        inputs = (*args, *kwargs.values()) if kwargs else args
        return self._functions[1](heard, module, inputs, output) if heard else None


@breaking_graphs
def _uncompiled(function: Callable, *args) -> Any:
    """A compiled model breaks its graph here, and is watched like any other."""
    return function(*args)
