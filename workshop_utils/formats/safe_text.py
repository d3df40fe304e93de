"""YAML and JSON files of a checkpoint as plain dictionaries, bounded in size; nothing in them is ever instantiated."""

import json
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.paths import shown

MAX_BYTES = 32 * 1024**2
"""Larger texts are not read. A ``model.yaml`` has some 10 kB, the index of a large sharded model some 200 kB."""

MAX_DEPTH = 100
"""Deeper nesting is refused: libyaml's loader overflows the stack on it and takes Python with it."""

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_bytes(path: Path) -> bytes:
    """The bytes of a text file. Raises :class:`DamagedCheckpoint` when it is missing, no file or larger than MAX_BYTES."""
    if not path.is_file():
        raise DamagedCheckpoint(f"{shown(path)} is missing.")
    if path.stat().st_size > MAX_BYTES:
        raise DamagedCheckpoint(f"{shown(path)} has {path.stat().st_size:,} bytes; a text of a checkpoint has at most {MAX_BYTES:,}.")
    return path.read_bytes()


def parse_yaml(text: bytes, where: str) -> dict[str, Any]:
    """A YAML mapping. ``where`` names it in errors.

    Raises :class:`UnsafeCheckpoint` for tags such as ``!!python/object`` and :class:`DamagedCheckpoint` for broken YAML.
    """
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_SafeLoader)
    except yaml.constructor.ConstructorError as error:
        if "python/" in str(error.problem):
            raise UnsafeCheckpoint(
                f"{where}: {error.problem} (line {error.problem_mark.line + 1}). Such a tag makes a careless reader run code. "
                "Nothing was executed. Get the checkpoint again from a source you trust."
            ) from None
        raise DamagedCheckpoint(f"{where} cannot be read as YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise DamagedCheckpoint(f"{where} cannot be read as YAML: {str(error) or type(error).__name__}") from error
    return _mapping(value, where)


def _check_events(text: bytes) -> None:
    """Refuse, before anything is built, what makes a safe loader crash or run for hours on a small file."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            # Merge keys copy mappings, so that a few lines can double a mapping over and over.
            if event.value == "<<":
                raise ValueError("it has a merge key (<<), which no checkpoint needs")
            # Base-60 numbers (1:2:3) take time that grows with the square of their length.
            if len(event.value) > 1000 and event.value[0] in "+-.0123456789":
                raise ValueError("it has a number of more than 1,000 digits")


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. ``where`` names it in errors. Raises :class:`DamagedCheckpoint` for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} cannot be read as JSON: {str(error) or type(error).__name__}") from error
    return _mapping(value, where)


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in the file ``path``; errors as :func:`parse_yaml`, also for a missing file."""
    return parse_yaml(read_bytes(path), shown(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; errors as :func:`parse_json`, also for a missing file."""
    return parse_json(read_bytes(path), shown(path))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{where} holds {type(value).__name__}, not a mapping of names to values.")
    return value
