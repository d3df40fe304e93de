"""The kinds of fine-tuning that the script knows, the settings of each, and the names of the
modules that LoRA adapts.

Source: ``peft_config.py`` and ``megatron_gpt_finetuning_config.yaml`` of NeMo 2.4.1.
"""

SCHEMES = ("lora", "ptuning", "adapter", "ia3", "none")
"""Values of ``model.peft.peft_scheme``; ``none`` trains every weight."""

SECTIONS = {"lora": "lora_tuning", "adapter": "adapter_tuning", "ia3": "ia3_tuning"}
"""Schemes with weights in each layer -> their section of ``model.peft``. Parts of these can be put
together (:mod:`workshop_utils.adapters.rank_parts`)."""

TARGETS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
}
"""What NeMo's group names stand for (``get_target_modules``)."""

MODULES = (*TARGETS["all"], *TARGETS)
"""Values of ``target_modules``."""


def lora_modules(targets: list[str]) -> list[str]:
    """The modules that ``targets`` mean, groups resolved, each once."""
    return list(
        dict.fromkeys(module for target in targets for module in TARGETS.get(target, (target,)))
    )
