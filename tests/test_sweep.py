"""Several trainings by one command: which they are, what they leave, and that the command goes on."""

import os
import signal
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import run, start

from ddp_trainer.rundir import read_json
from ddp_trainer.sweep import main, parse


def test_every_combination_has_every_seed() -> None:
    settings = ("--set", "peak-lr=0.2,0.3", "--set", "whiten-stem=true,false")
    sweep = parse(["fast", "--seeds", "2", *settings, "--epochs", "1"])
    assert [training.name for training in sweep.trainings] == [
        f"peak-lr={rate},whiten-stem={whiten},seed={seed}"
        for rate in ("0.2", "0.3")
        for whiten in ("true", "false")
        for seed in (0, 1)
    ]
    words = "fast --epochs 1 --peak-lr 0.3 --no-whiten-stem --seed 1"
    assert sweep.trainings[-1].arguments == words.split()
    assert sweep.folders[0] == Path("runs/sweep-fast/peak-lr=0.2,whiten-stem=true,seed=0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fest"], "unknown recipe 'fest'"),
        (["fast", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["fast", "--seeds", "few"], "invalid int value: 'few'"),
        (["fast", "--set", "peak-lr"], "--set peak-lr: give it as FLAG=VALUE,VALUE"),
        (["fast", "--set", "peak-lr=0.1,-1"], "--peak-lr -1.0: give a number above 0"),
        (["fast", "--set", "peak-rl=0.1"], "peak-rl"),
        (["fast", "--seed", "3"], "--seed is set for each training by the sweep"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_stopped_sweep_goes_on_and_ends_with_its_table(tiny_dir: Path, tmp_path: Path) -> None:
    """The signal comes within the second training; one setting cannot be trained with these data."""
    sweep = ("smoke", "--seeds", "2", "--set", "batch-size=32,1000", "--device", "cpu", "--data-dir", tiny_dir,
             "--max-steps", "3", "--out", tmp_path)  # fmt: skip
    process = start("ddp_trainer.sweep", *sweep)
    second = tmp_path / "batch-size=32,seed=1"
    while not (second / "status.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == "asked to stop: the same command goes on"
    assert (read_json(second / "status.json") or {})["state"] in ("preempted", "done")

    finished = run("ddp_trainer.sweep", *sweep)
    assert finished.returncode == 1, "1000 images are more than there are"
    assert "batch-size=1000,seed=0 failed" in finished.stderr
    assert "[1/4]" not in finished.stderr, "what is complete is not trained again"
    found = [read_json(tmp_path / f"batch-size=32,seed={seed}" / "summary.json") or {} for seed in (0, 1)]
    plain, views = ([each[name] for each in found] for name in ("test_accuracy", "test_accuracy_tta"))
    table = finished.stdout.splitlines()
    assert table == (tmp_path / "table.md").read_text().splitlines()
    assert table[2].startswith(
        f"| all alike | 2 | {mean(plain):.2%} | {stdev(plain):.2%} | {mean(views):.2%} | {stdev(views):.2%} | "
    )
    assert table[-1] == "Not complete, and not in the table: batch-size=1000,seed=0, batch-size=1000,seed=1."
