"""Every benchmark runs and writes its figures; their values are not checked."""

import json
import math
from pathlib import Path

import pytest

from tests.support.trainer import run


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loading", ("--batch-size", "32", "--images", "64")),
        ("training_step", ("--batch-size", "4", "--steps", "1")),
        ("reliability", ("--batch-size", "4")),
    ],
)
def test_benchmark_runs_and_writes_its_figures(
    name: str, flags: tuple[str, ...], tiny_dir: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    finished = run(f"benchmarks.{name}", "--data-dir", tiny_dir, *flags, "--rounds", "1", "--result", result)
    assert finished.returncode == 0, finished.stderr
    written = json.loads(result.read_text())
    assert {"versions", "git_commit"} < written.keys()
    assert written["figures"]
    assert all(map(math.isfinite, written["figures"].values()))
