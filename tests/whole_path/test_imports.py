"""Importing a module has no side effects, and an invalid command line is refused before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source import PACKAGES, REPOSITORY

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys, threading
import torch
from PIL import Image
import data_prep.dataset, ddp_trainer.engine.build, ddp_trainer.train, slurm.preflight  # what a run imports
limited = Image.MAX_IMAGE_PIXELS is not None
before = {"threads": torch.get_num_threads(), "seed": torch.initial_seed()}
names = []
for package in PACKAGES:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        names.append(module.name)
        importlib.import_module(module.name)
print(json.dumps({
    "names": names,
    "loaded": sorted(sys.modules),
    "alive": threading.active_count(),
    "before": before,
    "after": {"threads": torch.get_num_threads(), "seed": torch.initial_seed()},
    "cuda": torch.cuda.is_initialized(),
    "joined": torch.distributed.is_initialized(),
    "limited": limited,
}))
"""


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    """An import writes nothing, starts no thread, changes no setting, and loads no heavy library except torch."""
    code = IMPORT_EVERYTHING.replace("PACKAGES", repr(PACKAGES))
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, text=True, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)  # nothing else was printed
    assert set(seen["names"]) >= {"data_prep.__main__", "ddp_trainer.train", "ddp_trainer.tracking.tracker"}
    heavy = {"ffcv", "numba", "cv2", "wandb", "matplotlib", "torchvision", "tensorboard"}
    assert heavy.isdisjoint(name.split(".")[0] for name in seen["loaded"])
    assert seen["after"] == seen["before"]
    assert (seen["alive"], seen["cuda"], seen["joined"]) == (1, False, False)
    assert seen["limited"], "Pillow's limit on the size of images was off after the imports of a run"
    assert list(tmp_path.iterdir()) == []


def test_importing_ffcv_does_not_query_the_gpus() -> None:
    """A process that is forked after such a query cannot use CUDA."""
    code = """
import torch
calls = []
torch._C._cuda_getDeviceCount = lambda: calls.append(1) or 0
from data_prep.ffcv_import import import_ffcv
import_ffcv()
import ffcv.loader
print(calls)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("module", ["ddp_trainer.train", "ddp_trainer.sweep", "ddp_trainer.report", "slurm.preflight"])
def test_invalid_command_line_is_refused_before_torch_is_imported(module: str, tmp_path: Path) -> None:
    """Importing torch takes seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, "-m", module, "nothing-of-this-name"],
        env=variables,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "nothing-of-this-name" in done.stderr
