"""NeMo 1.0 configuration -> NeMo 2.0 code. The arguments are compared with the installed NeMo's
source; a slow test executes the code."""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT
from tiny_model import make_tiny_model

from workshop_utils.cli import main
from workshop_utils.core.errors import WorkshopError
from workshop_utils.training.migrate import _flat, code, migrate
from workshop_utils.training.migrate.signatures import defaults, parameters, schedules
from workshop_utils.training.migrate.table import (
    CHECKPOINTING,
    DEFAULTS,
    FP8_ROWS,
    FP16_ROWS,
    ROWS,
    WEIGHT_DECAY,
)

CONFIGURATION = ROOT / "workshop_utils/training/script/conf/megatron_gpt_finetuning_config.yaml"

PRETRAINING = """\
name: small
trainer: {devices: 1, accelerator: cpu, precision: 32, max_steps: 20, val_check_interval: 10, gradient_clip_val: 1.0, logger: false}
exp_manager:
  exp_dir: /tmp/runs
  name: ${name}
  resume_if_exists: true
  checkpoint_callback_params: {monitor: validation_loss, save_top_k: 2, filename: "${name}--{validation_loss:.2f}-{step}"}
  create_early_stopping_callback: true
  early_stopping_callback_params: {monitor: validation_loss, patience: 3}
model:
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 1
  micro_batch_size: 2
  global_batch_size: 4
  encoder_seq_length: 64
  max_position_embeddings: ${.encoder_seq_length}
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: ${multiply:4, ${.hidden_size}}
  num_attention_heads: 4
  normalization: rmsnorm
  activation: swiglu
  bias: false
  layernorm_epsilon: 1e-5
  megatron_amp_O2: true
  virtual_pipeline_model_parallel_size: null
  dist_ckpt_format: zarr
  dist_ckpt_load_on_device: true
  dist_ckpt_parallel_save: false
  dist_ckpt_parallel_save_within_dp: false
  dist_ckpt_parallel_load: true
  dist_ckpt_torch_dist_multiproc: 2
  dist_ckpt_assume_constant_structure: true
  dist_ckpt_parallel_dist_opt: false
  dist_ckpt_load_strictness: log_all
  data: {data_prefix: [1.0, some_text_document], splits_string: "900,50,50", seq_length: 64, data_impl: mmap}
  tokenizer: {library: huggingface, type: tiny, use_fast: true}
  optim:
    name: distributed_fused_adam
    lr: 2e-4
    betas: [0.9, 0.98]
    overlap_grad_sync: true
    sched: {name: CosineAnnealing, warmup_steps: 5, min_lr: 2e-5, constant_steps: 0}
"""  # noqa: E501

FINETUNING = """\
trainer: {devices: 1, accelerator: cpu, precision: bf16, max_steps: 20}
model:
  restore_from_path: models/base
  pipeline_model_parallel_size: 2
  micro_batch_size: 2
  global_batch_size: 4
  hidden_dropout: 0.1
  optim: {name: adamw, lr: 1e-3}
  peft: {peft_scheme: lora, lora_tuning: {target_modules: [attention_qkv, mlp], adapter_dim: 8, alpha: 16, adapter_dropout: 0.05}}
  data:
    train_ds: {file_names: [data/rows/training.jsonl], max_seq_length: 128, label_key: output, add_eos: true}
    validation_ds: {file_names: [data/rows/validation.jsonl]}
"""  # noqa: E501


def written(folder, text, name="nemo1.yaml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "row", [*ROWS, *FP16_ROWS, *FP8_ROWS], ids=lambda row: f"{row.key}-{row.target}"
)
def test_every_row_of_the_table_names_an_argument_that_the_installed_nemo_takes(row):
    assert row.argument in parameters(row.target)


def test_the_table_holds_every_checkpoint_setting_of_nemo_1_and_not_the_name_of_nvidias_page():
    keys = {row.key.rpartition(".")[2]: row.argument for row in CHECKPOINTING}
    assert keys["dist_ckpt_load_on_device"] == "ckpt_load_directly_on_device"
    assert keys["dist_ckpt_parallel_dist_opt"] == "ckpt_parallel_save_optim"
    assert "ckpt_load_on_device" not in parameters("strategy")
    names = """format load_on_device parallel_save parallel_save_within_dp parallel_load
        torch_dist_multiproc assume_constant_structure parallel_dist_opt load_strictness"""
    ours = {name for name in keys if name.startswith("dist_ckpt")}
    assert ours == {f"dist_ckpt_{name}" for name in names.split()}
    theirs = {name for name in parameters("strategy") if "ckpt" in name}
    new_in_nemo_2 = {"ckpt_load_optimizer", "ckpt_save_optimizer"}
    assert theirs - {row.argument for row in CHECKPOINTING} == new_in_nemo_2


def test_the_table_in_docs_is_the_one_that_the_command_prints(capsys):
    assert main(["migrate", "--table"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs/migrating-from-nemo1.md").read_text()


@pytest.mark.parametrize("text", [PRETRAINING, FINETUNING, CONFIGURATION.read_text()])
def test_no_key_is_dropped(tmp_path, text):
    """Each key of the file becomes an argument, stands among the rest with a reason, or is null."""
    made = migrate(written(tmp_path, text))
    used = {one.source for arguments in made.parts.values() for one in arguments.values()}
    known = {
        "exp_manager.create_early_stopping_callback",
        "model.optim.sched.name",
        "model.peft.peft_scheme",
        "model.peft.lora_tuning.variant",
    }
    flat = dict(_flat(yaml.safe_load(text)))
    given = {key for key, value in flat.items() if value is not None and "<<" not in key}
    assert given - used - known - set(made.left) == set()
    assert made.unset == list(flat.values()).count(None) or "<<" in text


def test_values_are_translated(tmp_path):
    made = migrate(written(tmp_path, PRETRAINING))
    for place, value in {
        "strategy.save_ckpt_format": "zarr",
        "strategy.ckpt_async_save": False,  # zarr cannot, and NeMo 2.0's default is True
        "optimizer.use_distributed_optimizer": True,
        "optimizer.lr": 2e-4,
        "config.gated_linear_unit": True,
        "config.normalization": "RMSNorm",
        "config.ffn_hidden_size": 128,
        "checkpoint.filename": "small--{val_loss:.2f}-{step}",
        "stopping.monitor": "val_loss",
        "ddp.overlap_grad_reduce": True,
    }.items():
        assert made.value(*place.split(".")) == value, place
    assert "fp32" in made.left["model.megatron_amp_O2"][1]
    assert made.unset == 1


def test_an_adapter_is_translated(tmp_path):
    made = migrate(written(tmp_path, FINETUNING))
    assert {name: argument.value for name, argument in made.parts["peft"].items()} == {
        "target_modules": ["linear_qkv", "linear_fc1", "linear_fc2"],
        "dim": 8,
        "alpha": 16,
        "dropout": 0.05,
        "dropout_position": "post",  # NeMo 1.0's default; NeMo 2.0's is pre
        "lora_A_init_method": "normal",  # and here xavier
    }
    assert repr(made.value("strategy", "pipeline_dtype")) == "torch.bfloat16"
    assert made.value("finetuning", "dataset_root") == "data/rows"
    assert "model.data.validation_ds.file_names" in made.left


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (("swiglu", "reglu"), "model.activation"),
        (("CosineAnnealing", "Unheard"), "model.optim.sched.name"),
        (("distributed_fused_adam", "sgdx"), "model.optim.name"),
        (("precision: 32", "precision: 64"), "trainer.precision"),
    ],
)
def test_a_value_without_a_counterpart_is_listed(tmp_path, change, left):
    assert left in migrate(written(tmp_path, PRETRAINING.replace(*change))).left


@pytest.mark.parametrize("scheme", ["ptuning", "lora,ptuning", "ia3"])
def test_another_peft_scheme_trains_no_whole_model(tmp_path, scheme):
    text = f"model: {{peft: {{peft_scheme: '{scheme}'}}, data: {{train_ds: {{file_names: [a]}}}}}}"
    script = code.script(migrate(written(tmp_path, text)))
    ast.parse(script)
    assert f'raise NotImplementedError("model.peft.peft_scheme is {scheme}: give peft=' in script


def test_a_file_whose_settings_stand_in_another_is_refused(tmp_path):
    with pytest.raises(WorkshopError, match="defaults names 'base'.*--cfg job"):
        migrate(written(tmp_path, "defaults: [base, _self_]\nmodel: {num_layers: 2}"))
    migrate(written(tmp_path, "defaults: [_self_]\nmodel: {num_layers: 2}"))


def test_normalization_is_read_as_nemo_1_does(tmp_path):
    text = PRETRAINING.replace("normalization: rmsnorm", "normalization: RMSNorm")
    assert migrate(written(tmp_path, text)).value("config", "normalization") == "RMSNorm"


def test_schemes_without_a_counterpart_are_listed(tmp_path):
    made = migrate(written(tmp_path, FINETUNING.replace("peft_scheme: lora,", "peft_scheme: ia3,")))
    assert "peft" not in made.parts
    assert {"model.peft.peft_scheme", "model.peft.lora_tuning.adapter_dim"} <= set(made.left)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {tensor_model_parallel_sise: 2}", "Did you mean model.tensor_model_parallel_size"),
        ("model: {dist_ckpt_formatt: zarr}", "Did you mean model.dist_ckpt_format"),
        ("a: [1", "line 1"),
        ("- 1", "holds a list"),
        ("model: 3", "nemo1.yaml, model: is 3"),
        ("model: {lr: '${nope}'}", "model.lr"),
        ("_target_: nemo.X", "NeMo 2.0"),
        ("architectures: [X]", "Hugging Face"),
        ("services: {}", "no NeMo 1.0 configuration"),
        ("model: !!python/object:os.system {}", "line 1"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, capsys, text, message):
    path = written(tmp_path, text)
    assert main(["migrate", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "nemo1.yaml" in error


def test_a_key_that_looks_mistyped_can_be_kept(tmp_path):
    path = written(tmp_path, "model: {tensor_model_parallel_sise: 2}")
    assert "model.tensor_model_parallel_sise" in migrate(path, allow_unknown=True).left


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "model.nemo").write_bytes(b"\x80\x02\x00" * 100)
    for name in ("model.nemo", "absent.yaml"):
        with pytest.raises(WorkshopError, match=name):
            migrate(tmp_path / name)


def test_the_command_writes_a_script_and_replaces_none(tmp_path, capsys):
    command = ["migrate", str(written(tmp_path, PRETRAINING)), "--out"]
    assert main([*command, str(tmp_path / "new.py")]) == 0
    ast.parse((tmp_path / "new.py").read_text())
    assert main([*command, str(tmp_path / "new.py")]) == 1
    assert "there already" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "new.py" / "new.py")]) == 1
    assert "cannot be written (File exists). Choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(schedules()))
def test_every_schedule_of_nemo_2_is_one_of_nemo_1s_names(name, tmp_path):
    text = PRETRAINING.replace("name: CosineAnnealing", f"name: {name}")
    assert f"nl.lr_scheduler.{name}Scheduler(" in code.script(migrate(written(tmp_path, text)))


CHECKS = {
    PRETRAINING: "assert strategy.save_ckpt_format == 'zarr'; assert config.num_layers == 2; "
    "assert optim.config.lr == 2e-4; assert strategy.parallel_save_optim is False",
    FINETUNING: "assert peft.dim == 8; assert data.seq_length == 128; assert "
    "strategy.pipeline_model_parallel_size == 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", CHECKS, ids=["pretraining", "finetuning"])
def test_the_printed_code_runs(tmp_path, text):
    """What the script defines is built by NeMo itself; the strategy has then the values of the
    file."""
    (tmp_path / "migrated.py").write_text(code.script(migrate(written(tmp_path, text))))
    make_tiny_model(tmp_path / "tiny")  # for its tokenizer
    for end in ("bin", "idx"):  # the data module looks for them
        (tmp_path / f"some_text_document.{end}").touch()
    program = (
        "from workshop_utils.runtime import nemo_cpu\nnemo_cpu.apply()\nfrom migrated import *\n"
        f"{CHECKS[text]}\nprint('built')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "WORKSHOP_DEVICE": "cpu"},
    )
    assert done.stdout.strip().endswith("built"), done.stderr[-2000:]


def test_nothing_of_the_file_becomes_code_by_itself(tmp_path):
    """Line breaks in keys and names, keys below a known one, and numbers that Python writes
    otherwise."""
    sched = {"name": "CosineAnnealing", "warmup_steps": 5, "below\n": {"min_lr": 1}}
    optim = {"name": "fused_adam", "lr": float("inf"), "sched": sched}
    model = {"tensor_model_parallel_size": 2, "evil\nimport os #": 1, "optim": optim}
    file = tmp_path / 'a"""\nimport os #.yaml'
    file.write_text(yaml.safe_dump({"model": model}))
    text = code.script(migrate(file))
    assert not any(isinstance(node, ast.Import) for node in ast.parse(text).body)
    assert 'lr=float("inf")' in text and "warmup_steps=5" in text


# Keys that are absent


_MODELS = "nemo/collections/nlp/models/language_modeling/"
_PEFT, _BASE = "nemo/collections/nlp/parts/peft_config.py", f"{_MODELS}megatron_base_model.py"
_CHECKPOINTS = "nemo/utils/callbacks/dist_ckpt_io.py"
_BUILDER = "nemo/collections/nlp/parts/megatron_trainer_builder.py"
READ = {
    "strategy.ckpt_parallel_save": (_CHECKPOINTS, "dist_ckpt_parallel_save"),
    "strategy.ckpt_parallel_load": (_CHECKPOINTS, "dist_ckpt_parallel_load"),
    "strategy.ckpt_async_save": (_BUILDER, "async_save"),
    "config.bias_activation_fusion": (_BASE, "bias_activation_fusion"),
    "config.bias_dropout_fusion": (_BASE, "bias_dropout_add_fusion"),
    "config.gradient_accumulation_fusion": (_BASE, "gradient_accumulation_fusion"),
    "config.seq_length": (f"{_MODELS}megatron_gpt_model.py", "encoder_seq_length"),
    "peft.dropout_position": (_PEFT, "dropout_position"),
    "peft.lora_A_init_method": (_PEFT, "column_init_method"),
    "rows.label_key": (f"{_MODELS}megatron_gpt_sft_model.py", "label_key"),
    "fp8.fp8_amax_history_len": (f"{_MODELS}megatron_gpt_model.py", "fp8_amax_history_len"),
    "fp8.fp8_amax_compute_algo": (f"{_MODELS}megatron_gpt_model.py", "fp8_amax_compute_algo"),
}
"""Where the installed NeMo reads a key with ``get``, and so what it does without."""


def installed(file):
    package, _, rest = file.partition("/")
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return ast.parse((Path(folder) / rest).read_text())


def got(file, key):
    """The defaults with which ``file`` of the installed NeMo reads ``key``."""
    calls = [node for node in ast.walk(installed(file)) if isinstance(node, ast.Call)]
    return [
        ast.literal_eval(call.args[1])
        for call in calls
        if getattr(call.func, "attr", "") == "get"
        and len(call.args) == 2
        and getattr(call.args[0], "value", None) == key
        and isinstance(call.args[1], ast.Constant)
    ]


@pytest.mark.parametrize(
    "target, argument", [(target, name) for target in DEFAULTS for name in DEFAULTS[target]]
)
def test_what_is_written_for_an_absent_key_is_what_the_installed_nemo_1_does(target, argument):
    ours = DEFAULTS[target][argument]
    assert defaults("precision" if target == "fp8" else target)[argument] != ours
    if target == "stopping":
        fields = next(
            node
            for node in installed("nemo/utils/exp_manager.py").body
            if getattr(node, "name", "") == "EarlyStoppingParams"
        )
        theirs = {one.target.id: one.value for one in fields.body if isinstance(one, ast.AnnAssign)}
        assert ast.literal_eval(theirs[argument]) == ours
    elif argument == "target_modules":
        function = next(
            node
            for node in installed(_PEFT).body
            if getattr(node, "name", "") == "get_target_modules"
        )
        assert ast.literal_eval(function.args.defaults[0]) == ("attention_qkv",)
    elif argument == "clip_grad":  # off
        assert defaults("trainer")["gradient_clip_val"] is None and ours == 0
    else:
        assert ours in got(*READ[f"{target}.{argument}"])


def test_rank_is_nemo_1s_alpha():
    assert 'lora_cfg.get("alpha", lora_cfg.adapter_dim)' in ast.unparse(installed(_PEFT)).replace(
        "'", '"'
    )


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_weight_decay_of_torch(name):
    import torch

    theirs = inspect.signature(getattr(torch.optim, name)).parameters["weight_decay"].default
    assert WEIGHT_DECAY[name.lower()] == theirs


@pytest.mark.parametrize("name", schedules())
def test_an_absent_setting_of_a_schedule_is_nemo_1s(tmp_path, name):
    from nemo.core.optim import lr_scheduler

    text = f"model: {{optim: {{name: adamw, lr: 1e-3, sched: {{name: {name}}}}}}}"
    made = migrate(written(tmp_path, text))
    taken = schedules()[name] | {n: one.value for n, one in made.parts["schedule"].items()}
    theirs = {}
    for kind in reversed(getattr(lr_scheduler, name).__mro__[:-1]):
        for parameter in inspect.signature(kind.__init__).parameters.values():
            if parameter.default is not parameter.empty:
                theirs[parameter.name] = parameter.default
    shared = theirs.keys() & taken.keys() - {"max_steps"}
    assert {key: taken[key] for key in shared} == {key: theirs[key] for key in shared}


MINIMAL = """\
trainer: {max_steps: 9}
exp_manager: {create_early_stopping_callback: true}
model:
  restore_from_path: base
  optim: {name: fused_adam, lr: 1e-4, sched: {name: CosineAnnealing}}
  peft: {peft_scheme: lora, lora_tuning: {adapter_dim: 8, adapter_dropout: 0.0}}
  data: {train_ds: {file_names: [a.jsonl], global_batch_size: 4, micro_batch_size: 2}}
"""


def test_a_file_with_few_keys_does_what_nemo_1_did(tmp_path):
    made = migrate(written(tmp_path, MINIMAL))
    for place, value in {
        "peft.alpha": 8,
        "peft.target_modules": ["linear_qkv"],
        "optimizer.clip_grad": 0.0,
        "optimizer.weight_decay": 0.0,
        "stopping.patience": 10,
        "finetuning.global_batch_size": 4,
        "finetuning.micro_batch_size": 2,
    }.items():
        assert made.value(*place.split(".")) == value, place
    assert made.value("schedule", "constant_steps") is None
    assert made.parts["schedule"]["constant_steps"].note == "NeMo 2.0's is 80000"
    assert made.parts["checkpoint"] == {}  # NeMo 1.0 makes one unless it is told not to
    assert made.left == {"model.data.train_ds.prompt_template": (None, "has to be given")}


_LORA, _BATCH = "model.peft.lora_tuning", "global_batch_size"


@pytest.mark.parametrize(
    "old, new, key, reason",
    [
        ("adapter_dropout: 0.0", "dropout: 0.0", f"{_LORA}.dropout", "adapter_dropout"),
        ("adapter_dim: 8, ", "", f"{_LORA}.adapter_dim", "has to be given"),
        ("adapter_dim: 8, ", "r: 8, ", f"{_LORA}.r", "no such argument"),
        ("dim: 8", "dim: 8, layer_selection: [1]", f"{_LORA}.layer_selection", "chooses layers"),
        ("lr: 1e-4, ", "", "model.optim.lr", "has to be given"),
        ("lr: 1e-4", "lr: 1e-4, adam_beta1: 0.8", "model.optim.adam_beta1", "model.optim.betas"),
        ("model:", f"model:\n  {_BATCH}: 8", f"model.{_BATCH}", "trains with model.data"),
        ("model:", f"model:\n  {_BATCH}: 4", f"model.data.train_ds.{_BATCH}", "says the same"),
        ("steps: 9", "steps: 9, strategy: ddp", "trainer.strategy", "that is known here"),
    ],
)
def test_a_key_that_is_not_migrated_has_a_true_reason(tmp_path, old, new, key, reason):
    made = migrate(written(tmp_path, MINIMAL.replace(old, new)), allow_unknown=True)
    assert reason in made.left[key][1]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfmodel: {num_layers: 2}\r\n",
        "model: {num_layers: 2}".encode("utf-16"),
        b"",
        b"model:",
        b"- model",
        b"model: {num_layers: 2, num_layers: 3}",
        b"model: {optim: {name: [a], sched: {name: [b]}}}",
        b"model: {num_layers: .nan, activation: {a: 1}, peft: {peft_scheme: {a: b}}}",
        b"model: {peft: {peft_scheme: lora, lora_tuning: null}, optim: null, data: null}",
        b"model: {data: {train_ds: {file_names: {a: 1}, global_batch_size: [1]}}}",
        b"model: {1: 2, num_layers: 2024-01-01}",
        b"model: {num_layers: !!python/object:os.system x}",
        b"model: &a {num_layers: *a}",
        b"model: {num_layers: '${div:1,0}'}",
        b"trainer: {precision: {a: 1}, max_steps: [1]}",
        b"model: {restore_from_path: 7, peft: {peft_scheme: lora}}",
        b"model: {optim: {betas: 3, name: adam, weight_decay: a}}",
        b"a: 1\n---\nb: 2\n",
        b"\x00",
        b"model: " + b"[" * 5000,
    ],
)
def test_no_file_ends_in_a_traceback(tmp_path, capsys, content):
    (tmp_path / "x.yaml").write_bytes(content)
    status = main(["migrate", str(tmp_path / "x.yaml")])
    said = capsys.readouterr()
    assert (status == 0) != said.err.startswith("error: "), said
    if status == 0:
        ast.parse(said.out)
    else:
        assert "x.yaml" in said.err
