"""The model card: true figures, and lines that load the weights where this package is not."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.batch_ops import batch_normalize
from ddp_trainer.model_card import LOADING, main, write_model_card, write_model_card_or_say_why
from ddp_trainer.models.custom_resnet import ACTIVATIONS
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.run.outputs import write_model
from tests.support.trainer import environment

AS_A_USER = """
import sys
sys.modules["ddp_trainer"] = sys.modules["data_prep"] = None
exec(open(sys.argv[1]).read())
import numpy as np
np.save(sys.argv[3], logits(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    return code


def test_the_run_left_a_card_whose_code_gives_the_models_logits(smoke_run: Path, tmp_path: Path) -> None:
    code = code_of((smoke_run / "model.md").read_text())
    images = np.random.default_rng(0).integers(256, size=(5, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "code.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", AS_A_USER, *(tmp_path / name for name in ("code.py", "images.npy", "out.npy"))],
        env=environment(),
        cwd=smoke_run,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    model, spec = load_model(smoke_run)
    with torch.inference_mode():
        own = model(batch_normalize(torch.from_numpy(images), spec.mean, spec.std, torch.float32)).numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - own).max() < 1e-5 * np.abs(own).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_code_knows_every_activation(activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(
        classes=("a", "b"),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.3),
        image_size=32,
        widths=(4, 4, 8, 8),
        activation=activation,
    )
    model = build_model(spec).eval()
    write_model(tmp_path, model, spec)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(LOADING, names)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own = model(batch_normalize(images, spec.mean, spec.std, torch.float32))
        torch.testing.assert_close(names["logits"](images), own)


def test_the_figures_are_those_of_the_summary(smoke_run: Path) -> None:
    card, summary = ((smoke_run / name).read_text() for name in ("model.md", "summary.json"))
    correct = json.loads(summary)["test_correct"]
    assert f"{correct / 40:.2%}, {correct} of 40 test images; 95% interval" in card
    assert "6,573,130 parameters" in card
    assert "6 steps of 32 images" in card
    assert all(f"`{name}`" in card for name in load_model(smoke_run)[1].classes)


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smoke_run, tmp_path / "copy", ignore=shutil.ignore_patterns("wandb", "checkpoints")))


def test_held_out_images_are_not_called_test_images(copy: Path) -> None:
    for name, changes in (("summary.json", {"evaluation_split": "validation"}), ("config.json", {})):
        content = json.loads((copy / name).read_text()) | changes
        if name == "config.json":
            content["settings"]["validation"] = 40
        (copy / name).write_text(json.dumps(content))
    card = write_model_card(copy).read_text()
    assert "of 40 validation images" in card
    assert "40 of the training images were held out" in card
    assert "of 40 test images" not in card


def test_a_card_that_fails_loses_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.md").unlink()
    (copy / "predictions.npz").write_bytes(b"no predictions")
    write_model_card_or_say_why(copy)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"try: python -m ddp_trainer.model_card {copy}")
    assert not (copy / "model.md").exists()
    (copy / "predictions.npz").unlink()
    assert main([str(copy)]) == 0
    assert (copy / "model.md").exists()


def test_a_run_that_is_not_complete_gets_no_card(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "summary.json").unlink()
    assert main([str(copy)]) == 2
    assert "not a completed run" in capsys.readouterr().err
