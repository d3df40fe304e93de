"""``workshop run``: the whole series without a browser."""

import argparse
import re

from workshop_utils.cli import options

DESCRIPTION = """\
Run the notebooks in order, without a browser, and end with a table: notebook, time, result. This is
what `make workshop` does after it has made the environment.

A notebook that fails is named with its first error and does not stop the others: each makes what it
needs. The command then exits with 1. Executed copies go to runs/workshop/notebooks, the report to
runs/workshop/report.json. What an earlier run made is used again.
"""

EXAMPLES = """\
examples:
  workshop run                          the whole series
  workshop run --only 03,05             two of them
  workshop run --only 03 --save-outputs store the outputs in notebooks/, too
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``run`` to the ``workshop`` command."""
    words = {"description": DESCRIPTION, "epilog": EXAMPLES}
    short = "run all notebooks, or some, and report what they made"
    parser = subparsers.add_parser("run", help=short, **words)
    only = "numbers or names of the notebooks to run, with commas or spaces between them"
    add = parser.add_argument
    add("--only", nargs="+", action="extend", default=[], metavar="NN", help=only)
    options.flag(parser, "--save-outputs", "store the outputs of those that pass in notebooks/")
    would = "say what would run, and stop"
    add("--list", "--dry-run", dest="list", action="store_true", help=would)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if every notebook asked for passed, 1 if one failed, 130 after Ctrl-C."""
    from workshop_utils.core import paths
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.series import report, run_notebooks

    only = [name for words in args.only for name in re.split(r"[,\s]+", words) if name]
    if args.only and not only:
        raise WorkshopError("--only names no notebook: give numbers or names, as in --only 03,05.")
    if args.list:
        print(*(file.stem for file in run_notebooks.find_notebooks(only)), sep="\n")
        return 0
    results = run_notebooks.run_notebooks(only, args.save_outputs)
    if run_notebooks.was_interrupted(results):
        print(f"What is finished is kept. The report: {paths.shown(report.report_file())}")
        raise KeyboardInterrupt
    print("\n" + run_notebooks.summary(results))
    return 1 if any(row.result == "failed" for row in results) else 0
