"""Megatron-Core's engines against each other and against transformers; the predictions file through
interruptions and changes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import engine_trials
import pytest

from workshop_utils.core import errors
from workshop_utils.inference import nemo2_engine
from workshop_utils.inference.sampling import Sampling
from workshop_utils.training.recipe import options, plan, predict
from workshop_utils.training.recipe.presets import preset

ROWS = [(f"number {i}?", f"it is {i}") for i in range(5)]
GREEDY = Sampling(temperature=0, max_new_tokens=8)
LIMITS = nemo2_engine.EngineLimits(buffer_size_gb=0.05, inference_max_seq_length=64)


@pytest.fixture
def checkpoint(tmp_path):
    """A directory laid out as a NeMo 2.0 checkpoint; what would load it is replaced."""
    for part in ("weights/metadata.json", "weights/.metadata", "context/model.yaml"):
        file = tmp_path / "run" / "nemo_logs" / "checkpoints" / "m--val_loss=0.5-step=9" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return file.parents[1]


@pytest.fixture
def nemo(monkeypatch):
    """Stands in for the process that answers: upper case; stops with an error after ``nemo.rows``
    rows. Verification has its own tests."""

    class Nemo:
        rows = 100

        def __init__(self):
            self.started = []

        def __call__(self, module, folder, job, checkpoint):
            self.started.append([row["row"] for row in job["rows"]])
            with Path(job["answers"]).open("a") as stream:
                for row in list(reversed(job["rows"]))[: self.rows]:  # not in the order of the rows
                    refused = "too long." if "3" in row["prompt"] else None
                    text = "" if refused else f" {row['prompt'].upper()}"
                    answer = {"request": row["row"], "text": text, "refused": refused}
                    stream.write(json.dumps(answer | {"tokens": [1]}) + "\n")
                if self.rows < len(job["rows"]):
                    stream.write('{"request": 0, "te')
                    raise errors.GenerationFailed("killed")
            (folder / "speed.json").write_text('{"tokens": 10, "seconds": 2.0}')

    stand_in = Nemo()
    monkeypatch.setattr(predict, "run_job", stand_in)
    monkeypatch.setattr(predict, "require_sound", lambda *args: None)
    return stand_in


def answered(checkpoint, file, rows=ROWS, sampling=GREEDY):
    return predict.predict(checkpoint, rows, file, sampling, LIMITS, progress=False)


def test_the_predictions_file(checkpoint, nemo, tmp_path):
    found = answered(checkpoint, tmp_path / "out" / "qwen2.5--val_loss=0.5-step=9.jsonl")
    lines = [json.loads(line) for line in found.file.read_text().splitlines()]
    assert lines[0] == {"input": "number 0?", "label": "it is 0", "prediction": "NUMBER 0?"}
    assert [line["input"] for line in lines] == [prompt for prompt, _ in ROWS]
    row = {"input": "number 3?", "label": "it is 3", "prediction": ""}
    assert lines[3] == row | {"refused": "too long."} and found.refused == {3: "too long."}
    assert (found.predictions[4], found.speed) == ("NUMBER 4?", ", 5 tokens/s")
    assert not list(found.file.parent.glob("*.partial"))


def test_an_interrupted_run_answers_only_what_is_missing(checkpoint, nemo, tmp_path):
    file, nemo.rows = tmp_path / "p.jsonl", 2
    with pytest.raises(errors.GenerationFailed):
        answered(checkpoint, file)
    assert not file.exists()
    nemo.rows = 100
    found = answered(checkpoint, file)
    # A line that was cut in half is answered again.
    assert nemo.started == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert found.predictions == ("NUMBER 0?", "NUMBER 1?", "NUMBER 2?", "", "NUMBER 4?")
    assert found.seconds is None


def test_a_finished_file_is_used_again_until_something_changes(checkpoint, nemo, tmp_path):
    file = tmp_path / "p.jsonl"
    first = answered(checkpoint, file)
    assert answered(checkpoint, file).predictions == first.predictions and len(nemo.started) == 1
    answered(checkpoint, file, sampling=replace(GREEDY, max_new_tokens=9))
    answered(checkpoint, file, rows=ROWS[:4])
    (checkpoint / "weights" / "metadata.json").write_text("{}")
    answered(checkpoint, file, rows=ROWS[:4])
    file.write_text(file.read_text().replace("NUMBER", "number"))
    # A file that was edited is not trusted.
    assert answered(checkpoint, file, rows=ROWS[:4]).predictions[0] == "NUMBER 0?"
    assert len(nemo.started) == 5


def test_what_is_left_of_another_run_is_not_taken(checkpoint, nemo, tmp_path):
    file, nemo.rows = tmp_path / "p.jsonl", 2
    with pytest.raises(errors.GenerationFailed):
        answered(checkpoint, file)
    nemo.rows = 100
    answered(checkpoint, file, rows=list(reversed(ROWS)))
    assert nemo.started[-1] == [0, 1, 2, 3, 4]


def resolved(output_dir, **changes):
    given = {
        "hf_model_id": str(output_dir),
        "output_dir": str(output_dir),
        "hfdc_dataset_name": "x",
    }
    given |= {"num_tokens_to_generate": 8, "inference_max_seq_length": 64, "buffer_size_gb": 0.05}
    return plan.resolve(options.from_mapping(preset("cpu") | given | changes))


def test_the_report_compares_base_and_tuned(checkpoint, nemo, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"input": prompt, "output": prompt.upper()} for prompt, _ in ROWS]
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tmp_path / "base"
    (checkpoint.rename(base), (base / "weights" / "metadata.json").write_text("{}"))
    tuned = checkpoint.parent / "m--val_loss=0.5-step=9"
    tuned.symlink_to(base)
    places = {"nemo_ckpt_dir": str(base), "data_dir": str(tmp_path / "data")}
    settings = resolved(tmp_path / "run", max_samples=4, **places)
    report = predict.test(settings, progress=False)
    assert (report.checkpoint, report.rows, report.metrics["exact match"].mean) == (tuned, 4, 0.75)
    assert report.comparison.difference["exact match"].mean == 0
    assert "row 4 refused: too long." in str(report) and "tuned - base" in str(report)
    alone = resolved(tmp_path / "run", max_samples=4, compare_base=False, **places)
    alone = predict.test(alone, progress=False)
    assert alone.comparison is None and alone.base is None and "0.750 [" in str(alone)
    base.rename(tmp_path / "away")
    with pytest.raises(errors.CheckpointError):
        predict.test(settings, progress=False)


def test_what_is_refused_before_nemo_starts(checkpoint, nemo, tmp_path):
    with pytest.raises(
        errors.WorkshopError, match="inference_engine is 'vllm'; it is one of dynamic, static"
    ):
        predict.predict(checkpoint, ROWS, tmp_path / "p.jsonl", GREEDY, LIMITS, "vllm")
    with pytest.raises(
        errors.WorkshopError, match=r"top_k is 5 and top_p 0.95: Megatron-Core takes one"
    ):
        drawn = Sampling(top_k=5, top_p=0.95)
        predict.predict(checkpoint, ROWS, tmp_path / "p.jsonl", drawn, LIMITS)
    with pytest.raises(errors.DataError, match="does not exist"):
        predict.read_test_rows(tmp_path / "test.jsonl")
    with pytest.raises(errors.CheckpointError, match="compare_base off"):
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"input": "a", "output": "b"}\n')
        predict.test(resolved(tmp_path / "run", test_path=str(rows)), progress=False)
    (checkpoint / "weights" / "adapter_metadata.json").write_text(
        '{"model_ckpt_path": "/nowhere/base"}'
    )
    with pytest.raises(
        errors.DamagedCheckpoint,
        match="model_ckpt_path is '/nowhere/base', which holds no NeMo 2.0 checkpoint",
    ):
        answered(checkpoint, tmp_path / "p.jsonl")
    assert not nemo.started


def test_sampling_and_what_is_too_long():
    assert Sampling(temperature=0).greedy and Sampling(top_k=1).greedy and not Sampling().greedy
    long = "the prompt has 60 tokens and 8 are to be generated (num_tokens_to_generate), together "
    long += "more than 64 (inference_max_seq_length)."
    for tokens, reason in ((60, long), (56, None), (0, "the prompt is empty.")):
        assert nemo2_engine.too_long(tokens, GREEDY, LIMITS) == reason
    nemo2_engine.check(Sampling(top_k=5, max_new_tokens=8), LIMITS)  # top_p 1 draws among all


@pytest.fixture(scope="module")
def trials(bridged_tiny, tmp_path_factory):
    result = tmp_path_factory.mktemp("trials") / "result.json"
    command = [sys.executable, engine_trials.__file__, bridged_tiny / "nemo2" / "tiny", result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.slow
def test_static_and_dynamic_agree_token_for_token(trials):
    assert trials["static"] == trials["dynamic"] and any(map(len, trials["static"].values()))


@pytest.mark.slow
def test_both_agree_with_transformers(trials, bridged_tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bridged_tiny / "hf" / "tiny")
    model = AutoModelForCausalLM.from_pretrained(bridged_tiny / "hf" / "tiny")
    for request, prompt in enumerate(engine_trials.prompts()):
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert trials["dynamic"][str(request)] == new


@pytest.mark.slow
def test_requests_join_and_leave_while_others_run(trials):
    found = trials["joining"]
    assert {request: trials["static"][request] for request in found["tokens"]} == found["tokens"]
    assert len(found["tokens"]) == len(engine_trials.prompts())
    # More join than were there at the start, never more than there are places.
    assert found["running"][0] < max(found["running"]) == 4


@pytest.mark.slow
def test_what_never_fits_is_refused_and_the_others_finish(trials):
    reason = (
        "the prompt has 120 tokens and 20 are to be generated (num_tokens_to_generate), together "
        "more than 96 (inference_max_seq_length)."
    )
    assert set(trials["joining"]["refused"].values()) == {reason}
    assert set(trials["refused"]) == {"14", "15"}
    assert trials["refused"]["15"] == "the prompt is empty."
    step = "the prompt has 70 tokens, and a step takes 64 (max_tokens)."
    assert trials["more than a step"] == step
    assert trials["small buffer"].endswith("Raise it to 0.02, or lower inference_max_seq_length.")


@pytest.mark.slow
def test_sampling_is_seeded(trials):
    first, second = trials["drawn"]
    assert first == second != {request: trials["static"][request] for request in first}


@pytest.mark.slow
def test_a_trained_adapter_answers_otherwise_than_its_base(nemo2_trained, bridged_tiny, tmp_path):
    given = {
        "nemo_logs_dir": str(nemo2_trained / "lora"),
        "data_dir": str(nemo2_trained / "data"),
        "max_samples": 3,
        "nemo_ckpt_dir": str(bridged_tiny / "nemo2" / "tiny"),
    }
    report = predict.test(resolved(tmp_path, **given), progress=False)
    assert report.checkpoint.name.startswith("step=3-val_loss=") and report.rows == 3
    assert report.tuned.predictions != report.base.predictions
    assert report.tuned.file == tmp_path / "predictions" / f"{report.checkpoint.name}.jsonl"
