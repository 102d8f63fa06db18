"""Image files for tests: a small folder with two classes for `--source folder`, damaged files and unusual formats."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import InputError
from data_prep.sources import Split
from data_prep.sources.folder import FolderImages
from data_prep.sources.picture import read_picture
from data_prep.sources.repair import PNG

BAD_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x20\0\x12\x01\x03\0\x01\0\0\0"  # claims 32 entries, but ends within the first


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def gradient(size: int) -> np.ndarray:
    """Returns (size, size) uint8 pixels that get brighter from left to right."""
    return np.broadcast_to(np.linspace(0, 255, size).astype(np.uint8), (size, size))


def damaged_tiff(path: Path) -> Path:
    """Writes a damaged TIFF file, for which libtiff prints a message."""
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    content = bytearray(save(path, Image.fromarray(pixels), compression="tiff_lzw").read_bytes())
    content[200:260] = bytes(byte ^ 0x5A for byte in content[200:260])
    path.write_bytes(content)
    return path


def png_of(values: np.ndarray, color_type: int, transparent: bytes = b"") -> bytes:
    """Returns a PNG of (H, W, channels) big-endian uint16 values, which Pillow cannot write.

    `transparent`: the content of the chunk that marks a color as transparent.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    marked = chunk(b"tRNS", transparent) if transparent else b""
    return PNG + chunk(b"IHDR", header) + marked + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noise_jpeg(**options: Any) -> bytes:
    """Returns a JPEG of 64 x 64 random pixels."""
    target = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "JPEG", **options)
    return target.getvalue()


def draw_photos(root: Path) -> Path:
    """Writes twelve training and four test images of two classes; the red value encodes class and file number."""
    for split, count in (("train", 6), ("test", 2)):
        for label, kind in enumerate(("cat", "dog")):
            for number in range(count):
                color = (100 * label + 10 * number, count, 0)
                save(root / split / kind / f"{number}.png", Image.new("RGB", (8, 8), color))
    return root


def read_image(path: Path, size: int) -> np.ndarray:
    """Returns the (size, size, 3) uint8 pixels of one image file."""
    return read_picture(path, size).pixels


class Loaded(NamedTuple):
    """All images of a folder, with the notes and the skipped files that the reader reports."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def load_folder(root: Path, **options: Any) -> Loaded:
    """Reads a folder as `data_prep` does, but keeps all images in memory."""
    source = FolderImages(root, **options)
    train, test = ([*source.chunks(name)] for name in ("train", "test"))
    findings = source.findings()
    return Loaded(source.classes, join(train), join(test), findings.notes, findings.skipped)


def join(chunks: list[Split]) -> Split:
    images, labels = zip(*chunks, strict=True)
    return Split(np.concatenate(images), np.concatenate(labels))


def fails(root: Path, **options: Any) -> str:
    """Reads `root`, which must fail with InputError, and returns the one-line error message."""
    with pytest.raises(InputError) as caught:
        load_folder(root, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
