"""The command line, ``python -m sogrid``: ``reproduce``, ``search`` and ``records``.

Torch is imported only by what needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sogrid.extras import MissingExtraError

__all__ = ["LAYOUT", "OK", "PROFILES", "add_options", "answer", "check_device", "checked", "main", "table"]

OK, FAILURE = 0, 1  # argparse exits with 2 for wrong usage

DESCRIPTION = "Rerun the experiments of the thesis, and look at the records that they leave."

ENDING = """\
examples:
  python -m sogrid reproduce fig6_2                     a few seconds: does everything run?
  python -m sogrid reproduce fig6_2 --profile laptop    the figure, on full MNIST
  python -m sogrid search mnist_autoencoder --out mine  hyperparameters of your own, for that OUT
  python -m sogrid records verify                       are the book's records intact?

Stop a run with Ctrl-C; the same command goes on where it stopped, also after a crash.

exit status: 0 done, 1 failed (one line says why), 2 wrong usage, 130 stopped by Ctrl-C
"""

REPRODUCE = """\
Run what is missing of a figure's record, OUT/FIG.PROFILE.json, which is written after each run. A run
under way saves its state every half minute and at Ctrl-C, in OUT/.checkpoints; the same command goes on
from there to the same curve. Other seeds and methods may go on in other processes at the same time,
into the same record. Learning curves use the hyperparameters that a `search` with this OUT has found, or
without one those of the book. In a notebook: papermill book/experiments/FIG.ipynb, see there.
"""

SEARCH = """\
Search the hyperparameters of every method of a benchmark by biased random search: the same number of
trials over the same domain, the criterion being the training risk after a fixed number of updates (laptop:
3,000 of the autoencoder, 5,000 of the CIFAR-10 network). On its way there the worse half of the trials
ends at each of three comparisons; then the best three are run twice more, and the best is chosen. The
record is OUT/search_BENCHMARK.PROFILE.json; `reproduce` with the same OUT uses it. Stopped, the same
command goes on: with the trials that there are, then with other proposals than it would have made.
--begin-with tries first what an earlier search, a shorter one say, has chosen. The studies
are Optuna's, in OUT/search_BENCHMARK.PROFILE.sqlite3: look at them with
`optuna-dashboard sqlite:///OUT/search_BENCHMARK.PROFILE.sqlite3`. With --storage, several machines work on
the same studies: start the same command on each.
"""

PROFILES = """\
profiles:
  smoke     five updates on 400 digits that come with the project; needs nothing
  laptop    10,000 updates of the autoencoder (5,000 in Fig. 5.1), 20,000 of the CIFAR-10 network, on the
            full data sets; point SOGRID_DATA at them (see README, Data)
  long      100,000 and 50,000 updates
  thesis    the thesis's 300,000 and 50,000 updates; for a GPU or a patient machine
"""


LAYOUT = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def _seed(text: str) -> int:
    """A seed that torch and NumPy can be given thousands of times of."""
    if not (text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**31 - 1}, got {text}")
    return int(text)


def _folder(text: str) -> str:
    for path in (Path(text), *Path(text).parents):
        if path.exists() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a file, and the record needs a folder")
    return text


OPTIONS: dict[str, dict[str, Any]] = {
    "profile": {"default": "smoke", "help": "how much of it, see below (default: smoke)"},
    "seed": {"type": _seed, "default": 0, "help": "of weights and data order (default: 0)"},
    "methods": {
        "nargs": "+",
        "default": (),
        "metavar": "METHOD",
        "help": "only these methods (default: all)",
    },
    "storage": {
        "metavar": "URL",
        "help": "database of the studies, e.g. postgresql+psycopg://user@host/name (default: SQLite in OUT)",
    },
    "begin-with": {
        "type": Path,
        "metavar": "RECORD",
        "help": "of an earlier search: what it chose for a method is that method's first trial",
    },
    "device": {"default": "cpu", "help": "where to compute, e.g. cuda (default: cpu)"},
    "out": {"type": _folder, "default": "out", "help": "folder of the record (default: out)"},
    "quiet": {"action": "store_true", "help": "no progress bars, only the result"},
}
"""What the commands have in common, here and in the book's laboratory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks, and return the exit status.

    Args:
        arguments: Without the program's name; default ``sys.argv``.
    """
    return answer(_parser(), arguments)


def answer(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Do the ``action`` that a parser found, and return the exit status; one line says what went wrong."""
    options, name = parser.parse_args(arguments), parser.prog.rpartition(" ")[2]
    try:
        return options.action(options)
    except KeyboardInterrupt as stop:
        print(f"\n{name}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "number", 2)
    except BrokenPipeError:  # as in `sogrid records list | head`
        sys.stderr.close()
        return OK
    except MissingExtraError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILURE
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _ours(error):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return FAILURE


def _ours(error: ValueError) -> bool:
    """Whether an error's message is written for the reader of a terminal."""
    from sogrid.experiments.checkpoints import CheckpointError
    from sogrid.experiments.data import DataError
    from sogrid.experiments.records import RecordError
    from sogrid.experiments.tuning import SearchError

    return isinstance(error, CheckpointError | DataError | RecordError | SearchError)


def add_options(command: argparse.ArgumentParser, *names: str) -> None:
    """Give a command some of :data:`OPTIONS`."""
    for name in names:
        command.add_argument(f"--{name}", **OPTIONS[name])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sogrid", description=DESCRIPTION, epilog=ENDING, **LAYOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    own = {"figure": ("seed",), "benchmark": ("storage", "begin-with")}
    for name, dest, metavar, text, description, action in (
        ("reproduce", "figure", "FIG", "run, or go on with, a figure", REPRODUCE, _reproduce),
        ("search", "benchmark", "BENCHMARK", "search a benchmark's hyperparameters", SEARCH, _search),
    ):
        command = commands.add_parser(name, help=text, description=description, epilog=PROFILES, **LAYOUT)
        command.add_argument(dest, metavar=metavar, help="its name, or the beginning of it")
        add_options(command, "profile", *own[dest], "methods", "device", "out", "quiet")
        command.set_defaults(action=action, parser=command)
    _add_records(commands.add_parser("records", help="list, show or verify records", description="Records."))
    return parser


def _add_records(records: argparse.ArgumentParser) -> None:
    verbs = records.add_subparsers(required=True, metavar="VERB")
    several = {"nargs": "*", "help": "records, or folders of them (default: those of the book)"}
    for name, action, number, text in (
        ("list", _list, several, "one line for each record"),
        (
            "verify",
            _verify,
            several,
            "read each record and compare it with its checksum; 1 if any is damaged",
        ),
        ("show", _show, {"help": "the record"}, "settings, runs and provenance of a record"),
    ):
        verb = verbs.add_parser(name, help=text, description=text.capitalize(), **LAYOUT)
        verb.add_argument("file" if name == "show" else "files", metavar="FILE", type=Path, **number)
        verb.set_defaults(action=action)


def _reproduce(options: argparse.Namespace) -> int:
    from sogrid.experiments.reproduce import COMPARISONS, EXPERIMENTS, Searches, record_path, reproduce

    plans = EXPERIMENTS | COMPARISONS
    name = checked(options, "figure", plans)
    plan = plans[name]
    searches = isinstance(plan, Searches)
    _check_methods(options, plan.samplers if searches else plan.methods)
    wanted = {key: getattr(options, key) for key in ("profile", "seed", "device", "out", "methods")}
    content = reproduce(name, **wanted, progress=not options.quiet)
    runs = [run for run in content["runs"] if run["seed"] == options.seed or searches]
    print(_runs({**content, "runs": runs}))
    print(f"\nrecord: {record_path(options.out, name, options.profile)}")
    return OK


def _search(options: argparse.Namespace) -> int:
    from sogrid.experiments.reproduce import search_path, tune, tuned_methods

    name = checked(options, "benchmark", tuned_methods())
    _check_methods(options, tuned_methods()[name])
    keys = ("profile", "device", "out", "methods", "storage", "begin_with")
    wanted = {key: getattr(options, key) for key in keys}
    content = tune(name, **wanted, progress=not options.quiet)
    print(_runs(content))
    print(f"\nrecord: {search_path(options.out, name, options.profile)}")
    return OK


def checked(options: argparse.Namespace, kind: str, known: Mapping[str, Any]) -> str:
    """The full name of the figure or benchmark; wrong usage if there is none, or of profile or device."""
    from sogrid.experiments.reproduce import PROFILES

    fail, given = options.parser.error, getattr(options, kind)
    exact = [name for name in known if name == given]
    found = exact or [name for name in known if name.startswith(given)]
    if len(found) != 1:
        verdict = "could be any of" if found else "is unknown; there are"
        fail(f"{kind} {given!r} {verdict}: {', '.join(found or known)}")
    if options.profile not in PROFILES:
        fail(f"--profile must be one of {', '.join(PROFILES)}, got {options.profile!r}")
    check_device(options)
    return found[0]


def _check_methods(options: argparse.Namespace, known: Sequence[str]) -> None:
    for method in options.methods:
        if method not in known:
            options.parser.error(f"--methods: there are {', '.join(known)}, got {method!r}")


def check_device(options: argparse.Namespace) -> None:
    """Wrong usage, in torch's words, if it cannot compute on the device."""
    import torch

    try:
        float(torch.zeros((), device=options.device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = str(error).splitlines()[0]
        options.parser.error(f"--device {options.device!r} cannot be used here: {problem}")


def _list(options: argparse.Namespace) -> int:
    from sogrid.experiments.records import Record, RecordError

    rows, damaged = [], []
    for file in _files(options.files):
        try:
            content = Record.read(file)
        except RecordError as error:
            damaged.append(error)
            continue
        runs = content["runs"]
        dates = {run["provenance"]["date"] for run in runs if "provenance" in run}
        profile = content["settings"].get("profile", "")
        rows.append((str(file), content["experiment"], profile, len(runs), max(dates, default="")))
    print(table([("file", "experiment", "profile", "runs", "last"), *rows]))
    for error in damaged:
        print(f"sogrid: {error}", file=sys.stderr)
    return FAILURE if damaged else OK


def _verify(options: argparse.Namespace) -> int:
    from sogrid.experiments.records import Record, RecordError

    status = OK
    for file in _files(options.files):
        try:
            content = Record.read(file)
        except RecordError as error:
            print(f"sogrid: {error}", file=sys.stderr)
            status = FAILURE
        else:
            print(f"ok  {file}  ({len(content['runs'])} runs)")
    return status


def _show(options: argparse.Namespace) -> int:
    from sogrid.experiments.records import Record

    content = Record.read(options.file)
    print(f"experiment  {content['experiment']}\n\nsettings")
    print(table([(f"  {key}", _plain(value)) for key, value in content["settings"].items()]))
    print(f"\nruns\n{_runs(content)}\n\nprovenance")
    numbered = enumerate(content["runs"], start=1)
    for origin, group in groupby(numbered, lambda entry: entry[1].get("provenance", {})):
        group = list(group)
        numbers = [str(number) for number, _ in group]
        print(f"  run {numbers[0]}" if len(group) == 1 else f"  runs {numbers[0]} to {numbers[-1]}")
        print(table([(f"    {key}", _plain(value)) for key, value in origin.items()]))
        for number, run in group:
            for part in run.get("resumed", ()):
                where = f"{part['date']}, commit {part['commit']}, {part['processor']}"
                print(f"    run {number} was resumed; up to update {part['update']:,}: {where}")
    return OK


def _runs(content: dict[str, Any]) -> str:
    """A table of a record's runs: learning curves and where they ended, or searches and what they found."""
    runs = list(enumerate(content["runs"], start=1))
    curves = [pair for pair in runs if "trials" not in pair[1]]
    searches = [pair for pair in runs if "trials" in pair[1]]
    return "\n".join(
        table([tuple(f"  {cell}" if i == 0 else cell for i, cell in enumerate(row)) for row in rows])
        for rows in (_curve_rows(curves), _search_rows(searches))
        if len(rows) > 1
    )


def _curve_rows(runs: list[tuple[int, dict[str, Any]]]) -> list[tuple]:
    rows = [("", "method", "seed", "updates", "seconds", "train", "test", "status", "settings")]
    for number, run in runs:
        ends = [(run.get(key) or [None])[-1] for key in ("update", "second", "train", "test")]
        formats = ("{:,}", "{:.1f}", "{:.4g}", "{:.4g}")
        ends = ["" if end is None else form.format(end) for form, end in zip(formats, ends, strict=True)]
        status = run.get("status", "") + (f" ({run['reason']})" if run.get("reason") else "")
        settings = _plain(run.get("settings", {}))
        rows.append((number, run.get("method", ""), run.get("seed", ""), *ends, status, settings))
    return rows


def _search_rows(runs: list[tuple[int, dict[str, Any]]]) -> list[tuple]:
    from sogrid.experiments.tuning import best_so_far, chosen, updates_spent

    rows = [("", "method", "sampler", "seed", "trials", "diverged", "updates", "best", "settings")]
    for number, run in runs:
        losses = run["trials"]["loss"]
        diverged = losses.count(None)
        found = (f"{best_so_far(run)[-1]:.4g}", _plain(chosen(run))) if diverged < len(losses) else ("", "")
        counts = len(losses), diverged, f"{updates_spent(run):,}"
        rows.append((number, run["method"], run["sampler"], run["seed"], *counts, *found))
    return rows


def _files(given: Sequence[Path]) -> list[Path]:
    """The records that were named, or lie in folders that were named.

    Raises:
        RecordError: If there is none.
    """
    from sogrid.experiments.records import RESULTS, RecordError

    files = []
    for path in given or [RESULTS]:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside or not path.exists():
            raise RecordError(f"{path}: {'no records there' if path.exists() else 'no such file or folder'}")
        files += inside
    here = Path.cwd()
    return [file.relative_to(here) if file.is_relative_to(here) else file for file in files]


def _plain(value: Any) -> str:
    """JSON values as one reads them: ``lr 0.1, scale 4.0``."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return str(value)


def table(rows: Sequence[tuple]) -> str:
    """Rows of cells, as columns of even width."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)] if cells else []
    padded = (map(str.ljust, row, widths) for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)
