"""What is found before NeMo is imported: batch arithmetic, parallel sizes, data, settings; and the
counts against NeMo's own."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from tiny_model import write_rows

from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.training import data_check
from workshop_utils.training.data_check import Template
from workshop_utils.training.script import configuration, estimate, make_plan, preflight
from workshop_utils.training.script.plan import SCRIPT


@pytest.fixture
def check(root, plan):
    """A function from overrides to the plan's preflight, on 16 rows."""
    files = [
        write_rows(root / f"{name}.jsonl", n) for name, n in (("train", 16), ("validation", 3))
    ]
    files[1].write_text(files[1].read_text().replace("number", "figure"))

    def made(*overrides: str, processes: int = 1, **options):
        own = {"data": files[0], "validation": files[1], "nproc_per_node": processes}
        return plan(*overrides, **own | options).preflight

    return made


@pytest.fixture
def tokenizer(base):
    return ChatTokenizer(base.parent / "hf")


def test_a_sound_run_has_facts_and_no_problem(check):
    seen = check()
    assert seen.problems == []
    seen.require()
    batch = "8 rows = 8 a micro batch x 1 accumulated x 1 data-parallel (TP 1 x PP 1 x CP 1)"
    assert f"batch: {batch}" in seen.facts
    # rank x (in + out) of the fused projection, in each of the four layers
    assert fact(seen, "trainable").startswith(f"trainable: {4 * 32 * (64 + 128):,} of ")


ALIASES = {
    "TRAIN": "model.data.train_ds",
    "LORA": "model.peft.lora_tuning",
    "SCHEME": "model.peft.peft_scheme",
    "TP": "model.tensor_model_parallel_size",
    "PP": "model.pipeline_model_parallel_size",
    "CHECKPOINT": "exp_manager.checkpoint_callback_params",
    "STOPPING": "exp_manager.early_stopping_callback_params",
}
# Processes | overrides | a part of the problem; nothing where there is none
CASES = """
1 | model.global_batch_size=9 | global_batch_size 9 is no multiple of micro batch 8 x 1
1 | model.global_batch_size=4 | Set model.global_batch_size=8
1 | model.micro_batch_size=0 | micro_batch_size is 0; it has to be a whole number of at least 1
2 |  | global_batch_size 8 is no multiple of micro batch 8 x 2 data-parallel copies
1 | model.micro_batch_size=x | model.micro_batch_size is 'x'; it has to be a whole number
1 | model.data.validation_ds.global_batch_size=3 | Set model.data.validation_ds.global_batch_size=8
1 | trainer.num_nodes=2 | starts torchrun on this machine alone
1 | trainer.max_steps=abc | max_steps is 'abc'; it has to be a whole number of at least 1
1 | trainer.max_steps=2.5 | max_steps is 2.5; it has to be a whole number
1 | trainer.max_steps=-1 | max_steps is -1; it has to be a whole number
1 | trainer.max_steps= | max_steps is ''; it has to be a whole number
1 | trainer.max_steps=9 | 9 steps: no checkpoint would be kept. Set trainer.val_check_interval=3
1 | trainer.val_check_interval=1.5 | val_check_interval is 1.5; it has to be a whole number, or a
1 | trainer.limit_val_batches=all | limit_val_batches is 'all'
1 | model.optim.lr=nan | model.optim.lr is nan; it has to be a number above 0
1 | model.answer_only_loss=maybe | answer_only_loss is 'maybe'; it has to be true or false
1 | LORA=null | lora_tuning is None; it has keys of its own, for example model.peft.lora_tuning.
1 | trainer=5 | trainer is 5; it has keys of its own
1 | model.resume_from_checkpoint=x | reads it nowhere
1 | TRAIN.max_seq_length=0 | max_seq_length is 0
1 | TRAIN.truncation_method=middle | truncation_method is 'middle'; it has to be left or right
1 | TRAIN.prompt_template=5 | prompt_template is 5; it has to be a text
1 | TRAIN.concat_sampling_probabilities=[a] | is ['a']; it has to be a list of numbers
1 | TRAIN.concat_sampling_probabilities=[-1] | shares that are not below 0
1 | LORA.target_modules=attention_qkv | it has to be a list of texts
1 | SCHEME=ia3 & model.peft.ia3_tuning.layer_selection=[7] | layer_selection is [7]; layers are numb
2 | TP=2 & LORA.adapter_dim=3 | adapter_dim 3 is no multiple of
1 | TP=2 | TP 2 x PP 1 x CP 1 needs a multiple of 2
4 | TP=4 | size 4 does not divide the 2 key/value groups. Possible below it: [1, 2]
3 | PP=3 | size 3 does not divide the 4 layers
2 | trainer.devices=4 | Give --nproc-per-node=4
2 | model.context_parallel_size=2 | only through Transformer Engine
2 | ++model.context_parallel_size=2 | only through Transformer Engine
2 | SCHEME=ptuning & PP=2 | those of ptuning are not put together
2 | SCHEME=adapter & model.peft.adapter_tuning.adapter_dim=3 & TP=2 | adapter_dim 3 is no multiple
1 | model.sequence_parallel=true | sequence_parallel needs
1 | trainer.precision=bf16-true | trainer.precision is 'bf16-true'; there are 32, 32-true
1 | model.megatron_amp_O2=true | megatron_amp_O2 works with bf16 alone; trainer.precision is 32
1 | model.megatron_amp_O2=true & trainer.precision=16-mixed | megatron_amp_O2 works with bf16 alone
1 | model.optim.name=adamx | model.optim.name is adamx. Did you mean adamax? There are sgd, adam,
1 | model.optim.sched.name=CosineAnealing | sched.name is CosineAnealing. Did you mean CosineAnneali
1 | CHECKPOINT.monitor=val_acc | monitor is val_acc, which the script does not log. There are val
1 | STOPPING.monitor=eval_loss | early_stopping_callback_params.monitor is eval_loss
1 | STOPPING.monitor=validation_loss_dataloader0 |
1 | model.optim.name=lamb | optim.name is lamb, which needs a GPU and Apex. Leave it out
1 | model.optim.name=fused_adam | optim.name is fused_adam, which needs a GPU and Apex. Leave it out
1 | model.optim.name=mcore_distributed_optim | mcore_distributed_optim, which needs a GPU. Leave
1 | trainer.accelerator=gpu | accelerator is gpu, but this plan is for the CPU (WORKSHOP_DEVICE=cpu)
1 | ++model.fsdp=true | sharding by FSDP is for GPUs
1 | SCHEME=dora | peft_scheme is 'dora'; there are lora, ptuning
1 | LORA.target_modules=[q_proj] | names q_proj; there are attention_qkv
1 | LORA.adapter_dim=0 | adapter_dim is 0
1 | LORA.adapter_dropout=1.0 | adapter_dropout is 1.0
1 | LORA.layer_selection=[0,1] | layers are numbered from 1 to 4
1 | TRAIN.prompt_template='{output} {input}' | has to end with {output}
1 | TRAIN.prompt_template='plain' | it names no column
1 | TRAIN.prompt_template='{input} é {output}' | outside ASCII, which NeMo garbles
1 | TRAIN.truncation_field=context |
1 | TRAIN.truncation_field=question | names 'question'; the template has input, output
1 | TRAIN.concat_sampling_probabilities=[0.5] | adds up to 0.5
1 | TRAIN.concat_sampling_probabilities=null | needs one share for each of 1 files, for instance [1]
1 | model.data.validation_ds.names=[a,b] | has 2 names for 1 files
1 | TRAIN.label_key=answer & TRAIN.prompt_template='{input}{answer}' | a text in 'answer'; the row h
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_what_would_fail_is_said_before(check, case):
    processes, words, said = (part.strip() for part in f"{case} ".split(" | "))
    for short, key in ALIASES.items():
        words = re.sub(rf"\b{short}\b", key, words)
    seen = check(*filter(None, words.split(" & ")), processes=int(processes))
    if not said:
        assert seen.problems == []
        return
    assert any(said in problem for problem in seen.problems), seen.problems
    with pytest.raises(WorkshopError, match="this run would fail"):
        seen.require()


def fact(seen, name: str) -> str:
    (line,) = (line for line in seen.facts if line.startswith(f"{name}: "))
    return line


WEIGHTS = 4 * (64 * 16 * 12 + 3 * 64 * 128) + 512 * 64
"""Of SIZES: attention, a feed-forward with a gate, embeddings that are tied."""


@pytest.mark.parametrize(
    "scheme, count",
    [
        ("lora", 4 * 32 * (64 + 128)),
        ("adapter", 4 * 2 * (2 * 64 * 32 + 2 * 64)),
        ("ia3", 4 * (2 * 32 + 128)),
        ("ptuning", 10 * 1024 + 1025 * 1024 + 1025 * 64),
        ("none", WEIGHTS),
    ],
)
def test_what_a_run_needs(check, monkeypatch, scheme, count):
    """The schemes' own counts against NeMo are in test_finetune_schemes.py."""
    monkeypatch.setattr(estimate, "operations_per_second", lambda: 1e7)
    steps = "trainer.max_steps=20", "trainer.val_check_interval=10"
    seen = check(f"model.peft.peft_scheme={scheme}", *steps)
    assert fact(seen, "trainable").startswith(f"trainable: {count:,} of {WEIGHTS:,} weights")
    counted = [re.findall(r"([\d]+) tokens a row, longest (\d+)", line) for line in seen.facts]
    (train, longest), (validation, other) = (map(int, one[0]) for one in counted if one)
    length = max(longest, other)
    # Weights; a gradient and two moments of what is trained; activations of a micro batch and two
    # copies of its logits.
    activations = 4 * 8 * length * 64 * (34 + 5 * 4 * length / 64) * 2 + 2 * 4 * 8 * length * 512
    memory = (4 * WEIGHTS + 16 * count + activations) / 1e9
    assert fact(seen, "memory").startswith(f"memory: about {memory:.1f} GB")
    disk = f"disk: about {(2 * 12 + 4) * count / 1e6:,.0f} MB for 2 checkpoints"
    assert fact(seen, "disk").startswith(disk)
    operations = (4 * WEIGHTS + 2 * count) * 20 * 8 * train + 2 * WEIGHTS * 2 * 3 * validation
    minutes = float(re.search(r"about ([\d.]+) min for 20 steps", fact(seen, "time"))[1])
    assert minutes == pytest.approx(operations / 1e7 / 60, rel=0.05)


@pytest.mark.parametrize("top, kept", [(1, 2), (2, 3), (0, 1), (-1, 6)])
def test_the_checkpoints_that_are_kept_need_room(check, monkeypatch, top, kept):
    size = (12 * kept + 4) * 4 * 32 * (64 + 128)
    for free in (size, size - 1):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place, usage=usage: usage)
        seen = check(
            f"exp_manager.checkpoint_callback_params.save_top_k={top}",
            "trainer.max_steps=50",
            "trainer.val_check_interval=10",
        )
        said = f"disk: about {size / 1e6:,.0f} MB for {kept} checkpoints and the .nemo"
        assert fact(seen, "disk") == said
        assert len(seen.problems) == (free < size)
        assert all("MB are needed on disk" in problem for problem in seen.problems)


def test_the_speed_of_a_machine_is_that_of_its_best_moment(monkeypatch):
    ticks = iter([0, 9, 10, 12, 20, 21, 30, 35, 40, 48])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert estimate.operations_per_second() == 2 * 1024**3


@pytest.mark.parametrize(
    "file, ours",
    [
        ("optimizers.py", {*preflight.OPTIMIZERS} - {"mcore_distributed_optim"}),
        ("lr_scheduler.py", {*preflight.SCHEDULERS}),
    ],
)
def test_the_optimizers_and_schedules_are_those_of_nemo(file, ours):
    optim = Path(importlib.util.find_spec("nemo").origin).parent / "core" / "optim"
    text = (optim / file).read_text().split("__all__ =")[0]
    key = r"""(?m)^ {4}['"](\w+)['"]: |AVAILABLE_\w+\[['"](\w+)['"]\]"""
    assert {one or other for one, other in re.findall(key, text)} == ours


def test_a_value_from_another_key_is_told_once(check):
    said = (
        "model.data.train_ds.max_seq_length is 'long'; it has to be a whole number of at least 1."
    )
    assert check("model.data.train_ds.max_seq_length=long").problems == [said]


@pytest.fixture
def written(root, monkeypatch):
    """A function from LoRA settings and the names of weight files to the override that goes on from
    such an adapter."""
    monkeypatch.setattr("workshop_utils.training.script.plan.require_sound", lambda *_: None)

    def write(lora: dict, *weights: str) -> str:
        described = yaml.safe_dump({"peft": {"peft_scheme": "lora", "lora_tuning": lora}}).encode()
        with tarfile.open(root / "a.nemo", "w") as archive:
            files = {"model_config.yaml": described} | dict.fromkeys(weights, b"")
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return f"model.peft.restore_from_path={root / 'a.nemo'}"

    return write


LORA = "model.peft.lora_tuning"
SAME = {"adapter_dim": 8, "target_modules": "[attention]"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, None),
        ({"adapter_dim": 32}, "has rank 8; {}.adapter_dim is 32. Set it to 8."),
        (
            {"target_modules": "[attention_qkv]"},
            "has modules [attention_dense, attention_qkv]; {}.target_modules is ['attention_qkv']",
        ),
        (
            {"layer_selection": "[2]"},
            "has layers null; {}.layer_selection is [2]. Set it to null.",
        ),
    ],
)
def test_the_adapter_to_go_on_from_is_of_the_same_kind(check, written, changes, said):
    modules = ["attention_dense", "attention_qkv"]
    start = written({"adapter_dim": 8, "target_modules": modules, "layer_selection": None})
    settings = (f"{LORA}.{key}={value}" for key, value in (SAME | changes).items())
    problems = check(start, *settings).problems
    assert len(problems) == (said is not None)
    assert all(said.format(LORA) in problem for problem in problems)


def test_the_adapter_to_go_on_from_is_one(root, check, written):
    scheme = "model.peft.peft_scheme=none"
    assert "is of the scheme lora" in check(written({}), scheme).problems[0]
    assert "is a directory" in check(f"model.peft.restore_from_path={root}").problems[0]


@pytest.mark.parametrize(
    "weights, split, said",
    [
        (
            ["model_weights.ckpt"],
            True,
            "holds the weights of TP 1 x PP 1; NeMo looks for those of TP 2 x PP 1. Set "
            "model.tensor_model_parallel_size=1",
        ),
        ([f"mp_rank_0{rank}/model_weights.ckpt" for rank in (0, 1)], True, None),
        (
            [f"mp_rank_0{rank}/model_weights.ckpt" for rank in (0, 1)],
            False,
            "or put its parts together: workshop export a.nemo --to nemo --reader nemo",
        ),
    ],
)
def test_the_adapter_to_go_on_from_is_split_as_the_run(check, written, weights, split, said):
    """NeMo 2.4.1 looks for mp_rank_00/ in it where the run is split, after a minute of imports."""
    words = ["model.tensor_model_parallel_size=2", "model.micro_batch_size=4"] if split else []
    problems = check(written({}, *weights), *words, processes=1 + split).problems
    assert len(problems) == (said is not None) and all(said in problem for problem in problems)


def test_packed_rows_need_transformer_engine_and_trust(check):
    """NeMo 2.4.1 tried on a CPU: a TypeError without Transformer Engine, and each row sees those
    before it with return_cu_seqlen=false."""
    word = "++model.data.train_ds.packed_sequence=true"
    with pytest.raises(DataError, match="reads packed rows as a pickle, which can run code"):
        check(word)
    said = "only the attention of Transformer Engine, which is not installed"
    assert any(said in problem for problem in check(word, trust=True).problems)


# The command line of a public workshop, as it was typed in NeMo's container.
CONTAINER = """\
exp_manager.exp_dir={root}/results
exp_manager.name=customer_lora
trainer.devices=1
trainer.num_nodes=1
trainer.precision=bf16-mixed
trainer.val_check_interval=0.5
trainer.max_steps=50
model.megatron_amp_O2=True
++model.mcore_gpt=True
model.tensor_model_parallel_size=1
model.pipeline_model_parallel_size=1
model.micro_batch_size=1
model.global_batch_size=2
model.data.train_ds.file_names=[{root}/train.jsonl]
model.data.train_ds.concat_sampling_probabilities=[1.0]
model.data.validation_ds.file_names=[{root}/validation.jsonl]
model.peft.peft_scheme=lora
model.peft.lora_tuning.target_modules=[attention_qkv]
model.peft.lora_tuning.adapter_dim=32
model.peft.lora_tuning.adapter_dropout=0.1
model.optim.lr=5e-4
"""


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_command_line_of_the_container_is_taken_as_it_is(root, plan, monkeypatch, device):
    monkeypatch.setenv("WORKSHOP_DEVICE", device)
    for name in ("train", "validation"):
        row = json.dumps({"input": f"User: {name}?", "output": "yes"})
        (root / f"{name}.jsonl").write_text(f"{row}\n")
    typed = CONTAINER.format(root=root).splitlines()
    made = plan(*typed)
    seen, model = made.preflight, made.config.model
    assert seen.problems == []
    adds = {f"trainer.accelerator={device}", "model.optim.name=adamw"}
    assert adds | set(typed) <= set(made.command)
    said = "cpu: trainer.accelerator=cpu and model.optim.name=adamw in place of"
    assert any(line.startswith(said) for line in seen.facts) == (device == "cpu")
    assert any("(O2)" in line for line in seen.facts)
    train = model.data.train_ds
    assert (model.peft.lora_tuning.alpha, train.max_seq_length) == (32, 2048)
    assert made.config.trainer.limit_val_batches == 1.0
    assert train.prompt_template == "{input} {output}" == model.data.validation_ds.prompt_template
    assert (model.optim.sched.warmup_steps, model.optim.weight_decay) == (50, 0.01)
    assert seen.warnings == [
        "model.optim.sched.warmup_steps is 50, but there are 50 steps: model.optim.lr is never "
        "reached."
    ]


@pytest.mark.parametrize(
    "override, meant",
    [
        ("trainer.max_step=5", "trainer.max_steps"),
        ("model.peft.lora_tuning.adaptr_dim=8", "model.peft.lora_tuning.adapter_dim"),
        ("optim.lr=1", "model.optim.lr"),
        ("adapter_dim=4", "model.peft.lora_tuning.adapter_dim"),
        ("model.restore_path=x", "model.restore_from_path"),
    ],
)
def test_the_nearest_key_is_offered(check, override, meant):
    said = rf"is no key of megatron_gpt_finetuning\. Did you mean {meant}\?"
    with pytest.raises(WorkshopError, match=said):
        check(override)


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "+model.context_parallel_size=2",
            r"model.context_parallel_size is a key of megatron_gpt_finetuning already: write .* "
            r"without \+",
        ),
        ("model.data.train_ds.file_names=[a", "cannot be read as an override"),
        (
            "trainer.max_steps=${model.nope}",
            "trainer.max_steps: Interpolation key 'model.nope' not found",
        ),
    ],
)
def test_overrides_that_hydra_refuses(override, said):
    with pytest.raises(WorkshopError, match=said):
        configuration.compose(SCRIPT, [override])


def test_hydra_set_up_by_somebody_else_is_left_as_it_was(tmp_path):
    import concurrent.futures

    import hydra
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "mine.yaml").write_text("a: 1")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        assert configuration.compose(SCRIPT, []).model.seed == 1234
        assert hydra.compose("mine").a == 1
    assert not GlobalHydra.instance().is_initialized()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        steps = pool.map(
            lambda n: configuration.compose(SCRIPT, [f"trainer.max_steps={n}"]).trainer.max_steps,
            range(8),
        )
        assert list(steps) == list(range(8))


@pytest.mark.parametrize(
    "value", ["/a/b", "läuf", "my run's", "1234", "null", "x=y,z", " lead", "1e5", "[a]"]
)
def test_a_value_is_read_back_by_hydra(value):
    assert (
        configuration.compose(
            SCRIPT, [f"exp_manager.name={configuration.plain(value)}"]
        ).exp_manager.name
        == value
    )


def test_added_keys_are_let_through():
    assert configuration.compose(SCRIPT, ["+model.brand_new=3"]).model.brand_new == 3


def test_rows_that_are_cut_and_rows_that_repeat_are_warned_of(check, root):
    cut = check("model.data.train_ds.max_seq_length=8").warnings
    assert any("rows are longer than 8 tokens" in line for line in cut)
    repeated = check(validation=root / "train.jsonl").warnings
    assert any("repeats 16 rows" in line for line in repeated)


@pytest.fixture
def with_files(plan):
    """A function from the files of train_ds and of validation_ds to the plan's preflight."""

    def made(train: Path, validation: Path):
        files = {"train_ds": train, "validation_ds": validation}
        return plan(
            *(f"model.data.{part}.file_names=[{file}]" for part, file in files.items())
        ).preflight

    return made


def test_a_bad_row_is_named(with_files, root):
    rows = '{"input": "a", "output": "b"}\n{"input": 3, "output": "b"}\n'
    (root / "bad.jsonl").write_text(rows)
    problems = with_files(root / "bad.jsonl", root / "no.jsonl").problems
    assert "bad.jsonl, line 2: the template needs a text in 'input'" in problems[0]
    assert "no.jsonl does not exist" in problems[1]


GOOD = '{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "holds no rows"),
        (b"[1]\n", "a list, not an object"),
        (b"{\n", "not JSON"),
        (b"\xff\n", "is not UTF-8 text"),
        (f"\ufeff{GOOD}".encode(), "line 1: not JSON .*BOM"),
        (GOOD.encode("utf-16"), "not UTF-8 text"),
        (f"{GOOD}\n{GOOD}".encode(), "line 2: not JSON"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"input": %s, "output": "b"}\n' % (b"9" * 5000), "not JSON that can be read"),
        (b'{"input": "\\ud800", "output": "b"}\n', "surrogate"),
    ],
)
def test_files_that_are_no_rows(tokenizer, tmp_path, content, said):
    (tmp_path / "x.jsonl").write_bytes(content)
    rule = Template("{input}{output}", "output", (), 64, 1)
    with pytest.raises(DataError, match=said):
        data_check.count(tmp_path / "x.jsonl", rule, tokenizer)


def test_a_large_file_is_sampled_and_says_so(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data_check, "WHOLE", 11)
    monkeypatch.setattr(data_check, "SAMPLE", 5)
    (tmp_path / "x.jsonl").write_text(GOOD * 12)
    rule = Template("{input}{output}", "output", (), 64, 1)
    counted = data_check.count(tmp_path / "x.jsonl", rule, tokenizer)
    assert (counted.rows, counted.sampled) == (12, 5)
    assert "12 rows" in str(counted)
    assert "of a sample of 5; the other rows are not read" in str(counted)


def test_a_hundred_thousand_rows_take_no_longer(tokenizer, tmp_path):
    """Processor time, so that a busy machine does not matter; every row parsed took four times the
    bound."""
    rule = Template("{input} {output}", "output", ("input",), 512, 1)
    row = json.dumps({"input": "%d " + "some words " * 20, "output": "an answer"}) + "\n"
    files = [tmp_path / f"{name}.jsonl" for name in ("train", "validation")]
    numbers = range(0, 200_000, 2), [*range(1, 199_999, 2), 0]
    for file, of_rows in zip(files, numbers, strict=True):
        file.write_text("".join(row % number for number in of_rows))
    began = time.process_time()
    counted = [data_check.count(file, rule, tokenizer) for file in files]
    lines = {str(file): data_check.read_lines(file) for file in files}
    assert data_check.common_rows(*files, rule, lines) == 1
    assert time.process_time() - began < 4
    assert {file.rows for file in counted} == {100_000}


def test_the_rows_for_a_nemo_base_are_read(root, base):
    """Its tokenizer is inside: tokens are not counted, but everything else about the files is
    found."""
    with tarfile.open(root / "base.nemo", "w") as archive:
        for file in sorted(base.rglob("*")):
            archive.add(file, file.relative_to(base), recursive=False)
    (root / "good.jsonl").write_text(GOOD * 3)

    def check(train: str):
        (root / "t.jsonl").write_text(train)
        words = [
            f"model.restore_from_path={root}/base.nemo",
            f"model.data.train_ds.file_names=[{root}/t.jsonl]",
            f"model.data.validation_ds.file_names=[{root}/good.jsonl]",
        ]
        return make_plan(words, trust=True).preflight

    sound = check(GOOD)
    said = "t.jsonl: 1 rows; tokens are not counted, the tokenizer is inside the .nemo"
    assert sound.problems == [] and said in sound.facts
    assert any("repeats 3 rows of t.jsonl" in warning for warning in sound.warnings)
    assert fact(sound, "memory").startswith("memory: at most about ")
    assert not any(line.startswith("time:") for line in sound.facts)
    assert any("t.jsonl, line 1: not JSON" in problem for problem in check("{").problems)
    bad = check('{"question": "a"}\n').problems
    assert any("the template needs a text in 'input'" in problem for problem in bad)


NEMO = """
import json, sys
from workshop_utils.runtime import nemo_cpu; nemo_cpu.apply()
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
tokenizer = AutoTokenizer(sys.argv[1], use_fast=True)
for template, field, length, bos in json.loads(sys.argv[3]):
    def rows(length):
        data = GPTSFTDataset(
            sys.argv[2], tokenizer, memmap_workers=1, add_bos=bos, add_eos=True, label_key="output",
            prompt_template=template, truncation_field=field, max_seq_length=length,
            sanity_check_dist_workers=False)
        return [data[i] for i in range(len(data))]
    whole, cut = rows(10**6), rows(length)
    shorter = sum(len(a["answer_ids"]) < len(b["answer_ids"]) for a, b in zip(cut, whole))
    print("RESULT", json.dumps([[row["token_count"] for row in whole], shorter]))
"""


@pytest.mark.slow
def test_the_counts_are_those_of_nemo(tokenizer, tmp_path):
    """Lengths, rows that are too long and answers that are cut, as NeMo's own data set class makes
    them."""
    file = tmp_path / "rows.jsonl"
    rows = [("word " * (n % 7 + 1) + " end ", " answer" * (n % 5 + 1)) for n in range(20)]
    file.write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in rows))
    cases = [
        ("{input}{output}", "input", 20, False),
        ("Question: {input}\\n\\nAnswer: {output}", "input", 24, True),
        ("{input} {output}", "output", 16, False),
        ("{input} {output}", "input,output", 30, False),
    ]
    command = [sys.executable, "-c", NEMO, str(tokenizer.directory), str(file), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = re.findall(r"(?m)^RESULT (.*)$", done.stdout)
    assert len(results) == len(cases), done.stderr[-2000:]
    for (template, fields, length, bos), result in zip(cases, results, strict=True):
        lengths, answers_cut = json.loads(result)
        rule = Template(template, "output", tuple(fields.split(",")), length, 1 + bos)
        counted = data_check.count(file, rule, tokenizer)
        assert counted.longest == max(lengths)
        assert counted.mean_tokens == sum(lengths) / len(rows)
        assert counted.truncated == sum(tokens > length for tokens in lengths) > 0
        assert counted.answers_cut == answers_cut


def test_columns_of_own_files_that_the_template_does_not_use_are_named(check, root):
    file = root / "alpaca.jsonl"
    file.write_text('{"instruction": "add", "input": "1", "output": "2"}\n' * 8)
    files = [f"model.data.{part}_ds.file_names=[{file}]" for part in ("train", "validation")]
    seen = check(*files, data=None, validation=None)
    assert any(text.endswith("does not use: instruction") for text in seen.facts)


def test_own_rows_are_said_and_looked_at(check, root):
    file = root / "alpaca.jsonl"
    row = '{{"instruction": "add", "input": "1", "output": "{}", "id": 4}}\n'
    file.write_text("".join(row.format(answer) for answer in "22334444"))
    seen = check(data=file, validation=None)
    assert any("Alpaca: instruction and input" in text for text in seen.facts)
    assert any(text.endswith("not used: id") for text in seen.facts)
    assert any("prompts with different answers" in text for text in seen.warnings)
