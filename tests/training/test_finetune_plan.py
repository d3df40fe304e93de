"""Planning a run: what is refused before anything heavy starts, and who wins among recipe, machine
and user."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import make_tiny_model, write_rows, write_sharded

from workshop_utils.cli import main
from workshop_utils.core.errors import DataError, NotACheckpoint, WorkshopError
from workshop_utils.core.hashing import sampled
from workshop_utils.runtime.device import Device
from workshop_utils.training.script import failure_cause, make_plan, run_logged
from workshop_utils.training.script.configuration import compose
from workshop_utils.training.script.plan import SCRIPT, parse_overrides, script_path
from workshop_utils.training.script.predict import SCRIPT as PREDICT_SCRIPT
from workshop_utils.training.script.predict import predict


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What `workshop bridge` leaves, as far as planning looks at it."""
    directory = tmp_path_factory.mktemp("bridged") / "tiny"
    tokenizer = make_tiny_model(directory.parent / "hf")
    write_sharded(directory / "model_weights")
    (directory / "model_config.yaml").write_text(
        yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}})
    )
    return directory


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_PATH", raising=False)
    (tmp_path / "data" / "tickets").mkdir(parents=True)
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / "tickets" / f"{name}.jsonl")
    return tmp_path


def test_the_base_alone_is_enough(root, base):
    plan = make_plan([f"model.restore_from_path={base}"])
    assert [rendered.rows for rendered in plan.data] == [16, 16]
    assert plan.run_dir == root / "runs" / "finetune" / "tiny-lora"
    assert plan.adapter == plan.run_dir / "checkpoints" / "tiny-lora.nemo"
    assert plan.overrides["trainer.accelerator"] == "cpu"
    assert plan.command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert str(plan).startswith("torchrun") and str(root) not in str(plan)


def test_the_user_wins_over_recipe_and_machine(root, base):
    plan = make_plan(
        [
            f"model.restore_from_path={base}",
            "trainer.max_steps=7",
            "trainer.precision=bf16-mixed",
            f"exp_manager.exp_dir={root}/else",
            "exp_manager.name=mine",
        ]
    )
    assert (plan.overrides["trainer.max_steps"], plan.overrides["trainer.precision"]) == (
        "7",
        "bf16-mixed",
    )
    assert plan.adapter == root / "else" / "mine" / "checkpoints" / "mine.nemo"
    assert sum(part.startswith("trainer.max_steps=") for part in plan.command) == 1


def test_own_data_and_its_validation_file(root, base, tmp_path):
    write_rows(tmp_path / "my.jsonl", 5)
    plan = make_plan([f"model.restore_from_path={base}"], data=tmp_path / "my.jsonl")
    assert [rendered.rows for rendered in plan.data] == [5, 5], (
        "without a validation.jsonl the training rows stand in"
    )


def test_the_fingerprint_follows_what_decides_the_outcome(root, base):
    first = make_plan([f"model.restore_from_path={base}"]).fingerprint()
    assert first == make_plan([f"model.restore_from_path={base}"]).fingerprint()
    assert (
        first != make_plan([f"model.restore_from_path={base}", "model.optim.lr=1e-4"]).fingerprint()
    )
    write_rows(root / "data" / "tickets" / "train.jsonl", 17)
    assert first != make_plan([f"model.restore_from_path={base}"]).fingerprint()


def test_the_fingerprint_follows_the_weights(root, base, tmp_path):
    """Others of the same shape, in a linked directory as `workshop bridge` leaves it, or in an
    archive of any size."""
    own = tmp_path / "own"
    weights = shutil.copytree(base / "model_weights", tmp_path / "stored")
    own.mkdir()
    shutil.copy(base / "model_config.yaml", own)
    (own / "model_weights").mkdir()
    for file in weights.iterdir():
        (own / "model_weights" / file.name).symlink_to(file)
    (file,) = weights.glob("*.distcp")

    def found():
        return make_plan([f"model.restore_from_path={own}"], trust=True).fingerprint()

    first = found()
    assert first == found() and ".metadata" in first["base"]["weights"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert found() != first


def test_a_copied_or_moved_clone_knows_its_run_again(root, base, tmp_path, monkeypatch):
    """Everything lies elsewhere there: base, tokenizer (by an absolute path in the bridged
    configuration), rows, run and script's clone."""

    def clone(place):
        """The fingerprint of the README's command in a clone at ``place``."""
        shutil.copytree(root / "data", place / "data")
        view, tokenizer = (
            place / "models" / "bridged" / "tiny",
            place / "models" / "nemo2" / "tiny" / "context" / "nemo_tokenizer",
        )
        shutil.copytree(base / "model_weights", view / "model_weights")
        shutil.copytree(base.parent / "hf", tokenizer)
        (view / "model_config.yaml").write_text(
            yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}})
        )
        monkeypatch.setenv("WORKSHOP_ROOT", str(place))
        return view, lambda: make_plan([f"model.restore_from_path={view}"]).fingerprint()

    (_, first), (view, second) = clone(tmp_path / "first"), clone(tmp_path / "second")
    assert json.dumps(first()) == json.dumps(second())
    tokenizer = (
        Path(yaml.safe_load((view / "model_config.yaml").read_text())["tokenizer"]["type"])
        / "tokenizer.json"
    )
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|endoftask|>"))
    assert first() != second(), "another tokenizer"


def test_the_fingerprint_tells_training_from_validation_rows(root, base, tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", count) for count, name in enumerate("abc", 5)]

    def found(train, validation):
        names = [json.dumps([str(file) for file in part]) for part in (train, validation)]
        return make_plan(
            [
                f"model.restore_from_path={base}",
                f"model.data.train_ds.file_names={names[0]}",
                "model.data.train_ds.concat_sampling_probabilities="
                + json.dumps([1 / len(train)] * len(train)),
                f"model.data.validation_ds.file_names={names[1]}",
                "model.data.validation_ds.names=" + json.dumps([file.stem for file in validation]),
            ]
        ).fingerprint()["data"]

    assert found(files[:2], files[2:]) != found(files[:1], files[1:])


def test_a_large_file_is_told_by_a_sample_in_no_time(tmp_path):
    file = tmp_path / "large.nemo"
    with file.open("wb") as stream:
        stream.truncate(1 << 31)
    began = time.process_time()
    found = {sampled(file)}
    assert time.process_time() - began < 0.2
    for place in (0, (1 << 31) * 7 // 15, (1 << 31) - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        found.add(sampled(file))
    assert len(found) == 4


def test_the_fingerprint_follows_the_adapter_to_go_on_from(root, base, monkeypatch):
    monkeypatch.setattr("workshop_utils.training.script.plan.require_sound", lambda *_: None)
    adapter = root / "a.ckpt"
    found = []
    for content in (b"a", b"b"):
        adapter.write_bytes(content)
        found.append(
            make_plan(
                [f"model.restore_from_path={base}", f"model.peft.restore_from_path={adapter}"]
            ).fingerprint()
        )
    assert found[0] != found[1]


def test_the_fingerprint_follows_the_rows_of_ones_own_files(root, base):
    """And NeMo's index of them, which it never renews, stands with the run."""
    file = root / "rows.jsonl"
    words = [
        f"model.restore_from_path={base}",
        *(f"model.data.{part}_ds.file_names=[{file}]" for part in ("train", "validation")),
    ]
    found = []
    for answer in ("yes", "no"):
        file.write_text(f'{{"input": "a", "output": "{answer}"}}\n')
        plan = make_plan(words)
        found.append(plan.fingerprint())
    assert found[0] != found[1]
    assert plan.config.model.data.train_ds.index_mapping_dir == str(
        plan.run_dir / "workshop" / "index"
    )


@pytest.mark.parametrize("name", ["my run's", "läuf", "2026", "a.b"])
def test_a_run_may_have_any_name_that_a_folder_can_have(root, base, name):
    plan = make_plan([f"model.restore_from_path={base}"], name=name)
    assert plan.adapter == root / "runs" / "finetune" / name / "checkpoints" / f"{name}.nemo"
    assert (plan.config.exp_manager.name, plan.config.model.data.train_ds.file_names) == (
        name,
        [str(plan.data[0].path)],
    )


@pytest.mark.parametrize(
    "override, said",
    [
        ("exp_manager.name=../../x", "is no name for a run"),
        ("exp_manager.name=.", "is no name for a run"),
        ("++exp_manager.name=x", "say where the run goes"),
        ("exp_manager.explicit_log_dir=/tmp/x", "say where the run goes"),
        ("~trainer.max_steps", "is not an override"),
    ],
)
def test_where_a_run_goes_is_certain(root, base, override, said):
    with pytest.raises(WorkshopError, match=said):
        make_plan([f"model.restore_from_path={base}", override])


def test_two_sources_of_rows_and_no_process_are_refused(root, base):
    with pytest.raises(WorkshopError, match="Both --data and model.data.train_ds.file_names"):
        make_plan(
            [f"model.restore_from_path={base}", "model.data.train_ds.file_names=[a]"],
            data=root / "x",
        )
    with pytest.raises(WorkshopError, match="nproc-per-node is 0"):
        make_plan([f"model.restore_from_path={base}"], nproc_per_node=0)


def test_a_place_where_nothing_can_be_made_is_told(root, base):
    (root / "file").touch()
    (problem,) = make_plan(
        [f"model.restore_from_path={base}", f"exp_manager.exp_dir={root}/file/x"]
    ).preflight.problems
    assert "exp_manager.exp_dir: file is no folder" in problem
    plan = make_plan([f"model.restore_from_path={base}", f"exp_manager.exp_dir={root}/x"])
    (root / "runs").touch()
    with pytest.raises(WorkshopError, match="runs/finetune/data/tiny-lora cannot be written"):
        plan.write_rows()


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "model.data.test_ds.tokens_to_generate=-3",
            "tokens_to_generate is -3; it has to be a whole number of at least 1",
        ),
        ("inference.top_k=x", "inference.top_k is 'x'"),
        (
            "model.micro_batch_size=3",
            "model.global_batch_size 4 is no multiple of model.micro_batch_size 3",
        ),
        ("model.tensor_model_parallel_size=2", "predictions are made by one process"),
        ("model.data.test_ds.file_names=[no.jsonl]", "Both --data and"),
        ("model.data.test_ds.names=[a,b]", "names has 2 names for 1 files"),
        (
            "server=true",
            (
                "server is true, but `workshop predict` answers a file. `workshop serve` answers "
                "over HTTP"
            ),
        ),
        ("web_server=true", "`workshop serve` answers over HTTP"),
        (
            "model.peft.restore_from_ckpt.checkpoint_dir=x",
            "restore_from_ckpt needs checkpoint_dir and checkpoint_name",
        ),
    ],
)
def test_predictions_that_cannot_be_made_are_refused_at_once(root, base, override, said):
    with pytest.raises(WorkshopError, match=said):
        predict(
            [f"model.restore_from_path={base}", override],
            data=root / "data" / "tickets" / "train.jsonl",
        )


@pytest.fixture
def answered(root, monkeypatch):
    """NeMo is not started; what would have been composed from the command line is kept here."""
    seen = []

    def run(command, environment, log, *_):
        config = compose(PREDICT_SCRIPT, command[command.index(str(PREDICT_SCRIPT)) + 1 :])
        seen.append(config)
        for name in config.model.data.test_ds.names:
            Path(
                f"{config.model.data.test_ds.output_file_path_prefix}_test_{name}_inputs_preds_labels.jsonl"
            ).write_text("{}\n")
        return 0

    monkeypatch.setattr("workshop_utils.training.script.predict.run_logged", run)
    monkeypatch.setattr("workshop_utils.training.script.plan.require_sound", lambda *_: None)
    return seen


GENERATE = [  # as NeMo's megatron_gpt_generate.py documents it, and a few of its defaults as a script writes them out  # noqa: E501
    "model.restore_from_path={base}",
    "model.peft.restore_from_path=null",
    "trainer.devices=1",
    "model.data.test_ds.file_names=[{root}/one.jsonl, {root}/two.jsonl]",
    "model.data.test_ds.names=['one', 'two']",
    "model.data.test_ds.global_batch_size=4",
    "model.data.test_ds.micro_batch_size=4",
    "model.data.test_ds.tokens_to_generate=30",
    "inference.greedy=True",
    "inference.outfile_path='{root}/answers.jsonl'",
    "exp_manager.exp_dir={root}/x",
    "server=False",
    "port=5555",
    "web_server=False",
    "model.peft.lora_tuning.adapter_dim=8",
    "model.peft.adapter_tuning.adapter_dim=8",
    "model.peft.p_tuning.virtual_tokens=4",
    "model.peft.ia3_tuning.layer_selection=null",
]


def test_nemos_documented_command_of_generation(root, base, answered):
    for name in ("one", "two"):
        (root / f"{name}.jsonl").write_text('{"input": "a", "output": "b"}\n')
    made = predict([word.format(root=root, base=base) for word in GENERATE])
    assert (made, made.read_text()) == (root / "answers.jsonl", "{}\n{}\n")
    test = answered[0].model.data.test_ds
    assert (test.prompt_template, test.tokens_to_generate, answered[0].inference.greedy) == (
        "{input} {output}",
        30,
        True,
    )
    with pytest.raises(WorkshopError, match="Both --out and inference.outfile_path"):
        predict([word.format(root=root, base=base) for word in GENERATE], out=root / "else.jsonl")


def test_rows_are_taken_as_the_adapter_learned_them(root, base, answered):
    """NeMo's defaults do so, too. Rows that are rendered here have a template of their own."""
    folder = root / "run" / "checkpoints"
    (folder.parent / "version_0").mkdir(parents=True)
    folder.mkdir()
    peft = {
        "peft_scheme": "lora",
        "lora_tuning": {
            "adapter_dim": 6,
            "alpha": 12,
            "target_modules": ["mlp"],
            "variant": "nemo",
        },
    }
    rows = {
        "prompt_template": "Q: {question} A: {answer}",
        "label_key": "answer",
        "truncation_field": "question",
        "add_bos": True,
    }
    (folder.parent / "version_0" / "hparams.yaml").write_text(
        yaml.safe_dump({"cfg": {"peft": peft, "data": {"train_ds": rows}}})
    )
    torch.save({"state_dict": {}}, folder / "a=1.ckpt")
    (root / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    words = [
        f"model.restore_from_path={base}",
        f"model.peft.restore_from_ckpt.checkpoint_dir={folder}",
        "model.peft.restore_from_ckpt.checkpoint_name='a=1.ckpt'",
    ]
    predict([*words, f"model.data.test_ds.file_names=[{root}/q.jsonl]"])
    predict(words, data=root / "data" / "tickets" / "train.jsonl")
    own, rendered = (config.model for config in answered)
    assert {key: own.data.test_ds[key] for key in rows} == rows
    assert (rendered.data.test_ds.prompt_template, rendered.data.test_ds.label_key) == (
        "{input}{output}",
        "output",
    )
    for model in (own, rendered):
        lora = model.peft.lora_tuning
        assert (lora.adapter_dim, lora.alpha, lora.target_modules) == (6, 12, ["mlp"])
    (folder / "a=1.ckpt").unlink()
    with pytest.raises(WorkshopError, match="a=1.ckpt is no file. Give the .ckpt of an adapter"):
        predict(words, data=root / "data" / "tickets" / "train.jsonl")


def test_files_of_predictions_are_looked_at_first(root, base):
    words = [f"model.restore_from_path={base}", "model.data.test_ds.file_names=[no.jsonl]"]
    with pytest.raises(WorkshopError, match="no.jsonl does not exist"):
        predict(words)
    with pytest.raises(WorkshopError, match="--out: .* is a directory"):
        predict(words, out=root)


def test_processes_share_the_cores_and_inherit_the_patches(root, base, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = make_plan([f"model.restore_from_path={base}"], nproc_per_node=64)
    assert plan.environment["OMP_NUM_THREADS"] == "1"
    assert "nemo_cpu/inherited" in plan.environment["PYTHONPATH"]
    assert "--nproc_per_node=64" in plan.command


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """``NEMO_PATH`` with a script, and with defaults that differ from ours as those of NeMo v2.4.1
    do."""
    monkeypatch.setenv("NEMO_PATH", str(tmp_path / "clone"))
    script = tmp_path / "clone/examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py"
    defaults = (
        shutil.copytree(SCRIPT.parent / "conf", script.parent / "conf")
        / "megatron_gpt_finetuning_config.yaml"
    )
    text = (
        defaults.read_text()
        .replace("peft_scheme: lora ", "peft_scheme: adapter ")
        .replace("  limit_val_batches: 1.0\n", "")
    )
    defaults.write_text(text)
    script.touch()
    return script


def test_nemo_path_runs_the_clones_script(root, base, tmp_path, monkeypatch):
    assert script_path() == SCRIPT
    monkeypatch.setenv("NEMO_PATH", str(tmp_path))
    with pytest.raises(WorkshopError, match="NEMO_PATH is .* does not exist"):
        script_path()


def test_a_clones_defaults_may_lack_our_keys(root, base, clone):
    assert script_path() == clone
    command = make_plan([f"model.restore_from_path={base}", "trainer.max_steps=3"]).command
    assert "trainer.max_steps=3" in command and "++trainer.limit_val_batches=6" in command


def test_rendered_rows_are_glued_without_a_blank(root, base, clone, monkeypatch):
    """NeMo strips the blanks of each value: the template alone says what stands between prompt and
    answer, in every script."""
    for _ in range(2):
        data = make_plan([f"model.restore_from_path={base}"]).config.model.data
        assert {
            data[part].prompt_template for part in ("train_ds", "validation_ds", "test_ds")
        } == {"{input}{output}"}
        monkeypatch.delenv("NEMO_PATH", raising=False)


def test_own_files_leave_a_clones_defaults_alone(root, base, clone):
    """And what Apex is needed for is told by the scheme that the clone's defaults name."""
    file = root / "rows.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    words = [f"model.data.{part}_ds.file_names=[{file}]" for part in ("train", "validation")]
    plan = make_plan([f"model.restore_from_path={base}", *words])
    model = plan.config.model
    assert (
        model.peft.peft_scheme,
        model.peft.adapter_tuning.norm_type,
        model.peft.lora_tuning.alpha,
    ) == ("adapter", "layernorm", 32)
    assert (
        model.data.train_ds.prompt_template,
        model.data.train_ds.max_seq_length,
        model.optim.sched.warmup_steps,
    ) == ("{input} {output}", 2048, 50)
    assert "model.optim.lr" not in plan.overrides


@pytest.mark.parametrize(
    "overrides, error, said",
    [
        ([], WorkshopError, "model.restore_from_path is missing"),
        (["oops"], WorkshopError, "'oops' is not an override: write key=value"),
        (["model.restore_from_path=no/such"], NotACheckpoint, "no/such does not exist"),
    ],
)
def test_refused_at_once(root, overrides, error, said):
    with pytest.raises(error, match=said):
        make_plan(overrides)


def test_a_nemo2_checkpoint_is_told_from_a_bridged_one(root, tmp_path):
    (tmp_path / "n2" / "context").mkdir(parents=True)
    with pytest.raises(NotACheckpoint, match="Run `workshop bridge"):
        make_plan([f"model.restore_from_path={tmp_path / 'n2'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpoint, match="no model_config.yaml"):
        make_plan([f"model.restore_from_path={tmp_path / 'empty'}"])


def test_missing_tickets_are_named(root, base):
    (root / "data" / "tickets" / "train.jsonl").unlink()
    with pytest.raises(DataError, match="make_tickets.py"):
        make_plan([f"model.restore_from_path={base}"])


@pytest.mark.parametrize("tickets", [True, False])
def test_a_dry_run_leaves_the_disk_as_it_was(root, base, capsys, tickets):
    """And launching writes what the plan named: the rows, and the tickets of the README's other
    commands."""
    if not tickets:
        shutil.rmtree(root / "data")

    def listing():
        return {
            str(path.relative_to(root)): (
                path.lstat().st_mtime_ns,
                path.lstat().st_mode,
                path.read_bytes() if path.is_file() else None,
            )
            for path in (root, *root.rglob("*"))
        }

    before = listing()
    words = [f"model.restore_from_path={base}"]
    assert main(["finetune", "--dry-run", *words]) == 0
    assert listing() == before
    plan = make_plan(words)
    assert listing() == before
    fingerprint = plan.fingerprint()
    plan.write_rows()
    assert [rows.path.read_bytes() for rows in plan.data] == [rows.content for rows in plan.data]
    assert (root / "data" / "tickets" / "train.jsonl").exists()
    assert plan.fingerprint() == make_plan(words).fingerprint() == fingerprint
    assert all(str(rows.path) in " ".join(plan.command) for rows in plan.data)
    assert "tokens a row" in capsys.readouterr().out


def test_the_configuration_is_composed_once(root, base, monkeypatch):
    calls = []

    def composed(*words):
        calls.append(words)
        return compose(*words)

    monkeypatch.setattr("workshop_utils.training.script.plan.compose", composed)
    make_plan([f"model.restore_from_path={base}"])
    assert len(calls) == 1


def test_a_device_is_passed_and_told_to_the_processes(root, base, monkeypatch):
    monkeypatch.delenv("WORKSHOP_DEVICE")
    before = dict(os.environ)
    plan = make_plan(
        [f"model.restore_from_path={base}"], device=Device("cpu", "32", "fp32", "a test")
    )
    assert plan.device.reason == "a test"
    assert plan.environment["WORKSHOP_DEVICE"] == plan.overrides["trainer.accelerator"] == "cpu"
    assert os.environ == before


def test_a_later_override_wins():
    assert parse_overrides(["a=1", "++b=x=y", "a=2"]) == {"a": "2", "++b": "x=y"}


def test_status_and_cause_of_a_failed_process(tmp_path):
    program = "import sys\nprint('before')\ndef f():\n    raise ValueError('the real cause')\nf()"
    assert (
        run_logged([sys.executable, "-c", program], {"PYTHONUNBUFFERED": "1"}, tmp_path / "log")
        == 1
    )
    summary = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\nRootCause (first "
        "observed failure)\n"
    )
    with (tmp_path / "log").open("a") as log:
        log.write(summary)
    assert failure_cause(tmp_path / "log") == "ValueError: the real cause"


def test_a_process_that_dies_without_a_word(tmp_path):
    run_logged(
        [sys.executable, "-c", "print('last words'); import os; os.kill(os.getpid(), 9)"],
        {"PYTHONUNBUFFERED": "1"},
        tmp_path / "log",
    )
    assert "last words" in failure_cause(tmp_path / "log")


def test_dry_run_imports_nothing_heavy(root, base):
    program = (
        "import sys; from workshop_utils.cli import main; status = main(['finetune', "
        f"'--dry-run', 'model.restore_from_path={base}']); print([name for name in ('torch', "
        "'transformers', 'nemo', 'lightning') if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "trainer.max_steps=" in done.stdout
