"""``workshop preflight``: is this machine ready?"""

import argparse

DESCRIPTION = """\
Check system, Python, cores, memory, disk, home, package versions, Jupyter kernel and GPU. Takes a
second and needs no network. Each line is [OK], [WARN] (it works, but mind this) or [FAIL] with what
to do. Exits with 1 if a check failed.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``preflight`` to the ``workshop`` command."""
    words = {"description": DESCRIPTION, "epilog": "example:\n  workshop preflight"}
    short = "check this machine before anything long starts"
    subparsers.add_parser("preflight", help=short, **words).set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if no check failed, else 1."""
    from workshop_utils.core import terminal
    from workshop_utils.series.preflight import preflight

    checks = preflight()
    for line in "\n".join(map(str, checks)).splitlines():
        print(terminal.folded(line, 7))
    failed = sum(check.status == "FAIL" for check in checks)
    print(f"\n{failed} of {len(checks)} checks failed" if failed else "\nready")
    return 1 if failed else 0
