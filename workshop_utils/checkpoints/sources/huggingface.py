"""Models of the Hugging Face Hub: ``huggingface_hub.snapshot_download``, then a directory of our
own.

The Hub's client honours HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, keeps what it has
fetched in its cache and resumes there. Our directory takes the weights from the cache by hard link
where the file system allows it, so they lie on the disk once.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from workshop_utils.checkpoints.sources import pad_token, proxy, wholeness
from workshop_utils.checkpoints.sources.catalogue import Model
from workshop_utils.core import hashing, paths
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
_TOKENS = "https://huggingface.co/settings/tokens"
_CUT = re.compile(r"file should be of size (\d+) but has size (\d+) \((?:.*/)?([^/]+)\)")


def plan(model: Model) -> str:
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
    # The snapshot may hold what somebody else fetched, too.
    files = {file for pattern in WANTED for file in snapshot.glob(pattern) if file.is_file()}
    for file in files:
        _check(model, file)
    with paths.new_directory(target) as part:
        for file in files:
            _place(file, part / file.name)
        pad_token.ensure(part)
        if not wholeness.huggingface(part):
            there = ", ".join(sorted(file.name for file in files)) or "nothing"
            raise FetchError(
                f"{model.address}: only a part of it is in the Hub's cache ({there}), and the Hub "
                "could not be asked for the rest. Go online, unset HF_HUB_OFFLINE and start again; "
                "it resumes"
            )


def _snapshot(model: Model, progress: bool) -> Path:
    # The Hub's own transfer protocol (Xet) cannot resume a file; plain HTTP can.
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_XET"):
        os.environ.setdefault(name, "1")
    import requests
    from huggingface_hub import snapshot_download

    bars = {"tqdm_class": progress_bar_class()} if progress else {}
    with contextlib.nullcontext() if progress else _no_bars():
        try:
            snapshot = snapshot_download(
                model.address, revision=model.revision, allow_patterns=list(WANTED), **bars
            )
        # Every error of the Hub's client is one or the other.
        except (requests.RequestException, OSError) as error:
            raise _explained(model, error) from error
    return Path(snapshot)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub import utils

    were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            utils.enable_progress_bars()


def _explained(model: Model, error: BaseException) -> FetchError:
    """``error`` of the Hub's client as an error that says what to do."""
    import requests
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403 or (status == 401 and model.gated):
        return GatedModel(_how_to_get_access(model, status))
    if isinstance(error, errors.RepositoryNotFoundError):
        why = (
            f"the Hub has no such repository ({status}), or it is private and HF_TOKEN may not "
            "see it"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"the Hub has no revision {model.revision}; see models/manifest.yaml"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        # The client says so whenever it has nothing cached; why it had to look there is the cause.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            return _explained(model, error.__cause__)
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            why = (
                "HF_HUB_OFFLINE is set and the Hub's cache (HF_HOME) does not hold it. Unset "
                "HF_HUB_OFFLINE"
            )
        else:
            why = (
                f"the Hub cannot be reached.{_proxy(error)} Check the network (or HF_ENDPOINT) and "
                "start again; it resumes"
            )
    elif status == 401:
        return GatedModel(_how_to_get_access(model, status))
    elif status is not None:
        why = f"the Hub answered {status}.{_proxy(error)} Try again later; it resumes"
    elif isinstance(error, requests.RequestException):
        broke = f"the connection broke ({type(error).__name__}).{_proxy(error)}"
        why = f"{broke} Start again; it resumes where it stopped"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        why = (
            "no space left on the disk of the Hub's cache (HF_HOME); "
            f"{model.size / 1e9:.1f} GB are needed"
        )
    elif cut := _CUT.search(str(error)):
        why = (
            f"{cut[3]}: the connection broke after {cut[2]} of {cut[1]} bytes. Start again; it "
            "resumes where it stopped"
        )
    else:
        why = f"{' '.join(str(error).split())}. Start again; it resumes"
    return FetchError(f"{model.address}: {why}")


def _how_to_get_access(model: Model, status: int | None) -> str:
    from huggingface_hub import get_token

    page = f"https://huggingface.co/{model.address}"
    if get_token() is None:
        return (
            f"{model.address} is gated. Open {page}, sign in and accept its licence "
            f"({model.licence}); make a token that may read at {_TOKENS}; then set HF_TOKEN to it "
            "and start again"
        )
    if status == 401:
        return (
            f"{model.address}: the Hub refuses the token (401). Make a new one that may read at "
            f"{_TOKENS} and set HF_TOKEN to it"
        )
    return (
        f"{model.address} is gated and the account of this token has no access (403). Open "
        f"{page} with that account, accept the licence ({model.licence}) and wait until the page "
        "says that access is granted; a fine-grained token also needs the permission to read "
        "gated repositories"
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
    from huggingface_hub.utils.sha import git_hash

    blob = file.resolve()
    expected = model.files.get(file.name, blob.name)
    if len(expected) == 64:
        digest = hashing.sha256(blob)
    elif len(expected) == 40:
        digest = git_hash(blob.read_bytes())
    else:  # a cache without symbolic links (some Windows machines): nothing to compare with
        return
    if digest != expected:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise FetchError(
            f"{model.address}, {file.name}: its checksum is {digest}, {expected} was expected. The "
            "damaged copy was deleted; start again"
        )


def _place(cached: Path, target: Path) -> None:
    """Link weights (never edited) into the model's directory, copy everything else (which we may
    edit).

    A link shares its permissions with the cache: where those are not what the umask gives, a copy
    is made.
    """
    mode = stat.S_IMODE(cached.stat().st_mode)
    if cached.suffix == ".safetensors" and mode == paths.new_file_mode():
        # Not where the cache is on another file system, or this one has no hard links.
        with contextlib.suppress(OSError):
            os.link(cached.resolve(), target)
            return
    shutil.copyfile(cached, target)
