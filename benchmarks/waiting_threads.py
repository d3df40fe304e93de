"""Does it matter whether OpenMP's threads spin while they wait? Generation with and without, alone
and beside one busy process.

    python benchmarks/waiting_threads.py [--rounds 3]

The default model answers 16 test tickets, 24 tokens each, by turns with OpenMP's default, which
spins, and with ``OMP_WAIT_POLICY=PASSIVE``, which `workshop serve` sets, each in a process of its
own. Writes ``waiting_threads.json`` beside it: medians of the seconds, and how many times as long
the default takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

from workshop_utils.core import paths

POLICIES = ("default", "PASSIVE")
ROWS, TOKENS = 16, 24


def answer() -> None:
    """Answer the tickets and print the seconds; run in a process of its own."""
    from workshop_utils.core.chat_data import read_rows
    from workshop_utils.inference.generate import generate, load

    model, tokenizer = load(paths.huggingface_model("smollm2-135m-instruct"))
    tickets = [
        row["messages"][:1] for row in read_rows(paths.data_dir() / "tickets" / "test.jsonl")[:ROWS]
    ]
    generate(model, tokenizer, tickets[:2], max_new_tokens=4, progress=False)
    began = time.perf_counter()
    generate(model, tokenizer, tickets, max_new_tokens=TOKENS, progress=False)
    print(time.perf_counter() - began)


def seconds(policy: str) -> float:
    """The seconds of :func:`answer` under ``policy``."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, __file__, "--answer"],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout.split()[-1])


def compare(rounds: int) -> dict[str, float]:
    """Medians for both policies, by turns, and how many times as long the default takes."""
    found = {policy: [] for policy in POLICIES}
    for _ in range(rounds):
        for policy in POLICIES:
            found[policy].append(seconds(policy))
    ratios = [
        spinning / passive
        for spinning, passive in zip(found["default"], found["PASSIVE"], strict=True)
    ]
    return {policy: round(statistics.median(values), 2) for policy, values in found.items()} | {
        "ratio": round(statistics.median(ratios), 2)
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        return answer()
    record = {
        "date": date.today().isoformat(),
        "rows": ROWS,
        "tokens": TOKENS,
        "rounds": args.rounds,
        "machine": {
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
            "torch": version("torch"),
        },
    }
    record["alone"] = compare(args.rounds)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            record["beside_a_busy_process"] = compare(args.rounds)
        finally:
            busy.kill()
    print(json.dumps(record, indent=1))
    paths.write_text(Path(__file__).with_suffix(".json"), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
