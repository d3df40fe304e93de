"""Write the index (``.metadata``) of a large checkpoint with torch's own classes:
``synthetic_index.py DIRECTORY [CHUNKS]``.

80 layers, 8-way tensor and 16-way pipeline parallel, bfloat16 weights and three float32 optimizer
states a weight, each of them split further over the data-parallel ranks, until there are CHUNKS
chunks (100,000). Beside the index there are sparse files, as long as their byte ranges need, so
that a reader that checks them finds nothing missing.
"""

import pickle
import sys
from pathlib import Path

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

LAYERS, TENSOR_PARALLEL, PIPELINE_PARALLEL, FILES_PER_RANK = 80, 8, 16, 2
HIDDEN, FFN, QKV, VOCABULARY = 8192, 28672, 10240, 128256
#: name -> (rows, columns, pieces of the rows, pieces of the columns)
LAYER = {
    "self_attention.linear_qkv.weight": (QKV, HIDDEN, TENSOR_PARALLEL, 1),
    "self_attention.linear_qkv.layer_norm_weight": (HIDDEN, None, 1, 1),
    "self_attention.linear_proj.weight": (HIDDEN, HIDDEN, 1, TENSOR_PARALLEL),
    "mlp.linear_fc1.weight": (2 * FFN, HIDDEN, 2 * TENSOR_PARALLEL, 1),
    "mlp.linear_fc1.layer_norm_weight": (HIDDEN, None, 1, 1),
    "mlp.linear_fc2.weight": (HIDDEN, FFN, 1, TENSOR_PARALLEL),
}
STATES = ("fp32_param", "exp_avg", "exp_avg_sq")


def write(directory: Path, chunks: int = 100_000) -> Path:
    """Write ``.metadata`` with ``chunks`` tensor chunks, ``metadata.json`` and sparse files;
    returns ``directory``."""
    entries, places, ends = {}, {}, {}
    left = chunks

    def place(name: str, offset: torch.Size | None, layer: int, rank: int, length: int) -> None:
        """Put a chunk of ``length`` bytes at the end of a file of its rank."""
        file = f"__{layer * PIPELINE_PARALLEL // LAYERS * TENSOR_PARALLEL + rank % TENSOR_PARALLEL}_{rank % FILES_PER_RANK}.distcp"  # noqa: E501
        start = ends.get(file, 0)
        ends[file] = start + length
        # Each rank sends its own copy of the names, and its own offsets.
        places[
            MetadataIndex(
                "".join(name.partition(".")), torch.Size(tuple(offset)) if offset else None, None
            )
        ] = _StorageInfo(file, start, length)

    def add(name: str, dtype: torch.dtype, sizes: tuple, layers: int, splits: int) -> None:
        """Add a tensor, cut into chunks as long as any are left. ``sizes``: rows, columns, pieces
        of the rows, pieces of the columns."""
        nonlocal left
        rows, columns, row_pieces, column_pieces = sizes
        # More pieces of the rows for what the data-parallel ranks share.
        row_pieces *= splits
        tail = (rows,) if columns is None else (rows, columns)
        found = []
        for layer in range(layers):
            for piece in range(row_pieces * column_pieces):
                if left == 0:
                    break
                left -= 1
                row, column = divmod(piece, column_pieces)
                step = (
                    (rows // row_pieces,)
                    if columns is None
                    else (rows // row_pieces, columns // column_pieces)
                )
                begin = (row * step[0],) if columns is None else (row * step[0], column * step[1])
                lead, one = ((layer,), (1,)) if layers > 1 else ((), ())
                offset = torch.Size(lead + begin)
                found.append(ChunkStorageMetadata(offset, torch.Size(one + step)))
                place(name, offset, layer, piece, torch.Size(step).numel() * dtype.itemsize + 1200)
        size = torch.Size(((layers,) if layers > 1 else ()) + tail)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, found)

    ends_only = {
        "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN, TENSOR_PARALLEL, 1),
        "output_layer.weight": (VOCABULARY, HIDDEN, TENSOR_PARALLEL, 1),
        "decoder.final_layernorm.weight": (HIDDEN, None, 1, 1),
    }
    for name, sizes in ends_only.items():
        add(f"module.{name}", torch.bfloat16, sizes, 1, 1)
    for name, sizes in LAYER.items():
        add(f"module.decoder.layers.{name}", torch.bfloat16, sizes, LAYERS, 1)
        for layer in range(LAYERS) if name.endswith("qkv.weight") else ():
            key = f"module.decoder.layers.self_attention.linear_qkv._extra_state/shard_{layer}_{LAYERS}"  # noqa: E501
            entries[key] = BytesStorageMetadata()
            place(key, None, layer, 0, 1261)
    for state in STATES:
        for name, sizes in LAYER.items():
            add(
                f"optimizer.state.{state}.module.decoder.layers.{name}",
                torch.float32,
                sizes,
                LAYERS,
                16,
            )
    assert left == 0, left
    metadata = Metadata(entries, {name: tuple(name.split(".")) for name in entries}, places)
    directory.mkdir(parents=True, exist_ok=True)
    for file, length in ends.items():
        with (directory / file).open("wb") as made:
            made.truncate(length)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": '
        '"torch", "common_backend_version": 1}'
    )
    torch.save({}, directory / "common.pt")
    return directory


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
