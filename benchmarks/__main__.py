"""The one program: list the suites, run one, print its tables or write them into the documents, plot it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import suite as suites
from benchmarks.suite import Key, Lab, Row, Suite
from benchmarks.tables import rewritten

RESULTS = Path("docs/results")
DOCUMENTS = ("README.md", "docs/**/*.md")


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks; return the exit status."""
    args = parser().parse_args(arguments)
    return int(args.act(args) or 0)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    main_parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main_parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="say what each suite measures, against whom")
    running = commands.add_parser("run", help="measure what is not in the results file yet")
    tables = commands.add_parser("table", help="print a suite's tables, or put all tables into the documents")
    plots = commands.add_parser("plot", help="draw a suite's results into a picture in docs")
    running.add_argument("suite", choices=suites.names(), metavar="SUITE")
    running.add_argument("--only", default="", help="run the jobs whose text, 'name=value, …', matches this")
    running.add_argument("--results", type=Path, help="the file that rows are appended to")
    running.add_argument("--quick", action="store_true", help="run one row at a tiny cost, write nothing")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--assets", type=Path, default=Lab.assets)
    running.add_argument("--cache", type=Path, default=Lab.cache)
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    tables.add_argument("suite", nargs="?", choices=suites.names(), metavar="SUITE")
    tables.add_argument("--write", action="store_true", help="rewrite the marked blocks of the documents")
    tables.add_argument("--check", action="store_true", help="fail where a marked block is out of date")
    plots.add_argument("suite", choices=suites.names(), metavar="SUITE")
    for command, act in ((listing, act_list), (running, act_run), (tables, act_table), (plots, act_plot)):
        command.set_defaults(act=act)
    return main_parser


def results_of(name: str, root: Path = Path()) -> list[Row]:
    """Return a suite's published rows."""
    return suites.read(root / RESULTS / f"{name}.jsonl")


def act_list(args: argparse.Namespace) -> None:
    """Print each suite's name, tables and docstring."""
    for name in suites.names():
        suite, doc = suites.load(name)
        print(f"{name} (tables: {', '.join(suite.tables)})\n\n{doc}\n\n")


def act_run(args: argparse.Namespace) -> None:
    """Run a suite's missing jobs, or its quick one."""
    torch.set_num_threads(args.threads)
    suite, _ = suites.load(args.suite)
    lab = Lab(args.assets, args.cache, args.device, args.quick)
    if args.quick:
        for more, figures in suite.measure(suite.quick, lab):
            print(described({**suite.quick, **more}, figures))
        return
    on_gpu = args.device.startswith("cuda")
    device = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    setting = {"torch": torch.__version__, "threads": args.threads, "device": device}
    path = args.results or RESULTS / f"{args.suite}.jsonl"
    run(suite, lab, path, setting, args.only)
    print_tables(suite, suites.read(path))


def run(suite: Suite, lab: Lab, path: Path, setting: Key, only: str = "") -> None:
    """Do the jobs that match ``only`` and have no rows in the results file; append theirs."""
    rows = suites.read(path)
    for job in suite.jobs(rows):
        rows[:] = suites.read(path)  # another process may have done it by now
        if not re.search(only, described(job)) or any(row.belongs_to(job) for row in rows):
            continue
        print(f"{time.strftime('%H:%M:%S')} {described(job)} …", flush=True)
        new = [Row({**job, **more}, figures, setting) for more, figures in suite.measure(job, lab)]
        suites.append(path, new)
        rows += new
        for row in new:
            print(f"{time.strftime('%H:%M:%S')} {described(row.key, row.figures)}", flush=True)


def described(key: Key, figures: Key | None = None) -> str:
    """Return a key, and figures after it, in one line."""
    parts = (f"{name}={part}" for name, part in key.items())
    shown = (f"{name} {figure!r}" for name, figure in (figures or {}).items())
    return ", ".join(parts) + (f": {', '.join(shown)}" if figures else "")


def act_table(args: argparse.Namespace) -> int:
    """Print tables; or write them into the documents, or compare them with those there."""
    if args.write or args.check:
        return update_documents(Path(), write=args.write)
    for name in [args.suite] if args.suite else suites.names():
        print_tables(suites.load(name)[0], results_of(name))
    return 0


def print_tables(suite: Suite, rows: list[Row]) -> None:
    """Print all tables of a suite."""
    for name, table in suite.tables.items():
        print(f"\n{name}\n\n{table.markdown(rows)}")


def update_documents(root: Path, *, write: bool) -> int:
    """Rewrite the tables in all documents, or only say which are out of date; return 1 if any is."""

    def table(suite: str, name: str) -> str:
        return suites.load(suite)[0].tables[name].markdown(results_of(suite, root))

    status = 0
    for path in sorted(path for pattern in DOCUMENTS for path in root.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, table)
        if write:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            print(f"{path}: a table differs from docs/results. Run `python -m benchmarks table --write`.")
            status = 1
    return status


def act_plot(args: argparse.Namespace) -> int:
    """Draw a suite's plot into a file."""
    from matplotlib import figure

    suite, _ = suites.load(args.suite)
    if suite.plot is None:
        print(f"The suite {args.suite!r} has no plot.")
        return 1
    picture = figure.Figure(figsize=(7, 4.5), layout="constrained")
    suite.plot.draw(results_of(args.suite), picture.subplots())
    picture.savefig(Path("docs") / suite.plot.file, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
