"""Every benchmark runs and writes its figures; what they are is of no interest here."""

import json
from pathlib import Path

import pytest

from tests.support.trainer import run


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loading", ("--batch-size", "32", "--images", "64")),
        ("training_step", ("--batch-size", "4", "--steps", "1")),
        ("reliability", ("--batch-size", "4")),
    ],
)
def test_it_runs_and_writes_its_figures(name: str, flags: tuple[str, ...], tiny_dir: Path, tmp_path: Path) -> None:
    data = () if name == "reliability" else ("--data-dir", tiny_dir)
    finished = run(f"benchmarks.{name}", *data, *flags, "--rounds", "1", "--result", tmp_path / "result.json")
    assert finished.returncode == 0, finished.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    assert {"versions", "git_commit"} < written.keys()
    assert written["figures"]
    assert all(value >= 0 for value in written["figures"].values())
