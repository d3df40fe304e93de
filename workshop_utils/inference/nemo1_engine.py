"""Answers and logits by NeMo itself: the script path's model with a LoRA adapter as NeMo wrote it.

NeMo decodes slowly on a CPU, so this is for cross-checks of a few rows against transformers and
PEFT. ``ask_nemo`` works in a process of its own: NeMo keeps a parallel state that a process cannot
get rid of, and talks a lot. ``NemoModel`` is what that process uses.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import NotACheckpoint, UnsupportedAdapter
from workshop_utils.inference.nemo2_engine import megatron_logits
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.device import choose_device
from workshop_utils.runtime.processes import run_job

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class NemoAnswers:
    """``logits``: fp32 ``[batch, sequence, vocabulary]``, None without token ids; ``new_tokens``
    were made in ``seconds``, loading apart."""

    texts: list[str]
    logits: numpy.ndarray | None
    new_tokens: int
    seconds: float


class NemoModel:
    """A bridged checkpoint, with an adapter or without, loaded by NeMo in this process, in fp32.

    ``adapter`` is a ``.nemo`` as NeMo writes it, rows of q, k and v interleaved: UnsupportedAdapter
    for another. CheckpointError says what is wrong with either (``trust``: only printed) before
    NeMo sees it.
    """

    def __init__(self, bridged: Path | str, adapter: Path | str | None = None, trust: bool = False):
        _check(Path(bridged), adapter, trust)
        nemo_cpu.apply()
        from lightning.pytorch import Trainer
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
            MegatronGPTSFTModel,
        )
        from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
        from omegaconf import open_dict

        alone = {"devices": 1, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator=choose_device().kind, strategy=NLPDDPStrategy(), **alone)
        config = MegatronGPTSFTModel.restore_from(str(bridged), return_config=True)
        with open_dict(config):
            config.target = f"{MegatronGPTSFTModel.__module__}.{MegatronGPTSFTModel.__qualname__}"
            # Both fields are read when the model is built, although nothing is trained.
            config.data, config.optim = {}, {"name": "adamw"}
            config.precision = 32
        self.model = MegatronGPTSFTModel.restore_from(
            str(bridged), override_config_path=config, trainer=trainer
        )
        if adapter is not None:
            self.model.load_adapters(str(adapter))
        self.model.eval().cuda()
        self.tokenizer = self.model.tokenizer.tokenizer
        self.new_tokens = 0

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 48) -> list[str]:
        """Greedy answers to rendered ``prompts``, in one batch, up to the stop token."""
        from nemo.collections.nlp.modules.common.text_generation_strategy import (
            GPTModelTextGenerationStrategy,
        )

        length = {"min_length": 0, "max_length": max_new_tokens}
        sampling = {"use_greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        sampling |= {"repetition_penalty": 1.0, "end_strings": [self.tokenizer.eos_token]}
        sampling |= {"add_BOS": False, "all_probs": False, "compute_logprob": False}
        # NeMo's search for a strategy imports its multimodal models, which need torchvision.
        strategy = GPTModelTextGenerationStrategy(self.model)
        output = self.model.generate(list(prompts), length, sampling, strategy=strategy)
        answers, stop = [], self.tokenizer.eos_token_id
        for prompt, ids in zip(prompts, output["token_ids"], strict=True):
            # NeMo goes on with a short prompt until the longest one has its tokens.
            new = ids[len(self.model.tokenizer.text_to_ids(prompt)) :][:max_new_tokens]
            new = new[: new.index(stop) + 1] if stop in new else new
            self.new_tokens += len(new)
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return answers

    def logits(self, token_ids: Sequence[Sequence[int]]) -> numpy.ndarray:
        """As :func:`.nemo2_engine.megatron_logits`."""
        # Rows that only pad the vocabulary are cut off.
        return megatron_logits(self.model.model, token_ids)[
            ..., : self.model.cfg.get("override_vocab_size")
        ]


def ask_nemo(
    bridged: Path | str,
    adapter: Path | str | None = None,
    prompts: Sequence[str] = (),
    token_ids: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 48,
    trust: bool = False,
) -> NemoAnswers:
    """Load once, in a process of its own, answer ``prompts``, and give the logits of ``token_ids``.

    Takes about half a minute on two cores before the first token, most of it NeMo's import. The
    message of a GenerationFailed ends with what NeMo wrote last.
    """
    import numpy

    _check(Path(bridged), adapter, trust)
    rows = [] if token_ids is None else token_ids
    with tempfile.TemporaryDirectory(prefix="workshop-nemo-") as name:
        folder = Path(name)
        job = {
            "bridged": str(Path(bridged).resolve()),
            "adapter": adapter and str(Path(adapter).resolve()),
            "prompts": list(prompts),
            "token_ids": [[int(token) for token in row] for row in rows],
            "max_new_tokens": max_new_tokens,
            "trust": trust,
        }
        run_job("workshop_utils.inference.nemo1_engine", folder, job, bridged)
        answers = json.loads((folder / "answers.json").read_text())
        array = folder / "logits.npy"
        return NemoAnswers(**answers, logits=numpy.load(array) if array.exists() else None)


def nemo_logits(
    bridged: Path | str, adapter: Path | str | None, token_ids: Sequence[Sequence[int]]
) -> numpy.ndarray:
    """Only the logits of :func:`ask_nemo`."""
    return ask_nemo(bridged, adapter, token_ids=token_ids).logits


def _check(bridged: Path, adapter: Path | str | None, trust: bool) -> None:
    if not (bridged / "model_config.yaml").is_file() or not (bridged / "model_weights").is_dir():
        raise NotACheckpoint(
            f"{paths.shown(bridged)} is not what the script path loads: make that with `workshop "
            "bridge`."
        )
    if adapter is not None:
        from workshop_utils.adapters.read import read_adapter

        require_sound(adapter, trust, (Kind.NEMO1_ARCHIVE_ADAPTER,))
        if (order := read_adapter(adapter).qkv_order) != "interleaved":
            raise UnsupportedAdapter(
                f"{paths.shown(adapter)} has its rows in the order {order!r}, for another reader; "
                "NeMo would load it and answer wrongly. Give the .nemo that the training wrote, or "
                "one exported with --reader nemo."
            )
    require_sound(bridged, trust, (Kind.BRIDGED_VIEW, Kind.NEMO1_DIRECTORY))


def _work(folder: Path) -> None:
    """The process that :func:`ask_nemo` starts: read the job, write the answers."""
    import numpy

    job = json.loads((folder / "job.json").read_text())
    model = NemoModel(job["bridged"], job["adapter"], job["trust"])
    began = time.perf_counter()
    texts = model.generate(job["prompts"], job["max_new_tokens"]) if job["prompts"] else []
    seconds = time.perf_counter() - began
    answers = {"texts": texts, "new_tokens": model.new_tokens, "seconds": seconds}
    if job["token_ids"]:
        numpy.save(folder / "logits.npy", model.logits(job["token_ids"]))
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
