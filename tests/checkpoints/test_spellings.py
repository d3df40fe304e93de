"""``config.json`` and tokenizer files as transformers 4 and 5 write them, against the installed
transformers; broken ones are a sentence in every command."""

import importlib
import inspect
import json
import shutil

import pytest

from workshop_utils.checkpoints.convert import convert, tokenizers
from workshop_utils.checkpoints.convert.huggingface import check
from workshop_utils.checkpoints.formats import gpt_config, huggingface_config
from workshop_utils.checkpoints.formats.findings import Severity
from workshop_utils.checkpoints.formats.huggingface_config import DEFAULTS, readable, spelled
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.checkpoints.verify.loads_in import NEMO2, loads_in
from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.cli import main
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.inference.generate import load, prompt_ids
from workshop_utils.runtime.processes import run_quietly

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
NO_ROPE = {"rope_theta": "absent", "rope_scaling": "absent"}
TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture
def model(tiny, root):
    """Copies of the tiny model: ``model(config={...}, tokenizer={...}, files={name: bytes})``; None
    takes a field, or a file, away."""

    def make(config=(), tokenizer=(), files=(), name="hf"):
        path = shutil.copytree(tiny, root / name)
        for file, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            content = json.loads((path / file).read_text()) | dict(changes)
            content = {key: value for key, value in content.items() if value != "absent"}
            (path / file).write_text(json.dumps(content))
        for file, content in dict(files).items():
            (path / file).unlink(missing_ok=True)
            (path / file).parent.mkdir(exist_ok=True)
            if content is not None:
                (path / file).write_bytes(content)
        return path

    return make


def logits(path):
    model, tokenizer = load(path)
    ids = prompt_ids(tokenizer, TURNS) * 20
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        (
            {"rope_theta": 500.0, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "dtype": "float32"},
        ),
        (
            {"rope_theta": 500.0, "rope_scaling": YARN},
            {"rope_parameters": YARN | {"rope_theta": 500.0}},
        ),
        (
            {"rope_theta": 500.0},
            {"rope_parameters": {"full_attention": {"rope_theta": 500.0, "rope_type": "default"}}},
        ),
    ],
)
def test_both_spellings_of_rope_compute_the_same(model, old, new):
    absent = NO_ROPE | {"torch_dtype": "absent"}
    first, second = model(old, name="old"), model(absent | new, name="new")
    plain = model(name="plain")
    assert (logits(first) == logits(second)).all()
    assert not (logits(plain) == logits(second)).all()
    sizes = identify(second).architecture
    assert sizes == identify(first).architecture
    assert sizes.rope_base == 500.0


def test_the_defaults_are_those_of_the_installed_transformers():
    for kind, ours in DEFAULTS.items():
        module = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
        cls = getattr(module, f"{kind.capitalize()}Config")
        theirs = inspect.signature(cls.__init__).parameters
        theirs = {name: each.default for name, each in theirs.items() if name != "self"}
        assert {name: theirs.get(name) for name in ours} == ours, kind
        unseen = {*theirs} - {*ours, *huggingface_config.CHANGES_NOTHING, "kwargs"}
        assert not unseen, kind  # a field of the next release: does a result depend on it?


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_configuration_leaves_out(kind):
    assert huggingface_config.with_defaults({"model_type": kind})["vocab_size"] > 1
    assert spelled({"model_type": kind}, "config.json") == {"model_type": kind}


REFUSED = [
    ("llama", {"rope_parameters": YARN}, "rope_parameters.rope_type is"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type is "linear"'),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq with 4 bits"),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "says bitsandbytes"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true"),
    ("qwen3", {"rope_parameters": LLAMA3}, "rope_parameters is"),
    ("mistral", {"sliding_window": "absent"}, "sliding_window is 4096"),
    ("mixtral", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
]


@pytest.mark.parametrize("kind, config, said", REFUSED)
def test_what_the_importer_would_pass_over_is_refused(tmp_path, kind, config, said):
    config = {name: value for name, value in config.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | config))
    with pytest.raises(UnsupportedCheckpoint, match=said):
        check(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"rope_parameters": YARN, **NO_ROPE}, {"quantization_config": {"quant_method": "awq"}}],
)
def test_every_command_says_the_same(model, config, root):
    path = model({**config})
    refused = [item for item in huggingface_config.findings(path) if item.severity == "refused"]
    message = refused[0].message
    with pytest.raises(UnsupportedCheckpoint) as raised:
        convert(path, root / "out", "nemo2", dry_run=True)
    assert str(raised.value) == message
    assert {reader.name: reader.how for reader in loads_in(identify(path))}[NEMO2] == message
    report = verify(path)
    assert report.sound and message in [note.message for note in report.notes]


def test_an_unknown_field_is_said_everywhere(model, root):
    path = model({"logits_scaling": 8.0})
    (finding,) = huggingface_config.findings(path)
    assert finding.severity is Severity.NOT_KNOWN and "logits_scaling is 8.0" in finding.message
    assert finding in verify(path).not_known
    notes = convert(path, root / "out", "nemo2", dry_run=True).notes
    assert any(finding.message in note for note in notes)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"rope_theta": "10000"}, "rope_theta is"),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"hidden_size": True}, "hidden_size is true"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type is null"),
        ({"rope_parameters": "yarn"}, "rope_parameters is"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, "Only one can be right"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"torch_dtype": "float99"}, "float99"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is"),
    ],
)
def test_a_field_of_another_type(model, root, capsys, config, said):
    path = model(config)
    with pytest.raises(DamagedCheckpoint, match=said):
        load(path)
    for words in (["inspect"], ["verify"], ["import", "--out", str(root / "out")]):
        command, *options = words
        assert main([command, str(path), *options]) != 0
        assert said in "".join(capsys.readouterr())


def test_rope_that_differs_by_layer(model):
    each = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}
    path = model({"rope_parameters": each})
    with pytest.raises(UnsupportedCheckpoint, match="differs between"):
        load(path)
    assert verify(path).sound


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_end|>"]},
        {"extra_special_tokens": ["<|im_start|>"], "model_specific_special_tokens": {}},
    ],
)
def test_a_tokenizer_of_transformers_5(model, tiny, changes):
    tokenizer = huggingface_config.load_tokenizer(model(tokenizer=changes))
    ids = tokenizer("<|im_start|>hi<|im_end|>").input_ids
    assert ids == huggingface_config.load_tokenizer(tiny)("<|im_start|>hi<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


@pytest.mark.parametrize(
    "changes, files, said",
    [
        ({"tokenizer_class": "FancyTokenizer"}, {}, "FancyTokenizer.*PreTrainedTokenizerFast"),
        ({}, {"tokenizer.json": None}, r"copy tokenizer\.json, which is missing"),
        ({}, {"tokenizer.json": None, "tokenizer_config.json": None}, "has no tokenizer"),
        ({"extra_special_tokens": ["a"], "additional_special_tokens": "b"}, {}, "is no list"),
    ],
)
def test_a_tokenizer_that_cannot_be_made(model, changes, files, said):
    with pytest.raises(DamagedCheckpoint, match=said):
        load(model(tokenizer=changes, files=files))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"7", '{"a": 1}'.encode("utf-16"), b"\xff\xfe"]
)
def test_a_file_that_is_no_json_object(model, root, capsys, file, content):
    path, name = model(files={file: content}), file
    for words in (
        ["inspect", str(path)] if file == "config.json" else ["verify", str(path)],
        ["convert", str(path), str(root / "out"), "--to", "nemo2", "--dry-run"],
        ["import", str(path), "--out", str(root / "out")],
        ["generate", "hello", "--model", str(path)],
    ):
        assert main(words) != 0, words
        assert name in "".join(capsys.readouterr()), words
    assert not (root / "out").exists()


def test_a_mark_in_front_is_passed_over(model):
    path = model()
    for name in ("config.json", "tokenizer_config.json"):
        (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    assert verify(path).sound
    load(path)


def test_a_directory_in_place_of_a_file(model):
    path = model(files={"tokenizer.json": None})
    (path / "tokenizer.json").mkdir()
    assert any("tokenizer.json is no file" in item.message for item in verify(path).refused)


def test_a_model_as_it_is_needs_no_copy(tiny):
    with readable(tiny) as place:
        assert place == tiny


def test_a_tokenizer_is_copied_in_the_spelling_that_is_read(model, root):
    from transformers import AutoTokenizer

    path = model(tokenizer={"tokenizer_class": "TokenizersBackend"})
    (path / "chat_template.jinja").write_text("x")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("y")
    tokenizers.copy(tokenizers.given(path), root / "copy")
    copied = AutoTokenizer.from_pretrained(root / "copy")
    assert copied.chat_template == {"default": "x", "rag": "y"}
    assert huggingface_config.load_tokenizer(path).chat_template == copied.chat_template


@pytest.mark.slow
def test_the_importer_gets_what_is_meant(model, root):
    path = model(
        NO_ROPE
        | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "torch_dtype": "absent"}
        | {"dtype": "float32"},
        {"tokenizer_class": "TokenizersBackend"},
        {"generation_config.json": None},
    )
    run_quietly("import", str(path), "--out", str(root / "out"))
    model_yaml = root / "out" / "context" / "model.yaml"
    fields = gpt_config.read_fields(read_yaml(model_yaml), "model.yaml")
    expected = {"rotary_base": 500.0, "scale_factor": 8.0, "old_context_len": 64}
    assert {name: fields[name] for name in expected} == expected
    assert verify(root / "out").sound


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "name, value, words",
    [
        ("eos_token_id", "2", "a token's number, or a list of them"),
        ("eos_token_id", [2, "3"], "a token's number, or a list of them"),
        ("bos_token_id", [1], "a token's number"),
        ("pad_token_id", 1e300, "a token's number"),
        ("transformers_version", 4.51, "no version"),
        ("transformers_version", "", "no version"),
    ],
)
def test_what_transformers_would_break_at_while_it_generates(model, file, name, value, words):
    place = model()
    stated = place / file
    fields = json.loads(stated.read_text()) if stated.is_file() else {}
    stated.write_text(json.dumps(fields | {name: value}))
    with pytest.raises(DamagedCheckpoint, match=f"{file}: {name} is .*{words}"), readable(place):
        pass
