"""``workshop finetune``: LoRA by the script path."""

from pathlib import Path

from workshop_utils.cli import options

HELP = """\
Fine-tune with NeMo's script path: torchrun and megatron_gpt_finetuning.

Everything after the options is a Hydra override of the script (key=value; +key, ++key, ~key as in
Hydra; no sweeps, as one run is started), for example
  workshop finetune model.restore_from_path=models/bridged/smollm2-135m-instruct
  workshop finetune model.restore_from_path=... trainer.max_steps=20 model.peft.lora_tuning.adapter_dim=8
  workshop finetune --data my.jsonl model.restore_from_path=... '~model.optim.sched'
With model.restore_from_path alone it trains on the workshop's ticket data with the workshop's
recipe and this machine's settings. With model.data.train_ds.file_names=[...] it is NeMo's own
command line: the script's defaults hold, and rows are taken as they are. Set NEMO_PATH to a NeMo
clone to run its own copy of the script.
"""  # noqa: E501


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "finetune", help="LoRA fine-tuning by the script path", description=HELP
    )
    add = parser.add_argument
    add("--data", type=Path, help="training rows; `workshop data --help` lists the known shapes")
    add(
        "--validation",
        type=Path,
        help="validation rows (default: validation.jsonl beside the training file)",
    )
    add("--name", help="name of the run and of its .nemo (default: the base's name and -lora)")
    add(
        "--nproc-per-node",
        "--nproc_per_node",
        type=int,
        default=1,
        metavar="N",
        help="processes (default: 1)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked, print the command, and stop: nothing is "
        "written",
    )
    add(
        "--fresh",
        action="store_true",
        help="train anew although an identical run has finished or can be continued",
    )
    options.add_trust(parser, "the checkpoint")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args) -> int:
    """Plan, print, train."""
    from workshop_utils.cli import overrides
    from workshop_utils.core import paths
    from workshop_utils.runtime.device import choose_device
    from workshop_utils.training import script

    plan = script.make_plan(
        overrides(args),
        data=args.data,
        validation=args.validation,
        name=args.name,
        nproc_per_node=args.nproc_per_node,
        trust=args.trust,
        device=choose_device(),
    )
    checked = plan.preflight
    warnings = [f"warning: {text}" for text in checked.warnings]
    print(f"device: {plan.device}", *checked.facts, *warnings, plan, sep="\n", flush=True)
    checked.require()
    if not args.dry_run:
        adapter = script.finetune(plan, fresh=args.fresh)
        print(f"adapter: {paths.shown(adapter)} ({adapter.stat().st_size / 1e6:.1f} MB)")
    return 0
