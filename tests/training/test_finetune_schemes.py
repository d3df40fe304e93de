"""Everything that the script can be asked for, each tried on a two-layer model with NeMo doing the
work."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny_model import write_rows

from workshop_utils.adapters.export import export
from workshop_utils.adapters.read import read_adapter
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.core.errors import UnsupportedAdapter
from workshop_utils.training import script
from workshop_utils.training.script.predict import predict

pytestmark = pytest.mark.slow

LARGE = ["model.peft.lora_tuning.target_modules=[all]", "model.peft.lora_tuning.adapter_dim=64"]
NEVER_EARLY = "exp_manager.create_early_stopping_callback=false"


@pytest.fixture(autouse=True)
def environment(tiny, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tiny))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def overrides(tiny, name: str, *more: str) -> list[str]:
    return [
        f"model.restore_from_path={tiny / 'bridged' / 'tiny'}",
        f"exp_manager.exp_dir={tiny / 'runs'}",
        f"exp_manager.name={name}",
        "trainer.max_steps=12",
        "trainer.val_check_interval=6",
        "model.peft.lora_tuning.adapter_dim=8",
        "model.optim.lr=2e-2",
        "model.peft.lora_tuning.alpha=16",
        *more,
    ]


def command(tiny, words: list[str]) -> list[str]:
    """The same as a command line."""
    start = [sys.executable, "-m", "workshop_utils", "finetune"]
    return [*start, "--data", str(tiny / "rows.jsonl"), *words]


def told(plan: script.Plan, kind: str, value: str = "step") -> list:
    return [event[value] for event in script.read_events(plan.events) if event["event"] == kind]


def losses(plan: script.Plan) -> dict[int, float]:
    return dict(zip(told(plan, "step"), told(plan, "step", "loss"), strict=True))


def train(tiny, name: str, *more: str) -> tuple[script.Plan, list[float]]:
    own = any("train_ds.file_names" in one for one in more)
    plan = script.make_plan(overrides(tiny, name, *more), data=None if own else tiny / "rows.jsonl")
    script.finetune(plan, progress=False)
    return plan, told(plan, "step", "loss")


def wait_for_step(plan: script.Plan, step: int, is_running) -> None:
    deadline = time.monotonic() + 200
    while max(told(plan, "step"), default=0) <= step:
        assert is_running() and time.monotonic() < deadline, plan.log.read_text()[-2000:]
        time.sleep(0.02)


def running(name: str) -> list:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"exp_manager.name={name}" in (process.info["cmdline"] or [])
    ]


SETTINGS = {
    "lora": [],
    "canonical-lora": ["model.peft.lora_tuning.variant=canonical"],
    "attention": ["model.peft.lora_tuning.target_modules=[attention]"],
    "mlp": ["model.peft.lora_tuning.target_modules=[mlp]"],
    "dropout": ["model.peft.lora_tuning.adapter_dropout=0.1"],
    "adapter": ["model.peft.peft_scheme=adapter"],
    "ia3": ["model.peft.peft_scheme=ia3"],
    "ptuning": ["model.peft.peft_scheme=ptuning"],
    "full": ["model.peft.peft_scheme=none", "model.optim.lr=1e-3"],
    "whole-row-loss": ["model.answer_only_loss=false"],
    "early-stop": [
        "exp_manager.early_stopping_callback_params.min_delta=100",
        "exp_manager.early_stopping_callback_params.patience=1",
        "trainer.val_check_interval=2",
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains(tiny, name):
    plan, losses = train(tiny, name, *SETTINGS[name])
    assert plan.adapter.exists()
    assert len(losses) == (4 if name == "early-stop" else 12)
    assert losses[-1] < losses[0]
    if name != "full":  # whose norms are left out of the estimate
        (said,) = (fact for fact in plan.preflight.facts if fact.startswith("trainable: "))
        table = 10 * 64 if name == "ptuning" else 0  # what the encoder says, kept for inference
        counted = int(said.split()[1].replace(",", "")) + table
        assert identify(plan.adapter).parameters == counted


def test_one_layer_alone_is_trained_and_cannot_be_exported(tiny):
    plan, losses = train(tiny, "layer", "model.peft.lora_tuning.layer_selection=[2]")
    assert losses[-1] < losses[0]
    with pytest.raises(UnsupportedAdapter, match="layer_selection is set"):
        export(plan.adapter, "hf-peft")


def test_mixed_precision_rounds_and_learns_alike(tiny):
    _, whole = train(tiny, "lora")
    _, mixed = train(tiny, "bf16", "trainer.precision=bf16-mixed")
    assert 0 < max(abs(one - other) for one, other in zip(whole, mixed, strict=True)) < 0.02


def test_training_goes_on_from_an_adapter(tiny):
    plan, losses = train(tiny, "lora")
    _, more = train(tiny, "more", f"model.peft.restore_from_path={plan.adapter}")
    assert abs(more[0] - losses[-1]) < 0.1 < losses[0] - more[0]


def test_two_files_in_proportion(tiny):
    files = [tiny / f"{name}.jsonl" for name in ("one", "two")]
    rows = [{"question": f"number {n}?", "reply": f"it is {n}"} for n in range(20)]
    for file in files:  # as NeMo reads them
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = json.dumps([str(file) for file in files])
    plan, losses = train(
        tiny,
        "two",
        f"model.data.train_ds.file_names={names}",
        f"model.data.validation_ds.file_names={names}",
        "model.data.train_ds.concat_sampling_probabilities=[0.3,0.7]",
        "model.data.validation_ds.names=[one,two]",
        "model.data.train_ds.label_key=reply",
        "model.data.train_ds.truncation_field=question",
        "model.data.train_ds.prompt_template='Question: {question} Answer: {reply}'",
        "model.optim.sched.warmup_steps=2",
        "trainer.val_check_interval=0.5",
        "trainer.max_steps=20",
    )
    assert losses[-1] < losses[0]
    # A part of the run, as the container's command line has it: NeMo's epoch is the whole run, more
    # than twice the rows here.
    assert told(plan, "validation") == [10, 20]


def test_an_interrupted_run_goes_on_as_an_uninterrupted_one_would(tiny, capsys):
    """Killed with SIGKILL after more than half of the steps, continued by the same command: the
    same losses bit for bit. Fewer steps are left then than lie between two validations.
    """
    more = ("trainer.max_steps=90", "trainer.val_check_interval=30", "model.optim.lr=2e-3")
    _, right = train(tiny, "whole-run", *more)
    words = overrides(tiny, "killed", *more)
    null = subprocess.DEVNULL
    process = subprocess.Popen(command(tiny, words), stdout=null, stderr=null, env=os.environ)
    plan = script.make_plan(words, data=tiny / "rows.jsonl")
    wait_for_step(plan, 62, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    script.finetune(plan, progress=False)
    printed = capsys.readouterr().out
    assert "ended without a word after step" in printed and "Continuing from" in printed
    assert told(plan, "start")[-1] == 60
    assert [losses(plan)[step] for step in range(1, 91)] == right
    assert told(plan, "validation") == [30, 60, 90]


def test_a_killed_worker_is_named_and_the_same_command_finishes(tiny):
    steps = "trainer.max_steps=60", "trainer.val_check_interval=5", NEVER_EARLY
    words = overrides(tiny, "worker", *steps)
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(tiny, words), env=os.environ, **output)
    plan = script.make_plan(words, data=tiny / "rows.jsonl")
    wait_for_step(plan, 6, lambda: process.poll() is None)
    (torchrun,) = psutil.Process(process.pid).children()
    name = "megatron_gpt_finetuning.py"
    workers = [one for one in torchrun.children() if any(w.endswith(name) for w in one.cmdline())]
    workers[0].kill()
    assert "was killed (SIGKILL)" in process.communicate(timeout=60)[1] and process.returncode == 1
    assert script.finetune(plan, progress=False).exists()
    starts = told(plan, "start")
    assert starts[0] == 0 and 5 <= starts[1] < 60


def test_a_run_killed_between_its_last_checkpoint_and_the_nemo_is_finished(tiny):
    plan, _ = train(tiny, "late")
    before = read_adapter(plan.adapter).weights
    plan.adapter.unlink()
    plan.record.write_text(json.dumps(json.loads(plan.record.read_text()) | {"status": "running"}))
    script.finetune(plan, progress=False)
    after = read_adapter(plan.adapter).weights
    for place, halves in before.items():
        assert all((a == b).all() for a, b in zip(halves, after[place], strict=True))


@pytest.mark.parametrize(
    "limit, size, said",
    [
        (resource.RLIMIT_FSIZE, 100_000, "The disk is full, or a limit on the size of files is"),
        (resource.RLIMIT_AS, 2_500_000_000, "Memory ran out: lower model.micro_batch_size"),
    ],
)
def test_out_of_disk_and_out_of_memory(tiny, limit, size, said):
    """The cause is named, nothing is left running, and the same command finishes once there is
    room."""
    words = overrides(tiny, f"limit-{limit}", *LARGE)
    done = subprocess.run(
        command(tiny, words),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(limit, (size, size)),
    )
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert running(f"limit-{limit}") == []
    plan = script.make_plan(words, data=tiny / "rows.jsonl")
    assert script.finetune(plan, progress=False).exists()


FULL_DISK = """
place=$0
mount -t tmpfs -o size=40m none "$place" || exit 90
"$@" &
for tenth in $(seq 2000); do
    grep -qs '"event": "step"' "$place"/*/workshop/events.jsonl && break
    sleep 0.1
done
head -c 100m /dev/zero > "$place/filler" 2>/dev/null
wait $! && exit 91
rm "$place/filler"
exec "$@"
"""


def test_a_full_disk_for_real(tiny):
    """A tmpfs in a mount namespace of its own fills up while training: the cause is named, and with
    room the same command finishes."""
    place = tiny / "disk"
    place.mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the test above limits files instead")
    steps = "trainer.max_steps=100", "trainer.val_check_interval=50"
    words = overrides(tiny, "tmpfs", *LARGE, f"exp_manager.exp_dir={place}", *steps)
    shell = ["unshare", "-rm", "sh", "-c", FULL_DISK, str(place), *command(tiny, words)]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No space left on device" in done.stderr and "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "The last start ended without a word" in done.stdout and "tmpfs.nemo" in done.stdout


def test_a_kernel_interrupt_stops_it_and_the_same_call_goes_on(tiny):
    """As in notebook 05: in a kernel, with the weights in bf16 (O2), whose optimizer has to be
    resumed, too."""
    from jupyter_client.manager import start_new_kernel

    words = overrides(
        tiny,
        "kernel",
        "trainer.max_steps=400",
        "trainer.precision=bf16-mixed",
        "model.megatron_amp_O2=true",
        "trainer.val_check_interval=5",
        NEVER_EARLY,
    )
    rows = tiny / "rows.jsonl"
    code = (
        "from pathlib import Path\nfrom workshop_utils.training import script\nplan = "
        f"script.make_plan({words!r}, data=Path({str(rows)!r}))\n"
        "script.finetune(plan, progress=False)"
    )
    plan = script.make_plan(words, data=rows)
    manager, client = start_new_kernel(env=dict(os.environ))
    try:
        client.execute(code)
        wait_for_step(plan, 12, manager.is_alive)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)["content"]
    finally:
        manager.shutdown_kernel(now=True)
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    assert running("kernel") == []
    record = json.loads(plan.record.read_text())
    assert record["status"] == "interrupted" and 12 < record["steps"] < 400
    script.finetune(plan, progress=False)
    starts, by_step = told(plan, "start"), losses(plan)
    assert starts[0] == 0 and starts[1] >= 10 and len(by_step) == 400
    assert by_step[400] < by_step[starts[1] + 1] < by_step[1]


@pytest.mark.parametrize("adapted", [True, False])
def test_predictions(tiny, adapted):
    plan, _ = train(tiny, "lora")
    words = [*PREDICT, *[f"model.peft.restore_from_path={plan.adapter}"] * adapted]
    file = predict([word.format(tiny) for word in words], data=write_rows(tiny / "test.jsonl", 5))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["label"] for row in rows] == [f"it is {n}" for n in range(5)]
    assert all({"input", "pred", "label"} <= row.keys() for row in rows)
    assert file.name == ("lora-test.jsonl" if adapted else "base-test.jsonl")


PREDICT = ["model.restore_from_path={}/bridged/tiny", "model.data.test_ds.tokens_to_generate=8"]


def test_a_lightning_checkpoint_answers_as_the_nemo_of_its_run(tiny):
    """The last step is the best here."""
    plan, _ = train(tiny, "lora")
    (checkpoint,) = plan.adapter.parent.glob("*-last.ckpt")
    of_lightning = [
        f"model.peft.restore_from_ckpt.checkpoint_dir={checkpoint.parent}",
        f"model.peft.restore_from_ckpt.checkpoint_name='{checkpoint.name}'",
    ]
    rows = write_rows(tiny / "test.jsonl", 5)

    def answers(*more: str) -> str:
        words = [word.format(tiny) for word in PREDICT]
        return predict([*words, *more], rows, tiny / "answers.jsonl").read_text()

    by_nemo = answers(f"model.peft.restore_from_path={plan.adapter}")
    assert by_nemo == answers(*of_lightning) != answers()
