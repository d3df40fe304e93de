"""Run by the Python of the NGC client's own environment (see :mod:`.ngc`); knows nothing of this
workshop.

    python ngc_driver.py ORG/TEAM/NAME:VERSION DIRECTORY

Downloads one file after another to DIRECTORY/NAME_vVERSION and notes each finished one, so that a
new start skips it: the client gives a file its full size before its content, so its size does not
tell whether it is whole. Speaks JSON lines on standard output: {"done": BYTES, "total": BYTES} as
it goes, {"error": KIND, "message": TEXT} when it fails.
"""

import base64
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path, PurePosixPath

NOTES = ".fetched.json"
PRECONDITION_FAILED = 412  # NGC's answer while terms have not been accepted


def main(target: str, directory: Path) -> int:
    """Download ``target`` into ``directory``. Exit code: 0, or 1 once the error is told on standard
    output."""
    from ngcbase import errors
    from ngcsdk import Client

    kinds = {
        errors.AuthenticationException: "refused",
        errors.AccessDeniedException: "no access",
        errors.ResourceNotFoundException: "not found",
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the client prints is not ours to say
            client = Client()
            # A personal key knows its organisation; an old key needs NGC_CLI_ORG.
            client.configure(api_key=key(), org_name=os.environ.get("NGC_CLI_ORG"))
            download(client.registry.model, target, directory)
    except (errors.NgcException, ValueError, OSError) as error:
        kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "failed")
        if getattr(error, "status_code", None) == PRECONDITION_FAILED:
            kind = "terms"
        elif "Invalid apikey" in str(error):
            kind = "refused"
        say(error=kind, message=" ".join(str(error).split()))
        return 1
    return 0


def key() -> str | None:
    return os.environ.get("NGC_API_KEY") or os.environ.get("NGC_CLI_API_KEY")


def download(models, target: str, directory: Path) -> None:
    """Download the files of ``target`` not yet noted as finished. Raises OSError for a bad path or
    transfer."""
    files = list(models.list_files(target))
    total = sum(file.sizeInBytes for file in files)
    for file in files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise OSError(f"the listing names a file outside the model: {file.path}")
    notes = directory / NOTES
    fetched = set(json.loads(notes.read_text())) if notes.exists() else set()
    before = sum(file.sizeInBytes for file in files if file.path in fetched)
    say(done=before, total=total)
    for file in files:
        if file.path in fetched:
            continue

        def report(completed, *_, before=before):
            say(done=before + completed, total=total)

        result = models.download_version(
            target, str(directory), file_patterns=[file.path], progress_callback_func=report
        )
        check(result, file)
        fetched.add(file.path)
        notes.write_text(json.dumps(sorted(fetched)))
        before += file.sizeInBytes
    say(done=total, total=total)


def check(result, file) -> None:
    # The client reports a failed transfer only in its result.
    if result.status != "Completed":
        raise OSError(
            f"{file.path}: the transfer ended as '{result.status}' after "
            f"{result.completed_bytes} of {file.sizeInBytes} bytes"
        )
    if file.sha256_base64:
        with open(Path(result.path) / file.path, "rb") as content:
            digest = base64.b64encode(hashlib.file_digest(content, "sha256").digest()).decode()
        if digest != file.sha256_base64:
            raise OSError(
                f"{file.path}: its sha256 is {digest}, {file.sha256_base64} was expected (base64)"
            )


def say(**message) -> None:
    print(json.dumps(message), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
