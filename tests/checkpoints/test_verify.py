"""Every kind of damage to a NeMo 2.0 checkpoint is found, and named to the tensor and layer."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_samples as samples
import pytest
import torch
import yaml

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.verify import manifest
from workshop_utils.checkpoints.verify.verify import require_sound, verify
from workshop_utils.cli import main
from workshop_utils.core.errors import DamagedCheckpoint, NotACheckpoint, UnsafeCheckpoint

FC1 = "module.decoder.layers.mlp.linear_fc1.weight"
FC2 = "module.decoder.layers.mlp.linear_fc2.weight"
NORM = "module.decoder.final_layernorm.weight"


@pytest.fixture(params=["plain", "gpu"])
def checkpoint(originals, tmp_path, monkeypatch, request):
    """A copy of a genuine checkpoint, to be damaged."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / request.param, tmp_path / request.param))


@pytest.fixture
def gpu(originals, tmp_path, monkeypatch):
    """The one as a GPU writes it: bfloat16, not tied, objects and optimizer state beside the
    weights."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / "gpu", tmp_path / "gpu"))


def chunk_of(checkpoint: Path, name: str, layer: int | None = None):
    chunks = nemo2.read(checkpoint).tensors[name].chunks
    return next(chunk for chunk in chunks if layer is None or chunk.offsets[0] == layer)


def rewrite_index(checkpoint: Path, change) -> None:
    """Apply ``change`` to torch's own object of the index."""
    index = checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def rewrite_values(checkpoint: Path, name: str, layer: int | None, change) -> None:
    """Apply ``change`` to the tensor of one chunk, and save it as torch.distributed.checkpoint did,
    in the same place."""
    chunk = chunk_of(checkpoint, name, layer)
    with (checkpoint / "weights" / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        saved = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
        new = io.BytesIO()
        torch.save(change(saved).clone(), new)
        assert new.getbuffer().nbytes == chunk.length
        file.seek(chunk.start)
        file.write(new.getbuffer())


def rewrite_config(checkpoint: Path, **fields) -> None:
    path = checkpoint / "context" / "model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"] |= fields
    path.write_text(yaml.safe_dump(model))


def found(report, tensor: str | None, *words: str) -> bool:
    """Whether one finding names ``tensor`` and has all ``words``."""
    named = [finding for finding in report.findings if tensor is None or finding.tensor == tensor]
    return any(all(word in str(finding) for word in words) for finding in named)


def test_a_genuine_checkpoint_is_sound(checkpoint):
    report = verify(checkpoint, deep=True)
    assert report.findings == []
    assert report.notes == []
    assert report.checkpoint.path == checkpoint
    assert any("every number is finite" in check for check in report.checked)
    assert [gap for gap in report.untold if "come from one save" not in gap] == []


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp"])
def test_a_missing_shard(checkpoint, name):
    held = {
        (tensor.name, chunk.offsets[0] if "layers" in tensor.name else None)
        for tensor in nemo2.read(checkpoint).tensors.values()
        for chunk in tensor.chunks
        if chunk.file == name
    }
    (checkpoint / "weights" / name).unlink()
    report = verify(checkpoint)
    assert held
    assert sum("is missing" in str(finding) for finding in report.findings) == 1, (
        "a file is named once"
    )
    assert found(report, None, name, "is missing")
    for tensor, layer in held:
        assert found(report, tensor, "not whole is")
        assert layer is None or found(report, tensor, "layer", str(layer), "not whole is")


@pytest.mark.parametrize("fraction", [0.999, 0.7, 0.3, 0.0])
def test_a_truncated_shard(checkpoint, fraction):
    shard = checkpoint / "weights" / "__0_0.distcp"
    end = int(shard.stat().st_size * fraction)
    cut = {
        tensor.name
        for tensor in nemo2.read(checkpoint).tensors.values()
        for chunk in tensor.chunks
        if chunk.file == shard.name and chunk.start + chunk.length > end
    }
    os.truncate(shard, end)
    report = verify(checkpoint)
    assert {finding.tensor for finding in report.findings} >= cut
    assert all(found(report, tensor, "not whole is") for tensor in cut)
    assert sum("cut off" in str(finding) for finding in report.findings) == 1, (
        "a file is named once"
    )
    assert found(report, None, "__0_0.distcp", "cut off")
    assert not any("longer than" in note for note in report.notes)


def test_swapped_shards(checkpoint):
    first, second = (checkpoint / "weights" / f"__0_{at}.distcp" for at in (0, 1))
    sizes = first.stat().st_size, second.stat().st_size
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    if sizes[0] != sizes[1]:
        assert found(verify(checkpoint), None, "cut off")
    report = verify(checkpoint, deep=True)
    assert len({finding.tensor for finding in report.findings}) > 3


def test_overlapping_byte_ranges(gpu):
    other = chunk_of(gpu, FC2, 1)

    def change(index):
        key = next(
            key for key in index.storage_data if key.fqn == FC2 and tuple(key.offset) == (0, 0, 0)
        )
        place = index.storage_data[key]
        place.relative_path, place.offset, place.length = (
            other.file,
            other.start + 64,
            other.length - 64,
        )

    rewrite_index(gpu, change)
    report = verify(gpu)
    assert found(report, FC2, "overlap", f"{FC2}, layer 0", f"{FC2}, layer 1", other.file)


def drop_chunk(index):
    entry = index.state_dict_metadata[FC1]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets[0] != 1]


def double_chunk(index):
    entry = index.state_dict_metadata[FC1]
    layer = next(chunk for chunk in entry.chunks if chunk.offsets[0] == 1)
    entry.chunks = [layer, *(chunk for chunk in entry.chunks if chunk.offsets[0] == 1)]


def shrink_chunk(index):
    entry = index.state_dict_metadata[FC1]
    chunk = next(chunk for chunk in entry.chunks if chunk.offsets[0] == 1)
    chunk.sizes = torch.Size((1, chunk.sizes[1] - 1, chunk.sizes[2]))


def grow_chunk(index):
    chunk = next(chunk for chunk in index.state_dict_metadata[FC1].chunks if chunk.offsets[0] == 1)
    chunk.sizes = torch.Size((2, *chunk.sizes[1:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_chunk, ("not whole is", "layer 1: no chunk covers [1, ")),
        (double_chunk, ("(1, 0, 0) has no place", "of its own")),
        (shrink_chunk, ("not whole is", "layer 1: no chunk covers [1, ")),
        (grow_chunk, ("outside the shape",)),
    ],
)
def test_chunks_that_do_not_cover_the_tensor(gpu, change, words):
    rewrite_index(gpu, change)
    report = verify(gpu)
    assert found(report, FC1, *words)
    assert {finding.tensor for finding in report.findings} == {FC1}


def set_dtype(name, dtype):
    def change(index):
        entry = index.state_dict_metadata[name]
        entry.properties.dtype = dtype

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_dtype_that_the_bytes_contradict(gpu, dtype):
    rewrite_index(gpu, set_dtype(FC1, dtype))
    report = verify(gpu)
    assert found(report, FC1, "layer 0", f"of {str(dtype).removeprefix('torch.')} needs")
    assert {finding.tensor for finding in report.findings} == {FC1}


def test_a_dtype_of_the_same_size(gpu):
    rewrite_index(gpu, set_dtype(FC2, torch.float16))
    assert found(verify(gpu), FC2, "float16", "most weights are bfloat16")
    assert found(verify(gpu, deep=True), FC2, "holds", "of bfloat16", "index says", "layer 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(checkpoint, value):
    def change(tensor):
        tensor[0, 3, 5] = value
        tensor[0, 7, 1] = value
        return tensor

    rewrite_values(checkpoint, FC2, 1, change)
    assert verify(checkpoint).findings == []
    report = verify(checkpoint, deep=True)
    assert len(report.findings) == 1
    assert found(report, FC2, "layer 1", "has 2 values", f"{value} at [1, 3, 5]")


def test_a_flipped_bit_in_the_weights(checkpoint):
    chunk = chunk_of(checkpoint, FC2, 0)
    with (checkpoint / "weights" / chunk.file).open("r+b") as file:
        file.seek(chunk.start + chunk.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert verify(checkpoint).findings == []
    assert found(verify(checkpoint, deep=True), FC2, "damaged")


def test_a_shard_of_the_same_size_from_another_save(checkpoint, tmp_path):
    """Nothing in the checkpoint tells: it is said so. With a manifest it is found, and named."""
    written = manifest.write(checkpoint)
    assert written == checkpoint.with_name(f"{checkpoint.name}.manifest.json")
    assert verify(checkpoint, manifest=written).findings == []
    for layer in range(samples.LAYERS):
        rewrite_values(checkpoint, FC1, layer, lambda tensor: -tensor)
    file = chunk_of(checkpoint, FC1, 0).file
    report = verify(checkpoint, deep=True)
    assert report.findings == []
    assert any("whether all shards come from one save" in gap for gap in report.untold)
    report = verify(checkpoint, manifest=written)
    assert found(report, None, f"weights/{file} is not the file of", "it holds")
    assert not any("come from one save" in gap for gap in report.untold)


@pytest.mark.parametrize(
    ("fields", "tensor", "words"),
    [
        ({"num_layers": 3}, FC1, ("[2, ", "has to be [3, ")),
        ({"num_layers": 10**12}, None, ("states 1,000,000,000,000 layers",)),
        ({"hidden_size": 64}, NORM, ("[32]", "has to be [64]", "model.yaml")),
        ({"ffn_hidden_size": 96}, FC2, ("has to be [2, 32, 96]",)),
        (
            {"num_query_groups": 4},
            "module.decoder.layers.self_attention.linear_qkv.weight",
            ("has to be [2, 144, 32]",),
        ),
        (
            {"kv_channels": 8},
            "module.decoder.layers.self_attention.linear_proj.weight",
            ("has to be [2, 32, 32]",),
        ),
        (
            {"vocab_size": 1000},
            "module.embedding.word_embeddings.weight",
            ("384 rows", "a vocabulary of 1,000"),
        ),
        ({"num_attention_heads": "four"}, None, ("num_attention_heads",)),
    ],
)
def test_a_configuration_that_disagrees(checkpoint, fields, tensor, words):
    rewrite_config(checkpoint, **fields)
    assert found(verify(checkpoint), tensor, *words)


def test_a_tensor_that_is_missing_altogether(gpu):
    rewrite_index(gpu, lambda index: index.state_dict_metadata.pop(FC2))
    report = verify(gpu)
    assert found(report, "decoder.layers.mlp.linear_fc2.weight", "is missing", "model.yaml")


def test_a_model_that_is_not_tied_needs_its_output_layer(gpu):
    rewrite_config(gpu, share_embeddings_and_output_weights=True)
    assert verify(gpu).findings == []
    rewrite_index(gpu, lambda index: index.state_dict_metadata.pop("module.output_layer.weight"))
    assert verify(gpu).findings == []
    rewrite_config(gpu, share_embeddings_and_output_weights=False)
    assert found(verify(gpu), "output_layer.weight", "is missing")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "weights/metadata.json",
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 7}',
            ("torch_dist' 7", "known are torch_dist 1"),
        ),
        (
            "weights/metadata.json",
            '{"sharded_backend": "torch_dist", "sharded_backend_version": [1]}',
            ("torch_dist' [1]",),
        ),
        ("weights/common.pt", None, ("common.pt is missing",)),
        ("weights/common.pt", "junk", ("common.pt",)),
        ("weights/.metadata", None, (".metadata is missing",)),
        ("context/io.json", None, ("io.json is missing",)),
        ("context/io.json", "{", ("io.json", "JSON")),
        ("context/nemo_tokenizer/tokenizer.json", None, ("nemo_tokenizer", "no tokenizer")),
        ("context/model.yaml", None, ("model.yaml",)),
    ],
)
def test_the_files_beside_the_weights(checkpoint, name, content, words):
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(content)
    assert found(verify(checkpoint), None, *words)


def test_what_is_odd_and_harmless_is_a_note(gpu):
    (gpu / "weights" / "__9_0.distcp").write_bytes(b"left over")
    (gpu / "weights" / "x.partial").touch()
    with (gpu / "weights" / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    rewrite_config(gpu, params_dtype={"_target_": "torch.float32", "_call_": False})
    report = verify(gpu)
    assert report.findings == []
    for words in (
        "__9_0.distcp is named by no entry",
        "x.partial is left over",
        "__0_0.distcp is 4 bytes longer",
        "states float32",
    ):
        assert any(words in note for note in report.notes), words


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_that_would_run_code(gpu):
    (gpu / "weights" / "common.pt").write_bytes(b"")
    torch.save({"a": Evil()}, gpu / "weights" / "common.pt")
    (gpu / "weights" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    report = verify(gpu)
    assert isinstance(report.worst, UnsafeCheckpoint)
    assert "exec" in str(report.worst)
    assert len(report.findings) > 1
    assert report.verdict.startswith("UNSAFE: gpu, ")


@pytest.mark.parametrize("name", ["model.yaml", "io.json"])
def test_a_configuration_that_names_something_foreign(gpu, name):
    path = gpu / "context" / name
    tree = yaml.safe_load(path.read_text())
    tree["extra"] = {"_target_": "torch.hub.load", "repo_or_dir": "somebody/else"}
    path.write_text(json.dumps(tree))
    report = verify(gpu)
    assert isinstance(report.worst, UnsafeCheckpoint)
    assert [str(finding).partition(", which")[0] for finding in report.findings] == [
        f"gpu/context/{name}: extra._target_ names 'torch.hub.load'"
    ]


def test_what_a_fine_tuning_run_names_is_not_foreign(gpu):
    """The names in io.json and model.yaml of a run of llm.finetune with LoRA on SQuAD, beside those
    of the samples (NeMo 2.4.1)."""
    path = gpu / "context" / "io.json"
    names = [
        "nemo.lightning.pytorch.callbacks.preemption.PreemptionCallback",
        "nemo.lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        "nemo.collections.llm.gpt.data.squad.SquadDataModule",
        "nemo.collections.llm.peft.lora.LoRA",
    ]
    entries = [
        {"type": "pyref", "module": name.rpartition(".")[0], "name": name.rpartition(".")[2]}
        for name in names
    ]
    path.write_text(
        json.dumps(
            {"objects": entries, "canonical_mapping": {"_target_": "collections.defaultdict"}}
        )
    )
    assert verify(gpu).findings == []
    entries.append(
        {
            "type": "pyref",
            "module": "nemo.collections.llm.gpt.data.hf_dataset",
            "name": "HFDatasetDataModule",
        }
    )
    path.write_text(json.dumps({"objects": entries}))
    assert isinstance(verify(gpu).worst, UnsafeCheckpoint)


def test_require_sound(gpu, capsys):
    require_sound(gpu)
    (gpu / "weights" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (gpu / "weights" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="workshop verify gpu") as raised:
        require_sound(gpu)
    assert "__0_0.distcp is missing" in str(raised.value)
    assert "backend" in str(raised.value)
    torch.save({"a": Evil()}, gpu / "weights" / "common.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"(?s)\A[^\n]*exec.*__0_0\.distcp is missing"):
        require_sound(gpu)
    capsys.readouterr()
    require_sound(gpu, trust=True)
    assert "warning: UNSAFE: gpu" in capsys.readouterr().err
    with pytest.raises(NotACheckpoint, match="does not exist"):
        require_sound(gpu / "nothing")
    require_sound(gpu / "nothing", trust=True)
    assert "does not exist" in capsys.readouterr().err


def test_no_weights_are_read_and_torch_is_not_imported(originals):
    """Every file that is opened is reported by an audit hook."""
    code = """
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
from workshop_utils.checkpoints.verify.verify import verify
assert verify(sys.argv[1]).findings == []
print(sorted({path.rpartition("/")[2] for path in opened if sys.argv[1] in path}))
print(sorted({"torch", "numpy", "nemo", "megatron", "transformers", "tqdm"} & set(sys.modules)))
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code, originals / "plain"],
        capture_output=True,
        text=True,
        check=True,
    )
    names, modules = map(json.loads, done.stdout.replace("'", '"').splitlines())
    assert {".metadata", "common.pt", "model.yaml"} <= set(names)
    assert not [name for name in names if name.endswith(".distcp")]
    assert modules == []


def test_beside_objects_no_tensor_is_read(gpu):
    """Objects in the shards are pickles and are looked into; the bytes of tensors could be
    anything."""
    index = nemo2.read(gpu)
    assert index.objects
    for tensor in index.tensors.values():
        for chunk in tensor.chunks:
            with (gpu / "weights" / chunk.file).open("r+b") as file:
                file.seek(chunk.start)
                file.write(bytes(chunk.length))
    assert verify(gpu).findings == []
    assert {finding.tensor for finding in verify(gpu, deep=True).findings} == set(index.tensors)


def test_the_command(gpu, capsys):
    assert main(["verify", str(gpu)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("sound: gpu, ")
    assert main(["verify", str(gpu), "--write-manifest"]) == 0
    assert "manifest: gpu.manifest.json" in capsys.readouterr().out
    assert (
        main(["verify", str(gpu), "--manifest", str(gpu.with_name("gpu.manifest.json")), "--deep"])
        == 0
    )
    capsys.readouterr()
    (gpu / "weights" / "__0_0.distcp").unlink()
    assert main(["verify", str(gpu), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["sound"] is False
    assert FC1 in {finding["tensor"] for finding in answer["findings"]} or FC2 in {
        finding["tensor"] for finding in answer["findings"]
    }
    assert main(["verify", str(gpu)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("unsound: gpu, ")
    gpu.with_name("gpu.manifest.json").unlink()
    assert main(["verify", str(gpu), "--write-manifest"]) == 1
    assert not gpu.with_name("gpu.manifest.json").exists()
    assert main(["verify", str(gpu / "weights" / "__0_1.distcp")]) == 2
    assert "top directory: gpu" in capsys.readouterr().err
