"""Writing a report takes limited memory, the page is small, and the package contains its templates."""

import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddp_trainer.report.write import write_report
from tests.support.memory import PEAK_MEMORY
from tests.support.run_directories import make_run
from tests.support.trainer import REPOSITORY, environment

MEASURED = (
    PEAK_MEMORY
    + """
import sys
from pathlib import Path
from ddp_trainer.report.write import write_report
write_report([Path(sys.argv[1])])
print(peak_memory())
"""
)


def test_report_of_1000_classes_takes_limited_memory(tmp_path: Path) -> None:
    make_run(tmp_path / "run", num_classes=1000)
    found = np.load(tmp_path / "run" / "predictions.npz")
    labels = np.arange(10_000) % 1000
    probabilities = np.full((10_000, 1000), 1e-4, np.float32)
    probabilities[np.arange(10_000), np.where(np.arange(10_000) % 7, labels, labels // 2)] = 0.9
    kept = {name: found[name] for name in ("wrong_indices", "wrong_images")}
    kept["wrong_indices"] = np.arange(len(kept["wrong_images"])) * 7
    np.savez(
        tmp_path / "run" / "predictions.npz",
        indices=np.arange(10_000),
        labels=labels,
        probabilities=probabilities,
        **kept,
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "run"],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000, "the peak memory exceeds 1000 MiB"
    picture = np.asarray(Image.open(tmp_path / "run" / "report" / "confusion.png").convert("L"))
    assert picture.shape == (2000, 2000)
    cells = picture.reshape(1000, 2, 1000, 2)[:, 0, :, 0]
    assert (cells.diagonal() < 200).mean() > 0.8 and np.median(cells) == 255
    assert (cells[999, 499] < 255) and (cells[999, 498] == 255), "the rows are not the true classes"
    assert (tmp_path / "run" / "report" / "index.html").stat().st_size < 2e6


@pytest.mark.parametrize("shape", [(1024, 1024), (3, 5000)])
def test_page_stays_small_whatever_the_size_of_images(tmp_path: Path, shape: tuple[int, int]) -> None:
    found = make_run(tmp_path / "run")
    arrays = {key: array for key, array in found.items() if np.ndim(array)}
    noise = np.random.default_rng(0).integers(256, size=(1, *shape, 3), dtype=np.uint8)
    arrays["wrong_images"] = np.repeat(noise, len(arrays["wrong_indices"]), axis=0)
    np.savez(tmp_path / "run" / "predictions.npz", **arrays)
    assert write_report([tmp_path / "run"]).stat().st_size < 5e6


def test_wheel_has_the_templates(tmp_path: Path) -> None:
    """Imports the package straight from the wheel file, without installing it."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for package in ("data_prep", "ddp_trainer"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp_path, source)
    done = subprocess.run([sys.executable, *build], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    code = "from ddp_trainer.report import html; print(html.__file__); html.environment().get_template('page.html')"
    env = environment(PYTHONPATH=str(wheel))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and str(wheel) in done.stdout, done.stderr


def test_templates_are_files_of_the_package() -> None:
    folder = resources.files("ddp_trainer.report") / "templates"
    assert {"page.html", "style.css"} <= {file.name for file in folder.iterdir()}
