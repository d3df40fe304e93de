"""``workshop import``: Hugging Face -> NeMo 2.0."""

from pathlib import Path

from workshop_utils.cli import options

HELP = """\
Convert a Hugging Face model (Llama, Mistral, Mixtral, Qwen 2.5, Qwen 3, Nemotron) to a NeMo 2.0
distributed checkpoint with NeMo's importer. Example: workshop import smollm2-135m-instruct
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "import", help="Hugging Face model -> NeMo 2.0 checkpoint", description=HELP
    )
    parser.add_argument(
        "model", help="a model that `workshop models fetch` got, or a Hugging Face model directory"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write (default: models/nemo2/NAME, or models/huggingface/NAME)",
    )
    parser.add_argument(
        "--to-huggingface", action="store_true", help="the other way: MODEL is a NeMo 2.0 directory"
    )
    options.add_overwrite(parser, "an existing checkpoint")
    options.add_trust(parser, "MODEL")
    parser.set_defaults(run=run)


def run(args) -> int:
    from workshop_utils.checkpoints import sources
    from workshop_utils.checkpoints.convert.huggingface import export_huggingface, import_checkpoint
    from workshop_utils.checkpoints.convert.targets import refuse_inside
    from workshop_utils.checkpoints.formats.identify import require_place
    from workshop_utils.core import paths

    have, want = paths.huggingface_model, paths.nemo2_checkpoint
    convert = import_checkpoint
    if args.to_huggingface:
        have, want, convert = want, have, export_huggingface
    source = sources.directory(args.model, have)
    target = args.out or want(source.resolve().name)
    refuse_inside(source, target.parent.resolve() / target.name)
    require_place(target, overwrite=True)
    if (target.is_file() or (target.is_dir() and any(target.iterdir()))) and not args.overwrite:
        print(f"{paths.shown(target)} is there already; --overwrite makes it again.")
        return 0
    print(f"written: {paths.shown(convert(source, target, args.trust))}")
    return 0
