"""The model card has the results of the run, and code that computes the logits with and without this package."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_trainer import export
from ddp_trainer.model_card import main
from ddp_trainer.models.spec import load_model
from ddp_trainer.report.model_card import EXPORT, write_model_card
from ddp_trainer.run.outputs import write_model_card_or_warn
from tests.support.trainer import environment

AS_A_USER = """
import sys
import numpy as np
import torch
images = torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    exec(open(sys.argv[1]).read())
np.save(sys.argv[3], logits.numpy())
"""
WITHOUT_THIS_PACKAGE = 'import sys; sys.modules["ddp_trainer"] = sys.modules["data_prep"] = None\n' + AS_A_USER


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke_run, tmp_path / "copy", ignore=shutil.ignore_patterns("wandb", "checkpoints")))


@pytest.mark.parametrize(("block", "program"), [(0, AS_A_USER), (1, WITHOUT_THIS_PACKAGE)])
def test_code_in_the_card_computes_the_logits_of_the_model(
    copy: Path, tmp_path: Path, block: int, program: str
) -> None:
    card = (copy / "model.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)[block]
    images = np.random.default_rng(0).integers(256, size=(5, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "code.py").write_text(code)
    if program is WITHOUT_THIS_PACKAGE:
        assert EXPORT in card
        assert export.main([str(copy), "--format", "torch"]) == 0
    done = subprocess.run(
        [sys.executable, "-c", program, *(tmp_path / name for name in ("code.py", "images.npy", "out.npy"))],
        env=environment(),
        cwd=copy,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    model, spec = load_model(copy)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        own = model((torch.from_numpy(images) / 255 - mean) / std).numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - own).max() < 1e-5 * np.abs(own).max()


def test_card_shows_the_results_of_the_run(smoke_run: Path) -> None:
    card, summary = ((smoke_run / name).read_text() for name in ("model.md", "summary.json"))
    correct = json.loads(summary)["test_correct"]
    assert f"{correct / 40:.2%}, {correct} of 40 test images; 95% interval" in card
    assert "6,573,130 parameters" in card
    assert "6 steps of `32` images" in card
    assert all(f"`{name}`" in card for name in load_model(smoke_run)[1].classes)


def test_held_out_images_are_not_called_test_images(copy: Path) -> None:
    for name, changes in (("summary.json", {"evaluation_split": "validation"}), ("config.json", {})):
        content = json.loads((copy / name).read_text()) | changes
        if name == "config.json":
            content["settings"]["validation"] = 40
        (copy / name).write_text(json.dumps(content))
    card = write_model_card(copy).read_text()
    assert "of 40 validation images" in card
    assert "`40` of the training images were held out" in card
    assert "of 40 test images" not in card


def test_failing_to_write_the_card_does_not_fail_the_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.md").unlink()
    (copy / "predictions.npz").write_bytes(b"no predictions")
    write_model_card_or_warn(copy)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"try: python -m ddp_trainer.model_card {copy}")
    assert not (copy / "model.md").exists()
    (copy / "predictions.npz").unlink()
    assert main([str(copy)]) == 0
    assert (copy / "model.md").exists()


def test_run_that_is_not_finished_gets_no_card(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "summary.json").unlink()
    assert main([str(copy)]) == 2
    assert "not a finished run" in capsys.readouterr().err


def test_card_that_cannot_be_written_is_reported_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("ddp_trainer.report.model_card.replace_file", fail)
    assert main([str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "cannot be written (Read-only file system)" in line
