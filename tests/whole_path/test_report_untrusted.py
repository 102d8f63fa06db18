"""Untrusted run directories: hostile content of a file is handled, or refused in one line without a traceback."""

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer import evaluate, export, model_card, predict
from ddp_trainer.config import NetworkConfig, TrainConfig
from ddp_trainer.models.spec import ModelSpec, build_model, load_model
from ddp_trainer.report import __main__ as report
from ddp_trainer.report.reproduce import reproduce_commands
from ddp_trainer.report.write import write_report
from ddp_trainer.run.outputs import write_model
from ddp_trainer.tracking.run_record import load_run
from tests.support.mutations import VALUES, mutations, write_text
from tests.support.run_directories import make_run

JSON_FILES = ("config.json", "model.json", "summary.json", "status.json", "metrics.jsonl", "steps.jsonl")


@pytest.fixture(scope="module")
def narrow_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose network is so small that it can be loaded hundreds of times."""
    run, dataset = tmp_path_factory.mktemp("untrusted") / "run", read_dataset(tiny_dir)
    make_run(run, classes=tuple(dataset.classes))
    config = json.loads((run / "config.json").read_text())
    config |= {"data_dir": str(tiny_dir), "dataset": json.loads((tiny_dir / "dataset.json").read_text())}
    (run / "config.json").write_text(json.dumps(config))
    (run / "status.json").write_text('{"state": "done", "step": 30, "epoch": 3, "message": "fine"}')
    spec = ModelSpec.of(dataset, TrainConfig(network=NetworkConfig(widths=(2, 2, 4, 4))))
    write_model(run, build_model(spec).eval(), spec)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(run / "image.png")
    return run


def check(
    command: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str], content: str
) -> None:
    status = command(arguments)
    printed = capsys.readouterr()
    assert status in (0, 2), content[:500]
    if status == 2:
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, (printed.err, content[:500])
    assert not unsafe_characters(printed.err), (printed.err, content[:500])


def unsafe_characters(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) in ("Cc", "Cs")} - {"\n", "\t"}


def try_mutations(run: Path, names: tuple[str, ...], count: int, command: Callable[[str], None], seed: int = 0) -> None:
    """Runs `command` with `count` variants of each file, one file changed at a time."""
    for name in names:
        original = (run / name).read_text()
        try:
            for content in mutations(original, count, seed):
                write_text(run / name, content)
                command(content)
        finally:
            (run / name).write_text(original)


@pytest.mark.usefixtures("no_drawing")
def test_report_survives_changed_json(narrow_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(content: str) -> None:
        check(report.main, [str(narrow_run)], capsys, content)
        if (narrow_run / "report" / "index.html").exists():
            assert not unsafe_characters((narrow_run / "report" / "index.html").read_text())
            shutil.rmtree(narrow_run / "report")

    try_mutations(narrow_run, JSON_FILES, 40, command)


def test_many_mutations_are_valid_json(narrow_run: Path) -> None:
    """If few were valid, the other tests in this file would only show that invalid JSON is refused."""
    usable = 0
    for content in mutations((narrow_run / "config.json").read_text(), 100, seed=0):
        try:
            json.loads(content)
            usable += 1
        except (ValueError, RecursionError):
            pass
    assert 50 < usable < 95


def test_curves_of_changed_records_are_drawn_or_refused(narrow_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(narrow_run)]
    try_mutations(
        narrow_run, ("metrics.jsonl", "steps.jsonl"), 5, lambda content: check(report.main, arguments, capsys, content)
    )


def test_model_card_survives_changed_json(narrow_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(content: str) -> None:
        check(model_card.main, [str(narrow_run)], capsys, content)
        if (narrow_run / "model.md").exists():
            card = (narrow_run / "model.md").read_text()
            outside = re.sub(r"```.*?```|`[^`\n]*`", "", card, flags=re.DOTALL)
            assert not unsafe_characters(card) and not re.search(r"[<>]|\]\(|^#{3}", outside, flags=re.MULTILINE), (
                content
            )
            (narrow_run / "model.md").unlink()

    try_mutations(narrow_run, JSON_FILES[:5], 30, command, seed=1)


def test_predict_survives_changed_json(narrow_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(narrow_run), str(narrow_run / "image.png")]
    try_mutations(narrow_run, ("model.json",), 80, lambda content: check(predict.main, arguments, capsys, content), 2)


def test_evaluate_survives_changed_json(narrow_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.json", "model.safetensors"):
        shutil.copy(narrow_run / name, tmp_path)
    arguments = [str(narrow_run), "--device", "cpu"]
    try_mutations(
        narrow_run,
        ("model.json", "config.json"),
        40,
        lambda content: check(evaluate.main, arguments, capsys, content),
        seed=3,
    )
    for value in VALUES:
        (tmp_path / "config.json").write_bytes(json.dumps({"data_dir": value}).encode())
        check(evaluate.main, [str(tmp_path), "--device", "cpu"], capsys, repr(value))


def test_export_survives_changed_json(
    narrow_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_only(run_dir: Path) -> None:
        load_model(run_dir)
        raise InputError("the model was loaded; exporting each one would take too long")

    monkeypatch.setattr(export, "load_model", load_only)
    arguments = [str(narrow_run), "--format", "torch"]
    try_mutations(narrow_run, ("model.json",), 40, lambda content: check(export.main, arguments, capsys, content), 4)


def test_wrong_widths_and_image_sizes_in_model_json_are_refused(narrow_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(narrow_run, tmp_path / "run")
    fields = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps({**fields, "widths": [8192] * 4}))  # would take 17 GB
    with pytest.raises(InputError, match=r"does not fit model\.json"):
        load_model(run)
    for changes in ({"widths": [20000] * 4}, {"widths": "abcd"}, {"image_size": 0}, {"image_size": 60000}):
        (run / "model.json").write_text(json.dumps(fields | changes))
        with pytest.raises(InputError, match=next(iter(changes))):
            load_model(run)


def test_report_never_follows_a_link_out_of_the_run(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make_run(run)
    elsewhere.mkdir()
    for name in ("holiday.png", "curves.png", "index.html"):
        (elsewhere / name).write_text("mine")
    (run / "report").symlink_to(elsewhere)
    with pytest.raises(InputError, match="symbolic link"):
        write_report([run])
    (run / "report").unlink()
    (run / "report").mkdir()
    (run / "report" / "index.html").symlink_to(elsewhere / "index.html")
    (run / "report" / "holiday.png").symlink_to(elsewhere / "holiday.png")
    write_report([run])
    assert {path.read_text() for path in elsewhere.iterdir()} == {"mine"}
    assert (run / "report" / "holiday.png").is_symlink(), "a file that this program did not write is gone"


@pytest.mark.parametrize("commit", ["-f", "HEAD; id", "0000000\x1b[201~", "abc", "G" * 40])
def test_commands_that_repeat_the_run_contain_the_commit_only_if_it_is_a_hash(tmp_path: Path, commit: str) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "git_commit": commit}))
    assert not [line for line in reproduce_commands(load_run(tmp_path / "run")) if "git" in line]
