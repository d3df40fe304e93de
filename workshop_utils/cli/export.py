"""``workshop export``: an adapter for the programs that serve it."""

import argparse

from workshop_utils.core import terminal
from workshop_utils.core.paths import shown

DESCRIPTION = """\
Turn an adapter into one that a server accepts, or merge it into its base. ADAPTER is a .nemo or
.ckpt of NeMo's script path, an adapter directory of NeMo 2.0 (LoRA, DoRA, CanonicalLoRA), or a
Hugging Face PEFT directory. Only merging looks at the base model.

  --to nemo                   .nemo for TensorRT-LLM: q, k, v rows in its order, alpha multiplied in
                              (attention_qkv only)
  --to nemo --reader nemo     .nemo for NeMo itself and NeMo's own converter: rows interleaved, as
                              trained
  --to hf-peft                Hugging Face PEFT directory, for PEFT, vLLM and NIM: any target, DoRA
                              too
  --to hf-merged --base DIR      the Hugging Face model DIR with the adapter in it
  --to nemo2-merged --base DIR   the NeMo 2.0 checkpoint DIR with the adapter in it

Each export is checked against the public rules of its reader (`workshop conform` asks them of any
adapter) and against what the adapter does, before it gets its name; the list is printed. It comes
with a model card.
"""

EXAMPLES = """\
examples:
  workshop export runs/finetune --to nemo
  workshop export runs/finetune/checkpoints/lora.nemo --to hf-peft --base meta-llama/Llama-3.2-1B-Instruct
  workshop export peft-directory --to nemo --reader nemo --base models/huggingface/NAME
  workshop export nemo2-run/checkpoints/NAME --to hf-merged --base models/huggingface/NAME --dtype bfloat16
"""  # noqa: E501


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``export`` to the ``workshop`` command."""
    parser = subparsers.add_parser(
        "export",
        help="make a trained adapter readable for TensorRT-LLM, NIM, vLLM or PEFT",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="a .nemo, .ckpt, NeMo 2.0 or PEFT directory, or the run directory of a script-path "
        "training",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("nemo", "hf-peft", "hf-merged", "nemo2-merged"),
        help="the form to export to",
    )
    parser.add_argument(
        "--reader",
        default="trtllm",
        choices=("trtllm", "nemo"),
        help="whose .nemo (default: trtllm)",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="the .nemo or the directory to write (default: in runs/exports/)",
    )
    parser.add_argument(
        "--base",
        metavar="ID|DIR",
        help="id of the base model to record (default: the one in the adapter), or its directory",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype to write (default: as it is)",
    )
    parser.add_argument(
        "--name",
        help="name of the adapter; a server shows it as the model's id (default: the file's)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an export of another adapter that is already there",
    )
    parser.add_argument(
        "--check",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="check the export before it gets its name",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="go on in spite of what the verification of the adapter finds: it is only printed",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and print what was made: files and sizes, row order, reader."""
    from workshop_utils.adapters.export import export_adapter

    made = export_adapter(
        args.adapter,
        args.to,
        args.out,
        args.reader,
        args.base,
        args.name,
        args.overwrite,
        trust=args.trust,
        dtype=args.dtype,
        check=args.check,
    )
    record = made.record
    if made.reused:
        print("This adapter was already exported here; the export is sound and was reused.")
    for rule in made.rules:
        print(f"✓ OK    {terminal.one_line(rule)}")
    for note in made.notes:
        print(f"note: {terminal.one_line(note)}")
    for file in made.files:
        print(f"{shown(file)}  {file.stat().st_size:,} bytes")
    print(f"reader      {record.reader}")
    print(f"row order   {record.qkv_order}")
    print(f"base        {record.base}")
    print(
        f"rank        {record.rank}, alpha "
        f"{record.trained_alpha:g}{' (baked in)' if record.alpha_baked_in else ''}"
    )
    print(
        f"checks      {len(made.rules)} rules kept"
        if args.check
        else "checks      none, as you asked (--no-check)"
    )
    return 0
