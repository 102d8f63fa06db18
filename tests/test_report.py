"""The report: its arithmetic against slow references, and the page against the files it was made from."""

import json
import math
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_directories import draw_predictions, make_run

from data_prep.errors import InputError
from ddp_trainer.report import write_report
from ddp_trainer.report.__main__ import main
from ddp_trainer.report.loading import load_run
from ddp_trainer.report.reproduce import LEFT_OUT, reproduce_commands
from ddp_trainer.report.scores import (
    NUM_BINS,
    Z95,
    calibration,
    confused_pairs,
    confusion_counts,
    precision_and_recall,
    wilson_interval,
)

VOID = {"meta", "img", "source", "br"}
HOSTILE = ('<script>alert("1")</script>', "$x^{$", "a&b'\"", "鳥 \N{BIRD}\n2", "\\frac{1}$y$", "x" * 300)


class Page(HTMLParser):
    """Checks the nesting and collects what the tests ask about."""

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


def test_wilson_interval_solves_its_equation():
    for correct, total in ((0, 5), (5, 5), (1, 3), (9612, 10000)):
        low, high = wilson_interval(correct, total)
        assert 0 <= low <= correct / total <= high <= 1
        for end in {low, high} - {0.0, 1.0}:  # |share - p| is Z95 standard errors of p
            assert abs(correct / total - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / total))


def test_counts_precision_recall_and_pairs_agree_with_loops():
    found = draw_predictions(7)
    labels, predicted = found["labels"], found["probabilities"].argmax(axis=1)
    seen = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    confusion = confusion_counts(labels, predicted, 8)  # the eighth class does not occur
    assert confusion.sum() == len(labels)
    assert all(confusion[true, other] == seen[true, other] for true in range(8) for other in range(8))
    precision, recall = precision_and_recall(confusion)
    for label in range(7):
        hits = seen[label, label]
        assert precision[label] == hits / sum(n for (_, other), n in seen.items() if other == label)
        assert recall[label] == hits / sum(n for (true, _), n in seen.items() if true == label)
    assert math.isnan(precision[7]) and math.isnan(recall[7])
    pairs = confused_pairs(confusion, 100)
    mistakes = {key: n for key, n in seen.items() if key[0] != key[1]}
    assert {(pair.true, pair.predicted): pair.images for pair in pairs} == mistakes
    assert [pair.images for pair in pairs] == sorted((pair.images for pair in pairs), reverse=True)


def test_calibration_error_agrees_with_a_loop_over_bins():
    found = draw_predictions(4, count=500)
    confidence = found["probabilities"].max(axis=1).astype(float)
    hits = found["probabilities"].argmax(axis=1) == found["labels"]
    expected = 0.0
    for number in range(NUM_BINS):
        inside = (confidence > number / NUM_BINS) & (confidence <= (number + 1) / NUM_BINS)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    measured = calibration(found["labels"], found["probabilities"])
    assert measured.error == pytest.approx(expected, abs=1e-12)
    assert measured.counts.sum() == 500
    sure = calibration(np.zeros(5, np.int64), np.tile(np.array([1, 0], np.float32), (5, 1)))
    assert sure.error == 0 and sure.counts[-1] == 5


def test_page_loads_nothing_and_describes_every_picture(complete):
    run, found, page = complete
    assert page.of("script") == [] and page.of("link") == [] and page.of("iframe") == []
    policy = next(one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert all(attributes.get("alt") for attributes in page.of("img"))
    assert len(page.of("img")) == 4 + 2 + len(found["wrong_indices"])
    for name in ("curves.png", "confusion.png", "misclassified.png", "reliability.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_page_says_what_the_files_say(complete):
    _, found, page = complete
    low, high = wilson_interval(found["correct"], found["total"])
    for words in (
        f"{found['correct'] / found['total']:.2%}", f"{found['correct']:,} of {found['total']:,} test images",
        f"{low:.2%} to {high:.2%}", "87.50%", "3 of 3", "1 min 1 s", "1.5 PFLOP", "6,573,130", "Imagined GPU",
        "torch 2.15.0",
        f"error {calibration(found['labels'], found['probabilities']).error:.2%}",
    ):  # fmt: skip
        assert words in page.text
    predicted = found["probabilities"].argmax(axis=1)
    for label, count in enumerate(np.bincount(found["labels"])):
        hits = ((predicted == label) & (found["labels"] == label)).sum()
        precision = hits / (predicted == label).sum()
        assert f"kind-{label} {count} {precision:.1%} {hits / count:.1%}" in page.text
    row = int(np.flatnonzero(found["indices"] == found["wrong_indices"][0])[0])
    said = f"kind-{found['labels'][row]} taken for kind-{predicted[row]} {found['probabilities'][row].max():.1%}"
    assert said in page.text
    assert "--num_processes 2" in page.text
    assert "-m ddp_trainer.train baseline --data-dir data/x --epochs 3" in page.text


def test_interrupted_run_is_described_by_its_epochs(tmp_path):
    run = tmp_path / "stopped"
    make_run(run)
    write_report([run])
    for name in ("summary.json", "model.json", "predictions.npz"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"epoch": 4, "train_lo')  # the crash came while it was written
    (run / "status.json").write_text('{"state": "preempted", "message": "asked to <stop>"}')
    page = Page(write_report([run]))
    for words in ("57.00%", "preempted, after 3 finished epochs", "asked to <stop>"):
        assert words in page.text
    assert "Calibration" not in page.text
    assert sorted(path.name for path in (run / "report").iterdir()) == ["curves.png", "index.html"]
    (run / "metrics.jsonl").unlink()
    assert "No epoch was finished" in Page(write_report([run])).text


def test_hundred_classes_are_all_there(tmp_path):
    make_run(tmp_path / "many", num_classes=100)
    page = Page(write_report([tmp_path / "many"]))
    assert all(re.search(rf"\bkind-{label} \d+ ", page.text) for label in range(100))


def test_hostile_names_are_shown_as_they_are(tmp_path):
    run = tmp_path / "<b>$run$"
    make_run(run, num_classes=len(HOSTILE), classes=HOSTILE)
    page = Page(write_report([run]))
    assert "script" not in {tag for tag, _ in page.tags} and "<b>$run" not in page.source
    assert all(" ".join(name.split()) in page.text for name in HOSTILE)
    assert "<b>$run$" in page.text


def test_commands_to_run_it_again_are_understood(smoke_run):
    from data_prep.__main__ import parse
    from ddp_trainer.command_line import parse_command_line
    from ddp_trainer.recipes import RECIPES

    lines = reproduce_commands(load_run(smoke_run))
    data, training = (shlex.split(line)[3:] for line in lines[-2:])
    options = parse(data)
    assert (options.source, options.train_count, options.test_count, options.size) == ("synthetic", 96, 40, 32)
    config = parse_command_line(training, RECIPES, prog="train", description="")
    original = json.loads((smoke_run / "config.json").read_text())["settings"]
    assert {name for name, value in config.flat().items() if value != original[name]} <= LEFT_OUT


def test_several_runs_have_mean_and_spread_over_their_seeds(tmp_path):
    runs = [tmp_path / "a" / "same", tmp_path / "b" / "same", tmp_path / "stopped"]
    found = [make_run(run, seed=seed) for seed, run in enumerate(runs)]
    (runs[2] / "summary.json").unlink()
    page = Page(write_report(runs))
    shares = [one["correct"] / one["total"] for one in found[:2]]
    assert f"mean {np.mean(shares):.2%} 87.50%" in page.text
    assert f"standard deviation {np.std(shares, ddof=1):.2%} 0.00%" in page.text
    assert f"{np.mean(shares):.2%} mean accuracy on the test images over 2 seeds" in page.text
    assert "3 runs side by side" in page.text and "stopped (not complete)" in page.text
    assert "a/same" in page.text and "b/same" in page.text and "seed 0 1 2" in page.text
    assert not (runs[1] / "report").exists()


def test_runs_of_different_settings_are_not_averaged(tmp_path):
    runs = [tmp_path / f"run-{number}" for number in range(4)]
    found = [make_run(run, seed=seed, peak_lr=peak_lr) for run, seed, peak_lr in zip(
        runs, (0, 0, 1, 1), (0.4, 0.2, 0.4, 0.2), strict=True)]  # fmt: skip
    page = Page(write_report(runs))
    shares = [one["correct"] / one["total"] for one in found]
    for first, second in ((0, 2), (1, 3)):
        assert f"mean {np.mean([shares[first], shares[second]]):.2%}" in page.text
    assert page.text.count("standard deviation") == 3, "two rows, and the note below the table"
    assert "over 2 seeds" not in page.text


def damage(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"), ("config.json", "[]"), ("metrics.jsonl", "{}\n"), ("metrics.jsonl", "no\n{}"),
        ("predictions.npz", "no zip"), ("summary.json", '{"test_correct": 3, "test_total": 2}'),
        ("model.json", '{"classes": ["one"]}'),
    ],
)  # fmt: skip
def test_damaged_file_is_named_in_one_line(tmp_path, capsys, name, content):
    make_run(tmp_path / "run")
    damage(tmp_path / "run", name, content)
    assert main([str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and name in said
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("labels", np.full(300, 10)), ("indices", np.arange(3)), ("probabilities", np.full((300, 10), np.nan)),
     ("wrong_images", np.zeros((1, 8, 8, 3), np.uint8)), ("wrong_indices", np.zeros(60, np.int64))],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_refused(tmp_path, name, value):
    found = make_run(tmp_path / "run")
    arrays = {key: array for key, array in found.items() if np.ndim(array)} | {name: value}
    np.savez(tmp_path / "run" / "predictions.npz", **arrays)
    with pytest.raises(InputError, match=r"predictions\.npz"):
        write_report([tmp_path / "run"])


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    make_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report' / 'index.html'}\n"
