"""The words that the project avoids are absent from its code, messages, pages and tests."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.source import REPOSITORY, name_of

# Patterns of avoided words, each with the words to use instead.
AVOIDED = {
    r"anew": "again, rewrite or rebuild",
    r"lest": "so that ... not, or: to avoid",
    r"mend(s|ed|ing)?": "fix",
    r"for ever": "forever or indefinitely",
    r"at hand": "current",
    r"(let|lets|letting) be": "leave unchanged",
    r"(go|goes|going|went|gone) on with": "resume or continue",
    r"refused steps?": "skipped step",
    r"clear-cut": "uncertain or certain prediction",
    r"peers": "process or rank",
    r"if not told otherwise": "default: X",
    r"exit codes?": "exit status",
    r"trainings": "runs",
    r"fill a last batch": "leftover images",
}
ROOTS = ("data_prep", "ddp_trainer", "benchmarks", "slurm", "launch", "scripts", "tests", "docs")
SUFFIXES = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".html", ".css", ".j2"}


def texts() -> Iterator[Path]:
    """Yields the files whose words are checked."""
    yield from (REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"))
    for root in ROOTS:
        yield from (file for file in sorted((REPOSITORY / root).rglob("*")) if file.suffix in SUFFIXES)


def as_one_line(text: str) -> str:
    """Joins wrapped lines, including those of comments."""
    return re.sub(r"\s*\n\s*(#\s*)?", " ", text)


def test_avoided_words_are_absent() -> None:
    found = [
        f"{name_of(file)}: ...{line[max(match.start() - 40, 0) : match.end() + 20]}... -> {better}"
        for file in texts()
        if file.exists() and file != Path(__file__).resolve()
        for line in [as_one_line(file.read_text())]
        for word, better in AVOIDED.items()
        for match in re.finditer(rf"\b{word}\b", line, re.IGNORECASE)
    ]
    assert found == [], "\n".join(["", *found])


def test_avoided_words_are_found_across_line_breaks() -> None:
    assert as_one_line("# a refused\n    # step") == "# a refused step"
