"""YAML and JSON files of a checkpoint as plain dictionaries, bounded in size; nothing in them is ever instantiated."""

import json
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.paths import shown

MAX_BYTES = 32 * 1024**2
"""Larger texts are not read. A ``model.yaml`` has some 10 kB, the index of a large sharded model some 200 kB."""

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
