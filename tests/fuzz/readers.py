"""Each reader as a function of bytes, for the fuzzers: whatever the bytes, only a WorkshopError may
come out.

Checksums that a random change would break, and with them the rest of the file, are put right first.
"""

import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from workshop_utils.checkpoints.formats import (
    gguf,
    huggingface,
    nemo_archive,
    restricted_pickle,
    safe_text,
    saved_tensors,
    torch_archive,
    torch_dist,
)
from workshop_utils.core.errors import CheckpointError, WorkshopError

FILES = {"__0_0.distcp": 1 << 20, "__0_1.distcp": 1 << 20}


def index(data: bytes) -> None:
    """``.metadata`` of a torch_dist checkpoint, every fault reported."""
    faults: list[CheckpointError] = []
    found = torch_dist.read_index(data, "weights", FILES, faults.append)
    for tensor in found.tensors.values():
        assert all(
            0 <= chunk.start <= chunk.start + chunk.length <= FILES[chunk.file]
            for chunk in tensor.chunks
        )


def scan(data: bytes) -> None:
    """The list of calls of any pickle."""
    for call in restricted_pickle.survey(data, "a pickle")[0]:
        assert call.isprintable() and len(call) < 2000


def zipped(data: bytes) -> bytes:
    """The pickle ``data`` as torch.save would store it, with two storages of 64 bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", bytes(64))
        archive.writestr("a/data/1", bytes(64))
    return content.getvalue()


def state(data: bytes) -> None:
    """``common.pt``: the pickle in a sound zip."""
    content = zipped(data)
    faults: list[CheckpointError] = []
    found = torch_archive.read_state(io.BytesIO(content), "common.pt", faults.append)
    _visit(found, len(content))


def _visit(value: object, length: int) -> None:
    """What a program does with a state: go through all of it."""
    if isinstance(value, torch_archive.SavedTensor) and value.contiguous:
        assert 0 <= value.start <= value.start + value.length <= length
    for item in (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    ):
        _visit(item, length)


def lightning(data: bytes) -> None:
    """The bytes of a ``.ckpt``, zip and all."""
    state = saved_tensors.read_state(io.BytesIO(data), "a.ckpt", lambda fault: None)
    saved_tensors.tensors(state.get("state_dict"), "a.ckpt")


def tar(data: bytes) -> None:
    """The bytes of a ``.nemo``; the checksums of headers are made right."""
    content = bytearray(data)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    _as_file(bytes(content), _nemo)


def _nemo(path: Path) -> None:
    for member in nemo_archive.members(path):
        with nemo_archive.open_member(path, member.name) as file:
            assert len(file.read(1 << 16)) == min(member.size, 1 << 16)
    nemo_archive.read_config(path)


def yaml(data: bytes) -> None:
    """``model.yaml``."""
    safe_text.foreign_targets(safe_text.parse_yaml(data, "model.yaml"))


def json(data: bytes) -> None:
    """``config.json``."""
    found = safe_text.parse_json(data, "config.json")
    safe_text.foreign_targets(found)
    str(found).encode()


def safetensors(data: bytes) -> None:
    """A safetensors file; the length of its header is made right unless it begins with 0xFF."""
    if data[:1] != b"\xff" and len(data) > 8:
        data = (
            struct.pack("<Q", min(len(data) - 8, data.rfind(b"}") - 7)) + data[8:]
            if b"}" in data[8:]
            else data
        )
    _as_file(data, lambda path: huggingface.read_safetensors(path, lambda fault: None))


def gguf_header(data: bytes) -> None:
    """A GGUF file."""
    _as_file(data, lambda path: gguf.read_header(path, lambda fault: None))


def _as_file(data: bytes, read: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        read(Path(name))
    finally:
        os.unlink(name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (index, scan, state, lightning, tar, yaml, json, safetensors, gguf_header)
}


def run(target: str, data: bytes) -> bool:
    """Feed ``data`` to the reader; True if it took them. Everything but a WorkshopError comes
    out."""
    try:
        TARGETS[target](data)
    except WorkshopError as error:
        message = str(error)
        assert len(message) < 5000 and message.encode() and "MemoryError" not in message, message[
            :500
        ]
        return False
    return True
