"""Patches of the script path (``nemo.collections.nlp``, NeMo 1 style) of nemo-toolkit 2.4.1."""

import inspect
import os
import sys
import types
from types import ModuleType

from .nemo2 import local_layer_norm_name
from .registry import always, no_apex, no_cuda, no_transformer_engine, patch
from .torch_cuda import CpuTorch, name_types_of_the_cpu

GPT_MODEL = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"


@patch("nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins", when=always)
def lora_mixin_forward(module: ModuleType) -> None:
    """MCoreSelfAttentionMixin.forward() predates Megatron-Core 0.12: "unexpected keyword argument
    'inference_context'" on every LoRA run, on GPUs too.

    Use Megatron-Core's own ``forward``: it calls the mixin's ``get_query_key_value_tensors``, which
    adds the LoRA of q, k and v.

    The LoRA of the attention's output projection, which the replaced method added itself, becomes a
    forward hook."""
    attention, mixin = module.SelfAttention, module.MCoreSelfAttentionMixin
    if "inference_context" not in inspect.signature(attention.forward).parameters:
        return  # Megatron-Core before 0.12 and the mixin agree
    if "inference_context" in inspect.signature(mixin.forward).parameters:
        return  # a NeMo in which this is repaired
    name = module.AdapterName.LORA_DENSE_ATTENTION_ADAPTER

    def forward(self, *args, **kwargs):
        adapter = self.get_adapter_module(name) if self.is_adapter_available() else None
        if adapter is None or not self.adapter_cfg[name]["enabled"]:
            return attention.forward(self, *args, **kwargs)
        hook = self.linear_proj.register_forward_hook(
            lambda projection, inputs, output: (output[0] + adapter(inputs[0]), *output[1:])
        )
        try:
            return attention.forward(self, *args, **kwargs)
        finally:
            hook.remove()

    mixin.forward = forward


@patch("nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins", when=always)
def adapter_mixin_forward(module: ModuleType) -> None:
    """MCoreTransformerLayerMixin.forward() predates Megatron-Core 0.13: "unexpected keyword
    argument 'rotary_pos_cos'" on every run with peft_scheme=adapter, on GPUs too.

    Use Megatron-Core's own ``forward``; the two adapters of the layer become hooks on its attention
    and its feed-forward."""
    layer, mixin = module.TransformerLayer, module.MCoreTransformerLayerMixin
    if "rotary_pos_cos" in inspect.signature(mixin.forward).parameters:
        return  # a NeMo in which this is repaired
    names = {
        "self_attention": module.AdapterName.PRE_ATTN_ADAPTER,
        "mlp": module.AdapterName.POST_ATTN_ADAPTER,
    }

    def add(adapter):
        return lambda block, inputs, output: (output[0] + adapter(output[0]), *output[1:])

    def forward(self, *args, **kwargs):
        hooks = [
            getattr(self, part).register_forward_hook(add(adapter))
            for part, name in names.items()
            if self.is_adapter_available()
            and (adapter := self.get_adapter_module(name)) is not None
            and self.adapter_cfg[name]["enabled"]
        ]
        try:
            return layer.forward(self, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    mixin.forward = forward


@patch("nemo.collections.nlp.modules.common.text_generation_strategy", when=always)
def strategy_of_gpt_models(module: ModuleType) -> None:
    """choosing the way to generate imports every model family, the multimodal ones too: torchvision
    is needed for text.

    A GPT model gets its strategy without the imports; any other model takes the old way."""
    original = module.model_inference_strategy_dispatcher

    def dispatch(model, **arguments):
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
            MegatronGPTSFTModel,
        )

        if isinstance(model, MegatronGPTSFTModel):
            return module.GPTModelTextGenerationStrategy(model)
        return original(model, **arguments)

    module.model_inference_strategy_dispatcher = dispatch


@patch("nemo.collections.nlp.parts.nlp_overrides", when=no_apex)
def strategy_without_apex(module: ModuleType) -> None:
    """ImportError 'Apex was not found', although its names are only used in isinstance().

    Say that Apex is there and give the names classes of which nothing is an instance."""
    if not module.HAVE_APEX:
        from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

        module.HAVE_APEX = True
        module.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})
        module.McoreDistributedOptimizer = McoreDistributedOptimizer


@patch("nemo.collections.nlp.parts.nlp_overrides", when=no_apex)
def steps_of_the_optimizer(module: ModuleType) -> None:
    """torch's AdamW keeps its step as a tensor without axes, fused Adam does not: 'Optimizer shape
    (() does not match model shape' at the first checkpoint of a full fine-tuning.

    Steps are saved, and loaded, with the state that is not sharded."""
    original = module.optim_state_to_sharding_state

    def optim_state_to_sharding_state(state, *args, **kwargs):
        # The entries are the optimizer's own: it goes on with them.
        state["state"] = {number: dict(entry) for number, entry in state["state"].items()}
        entries = state["state"].items()
        steps = {number: entry.pop("step") for number, entry in entries if "step" in entry}
        original(state, *args, **kwargs)
        for number, step in steps.items():
            state["state"][number]["step"] = step

    module.optim_state_to_sharding_state = optim_state_to_sharding_state


@patch("nemo.collections.nlp.parts.nlp_overrides", when=no_cuda)
def resumed_tensors_stay_on_cpu(module: ModuleType) -> None:
    """asserts torch.cuda.is_initialized() when a run resumes from a distributed checkpoint."""
    module.NLPDDPStrategy._fix_tensors_device = lambda self, checkpoint: checkpoint


@patch("nemo.collections.nlp.models.language_modeling.megatron_base_model", when=no_apex)
def container_version(module: ModuleType) -> None:
    """_enable_nvidia_optimizations matches the container's version, None outside it: TypeError in
    re.fullmatch.

    A version before 21.11 also turns off the persistent layer norm, an Apex kernel."""
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "20.01")


@patch(GPT_MODEL, when=no_transformer_engine)
def local_layer_spec(module: ModuleType) -> None:
    """get_specs() builds every layer spec, Transformer Engine's too: NameError."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def get_specs(spec_name, transformer_config=None, use_te=True, hyena_cfg=None, fp8=False):
        return get_gpt_layer_local_spec(
            num_experts=transformer_config.num_moe_experts,
            # Only "decoder_block_gpt" of NeMo's own specs has norms of q and k; the others leave
            # them out without a word.
            qk_layernorm=spec_name == "decoder_block_gpt" and transformer_config.qk_layernorm,
            normalization=transformer_config.normalization,
        )

    module.get_specs = get_specs


@patch(GPT_MODEL, when=no_transformer_engine)
def process_groups_before_the_model(module: ModuleType) -> None:
    """Megatron-Core 0.13's local attention asks for process groups in its constructor; NeMo makes
    them later."""
    from megatron.core import parallel_state

    original = module.MegatronGPTModel.model_provider_func

    def model_provider_func(self, pre_process, post_process):
        if not parallel_state.is_initialized():
            strategy = self.trainer.strategy
            if strategy.launcher is not None:
                strategy.launcher.launch(lambda: None, trainer=self.trainer)
            strategy.setup_environment()
        return original(self, pre_process, post_process)

    module.MegatronGPTModel.model_provider_func = model_provider_func


@patch(GPT_MODEL, when=no_transformer_engine)
def layer_norm_names_of_state_dicts(module: ModuleType) -> None:
    """plain state dicts (adapters, merged models) name the layer norms as Transformer Engine fuses
    them.

    Rename on load. Distributed checkpoints need no help: the local spec maps the names itself."""
    original = module.MegatronGPTModel.load_state_dict

    def load_state_dict(self, state_dict, *args, **kwargs):
        kept = {
            local_layer_norm_name(name): value
            for name, value in state_dict.items()
            if not name.endswith("_extra_state")
        }
        return original(self, kept, *args, **kwargs)

    module.MegatronGPTModel.load_state_dict = load_state_dict


@patch("nemo.collections.nlp.modules.common.megatron.utils", when=no_apex)
def parameter_groups(module: ModuleType) -> None:
    """takes listify_model and the classes of Apex's norms from Apex only: NameError when the whole
    model is fine-tuned.

    A model, or a list of them, as a list; and torch's norms, which Megatron-Core uses then, among
    those without weight decay."""
    import torch

    module.listify_model = lambda model: model if isinstance(model, list) else [model]
    module.FusedLayerNorm = module.FastLayerNorm = torch.nn.LayerNorm
    module.MixedFusedRMSNorm = torch.nn.RMSNorm


@patch(
    "nemo.collections.nlp.modules.common.megatron.fused_bias_gelu",
    "nemo.collections.nlp.modules.common.megatron.fused_bias_geglu",
    "nemo.collections.nlp.modules.common.megatron.fused_bias_dropout_add",
    when=no_apex,
)
def cast_under_autocast(module: ModuleType) -> None:
    """_cast_if_autocast_enabled comes with Apex only: NameError in the encoder of p-tuning.

    Cast to the dtype of autocast where it is on, as Apex's function does for GPUs."""
    import torch

    def cast(*tensors):
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if not torch.is_autocast_enabled(kind):
            return tensors
        dtype = torch.get_autocast_dtype(kind)
        return tuple(
            tensor.to(dtype) if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor
            for tensor in tensors
        )

    module._cast_if_autocast_enabled = cast


@patch("nemo.collections.nlp.modules.common.megatron.build_model", when=no_apex)
def parallel_attributes(module: ModuleType) -> None:
    """takes set_defaults_if_not_set_tensor_model_parallel_attributes from Apex only: NameError."""
    from megatron.core.tensor_parallel.layers import (
        set_defaults_if_not_set_tensor_model_parallel_attributes as helper,
    )

    module.set_defaults_if_not_set_tensor_model_parallel_attributes = helper


@patch("nemo.core.optim.optimizer_with_main_params", when=no_apex)
def master_weights_without_apex(module: ModuleType) -> None:
    """megatron_amp_O2: ImportError 'Apex was not found', although its kernels are only called for
    fp16, which O2 refuses."""
    module.HAVE_APEX = True


@patch("nemo.core.optim.optimizer_with_main_params", when=no_cuda)
def master_weights_on_cpu(module: ModuleType) -> None:
    """megatron_amp_O2 compares types of parameters with 'torch.cuda.BFloat16Tensor' and its like:
    TypeError on a CPU."""
    name_types_of_the_cpu(module.MainParamsOptimizerWrapper.__init__)


@patch("nemo.collections.nlp.modules.common.megatron.clip_grads", when=no_apex)
def gradient_norm(module: ModuleType) -> None:
    """gradient clipping calls Apex's multi_tensor_applier and amp_C: NameError."""
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm

    module.multi_tensor_applier = local_multi_tensor_applier
    module.amp_C = types.SimpleNamespace(multi_tensor_l2norm=local_multi_tensor_l2_norm)


@patch(
    "nemo.collections.nlp.modules.common.megatron.clip_grads",
    "nemo.collections.nlp.modules.common.text_generation_utils",
    when=no_cuda,
)
def cuda_literals_in_nemo(module: ModuleType) -> None:
    """device='cuda' is written in the source: 'Torch not compiled with CUDA enabled'."""
    module.torch = CpuTorch(module.torch)


@patch("nemo.collections.nlp.data.language_modeling.megatron.dataset_utils", when=always)
def compiled_helpers(module: ModuleType) -> None:
    """BlendableDataset compiles a C++ file inside site-packages at run time: needs make, g++,
    pybind11 and write access.

    Use the same functions compiled in Megatron-Core.

    Its ``build_blending_indices`` wants int16 where NeMo passes uint8; pybind11 would convert
    silently and fill a copy."""
    import megatron.core.datasets.helpers_cpp as compiled
    import nemo.collections.nlp.data.language_modeling.megatron as package
    import numpy

    def build_blending_indices(dataset_index, dataset_sample_index, weights, count, size, verbose):
        wide = dataset_index.astype(numpy.int16)
        compiled.build_blending_indices(wide, dataset_sample_index, weights, count, size, verbose)
        dataset_index[:] = wide

    helpers = ModuleType(f"{package.__name__}.helpers")
    helpers.__dict__.update(
        {name: getattr(compiled, name) for name in dir(compiled) if name.startswith("build_")}
    )
    helpers.build_blending_indices = build_blending_indices
    sys.modules[helpers.__name__] = package.helpers = helpers
    module.compile_helper = lambda: None
