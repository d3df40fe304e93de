"""How much memory an export from adapter to adapter takes, in multiples of the adapter. Its base is
not on the machine.

    .venv/bin/python benchmarks/export_memory.py [--repeats 3] [--output
    benchmarks/export_memory.json]

``tests/samples/export_memory.py`` makes the adapter and measures: the peak of resident memory in a
process of its own, without that of the imports. The export is checked, as it is by default.
Medians.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "samples"))

import export_memory  # noqa: E402


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "export_memory.json")
    args = parser.parse_args()
    forms = {}
    with tempfile.TemporaryDirectory() as folder:
        source = export_memory.adapter(Path(folder))
        for to in export_memory.FORMS:
            runs = [
                export_memory.measure(source, to, Path(folder) / f"{to}{number}")
                for number in range(args.repeats)
            ]
            forms[to] = {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {
                "runs": runs
            }
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")
        },
    }
    report = {"date": str(datetime.date.today()), "machine": machine, "forms": forms}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
