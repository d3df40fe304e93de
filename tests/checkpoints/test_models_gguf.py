"""The directory that a GGUF becomes: weights, tokenizer, stop token, padding."""

import json

import numpy as np
import pytest
from tiny_gguf import GROUPS, HEADS, HIDDEN, TEMPLATE, write_gguf

PROMPTS = ("What is the capital of France?", "Hi")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny GGUF's tensors and the directory made from it."""
    from workshop_utils.checkpoints.sources import gguf

    folder = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(folder / "tiny.gguf")
    (folder / "hf").mkdir()
    gguf.convert(folder / "tiny.gguf", folder / "hf", "tiny", progress=False)
    return tensors, folder / "hf"


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny[1])


@pytest.fixture(scope="module")
def embedded():
    """The directory of the workshop's own model, fetched when it is not here."""
    from workshop_utils.checkpoints.sources import fetch

    return fetch("smollm2-135m-instruct", progress=False)


def test_weights_are_the_ggufs(tiny):
    from safetensors.numpy import load_file

    tensors, directory = tiny
    weights = load_file(directory / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {np.dtype("float32")}
    assert "lm_head.weight" not in weights, "the output is tied to the embedding, as in the GGUF"
    np.testing.assert_array_equal(
        weights["model.embed_tokens.weight"], tensors["token_embd.weight"]
    )
    np.testing.assert_array_equal(
        weights["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"]
    )
    # llama.cpp keeps the two halves of each rotary pair side by side, Hugging Face keeps them half
    # a head apart.
    for name, heads in (("q", HEADS), ("k", GROUPS)):
        stored = tensors[f"blk.0.attn_{name}.weight"]
        expected = stored.reshape(heads, -1, 2, HIDDEN).swapaxes(1, 2).reshape(stored.shape)
        np.testing.assert_array_equal(
            weights[f"model.layers.0.self_attn.{name}_proj.weight"], expected
        )


def test_configuration(tiny):
    directory = tiny[1]
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert config["torch_dtype"] == "float32"
    assert config["rms_norm_eps"] == 1e-5
    assert not {"_model_name_or_path", "_attn_implementation_autoset"} & set(config)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hi hi", ["hi", "Ġhi"]),
        ("hi 12", ["hi", "Ġ", "1", "2"]),
        ("hi  5", ["hi", "ĠĠ", "5"]),
        ("hi\n\n5", ["hi", "ĊĊ", "5"]),
        ("<|im_start|>hi<|im_end|>\n", ["<|im_start|>", "hi", "<|im_end|>", "Ċ"]),
    ],
)
def test_text_is_split_as_the_model_learned_it(tokenizer, text, pieces):
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == text


def test_tokenizer_settings(tiny, tokenizer):
    from transformers import AutoTokenizer

    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    batch = tokenizer(["hi", "hi hi hi"], padding=True)
    assert batch.input_ids[0][:2] == [tokenizer.pad_token_id] * 2, "padded on the left"
    assert set(batch) == {"input_ids", "attention_mask"}, "only what a Llama takes"
    assert (
        AutoTokenizer.from_pretrained(tiny[1], use_fast=False)("hi").input_ids
        == tokenizer("hi").input_ids
    )


@pytest.mark.slow
def test_the_embedded_model_answers_and_stops_in_a_batch(embedded):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded)
    model = AutoModelForCausalLM.from_pretrained(embedded)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)

    def answer(texts: list[str]) -> list[list[int]]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        return [row[inputs.input_ids.shape[1] :].tolist() for row in made]

    together = answer(rendered)
    assert (
        tokenizer.decode(together[0], skip_special_tokens=True) == "The capital of France is Paris."
    )
    assert 2 in together[0], "the turn ends with <|im_end|>"
    for text, row in zip(rendered, together, strict=False):
        alone = answer([text])[0]
        assert row[: len(alone)] == alone, "padding changes no answer"
        assert set(row[len(alone) :]) <= {tokenizer.pad_token_id}


@pytest.mark.slow
def test_the_embedded_directory_is_clean(embedded):
    names = {file.name for file in embedded.iterdir()}
    assert names - {"chat_template.jinja"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in embedded.iterdir()) < 545e6
