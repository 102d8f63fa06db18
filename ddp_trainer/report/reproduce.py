"""The commands that train a run again, from its config.json. Not owned here: what the flags mean (`config`)."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.dataset import preparation
from ddp_trainer.report.page import escape, section
from ddp_trainer.tracking.run_record import Run, mapping

# Where a run was and how it was watched; the same training goes on without them.
LEFT_OUT = {
    "out",
    "resume",
    "data_dir",
    "keep_checkpoints",
    "process_group_timeout",
    "trackers",
    "wandb",
    "wandb_group",
    "wandb_job_type",
    "wandb_tags",
    "profile",
}
LAUNCHER = "accelerate launch --multi_gpu --num_machines 1 --num_processes {} --mixed_precision no --dynamo_backend no"


def reproduce(run: Run) -> str:
    commit = str(run.config.get("git_commit") or "")
    note = ""
    if commit.endswith("+"):
        note = "The code had changes beside this commit, so the commands may not give quite the same run. "
    elif not commit:
        note = "The commit of the code is not known. "
    commands = "\n".join(reproduce_commands(run))
    says = f'<p class="muted">{note}Versions and the checksums of the data are in the tables above.</p>'
    return section("Run it again", f"<pre>{escape(commands)}</pre>", says)


def reproduce_commands(run: Run) -> list[str]:
    """Shell commands: check the code out, prepare the data, train."""
    commit = str(run.config.get("git_commit") or "").rstrip("+")
    checkout = [f"git checkout {shlex.quote(commit)}"] if commit else []
    return [*checkout, *data_command(run), train_command(run)]


def data_command(run: Run) -> list[str]:
    """Nothing where the data is not known."""
    dataset, folder = mapping(run.config.get("dataset")), run.config.get("data_dir")
    if not dataset.get("source") or not folder:
        return []
    splits = {name: mapping(split) for name, split in mapping(dataset.get("splits")).items()}
    return [preparation(Path(str(folder)), {**dataset, "splits": splits})]


def train_command(run: Run) -> str:
    """The launch, with the flags that differ from the recipe; all flags where this code has no such recipe."""
    recipe, world_size = str(run.config.get("recipe") or ""), run.config.get("world_size") or 1
    launcher = LAUNCHER.format(shlex.quote(str(world_size))) if world_size != 1 else "python"
    usual = recipe_settings(recipe)
    words = [launcher, "-m ddp_trainer.train"]
    if usual is not None:
        words.append(recipe)
    if run.config.get("data_dir"):
        words.append(f"--data-dir {shlex.quote(str(run.config['data_dir']))}")
    for name, value in run.settings.items():
        if name not in LEFT_OUT and value is not None and (usual is None or usual.get(name) != value):
            words.append(flag(name, value))
    words.append("--out runs/again")
    return " ".join(words)


def flag(name: str, value: object) -> str:
    dashed = str(name).replace("_", "-")
    if isinstance(value, bool):
        return shlex.quote(f"--{dashed}" if value else f"--no-{dashed}")
    return f"{shlex.quote('--' + dashed)} {shlex.quote(str(value))}"


def recipe_settings(name: str) -> Mapping[str, Any] | None:
    from ddp_trainer.recipes import RECIPES

    return RECIPES[name].flat() if name in RECIPES else None
