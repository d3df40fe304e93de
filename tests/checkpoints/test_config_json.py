"""``config.json`` and ``tokenizer_config.json`` in the spellings of transformers 4 and 5, and what
NeMo's importers would leave out of account."""

import json
import shutil

import pytest
from tiny_model import make_tiny_model

from workshop_utils.checkpoints.convert.huggingface import check
from workshop_utils.checkpoints.formats import config_json
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.verify.loads_in import loads_in
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError, NotACheckpoint, UnsupportedCheckpoint

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TURNS = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder)
    return folder


@pytest.fixture
def model(tiny, tmp_path, monkeypatch):
    """A function of the fields of config.json and of tokenizer_config.json: a model with these."""
    monkeypatch.chdir(tmp_path)

    def make(tokenizer=None, without=(), **fields):
        folder = shutil.copytree(tiny, tmp_path / "m", dirs_exist_ok=True)
        for name, more in (("config.json", fields), ("tokenizer_config.json", tokenizer or {})):
            written = json.loads((tiny / name).read_text())
            kept = {key: value for key, value in written.items() if key not in without}
            (folder / name).write_text(json.dumps(kept | more))
        return folder

    return make


def test_the_fields_are_those_of_the_installed_transformers():
    import inspect

    import transformers as its

    classes = (its.LlamaConfig, its.MistralConfig, its.MixtralConfig, its.Qwen2Config)
    classes += its.Qwen3Config, its.NemotronConfig
    parameters = [inspect.signature(each.__init__).parameters for each in classes]
    fields = {name for each in parameters for name in each} - {"self", "kwargs"}
    assert fields == config_json.OF_MODELS
    assert set(its.PretrainedConfig().to_dict()) <= config_json.OF_ALL | fields


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, LLAMA_3], ids=["default", "llama3"])
@pytest.mark.parametrize("nested", [False, True])
def test_rope_parameters_of_transformers_5(model, scaling, nested):
    rope = scaling | {"rope_theta": 500_000.0}
    rope = {"full_attention": rope} if nested else rope
    drop = ("rope_theta", "rope_scaling", "torch_dtype")
    folder = model(without=drop, rope_parameters=rope, dtype="bfloat16")
    shape = identify(folder).architecture
    assert shape.rope_base == 500_000
    assert bool(shape.rope_scaling) == (scaling is LLAMA_3)
    assert config_json.read(folder)["torch_dtype"] == "bfloat16"
    from transformers import AutoConfig

    with config_json.readable(folder) as readable:
        config = AutoConfig.from_pretrained(readable)
    assert config.rope_theta == 500_000 and str(config.torch_dtype) == "torch.bfloat16"
    check(folder)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (
            {"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
            "kind of layer",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
    ],
)
def test_what_an_importer_leaves_out_is_refused_and_not_offered(model, fields, word):
    folder = model(**fields)
    with pytest.raises(UnsupportedCheckpoint, match=word):
        check(folder)
    answers = {reader.name: reader for reader in loads_in(identify(folder))}
    assert answers["NeMo 2.0 API"].answer == "no" and word in answers["NeMo 2.0 API"].how
    assert answers["transformers"].answer == "yes"


def test_fields_that_nobody_looks_at_are_named(model):
    (note,) = identify(model(logit_scale=2.0, use_cache=False)).notes
    assert note.endswith("anything here: logit_scale")


def test_tokenizers_that_transformers_5_wrote(model):
    folder = model(
        tokenizer={"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]}
    )
    tokenizer = config_json.load_tokenizer(folder)
    assert tokenizer.additional_special_tokens == ["<x>"]
    assert tokenizer("Hi").input_ids == ChatTokenizer(folder).encode("Hi")


@pytest.mark.parametrize(
    "fields", [{"tokenizer_class": "NoSuchTokenizer"}, {"eos_token": ["a", 1]}, {"pad_token": 7}]
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(model, fields):
    folder = model(tokenizer=fields)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(NotACheckpoint, match=r"tokenizer_config\.json: the installed transformers"):
        config_json.load_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{%- for m in messages -%}{% if loop.index > 9 %}{% break %}{% endif %}{{ m | tojson }}"
        "{%- endfor %}{{ bos_token }}",
        [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "tool_use", "template": "none"},
        ],
    ],
)
def test_a_template_renders_as_transformers_does(model, template):
    folder = model(tokenizer={"chat_template": template})
    tokenizer = config_json.load_tokenizer(folder)
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert ChatTokenizer(folder).render(TURNS, add_generation_prompt=False) == expected


def test_templates_without_a_default(model):
    folder = model(tokenizer={"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(DataError, match="rag and none that is called default"):
        ChatTokenizer(folder)
