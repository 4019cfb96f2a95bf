"""Checkpoints: the state of an unfinished run, so that a killed one goes on to the same curve.

A checkpoint is one file: a line that says what it is, the SHA-256 of the rest, and the rest as
``torch.save`` writes it, tensors and plain values only. It is written whole or not at all, and it says
which run it belongs to: what is damaged, or of another run, is refused by name and never used.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import signal
import threading
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from sogrid.experiments.records import alone, difference, provenance, write_atomically

__all__ = ["FOLDER", "Checkpoint", "CheckpointError", "Interrupted", "StopSignals", "source_digest"]

MAGIC = b"sogrid checkpoint 1\n"
FOLDER = ".checkpoints"
"""Beside the record; removed when it is empty."""

EVERY = 30.0
"""Seconds between checkpoints."""

PACKAGE = Path(__file__).parents[1]
TRAINING = {"experiments/benchmarks.py", "experiments/muon.py", "experiments/training.py"}
PROGRAMS = {"__main__.py", "cli.py"}
"""A curve's numbers come from these of the experiments, and from all else but the programs."""

PATIENCE = 0.1
"""Seconds that another process may still need to leave a place that it is done with."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written, or is of another run; the message says what to do."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal and left a checkpoint.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        """See the class."""
        super().__init__(message)
        self.number = number


class StopSignals:
    """Within its block, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Outside the main thread, and where a signal is ignored, nothing changes. A signal that nobody has
    ``taken`` acts when the block ends.

    Attributes:
        number: Of the signal that came, or ``None``.
    """

    def __init__(self) -> None:
        """See the class."""
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def take(self) -> int:
        """The signal's number; the caller acts on it."""
        number, self.number = self.number, None
        return number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self._restore()
        if kind is None and self.number is not None:
            signal.raise_signal(self.take())

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


class Checkpoint:
    """The place of one run's state, for one process at a time.

    A block ``with Checkpoint(path) as checkpoint:`` holds the place. Leaving it without an error says that
    the run's result is safe elsewhere, and deletes the state; leaving it with one keeps the state.

    Args:
        path: The file.
        every: Seconds between two saves; default :data:`EVERY`.

    Attributes:
        identity: What the state belongs to, as JSON values. Filled in before the first use by those who
            know: a state saved under another identity is refused.
        resumed: One entry for each time the run was taken up: ``update`` after which, and ``date``,
            ``commit`` and ``processor`` of the part before.

    Raises:
        CheckpointError: On entering, if the folder cannot be written to or another process runs this run.
    """

    def __init__(self, path: str | Path, every: float | None = None) -> None:
        """See the class."""
        self.path = Path(path)
        self.every = EVERY if every is None else every
        self.identity: dict[str, Any] = {}
        self.resumed: list[dict[str, Any]] = []
        self._origin: dict[str, Any] = {}
        self._alone: AbstractContextManager | None = None
        self._saved = monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return monotonic() - self._saved >= self.every

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU, or ``None`` where there is no file.

        Raises:
            CheckpointError: If it is unreadable, truncated, altered, or of another run. It stays where
                it is.
        """
        advice = "Delete it to start this run from its beginning"
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}. {advice}") from error
        payload = content[len(MAGIC) + 65 :]
        if content != _header(payload) + payload:
            raise CheckpointError(f"{self.path} is truncated, altered or no checkpoint. {advice}")
        try:
            found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            theirs, ours = found["identity"], _plain(self.identity)
            state, resumed, origin = found["state"], found["resumed"], found["origin"]
        except Exception as error:  # torch has many types for what it refuses to unpickle
            raise CheckpointError(f"{self.path} is no checkpoint that can be read here. {advice}") from error
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                found = difference(theirs.get(key), ours.get(key))
                raise CheckpointError(
                    f"{self.path} is of another run, of {origin['date']} and commit {origin['commit']}: its "
                    f"{key} is {found}. {advice}, or go back to what it was made with to finish it"
                )
        self.resumed = [*resumed, {"update": state["update"], **origin}]
        self._saved = monotonic()
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was saved.

        Args:
            state: Tensors and plain values; its ``"update"`` is the number of updates done.

        Raises:
            CheckpointError: If it cannot be written; what was saved before is intact.
        """
        if not self._origin:
            origin = provenance()
            self._origin = {key: origin[key] for key in ("date", "commit")}
            self._origin["processor"] = origin["machine"]["processor"]
        buffer = io.BytesIO()
        content = {"identity": _plain(self.identity), "origin": self._origin, "resumed": self.resumed}
        torch.save({**content, "state": state}, buffer)
        payload = buffer.getvalue()
        try:
            write_atomically(self.path, _header(payload) + payload)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error.strerror}. What was saved before is intact: make the "
                "folder writable, with room for it, and run the same again"
            ) from error
        self._saved = monotonic()

    def __enter__(self) -> Checkpoint:
        self._alone = alone(self.path, PATIENCE)
        try:
            self._alone.__enter__()
        except TimeoutError as error:
            raise CheckpointError(f"{self.path}: another process is at this run; wait for it") from error
        except OSError as error:
            raise CheckpointError(
                f"{self.path.parent} cannot be written to, so that the run could not be resumed: "
                f"{error.strerror}. Choose another folder"
            ) from error
        for leftover in self.path.parent.glob(f".{self.path.name}.*"):  # of a process killed while saving
            leftover.unlink(missing_ok=True)
        self._saved = monotonic()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        with suppress(OSError):
            if kind is None:
                self.path.unlink(missing_ok=True)
        self._alone.__exit__(None, None, None)
        if self.path.parent.name == FOLDER:
            with suppress(OSError):  # while other runs have their checkpoints there
                self.path.parent.rmdir()


@cache
def source_digest() -> str:
    """Digest of the code that a curve's numbers come from; comments and docstrings do not count.

    It is that of the first call: what runs is what was imported then.
    """
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name in TRAINING or not (name in PROGRAMS or name.startswith("experiments/")):
            digest.update(f"{name}: {_code(file.read_bytes())}\n".encode())
    return digest.hexdigest()[:16]


def _code(source: bytes) -> str:
    """What a file says without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    """Whether it is a string and nothing else: what documents a function, or the line above."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def _header(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))
