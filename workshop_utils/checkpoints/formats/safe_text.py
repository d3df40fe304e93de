"""YAML and JSON files of a checkpoint as plain dictionaries, bounded in size; nothing in them is
ever instantiated."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from workshop_utils.checkpoints.formats.known_names import CONTAINERS, KNOWN, NEMO1_MODEL
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.core.terminal import plain

MAX_BYTES = 32 * 1024**2
"""Larger texts are not read. A ``model.yaml`` has some 10 kB, the index of a large sharded model
some 200 kB."""

MAX_DEPTH = 100
"""Deeper nesting is refused: libyaml's loader overflows the stack on it and takes Python with
it."""

MAX_VALUES = 100_000
"""Values of a YAML file, those counted twice that it refers to twice. A ``model.yaml`` has some
300."""

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_bytes(path: Path) -> bytes:
    """The bytes of a text file. Raises :class:`DamagedCheckpoint` when it is missing, no file or
    larger than MAX_BYTES."""
    if not path.is_file():
        there = "is no file. Put the file in its place" if path.exists() else "is missing"
        raise DamagedCheckpoint(f"{shown(path)} {there}.")
    if path.stat().st_size > MAX_BYTES:
        raise DamagedCheckpoint(
            f"{shown(path)} has {path.stat().st_size:,} bytes; a text of a checkpoint has at "
            f"most {MAX_BYTES:,}."
        )
    return path.read_bytes()


def parse_yaml(text: bytes, where: str) -> dict[str, Any]:
    """A YAML mapping. ``where`` names it in errors.

    Raises :class:`UnsafeCheckpoint` for tags such as ``!!python/object`` and
    :class:`DamagedCheckpoint` for broken YAML.
    """
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_SafeLoader)
    except _UnsafeTag as error:
        raise UnsafeCheckpoint(
            f"{where}: {error}. Such a tag makes a careless reader run code. Nothing was "
            "executed. Get the checkpoint again from a source you trust."
        ) from None
    # The constructors of numbers and dates fail in their own ways, and str() of an error may, too.
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OverflowError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise DamagedCheckpoint(
            f"{where} cannot be read as YAML: {plain(str(error), 300) or type(error).__name__}"
        ) from error
    return _mapping(value, where)


class _UnsafeTag(ValueError):
    """A tag that names a Python object."""


def _check_events(text: bytes) -> None:
    """Refuse, before anything is built, what makes a safe loader crash or run for hours on a small
    file."""
    # For each open collection: its anchor, the values before it, and for a mapping its keys and
    # whether a key comes next.
    opened: list[tuple[str | None, int, set | None]] = []
    key_next: list[bool] = []
    sizes: dict[str, int] = {}
    count = events = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        events += 1
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before, _ = opened.pop()
            key_next.pop()
            if anchor:
                sizes[anchor] = count - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        anchor = event.anchor
        # An alias stands for all that its anchor holds: ten lines of ten aliases each are ten
        # billion values.
        count += sizes.get(anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
        if count > MAX_VALUES or events > 2 * MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        if isinstance(event, yaml.AliasEvent) and any(anchor == name for name, _, _ in opened):
            raise ValueError(f"{anchor!r} contains itself")
        tag = getattr(event, "tag", None)
        if tag and "python/" in tag:
            raise _UnsafeTag(f"it has the tag {plain(tag, 200)} (line {event.start_mark.line + 1})")
        keys = opened[-1][2] if opened else None
        if keys is not None:
            if key_next[-1]:
                _check_key(event, keys)
            key_next[-1] = not key_next[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(
                (anchor, count - 1, set() if isinstance(event, yaml.MappingStartEvent) else None)
            )
            key_next.append(True)
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.ScalarEvent):
            if anchor:
                sizes[anchor] = 1
            # Base-60 numbers (1:2:3) take time that grows with the square of their length.
            if (
                (event.implicit[0] or tag)
                and len(event.value) > 1000
                and event.value[0] in "+-.0123456789"
            ):
                raise ValueError("it has a number of more than 1,000 digits")


def _check_key(event: yaml.NodeEvent, keys: set) -> None:
    if not isinstance(event, yaml.ScalarEvent):
        raise yaml.YAMLError(f"a key is not a plain value (line {event.start_mark.line + 1})")
    # Merge keys copy mappings, so that a few lines can double a mapping over and over.
    if event.value == "<<" and event.implicit[0]:
        raise ValueError("it has a merge key (<<), which no checkpoint needs")
    if event.value in keys:
        raise ValueError(
            f"it has the key {plain(event.value, 100)!r} twice (line {event.start_mark.line + 1})"
        )
    keys.add(event.value)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. ``where`` names it in errors. Raises :class:`DamagedCheckpoint` for anything
    else."""
    try:
        value = json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant
        )
        _check_depth(value)
        if b"\\u" in text:
            # Half of a surrogate pair cannot be printed later.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"{where} cannot be read as JSON: {plain(str(error), 300) or type(error).__name__}"
        ) from error
    return _mapping(value, where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        # Two readers may take two different ones.
        keys = [key for key, _ in pairs]
        raise ValueError(
            "it has the key "
            f"{plain(max(keys, key=keys.count) if len(keys) < 1000 else 'of some object', 100)!r} "
            "twice"
        )
    return mapping


def _constant(name: str) -> float:
    # transformers writes Infinity for a limit that is none.
    if name == "NaN":
        raise ValueError("it has NaN, which is no JSON and equal to nothing")
    return float(name)


def _check_depth(value: Any) -> None:
    """Refuse what a recursive reader would not get to the end of."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        level = [
            item
            for holder in level
            for item in (holder.values() if type(holder) is dict else holder)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")


def foreign_targets(tree: Any) -> list[tuple[str, str]]:
    """What a configuration names to be imported or called that genuine NeMo checkpoints do not:
    (path in the tree, value).

    ``model.yaml`` and ``model_config.yaml`` are made into objects by their loaders: whatever
    ``_target_`` (Hydra, NeMo 2.0), ``target`` (NeMo 1) or a ``pyref`` of ``io.json`` names is
    imported, and mostly called with the values beside it (CVE-2025-23304). NeMo checks only the
    first part of the name, so that ``torch.hub.load`` or its own functions that read pickles pass.
    The list is in :mod:`.known_names`. ``trust_remote_code: true`` is foreign, too: it runs code of
    the tokenizer's repository; so is the tokenizer ``library: tabular``, which NeMo unpickles
    (CVE-2026-65179), and so is an object of ``io.json`` that NeMo would unpickle from a file.
    """
    targets: list[tuple[str, str]] = []
    objects = tree.get("objects") if isinstance(tree, dict) else None
    objects = objects if isinstance(objects, dict) else {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                here = f"{path}.{plain(str(key), 100)}" if path else plain(str(key), 100)
                text = value if isinstance(value, str) else ""
                if key == "_target_":
                    foreign = not KNOWN.fullmatch(text)
                elif key == "target" and _DOTTED.fullmatch(text):
                    foreign = not (KNOWN.fullmatch(text) or NEMO1_MODEL.fullmatch(text))
                elif key == "library" and text:
                    foreign = text == "tabular" or "${" in text
                elif key == "trust_remote_code":
                    foreign = value not in (False, None)
                else:
                    visit(value, here)
                    continue
                if foreign:
                    targets.append((here, plain(str(value), 200)))
            # Whatever its "type" says: NeMo imports the name before fiddle looks at that.
            if node.get("type") == "pyref" or {"type", "module", "name"} <= node.keys():
                name = f"{node.get('module')}.{node.get('name')}"
                if not KNOWN.fullmatch(name):
                    targets.append((path, plain(name, 200)))
            if isinstance(node.get("type"), dict) and isinstance(node.get("items"), list):
                targets.extend((path, text) for text in _of_fiddle(node, objects))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                visit(value, f"{path}[{i}]")

    visit(tree, "")
    return targets


def _of_fiddle(node: dict[str, Any], objects: dict[str, Any]) -> Iterator[str]:
    """What the object ``node`` of ``io.json`` would do without naming it: read a pickle, run code
    of a tokenizer."""
    values = _values(node, objects)
    name = f"{node['type'].get('module')}.{node['type'].get('name')}"
    if not CONTAINERS.fullmatch(name) and len(values) == 1:
        yield f"the pickle {plain(str(values[0]), 100)}, to make {plain(name, 100)} of it"
    # The names in the items are for people; fiddle takes those of the metadata, in the same order.
    described = _values(_followed(node.get("metadata"), objects), objects)
    names = _values(described[1], objects) if len(described) > 1 else []
    for argument, value in zip(names, values, strict=False):
        if argument == "trust_remote_code" and value not in (False, None):
            yield f"trust_remote_code={plain(str(value), 100)}"


def _followed(value: Any, objects: dict[str, Any]) -> Any:
    """What a reference or a leaf of ``io.json`` stands for."""
    if isinstance(value, dict) and value.get("type") == "ref":
        key = value.get("key")
        value = objects.get(key) if isinstance(key, str) else None
    return value.get("value") if isinstance(value, dict) and value.get("type") == "leaf" else value


def _values(node: Any, objects: dict[str, Any]) -> list[Any]:
    items = node.get("items") if isinstance(node, dict) else None
    return (
        [_followed(item[-1], objects) for item in items if isinstance(item, list) and item]
        if isinstance(items, list)
        else []
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in the file ``path``; errors as :func:`parse_yaml`, also for a missing
    file."""
    return parse_yaml(read_bytes(path), shown(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``; errors as :func:`parse_json`, also for a missing
    file."""
    return parse_json(read_bytes(path), shown(path))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamagedCheckpoint(
            f"{where} holds {type(value).__name__}, not a mapping of names to values."
        )
    return value
