"""From the command line to a checked, frozen configuration."""

import dataclasses
from pathlib import Path

import pytest
import torch

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.config import FREE_ON_RESUME, RuntimeConfig, TrainConfig
from ddp_trainer.distributed.launch import check_launch
from ddp_trainer.recipes import RECIPES, describe_recipes
from ddp_trainer.run.checks import check_batch, check_dataset


def parse(*arguments: str) -> TrainConfig:
    return parse_command_line(arguments, RECIPES, prog="train", description=describe_recipes())


def test_without_a_recipe_it_is_baseline() -> None:
    assert parse() == RECIPES["baseline"]
    assert parse("--epochs", "3").schedule.epochs == 3


def test_flags_are_flat_and_keep_the_rest_of_the_recipe() -> None:
    config = parse(
        "smoke", "--peak-lr", "0.3", "--no-channels-last", "--compile", "--cutout", "3", "--wandb", "offline"
    )
    assert config.optim == dataclasses.replace(RECIPES["smoke"].optim, peak_lr=0.3)
    assert (config.runtime.channels_last, config.runtime.compile) == (False, True)
    assert (config.augment.cutout, config.augment.crop_padding) == (3, RECIPES["smoke"].augment.crop_padding)
    assert config.recipe == "smoke"


PROMISED = [
    *("data-dir", "out", "resume", "epochs", "batch-size", "max-steps", "peak-lr", "weight-decay", "label-smoothing"),
    *("seed", "device", "precision", "compile", "no-compile", "channels-last", "no-channels-last", "sync-bn"),
    *("no-sync-bn", "checkpoint-every-steps", "keep-checkpoints", "wandb", "validation", "num-workers", "data-mode"),
    *("trackers", "deterministic", "wandb-group", "wandb-job-type", "wandb-tags"),
]


def test_help_lists_every_promised_flag_and_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in PROMISED if f"--{flag}" not in text] == []
    assert all(name in text for name in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["basline"], "unknown recipe 'basline': choose from baseline"),
        (["--peek-lr", "1"], "--peek-lr"),
        (["--epochs", "many"], "many"),
        (["--epochs", "0"], "--epochs 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--candidates", "0"], "--candidates 0"),
        (["--peak-lr", "-0.1"], "--peak-lr -0.1"),
        (["--peak-lr", "nan"], "--peak-lr nan"),
        (["--weight-decay", "inf"], "--weight-decay inf"),
        (["--label-smoothing", "1"], "--label-smoothing 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--precision", "fp8"], "fp8"),
        (["--trackers", "wandb,mlflow"], "mlflow"),
        (["--wandb-tags", "fine," + 65 * "x"], "--wandb-tags"),
        (["--resume"], "--out"),
        (["--crop-padding", "-1"], "--crop-padding"),
        (["--warmup-fraction", "2"], "--warmup-fraction"),
        (["--process-group-timeout", "inf"], "--process-group-timeout inf"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_may_change_on_resume_is_named_as_it_is_spelled() -> None:
    assert set(RECIPES["smoke"].flat()) >= FREE_ON_RESUME
    assert not FREE_ON_RESUME & set(RECIPES["smoke"].fixed_on_resume())


def test_there_must_be_enough_images_to_choose_from() -> None:
    config = parse("smoke", "--candidates", "3")
    check_batch(config, num_images=96)
    with pytest.raises(InputError, match="--candidates"):
        check_batch(parse("smoke", "--candidates", "3", "--mixup", "0.2"), num_images=96)
    with pytest.raises(InputError, match="--batch-size 32 with --candidates 3 is more than the 95 training images"):
        check_batch(config, num_images=95)


@pytest.mark.parametrize(("world_size", "images", "fine"), [("1", 640, True), ("3", 640, False), ("2", 31, False)])
def test_the_batch_must_be_shared_out_evenly(
    monkeypatch: pytest.MonkeyPatch, world_size: str, images: int, fine: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    if fine:
        check_batch(RECIPES["smoke"], num_images=images)
    else:
        with pytest.raises(InputError, match="--batch-size 32"):
            check_batch(RECIPES["smoke"], num_images=images)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--validation", "96"], "--validation 96: there are 96 training images; leave some to train on"),
        (["--validation", "80"], "--batch-size 32 is more than the 16 training images"),
        (["--cutout", "32"], "--cutout 32: the images have 32 pixels a side; give at most 31"),
        (["--crop-padding", "32"], "--crop-padding 32: the images have 32 pixels a side; give at most 31"),
        (
            ["--epochs", "4", "--small-crop-fraction", ".5", "--cutout", "16"],
            "--cutout 16: the first crops have 16 pixels a side; give",
        ),
    ],
)
def test_settings_that_do_not_fit_the_dataset(tiny_dir: Path, arguments: list[str], expected: str) -> None:
    dataset = read_dataset(tiny_dir)
    assert check_dataset(parse("smoke", "--validation", "64", "--crop-padding", "31", "--cutout", "31"), dataset) == 32
    with pytest.raises(InputError, match=expected):
        check_dataset(parse("smoke", *arguments), dataset)


def test_small_crops_are_large_enough_for_the_network(tiny_dir: Path) -> None:
    dataset, config = read_dataset(tiny_dir), parse("smoke", "--epochs", "4", "--small-crop-fraction", "0.5")
    assert check_dataset(config, dataclasses.replace(dataset, image_size=16)) == 96
    with pytest.raises(InputError, match=r"--small-crop-fraction 0\.5: the first crops have 7 pixels a side"):
        check_dataset(config, dataclasses.replace(dataset, image_size=15))


def test_more_processes_than_gpus_are_refused_by_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for processes, fine in ((2, True), (4, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        check_launch(RuntimeConfig(device="cpu"))
        if fine:
            check_launch(RuntimeConfig())
        else:
            with pytest.raises(InputError, match="4 processes were launched on this machine, which has 2 GPUs"):
                check_launch(RuntimeConfig())
