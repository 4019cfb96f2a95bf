"""Children of a warm process: fresh Python programs, without the seconds that importing torch takes.

A server, started once for all of pytest's workers, imports the packages at the first request and does nothing
else with them. It forks the children: each has its own streams, signals, environment and exit status.
"""

import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
ADDRESS = "SOGRID_CHILDREN"
"""Environment variable with the address of the server."""

WARM = ("torch", "torch._dynamo", "alembic.command", "optuna.storages._rdb.alembic", "psycopg", "pytest")
WARM += ("sqlalchemy.dialects.sqlite", "sogrid.cli", "sogrid.experiments.reproduce")
PROGRAM = "import sys, sogrid.cli; sys.exit(sogrid.cli.main())"
NUMBER = struct.Struct("i")


class Child:
    """A program in a process of its own, to be used as a :class:`subprocess.Popen`; its streams are text.

    Args:
        code: The program.
        arguments: Its ``sys.argv[1:]``.
        path: Folders from which it imports before all others.
    """

    def __init__(self, code: str, *arguments: object, path: tuple[Path, ...] = ()) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS])
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        socket.send_fds(self._server, [b"."], [out_end, err_end])
        os.close(out_end)
        os.close(err_end)
        variables = {k: v for k, v in os.environ.items() if k != "SOGRID_DATA"} | {"OMP_NUM_THREADS": "1"}
        plan = [code, list(map(str, arguments)), list(map(str, path)), variables]
        self._server.sendall(json.dumps(plan).encode() + b"\n")
        self.pid = self._number()

    def _number(self) -> int:
        return NUMBER.unpack(self._server.recv(NUMBER.size))[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"child {self.pid}", timeout)
            self.returncode = self._number()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return texts[0].result(), texts[1].result()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()
        self._server.close()


def program(*arguments: object) -> Child:
    """``python -m sogrid``."""
    return Child(PROGRAM, *arguments)


class Server:
    """The warm process; it waits, without any import, until it is needed."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="sogrid", dir="/tmp")  # a socket's path must be short
        os.environ[ADDRESS] = f"{self._folder}/socket"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], env=variables, **streams)
        self._process.stdout.readline()  # it listens

    def stop(self) -> None:
        """End it, so that what its children have computed counts as pytest's."""
        self._process.communicate()
        shutil.rmtree(self._folder)


def serve() -> str:
    """Fork children until standard input is closed; return in a child, the program that it has to become."""
    running: dict[int, socket.socket] = {}

    def reap(*_) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if (client := running.pop(ended[0], None)) is not None:
                    with suppress(OSError), client:  # a test that failed no longer listens
                        client.sendall(NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[ADDRESS])
    listener.listen()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, reap)
    print(flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        _, ends, *_ = socket.recv_fds(client, 1, 2)
        plan = json.loads(client.makefile().readline())
        for package in WARM:
            with suppress(ImportError):  # those who need it will say so
                import_module(package)
        gc.freeze()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if (pid := os.fork()) == 0:
            return _become(ends, *plan)
        running[pid] = client
        client.sendall(NUMBER.pack(pid))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for end in ends:
            os.close(end)
    os._exit(0)


def _become(ends, code: str, arguments: list[str], path: list[str], variables: dict[str, str]) -> str:
    for number, end in enumerate([os.open(os.devnull, os.O_RDONLY), *ends]):
        os.dup2(end, number)
        os.close(end)
    sys.argv, sys.path = ["child", *arguments], [*path, *sys.path]
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    return code


def run(code: str) -> int:
    """The exit status of a program."""
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = run(serve())
    sys.stdout.flush()
    os._exit(status)  # an orderly end would touch, and so copy, all of the server's memory
