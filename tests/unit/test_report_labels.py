"""The labels of classes in the report's pictures are short, and no two are the same."""

from pathlib import Path

import matplotlib
import pytest

from ddp_trainer.report.labels import distinct_labels, drawable_labels, is_drawable, shorten
from ddp_trainer.report.write import write_report
from tests.support.run_directories import make_run
from tests.support.trainer import run

PLANTS = ["Corn_(maize)___Common_rust_", "Corn_(maize)___Northern_Leaf_Blight", "Corn_(maize)___healthy"]


@pytest.mark.parametrize(
    "names",
    [
        PLANTS,
        [f"{'a' * 30}{number}{'z' * 30}" for number in range(100)],
        ["x" * 40, "x" * 41, "0: xxxxxx…xxxxx", "1: xxxxxx…xxxxx"],
        ["cat", "cat", "dog"],
        ["猫", "狗", "ねこ", "\u0e41\u0e21\u0e27", "class 0"],
        ["class 1", "猫"],
    ],
)
def test_no_two_classes_share_a_label(names: list[str]) -> None:
    for labels in (distinct_labels(names), drawable_labels(names), distinct_labels(names, 14)):
        assert len(set(labels)) == len(names) == len(labels)
        assert max(map(len, labels)) <= 16
    assert all(map(is_drawable, drawable_labels(names)))


def test_short_labels_are_unchanged_and_long_ones_keep_both_ends() -> None:
    assert distinct_labels(["cat", "dog"]) == ["cat", "dog"]
    assert shorten("Corn_(maize)___healthy") == "Corn_(ma…healthy"


@pytest.mark.parametrize("other", ["dog ", " dog", "d\u200bog", "do\u00adg"])
def test_names_that_look_the_same_get_different_labels(other: str) -> None:
    assert distinct_labels(["dog", other]) == ["0: dog", f"1: {other}"]


def test_the_users_matplotlib_settings_do_not_change_the_report(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    page = write_report([tmp_path / "run"]).read_text()
    with matplotlib.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True, "font.size": 30}):
        assert write_report([tmp_path / "run"]).read_text() == page


def test_matplotlib_settings_that_cannot_be_used_are_reported_in_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    finished = run("ddp_trainer.report", tmp_path / "run", env={"MPLBACKEND": "bogus"})
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: matplotlib cannot be imported (Key backend: 'bogus' is not a valid value")
    assert not (tmp_path / "run" / "report").exists()
