"""The test phase: the test rows answered by the base and by a checkpoint of the run, and what the
training changed.

Each set of answers is a file ``{output_dir}/predictions/{checkpoint}.jsonl``, one ``{"input",
"label", "prediction"}`` a line. It is there when it is complete; an interrupted one goes on where
it stopped, a finished one of the same checkpoint, rows and options is used again. With a
temperature above 0 the answers depend on which requests run side by side, so that only greedy ones
come out the same.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import chat_data, paths
from workshop_utils.core.errors import NotACheckpoint, WorkshopError
from workshop_utils.core.hashing import sha256, sha256_of_text
from workshop_utils.core.progress import progress_bar
from workshop_utils.inference import metrics, nemo2_engine
from workshop_utils.inference.sampling import Sampling
from workshop_utils.runtime.processes import run_job
from workshop_utils.training.recipe import choose_checkpoint

if TYPE_CHECKING:
    from workshop_utils.training.recipe.plan import Resolved

BASE = "base"


@dataclass(frozen=True)
class Predictions:
    """One file of answers. ``refused`` rows have an empty prediction and a sentence in the field
    ``refused``.

    ``tokens`` new tokens took ``seconds``, loading apart; both None where the file was used again
    or put together from two starts.
    """

    file: Path
    checkpoint: Path
    predictions: tuple[str, ...]
    refused: dict[int, str]
    tokens: int | None = None
    seconds: float | None = None

    @property
    def speed(self) -> str:
        """Tokens a second in words; nothing where that is not known."""
        known = self.tokens and self.seconds
        return f", {self.tokens / self.seconds:.0f} tokens/s" if known else ""


@dataclass(frozen=True)
class TestReport:
    """What the test phase found. ``base`` and ``comparison`` are None when only the checkpoint was
    asked (``compare_base``)."""

    __test__ = False  # pytest takes the name for a test's

    checkpoint: Path
    rows: int
    tuned: Predictions
    base: Predictions | None
    metrics: dict[str, metrics.Interval]
    comparison: metrics.Comparison | None

    def __str__(self) -> str:
        lines = [f"checkpoint: {paths.shown(self.checkpoint)}"]
        for name, answers in ((BASE, self.base), ("tuned", self.tuned)):
            if answers:
                lines.append(f"{name}: {paths.shown(answers.file)}{answers.speed}")
                lines += [f"  row {row + 1} refused: {why}" for row, why in answers.refused.items()]
        if self.comparison:
            return "\n".join([*lines, "", str(self.comparison)])
        width = max(map(len, self.metrics))
        means = [f"{name.ljust(width)}  {value}" for name, value in self.metrics.items()]
        return "\n".join([*lines, "", *means, f"{self.rows} rows"])


def test(
    resolved: Resolved, checkpoint: Path | str | None = None, progress: bool = True
) -> TestReport:
    """Answer up to ``max_samples`` test rows with ``checkpoint`` (best, last, or a directory; by
    default the option) and, with ``compare_base``, with the base; measure both.

    Raises:
        CheckpointError: there is no such checkpoint, or it or its base is unsafe or damaged.
        DataError: the test file is missing or has an unusable row.
        GenerationFailed: NeMo failed; with what it wrote last.
    """
    options = resolved.options
    chosen = choose_checkpoint.choose(resolved.run_dir, str(checkpoint or options.checkpoint))
    rows = read_test_rows(resolved.test_path, options.max_samples)
    own = nemo2_engine.base_of(chosen, resolved.nemo_ckpt_dir)
    base = (own or resolved.nemo_ckpt_dir) if options.compare_base else None
    if base and not nemo2.looks_like(base):
        raise NotACheckpoint(
            f"{paths.shown(base)} (nemo_ckpt_dir) is no NeMo 2.0 checkpoint, and the tuned model "
            "is to be compared with it. Import the base, or switch compare_base off."
        )

    folder = resolved.output_dir / "predictions"

    def answered(model: Path, name: str, its_base: Path | None = None) -> Predictions:
        file, engine = folder / f"{name}.jsonl", (*resolved.engine(), options.inference_engine)
        where = (its_base, resolved.device)
        return predict(model, rows, file, *engine, options.trust, progress, *where)

    before = answered(base, BASE) if base else None
    after = answered(chosen, chosen.name, own)
    labels, model = [label for _, label in rows], options.bertscore_model
    if before:
        comparison = metrics.compare(before.predictions, after.predictions, labels, model)
        return TestReport(chosen, len(rows), after, before, comparison.tuned, comparison)
    means = metrics.means(metrics.measure(after.predictions, labels, model))
    return TestReport(chosen, len(rows), after, None, means, None)


def read_test_rows(file: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Prompt and label of the first rows of ``file``: ``{"input", "output"}``, as the data phase
    writes them. Raises DataError for a missing file or an unusable row."""
    turns = [row["messages"] for row in chat_data.read_rows(file)[:limit]]
    return [(chat_data.prompt_turns(row)[-1]["content"], row[-1]["content"]) for row in turns]


def predict(
    checkpoint: Path,
    rows: Sequence[tuple[str, str]],
    file: Path,
    sampling: Sampling,
    limits: nemo2_engine.EngineLimits,
    engine: str = "dynamic",
    trust: bool = False,
    progress: bool = True,
    base: Path | None = None,
    device: str | None = None,
) -> Predictions:
    """Answer ``rows`` (prompt, label) with a NeMo 2.0 checkpoint, in a process of its own, and
    write ``file``. ``base`` takes the place of the one that an adapter names.

    Raises: as :func:`test`, and WorkshopError for an unknown engine or an impossible sampling.
    """
    if engine not in nemo2_engine.ENGINES:
        raise WorkshopError(
            f"inference_engine is {engine!r}; it is one of {', '.join(nemo2_engine.ENGINES)}."
        )
    nemo2_engine.check(sampling, limits)
    require_sound(checkpoint, trust, (Kind.NEMO2, Kind.NEMO2_ADAPTER))
    base = base or nemo2_engine.base_of(checkpoint)
    weights = [nemo2.contents_of(path) for path in (checkpoint, base) if path]
    made_from = [weights, rows, asdict(sampling), asdict(limits), engine]
    mark = sha256_of_text(json.dumps(made_from))
    if done := _finished(file, mark):
        return Predictions(file, checkpoint, *done)
    partial, speed = file.with_name(f".{file.name}.partial"), {}
    known = _resume(partial, mark)
    if left := [row for row in range(len(rows)) if row not in known]:
        job = {"checkpoint": str(checkpoint.resolve()), "base": base and str(base), "trust": trust}
        job |= {"engine": engine, "sampling": asdict(sampling), "limits": asdict(limits)}
        job |= {"device": device, "answers": str(partial.resolve())}
        # NeMo's data module takes the spaces at both ends of a prompt away, too: the model has
        # never seen them.
        job["rows"] = [{"row": row, "prompt": rows[row][0].strip(" ")} for row in left]
        with _bar(partial, len(rows), checkpoint.name, progress):
            speed = _answer(job, checkpoint)
        speed = speed if len(left) == len(rows) else {}
    _write(file, mark, rows, _resume(partial, mark))
    partial.unlink()
    return Predictions(file, checkpoint, *_finished(file, mark), **speed)


def _answer(job: dict, checkpoint: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="workshop-recipe-") as folder:
        run_job(nemo2_engine.__name__, Path(folder), job, checkpoint)
        return json.loads((Path(folder) / "speed.json").read_text())


def _write(
    file: Path, mark: str, rows: Sequence[tuple[str, str]], answers: dict[int, dict]
) -> None:
    """The predictions in the order of the rows, and beside them what they belong to, last: without
    it they are not used again."""
    lines = []
    for row, (prompt, label) in enumerate(rows):
        text, refused = answers[row]["text"], answers[row]["refused"]
        line = {"input": prompt, "label": label, "prediction": text.strip()}
        line |= {"refused": refused} if refused else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    paths.write_text(file, "".join(lines))
    paths.write_text(_record(file), json.dumps({"made_from": mark, "sha256": sha256(file)}) + "\n")


def _finished(file: Path, mark: str) -> tuple[tuple[str, ...], dict[int, str]] | None:
    """Predictions and refusals in ``file`` if it was made from the same and has not been changed
    since."""
    try:
        record = json.loads(_record(file).read_text("utf-8"))
        if record != {"made_from": mark, "sha256": sha256(file)}:
            return None
    except (FileNotFoundError, ValueError):
        return None
    lines = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    refused = {row: line["refused"] for row, line in enumerate(lines) if "refused" in line}
    return tuple(line["prediction"] for line in lines), refused


def _resume(partial: Path, mark: str) -> dict[int, dict]:
    """Row -> answer of an interrupted start of the same job; anything else that stands there is
    replaced by a new beginning."""
    try:
        head, *lines = partial.read_text("utf-8").split("\n")
    except FileNotFoundError:
        head, lines = "", []
    if head != mark:
        paths.write_text(partial, f"{mark}\n")
        return {}
    whole, torn = lines[:-1], lines[-1]
    if torn:  # the process ended in the middle of a line
        paths.write_text(partial, "".join(f"{line}\n" for line in [head, *whole]))
    return {answer["request"]: answer for answer in map(json.loads, whole)}


def _record(file: Path) -> Path:
    return file.with_name(f".{file.name}.made_from")


@contextlib.contextmanager
def _bar(partial: Path, total: int, name: str, progress: bool) -> Iterator[None]:
    """A progress bar that follows the lines of ``partial``, which another process appends."""
    if not progress:
        yield
        return
    stop, form = threading.Event(), {"unit": "row", "dynamic_ncols": True}
    with progress_bar(total=total, desc=f"{name}: loading NeMo", **form) as bar:

        def follow() -> None:
            ended = False
            while not ended:
                ended = stop.wait(0.5)
                seen = partial.read_bytes().count(b"\n") - 1
                if seen > bar.n:
                    bar.set_description(name, refresh=False)
                    bar.update(seen - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
