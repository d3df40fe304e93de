"""Make the support-ticket data set: plain-English tickets and the one JSON line a triage desk
answers with.

    python data/make_tickets.py [--out data/tickets] [--seed 7]

Each ticket has a subject line and a problem sentence (they decide the team), two sentences about
time (they decide the priority) and an identifier (the reply repeats it). The sentences stand in
``ticket_phrases.json``, one list for each split: no split borrows a sentence from another. The same
seed writes the same bytes. See ``README.md`` beside this file for the data card.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

PHRASES = Path(__file__).with_name("ticket_phrases.json")
DEFAULT_OUT = Path(__file__).with_name("tickets")

# Every team meets every priority this often, so neither label says anything about the other.
ROWS_PER_PAIR = {"train": 27, "validation": 5, "test": 7}

# Where the identifier stands: the subject line and an opening come first, the other sentences may
# stand anywhere.
LAYOUTS = (
    ("opening", "problem", "time", "time"),
    ("opening", "time", "problem", "time"),
    ("problem", "inside", "time", "time"),
    ("problem", "time", "time", "inside"),
    ("time", "problem", "time", "inside"),
    ("time", "time", "inside", "problem"),
)

# No I, O, or Q: they read like digits. The letters are drawn for each ticket and say nothing about
# its labels.
IDENTIFIER_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


class Cycle:
    """Deals the items of a list in random order, all of them once before any comes again."""

    def __init__(self, items: list, rng: random.Random):
        self.items, self.rng, self.left = items, rng, []

    def draw(self):
        """The next item; each comes once before any comes again."""
        if not self.left:
            self.left = list(self.items)
            self.rng.shuffle(self.left)
        return self.left.pop()


def new_identifier(used: set[str], rng: random.Random) -> str:
    """An identifier such as ``KD-517`` that is not in ``used`` yet, to which it is added."""
    while True:
        letters = "".join(
            IDENTIFIER_LETTERS[rng.randrange(len(IDENTIFIER_LETTERS))] for _ in range(2)
        )
        identifier = f"{letters}-{rng.randrange(100, 1000)}"
        if identifier not in used:
            used.add(identifier)
            return identifier


def answer_line(team: str, priority: str, identifier: str) -> str:
    """The answer the model has to give, on one line; it follows from the ticket alone."""
    return json.dumps({"team": team, "priority": priority, "reply": f"We have {identifier}."})


def make_split(phrases: dict, rows_per_pair: int, used: set[str], rng: random.Random) -> list[dict]:
    """Chat rows of one split, shuffled: ``rows_per_pair`` for each pair of team and priority.

    ``phrases`` is one split of ``ticket_phrases.json``; ``used`` holds the identifiers that other
    splits have taken.
    """
    problems = {team: Cycle(sentences, rng) for team, sentences in phrases["teams"].items()}
    times = {
        priority: Cycle(sentences, rng) for priority, sentences in phrases["priorities"].items()
    }
    subjects = {team: Cycle(lines, rng) for team, lines in phrases["subjects"].items()}
    references = {
        place: Cycle(sentences, rng) for place, sentences in phrases["references"].items()
    }
    layouts = Cycle(LAYOUTS, rng)
    rows = []
    for team, problem in problems.items():
        for priority, time in times.items():
            for _ in range(rows_per_pair):
                identifier = new_identifier(used, rng)
                sentences = {"problem": problem, "time": time, **references}
                body = " ".join(sentences[part].draw() for part in layouts.draw()).format(
                    id=identifier
                )
                subject = subjects[team].draw()
                ticket = f"Subject: {subject[0].upper()}{subject[1:]}\n{body}"
                answer = answer_line(team, priority, identifier)
                rows.append(
                    {
                        "messages": [
                            {"role": "user", "content": ticket},
                            {"role": "assistant", "content": answer},
                        ]
                    }
                )
    rng.shuffle(rows)
    return rows


def make_tickets(phrases: dict, seed: int) -> dict[str, list[dict]]:
    """All splits by name. Each is drawn from a generator of its own, so that a longer one leaves
    the others as they are."""
    used: set[str] = set()
    return {
        split: make_split(phrases[split], rows_per_pair, used, random.Random(f"{seed} {split}"))
        for split, rows_per_pair in reversed(ROWS_PER_PAIR.items())
    }


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One row a line; an existing file is replaced only by a complete one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main() -> int:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(
        description="Write train.jsonl, validation.jsonl and test.jsonl of the support-ticket data set.",  # noqa: E501
        epilog="Example: python data/make_tickets.py --out /tmp/tickets --seed 11",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder to write to (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=7, help="seed of the random generator (default: %(default)s)"
    )
    args = parser.parse_args()
    splits = make_tickets(json.loads(PHRASES.read_text(encoding="utf-8")), args.seed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for split in ROWS_PER_PAIR:
            write_jsonl(args.out / f"{split}.jsonl", splits[split])
            print(f"{args.out / split}.jsonl: {len(splits[split])} rows")
    except OSError as error:
        print(
            f"make_tickets.py: cannot write to {args.out}: {error.strerror}. Name another folder "
            "with --out.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
