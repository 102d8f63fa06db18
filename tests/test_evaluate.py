"""The evaluate command: every test image once, whoever shares the work, and one line for a mistake."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run

from ddp_trainer.evaluate import main


def test_three_processes_count_every_image_once(smoke_run: Path) -> None:
    """40 images on 3 ranks: shards of unequal size."""
    summary = json.loads((smoke_run / "summary.json").read_text())
    finished = run("ddp_trainer.evaluate", smoke_run, "--device", "cpu", "--tta", processes=3)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert sum(line.startswith("{") for line in lines) == 1, "one rank speaks"
    figures = json.loads(lines[-1])
    assert figures["test_total"] == 40
    assert figures["test_accuracy"] == figures["test_correct"] / 40 == summary["test_accuracy_tta"]


def test_other_images_than_the_runs_are_refused(
    smoke_run: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tiny_dir, tmp_path / "data")
    manifest = json.loads((data / "dataset.json").read_text())
    for change, expected in (({"classes": list("abcdefghij")}, "other classes"), ({"image_size": 64}, "64 pixels")):
        (data / "dataset.json").write_text(json.dumps(manifest | change))
        assert main([str(smoke_run), "--data-dir", str(data)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        assert "--data-dir" in line
