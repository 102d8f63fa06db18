"""A command line gives a configuration or a one-line error. Settings must fit the dataset and the machine."""

import dataclasses
from pathlib import Path

import pytest
import torch

from data_prep.dataset import read_dataset
from data_prep.errors import InputError
from ddp_trainer.command_line import parse_command_line
from ddp_trainer.config import CHANGEABLE_ON_RESUME, RuntimeConfig, TrainConfig
from ddp_trainer.distributed.launch import check_machine
from ddp_trainer.engine.build import images_per_pass
from ddp_trainer.recipes import RECIPES, describe_recipes
from ddp_trainer.run.checks import check_batch, check_settings


def parse(*arguments: str) -> TrainConfig:
    return parse_command_line(arguments, prog="train", description=describe_recipes())


def test_default_recipe_is_baseline() -> None:
    assert parse() == RECIPES["baseline"]
    assert parse("--epochs", "3").schedule.epochs == 3


def test_flags_change_single_settings_of_a_recipe() -> None:
    config = parse(
        "smoke", "--peak-lr", "0.3", "--no-channels-last", "--compile", "--cutout", "3", "--wandb", "offline"
    )
    assert config.optim == dataclasses.replace(RECIPES["smoke"].optim, peak_lr=0.3)
    assert (config.runtime.channels_last, config.runtime.compile) == (False, True)
    assert (config.augment.cutout, config.augment.crop_padding) == (3, RECIPES["smoke"].augment.crop_padding)
    assert config.recipe == "smoke"


# Flags that must keep their names, because job scripts and docs use them.
PROMISED = [
    *("data-dir", "out", "resume", "epochs", "batch-size", "max-steps", "peak-lr", "weight-decay", "label-smoothing"),
    *("seed", "device", "precision", "compile", "no-compile", "channels-last", "no-channels-last", "sync-bn"),
    *("no-sync-bn", "checkpoint-every-steps", "keep-checkpoints", "wandb", "validation", "num-workers", "data-mode"),
    *("trackers", "deterministic", "widths", "log-every-steps"),
]


def test_help_lists_the_promised_flags_and_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in PROMISED if f"--{flag}" not in text] == []
    assert all(name in text for name in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["basline"], "unknown recipe 'basline'; choose from baseline"),
        (["--peek-lr", "1"], "--peek-lr"),
        (["--epochs", "many"], "many"),
        (["--accumulate", "0"], "--accumulate must be auto or at least 1, got 0"),
        (["--accumulate", "some"], "some"),
        (["--crop-scale", "0.5", "0.2"], "--crop-scale must be two shares in (0, 1], the smaller one first"),
        (["--train-size", "0"], "--train-size must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be above 0 and at most 1000000, got 0"),
        (["--epochs", "1e308"], "--epochs must be above 0 and at most 1000000, got 1e+308"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--widths", "8", "8", "0", "8"], "--widths must be from 1 to 8192, got 8 8 0 8"),
        (["--widths", "8193", "1", "1", "1"], "--widths must be from 1 to 8192, got 8193 1 1 1"),
        (["--log-every-steps", "-1"], "--log-every-steps must be at least 0, got -1"),
        (["--peak-lr", "-0.1"], "--peak-lr must be positive, got -0.1"),
        (["--peak-lr", "nan"], "--peak-lr must be positive, got nan"),
        (["--head-lr", "0"], "--head-lr must be positive, got 0.0"),
        (["--weight-decay", "inf"], "--weight-decay must be at least 0, got inf"),
        (["--label-smoothing", "1"], "--label-smoothing must be in [0, 1), got 1.0"),
        (["--seed", "-1"], "--seed must be in [0, 2^63 - 1], got -1"),
        (["--precision", "fp8"], "fp8"),
        (["--trackers", "wandb,mlflow"], "mlflow"),
        (["--resume"], "--resume needs --out"),
        (["--crop-padding", "-1"], "--crop-padding"),
        (["--warmup-fraction", "2"], "--warmup-fraction must be in [0, 1], got 2.0"),
        (["--bn-momentum", "0"], "--bn-momentum must be in (0, 1], got 0.0"),
        (["--bn-momentum", "nan"], "--bn-momentum must be in (0, 1], got nan"),
        (["--process-group-timeout", "inf"], "--process-group-timeout must be in (0, 604800] seconds, got inf"),
    ],
)
def test_invalid_flag_or_value_is_refused_in_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changeable_on_resume_contains_only_names_of_settings() -> None:
    assert set(RECIPES["smoke"].flat()) >= CHANGEABLE_ON_RESUME


CASES_OF_PASSES: list[tuple[int, tuple[str, ...], int]] = [
    (1, (), 32),
    (3, (), 10),
    (3, ("--mixup", "1"), 10),
    (3, ("--accumulate", "5"), 2),
    (3, ("--accumulate", "10", "--sync-bn"), 3),
]


@pytest.mark.parametrize(("world_size", "arguments", "smallest"), CASES_OF_PASSES)
def test_images_per_pass_is_the_smallest_number_that_batchnorm_sees(
    world_size: int, arguments: tuple[str, ...], smallest: int
) -> None:
    assert images_per_pass(parse("smoke", *arguments), world_size) == smallest


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "641"], "--batch-size must be at most the number of training images, 640, got 641"),
        (["--batch-size", "2"], "--batch-size must be at least 3 for 3 processes x --accumulate 1, got 2"),
        (
            ["--batch-size", "4", "--mixup", "1"],
            "--batch-size must be at least 6 for 3 processes x --accumulate 1, got 4",
        ),
        (["--accumulate", "11"], "--batch-size must be at least 33 for 3 processes x --accumulate 11, got 32"),
        (["--batch-size", "33", "--cutmix", "1"], "--mixup and --cutmix need an even --batch-size, got 33"),
    ],
)
def test_batch_that_cannot_be_split_is_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_batch(parse("smoke", *arguments), num_images=640, world_size=3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--validation", "96"],
            "--validation and --calibrate must leave one training image per class: hold out at most 86",
        ),
        (["--validation", "80"], "--batch-size must be at most the number of training images, 16, got 32"),
        (["--cutout", "32"], "--cutout must be below the side of the images, 32 pixels, got 32"),
        (["--crop-padding", "32"], "--crop-padding must be below the side of the images, 32 pixels, got 32"),
        (
            ["--small-crops", "16:0.5", "--cutout", "16"],
            "--cutout must be below the side of the smallest crops, 16 pixels, got 16",
        ),
        (["--train-size", "24", "--cutout", "24"], "--cutout must be below the side of the smallest crops, 24 pixels"),
        (["--train-size", "33"], "--train-size must be at most the side of the images, 32 pixels, got 33"),
        (["--train-size", "7"], "--train-size must be at least 8, got 7"),
    ],
)
def test_settings_that_do_not_fit_the_dataset_are_refused(tiny_dir: Path, arguments: list[str], expected: str) -> None:
    dataset = read_dataset(tiny_dir)
    fitting = parse("smoke", "--validation", "64", "--crop-padding", "31", "--cutout", "31")
    assert check_settings(fitting, dataset, world_size=1) == 32
    with pytest.raises(InputError, match=expected):
        check_settings(parse("smoke", *arguments), dataset, world_size=1)


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [
        (1, "data/synthetic has only one class, but training needs at least two"),
        (97, "data/synthetic has 97 classes, but only 96 training images; add training images for every class"),
    ],
)
def test_a_dataset_with_one_class_or_more_classes_than_training_images_is_refused(
    tiny_dir: Path, num_classes: int, expected: str
) -> None:
    dataset = dataclasses.replace(read_dataset(tiny_dir), classes=tuple(map(str, range(num_classes))))
    with pytest.raises(InputError, match=expected):
        check_settings(parse("smoke"), dataset, world_size=1)


def test_small_crops_must_fit_the_network_and_the_images(tiny_dir: Path) -> None:
    dataset, config = read_dataset(tiny_dir), parse("smoke", "--small-crops", "8:0.5")
    assert check_settings(config, dataclasses.replace(dataset, image_size=16), world_size=1) == 96
    with pytest.raises(InputError, match=r"--small-crops 7:0\.5: the network needs crops of at least 8 pixels a side"):
        check_settings(parse("smoke", "--small-crops", "7:0.5"), dataset, world_size=1)
    with pytest.raises(InputError, match=r"--small-crops 32:0\.5: small crops must be smaller than the other crops"):
        check_settings(parse("smoke", "--small-crops", "32:0.5"), dataset, world_size=1)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for processes, accepted in ((2, True), (4, False)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        check_machine(RuntimeConfig(device="cpu", precision="fp32"))
        if accepted:
            check_machine(RuntimeConfig(precision="fp32"))
        else:
            with pytest.raises(InputError, match="4 processes were launched on this machine, which has 2 GPUs"):
                check_machine(RuntimeConfig(precision="fp32"))


def test_settings_that_affect_what_is_learned_are_fixed_on_resume() -> None:
    config = RECIPES["smoke"]
    parts = (config.augment, config.network, config.optim, config.schedule)
    learned = {field.name for part in parts for field in dataclasses.fields(part)} - {"max_steps"}
    learned |= {"seed", "precision", "deterministic", "sync_bn", "channels_last", "gradient_compression"}
    learned |= {"validation", "calibrate", "balance"}
    assert learned <= set(config.fixed_on_resume())
