"""``workshop verify``: is this checkpoint whole, and safe to load?"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.cli import options
from workshop_utils.core import terminal
from workshop_utils.core.paths import shown

if TYPE_CHECKING:
    from workshop_utils.checkpoints.verify.report import Report

DESCRIPTION = """\
Tell whether a checkpoint is whole and safe to load, before a program spends minutes, or runs code,
to find out.

Checked is that every file that an index names is there and long enough; no two tensors share bytes;
the pieces of each tensor cover it exactly; names, shapes, layers and dtypes fit the configuration;
adapters have both halves, one rank and every layer; pickles, tars and configurations name nothing
that would run. This reads indexes, headers and the sizes of files: no weight, so that it takes
seconds for any size. torch is not needed, and nothing that a file contains is run.

  --deep              read every value once, too: each piece is what the index says, and every
                      number is finite
  --write-manifest    write size and sha256 of every file to NAME.manifest.json beside the
                      checkpoint, if it is sound
  --manifest FILE     compare with such a manifest: the only way to tell that no file comes from
                      another save

What is damaged is named to the tensor and layer. "Not known" is what nothing in the checkpoint
could prove. Exit status: 0 sound, 1 unsound, 2 not a checkpoint.
"""

EXAMPLES = """\
examples:
  workshop verify models/nemo2/smollm2-135m-instruct
  workshop verify runs/exports/NAME/hf-peft --deep
  workshop verify models/nemo2/smollm2-135m-instruct --write-manifest
  workshop verify COPY --manifest models/nemo2/smollm2-135m-instruct.manifest.json
"""

_SHOWN = 200


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="is a checkpoint whole, and safe to load?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="a checkpoint of any format: a directory or a file"
    )
    parser.add_argument("--deep", action="store_true", help="read every value, too")
    options.add_json(parser)
    manifests = parser.add_mutually_exclusive_group()
    manifests.add_argument(
        "--manifest", metavar="FILE", type=Path, help="the manifest that the files have to match"
    )
    manifests.add_argument(
        "--write-manifest",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(),
        help="write a manifest",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 sound, 1 unsound."""
    from workshop_utils.checkpoints.verify import manifest
    from workshop_utils.checkpoints.verify.verify import verify

    report = verify(args.path, args.deep, args.manifest, progress=not args.json)
    written = None
    if args.write_manifest is not None and report.sound:
        # Path() stands for the option without a file.
        chosen = args.write_manifest if args.write_manifest.name else None
        written = manifest.write(args.path, chosen, progress=not args.json)
    if args.json:
        import json

        answer = as_dict(report) | {"manifest_written": shown(written) if written else None}
        print(json.dumps(answer, indent=2))
        return 0 if report.sound else 1
    for line in _lines(report):
        print(terminal.one_line(line))
    if written:
        print(f"manifest: {terminal.one_line(shown(written))}")
    elif args.write_manifest is not None:
        print("manifest: not written, since the checkpoint is not sound")
    print(terminal.one_line(report.verdict))
    return 0 if report.sound else 1


def as_dict(report: "Report") -> dict[str, Any]:
    """The report as plain values. ``findings`` are what is refused; ``remarks`` hold ``notes`` and
    ``untold`` (what is not known) once more, with their codes."""
    import dataclasses

    checkpoint = report.checkpoint
    return {
        "path": shown(report.path),
        "format": checkpoint.format if checkpoint else None,
        "sound": report.sound,
        "verdict": report.verdict,
        "findings": [
            {"kind": type(finding.error()).__name__} | dataclasses.asdict(finding)
            for finding in report.refused
        ],
        "checked": report.checked,
        "untold": [finding.message for finding in report.not_known],
        "notes": [finding.message for finding in report.notes],
        "remarks": [dataclasses.asdict(finding) for finding in report.notes + report.not_known],
    }


def _lines(report: "Report") -> Iterator[str]:
    from workshop_utils.checkpoints.formats.findings import Code

    if report.checkpoint:
        yield f"format: {report.checkpoint.format}"
    for check in report.checked if report.sound else ():
        yield f"ok: {check}"
    for note in report.notes:
        yield f"note: {note}"
    for gap in report.not_known:
        yield f"not known: {gap}"
    refused = report.refused
    for finding in refused[:_SHOWN]:
        yield f"{'UNSAFE' if finding.code is Code.UNSAFE else 'FINDING'}: {finding}"
    if len(refused) > _SHOWN:
        yield f"and {len(refused) - _SHOWN:,} more findings; --json lists them all"
