"""Several trainings by one command: which they are, what they leave, and that the command goes on."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from data_prep.files import read_json
from ddp_trainer.report.sweep_table import results_table
from ddp_trainer.report.wording import NOTHING
from ddp_trainer.sweep import main, parse
from tests.support.trainer import run, start


def test_every_combination_has_every_seed(tiny_dir: Path) -> None:
    settings = ("--set", "peak-lr=0.2,0.3", "--set", "freeze-bn-scale=true,false")
    sweep = parse(["smoke", "--data-dir", str(tiny_dir), "--seeds", "2", *settings])
    assert [training.out.name for training in sweep.trainings] == [
        f"peak-lr={rate},freeze-bn-scale={frozen},seed={seed}"
        for rate in ("0.2", "0.3")
        for frozen in ("true", "false")
        for seed in (0, 1)
    ]
    last = sweep.trainings[-1]
    words = ["smoke", "--data-dir", str(tiny_dir), "--peak-lr", "0.3", "--no-freeze-bn-scale", "--seed", "1"]
    assert last.arguments == words
    assert last.out == Path("runs/sweep-smoke/peak-lr=0.3,freeze-bn-scale=false,seed=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fest"], "unknown recipe 'fest'"),
        (["smoke", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["smoke", "--seeds", "few"], "invalid int value: 'few'"),
        (["smoke", "--set", "peak-lr"], "--set peak-lr: give it as FLAG=VALUE,VALUE"),
        (["smoke", "--set", "peak-lr=0.1,-1"], "--peak-lr -1.0: give a number above 0"),
        (["smoke", "--set", "peak-rl=0.1"], "peak-rl"),
        (["smoke", "--seed=3"], "--seed is set for each training by the sweep"),
        (["smoke", "--set", "seed=1,2"], "--seed is set for each training by the sweep"),
        (["smoke", "--set", "out=a,b"], "--out is set for each training by the sweep"),
        (["smoke", "--set", "peak-lr=1,2", "--set", "peak_lr=3"], "--set peak-lr=...: give all its values at once"),
        (["smoke", "--set", "batch-size=32,1000"], "more than the 96 training images"),
        (["smoke", "--data-dir", "nowhere"], "nowhere"),
        (["smoke", "--launcher", "acelerate launch -m"], "--launcher acelerate launch -m: no such program"),
        (["smoke", "--launcher", "'"], "--launcher ': No closing quotation"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    arguments: list[str], said: str, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = () if "--data-dir" in arguments else ("--data-dir", str(tiny_dir))
    assert main([arguments[0], *data, "--out", str(tmp_path / "sweep"), *arguments[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "sweep").exists()


def test_a_stopped_sweep_goes_on_and_ends_with_its_table(tiny_dir: Path, tmp_path: Path) -> None:
    """The second training cannot have its folder."""
    small = ("--device", "cpu", "--batch-size", "8", "--data-dir", tiny_dir)
    sweep = ("smoke", "--seeds", "2", *small, "--max-steps", "3", "--out", tmp_path)
    (tmp_path / "seed=1").write_text("in the way")
    process = start("ddp_trainer.sweep", *sweep)
    first = tmp_path / "seed=0"
    while not (first / "status.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == "asked to stop: the same command goes on"
    assert "[2/2]" not in said
    assert (read_json(first / "status.json") or {})["state"] in ("preempted", "done")

    finished = run("ddp_trainer.sweep", *sweep)
    assert finished.returncode == 1
    assert "error: seed=1 failed" in finished.stderr
    found = read_json(first / "summary.json") or {}
    table = finished.stdout.splitlines()
    assert table == (tmp_path / "table.md").read_text().splitlines()
    assert table[2].startswith(f"| all alike | 1 | {found['test_accuracy']:.2%} | {NOTHING} | ")
    assert table[-1] == "Not complete, and not in the table: seed=1."

    again = run("ddp_trainer.sweep", *sweep)
    assert "[1/2]" not in again.stderr, "what is complete is not trained again"
    (first / "status.json").write_text('{"state": "running"}')  # as if it had been killed after its summary
    shutil.rmtree(first / "report")
    again = run("ddp_trainer.sweep", *sweep)
    assert f"{first} is complete already" in again.stderr
    assert (first / "report" / "index.html").exists()
    other = run("ddp_trainer.sweep", *sweep[:-4], "--max-steps", "2", "--out", tmp_path)
    assert other.returncode == 2
    assert "was trained with max_steps 3, not 2: name another folder by --out" in other.stderr


def test_settings_that_train_alike_share_a_row(smoke_run: Path, tmp_path: Path) -> None:
    """The number of steps makes another training, the number of kept checkpoints does not."""
    folders = []
    for number, changes in enumerate(({}, {"keep_checkpoints": 9, "seed": 1}, {"max_steps": 5})):
        folders.append(Path(shutil.copytree(smoke_run, tmp_path / str(number), ignore=shutil.ignore_patterns("wandb"))))
        config = read_json(folders[-1] / "config.json") or {}
        config["settings"] |= changes
        (folders[-1] / "config.json").write_text(json.dumps(config))
    summary = read_json(folders[2] / "summary.json") or {}
    del summary["test_accuracy_tta"]
    (folders[2] / "summary.json").write_text(json.dumps(summary))
    rows = [row.split(" | ") for row in results_table(folders).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["| max_steps 6", "2"], ["| max_steps 5", "1"]]
    assert rows[0][3] == "0.00%"
    assert rows[1][3:6] == [NOTHING] * 3
