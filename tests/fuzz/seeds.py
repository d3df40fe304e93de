"""Genuine small files to start from: ``seeds.py DIRECTORY`` writes DIRECTORY/TARGET/NAME. Needs
torch, safetensors and gguf."""

import argparse
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path


def _index() -> bytes:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries, places = {}, {}
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        name = f"module.decoder.layers.weight{number}"
        chunks = [
            ChunkStorageMetadata(torch.Size((layer, 0)), torch.Size((1, 300))) for layer in range(2)
        ]
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size((2, 300)), chunks
        )
        for layer in range(2):
            places[MetadataIndex(name, torch.Size((layer, 0)))] = _StorageInfo(
                f"__0_{layer}.distcp", number * 5000, 5000
            )
    entries["extra/shard_0_1"] = BytesStorageMetadata()
    places[MetadataIndex("extra/shard_0_1")] = _StorageInfo("__0_0.distcp", 70000, 100)
    return pickle.dumps(Metadata(entries, {"a": ("b", 1)}, places))


def _state() -> bytes:
    import torch

    base = torch.zeros(4, 4)
    state = {
        "weight": base,
        "row": base[1],
        "turned": base.T,
        "half": torch.zeros(3, dtype=torch.bfloat16),
    }
    rest = {
        "epoch": 1,
        "args": argparse.Namespace(a=1, b=[1.5, None]),
        "set": {1},
        "bytes": b"abc",
        "name": "x" * 300,
    }
    content = io.BytesIO()
    torch.save(
        {
            "state_dict": state,
            "pytorch-lightning_version": "2.4.0",
            "optimizer_states": [{"state": {0: base}}],
            **rest,
        },
        content,
    )
    return content.getvalue()


def _tar(mode: str, pax: bool, config: bytes, weights: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode=mode, format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    ) as archive:
        for name, data in (
            ("./model_config.yaml", config),
            ("./model_weights.ckpt", weights),
            ("./" + "long/" * 30 + "name", b"x"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1.5 if pax else 1
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def write(directory: Path) -> None:
    """Write the seeds of every target."""
    import safetensors.numpy
    from gguf import GGUFWriter
    from numpy import zeros

    config = b"_target_: nemo.collections.llm.gpt.model.llama.LlamaModel\nconfig: &a\n  n: 1\n  x: [1.0e-05, null, true, 'a']\nb: *a\n"  # noqa: E501
    as_json = json.dumps(
        {"a": [1, 2.5, None, {"b": "c\u00e9"}], "_target_": "torch.load", "n": 1e30}
    ).encode()
    saved = _state()
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        pickled = archive.read(
            next(name for name in archive.namelist() if name.endswith("data.pkl"))
        )
    gguf_file = directory / "seed.gguf"
    directory.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(gguf_file, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", zeros((4, 32), dtype="float32"))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    seeds = {
        "index": {"torch": _index()},
        "scan": {"reduce": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.",
            "old": b"(S'x'\niposix\nsystem\n.", "index": _index()},
        "state": {"torch": pickled, **{f"protocol{n}": pickle.dumps({"a": [1, 2.5, (None,
            True), b"x", {3}]}, n) for n in range(6)}},
        "lightning": {"torch": saved},
        "tar": {"gnu": _tar("w", False, config, saved), "pax": _tar("w", True, config,
            b"x"), "gzip": _tar("w:gz", True, config, b"x")},
        "yaml": {"model": config,
            "odd": b"%YAML 1.1\n---\n? a\n: !!float 1:2\nc: |\n  x\nd: 2001-01-01\n..."},
        "json": {"config": as_json},
        "safetensors": {"numpy": safetensors.numpy.save({"a": zeros((2, 3), dtype="float32"),
            "b": zeros(4, dtype="int8")})},
        "gguf_header": {"gguf": gguf_file.read_bytes()},
    }  # fmt: skip
    gguf_file.unlink()
    for target, files in seeds.items():
        (directory / target).mkdir(exist_ok=True)
        for name, content in files.items():
            (directory / target / name).write_bytes(content)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
