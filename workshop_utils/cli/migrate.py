"""``workshop migrate``: a NeMo 1.0 configuration -> NeMo 2.0 code."""

from pathlib import Path

HELP = """\
Print the NeMo 2.0 code for a NeMo 1.0 configuration: strategy and checkpoint settings, trainer,
logging, optimizer, adapter, data.

  workshop migrate docs/examples/megatron_gpt_config.yaml
  workshop migrate megatron_gpt_finetuning_config.yaml --out finetune.py
  workshop migrate --table                 which key became which argument

Every argument is checked against the installed NeMo. Keys without a certain counterpart are listed
at the end, with the reason; none is dropped.
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "migrate", help="NeMo 1.0 configuration -> NeMo 2.0 code", description=HELP
    )
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG.yaml",
        help="a YAML file of NeMo 1.0, or the model_config.yaml of a .nemo",
    )
    add("--out", type=Path, help="write to this file instead of the screen")
    add("--table", action="store_true", help="print the table of keys and arguments, as Markdown")
    add(
        "--allow-unknown",
        action="store_true",
        help="list a key that looks mistyped instead of refusing the file",
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    """Translate and print."""
    from workshop_utils.core import paths
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.training.migrate import code, migrate
    from workshop_utils.training.migrate.table import ROWS

    if args.table:
        print(code.table(ROWS))
        return 0
    if args.config is None:
        raise WorkshopError(
            "which file? workshop migrate CONFIG.yaml, or --table for the keys it knows."
        )
    text = code.script(migrate(args.config, args.allow_unknown))
    if not args.out:
        print(text)
        return 0
    if args.out.exists():
        raise WorkshopError(
            f"{args.out} is there already, and would be replaced. Choose another name."
        )
    try:
        paths.write_text(args.out, text + "\n")
    except OSError as error:
        raise WorkshopError(
            f"{args.out} cannot be written ({error.strerror}). Choose another name."
        ) from None
    print(f"written: {paths.shown(args.out)}")
    return 0
