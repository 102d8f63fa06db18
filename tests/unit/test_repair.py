"""JPEG files: the end marker may be missing if all pixels are there, and may be followed by other data."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.picture import read_image, read_picture
from tests.support.photos import noise_jpeg


@pytest.mark.parametrize("end", [b"", b"\xff", b"\0" * 99])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "whole.jpg").write_bytes(noise_jpeg())
    (tmp_path / "a.jpg").write_bytes(noise_jpeg()[:-2] + end)
    assert np.array_equal(read_image(tmp_path / "a.jpg", 32), read_image(tmp_path / "whole.jpg", 32))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_is_refused(share: float, progressive: bool, tmp_path: Path) -> None:
    content = noise_jpeg(progressive=progressive)
    present = content[: int(len(content) * share)]
    for missing in (b"", b"\0" * (len(content) - len(present))):  # an interrupted copy may leave zeros
        (tmp_path / "a.jpg").write_bytes(present + missing)
        with pytest.raises(OSError, match="truncated"):
            read_image(tmp_path / "a.jpg", 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_the_end_marker_of_a_jpeg_does_not_matter(progressive: bool, tmp_path: Path) -> None:
    """Some phones append a video to a photo."""
    whole = noise_jpeg(progressive=progressive)
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "a.jpg").write_bytes(whole + np.random.default_rng(0).bytes(200_000) + b"\xff\xda")
    found = read_picture(tmp_path / "a.jpg", 32)
    assert np.array_equal(found.pixels, read_image(tmp_path / "whole.jpg", 32))
    assert not found.metadata_ignored
