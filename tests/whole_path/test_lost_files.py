"""A resumed run never takes a file that it cannot read for a damaged or missing one, and replaces lost results."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep import files
from ddp_trainer.run.checkpoint import list_checkpoints, write_checkpoint
from ddp_trainer.train import main
from tests.support.folders import checksums
from tests.support.trainer import NARROW, fork, read_lines, train

WORDS = ("smoke", "--device", "cpu")
WIDTHS = ("--widths", "8", "8", "16", "16")  # those of NARROW


@pytest.fixture(scope="module")
def finished_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train("--data-dir", tiny_dir, "--out", out, "--log-every-steps", "1", module=NARROW)
    return out


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def make_unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = files.open_regular

    def open_regular(path: Path) -> object:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(files, "open_regular", open_regular)


@pytest.mark.parametrize(
    ("name", "lost", "problem"),
    [
        ("steps.jsonl", ("summary.json",), "steps.jsonl cannot be read (Permission denied)"),
        ("metrics.jsonl", ("summary.json", "checkpoints"), "metrics.jsonl cannot be read (Permission denied)"),
        ("manifest.json", ("summary.json",), "step-00000006 cannot be read (Permission denied)"),
    ],
)
def test_an_unreadable_file_is_not_taken_for_a_lost_or_damaged_one(
    name: str,
    lost: tuple[str, ...],
    problem: str,
    run_dir: Path,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (run_dir / one for one in lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = checksums(run_dir)
    make_unreadable(monkeypatch, name)
    assert main([*WORDS, *WIDTHS, "--data-dir", str(tiny_dir), "--out", str(run_dir), "--resume"]) == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    changed = {path.name for path, content in checksums(run_dir).items() if before.get(path) != content}
    assert changed <= {"status.json", "config.json"}


@pytest.mark.parametrize("lost", ["model.safetensors", "model.json"])
def test_a_finished_run_that_lost_its_model_writes_it_again(lost: str, run_dir: Path, tiny_dir: Path) -> None:
    before = (run_dir / lost).read_bytes()
    (run_dir / lost).unlink()
    done = fork(*WORDS, "--data-dir", tiny_dir, "--out", run_dir, "--resume", "--log-every-steps", "1")
    assert done.returncode == 0, done.stderr
    assert (run_dir / lost).read_bytes() == before
    assert (run_dir / "summary.json").exists()
    assert [record["step"] for record in read_lines(run_dir / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_a_newer_release_is_refused(
    run_dir: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "summary.json").unlink()
    change_settings(run_dir, lambda settings: settings.update(lookahead=5))
    assert main([*WORDS, *WIDTHS, "--data-dir", str(tiny_dir), "--out", str(run_dir), "--resume"]) == 2
    assert "has settings that this release does not know (lookahead)" in capsys.readouterr().err.splitlines()[-1]


def change_settings(run_dir: Path, change: Callable[[dict], object]) -> None:
    for place in list_checkpoints(run_dir / "checkpoints"):
        state = torch.load(place / "state.pt", weights_only=True)
        change(state["settings"])
        write_checkpoint(place, state, step=state["step"])


def test_a_failure_before_the_first_step_is_recorded(
    run_dir: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "summary.json").unlink()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory in resolve_passes")

    monkeypatch.setattr("ddp_trainer.engine.passes.resolve_passes", fail)
    assert main([*WORDS, *WIDTHS, "--data-dir", str(tiny_dir), "--out", str(run_dir), "--resume"]) == 1
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["saved_step"]) == ("failed", 6, 6)
    assert "out of memory in resolve_passes" in status["message"]
