"""Models of the Hugging Face Hub: ``huggingface_hub.snapshot_download``, then a directory of our
own.

The Hub's client honours HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, keeps what it has
fetched in its cache and resumes there. Our directory takes the weights from the cache by hard link
where the file system allows it, so they lie on the disk once.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from workshop_utils.checkpoints.sources import pad_token, proxy, wholeness
from workshop_utils.checkpoints.sources.catalogue import Model
from workshop_utils.core import paths
from workshop_utils.core.errors import FetchError, GatedModel
from workshop_utils.core.progress import progress_bar_class

# One copy of each thing: no original/*.pth, no pytorch_model.bin, no ONNX, no second form of the
# tokenizer.
WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "USE_POLICY*",
)
SHA256_LENGTH = 64  # hexadecimal digits
GIT_SHA1_LENGTH = 40


def plan(model: Model) -> str:
    """What :func:`download` does, for people to read."""
    at = f" at {model.revision[:12]}" if model.revision else ""
    return (
        f"snapshot_download of {model.address}{at} (weights, tokenizer and configuration), check "
        "each file's checksum"
    )


def download(model: Model, target: Path, progress: bool = True) -> None:
    """Make ``target``, the Hugging Face directory of ``model``: whole or not at all, with a pad
    token that is not the end token.

    Raises GatedModel when the licence has to be accepted or the token is refused, FetchError for
    anything else that fails. A new start resumes.
    """
    snapshot = _snapshot(model, progress)
    files = sorted(
        file
        for file in snapshot.iterdir()
        if file.is_file() and any(file.match(pattern) for pattern in WANTED)
    )
    for file in files:
        _check(model, file)
    with paths.new_directory(target) as made:
        for file in files:
            _place(file, made / file.name)
        pad_token.ensure(made)
        if not wholeness.huggingface(made):
            raise FetchError(
                f"{model.address}: only a part of it is in the Hub's cache "
                f"({', '.join(f.name for f in files) or 'nothing'}), and the Hub could not be "
                "asked for the rest. Go online, unset HF_HUB_OFFLINE and start again; it resumes"
            )


def _snapshot(model: Model, progress: bool) -> Path:
    """The snapshot's directory in the Hub's cache."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # The Hub's own transfer protocol (Xet) cannot resume a file; plain HTTP can.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import requests
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        bars = {"tqdm_class": progress_bar_class()} if progress else {}
        return Path(
            snapshot_download(
                model.address, revision=model.revision, allow_patterns=list(WANTED), **bars
            )
        )
    except (
        requests.RequestException,
        OSError,
    ) as error:  # every error of the Hub's client is one or the other
        raise _explained(model, error) from error
    finally:
        if not were_off:
            enable_progress_bars()


def _explained(model: Model, error: BaseException) -> FetchError:
    """``error`` of the Hub's client as an error that says what to do."""
    import requests
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403 or (status == 401 and model.gated):
        return GatedModel(_how_to_get_access(model, status))
    if isinstance(error, errors.RepositoryNotFoundError):
        return FetchError(
            f"{model.address}: the Hub has no such repository ({status}), or it is private and "
            "HF_TOKEN may not see it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchError(
            f"{model.address}: the Hub has no revision {model.revision}; see models/manifest.yaml"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        # The client says so whenever it has nothing cached; why it had to look there is the cause.
        caused_by_answer = isinstance(error.__cause__, errors.HfHubHTTPError)
        return (
            _explained(model, error.__cause__)
            if caused_by_answer
            else FetchError(_unreachable(model, error))
        )
    if status == 401:
        return GatedModel(_how_to_get_access(model, status))
    if status is not None:
        return FetchError(
            f"{model.address}: the Hub answered {status}.{_proxy(error)} Try again later; it "
            "resumes"
        )
    if isinstance(error, requests.RequestException):
        return FetchError(
            f"{model.address}: the connection broke ({type(error).__name__}).{_proxy(error)} "
            "Start again; it resumes where it stopped"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return FetchError(
            f"{model.address}: no space left on the disk of the Hub's cache (HF_HOME); "
            f"{model.size / 1e9:.1f} GB are needed"
        )
    if cut := re.search(
        r"file should be of size (\d+) but has size (\d+) \((?:.*/)?([^/]+)\)", str(error)
    ):
        return FetchError(
            f"{model.address}, {cut[3]}: the connection broke after {cut[2]} of {cut[1]} bytes. "
            "Start again; it resumes where it stopped"
        )
    return FetchError(f"{model.address}: {' '.join(str(error).split())}. Start again; it resumes")


def _how_to_get_access(model: Model, status: int | None) -> str:
    from huggingface_hub import get_token

    page = f"https://huggingface.co/{model.address}"
    if get_token() is None:
        return (
            f"{model.address} is gated. Open {page}, sign in and accept its licence "
            f"({model.licence}); make a token that may read at "
            "https://huggingface.co/settings/tokens; then set HF_TOKEN to it and start again"
        )
    if status == 401:
        return (
            f"{model.address}: the Hub refuses the token (401). Make a new one that may read at "
            "https://huggingface.co/settings/tokens and set HF_TOKEN to it"
        )
    return (
        f"{model.address} is gated and the account of this token has no access (403). Open "
        f"{page} with that account, accept the licence ({model.licence}) and wait until the page "
        "says that access is granted; a fine-grained token also needs the permission to read "
        "gated repositories"
    )


def _unreachable(model: Model, error: BaseException) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"{model.address}: HF_HUB_OFFLINE is set and the Hub's cache (HF_HOME) does not hold "
            "it. Unset HF_HUB_OFFLINE"
        )
    return (
        f"{model.address}: the Hub cannot be reached.{_proxy(error)} Check the network (or "
        "HF_ENDPOINT) and start again; it resumes"
    )


def _proxy(error: BaseException) -> str:
    """What is to be said about a proxy; ``error`` or its cause holds the answer of one."""
    from huggingface_hub.constants import ENDPOINT

    return proxy.of_environment(ENDPOINT, f"{error} {error.__cause__}")


def _check(model: Model, file: Path) -> None:
    """Compare ``file`` with the manifest's sha256, else with the checksum that names its blob in
    the Hub's cache.

    The Hub names a large file by its sha256 and a small one by its git blob id. A file that differs
    leaves the cache, so that the next start fetches it anew.
    """
    blob = file.resolve()
    wanted = model.files.get(file.name, blob.name)
    if len(wanted) == SHA256_LENGTH:
        found = _digest(blob, hashlib.sha256)
    elif len(wanted) == GIT_SHA1_LENGTH:
        found = _digest(
            blob,
            lambda: hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False),
        )
    else:  # a cache without symbolic links (some Windows machines): nothing to compare with
        return
    if found != wanted:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise FetchError(
            f"{model.address}, {file.name}: its checksum is {found}, {wanted} was expected. The "
            "damaged copy was deleted; start again"
        )


def _digest(file: Path, new_digest: Callable) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, new_digest).hexdigest()


def _place(cached: Path, target: Path) -> None:
    """Link weights (never edited) into the model's directory, copy everything else (which we may
    edit).

    A link shares its permissions with the cache: where those are not what the umask gives, a copy
    is made.
    """
    if (
        cached.suffix == ".safetensors"
        and stat.S_IMODE(cached.stat().st_mode) == paths.new_file_mode()
    ):
        try:
            os.link(cached.resolve(), target)
            return
        except OSError:  # the cache is on another file system, or this one has no hard links
            pass
    shutil.copyfile(cached, target)
