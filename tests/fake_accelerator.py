"""An accelerator without hardware: it computes nothing, and refuses whatever would make the host wait.

Inside :func:`accelerator` tensors have shapes, dtypes and a device, but no numbers (torch's
``FakeTensorMode`` on a backend named from Python), and two rules hold for every operation, those of
autograd included:

1. every tensor that an operation takes or returns lives on the accelerator: nothing is copied to or
   from the host, and no host tensor is mixed in, not even an index or (unless allowed) a scalar;
2. no operation has a result that the host must look at: ``.item()``, ``if tensor:``, boolean masks,
   and the factorisations that check for success.

A kernel that waits inside itself is invisible to the rules; those known to do so are listed in
:data:`WAITS`, which is only as good as our reading of the CUDA sources.

Naming a backend changes a process for good: ``torch.random.fork_rng`` and pinned memory break after it,
``torch.accelerator`` finds an accelerator, and a threaded backward pass aborts if any ran before (the
engine has no thread for the new device). Tests that use it therefore run in a process of their own, by
:func:`run_apart`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sogrid import finite

__all__ = ["DeviceFault", "Generator", "Reading", "accelerator", "main", "preparing", "run_apart"]

NAME = "fakegpu"

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,  # .item(), float(), bool(), if
    aten._linalg_check_errors,  # linalg.cholesky, inv, solve, ...; their _ex forms are free of it
    aten._linalg_eigh,  # these check inside
    aten._linalg_eigvals,
    aten._linalg_svd,
    aten.linalg_eig,
    aten.linalg_lstsq,
    aten.allclose,
    aten.equal,
    aten.bincount,  # and these have shapes that depend on values
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class DeviceFault(RuntimeError):
    """The host would have waited, or a tensor was not where it should be."""


_faults: list[str] = []
"""Those of the case under way: autograd's engine may lose an exception, and says so with another."""


def _fault(message: str) -> DeviceFault:
    """The exception; printed too in a backward pass, where an exception aborts under a Python backend."""
    _faults.append(f"DeviceFault: {message}")
    if torch._C._current_graph_task_id() != -1:
        traceback.print_stack()
        print(f"DeviceFault: {message}", file=sys.stderr, flush=True)
    return DeviceFault(message)


class Generator(torch.Generator):
    """``torch.Generator``, for the accelerator too: a backend named from Python cannot provide one.

    Attributes:
        seeds: The seeds of all generators on the accelerator, in order.
    """

    seeds: list[int] = []  # noqa: RUF012
    accelerated = False

    def __new__(cls, device: str | torch.device = "cpu") -> Generator:
        accelerated = torch.device(device).type == NAME
        generator = super().__new__(cls, "cpu" if accelerated else device)
        generator.accelerated = accelerated
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self.accelerated else super().device

    def manual_seed(self, seed: int) -> Generator:
        if self.accelerated:
            self.seeds.append(seed)
        return super().manual_seed(seed)


class Reading:
    """In the place of :func:`sogrid.finite.read`.

    Attributes:
        counts: How many numbers were read, each time.
        planted: Which of those that are read next are NaN; the others are zero.
    """

    counts: list[int] = []  # noqa: RUF012
    planted: set[int] = set()  # noqa: RUF012

    @classmethod
    def read(cls, sizes: Tensor) -> list[float]:
        if sizes.device.type != NAME or sizes.dim() != 1:
            raise _fault(f"a tensor of shape {tuple(sizes.shape)} on {sizes.device} is read")
        cls.counts.append(len(sizes))
        return [float("nan") if i in cls.planted else 0.0 for i in range(len(sizes))]


class _Calls(TorchFunctionMode):
    """What is only visible above the dispatcher: whose generator it is, and numbers made into tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if generator is not None:
            kwargs["generator"] = None  # torch's fake random operations know none
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as error:
            if _Operations.suspended and function is torch.tensor:
                return torch.full((), *args, **kwargs)
            if "aten::empty_strided" in str(error):
                raise _fault(f"{function.__name__}: Python numbers are copied to the device") from error
            raise
        if generator is not None and isinstance(result, Tensor) and result.device != generator.device:
            raise _fault(f"{function.__name__}: {result.device} draws from a {generator.device} generator")
        return result


class _Operations(TorchDispatchMode):
    """The two rules."""

    suspended = False

    def __init__(self, host_scalars: bool) -> None:
        super().__init__()
        self.host_scalars = host_scalars

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _Operations.suspended or function.namespace == "prim":  # "prim": x.device
            return function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        packet = function.overloadpacket
        waits = packet in WAITS or (packet in INDEXING and any(t.dtype == torch.bool for t in given[1:]))
        if waits and any(t.device.type == NAME for t in given):
            raise _fault(f"{function}: the host waits for the device")
        result = function(*args, **kwargs)
        tensors = given + [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if packet in COPIES and len({t.device.type for t in tensors}) > 1:
            raise _fault(f"{function}: a copy between host and device")
        for tensor in tensors:
            where, shape = tensor.device, tuple(tensor.shape)
            if where.type not in (NAME, "meta") and not (self.host_scalars and shape == ()):
                raise _fault(f"{function}: a tensor of shape {shape} is on {where}")
        return result


class _Fakes(FakeTensorMode):
    """Copies of a tensor belong to the same mode as the tensor."""

    def __deepcopy__(self, memo) -> _Fakes:
        return self


@functools.cache
def _name_backend() -> None:
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def accelerator(*, host_scalars: bool = False, threaded: bool = False) -> Iterator[torch.device]:
    """Enforce the rules of the module, and give the device.

    Args:
        host_scalars: Let 0-d host tensors take part: torch passes their values along, as it does
            with Python numbers.
        threaded: Run backward passes in the engine's thread for the device, as a GPU does.
    """
    _name_backend()
    for kept in (Generator.seeds, Reading.counts, Reading.planted):
        kept.clear()
    with (
        _Fakes(allow_non_fake_inputs=False),
        _Operations(host_scalars),
        _Calls(),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(finite, "read", Reading.read),
        torch.autograd.set_multithreading_enabled(threaded),
    ):
        yield torch.device(NAME, 0)


@contextmanager
def preparing() -> Iterator[None]:
    """Suspend the rules: building a model may copy numbers to the device (batch norm's counter does)."""
    _Operations.suspended = True
    try:
        yield
    finally:
        _Operations.suspended = False


# --- a process of its own --------------------------------------------------------------------------


def main(cases: dict[str, Callable[[], None]]) -> None:
    """Run the cases named on the command line, or all; print [name, traceback or ""] for each, in JSON."""
    print("ready", flush=True)
    for name in sys.argv[1:] or cases:
        _faults.clear()
        try:
            cases[name]()
            outcome = ""
        except Exception:
            outcome = "\n".join([traceback.format_exc(), *_faults])
        print(json.dumps([name, outcome]), flush=True)


def run_apart(script: str, names: Iterable[str], timeout: float = 900.0) -> dict[str, str]:
    """Run the named cases of a script that ends in :func:`main`, in a fresh Python.

    Returns:
        Name → traceback, empty if the case passed. A case that takes its process down gets the last
        words of that process, and those after it another process.

    Raises:
        RuntimeError: If the script does not start.
    """
    report: dict[str, str] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    while remaining := [name for name in names if name not in report]:
        command = [sys.executable, script, *remaining]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        if not done.stdout.startswith("ready"):
            raise RuntimeError(f"{script} did not start:\n{done.stderr}")
        report |= dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
        for name in remaining:
            if name not in report:
                report[name] = f"exit status {done.returncode}\n{done.stderr[-10_000:]}"
                break
    return report
