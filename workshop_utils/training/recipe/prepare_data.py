"""Data set -> ``training.jsonl``, ``validation.jsonl`` and ``test.jsonl`` with ``input`` and
``output``, which NeMo's data module reads.

**What stands between prompt and answer.** NeMo joins the two by a template of its own, strips
spaces at both ends of each, and adds the stop token. Where the prompt was rendered by a chat
template or ends with white space such as a new line, nothing is put between (as
:data:`NOTHING_BETWEEN` says); else one space, which is NeMo's default. The marker file keeps which,
and the data module follows it.

**Leaks.** An input that stands in training must not be tested. When one split is divided, rows
whose input occurs more than once (case, white space and the form of characters aside) all go to
training: sizes stay exact and no row is lost. Splits that the data set brings along are kept, but
validation and test rows whose input stands in an earlier split are dropped. Both are counted in the
statistics.

**Cache.** The marker :data:`MARKER` holds everything that shaped the rows (:func:`_key`), the
statistics, and each file's hash. The rows are used again only while all of it is the same.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from workshop_utils.core import paths
from workshop_utils.core.chat_template import read_tokenizer
from workshop_utils.core.errors import DataError, OutputExists
from workshop_utils.core.hashing import sha256
from workshop_utils.training import data_check
from workshop_utils.training.recipe import dataset_sources, splits, waiting
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.row_conversion import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

MARKER = ".data_ready"
NOTHING_BETWEEN, ONE_SPACE = "{input}{output}", "{input} {output}"
TIMEOUT = 3600.0  # seconds
_FORMAT = 3  # of what is written; another one invalidates caches
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ROWS_A_PROCESS = 2000  # starting a process takes as long as preparing about so many rows
_REASONS = {
    "converter": "the converter returned None",
    "null": "a column is null",
    "empty": "the answer is empty",
    "no prompt": "the prompt is empty",
}


@dataclass(frozen=True)
class SplitStatistics:
    """Rows of a split, and tokens a row (prompt, answer and stop token): mean, longest;
    ``truncated`` rows are longer than allowed.

    ``answers_cut`` of them lose tokens of the answer, too. Token counts come from ``sampled`` rows,
    and are None without a tokenizer.
    """

    rows: int
    sampled: int | None = None
    mean_tokens: float | None = None
    max_tokens: int | None = None
    truncated: int | None = None
    answers_cut: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Rows ready for training: the ``directory`` with the three files, and what is known about
    them.

    ``source_rows`` were read; ``left_out`` says how many were not used, by reason; ``repeated``
    have an input that occurs more than once; ``leaks`` were dropped from the data set's own
    validation and test splits. ``prompt_template`` is NeMo's; ``shape`` says which columns are
    what, where it is not the workshop's own.
    """

    directory: Path
    statistics: dict[str, SplitStatistics]
    source_rows: int
    left_out: dict[str, int]
    repeated: int
    leaks: dict[str, int]
    prompt_template: str
    max_seq_length: int
    revision: str
    shape: str = ""
    reused: bool = False

    def __str__(self) -> str:
        earlier = " earlier; nothing has changed since" if self.reused else ""
        lines = [f"{paths.shown(self.directory)}: {self.source_rows:,} rows read{earlier}"]
        if self.shape:
            lines.append(f"  columns: {self.shape}")
        for name, split in self.statistics.items():
            lines.append(f"  {name}: {split.rows:,} rows")
            if split.max_tokens:
                longest = f"longest {split.max_tokens:,}"
                lines[-1] += f"; {split.mean_tokens:.0f} tokens a row, {longest}"
            if split.sampled and split.sampled < split.rows:
                lines[-1] += f" (of a sample of {split.sampled:,})"
            if split.truncated:
                cut = f", {split.answers_cut:,} of them in the answer" if split.answers_cut else ""
                lines.append(
                    f"    {split.truncated:,} rows are longer than max_seq_length "
                    f"{self.max_seq_length:,} and will be cut{cut}"
                )
        for reason, count in self.left_out.items():
            if count:
                lines.append(f"  left out: {count:,} rows because {_REASONS[reason]}")
        if self.repeated:
            training = "" if self.leaks else "; all of them are in training"
            lines.append(f"  {self.repeated:,} rows share their input with another row{training}")
        for name, count in self.leaks.items():
            if count:
                lines.append(
                    f"  dropped: {count:,} {name} rows whose input stands in an earlier split"
                )
        return "\n".join(lines)


def prepare(
    config: HFDatasetConfig,
    data_dir: Path,
    tokenizer_dir: Path | None = None,
    max_seq_length: int = 2048,
    progress: bool = True,
    timeout: float = TIMEOUT,
) -> Prepared:
    """Write the three files of ``config`` to ``data_dir``, or take them from there when nothing
    that shapes them has changed.

    ``tokenizer_dir`` is a directory with a ``tokenizer.json``, or the NeMo 2.0 checkpoint that
    holds one; rows with ``messages`` need its chat template, and without it no tokens are counted.
    ``max_seq_length`` is in tokens. Where two processes ask at once, one waits for the other, up to
    ``timeout`` seconds.

    Raises:
        DataError: of data, templates or converter; nothing of an earlier preparation has changed.
        FetchError: the Hub cannot be reached.
        OutputExists: ``data_dir`` holds other things; nothing was replaced.
        WaitedTooLong: another process is still at it.
    """
    data_dir, tokenizer_dir = Path(data_dir), directory_of_tokenizer(tokenizer_dir)
    with waiting.alone_on(data_dir, f"preparing {config.dataset_name}", timeout):
        _require_ours(data_dir)
        source = dataset_sources.find(config)
        key = _key(config, source.revision, tokenizer_dir, max_seq_length)
        marker = _read_marker(data_dir)
        if marker and marker["key"] == key:
            with contextlib.suppress(DataError):  # a file was changed or deleted
                return load_prepared(data_dir)
        waiting.remove_leftovers(data_dir)
        with (
            _progress_bars(progress),
            paths.new_directory(data_dir) as part,
            tempfile.TemporaryDirectory(prefix="workshop-data-") as scratch,
        ):
            marker = _write(config, source, part, Path(scratch), tokenizer_dir, max_seq_length)
            (part / MARKER).write_text(json.dumps({"key": key} | marker, indent=1), "utf-8")
        return _prepared(data_dir, marker, reused=False)


def load_prepared(data_dir: Path) -> Prepared:
    """What :func:`prepare` made in ``data_dir``. Raises :class:`DataError` when it made nothing
    there, or a file has changed since."""
    data_dir = Path(data_dir)
    if (marker := _read_marker(data_dir)) is None:
        raise DataError(
            f"{paths.shown(data_dir)} holds no prepared data ({MARKER} is missing). Run "
            "`workshop recipe data` first."
        )
    for name, digest in marker["files"].items():
        file = data_dir / name
        if not file.is_file() or sha256(file) != digest:
            raise DataError(
                f"{paths.shown(file)} is missing or has changed since it was prepared. Run "
                "`workshop recipe data` again; it is made anew."
            )
    return _prepared(data_dir, marker, reused=True)


def _prepared(data_dir: Path, marker: dict[str, Any], reused: bool) -> Prepared:
    about = marker["prepared"]
    statistics = {name: SplitStatistics(**split) for name, split in about["statistics"].items()}
    return Prepared(directory=data_dir, reused=reused, **about | {"statistics": statistics})


def require_whole_batch(prepared: Prepared, global_batch_size: int) -> None:
    """Raise :class:`DataError` when the validation rows are fewer than ``global_batch_size``.

    Megatron's sampler drops an incomplete batch: NeMo would train without validation and, since
    checkpoints wait for ``val_loss``, save none.
    """
    rows = prepared.statistics["validation"].rows
    if rows < global_batch_size:
        raise DataError(
            f"{paths.shown(prepared.directory / 'validation.jsonl')} has {rows} rows, fewer than "
            f"the global batch of {global_batch_size}: NeMo would neither validate nor save a "
            "checkpoint. Lower train_split_ratio or the batch (micro_batch_size, "
            "accumulate_grad_batches)."
        )


def _read_marker(data_dir: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((data_dir / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(marker, dict) and {"key", "files", "prepared"} <= marker.keys()
    return marker if whole else None


def _require_ours(data_dir: Path) -> None:
    """The directory will be replaced: it has to be ours, or empty."""
    ours = not data_dir.exists() or (data_dir / MARKER).is_file()
    if not ours and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise OutputExists(
            f"{paths.shown(data_dir)} holds something that was not prepared by this command. "
            "Nothing was replaced. Set data_dir to another directory."
        )


def _key(
    config: HFDatasetConfig, revision: str, tokenizer_dir: Path | None, max_seq_length: int
) -> dict[str, Any]:
    """Everything that shapes the rows and their statistics, as it looks after a round trip through
    JSON."""
    files = [tokenizer_dir / name for name in _TOKENIZER_FILES] if tokenizer_dir else []
    tokenizer = {file.name: sha256(file) for file in files if file.is_file()}
    source = {"format": _FORMAT, "revision": revision}
    texts = {"tokenizer": tokenizer, "max_seq_length": max_seq_length}
    return json.loads(json.dumps(config.describe() | source | texts, default=str))


def directory_of_tokenizer(given: Path | None) -> Path | None:
    """The folder of ``tokenizer.json`` at ``given``; DataError where there is none."""
    if given is None:
        return None
    inside = Path(given) / "context" / "nemo_tokenizer"
    folder = inside if inside.is_dir() else Path(given)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{paths.shown(folder)} has no tokenizer.json: give the directory of a tokenizer or "
            "of a NeMo 2.0 checkpoint."
        )
    return folder


def _write(
    config: HFDatasetConfig,
    source: dataset_sources.Source,
    part: Path,
    scratch: Path,
    tokenizer_dir: Path | None,
    max_seq_length: int,
) -> dict[str, Any]:
    """The three files, in ``part``; returns what the marker holds beside the key."""
    from datasets import concatenate_datasets

    loaded = source.load(scratch)
    convert = config.conversion(loaded[0].column_names, tokenizer_dir)
    converted = [
        _convert(rows, convert, config.num_proc, scratch / f"{number}.arrow")
        for number, rows in enumerate(loaded)
    ]
    reasons = [reason for rows in converted for reason in rows["reason"]]
    kept = [
        rows.select([row for row, reason in enumerate(rows["reason"]) if not reason])
        for rows in converted
    ]
    left_out = {reason: reasons.count(reason) for reason in _REASONS}
    if not any(map(len, kept)):
        counts = [
            f"{count:,} because {_REASONS[name]}" for name, count in left_out.items() if count
        ]
        raise DataError(f"{config.dataset_name}: no row is left: {'; '.join(counts)}.")
    if config.own_splits():
        division = splits.keep([rows["key"] for rows in kept])
    else:
        ratios = (config.train_split_ratio, config.val_test_split_ratio)
        division = splits.divide(kept[0]["key"], *ratios, config.seed)
    rows, statistics, files = concatenate_datasets(kept), {}, {}
    between = _between(set(rows["ends"]), config.dataset_name)
    for name, positions in division.rows.items():
        file = part / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            stream.writelines(_lines(rows.select(positions)))
        split = _statistics(file, len(positions), between, tokenizer_dir, max_seq_length)
        statistics[name], files[file.name] = asdict(split), sha256(file)
    about = {"statistics": statistics, "source_rows": sum(map(len, loaded)), "left_out": left_out}
    about |= {"repeated": division.repeated, "leaks": division.dropped, "revision": source.revision}
    about |= {"prompt_template": between, "max_seq_length": max_seq_length}
    if convert.shape and not convert.shape.is_plain:
        about["shape"] = str(convert.shape)
    return {"files": files, "prepared": about}


def _between(ends: set[str], name: str) -> str:
    """NeMo's prompt template for prompts that end so: a space is put between only where nothing
    else separates prompt and answer."""
    if "chat" in ends and len(ends) > 1:
        raise DataError(
            f"{name}: the custom_converter returned conversations for some rows and input and "
            "output for others; return one of them for all."
        )
    return NOTHING_BETWEEN if ends in ({"chat"}, {"new line"}) else ONE_SPACE


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """The bars of the ``datasets`` library off unless ``shown``, and afterwards as they were."""
    import datasets

    off = datasets.is_progress_bar_enabled() and not shown
    if off:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if off:
            datasets.enable_progress_bars()


def _convert(rows: "Dataset", convert: Callable, num_proc: int, file: Path) -> "Dataset":
    """Every row of ``rows`` converted, in as many processes as are worth starting."""
    import datasets

    processes = min(num_proc, len(rows) // _ROWS_A_PROCESS)
    return rows.map(
        convert,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=processes if processes > 1 else None,
        desc="preparing rows",
        features=datasets.Features(dict.fromkeys(COLUMNS, datasets.Value("string"))),
        load_from_cache_file=False,
        cache_file_name=str(file),
        new_fingerprint="workshop",
    )


def _lines(rows: "Dataset") -> Iterator[str]:
    # In batches: one row at a time takes ten times as long.
    for batch in rows.iter(batch_size=1000):
        for prompt, answer in zip(batch["input"], batch["output"], strict=True):
            yield json.dumps({"input": prompt, "output": answer}, ensure_ascii=False) + "\n"


def _statistics(
    file: Path, rows: int, prompt_template: str, tokenizer_dir: Path | None, max_seq_length: int
) -> SplitStatistics:
    if tokenizer_dir is None:
        return SplitStatistics(rows)
    tokenizer = read_tokenizer(tokenizer_dir / "tokenizer.json")

    def count(texts: list[str]) -> list[int]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(tokens.ids) for tokens in encoded]

    rule = data_check.Template(prompt_template, "output", ("input",), max_seq_length, extra=1)
    counted = data_check.count(file, rule, SimpleNamespace(count=count))
    lengths = (counted.mean_tokens, counted.longest, counted.truncated, counted.answers_cut)
    return SplitStatistics(rows, counted.sampled, *lengths)
