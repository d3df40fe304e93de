"""What a configuration may name, and what NeMo itself names."""

import pytest

from workshop_utils.checkpoints.formats import safe_text

GENUINE = [
    "nemo.collections.llm.gpt.model.llama.LlamaModel",
    "nemo.collections.llm.gpt.model.llama.Llama31Config8B",
    "nemo.collections.llm.gpt.model.base.default_layer_spec",
    "nemo.collections.llm.gpt.model.base.gpt_forward_step",
    "nemo.collections.llm.gpt.model.gemma2.gemma2_layer_spec",
    "nemo.collections.llm.fn.activation.openai_gelu",
    "nemo.collections.llm.peft.lora.LoRA",
    "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
    "nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule",
    "nemo.lightning.pytorch.optim.lr_scheduler.CosineAnnealingScheduler",
    "nemo.lightning.io.artifact.hf_auto.from_pretrained",
    "nemo.lightning.io.artifact.file.DirOrStringArtifact",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.optimizer.OptimizerConfig",
    "megatron.core.distributed.distributed_data_parallel_config.DistributedDataParallelConfig",
    "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider",
    "megatron.bridge.training.config.ConfigContainer",
    "torch.nn.functional.silu",
    "torch.bfloat16",
    "torch.nn.init.normal_",
    "functools.partial",
    "transformers.generation.configuration_utils.GenerationConfig",
    "nemo.collections.llm.gpt.model.qwen3.Qwen3Config30B_A3B",
    "nemo.collections.llm.t5.model.t5.T5Model",
    "nemo.collections.llm.gpt.data.packed_sequence.PackedSequenceSpecs",
    "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer",
    "megatron.core.optimizer.OptimizerConfig",
    "nemo.lightning.pytorch.plugins.mixed_precision.MegatronMixedPrecision",
    "megatron.core.transformer.enums.AttnBackend.auto",
    "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
    "nemo.lightning.pytorch.strategies.MegatronStrategy",
    "nemo.lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "nemo.lightning.pytorch.callbacks.ModelCheckpoint",
]

FOREIGN = [
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.nn.functional.silu.__globals__",
    "torch.utils.data.DataLoader",
    "torch.utils.cpp_extension.load",
    "torch.utils.collect_env.run",
    "subprocess.run",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "os.system",
    "nemo.collections.llm.api.import_ckpt",
    "nemo.collections.llm.api.finetune",
    "nemo.collections.llm.utils.factory",
    "nemo.lightning.io.mixin.load",
    "nemo.lightning.io.mixin.pickle_load",
    "nemo.lightning.io.artifact.pickle.PickleArtifact",
    "nemo.utils.app_state.AppState",
    "nemo.core.connectors.save_restore_connector.SaveRestoreConnector",
    "nemo.collections.asr.parts.utils.os.system",
    "nemo.collections.llm.gpt.model.base.os.system",
    "megatron.core.utils.os.system",
    "nemo.collections.llm.gpt.model.base.GPTModel.load_from_checkpoint",
    "nemo.collections.llm.gpt.model.base.torch.load",
    "megatron.core.dist_checkpointing.serialization.load",
    "transformers.AutoModel.from_pretrained",
    "transformers.pipeline",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "numpy.load",
    "pickle.loads",
    "nemo",
    "",
    "torch.bfloat16\nos.system",
    # Through what a module imports; each was found on a list that named packages.
    "nemo.collections.llm.gpt.model.base.torch.utils.cpp_extension.subprocess.Popen",
    "nemo.lightning.pytorch.callbacks.model_checkpoint.shutil.zipfile.ZipFile",
    "transformers.models.auto.os.subprocess.Popen",
    "nemo.collections.llm.peft.lora.torch.jit.CompilationUnit",
    "megatron.core.transformer.module.torch.classes.Config.load",
    # Classes of NeMo that read a pickle, make directories, call or fetch what they are told.
    "nemo.collections.common.tokenizers.tabular_tokenizer.TabularTokenizer",
    "nemo.lightning.pytorch.callbacks.memory_profiler.MemoryProfileCallback",
    "nemo.lightning.pytorch.callbacks.pytorch_profiler.PytorchProfilerCallback",
    "nemo.lightning.pytorch.callbacks.model_callback.ModelCallback",
    "nemo.collections.llm.gpt.model.hf_auto_model_for_causal_lm.HFAutoModelForCausalLM",
    "nemo.collections.llm.gpt.model.hf_llama_embedding.LlamaBidirectionalModel",
    "nemo.collections.llm.gpt.model.llama.HFLlamaImporter",
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "Torch.load",
    "nemo.collections.llm.gpt.model..Config",
    "functools.partial.__call__",
]


@pytest.mark.parametrize("name", GENUINE)
def test_what_nemo_names_is_known(name):
    assert safe_text.foreign_targets({"a": [{"_target_": name, "_call_": False}]}) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_what_runs_things_is_foreign(name):
    found = safe_text.foreign_targets({"a": [{"x": {"_target_": name}}]})
    assert [place for place, _ in found] == ["a[0].x._target_"]
    assert found[0][1].isprintable()


def test_other_ways_to_name_something():
    tree = {
        "target": "os.system",
        "tokenizer": {"_target_": GENUINE[7], "trust_remote_code": True},
        "base": {"tokenizer": {"library": "tabular", "vocab_file": "nemo:a.pkl"}, "library":
            "${x}"},
        "partial": {"_target_": "functools.partial", "_args_": [{"_target_": "os.system"}]},
        "list": {"_target_": ["os.system"]},
        "object": {"type": "pyref", "module": "os", "name": "system"},
    }  # fmt: skip
    assert safe_text.foreign_targets(tree) == [
        ("target", "os.system"),
        ("tokenizer.trust_remote_code", "True"),
        ("base.tokenizer.library", "tabular"),
        ("base.library", "${x}"),
        ("partial._args_[0]._target_", "os.system"),
        ("list._target_", "['os.system']"),
        ("object", "os.system"),
    ]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("megatron_gpt_model.MegatronGPTModel", True),
        ("megatron_gpt_sft_model.MegatronGPTSFTModel", True),
        ("megatron_gpt_prompt_learning_model.MegatronGPTPromptLearningModel", False),
        ("megatron_gpt_model.os.system", False),
    ],
)
def test_the_class_that_nemo_1_makes_of_a_file(name, known):
    found = safe_text.foreign_targets(
        {"target": f"nemo.collections.nlp.models.language_modeling.{name}"}
    )
    assert bool(found) is not known


def pyref(name):
    module, _, name = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


def leaf(value):
    return {"type": "leaf", "value": value}


def test_what_io_json_would_do_without_naming_it():
    """As fiddle reads it: the names of arguments come from the metadata, and NeMo unpickles an
    object with a single item."""
    names = {
        "type": pyref("builtins.tuple"),
        "items": [["Index(index=0)", "a"], ["Index(index=1)", leaf("trust_remote_code")]],
    }
    described = {
        "type": pyref("fiddle._src.config.BuildableTraverserMetadata"),
        "metadata": None,
        "items": [["x", pyref(GENUINE[7])], ["x", {"type": "ref", "key": "names"}]],
    }
    config = {
        "type": pyref("fiddle._src.config.Config"),
        "items": [["x", "b"], ["Attr(name='use_fast')", leaf(True)]],
        "metadata": {"type": "ref", "key": "described"},
    }
    pickled = {"type": pyref(GENUINE[0]), "items": [["", leaf("../a.pkl")]], "metadata": None}
    tree = {
        "root": {},
        "objects": {"names": names, "described": described, "config": config, "model":
            pickled, "odd": {"type": "pyref?", "module": "os", "name": "system"}},
    }  # fmt: skip
    assert safe_text.foreign_targets(tree) == [
        ("objects.config", "trust_remote_code=True"),
        ("objects.model", f"the pickle ../a.pkl, to make {GENUINE[0]} of it"),
        ("objects.odd", "os.system"),
    ]
    config["items"][1][1] = leaf(False)
    assert ("objects.config", "trust_remote_code=True") not in safe_text.foreign_targets(tree)


def test_other_meanings_of_the_words():
    tree = {
        "target": "attention_qkv",
        "dataset": {"target": 3},
        "tokenizer": {"trust_remote_code": False, "library": "sentencepiece"},
        "type": "pyramid",
    }
    assert safe_text.foreign_targets(tree) == []


def test_sound_texts_are_read():
    assert safe_text.parse_yaml(
        b"a: &x [1, 2.5e-05]\nb: *x\nc: {d: null, 'e': \"f\", 1: yes}\n", "x"
    ) == {
        "a": [1, 2.5e-05],
        "b": [1, 2.5e-05],
        "c": {"d": None, "e": "f", 1: True},
    }
    assert safe_text.parse_json(b'{"a": [Infinity, "\\ud83d\\ude00"]}', "x") == {
        "a": [float("inf"), "\U0001f600"]
    }
