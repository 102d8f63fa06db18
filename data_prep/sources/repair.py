"""Repairs PNG and JPEG files whose pixels are complete: removes metadata, and adds a JPEG's missing end marker."""

import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_prep.machine_limits import due_to_machine

PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the only chunks of a PNG that matter for its pixels
_ANCILLARY_MARKERS = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # comments, and all APPn segments except those of JFIF and Adobe
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]", re.DOTALL)  # such a pair of bytes never occurs in the pixel data


def pixels_only(content: bytes, decode: Callable[[bytes], np.ndarray]) -> bytes | None:
    """The file without its metadata and, for a JPEG, with an end marker; None if it cannot be repaired.

    `decode`: reads the pixels of a JPEG.
    """
    if content.startswith(PNG):
        return _png_pixels(content)
    if content.startswith(JPEG):
        stripped = _jpeg_pixels(content)
        return _jpeg_with_end(stripped, decode) if lacks_end(stripped) else stripped
    return None


def lacks_end(jpeg: bytes) -> bool:
    """Whether a JPEG has no end marker. Skips segments, because one may contain a thumbnail with its own end marker."""
    position = 2
    while found := _MARKER.search(jpeg, position):
        if found[0] == JPEG_END:
            break
        position = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return found is None


def _png_pixels(content: bytes) -> bytes | None:
    """A PNG without its comments, profiles and other metadata. The checksums of its pixels are kept."""
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
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] not in (b"", b"\xda"):
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if marker not in _ANCILLARY_MARKERS:
            kept.append(content[position : position + 2 + length])
        position += 2 + max(length, 2)
    return b"".join(kept) + content[position:]


def _jpeg_with_end(content: bytes, decode: Callable[[bytes], np.ndarray]) -> bytes | None:
    """A JPEG that lacks only its end marker, with the marker added. None if pixels are missing too.

    The decoder makes up missing pixels from whatever follows the data. If two different endings give the same picture,
    no pixels are missing. A progressive JPEG is not repaired, because its last scans may be missing unnoticed.
    """
    content = content.rstrip(b"\0").removesuffix(b"\xff")  # zeros would become pixels; 0xff is half of an end marker
    ended, other = content + JPEG_END, content + b"\x35\xa6" * 64 + JPEG_END
    try:
        with Image.open(io.BytesIO(ended), formats=("JPEG",)) as image:
            if "progressive" in image.info:
                return None
        return ended if np.array_equal(decode(ended), decode(other)) else None
    except Exception as error:  # whatever the decoder raises for damaged files
        if due_to_machine(error):
            raise
        return None
