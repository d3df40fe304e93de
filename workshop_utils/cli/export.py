"""``workshop export``: an adapter for the programs that serve it."""

import argparse

from workshop_utils.paths import shown

DESCRIPTION = """\
Turn the .nemo adapter that a training wrote into one that a server accepts. The base model is not loaded.

  --to nemo                   .nemo for TensorRT-LLM: q, k, v rows in its order, alpha multiplied in (attention_qkv only)
  --to nemo --reader nemo     .nemo for NeMo itself and NeMo's own converter: rows interleaved, as trained
  --to hf-peft                Hugging Face PEFT directory, for PEFT, vLLM and NIM: any target

Each export is checked against the public rules of its reader before it gets its name, and comes with a model card.
"""

EXAMPLES = """\
examples:
  workshop export runs/finetune --to nemo
  workshop export runs/finetune/checkpoints/lora.nemo --to hf-peft --base meta-llama/Llama-3.2-1B-Instruct
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``export`` to the ``workshop`` command."""
    parser = subparsers.add_parser(
        "export",
        help="make a trained adapter readable for TensorRT-LLM, NIM, vLLM or PEFT",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a .nemo adapter, or the run directory of a training that holds one")
    parser.add_argument("--to", required=True, choices=("nemo", "hf-peft"), help="the form to export to")
    parser.add_argument("--reader", default="trtllm", choices=("trtllm", "nemo"), help="whose .nemo (default: trtllm)")
    parser.add_argument("--out", metavar="PATH", help="the .nemo or the directory to write (default: in runs/exports/)")
    parser.add_argument("--base", metavar="ID", help="id of the base model to record (default: the one in the adapter)")
    parser.add_argument("--name", help="name of the adapter; a server shows it as the model's id (default: the file's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export of another adapter that is already there")
    parser.add_argument("--trust", action="store_true", help="go on in spite of what the verification of the adapter finds: it is only printed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and print what was made: files and sizes, row order, reader."""
    from workshop_utils.export.job import export_adapter

    made = export_adapter(args.adapter, args.to, args.out, args.reader, args.base, args.name, args.overwrite, trust=args.trust)
    record = made.record
    if made.reused:
        print("This adapter was already exported here; the export is sound and was reused.")
    for file in made.files:
        print(f"{shown(file)}  {file.stat().st_size:,} bytes")
    print(f"reader      {record.reader}")
    print(f"row order   {record.qkv_order}")
    print(f"base        {record.base}")
    print(f"rank        {record.rank}, alpha {record.trained_alpha:g}{' (baked in)' if record.alpha_baked_in else ''}")
    print(f"checks      {len(made.rules)} rules kept")
    return 0
