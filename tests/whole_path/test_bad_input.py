"""Runs that cannot start. Wrong input: exit status 2, one line with the problem and its fix, no file overwritten."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.beton import read_samples
from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.engine.build import prepare_network
from ddp_trainer.train import main as train_main
from tests.support.processes import wait_until
from tests.support.trainer import NARROW, REPOSITORY, environment, fork, run, start, train

SMOKE = ("smoke", "--device", "cpu")


def refused(*arguments: str | Path, **options: object) -> str:
    """Runs the trainer, which must refuse the input, and returns its line on stderr."""
    finished = run("ddp_trainer.train", *arguments, **options)  # type: ignore[arg-type]
    lines = [line for line in finished.stderr.splitlines() if line]
    assert finished.returncode == 2, finished.stderr
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_a_bit(folder: Path) -> None:
    path = folder / "train.beton"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "train.beton"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "python -m data_prep --source SOURCE --out"),
    "no dataset.json": (lambda folder: (folder / "dataset.json").unlink(), "python -m data_prep"),
    "dataset.json is not JSON": (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json"),
    "another version": (lambda folder: edit_manifest(folder, format_version=99), "version"),
    "truncated": (truncate, "python -m data_prep --source synthetic --out"),
    "bit flip": (flip_a_bit, "python -m data_prep --source synthetic --out"),
    "not a beton file": (lambda folder: (folder / "test.beton").write_bytes(b"hello world" * 1000), "test.beton"),
    "no test.beton": (lambda folder: (folder / "test.beton").unlink(), "test.beton"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_is_refused(tiny_dir: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(tiny_dir, folder)
    harm, expected = DAMAGES[damage]
    harm(folder)
    finished = fork(*SMOKE, "--data-dir", folder, "--out", tmp_path / "run")
    (line,) = finished.stderr.splitlines()
    assert (finished.returncode, line[:7]) == (2, "error: ")
    assert expected in line
    assert str(folder) in line
    assert not (tmp_path / "run").exists(), "files were written although the input was refused"


def test_verify_full_finds_a_changed_pixel_in_a_large_dataset(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.dataset.HASHED_BYTES", 0)  # every file counts as large
    data = shutil.copytree(tiny_dir, tmp_path / "data")
    content = bytearray((data / "train.beton").read_bytes())
    content[int(read_samples(data / "train.beton")["image"]["ptr"][3]) + 100] ^= 1
    (data / "train.beton").write_bytes(content)
    words = (*SMOKE, "--data-dir", str(data), "--out", str(tmp_path / "run"), "--verify", "full")
    assert train_main(words) == 2
    assert "sha256 differs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fields_of_wrong_types_in_dataset_json_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    whole = json.loads((tiny_dir / "dataset.json").read_text())
    for field in whole.keys() - {"splits"}:
        for wrong in (None, [], {}, [None], -1.5):
            edit_manifest(tmp_path, **{**whole, field: wrong})
            with pytest.raises(InputError, match=r"dataset\.json"):
                read_dataset(tmp_path)
    for name, wrong in itertools.product(whole["splits"]["train"], (None, [], {}, -1.5, True)):
        for split in whole["splits"]:
            splits = {**whole["splits"], split: {**whole["splits"][split], name: wrong}}
            edit_manifest(tmp_path, **{**whole, "splits": splits})
            with pytest.raises(InputError, match=name):
                read_dataset(tmp_path)


def test_invalid_settings_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    data = ("--data-dir", tiny_dir, "--out", tmp_path / "run")
    assert "unknown recipe" in refused("smok", *data)
    assert "fp16" in refused(*SMOKE, *data, "--precision", "fp16")
    assert "--batch-size must be at most the number of training images, 96, got 97" in refused(
        *SMOKE, *data, "--batch-size", "97"
    )
    latin1 = tmp_path / "j\udcf6rg"
    assert "--init-from must be valid text" in refused(*SMOKE, *data, "--init-from", latin1)
    shutil.copytree(tiny_dir, latin1)
    (tmp_path / "link").symlink_to(latin1)
    assert "--data-dir must be valid text" in refused(*SMOKE, *data, "--data-dir", tmp_path / "link")
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "True"}
    assert "contradicts the Accelerate configuration" in refused("smoke", "--device", "cuda", *data, env=on_cpu)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("network", "side"), [("custom_resnet", 15), ("torchvision:resnet18", 32)])
def test_single_small_image_in_a_forward_pass_is_refused(network: str, side: int, tiny_dir: Path) -> None:
    """The network reduces the image to one pixel, and BatchNorm needs more than one value per channel."""
    small = replace(read_dataset(tiny_dir), image_size=side)
    arguments = [*SMOKE, "--network", network, "--batch-size", "5", "--accumulate", "2"]
    config = parse_command_line(arguments, prog="", description="")
    with pytest.raises(InputError, match=f"fails on images of shape 1x3x{side}x{side}: .* raise --batch-size or lower"):
        prepare_network(config, small, world_size=2, load_weights=False)
    prepare_network(config, replace(small, image_size=side + 1), world_size=2, load_weights=False)
    prepare_network(config, small, world_size=1, load_weights=False)


def test_a_port_that_another_program_uses_is_reported_in_one_line(tiny_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rank = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port := taken.getsockname()[1]),
        }
        finished = run("ddp_trainer.train", *SMOKE, "--data-dir", tiny_dir, "--out", tmp_path / "run", env=rank)
    assert finished.returncode == 2, finished.stderr
    problem = f"error: another program uses the port of 127.0.0.1:{port}; choose another --main_process_port"
    assert finished.stderr.splitlines()[-1].startswith(problem)
    assert not (tmp_path / "run").exists()


def test_batch_with_fewer_images_than_processes_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = (*SMOKE, "--data-dir", tiny_dir, "--out", tmp_path / "run", "--batch-size", "1")
    finished = run("ddp_trainer.train", *arguments, processes=2)
    assert finished.returncode != 0
    assert finished.stderr.count("error: --batch-size must be at least 2 for 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_directory_with_a_run_is_refused_without_resume(smoke_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    before = (out / "config.json").read_bytes()
    finished = fork(*SMOKE, "--data-dir", tiny_dir, "--out", out)
    assert finished.returncode == 2
    assert "add --resume" in finished.stderr
    assert (out / "config.json").read_bytes() == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("name", ["predictions.npz", "metrics.jsonl", "model.onnx", "tensorboard"])
def test_directory_with_unrelated_files_that_a_run_would_replace_is_refused(
    tiny_dir: Path, tmp_path: Path, name: str, resume: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text("not yours")
    finished = fork(*SMOKE, "--data-dir", tiny_dir, "--out", tmp_path, *resume)
    assert finished.returncode == 2
    assert f"--out {tmp_path} is not a run, but contains {name}" in finished.stderr
    assert (tmp_path / name).read_text() == "not yours"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", name]


def test_directory_that_another_run_is_using_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(
        "ddp_trainer.train", *SMOKE, "--data-dir", tiny_dir, "--out", out, "--epochs", "50", "--max-steps", "1000"
    )
    try:
        wait_until(lambda: (out / "status.json").exists() or first.poll() is not None, "the run does not start", 120)
        assert first.poll() is None
        assert "another run is using" in refused(*SMOKE, "--data-dir", tiny_dir, "--out", out, "--resume")
    finally:
        first.kill()
        first.communicate()


def test_run_with_only_damaged_checkpoints_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("--data-dir", tiny_dir, "--out", out, "--max-steps", "1")
    train(*arguments, module=NARROW)
    (out / "summary.json").unlink()
    for state in out.glob("checkpoints/*/state.pt"):
        state.write_bytes(b"")
    finished = fork(*SMOKE, *arguments, "--resume")
    assert finished.returncode == 2
    assert "damaged" in finished.stderr


def test_single_process_is_refused_if_two_were_requested(tiny_dir: Path, tmp_path: Path) -> None:
    """With `--cpu`, Accelerate starts a single process and ignores --num_processes."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "-m",
            "ddp_trainer.train",
            *SMOKE,
            "--data-dir",
            tiny_dir,
            "--out",
            tmp_path / "run",
        ],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode != 0
    assert "but only one was started" in finished.stderr
    assert not (tmp_path / "run").exists()
