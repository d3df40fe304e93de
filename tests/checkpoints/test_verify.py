"""Every kind of damage to a NeMo 2.0 checkpoint is found, and named to the tensor and layer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_samples as samples
import pytest
import torch
from damage import Evil, chunk_of, has, rewrite, rewrite_index, rewrite_values

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.findings import Code, Finding, Severity
from workshop_utils.checkpoints.verify import manifest
from workshop_utils.checkpoints.verify.verify import require_sound, verify
from workshop_utils.cli import main
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)

BLOCK = "module.decoder.layers"
FC1, FC2 = (f"{BLOCK}.mlp.linear_fc{number}.weight" for number in (1, 2))
QKV, PROJ = (f"{BLOCK}.self_attention.linear_{name}.weight" for name in ("qkv", "proj"))
NORM, EMBEDDING = "module.decoder.final_layernorm.weight", "module.embedding.word_embeddings.weight"
OUTPUT = "module.output_layer.weight"


@pytest.fixture(params=["plain", "gpu"])
def checkpoint(originals, tmp_path, monkeypatch, request):
    """A copy of a genuine checkpoint, to be damaged."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / request.param, tmp_path / request.param))


@pytest.fixture
def gpu(originals, tmp_path, monkeypatch):
    """The one as a GPU writes it: bfloat16, not tied, with objects and optimizer state."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(originals / "gpu", tmp_path / "gpu"))


def configure(checkpoint: Path, **fields) -> None:
    rewrite(checkpoint / "context" / "model.yaml", lambda model: model["config"].update(fields))


def test_a_genuine_checkpoint_is_sound(checkpoint):
    report = verify(checkpoint, deep=True)
    assert [finding.code for finding in report.findings] == [Code.ORIGIN]
    assert report.checkpoint.path == checkpoint
    assert any("every number is finite" in check for check in report.checked)


def test_a_finding_is_made_of_an_error_and_raised_again():
    kinds = UnsafeCheckpoint, DamagedCheckpoint, UnsupportedCheckpoint, NotACheckpoint
    for error in [kind("a", "t") for kind in kinds] + [DamagedCheckpoint("a", "t", Code.SHAPE)]:
        finding = Finding.of(error)
        again = finding.error()
        assert (finding.severity, finding.where) == (Severity.REFUSED, "t")
        assert (type(again), again.args, again.tensor) == (type(error), error.args, "t")
        assert Finding.of(again) == finding


@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_1.distcp"])
@pytest.mark.parametrize("fraction", [None, 0.999, 0.7, 0.3, 0.0])
def test_a_missing_or_truncated_shard(checkpoint, name, fraction):
    shard = checkpoint / "weights" / name
    end = int(shard.stat().st_size * (fraction or 0))
    lost = {
        (tensor.name, chunk.offsets[0] if "layers" in tensor.name else None)
        for tensor in nemo2.read(checkpoint).tensors.values()
        for chunk in tensor.chunks
        if chunk.file == name and (fraction is None or chunk.start + chunk.length > end)
    }
    shard.unlink() if fraction is None else os.truncate(shard, end)
    report = verify(checkpoint)
    assert lost
    for tensor, layer in lost:
        assert has(
            report, Code.NOT_WHOLE, tensor, *([] if layer is None else ["layer", str(layer)])
        )
    code = Code.MISSING_FILE if fraction is None else Code.CUT_OFF
    assert [finding.code for finding in report.findings].count(code) == 1, "a file is named once"
    assert has(report, code, None, name)
    assert not has(report, Code.NOBODYS_BYTES)


def test_swapped_shards(checkpoint):
    first, second = (checkpoint / "weights" / f"__0_{at}.distcp" for at in (0, 1))
    sizes = first.stat().st_size, second.stat().st_size
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    if sizes[0] != sizes[1]:
        assert has(verify(checkpoint), Code.CUT_OFF)
    assert len({finding.tensor for finding in verify(checkpoint, deep=True).refused}) > 3


def in_index(change):
    """Apply ``change`` to FC1's entry in the index, and its chunk of layer 1."""

    def rewritten(index):
        entry = index.state_dict_metadata[FC1]
        change(entry, next(chunk for chunk in entry.chunks if chunk.offsets[0] == 1))

    return lambda checkpoint: rewrite_index(checkpoint, rewritten)


def resized(size):
    return in_index(lambda _, second: setattr(second, "sizes", torch.Size(size(second.sizes))))


def dtype(new):
    return in_index(lambda entry, _: setattr(entry.properties, "dtype", new))


def without(name):
    return lambda path: rewrite_index(path, lambda index: index.state_dict_metadata.pop(name))


def overlap(checkpoint):
    other = chunk_of(checkpoint, FC2, 1)

    def change(index):
        key = next(key for key in index.storage_data if key.fqn == FC2 and not any(key.offset))
        place = index.storage_data[key]
        place.relative_path, place.offset = other.file, other.start + 64
        place.length = other.length - 64

    rewrite_index(checkpoint, change)


NO_CHUNK = "layer 1: no chunk covers [1, "
INDEX = {
    "overlap": (overlap, Code.OVERLAP, FC2, f"{FC2}, layer 0", f"{FC2}, layer 1"),
    "gap": (in_index(lambda a, chunk: a.chunks.remove(chunk)), Code.NOT_WHOLE, FC1, NO_CHUNK),
    "twice": (
        in_index(lambda a, chunk: setattr(a, "chunks", [chunk, chunk])),
        *(Code.DAMAGED, FC1, "(1, 0, 0) has no place", "of its own"),
    ),
    "small": (resized(lambda s: (1, s[1] - 1, s[2])), Code.NOT_WHOLE, FC1, NO_CHUNK),
    "large": (resized(lambda s: (2, *s[1:])), Code.NOT_WHOLE, FC1, "outside the shape"),
    "float32": (dtype(torch.float32), Code.LENGTH, FC1, "layer 0", "of float32 needs"),
    "int8": (dtype(torch.int8), Code.LENGTH, FC1, "of int8 needs"),
    "tensor": (without(FC2), Code.MISSING_TENSOR, FC2.removeprefix("module."), "model.yaml"),
}


@pytest.mark.parametrize("damage", INDEX)
def test_an_index_that_is_wrong(gpu, damage):
    change, *finding = INDEX[damage]
    change(gpu)
    report = verify(gpu)
    assert has(report, *finding), report.findings
    assert {item.tensor for item in report.refused} == {finding[1]}


def test_a_dtype_of_the_same_size(gpu):
    dtype(torch.float16)(gpu)
    assert has(verify(gpu), Code.DTYPE, FC1, "float16", "most weights are bfloat16")
    assert has(verify(gpu, deep=True), Code.CONTENT, FC1, "of bfloat16", "index says", "layer 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(checkpoint, value):
    def change(tensor):
        tensor[0, 3, 5] = tensor[0, 7, 1] = value

    rewrite_values(checkpoint, FC2, 1, change)
    assert verify(checkpoint).sound
    report = verify(checkpoint, deep=True)
    assert len(report.refused) == 1
    words = "layer 1", "has 2 values", f"{value} at [1, 3, 5]"
    assert has(report, Code.NOT_FINITE, FC2, *words)


def test_a_flipped_bit_in_the_weights(checkpoint):
    chunk = chunk_of(checkpoint, FC2, 0)
    with (checkpoint / "weights" / chunk.file).open("r+b") as file:
        file.seek(chunk.start + chunk.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert verify(checkpoint).sound
    assert has(verify(checkpoint, deep=True), Code.DAMAGED, FC2)


def test_a_shard_of_the_same_size_from_another_save(checkpoint):
    """Nothing in the checkpoint tells: it is said so. With a manifest it is found, and named."""
    written = manifest.write(checkpoint)
    assert written == checkpoint.with_name(f"{checkpoint.name}.manifest.json")
    assert verify(checkpoint, manifest=written).findings == []
    for layer in range(samples.LAYERS):
        rewrite_values(checkpoint, FC1, layer, lambda tensor: tensor.neg_())
    file = f"weights/{chunk_of(checkpoint, FC1, 0).file}"
    assert [finding.code for finding in verify(checkpoint, deep=True).findings] == [Code.ORIGIN]
    report = verify(checkpoint, manifest=written)
    assert has(report, Code.MANIFEST, file, f"{file} is not the file of", "it holds")
    assert report.not_known == []


CONFIGURATIONS = [
    ("num_layers", 3, Code.SHAPE, FC1, "[2, ", "has to be [3, "),
    ("num_layers", 10**12, Code.LAYERS, "model.yaml", "states 1,000,000,000,000 layers"),
    ("hidden_size", 64, Code.SHAPE, NORM, "[32]", "has to be [64]", "model.yaml"),
    ("ffn_hidden_size", 96, Code.SHAPE, FC2, "has to be [2, 32, 96]"),
    ("num_query_groups", 4, Code.SHAPE, QKV, "has to be [2, 144, 32]"),
    ("kv_channels", 8, Code.SHAPE, PROJ, "has to be [2, 32, 32]"),
    ("vocab_size", 1000, Code.SHAPE, EMBEDDING, "384 rows", "a vocabulary of 1,000"),
    ("num_attention_heads", "four", Code.DAMAGED, None, "num_attention_heads"),
]


def test_a_configuration_that_disagrees(checkpoint):
    for field, value, *finding in CONFIGURATIONS:
        before = (checkpoint / "context" / "model.yaml").read_text()
        configure(checkpoint, **{field: value})
        assert has(verify(checkpoint), *finding), field
        (checkpoint / "context" / "model.yaml").write_text(before)


def test_a_model_that_is_not_tied_needs_its_output_layer(gpu):
    configure(gpu, share_embeddings_and_output_weights=True)
    assert verify(gpu).sound
    without(OUTPUT)(gpu)
    assert verify(gpu).sound
    configure(gpu, share_embeddings_and_output_weights=False)
    assert has(verify(gpu), Code.MISSING_TENSOR, "output_layer.weight")


BACKEND = '{"sharded_backend": "torch_dist", "sharded_backend_version": %s}'


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("weights/metadata.json", BACKEND % 7, Code.BACKEND, "dist' 7; known are torch_dist 1"),
        ("weights/metadata.json", BACKEND % "[1]", Code.BACKEND, "torch_dist' [1]"),
        ("weights/common.pt", None, Code.DAMAGED, "common.pt is missing"),
        ("weights/common.pt", "junk", Code.DAMAGED, "common.pt"),
        ("weights/.metadata", None, Code.DAMAGED, ".metadata is missing"),
        ("context/io.json", None, Code.MISSING_FILE, "io.json is missing"),
        ("context/io.json", "{", Code.DAMAGED, "io.json cannot be read as JSON"),
        ("context/nemo_tokenizer/tokenizer.json", None, Code.TOKENIZER, "no tokenizer"),
        ("context/model.yaml", None, Code.DAMAGED, "model.yaml"),
    ],
)
def test_the_files_beside_the_weights(checkpoint, name, content, code, words):
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(content)
    assert has(verify(checkpoint), code, None, words)


def test_what_is_odd_and_harmless_is_a_note(gpu):
    (gpu / "weights" / "__9_0.distcp").write_bytes(b"left over")
    (gpu / "weights" / "x.partial").touch()
    with (gpu / "weights" / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    configure(gpu, params_dtype={"_target_": "torch.float32", "_call_": False})
    report = verify(gpu)
    assert report.sound
    assert len(report.notes) == 4
    assert has(report, Code.UNREAD_FILE, "__9_0.distcp", "named by no entry")
    assert has(report, Code.LEFTOVER, "x.partial", "is left over")
    assert has(report, Code.NOBODYS_BYTES, "__0_0.distcp", "is 4 bytes longer")
    assert has(report, Code.DTYPE, None, "states float32")


def test_a_pickle_that_would_run_code(gpu):
    torch.save({"a": Evil()}, gpu / "weights" / "common.pt")
    (gpu / "weights" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    report = verify(gpu)
    assert (report.worst.code, len(report.refused)) == (Code.UNSAFE, 2)
    assert "exec" in report.worst.message
    assert report.verdict == "UNSAFE: gpu, 2 findings"


@pytest.mark.parametrize("name", ["model.yaml", "io.json"])
def test_a_configuration_that_names_something_foreign(gpu, name):
    target = {"_target_": "torch.hub.load", "repo_or_dir": "somebody/else"}
    rewrite(gpu / "context" / name, lambda tree: tree.update(extra=target))
    [finding] = verify(gpu).refused
    assert finding.code is Code.UNSAFE
    words = f"gpu/context/{name}: extra._target_ names 'torch.hub.load'"
    assert finding.message.startswith(words)


def test_what_a_fine_tuning_run_names_is_not_foreign(gpu):
    """The names in io.json and model.yaml of a run of llm.finetune with LoRA on SQuAD, beside those
    of the samples (NeMo 2.4.1)."""
    names = [
        "nemo.lightning.pytorch.callbacks.preemption.PreemptionCallback",
        "nemo.lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        "nemo.collections.llm.gpt.data.squad.SquadDataModule",
        "nemo.collections.llm.peft.lora.LoRA",
        "nemo.collections.llm.gpt.data.hf_dataset.HFDatasetDataModule",
    ]
    entries = [dict(zip(("module", "name"), name.rsplit(".", 1), strict=True)) for name in names]
    entries = [{"type": "pyref"} | entry for entry in entries]
    io = {"objects": entries[:-1], "canonical_mapping": {"_target_": "collections.defaultdict"}}
    (gpu / "context" / "io.json").write_text(json.dumps(io))
    assert verify(gpu).sound
    (gpu / "context" / "io.json").write_text(json.dumps({"objects": entries}))
    assert verify(gpu).worst.code is Code.UNSAFE


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
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from workshop_utils.checkpoints.verify.verify import verify
assert verify(sys.argv[1]).sound
print(json.dumps(sorted({path.rpartition("/")[2] for path in opened if sys.argv[1] in path})))
print({"torch", "numpy", "nemo", "megatron", "transformers", "tqdm"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, originals / "plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names, modules = done.stdout.splitlines()
    assert {".metadata", "common.pt", "model.yaml"} <= set(json.loads(names))
    assert ".distcp" not in names
    assert modules == "set()"


def test_beside_objects_no_tensor_is_read(gpu):
    """Objects in the shards are pickles and are looked into; the bytes of tensors could be
    anything."""
    index = nemo2.read(gpu)
    assert index.objects
    for chunk in (chunk for tensor in index.tensors.values() for chunk in tensor.chunks):
        with (gpu / "weights" / chunk.file).open("r+b") as file:
            file.seek(chunk.start)
            file.write(bytes(chunk.length))
    assert verify(gpu).sound
    assert {finding.tensor for finding in verify(gpu, deep=True).refused} == set(index.tensors)


def test_the_command(gpu, capsys):
    listed = gpu.with_name("gpu.manifest.json")

    def says(status: int, *options: str) -> str:
        assert main(["verify", str(gpu), *options]) == status
        return capsys.readouterr().out

    assert says(0).splitlines()[-1].startswith("sound: gpu, ")
    assert "manifest: gpu.manifest.json" in says(0, "--write-manifest")
    says(0, "--manifest", str(listed), "--deep")
    (gpu / "weights" / "__0_0.distcp").unlink()
    answer = json.loads(says(1, "--json"))
    assert answer["sound"] is False
    assert {FC1, FC2} & {finding["tensor"] for finding in answer["findings"]}
    finding = answer["findings"][0]
    said = [finding[name] for name in ("kind", "code", "severity")]
    assert said == ["DamagedCheckpoint", "missing file", "refused"]
    assert [remark["code"] for remark in answer["remarks"]] == ["origin"]
    assert answer["untold"] == [answer["remarks"][0]["message"]]
    assert says(1).splitlines()[-1].startswith("unsound: gpu, ")
    listed.unlink()
    says(1, "--write-manifest")
    assert not listed.exists()
    assert main(["verify", str(gpu / "weights" / "__0_1.distcp")]) == 2
    assert "top directory: gpu" in capsys.readouterr().err
