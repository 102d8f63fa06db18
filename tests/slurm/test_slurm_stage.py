"""A dataset is copied to the local disk of a node, and a damaged copy is not used."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.errors import InputError
from slurm.stage import main, stage


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy"


def test_the_error_for_damaged_data_names_the_original(tiny_dir: Path, tmp_path: Path, copy: Path) -> None:
    data = Path(shutil.copytree(tiny_dir, tmp_path / "data"))
    (data / "train.beton").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        stage(data, copy)
    assert f"{data}/train.beton" in str(caught.value)
    assert f"--out {data}" in str(caught.value)
    assert str(copy) not in str(caught.value)


def test_a_damaged_copy_is_not_used(tiny_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: target.write_bytes(source.read_bytes()[:-1] + b" "))
    with pytest.raises(InputError, match=rf"{tiny_dir} is intact, but its copy in {copy} .* DDP_STAGE_DIR"):
        stage(tiny_dir, copy)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "a\0b"},
        {"file": "../train.beton"},
        {"file": ""},
        {"file": "."},
        {"file": ["train.beton"]},
        {"file": "pipe"},
        {"file": "nothing"},
        {"bytes": "many"},
        {"sha256": None},
    ],
)
def test_an_invalid_manifest_is_refused_in_one_line(
    change: dict,
    tiny_dir: Path,
    tmp_path: Path,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = Path(shutil.copytree(tiny_dir, tmp_path / "data"))
    os.mkfifo(data / "pipe")
    manifest = json.loads((data / "dataset.json").read_text())
    manifest["splits"]["train"] |= change
    (data / "dataset.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["stage", str(data), str(copy)])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(data) in line
