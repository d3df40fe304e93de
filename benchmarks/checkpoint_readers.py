"""How long and how much memory it takes to know what is in a checkpoint: this workshop's reader
against Megatron-Core's.

    .venv/bin/python benchmarks/checkpoint_readers.py [--repeats 5] [--output
    benchmarks/checkpoint_readers.json]

Each measurement is a process of its own, the two readers by turns; medians are reported, and their
ratios (Megatron-Core's divided by ours). ``seconds_reading`` is the call alone, ``seconds_process``
with the start of Python and all imports, ``seconds_processor`` the same without the time that
others had the processor, ``peak_mib`` the process's largest resident memory. Megatron-Core's reader
is ``load_tensors_metadata``: it loads the pickle with no restriction and returns names, shapes and
dtypes; ours also checks the place of each chunk against the files, and returns those.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OURS = """
import sys, time
from pathlib import Path
from workshop_utils.checkpoints.formats import torch_dist
begin = time.perf_counter()
found = torch_dist.read_directory(Path(sys.argv[1]))
print(time.perf_counter() - begin, len(found.tensors), sum(len(tensor.chunks) for tensor in found.tensors.values()))
"""  # noqa: E501
MEGATRON = """
import sys, time
from workshop_utils.runtime import nemo_cpu
nemo_cpu.apply()
from megatron.core.dist_checkpointing import load_tensors_metadata
begin = time.perf_counter()
found = load_tensors_metadata(sys.argv[1])
print(time.perf_counter() - begin, len(found), 0)
"""


def measured(command: list[str]) -> tuple[dict[str, float], list[str]]:
    """Seconds, processor seconds and peak MiB of ``command``, and the words of the last line of its
    output."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{command[:3]} failed with {status}")
    found = {
        "seconds_process": round(seconds, 3),
        "seconds_processor": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }
    return found, output.splitlines()[-1].split()


def compare(weights: Path, repeats: int) -> dict:
    """Both readers on the directory ``weights``, by turns."""
    runs: dict[str, list[dict]] = {"workshop": [], "megatron_core": []}
    counts: dict[str, list[str]] = {}
    for _ in range(repeats):
        for name, code in (("workshop", OURS), ("megatron_core", MEGATRON)):
            found, (reading, *counts[name]) = measured([sys.executable, "-c", code, str(weights)])
            runs[name].append({"seconds_reading": round(float(reading), 4), **found})
    tensors, chunks = map(int, counts["workshop"])
    if tensors != int(counts["megatron_core"][0]):
        raise SystemExit(f"{tensors} tensors here, {counts['megatron_core'][0]} in Megatron-Core")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    ratios = {
        key: round(medians["megatron_core"][key] / medians["workshop"][key], 2)
        for key in medians["workshop"]
    }
    size = (weights / ".metadata").stat().st_size
    return {
        "metadata_bytes": size,
        "tensors": tensors,
        "chunks": chunks,
        "medians": medians,
        "ratios": ratios,
        "runs": runs,
    }


def inspect(checkpoint: Path, repeats: int) -> dict:
    """``workshop inspect`` on ``checkpoint``, the whole process."""
    runs = []
    for _ in range(repeats):
        found, _ = measured(
            [str(Path(sys.executable).with_name("workshop")), "inspect", str(checkpoint)]
        )
        runs.append(found)
    return {
        "medians": {key: statistics.median(run[key] for run in runs) for key in runs[0]},
        "runs": runs,
    }


def machine() -> dict:
    """What the numbers were taken on."""
    packages = ("megatron-core", "torch", "pyyaml")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "models" / "nemo2" / "smollm2-135m-instruct"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, Path(__file__).with_name("synthetic_index.py"), folder],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "inspect": inspect(args.checkpoint, args.repeats),
            "embedded": compare(args.checkpoint / "weights", args.repeats),
            "synthetic_100000_chunks": compare(Path(folder), args.repeats),
            "minutes_of_cpu": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / 60, 1),
        }
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for name in ("inspect", "embedded", "synthetic_100000_chunks"):
        print(
            name,
            json.dumps(
                {key: results[name][key] for key in ("medians", "ratios") if key in results[name]}
            ),
        )


if __name__ == "__main__":
    main()
