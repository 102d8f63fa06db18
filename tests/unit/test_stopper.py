"""Signals stop `python -m data_prep`, and a program that calls its `main` keeps its own signal handlers."""

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.signals import SIGNALS, Stopper

HANDLERS = (signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Within a test, no signal is ignored, as in a terminal."""
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, HANDLERS, strict=True)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_after_a_signal_main_restores_the_handlers(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_dataset(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("data_prep.__main__.write_dataset", write_dataset)
    words, hook = ["--source", "synthetic", "--out", str(tmp_path / "out")], sys.excepthook
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            main(words)
    else:
        assert main(words) == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}: incomplete files were removed\n"
    assert (handlers(), sys.excepthook) == ([*HANDLERS], hook)


def test_without_a_signal_main_restores_the_handlers_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--color", "red"]) == 2
    assert handlers() == [*HANDLERS]


def test_main_works_in_a_thread_and_changes_no_handler_there(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(main(["--color", "red"])))
    thread.start()
    thread.join()
    assert found == [2]
    assert handlers() == [*HANDLERS]


def test_ignored_signals_stay_ignored_except_for_sigterm() -> None:
    """A script's background job ignores SIGINT, and a command under nohup ignores SIGHUP."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with Stopper() as stopper:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert stopper.number == 0
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    assert handlers() == [signal.SIG_IGN] * 3
