"""How the pixels of an image are stored: as they are, or as a JPEG file. And the checksum of what is stored."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from data_prep.errors import InputError

ENCODINGS = ("raw", "jpeg")
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """`raw` keeps the pixels. `jpeg` needs less space and time to read from a disk, loses detail, and is decoded again
    in every epoch."""

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
    """Decodes a JPEG into (H, W, 3) uint8 pixels. Raises ValueError for any fault, also for one that could be hidden.

    libjpeg only warns of missing or wrong data and makes pixels up; `strict` turns its warnings into errors.
    """
    from simplejpeg import decode_jpeg, decode_jpeg_header

    height, width, *_ = decode_jpeg_header(content)
    if (height, width) != pixels.shape[:2]:
        raise ValueError(f"it has {width}x{height} pixels instead of {pixels.shape[1]}x{pixels.shape[0]}")
    decode_jpeg(content, buffer=pixels, strict=True)


def checksum(content: bytes | memoryview) -> int:
    """A 64-bit checksum, signed because FFCV's integers are. It finds any damage but not a deliberate change."""
    value = xxhash.xxh3_64_intdigest(content)
    return value - 2**64 if value >= 2**63 else value
