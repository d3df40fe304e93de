"""Where the workshop keeps things, and writes that are all or nothing."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "shipped"
_unfinished: set[Path] = set()
_naming = threading.Lock()
"""Held while something finished gets its name."""


def in_clone() -> bool:
    """Whether this package lies in its repository; a wheel carries some of its files (setup.py)."""
    return not _SHIPPED.is_dir()


def root() -> Path:
    """Where ``models/``, ``data/`` and ``runs/`` lie: WORKSHOP_ROOT, else the clone that holds this
    package, else (installed from a wheel) the current folder."""
    chosen = os.environ.get("WORKSHOP_ROOT")
    if chosen:
        return Path(chosen).resolve()
    return _PACKAGE.parent if in_clone() else Path.cwd()


def repository_file(name: str) -> Path:
    """A file such as ``models/manifest.yaml``: the root's own where it has one."""
    own = root() / name
    return own if own.exists() else (_PACKAGE.parent if in_clone() else _SHIPPED) / name


def models_dir() -> Path:
    """``models/``: one folder a format, one folder a model in it."""
    return root() / "models"


def data_dir() -> Path:
    """``data/``: generators, and the data sets they write."""
    return root() / "data"


def runs_dir() -> Path:
    """``runs/``: what training, evaluation and export produce."""
    return root() / "runs"


def adapter_store() -> Path:
    """``runs/store/``: the adapters that a server holds, one directory each."""
    return runs_dir() / "store"


def huggingface_model(name: str) -> Path:
    """Hugging Face model directory; its name is the model's id when it is served."""
    return models_dir() / "huggingface" / name


def nemo2_checkpoint(name: str) -> Path:
    """NeMo 2.0 distributed checkpoint (``context/`` and ``weights/``)."""
    return models_dir() / "nemo2" / name


def bridged_checkpoint(name: str) -> Path:
    """The view of :func:`nemo2_checkpoint` that the script path can load."""
    return models_dir() / "bridged" / name


def shown(path: Path | str) -> str:
    """``path`` relative to :func:`root` where it lies inside; for messages, reports and outputs."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that takes its name at an end without an error.

    An existing ``target`` is replaced only then. The umask decides who may read what is in it,
    whoever wrote it; files that have other names too (hard links) keep their modes.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(f".{target.name}.", target.parent, suffix=".partial") as part:
        yield part
        _set_modes(part)
        with _naming:
            if target.is_symlink() or target.is_file():
                target.unlink()
            elif target.exists():
                _replace_directory(target, part)
                return
            os.replace(part, target)


@contextlib.contextmanager
def temporary_directory(
    prefix: str, parent: Path | None = None, suffix: str = ""
) -> Iterator[Path]:
    """Yield an empty directory that is gone after the block, and after Ctrl-C."""
    part = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
    _unfinished.add(part)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _unfinished.discard(part)


def remove_unfinished() -> None:
    """At the end of this process: remove what has not got its name yet."""
    _naming.acquire(timeout=1)
    for part in list(_unfinished):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _replace_directory(target: Path, part: Path) -> None:
    """A directory cannot be renamed over a full one: two renames, or none."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.replace(target, old / "was")
        os.replace(part, target)
    finally:
        if not target.exists():
            os.replace(old / "was", target)
        shutil.rmtree(old)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that takes its name at an end without an error."""
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    part = Path(name)
    _unfinished.add(part)
    try:
        yield part
        part.chmod(new_file_mode())
        with _naming:
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
        _unfinished.discard(part)


def write_text(target: Path, text: str) -> Path:
    """Write ``text`` to ``target`` (UTF-8), all or nothing, and return ``target``."""
    with new_file(target) as part:
        part.write_text(text, encoding="utf-8")
    return Path(target)


def new_file_mode() -> int:
    """The permissions that a new file gets from the umask."""
    return 0o666 & ~_umask()


def _set_modes(folder: Path) -> None:
    """tempfile and some libraries (safetensors) let only the owner in, others everybody."""
    for here, _, names in os.walk(folder):
        os.chmod(here, os.stat(here).st_mode & stat.S_ISGID | 0o777 & ~_umask())
        for file in (Path(here, name) for name in names):
            if not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(new_file_mode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
