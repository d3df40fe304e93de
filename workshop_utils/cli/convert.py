"""``workshop convert``: a checkpoint of one NeMo format as another."""

import argparse
from pathlib import Path

from workshop_utils.checkpoints.convert import DTYPES, FORMATS
from workshop_utils.cli import options
from workshop_utils.core.paths import shown

DESCRIPTION = """\
Convert a checkpoint to NeMo 2.0 or NeMo 1. The architecture is read from the checkpoint itself.

SRC is one of
  a .nemo archive, or the directory that it unpacks to      (NeMo 1)
  a directory with context/ and weights/                    (NeMo 2.0)
  an iter_XXXXXXX/ directory in torch_dist form             (Megatron-LM, Megatron-Bridge)
  a directory with config.json                              (Hugging Face; NeMo itself imports it)
of the families Llama, Mistral, Mixtral, Qwen 2.5, Qwen 3 and Nemotron.

Sharded weights are linked and not copied: keep the source. Weights in one file for each rank are
written anew, tensor by tensor. Numbers are not changed, unless --dtype says so. SRC is verified
first.
"""

EXAMPLES = """\
example:
  workshop convert megatron_gpt.nemo models/nemo2/mine --to nemo2
  workshop convert models/nemo2/mine mine.nemo --to nemo1
  workshop convert iter_0001000 models/nemo2/mine --to nemo2 --tokenizer models/huggingface/mine
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="NeMo 1 <-> NeMo 2.0, and Hugging Face or Megatron to both",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="the checkpoint")
    place = "directory to make; with --to nemo1 also an archive, NAME.nemo"
    add("target", metavar="DST", type=Path, help=place)
    add("--to", required=True, choices=FORMATS, help="format of DST")
    kinds = "Hugging Face directory or SentencePiece *.model to use"
    add("--tokenizer", metavar="DIR|FILE", type=Path, help=kinds)
    add("--dtype", choices=DTYPES, help="convert the weights (default: as they are)")
    options.add_overwrite(parser, "an existing checkpoint at DST")
    add("--dry-run", action="store_true", help="say what would be done")
    add(
        "--trust",
        action="store_true",
        help="print what the verification of SRC finds, and go on; what cannot be read or "
        "converted is refused all the same",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from workshop_utils.checkpoints.convert import convert

    names = ("source", "target", "to", "tokenizer", "dtype", "overwrite", "dry_run", "trust")
    done = convert(**{name: getattr(args, name) for name in names})
    for note in done.notes:
        print(note)
    print(f"{'would write' if args.dry_run else 'written'}: {shown(done.target)}")
    return 0
