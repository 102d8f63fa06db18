"""README and docs are correct: commands run; flags, paths and link targets exist; error texts match the code.

These tests run the bash and python blocks in the order of the pages, in one folder, as a reader would. They only parse
the console and pycon blocks.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support.trainer import REPOSITORY, environment

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FOLDERS = "ddp_trainer|data_prep|slurm|launch|scripts|tests|benchmarks|docs"
MADE_BY_THE_READER = {"slurm/cluster.env"}


class Block(NamedTuple):
    page: Path
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}: {' '.join(self.text.split())[:60]}"


def blocks(*languages: str) -> list[Block]:
    """Returns the code blocks in one of `languages`, from all pages."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    found = [Block(page, *match) for page in PAGES for match in fence.findall(page.read_text())]
    return [block for block in found if block.language in languages]


def commands() -> list[str]:
    """Returns every command in the bash and console blocks, without prompts and comments, with continued lines joined.

    In a console block, lines without a prompt are output.
    """
    lines = []
    for block in blocks("bash", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "bash" or line.startswith("$ "):
                lines.append(line.removeprefix("$ "))
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def arguments_after(command: str, *programs: str) -> list[str]:
    """Returns the words of `command` after the first word that is one of `programs`."""
    words = shlex.split(command)
    return words[next(number for number, word in enumerate(words) if word in programs) + 1 :]


def tree() -> list[str]:
    """Returns the paths in the tree of the architecture page; folders end in a slash."""
    paths, parents = [], [""]
    (text,) = (block.text for block in blocks("text") if block.page.name == "architecture.md")
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(\S+) +\S.*", line)
        assert match, f"not a path and a caption: {line}"
        depth = len(match[1]) // 2
        paths.append(parents[depth] + match[2])
        parents[depth + 1 :] = [paths[-1]]
    return paths


def repository_paths() -> Iterator[str]:
    """Yields files and folders of the repository, without __init__.py; folders end in a slash."""
    listing = ["git", "ls-files"]
    try:
        listed = subprocess.run(listing, cwd=REPOSITORY, text=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip(f"git cannot read this folder: {listed.stderr}")
    for path in map(Path, listed.stdout.splitlines()):
        if path.name != "__init__.py" and (REPOSITORY / path).exists():
            yield str(path)
        yield from (f"{folder}/" for folder in path.parents if folder != Path())


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the blocks run. It has photos of cats and dogs (noise in two colors) and a link to `launch`."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("reader")
    (folder / "launch").symlink_to(REPOSITORY / "launch")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for kind, color in (("cat", (190, 120, 60)), ("dog", (60, 120, 190))):
            (folder / "photos" / split / kind).mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = np.clip(generator.normal(color, 40, size=(40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / kind / f"{number:03}.png")
    return folder


@pytest.mark.parametrize("block", blocks("bash", "python"), ids=lambda block: block.name)
def test_a_block_runs_as_printed(block: Block, readers_folder: Path) -> None:
    found = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    interpreter = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*interpreter, block.text], cwd=readers_folder, env=found, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("pycon"), ids=lambda block: block.name)
def test_a_python_session_names_settings_that_exist(block: Block) -> None:
    from ddp_trainer.command_line import as_flags, parse_flags
    from ddp_trainer.config import TrainConfig

    for call in ast.walk(ast.parse(block.text.replace(">>> ", ""))):
        if isinstance(call, ast.Call):
            settings = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
            settings.pop("num_processes", None)
            parse_flags(TrainConfig, as_flags(settings), prog="train")


@pytest.mark.parametrize("command", [command for command in commands() if "accelerate launch" in command])
def test_launcher_flags_in_the_docs_exist(command: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            parsed = launch_command_parser().parse_args(arguments_after(command, "launch"))
        except SystemExit:
            pytest.fail(printed.getvalue())
    assert parsed.module


@pytest.mark.parametrize(
    "command", [command for command in commands() if re.search(r"-m ddp_trainer\.train|slurm/train\.sh", command)]
)
def test_trainer_flags_in_the_docs_exist(command: str) -> None:
    from ddp_trainer.command_line import parse_command_line

    arguments = arguments_after(command, "ddp_trainer.train", "slurm/train.sh")
    parse_command_line(arguments, prog="train", description="")


@pytest.mark.parametrize(
    "command", [command for command in commands() if re.search(r"-m data_prep|slurm/prep\.sh", command)]
)
def test_preparation_flags_in_the_docs_exist(command: str) -> None:
    from data_prep.__main__ import parse

    parse([word.removesuffix(")") for word in arguments_after(command, "data_prep", "slurm/prep.sh")])


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_targets_in_the_docs_exist(command: str) -> None:
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", sorted({module for command in commands() for module in re.findall(r"(?<!pytest )-m ([\w.]+)", command)})
)
def test_modules_named_in_the_docs_exist(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_the_docs_exist(page: Path) -> None:
    """Checks paths in prose and in commands, except for files that the reader creates."""
    named = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", page.read_text())) - MADE_BY_THE_READER
    assert [path for path in named if not (REPOSITORY / path).exists() and not (page.parent / path).exists()] == []


def test_every_path_in_the_tree_exists() -> None:
    assert set(tree()) - set(repository_paths()) == set()


def test_the_tree_lists_all_files_of_a_folder_or_none() -> None:
    named = set(tree())
    listed = {str(Path(path).parent) for path in named}
    inside = {path for path in repository_paths() if str(Path(path).parent) in listed}
    assert inside - named == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_existing_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not heading or heading in headings(file), target


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub generates them."""
    lines = [line.lstrip("# ") for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


def test_every_page_can_be_reached_from_readme() -> None:
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        linked = {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text())}
        waiting += linked & set(PAGES) - reached
    assert set(PAGES) - reached == set()


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_error_texts_are_printed_by_the_code() -> None:
    """The code contains each `error:` text of docs/troubleshooting.md word for word; … stands for varying parts."""
    files = [
        *(file for folder in ("data_prep", "ddp_trainer", "slurm") for file in (REPOSITORY / folder).rglob("*.py")),
        *(REPOSITORY / "slurm").glob("*.sh"),
        REPOSITORY / "scripts" / "setup.sh",
    ]
    source = "\n".join(file.read_text() for file in files)
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    texts = re.findall(r"^\| `error: ([^`]+)` \|", page, flags=re.MULTILINE)
    assert texts
    assert [part for text in texts for part in text.split("…") if part.strip() not in source] == []
