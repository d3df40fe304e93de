"""The names that NeMo and Megatron-Bridge (0.3 to 0.6) write into a checkpoint to be imported, and
that do no harm whatever is handed to them.

Each pattern ends at a class or function of one module. None lets a name go on through a module's
own imports: the loaders follow attributes, so that
``nemo...base.torch.utils.cpp_extension.subprocess.Popen`` is ``subprocess.Popen``. Left out on
purpose are, of NeMo 2.4.1, ``TabularTokenizer`` (reads a pickle), ``MemoryProfileCallback`` and
``PytorchProfilerCallback`` (make directories where they are told), ``ModelCallback`` (calls what it
is given), ``HFDatasetDataModule`` and ``HFAutoModelForCausalLM`` (may run code of a repository),
the prompt-learning models of NeMo 1 (load a second checkpoint), importers and exporters.
"""

import re

_LLM = r"nemo\.collections\.llm\."
_TOKENIZERS = r"nemo\.collections\.common\.tokenizers\."
_PYTORCH = r"nemo\.lightning\.pytorch\."
_CORE = r"megatron\.core\."
_CALLBACKS = (
    "DdpParityChecker|DeepEPCallback|FLOPsMeasurementCallback|GarbageCollectionCallback|"
    "JitConfig|JitTransform|MM_FLOPsMeasurementCallback|MegatronCommOverlapCallback|"
    "MegatronEnableExperimentalCallback|MegatronProgressBar|MegatronTokenDropCallback|"
    "MemoryMonitor|ModelCheckpoint|ModelTransform|NsysCallback|OptimizerMonitor|"
    "ParameterDebugger|PreemptionCallback|ProgressPrinter|RuntimeEstimator|SpeedMonitor"
)

KNOWN = re.compile(
    "|".join(
        [
            # Configurations and models. Not of modules hf_*, whose models are transformers' and
            # fetch what they are told.
            _LLM
            + r"(?:bert|gpt|t5)\.model\.(?:(?!hf_)\w+\.)?(?!Auto|PreTrained)[A-Z]\w*(?:Config\w*|Model)",  # noqa: E501
            _LLM
            + r"(?:bert|gpt|t5)\.model\.\w+\.\w*_(?:data_step|forward_step|layer_spec|full_layer_spec|block_spec)",  # noqa: E501
            _LLM + r"fn\.activation\.(?:openai_gelu|quick_gelu|squared_relu)",
            _LLM
            + r"peft\.(?:(?:lora|dora|canonical_lora)\.)?(?:LoRA|LoRAMerge|DoRA|CanonicalLoRA)",
            _LLM
            + r"gpt\.data\.(?:\w+\.)?(?:Alpaca|Chat|Dolly|FineTuning|Mock|PreTraining|Squad)DataModule",  # noqa: E501
            _LLM + r"gpt\.data\.packed_sequence\.PackedSequenceSpecs",
            _TOKENIZERS
            + r"(?:huggingface\.)?(?:\w+_tokenizers?\.)?(?:Auto|SentencePiece|Tiktoken|Null|ByteLevel)Tokenizer",  # noqa: E501
            # The run.
            _PYTORCH + rf"callbacks\.(?:\w+\.)?(?:{_CALLBACKS})",
            _PYTORCH + r"optim\.(?:\w+\.)?\w*(?:OptimizerModule|Scheduler)",
            _PYTORCH
            + r"strategies\.(?:\w+_strategy\.)?(?:MegatronStrategy|FSDP2?Strategy|ParallelismConfig)",  # noqa: E501
            _PYTORCH
            + r"plugins\.(?:\w+\.)?(?:MegatronDataSampler|MegatronMixedPrecision|DtypeConfig)",
            _PYTORCH + r"trainer\.Trainer",
            r"nemo\.lightning\.io\.artifact\.file\.(?:Path|File|Dir|DirOrString)Artifact",
            r"nemo\.lightning\.io\.artifact\.hf_auto\.from_pretrained",
            r"nemo\.lightning\.io\.pl\.TrainerContext",
            _CORE
            + r"(?:(?:distributed|optimizer|transformer)(?:\.heterogeneous)?(?:\.\w+_config)?|model_parallel_config)\.[A-Z]\w*Config",  # noqa: E501
            _CORE + r"(?:transformer\.)?enums\.[A-Z]\w*(?:\.[A-Za-z]\w*)?",
            r"megatron\.bridge\.(?:models|training|peft)\.(?:\w+\.){0,3}(?:[A-Z]\w*(?:Config|Container|Provider\w*)|\w*[LD]oRA)",
            # Dataclasses of settings; what would read the data is built from them later, and by
            # training alone.
            r"megatron\.bridge\.data\.(?:base|builders|conversation_processing|sft_processing|sources)\.(?:\w+\.)?[A-Z]\w*Config",
            r"megatron\.bridge\.data\.hf_processors\.\w+\.process_\w+_example",
            r"megatron\.training\.(?:config|models)\.\w+\.[A-Z]\w*Config",
            r"megatron\.core\.quantization\.quant_config\.RecipeConfig",
            r"megatron\.bridge\.models\.\w+\.\w*_layer_spec",
            # Functions of the model, dtypes, settings of generation and tokenizers.
            r"torch\.nn\.functional\.(?:elu|gelu|leaky_relu|relu|relu6|sigmoid|silu|softplus|tanh)",
            r"torch\.nn\.init\.(?:constant|kaiming_normal|kaiming_uniform|normal|ones|trunc_normal|uniform|xavier_normal|xavier_uniform|zeros)_",
            r"torch\.(?:bfloat16|float16|float32|float64|float|half|double|float8_e4m3fn|float8_e5m2|int8|int32|int64|uint8|long)",
            r"transformers\.generation\.configuration_utils\.GenerationConfig(?:\.from_dict)?",
            r"transformers\.models\.\w+\.(?:configuration|tokenization)_\w+\.[A-Z]\w*(?:Config|Tokenizer|TokenizerFast)",
            # Calls nothing by itself; its argument is a _target_, too.
            r"functools\.partial",
            # What io.json is made of.
            r"collections\.defaultdict",
            r"builtins\.(?:bool|dict|float|int|list|set|str|tuple)",
            r"fiddle\._src\.config\.(?:BuildableTraverserMetadata|Config)",
            r"fiddle\._src\.partial\.Partial",
        ]
    )
)
"""What ``_target_`` and ``pyref`` may name."""

NEMO1_MODEL = re.compile(
    r"nemo\.collections\.nlp\.models\.language_modeling\.(megatron_(?!\w*prompt_learning)\w+)\.Megatron(?!\w*PromptLearning)\w+Model"
)
"""What ``target`` at the top of a ``model_config.yaml`` may name: the class that NeMo 1 makes of
the file."""

CONTAINERS = re.compile(
    r"builtins\.(?:dict|list|set|tuple)|collections\.defaultdict|fiddle\._src\.(?:config\.(?:BuildableTraverserMetadata|Config)|partial\.Partial)"
)
"""The types of ``io.json`` that only hold. NeMo's own, with a single item, is a pickle:
``nemo.lightning.io.mixin._io_unflatten_object``."""
