"""The command line of the book's laboratory, ``python -m lab``: what measures time, memory and defaults.

Torch is imported only by what needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from sogrid.cli import (
    LAYOUT,
    OK,
    PROFILES,
    add_options,
    answer,
    check_device,
    checked,
    table,
)

__all__ = ["main"]

DESCRIPTION = "Measure what the book says of time and memory."

CLOCK = """\
Measure what an update of each method of a figure costs, interleaved in one process, and put the result
into the figure's record, where it makes the time axis. Do it on an otherwise idle machine.
"""

BENCH = """\
Measure what an update of each method costs, in time and memory, beside torch's optimizers and the libraries
of `make bench`, all interleaved in one process; and how that grows. The record is OUT/bench.json, of a GPU
OUT/bench.cuda.json. Do it on an otherwise idle machine.
"""

OUT_OF_THE_BOX = """\
Train six networks with the line of the README, one for all, and with Adam and its defaults, from three
seeds: some minutes for each on one thread. The record is OUT/out_of_the_box.json; what it holds is not run
again.
"""

REFRESHING = """\
Train the thesis's autoencoder under fixed schedules of refreshes and under an adaptive one, from three seeds:
half an hour on one thread. With --clock, on an idle machine, measure what updates and refreshes cost.
The record is OUT/adaptive_refresh.json; what it holds is not run again.
"""

CONTEST = """\
Search and train the thesis's methods and today's to one training loss of the thesis's autoencoder: hours on
one thread; stopped, the same command goes on. With --clock, on an idle machine, measure what their updates
cost. The record is OUT/contest.json. SOAP and Shampoo need the packages of `make bench`.
"""

STUDY = """\
Search methods of a study on one grid, run the best of each from other seeds, and leave the record:
OUT/NAME.json; what it holds is not run again. Minutes each on one thread.
"""

STUDIES = {
    "centring": ("lab.centring", "CENTRING"),
    "newton-muon": ("lab.centring", "NEWTON_MUON"),
    "better-blocks": ("lab.blocks", "BETTER_BLOCKS"),
    "gan": ("lab.gan", "GAN"),
    "architectures": ("lab.architectures", "ARCHITECTURES"),
    "published-autoencoder": ("lab.published", "PUBLISHED"),
}

LABORATORY = """\
Write down what the page "Laboratory" has to compute: the losses of sogrid's optimizers from its weights, on
its minibatches. Some seconds on one thread.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks, and return the exit status.

    Args:
        arguments: Without the program's name; default ``sys.argv``.
    """
    return answer(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lab", description=DESCRIPTION, **LAYOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "measure the time axis of a figure"
    command = commands.add_parser("clock", help=text, description=CLOCK, epilog=PROFILES, **LAYOUT)
    command.add_argument("figure", metavar="FIG", help="its name, or the beginning of it")
    add_options(command, "profile", "device", "out", "quiet")
    command.set_defaults(action=_clock, parser=command)

    text = "what an update costs, ours beside torch's and other libraries'"
    command = commands.add_parser("bench", help=text, description=BENCH, **LAYOUT)
    text = "only these: mnist_autoencoder, cifar10_classifier, low_rank, convolutions, narrow, transformer"
    text = f"{text}, growth, compile (default: all)"
    command.add_argument("--parts", nargs="+", metavar="PART", help=text)
    command.add_argument("--rounds", type=int, default=30, help="updates timed of each method (default: 30)")
    add_options(command, "device", "out", "quiet")
    command.set_defaults(action=_bench, parser=command)

    text = "the README's line on six tasks, beside Adam's"
    command = commands.add_parser("out-of-the-box", help=text, description=OUT_OF_THE_BOX, **LAYOUT)
    text = "only these: digits, normalised, cifar10, convolutions, transformer, autoencoder"
    command.add_argument("--tasks", nargs="+", metavar="TASK", help=f"{text} (default: all)")
    command.add_argument("--updates", type=int, default=300, help="of each run (default: 300)")
    add_options(command, "out", "quiet")
    command.set_defaults(action=_out_of_the_box, parser=command)

    text = "when to refresh: fixed schedules beside an adaptive one"
    command = commands.add_parser("refreshing", help=text, description=REFRESHING, **LAYOUT)
    command.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these: acp_bounded, kfac_bounded"
    )
    command.add_argument("--updates", type=int, default=500, help="of each run (default: 500)")
    command.add_argument("--clock", action="store_true", help="measure prices in the place of losses")
    add_options(command, "out", "quiet")
    command.set_defaults(action=_refreshing, parser=command)

    text = "the thesis's methods against today's, to one loss"
    command = commands.add_parser("contest", help=text, description=CONTEST, **LAYOUT)
    command.add_argument("--methods", nargs="+", metavar="METHOD", help="only these (default: all)")
    command.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these of the ten")
    command.add_argument("--clock", action="store_true", help="measure prices in the place of losses")
    add_options(command, "out", "quiet")
    command.set_defaults(action=_contest, parser=command)

    text = f"a study of the book: {', '.join(STUDIES)}"
    command = commands.add_parser("study", help=text, description=STUDY, **LAYOUT)
    command.add_argument("name", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    add_options(command, "out", "quiet")
    command.set_defaults(action=_study, parser=command)

    text = "what the Laboratory's engine has to compute"
    command = commands.add_parser("laboratory", help=text, description=LABORATORY, **LAYOUT)
    command.set_defaults(action=_laboratory, parser=command)
    return parser


def _clock(options: argparse.Namespace) -> int:
    from lab.timing import clock
    from sogrid.experiments.records import RecordError
    from sogrid.experiments.reproduce import EXPERIMENTS, Curves, record_path

    name = checked(options, "figure", {k: v for k, v in EXPERIMENTS.items() if isinstance(v, Curves)})
    path = record_path(options.out, name, options.profile)
    if not path.exists():
        make = f"python -m sogrid reproduce {name} --profile {options.profile} --out {options.out}"
        raise RecordError(f"there is no record {path} to time the methods of: run {make} first")
    rows = clock(path, device=options.device, progress=not options.quiet)
    print(table([("  method", "ms per update", "quartiles", "ratio to SGD", "ms per refresh"), *rows]))
    print(f"\nrecord: {path}")
    return OK


def _bench(options: argparse.Namespace) -> int:
    from lab.bench import PARTS, bench, bench_path, report

    fail, parts = options.parser.error, options.parts or PARTS
    for part in parts:
        if part not in PARTS:
            fail(f"--parts: there are {', '.join(PARTS)}, got {part!r}")
    if options.rounds < 2:
        fail(f"--rounds must be 2 or more, got {options.rounds}")
    check_device(options)
    wanted = {key: getattr(options, key) for key in ("rounds", "device", "out")}
    content = bench(parts=parts, **wanted, progress=not options.quiet)
    for title, rows in report(content).items():
        print(f"{title}\n{table(rows)}\n")
    print(f"record: {bench_path(options.out, options.device)}")
    return OK


def _out_of_the_box(options: argparse.Namespace) -> int:
    from lab.out_of_the_box import TASKS, out_of_the_box, report

    fail, tasks = options.parser.error, options.tasks or tuple(TASKS)
    for task in tasks:
        if task not in TASKS:
            fail(f"--tasks: there are {', '.join(TASKS)}, got {task!r}")
    if options.updates < 1:
        fail(f"--updates must be 1 or more, got {options.updates}")
    wanted = {key: getattr(options, key) for key in ("updates", "out")}
    content = out_of_the_box(tasks=tasks, **wanted, progress=not options.quiet)
    print(f"{table(report(content))}\n\nrecord: {Path(options.out) / 'out_of_the_box.json'}")
    return OK


def _refreshing(options: argparse.Namespace) -> int:
    from lab.refreshing import METHODS, refreshing, report

    fail, methods = options.parser.error, options.methods or tuple(METHODS)
    for method in methods:
        if method not in METHODS:
            fail(f"--methods: there are {', '.join(METHODS)}, got {method!r}")
    if options.updates < 1:
        fail(f"--updates must be 1 or more, got {options.updates}")
    wanted = {key: getattr(options, key) for key in ("updates", "out")}
    content = refreshing(methods=methods, **wanted, clocked=options.clock, progress=not options.quiet)
    for method in methods:
        if all(
            any(run["method"] == method and key in run for run in content["runs"])
            for key in ("every", "part")
        ):
            print(table(report(content, method)))
    print(f"record: {Path(options.out) / 'adaptive_refresh.json'}")
    return OK


def _contest(options: argparse.Namespace) -> int:
    from lab.contest import METHODS, PACKAGE, PACKAGED, SEEDS, clock, contest

    fail, methods, seeds = options.parser.error, options.methods or METHODS, options.seeds or SEEDS
    for method in methods:
        if method not in METHODS:
            fail(f"--methods: there are {', '.join(METHODS)}, got {method!r}")
    for seed in seeds:
        if seed not in SEEDS:
            fail(f"--seeds: there are {', '.join(map(str, SEEDS))}, got {seed}")
    if options.clock and (options.methods or options.seeds):
        fail("--clock times all methods that have been searched: leave --methods and --seeds out")
    try:
        if options.clock:
            for row in clock(out=options.out, progress=not options.quiet):
                print(f"  {row['method']}: {row['update_ms']:.2f} ms")
        else:
            contest(methods=methods, seeds=seeds, out=options.out, progress=not options.quiet)
    except ModuleNotFoundError as missing:
        if missing.name != PACKAGE:
            raise
        names = " and ".join(PACKAGED)
        fail(f"{names} need the packages of `make bench`: set PYTHONPATH=.venv/peers, or leave them out")
    print(f"record: {Path(options.out) / 'contest.json'}")
    return OK


def _study(options: argparse.Namespace) -> int:
    if options.name not in STUDIES:
        options.parser.error(f"there are {', '.join(STUDIES)}, got {options.name!r}")
    module, study = STUDIES[options.name]
    found = getattr(import_module(module), study)
    found.record(options.out, not options.quiet)
    print(f"record: {Path(options.out) / found.name}.json")
    return OK


def _laboratory(options: argparse.Namespace) -> int:
    from lab.laboratory.reference import GOLDEN_FILE, write

    write()
    print(f"written: {GOLDEN_FILE}")
    return OK
