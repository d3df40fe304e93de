"""``workshop data``: training rows of one's own, looked at and converted."""

from pathlib import Path

from workshop_utils.cli import options

HELP = """\
Look at training rows before training on them, or rewrite them as messages.

  workshop data check train.jsonl
  workshop data check train.csv --test test.csv --model smollm2-135m-instruct --seq-length 512
  workshop data convert alpaca.json train.jsonl

Files are JSON Lines, JSON, CSV, TSV, Parquet or Arrow; text files may be packed with gzip. Known
shapes, by their columns:
  messages                                OpenAI: a list of {"role", "content"}
  conversations                           ShareGPT: a list of {"from", "value"}
  instruction, input, output              Alpaca; input may be empty
  prompt, completion                      or question, query, input with response, answer, output
beside each of which may stand system (or system_prompt), a text. All other columns are named and
not used. `workshop finetune --data` and `workshop recipe` read rows the same way.
"""
CHECK = """\
Say which columns are used, and count, with two examples each: rows that cannot be used, empty
prompts, answers that the length cuts away (with --model), prompts with different answers, rows of
the test set in the training set. Nothing is written. Exit status: 0 the rows can be trained on,
1 they cannot.
"""
CONVERT = """\
Write the rows of FILE to OUT as JSON Lines, {"messages": [...]} a line. A row that cannot be used
is an error, and then nothing is written.
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "data", help="look at training rows, or convert them to messages", description=HELP
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="what is in the rows", description=CHECK)
    add = check.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="training rows")
    add("--test", type=Path, metavar="FILE", help="rows that must not be among them")
    add(
        "--model",
        metavar="DIR",
        help="count tokens with the tokenizer of this model: a Hugging Face or NeMo 2.0 directory, "
        "or a name from `workshop models`",
    )
    add(
        "--seq-length",
        type=int,
        default=512,
        metavar="N",
        help="longest row, in tokens (default: 512, as `workshop finetune --data` has it)",
    )
    options.add_json(check)
    check.set_defaults(run=run_check)
    convert = actions.add_parser("convert", help="rows -> messages", description=CONVERT)
    convert.add_argument("file", type=Path, metavar="FILE", help="rows of any known shape")
    convert.add_argument("out", type=Path, metavar="OUT.jsonl", help="where they go")
    options.add_overwrite(convert, "OUT")
    convert.set_defaults(run=run_convert)


def run_check(args) -> int:
    """Look and tell."""
    import json
    from dataclasses import asdict

    from workshop_utils.core.errors import DataError
    from workshop_utils.training.data_report import check

    if args.seq_length < 1:
        raise DataError(f"--seq-length is {args.seq_length}; it has to be at least 1.")
    tokenizer = _tokenizer(args.model) if args.model else None
    report = check(args.files, args.test, tokenizer, args.seq_length)
    about = asdict(report) | {"usable": report.is_usable}
    print(json.dumps(about, indent=1, ensure_ascii=False) if args.json else report)
    return 0 if report.is_usable else 1


def _tokenizer(model: str):
    from workshop_utils.checkpoints import sources
    from workshop_utils.core.chat_template import ChatTokenizer
    from workshop_utils.training.recipe.prepare_data import directory_of_tokenizer

    return ChatTokenizer(directory_of_tokenizer(sources.directory(model)))


def run_convert(args) -> int:
    """Convert, and say how the rows were taken."""
    from workshop_utils.core import paths
    from workshop_utils.core.errors import DataError, OutputExists
    from workshop_utils.training.data_report import convert

    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise DataError(f"{paths.shown(args.out)}: the rows become JSON Lines; name it NAME.jsonl.")
    if args.out.exists() and not args.overwrite:
        raise OutputExists(
            f"{paths.shown(args.out)} is there already. Add --overwrite, or choose another name."
        )
    rows = convert(args.file, args.out)
    print(*rows.said, f"written: {paths.shown(args.out)}, {len(rows):,} rows", sep="\n")
    return 0
