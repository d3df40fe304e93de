"""``workshop conform``: would a server take this adapter?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.cli import options
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from workshop_utils.adapters.rules import Result

DESCRIPTION = """\
Ask of anybody's LoRA adapter the public rules of the program that is to read it: one line a rule,
and the fix for each fault.

  --reader trtllm    TensorRT-LLM: a .nemo in its order of rows, alpha multiplied in (or a Hugging
                     Face directory)
  --reader nemo      NeMo's script path and its converter: a .nemo as NeMo writes it
  --reader peft      Hugging Face PEFT
  --reader vllm      vLLM (largest rank 16 unless --max-rank says otherwise)
  --reader nim1      NIM 1.x: a .nemo as NeMo writes it, or Hugging Face (largest rank 32 unless
                     --max-rank says otherwise)
  --reader nim2      NIM 2.x: Hugging Face only

NIM's own loaders are closed: for them the rules are those of its pages and of the public engines in
it; where neither says anything, the answer is "NOT KNOWN", which breaks no rule. The base is not
needed, torch is not needed, and nothing that a file contains is run. Exit status: 0 no rule is
broken, 1 one is, 2 there is nothing to ask.
"""

EXAMPLES = """\
examples:
  workshop conform runs/exports/NAME/hf-peft --reader vllm --max-rank 64
  workshop conform adapter.nemo --reader trtllm
  workshop conform loras/support-bot --reader nim1 --json
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``conform`` to the ``workshop`` command."""
    parser = subparsers.add_parser(
        "conform",
        help="would TensorRT-LLM, NIM, vLLM or PEFT take this adapter?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a .nemo, a PEFT directory, or one directory of a NIM store",
    )
    parser.add_argument(
        "--reader",
        required=True,
        choices=("trtllm", "nemo", "peft", "vllm", "nim1", "nim2"),
        help="who is to read it",
    )
    parser.add_argument(
        "--max-rank", type=int, metavar="N", help="the largest rank that the server allows"
    )
    options.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line a rule; 0 when none is broken, 1 otherwise."""
    from workshop_utils.adapters.rules import check

    result = check(args.path, args.reader, args.max_rank)
    if args.json:
        import json

        print(json.dumps(as_dict(result), indent=2))
    else:
        print("\n".join(result.lines()))
    return 0 if result.conforms else 1


def as_dict(result: "Result") -> dict[str, Any]:
    """The result as plain values."""
    rules = [
        {
            "code": verdict.code,
            "rule": verdict.rule,
            "ok": verdict.severity != "refused",
            "severity": verdict.severity,
            "fault": verdict.fault,
            "fix": verdict.fix,
            "source": f"{verdict.source.where} ({verdict.source.date})",
        }
        for verdict in result.rules
    ]
    return {
        "path": shown(result.path),
        "reader": result.reader,
        "form": result.form,
        "conforms": result.conforms,
        "rules": rules,
        "notes": result.notes,
    }
