"""Would a given reader take this adapter, and would it do what it was trained to do?

:data:`.table.RULES` is what each reader asks for, one row a rule, and :data:`.table.READERS` who
they are. ``workshop inspect``, ``conform``, ``export``, ``nim stage`` and ``serve`` all ask
:func:`check`. Nothing imports torch, and nothing that a file contains is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.adapters.rules.facts import Facts
from workshop_utils.adapters.rules.table import READERS, RULES, Ask, Fault, Rule, Severity, Source
from workshop_utils.core import terminal
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.paths import shown

ANY_RANK = math.inf
"""As the largest rank: any that the server can be started with."""


_MARKS = {
    None: "✓ OK   ",
    "note": "✓ OK   ",
    "warning": "! WARN ",
    "not known": "? NOT KNOWN",
    "refused": "✗ FAIL ",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one rule; ``code`` names it. ``severity`` is None where it holds, else
    ``fault`` says how it does not, and ``fix`` what to do about it."""

    code: str
    rule: str
    source: Source
    severity: Severity | None = None
    fault: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Result:
    """What :func:`check` found. ``form`` is ``nemo``, ``hf-peft`` or None. ``stopped``: after the
    last of the rules no other could be asked."""

    path: Path
    reader: str
    form: str | None
    rules: tuple[Verdict, ...]
    stopped: bool = False

    def of(self, *severities: Severity) -> list[Verdict]:
        return [verdict for verdict in self.rules if verdict.severity in severities]

    @property
    def broken(self) -> list[Verdict]:
        """The rules for which the reader refuses the adapter, or runs it wrongly."""
        return self.of(Severity.REFUSED)

    @property
    def faults(self) -> list[Verdict]:
        """:attr:`broken`, and what a sound export would not have."""
        return self.of(Severity.REFUSED, Severity.WARNING)

    @property
    def conforms(self) -> bool:
        return not self.broken

    @property
    def notes(self) -> list[str]:
        """What else to know, and what is not known of the reader."""
        odd = [": ".join(filter(None, (its.fault, its.fix))) for its in self.of(Severity.NOTE)]
        reader = READERS[self.reader]
        return [*reader.notes, *reader.modes, *odd]

    def lines(self) -> list[str]:
        """One line a rule, its fault and fix below it, and the verdict."""
        text = []
        for verdict in self.rules:
            text.append(f"{_MARKS[verdict.severity]} {verdict.rule}")
            if verdict.severity not in (None, "note"):
                text += [f"          {verdict.fault}", f"          fix: {verdict.fix}"]
        text += [f"note: {note}" for note in self.notes]
        broken, count = len(self.broken), len(self.rules)
        kept = (
            "none" if any(its.severity in ("warning", "not known") for its in self.rules) else "all"
        )
        verdict = f"all {count} rules kept" if kept == "all" else f"none of {count} rules broken"
        verdict = f"{broken} of {count} rules broken" if broken else verdict
        further = "; no other was asked" if self.stopped else ""
        text.append(f"{self.reader}: {verdict}{further}: {shown(self.path)}")
        return [terminal.one_line(line) for line in text]


def check(
    adapter: Path | str | Facts,
    reader: str,
    max_rank: float | None = None,
    copied: bool = False,
    values: bool = True,
) -> Result:
    """Ask the rules of ``reader`` (a key of :data:`READERS`) of an adapter: a ``.nemo``, a PEFT
    directory, or the directory of one adapter in a NIM store.

    ``max_rank`` is the server's largest rank; without it, what the server has unless it is told
    otherwise. ``copied``: its files go into the store as files, so that links do no harm. Without
    ``values`` no tensor is read.

    Raises:
        NotACheckpoint: there is no adapter and no checkpoint at all; the message says what is
            there.
        WorkshopError: an unknown reader, or a largest rank below 1.
    """
    if reader not in READERS:
        raise WorkshopError(f"Unknown reader {reader!r}: it is one of {', '.join(READERS)}.")
    if max_rank is not None and max_rank < 1:
        raise WorkshopError(f"The largest rank is {max_rank}; it must be 1 or more.")
    facts = adapter if isinstance(adapter, Facts) else Facts.of(Path(adapter))
    ask = Ask(facts, reader, max_rank, copied)
    verdicts, stopped = [], False
    for rule in RULES:
        if reader not in rule.readers or rule.form not in (None, facts.form):
            continue
        if (values or not rule.values) and rule.when(ask):
            verdicts.append(_verdict(rule, ask))
            stopped = rule.stops and verdicts[-1].severity in (
                Severity.REFUSED,
                Severity.NOT_KNOWN,
            )
            if stopped:
                break
    return Result(facts.path, reader, facts.form, tuple(verdicts), stopped)


def _verdict(rule: Rule, ask: Ask) -> Verdict:
    title, answer = rule.title.format(**ask.words), rule.check(ask)
    if not answer:
        return Verdict(rule.code, title, rule.source)
    fault = answer if isinstance(answer, Fault) else Fault(answer)
    fix = (rule.fix if fault.fix is None else fault.fix).format(**ask.words)
    return Verdict(rule.code, title, rule.source, fault.severity or rule.severity, fault.text, fix)


def rank_notes(rank: int, form: str) -> list[str]:
    """How to start the servers that take ``form`` and whose largest rank is below ``rank`` unless
    they are told otherwise."""
    notes = []
    vllm, nim = READERS["vllm"], READERS["nim1"]
    if form in vllm.forms and rank > vllm.usual:
        notes.append(
            f"rank {rank} is above vLLM's default of {vllm.usual}: start it with --max-lora-rank "
            f"{vllm.enough_for(rank)}"
        )
    if rank > nim.usual:
        notes.append(
            f"rank {rank} may be above NIM's largest ({nim.usual} in a published profile): start "
            f"it with NIM_MAX_LORA_RANK={rank}"
        )
    return notes


__all__ = ["ANY_RANK", "READERS", "RULES", "Facts", "Result", "Severity", "Verdict", "check"]
