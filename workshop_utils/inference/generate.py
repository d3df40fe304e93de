"""Greedy answers of a Hugging Face model, with or without a PEFT adapter, in batches.

loaded = load("models/huggingface/NAME", adapter="runs/exports/NAME/hf-peft")
generate(*loaded, [[{"role": "user", "content": "Hello"}]])    # ["Hello! How can I help?"]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.checkpoints import sources
from workshop_utils.checkpoints.formats import huggingface_config
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.sources.catalogue import chosen_model
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.chat_data import prompt_turns
from workshop_utils.core.chat_template import default_template, refusing
from workshop_utils.core.errors import NotACheckpoint
from workshop_utils.core.progress import progress_bar
from workshop_utils.runtime.device import choose_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict]
"""A conversation: ``[{"role": "user", "content": "..."}, ...]``. A last turn by the assistant is
the answer and not shown."""


def model_directory(model: Path | str | None = None) -> Path:
    """A directory, a fetched model's, or that of the settings; NotACheckpoint for others."""
    return _with_config(sources.directory(chosen_model().name if model is None else model))


def sound_model(directory: Path | str, trust: bool = False) -> Path:
    """``directory``. Raises NotACheckpoint where it is no Hugging Face model directory, and
    CheckpointError where that is unsafe or damaged; with ``trust`` the latter is only printed."""
    require_sound(_with_config(Path(directory)), trust, (Kind.HUGGINGFACE,))
    return Path(directory)


def _with_config(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise NotACheckpoint(
            f"{paths.shown(directory)} has no config.json: give the directory of a Hugging Face "
            "model."
        )
    return directory


def as_peft(adapter: Path | str, trust: bool = False) -> Path:
    """The PEFT directory of ``adapter``, verified first: itself, or the export of a ``.nemo`` (made
    on first use, then reused). CheckpointError where it is unsafe or damaged."""
    adapter = Path(adapter)
    if (adapter / "adapter_config.json").is_file():
        require_sound(adapter, trust, (Kind.PEFT,))
        return adapter
    from workshop_utils.adapters.export import export

    return export(adapter, "hf-peft", trust=trust)


def load(
    hf_model: Path | str, adapter: Path | str | None = None, trust: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready to generate, and its tokenizer, which pads on the left. fp32 on the CPU,
    bf16 on a GPU.

    Args:
        hf_model: directory of a Hugging Face model with a chat template.
        adapter: a PEFT directory, or a ``.nemo`` that is exported first.
        trust: what is found wrong with either is printed and not raised.

    Raises:
        CheckpointError: one of the two is missing, unsafe or damaged, or has no chat template.
    """
    hf_model = sound_model(hf_model, trust)
    # What is wrong with the adapter is said before anything is loaded.
    peft = None if adapter is None else as_peft(adapter, trust)
    tokenizer = huggingface_config.load_tokenizer(hf_model, padding_side="left")
    default_template(tokenizer.chat_template, paths.shown(hf_model))
    import torch

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if choose_device().kind == "gpu":
        return _read(hf_model, peft, torch.bfloat16).to("cuda"), tokenizer
    return _read(hf_model, peft, torch.float32), tokenizer


def _read(hf_model: Path, peft: Path | None, dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with huggingface_config.readable(hf_model) as place, huggingface_config.loading(hf_model):
        model = AutoModelForCausalLM.from_pretrained(
            place, torch_dtype=dtype, trust_remote_code=False
        )
    if peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, peft)
    return model.eval()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    prefix: Messages | None = None,
    progress: bool = True,
) -> list[str]:
    """The most probable answer to each conversation, in the order given, without special tokens.

    Conversations of similar length share a batch. The tokens that all prompts begin with (a system
    prompt, ``prefix``) go through the model once; every batch starts from a copy of their keys and
    values. ``prefix``: turns before those of every conversation, behind its own system message.
    """
    import torch
    from transformers import DynamicCache

    if not conversations:
        return []
    prompts = [prompt_ids(tokenizer, with_prefix(prefix or [], turns)) for turns in conversations]
    shared = common_start(prompts)
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    answers = [""] * len(prompts)
    bar = progress_bar(total=len(prompts), unit="row", desc="generate", shown=progress)
    with torch.inference_mode(), bar:
        cache = None
        if shared:
            start = torch.tensor([prompts[0][:shared]], device=model.device)
            how = {"use_cache": True, "logits_to_keep": 1}
            cache = model(input_ids=start, past_key_values=DynamicCache(), **how).past_key_values
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompts[row] for row in rows]
            tokens = _greedy(model, tokenizer, batch, shared, cache, max_new_tokens)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            bar.update(len(rows))
    return answers


def with_prefix(prefix: Messages, turns: Messages) -> Messages:
    """``prefix``, then what ``turns`` ask; a system message of theirs stays first."""
    asked = prompt_turns(turns)
    system = [turn for turn in asked[:1] if turn["role"] == "system"]
    return system + list(prefix) + asked[len(system) :]


def common_start(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, at least one of each left over. Compared as
    tokens: the text of a prefix need not end where a token does."""
    # The first and the last in sorted order differ earliest.
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((at for at in range(limit) if first[at] != last[at]), limit)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of the conversation up to where the answer begins."""
    with refusing(tokenizer.name_or_path):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written them


def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    shared: int,
    cache: Cache | None,
    max_new_tokens: int,
) -> Tensor:
    """New tokens ``[batch, <= max_new_tokens]``, padded after the stop token.

    Padding stands between the shared tokens and the rest of a prompt, where the attention mask
    hides it; positions are counted over the mask, so each token has the one it would have alone.
    """
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens, rest = torch.tensor(prompt), len(prompt) - shared
        ids[row, :shared], mask[row, :shared] = tokens[:shared], 1
        ids[row, width - rest :], mask[row, width - rest :] = tokens[shared:], 1
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(prompts))
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": stop}
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **tokens)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        generation_config=config,
        use_model_defaults=False,
    )
    return output[:, width:]


def logits(
    model: PreTrainedModel | Path, token_ids: Sequence[Sequence[int]], adapter: Path | None = None
):
    """fp32 logits, a numpy array ``[batch, sequence, vocabulary]``, of token ids ``[batch,
    sequence]`` without padding; ``model`` and ``adapter`` may be directories."""
    import numpy

    from workshop_utils.adapters import proof

    return numpy.stack(proof.logits((model, adapter) if adapter else model, token_ids))
