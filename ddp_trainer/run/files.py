"""The names of the files in a run directory, and checks that a run replaces no files of other origin."""

import os
import re
from pathlib import Path

from data_prep.errors import InputError, require
from data_prep.files import read_json

STATUS = {"state", "step", "epoch", "message", "saved_step"}  # the keys in status.json
STATES = ("running", "preempted", "done", "failed")  # the values of `state` in status.json
CHECKPOINT = re.compile(r"step-(\d{8,})")  # the names of the folders in checkpoints/
EXPORTS = {"onnx": "model.onnx", "torch": "model.pt2"}  # the keys are the values of --format of ddp_trainer.export
# Files and folders that a run replaces or deletes, and that are created later than config.json.
FILES = (
    *("metrics.jsonl", "steps.jsonl", "summary.json", "predictions.npz", "model.safetensors", "model.json", "model.md"),
    *("trace.json.gz", *EXPORTS.values()),
)
FOLDERS = ("report", "checkpoints", "crash", "tensorboard")


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first. Temporary folders are left out."""
    found = [path for path in folder.glob("step-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def refuse_links(path: Path) -> None:
    """Raises InputError for a symbolic link in a run directory, because writing to it would change another file.

    Links in wandb/ are allowed, because W&B creates some. The only file in wandb/ that the trainer itself writes is
    run-id, which must not be a link.
    """
    for folder, folders, files in os.walk(path):
        if Path(folder) == path / "wandb":
            folders.clear()
            files = [name for name in files if name == "run-id"]
        for name in (*folders, *files):
            link = Path(folder) / name
            require(not link.is_symlink(), f"{link} is a symbolic link; remove it, or choose another --out")


def refuse_existing_run(out: Path, *, resume: bool) -> None:
    """Raises InputError if `out` contains a run and `resume` is false.

    A folder counts as a run if it contains config.json or, with `resume`, a checkpoint. If `out` does not count as a
    run, it must not contain a file or folder that a run would replace. In all cases, a path named in FILES must not be
    a folder, and one named in FOLDERS must be a folder if it exists. Breaking a rule raises InputError.
    """
    if os.path.exists(out / "config.json"):
        fix = "add --resume to continue it, or choose another folder"
        require(resume, f"--out {out} already contains a run; {fix}")
    elif not (resume and list_checkpoints(out / "checkpoints")):
        for name in (*FILES, *FOLDERS, *(() if _is_our_status(out / "status.json") else ("status.json",))):
            present = os.path.lexists(out / name)
            require(
                not present,
                f"--out {out} is not a run, but contains {name}; a run would replace it, so choose another folder",
            )
    for name in (*FILES, *FOLDERS):
        path, is_folder = out / name, name in FOLDERS
        require(
            not os.path.lexists(path) or os.path.isdir(path) == is_folder,
            f"{path} must be a {'folder' if is_folder else 'file'}; restore it from a backup, or remove it",
        )


def _is_our_status(path: Path) -> bool:
    """Whether a run wrote this status.json. A run that was killed early leaves it without a config.json."""
    try:
        content = read_json(path) or {}
        return content.get("state") in STATES and content.keys() <= STATUS
    except InputError:  # damaged, or not a JSON object
        return False
