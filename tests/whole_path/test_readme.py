"""README.md tells the truth: its bash blocks run, its trainings parse, its tree and links are the repository's.

Blocks marked bash are run here, in order, in one folder, as a reader would; blocks marked console are only read.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
PACKAGES = ("data_prep", "ddp_trainer")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of the bash and console blocks, without prompt, comment and continued lines."""
    found = []
    for text in [*blocks("bash"), *(block.replace("$ ", "") for block in blocks("console"))]:
        found += [shlex.join(shlex.split(line, comments=True)) for line in text.replace("\\\n", " ").splitlines()]
    return found


def tree() -> dict[str, str]:
    """Path -> caption of the tree; folders end in a slash."""
    entries, parents = {}, [""]
    for line in blocks("text")[-1].splitlines():
        indented, name, caption = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        depth = len(indented) // 2
        entries[parents[depth] + name] = caption
        parents[depth + 1 :] = [parents[depth] + name]
    return entries


def top_level() -> Iterator[str]:
    """What belongs to the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip(f"not a checkout that git reads: {listed.stderr}")
    for path in listed.stdout.splitlines():
        name, slash, _ = path.partition("/")
        yield name + slash


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: `launch` and some photos of cats and dogs (small noise of two colours) are at hand."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("reader")
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for kind, colour in (("cat", (190, 120, 60)), ("dog", (60, 120, 190))):
            (folder / "photos" / split / kind).mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = np.clip(generator.normal(colour, 40, size=(40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / kind / f"{number:03}.png")
    return folder


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: " ".join(block.split())[:60])
def test_a_command_runs_as_printed(block: str, readers_folder: Path) -> None:
    unwanted = ("WANDB_", "ACCELERATE_", "TORCHELASTIC_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=readers_folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in commands() if "accelerate launch" in command])
def test_launcher_flags_exist(command: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    arguments, said = shlex.split(command)[2:], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            parsed = launch_command_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(said.getvalue())
    assert parsed.module
    assert not parsed.config_file or (REPOSITORY / parsed.config_file).is_file()


@pytest.mark.parametrize(
    "command", [command for command in commands() if re.search(r"-m ddp_trainer\.train|slurm/train\.sh", command)]
)
def test_trainer_flags_exist(command: str) -> None:
    from ddp_trainer.command_line import parse_command_line
    from ddp_trainer.recipes import RECIPES

    words = shlex.split(command)
    first = next(number for number, word in enumerate(words) if word in {"ddp_trainer.train", "slurm/train.sh"}) + 1
    parse_command_line(words[first:], RECIPES, prog="train", description="")


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", sorted({module for command in commands() for module in re.findall(r"-m ([\w.]+)", command)})
)
def test_modules_named_exist(command: str) -> None:
    assert importlib.util.find_spec(command) is not None


def test_the_tree_holds_nothing_that_is_not_there() -> None:
    assert [
        path
        for path in tree()
        if not (REPOSITORY / path).exists() or path.endswith("/") != (REPOSITORY / path).is_dir()
    ] == []


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_tree_names_every_top_level_entry() -> None:
    assert set(top_level()) - set(tree()) == set()


@pytest.mark.parametrize("package", [*PACKAGES, "slurm"])
def test_the_tree_names_every_module(package: str) -> None:
    inside = {
        f"{package}/{path.name}" + "/" * path.is_dir()
        for path in (REPOSITORY / package).iterdir()
        if path.name not in {"__init__.py", "__pycache__", "cluster.env"}
    }
    assert inside - set(tree()) == set()


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line[:1] == "#"
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (REPOSITORY / target).exists(), target


def test_the_error_texts_are_ours() -> None:
    """Those that begin with `error:` are printed by this repository, in these words; … stands for what varies."""
    files = [
        *(file for package in (*PACKAGES, "slurm") for file in (REPOSITORY / package).rglob("*.py")),
        *(REPOSITORY / "slurm").glob("*.sh"),
        REPOSITORY / "scripts" / "setup.sh",
    ]
    source = "\n".join(file.read_text() for file in files)
    texts = re.findall(r"^\| `error: ([^`]+)` \|", README, flags=re.MULTILINE)
    assert texts
    assert [part for text in texts for part in text.split("…") if part.strip() not in source] == []
