"""Turns an image file into a square RGB array, with bounded memory and a limit on the number of pixels.

Damaged metadata is ignored if the pixels can be read.
"""

import io
import math
import os
import re
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data_prep.errors import printable, require
from data_prep.files import open_regular
from data_prep.machine_limits import due_to_machine
from data_prep.sources.decoder_messages import reading
from data_prep.sources.repair import JPEG, PNG, check_chunks, check_markers, require_all_pixels, without_metadata
from data_prep.sources.tiff import UNKNOWN_RANGE, is_inverted, require_known_range, tags_in, tags_of, tile_size

# A format is recognized by the content of a file, not by its name. Of an animation, only the first frame is used.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
# The first letters do not suffice for WebP, BMP and PPM: WAV files start with "RIFF" too, and a text file may start
# with "BM" or "P5".
_OTHER_STARTS = rb"RIFF....WEBP|BM....\0\0\0\0|GIF8[79]a|II[*+]\0|MM\0[*+]|P[1-6]\s+[#\d]"
_TIFF = b"II*\0", b"MM\0*"
_IMAGE_START = re.compile(re.escape(PNG) + b"|" + JPEG + b"|" + _OTHER_STARTS, re.DOTALL)

LIMIT_VARIABLE = "DATA_PREP_MAX_PIXELS"
_limit = os.environ.get(LIMIT_VARIABLE) or "100000000"
# Maximum number of pixels of an image at its decoded size. 0 if the variable is wrong: see `require_valid_limit`.
MAX_PIXELS = int(_limit) if re.fullmatch("[0-9]{1,18}", _limit) else 0
MAX_SHRINKING = 4  # a non-progressive JPEG may exceed MAX_PIXELS by this factor: it can be decoded at a smaller size
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
_one_large_image = threading.Lock()


class Picture(NamedTuple):
    """The pixels of one image file, and facts about it that data preparation reports."""

    pixels: np.ndarray  # (size, size, 3) uint8
    metadata_ignored: bool
    brightest: int  # largest value of a 16-bit image; -1 for other images


def require_valid_limit() -> None:
    """Raises InputError if the environment variable LIMIT_VARIABLE is not a positive whole number."""
    require(MAX_PIXELS > 0, f"{LIMIT_VARIABLE} must be a positive whole number such as 200000000, got {_limit}")


def read_picture(path: Path, size: int) -> Picture:
    """Reads the center square of one image file, resized to `size` x `size` pixels.

    The picture is turned upright according to its EXIF orientation, and resized with an antialiasing filter. Images
    with transparency are laid over white, 16-bit values are scaled to 8 bits, and all color modes become RGB. Raises
    ValueError or OSError. For a damaged file, the decoder may also raise other exceptions.
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
            content = _content(file)
            if picture := _repaired(content, size):
                return picture
            raise _plainer(error, content) from None


def starts_like_image(content: bytes) -> bool:
    """Whether `content` is the start of an image. It must have at least the first 16 bytes of the file."""
    return _IMAGE_START.match(content) is not None


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
        is_jpeg, progressive = image.format in ("JPEG", "MPO"), "progressive" in image.info
        _check_size(image.size, MAX_SHRINKING if is_jpeg and not progressive else 1)
        jpeg = _content(file) if is_jpeg else b""
        if is_jpeg:
            check_markers(jpeg)
        # A large JPEG is decoded at 1/8 to 1/2 of its size, but at no less than four times the target size.
        image.draft(image.mode, (4 * size, 4 * size))
        decoded = max(image.size, tile_size(image), key=math.prod)
        _check_size(decoded, 1)
        with _one_large_image if math.prod(decoded) > LARGE_PIXELS else nullcontext():
            picture = _finish(image, size, metadata_ignored)
            if is_jpeg:
                require_all_pixels(jpeg)
            elif image.format == "PNG":
                check_chunks(file)
            return picture


def _repaired(content: bytes, size: int) -> Picture | None:
    """The picture after a repair by `repair.without_metadata`, or None if it still cannot be read."""
    for keep_exif in (True, False):  # the EXIF data may be what cannot be read
        repaired = without_metadata(content, partial(_pixels_of, size=size), keep_exif=keep_exif)
        try:
            if repaired is not None:
                return _decode(io.BytesIO(repaired), size, metadata_ignored=True)
        except Exception as error:
            if isinstance(error, TooLargeError) or due_to_machine(error):
                raise
    return None


def _pixels_of(content: bytes, size: int) -> np.ndarray:
    return _decode(io.BytesIO(content), size, metadata_ignored=True).pixels


def _check_size(size: tuple[int, int], factor: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS * factor:
        raise TooLargeError(
            f"{width}x{height} pixels exceed the limit of {MAX_PIXELS * factor:,}; shrink the image, "
            f"or raise the limit with {LIMIT_VARIABLE}={-(-width * height // factor)}"
        )


def _finish(image: Image.Image, size: int, metadata_ignored: bool) -> Picture:
    has_16_bits = any(re.search("(RGB|LA|RGBA|I);16", str(tile.args)) for tile in getattr(image, "tile", ()))
    require_known_range(tags_of(image))
    image.load()
    if image.mode == "F":
        raise ValueError(f"float image: {UNKNOWN_RANGE}")
    if has_16_bits and image.mode == "RGB" and "transparency" in image.info:  # Pillow keeps only the upper 8 bits
        raise ValueError("16-bit image with a transparent color; save it with an alpha channel or with 8 bits")
    orientation, readable = _orientation(image)
    square, brightest = _center_square(image, size, has_16_bits)
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
    """Largest factor by which the image can be shrunk and still have four times the target size; at least 1."""
    return max(min(image.size) // (4 * size), 1)


def _center_square(image: Image.Image, size: int, has_16_bits: bool) -> tuple[Image.Image, int]:
    """The center square as RGB, shrunk by `_factor`, and the largest value if the image has 16 bits (else -1).

    Converts one strip at a time, because converting a whole image needs several copies of it.
    """
    side, factor = min(image.size), _factor(image, size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = -(-side // factor)
    square, brightest = Image.new("RGB", (small, small)), -1
    rows = max(STRIP_PIXELS // side // factor, 1) * factor
    for start in range(0, side, rows):
        strip = image.crop((left, top + start, left + side, top + min(start + rows, side)))
        if strip.mode == "I" or strip.mode.startswith("I;16"):
            strip, largest = _scale_to_8_bits(strip, inverted=is_inverted(image))
            brightest = max(brightest, largest)
        elif has_16_bits:  # in color or with transparency: Pillow keeps only the upper 8 bits
            colors = [band for band in strip.getbands() if band != "A"]
            brightest = max(brightest, *(257 * int(np.asarray(strip.getchannel(band)).max()) for band in colors))
        rgb = _to_rgb(strip)
        square.paste(rgb.reduce(factor) if factor > 1 else rgb, (0, start // factor))
    return square, brightest


def _scale_to_8_bits(strip: Image.Image, *, inverted: bool) -> tuple[Image.Image, int]:
    """A 16-bit image as 8 bits, and its largest value. Pillow's own conversion clips at 255 instead of scaling."""
    values = 65535 - np.asarray(strip) if inverted else np.asarray(strip)
    lowest, largest = int(values.min()), int(values.max())
    if lowest < 0 or largest > 65535:
        raise ValueError(f"its values range from {lowest} to {largest}; only 0 to 65535 are supported")
    values = np.where(values == strip.info.get("transparency", -1), 65535, values)  # transparent pixels become white
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)), largest


def _to_rgb(strip: Image.Image) -> Image.Image:
    if not strip.has_transparency_data:
        return strip.convert("RGB")
    strip = strip.convert("RGBA")
    white = Image.new("RGBA", strip.size, "white")
    return Image.alpha_composite(white, strip).convert("RGB")


def _content(file: BinaryIO | io.BytesIO) -> bytes:
    """The file, but at most 8 * MAX_PIXELS bytes: 8 bytes per pixel."""
    file.seek(0)
    if isinstance(file, io.BytesIO):
        return file.read()
    return file.read(min(os.fstat(file.fileno()).st_size, 8 * MAX_PIXELS))  # `read(n)` allocates n bytes


def _plainer(error: Exception, content: bytes) -> Exception:
    """`error`, or "damaged or incomplete" if `error` is unclear and `content` starts like an image."""
    is_clear = isinstance(error, (OSError, ValueError)) and not isinstance(error, Image.UnidentifiedImageError)
    if content.startswith(_TIFF):
        require_known_range(tags_in(content))  # Pillow cannot open some valid TIFFs, such as those of 64-bit floats
    return error if is_clear or not starts_like_image(content) else ValueError("the file is damaged or incomplete")
