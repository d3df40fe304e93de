"""``workshop export``: an adapter for the programs that serve it."""

import argparse

from workshop_utils.cli import options
from workshop_utils.core import terminal
from workshop_utils.core.paths import shown

DESCRIPTION = """\
Turn an adapter into one that a server accepts, or merge it into its base. ADAPTER is a .nemo or
.ckpt of NeMo's script path, an adapter directory of NeMo 2.0 (LoRA, DoRA, CanonicalLoRA), or a
Hugging Face PEFT directory. Only merging looks at the base model.

  --to nemo                   .nemo as NeMo writes it: for NeMo, its converter, and NIM 1.x by
                              NVIDIA's tutorial
  --to nemo --reader trtllm   .nemo for TensorRT-LLM: q, k, v rows in its order, alpha multiplied in
                              (attention_qkv only); not for NIM
  --to hf-peft                Hugging Face PEFT directory, for PEFT, vLLM and NIM: any target, DoRA
                              too
  --to hf-merged --base DIR      the Hugging Face model DIR with the adapter in it
  --to nemo2-merged --base DIR   the NeMo 2.0 checkpoint DIR with the adapter in it

Each export is checked against the public rules of its reader (`workshop conform` asks them of any
adapter) and against what the adapter does, before it gets its name; the list is printed. Where the
base is at hand (--base DIR, or fetched by `workshop models`), its logits are compared, too; where
that is somebody else's code on both sides (PEFT, transformers, NeMo's converter) it is proven, else
the report says "not proven" and why. It comes with a model card.
"""

EXAMPLES = """\
examples:
  workshop export runs/finetune --to nemo
  workshop export runs/finetune/checkpoints/lora.nemo --to hf-peft --base meta-llama/Llama-3.2-1B-Instruct
  workshop export peft-directory --to nemo --base models/huggingface/NAME
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
    option = parser.add_argument
    option(
        "adapter",
        metavar="ADAPTER",
        help="a .nemo, .ckpt, NeMo 2.0 or PEFT directory, or the run directory of a script-path "
        "training",
    )
    forms = ("nemo", "hf-peft", "hf-merged", "nemo2-merged")
    option("--to", required=True, choices=forms, help="the form to export to")
    readers = ("nemo", "trtllm")
    option("--reader", default="nemo", choices=readers, help="whose .nemo (default: nemo)")
    option(
        "--out",
        metavar="PATH",
        help="the .nemo or the directory to write (default: in runs/exports/)",
    )
    option(
        "--base",
        metavar="ID|DIR",
        help="id of the base model to record (default: the one in the adapter), or its directory",
    )
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", choices=dtypes, help="dtype to write (default: as it is)")
    option(
        "--name",
        help="name of the adapter; a server shows it as the model's id (default: the file's)",
    )
    options.add_overwrite(parser, "an export of another adapter that is already there")
    parser.add_argument(
        "--check",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="check the export before it gets its name",
    )
    options.add_trust(parser, "the adapter")
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and print what was made: files and sizes, row order, reader."""
    from workshop_utils.adapters.export import export_adapter

    export = export_adapter(
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
    record = export.record
    if args.json:
        options.print_json(export)
        return 0
    lines = [f"✓ OK    {rule}" for rule in export.rules]
    if export.reused:
        reused = "This adapter was already exported here; the export is sound and was reused."
        lines.insert(0, reused)
    lines += [f"note: {note}" for note in export.notes]
    lines += [f"{shown(file)}  {file.stat().st_size:,} bytes" for file in export.files]
    baked = " (baked in)" if record.alpha_baked_in else ""
    kept = f"{len(export.rules)} rules kept" if args.check else "none, as you asked (--no-check)"
    lines += [
        f"reader      {record.reader}",
        f"row order   {record.qkv_order}",
        f"base        {record.base}",
        f"rank        {record.rank}, alpha {record.trained_alpha:g}{baked}",
        f"checks      {kept}",
        f"proof       {export.proof}",
    ]
    print("\n".join(map(terminal.one_line, lines)))
    return 0
