"""Conversion between the formats of NeMo, on checkpoints that Megatron-Core wrote; NeMo itself
reads the results in test_convert_nemo."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import checkpoint_samples as samples
import parallel_samples
import pytest
import yaml
from tiny_model import make_tiny_model

from workshop_utils.checkpoints.convert import convert, readers
from workshop_utils.checkpoints.convert import weights as weights_module
from workshop_utils.checkpoints.formats import (
    gpt_config,
    nemo1_config,
    nemo2,
    nemo_archive,
    torch_dist,
    values,
)
from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.cli import main
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A Hugging Face directory with a tokenizer (and a model, which must not come along)."""
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture
def checkpoint(originals, root, tokenizer, request):
    """A NeMo 2.0 checkpoint as a GPU writes it (bfloat16, Llama 3.1 rope, _extra_state, optimizer
    state), with a real tokenizer."""
    made = Path(shutil.copytree(originals / getattr(request, "param", "gpu"), root / "source"))
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, made / "context" / "nemo_tokenizer")
    return made


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """What four ranks of Megatron wrote, see :mod:`parallel_samples`."""
    directory = tmp_path_factory.mktemp("megatron")
    parallel_samples.make(directory)
    (directory / "ranks" / "model_config.yaml").write_text(yaml.safe_dump(parallel_samples.CONFIG))
    return directory


def weights(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name without prefix -> (dtype, bytes) of every tensor of the model in a NeMo or Megatron
    checkpoint."""
    found = identify(path)
    return {
        tensor.name.removeprefix("module.").removeprefix("model."): (
            tensor.dtype,
            values.read_tensor(found, tensor).tobytes(),
        )
        for tensor in found.tensors
    }


def fields(path: Path) -> dict:
    return gpt_config.read_fields(read_yaml(path / "context" / "model.yaml"), str(path))


@pytest.mark.parametrize("checkpoint", ["plain", "gpu"], indirect=True)
@pytest.mark.parametrize("through", ["nemo1", "mine.nemo"])
def test_round_trip_is_bit_equal(checkpoint, root, through):
    convert(checkpoint, root / through, "nemo1")
    convert(root / through, root / "back", "nemo2")
    assert weights(root / through) == weights(root / "back") == weights(checkpoint)
    # The number of rows is what the embedding has; a padded vocabulary is not stated by the source.
    assert fields(root / "back") == fields(checkpoint) | {"vocab_size": samples.VOCABULARY}
    objects = {name for name in nemo2.read(checkpoint).objects if name.startswith("module.")}
    assert set(nemo2.read(root / "back").objects) == objects
    before, after = (path / "context" / "nemo_tokenizer" for path in (checkpoint, root / "back"))
    assert (after / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
    convert(root / "back", root / "again.nemo", "nemo1")
    assert weights(root / "again.nemo") == weights(checkpoint)


@pytest.mark.parametrize("checkpoint", ["plain", "gpu"], indirect=True)
@pytest.mark.parametrize("form", ["sharded", "archive"])
def test_megatron_core_loads_what_was_written(checkpoint, root, form, request):
    import torch

    flavour = request.node.callspec.params["checkpoint"]
    target = root / "made" if form == "sharded" else root / "made.nemo"
    convert(checkpoint, target, "nemo1")
    if form == "archive":
        with tarfile.open(target) as archive:
            archive.extractall(root / "made")
    loaded = samples.load(root / "made", flavour)
    for layer in range(samples.LAYERS):
        for name in samples.LAYER_SHAPES:
            assert torch.equal(
                loaded[f"model.decoder.layers.{layer}.{name}"], samples.weight(name, layer, flavour)
            ), name
    embedding = "embedding.word_embeddings.weight"
    assert torch.equal(loaded[f"model.{embedding}"], samples.weight(embedding, None, flavour))


def test_sharded_weights_are_linked_to_the_files_themselves(checkpoint, root):
    convert(checkpoint, root / "one", "nemo1")
    done = convert(root / "one", root / "two", "nemo2")
    shutil.rmtree(root / "one")
    for shard in (root / "two" / "weights").glob("*.distcp"):
        assert shard.is_symlink()
        assert not os.path.isabs(os.readlink(shard))
        assert shard.resolve() == checkpoint / "weights" / shard.name
    assert f"{checkpoint.name}/weights (keep both)" in " ".join(done.notes)
    assert not any(name.startswith("optimizer") for name in nemo2.read(root / "two").tensors)


@pytest.mark.parametrize("form", ["directory", "archive", "old Megatron-LM", "iteration"])
def test_ranks_are_put_together(megatron, root, tokenizer, form):
    source = {
        "directory": megatron / "ranks",
        "archive": root / "ranks.nemo",
        "old Megatron-LM": megatron / "lm",
    }.get(form, megatron / "iter")
    if form == "archive":
        with tarfile.open(source, "w") as archive:
            archive.add(megatron / "ranks", ".")
    convert(source, root / "made", "nemo2", tokenizer=tokenizer)
    made, reference = nemo2.read(root / "made"), torch_dist.read_directory(megatron / "reference")
    assert weights(root / "made") == weights(megatron / "iter")
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {
        f"module.{name}": tensor.shape for name, tensor in reference.tensors.items()
    }
    if form in ("directory", "archive"):
        fc1 = made.tensors["module.decoder.layers.mlp.linear_fc1.weight"]
        # Nothing was put together: two ranks, each with a half of the gate and one of up, for each
        # layer.
        assert len(fc1.chunks) == parallel_samples.LAYERS * 2 * 2
        assert (root / "made" / "weights" / "__0_0.distcp").is_file()
    stated = fields(root / "made")
    assert (stated["add_qkv_bias"], stated["kv_channels"], stated["vocab_size"]) == (
        True,
        12,
        parallel_samples.ROWS,
    )
    assert read_yaml(root / "made" / "context" / "model.yaml")["_target_"].endswith(
        ".Qwen2Model"
    ), "known by the bias of q, k and v"


def test_experts_are_put_together(megatron, root, tokenizer):
    source = Path(shutil.copytree(megatron / "experts", root / "experts"))
    config = parallel_samples.CONFIG | {
        "num_moe_experts": 3,
        "qkv_bias": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    (source / "model_config.yaml").write_text(yaml.safe_dump(config))
    convert(source, root / "made", "nemo2", tokenizer=tokenizer)
    made, reference = (
        nemo2.read(root / "made"),
        torch_dist.read_directory(megatron / "experts_reference"),
    )
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {
        f"module.{name}": tensor.shape for name, tensor in reference.tensors.items()
    }
    assert weights(root / "made") == weights(megatron / "experts_reference")
    assert read_yaml(root / "made" / "context" / "model.yaml")["_target_"].endswith("MixtralModel")


def test_a_run_config_of_megatron_bridge(megatron, root, tokenizer):
    source = Path(shutil.copytree(megatron / "reference", root / "iter_0000010"))
    model = {
        name: getattr(parallel_samples.ARGUMENTS, name)
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "ffn_hidden_size",
            "seq_length",
            "position_embedding_type",
            "rotary_base",
            "normalization",
            "add_bias_linear",
            "add_qkv_bias",
        )
    }
    model |= {
        "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider",
        "gated_linear_unit": True,
        "layernorm_epsilon": 1e-5,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "share_embeddings_and_output_weights": True,
    }
    (source / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    convert(source, root / "made", "nemo2", tokenizer=tokenizer)
    assert weights(root / "made") == weights(megatron / "iter")
    assert fields(root / "made")["ffn_hidden_size"] == parallel_samples.FFN


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: shutil.rmtree(path / "tp_rank_01_pp_rank_001"), "rank"),
        (lambda path: _change(path, num_layers=6), "linear_fc1|is missing, or a layer"),
        (lambda path: _change(path, hidden_size=64), "has the shape"),
    ],
)
def test_ranks_that_do_not_fit_are_damaged(megatron, root, tokenizer, change, words):
    source = Path(shutil.copytree(megatron / "ranks", root / "ranks"))
    change(source)
    with pytest.raises(DamagedCheckpoint):
        convert(source, root / "made", "nemo2", tokenizer=tokenizer)
    assert not (root / "made").exists()
    # The reader itself, for --trust.
    with pytest.raises(DamagedCheckpoint, match=words):
        readers.read(source)


def _change(directory: Path, **changes) -> None:
    file = directory / "model_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def test_dtype_is_kept_unless_asked(checkpoint, root):
    import torch

    convert(checkpoint, root / "made", "nemo2", dtype="float16")
    convert(checkpoint, root / "as_is.nemo", "nemo1")
    name = "decoder.final_layernorm.weight"
    expected = samples.weight(name, None, "gpu").to(torch.float16).numpy()
    assert weights(root / "made")[name] == ("float16", expected.tobytes())
    assert {dtype for dtype, _ in weights(root / "made").values()} == {"float16"}
    assert {dtype for dtype, _ in weights(root / "as_is.nemo").values()} == {"bfloat16"}
    config = read_yaml(root / "made" / "context" / "model.yaml")["config"]
    assert (config["fp16"], config["bf16"], config["params_dtype"]["_target_"]) == (
        True,
        False,
        "torch.float16",
    )


def test_what_is_written_passes_verification(checkpoint, root, capsys):
    for target, to in (("made", "nemo1"), ("made.nemo", "nemo1")):
        convert(checkpoint, root / target, to)
        assert main(["verify", str(root / target), "--deep"]) == 0, capsys.readouterr()
    convert(root / "made.nemo", root / "back", "nemo2")
    assert main(["verify", str(root / "back"), "--deep"]) == 0, capsys.readouterr()


def test_a_sentencepiece_tokenizer(checkpoint, root):
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["number one", "it is two", "three of them"] * 10),
        model_writer=written,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (root / "mine.model").write_bytes(written.getvalue())
    convert(checkpoint, root / "made.nemo", "nemo1", tokenizer=root / "mine.model")
    config = nemo_archive.read_config(root / "made.nemo")
    assert config["tokenizer"]["library"] == "sentencepiece"
    assert config["tokenizer"]["model"] == "nemo:tokenizer.model"
    assert nemo_archive.read_member(root / "made.nemo", "tokenizer.model") == written.getvalue()
    (root / "mine.model").unlink()
    convert(root / "made.nemo", root / "back", "nemo2")
    described = read_yaml(root / "back" / "context" / "model.yaml")["tokenizer"]
    assert described["_target_"].endswith("SentencePieceTokenizer")
    assert (root / "back" / "context" / described["model_path"]).read_bytes() == written.getvalue()
    convert(root / "back", root / "again", "nemo1")
    assert (
        Path(read_yaml(root / "again" / "model_config.yaml")["tokenizer"]["model"]).read_bytes()
        == written.getvalue()
    )


def test_only_the_tokenizer_comes_along(megatron, root, tokenizer):
    convert(megatron / "iter", root / "made", "nemo2", tokenizer=tokenizer)
    assert {file.name for file in (root / "made" / "context" / "nemo_tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_a_given_tokenizer_replaces_a_missing_one(checkpoint, root, tokenizer):
    shutil.rmtree(checkpoint / "context" / "nemo_tokenizer")
    with pytest.raises(DamagedCheckpoint, match="tokenizer"):
        convert(checkpoint, root / "made", "nemo1", trust=True)
    convert(checkpoint, root / "made", "nemo2", tokenizer=tokenizer, trust=True)
    assert (root / "made" / "context" / "nemo_tokenizer" / "tokenizer.json").read_bytes() == (
        tokenizer / "tokenizer.json"
    ).read_bytes()
    assert weights(root / "made") == weights(checkpoint)


@pytest.mark.parametrize(
    "described, words",
    [
        (
            {"library": "huggingface", "type": "meta-llama/Llama-3.2-1B"},
            "names its tokenizer 'meta-llama/Llama-3.2-1B', which is not here",
        ),
        (
            {"library": "huggingface", "type": "/gone/tokenizer"},
            "which is not here.*--tokenizer DIR",
        ),
        (
            {"library": "megatron", "type": "GPT2BPETokenizer"},
            "has no tokenizer that can be taken along.*--tokenizer",
        ),
        (
            {"library": "sentencepiece", "model": "nemo:gone.model"},
            "has no tokenizer that can be taken along",
        ),
        (None, "has no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_here_is_asked_for(megatron, root, described, words):
    source = Path(shutil.copytree(megatron / "ranks", root / "ranks"))
    _change(source, tokenizer=described)
    for dry_run in (True, False):
        with pytest.raises(UnsupportedCheckpoint, match=words):
            convert(source, root / "made", "nemo2", dry_run=dry_run)
    assert not (root / "made").exists()


def test_a_tokenizer_outside_the_checkpoint_is_not_read(megatron, root):
    source = Path(shutil.copytree(megatron / "ranks", root / "ranks"))
    _change(source, tokenizer={"library": "sentencepiece", "model": "nemo:../../secret.model"})
    with pytest.raises(UnsafeCheckpoint, match="outside the checkpoint"):
        convert(source, root / "made", "nemo2")
    with pytest.raises(NotACheckpoint, match="is no tokenizer"):
        convert(megatron / "ranks", root / "made", "nemo2", tokenizer=root)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (
            {"mcore_gpt": False},
            UnsupportedCheckpoint,
            "mcore_gpt is False: .*convert_nemo_gpt_to_mcore",
        ),
        (
            {"position_embedding_type": "learned_absolute"},
            UnsupportedCheckpoint,
            "position_embedding_type is 'learned_absolute'",
        ),
        ({"name": "megatron_falcon_gpt"}, UnsupportedCheckpoint, "name is 'megatron_falcon_gpt'"),
        ({"activation": "approx-gelu"}, UnsupportedCheckpoint, "activation is 'approx-gelu'"),
        ({"normalization": "batchnorm"}, UnsupportedCheckpoint, "normalization is 'batchnorm'"),
        (
            {"apply_embedding_scaling": True},
            UnsupportedCheckpoint,
            "apply_embedding_scaling is True",
        ),
        (
            {
                "target": "nemo.collections.nlp.models.language_modeling.megatron_t5_model.MegatronT5Model"  # noqa: E501
            },
            UnsupportedCheckpoint,
            "target is",
        ),
        ({"num_query_groups": 3}, DamagedCheckpoint, "no multiple of num_query_groups"),
        ({"hidden_size": "big"}, DamagedCheckpoint, "hidden_size is 'big'"),
        ({"num_layers": None}, DamagedCheckpoint, "num_layers is missing"),
    ],
)
def test_what_a_configuration_of_nemo_1_may_not_say(changes, error, words):
    with pytest.raises(error, match=words):
        nemo1_config.read_fields(parallel_samples.CONFIG | changes, "model_config.yaml")


SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "num_query_groups": 2,
    "kv_channels": 24,
}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for family in FAMILIES.values()
        for kind in [*list(family.configs)[:1], family.scaled]
        if kind
    ],
)
def test_every_family_comes_back_from_nemo_1(kind):
    family = next(family for family in FAMILIES.values() if kind in family.configs)
    model = {"_target_": family.models[0], "config": {"_target_": kind, **SMALL, "vocab_size": 256}}
    stated = gpt_config.read_fields(model, "model.yaml")
    config = nemo1_config.from_fields(stated, family, 256, "bfloat16", {}, "model.yaml")
    back, found = nemo1_config.read_fields(
        yaml.safe_load(yaml.safe_dump(config)), "model_config.yaml"
    )
    assert back | {"vocab_size": 256} == stated
    assert found is family
    without_our_note = {name: value for name, value in config.items() if name != "workshop"}
    assert nemo1_config.read_fields(without_our_note, "model_config.yaml")[1] is family, (
        "known by its features"
    )


def test_the_layers_with_norms_of_q_and_k_are_named():
    family = FAMILIES["qwen3"]
    model = {
        "_target_": family.models[0],
        "config": {"_target_": next(iter(family.configs)), **SMALL},
    }
    config = nemo1_config.from_fields(
        gpt_config.read_fields(model, ""), family, 256, "float32", {}, ""
    )
    assert config["name"] == "decoder_block_gpt"
    # With any other layers NeMo 1 leaves the norms out, whatever the configuration says.
    assert nemo1_config.read_fields(config | {"name": ""}, "")[0]["qk_layernorm"] is False


def test_other_formats_get_a_sentence(checkpoint, root, tokenizer):
    import torch

    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.4.0"}, root / "last.ckpt")
    with pytest.raises(UnsupportedCheckpoint, match="Lightning.*megatron_ckpt_to_nemo"):
        convert(root / "last.ckpt", root / "made", "nemo2")
    shutil.copytree(checkpoint, root / "old")
    (root / "old" / "weights" / "metadata.json").write_text(
        '{"sharded_backend": "zarr", "sharded_backend_version": 1}'
    )
    with pytest.raises(UnsupportedCheckpoint, match="zarr is deprecated.*load and save"):
        readers.read(root / "old")
    (root / "gguf.gguf").write_bytes(b"GGUF")
    with pytest.raises((DamagedCheckpoint, UnsupportedCheckpoint)):
        convert(root / "gguf.gguf", root / "made", "nemo2")
    with pytest.raises(NotACheckpoint, match="does not exist"):
        convert(root / "nothing", root / "made", "nemo1")
    with pytest.raises(NotACheckpoint):
        convert(root, root.parent / "made", "nemo1")
    assert not (root / "made").exists()


def test_an_adapter_is_not_a_model(checkpoint, root):
    (checkpoint / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    with pytest.raises((UnsupportedCheckpoint, DamagedCheckpoint), match="adapter"):
        convert(checkpoint, root / "made", "nemo1")


def test_nothing_is_overwritten_unless_asked(checkpoint, root):
    mine = root / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="is no checkpoint"):
            convert(checkpoint, mine, "nemo1", overwrite=overwrite)
    (mine / "notes.txt").rename(root / "notes.txt")
    convert(checkpoint, mine, "nemo1")
    (mine / "model_weights" / "common.pt").unlink()
    with pytest.raises(OutputExists, match="--overwrite"):
        convert(checkpoint, mine, "nemo1")
    for inside in (checkpoint, checkpoint / "made", root):
        with pytest.raises(OutputExists, match="cannot lie inside"):
            convert(checkpoint, inside, "nemo1", overwrite=True)
    convert(checkpoint, mine, "nemo1", overwrite=True)
    assert (mine / "model_weights" / "common.pt").exists()
    with pytest.raises(UnsupportedCheckpoint, match="a .nemo archive is NeMo 1"):
        convert(mine, root / "x.nemo", "nemo2")
    with pytest.raises(UnsupportedCheckpoint, match="is a NeMo 1 checkpoint already"):
        convert(mine, root / "again", "nemo1")


def test_relative_paths(checkpoint, root, monkeypatch):
    monkeypatch.chdir(root)
    for target in ("made", "made.nemo"):
        convert(checkpoint.name, target, "nemo1")
        config = (
            read_yaml(root / "made" / "model_config.yaml")
            if target == "made"
            else nemo_archive.read_config(root / target)
        )
        assert (
            Path(config["tokenizer"]["type"]).is_absolute(),
            Path(config["tokenizer"]["type"]).is_dir(),
        ) == (True, True)
    shutil.rmtree(checkpoint.name)
    convert("made.nemo", "back", "nemo2")
    assert (root / "back" / "context" / "nemo_tokenizer" / "tokenizer.json").is_file()


def test_weights_that_are_only_linked_to_are_not_replaced(checkpoint, root):
    convert(checkpoint, root / "linked", "nemo1")
    before = weights(checkpoint)
    with pytest.raises(OutputExists, match="holds the weights that linked only links to"):
        convert(root / "linked", checkpoint, "nemo2", overwrite=True)
    assert weights(checkpoint) == before


@pytest.mark.parametrize("target", ["made", "made.nemo"])
def test_an_interrupted_conversion_leaves_what_was_there(checkpoint, root, monkeypatch, target):
    convert(checkpoint, root / target, "nemo1")
    before = weights(root / target)
    there = sorted(root.iterdir())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "workshop_utils.checkpoints.formats.torch_dist_writer.write_index", interrupted
    )
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, root / target, "nemo1", overwrite=True)
    assert sorted(root.iterdir()) == there
    assert weights(root / target) == before


def test_the_source_is_verified_first(checkpoint, root, capsys):
    shard = checkpoint / "weights" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp"):
        convert(checkpoint, root / "made", "nemo1")
    assert main(["convert", str(checkpoint), str(root / "made"), "--to", "nemo1"]) == 1
    assert "__0_0.distcp" in capsys.readouterr().err


def test_the_command(checkpoint, root, capsys):
    assert main(["convert", str(checkpoint), str(root / "made"), "--to", "nemo1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would write: made" in said
    assert "family llama: 2 layers" in said
    assert not (root / "made").exists()
    assert main(["convert", str(checkpoint), str(root / "made"), "--to", "nemo1"]) == 0
    assert "written: made" in capsys.readouterr().out
    assert main(["convert", str(checkpoint), str(root / "made"), "--to", "nemo1"]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_nothing_is_put_together_on_disk_before_an_archive(megatron, root, tokenizer, monkeypatch):
    """Layers of four ranks go into the tar one by one; other readers of tars agree with what was
    written."""
    seen = []
    original = weights_module.write

    def write(source, written, dtype):
        found = original(source, written, dtype)
        seen.append(
            sum(
                file.stat().st_size
                for file in root.rglob("*")
                if file.is_file() and file.suffix != ".partial"
            )
        )
        return found

    monkeypatch.setattr(weights_module, "write", write)
    convert(
        megatron / "lm",
        root / "made.nemo",
        "nemo1",
        tokenizer=tokenizer,
        dtype="bfloat16",
        trust=True,
    )
    assert seen == [0]
    with tarfile.open(root / "made.nemo") as archive:
        names = archive.getnames()
        archive.extractall(root / "out")
    assert sorted(names) == sorted(
        f"./{member.name}" for member in nemo_archive.members(root / "made.nemo")
    )
    assert weights(root / "out") == weights(root / "made.nemo")
