"""One reader for each format that can be converted: what lies at a path, as a
:class:`.source.Source`."""

from functools import partial
from pathlib import Path

from workshop_utils.checkpoints.convert import bridge_config, layered, megatron, tokenizers
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

_WAYS_OUT = {
    Kind.LIGHTNING: "weights and optimizer state as NeMo 1 saves them in training. Let NeMo 1 write a .nemo "  # noqa: E501
    "of it (nemo/collections/nlp: examples/nlp/language_modeling/megatron_ckpt_to_nemo.py), "
    "and convert that.",
    Kind.GGUF: "quantised for llama.cpp. Turn it into a Hugging Face model directory first "
    "(transformers: from_pretrained(..., gguf_file=...)), and convert that.",
    Kind.NEMO2_ADAPTER: "not a model. Convert its base, or hand the adapter on with `workshop export`.",  # noqa: E501
    Kind.NEMO1_ARCHIVE_ADAPTER: "not a model. Convert its base, or hand the adapter on with `workshop export`.",  # noqa: E501
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
    found = identify(path, report)
    if found.kind in _WAYS_OUT:
        raise UnsupportedCheckpoint(f"{shown(path)} is a {found.kind}, {_WAYS_OUT[found.kind]}")
    # NeMo 1 looks tokenizers up in the current directory: every path that is written has to be
    # absolute.
    path = path.resolve()
    readers = {Kind.NEMO2: _nemo2, Kind.MEGATRON: megatron.read}
    return readers.get(found.kind, _nemo1)(path, tokenizer, report)


def _nemo2(path: Path, tokenizer: Tokenizer | None, report: Report) -> Source:
    found = nemo2.read(path, report)
    where = shown(path / "context" / "model.yaml")
    fields = gpt_config.read_fields(found.model, where)
    tensors = found.model_tensors()
    rows, dtype = bridge_config.check_tensors(
        tensors, "module.", fields, shown(path), "context/model.yaml"
    )
    return Source(
        path=path,
        format="NeMo 2.0",
        fields=fields,
        family=gpt_config.family_of(found.model, where),
        rows=rows,
        dtype=dtype,
        tensors=tensors,
        objects={
            name: entry for name, entry in found.objects.items() if name.startswith("module.")
        },
        prefix="module.",
        files=Files(path / "weights"),
        tokenizer=tokenizer or tokenizers.of_nemo2(bridge_config.tokenizer(found, where)),
    )


def _nemo1(path: Path, tokenizer: Tokenizer | None, report: Report) -> Source:
    """A ``.nemo`` archive, or a directory with the same files."""
    files = Files(path)
    names = files.sizes()
    config, where = nemo1.read_config(files), files.where(nemo1.CONFIG)
    fields, family = nemo1_config.read_fields(config, where)
    ranks = rank_files(names)
    if f"{nemo1.SHARDED}/{torch_dist.INDEX}" in names:
        files = files.below(nemo1.SHARDED)
        backend = (
            "torch_dist"
            if files.are_members
            else read_json(files.place / "metadata.json").get("sharded_backend")
        )
        if backend != "torch_dist":
            raise UnsupportedCheckpoint(
                f"{shown(path)}: sharded_backend is {backend!r}; only torch_dist is read."
            )
        index = files.read_index(report)
        tensors = {
            name: tensor for name, tensor in index.tensors.items() if name.startswith("model.")
        }
        objects = {
            name: entry for name, entry in index.objects.items() if name.startswith("model.")
        }
    elif ranks:
        tensors, objects = (
            layered.read(
                files, fields, ranks, "model.", partial(saved_tensors.read, report=report)
            ),
            {},
        )
    else:
        raise DamagedCheckpoint(
            f"{shown(path)} has no weights: neither model_weights.ckpt nor model_weights/.metadata."
        )
    rows, dtype = bridge_config.check_tensors(
        tensors, "model.", fields, shown(path), "model_config.yaml"
    )
    return Source(
        path=path,
        format="NeMo 1",
        fields=fields,
        family=family,
        rows=rows,
        dtype=dtype,
        tensors=tensors,
        objects=objects,
        prefix="model.",
        files=files,
        tokenizer=tokenizer or tokenizers.of_nemo1(config, path, where),
    )
