"""A LoRA adapter from a file or a directory, whoever wrote it."""

from __future__ import annotations

import glob
from pathlib import Path

from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.checkpoints.formats import nemo2, safe_text
from workshop_utils.checkpoints.formats.lora_layout import PEFT_CONFIG
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsupportedAdapter
from workshop_utils.core.paths import shown


def find_adapter(path: Path | str) -> Path:
    """The adapter at ``path``: a file, a PEFT or NeMo 2.0 directory, or the only ``.nemo`` in the
    ``checkpoints`` folders below it.

    Raises:
        NotACheckpoint: there is none, or more than one.
    """
    path = Path(path)
    marks = (PEFT_CONFIG, "weights/adapter_metadata.json")
    if path.is_file() or any((path / mark).is_file() for mark in marks):
        return path
    if not path.exists():
        raise NotACheckpoint(
            f"{shown(path)} does not exist. Give an adapter, or the run directory of a "
            f"script-path training.{_kept(path)}"
        )
    if nemo2.looks_like(path):
        raise NotACheckpoint(
            f"{shown(path)} is a NeMo 2.0 distributed checkpoint of a whole model: it has no "
            "weights/adapter_metadata.json."
        )
    files = sorted(
        file
        for file in path.rglob("*.nemo")
        if file.parent == path or file.parent.name == "checkpoints"
    )
    if not files:
        # What the record of the run says of its training, and earlier runs of that name.
        record = path / "workshop" / "run.json"
        status = safe_text.read_json(record).get("status") if record.is_file() else None
        said = f" {shown(record)} has its training as {status}." if isinstance(status, str) else ""
        raise NotACheckpoint(
            f"{shown(path)} holds no adapter: no .nemo (NeMo writes one to checkpoints/ when a "
            f"training ends normally), no {PEFT_CONFIG} and no "
            f"weights/adapter_metadata.json.{said}{_kept(path)}"
        )
    if len(files) > 1:
        names = "\n".join(f"  {shown(file)}" for file in files)
        raise NotACheckpoint(
            f"{shown(path)} holds {len(files)} .nemo files; name the one to export:\n{names}"
        )
    return files[0]


def read_adapter(path: Path | str, base: Path | None = None) -> LoraAdapter:
    """Read and validate the LoRA or DoRA adapter at ``path``: ``.nemo``, ``.ckpt``, NeMo 2.0 or
    PEFT directory, or a run directory.

    Nothing is executed or extracted. The base model is not read; of ``base``, its directory, only
    the configuration is, and only for a PEFT adapter, which does not tell the base's sizes
    (:mod:`.modules` needs them to fuse q, k and v).

    Raises:
        NotACheckpoint: not a LoRA adapter, or not one adapter.
        UnsafeCheckpoint: the weights hold something else than tensors.
        DamagedCheckpoint: a field or a tensor is missing, contradicts the others, or is not finite.
        UnsupportedAdapter: another variant of LoRA, or a target this workshop does not know.
    """
    import torch

    from workshop_utils.adapters import read_nemo1, read_nemo2, read_peft

    source = find_adapter(path)
    if (source / PEFT_CONFIG).is_file():
        adapter = read_peft.read(source, base)
    elif source.is_dir():
        adapter = read_nemo2.read(source)
    elif source.suffix == ".ckpt":
        adapter = read_nemo1.read_ckpt(source)
    else:
        adapter = read_nemo1.read_nemo(source)
    named = [
        (f"layer {layer}, {target} {half}", tensor)
        for (layer, target), halves in adapter.weights.items()
        for half, tensor in zip(("linear_in.weight", "linear_out.weight"), halves, strict=True)
    ]
    named += [
        (f"layer {layer}, {target} magnitude", tensor)
        for (layer, target), tensor in adapter.magnitudes.items()
    ]
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise UnsupportedAdapter(
                f"{shown(source)}: {name} is {tensor.dtype}; only floating-point weights can be "
                "exported."
            )
        if not torch.isfinite(tensor).all():
            raise DamagedCheckpoint(
                f"{shown(source)}: {name} holds NaN or infinity. The training diverged: lower the "
                "rate."
            )
    return adapter


def _kept(run: Path) -> str:
    """Adapters of earlier trainings that are kept beside ``run`` under a number, as a sentence."""
    folders = sorted(run.parent.glob(f"{glob.escape(run.name)}.*"))
    kept = [
        shown(folder)
        for folder in folders
        if folder.suffix[1:].isdecimal() and any(folder.glob("checkpoints/*.nemo"))
    ]
    names = " and as ".join(kept)
    return f" An earlier run of that name, with an adapter, is kept as {names}." if kept else ""
