"""With --log-every-steps N, steps.jsonl has a record of mean figures for every N steps."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.trainer import NARROW, read_lines, train

PLAN = ("--epochs", "2", "--max-steps", "12", "--batch-size", "16")  # two epochs of 6 steps
KEYS = {"epoch", "step", "learning_rate", "train_loss", "train_accuracy"}


def records(data_dir: Path, out: Path, *flags: str, processes: int = 1) -> list[dict[str, Any]]:
    train(*PLAN, *flags, "--data-dir", data_dir, "--out", out, processes=processes, module=NARROW)
    return read_lines(out / "steps.jsonl")


def test_records_are_means_over_the_steps_since_the_previous_record(tiny_dir: Path, tmp_path: Path) -> None:
    """A record may span two epochs. All steps have the same number of images, so they count equally in a mean."""
    each = records(tiny_dir, tmp_path / "each", "--log-every-steps", "1")
    assert [record["step"] for record in each] == list(range(1, 13))
    assert [record["epoch"] for record in each] == [1] * 6 + [2] * 6
    assert all(record.keys() == KEYS for record in each), (
        "the keys are not exactly KEYS; a record must not have images per second, which differ from run to run"
    )
    fourth = records(tiny_dir, tmp_path / "fourth", "--log-every-steps", "4")
    assert [record["step"] for record in fourth] == [4, 8, 12]
    for number, record in enumerate(fourth):
        window = each[4 * number : 4 * number + 4]
        for name in ("train_loss", "train_accuracy"):
            assert record[name] == pytest.approx(sum(step[name] for step in window) / 4, rel=1e-9)
        assert record["learning_rate"] == window[-1]["learning_rate"]
    epochs = read_lines(tmp_path / "each" / "metrics.jsonl")
    for epoch in epochs:
        steps = [record["train_loss"] for record in each if record["epoch"] == epoch["epoch"]]
        assert epoch["train_loss"] == pytest.approx(sum(steps) / 6, rel=1e-9)


def test_log_every_0_steps_writes_no_records(tiny_dir: Path, tmp_path: Path) -> None:
    assert records(tiny_dir, tmp_path / "none", "--log-every-steps", "0") == []


def test_two_processes_record_the_same_figures_as_one(tiny_dir: Path, tmp_path: Path) -> None:
    flags = ("--log-every-steps", "3", "--sync-bn", "--precision", "fp32", "--peak-lr", "0.001")
    one, two = (records(tiny_dir, tmp_path / f"{size}", *flags, processes=size) for size in (1, 2))
    assert len(one) == 4
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
