"""GGUF files written by the gguf package, and damaged ones."""

import shutil
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import tiny_gguf

from workshop_utils.checkpoints.formats import gguf as reader
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.core.errors import (
    CheckpointError,
    DamagedCheckpoint,
    NotACheckpoint,
    UnsupportedCheckpoint,
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write_gguf(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def test_a_llama(llama):
    path, tensors = llama
    found = identify(path)
    assert (found.format, found.version) == ("GGUF file (llama, float32)", "GGUF 3")
    sizes = found.architecture
    assert (
        sizes.family,
        sizes.layers,
        sizes.hidden,
        sizes.heads,
        sizes.groups,
        sizes.head_dim,
        sizes.ffn,
        sizes.rope_base,
    ) == (
        "Llama",
        tiny_gguf.LAYERS,
        tiny_gguf.HIDDEN,
        tiny_gguf.HEADS,
        tiny_gguf.GROUPS,
        16,
        tiny_gguf.FFN,
        1e5,
    )
    assert sizes.tied
    assert sizes.vocabulary == tensors["token_embd.weight"].shape[0]
    assert found.tokenizer == f"gpt2 (smollm), in the file, {sizes.vocabulary} tokens"
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: value.shape for name, value in tensors.items()
    }
    for tensor in found.tensors:
        assert np.array_equal(read_tensor(found, tensor), tensors[tensor.name])


def test_the_places_are_those_that_the_gguf_package_reads(llama):
    path, _ = llama
    theirs = {
        tensor.name: (tensor.data_offset, tensor.n_bytes)
        for tensor in gguf.GGUFReader(path).tensors
    }
    assert {
        tensor.name: (tensor.chunks[0].start, tensor.chunks[0].length)
        for tensor in identify(path).tensors
    } == theirs


def write(path, architecture="llama", tensors=(), alignment=None, **numbers):
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_types_have_their_names_and_bytes(root, name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    data = gguf.quants.quantize(np.ones((4, 64), np.float32), kind)
    path = write(root / "a.gguf", tensors=[("blk.0.ffn_up.weight", data, kind)])
    (tensor,) = identify(path).tensors
    assert (tensor.shape, tensor.dtype) == (
        (4, 64),
        {"BF16": "bfloat16", "F16": "float16"}.get(name, name),
    )
    assert tensor.chunks[0].length == data.nbytes


def test_every_type_of_the_gguf_package_is_known():
    theirs = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (elements, width) for number, (_, elements, width) in reader._TYPES.items()}
    assert {number: ours.get(number) for number in theirs} == theirs


def test_experts_qk_norm_and_alignment(root):
    ones = np.ones(8, np.float32)
    tensors = [
        ("blk.0.attn_q_norm.weight", ones, None),
        ("output.weight", np.ones((4, 64), np.float32), None),
    ]
    sizes = {
        "block_count": 1,
        "embedding_length": 64,
        "feed_forward_length": 32,
        "head_count": 4,
        "head_count_kv": 2,
        "expert_count": 8,
        "key_length": 24,
        "vocab_size": 4,
        "rope_freq_base": 1e6,
    }
    found = identify(write(root / "a.gguf", "qwen3moe", tensors, alignment=256, **sizes))
    shape = found.architecture
    assert (shape.family, shape.experts, shape.qk_norm, shape.head_dim, shape.tied) == (
        "Qwen3",
        8,
        True,
        24,
        False,
    )
    assert all(tensor.chunks[0].start % 256 == 0 for tensor in found.tensors)
    assert (
        identify(write(root / "b.gguf", "llama", tensors[1:], **sizes)).architecture.family
        == "Mixtral"
    )


def test_an_adapter_of_llama_cpp(root):
    path = root / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpoint, match="PEFT adapter that it was made of"):
        identify(path)


def test_a_file_cut_off_anywhere(llama, root):
    whole = llama[0].read_bytes()
    header = min(tensor.chunks[0].start for tensor in identify(llama[0]).tensors)
    for length in [*range(4, header, 97), header, len(whole) - 1]:
        (root / "a.gguf").write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.gguf .*cut off"):
            identify(root / "a.gguf")


def test_every_fault_is_reported_and_the_rest_described(llama, root):
    whole = llama[0].read_bytes()
    (root / "a.gguf").write_bytes(whole[:-100])
    faults = []
    found = identify(root / "a.gguf", faults.append)
    assert len(faults) >= 1
    assert {fault.tensor for fault in faults} | {tensor.name for tensor in found.tensors} == set(
        llama[1]
    )


def test_flipped_bytes_never_escape_as_another_error(llama, root):
    whole = llama[0].read_bytes()
    for position in range(4, 6000, 37):
        (root / "a.gguf").write_bytes(
            whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        )
        try:
            identify(root / "a.gguf")
        except CheckpointError as error:
            assert "a.gguf" in str(error)


def header(version=3, tensors=0, pairs=0, order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, pairs)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (header(1), UnsupportedCheckpoint, "version 1"),
        (header(3, order=">"), UnsupportedCheckpoint, "gguf-convert-endian"),
        (header(9), UnsupportedCheckpoint, "version 9"),
        (header(tensors=2**63), DamagedCheckpoint, "no model has so many"),
        (header(pairs=2**40), DamagedCheckpoint, "no model has so many"),
        (header(pairs=1) + struct.pack("<Q", 2**62), DamagedCheckpoint, "header is longer"),
        (header(pairs=1) + struct.pack("<Q", 2**20), DamagedCheckpoint, "cut off"),
        (
            header(pairs=1) + struct.pack("<QcIIQ", 1, b"a", 9, 8, 2**60),
            DamagedCheckpoint,
            "cut off",
        ),
        (
            header(pairs=1) + struct.pack("<QcIIQ", 1, b"a", 9, 4, 2**60),
            DamagedCheckpoint,
            "header is longer",
        ),
        (
            header(pairs=1) + struct.pack("<QcIIQ", 1, b"a", 9, 9, 1),
            DamagedCheckpoint,
            "array of the type 9",
        ),
        (header(pairs=1) + struct.pack("<QcI", 1, b"a", 77), DamagedCheckpoint, "the type 77"),
        (header(pairs=2) + 2 * struct.pack("<QcII", 1, b"a", 4, 1), DamagedCheckpoint, "twice"),
        (
            header(tensors=1) + struct.pack("<QcIQQIQ", 1, b"a", 2, 2**40, 2**40, 0, 0),
            DamagedCheckpoint,
            "does not fill whole blocks",
        ),
        (
            header(tensors=1) + struct.pack("<QcIQIQ", 1, b"a", 1, 33, 2, 0),
            DamagedCheckpoint,
            "whole blocks of Q4_0",
        ),
        (
            header(tensors=1) + struct.pack("<QcIQIQ", 1, b"a", 1, 4, 0, 2**63),
            DamagedCheckpoint,
            "cut off",
        ),
        (
            header(tensors=1) + struct.pack("<QcIQIQ", 1, b"a", 1, 4, 99, 0),
            DamagedCheckpoint,
            "type 99",
        ),
        (header(tensors=1) + struct.pack("<QcI", 1, b"a", 2**31), DamagedCheckpoint, "dimensions"),
    ],
)
def test_hostile_headers(root, content, error, message):
    (root / "a.gguf").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(error, match=message):
        identify(root / "a.gguf")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_another_name_is_no_hindrance(llama, root):
    shutil.copy(llama[0], root / "model.bin")
    assert identify(root / "model.bin").format.startswith("GGUF")
    with pytest.raises(NotACheckpoint):
        reader.read_header(shutil.copy(__file__, root / "a.gguf"))
