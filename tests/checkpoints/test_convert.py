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
from reading import shapes

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
def checkpoint(originals, root, tiny, request):
    """A NeMo 2.0 checkpoint as a GPU writes it (bfloat16, Llama 3.1 rope, _extra_state, optimizer
    state), with a real tokenizer."""
    copy = Path(shutil.copytree(originals / getattr(request, "param", "gpu"), root / "source"))
    for file in tiny.glob("*token*"):
        shutil.copy(file, copy / "context" / "nemo_tokenizer")
    return copy


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """What four ranks of Megatron wrote, see :mod:`parallel_samples`."""
    directory = tmp_path_factory.mktemp("megatron")
    parallel_samples.make(directory)
    (directory / "ranks" / "model_config.yaml").write_text(yaml.safe_dump(parallel_samples.CONFIG))
    return directory


@pytest.fixture
def ranks(megatron, root):
    """A copy of what NeMo 1 wrote on four ranks."""
    return Path(shutil.copytree(megatron / "ranks", root / "ranks"))


def weights(path: Path) -> dict[str, tuple[str, bytes]]:
    """Name without prefix -> (dtype, bytes) of every tensor of the model in a NeMo or Megatron
    checkpoint."""
    checkpoint, held = identify(path), {}
    for tensor in checkpoint.tensors:
        name = tensor.name.removeprefix("module.").removeprefix("model.")
        held[name] = tensor.dtype, values.read_tensor(checkpoint, tensor).tobytes()
    return held


def model_of(path: Path) -> dict:
    return read_yaml(path / "context" / "model.yaml")


def fields(path: Path) -> dict:
    return gpt_config.read_fields(model_of(path), str(path))


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
@pytest.mark.parametrize("target", ["made", "made.nemo"])
def test_megatron_core_loads_what_was_written(checkpoint, root, target, request):
    import torch

    flavour = request.node.callspec.params["checkpoint"]
    convert(checkpoint, root / target, "nemo1")
    if target == "made.nemo":
        with tarfile.open(root / target) as archive:
            archive.extractall(root / "made")
    loaded = samples.load(root / "made", flavour)
    places = [("embedding.word_embeddings.weight", None, "")]
    for layer in range(samples.LAYERS):
        places += [(name, layer, f"decoder.layers.{layer}.") for name in samples.LAYER_SHAPES]
    for name, layer, above in places:
        assert torch.equal(loaded[f"model.{above}{name}"], samples.weight(name, layer, flavour))


def test_sharded_weights_are_linked_to_the_files_themselves(checkpoint, root):
    convert(checkpoint, root / "one", "nemo1")
    done = convert(root / "one", root / "two", "nemo2")
    shutil.rmtree(root / "one")
    for shard in (root / "two" / "weights").glob("*.distcp"):
        assert shard.is_symlink() and not os.path.isabs(os.readlink(shard))
        assert shard.resolve() == checkpoint / "weights" / shard.name
    assert f"{checkpoint.name}/weights (keep both)" in " ".join(done.notes)
    assert not any(name.startswith("optimizer") for name in nemo2.read(root / "two").tensors)


def check_stacked(path: Path, reference: Path) -> dict:
    """``path`` has the tensors and values of ``reference``, which Megatron-Core stacked."""
    tensors = nemo2.read(path).tensors
    stacked = shapes(torch_dist.read_directory(reference).tensors)
    assert shapes(tensors) == {f"module.{name}": shape for name, shape in stacked.items()}
    assert weights(path) == weights(reference)
    return tensors


@pytest.mark.parametrize("form", ["ranks", "archive", "lm", "iter"])
def test_ranks_are_put_together(megatron, root, tiny, form):
    source = root / "ranks.nemo" if form == "archive" else megatron / form
    if form == "archive":
        with tarfile.open(source, "w") as archive:
            archive.add(megatron / "ranks", ".")
    convert(source, root / "made", "nemo2", tokenizer=tiny)
    tensors = check_stacked(root / "made", megatron / "iter")
    if form in ("ranks", "archive"):
        fc1 = tensors["module.decoder.layers.mlp.linear_fc1.weight"]
        # Nothing was put together: two ranks, each with a half of the gate and one of up, for each
        # layer.
        assert len(fc1.chunks) == parallel_samples.LAYERS * 2 * 2
        assert (root / "made" / "weights" / "__0_0.distcp").is_file()
    stated = fields(root / "made")
    sizes = stated["add_qkv_bias"], stated["kv_channels"], stated["vocab_size"]
    assert sizes == (True, 12, parallel_samples.ROWS)
    known_by_the_bias = model_of(root / "made")["_target_"]
    assert known_by_the_bias.endswith(".Qwen2Model")


def test_experts_are_put_together(megatron, root, tiny):
    source = Path(shutil.copytree(megatron / "experts", root / "experts"))
    one = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    config = parallel_samples.CONFIG | {"num_moe_experts": 3, "qkv_bias": False} | one
    (source / "model_config.yaml").write_text(yaml.safe_dump(config))
    convert(source, root / "made", "nemo2", tokenizer=tiny)
    check_stacked(root / "made", megatron / "experts_reference")
    assert model_of(root / "made")["_target_"].endswith("MixtralModel")


def test_a_run_config_of_megatron_bridge(megatron, root, tiny):
    source = Path(shutil.copytree(megatron / "reference", root / "iter_0000010"))
    names = set(parallel_samples.SIZES) | {"position_embedding_type", "rotary_base"}
    names |= {"seq_length", "normalization", "add_bias_linear", "add_qkv_bias"}
    model = {name: getattr(parallel_samples.ARGUMENTS, name) for name in names} | {
        "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider",
        "gated_linear_unit": True,
        "layernorm_epsilon": 1e-5,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "share_embeddings_and_output_weights": True,
    }
    (source / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    convert(source, root / "made", "nemo2", tokenizer=tiny)
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
def test_ranks_that_do_not_fit_are_damaged(ranks, root, tiny, change, words):
    change(ranks)
    with pytest.raises(DamagedCheckpoint):
        convert(ranks, root / "made", "nemo2", tokenizer=tiny)
    assert not (root / "made").exists()
    # The reader itself, for --trust.
    with pytest.raises(DamagedCheckpoint, match=words):
        readers.read(ranks)


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
    config = model_of(root / "made")["config"]
    assert (config["fp16"], config["bf16"]) == (True, False)
    assert config["params_dtype"]["_target_"] == "torch.float16"


def test_what_is_written_passes_verification(checkpoint, root, capsys):
    convert(checkpoint, root / "made", "nemo1")
    convert(checkpoint, root / "made.nemo", "nemo1")
    convert(root / "made.nemo", root / "back", "nemo2")
    for target in ("made", "made.nemo", "back"):
        assert main(["verify", str(root / target), "--deep"]) == 0, capsys.readouterr()


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
    mine, content = root / "mine.model", written.getvalue()
    mine.write_bytes(content)
    convert(checkpoint, root / "made.nemo", "nemo1", tokenizer=mine)
    described = nemo_archive.read_config(root / "made.nemo")["tokenizer"]
    named = described["library"], described["model"]
    assert named == ("sentencepiece", "nemo:tokenizer.model")
    assert nemo_archive.read_member(root / "made.nemo", "tokenizer.model") == content
    mine.unlink()
    convert(root / "made.nemo", root / "back", "nemo2")
    described = model_of(root / "back")["tokenizer"]
    assert described["_target_"].endswith("SentencePieceTokenizer")
    assert (root / "back" / "context" / described["model_path"]).read_bytes() == content
    convert(root / "back", root / "again", "nemo1")
    described = read_yaml(root / "again" / "model_config.yaml")["tokenizer"]
    assert Path(described["model"]).read_bytes() == content


def test_only_the_tokenizer_comes_along(megatron, root, tiny):
    convert(megatron / "iter", root / "made", "nemo2", tokenizer=tiny)
    there = {file.name for file in (root / "made" / "context" / "nemo_tokenizer").iterdir()}
    assert there == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def test_a_given_tokenizer_replaces_a_missing_one(checkpoint, root, tiny):
    shutil.rmtree(checkpoint / "context" / "nemo_tokenizer")
    with pytest.raises(DamagedCheckpoint, match="tokenizer"):
        convert(checkpoint, root / "made", "nemo1", trust=True)
    convert(checkpoint, root / "made", "nemo2", tokenizer=tiny, trust=True)
    copied = root / "made" / "context" / "nemo_tokenizer" / "tokenizer.json"
    assert copied.read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert weights(root / "made") == weights(checkpoint)


NONE = "has no tokenizer that can be taken along.*--tokenizer"


@pytest.mark.parametrize(
    "library, kind, model, words",
    [
        ("huggingface", "meta/L", None, "names its tokenizer 'meta/L', which is not here"),
        ("huggingface", "/gone/tokenizer", None, "which is not here.*--tokenizer DIR"),
        ("megatron", "GPT2BPETokenizer", None, NONE),
        ("sentencepiece", None, "nemo:gone.model", NONE),
        (None, None, None, NONE),
    ],
)
def test_a_tokenizer_that_is_not_here_is_asked_for(ranks, root, library, kind, model, words):
    described = {"library": library, "type": kind, "model": model}
    _change(ranks, tokenizer=described if library else None)
    for dry_run in (True, False):
        with pytest.raises(UnsupportedCheckpoint, match=words):
            convert(ranks, root / "made", "nemo2", dry_run=dry_run)
    assert not (root / "made").exists()


def test_a_tokenizer_outside_the_checkpoint_is_not_read(ranks, root):
    with pytest.raises(NotACheckpoint, match="is no tokenizer"):
        convert(ranks, root / "made", "nemo2", tokenizer=root)
    _change(ranks, tokenizer={"library": "sentencepiece", "model": "nemo:../../secret.model"})
    with pytest.raises(UnsafeCheckpoint, match="outside the checkpoint"):
        convert(ranks, root / "made", "nemo2")


T5 = "nemo.collections.nlp.models.language_modeling.megatron_t5_model.MegatronT5Model"


@pytest.mark.parametrize(
    "field, value, error, words",
    [
        ("mcore_gpt", False, UnsupportedCheckpoint, "is False: .*convert_nemo_gpt_to_mcore"),
        ("position_embedding_type", "learned_absolute", UnsupportedCheckpoint, "only rope"),
        ("name", "megatron_falcon_gpt", UnsupportedCheckpoint, "is 'megatron_falcon_gpt'"),
        ("activation", "approx-gelu", UnsupportedCheckpoint, "is 'approx-gelu'"),
        ("activation", ["gelu"], UnsupportedCheckpoint, "gelu"),
        ("moe_token_dropping", True, UnsupportedCheckpoint, "is True"),
        ("normalization", "batchnorm", UnsupportedCheckpoint, "is 'batchnorm'"),
        ("apply_embedding_scaling", True, UnsupportedCheckpoint, "is True"),
        ("target", T5, UnsupportedCheckpoint, "only GPT models"),
        ("num_query_groups", 3, DamagedCheckpoint, "3"),
        ("hidden_size", "big", DamagedCheckpoint, "is 'big'"),
        ("num_layers", None, DamagedCheckpoint, "is missing"),
    ],
)
def test_what_a_configuration_of_nemo_1_may_not_say(field, value, error, words):
    with pytest.raises(error, match=f"model_config.yaml: .*{field} .*{words}"):
        nemo1_config.read_fields(parallel_samples.CONFIG | {field: value}, "model_config.yaml")


SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "num_query_groups": 2,
    "kv_channels": 24,
}
KINDS = [
    (family, kind)
    for family in FAMILIES.values()
    for kind in (next(iter(family.configs)), family.scaled)
    if kind
]


@pytest.mark.parametrize("family, kind", KINDS)
def test_every_family_comes_back_from_nemo_1(family, kind):
    model = {"_target_": family.models[0], "config": {"_target_": kind, **SMALL, "vocab_size": 256}}
    stated = gpt_config.read_fields(model, "model.yaml")
    config = nemo1_config.from_fields(stated, family, 256, "bfloat16", {}, "model.yaml")
    written = yaml.safe_load(yaml.safe_dump(config))
    back, same = nemo1_config.read_fields(written, "model_config.yaml")
    assert back | {"vocab_size": 256} == stated
    assert same is family
    del config["workshop"]
    known_by_its_features = nemo1_config.read_fields(config, "model_config.yaml")[1]
    assert known_by_its_features is family
    assert config["name"] == ("decoder_block_gpt" if family.name == "qwen3" else "")
    # With any other layers NeMo 1 leaves the norms out, whatever the configuration says.
    assert nemo1_config.read_fields(config | {"name": ""}, "")[0]["qk_layernorm"] is False


def test_other_formats_get_a_sentence(checkpoint, root):
    import torch

    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.4.0"}, root / "last.ckpt")
    old = Path(shutil.copytree(checkpoint, root / "old")) / "weights" / "metadata.json"
    old.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(UnsupportedCheckpoint, match="zarr is deprecated.*load and save"):
        readers.read(root / "old")
    (root / "gguf.gguf").write_bytes(b"GGUF")
    for name, error, words in (
        ("last.ckpt", UnsupportedCheckpoint, "Lightning.*megatron_ckpt_to_nemo"),
        ("gguf.gguf", (DamagedCheckpoint, UnsupportedCheckpoint), "gguf"),
        ("nothing", NotACheckpoint, "does not exist"),
    ):
        with pytest.raises(error, match=words):
            convert(root / name, root / "made", "nemo2")
    with pytest.raises(NotACheckpoint):
        convert(root, root.parent / "made", "nemo1")
    (checkpoint / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/base"}')
    with pytest.raises((UnsupportedCheckpoint, DamagedCheckpoint), match="adapter"):
        convert(checkpoint, root / "made", "nemo1")
    assert not (root / "made").exists()


def test_nothing_is_overwritten_unless_asked(checkpoint, root):
    mine = root / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="is no checkpoint"):
            convert(checkpoint, mine, "nemo1", overwrite=overwrite)
    (mine / "notes.txt").rename(root / "notes.txt")
    convert(checkpoint, mine, "nemo1")
    common = mine / "model_weights" / "common.pt"
    common.unlink()
    with pytest.raises(OutputExists, match="--overwrite"):
        convert(checkpoint, mine, "nemo1")
    for inside in (checkpoint, checkpoint / "made", root):
        with pytest.raises(OutputExists, match="cannot lie inside"):
            convert(checkpoint, inside, "nemo1", overwrite=True)
    convert(checkpoint, mine, "nemo1", overwrite=True)
    assert common.exists()
    with pytest.raises(UnsupportedCheckpoint, match="a .nemo archive is NeMo 1"):
        convert(mine, root / "x.nemo", "nemo2")
    with pytest.raises(UnsupportedCheckpoint, match="is a NeMo 1 checkpoint already"):
        convert(mine, root / "again", "nemo1")
    before = weights(checkpoint)
    with pytest.raises(OutputExists, match="holds the weights that mine only links to"):
        convert(mine, checkpoint, "nemo2", overwrite=True)
    assert weights(checkpoint) == before


def test_relative_paths(checkpoint, root, monkeypatch):
    monkeypatch.chdir(root)
    for target in ("made", "made.nemo"):
        convert(checkpoint.name, target, "nemo1")
    configs = read_yaml(root / "made/model_config.yaml"), nemo_archive.read_config("made.nemo")
    for config in configs:
        tokenizer = Path(config["tokenizer"]["type"])
        assert tokenizer.is_absolute() and tokenizer.is_dir()
    shutil.rmtree(checkpoint.name)
    convert("made.nemo", "back", "nemo2")
    assert (root / "back" / "context" / "nemo_tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("target", ["made", "made.nemo"])
def test_an_interrupted_conversion_leaves_what_was_there(checkpoint, root, monkeypatch, target):
    convert(checkpoint, root / target, "nemo1")
    before = weights(root / target)
    there = sorted(root.iterdir())

    def interrupted(*_):
        raise KeyboardInterrupt

    writer = "workshop_utils.checkpoints.formats.torch_dist_writer.write_index"
    monkeypatch.setattr(writer, interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, root / target, "nemo1", overwrite=True)
    assert sorted(root.iterdir()) == there
    assert weights(root / target) == before


def test_the_command(checkpoint, root, capsys):
    command = ["convert", str(checkpoint), str(root / "made"), "--to", "nemo1"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would write: made" in said and "family llama: 2 layers" in said
    assert not (root / "made").exists()
    assert main(command) == 0
    assert "written: made" in capsys.readouterr().out
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    # The source is verified first.
    shard = checkpoint / "weights" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    assert main([*command, "--overwrite"]) == 1
    assert "__0_0.distcp" in capsys.readouterr().err


def test_nothing_is_put_together_on_disk_before_an_archive(megatron, root, tiny, monkeypatch):
    """Layers of four ranks go into the tar one by one; other readers of tars agree with what was
    written."""
    seen = []
    original = weights_module.write

    def write(source, written, dtype):
        entries = original(source, written, dtype)
        files = (file for file in root.rglob("*") if file.is_file() and file.suffix != ".partial")
        seen.append(sum(file.stat().st_size for file in files))
        return entries

    monkeypatch.setattr(weights_module, "write", write)
    options = {"tokenizer": tiny, "dtype": "bfloat16", "trust": True}
    convert(megatron / "lm", root / "made.nemo", "nemo1", **options)
    assert seen == [0]
    with tarfile.open(root / "made.nemo") as archive:
        names = archive.getnames()
        archive.extractall(root / "out")
    members = nemo_archive.members(root / "made.nemo")
    assert sorted(names) == sorted(f"./{member.name}" for member in members)
    assert weights(root / "out") == weights(root / "made.nemo")
