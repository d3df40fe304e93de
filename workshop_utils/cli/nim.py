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
    action.add_argument(
        "adapter",
        type=Path,
        metavar="ADAPTER",
        help="a PEFT directory, or a .nemo for TensorRT-LLM (workshop export)",
    )
    action.add_argument("--name", required=True, help="the model's id in the API")
    action.add_argument(
        "--store",
        type=Path,
        default=paths.adapter_store(),
        metavar="DIR",
        help="the directory of all adapters; made where missing (default: runs/store)",
    )
    action.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that is served, a directory or its id: another base, or dtype, is warned "
        "about (default: compare the store's)",
    )
    action.add_argument(
        "--max-lora-rank",
        type=int,
        default=32,
        metavar="N",
        help="NIM_MAX_LORA_RANK of the server (default: 32)",
    )
    action.add_argument(
        "--reader",
        choices=("nim1", "nim2"),
        default="nim1",
        help="NIM 1.x reads .nemo and PEFT, 2.x PEFT (default: nim1)",
    )
    options.add_trust(action, "the adapter")
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

    for name, gpus, run in (("compose", "all", _compose), ("kubernetes", "1", _kubernetes)):
        action = actions.add_parser(
            name,
            allow_abbrev=False,
            help=f"write a {'Docker Compose file' if name == 'compose' else 'Kubernetes manifest'}",
        )  # else --store would be --store-size
        _add_options(action, gpus, on_this_machine=name == "compose")
        action.add_argument(
            "--out", type=Path, metavar="FILE", help="the file to write (default: print it)"
        )
        action.set_defaults(run=run)
    action.add_argument(
        "--cache-size",
        default="100Gi",
        metavar="SIZE",
        help="volume for the model (default: 100Gi)",
    )
    action.add_argument(
        "--store-size",
        default="10Gi",
        metavar="SIZE",
        help="volume for the adapters (default: 10Gi)",
    )


def _add_options(action: argparse.ArgumentParser, gpus: str, on_this_machine: bool = True) -> None:
    action.add_argument(
        "--image", required=True, help="the NIM's image with a tag or digest; :latest is refused"
    )
    if on_this_machine:
        action.add_argument(
            "--store",
            type=Path,
            default=paths.adapter_store(),
            metavar="DIR",
            help="the directory of the adapters (default: runs/store)",
        )
        action.add_argument(
            "--cache",
            type=Path,
            default=Path.home() / ".cache" / "nim",
            metavar="DIR",
            help="keeps the downloaded model (default: ~/.cache/nim)",
        )
    action.add_argument(
        "--name",
        default="workshop-nim",
        help="name of the container, or of the objects (default: workshop-nim)",
    )
    where = "on this machine's loopback address" if on_this_machine else "of the Service"
    action.add_argument("--port", type=int, default=8000, help=f"port {where} (default: 8000)")
    action.add_argument(
        "--gpus", default=gpus, help=f"a number, all, or device=0,1 (default: {gpus})"
    )
    action.add_argument(
        "--shm-size", default="16GB", metavar="SIZE", help="shared memory (default: 16GB)"
    )
    action.add_argument(
        "--refresh",
        type=int,
        default=60,
        metavar="SECONDS",
        help="NIM_PEFT_REFRESH_INTERVAL (default: 60)",
    )
    action.add_argument(
        "--max-lora-rank", type=int, default=32, metavar="N", help="NIM_MAX_LORA_RANK (default: 32)"
    )
    action.add_argument(
        "--max-gpu-loras", type=int, default=8, metavar="N", help="NIM_MAX_GPU_LORAS (default: 8)"
    )
    action.add_argument(
        "--max-cpu-loras", type=int, default=16, metavar="N", help="NIM_MAX_CPU_LORAS (default: 16)"
    )
    action.add_argument(
        "--profile", metavar="ID", help="NIM_MODEL_PROFILE (default: the NIM chooses)"
    )


def _nim(args: argparse.Namespace):
    from dataclasses import fields

    from workshop_utils.serving.nim.docker import Nim

    names = {field.name for field in fields(Nim)}
    return Nim(**{name: value for name, value in vars(args).items() if name in names})


def _stage(args: argparse.Namespace) -> int:
    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.core.paths import shown
    from workshop_utils.serving.nim import stage

    if args.max_lora_rank < 1:
        raise WorkshopError(f"--max-lora-rank is {args.max_lora_rank}; it has to be above 0.")
    staged = stage(
        args.adapter, args.name, args.store, args.base, args.max_lora_rank, args.reader, args.trust
    )
    for warning in staged.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for note in staged.notes:
        print(f"note: {note}", file=sys.stderr)
    said = {
        "added": "new",
        "replaced": "replaces an older one",
        "unchanged": "the identical adapter is there already; left as it is",
    }
    print(f"{shown(staged.path)}: {said[staged.change]}")
    print(f'rank {staged.rank}; served as "model": "{staged.name}"')
    return 0


def _run(args: argparse.Namespace) -> int:
    import os

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
        found = [
            f"  {one.meaning}\n    the log: {one.line}"
            for one in readiness.read_log(text)
            if one.kind == "error"
        ]
        last = [f"  {line}" for line in text.strip().splitlines()[-8:]]
        state = (
            docker.ended(nim.name) and "It is kept for you to look at"
        ) or "The container still runs"
        end = f"{state}: docker logs {nim.name}; docker rm -f {nim.name} removes it."
        raise NimFailed(
            "\n".join(
                [
                    f"{error}.",
                    *(["What its log says:", *found] if found else ["Its log ends with:", *last]),
                    end,
                ]
            )
        ) from error
    served = readiness.models(nim.url)
    print(f"ready after {seconds:.0f} s: {nim.url}/v1")
    print(f"models: {', '.join(served)}")
    for one in readiness.read_log(docker.logs(nim.name)):
        print(
            f"log: {one.line}" if one.kind == "loaded" else f"log: {one.line}\n     {one.meaning}"
        )
    print(f"stop it: docker rm -f {nim.name}")
    missing = readiness.not_served(store.names(nim.store), served)
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
    from workshop_utils.core.paths import shown, write_text

    if out is None:
        print(text, end="")
    else:
        if os.path.lexists(out) and not (
            out.is_file() and out.read_bytes().startswith(text.split("\n")[0].encode())
        ):
            raise OutputExists(
                f"{shown(out)} exists and was not written by this command. It was left as it is. "
                "Choose another name."
            )
        print(f"written: {shown(write_text(out, text))}")
    return 0
