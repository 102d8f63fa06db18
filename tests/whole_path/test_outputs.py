"""A finished run does not fail if its report cannot be written."""

import json
from pathlib import Path

import pytest

from ddp_trainer.run.outputs import write_report_or_warn
from tests.support.trainer import train


def test_run_finishes_without_its_report(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "report").write_text("a file where the folder belongs")
    finished = train("--data-dir", tiny_dir, "--out", out, "--max-steps", "1", "--widths", *"8888")
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert (out / "summary.json").exists() and (out / "model.safetensors").exists()
    assert f"python -m ddp_trainer.report {out}" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("division by zero")])
def test_any_error_in_the_report_causes_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(run_dirs: list[Path]) -> Path:
        raise error

    monkeypatch.setattr("ddp_trainer.report.write.write_report", fail)
    assert write_report_or_warn(Path("runs/it is here")) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and type(error).__name__ in said
    assert "python -m ddp_trainer.report 'runs/it is here'" in said
