"""Counts how often each fault was injected and how often the result was wrong, and formats the counts as a table."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """One row of the table: the counts for one kind of fault."""

    fault: str
    promise: str  # what must happen after the fault
    tried: int = 0
    losses: list[str] = field(default_factory=list)  # descriptions of the cases in which the promise was broken
    notes: dict[str, int] = field(default_factory=dict)  # what else was observed -> how often
    worst_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def count(self, good: bool, story: str) -> None:
        """Counts one injected fault; keeps its `story` unless the result was `good`."""
        self.tried += 1
        self.seconds = time.monotonic() - self.started
        if not good:
            self.losses.append(story)
            print(f"LOST: {self.fault}: {story}", file=sys.stderr, flush=True)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def took(self, seconds: float) -> None:
        self.worst_seconds = max(self.worst_seconds, seconds)

    def row(self) -> str:
        notes = ", ".join(f"{count} {what}" for what, count in sorted(self.notes.items()))
        if self.worst_seconds:
            notes += f"{'; ' if notes else ''}slowest {self.worst_seconds:.0f} s"
        return f"| {self.fault} | {self.promise} | {self.tried} | {len(self.losses)} | {notes} |"


def table(outcomes: list[Outcome]) -> str:
    head = "| fault | what must happen | tried | lost | details |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *(outcome.row() for outcome in outcomes)])


def write_outcomes(path: Path, outcomes: list[Outcome], *, device: str, seed: int) -> None:
    """Writes the table as JSON, with date, hardware and versions. `device`: cpu or cuda."""
    from benchmarks.results import write_result

    rows = [
        {
            "fault": one.fault,
            "promise": one.promise,
            "tried": one.tried,
            "lost": len(one.losses),
            "of which": one.notes,
            "slowest_seconds": round(one.worst_seconds, 1),
            "seconds": round(one.seconds),
        }
        for one in outcomes
    ]
    figures = {"tried": sum(one.tried for one in outcomes), "lost": sum(len(one.losses) for one in outcomes)}
    write_result(path, figures, device=device, seed=seed, rows=rows)
