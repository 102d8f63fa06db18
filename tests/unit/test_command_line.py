"""An invalid command line is explained in one line, and a command does not fail if its output cannot be written."""

import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from data_prep.errors import InputError, printable
from ddp_trainer import sweep
from ddp_trainer.command_line import FREE_MEMORY, SMALLER_STEPS, parse_command_line, run_command
from ddp_trainer.config import DEFAULT_WIDTHS, TrainConfig
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.recipes import RECIPES
from tests.support.trainer import REPOSITORY, environment


def parse(*arguments: str) -> TrainConfig:
    return parse_command_line(arguments, prog="train", description="")


def test_threads_that_parse_at_the_same_time_leave_stderr_unchanged() -> None:
    before = sys.stderr
    with ThreadPoolExecutor(4) as pool:
        assert len({config.optim.peak_lr for config in pool.map(lambda _: parse("--peak-lr", "0.3"), range(40))}) == 1
    assert sys.stderr is before


def test_an_error_message_is_the_same_if_stdout_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """tyro, which parses the command line, frames the message with hyphens if stdout is not UTF-8."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(InputError, match=r"^Unrecognized options: --peak-rl; did you mean --peak-lr\? \(--help"):
        parse("--peak-rl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peak-rl", "1"), "Unrecognized options: --peak-rl, 1; did you mean --peak-lr? (--help lists the flags)"),
        (("--qqq",), "Unrecognized options: --qqq (--help lists the flags)"),
        (
            ("--peak-lr", "high"),
            "Error parsing --peak-lr: could not convert string to float: 'high' (--help lists the flags)",
        ),
        (
            ("--optimizer", "adam"),
            "invalid choice 'adam' for argument '--optimizer'. Expected one of ('sgd', 'adamw', 'muon') "
            "(--help lists the flags)",
        ),
        (("--peak-lr",), "Missing value for argument '--peak-lr'. Expected 1 values (--help lists the flags)"),
        (("--peak-lr", "-1"), "--peak-lr must be positive, got -1.0"),
        (("basline",), f"unknown recipe 'basline'; choose from {', '.join(RECIPES)}"),
    ],
)
def test_an_invalid_command_line_is_explained_in_one_line(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("flag", [("--network", "torchvision:resnet18"), ("--network=torchvision:resnet18",)])
def test_another_network_does_not_inherit_the_widths_or_late_freezing_of_the_recipe(flag: tuple[str, ...]) -> None:
    recipe, other = RECIPES["fast"], parse("fast", *flag)
    assert recipe.network.widths != DEFAULT_WIDTHS and recipe.schedule.freeze_late
    assert (other.network.widths, other.schedule.freeze_late) == (DEFAULT_WIDTHS, "")
    assert other.optim == recipe.optim
    assert parse("fast", *flag, "--freeze-late", "layer1.*").schedule.freeze_late == "layer1.*"
    assert parse("fast", "--network", "custom_resnet") == recipe
    with pytest.raises(InputError, match="--widths is for --network custom_resnet"):
        parse("fast", *flag, "--widths", "8", "8", "8", "8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sync_bn=True",), "--sync_bn takes no value, got --sync_bn=True; write --sync-bn"),
        (("--sync-bn", "true"), "--sync-bn takes no value, got --sync-bn true; write --sync-bn"),
        (("--sync-bn=0",), "--sync-bn takes no value, got --sync-bn=0; write --no-sync-bn"),
        (("--no-compile=true",), "--no-compile takes no value, got --no-compile=true; write --no-compile"),
        (("--no-compile", "False"), "--no-compile takes no value, got --no-compile False; write --compile"),
    ],
)
def test_the_error_for_a_switch_with_a_value_shows_the_right_flag(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert str(error.value) == message


def test_switches_accept_dashes_and_underscores() -> None:
    runtime = parse("--sync_bn", "--no-channels-last", "--peak-lr=0.1").runtime
    assert (runtime.sync_bn, runtime.channels_last) == (True, False)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_status_is_what_the_work_returns(result: int | None, status: int) -> None:
    assert run_command(lambda: result) == status


def test_ctrl_c_ends_a_command_by_sigint_and_without_a_traceback() -> None:
    code = """
import time
from ddp_trainer.command_line import run_command
run_command(lambda: [print("started", flush=True), time.sleep(60)])
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b""
    assert process.returncode == -signal.SIGINT


def test_an_input_error_is_printed_as_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise InputError("two\nlines, a \x1b[31mcolor and a byte \udce9")

    assert run_command(work) == 2
    assert capsys.readouterr().err == "error: two\\nlines, a \\x1b[31mcolor and a byte \\udce9\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()])
@pytest.mark.parametrize("fix", [FREE_MEMORY, SMALLER_STEPS])
def test_a_lack_of_memory_is_reported_in_one_line(
    error: Exception, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert run_command(work, memory_fix=fix) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory (")
    assert line.endswith(f"); {fix}")


def test_library_that_cannot_be_mapped_is_reported_as_a_lack_of_memory_if_memory_is_limited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise ImportError("lib.so: failed to map segment from shared object")

    with pytest.raises(ImportError):
        run_command(work)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, 2**30))
    assert run_command(work) == 1
    assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(("launched", "is_printed"), [(False, True), (True, False)])
def test_only_a_command_launched_in_several_processes_leaves_errors_to_the_first_process(
    launched: bool, is_printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in Launch(rank=1, local_rank=1, world_size=2, local_world_size=2).variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29999")

    def work() -> None:
        raise InputError("wrong")

    assert run_command(work, launched=launched) == 2
    assert (capsys.readouterr().err == "error: wrong\n") == is_printed


def test_a_launched_command_prints_the_traceback_of_an_unexpected_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: 1 // 0, launched=True) == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def test_printable_keeps_letters_of_every_script_and_escapes_control_characters() -> None:
    assert printable("café 猫 🐈") == "café 猫 🐈"
    assert printable("tab\t, line\u2028 and right-to-left \u202e") == "tab\\t, line\\u2028 and right-to-left \\u202e"


PRINTS = """
import sys
from ddp_trainer.command_line import require_output, run_command
def work():
    for _ in range(10_000):
        print("é" * 20)
    print("done", file=sys.stderr)
    require_output()
    return 3
sys.exit(run_command(work))
"""


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">/dev/full", 1, "done\nerror: cannot write the output: No space left on device\n"),
        ("| head -1", 3, "done\n"),
        (">&-", 3, "done\n"),
        (">/dev/null", 3, "done\n"),
    ],
)
def test_a_command_whose_result_is_its_output_fails_if_the_disk_is_full(
    redirection: str, status: int, message: str
) -> None:
    """A reader that closes the pipe early is not an error, and neither is a stdout that is closed from the start."""
    command = f'set -o pipefail; "$PYTHON" -c "$PROGRAM" {redirection}'
    found = environment(PYTHON=sys.executable, PROGRAM=PRINTS)
    done = subprocess.run(
        ["bash", "-c", command], env=found, cwd=REPOSITORY, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (status, message)


def test_help_printed_to_a_closed_pipe_does_not_fail() -> None:
    command = f"set -o pipefail; {sys.executable} -m ddp_trainer.train --help | true"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), cwd=REPOSITORY, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (os.EX_OK, "")


def test_help_works_without_docstrings() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "ddp_trainer.train", "--help"],
        env=environment(),
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "baseline" in done.stdout


def test_a_sweep_that_was_started_as_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert sweep.main(["smoke", "--out", str(tmp_path / "sweep")]) == 2
    assert "the sweep itself must be a single process" in capsys.readouterr().err
