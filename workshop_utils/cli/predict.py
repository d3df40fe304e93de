"""``workshop predict``: the rows of a file answered by NeMo, as megatron_gpt_generate does it."""

from pathlib import Path

from workshop_utils.cli import options

HELP = """\
Answer the rows of a file with NeMo's script path: torchrun and megatron_gpt_generate.

Writes the file that NeMo writes, one {"input", "pred", "label"} a line. Everything after the
options is a Hydra override, for example
  workshop predict --data data/tickets/test.jsonl model.restore_from_path=models/bridged/NAME
  workshop predict --data test.jsonl model.restore_from_path=... model.peft.restore_from_path=ADAPTER.nemo
NeMo decodes slowly on a CPU: for many rows use `workshop evaluate`, which answers with transformers
and PEFT.
"""  # noqa: E501


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "predict", help="answer a file of rows by the script path", description=HELP
    )
    parser.add_argument("--data", type=Path, help="rows, as for training")
    parser.add_argument(
        "--out", type=Path, help="where the predictions go (default: runs/predictions/)"
    )
    options.add_trust(parser, "base and adapter")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args) -> int:
    """Answer, and say where."""
    from workshop_utils.cli import overrides
    from workshop_utils.core import paths
    from workshop_utils.runtime.device import choose_device
    from workshop_utils.training.script.predict import predict

    file = predict(overrides(args), args.data, args.out, args.trust, choose_device())
    print(f"predictions: {paths.shown(file)}")
    return 0
