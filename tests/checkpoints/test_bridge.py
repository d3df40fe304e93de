"""The bridge: configuration, view of the weights, link, and what it refuses."""

import json
import os
import pickle
import shutil
from pathlib import Path

import checkpoint_samples as samples
import pytest
import yaml
from reading import contents

from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.cli import main
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    DamagedCheckpoint,
    NotACheckpoint,
    OutputExists,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
)

pytestmark = pytest.mark.usefixtures("root")


def copy(originals: Path, flavour: str) -> Path:
    return Path(shutil.copytree(originals / flavour, paths.nemo2_checkpoint(flavour)))


@pytest.fixture
def plain(originals, root):
    return copy(originals, "plain")


@pytest.fixture
def gpu(originals, root):
    return copy(originals, "gpu")


def change(checkpoint: Path, **fields) -> None:
    """Change fields of ``model.yaml``: ``config={...}``, ``tokenizer={...}`` or top-level ones; a
    value of ... takes it out."""
    file = checkpoint / "context" / "model.yaml"
    model = yaml.safe_load(file.read_text())
    for name, value in fields.items():
        where, values = (model[name], value) if isinstance(value, dict) else (model, {name: value})
        for key, new in values.items():
            where.pop(key, None)
            if new is not ...:
                where[key] = new
    file.write_text(yaml.safe_dump(model))


def config_of(view: Path) -> dict:
    return yaml.safe_load((view / "model_config.yaml").read_text())


@pytest.mark.parametrize("flavour", ["plain", "gpu"])
def test_megatron_core_loads_the_view_under_the_names_of_nemo_1(originals, root, flavour):
    import torch

    checkpoint = copy(originals, flavour)
    before = contents(checkpoint)
    view = bridge(checkpoint)
    assert view == paths.bridged_checkpoint(flavour)
    loaded = samples.load(view, flavour)
    expected = {f"model.{name}": (name, None) for name in samples.WHOLE_SHAPES}
    if flavour == "plain":
        del expected["model.output_layer.weight"]
    objects = {}
    for layer in range(samples.LAYERS):
        above = f"model.decoder.layers.{layer}."
        expected |= {above + name: (name, layer) for name in samples.LAYER_SHAPES}
        if flavour == "gpu":
            objects |= {above + name: f"{name} {layer}" for name in samples.EXTRA_STATE}
    assert loaded.keys() == expected.keys() | objects.keys()
    for name, place in expected.items():
        weight = samples.weight(*place, flavour)
        assert loaded[name].dtype == weight.dtype and torch.equal(loaded[name], weight), name
    for name, said in objects.items():
        assert pickle.loads(loaded[name].getvalue())["extra_fp8_variables"]["name"] == said
    assert contents(checkpoint) == before, "the NeMo 2.0 directory has to stay as it is"


def test_no_weight_is_copied_and_optimizer_state_is_left_out(gpu):
    weights = bridge(gpu) / "model_weights"
    shards = sorted(weights.glob("*.distcp"))
    assert shards
    for shard in shards:
        assert shard.is_symlink() and not os.path.isabs(os.readlink(shard))
        assert shard.resolve() == (gpu / "weights" / shard.name).resolve()
    assert any(name.startswith("optimizer.") for name in nemo2.read(gpu).tensors)
    index = (weights / ".metadata").read_bytes()
    assert b"optimizer" not in index and b"module." not in index


def test_the_configuration_is_translated(gpu):
    config = config_of(bridge(gpu))
    expected = samples.SIZES | {
        "encoder_seq_length": 512,
        "max_position_embeddings": 512,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": False,
        "position_embedding_type": "rope",
        "rotary_base": 500000.0,
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": False,
        "override_vocab_size": samples.VOCABULARY,
        "precision": "bf16-mixed",
        "scale_positional_embedding": True,
        "scale_factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "old_context_len": 256,
        "layernorm_epsilon": 1e-05,
        "init_method_std": 0.02,
        "mcore_gpt": True,
    }
    assert {name: config[name] for name in expected} == expected
    # Fields that Megatron-Core's TransformerConfig would take over the derived ones must not be
    # there.
    derived = {"activation_func", "params_dtype", "bf16", "init_method", "gated_linear_unit"}
    assert not {*derived, "_target_", "config"} & set(config)


def test_without_rope_scaling_and_in_single_precision(plain):
    # A number that YAML reads as text, too.
    file = plain / "context" / "model.yaml"
    file.write_text(file.read_text().replace("epsilon: 1.0e-05", "epsilon: 1e-05"))
    config = config_of(bridge(plain))
    assert config["scale_positional_embedding"] is False and "scale_factor" not in config
    assert (config["precision"], config["layernorm_epsilon"]) == (32, 1e-05)
    assert config["share_embeddings_and_output_weights"] is True
    tokenizer = config["tokenizer"]
    assert tokenizer["library"] == "huggingface" and "trust_remote_code" not in tokenizer
    assert tokenizer["type"] == str(plain / "context" / "nemo_tokenizer")


def test_fields_that_an_older_dump_leaves_out_come_from_the_class(gpu):
    left = ("seq_length", "layernorm_epsilon", "normalization", "gated_linear_unit", "vocab_size")
    left += ("activation_func", "params_dtype", "share_embeddings_and_output_weights")
    change(gpu, config=dict.fromkeys((*left, "scale_factor", "old_context_len"), ...))
    config = config_of(bridge(gpu))
    expected = {
        "encoder_seq_length": 4096,
        "scale_factor": 8.0,
        "old_context_len": 8192,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-05,
        # The weights say bfloat16, whatever the default of the class is.
        "precision": "bf16-mixed",
    }
    assert {name: config[name] for name in expected} == expected


NEMO = "nemo.collections.common.tokenizers"
HUB = {
    "_target_": "nemo.lightning.io.artifact.file.DirOrStringArtifact",
    "attr": "meta-llama/Llama-3.2-1B",
    "skip": True,
}


def test_other_tokenizers(plain):
    change(plain, tokenizer={"pretrained_model_name": HUB})
    assert config_of(bridge(plain))["tokenizer"]["type"] == "meta-llama/Llama-3.2-1B"
    file = plain / "context" / "tokenizer.model"
    file.write_bytes(b"model")
    kind = f"{NEMO}.sentencepiece_tokenizer.SentencePieceTokenizer"
    own = {"_target_": kind, "pretrained_model_name": ..., "model_path": "tokenizer.model"}
    change(plain, tokenizer=own)
    tokenizer = config_of(bridge(plain))["tokenizer"]
    assert (tokenizer["library"], tokenizer["model"]) == ("sentencepiece", str(file))


GPT = "nemo.collections.llm.gpt.model"
UNSUPPORTED = [
    ("", "_target_", f"{GPT}.mixtral.MixtralModel", "MixtralModel"),
    ("config", "_target_", f"{GPT}.qwen2.Qwen2Config", "is .*Qwen2Config"),
    ("config", "num_moe_experts", 8, "is 8"),
    ("config", "qk_layernorm", True, "is True"),
    ("config", "moe_expert_capacity_factor", 1.0, "is 1.0"),
    ("config", "softmax_type", "off-by-one", "is 'off-by-one'"),
    ("config", "quant_recipe", {"a": 1}, "is {'a': 1}"),
    ("config", "activation_func", {"_target_": "torch.tanh"}, "is 'tanh'"),
]
UNSAFE = [
    ("", "_target_", "os.system", "names 'os.system'"),
    ("config", "_target_", "evil.Config", "evil.Config"),
    ("tokenizer", "_target_", "evil.Tokenizer", "names 'evil.Tokenizer'"),
    ("tokenizer", "pretrained_model_name", "../../secret", "outside the checkpoint"),
]
DAMAGED = [
    ("config", "num_layers", ..., "is missing"),
    ("config", "hidden_size", "big", "is 'big'"),
    ("config", "num_attention_heads", 3.5, "is 3.5"),
    ("config", "num_query_groups", 3, "3"),
    ("tokenizer", "pretrained_model_name", "/gone/tokenizer", "no such file"),
    ("tokenizer", "pretrained_model_name", ..., "is missing"),
]
REFUSED = [
    (error, *row)
    for error, rows in (
        (UnsupportedCheckpoint, UNSUPPORTED),
        (UnsafeCheckpoint, UNSAFE),
        (DamagedCheckpoint, DAMAGED),
    )
    for row in rows
]


@pytest.mark.parametrize("error, part, field, value, words", REFUSED)
def test_what_cannot_be_translated_is_named(plain, error, part, field, value, words):
    change(plain, **({part: {field: value}} if part else {field: value}))
    with pytest.raises(error, match=f"{field}.*{words}"):
        bridge(plain)
    assert not paths.bridged_checkpoint("plain").exists()


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"config": ...}, DamagedCheckpoint, "field config is missing"),
        ({"tokenizer": ...}, UnsupportedCheckpoint, r"tokenizer\._target_ is None"),
        ({"config": {"num_layers": 3}}, DamagedCheckpoint, "has the shape.*asks for"),
        (
            {"config": {"share_embeddings_and_output_weights": False}},
            DamagedCheckpoint,
            "output_layer.weight is missing",
        ),
    ],
)
def test_parts_that_are_missing_or_of_another_model(plain, fields, error, words):
    change(plain, **fields)
    with pytest.raises(error, match=words):
        bridge(plain)


def test_a_tied_model_with_an_output_layer_is_refused(gpu):
    change(gpu, config={"share_embeddings_and_output_weights": True})
    with pytest.raises(UnsupportedCheckpoint, match="output_layer"):
        bridge(gpu)
    (gpu / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    with pytest.raises(UnsupportedCheckpoint, match="is an adapter"):
        bridge(gpu)


def test_a_view_is_reused_until_its_checkpoint_changes(plain):
    view = bridge(plain)
    before = (view / "model_weights" / ".metadata").stat().st_mtime_ns
    assert bridge(plain) == view
    assert (view / "model_weights" / ".metadata").stat().st_mtime_ns == before
    change(plain, config={"seq_length": 1024})
    bridge(plain)
    assert config_of(view)["encoder_seq_length"] == 1024
    (view / "model_weights" / "common.pt").unlink()
    bridge(plain)
    assert (view / "model_weights" / "common.pt").exists()


def test_a_moved_repository(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path / "here"))
    bridge(copy(originals, "plain"))
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path / "there"))
    view, checkpoint = paths.bridged_checkpoint("plain"), paths.nemo2_checkpoint("plain")
    shard = (view / "model_weights" / "__0_0.distcp").resolve()
    assert shard == checkpoint / "weights" / "__0_0.distcp"
    assert bridge(checkpoint) == view
    assert config_of(view)["tokenizer"]["type"] == str(checkpoint / "context" / "nemo_tokenizer")


def test_nothing_else_is_overwritten(plain, root):
    mine = root / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(OutputExists, match="not a bridged view"):
        bridge(plain, mine)
    assert (mine / "notes.txt").read_text() == "keep"
    for inside in (plain, plain / "weights", plain.parent, plain / "view"):
        with pytest.raises(OutputExists, match="cannot lie inside"):
            bridge(plain, inside)
    other = Path(shutil.copytree(plain, root / "elsewhere" / "plain"))
    view = bridge(plain)
    with pytest.raises(OutputExists, match="view of another checkpoint"):
        bridge(other)
    assert json.loads((view / "bridge.json").read_text())["view_of"] == "../../nemo2/plain"


def test_an_interrupted_build_leaves_nothing(plain, monkeypatch):
    monkeypatch.setattr(
        "workshop_utils.checkpoints.formats.torch_dist_writer.write_index",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        bridge(plain)
    assert list(paths.bridged_checkpoint("plain").parent.iterdir()) == []


def test_link_only_makes_just_the_link(plain, root, capsys):
    before = contents(plain)
    assert main(["bridge", str(plain), "--link-only"]) == 0
    link = plain / "model_config.yaml"
    assert os.readlink(link) == "context/model.yaml"
    assert "still cannot load" in capsys.readouterr().out
    assert not paths.bridged_checkpoint("plain").exists()
    assert bridge(plain, link_only=True) == link, "making it again changes nothing"
    assert config_of(bridge(plain))["num_layers"] == samples.LAYERS
    link.unlink()
    assert contents(plain) == before
    link.write_text("mine")
    with pytest.raises(OutputExists, match="left as it is"):
        bridge(plain, link_only=True)
    assert link.read_text() == "mine"
    with pytest.raises(ValueError, match="takes no out"):
        bridge(plain, root / "x", link_only=True)


def test_the_command(plain, root, capsys):
    assert main(["bridge", str(plain), "--out", str(root / "view")]) == 0
    assert "workshop finetune model.restore_from_path=view" in capsys.readouterr().out
    with pytest.raises(NotACheckpoint, match="already a bridged view"):
        bridge(root / "view")
    for path, status, words in (
        (root / "view", 2, "already a bridged view"),
        (root / "nothing", 2, "does not exist"),
        (plain / "weights", 2, "top directory: models/nemo2/plain"),
        (plain, 1, "__0_0.distcp is missing"),
    ):
        if status == 1:
            (plain / "weights" / "__0_0.distcp").unlink()
        assert main(["bridge", str(path)]) == status
        assert words in capsys.readouterr().err
