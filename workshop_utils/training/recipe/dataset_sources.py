"""Data sets from the Hugging Face Hub and from files, by the ``datasets`` library; with what
identifies their content."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.core import data_files, paths, row_shapes
from workshop_utils.core.data_files import FORMATS, ending
from workshop_utils.core.errors import DataError, FetchError
from workshop_utils.core.hashing import sha256, sha256_of_text
from workshop_utils.core.nearest import did_you_mean, nearest
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """A data set that is known and not loaded yet: ``revision`` is the Hub's commit, or the hash of
    the files' content."""

    config: HFDatasetConfig
    place: Path | None
    revision: str
    builder: Any = None

    def load(self, scratch: Path) -> "list[Dataset]":
        """The split, or the three own splits, that the configuration names; ``scratch`` takes the
        library's temporary files.

        Raises :class:`DataError` for a split that is not there, a file that cannot be read, and a
        data set without rows.
        """
        with _explained(self.config):
            if self.place is None:
                self.builder.download_and_prepare()
                rows = self.builder.as_dataset()
            else:
                rows = _read_local(self.place, self.config, scratch)
        names = self.config.own_splits() or [self.config.split]
        return [_split(rows, name, self.config.dataset_name) for name in names]


def find(config: HFDatasetConfig) -> Source:
    """The source of ``config``; asks the Hub for its newest commit (or the library's cache,
    offline), or hashes the files.

    Raises:
        DataError: there is no such data set, configuration, file or format.
        FetchError: the Hub cannot be reached and the data set is not cached.
    """
    name, place = config.dataset_name, Path(config.dataset_name).expanduser()
    suffix = ending(place)
    if place.exists():
        if place.is_file() and suffix not in FORMATS:
            raise DataError(
                f"{paths.shown(place)}: files ending in {place.suffix or 'nothing'} are not "
                f"read; known are {', '.join(FORMATS)}."
            )
        return Source(config, place.resolve(), _content(place))
    if name.startswith((".", "/", "~")) or suffix in FORMATS or name.count("/") > 1:
        there = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
        near = [paths.shown(place.parent / like) for like in nearest(place.name, there)]
        raise DataError(f"{paths.shown(place)} does not exist.{did_you_mean(near)}")
    if name == "pandas":  # CVE-2026-57845
        raise DataError(
            "dataset_name: pandas is the library's builder that reads pickles, which run code. "
            "Save the rows as Parquet or JSON Lines."
        )
    import datasets

    with _explained(config):
        builder = datasets.load_dataset_builder(
            name, config.dataset_config, trust_remote_code=False, **config.load_kwargs
        )
    return Source(config, None, builder.hash or str(builder.info.version), builder)


def _content(place: Path) -> str:
    """Hash of the names and bytes of all files at ``place``."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    digests = [(str(file.relative_to(place)), sha256(file)) for file in files if file.is_file()]
    return sha256_of_text(json.dumps(digests))


def _read_local(place: Path, config: HFDatasetConfig, scratch: Path) -> Any:
    import datasets

    # A cache of this preparation only: the library's own knows files by path and time, not by
    # content.
    options = {"cache_dir": str(scratch / "cache")} | config.load_kwargs
    if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(place))
    if place.is_dir():
        return datasets.load_dataset(
            str(place), config.dataset_config, trust_remote_code=False, **options
        )
    suffix = ending(place)
    if suffix == ".tsv":
        options.setdefault("sep", "\t")
    if FORMATS[suffix] in ("json", "csv") and not config.load_kwargs:
        # The library's message names neither the file nor the line, and it makes numbers of texts.
        rows = data_files.rows(place)
        if FORMATS[suffix] == "csv":
            texts = [{name: value or None for name, value in row.items()} for _, row in rows]
            return datasets.Dataset.from_list(texts)
    try:
        return datasets.load_dataset(FORMATS[suffix], data_files=str(place), **options)
    except datasets.exceptions.DatasetGenerationError:
        # A column with texts and other things, most often: then the row can be named.
        for where, row in (
            () if config.load_kwargs or config.templates() else data_files.rows(place)
        ):
            row_shapes.shape_of(row, where).messages(row, where)
        raise


def _split(rows: Any, name: str, source: str) -> "Dataset":
    import datasets

    if isinstance(rows, datasets.Dataset):
        if name != "train":
            raise DataError(
                f"split: {source} is one data set without splits; leave split at 'train'."
            )
    elif name in rows:
        rows = rows[name]
    else:
        raise DataError(f"split: {source} has no split {name!r}; it has {', '.join(rows)}.")
    if not len(rows):
        raise DataError(f"{source}, split {name!r}: no rows.")
    return rows


@contextlib.contextmanager
def _explained(config: HFDatasetConfig) -> Iterator[None]:
    """Errors of the ``datasets`` library as ours."""
    import datasets
    import requests
    from datasets import exceptions
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError

    from workshop_utils.checkpoints.sources import proxy

    name = config.dataset_name
    # It announces each of its retries, with the whole exception.
    log, datasets_log = logging.getLogger("huggingface_hub"), logging.getLogger("datasets")
    level, datasets_level = log.level, datasets_log.level
    log.setLevel(logging.ERROR)
    datasets_log.setLevel(logging.CRITICAL)
    try:
        yield
    except exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"dataset_name: {_one_line(error)} Check the name at "
            "https://huggingface.co/datasets; a private or gated one needs HF_TOKEN."
        ) from None
    except (
        exceptions.DataFilesNotFoundError,
        exceptions.DatasetGenerationError,
        exceptions.DatasetBuildError,
    ) as error:
        raise DataError(f"{name}: cannot be read: {_one_line(error.__cause__ or error)}") from None
    except (requests.RequestException, HfHubHTTPError, ConnectionError) as error:
        offline = " HF_HUB_OFFLINE is set." if datasets.config.HF_HUB_OFFLINE else ""
        raise FetchError(
            f"{name}: the Hub cannot be reached, and the data set is not in the cache "
            f"(HF_HOME).{offline}{proxy.of_environment(ENDPOINT, str(error))} Go online and "
            f"start again, or give a file. ({_one_line(error)})"
        ) from None
    except (ValueError, TypeError, KeyError, FileNotFoundError, UnicodeDecodeError) as error:
        # The library's answer to unknown configurations, arguments (load_kwargs) and data sets that
        # bring code along.
        said = _one_line(error).partition(" Example of usage")[0]
        if "trust_remote_code" in said:
            said = (
                "it comes with a script of its own, which is never run here. The Hub keeps a "
                'Parquet copy of most of them: load_kwargs {"revision": "refs/convert/parquet"}.'
            )
        about = "dataset_config: " if "BuilderConfig" in said or "Config name" in said else ""
        raise DataError(f"{about}{name}: {said}") from None
    finally:
        log.setLevel(level)
        datasets_log.setLevel(datasets_level)


def _one_line(error: BaseException) -> str:
    from workshop_utils.checkpoints.sources.proxy import without_credentials

    return without_credentials(" ".join(str(error).split()))[:600]
