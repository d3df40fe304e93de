"""Megatron-Core's static against its dynamic engine on one NeMo 2.0 checkpoint: tokens a second, by
turns, in one process.

    python benchmarks/inference_engines.py [CHECKPOINT] [--rounds 3] [--tokens 16]

Prompts are test tickets in the model's chat template; answers are greedy, so both engines make the
same tokens. The ratio is taken of processor seconds, which other programs on the machine disturb
less than wall time. Writes ``inference_engines.json`` beside it.
"""

import argparse
import json
import os
import statistics
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from workshop_utils.core import chat_data, paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.inference import nemo2_engine
from workshop_utils.inference.sampling import Sampling

BATCHES = (1, 4, 16)


def prompts(checkpoint: Path, count: int) -> list[str]:
    """The first test tickets as the model's chat template renders them."""
    tokenizer = ChatTokenizer(checkpoint / "context" / "nemo_tokenizer")
    rows = chat_data.read_rows(paths.data_dir() / "tickets" / "test.jsonl")[:count]
    return [chat_data.render_prompt(tokenizer, row["messages"]) for row in rows]


def timed(run, model, asked: list[str], tokens: int, batch: int) -> tuple[list, dict[str, float]]:
    """Answers, and how fast they came."""
    sampling = Sampling(temperature=0, max_new_tokens=tokens)
    limits = nemo2_engine.EngineLimits(max_batch_size=batch, inference_max_seq_length=512)
    wall, processor = time.perf_counter(), time.process_time()
    answers = sorted(
        (answer.request, answer.tokens) for answer in run(model, asked, sampling, limits)
    )
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    made = sum(len(one) for _, one in answers)
    return answers, {
        "tokens": made,
        "tokens_per_second": made / wall,
        "tokens_per_processor_second": made / processor,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=paths.nemo2_checkpoint("smollm2-135m-instruct")
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    model = nemo2_engine.Model(args.checkpoint)
    found = {}
    for batch in BATCHES:
        asked = prompts(args.checkpoint, batch)
        runs: dict[str, list] = {"static": [], "dynamic": []}
        for _ in range(args.rounds):
            answers = {}
            for name, run in (("static", nemo2_engine.static), ("dynamic", nemo2_engine.dynamic)):
                answers[name], figures = timed(run, model, asked, args.tokens, batch)
                runs[name].append(figures)
            if answers["static"] != answers["dynamic"]:
                raise SystemExit(f"the engines disagree at batch {batch}: nothing is recorded")
        median = {
            name: {key: round(statistics.median(run[key] for run in made), 2) for key in made[0]}
            for name, made in runs.items()
        }
        speed = "tokens_per_processor_second"
        ratio = statistics.median(
            one[speed] / other[speed]
            for one, other in zip(runs["dynamic"], runs["static"], strict=True)
        )
        found[f"batch_{batch}"] = median | {"dynamic_over_static": round(ratio, 2)}
        print(batch, json.dumps(found[f"batch_{batch}"]), flush=True)
    machine = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: version(name) for name in ("megatron-core", "nemo-toolkit", "torch")},
    }
    record = {
        "date": date.today().isoformat(),
        "checkpoint": paths.shown(args.checkpoint),
        "rounds": args.rounds,
        "machine": machine,
    } | found
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
