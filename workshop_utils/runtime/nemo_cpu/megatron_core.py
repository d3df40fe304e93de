"""Patches of Megatron-Core 0.13.1: hard-coded CUDA devices, fused kernels, and the paged attention
kernels of its engine."""

import contextlib
from types import ModuleType

from .registry import no_cuda, no_transformer_engine, patch
from .torch_cuda import CpuTorch, name_types_of_the_cpu


@patch(
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.transformer.utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
    "megatron.core.rerun_state_machine",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.inference.contexts.dynamic_context",
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.two_stage",
    when=no_cuda,
)
def cuda_literals_in_megatron(module: ModuleType) -> None:
    """device='cuda' and pin_memory=True are written in the source: 'Torch not compiled with CUDA
    enabled'.

    Give the module a ``torch`` that makes its tensors on the CPU. Narrower, and faster, than a mode
    around every operation."""
    module.torch = CpuTorch(module.torch)


@patch("megatron.core.optimizer.clip_grads", when=no_cuda)
def clipping_on_cpu(module: ModuleType) -> None:
    """clipping asserts that gradients are of type 'torch.cuda.FloatTensor': AssertionError in the
    first step."""
    name_types_of_the_cpu(module.clip_grad_by_total_norm_fp32)


@patch("megatron.core.optimizer.optimizer", when=no_cuda)
def bf16_optimizer_on_cpu(module: ModuleType) -> None:
    """the optimizer of bf16 parameters compares their types with 'torch.cuda.BFloat16Tensor' and
    its like: TypeError."""
    name_types_of_the_cpu(module.Float16OptimizerWithFloat16Params.__init__)


@patch("megatron.core.tensor_parallel.random", when=no_cuda)
def random_states_of_the_gpu(module: ModuleType) -> None:
    """only seeded where a GPU exists: 'cuda rng state model-parallel-rng is not added'.

    There is one generator on a CPU; forking the tracker leaves it alone."""
    module.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    module.model_parallel_cuda_manual_seed = lambda *args, **kwargs: None


FUSIONS = (
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "bias_dropout_fusion",
    "bias_activation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
    "tp_comm_overlap",
)


@patch("megatron.core.transformer.transformer_config", when=no_transformer_engine)
def fusions_off(module: ModuleType) -> None:
    """NeMo's LlamaConfig asks for fused kernels that come with Transformer Engine or Apex:
    ValueError in __post_init__."""
    config = module.TransformerConfig
    check = config.__post_init__

    def post_init(self):
        for name in FUSIONS:
            if getattr(self, name, None):
                setattr(self, name, False)
        check(self)

    config.__post_init__ = post_init


@patch("megatron.core.models.gpt.gpt_layer_specs", when=no_transformer_engine)
def norm_before_the_experts(module: ModuleType) -> None:
    """the local layers store the norm before a mixture of experts as
    mlp.linear_fc1.layer_norm_weight; with Transformer Engine, and so in every checkpoint of a GPU,
    it is pre_mlp_layernorm.weight: neither machine loads the other's Mixtral.

    Store it under its own name: without a fused layer there is nothing to rename."""
    original = module.get_gpt_layer_local_spec

    def get_gpt_layer_local_spec(num_experts=None, *args, **kwargs):
        spec = original(num_experts, *args, **kwargs)
        if num_experts is not None:
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        return spec

    module.get_gpt_layer_local_spec = get_gpt_layer_local_spec


@patch("megatron.core.transformer.torch_norm", when=no_transformer_engine)
def zero_centred_layer_norm(module: ModuleType) -> None:
    """Nemotron's norm multiplies by (1 + weight), which only Apex and Transformer Engine have:
    AssertionError, 'zero_centered_gamma not supported by torch LayerNorm'."""
    torch, original = module.torch, module.WrappedTorchNorm.__new__

    class ZeroCentredLayerNorm(torch.nn.LayerNorm):
        def reset_parameters(self):
            torch.nn.init.zeros_(self.weight)
            torch.nn.init.zeros_(self.bias)

        def forward(self, hidden):
            return torch.nn.functional.layer_norm(
                hidden, self.normalized_shape, self.weight + 1, self.bias, self.eps
            )

    def new(cls, config, hidden_size, eps=1e-5, *args, **kwargs):
        if config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm":
            return ZeroCentredLayerNorm(hidden_size, eps=eps)
        return original(cls, config, hidden_size, eps, *args, **kwargs)

    module.WrappedTorchNorm.__new__ = new


@patch("megatron.core.transformer.moe.moe_utils", when=no_transformer_engine)
def router_without_transformer_engine(module: ModuleType) -> None:
    """the router of a mixture of experts asks whether te_general_gemm is there, a name that is only
    set with Transformer Engine: NameError."""
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None
