"""Networks from torchvision, timm and the user can be trained, stopped, resumed, evaluated and exported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddp_trainer.config import is_installed
from ddp_trainer.models.spec import load_model
from tests.support import trainer
from tests.support.folders import same_model
from tests.support.trainer import NARROW, REPOSITORY, Finished, environment, fork, read_lines, run

OWN = "tests.support.networks:"
NEEDS_TIMM = pytest.mark.skipif(not is_installed("timm"), reason="timm is not installed")


def train(*arguments: str | Path, processes: int = 1) -> Finished:
    """Runs `ddp_trainer.train smoke ...` without the report. Fails the test if the run fails."""
    return trainer.train(*arguments, module=NARROW, processes=processes)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("network", "processes", "flags"),
    [
        (f"{OWN}small", 2, ("--sync-bn",)),
        (f"{OWN}Buffers", 2, ("--ema-decay", "0.9")),
        (f"{OWN}Tied", 1, ("--optimizer", "muon", "--peak-lr", "0.02")),
        ("torchvision:mobilenet_v3_small", 2, ()),
        pytest.param("timm:test_resnet", 1, (), marks=NEEDS_TIMM),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_dir: Path, tmp_path: Path, network: str, processes: int, flags: tuple[str, ...]
) -> None:
    """The saved weights and buffers are equal bit for bit, even with averaged weights or dropout."""
    arguments = ("--data-dir", tiny_dir, "--network", network, "--batch-size", "16", "--deterministic", *flags)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*arguments, "--out", whole, processes=processes)
    train(*arguments, "--out", parts, "--max-steps", "4", processes=processes)
    train(*arguments, "--out", parts, "--resume", processes=processes)
    assert same_model(whole, parts)


def test_unused_and_frozen_parameters_keep_their_initial_values(tiny_dir: Path, tmp_path: Path) -> None:
    """Even weight decay does not change them, with one process or two."""
    runs = []
    for processes, decay in ((1, "0"), (1, "0.5"), (2, "0.5")):
        out = tmp_path / f"{processes} {decay}"
        words = ("--data-dir", tiny_dir, "--network", f"{OWN}Buffers", "--out", out, "--weight-decay", decay)
        finished = train(*words, processes=processes)
        assert "2 parameters of tests.support.networks:Buffers get no gradient" in finished.stderr
        runs.append(weights(out))
    for name in ("unused.weight", "unused.bias", "frozen.weight"):
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], runs[2][name])
    assert runs[0]["steps"] == 6


@pytest.mark.parametrize(
    ("network", "flags"),
    [
        ("torchvision:mobilenet_v3_small", ()),
        pytest.param("timm:test_resnet", (), marks=NEEDS_TIMM),
        (f"{OWN}small", ()),
        (f"{OWN}OnlyContiguous", ("--no-channels-last",)),
    ],
)
def test_every_command_rebuilds_the_network_of_a_run(
    tiny_dir: Path, tmp_path: Path, network: str, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    words = ("--data-dir", tiny_dir, "--network", network, "--out", out, "--max-steps", "2", "--batch-size", "16")
    train(*words, *flags)
    summary = json.loads((out / "summary.json").read_text())
    model, spec = load_model(out)
    assert spec.architecture == network
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["train_pflops"] > 0

    evaluated = fork(out, "--device", "cpu", "--tta", program="ddp_trainer.evaluate:main", processes=2)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])["test_accuracy"] == summary["test_accuracy_tta"]

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert fork(out, tmp_path / "a.png", program="ddp_trainer.predict:main").returncode == 0
    exports = (("export", "--format", "torch"), ("export", "--format", "onnx"))
    for command, *options in (*exports, ("model_card",)):  # export compares the logits of the file with the model's
        finished = fork(out, *options, program=f"ddp_trainer.{command}:main")
        assert finished.returncode == 0, finished.stderr
    card = (out / "model.md").read_text()
    assert network in card


def test_init_from_lowers_the_loss_and_frozen_weights_do_not_change(tiny_dir: Path, tmp_path: Path) -> None:
    shared = ("--data-dir", tiny_dir, "--network", f"{OWN}small", "--batch-size", "16", "--peak-lr", "0.05")
    source, tuned, fresh = (tmp_path / name for name in ("source", "tuned", "fresh"))
    train(*shared, "--out", source, "--max-steps", "12", "--epochs", "2")
    more = ("--epochs", "1", "--max-steps", "1", "--seed", "7")
    finished = train(*shared, *more, "--out", tuned, "--init-from", source, "--freeze", "0.*")
    train(*shared, *more, "--out", fresh)
    assert f"starting from {source}" in finished.stderr
    assert torch.equal(weights(source)["0.weight"], weights(tuned)["0.weight"])
    losses = [read_lines(out / "metrics.jsonl")[0]["train_loss"] for out in (tuned, fresh)]
    assert losses[0] < losses[1]


def test_init_from_a_run_with_another_activation_is_refused_although_its_weights_fit(
    tiny_dir: Path, tmp_path: Path
) -> None:
    words = ("--data-dir", tiny_dir, "--max-steps", "1")
    train(*words, "--activation", "celu", "--out", tmp_path / "source")
    words = ("smoke", "--device", "cpu", *words, "--out", tmp_path / "tuned")
    for source in (tmp_path / "source", tmp_path / "source" / "model.safetensors"):
        refused = fork(*words, "--init-from", source)
        assert refused.returncode == 2
        assert "add --activation celu --widths 8 8 16 16" in refused.stderr
    assert fork(*words, "--init-from", source, "--activation", "celu").returncode == 0


@pytest.mark.parametrize("flags", [("--network", f"{OWN}other_shape"), ("--init-from", "nothing-there")])
def test_a_faulty_network_or_missing_initial_weights_are_refused_before_config_json_is_written(
    tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    finished = fork("smoke", "--device", "cpu", "--data-dir", str(tiny_dir), "--out", str(out), *flags)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1
    assert not (out / "config.json").exists()


SCRIPT = """
import sys
import ddp_trainer
assert "torch" not in sys.modules
result = ddp_trainer.launch(
    "smoke", num_processes=2, data_dir=DATA, out=OUT, network="beside:build", device="cpu", max_steps=2
)
print(result.state, result.accuracy, type(result.model()).__name__)
"""

BESIDE = """
from torch import nn

class Own(nn.Sequential):
    pass

def build(num_classes):
    return Own(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))
"""


def test_a_network_beside_the_users_script_is_found_from_anywhere(tiny_dir: Path, tmp_path: Path) -> None:
    """The network is not installed, and the working directory is another folder.

    The script finds the network nevertheless. `evaluate` finds it if PYTHONPATH contains the script's folder.
    """
    scripts, elsewhere, out = tmp_path / "scripts", tmp_path / "elsewhere", tmp_path / "run"
    scripts.mkdir()
    elsewhere.mkdir()
    (scripts / "beside.py").write_text(BESIDE)
    (scripts / "script.py").write_text(SCRIPT.replace("DATA", repr(str(tiny_dir))).replace("OUT", repr(str(out))))
    finished = subprocess.run(
        [sys.executable, scripts / "script.py"], cwd=elsewhere, env=environment(), text=True, capture_output=True,
        timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    state, accuracy, network = finished.stdout.split()
    assert (state, network) == ("done", "Own")
    assert 0 <= float(accuracy) <= 1
    refused = run("ddp_trainer.evaluate", out, "--device", "cpu", cwd=elsewhere)
    assert refused.returncode == 2
    assert "there is no module beside" in refused.stderr
    found = run(
        "ddp_trainer.evaluate", out, "--device", "cpu", cwd=elsewhere,
        env={"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(scripts)))},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
