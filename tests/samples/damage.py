"""Damage to checkpoints, and whether a report names it."""

import io
import json
import pickle
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.findings import Code
from workshop_utils.checkpoints.verify.report import Report


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def has(report: Report, code: Code, where: str | None = None, *words: str) -> bool:
    """Whether ``report`` has a finding of ``code`` about the tensor ``where``, or a file whose path
    ends so, with all ``words`` in its message."""
    return any(
        finding.code is code
        and (where is None or finding.tensor == where or str(finding.file).endswith(where))
        and all(word in finding.message for word in words)
        for finding in report.findings
    )


def rewrite(path: Path, change) -> None:
    """Apply ``change`` to the content of a JSON, YAML or safetensors file, or of one that torch
    saved."""
    if path.suffix in (".json", ".yaml"):
        load = json.loads if path.suffix == ".json" else yaml.safe_load
        content = load(path.read_text())
        change(content)
        path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    elif path.suffix == ".safetensors":
        content = load_file(path)
        change(content)
        save_file(content, path, {"format": "pt"})
    else:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


def rewrite_index(checkpoint: Path, change) -> None:
    """Apply ``change`` to torch's own object of the index of a NeMo 2.0 checkpoint."""
    index = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def chunk_of(checkpoint: Path, name: str, layer: int | None = None):
    chunks = nemo2.read(checkpoint).tensors[name].chunks
    return next(chunk for chunk in chunks if layer is None or chunk.offsets[0] == layer)


def rewrite_values(checkpoint: Path, name: str, layer: int | None, change) -> None:
    """Apply ``change`` to the tensor of one chunk, and save it as torch.distributed.checkpoint did,
    in the same place."""
    chunk = chunk_of(checkpoint, name, layer)
    with (checkpoint / "weights" / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        tensor = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True).clone()
        change(tensor)
        new = io.BytesIO()
        torch.save(tensor, new)
        assert new.getbuffer().nbytes == chunk.length
        file.seek(chunk.start)
        file.write(new.getbuffer())
