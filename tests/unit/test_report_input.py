"""If a report cannot be made from a run directory, one line names the damaged file."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from ddp_trainer import model_card
from ddp_trainer.config import SEED_LIMIT
from ddp_trainer.report.__main__ import main
from ddp_trainer.report.write import write_report
from ddp_trainer.tracking.run_record import load_run
from tests.support.run_directories import make_run


def damage(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "vit"}'),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "no\n{}"),
        ("predictions.npz", "no zip"),
        ("summary.json", '{"test_correct": 3, "test_total": 2}'),
        ("model.json", '{"classes": ["one"]}'),
    ],
)
def test_error_names_the_damaged_file_in_one_line(tmp_path, capsys, name, content):
    make_run(tmp_path / "run")
    damage(tmp_path / "run", name, content)
    assert main([str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and name in line
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"epochs": -(10**400)}, "epochs"),
        ({"peak_lr": 10**400}, "peak_lr"),
        ({"widths": [8, -(10**19)]}, "widths"),
        ({"epochs": float("inf")}, "epochs"),
        ({"validation": 8, "seed": [1]}, "seed"),
        ({"validation": [8]}, "validation"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(tmp_path, capsys, settings, name):
    for run in (tmp_path / "one", tmp_path / "two"):
        make_run(run)
        (run / "summary.json").write_text("{}")  # without evaluation_split, --validation decides
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "settings": config["settings"] | settings}))
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and f"config.json: settings.{name} must be " in line


def test_the_largest_seed_can_be_reported(tmp_path):
    make_run(tmp_path / "run", seed=SEED_LIMIT - 1)
    assert load_run(tmp_path / "run").settings["seed"] == SEED_LIMIT - 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", np.full(300, 10)),
        ("indices", np.arange(3)),
        ("probabilities", np.full((300, 10), np.nan)),
        ("wrong_images", np.zeros((1, 8, 8, 3), np.uint8)),
        ("wrong_indices", np.zeros(48, np.int64)),
        ("wrong_images", np.zeros((48, 0, 8, 3), np.uint8)),
        ("labels", np.zeros(300)),
    ],
)
def test_predictions_of_wrong_shapes_or_values_are_refused(tmp_path, name, value):
    found = make_run(tmp_path / "run")
    arrays = {key: array for key, array in found.items() if np.ndim(array)} | {name: value}
    np.savez(tmp_path / "run" / "predictions.npz", **arrays)
    with pytest.raises(InputError, match=r"predictions\.npz"):
        write_report([tmp_path / "run"])


def test_command_prints_the_path_of_the_report_or_one_error_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    make_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report' / 'index.html'}\n"


@pytest.mark.parametrize(
    ("marker", "offset", "replacement"),
    [(b"indices.npy", 60, b"\xff" * 40), (b"PK\x01\x02", 8, b"\x01"), (b"PK\x01\x02", 10, b"\x63")],
    ids=["compressed data", "encrypted", "unknown compression"],
)
def test_error_names_a_zip_file_with_damaged_content(tmp_path, capsys, marker, offset, replacement):
    """The names of the arrays are readable; the damage is found only when an array is read."""
    arrays = make_run(tmp_path / "run")
    path = tmp_path / "run" / "predictions.npz"
    np.savez_compressed(path, **{key: array for key, array in arrays.items() if np.ndim(array)})
    content = bytearray(path.read_bytes())
    start = content.index(marker) + offset
    content[start : start + len(replacement)] = replacement
    path.write_bytes(content)
    assert main([str(tmp_path / "run")]) == 2
    assert "predictions.npz cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, model_card.main])
def test_error_names_a_path_that_is_too_long(command, capsys) -> None:
    assert command(["a" * 300]) == 2
    assert capsys.readouterr().err.startswith("error: aaa")
