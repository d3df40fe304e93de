"""``workshop evaluate``: base, two baselines and adapter on the test set."""

import re
from pathlib import Path

from workshop_utils.cli import options

HELP = """\
Score the base model and an adapter on held-out rows.

Four lines: the plain base, the base with the schema and five examples in its prompt, the commonest
answer of the training data, and the adapter. Answers and scores are kept; what has not changed is
not computed again.
  workshop evaluate --adapter runs/exports/NAME/hf-peft
  workshop evaluate --adapter ADAPTER.nemo --limit 20 --json
A model that a server holds (workshop serve, NIM, vLLM) is scored on the same prompts; a key goes
into WORKSHOP_API_KEY:
  workshop evaluate --url http://127.0.0.1:8000 --model-id triage
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    short = "base and adapter on the test set"
    parser = subparsers.add_parser("evaluate", help=short, description=HELP)
    add = parser.add_argument
    adapter = "a PEFT directory or a .nemo (without one only the base and its baselines)"
    add("--adapter", type=Path, help=adapter)
    options.add_model(parser)
    add("--url", help="evaluate what the server at this address holds, through the API of OpenAI")
    own = "with --url: the base's or the adapter's id in /v1/models"
    add("--model-id", metavar="ID", help=own)
    add("--data", type=Path, help="test rows, as for training (default: the workshop's test set)")
    train = "training rows, for the two baselines (default: train.jsonl beside --data)"
    add("--train", type=Path, help=train)
    out = "directory of answers, scores and plot (default: runs/evaluation/ADAPTER)"
    add("--out", type=Path, help=out)
    add("--limit", type=int, metavar="N", help="only the first N rows")
    options.add_trust(parser, "model and adapter")
    options.add_json(parser, "print the scores as JSON and nothing else")
    parser.set_defaults(run=run)


def run(args) -> int:
    """Evaluate, print the table, save the plot."""
    import contextlib
    import json
    import sys
    from dataclasses import asdict

    from workshop_utils.core import paths
    from workshop_utils.core.errors import DataError
    from workshop_utils.inference.evaluate import evaluate, evaluate_served
    from workshop_utils.inference.generate import model_directory
    from workshop_utils.series.plots import plot_scores, save

    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit is {args.limit}; it has to be at least 1.")
    _check_served(args)
    test, train = _data_files(args.data, args.train)
    name = _name(args) if args.limit is None else f"{_name(args)}-first-{args.limit}"
    out = args.out or paths.runs_dir() / "evaluation" / name
    # With --json standard output holds one JSON document; everything else goes to standard error.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        if args.url:
            result = evaluate_served(args.url, args.model_id, test, out, limit=args.limit)
        else:
            model, how = model_directory(args.model), {"limit": args.limit, "trust": args.trust}
            result = evaluate(model, args.adapter, test, train, out, **how)
        print(result)
        print(f"plot: {paths.shown(save(plot_scores(result.scores), out / 'scores.png'))}")
        print(f"answers and scores: {paths.shown(out)}")
    if args.json:
        scores = {
            name: asdict(scores) | {"seconds": result.seconds[name]}
            for name, scores in result.scores.items()
        }
        print(json.dumps(scores, indent=2))
    return 0


def _data_files(test: Path | None, train: Path | None) -> tuple[Path, Path]:
    """What was asked for, completed by the workshop's own files or by the training file beside the
    test file."""
    from workshop_utils.series.workshop import open_workshop

    if test is None:
        own = open_workshop(show=False).data_files()
        return own["test"], train or own["train"]
    beside = test.with_name("train.jsonl")
    return test, train or (beside if beside.exists() else test)


def _check_served(args) -> None:
    from workshop_utils.core.errors import WorkshopError

    if bool(args.url) != bool(args.model_id):
        raise WorkshopError(
            "--url and --model-id go together: where the server is, and which of its models is "
            "meant."
        )
    for option in ("adapter", "model", "train"):
        if args.url and getattr(args, option) is not None:
            raise WorkshopError(
                f"--{option} has no effect with --url: the server holds base and adapter. Leave "
                "it out."
            )
    if args.url and not args.url.startswith(("http://", "https://")):
        raise WorkshopError(f"--url is {args.url!r}; it has to begin with http:// or https://.")


def _name(args) -> str:
    """Of the directory: the served model's id without its slashes, or that of the adapter, where a
    PEFT directory of `workshop export` is named after the one it lies in."""
    if args.url:
        return "served-" + re.sub(r"[^\w.-]", "-", args.model_id).lstrip(".")
    if args.adapter is None:
        return "base"
    path = args.adapter.resolve()
    return path.parent.name if path.name == "hf-peft" else path.name.removesuffix(".nemo")
