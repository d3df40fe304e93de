"""The bridge: configuration, view of the weights, link, and what it refuses."""

import json
import os
import pickle
import shutil
from pathlib import Path

import checkpoint_samples as samples
import pytest
import yaml

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


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of the test's own."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["plain", "gpu"])
def flavour(request):
    return request.param


def copy(originals: Path, flavour: str) -> Path:
    return Path(shutil.copytree(originals / flavour, paths.nemo2_checkpoint(flavour)))


def change(checkpoint: Path, **fields) -> dict:
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
    return model


def config_of(view: Path) -> dict:
    return yaml.safe_load((view / "model_config.yaml").read_text())


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_megatron_core_loads_the_view_under_the_names_of_nemo_1(originals, root, flavour):
    import torch

    checkpoint = copy(originals, flavour)
    before = contents(checkpoint)
    view = bridge(checkpoint)
    assert view == paths.bridged_checkpoint(flavour)
    loaded = samples.load(view, flavour)
    expected = {name: samples.weight(name, None, flavour) for name in samples.WHOLE_SHAPES}
    for layer in range(samples.LAYERS):
        expected |= {
            f"decoder.layers.{layer}.{name}": samples.weight(name, layer, flavour)
            for name in samples.LAYER_SHAPES
        }
    if flavour == "plain":
        del expected["output_layer.weight"]
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    assert set(tensors) == {f"model.{name}" for name in expected}
    for name, value in expected.items():
        assert tensors[f"model.{name}"].dtype == value.dtype
        assert torch.equal(tensors[f"model.{name}"], value), name
    objects = {
        name: pickle.loads(value.getvalue())["extra_fp8_variables"]["name"]
        for name, value in loaded.items()
        if not isinstance(value, torch.Tensor)
    }
    expected_objects = [
        (layer, name) for layer in range(samples.LAYERS) for name in samples.EXTRA_STATE
    ]
    assert objects == (
        {
            f"model.decoder.layers.{layer}.{name}": f"{name} {layer}"
            for layer, name in expected_objects
        }
        if flavour == "gpu"
        else {}
    )
    assert contents(checkpoint) == before, "the NeMo 2.0 directory has to stay as it is"


def test_no_weight_is_copied_and_optimizer_state_is_left_out(originals, root):
    checkpoint = copy(originals, "gpu")
    weights = bridge(checkpoint) / "model_weights"
    shards = sorted(weights.glob("*.distcp"))
    assert shards
    for shard in shards:
        assert shard.is_symlink()
        assert not os.path.isabs(os.readlink(shard))
        assert shard.resolve() == (checkpoint / "weights" / shard.name).resolve()
    assert any(name.startswith("optimizer.") for name in nemo2.read(checkpoint).tensors)
    assert b"optimizer" not in (weights / ".metadata").read_bytes()
    assert b"module." not in (weights / ".metadata").read_bytes()


def test_the_configuration_is_translated(originals, root):
    config = config_of(bridge(copy(originals, "gpu")))
    expected = {
        "num_layers": samples.LAYERS,
        "hidden_size": samples.HIDDEN,
        "ffn_hidden_size": samples.FFN,
        "num_attention_heads": samples.HEADS,
        "num_query_groups": samples.GROUPS,
        "kv_channels": samples.HEAD_DIM,
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
    assert not {
        "activation_func",
        "params_dtype",
        "bf16",
        "init_method",
        "gated_linear_unit",
        "_target_",
        "config",
    } & set(config)


def test_without_rope_scaling_and_in_single_precision(originals, root):
    config = config_of(bridge(copy(originals, "plain")))
    assert config["scale_positional_embedding"] is False
    assert "scale_factor" not in config
    assert config["precision"] == 32
    assert config["share_embeddings_and_output_weights"] is True


def test_fields_that_an_older_dump_leaves_out_come_from_the_class(originals, root):
    checkpoint = copy(originals, "gpu")
    left = (
        "seq_length",
        "layernorm_epsilon",
        "normalization",
        "gated_linear_unit",
        "activation_func",
        "params_dtype",
        "share_embeddings_and_output_weights",
        "scale_factor",
        "old_context_len",
        "vocab_size",
    )
    change(checkpoint, config=dict.fromkeys(left, ...))
    config = config_of(bridge(checkpoint))
    assert (config["encoder_seq_length"], config["scale_factor"], config["old_context_len"]) == (
        4096,
        8.0,
        8192,
    )
    assert (config["activation"], config["normalization"], config["layernorm_epsilon"]) == (
        "fast-swiglu",
        "rmsnorm",
        1e-05,
    )
    assert config["precision"] == "bf16-mixed", (
        "the weights say bfloat16, whatever the default of the class is"
    )


def test_numbers_that_yaml_reads_as_text(originals, root):
    checkpoint = copy(originals, "plain")
    file = checkpoint / "context" / "model.yaml"
    file.write_text(
        file.read_text().replace("layernorm_epsilon: 1.0e-05", "layernorm_epsilon: 1e-05")
    )
    assert config_of(bridge(checkpoint))["layernorm_epsilon"] == 1e-05


def test_the_tokenizer_is_found_inside_context(originals, root):
    checkpoint = copy(originals, "plain")
    tokenizer = config_of(bridge(checkpoint))["tokenizer"]
    assert tokenizer["library"] == "huggingface"
    assert tokenizer["type"] == str(checkpoint / "context" / "nemo_tokenizer")
    assert "trust_remote_code" not in tokenizer


def test_a_sentencepiece_tokenizer(originals, root):
    checkpoint = copy(originals, "plain")
    (checkpoint / "context" / "tokenizer.model").write_bytes(b"model")
    kind = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
    change(
        checkpoint,
        tokenizer={"_target_": kind, "pretrained_model_name": ..., "model_path": "tokenizer.model"},
    )
    tokenizer = config_of(bridge(checkpoint))["tokenizer"]
    assert (tokenizer["library"], tokenizer["model"]) == (
        "sentencepiece",
        str(checkpoint / "context" / "tokenizer.model"),
    )


def test_a_tokenizer_named_on_the_hub(originals, root):
    checkpoint = copy(originals, "plain")
    wrapped = {
        "_target_": "nemo.lightning.io.artifact.file.DirOrStringArtifact",
        "attr": "meta-llama/Llama-3.2-1B",
        "skip": True,
    }
    change(checkpoint, tokenizer={"pretrained_model_name": wrapped})
    assert config_of(bridge(checkpoint))["tokenizer"]["type"] == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (
            {"_target_": "nemo.collections.llm.gpt.model.mixtral.MixtralModel"},
            UnsupportedCheckpoint,
            "_target_.*MixtralModel",
        ),
        ({"_target_": "os.system"}, UnsafeCheckpoint, "_target_ names 'os.system'"),
        (
            {"config": {"_target_": "evil.Config"}},
            UnsafeCheckpoint,
            r"config\._target_.*evil\.Config",
        ),
        (
            {"config": {"_target_": "nemo.collections.llm.gpt.model.qwen2.Qwen2Config"}},
            UnsupportedCheckpoint,
            "Qwen2Config",
        ),
        ({"config": ...}, DamagedCheckpoint, "field config is missing"),
        ({"config": {"num_layers": ...}}, DamagedCheckpoint, r"config\.num_layers is missing"),
        ({"config": {"hidden_size": "big"}}, DamagedCheckpoint, r"config\.hidden_size is 'big'"),
        (
            {"config": {"num_attention_heads": 3.5}},
            DamagedCheckpoint,
            r"config\.num_attention_heads is 3\.5",
        ),
        ({"config": {"num_query_groups": 3}}, DamagedCheckpoint, "no multiple of num_query_groups"),
        (
            {"config": {"num_moe_experts": 8}},
            UnsupportedCheckpoint,
            r"config\.num_moe_experts is 8",
        ),
        (
            {"config": {"qk_layernorm": True}},
            UnsupportedCheckpoint,
            r"config\.qk_layernorm is True",
        ),
        (
            {"config": {"activation_func": {"_target_": "torch.tanh"}}},
            UnsupportedCheckpoint,
            r"config\.activation_func is 'tanh'",
        ),
        ({"config": {"num_layers": 3}}, DamagedCheckpoint, "linear_qkv.*has the shape.*asks for"),
        (
            {"config": {"share_embeddings_and_output_weights": False}},
            DamagedCheckpoint,
            "output_layer.weight is missing",
        ),
        ({"tokenizer": ...}, UnsupportedCheckpoint, r"tokenizer\._target_ is None"),
        (
            {"tokenizer": {"_target_": "evil.Tokenizer"}},
            UnsafeCheckpoint,
            r"tokenizer\._target_ names 'evil\.Tokenizer'",
        ),
        (
            {"tokenizer": {"pretrained_model_name": "../../secret"}},
            UnsafeCheckpoint,
            "outside the checkpoint",
        ),
        (
            {"tokenizer": {"pretrained_model_name": "/gone/tokenizer"}},
            DamagedCheckpoint,
            r"tokenizer\.pretrained_model_name",
        ),
        (
            {"tokenizer": {"pretrained_model_name": ...}},
            DamagedCheckpoint,
            "pretrained_model_name is missing",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(originals, root, fields, error, words):
    checkpoint = copy(originals, "plain")
    change(checkpoint, **fields)
    with pytest.raises(error, match=words):
        bridge(checkpoint)
    assert not paths.bridged_checkpoint("plain").exists()


def test_a_tied_model_with_an_output_layer_is_refused(originals, root):
    checkpoint = copy(originals, "gpu")
    change(checkpoint, config={"share_embeddings_and_output_weights": True})
    with pytest.raises(UnsupportedCheckpoint, match="output_layer"):
        bridge(checkpoint)


def test_an_adapter_is_refused(originals, root):
    checkpoint = copy(originals, "plain")
    (checkpoint / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    with pytest.raises(UnsupportedCheckpoint, match="is an adapter"):
        bridge(checkpoint)


def test_a_view_is_reused_until_its_checkpoint_changes(originals, root):
    checkpoint = copy(originals, "plain")
    view = bridge(checkpoint)
    before = (view / "model_weights" / ".metadata").stat().st_mtime_ns
    assert bridge(checkpoint) == view
    assert (view / "model_weights" / ".metadata").stat().st_mtime_ns == before
    change(checkpoint, config={"seq_length": 1024})
    bridge(checkpoint)
    assert config_of(view)["encoder_seq_length"] == 1024
    (view / "model_weights" / "common.pt").unlink()
    bridge(checkpoint)
    assert (view / "model_weights" / "common.pt").exists()


def test_a_moved_repository(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path / "here"))
    bridge(copy(originals, "plain"))
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path / "there"))
    view, checkpoint = paths.bridged_checkpoint("plain"), paths.nemo2_checkpoint("plain")
    assert (
        view / "model_weights" / "__0_0.distcp"
    ).resolve() == checkpoint / "weights" / "__0_0.distcp"
    assert bridge(checkpoint) == view
    assert config_of(view)["tokenizer"]["type"] == str(checkpoint / "context" / "nemo_tokenizer")


def test_nothing_else_is_overwritten(originals, root):
    checkpoint = copy(originals, "plain")
    mine = root / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(OutputExists, match="not a bridged view"):
        bridge(checkpoint, mine)
    assert (mine / "notes.txt").read_text() == "keep"
    for inside in (checkpoint, checkpoint / "weights", checkpoint.parent):
        with pytest.raises(OutputExists):
            bridge(checkpoint, inside)
    with pytest.raises(OutputExists, match="cannot lie inside"):
        bridge(checkpoint, checkpoint / "view")
    other = Path(shutil.copytree(checkpoint, root / "elsewhere" / "plain"))
    view = bridge(checkpoint)
    with pytest.raises(OutputExists, match="view of another checkpoint"):
        bridge(other)
    assert json.loads((view / "bridge.json").read_text())["view_of"] == "../../nemo2/plain"


def test_an_interrupted_build_leaves_nothing(originals, root, monkeypatch):
    checkpoint = copy(originals, "plain")
    monkeypatch.setattr(
        "workshop_utils.checkpoints.formats.torch_dist_writer.write_index",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        bridge(checkpoint)
    assert list(paths.bridged_checkpoint("plain").parent.iterdir()) == []


def test_link_only_makes_just_the_link(originals, root, capsys):
    checkpoint = copy(originals, "plain")
    before = contents(checkpoint)
    assert main(["bridge", str(checkpoint), "--link-only"]) == 0
    link = checkpoint / "model_config.yaml"
    assert os.readlink(link) == "context/model.yaml"
    assert "still cannot load" in capsys.readouterr().out
    assert not paths.bridged_checkpoint("plain").exists()
    assert bridge(checkpoint, link_only=True) == link, "making it again changes nothing"
    link.unlink()
    assert contents(checkpoint) == before
    link.write_text("mine")
    with pytest.raises(OutputExists, match="left as it is"):
        bridge(checkpoint, link_only=True)
    assert link.read_text() == "mine"
    with pytest.raises(ValueError, match="takes no out"):
        bridge(checkpoint, root / "x", link_only=True)


def test_a_linked_checkpoint_can_still_be_bridged(originals, root):
    checkpoint = copy(originals, "plain")
    bridge(checkpoint, link_only=True)
    assert config_of(bridge(checkpoint))["num_layers"] == samples.LAYERS


def test_the_command(originals, root, capsys):
    checkpoint = copy(originals, "plain")
    assert main(["bridge", str(checkpoint), "--out", str(root / "view")]) == 0
    assert "workshop finetune model.restore_from_path=view" in capsys.readouterr().out
    assert main(["bridge", str(root / "view")]) == 2
    assert "already a bridged view" in capsys.readouterr().err
    assert main(["bridge", str(root / "nothing")]) == 2
    assert main(["bridge", str(checkpoint / "weights")]) == 2
    assert "top directory: models/nemo2/plain" in capsys.readouterr().err
    (checkpoint / "weights" / "__0_0.distcp").unlink()
    assert main(["bridge", str(checkpoint)]) == 1
    assert "__0_0.distcp is missing" in capsys.readouterr().err


def test_a_view_is_not_bridged_again(originals, root):
    with pytest.raises(NotACheckpoint, match="already a bridged view"):
        bridge(bridge(copy(originals, "plain")))
