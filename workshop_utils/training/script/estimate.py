"""Rough numbers before a run: trainable parameters, memory, disk and time. Each says what it
counts."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.training.script.schemes import SECTIONS, lora_modules


@dataclass(frozen=True)
class Estimate:
    """``memory`` of one process and ``disk`` of the run in bytes, ``operations`` of the run in
    floating-point operations."""

    parameters: int
    trainable: int
    memory: int
    disk: int
    operations: float


def trained(sizes: Architecture, peft: Mapping[str, Any]) -> int:
    """Weights that ``peft``, the section of the script's configuration, trains. Weights that
    adapters share count in each of them.

    After ``peft_config.py`` and ``parallel_adapters.py`` (NeMo 2.4.1): ``adapter`` has two
    bottlenecks with a layer norm in each layer, ``ia3`` a factor for each key, value and inner unit
    of the feed-forward, ``ptuning`` an embedding and two linear layers, ``lora`` rank x (in + out)
    for each module.
    """
    scheme = peft["peft_scheme"]
    if scheme == "none":
        return parameters(sizes)
    if scheme == "ptuning":
        keys = ("virtual_tokens", "embedding_dim", "bottleneck_dim")
        rows, width, inner = (peft["p_tuning"][key] for key in keys)
        return rows * width + (width + 1) * inner + (inner + 1) * sizes.hidden
    settings = peft[SECTIONS[scheme]]
    layers = len(settings["layer_selection"] or range(sizes.layers))
    if scheme == "ia3":
        return layers * (2 * sizes.groups * sizes.head_dim + sizes.ffn)
    rank, hidden = settings["adapter_dim"], sizes.hidden
    if scheme == "adapter":
        return layers * 2 * 2 * hidden * (rank + (settings["norm_position"] is not None))
    heads = sizes.heads * sizes.head_dim
    ends = {
        "attention_qkv": hidden + heads + 2 * sizes.groups * sizes.head_dim,
        "attention_dense": heads + hidden,
        "mlp_fc1": hidden + 2 * sizes.ffn,
        "mlp_fc2": sizes.ffn + hidden,
    }
    if settings["variant"] == "canonical":
        # An A for each of q, k and v, and for gate and up, where "nemo" has one for all.
        ends["attention_qkv"] += 2 * hidden
        ends["mlp_fc1"] += hidden
    return layers * rank * sum(map(ends.get, lora_modules(list(settings["target_modules"]))))


def parameters(sizes: Architecture) -> int:
    """Weights of a Llama-like decoder, norms and biases aside."""
    attention = sizes.hidden * sizes.head_dim * (2 * sizes.heads + 2 * sizes.groups)
    embeddings = (sizes.vocabulary or 0) * sizes.hidden * (1 if sizes.tied else 2)
    return sizes.layers * (attention + 3 * sizes.hidden * sizes.ffn) + embeddings


def estimate(
    sizes: Architecture,
    trainable: int,
    half_compute: bool,
    half_weights: bool,
    tokens: int,
    length: int,
    *,
    trained_tokens: float = 0,
    validated_tokens: float = 0,
    split: int = 1,
    kept_checkpoints: int = 2,
) -> Estimate:
    """What a run needs.

    Args:
        trainable: weights that are trained; Adam keeps a gradient and two moments of 4 bytes for
            each.
        half_compute: ``trainer.precision`` is not 32. NeMo keeps the weights in 32 bits all the
            same, but for ``half_weights`` (O2).
        tokens: of one micro batch, padding included; ``length`` of them in one row.
        trained_tokens: of all optimizer steps over all processes; ``validated_tokens`` of all
            validations.
        split: tensor-parallel x pipeline-parallel size.
        kept_checkpoints: Lightning checkpoints (weights and moments of what is trained) on disk at
            once.

    Activations after Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
    Models" (2022), equation 1, without recomputation: ``tokens * hidden * (34 + 5 * heads * length
    / hidden)`` bytes a layer in 16 bits, twice that in 32; and two copies of the logits in 32 bits.
    A weight and token take 2 operations forward, 2 for the gradient of the activation, and 2 for
    that of the weight where it is trained.
    """
    count = parameters(sizes)
    of_a_layer = tokens * sizes.hidden * (34 + 5 * sizes.heads * length / sizes.hidden)
    activations = sizes.layers * of_a_layer * (1 if half_compute else 2)
    logits = 2 * 4 * tokens * (sizes.vocabulary or 0)
    weights = count * (2 if half_weights else 4) + trainable * (4 + 4 + 8)
    memory = math.ceil((weights + activations + logits) / split)
    disk = kept_checkpoints * trainable * 12 + trainable * 4
    operations = (4.0 * count + 2.0 * trainable) * trained_tokens + 2.0 * count * validated_tokens
    return Estimate(count, trainable, memory, disk, operations)


def operations_per_second() -> float:
    """Floating-point operations a second of this machine's processors: the best of five products of
    two small matrices."""
    import numpy

    matrix = numpy.ones((1024, 1024), "float32")
    matrix @ matrix
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)
