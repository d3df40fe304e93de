"""The ``workshop`` command. Each sub-command is one module of this package; none of them imports torch or NeMo to show help."""

import argparse
import functools
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence

from workshop_utils import __version__, interrupt, progress, terminal
from workshop_utils.device import quiet_environment
from workshop_utils.errors import WorkshopError

DESCRIPTION = """\
Fine-tune a Llama with NeMo 2.0 and LoRA, and export the adapter for NIM.

The usual order:
  workshop models fetch smollm2-135m-instruct     get a model
  workshop import smollm2-135m-instruct           Hugging Face -> NeMo 2.0
  workshop bridge models/nemo2/NAME               make it loadable by the script path
  workshop finetune model.restore_from_path=...   LoRA through torchrun
  workshop evaluate --adapter ADAPTER             base and adapter on the test set
  workshop export ADAPTER --to nemo               an adapter for NIM
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command found in this package."""
    parser = argparse.ArgumentParser("workshop", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # The lines of descriptions and examples are kept as they are written.
    command = functools.partial(argparse.ArgumentParser, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=command)
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        importlib.import_module(f"{__name__}.{module.name}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0 done, 1 failed, 2 usage or not a checkpoint, 130 interrupted.

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
        # Whatever was raised or returned: a library may have caught the interrupt and failed of something else.
        if interrupt.has_come():
            interrupt.end()


def _run(argv: Sequence[str] | None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        build_parser().error(f"unrecognised arguments: {' '.join(rest)}")
    args.rest = rest
    quiet_environment(os.environ)
    if not sys.stderr.isatty():
        progress.quiet_libraries(os.environ)
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    try:
        return args.run(args)
    except WorkshopError as error:
        if not interrupt.has_come():
            print(f"error: {terminal.lines(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is wrong. Keep Python from complaining at exit.
        sys.stdout = None
        return 0
