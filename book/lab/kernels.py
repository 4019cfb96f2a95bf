"""Kernels that start at once: forks of a process that has imported what pages import.

Most of what a short page costs is imports: torch, torch's compiler at the first optimizer, plotly. While
:func:`warm` is open, every IPython kernel that this process starts is a fork of a server that has imported
them, with the session, the folder and the environment that it would have had. The server imports other
people's packages only, so that each kernel reads our code from the tree. Only Linux can fork such a process
safely; elsewhere kernels start as they always do.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

__all__ = ["warm"]

IMPORTED = (
    "ipykernel.kernelapp",
    "ipywidgets",
    "myst_nb",
    "nbformat",
    "numpy",
    "optuna.storages",
    "plotly.graph_objs._figure",
    "scipy.spatial",
    "torch._dynamo",
)
"""None whose import depends on the kernel's environment, as that of ``plotly.io`` does."""

OURS = "sogrid", "lab"

NAME = "local-provisioner"


@contextmanager
def warm() -> Iterator[None]:
    """Start this process's kernels as forks of one server, which ends with the block."""
    if sys.platform != "linux":
        yield
        return
    provisioners = KernelProvisionerFactory.instance().provisioners
    usual, Fork.server = provisioners.get(NAME), Server()
    provisioners[NAME] = EntryPoint(NAME, "lab.kernels:Fork", KernelProvisionerFactory.GROUP_NAME)
    try:
        yield
    finally:
        provisioners[NAME] = usual
        Fork.server.close()


class Server:
    """The process that forks, as this one sees it."""

    def __init__(self):
        self.lock, (answers, answer) = threading.Lock(), os.pipe()
        command = [sys.executable, "-m", "lab.kernels", str(answer)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(answer,), text=True)
        os.close(answer)
        self.answers = os.fdopen(answers)

    def fork(self, arguments: list[str], folder: str, environment: dict[str, str]) -> int:
        """Start a kernel and return its process number, which is its group's too."""
        with self.lock:
            print(json.dumps([arguments, folder, environment]), file=self.process.stdin, flush=True)
            return int(self.answers.readline())

    def close(self) -> None:
        """End the server; a kernel that is left ends by itself."""
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


class Fork(LocalProvisioner):
    """Has the server start a kernel."""

    server: Server

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        """Launch a kernel; one of another language as always."""
        if "ipykernel_launcher" not in cmd:
            return await super().launch_kernel(cmd, **options)
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.cwd = os.fspath(options.get("cwd") or os.getcwd())
        self.pid = self.pgid = self.server.fork(arguments, self.cwd, options["env"])
        self.process = Process(self.pid)
        return self.connection_info


class Process:
    """What jupyter_client asks of a ``Popen``, for a process that is another one's child."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        """Say 0 if the process has ended, however it did."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    wait = poll

    def send_signal(self, number: int) -> None:
        """Send it a signal.

        Raises:
            ProcessLookupError: If it has ended.
        """
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _serve(answer: int) -> None:
    """Import, then fork for each line of the input, until it ends."""
    del sys.path[0]  # the folder that this was started in; a kernel adds its own
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # read as ipykernel is imported: a kernel ends with us
    for name in IMPORTED:
        with suppress(ImportError):
            import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]  # imported with this one; a kernel reads them anew
    gc.freeze()  # a kernel need not collect, and so copy, what all have
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        if not os.fork():
            return _be_a_kernel(answer, *json.loads(line))


def _reap(*_: Any) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _be_a_kernel(answer: int, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.write(answer, f"{os.getpid()}\n".encode())
    os.close(answer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    sys.argv[1:] = arguments
    import_module("ipykernel.kernelapp").launch_new_instance()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
