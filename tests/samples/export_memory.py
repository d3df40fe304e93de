"""Peak memory of an export from adapter to adapter. For a slow test and for
``benchmarks/export_memory.py``."""

import subprocess
import sys
from pathlib import Path

from export_samples import ALL, Shape, config_of, tensors_of, write_adapter

FORMS = ("hf-peft", "nemo")
SHAPE = Shape(hidden=4096, heads=32, groups=8, channels=128, ffn=11008, layers=8)
RANK = 64

EXPORT = """
import re, sys, torch
from pathlib import Path
from workshop_utils.adapters.export import export
from workshop_utils.adapters import proof
def held(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what is held now
before = held("VmRSS")
export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), reader="nemo")
print(held("VmHWM") - before)
"""


def adapter(folder: Path) -> Path:
    """An adapter of 122 MB as NeMo writes it; its base, with 32 of these 8 layers, would have 27 GB
    in fp32, and is nowhere."""
    return write_adapter(
        folder / "n.nemo", config_of(SHAPE, ALL, rank=RANK), tensors_of(SHAPE, ALL, rank=RANK)
    )


def measure(source: Path, to: str, out: Path) -> dict[str, float]:
    """The adapter's MB and those that a process of its own needs beyond its imports to export it,
    at most."""
    words = [sys.executable, "-c", EXPORT, str(source), to, str(out)]
    used = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    size = source.stat().st_size
    return {
        "adapter_mb": round(size / 1e6, 1),
        "peak_mb": round(used / 1e6, 1),
        "times_the_adapter": round(used / size, 2),
    }
