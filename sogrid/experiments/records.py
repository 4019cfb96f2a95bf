"""Records: what was run, on what, and the curves it gave. One JSON file each, enough to redraw a figure.

A record is written whole or not at all, carries a checksum of itself, and is refused if it does not
match. Its runs are added one by one, so an interrupted experiment keeps those that were finished, and
several processes may add to one record.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

__all__ = ["RESULTS", "Record", "RecordError", "provenance", "write_atomically"]

FORMAT = 1
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
ATTEMPTS = 100

RESULTS = Path(__file__).parents[2] / "book" / "results"
"""The records that the book shows (in a checkout)."""


class RecordError(ValueError):
    """A record cannot be read, or is not what its reader expected."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what was there before.

    Raises:
        OSError: If the folder cannot be written to (or is full); the old file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def alone(path: Path, timeout: float = -1) -> Iterator[bool]:
    """Keep other processes that do the same for ``path`` out of the block.

    The lock is a file beside it, ``<path>.lock``, which its holder removes.

    Args:
        path: Need not exist; its folder is made.
        timeout: Seconds to wait for the others; default until they are done.

    Yields:
        Whether they are kept out: False on a file system without locks.

    Raises:
        OSError: If the folder cannot be written to.
        TimeoutError: If another process is still at it.
    """
    lock = FileLock(f"{path}.lock", timeout, poll_interval=0.01)
    for left in reversed(range(ATTEMPTS)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            break
        except (FileExistsError, FileNotFoundError):  # another process may just have removed the folder
            if not left:
                raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            break
    try:
        yield lock.is_locked
    finally:
        with suppress(OSError):  # Windows: while it is open; there, the release removes it
            os.unlink(lock.lock_file)
        lock.release()


def difference(theirs: Any, ours: Any) -> str:
    """The part in which two JSON values differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        theirs, ours = ({key: side.get(key) for key in keys} for side in (theirs, ours))
    short = [text if len(text) < 120 else f"{text[:117]}..." for text in map(str, (theirs, ours))]
    return f"{short[0]}, not {short[1]}" if short[0] != short[1] else "different"


@cache
def _commit() -> str:
    """The source's commit, marked ``+changes`` if the work tree differs; ``"unknown"`` outside git.

    It is that of the first call: what runs is what was imported then.
    """
    here = Path(__file__).parents[1]
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        run("ls-files", "--error-unmatch", __file__)  # else it is installed inside another repository
        return run("rev-parse", "--short=12", "HEAD") + (
            "+changes" if run("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Date, source commit, versions and machine of a run."""
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sogrid": version("sogrid"),
        },
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Record:
    """An experiment's settings, provenance and runs, tied to a file.

    Args:
        path: Where it lives; an existing record there is read and continued.
        experiment: Its name, e.g. ``"fig6_2_mnist_autoencoder"``.
        settings: What defines the experiment (profile, data, sizes): JSON values. A file with other
            settings is refused, so that two experiments never mix.

    Raises:
        RecordError: If the file is damaged or belongs to another experiment.
    """

    def __init__(self, path: str | Path, experiment: str, settings: dict[str, Any]) -> None:
        """See the class."""
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "experiment": experiment,
            "settings": settings,
            "runs": [],
        }
        found = self._read_own()
        self.content, self._in_file = found, found["runs"]

    def _read_own(self) -> dict[str, Any]:
        """The content of the file, which which must be of this experiment; without one, no runs."""
        if not self.path.exists():
            return {**self.content, "runs": []}
        found = self.read(self.path)
        for key in ("experiment", "settings"):
            if found[key] != self.content[key]:
                raise RecordError(
                    f"{self.path} holds another {key}: {difference(found[key], self.content[key])}; "
                    "move it away or write to another place"
                )
        return found

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The verified content of a record file.

        Raises:
            RecordError: If it is missing, truncated, altered, or not a record of this format.
        """
        path = Path(path)
        if not path.exists():
            raise RecordError(f"there is no record {path}")
        try:
            content = json.loads(path.read_text(), parse_constant=_refuse)
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(
                f"{path} cannot be read as a record: {error}. It is as it was: restore it, or move it away"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise RecordError(f"{path} is not a sogrid record of format {FORMAT}")
        if not content.keys() >= {"experiment", "settings", "runs"}:
            raise RecordError(f"{path} is no whole record: it lacks its experiment, settings or runs")
        claimed = content.pop("checksum", None)
        if claimed != _checksum(content):
            raise RecordError(
                f"{path} was changed or damaged after it was written: its checksum does not match"
            )
        return content

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The run whose entries equal ``key``, if there is one."""
        return _find(self.content["runs"], json.loads(json.dumps(key)))

    def add(self, run: dict[str, Any], once: dict[str, Any] | None = None) -> None:
        """Append a run, after those that other processes have added meanwhile, and write the file.

        Args:
            run: JSON values.
            once: Only if there is no run yet whose entries equal these.

        Raises:
            RecordError: If the file cannot be written, or is no longer this record; it is left as it is.
            ValueError: If the run is not made of JSON values.
        """
        run, once = json.loads(json.dumps([run, once]))

        def change(content: dict[str, Any]) -> dict[str, Any]:
            there = once is not None and _find(content["runs"], once) is not None
            return {**content, "runs": content["runs"] if there else [*content["runs"], run]}

        self._write(change)

    def set_clock(self, clock: dict[str, Any]) -> None:
        """Note what an update of each method costs (see :mod:`lab.timing`); as :meth:`add`."""
        clock = json.loads(json.dumps(clock))
        self._write(lambda content: {**content, "clock": clock})

    def _write(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Write the file anew, as it is now but changed."""
        try:
            with alone(self.path) as is_alone:
                for leftover in self.path.parent.glob(f".{self.path.name}.*") if is_alone else ():
                    leftover.unlink()  # of a process killed while writing
                found = self._read_own()
                others = [other for other in found["runs"] if other not in self._in_file]
                content = change({**found, "runs": [*self.content["runs"], *others]})
                text = _dump({**content, "checksum": _checksum(content)})
                write_atomically(self.path, text.encode())
        except OSError as error:
            raise RecordError(
                f"{self.path} cannot be written: {error.strerror}. What it held before is intact: make the "
                "folder writable, with room for it, and run the same again"
            ) from error
        self.content, self._in_file = content, content["runs"]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _find(runs: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    return next((run for run in runs if all(run.get(k) == v for k, v in key.items())), None)


def _dump(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, so that a list of numbers does not fill pages."""
    text = json.dumps(content, indent=1, allow_nan=False)
    # Only line breaks go: there are none within strings, where they are escaped.
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
