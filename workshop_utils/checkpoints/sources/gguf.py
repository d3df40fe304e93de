"""Turn a GGUF file of a Llama-family model into a Hugging Face directory that is usable as it is.

``transformers`` dequantises the weights. The tokenizer is built here from the GGUF's own fields,
because the one that transformers 4.51 derives from a GGUF of this family is wrong in four ways: its
end token is the *start* token, it adds a start token to every text although the file says not to,
it keeps runs of spaces before digits together, and saving it writes the whole GGUF again as
``tokenizer.model``.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from workshop_utils.core.errors import FetchError
from workshop_utils.core.progress import progress_bar

PAD_TOKEN = "<|endoftext|>"
CONTROL = 3  # token_type of a special token, GGUF's `tokenizer.ggml.token_type`


def convert(gguf_file: Path, target: Path, name: str, progress: bool = True) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer's
    three files to ``target``.

    ``name`` is a neutral name for the config. The end token is the one that ends a turn of the chat
    template, and the pad token is another one, so that padding is never taken for an end. Raises
    FetchError for a GGUF whose tokenizer is not the byte-level BPE of the SmolLM family.
    """
    fields = _fields(gguf_file)
    with _quiet(progress):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        tokenizer = _tokenizer(gguf_file, fields)
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, torch_dtype=torch.float32
        )
        model.config = _config(model.config, tokenizer, name)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(target, max_shard_size="100GB")
        tokenizer.save_pretrained(target)
    _name_fast_class(target / "tokenizer_config.json")


def _fields(gguf_file: Path) -> dict:
    """The GGUF's metadata: its key/value pairs as Python values."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    return {key: field.contents() for key, field in reader.fields.items()}


def _tokenizer(gguf_file: Path, fields: dict):
    """Byte-level BPE as llama.cpp runs it for ``tokenizer.ggml.pre = smollm``: every digit is a
    token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise FetchError(
            f"{gguf_file.name}: its tokenizer is {kind}; only ('gpt2', 'smollm') can be converted"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    bpe = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token=unknown)
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    special = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=False)
        if kind == CONTROL
    ]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=unknown,
        pad_token=PAD_TOKEN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # a Llama has no token types
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
    )


def _config(loaded, tokenizer, name: str):
    """``loaded`` with the tokenizer's ids and without what only describes the GGUF."""
    values = loaded.to_dict()
    for leftover in (
        "_model_name_or_path",
        "_attn_implementation_autoset",
        "unk_token_id",
        "torch_dtype",
    ):
        values.pop(leftover, None)
    values["rms_norm_eps"] = float(
        f"{values['rms_norm_eps']:.6g}"
    )  # a float32 in the file: 9.99999975e-06 stands for 1e-05
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[key] = getattr(tokenizer, key)
    config = type(loaded)(**values, torch_dtype="float32")
    config._name_or_path = name
    return config


def _name_fast_class(tokenizer_config: Path) -> None:
    """transformers 4.51 saves the class without "Fast", a base class that cannot load anything when
    use_fast is off."""
    values = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_config.write_text(
        json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep the remarks of torch and transformers off the screen, and the progress bar unless
    ``progress``. Errors pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
        from transformers import modeling_gguf_pytorch_utils as reader
        from transformers.utils import logging as transformers_logging

        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        # The reader's bar has no switch of its own and calls itself "Converting and de-quantizing
        # GGUF tensors...".
        reader.tqdm = lambda tensors, desc: progress_bar(
            tensors, progress, desc="dequantising", unit="tensor"
        )
        try:
            yield
        finally:
            reader.tqdm = tqdm
            transformers_logging.set_verbosity(verbosity)
