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
from tiny_model import make_tiny_model, write_rows, write_sharded

from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.training import data_check
from workshop_utils.training.data_check import Template
from workshop_utils.training.script import configuration, estimate, make_plan, preflight
from workshop_utils.training.script.plan import SCRIPT

SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 128,
    "override_vocab_size": 512,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bridged") / "tiny"
    tokenizer = make_tiny_model(directory.parent / "hf")
    write_sharded(directory / "model_weights")
    (directory / "model_config.yaml").write_text(
        yaml.safe_dump(SIZES | {"tokenizer": {"type": str(tokenizer)}})
    )
    return directory


@pytest.fixture
def plan(base, tmp_path, monkeypatch):
    """A function from overrides to the plan's preflight, on 16 rows."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_PATH", raising=False)
    train, validation = (
        write_rows(tmp_path / "train.jsonl"),
        write_rows(tmp_path / "validation.jsonl", 3),
    )
    validation.write_text(validation.read_text().replace("number", "figure"))

    def made(*overrides: str, processes: int = 1):
        return make_plan(
            [f"model.restore_from_path={base}", *overrides],
            data=train,
            validation=validation,
            nproc_per_node=processes,
        ).preflight

    return made


def test_a_sound_run_has_facts_and_no_problem(plan):
    found = plan()
    assert found.problems == []
    found.require()
    assert (
        "batch: 8 rows = 8 a micro batch x 1 accumulated x 1 data-parallel (TP 1 x PP 1 x CP 1)"
        in found.facts
    )
    # rank x (in + out) of the fused projection, in each of the four layers
    assert any(fact.startswith(f"trainable: {4 * 32 * (64 + 128):,} of ") for fact in found.facts)


@pytest.mark.parametrize(
    "overrides, processes, said",
    [
        (
            ["model.global_batch_size=9"],
            1,
            "global_batch_size 9 is no multiple of micro batch 8 x 1",
        ),
        (["model.global_batch_size=4"], 1, "Set model.global_batch_size=8"),
        (
            ["model.micro_batch_size=0"],
            1,
            "micro_batch_size is 0; it has to be a whole number of at least 1",
        ),
        ([], 2, "global_batch_size 8 is no multiple of micro batch 8 x 2 data-parallel copies"),
        (
            ["model.micro_batch_size=x"],
            1,
            "model.micro_batch_size is 'x'; it has to be a whole number",
        ),
        (
            ["model.data.validation_ds.global_batch_size=3"],
            1,
            "Set model.data.validation_ds.global_batch_size=8",
        ),
        (["trainer.num_nodes=2"], 1, "starts torchrun on this machine alone"),
        (
            ["trainer.max_steps=abc"],
            1,
            "max_steps is 'abc'; it has to be a whole number of at least 1",
        ),
        (["trainer.max_steps=2.5"], 1, "max_steps is 2.5; it has to be a whole number"),
        (["trainer.max_steps=-1"], 1, "max_steps is -1; it has to be a whole number"),
        (["trainer.max_steps="], 1, "max_steps is ''; it has to be a whole number"),
        (
            ["trainer.max_steps=9"],
            1,
            (
                "val_check_interval is 17, but there are 9 steps: no checkpoint would be kept. Set "
                "trainer.val_check_interval=3"
            ),
        ),
        (
            ["trainer.val_check_interval=1.5"],
            1,
            "val_check_interval is 1.5; it has to be a whole number, or a part",
        ),
        (["trainer.limit_val_batches=all"], 1, "limit_val_batches is 'all'"),
        (["model.optim.lr=nan"], 1, "model.optim.lr is nan; it has to be a number above 0"),
        (
            ["model.answer_only_loss=maybe"],
            1,
            "answer_only_loss is 'maybe'; it has to be true or false",
        ),
        (
            ["model.peft.lora_tuning=null"],
            1,
            (
                "lora_tuning is None; it has keys of its own, for example "
                "model.peft.lora_tuning.variant"
            ),
        ),
        (["trainer=5"], 1, "trainer is 5; it has keys of its own"),
        (["model.resume_from_checkpoint=x"], 1, "reads it nowhere"),
        (["model.data.train_ds.max_seq_length=0"], 1, "max_seq_length is 0"),
        (
            ["model.data.train_ds.truncation_method=middle"],
            1,
            "truncation_method is 'middle'; it has to be left or right",
        ),
        (["model.data.train_ds.prompt_template=5"], 1, "prompt_template is 5; it has to be a text"),
        (
            ["model.data.train_ds.concat_sampling_probabilities=[a]"],
            1,
            "is ['a']; it has to be a list of numbers",
        ),
        (
            ["model.data.train_ds.concat_sampling_probabilities=[-1]"],
            1,
            "shares that are not below 0",
        ),
        (
            ["model.peft.lora_tuning.target_modules=attention_qkv"],
            1,
            "it has to be a list of texts",
        ),
        (
            ["model.peft.peft_scheme=ia3", "model.peft.ia3_tuning.layer_selection=[7]"],
            1,
            "ia3_tuning.layer_selection is [7]; layers are numbered",
        ),
        (
            ["model.tensor_model_parallel_size=2", "model.peft.lora_tuning.adapter_dim=3"],
            2,
            "adapter_dim 3 is no multiple of",
        ),
        (["model.tensor_model_parallel_size=2"], 1, "TP 2 x PP 1 x CP 1 needs a multiple of 2"),
        (
            ["model.tensor_model_parallel_size=4"],
            4,
            "size 4 does not divide the 2 key/value groups. Possible below it: [1, 2]",
        ),
        (["model.pipeline_model_parallel_size=3"], 3, "size 3 does not divide the 4 layers"),
        (["trainer.devices=4"], 2, "Give --nproc-per-node=4"),
        (["model.context_parallel_size=2"], 2, "only through Transformer Engine"),
        (["++model.context_parallel_size=2"], 2, "only through Transformer Engine"),
        (
            ["model.peft.peft_scheme=ptuning", "model.pipeline_model_parallel_size=2"],
            2,
            "those of ptuning are not put together",
        ),
        (
            [
                "model.peft.peft_scheme=adapter",
                "model.peft.adapter_tuning.adapter_dim=3",
                "model.tensor_model_parallel_size=2",
            ],
            2,
            "adapter_tuning.adapter_dim 3 is no",
        ),
        (["model.sequence_parallel=true"], 1, "sequence_parallel needs"),
        (
            ["trainer.precision=bf16-true"],
            1,
            "trainer.precision is 'bf16-true'; there are 32, 32-true",
        ),
        (
            ["model.megatron_amp_O2=true"],
            1,
            "megatron_amp_O2 works with bf16 alone; trainer.precision is 32",
        ),
        (
            ["model.megatron_amp_O2=true", "trainer.precision=16-mixed"],
            1,
            "megatron_amp_O2 works with bf16 alone",
        ),
        (
            ["model.optim.name=adamx"],
            1,
            "model.optim.name is adamx. Did you mean adamax? There are sgd, adam,",
        ),
        (
            ["model.optim.sched.name=CosineAnealing"],
            1,
            "model.optim.sched.name is CosineAnealing. Did you mean CosineAnnealing?",
        ),
        (
            ["exp_manager.checkpoint_callback_params.monitor=val_acc"],
            1,
            (
                "monitor is val_acc, which the script does not log. There are val_loss, "
                "validation_loss,"
            ),
        ),
        (
            ["exp_manager.early_stopping_callback_params.monitor=eval_loss"],
            1,
            "early_stopping_callback_params.monitor is eval_loss",
        ),
        (
            ["exp_manager.early_stopping_callback_params.monitor=validation_loss_dataloader0"],
            1,
            None,
        ),
        (
            ["model.optim.name=lamb"],
            1,
            "optim.name is lamb, which needs a GPU and Apex. Leave it out",
        ),
        (
            ["model.optim.name=fused_adam"],
            1,
            "optim.name is fused_adam, which needs a GPU and Apex. Leave it out",
        ),
        (
            ["model.optim.name=mcore_distributed_optim"],
            1,
            "mcore_distributed_optim, which needs a GPU. Leave it out",
        ),
        (
            ["trainer.accelerator=gpu"],
            1,
            "accelerator is gpu, but this plan is for the CPU (WORKSHOP_DEVICE=cpu)",
        ),
        (["++model.fsdp=true"], 1, "sharding by FSDP is for GPUs"),
        (["model.peft.peft_scheme=dora"], 1, "peft_scheme is 'dora'; there are lora, ptuning"),
        (
            ["model.peft.lora_tuning.target_modules=[q_proj]"],
            1,
            "names q_proj; there are attention_qkv",
        ),
        (["model.peft.lora_tuning.adapter_dim=0"], 1, "adapter_dim is 0"),
        (["model.peft.lora_tuning.adapter_dropout=1.0"], 1, "adapter_dropout is 1.0"),
        (["model.peft.lora_tuning.layer_selection=[0,1]"], 1, "layers are numbered from 1 to 4"),
        (["model.data.train_ds.prompt_template='{output} {input}'"], 1, "has to end with {output}"),
        (["model.data.train_ds.prompt_template='plain'"], 1, "it names no column"),
        (
            ["model.data.train_ds.prompt_template='{input} é {output}'"],
            1,
            "outside ASCII, which NeMo garbles",
        ),
        (["model.data.train_ds.truncation_field=context"], 1, None),
        (
            ["model.data.train_ds.truncation_field=question"],
            1,
            "names 'question'; the template has input, output",
        ),
        (["model.data.train_ds.concat_sampling_probabilities=[0.5]"], 1, "adds up to 0.5"),
        (
            ["model.data.train_ds.concat_sampling_probabilities=null"],
            1,
            "needs one share for each of 1 files, for instance [1]",
        ),
        (["model.data.validation_ds.names=[a,b]"], 1, "has 2 names for 1 files"),
        (
            [
                "model.data.train_ds.label_key=answer",
                "model.data.train_ds.prompt_template='{input}{answer}'",
            ],
            1,
            "needs a text in 'answer'; the row has input, output",
        ),
    ],
)
def test_what_would_fail_is_said_before(plan, overrides, processes, said):
    found = plan(*overrides, processes=processes)
    if said is None:
        assert found.problems == []
        return
    assert any(said in problem for problem in found.problems), found.problems
    with pytest.raises(WorkshopError, match="this run would fail"):
        found.require()


def fact(found, name: str) -> str:
    (one,) = (line for line in found.facts if line.startswith(f"{name}: "))
    return one


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
def test_what_a_run_needs(plan, monkeypatch, scheme, count):
    """The schemes' own counts against NeMo are in test_finetune_schemes.py."""
    monkeypatch.setattr(estimate, "operations_per_second", lambda: 1e7)
    found = plan(
        f"model.peft.peft_scheme={scheme}", "trainer.max_steps=20", "trainer.val_check_interval=10"
    )
    assert fact(found, "trainable").startswith(f"trainable: {count:,} of {WEIGHTS:,} weights")
    # Weights; a gradient and two moments of what is trained; activations of a micro batch and two
    # copies of its logits.
    length = max(
        int(re.search(r"longest (\d+)", line)[1]) for line in found.facts if "longest" in line
    )
    activations = 4 * 8 * length * 64 * (34 + 5 * 4 * length / 64) * 2 + 2 * 4 * 8 * length * 512
    assert fact(found, "memory").startswith(
        f"memory: about {(4 * WEIGHTS + 16 * count + activations) / 1e9:.1f} GB"
    )
    assert fact(found, "disk").startswith(
        f"disk: about {(2 * 12 + 4) * count / 1e6:,.0f} MB for 2 checkpoints"
    )
    train, validation = (
        float(re.search(r"([\d]+) tokens a row", line)[1])
        for line in found.facts
        if "tokens a row" in line
    )
    operations = (4 * WEIGHTS + 2 * count) * 20 * 8 * train + 2 * WEIGHTS * 2 * 3 * validation
    minutes = float(re.search(r"about ([\d.]+) min for 20 steps", fact(found, "time"))[1])
    assert minutes == pytest.approx(operations / 1e7 / 60, rel=0.05)


@pytest.mark.parametrize("top, kept", [(1, 2), (2, 3), (0, 1), (-1, 6)])
def test_the_checkpoints_that_are_kept_need_room(plan, monkeypatch, top, kept):
    words = [
        f"exp_manager.checkpoint_callback_params.save_top_k={top}",
        "trainer.max_steps=50",
        "trainer.val_check_interval=10",
    ]
    size = (12 * kept + 4) * 4 * 32 * (64 + 128)
    for free in (size, size - 1):
        monkeypatch.setattr(
            preflight.shutil,
            "disk_usage",
            lambda place, free=free: type("Usage", (), {"free": free}),
        )
        found = plan(*words)
        assert (
            fact(found, "disk")
            == f"disk: about {size / 1e6:,.0f} MB for {kept} checkpoints and the .nemo"
        )
        assert [
            problem for problem in found.problems if "MB are needed on disk" in problem
        ] == found.problems
        assert len(found.problems) == (free < size)


def test_the_speed_of_a_machine_is_that_of_its_best_moment(monkeypatch):
    ticks = iter([0, 9, 10, 12, 20, 21, 30, 35, 40, 48])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert estimate.operations_per_second() == 2 * 1024**3


def test_the_optimizers_and_schedules_are_those_of_nemo():
    optim = Path(importlib.util.find_spec("nemo").origin).parent / "core" / "optim"
    key = r"""^ {4}['"](\w+)['"]: |AVAILABLE_\w+\[['"](\w+)['"]\]"""
    optimizers, schedulers = (
        {
            one or other
            for one, other in re.findall(
                key, (optim / file).read_text().split("__all__ =")[0], re.MULTILINE
            )
        }
        for file in ("optimizers.py", "lr_scheduler.py")
    )
    assert optimizers | {"mcore_distributed_optim"} == set(preflight.OPTIMIZERS)
    assert schedulers == set(preflight.SCHEDULERS)


def test_a_value_from_another_key_is_told_once(plan):
    found = plan("model.data.train_ds.max_seq_length=long")
    assert found.problems == [
        "model.data.train_ds.max_seq_length is 'long'; it has to be a whole number of at least 1."
    ]


@pytest.fixture
def written(plan, monkeypatch, tmp_path):
    """A function from LoRA settings and the names of weight files to the override that goes on from
    such an adapter."""
    monkeypatch.setattr("workshop_utils.training.script.plan.require_sound", lambda *_: None)

    def write(lora: dict, *weights: str) -> str:
        described = yaml.safe_dump({"peft": {"peft_scheme": "lora", "lora_tuning": lora}}).encode()
        with tarfile.open(tmp_path / "a.nemo", "w") as archive:
            for name, content in (
                ("model_config.yaml", described),
                *((file, b"") for file in weights),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return f"model.peft.restore_from_path={tmp_path / 'a.nemo'}"

    return write


def test_the_adapter_to_go_on_from_is_of_the_same_kind(plan, written, tmp_path):
    start = written(
        {
            "adapter_dim": 8,
            "target_modules": ["attention_dense", "attention_qkv"],
            "layer_selection": None,
        }
    )
    same = [
        "model.peft.lora_tuning.adapter_dim=8",
        "model.peft.lora_tuning.target_modules=[attention]",
    ]
    assert plan(start, *same).problems == []
    found = plan(start, same[1]).problems
    assert (
        len(found) == 1
        and "has rank 8; model.peft.lora_tuning.adapter_dim is 32. Set it to 8." in found[0]
    )
    found = plan(start, same[0]).problems
    assert (
        len(found) == 1
        and (
            "has modules [attention_dense, attention_qkv]; model.peft.lora_tuning.target_modules "
            "is ['attention_qkv']"
        )
        in found[0]
    )
    found = plan(start, *same, "model.peft.lora_tuning.layer_selection=[2]").problems
    assert (
        len(found) == 1
        and "has layers null; model.peft.lora_tuning.layer_selection is [2]. Set it to null."
        in found[0]
    )
    assert "is of the scheme lora" in plan(start, "model.peft.peft_scheme=none").problems[0]
    assert "is a directory" in plan(f"model.peft.restore_from_path={tmp_path}").problems[0]


def test_the_adapter_to_go_on_from_is_split_as_the_run(plan, written):
    """NeMo 2.4.1 looks for mp_rank_00/ in it where the run is split, after a minute of imports."""
    split = "model.tensor_model_parallel_size=2"
    found = plan(
        written({}, "model_weights.ckpt"), split, "model.micro_batch_size=4", processes=2
    ).problems
    assert (
        len(found) == 1
        and (
            "holds the weights of TP 1 x PP 1; NeMo looks for those of TP 2 x PP 1. Set "
            "model.tensor_model_parallel_size=1"
        )
        in found[0]
    )
    parts = written({}, *(f"mp_rank_0{rank}/model_weights.ckpt" for rank in (0, 1)))
    assert plan(parts, split, "model.micro_batch_size=4", processes=2).problems == []
    found = plan(parts).problems
    assert (
        len(found) == 1
        and "or put its parts together: workshop export a.nemo --to nemo --reader nemo" in found[0]
    )


def test_packed_rows_need_transformer_engine_and_trust(plan, base, tmp_path):
    """NeMo 2.4.1 tried on a CPU: a TypeError without Transformer Engine, and each row sees those
    before it with return_cu_seqlen=false."""
    words = [f"model.restore_from_path={base}", "++model.data.train_ds.packed_sequence=true"]
    with pytest.raises(DataError, match="reads packed rows as a pickle, which can run code"):
        make_plan(words, data=tmp_path / "train.jsonl")
    found = make_plan(words, data=tmp_path / "train.jsonl", trust=True).preflight
    assert any(
        "only the attention of Transformer Engine, which is not installed" in problem
        for problem in found.problems
    )


CONTAINER = [  # the command line of a public workshop, as it was typed in NeMo's container
    "exp_manager.exp_dir={root}/results",
    "exp_manager.name=customer_lora",
    "trainer.devices=1",
    "trainer.num_nodes=1",
    "trainer.precision=bf16-mixed",
    "trainer.val_check_interval=0.5",
    "trainer.max_steps=50",
    "model.megatron_amp_O2=True",
    "++model.mcore_gpt=True",
    "model.tensor_model_parallel_size=1",
    "model.pipeline_model_parallel_size=1",
    "model.micro_batch_size=1",
    "model.global_batch_size=2",
    "model.restore_from_path={base}",
    "model.data.train_ds.file_names=[{root}/train.jsonl]",
    "model.data.train_ds.concat_sampling_probabilities=[1.0]",
    "model.data.validation_ds.file_names=[{root}/validation.jsonl]",
    "model.peft.peft_scheme=lora",
    "model.peft.lora_tuning.target_modules=[attention_qkv]",
    "model.peft.lora_tuning.adapter_dim=32",
    "model.peft.lora_tuning.adapter_dropout=0.1",
    "model.optim.lr=5e-4",
]


@pytest.mark.parametrize(
    "device, adds",
    [
        ("cpu", {"trainer.accelerator=cpu", "model.optim.name=adamw"}),
        ("gpu", {"trainer.accelerator=gpu", "model.optim.name=adamw"}),
    ],
)
def test_the_command_line_of_the_container_is_taken_as_it_is(
    base, tmp_path, monkeypatch, device, adds
):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", device)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"input": f"User: {name}?", "output": "yes"}) + "\n"
        )
    typed = [word.format(root=tmp_path, base=base) for word in CONTAINER]
    made = make_plan(typed)
    assert made.preflight.problems == []
    assert adds | set(typed) <= set(made.command)
    said = [
        fact
        for fact in made.preflight.facts
        if fact.startswith("cpu: trainer.accelerator=cpu and model.optim.name=adamw in place of")
    ]
    assert len(said) == (device == "cpu")
    assert any("(O2)" in fact for fact in made.preflight.facts)
    model = made.config.model
    assert (
        model.peft.lora_tuning.alpha,
        model.data.train_ds.max_seq_length,
        made.config.trainer.limit_val_batches,
    ) == (32, 2048, 1.0)
    assert (model.data.train_ds.prompt_template, model.data.validation_ds.prompt_template) == (
        "{input} {output}",
        "{input} {output}",
    )
    assert (model.optim.sched.warmup_steps, model.optim.weight_decay) == (50, 0.01)
    assert made.preflight.warnings == [
        (
            "model.optim.sched.warmup_steps is 50, but there are 50 steps: model.optim.lr is never "
            "reached."
        )
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
def test_the_nearest_key_is_offered(plan, override, meant):
    with pytest.raises(
        WorkshopError, match=rf"is no key of megatron_gpt_finetuning\. Did you mean {meant}\?"
    ):
        plan(override)


def test_a_key_that_is_there_is_not_added():
    with pytest.raises(
        WorkshopError,
        match=r"model.context_parallel_size is a key of megatron_gpt_finetuning already: write .* "
        r"without \+",
    ):
        configuration.compose(SCRIPT, ["+model.context_parallel_size=2"])


def test_an_override_that_cannot_be_parsed():
    with pytest.raises(WorkshopError, match=r"cannot be read as an override"):
        configuration.compose(SCRIPT, ["model.data.train_ds.file_names=[a"])


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


def test_interpolations_that_lead_nowhere():
    with pytest.raises(
        WorkshopError, match=r"trainer.max_steps: Interpolation key 'model.nope' not found"
    ):
        configuration.compose(SCRIPT, ["trainer.max_steps=${model.nope}"])


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


def test_rows_that_are_cut_and_rows_that_repeat_are_warned_of(plan, base, tmp_path):
    assert any(
        "rows are longer than 8 tokens" in line
        for line in plan("model.data.train_ds.max_seq_length=8").warnings
    )
    train = tmp_path / "train.jsonl"
    found = make_plan([f"model.restore_from_path={base}"], data=train, validation=train).preflight
    assert any(
        "repeats 16 rows" in line or "is the training file itself" in line
        for line in found.warnings
    )


@pytest.fixture
def with_files(plan, base):
    """A function from the files of train_ds and of validation_ds, and more overrides, to the
    plan."""

    def made(train: list, validation: list, *more: str):
        names = [
            f"model.data.{part}.file_names={json.dumps(list(map(str, files)))}"
            for part, files in (("train_ds", train), ("validation_ds", validation))
        ]
        return make_plan([f"model.restore_from_path={base}", *names, *more])

    return made


def test_a_bad_row_is_named(with_files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        '{"input": "a", "output": "b"}\n{"input": 3, "output": "b"}\n'
    )
    found = with_files([tmp_path / "bad.jsonl"], [tmp_path / "no.jsonl"]).preflight
    assert "bad.jsonl, line 2: the template needs a text in 'input'" in found.problems[0]
    assert "no.jsonl does not exist" in found.problems[1]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "holds no rows"),
        (b"[1]\n", "a list, not an object"),
        (b"{\n", "not JSON"),
        (b"\xff\n", "is not UTF-8 text"),
        ('\ufeff{"input": "a", "output": "b"}\n'.encode(), "line 1: not JSON .*BOM"),
        ('{"input": "a", "output": "b"}\n'.encode("utf-16"), "not UTF-8 text"),
        (b'{"input": "a", "output": "b"}\n\n{"input": "a", "output": "b"}\n', "line 2: not JSON"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"input": %s, "output": "b"}\n' % (b"9" * 5000), "not JSON that can be read"),
        (b'{"input": "\\ud800", "output": "b"}\n', "surrogate"),
    ],
)
def test_files_that_are_no_rows(base, tmp_path, content, said):
    (tmp_path / "x.jsonl").write_bytes(content)
    tokenizer = ChatTokenizer(
        yaml.safe_load((base / "model_config.yaml").read_text())["tokenizer"]["type"]
    )
    with pytest.raises(DataError, match=said):
        data_check.count(
            tmp_path / "x.jsonl", Template("{input}{output}", "output", (), 64, 1), tokenizer
        )


def test_a_large_file_is_sampled_and_says_so(base, tmp_path, monkeypatch):
    monkeypatch.setattr(data_check, "WHOLE", 11)
    monkeypatch.setattr(data_check, "SAMPLE", 5)
    tokenizer = ChatTokenizer(
        yaml.safe_load((base / "model_config.yaml").read_text())["tokenizer"]["type"]
    )
    (tmp_path / "x.jsonl").write_text('{"input": "a", "output": "b"}\n' * 12)
    found = data_check.count(
        tmp_path / "x.jsonl", Template("{input}{output}", "output", (), 64, 1), tokenizer
    )
    assert (found.rows, found.sampled) == (12, 5)
    assert "12 rows" in str(found) and "of a sample of 5; the other rows are not read" in str(found)


def test_a_hundred_thousand_rows_take_no_longer(base, tmp_path):
    """Processor time, so that a busy machine does not matter; every row parsed took four times the
    bound."""
    tokenizer = ChatTokenizer(
        yaml.safe_load((base / "model_config.yaml").read_text())["tokenizer"]["type"]
    )
    rule = Template("{input} {output}", "output", ("input",), 512, 1)
    files = [tmp_path / f"{name}.jsonl" for name in ("train", "validation")]
    for number, file in enumerate(files):
        row = json.dumps({"input": "{} " + "some words " * 20, "output": "an answer"}).replace(
            "{}", "%d", 1
        )
        file.write_text(
            "".join(row % (2 * n + number) + "\n" for n in range(100_000 - number))
            + (row % 0 + "\n") * number
        )
    began = time.process_time()
    counted = [data_check.count(file, rule, tokenizer) for file in files]
    lines = {str(file): data_check.read_lines(file) for file in files}
    assert data_check.common_rows(*files, rule, lines) == 1
    assert time.process_time() - began < 4
    assert {one.rows for one in counted} == {100_000}


@pytest.fixture
def archive(base, tmp_path):
    """The base as a .nemo, as far as planning looks at it."""
    with tarfile.open(tmp_path / "base.nemo", "w") as made:
        for file in sorted(base.rglob("*")):
            made.add(file, file.relative_to(base), recursive=False)
    return tmp_path / "base.nemo"


def test_the_rows_for_a_nemo_base_are_read(plan, archive, tmp_path):
    """Its tokenizer is inside: tokens are not counted, but everything else about the files is
    found."""
    good = '{"input": "a", "output": "b"}\n'
    (tmp_path / "good.jsonl").write_text(good * 3)

    def found(train: str):
        (tmp_path / "t.jsonl").write_text(train)
        return make_plan(
            [
                f"model.restore_from_path={archive}",
                f"model.data.train_ds.file_names=[{tmp_path}/t.jsonl]",
                f"model.data.validation_ds.file_names=[{tmp_path}/good.jsonl]",
            ],
            trust=True,
        ).preflight

    sound = found(good)
    assert (
        sound.problems == []
        and "t.jsonl: 1 rows; tokens are not counted, the tokenizer is inside the .nemo"
        in sound.facts
    )
    assert any("repeats 3 rows of t.jsonl" in warning for warning in sound.warnings)
    assert any(fact.startswith("memory: at most about ") for fact in sound.facts) and not any(
        fact.startswith("time:") for fact in sound.facts
    )
    for content, said in (
        ("{", "t.jsonl, line 1: not JSON"),
        ('{"question": "a"}\n', "the template needs a text in 'input'"),
    ):
        assert any(said in problem for problem in found(content).problems)


NEMO = """
import json, sys
from workshop_utils.runtime import nemo_cpu; nemo_cpu.apply()
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
tokenizer = AutoTokenizer(sys.argv[1], use_fast=True)
for case in json.loads(sys.argv[3]):
    data = GPTSFTDataset(sys.argv[2], tokenizer, memmap_workers=1, add_bos=case["bos"], add_eos=True, label_key="output",
        prompt_template=case["template"], truncation_field=case["field"], max_seq_length=case["length"], sanity_check_dist_workers=False)
    rows = [data[i] for i in range(len(data))]
    whole = GPTSFTDataset(sys.argv[2], tokenizer, memmap_workers=1, add_bos=case["bos"], add_eos=True, label_key="output",
        prompt_template=case["template"], truncation_field=case["field"], max_seq_length=10**6, sanity_check_dist_workers=False)
    full = [whole[i] for i in range(len(whole))]
    print("RESULT", json.dumps({"lengths": [r["token_count"] for r in full], "answers_cut": sum(len(a["answer_ids"]) < len(b["answer_ids"]) for a, b in zip(rows, full))}))
"""  # noqa: E501


@pytest.mark.slow
def test_the_counts_are_those_of_nemo(base, tmp_path):
    """Lengths, rows that are too long and answers that are cut, as NeMo's own data set class makes
    them."""
    directory = yaml.safe_load((base / "model_config.yaml").read_text())["tokenizer"]["type"]
    rows = [
        {"input": "word " * (n % 7 + 1) + " end ", "output": " answer" * (n % 5 + 1)}
        for n in range(20)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = [
        {"template": "{input}{output}", "field": "input", "length": 20, "bos": False},
        {
            "template": "Question: {input}\\n\\nAnswer: {output}",
            "field": "input",
            "length": 24,
            "bos": True,
        },
        {"template": "{input} {output}", "field": "output", "length": 16, "bos": False},
        {"template": "{input} {output}", "field": "input,output", "length": 30, "bos": False},
    ]
    done = subprocess.run(
        [sys.executable, "-c", NEMO, directory, str(file), json.dumps(cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    results = [
        json.loads(line.removeprefix("RESULT "))
        for line in done.stdout.splitlines()
        if line.startswith("RESULT")
    ]
    assert len(results) == len(cases), done.stderr[-2000:]
    tokenizer = ChatTokenizer(directory)
    for case, right in zip(cases, results, strict=True):
        rule = Template(
            case["template"],
            "output",
            tuple(case["field"].split(",")),
            case["length"],
            1 + case["bos"],
        )
        found = data_check.count(file, rule, tokenizer)
        assert found.longest == max(right["lengths"])
        assert found.mean_tokens == sum(right["lengths"]) / len(rows)
        assert found.truncated == sum(length > case["length"] for length in right["lengths"]) > 0
        assert found.answers_cut == right["answers_cut"]
