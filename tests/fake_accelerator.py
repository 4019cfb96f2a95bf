"""An accelerator without hardware: it computes nothing, and refuses whatever would make the host wait.

Inside :func:`accelerator` tensors have shapes, dtypes and a device, but no numbers (torch's
``FakeTensorMode`` on a backend named from Python), and two rules hold for every operation, those that
autograd runs in a thread of its own included:

1. every tensor an operation takes or returns lives on the accelerator: no copy to or from the host,
   no host tensor mixed in, not even a scalar or an index;
2. no operation has a result that the host must look at: ``.item()``, ``if tensor:``, boolean masks,
   and the factorisations that check for success.

What the rules cannot see is a kernel that waits inside itself. Those known to do so are in
:data:`WAITS`, from reading the CUDA sources; the list is only as good as that reading.

Naming a backend is per process and changes it for good: a backward pass aborts if one ran before the
naming (the engine has no thread for the new device), and ``torch.random.fork_rng`` and pinned memory
break after it. So tests that use it run in a process of their own, see :func:`run_apart`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DeviceFault", "accelerator", "main", "run_apart", "seeds"]

NAME = "fakegpu"

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,  # .item(), float(), bool(), if
    aten._linalg_check_errors,  # linalg.cholesky, inv, solve, ...; their _ex forms do not
    aten._linalg_eigh,  # checks inside
    aten._linalg_svd,
    aten._linalg_eigvals,
    aten.linalg_eig,
    aten.linalg_lstsq,
    aten.equal,
    aten.allclose,
    aten.nonzero,  # and all others whose shape depends on values
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.bincount,
}

seeds: list[int] = []
"""The seeds given to generators of the accelerator, in order, since :func:`accelerator` was entered."""


class DeviceFault(RuntimeError):
    """The host would have waited, or a tensor was not where it should be."""


class _Generator(torch.Generator):
    """``torch.Generator`` for the accelerator too, which a backend named from Python cannot provide."""

    accelerated = False

    def __new__(cls, device="cpu"):
        device = torch.device(device)
        if device.type != NAME:
            return torch.Generator.__base__.__new__(cls, device) if False else super().__new__(cls, device)
        generator = super().__new__(cls)
        generator.accelerated = True
        return generator

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self.accelerated else super().device

    def manual_seed(self, seed: int) -> _Generator:
        if self.accelerated:
            seeds.append(seed)
        return super().manual_seed(seed)
