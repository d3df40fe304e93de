"""``workshop recipe``: fine-tuning with NeMo 2.0's recipes."""

import argparse
import sys
from pathlib import Path

HELP = """\
Fine-tune with a NeMo 2.0 recipe: import, data, training, test, export.

  workshop recipe --preset cpu all                 everything, on this machine, with the model of the workshop
  workshop recipe --hf_model_id meta-llama/Llama-3.2-1B --recipe_cls_name llama32_1b --tensor_parallel_size 1
  workshop recipe --config my.yaml --max_steps 9   the command line wins over the file, the file over the preset
  workshop recipe --preset cpu --dry-run           every value, checked, in a second; nothing is run
  workshop recipe --list                           all recipes of this NeMo

ACTION is one of
  train    import and data where they are missing, then training (the default)
  import   the base -> a NeMo 2.0 checkpoint in nemo_ckpt_dir
  data     the data set -> training.jsonl, validation.jsonl and test.jsonl in data_dir
  test     answers of a checkpoint on the test rows, and what they are worth
  export   a checkpoint -> Hugging Face or NeMo 2.0, re-loaded and compared by logits
  all      all of it, in this order

Options have the names and the defaults (one machine with eight GPUs) of the pipeline that they come
from; in YAML they are keys, without the dashes. Unset ones take the default; `none` on the command
line, null in YAML, takes it back.
"""  # noqa: E501
ACTIONS = ("train", "import", "data", "test", "export", "all")


def add_parser(subparsers) -> None:
    """Register the command, with an option for each field of the dataclass."""
    from workshop_utils.training.recipe import options

    parser = subparsers.add_parser(
        "recipe",
        help="fine-tuning with NeMo 2.0's recipes",
        description=HELP,
        allow_abbrev=False,
        usage="workshop recipe [ACTION] [options]",
    )
    add = parser.add_argument
    add("action", nargs="?", metavar="ACTION", default="train", help=argparse.SUPPRESS)
    add(
        "--preset",
        metavar="NAME",
        help="a set of options: cpu (the model of the workshop on its tickets, one process, fp32)",
    )
    add("--config", type=Path, metavar="FILE.yaml", help="options from a file")
    for flag, text in {
        "--dry-run": "check, print every resolved value, and stop; imports no NeMo",
        "--resolve": "with --dry-run: NeMo-Run's whole configuration, too; imports NeMo",
        "--list": "list NeMo's recipes and stop",
        "--options": "print all options as Markdown tables and stop",
    }.items():
        add(flag, action="store_true", help=text)
    groups = {
        script: parser.add_argument_group(f"{what} (the reference's {script})")
        for script, what in options.SCRIPTS.items()
    }
    for name, field in options.FIELDS.items():
        _add_option(groups[field.metadata["script"]], name, field.metadata["help"])
    # Options are read strictly in `run`, where a mistyped one can be answered with the right one.
    parser.set_defaults(run=run, takes_overrides=True)


def _add_option(group, name: str, text: str) -> None:
    from workshop_utils.training.recipe import options

    default, takes = options.default(name), options.described(name)
    shown = "none" if default is None else default
    about = {"dest": f"option_{name}", "default": argparse.SUPPRESS}
    if isinstance(default, bool):
        off = f"--{name.removeprefix('no_')}" if name.startswith("no_") else f"--no-{name}"
        group.add_argument(off, action="store_false", help=argparse.SUPPRESS, **about)
        shown = f"{str(default).lower()}; off: {off}"
        about["action"] = "store_true"
    else:
        kinds = {"whole": "N", "number": "X", "list": "A,B", "mapping": "JSON"}
        about["metavar"] = kinds.get(takes.split()[1], "TEXT")
        if takes.startswith("one of "):
            about["metavar"] = takes.removeprefix("one of ").replace(", ", "|")
    group.add_argument(f"--{name}", help=f"{text} ({shown})".replace("%", "%%"), **about)


def run(args) -> int:
    """Gather the options, check them, and do what is asked for."""
    from workshop_utils.training.recipe import base_checkpoint, index, options
    from workshop_utils.training.recipe.plan import resolve, shown_values

    _refuse_unknown(args)
    if args.list or args.options:
        print(index.table() if args.list else options.table())
        return 0
    resolved = resolve(gather(args))
    if not (args.dry_run or args.resolve):
        return act(args.action, resolved)
    base_checkpoint.find_source(resolved.options.hf_model_id)
    _print_notices(resolved)
    print(shown_values(resolved))
    if args.resolve:
        from workshop_utils.training.recipe.build import finetune_recipe

        print(finetune_recipe(resolved, preview=True))
    return 0


def _print_notices(resolved) -> None:
    from workshop_utils.training.recipe.plan import notices

    for line in notices(resolved):
        print(f"note: {line}", file=sys.stderr)


def act(action: str, resolved) -> int:
    """Do ``action``, saying what came of each phase; the next begins only when the one before has
    succeeded."""
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.training.recipe.plan import ONE_MACHINE, require_possible

    phases = {"train": ("import", "data", "train"), "all": tuple(PHASES)}.get(action, (action,))
    require_possible(resolved)
    if "train" in phases and resolved.options.num_nodes > 1:
        raise WorkshopError(ONE_MACHINE)
    _print_notices(resolved)
    if "data" in phases:
        _require_sources(resolved)
    for phase in phases:
        print(f"== {phase}", flush=True)
        print(PHASES[phase](resolved))
    return 0


def _require_sources(resolved) -> None:
    """Base and data set exist: said before an import that may take an hour. Raises
    WorkshopError."""
    from workshop_utils.core import paths
    from workshop_utils.series import workshop
    from workshop_utils.training.recipe import base_checkpoint, dataset_sources

    if Path(resolved.dataset.dataset_name) == paths.data_dir() / "tickets":
        workshop.make_tickets()
    base_checkpoint.find_source(resolved.options.hf_model_id)
    dataset_sources.find(resolved.dataset)


def _import(resolved) -> str:
    from workshop_utils.core import paths
    from workshop_utils.training.recipe.base_checkpoint import import_base

    options, target = resolved.options, resolved.nemo_ckpt_dir
    base = import_base(options.hf_model_id, target, options.import_timeout, options.trust)
    return f"base: {paths.shown(base)}"


def _data(resolved) -> object:
    from workshop_utils.training.recipe.prepare_data import prepare

    base = resolved.nemo_ckpt_dir if (resolved.nemo_ckpt_dir / "context").is_dir() else None
    length, timeout = resolved.options.max_seq_length, resolved.options.import_timeout
    return prepare(resolved.dataset, resolved.data_dir, base, length, timeout=timeout)


def _train(resolved) -> object:
    from workshop_utils.training.recipe import job

    return job.train(resolved)


def _test(resolved) -> object:
    from workshop_utils.training.recipe import predict

    return predict.test(resolved)


def _export(resolved) -> str:
    from workshop_utils.core import paths
    from workshop_utils.training.recipe import deliver

    return f"export: {paths.shown(deliver.export(resolved))}"


PHASES = {"import": _import, "data": _data, "train": _train, "test": _test, "export": _export}
"""In this order; each returns what to print about it."""


def gather(args):
    """:class:`RecipeOptions` from the command line over YAML over preset over defaults."""
    from workshop_utils.training.recipe.options import from_file, from_mapping, from_text
    from workshop_utils.training.recipe.presets import preset

    chosen = from_mapping(preset(args.preset) if args.preset else {}, where="preset: ")
    if args.config:
        chosen = from_file(args.config, chosen)
    typed = {}
    for key, value in vars(args).items():
        if key.startswith("option_"):
            name = key.removeprefix("option_")
            typed[name] = from_text(name, value) if isinstance(value, str) else value
    return from_mapping(typed, chosen, where="--")


def _refuse_unknown(args) -> None:
    """A mistyped option or action, with the right one. Raises WorkshopError."""
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.training.recipe.options import FIELDS, nearest
    from workshop_utils.training.recipe.presets import PRESETS

    for word in args.rest:
        if word.startswith("-"):
            name = word.lstrip("-").partition("=")[0]
            known = [*FIELDS, "preset", "config", "dry-run", "resolve", "list", "options"]
            raise WorkshopError(
                f"{word} is no option.{nearest(name, known, '--')} `workshop recipe --help` "
                "lists all."
            )
    if args.action not in ACTIONS or args.rest:
        word = args.rest[0] if args.action in ACTIONS else args.action
        hint = nearest(word, list(ACTIONS))
        if word in PRESETS:
            hint = f" Options begin with dashes: --preset {word}."
        raise WorkshopError(f"{word!r} is no action.{hint} There are: {', '.join(ACTIONS)}.")
