"""``workshop inspect``: what is this checkpoint, and what can load it?"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.core import terminal
from workshop_utils.core.errors import NotACheckpoint, WorkshopError
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from workshop_utils.checkpoints.formats.summary import Checkpoint

DESCRIPTION = """\
Tell what a checkpoint is: format, architecture, size, tokenizer, the base of an adapter, and what
can load it.

Known are NeMo 2.0 directories (models and adapters), NeMo 1 .nemo archives and directories, bridged
views, Lightning .ckpt files, Megatron iter_* directories, Hugging Face models and PEFT adapters,
and GGUF. Only headers and indexes are read, without torch, and nothing that a file contains is run.
Exit status: 0 for a checkpoint, 2 for anything else, also when it is damaged or unsafe to load.
`workshop verify` tells what is wrong with it, and `workshop convert` changes between NeMo's
formats.
"""

EXAMPLES = """\
examples:
  workshop inspect models/nemo2/smollm2-135m-instruct
  workshop inspect models/huggingface/smollm2-135m-instruct --tensors
  workshop inspect models/nemo2/smollm2-135m-instruct --shards
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``inspect`` to the ``workshop`` command."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a checkpoint is and what can load it",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="a checkpoint: a directory or a .nemo file"
    )
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="list every tensor: name, dtype, shape, bytes, and where its pieces lie",
    )
    parser.add_argument(
        "--shards", action="store_true", help="the shard map: megabytes of every layer in each file"
    )
    parser.add_argument("--json", action="store_true", help="all of it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the description of ``args.path``; 0 for a checkpoint, 2 otherwise."""
    from workshop_utils.checkpoints.formats.identify import identify

    try:
        found = identify(args.path)
    except WorkshopError as error:
        print(f"error: {terminal.one_line(str(error))}", file=sys.stderr)
        return NotACheckpoint.exit_code
    if args.json:
        import json

        print(json.dumps(as_dict(found), indent=2))
        return 0
    for name, value in lines(found):
        print(terminal.folded(f"{name:<14}{terminal.one_line(value)}", 14))
    for wanted, listing in ((args.tensors, tensor_lines), (args.shards, shard_lines)):
        if wanted:
            print("", *map(terminal.one_line, listing(found)), sep="\n")
    return 0


def tensor_lines(found: "Checkpoint") -> Iterator[str]:
    """A line for each tensor, and one for each of its pieces: file, first byte, bytes, and where
    the piece begins in the tensor."""
    for tensor in found.tensors:
        yield f"{tensor.name}  {tensor.dtype}  {list(tensor.shape)}  {tensor.nbytes:,} bytes"
        for chunk in tensor.chunks:
            at = f"  at {list(chunk.offsets)}" if len(tensor.chunks) > 1 else ""
            yield (
                f"    {chunk.file}  byte {chunk.start:,}  {chunk.length:,} bytes  "
                f"{list(chunk.shape)}{at}"
            )


def shard_lines(found: "Checkpoint") -> Iterator[str]:
    """A table: one line for each layer, one column for each file, in megabytes; then the
    finding."""
    from workshop_utils.checkpoints.verify.shard_map import shard_map

    found_map = shard_map(found)
    width = max([len(file) for file in found_map.files] + [8])
    yield "MB by layer".ljust(14) + "  ".join(file.rjust(width) for file in found_map.files)
    for layer in (None, *found_map.layers):
        cells = [found_map.cells[file].get(layer, 0) for file in found_map.files]
        name = "outside" if layer is None else f"layer {layer}"
        yield name.ljust(14) + "  ".join(
            (f"{size / 1e6:.2f}" if size else "-").rjust(width) for size in cells
        )
    yield found_map.finding


def lines(found: "Checkpoint") -> Iterator[tuple[str, str]]:
    """(name, value) of each line of the description; what is not known is left out."""
    yield "path", shown(found.path)
    yield "format", found.format
    if found.version:
        yield "version", found.version
    if found.parallel != (1, 1):
        yield (
            "written by",
            (
                f"{found.parallel[0]} tensor-parallel x {found.parallel[1]} pipeline-parallel "
                "ranks, not merged"
            ),
        )
    if sizes := found.architecture:
        experts = f", {sizes.experts} experts in each layer" if sizes.experts else ""
        yield (
            "architecture",
            (
                f"{sizes.family + ': ' if sizes.family else ''}{sizes.layers} layers, hidden "
                f"{sizes.hidden}, FFN {sizes.ffn}{experts}"
            ),
        )
        yield (
            "attention",
            (
                f"{sizes.heads} heads of {sizes.head_dim}, {sizes.groups} key/value "
                f"groups{', queries and keys normalised' if sizes.qk_norm else ''}"
            ),
        )
        if sizes.vocabulary:
            yield (
                "vocabulary",
                f"{sizes.vocabulary:,} rows, {'tied' if sizes.tied else 'not tied'} to the output",
            )
        scaling = (
            f", scaled: {', '.join(f'{k} {v}' for k, v in sizes.rope_scaling.items())}"
            if sizes.rope_scaling
            else ""
        )
        yield "rope", f"base {sizes.rope_base:g}{scaling}"
    if found.parameters is not None:
        yield "parameters", f"{found.parameters:,} in {len(found.tensors)} tensors, {found.dtype}"
    yield "bytes", f"{found.nbytes:,}"
    if found.tokenizer:
        yield "tokenizer", found.tokenizer
    if adapter := found.adapter:
        stated = (
            ("rank", adapter.rank),
            ("alpha", adapter.alpha),
            ("on", ", ".join(adapter.targets)),
        )
        yield (
            "adapter",
            ", ".join([adapter.variant, *(f"{name} {value}" for name, value in stated if value)]),
        )
        here = {True: " (is here)", False: " (no longer there)", None: ""}[adapter.base_is_here]
        yield "base model", f"{shown(adapter.base) if here else adapter.base}{here}"
    for number, note in enumerate(found.notes):
        yield "" if number else "note", note
    yield from reader_lines(found)


def reader_lines(found: "Checkpoint") -> Iterator[tuple[str, str]]:
    """What can load it, as it is and after a command, and what cannot; readers with the same answer
    share a line."""
    from workshop_utils.adapters.loads_in import loads_in

    titles = {"yes": "loads in", "after": "loads after", "no": "not in"}
    shared: dict[tuple[str, str], list[str]] = {}
    for reader in loads_in(found):
        shared.setdefault((reader.answer, reader.how), []).append(reader.name)
    for answer, title in titles.items():
        entries = [
            (names, how) for (its_answer, how), names in shared.items() if its_answer == answer
        ]
        for number, (names, how) in enumerate(entries):
            who = ", ".join(names)
            yield (
                "" if number else title,
                f"{how}  [{who}]" if answer == "after" else f"{who}: {how}",
            )


def as_dict(found: "Checkpoint") -> dict[str, Any]:
    """Everything as plain values: the description, every tensor with its pieces, the shard map."""
    import dataclasses

    from workshop_utils.adapters.loads_in import loads_in
    from workshop_utils.checkpoints.verify.shard_map import shard_map

    shards = shard_map(found)
    plain = dataclasses.asdict(found)
    return plain | {
        "path": shown(found.path),
        "kind": found.kind.name.lower(),
        "format": found.format,
        "parameters": found.parameters,
        "loads_in": [dataclasses.asdict(reader) for reader in loads_in(found)],
        "dtype": found.dtype,
        "tensors": [
            entry | {"bytes": tensor.nbytes}
            for entry, tensor in zip(plain["tensors"], found.tensors, strict=True)
        ],
        "shards": {
            file: {
                "outside" if layer is None else str(layer): size for layer, size in cells.items()
            }
            for file, cells in shards.cells.items()
        },
    }
