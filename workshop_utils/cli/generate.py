"""``workshop generate``: the same prompts to the base and to the adapter, side by side."""

from pathlib import Path

from workshop_utils.cli import options

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
    short = "answers of the base and the adapter, side by side"
    parser = subparsers.add_parser("generate", help=short, description=HELP)
    add = parser.add_argument
    add("prompt", nargs="*", help="what to ask")
    file = "more prompts: a data file as for training, or one prompt a line in any other file"
    add("--file", type=Path, help=file)
    options.add_model(parser)
    add("--adapter", type=Path, help="a PEFT directory or a .nemo")
    longest = "longest answer (default: 64)"
    add("--max-new-tokens", type=int, default=64, metavar="N", help=longest)
    options.add_trust(parser, "model and adapter")
    parser.set_defaults(run=run)


def run(args) -> int:
    """Load, answer, print."""
    from workshop_utils.core.chat_data import prompt_turns, read_rows
    from workshop_utils.core.data_files import FORMATS, ending, lines
    from workshop_utils.core.errors import DataError
    from workshop_utils.inference.generate import as_peft, generate, load, model_directory

    prompts, conversations = list(args.prompt), []
    if args.file and ending(args.file) in FORMATS:
        rows = read_rows(args.file, say=True)
        conversations = [prompt_turns(row["messages"]) for row in rows]
    elif args.file:
        prompts += [line.strip() for line in lines(args.file) if line.strip()]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    conversations = asked + conversations
    if not conversations:
        raise DataError("nothing to answer: give a prompt, or --file with one prompt a line.")
    if args.max_new_tokens < 1:
        raise DataError(f"--max-new-tokens is {args.max_new_tokens}; it has to be at least 1.")
    directory = model_directory(args.model)
    # What is wrong with the adapter is said before the base answers.
    adapter = args.adapter and as_peft(args.adapter, args.trust)
    answers = {
        name: generate(*load(directory, peft, args.trust), conversations, args.max_new_tokens)
        for name, peft in {"base": None, **({"adapter": adapter} if adapter else {})}.items()
    }
    for number, turns in enumerate(conversations):
        print(f"\nprompt:  {turns[-1]['content']}")
        for name, texts in answers.items():
            print(f"{name + ':':<8} {texts[number].strip()}")
    return 0
