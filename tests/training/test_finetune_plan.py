"""Planning a run: what is refused before anything heavy starts, and who wins among recipe, machine
and user."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny_model import write_rows

from workshop_utils.cli import main
from workshop_utils.core.errors import DataError, NotACheckpoint, WorkshopError
from workshop_utils.core.hashing import sampled
from workshop_utils.runtime.device import Device
from workshop_utils.training.script import failure_cause, make_plan, run_logged
from workshop_utils.training.script.configuration import compose
from workshop_utils.training.script.plan import SCRIPT, parse_overrides, script_path
from workshop_utils.training.script.predict import SCRIPT as PREDICT_SCRIPT
from workshop_utils.training.script.predict import predict


@pytest.fixture
def root(root):
    """With tickets of our own."""
    (root / "data" / "tickets").mkdir(parents=True)
    for name in ("train", "validation"):
        write_rows(root / "data" / "tickets" / f"{name}.jsonl")
    return root


@pytest.fixture
def unverified(monkeypatch):
    monkeypatch.setattr("workshop_utils.training.script.plan.require_sound", lambda *_: None)


def test_the_base_alone_is_enough(root, plan):
    made = plan()
    assert [rendered.rows for rendered in made.data] == [16, 16]
    assert made.run_dir == root / "runs" / "finetune" / "tiny-lora"
    assert made.adapter == made.run_dir / "checkpoints" / "tiny-lora.nemo"
    assert made.overrides["trainer.accelerator"] == "cpu"
    assert made.command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert str(made).startswith("torchrun") and str(root) not in str(made)


def test_the_user_wins_over_recipe_and_machine(root, plan):
    place = f"exp_manager.exp_dir={root}/else", "exp_manager.name=mine"
    made = plan("trainer.max_steps=7", "trainer.precision=bf16-mixed", *place)
    assert made.overrides["trainer.max_steps"] == "7"
    assert made.overrides["trainer.precision"] == "bf16-mixed"
    assert made.adapter == root / "else" / "mine" / "checkpoints" / "mine.nemo"
    assert sum(part.startswith("trainer.max_steps=") for part in made.command) == 1


def test_own_data_without_a_validation_file_stands_in_for_it(root, plan):
    made = plan(data=write_rows(root / "my.jsonl", 5))
    assert [rendered.rows for rendered in made.data] == [5, 5]


def test_the_fingerprint_follows_what_decides_the_outcome(root, plan):
    first = plan().fingerprint()
    assert first == plan().fingerprint() != plan("model.optim.lr=1e-4").fingerprint()
    write_rows(root / "data" / "tickets" / "train.jsonl", 17)
    assert first != plan().fingerprint()


def test_the_fingerprint_follows_the_weights(root, base):
    """Others of the same shape, in a linked directory as `workshop bridge` leaves it."""
    weights = shutil.copytree(base / "model_weights", root / "stored")
    own = root / "own"
    (own / "model_weights").mkdir(parents=True)
    shutil.copy(base / "model_config.yaml", own)
    for file in weights.iterdir():
        (own / "model_weights" / file.name).symlink_to(file)
    (file,) = weights.glob("*.distcp")

    def fingerprint():
        return make_plan([f"model.restore_from_path={own}"], trust=True).fingerprint()

    first = fingerprint()
    assert first == fingerprint() and ".metadata" in first["base"]["weights"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint() != first


def test_a_copied_or_moved_clone_knows_its_run_again(root, base, monkeypatch):
    """Everything lies elsewhere there: base, tokenizer (by an absolute path in the bridged
    configuration), rows, run and script's clone."""

    def clone(place):
        """The tokenizer and the fingerprint of the README's command in a clone at ``place``."""
        shutil.copytree(root / "data", place / "data")
        view = place / "models" / "bridged" / "tiny"
        tokenizer = place / "models" / "nemo2" / "tiny" / "context" / "nemo_tokenizer"
        shutil.copytree(base / "model_weights", view / "model_weights")
        shutil.copytree(base.parent / "hf", tokenizer)
        described = yaml.safe_dump({"tokenizer": {"type": str(tokenizer)}})
        (view / "model_config.yaml").write_text(described)
        monkeypatch.setenv("WORKSHOP_ROOT", str(place))
        return tokenizer, lambda: make_plan([f"model.restore_from_path={view}"]).fingerprint()

    (_, first), (tokenizer, second) = clone(root / "first"), clone(root / "second")
    assert json.dumps(first()) == json.dumps(second())
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|endoftask|>"))
    assert first() != second(), "another tokenizer"


def test_the_fingerprint_tells_training_from_validation_rows(root, plan):
    files = [write_rows(root / f"{name}.jsonl", count) for count, name in enumerate("abc", 5)]

    def fingerprint(train, validation):
        of = [json.dumps([str(file) for file in part]) for part in (train, validation)]
        shares, names = [1 / len(train)] * len(train), [file.stem for file in validation]
        return plan(
            f"model.data.train_ds.file_names={of[0]}",
            f"model.data.train_ds.concat_sampling_probabilities={json.dumps(shares)}",
            f"model.data.validation_ds.file_names={of[1]}",
            f"model.data.validation_ds.names={json.dumps(names)}",
        ).fingerprint()["data"]

    assert fingerprint(files[:2], files[2:]) != fingerprint(files[:1], files[1:])


def test_a_large_file_is_told_by_a_sample_in_no_time(tmp_path):
    file = tmp_path / "large.nemo"
    with file.open("wb") as stream:
        stream.truncate(1 << 31)
    began = time.process_time()
    digests = {sampled(file)}
    assert time.process_time() - began < 0.2
    for place in (0, (1 << 31) * 7 // 15, (1 << 31) - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        digests.add(sampled(file))
    assert len(digests) == 4


def test_the_fingerprint_follows_the_adapter_to_go_on_from(root, plan, unverified):
    adapter, fingerprints = root / "a.ckpt", []
    for content in (b"a", b"b"):
        adapter.write_bytes(content)
        fingerprints.append(plan(f"model.peft.restore_from_path={adapter}").fingerprint())
    assert fingerprints[0] != fingerprints[1]


def test_the_fingerprint_follows_the_rows_of_ones_own_files(root, plan):
    """And NeMo's index of them, which it never renews, stands with the run."""
    file, fingerprints = root / "rows.jsonl", []
    words = [f"model.data.{part}_ds.file_names=[{file}]" for part in ("train", "validation")]
    for answer in ("yes", "no"):
        file.write_text(f'{{"input": "a", "output": "{answer}"}}\n')
        fingerprints.append((made := plan(*words)).fingerprint())
    assert fingerprints[0] != fingerprints[1]
    index = made.config.model.data.train_ds.index_mapping_dir
    assert index == str(made.run_dir / "workshop" / "index")


@pytest.mark.parametrize("name", ["my run's", "läuf", "2026", "a.b"])
def test_a_run_may_have_any_name_that_a_folder_can_have(root, plan, name):
    made = plan(name=name)
    assert made.adapter == root / "runs" / "finetune" / name / "checkpoints" / f"{name}.nemo"
    assert made.config.exp_manager.name == name
    assert made.config.model.data.train_ds.file_names == [str(made.data[0].path)]


@pytest.mark.parametrize(
    "override, said",
    [
        ("exp_manager.name=../../x", "is no name for a run"),
        ("exp_manager.name=.", "is no name for a run"),
        ("++exp_manager.name=x", "say where the run goes"),
        ("exp_manager.explicit_log_dir=/tmp/x", "say where the run goes"),
        ("~exp_manager.name", "~exp_manager.name: .*leave|say where the run goes"),
    ],
)
def test_where_a_run_goes_is_certain(plan, override, said):
    with pytest.raises(WorkshopError, match=said):
        plan(override)


def test_two_sources_of_rows_and_no_process_are_refused(root, plan):
    with pytest.raises(WorkshopError, match="Both --data and model.data.train_ds.file_names"):
        plan("model.data.train_ds.file_names=[a]", data=root / "x")
    with pytest.raises(WorkshopError, match="nproc-per-node is 0"):
        plan(nproc_per_node=0)


def test_a_place_where_nothing_can_be_made_is_told(root, plan):
    (root / "file").touch()
    (problem,) = plan(f"exp_manager.exp_dir={root}/file/x").preflight.problems
    assert "exp_manager.exp_dir: file is no folder" in problem
    made = plan(f"exp_manager.exp_dir={root}/x")
    (root / "runs").touch()
    with pytest.raises(WorkshopError, match="runs/finetune/data/tiny-lora cannot be written"):
        made.write_rows()


@pytest.mark.parametrize(
    "override, said",
    [
        ("model.data.test_ds.tokens_to_generate=-3", "is -3; it has to be a whole number of at"),
        ("inference.top_k=x", "inference.top_k is 'x'"),
        ("model.micro_batch_size=3", "size 4 is no multiple of model.micro_batch_size 3"),
        ("model.tensor_model_parallel_size=2", "predictions are made by one process"),
        ("model.data.test_ds.file_names=[no.jsonl]", "Both --data and"),
        ("model.data.test_ds.names=[a,b]", "names has 2 names for 1 files"),
        ("server=true", "server is true, .* `workshop serve` answers over HTTP"),
        ("web_server=true", "`workshop serve` answers over HTTP"),
        ("model.peft.restore_from_ckpt.checkpoint_dir=x", "needs checkpoint_dir and checkpoint_na"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused_at_once(root, base, override, said):
    rows = root / "data" / "tickets" / "train.jsonl"
    with pytest.raises(WorkshopError, match=said):
        predict([f"model.restore_from_path={base}", override], data=rows)


@pytest.fixture
def answered(root, monkeypatch, unverified):
    """NeMo is not started; what would have been composed from the command line is kept here."""
    seen = []

    def run(command, environment, log, *_):
        config = compose(PREDICT_SCRIPT, command[command.index(str(PREDICT_SCRIPT)) + 1 :])
        seen.append(config)
        test = config.model.data.test_ds
        for name in test.names:
            file = f"{test.output_file_path_prefix}_test_{name}_inputs_preds_labels.jsonl"
            Path(file).write_text("{}\n")
        return 0

    monkeypatch.setattr("workshop_utils.training.script.predict.run_logged", run)
    return seen


# As NeMo's megatron_gpt_generate.py documents it, and a few of its defaults as a script writes them
# out.
GENERATE = """\
model.restore_from_path={base}
model.peft.restore_from_path=null
trainer.devices=1
model.data.test_ds.file_names=[{root}/one.jsonl, {root}/two.jsonl]
model.data.test_ds.names=['one', 'two']
model.data.test_ds.global_batch_size=4
model.data.test_ds.micro_batch_size=4
model.data.test_ds.tokens_to_generate=30
inference.greedy=True
inference.outfile_path='{root}/answers.jsonl'
exp_manager.exp_dir={root}/x
server=False
port=5555
web_server=False
model.peft.lora_tuning.adapter_dim=8
model.peft.adapter_tuning.adapter_dim=8
model.peft.p_tuning.virtual_tokens=4
model.peft.ia3_tuning.layer_selection=null
"""


def test_nemos_documented_command_of_generation(root, base, answered):
    for name in ("one", "two"):
        (root / f"{name}.jsonl").write_text('{"input": "a", "output": "b"}\n')
    words = GENERATE.format(root=root, base=base).splitlines()
    file = predict(words)
    assert (file, file.read_text()) == (root / "answers.jsonl", "{}\n{}\n")
    test = answered[0].model.data.test_ds
    assert (test.prompt_template, test.tokens_to_generate) == ("{input} {output}", 30)
    assert answered[0].inference.greedy is True
    with pytest.raises(WorkshopError, match="Both --out and inference.outfile_path"):
        predict(words, out=root / "else.jsonl")


def test_rows_are_taken_as_the_adapter_learned_them(root, base, answered):
    """NeMo's defaults do so, too. Rows that are rendered here have a template of their own."""
    folder = root / "run" / "checkpoints"
    (folder.parent / "version_0").mkdir(parents=True)
    folder.mkdir()
    lora = {"adapter_dim": 6, "alpha": 12, "target_modules": ["mlp"], "variant": "nemo"}
    rows = {
        "prompt_template": "Q: {question} A: {answer}",
        "label_key": "answer",
        "truncation_field": "question",
        "add_bos": True,
    }
    peft = {"peft_scheme": "lora", "lora_tuning": lora}
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
    tickets = root / "data" / "tickets" / "train.jsonl"
    predict(words, data=tickets)
    own, rendered = (config.model for config in answered)
    assert {key: own.data.test_ds[key] for key in rows} == rows
    assert rendered.data.test_ds.prompt_template == "{input}{output}"
    assert rendered.data.test_ds.label_key == "output"
    for model in (own, rendered):
        assert {key: model.peft.lora_tuning[key] for key in lora} == lora
    (folder / "a=1.ckpt").unlink()
    with pytest.raises(WorkshopError, match="a=1.ckpt is no file. Give the .ckpt of an adapter"):
        predict(words, data=tickets)


def test_files_of_predictions_are_looked_at_first(root, base):
    words = [f"model.restore_from_path={base}", "model.data.test_ds.file_names=[no.jsonl]"]
    with pytest.raises(WorkshopError, match="no.jsonl does not exist"):
        predict(words)
    with pytest.raises(WorkshopError, match="--out: .* is a directory"):
        predict(words, out=root)


def test_processes_share_the_cores_and_inherit_the_patches(root, plan, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = plan(nproc_per_node=64)
    assert made.environment["OMP_NUM_THREADS"] == "1"
    assert "nemo_cpu/inherited" in made.environment["PYTHONPATH"]
    assert "--nproc_per_node=64" in made.command


@pytest.fixture
def clone(root, monkeypatch):
    """``NEMO_PATH`` with a script, and with defaults that differ from ours as those of NeMo v2.4.1
    do."""
    monkeypatch.setenv("NEMO_PATH", str(root / "clone"))
    script = root / "clone/examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py"
    shutil.copytree(SCRIPT.parent / "conf", script.parent / "conf")
    defaults = script.parent / "conf" / "megatron_gpt_finetuning_config.yaml"
    text = defaults.read_text().replace("peft_scheme: lora ", "peft_scheme: adapter ")
    defaults.write_text(text.replace("  limit_val_batches: 1.0\n", ""))
    script.touch()
    return script


def test_nemo_path_runs_the_clones_script(root, monkeypatch):
    assert script_path() == SCRIPT
    monkeypatch.setenv("NEMO_PATH", str(root))
    with pytest.raises(WorkshopError, match="NEMO_PATH is .* does not exist"):
        script_path()


def test_a_clones_defaults_may_lack_our_keys(plan, clone):
    assert script_path() == clone
    command = plan("trainer.max_steps=3").command
    assert "trainer.max_steps=3" in command and "++trainer.limit_val_batches=6" in command


def test_rendered_rows_are_glued_without_a_blank(plan, clone, monkeypatch):
    """NeMo strips the blanks of each value: the template alone says what stands between prompt and
    answer, in every script."""
    for _ in range(2):
        data = plan().config.model.data
        parts = ("train_ds", "validation_ds", "test_ds")
        assert {data[part].prompt_template for part in parts} == {"{input}{output}"}
        monkeypatch.delenv("NEMO_PATH", raising=False)


def test_own_files_leave_a_clones_defaults_alone(root, plan, clone):
    """And what Apex is needed for is told by the scheme that the clone's defaults name."""
    file = root / "rows.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n')
    made = plan(*(f"model.data.{part}_ds.file_names=[{file}]" for part in ("train", "validation")))
    model = made.config.model
    peft, train = model.peft, model.data.train_ds
    assert (peft.peft_scheme, peft.adapter_tuning.norm_type) == ("adapter", "layernorm")
    assert (peft.lora_tuning.alpha, model.optim.sched.warmup_steps) == (32, 50)
    assert (train.prompt_template, train.max_seq_length) == ("{input} {output}", 2048)
    assert "model.optim.lr" not in made.overrides


@pytest.mark.parametrize(
    "overrides, error, said",
    [
        ([], WorkshopError, "model.restore_from_path is missing"),
        (["oops"], WorkshopError, "'oops' is not an override: write key=value"),
        (["model.restore_from_path=no/such"], NotACheckpoint, "no/such does not exist"),
        (["model.restore_from_path={root}/n2"], NotACheckpoint, "Run `workshop bridge"),
        (["model.restore_from_path={root}/data"], NotACheckpoint, "no model_config.yaml"),
    ],
)
def test_refused_at_once(root, overrides, error, said):
    (root / "n2" / "context").mkdir(parents=True)
    with pytest.raises(error, match=said):
        make_plan([word.format(root=root) for word in overrides])


def test_missing_tickets_are_named(root, plan):
    (root / "data" / "tickets" / "train.jsonl").unlink()
    with pytest.raises(DataError, match="make_tickets.py"):
        plan()


@pytest.mark.parametrize("tickets", [True, False])
def test_a_dry_run_leaves_the_disk_as_it_was(root, base, plan, capsys, tickets):
    """And launching writes what the plan named: the rows, and the tickets of the README's other
    commands."""
    if not tickets:
        shutil.rmtree(root / "data")

    def listing():
        files = {path: path.lstat() for path in (root, *root.rglob("*"))}
        return {
            str(path): (stat.st_mtime_ns, stat.st_mode, path.is_file() and path.read_bytes())
            for path, stat in files.items()
        }

    before = listing()
    assert main(["finetune", "--dry-run", f"model.restore_from_path={base}"]) == 0
    assert "tokens a row" in capsys.readouterr().out
    made = plan()
    assert listing() == before
    fingerprint = made.fingerprint()
    made.write_rows()
    assert [rows.path.read_bytes() for rows in made.data] == [rows.content for rows in made.data]
    assert (root / "data" / "tickets" / "train.jsonl").exists()
    assert made.fingerprint() == plan().fingerprint() == fingerprint
    assert all(str(rows.path) in " ".join(made.command) for rows in made.data)


def test_the_configuration_is_composed_once(plan, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "workshop_utils.training.script.plan.compose",
        lambda *words: calls.append(words) or compose(*words),
    )
    plan()
    assert len(calls) == 1


def test_a_device_is_passed_and_told_to_the_processes(plan, monkeypatch):
    monkeypatch.delenv("WORKSHOP_DEVICE")
    before = dict(os.environ)
    made = plan(device=Device("cpu", "32", "fp32", "a test"))
    assert made.device.reason == "a test"
    assert made.environment["WORKSHOP_DEVICE"] == made.overrides["trainer.accelerator"] == "cpu"
    assert os.environ == before


def test_a_later_override_wins():
    words = ["a=1", "++b='x=y'", "~c", "~d=3", "a=2"]
    assert parse_overrides(words) == {"a": "2", "++b": "'x=y'", "~c": None, "~d": "3"}


@pytest.mark.parametrize(
    "word",
    [
        "~model.optim.sched",
        "~model.optim.sched.min_lr",
        "~model.optim.weight_decay=0.01",
        "+trainer.detect_anomaly=true",
        "++trainer.max_steps=30",
        "++model.optim.betas=[0.8, 0.9]",
        "model.optim.betas=[0.8,0.9]",
        "model.data.train_ds.prompt_template='\"a\" {input} {output}'",
        "+model.extra={a: 1, b: [x, 'y z'], c: null}",
        "+model.extra=str(3)",
        "model.data.train_ds.add_eos=false",
        "model.optim.lr=1e-4",
        "model.optim.sched=null",
    ],
)
def test_every_kind_of_override_means_what_hydra_says(plan, word):
    """One run each: the plan's words, composed by Hydra in order, end as the plan's own does."""
    key = word.partition("=")[0].lstrip("+~")
    made, without = plan(word), plan()
    changed = OmegaConf.select(made.config, key)
    if word.startswith("~"):
        assert changed is None and OmegaConf.select(without.config, key) is not None
    else:
        config = OmegaConf.create()
        override = OverridesParser.create().parse_override(word)
        OmegaConf.update(config, key, override.value())
        assert changed == OmegaConf.select(config, key)
    assert word.replace(" ", "") in [part.replace(" ", "") for part in made.command]


@pytest.mark.parametrize(
    "word, said",
    [
        ("trainer.max_steps=1,2", "is a sweep"),
        ("trainer.max_steps=choice(1,2)", "is a sweep"),
        ("trainer.max_steps=range(1,3)", "is a sweep"),
        ("model.optim.lr=interval(0,1)", "is a sweep"),
        ("model.optim.lr=sort(3,1)", "is a sweep"),
        ("model@x=y", "choose from a group"),
        ("model/peft=y", "choose from a group"),
        ("hydra/launcher=3", "choose from a group"),
        ("~model.no_such", "~model.no_such: megatron_gpt_finetuning has no such key"),
        ("~model.optim.weight_decay=7", "is 0.01 and not 7"),
        ("~trainer.max_steps", "~trainer.max_steps: the script reads trainer.max_steps"),
        ("~model.peft", "Interpolation key 'model.peft.peft_scheme' not found"),
        ("~", "'~' cannot be read as an override"),
        ("=3", "'=3' cannot be read as an override"),
        ("a={b", "cannot be read as an override"),
        ("model.optim.lr='1", "cannot be read as an override"),
        ("", "'' is not an override"),
    ],
)
def test_what_makes_no_run_is_named(plan, word, said):
    with pytest.raises(WorkshopError, match=re.escape(said)):
        plan(word)


def test_status_and_cause_of_a_failed_process(tmp_path):
    program = "import sys\nprint('before')\ndef f():\n    raise ValueError('the real cause')\nf()"
    log = tmp_path / "log"
    assert run_logged([sys.executable, "-c", program], {"PYTHONUNBUFFERED": "1"}, log) == 1
    with log.open("a") as stream:
        stream.write("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\nRoot\n")
    assert failure_cause(log) == "ValueError: the real cause"


def test_a_process_that_dies_without_a_word(tmp_path):
    code = "print('last words'); import os; os.kill(os.getpid(), 9)"
    log = tmp_path / "log"
    assert run_logged([sys.executable, "-c", code], {"PYTHONUNBUFFERED": "1"}, log) == -9
    assert "last words" in failure_cause(log)


def test_dry_run_imports_nothing_heavy(root, base):
    program = (
        "import sys; from workshop_utils.cli import main; status = main(['finetune', "
        f"'--dry-run', 'model.restore_from_path={base}']); print([name for name in ('torch', "
        "'transformers', 'nemo', 'lightning') if name in sys.modules]); sys.exit(status)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "trainer.max_steps=" in done.stdout
