"""Sweeps: the list of runs, the table of results, and continuing a stopped sweep."""

import errno
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from data_prep.files import read_json
from ddp_trainer.distributed.signals import handle_signals
from ddp_trainer.report.wording import NOTHING
from ddp_trainer.run.lock import wait_until_unlocked
from ddp_trainer.run.sweep_runs import PlannedRun, Runner
from ddp_trainer.sweep import main, parse
from tests.support.trainer import OF_SMOKE_RUN, SEVERAL, run, start


def test_every_combination_of_settings_is_planned_with_every_seed(tiny_dir: Path) -> None:
    settings = ("--set", "peak-lr=0.2,0.3", "--set", "freeze-bn-scale=true,false")
    sweep = parse(["smoke", "--data-dir", str(tiny_dir), "--seeds", "2", *settings])
    assert [run.out.name for run in sweep.runs] == [
        f"peak-lr={rate},freeze-bn-scale={frozen},seed={seed}"
        for rate in ("0.2", "0.3")
        for frozen in ("true", "false")
        for seed in (0, 1)
    ]
    last = sweep.runs[-1]
    words = ["smoke", "--data-dir", str(tiny_dir), "--peak-lr", "0.3", "--no-freeze-bn-scale", "--seed", "1"]
    assert last.arguments == words
    assert last.out == Path("runs/sweep-smoke/peak-lr=0.3,freeze-bn-scale=false,seed=1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fest"], "unknown recipe 'fest'"),
        (["smoke", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["smoke", "--seeds", "few"], "invalid int value: 'few'"),
        (["smoke", "--set", "peak-lr"], "--set must have the form FLAG=V1,V2, got peak-lr"),
        (["smoke", "--set", "peak-lr=0.1,-1"], "--peak-lr must be positive, got -1.0"),
        (["smoke", "--set", "peak-rl=0.1"], "peak-rl"),
        (["smoke", "--seed=3"], "--seed is set for each run by the sweep"),
        (["smoke", "--set", "small-crops=16:0.3,24:0.7"], "--set small-crops cannot have several values"),
        (["smoke", "--set", "seed=1,2"], "--seed is set for each run by the sweep"),
        (["smoke", "--set", "out=a,b"], "--out is set for each run by the sweep"),
        (
            ["smoke", "--set", "peak-lr=1,2", "--set", "peak_lr=3"],
            "--set peak-lr=... is given twice; give all values at once",
        ),
        (
            ["smoke", "--set", "batch-size=32,1000"],
            "--batch-size must be at most the number of training images, 96, got 1000",
        ),
        (["smoke", "--data-dir", "nowhere"], "nowhere"),
        (["smoke", "--launcher", "acelerate launch -m"], "--launcher acelerate launch -m: no such program"),
        (["smoke", "--launcher", "'"], "--launcher ': No closing quotation"),
        (["smoke", "--launcher", "cat /bin/true"], "does not start a process: "),
        (["smoke", "--launcher", "false"], "--launcher false does not start a process: exit status 1"),
        (["smoke", "--launcher", f"{sys.executable} -X nonsense -Q"], "does not start a process: "),
        (["smoke", "--list", "--table"], "--table: not allowed with argument --list"),
        (["smoke", "--list", "--freeze", "two\nlines"], "'two\\nlines' has a line break"),
        (["smoke", "--out", "two\nlines"], "--out must have no line breaks or other unprintable characters"),
        (["smoke", "--out", ""], "--out must not be empty"),
        (["smoke", "--set", "init-from=x/a,x_a"], "two values give the same folder name, init-from=x_a,seed=0"),
        (["smoke", "--set", f"init-from={'x' * 300}"], "has 317 bytes, but the limit is 255"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_is_trained(
    arguments: list[str], message: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = () if "--data-dir" in arguments else ("--data-dir", str(tiny_dir))
    assert main([arguments[0], *data, "--out", str(tmp_path / "sweep"), *arguments[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "sweep").exists()


def test_a_launcher_that_the_system_cannot_execute_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text("exit 0\n")  # a script without #!
    launcher.chmod(0o755)
    words = ("smoke", "--data-dir", str(tiny_dir), "--out", str(tmp_path / "x"), "--launcher", str(launcher))
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: --launcher {launcher} cannot be started: Exec format error\n"


def test_a_folder_that_cannot_be_read_is_refused(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", refuse)  # root may read any folder
    assert main(["smoke", "--data-dir", str(tiny_dir), "--out", str(tmp_path), "--list"]) == 2
    line = f"error: {tmp_path}/seed=0 cannot be read (Permission denied); choose another --out\n"
    assert capsys.readouterr().err == line


def test_runs_are_checked_with_the_number_of_processes_that_the_launcher_starts(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = f"{sys.executable} -m accelerate.commands.launch {' '.join(SEVERAL)} --num_processes 3 -m"
    words = ["smoke", "--batch-size", "2", "--data-dir", str(tiny_dir), "--out", str(tmp_path / "x")]
    assert main([*words, "--launcher", launcher]) == 2
    assert "--batch-size must be at least 3 for 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_listing_runs_trains_nothing(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["smoke", "--data-dir", str(tiny_dir), "--out", str(tmp_path / "a sweep"), "--seeds", "1"]
    assert main([*words, "--set", "sync-bn=true,false", "--list"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    common = ["smoke", "--data-dir", str(tiny_dir)]
    assert lines == [
        [*common, flag, "--seed", "0", "--out", str(tmp_path / "a sweep" / f"sync-bn={value},seed=0")]
        for flag, value in (("--sync-bn", "true"), ("--no-sync-bn", "false"))
    ]
    assert not (tmp_path / "a sweep").exists()


@pytest.mark.parametrize("action", ["--list", "--table"])
def test_a_full_disk_is_reported_in_one_line(
    action: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["smoke", "--data-dir", str(tiny_dir), "--out", str(tmp_path / "sweep"), action]) == 1
    assert capsys.readouterr().err == "error: cannot write the output: No space left on device\n"


def test_a_stopped_sweep_continues_and_ends_with_its_table(tiny_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C stops the first call. In the second call, seed=1 fails because its folder cannot be created."""
    small = ("--device", "cpu", "--batch-size", "8", "--widths", *"8888", "--data-dir", tiny_dir)
    sweep = ("smoke", "--seeds", "2", *small, "--max-steps", "3", "--out", tmp_path)
    (tmp_path / "seed=1").write_text("in the way")
    process = start("ddp_trainer.sweep", *sweep)
    first = tmp_path / "seed=0"
    while not (first / "status.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 0, printed
    assert printed.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "[2/2]" not in printed
    assert (read_json(first / "status.json") or {})["state"] in ("preempted", "done")

    finished = run("ddp_trainer.sweep", *sweep)
    assert finished.returncode == 1
    assert "error: seed=1 failed; continuing with the next run" in finished.stderr
    found = read_json(first / "summary.json") or {}
    table = finished.stdout.splitlines()
    assert table == (tmp_path / "table.md").read_text().splitlines()
    assert table[2].startswith(f"| same for all | 1 | {found['test_accuracy']:.2%} | {NOTHING} | ")
    assert table[-1] == "Not finished, so not in the table: seed=1."

    shown = run("ddp_trainer.sweep", *sweep, "--table")
    assert (shown.returncode, shown.stdout.splitlines(), shown.stderr) == (0, table, "")

    again = run("ddp_trainer.sweep", *sweep)
    assert "[1/2]" not in again.stderr, "a finished run was trained again"
    # As if the run had been killed after it wrote its summary.
    (first / "status.json").write_text('{"state": "running"}')
    shutil.rmtree(first / "report")
    again = run("ddp_trainer.sweep", *sweep)
    assert f"{first} is finished already" in again.stderr
    assert (first / "report" / "index.html").exists()
    other = run("ddp_trainer.sweep", *sweep[:-4], "--max-steps", "2", "--out", tmp_path)
    assert other.returncode == 2
    assert "was trained with max_steps 3, not 2; choose another folder with --out" in other.stderr


# A launcher that ends at the first signal, like `accelerate launch` with one process. Its worker has locked the run
# directory and needs a moment to save. Meanwhile, the worker sends two signals to the sweep.
LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from ddp_trainer.run.lock import lock_folder
sweep, launcher, out = os.getppid(), os.getpid(), Path(sys.argv[-2])
with lock_folder(out):
    if os.fork() == 0:
        os.kill(sweep, signal.SIGTERM)
        while os.getppid() == launcher:
            time.sleep(0.01)
        time.sleep(1)
        os.kill(sweep, signal.SIGTERM)
        time.sleep(1)
        (out / "saved").touch()
        os._exit(0)
    signal.pause()
"""


def test_a_stopped_sweep_waits_for_a_worker_that_outlives_its_launcher_until_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handle_signals(lambda *_: None):
        runner = Runner([sys.executable, "-c", LAUNCHER])
        runner.train(PlannedRun([], tmp_path / "one", ""), group="")  # the signals count as the same request
        assert runner.stopped and (tmp_path / "one" / "saved").exists()

        monkeypatch.setattr("ddp_trainer.run.sweep_runs.SAME_REQUEST_SECONDS", 0.1)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            Runner(runner.launcher).train(PlannedRun([], tmp_path / "two", ""), group="")
        assert not (tmp_path / "two" / "saved").exists()
        wait_until_unlocked(tmp_path / "two")


def test_a_table_that_cannot_be_written_is_printed_and_reported_in_one_line(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.md").mkdir()
    words = ("smoke", "--seeds", "1", "--data-dir", str(tiny_dir), "--out", str(tmp_path), "--table")
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "Not finished" in printed.out
    assert printed.err == f"error: {tmp_path}/table.md cannot be written: Is a directory\n"


def test_each_planned_combination_has_a_row(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The combinations in this test differ only in --num-workers, a setting that does not change the result."""
    words = ["smoke", *OF_SMOKE_RUN, "--data-dir", str(tiny_dir), "--seeds", "2"]
    words += ["--set", "num-workers=1,2", "--out", str(tmp_path)]
    for number, planned in enumerate(parse(words).runs[:3]):
        shutil.copytree(smoke_run, planned.out, ignore=shutil.ignore_patterns("wandb"))
        config = read_json(planned.out / "config.json") or {}
        config["settings"]["seed"] = number % 2
        (planned.out / "config.json").write_text(json.dumps(config))
    summary = read_json(tmp_path / "num-workers=2,seed=0" / "summary.json") or {}
    del summary["test_accuracy_tta"]
    (tmp_path / "num-workers=2,seed=0" / "predictions.npz").write_text("damaged, but not needed for the table")
    (tmp_path / "num-workers=2,seed=0" / "summary.json").write_text(json.dumps(summary))
    assert main([*words, "--table"]) == 0
    *rows, _, missing = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["| num-workers 1", "2"], ["| num-workers 2", "1"]]
    assert rows[0][3] == "0.00%"
    assert rows[1][3:6] == [NOTHING] * 3
    assert missing == ["Not finished, so not in the table: num-workers=2,seed=1."]
