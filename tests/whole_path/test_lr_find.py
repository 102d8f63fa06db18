"""The learning rate range test: what it suggests, that ranks stop together, and that a run beside it is untouched."""

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_trainer.engine.metrics import RunningSums
from ddp_trainer.lr_find import RangeConfig, RangeTrainer, main, parse
from ddp_trainer.report.loss_curve import LossCurve
from tests.support.trainer import run, start

TINY = ("smoke", "--device", "cpu", "--batch-size", "8")


def curve_with_valley(at: float, *, sweep: RangeConfig) -> LossCurve:
    """A loss that falls until the rate `at` and explodes after it."""
    curve = LossCurve(sweep.steps)
    for step in range(sweep.steps):
        rate = sweep.rate(step)
        curve.add(rate, 2.3 - 1.5 / (1 + (at / rate) ** 2) + (rate / (10 * at)) ** 2)
        if curve.diverged:
            break
    return curve


def test_rates_grow_by_one_factor_from_first_to_last() -> None:
    sweep = RangeConfig(start_lr=1e-4, end_lr=10, steps=21)
    rates = [sweep.rate(step) for step in range(21)]
    assert (rates[0], rates[-1]) == (1e-4, pytest.approx(10))
    assert np.allclose(np.diff(np.log(rates)), math.log(1e5) / 20)


def test_it_sees_whole_images_whatever_the_training_begins_with() -> None:
    test = parse(["baseline", "--small-crop-fraction", "0.5", "--batch-size", "8"])
    assert test.training().schedule.crop_sides(32) == [32]
    assert test.training().schedule.batch_size == 8


@pytest.mark.parametrize("steps", [50, 400])
def test_the_suggestion_moves_with_the_valley_at_any_number_of_steps(steps: int) -> None:
    sweep = RangeConfig(start_lr=1e-6, end_lr=1e3, steps=steps)
    low, high = (curve_with_valley(at, sweep=sweep) for at in (0.01, 1.0))
    assert low.diverged and high.diverged
    assert len(low.rates) < len(high.rates) < steps
    suggestions = low.suggestion(), high.suggestion()
    assert suggestions[0] and suggestions[1]
    assert suggestions[1] / suggestions[0] == pytest.approx(100, rel=0.3)
    assert 0.1 < suggestions[1] < 3, "below the rates at which the loss explodes, above those that do nothing"


def test_a_loss_that_is_no_number_stops_and_is_not_kept() -> None:
    curve = LossCurve(10)
    curve.add(0.1, 2.3)
    assert not curve.diverged
    curve.add(0.2, math.nan)
    assert curve.diverged
    assert curve.losses == [2.3]


class Refusing(RangeTrainer):
    """Its losses fall; some of its steps are refused."""

    def __init__(self, sweep: RangeConfig, refused: range, patience: int) -> None:
        self.sweep, self.refused, self.patience, self.step = sweep, refused, patience, 0
        self.sums = RunningSums(torch.device("cpu"))
        self.data = self.loader = self.runtime = self.guard = self  # type: ignore[assignment]
        self.is_main = False

    def plan(self, epoch: int) -> range:  # type: ignore[override]
        return range(self.sweep.steps)

    def batches(self, plan: range) -> range:
        return plan

    def train_step(self, batch: object, epoch: int) -> None:
        self.step += 1
        if self.step not in self.refused:
            self.sums.add(torch.full((2,), 2.0 - self.step / 100), torch.zeros(2))

    def end_of_startup(self) -> None: ...

    def announce_stop(self) -> None: ...

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        return sums

    def stop_agreed(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("refused", "patience", "kept"), [(range(3, 12), 10, 41), (range(3, 13), 10, 2), (range(3, 4), 1, 2)]
)
def test_a_few_refused_steps_are_no_divergence_where_the_loss_scale_is_sought(
    refused: range, patience: int, kept: int
) -> None:
    curve = Refusing(RangeConfig(steps=50), refused, patience).run()
    assert len(curve.losses) == kept
    assert curve.diverged == (kept == 2)


def test_nothing_is_suggested_where_the_loss_only_rose() -> None:
    curve = LossCurve(20)
    for step in range(20):
        curve.add(0.1 * 2**step, 2.3 + 0.1 * step)
    assert curve.suggestion() is None
    assert "nothing is suggested" in curve.advice()
    assert curve.draw("none").startswith(b"\x89PNG")


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_ranks_stop_together_and_leave_a_run_alone(smoke_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    before = contents(out)
    sweep = ("--start-lr", "0.01", "--end-lr", "1e5", "--steps", "9")
    finished = run("ddp_trainer.lr_find", *TINY, "--data-dir", tiny_dir, "--out", out, *sweep, processes=2)
    assert finished.returncode == 0, finished.stderr
    after = contents(out)
    assert {path: after[path] for path in before} == before
    assert {Path(path).name for path in after.keys() - before.keys()} == {"lr_find.png", "lr_find.json"}
    found = json.loads((out / "lr_find.json").read_text())
    assert "suggested_lr" in found
    assert found["diverged"], "at such rates"
    assert len(found["losses"]) < 9
    assert found["losses"][0] == pytest.approx(math.log(10), rel=0.2), "a fresh model, a mean over the global batch"
    assert found["world_size"] == 2


def test_sigterm_to_one_rank_ends_both_with_nothing_written(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ("--data-dir", tiny_dir, "--out", tmp_path / "out", "--steps", "80", "--end-lr", "0.01")
    with start("ddp_trainer.lr_find", *TINY, *flags, processes=2) as launcher:
        assert launcher.stderr is not None
        said = ""
        while "step 8/80" not in said:  # both are in the loop
            line = launcher.stderr.readline()
            assert line, said
            said += line
        workers = [pid for pid in children_of(launcher.pid) if "ddp_trainer.lr_find" in command_of(pid)]
        os.kill(workers[-1], signal.SIGTERM)
        said += launcher.communicate(timeout=120)[1]
    assert len(workers) == 2
    assert launcher.returncode == 0, said
    assert said.count("asked to stop: nothing is written") == 1
    assert list((tmp_path / "out").iterdir()) == []


def children_of(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_a_sweep_that_cannot_be_is_refused(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, expected in (
        (("--start-lr", "1", "--end-lr", "0.1"), "the lower first"),
        (("--steps", "1"), "at least 2"),
        (("--resume",), "--resume"),
        (("--out", str(tmp_path / "file" / "below")), "cannot be written"),
    ):
        assert main([*TINY, "--data-dir", str(tiny_dir), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
