"""The settings of a run as recorded in its config.json, and how they differ from those of a new command."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.dataset import DatasetInfo
from data_prep.errors import InputError
from data_prep.files import read_json
from ddp_trainer.config import TrainConfig

RESOLVED = ("precision", "accumulate")  # if one of these settings is `auto`, the run records the value that it chose
IMAGES = {"train": "training images", "test": "test images"}  # what error messages call the splits


def recorded_settings(run_dir: Path) -> dict[str, Any]:
    """The settings in config.json, the precision that the run used, and the entries of `dataset_settings`.

    Raises InputError if config.json does not contain them.
    """
    config = read_json(run_dir / "config.json") or {}
    try:
        return {**config["settings"], "precision": config["precision"], **_dataset_properties(config["dataset"])}
    except (KeyError, TypeError):
        raise InputError(f"{run_dir / 'config.json'} has no settings of a run; choose another --out") from None


def settings_of(config: TrainConfig, dataset: DatasetInfo, *, precision: str) -> dict[str, Any]:
    """The settings that must not change on --resume, the precision, and the `dataset_settings`."""
    return {**config.fixed_on_resume(), "precision": precision, **dataset_settings(config, dataset)}


def dataset_settings(config: TrainConfig, dataset: DatasetInfo) -> dict[str, Any]:
    """The properties of the dataset that must not change: its images (their sha256), and how colors are normalized.

    With --validation, the test images may change.
    """
    properties = _dataset_properties(asdict(dataset))
    if config.data.validation:
        del properties["test images"]
    return properties


def _dataset_properties(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset`: a DatasetInfo as a dict, as in config.json."""
    images = {name: dataset["splits"][split]["sha256"] for split, name in IMAGES.items()}
    return {**images, "mean and std": [*dataset["mean"], *dataset["std"]]}


def changed_settings(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings whose requested value differs from the recorded one, as (name, recorded, requested).

    A setting that is not recorded did not exist in the release that started the run. That release behaved as if the
    setting had its default value, so the requested value is compared with the default. A requested `auto` for a setting
    in RESOLVED equals any recorded value.
    """
    recorded = {**TrainConfig().flat(), **recorded}
    names = [name for name, value in requested.items() if not (name in RESOLVED and value == "auto")]
    return [(name, recorded.get(name), requested[name]) for name in names if recorded.get(name) != requested[name]]
