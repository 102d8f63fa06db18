"""Detects missing or damaged pixels in JPEG and PNG files, and repairs files with damaged metadata.

JPEG files that would take too long to decode are refused. A repair removes metadata, which may be damaged, and adds the
end marker to a JPEG that lacks it.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.machine_limits import due_to_machine

PNG, JPEG, JPEG_SCAN, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
# A scan of a few bytes can take as long to decode as a whole image. Encoders write about 10 scans. libtiff has the
# same limit for the JPEG data in a TIFF.
MAX_SCANS = 100
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # the only chunks of a PNG that matter for its pixels
_ANCILLARY_MARKERS = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # comments, and all APPn segments except those of JFIF and Adobe
_PIECE = 2**20  # number of bytes of a chunk that are read at a time
# Minimum bytes of a JFIF and an Adobe segment. Other decoders skip shorter segments, but Pillow fails on them.
_SHORTEST = {0xE0: 18, 0xEE: 16}
# A marker that starts a segment, or the end marker. Such a pair of bytes never occurs in the pixel data.
_MARKER = re.compile(rb"\xff[^\0\1\xd0-\xd7\xff]", re.DOTALL)


def require_all_pixels(jpeg: bytes) -> None:
    """Raises OSError if the data of a JPEG end before its last pixel. Pillow makes up missing pixels without a warning.

    Wrong pixel values cannot be detected, because a JPEG has no checksum. libjpeg-turbo reports only its first warning,
    so missing pixels are not detected in a file that causes a different warning first.
    """
    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:  # strict=True also raises it for other warnings, most of them harmless
        if "premature end" in str(error).lower():
            raise OSError("image file is truncated") from None


def check_chunks(png: BinaryIO | io.BytesIO) -> None:
    """Raises OSError if the pixels of a PNG are damaged. Pillow does not compare the checksums of IDAT chunks.

    What follows the IEND chunk does not matter, and neither do chunks with metadata or further frames of an animation.
    """
    png.seek(len(PNG))
    while len(start := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"IEND":
            break
        if kind not in _PIXEL_CHUNKS:
            png.seek(length + 4, io.SEEK_CUR)
            continue
        checksum = zlib.crc32(kind)
        while piece := png.read(min(length, _PIECE)):
            checksum, length = zlib.crc32(piece, checksum), length - len(piece)
        found = png.read(4)
        if len(found) == 4 and found != checksum.to_bytes(4, "big"):
            raise OSError("the file is damaged: the checksum of its pixels is wrong")


def without_metadata(content: bytes, decode: Callable[[bytes], np.ndarray], *, keep_exif: bool) -> bytes | None:
    """The file without its metadata and, for a JPEG, with an end marker; None if it cannot be repaired.

    `decode`: reads the pixels of a JPEG. `keep_exif`: whether to keep the EXIF data, which contain the orientation.
    """
    if content.startswith(PNG):
        return _png_pixels(content, _PIXEL_CHUNKS | ({b"eXIf"} if keep_exif else set()))
    if content.startswith(JPEG):
        stripped = _jpeg_pixels(content, keep_exif)
        return _jpeg_with_end(stripped, decode) if lacks_end(stripped) else stripped
    return None


def check_markers(jpeg: bytes) -> None:
    """Raises OSError if a JPEG has no end marker, and ValueError if it has more than MAX_SCANS scans.

    An interrupted copy may leave zeros instead of the last pixels.
    """
    if not jpeg.endswith(JPEG_END) and lacks_end(jpeg):
        raise OSError("image file is truncated")
    scans = (marker for marker in _markers(jpeg) if marker == JPEG_SCAN)
    if any(number > MAX_SCANS for number, _ in enumerate(scans, start=1)):
        raise ValueError(f"it has more than {MAX_SCANS} scans, so it would take too long to decode; save it again")


def lacks_end(jpeg: bytes) -> bool:
    return JPEG_END not in _markers(jpeg)


def _markers(jpeg: bytes) -> Iterator[bytes]:
    """The markers of a JPEG up to its end marker. Skips segments, because one may contain a thumbnail with markers."""
    position = 2
    while found := _MARKER.search(jpeg, position):
        yield found[0]
        if found[0] == JPEG_END:
            break
        position = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")


def _png_pixels(content: bytes, kinds: set[bytes]) -> bytes | None:
    """A PNG with only the chunks of the types `kinds`, each with its checksum.

    None if the type of a chunk that determines the pixels is damaged, so that its checksum does not fit.
    """
    kept, position = [content[:8]], 8
    while position + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        if kind in kinds:
            kept.append(content[position : position + 12 + length])
        elif _has_damaged_type(content[position + 8 : position + 12 + length]):
            return None
        position += 12 + length
    return b"".join(kept) if len(kept) > 2 else None


def _has_damaged_type(chunk: bytes) -> bool:
    """Whether a chunk's checksum shows that it is a pixel chunk with a damaged type. `chunk`: data and checksum."""
    checksum = int.from_bytes(chunk[-4:], "big")
    return any(zlib.crc32(chunk[:-4], zlib.crc32(kind)) == checksum for kind in _PIXEL_CHUNKS)


def _jpeg_pixels(content: bytes, keep_exif: bool) -> bytes:
    """A JPEG without its comments and profiles. JFIF and Adobe markers are kept: they define the colors."""
    kept, position = [content[:2]], 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] not in (b"", b"\xda"):
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position : position + 2 + length]
        matters = marker not in _ANCILLARY_MARKERS or (keep_exif and segment[4:10] == b"Exif\0\0")
        if matters and len(segment) >= _SHORTEST.get(marker, 0):
            kept.append(segment)
        position += 2 + max(length, 2)
    return b"".join(kept) + content[position:]


def _jpeg_with_end(content: bytes, decode: Callable[[bytes], np.ndarray]) -> bytes | None:
    """A JPEG that lacks only its end marker, with the marker added. None if pixels are missing too.

    The decoder makes up missing pixels from whatever follows the data. If two different endings give the same picture,
    no pixels are missing. A progressive JPEG is not repaired, because missing scans at its end would go unnoticed.
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
