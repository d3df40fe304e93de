"""Names and shapes of the weights of a GPT as Megatron-Core stores it, and how tensor parallelism
cuts each of them.

In a torch_dist checkpoint the layers are stacked on a first axis (and experts on a second); names
here are those, without the prefix (``module.`` in NeMo 2.0, ``model.`` in NeMo 1, none in
Megatron-LM). In a file for each rank every layer has a name of its
own: ``decoder.layers.7.mlp.linear_fc1.weight``.
Source: ``sharded_state_dict`` in ``megatron/core/transformer/{mlp,attention,moe/experts}.py``
(Megatron-Core 0.13).
"""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

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
    layers, hidden = fields["num_layers"], fields["hidden_size"]
    heads, groups, head_dim = (
        fields["num_attention_heads"],
        fields["num_query_groups"],
        fields["kv_channels"],
    )
    qkv = (heads + 2 * groups) * head_dim
    found = {EMBEDDING: Weight((rows, hidden), split=0)}
    if not fields["share_embeddings_and_output_weights"]:
        found[OUTPUT] = Weight((rows, hidden), split=0)
    norms = ("weight", "bias") if fields["normalization"] == "LayerNorm" else ("weight",)
    found |= {f"decoder.final_layernorm.{part}": Weight((hidden,)) for part in norms}
    attention, block = "decoder.layers.self_attention", "decoder.layers"
    found |= {
        f"{attention}.linear_qkv.layer_norm_{part}": Weight((layers, hidden), 1) for part in norms
    }
    found[f"{attention}.linear_qkv.weight"] = Weight((layers, qkv, hidden), 1, 0)
    found[f"{attention}.linear_proj.weight"] = Weight((layers, hidden, heads * head_dim), 1, 1)
    if fields["qk_layernorm"]:
        for name in ("q_layernorm", "k_layernorm"):
            found |= {f"{attention}.{name}.{part}": Weight((layers, head_dim), 1) for part in norms}
    if fields["add_bias_linear"] or fields["add_qkv_bias"]:
        found[f"{attention}.linear_qkv.bias"] = Weight((layers, qkv), 1, 0)
    if fields["add_bias_linear"]:
        found[f"{attention}.linear_proj.bias"] = Weight((layers, hidden), 1)
    experts = fields["num_moe_experts"]
    norm = "pre_mlp_layernorm." if experts else "mlp.linear_fc1.layer_norm_"
    found |= {f"{block}.{norm}{part}": Weight((layers, hidden), 1) for part in norms}
    if experts:
        found[f"{block}.mlp.router.weight"] = Weight((layers, experts, hidden), 1)
    return found | _feed_forward(
        fields, f"{block}.mlp.experts.experts" if experts else f"{block}.mlp"
    )


def _feed_forward(fields: dict[str, Any], block: str) -> dict[str, Weight]:
    """The two matrices of the feed-forward network, or of each expert."""
    gated, hidden, ffn = (
        fields["gated_linear_unit"],
        fields["hidden_size"],
        fields["ffn_hidden_size"],
    )
    stack = (
        fields["num_layers"],
        *([fields["num_moe_experts"]] if fields["num_moe_experts"] else []),
    )
    wide = (2 if gated else 1) * ffn
    found = {
        f"{block}.linear_fc1.weight": Weight((*stack, wide, hidden), len(stack), 0, gated),
        f"{block}.linear_fc2.weight": Weight((*stack, hidden, ffn), len(stack), 1),
    }
    if fields["add_bias_linear"]:
        found[f"{block}.linear_fc1.bias"] = Weight((*stack, wide), len(stack), 0, gated)
        found[f"{block}.linear_fc2.bias"] = Weight((*stack, hidden), len(stack))
    return found


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
    found, place = name, ()
    if layer := _LAYER.match(name):
        found, place = f"decoder.layers.{layer[2]}", (int(layer[1]),)
        if expert := _EXPERT.match(layer[2]):
            found, place = (
                f"decoder.layers.mlp.experts.experts.{expert[2]}",
                (*place, int(expert[1])),
            )
    for own, fused in _NORMS.items():
        if found.startswith(own) and found not in expected:
            found = found.replace(own, fused)
    return found, place
