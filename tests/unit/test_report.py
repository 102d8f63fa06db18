"""The page of the report agrees with the files of the run."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import printable
from ddp_trainer.report.scores import calibration, wilson_interval
from ddp_trainer.report.write import write_report
from tests.support.run_directories import make_run

VOID = {"meta", "img", "br"}
HOSTILE = (
    '<script>alert("1")</script>',
    "$x^{$",
    "a&b'\"",
    "鳥 \N{BIRD}\n2",
    "\\frac{1}$y$",
    "--><b>\x1b[31m",
    "x" * 300,
)


class Page(HTMLParser):
    """Checks that the tags are nested correctly, and collects tags and texts for the tests."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))  # self-closing, inside an SVG

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Page]:
    run = tmp_path_factory.mktemp("runs") / "complete"
    found = make_run(run)
    return run, found, Page(write_report([run]))


def test_page_loads_no_other_file_and_describes_every_picture(complete):
    run, found, page = complete
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    policy = next(one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page.source and set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert all(attributes.get("alt") for attributes in page.of("img"))
    charts = [attributes for attributes in page.of("div") if attributes.get("role") == "img"]
    assert len(charts) == len(page.of("svg")) == 4 + 2 and all(chart["aria-label"] for chart in charts)
    assert len(page.of("img")) == len(found["wrong_indices"])
    for name in ("curves.png", "confusion.png", "misclassified.png", "reliability.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_page_shows_the_numbers_in_the_run_directory(complete):
    _, found, page = complete
    low, high = wilson_interval(found["correct"], found["total"])
    predicted = found["probabilities"].argmax(axis=1)
    for words in (
        f"{found['correct'] / found['total']:.2%}",
        f"{found['correct']:,} of {found['total']:,} test images",
        f"{low:.2%} {high:.2%} 95% interval",
        "87.50%",
        "3 of 3",
        "1 min 1 s",
        "1.5 PFLOP, of which 0.25 in the optimizer",
        "6,573,130",
        "Imagined GPU",
        "torch 2.15.0",
        f"error {calibration(found['labels'], predicted, found['probabilities'].max(axis=1)).error:.2%}",
    ):
        assert words in page.text
    for label, count in enumerate(np.bincount(found["labels"])):
        hits = ((predicted == label) & (found["labels"] == label)).sum()
        precision = hits / (predicted == label).sum()
        assert f"{label} kind-{label} {count} {precision:.1%} {hits / count:.1%}" in page.text
    row = int(np.flatnonzero(found["indices"] == found["wrong_indices"][0])[0])
    caption = f"kind-{found['labels'][row]} taken for kind-{predicted[row]} {found['probabilities'][row].max():.1%}"
    assert caption in page.text
    assert "--num_processes 2" in page.text
    assert "-m ddp_trainer.train baseline --data-dir data/x --epochs 3" in page.text


def page_with(run: Path, **settings: float) -> Page:
    """Writes a run with these settings, and returns its page."""
    make_run(run)
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= settings
    (run / "config.json").write_text(json.dumps(config))
    return Page(write_report([run]))


def test_page_says_whether_the_training_loss_includes_label_smoothing(complete, tmp_path):
    assert "label smoothing" not in complete[2].text
    assert "label smoothing" in page_with(tmp_path / "smoothed", label_smoothing=0.2).text


@pytest.mark.usefixtures("no_drawing")
def test_page_counts_the_last_epoch_as_half_if_epochs_is_2_5(tmp_path):
    assert "2.5 of 2.5" in page_with(tmp_path / "fraction", epochs=2.5).text


def test_page_of_an_unfinished_run_shows_its_finished_epochs(tmp_path):
    run = tmp_path / "stopped"
    make_run(run)
    write_report([run])
    (run / "report" / "notes.png").write_bytes(b"of the user")
    for name in ("summary.json", "model.json", "predictions.npz"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"epoch": 4, "train_lo')  # the run crashed while it wrote this line
    (run / "status.json").write_text('{"state": "preempted", "message": "asked to <stop>"}')
    page = Page(write_report([run]))
    for words in ("57.00%", "state is preempted; finished epochs: 3", "asked to <stop>"):
        assert words in page.text
    assert "Calibration" not in page.text
    assert sorted(path.name for path in (run / "report").iterdir()) == [*("curves.png", "index.html", "notes.png")], (
        "pictures of an earlier report are left, or other files are deleted"
    )
    (run / "metrics.jsonl").unlink()
    assert "No epoch is finished" in Page(write_report([run])).text


def test_report_of_a_run_without_misclassified_images_replaces_the_old_picture(complete, tmp_path):
    run = shutil.copytree(complete[0], tmp_path / "perfect")
    with np.load(run / "predictions.npz") as found:
        kept = dict(found)
    kept["labels"] = kept["probabilities"].argmax(axis=1)
    kept |= {name: kept[name][:0] for name in ("wrong_indices", "wrong_images")}
    np.savez_compressed(run / "predictions.npz", **kept)
    page, sheet = Page(write_report([run])), run / "report" / "misclassified.png"
    assert page.of("img") == []
    assert sheet.read_bytes() != (complete[0] / "report" / "misclassified.png").read_bytes()


def test_all_100_classes_are_listed(tmp_path):
    make_run(tmp_path / "many", num_classes=100)
    page = Page(write_report([tmp_path / "many"]))
    assert all(re.search(rf"\bkind-{label} \d+ ", page.text) for label in range(100))


def test_hostile_names_are_shown_as_text(tmp_path):
    run = tmp_path / "<b>$run$"
    make_run(run, num_classes=len(HOSTILE), classes=HOSTILE)
    page = Page(write_report([run]))
    assert "script" not in {tag for tag, _ in page.tags} and "<b>$run" not in page.source
    assert all(" ".join(printable(name).split()) in page.text for name in HOSTILE)
    assert "<b>$run$" in page.text


def test_page_of_several_runs_shows_mean_and_standard_deviation_over_seeds(tmp_path):
    runs = [tmp_path / "a" / "same", tmp_path / "b" / "same", tmp_path / "stopped"]
    found = [make_run(run, seed=seed) for seed, run in enumerate(runs)]
    (runs[2] / "summary.json").unlink()
    page = Page(write_report(runs))
    shares = [one["correct"] / one["total"] for one in found[:2]]
    assert f"mean {np.mean(shares):.2%} 87.50%" in page.text
    assert f"standard deviation {np.std(shares, ddof=1):.2%} 0.00%" in page.text
    assert f"{np.mean(shares):.2%} mean accuracy on the test images over 2 runs" in page.text
    assert "3 runs side by side" in page.text and "stopped (not finished)" in page.text
    assert "a/same" in page.text and "b/same" in page.text and "seed 0 1 2" in page.text
    assert not (runs[1] / "report").exists()
    charts = [attributes["aria-label"] for attributes in page.of("div") if attributes.get("role") == "img"]
    assert sum("Confusion matrix" in (label or "") for label in charts) == 1


@pytest.mark.usefixtures("no_drawing")
def test_runs_with_different_settings_are_not_averaged(tmp_path):
    runs = [tmp_path / f"run-{number}" for number in range(4)]
    found = [
        make_run(run, seed=seed, peak_lr=peak_lr)
        for run, seed, peak_lr in zip(runs, (0, 0, 1, 1), (0.4, 0.2, 0.4, 0.2), strict=True)
    ]
    page = Page(write_report(runs))
    shares = [one["correct"] / one["total"] for one in found]
    for first, second in ((0, 2), (1, 3)):
        assert f"mean {np.mean([shares[first], shares[second]]):.2%}" in page.text
    assert page.text.count("standard deviation") == 3, (
        "expected one for each pair of runs, and one in the note below the table"
    )
    assert "over 2 runs" not in page.text
    assert "over 2 runs" not in Page(write_report([runs[0], runs[2], runs[1]])).text, (
        "a mean over only two of three runs is shown at the top"
    )


@pytest.mark.usefixtures("no_drawing")
def test_runs_with_different_numbers_of_processes_are_not_averaged(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        make_run(run, seed=seed)
    path = runs[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": 1}))
    assert Page(write_report(runs)).text.count("standard deviation") == 1, "expected only in the note below the table"


@pytest.mark.usefixtures("no_drawing")
def test_runs_that_differ_in_settings_without_effect_on_the_result_are_averaged(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        make_run(run, seed=seed)
        config = json.loads((run / "config.json").read_text())
        config["settings"] |= {"checkpoint_every_steps": seed, "data_dir": str(run)}
        (run / "config.json").write_text(json.dumps(config))
    page = Page(write_report(runs))
    assert "mean accuracy on the test images over 2 runs" in page.text


@pytest.mark.usefixtures("no_drawing")
def test_run_that_is_passed_twice_is_shown_once(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    page = Page(write_report([tmp_path / "run", tmp_path / "latest"]))
    assert "side by side" not in page.text
