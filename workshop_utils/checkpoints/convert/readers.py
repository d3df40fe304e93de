"""One reader for each format that can be converted: what lies at a path, as a
:class:`.source.Source`."""

from functools import partial
from pathlib import Path

from workshop_utils.checkpoints.convert import layered, megatron, tokenizers
from workshop_utils.checkpoints.convert.source import Source, Tokenizer
from workshop_utils.checkpoints.formats import (
    gpt_config,
    nemo1,
    nemo1_config,
    nemo2,
    saved_tensors,
    torch_dist,
)
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

_ADAPTER = "not a model. Convert its base, or hand the adapter on with `workshop export`."
_WAYS_OUT = {
    Kind.LIGHTNING: (
        "weights and optimizer state as NeMo 1 saves them in training. Let NeMo 1 write a .nemo of "
        "it (nemo/collections/nlp: examples/nlp/language_modeling/megatron_ckpt_to_nemo.py), and "
        "convert that."
    ),
    Kind.GGUF: (
        "quantised for llama.cpp. Turn it into a Hugging Face model directory first "
        "(transformers: from_pretrained(..., gguf_file=...)), and convert that."
    ),
    Kind.NEMO2_ADAPTER: _ADAPTER,
    Kind.NEMO1_ARCHIVE_ADAPTER: _ADAPTER,
    Kind.PEFT: (
        "not a model. Merge it into its base (workshop export ... --to hf-merged --base DIR) and "
        "convert that."
    ),
}


def read(path: Path, tokenizer: Tokenizer | None = None, report: Report = stop) -> Source:
    """What the checkpoint ``path`` holds, with ``tokenizer`` in place of its own. Of the weights
    only the indexes are read.

    Faults of single entries, and names that a pickle would call, go to ``report``. If it returns,
    they are left out. Raises :class:`NotACheckpoint`, :class:`UnsupportedCheckpoint` (a kind or a
    feature that cannot be converted), :class:`DamagedCheckpoint` and :class:`UnsafeCheckpoint`.
    """
    path = Path(path)
    kind = identify(path, report).kind
    if kind in _WAYS_OUT:
        raise UnsupportedCheckpoint(f"{shown(path)} is a {kind}, {_WAYS_OUT[kind]}")
    # NeMo 1 looks tokenizers up in the current directory: every path that is written has to be
    # absolute.
    path = path.resolve()
    if kind is Kind.NEMO2:
        return of_nemo2(nemo2.read(path, report), tokenizer)
    return (megatron.read if kind is Kind.MEGATRON else _nemo1)(path, tokenizer, report)


def of_nemo2(checkpoint: nemo2.Nemo2Checkpoint, tokenizer: Tokenizer | None = None) -> Source:
    where = shown(checkpoint.config)
    return Source.checked(
        checkpoint.path,
        "NeMo 2.0",
        gpt_config.read_fields(checkpoint.model, where),
        gpt_config.family_of(checkpoint.model, where),
        (checkpoint.tensors, checkpoint.objects),
        nemo2.PREFIX,
        Files(checkpoint.path / "weights"),
        tokenizer or tokenizers.of_nemo2(checkpoint, where),
        "context/model.yaml",
    )


def _nemo1(path: Path, tokenizer: Tokenizer | None, report: Report) -> Source:
    """A ``.nemo`` archive, or a directory with the same files."""
    files = Files(path)
    names = files.sizes()
    config, where = nemo1.read_config(files), files.where(nemo1.CONFIG)
    fields, family = nemo1_config.read_fields(config, where)
    if f"{nemo1.SHARDED}/{torch_dist.INDEX}" in names:
        files = files.below(nemo1.SHARDED)
        described = {} if files.are_members else read_json(files.place / "metadata.json")
        backend = described.get("sharded_backend", "torch_dist")
        if backend != "torch_dist":
            raise UnsupportedCheckpoint(
                f"{shown(path)}: sharded_backend is {backend!r}; only torch_dist can be read."
            )
        index = files.read_index(report)
        entries = index.tensors, index.objects
    elif ranks := rank_files(names):
        load = partial(saved_tensors.read, report=report)
        entries = layered.read(files, fields, ranks, "model.", load), {}
    else:
        raise DamagedCheckpoint(
            f"{shown(path)} has no weights: neither model_weights.ckpt nor model_weights/.metadata."
        )
    tokenizer = tokenizer or tokenizers.of_nemo1(config, path, where)
    weights = entries, "model.", files
    return Source.checked(path, "NeMo 1", fields, family, *weights, tokenizer, "model_config.yaml")
