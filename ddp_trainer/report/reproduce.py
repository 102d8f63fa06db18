"""The commands that repeat a run, built from its config.json."""

import shlex
from pathlib import Path
from typing import Any

from data_prep.dataset import preparation
from ddp_trainer.command_line import adapt_to_network, as_flags
from ddp_trainer.config import LEFT_OUT
from ddp_trainer.distributed.launch import ONE_MACHINE
from ddp_trainer.recipes import RECIPES
from ddp_trainer.tracking.run_record import Run

LAUNCHER = f"accelerate launch --multi_gpu --num_processes {{}} {' '.join(ONE_MACHINE)}"


def reproduce_commands(run: Run) -> list[str]:
    """Shell commands: check out the code, prepare the data, train."""
    commit = run.git_commit.rstrip("+")
    checkout = [f"git checkout {commit}"] if commit else []
    return [*checkout, *data_command(run), train_command(run)]


def data_command(run: Run) -> list[str]:
    """The command that prepares the data; empty if the dataset is not known."""
    dataset = run.dataset
    if not dataset.source or not run.data_dir:
        return []
    splits = {name: {"count": split.count} for name, split in dataset.splits.items() if split.count is not None}
    fields: dict[str, Any] = {"source": dataset.source, "splits": splits, "skipped": dataset.skipped}
    if dataset.image_size is not None:
        fields["image_size"] = dataset.image_size
    if dataset.quality is not None:
        fields |= {"encoding": dataset.encoding, "quality": dataset.quality}
    return [preparation(Path(run.data_dir), fields)]


def train_command(run: Run) -> str:
    """The command that trains, with flags for the settings that differ from the recipe.

    If the recipe is unknown, all settings that are not None get flags. Of the settings in LEFT_OUT, only --data-dir and
    --out get flags.
    """
    launcher = LAUNCHER.format(run.world_size) if run.world_size != 1 else "python"
    # With a network other than the recipe's own, some settings have other defaults: see `adapt_to_network`.
    network = str(run.settings.get("network"))
    usual = adapt_to_network(RECIPES[run.recipe], network).flat() if run.recipe in RECIPES else None
    words = [launcher, "-m ddp_trainer.train"]
    if usual is not None:
        words.append(run.recipe)
    if run.data_dir:
        words.append(f"--data-dir {shlex.quote(run.data_dir)}")
    for name, value in run.settings.items():
        changed = value is not None if usual is None else usual.get(name) != value
        if name not in LEFT_OUT and changed:
            words.append(shlex.join(as_flags({name: value})))
    words.append("--out runs/again")
    return " ".join(words)
