"""What a judgement consists of, and the rules about values that every form shares."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from workshop_utils.checkpoints.formats import values
from workshop_utils.checkpoints.formats.summary import Checkpoint, dtypes
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import CheckpointError
from workshop_utils.core.paths import shown

_SERVED = {"float32", "bfloat16", "float16"}
#: The way out where the file itself cannot be mended.
TRAINED = "export it again from what the training wrote: workshop export TRAINED_ADAPTER --to ..."


@dataclass(frozen=True)
class Rule:
    """One rule of a reader. ``fault`` says how it is broken (None: it holds), ``fix`` what to do
    about it."""

    rule: str
    fault: str | None = None
    fix: str | None = None


@dataclass
class Judgement:
    """What :func:`.judge.judge` found. ``form`` is ``nemo``, ``hf-peft`` or None; ``notes`` say
    what cannot be told."""

    path: Path
    reader: str
    form: str | None = None
    rules: list[Rule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[Rule]:
        """The rules that do not hold."""
        return [rule for rule in self.rules if rule.fault]

    @property
    def conforms(self) -> bool:
        """Whether every rule holds."""
        return not self.broken

    def check(self, rule: str, fault: str | None, fix: str) -> bool:
        """Keep ``rule``, broken where ``fault`` says something, and return whether it holds."""
        self.rules.append(Rule(rule, fault or None, fix if fault else None))
        return not fault

    def note(self, text: str) -> None:
        """Keep ``text`` for the end of the report."""
        self.notes.append(text)

    def again(self, to: str, *options: str) -> str:
        """The command that makes a sound export of this adapter."""
        return " ".join([f"workshop export {shlex.quote(shown(self.path))} --to {to}", *options])


def first(items: list[str]) -> str | None:
    """The first of ``items`` with the number of the others, or None."""
    return items[0] + (f" (and {len(items) - 1} more)" if len(items) > 1 else "") if items else None


def check_rank(found: Judgement, rank: int | None, max_rank: int | None, option: str) -> None:
    """The server's largest rank, where one is known."""
    if max_rank is not None:
        fault = f"it is {rank}" if rank is None or rank > max_rank else None
        found.check(
            f"the rank is at most {max_rank}",
            fault,
            f"raise {option} of the server, or train with a rank of {max_rank} or less",
        )


def check_values(found: Judgement, checkpoint: Checkpoint, outs: set[str], again: str) -> None:
    """Dtype, finite numbers, and a B that is not zero everywhere; ``outs`` names the tensors that
    are a B.

    Tensor by tensor: never more than one is in memory.
    """
    kinds = dtypes(checkpoint.tensors)
    known = _SERVED | (
        set() if found.reader == "vllm" or found.reader.startswith("nim") else {"float64"}
    )
    fault = (
        None
        if len(kinds) == 1 and kinds[0] in known
        else f"it has {', '.join(kinds) or 'no tensors'}"
    )
    found.check(
        "one floating-point dtype, as the base can have it",
        fault,
        "choose that of the served base (some servers answer like the base when "
        f"the dtypes differ): {again} --dtype bfloat16{' --trust' * (len(kinds) > 1)}"
        if all("float" in kind for kind in kinds)
        else TRAINED,
    )
    unread, broken, zero, seen = [], [], [], 0
    for tensor in checkpoint.tensors:
        try:
            is_finite, is_zero = _look(checkpoint, tensor)
        except CheckpointError as error:
            unread.append(str(error))
            continue
        if not is_finite:
            broken.append(f"{tensor.name} holds NaN or infinity")
        elif tensor.name in outs:
            seen += 1
            zero += [tensor.name] if is_zero else []
    fix = TRAINED if unread else "train again with a lower rate: these weights are lost"
    found.check("every number is finite", first(unread + broken), fix)
    untrained = f"every B is zero, from {zero[0]!r} on" if zero and len(zero) == seen else None
    found.check(
        "the adapter was trained: some B is not zero",
        untrained,
        "this adapter answers like its base. Export a checkpoint after training, "
        "and look that no key was left out when it was loaded",
    )
    if zero and not untrained:
        found.note(f"B is zero in {len(zero)} of {seen} modules: {first(zero)}")


def _look(checkpoint: Checkpoint, tensor: Tensor) -> tuple[bool, bool]:
    """Whether the values of ``tensor`` are all finite, and whether all are zero."""
    import numpy

    array = values.read_tensor(checkpoint, tensor).astype(numpy.float32)
    return bool(numpy.isfinite(array).all()), not array.any()


def check_storage(found: Judgement, checkpoint: Checkpoint, stored: int, again: str) -> None:
    """Every tensor has bytes of its own, and the file (``stored`` bytes of weights) holds no
    others."""
    seen: dict[tuple[str, int], str] = {}
    shared = []
    for tensor in checkpoint.tensors:
        for chunk in tensor.chunks:
            other = seen.setdefault((chunk.file, chunk.start), tensor.name)
            if other != tensor.name and chunk.length:
                shared.append(f"{tensor.name} and {other} share their bytes")
    used = sum(tensor.nbytes for tensor in checkpoint.tensors)
    # A zip has some hundred bytes for each entry.
    if not shared and stored > used + 1024 * len(checkpoint.tensors) + 2**16:
        shared.append(
            f"{stored:,} bytes are stored for {used:,} bytes of tensors: they are views of "
            "larger ones"
        )
    found.check(
        "every tensor has storage of its own",
        first(shared),
        f"whoever writes the file has to clone() first: {again}",
    )
