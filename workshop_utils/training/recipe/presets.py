"""Named sets of options. A preset stands below the command line and YAML, and above the
defaults."""

from typing import Any

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.training.recipe.options import nearest

CPU = {
    "hf_model_id": "smollm2-135m-instruct",
    "recipe_cls_name": "llama32_1b",
    "gpus_per_node": 1,
    "tensor_parallel_size": 1,
    "device": "cpu",
    "precision": "32",
    "max_steps": 30,
    "val_check_interval": 10,
    "log_every_n_steps": 1,
    "micro_batch_size": 4,
    "accumulate_grad_batches": 2,
    "limit_val_batches": 4,
    "max_seq_length": 256,
    "learning_rate": 2e-3,
    "warmup_steps": 4,
    "lora_dim": 32,
    "lora_alpha": 64.0,
    "lora_dropout": 0.0,
    "lora_target_modules": ("linear_qkv",),
    "hfdc_split": "train/validation/test",
    "hfdc_num_proc": 2,
    "max_samples": 16,
    "temperature": 0.0,
    "top_p": 0.0,
    "num_tokens_to_generate": 64,
    "max_batch_size": 8,
    "buffer_size_gb": 0.5,
    "max_tokens": 2048,
    "inference_max_seq_length": 512,
}
PRESETS = {"cpu": CPU}


def preset(name: str) -> dict[str, Any]:
    """The options of the preset ``name``.

    Raises:
        WorkshopError: there is no such preset.
    """
    if name not in PRESETS:
        raise WorkshopError(
            f"there is no preset '{name}'.{nearest(name, list(PRESETS))} There are: "
            f"{', '.join(PRESETS)}."
        )
    return PRESETS[name] | {
        "output_dir": str(paths.runs_dir() / "recipe/{hf_model_id}"),
        "data_dir": str(paths.runs_dir() / "recipe/data/{name}"),
        "hfdc_dataset_name": str(paths.data_dir() / "tickets"),
    }
