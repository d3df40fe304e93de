"""Export a LoRA adapter, of NeMo or of Hugging Face PEFT, for the programs that serve it. Only merging looks at the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal


def export(
    adapter: Path | str,
    to: Literal["nemo", "hf-peft", "hf-merged", "nemo2-merged"],
    out: Path | str | None = None,
    reader: Literal["trtllm", "nemo"] = "trtllm",
    base_model: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    results: Mapping[str, float | str] | None = None,
    trust: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    check: bool = True,
) -> Path:
    """Export ``adapter`` and return the path of the new ``.nemo`` (``to="nemo"``) or directory (PEFT adapter or merged model).

    The result is checked against the rules of its reader before it gets its name, and a model card is written with it. An
    export that was already made from the identical adapter is checked and reused.

    Args:
        adapter: a ``.nemo`` or ``.ckpt`` of NeMo's script path, a run directory that holds exactly one ``.nemo``, an adapter directory of
            NeMo 2.0 (LoRA, DoRA, CanonicalLoRA), or a PEFT directory (LoRA, DoRA).
        to: the form.
        out: where; by default ``runs/exports/NAME/{trtllm,nemo}/NAME.nemo`` or ``runs/exports/NAME/TO``.
        reader: whose ``.nemo``: ``"trtllm"`` (rows Q|K|V, alpha baked in) or ``"nemo"`` (interleaved, as trained).
        base_model: the base's id to record; by default the name in the adapter's configuration. Or its directory: needed for merging (a
            Hugging Face model or a NeMo 2.0 checkpoint), and for a ``.nemo`` of a PEFT adapter, which does not tell the base's heads.
        name: the adapter's name; by default the file's.
        overwrite: replace an export of another adapter, or a spoilt one. A directory with other files is never replaced.
        results: measured figures by name, for the model card.
        dtype: of the adapter's tensors, or of the merged Hugging Face model; by default they keep theirs.
        check: judge the result before it gets its name.
        trust: what :func:`workshop_utils.doctor.verify.require_sound` finds wrong with ``adapter`` is printed and not raised.

    Raises:
        NotACheckpoint, UnsafeCheckpoint, DamagedCheckpoint: see :func:`workshop_utils.export.adapter.read_adapter`.
        UnsupportedAdapter: the form cannot hold this adapter; the message names one that can.
        OutputExists: something else is where the export would go.
        ConformanceFailed: what was written breaks a rule of its reader. It was not kept.
    """
    from workshop_utils.export.job import export_adapter

    return export_adapter(adapter, to, out, reader, base_model, name, overwrite, results, trust, dtype, check).path
