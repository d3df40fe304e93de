"""Small adapters as NeMo's script path writes them, and what they do to a Llama, written without
the code under test."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

NAMES = {
    "attention_qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "attention_dense": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "mlp_fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "mlp_fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
ALL = tuple(NAMES)


@dataclass(frozen=True)
class Shape:
    """A tiny Llama's numbers; without a gate, a tiny Nemotron's."""

    hidden: int = 32
    heads: int = 4
    groups: int = 2
    channels: int = 8
    ffn: int = 48
    layers: int = 2
    gated: bool = True

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        attention = self.heads * self.channels
        return {
            "attention_qkv": (self.hidden, (self.heads + 2 * self.groups) * self.channels),
            "attention_dense": (attention, self.hidden),
            "mlp_fc1": (self.hidden, (2 if self.gated else 1) * self.ffn),
            "mlp_fc2": (self.ffn, self.hidden),
        }


GQA = Shape()
GQA_HEAD_DIM = Shape(channels=12)  # heads * channels is not the hidden size
MHA = Shape(groups=4)
SHAPES = {"gqa": GQA, "gqa-head-dim": GQA_HEAD_DIM, "mha": MHA}


def config_of(
    shape: Shape, targets: tuple[str, ...] = ("attention_qkv",), rank: int = 4, alpha: float = 8
) -> dict[str, Any]:
    """The fields of NeMo's ``model_config.yaml`` that matter, and some that do not."""
    return {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.MegatronGPTSFTModel",  # noqa: E501
        "restore_from_path": "/somewhere/models/bridged/tiny-llama",
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.channels,
        "activation": "fast-swiglu" if shape.gated else "squared-relu",
        "precision": 32,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "peft": {
            "peft_scheme": "lora",
            "lora_tuning": {
                "variant": "nemo",
                "target_modules": list(targets),
                "adapter_dim": rank,
                "alpha": alpha,
                "adapter_dropout": 0.1,
                "layer_selection": None,
                "weight_tying": False,
            },
        },
        "optim": {"name": "adamw", "lr": 0.0005},
        "data": {"train_ds": {"max_seq_length": 256}},
    }


def tensors_of(
    shape: Shape,
    targets: tuple[str, ...] = ("attention_qkv",),
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    prefix: str = "model.decoder.",
) -> dict[str, torch.Tensor]:
    """Random tensors under NeMo's keys; B is not zero."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for layer in range(shape.layers):
        for target in targets:
            inputs, outputs = shape.features[target]
            stem = f"{prefix}layers.{layer}.{NAMES[target]}"
            state[f"{stem}.linear_in.weight"] = torch.randn(rank, inputs, generator=generator).to(
                dtype
            )
            state[f"{stem}.linear_out.weight"] = torch.randn(outputs, rank, generator=generator).to(
                dtype
            )
    return state


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar like NeMo's: the folder itself and its files under ``./``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:") as archive:
        folder = tarfile.TarInfo("./")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def saved(state: Any) -> bytes:
    """``state`` as ``torch.save`` writes it."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def write_adapter(path: Path, config: dict[str, Any], state: Any) -> Path:
    """A ``.nemo`` with ``config`` and ``state``."""
    return write_tar(
        path,
        {"model_config.yaml": yaml.safe_dump(config).encode(), "model_weights.ckpt": saved(state)},
    )


def tiny_llama(shape: Shape):
    """A random Llama in single precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.channels,
        max_position_embeddings=64,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def logits(model) -> torch.Tensor:
    """Logits of two fixed prompts, ``[2, 10, vocabulary]``."""
    prompts = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(prompts).logits


def add_like_nemo(model, shape: Shape, state: dict[str, torch.Tensor], scale: float):
    """Make ``model`` answer as NeMo would with the adapter: fused outputs are added, then cut as
    Megatron cuts them.

    ``mixed_qkv + scale * B(A(x))`` viewed as ``[ng, (nh / ng + 2) * hd]`` and split by ``[nh / ng *
    hd, hd, hd]`` (``MCoreSelfAttentionMixin.get_query_key_value_tensors``,
    ``MCoreMLPMixin.forward``).
    """
    sizes = [shape.heads // shape.groups * shape.channels, shape.channels, shape.channels]

    def lora(layer: int, target: str, x: torch.Tensor) -> torch.Tensor | None:
        stem = f"model.decoder.layers.{layer}.{NAMES[target]}"
        if f"{stem}.linear_in.weight" not in state:
            return None
        return (
            x @ state[f"{stem}.linear_in.weight"].T @ state[f"{stem}.linear_out.weight"].T * scale
        )

    def qkv(layer: int, part: int):
        def hook(module, inputs, output):
            fused = lora(layer, "attention_qkv", inputs[0])
            if fused is None:
                return output
            groups = fused.view(*fused.shape[:-1], shape.groups, sum(sizes))
            return output + torch.split(groups, sizes, dim=-1)[part].reshape(output.shape)

        return hook

    def plain(layer: int, target: str, part: int = 0, parts: int = 1):
        def hook(module, inputs, output):
            added = lora(layer, target, inputs[0])
            return output if added is None else output + added.chunk(parts, dim=-1)[part]

        return hook

    for layer, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        for part, module in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
            module.register_forward_hook(qkv(layer, part))
        attention.o_proj.register_forward_hook(plain(layer, "attention_dense"))
        halves = (mlp.gate_proj, mlp.up_proj) if shape.gated else (mlp.up_proj,)
        for part, module in enumerate(halves):
            module.register_forward_hook(plain(layer, "mlp_fc1", part, len(halves)))
        mlp.down_proj.register_forward_hook(plain(layer, "mlp_fc2"))
    return model
