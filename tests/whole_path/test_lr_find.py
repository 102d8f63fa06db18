"""Learning rate range test: its suggestion is right, ranks stop together, and an older run in --out is unchanged."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset import read_dataset
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.step_guard import FP16_PATIENCE
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.lr_find import RangeTestConfig, RatesConfig, main, parse, range_test, write_results
from ddp_trainer.recipes import smoke
from ddp_trainer.report.loss_curve import LossCurve
from ddp_trainer.run.checks import check_settings
from tests.support.folders import checksums
from tests.support.narrow import narrow_settings, narrow_trainer, single_runtime
from tests.support.processes import processes_with
from tests.support.trainer import environment, fork, run, start

TINY = ("smoke", "--device", "cpu", "--batch-size", "8")


def curve_with_valley(at: float, *, planned: RatesConfig) -> LossCurve:
    """Returns a curve whose loss falls around the learning rate `at`, is lowest near 3 * `at`, and then explodes."""
    curve = LossCurve(planned.steps)
    for step in range(planned.steps):
        rate = planned.at(step)
        curve.add(rate, 2.3 - 1.5 / (1 + (at / rate) ** 2) + (rate / (10 * at)) ** 2)
        if curve.diverged:
            break
    return curve


def test_rates_grow_by_a_constant_factor() -> None:
    planned = RatesConfig(start_lr=1e-4, end_lr=10, steps=21)
    rates = [planned.at(step) for step in range(21)]
    assert (rates[0], rates[-1]) == (1e-4, pytest.approx(10))
    assert np.allclose(np.diff(np.log(rates)), math.log(1e5) / 20)


def test_range_test_uses_whole_images_even_if_the_recipe_has_small_crops() -> None:
    test = parse(["baseline", "--small-crops", "16:0.5", "--freeze-late", "features.0.*", "--batch-size", "8"])
    assert test.as_train_config().schedule.crop_sides(32) == [32]
    assert test.as_train_config().schedule.batch_size == 8


def test_the_range_test_ignores_a_wandb_mode_that_is_not_supported(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "shared")
    settings = parse([*TINY, "--data-dir", str(tiny_dir)]).as_train_config()
    assert check_settings(settings, read_dataset(tiny_dir), world_size=1) == 96


@pytest.mark.parametrize("steps", [50, 400])
def test_the_suggestion_moves_with_the_valley_for_any_number_of_steps(steps: int) -> None:
    planned = RatesConfig(start_lr=1e-6, end_lr=1e3, steps=steps)
    low, high = (curve_with_valley(at, planned=planned) for at in (0.01, 1.0))
    assert low.diverged and high.diverged
    assert len(low.rates) < len(high.rates) < steps
    suggestions = low.suggestion(), high.suggestion()
    assert suggestions[0] and suggestions[1]
    assert suggestions[1] / suggestions[0] == pytest.approx(100, rel=0.3)
    assert 0.1 < suggestions[1] < 3, "the suggested rate has no effect, or makes the loss explode"


def trainer_of(data_dir: Path, *, not_finite_in: Container[int] = ()) -> Trainer:
    """Returns a trainer whose network returns NaN in the given forward passes (1-based)."""
    config = RangeTestConfig.of(narrow_settings(data_dir, schedule={"batch_size": 8})).as_train_config()
    trainer, passes = narrow_trainer(config, single_runtime()), itertools.count(1)
    trainer.model.register_forward_hook(lambda *called: called[2] * (math.nan if next(passes) in not_finite_in else 1))
    return trainer


def test_each_step_has_its_own_rate_and_a_range_test_may_take_several_epochs(tiny_dir: Path) -> None:
    """With 96 images in batches of 8, 30 steps are two and a half epochs."""
    trainer, planned = trainer_of(tiny_dir), RatesConfig(start_lr=1e-4, end_lr=1e-2, steps=30)
    used: list[float] = []
    step = trainer.train_step
    trainer.train_step = lambda *arguments: (  # type: ignore[method-assign]
        step(*arguments),
        used.append(trainer.state.optimizer.param_groups[0]["lr"]),
    )[0]
    curve = range_test(trainer, planned)
    expected = [planned.at(step) for step in range(30)]
    assert curve.rates == expected
    assert used == pytest.approx(expected)
    assert not curve.diverged


def test_range_test_ends_as_soon_as_the_loss_diverges(tiny_dir: Path) -> None:
    trainer = trainer_of(tiny_dir)
    curve = range_test(trainer, RatesConfig(start_lr=1e-3, end_lr=1e6, steps=30))
    assert curve.diverged
    assert len(curve.losses) <= trainer.state.step < 30


@pytest.mark.parametrize(
    ("skipped", "patience", "kept"),
    [(range(3, 12), FP16_PATIENCE, 21), (range(3, 13), FP16_PATIENCE, 2), (range(3, 4), 1, 2), (range(30, 31), 1, 29)],
)
def test_skipped_steps_count_as_divergence_unless_fp16_is_searching_for_a_loss_scale(
    tiny_dir: Path, skipped: range, patience: int, kept: int
) -> None:
    """A skipped step is normally noticed in the next step. In the last case, no step follows the skipped one."""
    trainer = trainer_of(tiny_dir, not_finite_in=skipped)
    trainer.guard._patience = patience  # emulates fp16, which the CPU does not support
    curve = range_test(trainer, RatesConfig(start_lr=1e-6, end_lr=1e-5, steps=30))
    assert len(curve.losses) == kept
    assert curve.diverged == (len(skipped) == patience)


def test_there_is_no_suggestion_if_the_loss_only_rises() -> None:
    curve = LossCurve(20)
    for step in range(20):
        curve.add(0.1 * 2**step, 2.3 + 0.1 * step)
    assert curve.suggestion() is None
    assert "no suggestion" in curve.advice()
    assert curve.draw("none").startswith(b"\x89PNG")


def test_two_ranks_stop_together_and_leave_a_run_in_the_folder_unchanged(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    before = checksums(out)
    rates = ("--start-lr", "0.01", "--end-lr", "1e5", "--steps", "9")
    arguments = (*TINY, "--data-dir", tiny_dir, "--out", out, *rates, "--accumulate", "auto")
    finished = fork(*arguments, program="ddp_trainer.lr_find:main", processes=2)
    assert finished.returncode == 0, finished.stderr
    after = checksums(out)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"lr_find.png", "lr_find.json"}
    found = json.loads((out / "lr_find.json").read_text())
    assert "suggested_lr" in found
    assert found["diverged"], "no divergence, although the rates are far too high"
    assert len(found["losses"]) < 9
    assert found["losses"][0] == pytest.approx(math.log(10), rel=0.2), (
        "not the loss of an untrained network, averaged over the global batch"
    )
    assert found["world_size"] == 2


def test_sigterm_to_one_rank_ends_both_and_nothing_is_written(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ("--data-dir", tiny_dir, "--out", tmp_path / "out", "--steps", "80", "--end-lr", "0.01")
    with start("ddp_trainer.lr_find", *TINY, *flags, processes=2) as launcher:
        assert launcher.stderr is not None
        printed = ""
        while "step 8/80" not in printed:  # until both ranks are in the training loop
            line = launcher.stderr.readline()
            assert line, printed
            printed += line
        workers = processes_with("ddp_trainer.lr_find", str(tmp_path), "RANK=")
        os.kill(workers[-1], signal.SIGTERM)
        printed += launcher.communicate(timeout=120)[1]
    assert len(workers) == 2
    assert launcher.returncode == 0, printed
    assert printed.count("stopped: nothing was written") == 1
    assert not (tmp_path / "out").exists()


def test_invalid_rates_and_folders_are_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for flags, expected in (
        (("--start-lr", "1", "--end-lr", "0.1"), "--start-lr must be positive and below --end-lr, got 1.0 and 0.1"),
        (("--steps", "1"), "--steps must be at least 2, got 1"),
        (("--resume",), "--resume"),
        (("--out", ""), "--out must name a folder other than the current one"),
        (("--out", str(tmp_path / "file" / "below")), "cannot be written"),
    ):
        assert main([*TINY, "--data-dir", str(tiny_dir), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line


def test_pipes_of_the_command_do_not_take_the_place_of_closed_streams(tmp_path: Path) -> None:
    """Otherwise, what C code prints would get into the pipe for the numbers of signals, and stop the range test."""
    code = f"""import os, sys
os.close(1), os.close(2)
from ddp_trainer import lr_find
def find(*_):
    with open({str(tmp_path / "places")!r}, "w") as file:
        file.write(" ".join(os.readlink(f"/proc/self/fd/{{number}}") for number in (1, 2)))
lr_find.find_learning_rate = find
lr_find.main(["smoke"])
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)
    assert (tmp_path / "places").read_text() == "/dev/null /dev/null"


def test_the_measurements_are_kept_if_the_picture_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("ddp_trainer.lr_find.replace_file", fail)
    config = RangeTestConfig.of(smoke()).as_train_config()
    curve = curve_with_valley(0.1, planned=RatesConfig(steps=50))
    with restored_settings(), pytest.raises(OSError, match=r"No space left on device: .*lr_find.png"):
        write_results(tmp_path, curve, config, Runtime(RuntimeConfig(device="cpu", precision="fp32")))
    assert json.loads((tmp_path / "lr_find.json").read_text())["losses"] == curve.losses


def test_matplotlib_settings_that_cannot_be_used_are_refused_before_the_first_step(
    tiny_dir: Path, tmp_path: Path
) -> None:
    flags = ("--data-dir", tiny_dir, "--out", tmp_path / "out")
    finished = run("ddp_trainer.lr_find", *TINY, *flags, env={"MPLBACKEND": "bogus"})
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: matplotlib cannot be imported (Key backend: 'bogus'")
