"""Image files of every kind give the expected pixels; memory use is limited, and damaged metadata is ignored."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import picture
from data_prep.sources.picture import read_picture, why_unreadable
from tests.support.memory import PEAK_MEMORY
from tests.support.photos import gradient, noise_jpeg, png_of, read_image, save
from tests.support.trainer import REPOSITORY, environment

RED = (255, 0, 0)


def tiff_of(values: np.ndarray, *, white_is_zero: bool = False) -> bytes:
    """Returns a TIFF of a little-endian array (H, W) of any type; Pillow can write only a few types."""
    bits, kind = 8 * values.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (277, 1), (278, height), (279, values.nbytes), (339, kind)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 279 else 3, 1, value) for tag, value in tags)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
        + values.tobytes()
        + struct.pack("<H", 10)
        + entries
        + bytes(4)
    )


def test_a_png_of_the_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 32), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    """The left side is black and the right side is white in every mode."""
    halves = np.zeros((32, 32), dtype=np.uint8)
    halves[:, 16:] = 255
    if mode == "I;16":
        image = Image.fromarray(halves.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(halves).convert("RGB").convert(mode)
    found = read_image(save(tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"), image), 32)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    assert np.abs(found.astype(int) - halves[..., None]).max() <= 3


def test_sixteen_bit_values_are_scaled_to_eight_bits(tmp_path: Path) -> None:
    deep = (gradient(32).astype(np.uint16)) * 257
    found = read_image(save(tmp_path / "a.png", Image.fromarray(deep)), 32)
    assert np.array_equal(found[..., 1], gradient(32))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_become_white(mode: str, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    if mode in ("P", "RGB"):  # one color is marked as transparent
        transparency = 0 if mode == "P" else (0, 0, 0)
        path = save(tmp_path / "a.png", Image.new(mode, (32, 32), 0), transparency=transparency)
    else:
        path = save(tmp_path / "a.png", clear.convert(mode))
    assert (read_image(path, 32) == 255).all()


def test_the_transparent_color_of_a_16_bit_image_becomes_white_or_is_refused(tmp_path: Path) -> None:
    """Pillow keeps all bits of gray values, but only the upper 8 bits of colors: 1000 and 1001 become the same."""
    values = np.array([[[1000], [1001]]], dtype=">u2").repeat(8, axis=0).repeat(4, axis=1)
    (tmp_path / "gray.png").write_bytes(png_of(values, 0, struct.pack(">H", 1000)))
    assert read_image(tmp_path / "gray.png", 8)[0, :, 0].tolist() == [255] * 4 + [4] * 4
    (tmp_path / "color.png").write_bytes(png_of(values.repeat(3, axis=2), 2, struct.pack(">3H", 1000, 1000, 1000)))
    with pytest.raises(ValueError, match="16-bit image with a transparent color"):
        read_image(tmp_path / "color.png", 8)


def test_half_transparent_red_becomes_pink(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGBA", (32, 32), (255, 0, 0, 128)))
    assert np.abs(read_image(path, 32)[0, 0].astype(int) - (255, 127, 127)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_orientation_is_applied(suffix: str, tmp_path: Path) -> None:
    """With orientation 6, the left side of the stored pixels is the top of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(gradient(32)).convert("RGB")
    found = read_image(save(tmp_path / f"a.{suffix}", stored, exif=exif), 32)[..., 0].astype(int)
    assert found[0].max() < 16
    assert found[-1].min() > 239


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_images_are_center_cropped(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    center = tuple(slice((side - 32) // 2, (side + 32) // 2) for side in shape)
    pixels[center] = RED
    assert (read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), 32) == RED).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_is_antialiased(suffix: str, tmp_path: Path) -> None:
    """A fine checkerboard becomes gray. Without antialiasing it would stay black and white."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(board)), 32)
    assert np.abs(found.astype(int) - 127).max() <= 8


@pytest.mark.parametrize("side", [1, 5, 33, 500])
def test_images_of_any_size_are_resized(side: int, tmp_path: Path) -> None:
    found = read_image(save(tmp_path / "a.jpeg", Image.new("RGB", (side, side), RED)), 24)
    assert found.shape == (24, 24, 3)
    assert np.abs(found.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("side", [600, 613])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_averaging_strips_before_resizing_changes_little(mode: str, side: int, tmp_path: Path) -> None:
    """Images at least eight times as large as the target are averaged down in strips before they are resized."""
    smooth = gradient(side).astype(np.uint16) * 257
    image = Image.fromarray(smooth) if mode == "I;16" else Image.fromarray(gradient(side)).convert(mode)
    found = read_image(save(tmp_path / "a.png", image), 16)
    expected = np.array(Image.fromarray(gradient(side)).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 1


def png_with(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Returns a red PNG with an additional chunk after its header."""
    target = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(target, "PNG")
    whole = target.getvalue()
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return whole[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum) + whole[33:]


LONG = zlib.compress(b"a" * 2**21)
ODD_PNGS = {
    "long comment": png_with(b"zTXt", b"Comment\0\0" + LONG),
    "long profile": png_with(b"iCCP", b"ICC\0\0" + LONG),
    "broken EXIF": png_with(b"eXIf", b"xxxx"),
    "wrong checksum of a comment": png_with(b"tEXt", b"Comment\0hi", crc=0),
    "unknown chunk": png_with(b"abCd", b"whatever", crc=1),
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_a_png_with_odd_metadata_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(ODD_PNGS[name])
    found = read_picture(tmp_path / "a.png", 32)
    assert (found.pixels == RED).all()
    assert found.metadata_ignored


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0xxxx", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + b"\xff" * 50])
def test_a_jpeg_with_broken_exif_is_read(exif: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("RGB", (64, 64), "red"), exif=exif)
    assert np.abs(read_image(path, 32).astype(int) - RED).max() <= 3


ODD_SEGMENTS = {
    "short profile": b"\xff\xe2\x00\x0fICC_PROFILE\0\x01",
    "broken multi-picture index": b"\xff\xe2\x00\x08MPF\0xx",
    "broken Photoshop data": b"\xff\xed\x00\x1aPhotoshop 3.0\x008BIM\xff\xff\xff\xff\xff\xff",
    "comment": b"\xff\xfe\x00\x04\xff\xff",
    "short JFIF segment": b"\xff\xe0\x00\x06JFIF",
    "short Adobe segment": b"\xff\xee\x00\x07Adobe",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD_SEGMENTS)
@pytest.mark.parametrize("end", [None, -2])
def test_a_jpeg_with_odd_metadata_or_without_its_end_marker_is_read(name: str, end: int | None, tmp_path: Path) -> None:
    whole = noise_jpeg()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "a.jpg").write_bytes(whole[:2] + ODD_SEGMENTS[name] + whole[2:end])
    assert np.array_equal(read_image(tmp_path / "a.jpg", 32), read_image(tmp_path / "whole.jpg", 32))


@pytest.mark.parametrize("content", [b"\xff\xd8\xff", b"GIF89a\1\0", b"P6\n0 0\n255\n", b"II*\0\xff\xff\0\0"])
def test_an_image_with_a_damaged_header_is_called_damaged_or_truncated(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises((OSError, ValueError)) as caught:
        read_image(tmp_path / "a", 8)
    assert any(word in why_unreadable(caught.value) for word in ("damaged", "truncated"))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("f2", "float"),
        ("f4", "float"),
        ("f8", "float"),
        ("i1", "signed"),
        ("i2", "signed"),
        ("i4", "signed"),
        ("u4", "32-bit"),
    ],
)
def test_a_tiff_with_values_of_unknown_range_is_refused(dtype: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_of(np.ones((8, 8), f"<{dtype}")))
    with pytest.raises(ValueError, match=f"^{kind} image: the range of its values is unknown"):
        read_image(tmp_path / "a.tif", 8)


def test_8_and_16_bit_tiffs_that_store_white_as_zero_are_inverted(tmp_path: Path) -> None:
    for dtype, scale in (("u1", 1), ("<u2", 257)):
        (tmp_path / "a.tif").write_bytes(tiff_of(gradient(32).astype(dtype) * scale, white_is_zero=True))
        assert np.array_equal(read_image(tmp_path / "a.tif", 32)[..., 0], 255 - gradient(32))


def test_too_many_pixels_are_refused_and_the_error_says_how_to_raise_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", Image.new("L", (1000, 1001)))
    monkeypatch.setattr(picture, "MAX_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match=r"1000x1001 .* DATA_PREP_MAX_PIXELS=1001000"):
        read_image(path, 8)
    monkeypatch.setattr(picture, "MAX_PIXELS", 1_001_000)
    assert read_image(path, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "1", "P"])
def test_memory_for_one_image_is_limited(mode: str, tmp_path: Path) -> None:
    """64 million RGBA pixels take 256 MB, and converting the whole image would take several times that."""
    path = tmp_path / "a.png"
    Image.new(mode, (8000, 8000)).save(path, compress_level=1)
    code = f"""
from data_prep.sources.picture import read_picture
{PEAK_MEMORY}
before = peak_memory()
read_picture({str(path)!r}, 32)
print(peak_memory() - before)
""".replace("read_picture('", "read_picture(__import__('pathlib').Path('").replace("', 32)", "'), 32)")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 420, "the peak memory, in MiB, is too high"
