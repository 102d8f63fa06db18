"""The page of several runs says in which ways the runs and their images differ."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddp_trainer.report.charts import curves_figure
from ddp_trainer.report.comparison import compare, same_configuration
from ddp_trainer.report.sweep_table import results_table
from ddp_trainer.report.write import write_report
from ddp_trainer.tracking.run_record import load_run, load_runs
from tests.support.run_directories import make_run
from tests.unit.test_report import Page

CARE = "evaluated on different images, so compare their accuracies with care"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_pair(folder: Path, *test_images: str) -> list[Path]:
    """Two runs on the same training images. `test_images`: for each run, the sha256 of its test images."""
    runs = [folder / "one", folder / "two"]
    for seed, (run, sha256) in enumerate(zip(runs, test_images, strict=True)):
        make_run(run, seed=seed)
        splits = {"train": {"count": 900, "sha256": "a" * 64}, "test": {"count": 300, "sha256": sha256}}
        rewrite(run / "config.json", dataset={"source": "folder", "image_size": 8, "splits": splits})
    return runs


@pytest.mark.usefixtures("no_drawing")
def test_other_test_images_and_other_precisions_are_shown(tmp_path: Path) -> None:
    runs = make_pair(tmp_path, "b" * 64, "c" * 64)
    for run, precision in zip(runs, ("fp32", "bf16"), strict=True):
        rewrite(run / "config.json", precision=precision)
    text = Page(write_report(runs)).text
    assert "test images folder 300 (bbbbbbbb) folder 300 (cccccccc)" in text
    assert "precision fp32 bf16" in text
    assert CARE in text
    assert "train images folder" not in text and "processes" not in text.partition("Settings that differ")[2][:300]


@pytest.mark.usefixtures("no_drawing")
def test_runs_on_the_same_images_have_no_warning(tmp_path: Path) -> None:
    text = Page(write_report(make_pair(tmp_path, "b" * 64, "b" * 64))).text
    assert CARE not in text
    assert "mean accuracy on the test images over 2 runs" in text


@pytest.mark.usefixtures("no_drawing")
def test_the_mean_names_the_images_of_the_runs_over_which_it_is_taken(tmp_path: Path) -> None:
    runs = make_pair(tmp_path, "b" * 64, "b" * 64)
    make_run(tmp_path / "stopped", seed=2)
    config = json.loads((tmp_path / "stopped" / "config.json").read_text())
    rewrite(tmp_path / "stopped" / "config.json", settings=config["settings"] | {"validation": 100})
    (tmp_path / "stopped" / "summary.json").unlink()
    text = Page(write_report([tmp_path / "stopped", *runs])).text
    assert "mean accuracy on the test images over 2 runs" in text


def test_the_table_of_a_sweep_warns_of_runs_that_were_evaluated_on_different_images(tmp_path: Path) -> None:
    for other, expected in (("b", 0), ("c", 1)):
        runs = make_pair(tmp_path / other, "b" * 64, other * 64)
        table = results_table({"lr=1": runs})
        assert table.count("Warning: the runs were evaluated on different images.") == expected


def test_a_sweep_on_held_out_images_needs_the_same_seeds_in_all_rows(tmp_path: Path) -> None:
    """The seed decides which images are held out."""
    runs = []
    for name in ("one", "two", "three", "four"):
        runs.append(tmp_path / name)
        make_run(runs[-1], seed=len(runs) % 2)
        rewrite(runs[-1] / "summary.json", evaluation_split="validation")
        settings = json.loads((runs[-1] / "config.json").read_text())["settings"]
        rewrite(runs[-1] / "config.json", settings={**settings, "validation": 50})
    assert load_run(runs[0]).split == "validation"
    warning = "Warning: the runs were evaluated on different images."
    assert warning not in results_table({"lr=1": runs[:2], "lr=2": runs[2:]})
    assert warning in results_table({"lr=1": runs[:2], "lr=2": runs[2:3]})
    assert CARE in " ".join(str(compare(load_runs(runs[:2]))).split())


def test_numbers_of_different_types_and_a_chosen_precision_make_no_difference(tmp_path: Path) -> None:
    """A recipe has 11 epochs where --epochs 11 gives 11.0. The precision `auto` may be bf16."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, epochs, precision in zip(runs, (11, 11.0), ("auto", "bf16"), strict=True):
        make_run(run)
        settings = json.loads((run / "config.json").read_text())["settings"]
        rewrite(run / "config.json", settings={**settings, "epochs": epochs, "precision": precision})
    assert [len(group) for group in same_configuration(load_runs(runs))] == [2]


def test_each_run_has_its_own_label_and_its_own_curves_in_the_picture(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    names = [f"photos-256-a-long-name-{seed}-of-the-learning-rate" for seed in range(9)] + ["猫", "run 9", "last"]
    runs = [replace(load_run(tmp_path / "run"), name=name) for name in names]
    figure = curves_figure(runs)
    *lines, training = figure.legends[0].get_lines()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == len(labels) == 13
    assert max(map(len, labels)) <= 24
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert len(set(looks)) == 12
    for axes in figure.axes:
        curves = axes.get_lines()
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}) == len(curves)
    assert training.get_label() == "training"


def test_the_table_of_many_runs_shows_the_color_and_marker_of_each(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    runs = [replace(load_run(tmp_path / "run"), name=str(number), path=Path(str(number))) for number in range(21)]
    marks = re.findall(r'var\(--(series-\d)\)">(.?)</i>', compare(runs))
    assert len(marks) == len(set(marks)) == 21


def test_runs_in_folders_of_the_same_name_are_named_with_as_many_parents_as_needed(tmp_path: Path) -> None:
    folders = ["a/x/run", "b/x/run", "b/y/run", "other"]
    for folder in folders:
        make_run(tmp_path / folder)
    assert [run.name for run in load_runs([tmp_path / folder for folder in folders])] == [
        *folders[:2],
        "y/run",
        "other",
    ]
