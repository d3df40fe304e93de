"""The zarr form of a distributed checkpoint, which Megatron-Core wrote before torch_dist:
recognised and listed, not converted.

    NAME/.zarray   JSON: shape, shape of a chunk, dtype
    NAME/0.1       the elements of the chunk at (0, 1)

Source: ``megatron/core/dist_checkpointing/strategies/zarr.py`` (0.13) and the zarr format, version
2.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.safe_text import parse_json, read_bytes
from workshop_utils.checkpoints.formats.tensor import Chunk, Tensor
from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint
from workshop_utils.core.paths import shown

WAY_OUT = (
    "zarr is deprecated: Megatron-Core 0.16 and later cannot read it. Load and save the "
    "checkpoint once with NeMo 2.0 on Megatron-Core 0.13 to turn it into torch_dist"
)

_DTYPES = {
    "<f8": "float64",
    "<f4": "float32",
    "<f2": "float16",
    "bfloat16": "bfloat16",
    "<i8": "int64",
    "<i4": "int32",
    "<i2": "int16",
    "|i1": "int8",
    "|u1": "uint8",
    "|b1": "bool",
}


def read(
    files: Mapping[str, int], content: Callable[[str], bytes], where: str, report: Report = stop
) -> dict[str, Tensor]:
    """Name -> tensor of a directory whose ``files`` (relative name -> bytes) ``content`` reads;
    ``where`` names it in errors.

    A tensor without a sound description, or without one of its chunks, goes to ``report`` as
    :class:`DamagedCheckpoint`.
    """
    by_tensor: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if re.fullmatch(r"\d+(\.\d+)*", name):
            by_tensor.setdefault(folder, []).append(file)
    found = {}
    for file in files:
        name, _, last = file.rpartition("/")
        if last == ".zarray":
            try:
                found[name] = _tensor(
                    name,
                    parse_json(content(file), f"{where}/{file}"),
                    by_tensor.get(name, []),
                    files,
                    where,
                )
            except CheckpointError as fault:
                report(fault)
    return found


def read_directory(
    weights: Path, report: Report = stop
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of :func:`read` of the directory ``weights``, and name -> bytes of its files."""
    files = {
        str(file.relative_to(weights)): file.stat().st_size
        for file in sorted(weights.glob("**/*"))
        if file.is_file()
    }
    return read(files, lambda name: read_bytes(weights / name), shown(weights), report), files


def _tensor(
    name: str, described: dict, chunks: list[str], files: Mapping[str, int], where: str
) -> Tensor:
    shape, grid, dtype = (
        described.get("shape"),
        described.get("chunks"),
        _DTYPES.get(str(described.get("dtype"))),
    )
    sizes = (shape, grid)
    if not all(
        isinstance(part, list) and all(type(size) is int and 0 <= size < 2**63 for size in part)
        for part in sizes
    ):
        raise DamagedCheckpoint(f"{where}/{name}/.zarray has no sound shape and chunks.", name)
    if dtype is None or len(shape) != len(grid) or 0 in grid:
        raise DamagedCheckpoint(
            f"{where}/{name}/.zarray has no sound shape, chunks and dtype "
            f"({described.get('dtype')!r}).",
            name,
        )
    wanted = math.prod(-(-size // step) for size, step in zip(shape, grid, strict=True))
    if len(chunks) != wanted:
        raise DamagedCheckpoint(
            f"{where}/{name} has {len(chunks):,} chunks of {wanted:,}. Copy the checkpoint "
            "again, all of it.",
            name,
        )
    found = []
    for file in chunks:
        place = [int(number) for number in file.rpartition("/")[2].split(".")]
        # A tensor without dimensions is stored as chunk 0.
        offsets = tuple(at * step for at, step in zip(place, grid, strict=False))
        if any(offset >= size for offset, size in zip(offsets, shape, strict=False)) or (
            shape and len(place) != len(shape)
        ):
            raise DamagedCheckpoint(
                f"{where}/{file} lies outside the tensor's shape {shape}.", name
            )
        found.append(
            Chunk(
                offsets,
                tuple(
                    min(step, size - at)
                    for at, step, size in zip(offsets, grid, shape, strict=False)
                ),
                file,
                0,
                files[file],
            )
        )
    return Tensor(name, tuple(shape), dtype, tuple(sorted(found, key=lambda chunk: chunk.offsets)))
