"""``workshop nim``: adapters into a store, and a NIM that serves them."""

import argparse
import os
import sys
from pathlib import Path

from workshop_utils.cli import options
from workshop_utils.core import paths

DESCRIPTION = """\
Serve adapters with an NVIDIA NIM: put them where it looks, start it, wait until it is ready.

  stage         put an adapter into the store, in place of an older one of that name
  run           start the NIM's container and wait until it serves (--print: show the command, and
                start nothing)
  compose       write a Docker Compose file
  kubernetes    write a Kubernetes manifest, checked against the schemas of Kubernetes

A NIM needs docker, an NVIDIA GPU and a key of NGC in NGC_API_KEY, which is passed on by its name
and never written or shown. The same store works without them: workshop serve --base MODEL
"""

EXAMPLES = """\
examples:
  workshop nim stage runs/exports/NAME/hf-peft --name triage --base meta/llama-3.1-8b-instruct
  workshop nim run --image nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.6 --print
  workshop nim kubernetes --image nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.6 --gpus 1 --out nim.yaml
"""  # noqa: E501


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``nim`` to the ``workshop`` command."""
    parser = subparsers.add_parser(
        "nim", help="serve adapters with an NVIDIA NIM", description=DESCRIPTION, epilog=EXAMPLES
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser("stage", help="put an adapter into the store")
    option = action.add_argument
    option(
        "adapter",
        type=Path,
        metavar="ADAPTER",
        help="a PEFT directory, or a .nemo as NeMo wrote it",
    )
    option("--name", required=True, help="the model's id in the API")
    _store(action, "the directory of all adapters; made where missing (default: runs/store)")
    option(
        "--base",
        metavar="MODEL",
        help="the model that is served, a directory or its id: another base, or dtype, is warned "
        "about (default: compare the store's)",
    )
    _number(action, "--max-lora-rank", 32, "N", "NIM_MAX_LORA_RANK of the server")
    option(
        "--reader",
        choices=("nim1", "nim2"),
        default="nim1",
        help="NIM 1.x reads .nemo and PEFT, 2.x PEFT; of 2.x only the dynamic mode takes adapters "
        "while it runs (default: nim1)",
    )
    options.add_trust(action, "the adapter")
    options.add_json(action)
    action.set_defaults(run=_stage)

    action = actions.add_parser("run", help="start a NIM and wait until it serves")
    _add_options(action, gpus="all")
    action.add_argument(
        "--timeout",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="how long to wait (default: 3600: the first start downloads the model)",
    )
    action.add_argument(
        "--print",
        "--dry-run",
        dest="only_print",
        action="store_true",
        help="print the command for a shell and do nothing",
    )
    action.set_defaults(run=_run)

    for name, what, gpus, run in (
        ("compose", "Docker Compose file", "all", _compose),
        ("kubernetes", "Kubernetes manifest", "1", _kubernetes),
    ):
        # Else --store would be --store-size.
        action = actions.add_parser(name, allow_abbrev=False, help=f"write a {what}")
        _add_options(action, gpus, on_this_machine=name == "compose")
        out = "the file to write (default: print it)"
        action.add_argument("--out", type=Path, metavar="FILE", help=out)
        action.set_defaults(run=run)
    for name, size, what in (("cache", "100Gi", "model"), ("store", "10Gi", "adapters")):
        about = f"volume for the {what} (default: {size})"
        action.add_argument(f"--{name}-size", default=size, metavar="SIZE", help=about)


def _store(action: argparse.ArgumentParser, about: str) -> None:
    default = paths.adapter_store()
    action.add_argument("--store", type=Path, default=default, metavar="DIR", help=about)


def _number(
    action: argparse.ArgumentParser, option: str, default: int, metavar: str | None, about: str
) -> None:
    about = f"{about} (default: {default})"
    action.add_argument(option, type=int, default=default, metavar=metavar, help=about)


def _add_options(action: argparse.ArgumentParser, gpus: str, on_this_machine: bool = True) -> None:
    option = action.add_argument
    option(
        "--image", required=True, help="the NIM's image with a tag or digest; :latest is refused"
    )
    if on_this_machine:
        _store(action, "the directory of the adapters (default: runs/store)")
        option(
            "--cache",
            type=Path,
            default=Path.home() / ".cache" / "nim",
            metavar="DIR",
            help="keeps the downloaded model (default: ~/.cache/nim)",
        )
    option(
        "--name",
        default="workshop-nim",
        help="name of the container, or of the objects (default: workshop-nim)",
    )
    where = "on this machine's loopback address" if on_this_machine else "of the Service"
    _number(action, "--port", 8000, None, f"port {where}")
    option("--gpus", default=gpus, help=f"a number, all, or device=0,1 (default: {gpus})")
    option("--shm-size", default="16GB", metavar="SIZE", help="shared memory (default: 16GB)")
    _number(action, "--refresh", 60, "SECONDS", "NIM_PEFT_REFRESH_INTERVAL")
    _number(action, "--max-lora-rank", 32, "N", "NIM_MAX_LORA_RANK")
    _number(action, "--max-gpu-loras", 8, "N", "NIM_MAX_GPU_LORAS")
    _number(action, "--max-cpu-loras", 16, "N", "NIM_MAX_CPU_LORAS")
    option("--profile", metavar="ID", help="NIM_MODEL_PROFILE (default: the NIM chooses)")


def _nim(args: argparse.Namespace):
    from dataclasses import fields

    from workshop_utils.serving.nim.docker import Nim

    names = {field.name for field in fields(Nim)}
    return Nim(**{name: value for name, value in vars(args).items() if name in names})


def _stage(args: argparse.Namespace) -> int:
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.serving.nim import stage

    if args.max_lora_rank < 1:
        raise WorkshopError(f"--max-lora-rank is {args.max_lora_rank}; it has to be above 0.")
    staged = stage(
        args.adapter, args.name, args.store, args.base, args.max_lora_rank, args.reader, args.trust
    )
    if args.json:
        options.print_json(staged)
        return 0
    for warning in staged.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for note in staged.notes:
        print(f"note: {note}", file=sys.stderr)
    said = {
        "added": "new",
        "replaced": "replaces an older one",
        "unchanged": "the identical adapter is there already; left as it is",
    }
    print(f"{paths.shown(staged.path)}: {said[staged.change]}")
    print(f'rank {staged.rank}; served as "model": "{staged.name}"')
    return 0


def _run(args: argparse.Namespace) -> int:
    from workshop_utils.core.errors import NimFailed, WorkshopError
    from workshop_utils.serving.nim import docker, readiness, store

    nim = _nim(args)
    if not args.timeout > 0:
        raise WorkshopError(f"--timeout is {args.timeout}; it has to be above 0.")
    if args.only_print:
        print(docker.script(nim))
        return 0
    docker.preflight(nim, os.environ)
    docker.start(nim)
    print(f"container {nim.name} started; its log: docker logs -f {nim.name}")
    try:
        seconds = readiness.wait(nim.url, args.timeout, lambda: docker.ended(nim.name))
    except NimFailed as error:
        text = docker.logs(nim.name)
        causes = [
            f"  {finding.meaning}\n    the log: {finding.line}"
            for finding in readiness.read_log(text)
            if finding.kind == "error"
        ]
        last = [f"  {line}" for line in text.strip().splitlines()[-8:]]
        log = ["What its log says:", *causes] if causes else ["Its log ends with:", *last]
        ended = docker.ended(nim.name)
        state = "It is kept for you to look at" if ended else "The container still runs"
        end = f"{state}: docker logs {nim.name}; docker rm -f {nim.name} removes it."
        raise NimFailed("\n".join([f"{error}.", *log, end])) from error
    served = readiness.models(nim.url)
    print(f"ready after {seconds:.0f} s: {nim.url}/v1")
    print(f"models: {', '.join(served)}")
    for finding in readiness.read_log(docker.logs(nim.name)):
        meaning = "" if finding.kind == "loaded" else f"\n     {finding.meaning}"
        print(f"log: {finding.line}{meaning}")
    print(f"stop it: docker rm -f {nim.name}")
    missing = sorted(set(store.names(nim.store)) - set(served))
    if missing:
        raise NimFailed(
            f"in the store, but not served: {', '.join(missing)}. `workshop conform "
            f"{nim.store}/{missing[0]} --reader nim1` says why, or the log does."
        )
    return 0


def _compose(args: argparse.Namespace) -> int:
    from workshop_utils.serving.nim.compose import as_yaml, compose, header

    nim = _nim(args)
    return _write(header(nim) + as_yaml(compose(nim)), args.out)


def _kubernetes(args: argparse.Namespace) -> int:
    from workshop_utils.serving.nim.compose import as_yaml
    from workshop_utils.serving.nim.kubernetes import header, manifest

    nim = _nim(args)
    return _write(header(nim) + as_yaml(*manifest(nim, args.cache_size, args.store_size)), args.out)


def _write(text: str, out: Path | None) -> int:
    from workshop_utils.core.errors import OutputExists

    if out is None:
        print(text, end="")
    else:
        if os.path.lexists(out) and not (
            out.is_file() and out.read_bytes().startswith(text.split("\n")[0].encode())
        ):
            raise OutputExists(
                f"{paths.shown(out)} exists and was not written by this command. It was left as it "
                "is. Choose another name."
            )
        print(f"written: {paths.shown(paths.write_text(out, text))}")
    return 0
