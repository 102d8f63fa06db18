"""Shows the progress of a run: a live bar on a terminal, or plain lines in a log. Only the main rank shows anything.

All output goes to stderr. The training loop provides the figures. This file decides when to read them and how to
show them.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich import progress as rich_progress
from rich.console import Console

Values = Callable[[], Mapping[str, float]]
WorkLeft = Callable[[int], float]  # from the step within the epoch to the work until the end of the run, in any unit

DRAW_SECONDS = 0.5  # minimum time between two updates of the bar; each update waits for the device
# Shortest and longest time between log lines. Between these limits, log lines are a tenth of an epoch apart.
LINE_SECONDS = (10.0, 30.0)
BAR_CELLS, MIN_BAR_CELLS = 24, 6


class Progress:
    """What the training loop calls to show the progress within the current epoch. This class shows nothing."""

    def start(self, epoch: int, epochs: int, total_steps: int, initial_step: int, work_left: WorkLeft) -> None:
        """Called before the first step of an epoch. If the epoch is resumed, `initial_step` of `total_steps` are done.

        The remaining time is estimated from `work_left`.
        """

    def update(self, step: int, values: Values) -> None:
        """Called after each step.

        `values()` gives `loss`, `accuracy` (0-1), `learning_rate` and `images_per_second`; it is called only when
        something is drawn.
        """

    def finish(self) -> None:
        """Removes the bar, if there is one."""

    def note(self, line: str) -> None:
        """Prints a line that stays on the screen."""


class _Epoch(Progress):
    """The current epoch, its clock and its figures as text."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.label, self.total, self.initial = "", 0, 0
        self.work_left: WorkLeft = lambda step: 0
        self.started = self.drawn = clock()
        self.drawn_step = 0

    def start(self, epoch: int, epochs: int, total_steps: int, initial_step: int, work_left: WorkLeft) -> None:
        self.label = epoch_label(epoch, epochs)
        self.total, self.initial, self.work_left = total_steps, initial_step, work_left
        self.started = self.drawn = self.clock()
        self.drawn_step = initial_step

    def note(self, line: str) -> None:
        self.finish()
        print_line(line, self.stream)

    def was_drawn(self, step: int) -> None:
        self.drawn, self.drawn_step = self.clock(), step

    def figures(self, step: int, values: Values) -> str:
        read, still = values(), self.work_left(step)
        done = self.work_left(self.initial) - still
        # Until the end of the run, without the time of evaluations.
        left = (self.clock() - self.started) * still / done if done else 0.0
        return (
            f"loss {read['loss']:.4f}  accuracy {read['accuracy']:.2%}  lr {read['learning_rate']:.4f}  "
            f"{read['images_per_second']:.0f} images/s  {timedelta(seconds=round(left))} left"
        )


class BarProgress(_Epoch):
    """A bar followed by figures, drawn by rich and removed when the epoch ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self.console = _CursorStays(file=stream, force_terminal=True)
        self.column = rich_progress.BarColumn(complete_style="cyan", finished_style="cyan")
        self.bar: rich_progress.Progress | None = None

    def update(self, step: int, values: Values) -> None:
        if self.bar is not None and self.clock() - self.drawn < DRAW_SECONDS:
            return
        figures = self._fitted(f"{step}/{self.total}  {self.figures(step, values)}")
        if self.bar is None:
            self.bar = self._build_bar()
            self.bar.add_task(self.label, total=self.total, completed=step, figures=figures)
            self.bar.start()
        else:
            self.bar.update(self.bar.task_ids[0], completed=step, figures=figures, refresh=True)
        self.was_drawn(step)

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _fitted(self, figures: str) -> str:
        """Shortens the bar to make room for `figures`, and returns as much of `figures` as fits beside it."""
        room = self.console.width - len(self.label) - 2
        self.column.bar_width = min(max(room - len(figures), MIN_BAR_CELLS), BAR_CELLS)
        return figures[: max(room - self.column.bar_width, 0)]

    def _build_bar(self) -> rich_progress.Progress:
        return rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            self.column,
            rich_progress.TextColumn("{task.fields[figures]}", markup=False, style=""),
            console=self.console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )


class _CursorStays(Console):
    """A console that does not hide the cursor while rich draws, because a killed process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class LineProgress(_Epoch):
    """Prints a line now and then, for logs that are read later."""

    def update(self, step: int, values: Values) -> None:
        shortest, longest = LINE_SECONDS
        waited = self.clock() - self.drawn
        is_tenth = (step - self.drawn_step) * 10 >= self.total
        if step < self.total and ((is_tenth and waited >= shortest) or waited >= longest):
            self.note(f"{self.label}  step {step}/{self.total}  {self.figures(step, values)}")
            self.was_drawn(step)


def print_line(line: str, stream: TextIO) -> None:
    print(line, file=stream, flush=True)


def build_progress() -> Progress:
    isatty = getattr(sys.stderr, "isatty", bool)  # a script may have replaced stderr with an object that only writes
    if isatty() and os.environ.get("TERM") != "dumb":
        return BarProgress(sys.stderr)
    return LineProgress(sys.stderr)


def epoch_label(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"


def epoch_line(record: Mapping[str, Any], *, epochs: int) -> str:
    """A line that summarizes an epoch. `record`: the epoch's record in metrics.jsonl."""
    accuracy = f"{record['test_correct']}/{record['test_total']} ({record['test_accuracy']:.2%})"
    return (
        f"{epoch_label(int(record['epoch']), epochs)}  "
        f"train loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.2%}  |  "
        f"{record['split']} loss {record['test_loss']:.4f}  accuracy {accuracy}  |  "
        f"lr {record['learning_rate']:.4f}  |  "
        f"{record['images_per_second']:.0f} images/s  |  {record['seconds']:.1f} s"
    )
