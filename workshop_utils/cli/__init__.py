"""The ``workshop`` command: one module a sub-command; none imports torch or NeMo to show help."""

import argparse
import errno
import importlib
import itertools
import os
import pkgutil
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import NoReturn

from workshop_utils import __version__
from workshop_utils.core import home, paths, progress, terminal
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import did_you_mean, nearest
from workshop_utils.runtime import interrupt
from workshop_utils.runtime.device import quiet_environment

DESCRIPTION = """\
Fine-tune a Llama with NeMo 2.0 and LoRA, and export the adapter for NIM.

The usual order:
  workshop models fetch smollm2-135m-instruct     get a model
  workshop import smollm2-135m-instruct           Hugging Face -> NeMo 2.0
  workshop bridge models/nemo2/NAME               for the script path
  workshop finetune model.restore_from_path=...   LoRA through torchrun
  workshop evaluate --adapter ADAPTER             both on the test set
  workshop export ADAPTER --to nemo               an adapter for NIM

models/, data/, runs/ and workshop.yaml lie in the clone that the package is installed from, or,
when it was installed from a wheel, in the current folder. WORKSHOP_ROOT names another folder.
"""

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Formatter(argparse.HelpFormatter):
    """Prose fills the terminal; an indented line that is too long goes on under its 2nd column."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for kept, block in itertools.groupby(
            text.splitlines(), key=lambda line: not line or line[0] == " "
        ):
            if kept:
                lines += [self._folded(line, width) for line in block]
            else:
                lines.append(textwrap.fill(" ".join(block), width))
        return "\n".join(lines)

    @staticmethod
    def _folded(line: str, width: int) -> str:
        start = re.match(r" *(\S+( \S+)* {2,})?", line)
        command = line.startswith("  workshop ") and not start[1]
        options = {"break_long_words": False, "break_on_hyphens": False}
        options["subsequent_indent"] = " " * (start.end() + 4 * command)
        parts = textwrap.wrap(line, width - 2 if command else width, **options)
        return (" \\\n" if command else "\n").join(parts)


class _Command(argparse.ArgumentParser):
    """A parser that offers the right word for a mistyped one."""

    def __init__(self, *words, **options):
        super().__init__(*words, formatter_class=_Formatter, **options)
        self.set_defaults(parser=self)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, which forgets the words that :meth:`error` looks at."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with usage and ``message``."""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(nearest(wrong[1], re.findall(r"'([^']*)'", wrong[2])))
        elif "are required" in message:
            known = self._option_string_actions
            options = [word for word in self.words if word.startswith("-")]
            unknown = [word for word in options if word.partition("=")[0] not in known]
            message += "".join(map(self.meant, unknown))
        super().error(message)

    def meant(self, word: str) -> str:
        """ " Did you mean --option?" for a mistyped option ``word``."""
        return did_you_mean(nearest(word.partition("=")[0], self._option_string_actions))


def overrides(args: argparse.Namespace) -> list[str]:
    """The words ``key=value`` that a command hands on; WorkshopError for an option among them."""
    for word in args.rest:
        if word.startswith("-"):
            raise WorkshopError(
                f"unknown option {word}; see `{args.parser.prog} --help`. Overrides are written "
                f"key=value.{args.parser.meant(word)}"
            )
    return args.rest


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command found in this package."""
    parser = _Command("workshop", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if module.name != "options":
            importlib.import_module(f"{__name__}.{module.name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0 done, 1 failed, 2 usage or not a
    checkpoint, 130 interrupted.

    Without ``argv`` it is that of this process, which does not go on after Ctrl-C or SIGTERM.
    """
    if argv is None:
        interrupt.watch()
    try:
        return _run(argv)
    except KeyboardInterrupt:
        if argv is None:  # also where a library has put its own handler in place of ours
            interrupt.end()
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        # Whatever was raised or returned: a library may have caught the interrupt and failed of
        # something else.
        if interrupt.has_come():
            interrupt.end()


def _run(argv: Sequence[str] | None) -> int:
    home.use_writable_places()  # first: defaults of the options name the home
    args, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        args.parser.error(f"unrecognised arguments: {' '.join(rest)}.{args.parser.meant(rest[0])}")
    args.rest = rest
    quiet_environment(os.environ)
    if not sys.stderr.isatty():
        progress.quiet_libraries(os.environ)
    warnings.filterwarnings(
        "ignore", message="The pynvml package is deprecated", category=FutureWarning
    )
    try:
        return args.run(args)
    except WorkshopError as error:
        if not interrupt.has_come():
            print(f"error: {terminal.lines(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        from workshop_utils.series.preflight import packages

        check = packages()
        if check.status != "FAIL":
            raise
        said = f"{error}. `workshop preflight` says: {check.found}. {check.fix}"
        print(f"error: {said}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong. Keep Python from
        # complaining at exit.
        sys.stdout = None
        return 0
    except OSError as error:
        # Without a number it is of a library, with words of its own; `main` says the interrupt.
        if error.errno is None or interrupt.has_come():
            raise
        place = f"{terminal.lines(paths.shown(str(error.filename)))}: " if error.filename else ""
        advice = " Use a folder that is yours, or change its owner or mode."
        advice = advice if error.errno in _NOT_ALLOWED else ""
        print(f"error: {place}{error.strerror}.{advice}", file=sys.stderr)
        if error.errno == errno.ENOSPC:
            sys.stdout = None  # it may be what is full, and Python flushes it at exit
        return 1
