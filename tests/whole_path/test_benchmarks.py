"""The benchmarks run on tiny datasets and write all their figures. Their speed is not checked."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest

from benchmarks import accuracy_picture, collect_runs, training_step
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.measure import cost_of
from data_prep.errors import InputError
from tests.support.run_directories import make_run
from tests.support.source import REPOSITORY
from tests.support.trainer import run

SHORT = ("--batch-size", "4", "--steps", "1")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loading", ("--batch-size", "32", "--images", "64")),
        ("training_step", ("--recipe", "fast", "--side", "16", "--widths", "8", "8", "8", "8", *SHORT)),
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


def test_loaders_of_photographs_are_compared(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    flags = ("--images", "20", "--batch-size", "10", "--rounds", "1", "--work", tmp_path, "--result", result)
    finished = run("benchmarks.photo_loading", *flags)
    assert finished.returncode == 0, finished.stderr
    written = json.loads(result.read_text())
    assert 45 < written["conditions"]["kilobytes_per_photograph"] < 65
    for name in ("jpeg", "raw", "jpeg_augmented", "raw_augmented"):
        assert written["figures"][f"{name}_images_per_second"] > 0
    assert {"jpeg_beside_imagefolder", "raw_augmented_beside_imagefolder_augmented"} < written["figures"].keys()
    assert [*tmp_path.iterdir()] == [result], "the data is not removed"


def test_training_step_accepts_the_flags_of_the_trainer() -> None:
    options, config = training_step.parse_options(["--recipe", "fast", "--network", "torchvision:resnet18", *SHORT])
    assert options.steps == 1
    assert config.network.network == "torchvision:resnet18"
    assert (config.recipe, config.schedule.batch_size) == ("fast", 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--side", "33"), "--side must be 8 to 32 pixels, got 33"),
        (("--batch-size", "97"), "--batch-size must be at most"),
    ],
)
def test_training_step_refuses_settings_that_it_cannot_measure(
    flags: tuple[str, ...], message: str, tiny_dir: Path
) -> None:
    with pytest.raises(InputError, match=message):
        training_step.main(["--recipe", "fast", "--data-dir", str(tiny_dir), *flags])


def test_scaling_measures_each_part_and_draws_a_picture(tmp_path: Path) -> None:
    result, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    parts = ["--parts", "prepare", "checkpoint"]
    scaling.main(["--quick", "--work", str(tmp_path), "--result", str(result), "--picture", str(picture), *parts])
    figures = json.loads(result.read_text())["figures"]
    for part in parts[1:]:
        name = f"images: 64 images of 32 pixels in 4 classes: {part}"
        assert 0 < figures[f"{name} seconds"] < 100
        assert 50 < figures[f"{name} megabytes"] < 4000
        assert math.isfinite(figures[f"images: {part} seconds exponent"])
    assert picture.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.png"]


def test_memory_of_all_processes_of_a_command_is_counted(tmp_path: Path) -> None:
    child = "import sys, time; block = b'x' * (int(sys.argv[1]) << 20); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, '60']); print(2.5)"
    cost = cost_of([sys.executable, "-c", parent], tmp_path / "log")
    assert cost.seconds == 2.5
    assert 60 < cost.megabytes < 120
    with pytest.raises(InputError, match="failed: no such thing"):
        cost_of([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")


def test_finished_runs_are_collected_and_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for seed, path in enumerate(runs):
        make_run(path, seed=seed)
    arguments = [*map(str, runs), "--data", "random predictions", "--result", str(tmp_path / "result.json")]
    collect_runs.main(arguments)
    text = (tmp_path / "result.json").read_text()
    first, second = json.loads(text)["runs"]
    assert second["command"] == first["command"].replace("--out", "--seed 1 --out")
    assert (first["summary"]["test_accuracy_tta"], [epoch["epoch"] for epoch in first["epochs"]]) == (0.875, [1, 2, 3])
    assert "data/x" not in text and str(tmp_path) not in text, "the result contains a path of this machine"
    (runs[1] / "summary.json").unlink()
    with pytest.raises(InputError, match=r"b has no summary\.json"):
        collect_runs.main(arguments)
    assert (tmp_path / "result.json").read_text() == text


def test_page_of_results_states_the_accuracies_in_the_picture(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    for name, file in {**accuracy_picture.RECIPES, **accuracy_picture.OTHER_PROJECTS}.items():
        point = accuracy_picture.read_point(accuracy_picture.RESULTS / file)
        assert f"| `{name}`, test accuracy | {statistics.mean(point.without_tta):.2f} %" in page
        assert f"| `{name}`, TTA | {statistics.mean(point.with_tta):.2f} %" in page
    accuracy_picture.main(["--picture", str(tmp_path / "accuracy.png")])
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
