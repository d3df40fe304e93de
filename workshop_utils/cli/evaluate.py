"""``workshop evaluate``: base, two baselines and adapter on the test set."""

from pathlib import Path

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
    parser = subparsers.add_parser(
        "evaluate", help="base and adapter on the test set", description=HELP
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="a PEFT directory or a .nemo (without one only the base and its baselines)",
    )
    parser.add_argument(
        "--model",
        help="a Hugging Face model directory, or a name from `workshop models` (default: the "
        "chosen model)",
    )
    parser.add_argument(
        "--url", help="evaluate what the server at this address holds, through the API of OpenAI"
    )
    parser.add_argument(
        "--model-id", metavar="ID", help="with --url: the base's or the adapter's id in /v1/models"
    )
    parser.add_argument(
        "--data", type=Path, help="test rows, JSON Lines (default: the workshop's test set)"
    )
    parser.add_argument(
        "--train",
        type=Path,
        help="training rows, for the two baselines (default: train.jsonl beside --data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of answers, scores and plot (default: runs/evaluation/ADAPTER)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="go on in spite of what the verification of model and adapter finds: it is only "
        "printed",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the scores as JSON and nothing else"
    )
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

    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit is {args.limit}; it has to be at least 1.")
    _check_served(args)
    test, train = _data_files(args.data, args.train)
    name = f"served-{_as_directory(args.model_id)}" if args.url else _name(args.adapter)
    out = args.out or paths.runs_dir() / "evaluation" / (
        name if args.limit is None else f"{name}-first-{args.limit}"
    )
    # With --json standard output holds one JSON document; everything else goes to standard error.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        if args.url:
            result = evaluate_served(args.url, args.model_id, test, out, limit=args.limit)
        else:
            result = evaluate(
                model_directory(args.model),
                args.adapter,
                test,
                train,
                out,
                limit=args.limit,
                trust=args.trust,
            )
        print(result)

        from workshop_utils.series.plots import plot_scores, save

        print(f"plot: {paths.shown(save(plot_scores(result.scores), out / 'scores.png'))}")
        print(f"answers and scores: {paths.shown(out)}")
    if args.json:
        print(
            json.dumps(
                {
                    name: asdict(scores) | {"seconds": result.seconds[name]}
                    for name, scores in result.scores.items()
                },
                indent=2,
            )
        )
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


def _as_directory(model_id: str) -> str:
    """A model's id, such as meta/llama-3.1-8b-instruct, as one name of a directory."""
    import re

    return re.sub(r"[^\w.-]", "-", model_id).lstrip(".")


def _name(adapter: Path | None) -> str:
    """The adapter's name; a PEFT directory of `workshop export` is named after the one it lies
    in."""
    if adapter is None:
        return "base"
    path = adapter.resolve()
    return path.parent.name if path.name == "hf-peft" else path.name.removesuffix(".nemo")
