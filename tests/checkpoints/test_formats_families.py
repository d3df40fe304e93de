"""The architecture of every family, from the Hugging Face directory that transformers writes and
from what NeMo makes of it."""

import shutil

import checkpoint_samples
import pytest
import tiny_families
import yaml

from workshop_utils.checkpoints.formats import decoder_config
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import UnsafeCheckpoint

EXPECTED = {
    # family: name, head_dim, tied, experts, QK norm
    "llama2": ("Llama", 16, False, None, False),
    "llama31": ("Llama", 16, True, None, False),
    "mistral": ("Mistral", 24, False, None, False),
    "mixtral": ("Mixtral", 16, False, 4, False),
    "qwen25": ("Qwen2", 16, True, None, False),
    "qwen3": ("Qwen3", 24, False, None, True),
    "nemotron": ("Nemotron", 16, False, None, False),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("families")
    return {name: tiny_families.make_tiny_family(directory / name, name) for name in EXPECTED}


def told(sizes) -> tuple:
    return sizes.family, sizes.head_dim, sizes.tied, sizes.experts, sizes.qk_norm


@pytest.mark.parametrize("family", EXPECTED)
def test_hugging_face(models, family):
    checkpoint = identify(models[family])
    sizes = checkpoint.architecture
    assert told(sizes) == EXPECTED[family]
    assert (sizes.layers, sizes.hidden, sizes.groups) == (2, 64, 2)
    assert checkpoint.version.startswith("transformers 4.")
    assert checkpoint.tokenizer == "PreTrainedTokenizer, 259 tokens"


def test_a_tied_model_whose_configuration_does_not_say_so(tmp_path):
    """transformers leaves the field out where it is the default of the class (Gemma: tied)."""
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    GemmaForCausalLM(GemmaConfig(**sizes, **counts)).save_pretrained(tmp_path)
    architecture = identify(tmp_path).architecture
    assert (architecture.family, architecture.tied) == ("gemma", True)


def test_other_nemo2_families_without_an_entry_in_our_tables(originals, tmp_path):
    """model.yaml of a class that cannot be converted here is described as it stands."""
    directory = shutil.copytree(originals / "plain", tmp_path / "gemma")
    file = directory / "context" / "model.yaml"
    model = yaml.safe_load(file.read_text())
    model["_target_"] = "nemo.collections.llm.gpt.model.gemma.GemmaModel"
    model["config"]["_target_"] = "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"
    file.write_text(yaml.safe_dump(model))
    checkpoint = identify(directory)
    sizes = checkpoint.architecture
    assert (sizes.family, sizes.layers, sizes.tied) == ("GemmaModel", 2, True)
    assert any("families that are supported" in note for note in checkpoint.notes)
    file.write_text(yaml.safe_dump(model | {"_target_": "os.system"}))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        identify(directory)


SWIGLU = {"swiglu": True, "normalization": "RMSNorm"}
NEMO1 = {"activation": "fast-swiglu", "normalization": "rmsnorm"}


@pytest.mark.parametrize(
    ("features", "family"),
    [
        (NEMO1, "Llama"),
        (SWIGLU, "Llama"),
        (NEMO1 | {"qkv_bias": True}, "Qwen2"),
        (SWIGLU | {"qk_layernorm": True}, "Qwen3"),
        (SWIGLU | {"num_moe_experts": 8}, "Mixtral"),
        ({"activation": "squared-relu", "normalization": "layernorm1p"}, "Nemotron"),
        ({"activation": "gelu", "normalization": "layernorm"}, None),
    ],
)
def test_a_format_that_names_no_family(features, family):
    config = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2} | features
    assert decoder_config.megatron_core(config).family == family


def test_the_vocabulary_of_sentencepiece(tiny, tmp_path):
    import sentencepiece

    words = ("train", "model", "adapter", "weights")
    lines = [f"the {word} of {number}" for number in range(50) for word in words]
    path = shutil.copytree(tiny, tmp_path / "hf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path / "tokenizer"),
        vocab_size=30,
        minloglevel=2,
    )
    (path / "tokenizer.json").unlink()
    assert identify(path).tokenizer.endswith(", 30 tokens")
    (path / "tokenizer.model").write_bytes(b"\xff" * 100)
    assert "tokens" not in identify(path).tokenizer


IMPORT = """
import sys
from workshop_utils.checkpoints.convert.huggingface import import_checkpoint
if __name__ == "__main__":
    for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
        import_checkpoint(source, target)
"""


@pytest.mark.slow
def test_nemo2_after_its_own_importers(models, tmp_path):
    families = ("mixtral", "qwen3", "nemotron")
    (tmp_path / "importing.py").write_text(IMPORT)
    places = [path for family in families for path in (models[family], tmp_path / family)]
    checkpoint_samples.run(tmp_path / "importing.py", *places)
    for family in families:
        imported, source = identify(tmp_path / family), identify(models[family])
        sizes, own = imported.architecture, source.architecture
        assert told(sizes) == EXPECTED[family]
        assert (sizes.ffn, sizes.rope_base) == (own.ffn, own.rope_base)
        assert imported.parameters == source.parameters
