"""What a person watches: a live bar on a terminal, plain lines in a log, nothing on silent ranks.

Everything goes to stderr. What the numbers are is decided by the loop; when they are read and how they look, here.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

Values = Callable[[], Mapping[str, float]]

DRAW_SECONDS = 0.5  # reading the values waits for the device: not more often than this
LINE_SECONDS = (10.0, 30.0)  # lines of a log: one per tenth of an epoch, but in this range of seconds
BAR_CELLS, MIN_BAR_CELLS = 24, 6


class Progress(Protocol):
    """Steps of one epoch after another.

    `values()` gives `loss`, `accuracy` (0-1), `learning_rate` and `images_per_second`; it is called only when
    something is drawn.
    """

    def start(self, epoch: int, epochs: int, total_steps: int, initial_step: int) -> None: ...

    def update(self, step: int, values: Values) -> None: ...

    def finish(self) -> None:
        """Leaves nothing half-drawn; harmless where nothing was started."""
        ...

    def note(self, line: str) -> None:
        """A line that stays."""
        ...


class SilentProgress:
    """For every rank but the main one."""

    def start(self, epoch: int, epochs: int, total_steps: int, initial_step: int) -> None:
        pass

    def update(self, step: int, values: Values) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        pass


class _Epoch:
    """The epoch at hand and its clock."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.label, self.total, self.initial = "", 0, 0
        self.started = self.drawn = clock()
        self.drawn_step = 0

    def start(self, epoch: int, epochs: int, total_steps: int, initial_step: int) -> None:
        self.label = epoch_label(epoch, epochs)
        self.total, self.initial = total_steps, initial_step
        self.started = self.drawn = self.clock()
        self.drawn_step = initial_step

    def is_drawn(self, step: int) -> None:
        self.drawn, self.drawn_step = self.clock(), step

    def figures(self, step: int, values: Values) -> str:
        read = values()
        done = max(step - self.initial, 1)
        left = (self.clock() - self.started) / done * (self.total - step)
        return (
            f"loss {read['loss']:.4f}  accuracy {read['accuracy']:.2%}  lr {read['learning_rate']:.4f}  "
            f"{read['images_per_second']:.0f} images/s  {duration(left)} left"
        )


class BarProgress(_Epoch):
    """One line that is drawn over and over, and taken away when the epoch ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self.visible = False
        self.colour = "NO_COLOR" not in os.environ
        self.full, self.empty = ("━", "─") if "utf" in (stream.encoding or "").lower() else ("#", "-")

    def update(self, step: int, values: Values) -> None:
        if self.visible and self.clock() - self.drawn < DRAW_SECONDS:
            return
        head, tail = f"{self.label} ", f" {step}/{self.total}  {self.figures(step, values)}"
        room = max(self._width() - len(head) - 1, 0)  # a line that wraps cannot be drawn over
        # On a narrow terminal the bar gives way to the figures, down to what can still be read as a bar.
        cells = min(max(room - len(tail), MIN_BAR_CELLS), BAR_CELLS)
        tail = tail[: max(room - cells, 0)]
        filled = cells * step // max(self.total, 1)
        bar, rest = self.full * filled, self.empty * (cells - filled)
        if self.colour:
            bar, rest = f"\x1b[36m{bar}\x1b[0m", f"\x1b[2m{rest}\x1b[0m"
        self.stream.write(f"\r{head}{bar}{rest}{tail}\x1b[K")
        self.stream.flush()
        self.visible = True
        self.is_drawn(step)

    def finish(self) -> None:
        if self.visible:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.visible = False

    def note(self, line: str) -> None:
        self.finish()
        print_line(line, self.stream)

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


class LineProgress(_Epoch):
    """Now and then a whole line, for files that are read later."""

    def update(self, step: int, values: Values) -> None:
        shortest, longest = LINE_SECONDS
        waited = self.clock() - self.drawn
        is_tenth = (step - self.drawn_step) * 10 >= self.total
        if step < self.total and ((is_tenth and waited >= shortest) or waited >= longest):
            self.note(f"{self.label}  step {step}/{self.total}  {self.figures(step, values)}")
            self.is_drawn(step)

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        print_line(line, self.stream)


def print_line(line: str, stream: TextIO) -> None:
    """Where nobody reads the pipe any more, as `tee` after a Ctrl-C, the training goes on all the same."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=stream, flush=True)


def build_progress(enabled: bool) -> Progress:
    if not enabled:
        return SilentProgress()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarProgress(sys.stderr)
    return LineProgress(sys.stderr)


def epoch_label(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"


def epoch_line(record: Mapping[str, Any], *, epochs: int) -> str:
    """The summary of an epoch; `record` is its line of metrics.jsonl."""
    accuracy = f"{record['test_correct']}/{record['test_total']} ({record['test_accuracy']:.2%})"
    return (
        f"{epoch_label(int(record['epoch']), epochs)}  "
        f"train loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.2%}  |  "
        f"{record['split']} loss {record['test_loss']:.4f}  accuracy {accuracy}  |  "
        f"lr {record['learning_rate']:.4f}  |  "
        f"{record['images_per_second']:.0f} images/s  |  {record['seconds']:.1f} s"
    )


def duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
