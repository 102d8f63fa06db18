"""A run is done even if its report cannot be written. Resuming a run that was killed at the end completes its files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.loader import StreamLoader
from ddp_trainer.engine.evaluation import Evaluation
from ddp_trainer.models.spec import build_model
from ddp_trainer.run import outputs
from ddp_trainer.run.outputs import write_report_or_warn
from ddp_trainer.tracking import predictions
from tests.support.trainer import read_lines, train
from tests.support.wandb_file import read_history, read_summary
from tests.unit.test_networks import SPEC


def test_run_is_done_even_if_its_report_cannot_be_drawn(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setenv("MPLBACKEND", "unknown")  # so that matplotlib cannot draw the report
    finished = train("--data-dir", tiny_dir, "--out", out, "--max-steps", "1", "--widths", *"8888")
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert (out / "summary.json").exists() and (out / "model.safetensors").exists()
    assert f"python -m ddp_trainer.report {out}" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_resuming_a_killed_run_completes_its_trackers_and_report(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--data-dir", tiny_dir, "--out", out, "--max-steps", "4", "--wandb", "offline", "--widths", *"8888")
    train(*flags)
    expected = read_summary(out)
    for folder in (*out.glob("wandb/offline-run-*"), out / "report"):
        shutil.rmtree(folder)
    (out / "model.md").unlink()
    (out / "status.json").write_text('{"state": "running", "step": 4, "epoch": 2}')
    assert "finished already: completing its results" in train(*flags, "--resume").stderr
    found = read_summary(out)
    assert found.keys() == expected.keys()
    results = [name for name in expected if name.startswith(("final/", "best_"))]
    assert {name: found[name] for name in results} == {name: expected[name] for name in results}
    assert len([row for row in read_history(out) if "epoch" in row]) == len(read_lines(out / "metrics.jsonl"))
    assert (out / "report" / "index.html").exists() and (out / "model.md").exists()
    assert json.loads((out / "status.json").read_text())["state"] == "done"


def test_new_weights_remove_the_exports_of_the_old_weights(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).touch()
    spec = replace(SPEC, widths=(4, 4, 8, 8))
    outputs.write_model(tmp_path, build_model(spec), spec)
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


def test_predictions_that_could_not_be_read_back_are_not_written(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = StreamLoader(tiny_dir / "test.beton", device=torch.device("cpu"), batch_size=40, num_workers=1)
    logits, labels = torch.eye(40), torch.arange(40)
    labels[0] = 1  # so that the file has the pixels of one mistake
    evaluation = Evaluation(samples=np.arange(40), labels=labels, logits=logits, logits_tta=None)
    size = 40 * 8 + 40 * 8 + 40 * 40 * 4 + 1 * 8 + 1 * 32 * 32 * 3
    path = tmp_path / "predictions.npz"
    for name, fitting in (("MAX_BYTES", size), ("MAX_IMAGES", 40), ("MAX_CLASSES", 40)):
        for limit in (fitting - 1, fitting):
            path.unlink(missing_ok=True)
            monkeypatch.setattr(predictions, name, limit)
            outputs.write_predictions(tmp_path, evaluation, loader)
            assert path.exists() == (limit == fitting)
            is_refused, warning = limit < fitting, capsys.readouterr().err
            assert ("warning: predictions.npz is not written" in warning) == (warning.count("\n") == 1) == is_refused
    found = predictions.read_predictions(path)
    assert found is not None and found.num_correct == 39
    path.unlink()
    logits[0, 3] = torch.inf
    outputs.write_predictions(tmp_path, evaluation, loader)
    assert capsys.readouterr().err.endswith("not written: the network gives values that are not finite\n")
    assert not path.exists()


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
