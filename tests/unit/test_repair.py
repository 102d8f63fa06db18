"""Damaged PNG and JPEG files are read if all pixels are there, and refused if pixels are missing or damaged."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import picture
from data_prep.sources.picture import read_picture
from data_prep.sources.repair import JPEG_END, JPEG_SCAN
from tests.support.photos import noise_jpeg, read_image, save

BROKEN_COMMENT = struct.pack(">I", 4) + b"tEXtabcd" + b"\0\0\0\0"  # with a wrong checksum


@pytest.mark.parametrize("end", [b"", b"\xff", b"\0" * 99])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "whole.jpg").write_bytes(noise_jpeg())
    (tmp_path / "a.jpg").write_bytes(noise_jpeg()[:-2] + end)
    assert np.array_equal(read_image(tmp_path / "a.jpg", 32), read_image(tmp_path / "whole.jpg", 32))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("damage", ["no end marker", "broken comment"])
def test_a_repaired_file_keeps_its_orientation(damage: str, orientation: int, tmp_path: Path) -> None:
    picture, exif = Image.open(io.BytesIO(noise_jpeg())), Image.Exif()
    exif[0x0112] = orientation
    suffix = "jpg" if damage == "no end marker" else "png"
    whole, damaged = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    picture.save(whole, exif=exif)
    content = whole.read_bytes()
    damaged.write_bytes(content[:-2] if suffix == "jpg" else content[:33] + BROKEN_COMMENT + content[33:])
    found = read_picture(damaged, 32)
    assert found.metadata_ignored
    assert np.array_equal(found.pixels, read_image(whole, 32))


def test_unreadable_exif_data_are_ignored_when_a_file_is_repaired(tmp_path: Path) -> None:
    content = bytearray(noise_jpeg()[:-2])
    content[2:2] = b"\xff\xe1\0\x0eExif\0\0garbage!"[:18]
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "whole.jpg").write_bytes(noise_jpeg())
    assert np.array_equal(read_image(tmp_path / "a.jpg", 32), read_image(tmp_path / "whole.jpg", 32))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_before_its_end_marker_is_refused(progressive: bool, tmp_path: Path) -> None:
    content = noise_jpeg(progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2] + content[-2:])
    with pytest.raises(OSError, match="truncated"):
        read_image(tmp_path / "a.jpg", 32)


def test_a_png_with_a_damaged_header_is_called_damaged(tmp_path: Path) -> None:
    Image.open(io.BytesIO(noise_jpeg())).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[30] ^= 1  # in the checksum of the header
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_image(tmp_path / "a.png", 32)


def palette_png() -> bytes:
    """Returns a small PNG with a palette and a transparent color."""
    target, shades = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(shades.repeat(3, axis=0).repeat(3, axis=1)).quantize(8).save(target, "PNG", transparency=3)
    return target.getvalue()


def chunk_in(png: bytes, kind: bytes) -> range:
    """Returns the positions of the type, the data and the checksum of a chunk."""
    start = png.index(kind)
    return range(start, start + 8 + int.from_bytes(png[start - 4 : start], "big"))


@pytest.mark.parametrize("kind", [b"PLTE", b"tRNS", b"IDAT"])
@pytest.mark.parametrize("metadata", [b"", BROKEN_COMMENT], ids=["no metadata", "broken comment"])
def test_a_png_with_a_flipped_bit_in_its_pixels_is_refused(kind: bytes, metadata: bytes, tmp_path: Path) -> None:
    content = palette_png()[:33] + metadata + palette_png()[33:]
    (tmp_path / "a.png").write_bytes(content)
    assert read_picture(tmp_path / "a.png", 18).metadata_ignored == bool(metadata)
    for place in chunk_in(content, kind):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises((OSError, ValueError), match=r"damaged|broken|truncated|stream"):
            read_image(tmp_path / "a.png", 18)


def test_a_png_whose_end_was_overwritten_with_zeros_is_refused(tmp_path: Path) -> None:
    """An interrupted copy may leave zeros."""
    content = palette_png()
    for place in chunk_in(content, b"IDAT")[4:]:
        (tmp_path / "a.png").write_bytes(content[:place] + bytes(len(content) - place))
        with pytest.raises((OSError, ValueError), match=r"damaged|broken|truncated|stream"):
            read_image(tmp_path / "a.png", 18)


def test_only_the_first_frame_of_an_animated_png_is_checked(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (18, 18), color) for color in ("red", "blue")]
    content = bytearray(save(tmp_path / "a.png", frames[0], save_all=True, append_images=frames[1:]).read_bytes())
    whole = read_image(tmp_path / "a.png", 18)
    content[content.index(b"fdAT") + 20] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "a.png", 18), whole)
    content[content.index(b"IDAT") + 8] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"damaged|broken|truncated|stream"):
        read_image(tmp_path / "a.png", 18)


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


def test_a_tiff_whose_tile_exceeds_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is decoded as a whole, even if the image is much smaller."""
    side, data = 1008, zlib.compress(bytes(1008 * 1008))
    tags = [(256, 32), (257, 32), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(324, start), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + data
    (tmp_path / "a.tif").write_bytes(content)
    assert read_image(tmp_path / "a.tif", 32).shape == (32, 32, 3)
    monkeypatch.setattr(picture, "MAX_PIXELS", 1_000_000)
    with pytest.raises(picture.TooLargeError, match="1008x1008 pixels exceed the limit"):
        read_image(tmp_path / "a.tif", 32)


@pytest.mark.parametrize("hidden", [b"", b"\xff\1\xff\xff"], ids=["plain", "behind a marker without a length"])
def test_a_jpeg_with_more_than_100_scans_is_refused_before_it_is_decoded(
    hidden: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a scan can have a few bytes and take as long to decode as the whole image."""
    path = save(tmp_path / "a.jpg", Image.new("L", (64, 64), 90), progressive=True)
    content = path.read_bytes().removesuffix(JPEG_END)
    start = content.rindex(JPEG_SCAN)
    path.write_bytes(content + content[start:] * (100 - content.count(JPEG_SCAN)) + JPEG_END)
    assert (read_image(path, 32) == 90).all()
    path.write_bytes(content + hidden + content[start:] * 100 + JPEG_END)
    monkeypatch.setattr(picture, "_finish", lambda *_: pytest.fail("the image is decoded"))
    with pytest.raises(ValueError, match="more than 100 scans"):
        read_image(path, 32)
