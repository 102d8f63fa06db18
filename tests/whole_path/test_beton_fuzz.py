"""Tries a few hundred mutations of a beton file (FFCV's format). `make soak` tries thousands."""

from pathlib import Path

from tests.soak.fuzz import fuzz_betons


def test_a_mutated_beton_is_refused_or_gives_the_same_images(tmp_path: Path) -> None:
    result = fuzz_betons(tmp_path, 300, seed=1)
    assert (result.stories, result.crashes, result.hangs, result.tried) == ([], 0, 0, 300)
    assert result.counts["refused"] > 200
    assert result.counts["same"] > 0, "all mutations were refused, although some alter only a label or nothing"
    assert result.peak_mebibytes < 1500
