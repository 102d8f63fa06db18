"""What a person sees of a training: on a terminal, in a log, on silent ranks."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from ddp_trainer.tracking.console import BarProgress, LineProgress, SilentProgress, build_progress, duration, epoch_line
from tests.support.trainer import environment

VALUES = {"loss": 0.8123, "accuracy": 0.7152, "learning_rate": 0.312, "images_per_second": 12345.0}
RECORD = {
    "epoch": 3,
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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Reader:
    """Counts how often the values are read, since each time waits for the device."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, float]:
        self.count += 1
        return VALUES


def test_the_line_of_an_epoch_has_loss_accuracy_and_counts() -> None:
    assert epoch_line(RECORD, epochs=24, split="test") == (
        "epoch  3/24  train loss 0.8123  accuracy 71.52%  |  test loss 0.7012  accuracy 7712/10000 (77.12%)  |  "
        "lr 0.3120  |  12345 images/s  |  25.1 s"
    )


def test_the_bar_reads_the_values_at_most_twice_a_second() -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    bar = BarProgress(stream, clock)
    bar.start(1, 2, 1000, 0)
    for step in range(1, 1001):
        clock.now += 0.01
        bar.update(step, reader)
    assert 15 <= reader.count <= 20
    assert "1/1000" in stream.getvalue()
    assert "71.52%" in stream.getvalue()


def test_the_bar_is_gone_after_the_epoch_and_before_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    bar = BarProgress(stream, Clock())
    bar.start(1, 2, 10, 0)
    bar.update(5, Reader())
    bar.note("kept")
    assert stream.getvalue().endswith("\r\x1b[Kkept\n")
    bar.finish()
    assert stream.getvalue().endswith("kept\n"), "nothing was drawn, so there is nothing to take away"


@pytest.mark.parametrize("no_colour", [True, False])
def test_colour_is_left_out_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, no_colour: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    bar = BarProgress(stream, Clock())
    bar.start(1, 2, 10, 0)
    bar.update(5, Reader())
    assert bool(re.search(r"\x1b\[\d+m", stream.getvalue())) != no_colour


def test_a_log_gets_about_ten_lines_of_a_long_epoch() -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(3, 24, 100, 0)
    for step in range(1, 101):
        clock.now += 2.0
        lines.update(step, reader)
    said = stream.getvalue().splitlines()
    assert len(said) == reader.count == 9
    assert said[0] == ("epoch  3/24  step 10/100  loss 0.8123  accuracy 71.52%  lr 0.3120  12345 images/s  3:00 left")


@pytest.mark.parametrize(("seconds_per_step", "expected"), [(0.01, 0), (15.0, 49)])
def test_a_log_is_silent_in_a_short_epoch_and_never_for_long(seconds_per_step: float, expected: int) -> None:
    clock, reader, stream = Clock(), Reader(), io.StringIO()
    lines = LineProgress(stream, clock)
    lines.start(1, 2, 100, 0)
    for step in range(1, 101):
        clock.now += seconds_per_step
        lines.update(step, reader)
    assert reader.count == expected


def test_the_time_left_counts_from_where_a_resumed_epoch_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BarProgress, "_width", lambda self: 120)
    clock, stream = Clock(), io.StringIO()
    bar = BarProgress(stream, clock)
    bar.start(1, 2, 100, 90)
    clock.now = 5.0
    bar.update(95, Reader())
    assert "0:05 left" in stream.getvalue()


def test_silent_ranks_read_and_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress, reader = build_progress(enabled=False), Reader()
    assert isinstance(progress, SilentProgress)
    progress.start(1, 2, 10, 0)
    progress.update(1, reader)
    progress.note("a line")
    progress.finish()
    assert (reader.count, capfd.readouterr()) == (0, ("", ""))


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 75, 3675)] == ["0:00", "1:15", "1:01:15"]


DRAW = """
from ddp_trainer.tracking.console import build_progress
progress = build_progress(enabled=True)
progress.start(1, 2, 10, 0)
progress.update(5, lambda: {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 100.0})
progress.finish()
progress.note("the end")
"""


def test_a_terminal_gets_a_bar_that_fits_it() -> None:
    main, terminal = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = environment(NO_COLOR="1", TERM="xterm", PYTHONIOENCODING="utf-8")
    subprocess.run([sys.executable, "-c", DRAW], stderr=terminal, env=env, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(main, 10000).decode()
    os.close(main)
    bar = next(part for part in shown.split("\r") if "5/10" in part).replace("\x1b[K", "")
    assert "━" in bar
    assert len(bar) < 60
    assert shown.endswith("the end\r\n")


def test_a_pipe_gets_lines_without_control_characters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, text=True, env=environment(), check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("", "the end\n")
