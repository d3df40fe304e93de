"""``workshop inspect``: what is this checkpoint, and what can load it?"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.cli import options
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
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 for a checkpoint, 2 otherwise."""
    from workshop_utils.checkpoints.formats.identify import identify

    try:
        checkpoint = identify(args.path)
    except WorkshopError as error:
        print(f"error: {terminal.one_line(str(error))}", file=sys.stderr)
        return NotACheckpoint.exit_code
    if args.json:
        import json

        print(json.dumps(as_dict(checkpoint), indent=2))
        return 0
    for name, value in lines(checkpoint):
        print(terminal.folded(f"{name:<14}{terminal.one_line(value)}", 14))
    for chosen, listing in ((args.tensors, tensor_lines), (args.shards, shard_lines)):
        if chosen:
            print("", *map(terminal.one_line, listing(checkpoint)), sep="\n")
    return 0


def tensor_lines(checkpoint: "Checkpoint") -> Iterator[str]:
    """A line for each tensor, and one for each of its pieces: file, first byte, bytes, and where
    the piece begins in the tensor."""
    for tensor in checkpoint.tensors:
        yield f"{tensor.name}  {tensor.dtype}  {list(tensor.shape)}  {tensor.nbytes:,} bytes"
        for chunk in tensor.chunks:
            at = f"  at {list(chunk.offsets)}" if len(tensor.chunks) > 1 else ""
            yield (
                f"    {chunk.file}  byte {chunk.start:,}  {chunk.length:,} bytes  "
                f"{list(chunk.shape)}{at}"
            )


def shard_lines(checkpoint: "Checkpoint") -> Iterator[str]:
    """A table: one line for each layer, one column for each file, in megabytes; then the
    finding."""
    from workshop_utils.checkpoints.verify.shard_map import shard_map

    shards = shard_map(checkpoint)
    width = max([len(file) for file in shards.files] + [8])
    yield "MB by layer".ljust(14) + "  ".join(file.rjust(width) for file in shards.files)
    for layer in (None, *shards.layers):
        sizes = (shards.cells[file].get(layer, 0) for file in shards.files)
        cells = ((f"{size / 1e6:.2f}" if size else "-").rjust(width) for size in sizes)
        yield ("outside" if layer is None else f"layer {layer}").ljust(14) + "  ".join(cells)
    yield shards.finding


def lines(checkpoint: "Checkpoint") -> Iterator[tuple[str, str]]:
    """(name, value) of each line of the description; what is not known is left out."""
    yield "path", shown(checkpoint.path)
    yield "format", checkpoint.format
    if checkpoint.version:
        yield "version", checkpoint.version
    if checkpoint.parallel != (1, 1):
        tensor, pipeline = checkpoint.parallel
        text = f"{tensor} tensor-parallel x {pipeline} pipeline-parallel ranks, not merged"
        yield "written by", text
    if sizes := checkpoint.architecture:
        family = f"{sizes.family}: " if sizes.family else ""
        experts = f", {sizes.experts} experts in each layer" if sizes.experts else ""
        yield (
            "architecture",
            f"{family}{sizes.layers} layers, hidden {sizes.hidden}, FFN {sizes.ffn}{experts}",
        )
        normalised = ", queries and keys normalised" if sizes.qk_norm else ""
        yield (
            "attention",
            f"{sizes.heads} heads of {sizes.head_dim}, {sizes.groups} key/value groups{normalised}",
        )
        if sizes.vocabulary:
            tied = "tied" if sizes.tied else "not tied"
            yield "vocabulary", f"{sizes.vocabulary:,} rows, {tied} to the output"
        scaling = ", ".join(f"{key} {value}" for key, value in (sizes.rope_scaling or {}).items())
        yield "rope", f"base {sizes.rope_base:g}{', scaled: ' if scaling else ''}{scaling}"
    if checkpoint.parameters is not None:
        count = f"{checkpoint.parameters:,} in {len(checkpoint.tensors)} tensors"
        yield "parameters", f"{count}, {checkpoint.dtype}"
    yield "bytes", f"{checkpoint.nbytes:,}"
    if checkpoint.tokenizer:
        yield "tokenizer", checkpoint.tokenizer
    if adapter := checkpoint.adapter:
        stated = {"rank": adapter.rank, "alpha": adapter.alpha, "on": ", ".join(adapter.targets)}
        facts = (f"{name} {value}" for name, value in stated.items() if value)
        yield "adapter", ", ".join([adapter.variant, *facts])
        here = {True: " (is here)", False: " (no longer there)", None: ""}[adapter.base_is_here]
        yield "base model", f"{shown(adapter.base) if here else adapter.base}{here}"
    for number, note in enumerate(checkpoint.notes):
        yield "" if number else "note", note
    from workshop_utils.adapters.loads_in import reader_lines

    yield from reader_lines(checkpoint)


def as_dict(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Everything as plain values: the description, every tensor with its pieces, the shard map."""
    import dataclasses

    from workshop_utils.adapters.loads_in import loads_in
    from workshop_utils.checkpoints.verify.shard_map import shard_map

    plain = dataclasses.asdict(checkpoint)
    for entry, tensor in zip(plain["tensors"], checkpoint.tensors, strict=True):
        entry["bytes"] = tensor.nbytes
    return plain | {
        "path": shown(checkpoint.path),
        "kind": checkpoint.kind.name.lower(),
        "format": checkpoint.format,
        "parameters": checkpoint.parameters,
        "loads_in": [dataclasses.asdict(reader) for reader in loads_in(checkpoint)],
        "dtype": checkpoint.dtype,
        "shards": {
            file: {"outside" if layer is None else str(layer): size for layer, size in held.items()}
            for file, held in shard_map(checkpoint).cells.items()
        },
    }
