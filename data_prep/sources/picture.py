"""Turns an image file into square RGB pixels, with bounded memory and a limit on the number of pixels.

Damaged metadata is ignored if the pixels can be read.
"""

import io
import os
import struct
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data_prep.errors import printable
from data_prep.files import open_regular
from data_prep.machine_limits import due_to_machine
from data_prep.sources.decoder_messages import reading

# A format is recognized by the content of a file, not by its name. Of an animation, only the first frame is used.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"P5", b"P6")

LIMIT_VARIABLE = "DATA_PREP_MAX_PIXELS"
_limit = os.environ.get(LIMIT_VARIABLE, "")
MAX_PIXELS = int(_limit) if _limit.isdecimal() else 100_000_000  # of one image, at the size at which it is decoded
MAX_SHRINKING = 4  # a JPEG may have this many times as many pixels, because it can be decoded at a smaller size
STRIP_PIXELS = 2**22  # number of pixels that are converted at a time
LARGE_PIXELS = 2**24  # larger images are decoded one at a time, whatever the number of threads
Image.MAX_IMAGE_PIXELS = None  # turns off Pillow's own limit; `_check_size` enforces ours

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> operation that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the only chunks of a PNG that matter for its pixels
_ANCILLARY_MARKERS = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # JPEG comments, and all APPn except JFIF and Adobe
_one_large_image = threading.Lock()


class Picture(NamedTuple):
    """The pixels of one image file, and facts about it that data preparation reports."""

    pixels: np.ndarray  # (size, size, 3) uint8
    metadata_ignored: bool
    brightest: int | None  # largest value of a 16-bit image


def read_image(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8 pixels of one image file. Raises whatever the decoder raises for damaged files."""
    return read_picture(path, size).pixels


def read_picture(path: Path, size: int) -> Picture:
    """Reads the center square of one image file, resized to `size` x `size` pixels.

    The picture is turned upright according to its EXIF orientation, and resized with an antialiasing filter.
    Transparent images are laid over white, 16-bit values are scaled to 8 bits, and gray, palette and CMYK images
    become RGB. Raises ValueError or OSError, and for damaged files whatever else the decoder raises.
    """
    with reading(path), open_regular(path) as file:
        if not file.read(1):
            raise ValueError("the file is empty")
        file.seek(0)
        try:
            return _decode(file, size, metadata_ignored=False)
        except Exception as error:
            if isinstance(error, TooLargeError) or due_to_machine(error):
                raise
            file.seek(0)
            repaired = _pixels_only(file.read(8 * MAX_PIXELS), size)
            if repaired is None:
                raise
        return _decode(io.BytesIO(repaired), size, metadata_ignored=True)


def why_unreadable(error: Exception) -> str:
    """One line that explains an error that `read_picture` raised."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known kind ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error)) or type(error).__name__


class TooLargeError(ValueError):
    """An image has more pixels than the limit."""


def _decode(file: BinaryIO | io.BytesIO, size: int, *, metadata_ignored: bool) -> Picture:
    with Image.open(file, formats=FORMATS) as image:
        progressive = "progressive" in image.info
        _check_size(image.size, MAX_SHRINKING if image.format in ("JPEG", "MPO") and not progressive else 1)
        # A large JPEG is decoded at 1/8 to 1/2 of its size, which is still at least four times the target size.
        image.draft(image.mode, (4 * size, 4 * size))
        _check_size(image.size, 1)
        if image.width * image.height <= LARGE_PIXELS:
            return _finish(image, size, metadata_ignored)
        with _one_large_image:
            return _finish(image, size, metadata_ignored)


def _check_size(size: tuple[int, int], factor: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS * factor:
        raise TooLargeError(
            f"{width}x{height} pixels exceed the limit of {MAX_PIXELS * factor:,}; shrink the image, "
            f"or raise the limit with {LIMIT_VARIABLE}={-(-width * height // factor)}"
        )


def _finish(image: Image.Image, size: int, metadata_ignored: bool) -> Picture:
    image.load()
    if image.mode == "F":
        raise ValueError("float image: the range of its values is unknown; save it with 8 or 16 bits")
    orientation, readable = _orientation(image)
    square, brightest = _center_square(image, size)
    if square.width != size or square.height != size:
        side = min(image.size) / _factor(image, size)
        square = square.resize((size, size), Image.Resampling.LANCZOS, box=(0, 0, side, side))
    if orientation in _UPRIGHT:
        square = square.transpose(_UPRIGHT[orientation])
    return Picture(np.array(square), metadata_ignored or not readable, brightest)


def _orientation(image: Image.Image) -> tuple[int | None, bool]:
    """(EXIF orientation, whether the EXIF data could be read)."""
    try:
        return image.getexif().get(_ORIENTATION_TAG), True
    except Exception as error:  # whatever damaged metadata raises
        if due_to_machine(error):
            raise
        return None, False


def _factor(image: Image.Image, size: int) -> int:
    """Factor by which the image is averaged down before it is resized; at least four times the target size remains."""
    return max(min(image.size) // (4 * size), 1)


def _center_square(image: Image.Image, size: int) -> tuple[Image.Image, int | None]:
    """The center square as RGB, averaged down by `_factor`, and the largest value of a 16-bit image.

    Converts one strip at a time, because converting the whole image would need several copies of it.
    """
    side, factor = min(image.size), _factor(image, size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = -(-side // factor)
    square, brightest = Image.new("RGB", (small, small)), None
    rows = max(STRIP_PIXELS // side // factor, 1) * factor
    for start in range(0, side, rows):
        strip = image.crop((left, top + start, left + side, top + min(start + rows, side)))
        if strip.mode == "I" or strip.mode.startswith("I;16"):
            strip, largest = _scale_to_8_bits(strip)
            brightest = max(brightest or 0, largest)
        rgb = _to_rgb(strip)
        square.paste(rgb.reduce(factor) if factor > 1 else rgb, (0, start // factor))
    return square, brightest


def _scale_to_8_bits(strip: Image.Image) -> tuple[Image.Image, int]:
    """A 16-bit image as 8 bits, and its largest value. Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(strip)
    lowest, largest = int(values.min()), int(values.max())
    if lowest < 0 or largest > 65535:
        raise ValueError(f"its values range from {lowest} to {largest}; only 0 to 65535 are supported")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)), largest


def _to_rgb(strip: Image.Image) -> Image.Image:
    if not strip.has_transparency_data:
        return strip.convert("RGB")
    strip = strip.convert("RGBA")
    white = Image.new("RGBA", strip.size, "white")
    return Image.alpha_composite(white, strip).convert("RGB")


def _pixels_only(content: bytes, size: int) -> bytes | None:
    """The file without its metadata, or None if the metadata cannot be removed."""
    if content.startswith(SIGNATURES[0]):
        return _png_pixels(content)
    if content.startswith(SIGNATURES[1]):
        stripped = _jpeg_pixels(content)
        return _jpeg_with_end(stripped, size) or stripped
    return None


def _png_pixels(content: bytes) -> bytes | None:
    """A PNG without its comments, profiles and other ancillary chunks. The checksums of its pixels are kept."""
    kept, position = [content[:8]], 8
    while position + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        if kind in _PIXEL_CHUNKS:
            kept.append(content[position : position + 12 + length])
        position += 12 + length
    return b"".join(kept) if len(kept) > 2 else None


def _jpeg_pixels(content: bytes) -> bytes:
    """A JPEG without its comments, profiles and EXIF data. JFIF and Adobe markers are kept: they define the colors."""
    kept, position = [content[:2]], 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] != b"\xda":
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if marker not in _ANCILLARY_MARKERS:
            kept.append(content[position : position + 2 + length])
        position += 2 + max(length, 2)
    return b"".join(kept) + content[position:]


def _jpeg_with_end(content: bytes, size: int) -> bytes | None:
    """A JPEG that lacks only its end marker, with the marker added. None if pixels are missing too.

    The decoder makes up missing pixels from whatever follows the data. If two different endings give the same picture,
    no pixels are missing. A progressive JPEG is not repaired, because its last scans may be missing unnoticed.
    """
    if content.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    endings = [content + b"\xff\xd9", content + b"\x35\xa6" * 64 + b"\xff\xd9"]
    pixels = []
    for ending in endings:
        try:
            with Image.open(io.BytesIO(ending), formats=("JPEG",)) as image:
                if "progressive" in image.info:
                    return None
            pixels.append(_decode(io.BytesIO(ending), size, metadata_ignored=True).pixels)
        except Exception as error:
            if isinstance(error, TooLargeError) or due_to_machine(error):
                raise
            return None
    return endings[0] if np.array_equal(*pixels) else None
