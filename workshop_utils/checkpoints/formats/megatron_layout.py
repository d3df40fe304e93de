"""Names and shapes of the weights of a GPT as Megatron-Core stores it, and how tensor parallelism
cuts each of them.

In a torch_dist checkpoint the layers are stacked on a first axis (and experts on a second); names
here are those, without the prefix (``module.`` in NeMo 2.0, ``model.`` in NeMo 1, none in
Megatron-LM). In a file for each rank every layer has a name of its own:
``decoder.layers.7.mlp.linear_fc1.weight``.
Source: ``sharded_state_dict`` in ``megatron/core/transformer/{mlp,attention,moe/experts}.py``
(Megatron-Core 0.13).
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Weight:
    """``shape`` as stored, ``stacked`` leading axes (layers, experts). Ranks of tensor parallelism
    hold slices along ``split``, an axis of one layer's tensor (None: every rank has all of it);
    with ``halves`` each holds a slice of the gate and, after it, one of up.
    """

    shape: tuple[int, ...]
    stacked: int = 0
    split: int | None = None
    halves: bool = False


def layout(fields: dict[str, Any], rows: int) -> dict[str, Weight]:
    """Name -> :class:`Weight` of the model with ``fields`` (of :func:`.gpt_config.read_fields`) and
    ``rows`` rows of the embedding.

    Shapes of one layer are (output, input); linear_qkv holds q, k and v of each group after one
    another, linear_fc1 gate and up.
    """
    layers, hidden, ffn = fields["num_layers"], fields["hidden_size"], fields["ffn_hidden_size"]
    head_dim, experts = fields["kv_channels"], fields["num_moe_experts"]
    attention = fields["num_attention_heads"] * head_dim
    qkv = attention + 2 * fields["num_query_groups"] * head_dim
    bias, gated = fields["add_bias_linear"], fields["gated_linear_unit"]
    norms = ("weight", "bias") if fields["normalization"] == "LayerNorm" else ("weight",)
    weights = {EMBEDDING: Weight((rows, hidden), split=0)}
    if not fields["share_embeddings_and_output_weights"]:
        weights[OUTPUT] = Weight((rows, hidden), split=0)

    def add(name: str, *shape: int, split: int | None = None, halves: bool = False) -> None:
        shape = (layers, experts, *shape) if ".experts." in name else (layers, *shape)
        stacked = 1 + (".experts." in name)
        weights[f"decoder.layers.{name}"] = Weight(shape, stacked, split, halves)

    for part in norms:
        weights[f"decoder.final_layernorm.{part}"] = Weight((hidden,))
        add(f"self_attention.linear_qkv.layer_norm_{part}", hidden)
        norm = "pre_mlp_layernorm." if experts else "mlp.linear_fc1.layer_norm_"
        add(f"{norm}{part}", hidden)
        if fields["qk_layernorm"]:
            add(f"self_attention.q_layernorm.{part}", head_dim)
            add(f"self_attention.k_layernorm.{part}", head_dim)
    add("self_attention.linear_qkv.weight", qkv, hidden, split=0)
    add("self_attention.linear_proj.weight", hidden, attention, split=1)
    if bias or fields["add_qkv_bias"]:
        add("self_attention.linear_qkv.bias", qkv, split=0)
    mlp, wide = "mlp.experts.experts" if experts else "mlp", (2 if gated else 1) * ffn
    if experts:
        add("mlp.router.weight", experts, hidden)
    add(f"{mlp}.linear_fc1.weight", wide, hidden, split=0, halves=gated)
    add(f"{mlp}.linear_fc2.weight", hidden, ffn, split=1)
    if bias:
        add("self_attention.linear_proj.bias", hidden)
        add(f"{mlp}.linear_fc1.bias", wide, split=0, halves=gated)
        add(f"{mlp}.linear_fc2.bias", hidden)
    return weights


def check(
    tensors: Mapping[str, Tensor], prefix: str, fields: dict[str, Any], where: str, config: str
) -> tuple[int, str]:
    """Rows and dtype of the embedding, once ``tensors`` are exactly those of the model with
    ``fields``, under names with ``prefix``.

    The rows are those that are stored, whatever the configuration says: it may be padded. ``where``
    and ``config`` name the checkpoint and its configuration in errors: :class:`DamagedCheckpoint`
    (missing, or of another shape) and :class:`UnsupportedCheckpoint`.
    """
    embedding = tensors.get(prefix + EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise DamagedCheckpoint(
            f"{where}: the tensor {prefix}{EMBEDDING} (vocabulary x hidden) is missing."
        )
    expected = layout(fields, embedding.shape[0])
    # The loaders only log a weight that is missing and go on with random numbers, so the check has
    # to be here.
    for name, weight in expected.items():
        tensor = tensors.get(prefix + name)
        if tensor is None or tensor.shape != weight.shape:
            stated = f"has the shape {tensor.shape}" if tensor else "is missing"
            raise DamagedCheckpoint(
                f"{where}: the tensor {prefix}{name} {stated}; {config} asks for {weight.shape}. "
                "The configuration and the weights are not of one model."
            )
    if more := sorted(tensors.keys() - {prefix + name for name in expected}):
        raise UnsupportedCheckpoint(
            f"{where} holds tensors that the model of {config} does not have: {', '.join(more[:5])}"
        )
    return embedding.shape[0], embedding.dtype


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_NORMS = {
    "decoder.layers.input_layernorm.": "decoder.layers.self_attention.linear_qkv.layer_norm_",
    "decoder.layers.pre_mlp_layernorm.": "decoder.layers.mlp.linear_fc1.layer_norm_",
}


def stacked_name(name: str, expected: Container[str] = ()) -> tuple[str, tuple[int, ...]]:
    """Name in the stacked form, and place on its stacked axes, of the tensor ``name`` of one layer
    (and expert), without prefix.

    ``decoder.layers.7.mlp.linear_fc1.weight`` -> (``decoder.layers.mlp.linear_fc1.weight``, (7,)).
    A norm of a model without Transformer Engine, a module of its own, gets the name that it has in
    ``expected`` (of :func:`layout`).
    """
    stacked, place = name, ()
    if layer := _LAYER.match(name):
        rest, place = layer[2], (int(layer[1]),)
        if expert := _EXPERT.match(rest):
            rest, place = f"mlp.experts.experts.{expert[2]}", (*place, int(expert[1]))
        stacked = f"decoder.layers.{rest}"
    for own, fused in _NORMS.items():
        if stacked.startswith(own) and stacked not in expected:
            stacked = stacked.replace(own, fused)
    return stacked, place
