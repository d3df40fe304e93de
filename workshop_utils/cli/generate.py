"""``workshop generate``: the same prompts to the base and to the adapter, side by side."""

from pathlib import Path

HELP = """\
Answer prompts with the base model, and with the adapter beside it.

Greedy, in batches, through transformers and PEFT, each prompt in the model's own chat template. A
.nemo adapter is exported to the PEFT layout first.
  workshop generate "What is the capital of France?"
  workshop generate --adapter runs/exports/NAME/hf-peft "The invoice is wrong. My ID: WH-564."
  workshop generate --adapter ADAPTER.nemo --file prompts.jsonl
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate", help="answers of the base and the adapter, side by side", description=HELP
    )
    parser.add_argument("prompt", nargs="*", help="what to ask")
    parser.add_argument(
        "--file",
        type=Path,
        help="more prompts: JSON Lines as for training, or one prompt a line in any other file",
    )
    parser.add_argument(
        "--model",
        help="a Hugging Face model directory, or a name from `workshop models` (default: the "
        "chosen model)",
    )
    parser.add_argument("--adapter", type=Path, help="a PEFT directory or a .nemo")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="go on in spite of what the verification of model and adapter finds: it is only "
        "printed",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    """Load, answer, print."""
    from workshop_utils.core.chat_data import lines, prompt_turns, read_rows
    from workshop_utils.core.errors import DataError
    from workshop_utils.inference.generate import model_directory

    conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    if args.file and args.file.suffix == ".jsonl":
        conversations += [prompt_turns(row["messages"]) for row in read_rows(args.file)]
    elif args.file:
        conversations += [
            [{"role": "user", "content": line.strip()}] for line in lines(args.file) if line.strip()
        ]
    if not conversations:
        raise DataError("nothing to answer: give a prompt, or --file with one prompt a line.")
    if args.max_new_tokens < 1:
        raise DataError(f"--max-new-tokens is {args.max_new_tokens}; it has to be at least 1.")
    directory = model_directory(args.model)

    from workshop_utils.inference.generate import as_peft, generate, load

    adapter = args.adapter and as_peft(
        args.adapter, args.trust
    )  # what is wrong with it is said before the base answers
    answers = {
        "base": generate(*load(directory, trust=args.trust), conversations, args.max_new_tokens)
    }
    if adapter:
        answers["adapter"] = generate(
            *load(directory, adapter, args.trust), conversations, args.max_new_tokens
        )
    for number, turns in enumerate(conversations):
        print(f"\nprompt:  {turns[-1]['content']}")
        for name, texts in answers.items():
            print(f"{name + ':':<8} {texts[number].strip()}")
    return 0
