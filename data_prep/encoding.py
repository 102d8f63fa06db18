"""Encodes an image as raw pixels or as a JPEG file, decodes JPEG files, and computes checksums of the stored bytes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from data_prep.errors import InputError

ENCODINGS = ("raw", "jpeg")
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """How images are stored. `raw` keeps the pixels. `jpeg` images are smaller and faster to read from a disk, but they
    lose detail and must be decoded at each read."""

    name: Literal["raw", "jpeg"] = "raw"
    quality: int | None = None  # of a JPEG, 1 to 100

    def __post_init__(self) -> None:
        if self.name == "raw" and self.quality is not None:
            raise InputError("--quality needs --encoding jpeg")
        if self.name == "jpeg" and not (self.quality and 1 <= self.quality <= 100):
            raise InputError(f"--quality must be 1 to 100, got {self.quality}")

    def encode(self, image: np.ndarray) -> bytes:
        """The stored bytes of (H, W, 3) uint8 pixels."""
        if self.quality is None:
            return image.tobytes()
        from simplejpeg import encode_jpeg

        return encode_jpeg(np.ascontiguousarray(image), quality=self.quality, colorsubsampling="420")


RAW = Encoding()


def decode_into(pixels: np.ndarray, content: bytes) -> None:
    """Decodes a JPEG into `pixels`, (H, W, 3) uint8. Raises ValueError for all damage that libjpeg notices.

    If data are missing or wrong, libjpeg only warns and makes up pixels. `strict` turns its warnings into errors.
    """
    from simplejpeg import decode_jpeg, decode_jpeg_header

    height, width, *_ = decode_jpeg_header(content)
    if (height, width) != pixels.shape[:2]:
        raise ValueError(f"it has {width}x{height} pixels instead of {pixels.shape[1]}x{pixels.shape[0]}")
    decode_jpeg(content, buffer=pixels, strict=True)


def checksum(content: bytes | memoryview) -> int:
    """A 64-bit checksum, signed like FFCV's integers. It detects accidental damage, but not deliberate changes."""
    value = xxhash.xxh3_64_intdigest(content)
    return value - 2**64 if value >= 2**63 else value
