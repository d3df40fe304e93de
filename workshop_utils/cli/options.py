"""Options that several commands have, written once."""

import argparse
from pathlib import Path
from typing import Any

from workshop_utils.core.paths import shown


def flag(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """An option without a value; ``text`` is its help."""
    parser.add_argument(name, action="store_true", help=text)


def add_trust(parser: argparse.ArgumentParser, what: str) -> None:
    """``--trust``; ``what`` is verified otherwise."""
    findings = f"what the verification of {what} finds"
    flag(parser, "--trust", f"go on in spite of {findings}: it is only printed")


def add_json(
    parser: argparse.ArgumentParser, text: str = "all of it as JSON, for programs"
) -> None:
    """``--json``."""
    flag(parser, "--json", text)


def print_json(answer: Any) -> None:
    """The fields of a dataclass ``answer`` as JSON, paths as :func:`.shown`."""
    import dataclasses
    import json

    def plain(value: Any) -> str:
        return shown(value) if isinstance(value, Path) else str(value)

    print(json.dumps(dataclasses.asdict(answer), indent=2, default=plain))


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """``--overwrite``; ``what`` is replaced."""
    flag(parser, "--overwrite", f"replace {what}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model``, as :func:`workshop_utils.inference.generate.model_directory` takes it."""
    places = "a Hugging Face model directory, or a name from `workshop models`"
    parser.add_argument("--model", help=f"{places} (default: the chosen model)")
