"""The patches: each still answers a fault that stands in the installed library, and children
inherit them.

When a library is updated and a fault is gone, ``test_the_fault_is_still_there`` fails for that
patch: delete the patch.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.nemo_cpu import torch_cuda
from workshop_utils.runtime.nemo_cpu.registry import LIBRARIES, PATCHES

nemo_cpu.apply()

FAULTS = {
    "cuda_calls_do_nothing": None,  # see test_torch_without_cuda_refuses
    "cuda_method_keeps_the_cpu": None,
    "cuda_method_of_lightning_modules": r"def cuda\(self, device",
    "autocast_of_autograd_functions": None,  # see ELSEWHERE
    "no_compilation": None,  # see ELSEWHERE
    "cuda_literals_in_megatron": r"device=(device|torch\.cuda\.current_device\(\)|self\.\w+|[\"']cuda[\"'])|pin_memory",  # noqa: E501
    "random_states_of_the_gpu": r"cuda rng state \{\} is not added",
    "fusions_off": r"is not available\. Please install TE >= 1\.4 or Apex",
    "norm_before_the_experts": r"\"pre_mlp_layernorm\.\": \"mlp\.linear_fc1\.layer_norm_\"",
    "zero_centred_layer_norm": r"zero_centered_gamma not supported by torch LayerNorm",
    "router_without_transformer_engine": r"if te_general_gemm is not None",
    "paged_attention": r"flash attn verion v2\.7\.3 and above is required for dynamic batching",
    "chunks_of_finished_requests": r"self\.request_to_kv_chunk_ids\[finished_idxs\]\.fill_\(-1\)",
    "loaded_tensors_stay_on_cpu": r"def _fix_tensors_device.*\n.*\n\s+assert torch\.cuda\.is_initialized\(\)",  # noqa: E501
    "resumed_tensors_stay_on_cpu": r"def _fix_tensors_device.*\n.*\n\s+assert torch\.cuda\.is_initialized\(\)",  # noqa: E501
    "layer_norm_names_of_connectors": r"def apply_transforms\(",
    "modelopt_at_import": None,  # see ELSEWHERE
    "export_without_modelopt": r"def export_hf_checkpoint",
    "index_workers_can_be_stopped": r"def build_index_files|import build_index_files|build_index_files\(",  # noqa: E501
    "lora_without_transformer_engine": r"m\.__class__ == te\.Linear",
    "adapters_without_transformer_engine": r"if HAVE_TE and any\(isinstance\(m, te_column_parallel\)",  # noqa: E501
    "timers_of_one_process": r"timers\.get_all_timers_string\(names=None",
    "clipping_on_cpu": r"assert param\.grad\.type\(\) == 'torch\.cuda\.FloatTensor'",
    "bf16_optimizer_on_cpu": r"param\.type\(\) in \['torch\.cuda\.HalfTensor'",
    "lora_mixin_forward": r"class MCoreSelfAttentionMixin[\s\S]*?inference_params=None,",
    "adapter_mixin_forward": (
        r"class "
        r"MCoreTransformerLayerMixin[\s\S]*?inference_params=None,\n\s+packed_seq_params=None,\n "
        r"   \):"
    ),
    "strategy_of_gpt_models": r"def model_inference_strategy_dispatcher\(.*\n\s+from nemo\.collections\.multimodal",  # noqa: E501
    "strategy_without_apex": r"if not HAVE_APEX:\n\s+raise ImportError",
    "steps_of_the_optimizer": r"optim_state_to_sharding_state\(optimizer_state_dict, id_to_sharded_param_map\)",  # noqa: E501
    "container_version": r"re\.fullmatch\(r\"[^\"]+\", nvidia_torch_version\)",
    "local_layer_spec": r"\"te_gpt\": get_gpt_layer_with_transformer_engine_spec\(",
    "process_groups_before_the_model": r"def model_provider_func\(",
    "layer_norm_names_of_state_dicts": r"class MegatronGPTModel",
    "parameter_groups": r"from apex\.transformer\.pipeline_parallel\.schedules\.common import listify_model",  # noqa: E501
    "cast_under_autocast": r"from apex\._autocast_utils import _cast_if_autocast_enabled",
    "parallel_attributes": r"from apex\.transformer\.tensor_parallel\.layers import set_defaults",
    "master_weights_without_apex": r"def __init__[\s\S]*?if not HAVE_APEX:\n\s+raise ImportError",
    "master_weights_on_cpu": r"param\.type\(\) in \['torch\.cuda\.HalfTensor'",
    "gradient_norm": r"from apex\.multi_tensor_apply import multi_tensor_applier|import amp_C",
    "cuda_literals_in_nemo": r"device=(torch\.device\([\"']cuda[\"']\)|[\"']cuda[\"'])",
    "compiled_helpers": r"def compile_helper",
}
ELSEWHERE = {
    "no_compilation": ("megatron.core.jit", "torch.compile"),
    "autocast_of_autograd_functions": (
        "megatron.core.tensor_parallel.layers",
        'torch.amp.custom_bwd, device_type="cuda"',
    ),
    "modelopt_at_import": (
        "nemo.collections.llm.modelopt.speculative.model_transform",
        "EAGLE3_DEFAULT_CFG",
    ),
}
"""Patches of one module for the sake of another one, and what stands there."""


def source(module: str) -> str:
    """Text of ``module``, found without importing it or its parents."""
    parts = module.split(".")
    top = Path(importlib.util.find_spec(parts[0]).submodule_search_locations[0])
    file = top.joinpath(*parts[1:])
    return (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()


@pytest.mark.parametrize(
    "patch", PATCHES, ids=lambda patch: f"{patch.name}-{patch.module.rsplit('.', 1)[-1]}"
)
def test_the_fault_is_still_there(patch):
    assert patch.name in FAULTS, "say which fault of the library this patch answers"
    pattern = FAULTS[patch.name]
    assert pattern is None or re.search(pattern, source(patch.module)), (
        f"{patch.module} no longer shows it: delete {patch.name}"
    )


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_fault_is_still_there_in_another_module(name):
    module, text = ELSEWHERE[name]
    assert text in source(module), f"delete {name}"


def test_no_fault_without_a_patch():
    assert set(FAULTS) == {patch.name for patch in PATCHES}


@pytest.mark.parametrize("library", LIBRARIES)
def test_patches_are_written_against_the_installed_version(library):
    assert importlib.metadata.version(library).split("+")[0] == LIBRARIES[library]


def test_every_patch_says_why():
    assert all(len(patch.reason) > 30 and patch.change.__doc__ for patch in PATCHES)


def run(program: str, **environment: str) -> str:
    """Output of a Python process that has not been patched, on a machine without visible GPUs."""
    ours = ("PYTHONPATH", "WORKSHOP_DEVICE", "TORCHDYNAMO_DISABLE")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_torch_without_cuda_refuses():
    answers = run(
        "import torch\nfor call in (torch.cuda.synchronize, torch.cuda.current_device, "
        "torch.zeros(1).cuda, torch.nn.Linear(1, 1).cuda):\n    try: call(); print('works')\n    "
        "except (AssertionError, RuntimeError, AttributeError) as error: print('refuses')"
    )
    assert answers.split() == ["refuses"] * 4


APPLY = "import os, subprocess, sys; from workshop_utils.runtime.nemo_cpu import apply; apply(); "


def test_apply_loads_neither_torch_nor_nemo():
    assert run(APPLY + "print('torch' in sys.modules)") == "False"


def test_children_inherit_and_run_the_next_sitecustomize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.from_the_next = True")
    program = (
        "child = 'import torch; print(torch.cuda.current_device(), torch.zeros(1).cuda().device, "
        "from_the_next)'; print(subprocess.run([sys.executable, '-W', 'ignore', '-c', child], "
        "capture_output=True, text=True).stdout)"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    assert run(APPLY + program, PYTHONPATH=paths) == "cpu cpu True"


def test_a_cuda_literal_makes_a_cpu_tensor_and_the_rest_is_torch():
    import torch

    proxy = torch_cuda.CpuTorch(torch)
    assert proxy.zeros(2, device="cuda").device.type == "cpu"
    assert proxy.Tensor is torch.Tensor and proxy.float32 is torch.float32


def test_inherit_keeps_what_is_there():
    environment = {"PYTHONPATH": "/mine"}
    nemo_cpu.inherit(environment)
    nemo_cpu.inherit(environment)
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/mine"
    assert environment["PYTHONPATH"].count("inherited") == 1
