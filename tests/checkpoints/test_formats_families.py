"""The architecture of every family, from the Hugging Face directory that transformers writes and
from what NeMo makes of it."""

import subprocess
import sys

import pytest
import tiny_families
import yaml
from tiny_model import make_tiny_model

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
    return {
        family: tiny_families.make_tiny_family(directory / family, family) for family in EXPECTED
    }


def told(sizes) -> tuple:
    return sizes.family, sizes.head_dim, sizes.tied, sizes.experts, sizes.qk_norm


@pytest.mark.parametrize("family", EXPECTED)
def test_hugging_face(models, family):
    found = identify(models[family])
    assert told(found.architecture) == EXPECTED[family]
    assert (found.architecture.layers, found.architecture.hidden, found.architecture.groups) == (
        2,
        64,
        2,
    )
    assert found.version.startswith("transformers 4.")
    assert found.tokenizer == "PreTrainedTokenizer, 259 tokens"


def test_a_tied_model_whose_configuration_does_not_say_so(models, tmp_path):
    """transformers leaves the field out where it is the default of the class (Gemma: tied)."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    GemmaForCausalLM(config).save_pretrained(tmp_path)
    found = identify(tmp_path).architecture
    assert (found.family, found.tied) == ("gemma", True)


def test_other_nemo2_families_without_an_entry_in_our_tables(originals, tmp_path):
    """model.yaml of a class that cannot be converted here is described as it stands."""
    import shutil

    directory = shutil.copytree(originals / "plain", tmp_path / "gemma")
    file = directory / "context" / "model.yaml"
    model = yaml.safe_load(file.read_text())
    model["_target_"] = "nemo.collections.llm.gpt.model.gemma.GemmaModel"
    model["config"]["_target_"] = "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B"
    file.write_text(yaml.safe_dump(model))
    found = identify(directory)
    assert (found.architecture.family, found.architecture.layers, found.architecture.tied) == (
        "GemmaModel",
        2,
        True,
    )
    assert any("families that are supported" in note for note in found.notes)
    model["_target_"] = "os.system"
    file.write_text(yaml.safe_dump(model))
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        identify(directory)


@pytest.mark.parametrize(
    ("features", "family"),
    [
        ({"activation": "fast-swiglu", "normalization": "rmsnorm"}, "Llama"),
        ({"swiglu": True, "normalization": "RMSNorm"}, "Llama"),
        ({"activation": "fast-swiglu", "normalization": "rmsnorm", "qkv_bias": True}, "Qwen2"),
        ({"swiglu": True, "normalization": "RMSNorm", "qk_layernorm": True}, "Qwen3"),
        ({"swiglu": True, "normalization": "RMSNorm", "num_moe_experts": 8}, "Mixtral"),
        ({"activation": "squared-relu", "normalization": "layernorm1p"}, "Nemotron"),
        ({"activation": "gelu", "normalization": "layernorm"}, None),
    ],
)
def test_a_format_that_names_no_family(features, family):
    config = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2} | features
    assert decoder_config.named(decoder_config.megatron_core(config), None, config).family == family


def test_the_vocabulary_of_sentencepiece(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(
            f"the {word} of {number}"
            for number in range(50)
            for word in ("train", "model", "adapter", "weights")
        )
    )
    make_tiny_model(tmp_path / "hf")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "hf" / "tokenizer"),
        vocab_size=30,
        minloglevel=2,
    )
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert identify(tmp_path / "hf").tokenizer.endswith(", 30 tokens")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"\xff" * 100)
    assert "tokens" not in identify(tmp_path / "hf").tokenizer


@pytest.mark.slow
def test_nemo2_after_its_own_importers(models, tmp_path):
    families = ("mixtral", "qwen3", "nemotron")
    code = (
        "import sys; from workshop_utils.checkpoints.convert.huggingface import "
        "import_checkpoint\nif __name__ == '__main__':\n    for source, target in "
        "zip(sys.argv[1::2], sys.argv[2::2]): import_checkpoint(source, target)\n"
    )
    script = tmp_path / "importing.py"
    script.write_text(code)
    places = [str(path) for family in families for path in (models[family], tmp_path / family)]
    done = subprocess.run(
        [sys.executable, script, *places], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for family in families:
        found, source = identify(tmp_path / family), identify(models[family])
        assert told(found.architecture) == EXPECTED[family]
        assert (found.architecture.ffn, found.architecture.rope_base) == (
            source.architecture.ffn,
            source.architecture.rope_base,
        )
        assert found.parameters == source.parameters
