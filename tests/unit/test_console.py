"""Progress of a run: a bar on a terminal, plain lines in a log, and nothing on ranks other than 0."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from ddp_trainer.tracking.console import BarProgress, LineProgress, Progress, epoch_line
from tests.support.trainer import environment

VALUES = {"loss": 0.8123, "accuracy": 0.7152, "learning_rate": 0.312, "images_per_second": 12345.0}
RECORD = {
    "epoch": 3,
    "split": "test",
    "train_loss": 0.8123,
    "train_accuracy": 0.7152,
    "test_loss": 0.7012,
    "test_accuracy": 0.7712,
    "test_correct": 7712,
    "test_total": 10000,
    "learning_rate": 0.312,
    "images_per_second": 12345.4,
    "seconds": 25.1,
}


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tests independent of the terminal that they are started from."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Reader:
    """Counts how often the values are read. In a real run, each read waits for the device."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, float]:
        self.count += 1
        return VALUES


def test_the_line_of_an_epoch_has_loss_accuracy_and_counts() -> None:
    assert epoch_line(RECORD, epochs=24) == (
        "epoch  3/24  train loss 0.8123  accuracy 71.52%  |  test loss 0.7012  accuracy 7712/10000 (77.12%)  |  "
        "lr 0.3120  |  12345 images/s  |  25.1 s"
    )


def test_the_bar_reads_the_values_at_most_twice_a_second() -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    bar = BarProgress(stream, clock)
    bar.start(1, 2, 1000, 0, lambda step: 2000 - step)
    for step in range(1, 1001):
        clock.now += 0.01
        bar.update(step, reader)
    assert 15 <= reader.count <= 20
    assert "1/1000" in stream.getvalue()
    assert "71.52%" in stream.getvalue()


def test_the_bar_is_removed_before_a_note_and_the_cursor_is_never_hidden() -> None:
    stream = io.StringIO()
    bar = BarProgress(stream, Clock())
    bar.start(1, 2, 10, 0, lambda step: 20 - step)
    bar.update(5, Reader())
    bar.note("kept")
    assert stream.getvalue().endswith("\x1b[1A\x1b[2Kkept\n"), (
        "the line with the bar is not erased before the note is printed"
    )
    assert "\x1b[?25l" not in stream.getvalue(), (
        "the cursor is hidden, and would stay hidden if the process were killed"
    )
    bar.finish()
    assert stream.getvalue().endswith("kept\n"), "something is printed, although no bar was drawn after the note"


def test_each_epoch_gets_a_bar_of_its_own() -> None:
    stream = io.StringIO()
    bar = BarProgress(stream, Clock())
    for epoch in (1, 2):
        bar.start(epoch, 2, 10, 0, lambda step: 20 - step)
        bar.update(5, Reader())
        bar.finish()
    assert [f"epoch {epoch}/2" in stream.getvalue() for epoch in (1, 2)] == [True, True]


@pytest.mark.parametrize("no_color", [True, False])
def test_the_bar_has_no_colors_if_the_variable_no_color_is_set(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    bar = BarProgress(stream, Clock())
    bar.start(1, 2, 10, 0, lambda step: 20 - step)
    bar.update(5, Reader())
    assert bool(re.search(r"\x1b\[\d+m", stream.getvalue())) != no_color


def test_a_log_gets_about_ten_lines_per_epoch() -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(3, 24, 100, 0, lambda step: 2200 - step)
    for step in range(1, 101):
        clock.now += 2.0
        lines.update(step, reader)
    printed = stream.getvalue().splitlines()
    assert len(printed) == reader.count == 9
    assert printed[0] == (
        "epoch  3/24  step 10/100  loss 0.8123  accuracy 71.52%  lr 0.3120  12345 images/s  1:13:00 left"
    )


@pytest.mark.parametrize(("seconds_per_step", "expected"), [(0.01, 0), (15.0, 49)])
def test_a_log_gets_no_lines_in_a_fast_epoch_and_a_line_every_30_s_in_a_slow_epoch(
    seconds_per_step: float, expected: int
) -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(1, 2, 100, 0, lambda step: 200 - step)
    for step in range(1, 101):
        clock.now += seconds_per_step
        lines.update(step, reader)
    assert reader.count == expected


def test_the_remaining_time_of_a_resumed_epoch_is_estimated_from_its_new_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    clock, stream = Clock(), io.StringIO()
    bar = BarProgress(stream, clock)
    bar.start(1, 2, 100, 90, lambda step: 200 - step)
    clock.now = 5.0
    bar.update(95, Reader())
    assert "0:01:45 left" in stream.getvalue()


def test_the_remaining_time_is_right_when_steps_become_slower_within_an_epoch() -> None:
    """Ten steps take a second each, and ten more take four seconds each."""
    clock, stream = Clock(), io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(1, 1, 20, 0, lambda step: max(10 - step, 0) + 4 * min(20 - step, 10))
    for step in range(1, 20):
        clock.now += 1 if step <= 10 else 4
        lines.update(step, Reader())
    shown = re.findall(r"step (\d+)/20 .* (\S+) left", stream.getvalue())
    assert shown[-1] == ("19", "0:00:04")
    assert ("10", "0:00:40") in shown


def test_the_base_class_of_progress_reads_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress, reader = Progress(), Reader()
    progress.start(1, 2, 10, 0, lambda step: 20 - step)
    progress.update(1, reader)
    progress.note("a line")
    progress.finish()
    assert (reader.count, capfd.readouterr()) == (0, ("", ""))


DRAW = """
from ddp_trainer.tracking.console import build_progress
progress = build_progress()
progress.start(1, 2, 10, 0, lambda step: 20 - step)
progress.update(5, lambda: {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 100.0})
progress.finish()
progress.note("the end")
"""


@pytest.mark.parametrize(
    ("columns", "encoding", "bar"),
    [(120, "utf-8", "━" * 12), (60, "utf-8", "━━━"), (60, "ascii", "---"), (20, "ascii", "---")],
)
def test_a_terminal_gets_a_bar_that_fits_it(columns: int, encoding: str, bar: str) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = environment(NO_COLOR="1", TERM="xterm", PYTHONIOENCODING=encoding)
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": terminal}
    subprocess.run([sys.executable, "-c", DRAW], **streams, env=env, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(main, 10000).decode()
    os.close(main)
    drawn = shown.split("\r")[0]
    assert drawn.startswith(f"epoch 1/2 {bar} ")
    assert len(drawn) <= columns
    assert ("0:00:00 left" in drawn) == (columns == 120)
    assert shown.endswith("the end\r\n")


def test_a_pipe_gets_lines_without_control_characters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, text=True, env=environment(), check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("", "the end\n")
