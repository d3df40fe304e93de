"""Export a LoRA adapter trained by NeMo's script path, for the programs that serve it. The base model is never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def export(
    adapter: Path | str,
    to: Literal["nemo", "hf-peft"],
    out: Path | str | None = None,
    reader: Literal["trtllm", "nemo"] = "trtllm",
    base_model: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    results: Mapping[str, float | str] | None = None,
    trust: bool = False,
) -> Path:
    """Export ``adapter`` and return the path of the new ``.nemo`` (``to="nemo"``) or PEFT directory (``to="hf-peft"``).

    The result is checked against the rules of its reader before it gets its name, and a model card is written with it. An
    export that was already made from the identical adapter is checked and reused.

    Args:
        adapter: a ``.nemo`` written by NeMo's script path, or a training's run directory that holds exactly one.
        to: the form.
        out: where; by default ``runs/exports/NAME/{trtllm,nemo}/NAME.nemo`` or ``runs/exports/NAME/hf-peft``.
        reader: whose ``.nemo``: ``"trtllm"`` (rows Q|K|V, alpha baked in) or ``"nemo"`` (interleaved, as trained).
        base_model: the base's id or path to record; by default the name in the adapter's configuration.
        name: the adapter's name; by default the file's.
        overwrite: replace an export of another adapter, or a spoilt one. A directory with other files is never replaced.
        results: measured figures by name, for the model card.
        trust: what :func:`workshop_utils.doctor.verify.require_sound` finds wrong with ``adapter`` is printed and not raised.

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: see :func:`workshop_utils.export.adapter.read_adapter`.
        UnsupportedAdapter: the form cannot hold this adapter; the message names one that can.
        OutputExists: something else is where the export would go.
        ConformanceFailed: what was written breaks a rule of its reader. It was not kept.
    """
    from workshop_utils.export.job import export_adapter

    return export_adapter(adapter, to, out, reader, base_model, name, overwrite, results, trust).path
