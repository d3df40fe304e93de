"""What batching brings, how soon the first token comes, and how the server stands a store that
changes under load.

    .venv/bin/python benchmarks/serving.py [--output benchmarks/serving.json]

Batching and latency: the embedded model with its trained adapter under three names; eight chats of
different adapters, one after the other and then all at once, by turns, three times. Processor
seconds tell the same on a machine that others use. Load and faults: a tiny model, see
``tests/samples/serve_load.py``. The exit status is 1, after the record is written, where eight at
once cost more than two thirds of the processor seconds of one after the other.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "samples"))

import serve_load  # noqa: E402
from serve_samples import write_base, write_peft  # noqa: E402

from workshop_utils.serving.server import start  # noqa: E402

NAME = "smollm2-135m-instruct"
ADAPTER = ROOT / "runs" / "exports" / f"{NAME}-lora" / "hf-peft"
QUESTION = (
    "Write a long story about a printer, a cable and somebody who has lost their password, part {}."
)
TOKENS = 16
LEAST = 1.5
"""What batching has to bring: processor seconds one after the other, divided by those of all at
once."""


def chat(client: openai.OpenAI, model: str, number: int) -> tuple[int, float, float]:
    """Tokens of one streamed answer, seconds to its first and to its last."""
    begin = time.perf_counter()
    first = 0.0
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION.format(number)}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
    return chunk.usage.completion_tokens, first, time.perf_counter() - begin


def processor_seconds(pid: int) -> float:
    """What a process has had of the processors, which does not depend on who else wants them."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def at_once(client: openai.OpenAI, pid: int, models: list[str], clients: int) -> dict[str, float]:
    """Eight chats by ``clients`` at a time."""
    begin, processor = time.perf_counter(), processor_seconds(pid)
    with ThreadPoolExecutor(clients) as pool:
        found = list(
            pool.map(lambda number: chat(client, models[number % len(models)], number), range(8))
        )
    seconds = time.perf_counter() - begin
    tokens = sum(each[0] for each in found)
    return {
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "processor_seconds": round(processor_seconds(pid) - processor, 2),
        "seconds_to_first_token": round(statistics.median(each[1] for each in found), 3),
    }


def batching(folder: Path) -> dict:
    """One after the other against all at once."""
    for name in ("one", "two", "three"):
        (folder / name).mkdir(parents=True)
        for file in ADAPTER.glob("adapter*"):
            shutil.copy(file, folder / name)
    runs = {"sequential": [], "concurrent": []}
    with start(ROOT / "models" / "huggingface" / NAME, folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
        models = [NAME, "one", "two", "three"]
        at_once(client, server.process.pid, models, 4)  # warm
        for _ in range(3):
            runs["sequential"].append(at_once(client, server.process.pid, models, 1))
            runs["concurrent"].append(at_once(client, server.process.pid, models, 8))
        memory = serve_load.resident_mib(server.process.pid)
    rates = {
        name: statistics.median(run["tokens_per_second"] for run in each)
        for name, each in runs.items()
    }
    processor = {
        name: statistics.median(run["processor_seconds"] for run in each)
        for name, each in runs.items()
    }
    return {
        "tokens_per_second": rates,
        "processor_seconds": processor,
        "ratio": round(rates["concurrent"] / rates["sequential"], 2),
        "processor_ratio": round(processor["sequential"] / processor["concurrent"], 2),
        "resident_mib": memory,
        "runs": runs,
    }


def faults(folder: Path) -> dict:
    """Load on a tiny model while its store changes."""
    base, store = write_base(folder / "tiny"), folder / "store"
    versions = (write_peft(folder / "version0", 1), write_peft(folder / "version1", 2))
    shutil.copytree(versions[0], store / serve_load.REPLACED)
    write_peft(store / serve_load.BROKEN, 3)
    write_peft(store / serve_load.REMOVED, 4)
    with start(base, store, refresh=0.5) as server:
        return serve_load.load(server, store, versions, "tiny")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "serving.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machine = {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "peft", "fastapi", "uvicorn", "openai")
            },
            "load_average": os.getloadavg()[0],
        }
        report = {
            "date": str(datetime.date.today()),
            "machine": machine,
            "batching": batching(Path(folder) / "adapters"),
            "load_and_faults": faults(Path(folder)),
        }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if (ratio := report["batching"]["processor_ratio"]) < LEAST:
        sys.exit(
            f"eight chats at once take 1/{ratio} of the processor seconds of one after the "
            f"other; it has to be 1/{LEAST} or less"
        )


if __name__ == "__main__":
    main()
