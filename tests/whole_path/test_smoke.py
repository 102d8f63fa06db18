"""What a user does from start to end: prepare a dataset, train, read the run directory, evaluate."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import parse
from data_prep.sources.synthetic import draw_synthetic
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.config import LEFT_OUT
from ddp_trainer.recipes import RECIPES
from ddp_trainer.report.reproduce import reproduce_commands, train_command
from ddp_trainer.run.checks import can_compile
from ddp_trainer.tracking.run_record import load_run
from tests.support.folders import same_model
from tests.support.tracked_runs import holds
from tests.support.trainer import NARROW, SECRET, fork, read_lines, train

RUN_FILES = [
    *("config.json", "metrics.jsonl", "steps.jsonl", "summary.json", "status.json", "model.safetensors", "model.json"),
    *("predictions.npz", "report/index.html", "report/curves.png", "report/confusion.png"),
    *("report/misclassified.png", "wandb"),
]


def test_run_directory_has_the_main_files(smoke_run: Path) -> None:
    assert [name for name in RUN_FILES if not (smoke_run / name).exists()] == []
    assert list((smoke_run / "checkpoints").glob("step-*"))
    assert json.loads((smoke_run / "status.json").read_text())["state"] == "done"


def test_metrics_have_each_epoch_once_with_the_documented_keys(smoke_run: Path) -> None:
    records = read_lines(smoke_run / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]
    promised = {"epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate"}
    promised |= {"seconds", "images_per_second", "split", "test_correct", "test_total", "skipped_steps"}
    assert promised <= set(records[0])
    assert [record["step"] for record in records] == [3, 6]
    assert [record["split"] for record in records] == ["test", "test"]
    assert 0 < records[0]["train_loss"] < 10


def test_summary_counts_every_test_image(smoke_run: Path) -> None:
    summary = json.loads((smoke_run / "summary.json").read_text())
    promised = {
        "test_accuracy",
        "test_correct",
        "test_total",
        "test_accuracy_tta",
        "test_balanced_accuracy",
        "largest_class_share",
        "epochs",
        "steps",
        "world_size",
        "train_seconds",
        "train_pflops",
        "optimizer_pflops",
        "parameters",
        "images_per_second",
    }
    assert promised <= set(summary)
    assert (summary["test_total"], summary["parameters"], summary["world_size"]) == (40, 6_573_130, 1)
    assert summary["test_accuracy"] == summary["test_correct"] / 40
    assert summary["test_balanced_accuracy"] == pytest.approx(summary["test_accuracy"]), (
        "differs from the accuracy, although the classes are equally large"
    )
    assert summary["largest_class_share"] == 0.1
    assert summary["train_pflops"] == pytest.approx(6 * 32 * 2.276e9 / 1e15, rel=0.01)
    assert summary["optimizer_pflops"] == 0, "not 0, although SGD has no matrix products"


def test_config_json_records_the_settings_and_no_secret(smoke_run: Path) -> None:
    config = json.loads((smoke_run / "config.json").read_text())
    assert config["recipe"] == "smoke"
    assert config["settings"]["batch_size"] == 32
    assert {"torch", "accelerate", "ffcv"} <= set(config["versions"])
    assert (config["world_size"], config["device"]) == (1, "cpu")
    assert holds(smoke_run, SECRET) == []


def test_evaluate_prints_the_figures_of_the_summary(smoke_run: Path) -> None:
    summary = json.loads((smoke_run / "summary.json").read_text())
    finished = fork(smoke_run, "--device", "cpu", program="ddp_trainer.evaluate:main")
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(finished.stdout.splitlines()[-1])
    assert figures["test_correct"] == summary["test_correct"]
    assert figures["test_total"] == 40
    assert figures["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_stderr_has_plain_lines_if_it_is_not_a_terminal(tiny_dir: Path, tmp_path: Path) -> None:
    finished = train("--data-dir", tiny_dir, "--out", tmp_path / "run", "--max-steps", "1", module=NARROW)
    assert "\r" not in finished.stderr
    assert "\x1b" not in finished.stderr
    assert "/40 (" in finished.stderr, "no line shows the number of test images"


@pytest.mark.parametrize(
    "flags",
    [
        ("--ema-decay", "0.9", "--label-smoothing", "0.1", "--accumulate", "2"),
        ("--optimizer", "adamw", "--peak-lr", "0.001", "--flip", "alternating", "--cutmix", "1", "--validation", "30"),
        ("--optimizer", "muon", "--peak-lr", "0.2", "--bias-lr", "2", "--clip-norm", "1", "--accumulate", "2"),
        ("--precision", "bf16", "--no-channels-last", "--data-mode", "stream", "--mixup", "0.4", "--deterministic"),
        pytest.param(
            ("--compile", "--precision", "bf16", "--activation", "celu", "--small-crops", "24:0.5", "--max-steps", "6"),
            marks=[
                pytest.mark.skipif(not can_compile(), reason="g++ or Python.h is missing"),
                # With ATEN_CPU_CAPABILITY=default, torch 2.15 writes C++ that does not compile.
                pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch cannot compile"),
            ],
        ),
    ],
)
def test_combined_settings_work(tiny_dir: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    train("--data-dir", tiny_dir, "--out", tmp_path / "run", "--max-steps", "1", *flags, module=NARROW)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    held_out = "--validation" in flags
    assert summary["test_total"] == (30 if held_out else 40)
    assert summary["evaluation_split"] == ("validation" if held_out else "test")
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert {record["split"] for record in records} == {summary["evaluation_split"]}


def test_stream_and_resident_train_the_same_model(tiny_dir: Path, tmp_path: Path) -> None:
    for mode in ("stream", "resident"):
        train("--data-dir", tiny_dir, "--out", tmp_path / mode, "--data-mode", mode, "--max-steps", "2", module=NARROW)
    assert same_model(tmp_path / "stream", tmp_path / "resident")


def test_commands_that_repeat_the_run_can_be_parsed(smoke_run: Path) -> None:
    lines = reproduce_commands(load_run(smoke_run))
    data, training = (shlex.split(line)[3:] for line in lines[-2:])
    options = parse(data)
    assert (options.source, options.train_count, options.test_count, options.size) == ("synthetic", 96, 40, 32)
    config = parse_command_line(training, prog="train", description="")
    original = json.loads((smoke_run / "config.json").read_text())["settings"]
    assert {name for name, value in config.flat().items() if value != original[name]} <= LEFT_OUT


def test_command_that_repeats_a_run_unsets_a_setting_of_its_recipe(smoke_run: Path) -> None:
    run = replace(load_run(smoke_run), recipe="fast", settings={**RECIPES["fast"].flat(), "head_lr": None})
    training = shlex.split(train_command(run))[3:]
    assert parse_command_line(training, prog="train", description="").optim.head_lr is None


def test_predictions_belong_to_their_images(tiny_dir: Path, tmp_path: Path) -> None:
    words = ("--data-dir", tiny_dir, "--out", tmp_path / "run", "--validation", "30", "--batch-size", "16")
    train(*words, module=NARROW, processes=2)
    drawn = draw_synthetic(train_count=96, test_count=40, seed=1).train  # the same images as in tiny_dir
    with np.load(tmp_path / "run" / "predictions.npz") as found:
        assert np.array_equal(found["labels"], drawn.labels[found["indices"]])
        wrong = found["probabilities"].argmax(axis=1) != found["labels"]
        assert wrong.any()
        assert set(found["wrong_indices"]) == set(found["indices"][wrong])
        assert np.array_equal(found["wrong_images"], drawn.images[found["wrong_indices"]])
