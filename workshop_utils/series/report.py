"""What the notebooks made and measured, noted as they run, and the report of ``make workshop``
built from it.

``runs/workshop/results.json`` holds the notes, ``runs/workshop/report.json`` the report.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.runtime.machine import describe_machine

ARTIFACTS = ("hf_model", "nemo2_checkpoint", "bridged_checkpoint", "nemo_adapter")
ARTIFACTS += ("trtllm_adapter", "peft_adapter", "test_set")
METRICS = ("base_exact_match", "tuned_exact_match", "train_seconds")


@dataclass(frozen=True)
class NotebookResult:
    """``result``: passed, failed or skipped; ``error``: the cell and its first error."""

    name: str
    seconds: float
    result: str
    error: str | None = None


def report_file() -> Path:
    """``runs/workshop/report.json``."""
    return paths.runs_dir() / "workshop" / "report.json"


def record_artifact(key: str, path: Path) -> Path:
    """Note that the artifact ``key`` (see :data:`ARTIFACTS`) lies at ``path``; returns ``path``."""
    _record("artifacts", ARTIFACTS, key, paths.shown(path))
    return path


def record_metric(key: str, value: float) -> float:
    """Note a measured figure (see :data:`METRICS`) and return it; ValueError for what is no time in
    seconds, or no rate as a fraction."""
    value = float(value)
    if not math.isfinite(value) or value < 0 or (key.endswith("_match") and value > 1):
        raise ValueError(f"{key} is {value}; rates are fractions from 0 to 1, times are seconds")
    _record("metrics", METRICS, key, value)
    return value


def read_results() -> dict:
    """What has been noted so far: ``{"artifacts": {...}, "metrics": {...}}``."""
    file = _results_file()
    try:
        noted = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        noted = {}
    except json.JSONDecodeError as error:
        said = f"{paths.shown(file)} is not JSON ({error}). Delete it and run again."
        raise WorkshopError(said) from None
    return {"artifacts": noted.get("artifacts", {}), "metrics": noted.get("metrics", {})}


def forget_results() -> None:
    """Start anew: what an earlier run made or measured must not stand in the next report."""
    _results_file().unlink(missing_ok=True)


def build_report(notebooks: Sequence[NotebookResult]) -> dict:
    """Every key is there, and is null while nothing was made or measured, or that is gone."""
    noted = read_results()
    places = {key: noted["artifacts"].get(key) for key in ARTIFACTS}
    for key, place in places.items():
        if place and not (paths.root() / place).exists():
            places[key] = None
    rows = [
        {key: value for key, value in vars(row).items() if value is not None} for row in notebooks
    ]
    return {
        "notebooks": rows,
        "artifacts": places,
        "metrics": {key: noted["metrics"].get(key) for key in METRICS},
        "machine": describe_machine(),
    }


def write_report(notebooks: Sequence[NotebookResult]) -> Path:
    """Write :func:`build_report` to ``runs/workshop/report.json``, all or nothing."""
    return paths.write_text(report_file(), json.dumps(build_report(notebooks), indent=2) + "\n")


def _record(section: str, known: tuple[str, ...], key: str, value) -> None:
    if key not in known:
        raise ValueError(f"the report has no {section} entry {key!r}; it has {', '.join(known)}")
    results = read_results()
    results[section][key] = value
    paths.write_text(_results_file(), json.dumps(results, indent=2) + "\n")


def _results_file() -> Path:
    return paths.runs_dir() / "workshop" / "results.json"
