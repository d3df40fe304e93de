"""``workshop bridge``: a NeMo 2.0 checkpoint as the script path wants it."""

import argparse
from pathlib import Path

from workshop_utils.core.paths import shown

DESCRIPTION = """\
Make a NeMo 2.0 checkpoint loadable by the script path (megatron_gpt_finetuning), without copying a
weight.

The script path looks for model_config.yaml and model_weights/; a NeMo 2.0 directory has
context/model.yaml and weights/. This command makes a directory with a translated model_config.yaml,
links to the weights, and an index with the tensor names that the script path asks for. The NeMo 2.0
directory stays as it is. Run again, it reuses what is up to date.

  --link-only   only the link NEMO2_DIR/model_config.yaml -> context/model.yaml, for tools that look
                for that file. It does not make the checkpoint loadable: the file is found, and then
                its keys are not those of the script path.
"""

EXAMPLES = """\
example:
  workshop bridge models/nemo2/smollm2-135m-instruct
  workshop finetune model.restore_from_path=models/bridged/smollm2-135m-instruct
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bridge",
        help="make a NeMo 2.0 checkpoint loadable by the script path",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "nemo2_dir",
        metavar="NEMO2_DIR",
        type=Path,
        help="directory that holds context/ and weights/",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--out", metavar="DIR", type=Path, help="directory to make (default: models/bridged/NAME)"
    )
    choice.add_argument(
        "--link-only",
        action="store_true",
        help="only make the link to context/model.yaml in NEMO2_DIR",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="print what the verification of NEMO2_DIR finds, and go on; what cannot be "
        "translated is refused all the same",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from workshop_utils.checkpoints.convert.bridge import bridge

    source = args.nemo2_dir
    view = shown(bridge(source, args.out, args.link_only, args.trust))
    if args.link_only:
        print(
            f"{view} -> context/model.yaml\n"
            "This satisfies tools that look for the file. The script path still cannot load the "
            f"checkpoint: run\n  workshop bridge {shown(source)}"
        )
        return 0
    print(f"{view}  (links to {shown(source)}; keep both)")
    print(f"Next: workshop finetune model.restore_from_path={view}")
    return 0
