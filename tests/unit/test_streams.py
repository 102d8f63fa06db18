"""A command whose output cannot be written still does its work and exits with the usual status."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer import environment

# Prints to stdout and stderr, and then writes its result: a file that contains "done".
COMMAND = """
import faulthandler, sys
from pathlib import Path
from data_prep.streams import forgiving_output

@forgiving_output()
def main():
    faulthandler.enable()
    for _ in range(3):
        print("stdout: na\\xefve " + "x" * 100_000)
        print("stderr: na\\xefve", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("done")
    return 0

sys.exit(main())
"""


def run(tmp_path: Path, redirection: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    command = [
        "bash",
        "-c",
        f'exec "$@" {redirection}',
        "bash",
        sys.executable,
        "-c",
        COMMAND,
        str(tmp_path / "result"),
    ]
    return subprocess.run(command, env=environment(PYTHONIOENCODING="ascii"), timeout=60, **streams)


@pytest.mark.parametrize(
    "redirection",
    [
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "> >(true)",
        "2> >(true)",
    ],
)
def test_output_that_cannot_be_written_changes_neither_work_nor_exit_status(tmp_path: Path, redirection: str) -> None:
    finished = run(tmp_path, redirection, capture_output=True)
    assert (finished.returncode, (tmp_path / "result").read_text()) == (0, "done")
    assert b"Traceback" not in finished.stderr
    assert b"Exception ignored" not in finished.stderr


def test_a_closed_terminal_changes_neither_work_nor_exit_status(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    os.close(main)
    finished = run(tmp_path, "", stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert (finished.returncode, (tmp_path / "result").read_text()) == (0, "done")


def test_output_to_a_full_non_blocking_pipe_is_complete(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command, found = [sys.executable, "-c", COMMAND, str(tmp_path / "result")], environment(PYTHONIOENCODING="utf-8")
    with subprocess.Popen(command, env=found, stdout=writer, stderr=subprocess.DEVNULL) as process:
        os.close(writer)
        with os.fdopen(reader) as output:
            assert output.read().count("x") == 300_000
    assert process.returncode == 0


def test_progress_bars_raise_no_error_when_their_terminal_is_closed() -> None:
    code = (
        "import os, pty; from data_prep.bars import Bars; from data_prep.streams import forgiving_output\n"
        "main, terminal = pty.openpty(); os.dup2(terminal, 1); os.dup2(terminal, 2)\n"
        "with forgiving_output(), Bars() as bars:\n"
        "    bars.update('reading', 1, 2)\n"
        "    os.close(main)\n"
        "    print('a note')\n"
        "    bars.update('reading', 2, 2)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)


def test_progress_bars_leave_lines_whole_so_that_paths_can_be_copied() -> None:
    line = f"duplicates: '{'/tmp/a folder/:smile:  [red]x[/red] 640x480' * 5}.txt'"
    code = (
        "import sys; from data_prep.bars import Bars; from data_prep.streams import forgiving_output\n"
        "with forgiving_output(), Bars() as bars:\n"
        "    bars.update('reading the training images', 1, 2)\n"
        "    print(sys.argv[1])\n"
        "    bars.update('reading the training images', 2, 2)\n"
    )
    main, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="60")
    with subprocess.Popen([sys.executable, "-c", code, line], env=env, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        printed = b""
        with contextlib.suppress(OSError):  # EIO: the process has closed the terminal
            while part := os.read(main, 65536):
                printed += part
    os.close(main)
    assert process.returncode == 0
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed.decode()).replace("\r", "\n").split("\n")
    assert line in lines
    assert any("reading" in each for each in lines)
    assert max(len(each) for each in lines if each != line) <= 60, "a bar is wider than the terminal"


def test_characters_that_the_encoding_lacks_are_written_as_escapes(tmp_path: Path) -> None:
    finished = run(tmp_path, "", capture_output=True)
    assert finished.stdout.startswith(b"stdout: na\\xefve x")
    assert finished.stderr == b"stderr: na\\xefve\n" * 3


def test_a_file_name_that_is_not_utf_8_is_printed_as_its_bytes() -> None:
    code = "from data_prep.streams import forgiving_output\nwith forgiving_output(): print('caf\\udce9.png')"
    finished = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=60)
    assert finished.stdout == b"caf\xe9.png\n"


def test_an_object_that_can_only_write_is_left_unchanged() -> None:
    code = (
        "import io, sys; from data_prep.streams import forgiving_output\n"
        "class Log:\n"
        "    def write(self, text): pass\n"
        "    def flush(self): pass\n"
        "sys.stdout = sys.stderr = log = Log()\n"
        "from ddp_trainer.tracking.console import build_progress\n"
        "with forgiving_output():\n"
        "    build_progress().note('a line')\n"
        "    assert sys.stdout is sys.stderr is log\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)


def test_the_streams_are_restored() -> None:
    code = (
        "import sys; from data_prep.streams import forgiving_output\n"
        "before = sys.stdout, sys.stderr\n"
        "with forgiving_output():\n"
        "    assert sys.stdout is not before[0] and sys.stderr is not before[1]\n"
        "    inside = sys.stdout\n"
        "    with forgiving_output(): assert sys.stdout is inside\n"
        "assert (sys.stdout, sys.stderr) == before"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)
