"""The export phase: a checkpoint of the run for those who have no NeMo 2.0, or no adapter.

    hf_peft     the adapter, as Hugging Face PEFT                  {checkpoint}.hf_peft
    merged      adapter and base in one, a NeMo 2.0 checkpoint     {checkpoint}.merged
    hf_model    the merged, or fully fine-tuned, model for transformers   {checkpoint}.hf_model

All lie in ``{output_dir}/exports``, not beside the checkpoint as the reference has them: NeMo reads
every name in ``checkpoints/`` when it resumes, and fails at these. Nothing is called done before it
has been loaded again and its logits compared with those that NeMo computes from the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.adapters import proof
from workshop_utils.adapters.export import export_adapter
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Kind, dtypes
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import (
    ConformanceFailed,
    OutputExists,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.core.paths import shown
from workshop_utils.inference import nemo2_engine
from workshop_utils.runtime.processes import run_job
from workshop_utils.training.recipe import choose_checkpoint
from workshop_utils.training.recipe.base_checkpoint import find_source, run_import

if TYPE_CHECKING:
    import numpy

    from workshop_utils.training.recipe.plan import Resolved

FORMS = ("hf_peft", "merged", "hf_model")
RECORD = "workshop_export.json"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of two logits, as a part of the largest logit, by the dtype of the exported
weights."""
_GONE, _LEFT = "It was not kept.", "It was left as it is; --overwrite makes it again."
_ROWS, _LENGTH = 2, 24  # of the token ids whose logits are compared


def export(
    resolved: Resolved,
    form: str | None = None,
    checkpoint: Path | str | None = None,
    overwrite: bool | None = None,
) -> Path:
    """Export a checkpoint of the run (best, last, or a directory) in one of the :data:`FORMS`;
    returns the new directory. What the options say fills in what is not given.

    An export of the same checkpoint is compared again and reused. With ``overwrite`` one of another
    checkpoint, or a spoilt one, is replaced.

    Raises:
        CheckpointError: there is no such checkpoint, or it or its base is unsafe or damaged.
        UnsupportedAdapter: the form does not suit the checkpoint: a full fine-tune has no adapter,
            and is merged already.
        OutputExists: something else is where the export would go.
        ConformanceFailed: the logits differ. The export is not kept.
        GenerationFailed: NeMo failed; with what it wrote last.
    """
    options = resolved.options
    if form is None:
        whole = "merged" if options.target == "nemo2" else "hf_model"
        form = "hf_peft" if options.no_merge else whole
    if form not in FORMS:
        raise WorkshopError(f"The form of an export is {form!r}; it is one of {', '.join(FORMS)}.")
    chosen = choose_checkpoint.choose(resolved.run_dir, str(checkpoint or options.checkpoint))
    require_sound(chosen, options.trust, (Kind.NEMO2, Kind.NEMO2_ADAPTER))
    base = nemo2_engine.base_of(chosen, resolved.nemo_ckpt_dir)
    if base is None and form != "hf_model":
        raise UnsupportedAdapter(
            f"{shown(chosen)} is a full fine-tune: it has no adapter, and is a whole NeMo 2.0 "
            "model as it is. For Hugging Face leave no_merge out and set target: hf."
        )
    overwrite = options.overwrite if overwrite is None else overwrite
    return getattr(_Export(resolved, chosen, base, overwrite), form)()


@dataclass
class _Export:
    """One checkpoint on its way out; NeMo's logits of it are computed once."""

    resolved: Resolved
    checkpoint: Path
    base: Path | None
    overwrite: bool

    def place(self, form: str) -> Path:
        """Where ``form`` goes. Put together as text: a suffix would eat into a name with dots."""
        return self.resolved.output_dir / "exports" / f"{self.checkpoint.name}.{form}"

    def hf_peft(self) -> Path:
        with self.huggingface_base() as base:
            name = self.resolved.options.hf_model_id
            return self.adapter("hf_peft", "hf-peft", name, "float32", lambda peft: (base, peft))

    def merged(self) -> Path:
        def side(merged: Path) -> proof.Side:
            def logits(token_ids: list[list[int]]) -> numpy.ndarray:
                # A view: a checkpoint that still has the name of an unfinished one is refused.
                with tempfile.TemporaryDirectory(prefix="workshop-merged-") as view:
                    for part in merged.iterdir():
                        (Path(view) / part.name).symlink_to(part.resolve())
                    return self.nemo_logits(Path(view), token_ids)

            return logits

        return self.adapter("merged", "nemo2-merged", str(self.base), self.dtype, side)

    def adapter(
        self, form: str, to: str, base: str, dtype: str, side: Callable[[Path], proof.Side]
    ) -> Path:
        """What :mod:`workshop_utils.adapters` makes of the adapter. The logits of its ``side`` are
        compared before it gets its name."""
        target = self.place(form)
        export_adapter(
            self.checkpoint,
            to,
            target,
            base_model=base,
            overwrite=self.overwrite,
            trust=self.resolved.options.trust,
            accept=lambda part: self.compare(
                target, side(part), dtype, "" if part == target else _GONE
            ),
            elsewhere="Move it away",
        )
        return target

    def hf_model(self) -> Path:
        """The whole model for transformers; for an adapter by way of :meth:`merged`, which is
        kept."""
        source, target = self.merged() if self.base else self.checkpoint, self.place("hf_model")
        mark = {"checkpoint": self.checkpoint.name, "files": nemo2.contents_of(self.checkpoint)}
        if self.reusable(target, mark):
            self.compare(target, target, self.dtype, _LEFT)
            return target
        with paths.new_directory(target) as part:
            to_huggingface(source, part, self.resolved.options.trust)
            paths.write_text(part / RECORD, json.dumps(mark) + "\n")
            self.compare(target, part, self.dtype, _GONE)
        return target

    @cached_property
    def whole(self) -> nemo2.Checkpoint:
        """The base, or the full model."""
        return nemo2.describe(self.base or self.checkpoint)

    @property
    def dtype(self) -> str:
        """Of the weights that are merged or exported."""
        return dtypes(self.whole.tensors)[0]

    @cached_property
    def token_ids(self) -> list[list[int]]:
        """The same token ids for every form, from the lower half of the vocabulary: rows at its end
        may only pad it, and NeMo's exporter leaves those out."""
        rows, draw = self.whole.architecture.vocabulary or 256, random.Random(0)
        return [[draw.randrange(rows // 2) for _ in range(_LENGTH)] for _ in range(_ROWS)]

    def nemo_logits(
        self, checkpoint: Path, token_ids: list[list[int]], base: Path | None = None
    ) -> numpy.ndarray:
        options, device = self.resolved.options, self.resolved.device
        return nemo_logits(checkpoint, token_ids, options.trust, base, device)

    @cached_property
    def trained(self) -> list[numpy.ndarray]:
        """NeMo's logits of the checkpoint."""
        return list(self.nemo_logits(self.checkpoint, self.token_ids, self.base))

    def compare(self, target: Path, side: proof.Side, dtype: str, end: str) -> None:
        """Raise ConformanceFailed, which ends in ``end``, unless the logits of ``side`` are those
        that NeMo computes from the checkpoint."""
        try:
            difference = proof.compare(proof.logits(side, self.token_ids), self.trained)
        except UserWarning as warning:  # of PEFT: keys are missing
            raise ConformanceFailed(f"{shown(target)}: {warning} {end}".rstrip()) from None
        apart, allowed = difference.largest, TOLERANCE.get(dtype, 1e-3) * difference.scale
        if not apart <= allowed:
            raise ConformanceFailed(
                f"{shown(target)}: its logits differ from those that NeMo computes from "
                f"{shown(self.checkpoint)} by up to {apart:.3g}; {allowed:.3g} is allowed for "
                f"{dtype} weights. {end}".rstrip()
            )
        print(
            f"{shown(target)}: re-loaded; its logits differ from NeMo's by at most {apart:.1e} "
            f"(allowed: {allowed:.1e})"
        )

    def reusable(self, target: Path, mark: dict) -> bool:
        """Whether ``target`` was made from the same checkpoint; raises OutputExists if it is
        something that may not be replaced."""
        ours = (target / RECORD).is_file()
        if not target.exists() or (ours and self.overwrite):
            return False
        if ours and read_json(target / RECORD) == mark:
            return True
        what, fix = "something that this command did not make", "Move it away"
        if ours:
            what, fix = "an export of another checkpoint", "--overwrite replaces it"
        raise OutputExists(f"{shown(target)} is {what}. It was left as it is. {fix}.")

    @contextlib.contextmanager
    def huggingface_base(self) -> Iterator[Path]:
        """The base as transformers loads it: the one that was imported where it is still here, else
        exported for as long as it takes."""
        here, options = None, self.resolved.options
        with contextlib.suppress(WorkshopError):  # the id may name nothing on this machine
            here = find_source(options.hf_model_id).here
        if here and (here / "config.json").is_file():
            require_sound(here, options.trust, (Kind.HUGGINGFACE,))
            yield here
            return
        with tempfile.TemporaryDirectory(prefix="workshop-base-") as folder:
            to_huggingface(self.base, Path(folder), options.trust)
            yield Path(folder)


def nemo_logits(
    checkpoint: Path,
    token_ids: list[list[int]],
    trust: bool = False,
    base: Path | None = None,
    device: str | None = None,
) -> numpy.ndarray:
    """NeMo's fp32 logits ``[rows, tokens, vocabulary]`` of a NeMo 2.0 checkpoint, an adapter with
    its ``base``, computed in a process of its own."""
    import numpy

    job = {"token_ids": token_ids, "trust": trust, "base": base and str(base), "device": device}
    with tempfile.TemporaryDirectory(prefix="workshop-recipe-") as folder:
        job["checkpoint"] = str(checkpoint.resolve())
        run_job(nemo2_engine.__name__, Path(folder), job, checkpoint)
        return numpy.load(Path(folder) / "logits.npy")


def to_huggingface(checkpoint: Path, folder: Path, trust: bool = False) -> None:
    """Fill ``folder`` with the Hugging Face model of a NeMo 2.0 ``checkpoint``, by NeMo's own
    exporter."""
    run_import(checkpoint, folder, trust, "--to-huggingface")
