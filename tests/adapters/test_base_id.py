"""Which id an adapter records as its base, and when two of them are one model's."""

import json

import pytest
from export_samples import GQA, config_of, tensors_of, tiny_llama, write_adapter

from workshop_utils.adapters.base_id import base_id, is_place, same_base
from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.core.errors import OutputExists

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "base, its_id",
    [
        ("org/model", "org/model"),
        ("smollm2-135m-instruct", HUB),
        ("smollm2-135m-instruct-hub", HUB),
        ("", ""),
        ("/somewhere/models/bridged/smollm2-135m-instruct", HUB),
        ("/a/b/own-llama.nemo", "own-llama"),
        ("own-llama", "own-llama"),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    ],
)
def test_the_id_of_a_base(base, its_id):
    assert base_id(base) == its_id


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("meta/llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        (HUB, "models/huggingface/smollm2-135m-instruct", True),
        (HUB, "/x/nemo2/smollm2-135m-instruct-hub", True),
        (HUB, "meta/llama-3.1-8b-instruct", False),
        (HUB, "", False),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta/llama3-8b-instruct", True),
        ("meta-llama/Llama-2-7b-chat-hf", "meta/llama2-7b-chat", True),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", True),
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "meta/llama3-8b-instruct", True),
        (
            "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit",
            "meta-llama/Llama-3.2-1B-Instruct",
            True,
        ),
        (
            "mistralai/Mistral-7B-Instruct-v0.3",
            "nvcr.io/nim/mistralai/mistral-7b-instruct-v03",
            True,
        ),
        ("meta-llama/Meta-Llama-3-8B", "meta/llama3-8b-instruct", False),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.3", False),
    ],
)
def test_two_bases(one, other, same):
    assert same_base(one, other) is same_base(other, one) is same


def test_places():
    assert all(map(is_place, ("/a", "./a", "a/b/c", "~/a", "..")))
    assert not any(map(is_place, ("org/model", "model-1.0")))


def recorded(root, base=None, **options):
    """What an export of an adapter that was trained on ``tiny-llama`` or ``base`` records."""
    config = config_of(GQA) | ({"restore_from_path": base} if base else {})
    source = write_adapter(root / "n.nemo", config, tensors_of(GQA))
    return base_in(export(source, "hf-peft", root / "out", overwrite=True, **options))


def base_in(directory):
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_what_an_export_records(tmp_path):
    assert recorded(tmp_path) == "tiny-llama"
    assert recorded(tmp_path, base_model="org/base") == "org/base"
    assert recorded(tmp_path, "/x/bridged/smollm2-135m-instruct") == HUB
    assert recorded(tmp_path, base_model="smollm2-135m-instruct") == HUB


def test_the_directory_of_a_base_does_not_replace_its_id(tmp_path):
    here, known = tmp_path / "download", tmp_path / "smollm2-135m-instruct"
    tiny_llama(GQA).save_pretrained(here)
    assert recorded(tmp_path, base_model=str(here)) == "download"
    peft = export(tmp_path / "n.nemo", "hf-peft", tmp_path / "peft", base_model="org/base")
    known.symlink_to(here)
    for directory, base in ((here, "org/base"), (known, HUB)):
        out = tmp_path / f"out-{directory.name}"
        assert export_adapter(peft, "nemo", out, base_model=str(directory)).record.base == base


def test_an_export_with_another_name_of_its_base_is_made_again(tmp_path):
    """Those that an earlier version made, with the name of the base's directory, are not in the
    way."""
    recorded(tmp_path, base_model="llama")
    for base, reused in (("org/Llama", False), ("org/Llama", True), ("llama", False)):
        done = export_adapter(tmp_path / "n.nemo", "hf-peft", tmp_path / "out", base_model=base)
        assert (done.reused, done.record.base, base_in(done.path)) == (reused, base, base)
    with pytest.raises(OutputExists, match="another adapter, or for another reader, base"):
        export(tmp_path / "n.nemo", "hf-peft", tmp_path / "out", base_model="org/other")
