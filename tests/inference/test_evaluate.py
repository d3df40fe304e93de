"""Metrics on answers written by hand, and whole evaluations with a tiny random model."""

import json

import pytest
from test_generate import one_thread  # noqa: F401  used by every test
from tiny_model import make_tiny_model

from workshop_utils.core.errors import DataError, NotACheckpoint
from workshop_utils.inference import evaluate, generate

TEAMS, PRIORITIES = ("billing", "login", "network"), ("low", "high")


def row(i):
    label = {"team": TEAMS[i % 3], "priority": PRIORITIES[i % 2], "reply": f"We have T-{i}."}
    return turns(f"Ticket T-{i}.", json.dumps(label))


def turns(asked, answer):
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


TRAIN, TEST = [row(i) for i in range(40)], [row(i) for i in range(100, 107)]
LABELS = [evaluate.label_of(r) for r in TEST]


def changed(label, **values):
    return json.dumps(json.loads(label) | values)


def test_perfect_and_empty_answers():
    for answers, rate in (([f" {label}\n" for label in LABELS], 1), ([""] * len(LABELS), 0)):
        scores = evaluate.score(answers, LABELS)
        rates = {scores.exact_match, scores.valid_json, *scores.fields.values()}
        assert rates == {rate}
        # A reply that differs in every row is no class.
        assert set(scores.confusion) == {"team", "priority"}


def test_each_kind_of_mistake_counts_where_it_belongs():
    answers = [
        LABELS[0],
        changed(LABELS[1], team="login"),
        changed(LABELS[2], team="moon"),
        changed(LABELS[3], priority=True),
        json.dumps({"team": json.loads(LABELS[4])["team"]}),
        LABELS[5] + " and more",
        "[1]",
    ]
    scores = evaluate.score(answers, LABELS)
    assert scores.exact_match == pytest.approx(1 / 7)
    assert scores.valid_json == pytest.approx(5 / 7)
    right_team = sum(json.loads(label)["team"] == "login" for label in LABELS[1:2]) + 3
    rates = {"team": right_team / 7, "priority": 3 / 7, "reply": 4 / 7}
    assert scores.fields == pytest.approx(rates)
    team = json.loads(LABELS[2])["team"]
    assert scores.confusion["team"][team][evaluate.OTHER] == 1
    assert sum(line[evaluate.NO_ANSWER] for line in scores.confusion["team"].values()) == 2
    assert sum(line[evaluate.NO_ANSWER] for line in scores.confusion["priority"].values()) == 3
    assert sum(sum(line.values()) for line in scores.confusion["team"].values()) == 7


def test_true_is_not_one():
    scores = evaluate.score(['{"a": true}', '{"a": 1}'], ['{"a": 1}'] * 2)
    assert scores.fields == {"a": 0.5}


def test_plain_text_has_only_exact_match():
    scores = evaluate.score(["yes", "no"], ["yes", "yes"])
    assert scores == evaluate.Scores(2, 0.5, None, {}, {})
    assert "50.0%" in evaluate.table({"base": scores})


def test_score_wants_equal_lengths():
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        evaluate.score(["a"], ["a", "b"])


def test_majority_class_is_the_commonest_value_of_each_field():
    train = [row(i) for i in (0, 6, 12, 1)]
    answers = evaluate.majority_class(train, TEST)
    assert len(answers) == len(TEST) and len(set(answers)) == 1
    answer = json.loads(answers[0])
    assert (answer["team"], answer["priority"]) == ("billing", "low")
    assert list(answer) == ["team", "priority", "reply"]
    text = [turns("?", word) for word in ("b", "a", "b")]
    assert evaluate.majority_class(text, TEST[:2]) == ["b", "b"]


def test_few_shot_prefix_states_the_schema_and_covers_the_labels():
    prefix = evaluate.few_shot_prefix(TRAIN)
    assert [turn["role"] for turn in prefix] == ["user", "assistant"] * 5
    for field in ('"team" (one of billing, login, network)', '"reply" (text)'):
        assert field in prefix[0]["content"]
    labels = [json.loads(turn["content"]) for turn in prefix[1::2]]
    assert {label["team"] for label in labels} == set(TEAMS)
    assert {label["priority"] for label in labels} == set(PRIORITIES)
    assert prefix == evaluate.few_shot_prefix(TRAIN) != evaluate.few_shot_prefix(TRAIN, seed=1)
    assert TRAIN[0] == row(0), "the rows given stay as they are"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    model = make_tiny_model(folder / "model", initializer_range=0.6)
    for name, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(generate.load(model)[0], lora).save_pretrained(folder / "adapter")
    return folder


def run(setting, out, **options):
    options = {"max_new_tokens": 4, "progress": False, "adapter": setting / "adapter"} | options
    data = {"test_file": setting / "test.jsonl", "train_file": setting / "train.jsonl"}
    return evaluate.evaluate(setting / "model", out_dir=out, **data | options)


@pytest.fixture
def asked(monkeypatch):
    """The number of prefix turns of each call that reaches the model."""
    calls, real = [], generate.generate

    def noted(*args, **options):
        calls.append(len(options["prefix"] or []))
        return real(*args, **options)

    monkeypatch.setattr(generate, "generate", noted)
    return calls


def test_evaluation_is_kept_and_used_again(setting, tmp_path, asked):
    first = run(setting, tmp_path)
    assert list(first.scores) == list(evaluate.VARIANTS) and asked == [0, 10, 0]
    predictions = first.predictions("adapter")
    assert [entry["label"] for entry in predictions] == LABELS
    assert predictions[0]["input"] == "Ticket T-100."
    assert predictions != first.predictions("base")
    content = (tmp_path / "scores.json").read_text()
    assert run(setting, tmp_path) == first and len(asked) == 3
    assert (tmp_path / "scores.json").read_text() == content


def test_goes_on_after_an_interruption(setting, tmp_path, asked, monkeypatch):
    def broken(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "majority_class", broken)
        with pytest.raises(KeyboardInterrupt):
            run(setting, tmp_path)
    assert asked == [0, 10]
    assert len(run(setting, tmp_path).scores) == 4 and asked == [0, 10, 0]


def test_only_what_changed_runs_again(setting, tmp_path, asked):
    run(setting, tmp_path)
    asked.clear()
    (tmp_path / "base" / "predictions.jsonl").write_text("edited")
    run(setting, tmp_path)
    assert asked == [0]
    run(setting, tmp_path, max_new_tokens=5)
    assert len(asked) == 4


def test_damaged_scores_are_made_again(setting, tmp_path, asked):
    run(setting, tmp_path, variants=["base"])
    (tmp_path / "scores.json").write_text('{"variants": ')
    assert list(run(setting, tmp_path, variants=["base"]).scores) == ["base"] and len(asked) == 2


def test_without_an_adapter_and_with_a_limit(setting, tmp_path):
    result = run(setting, tmp_path, adapter=None, limit=3, variants=["majority-class", "adapter"])
    assert list(result.scores) == ["majority-class"] and result.scores["majority-class"].rows == 3


def test_what_is_missing_is_named(setting, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        run(setting, tmp_path, adapter=None, test_file=tmp_path / "gone.jsonl")
    test = setting / "test.jsonl"
    with pytest.raises(NotACheckpoint, match="config.json"):
        evaluate.evaluate(tmp_path, None, test, test, tmp_path)
