"""What the tags of a TIFF say about its pixels. Needed where Pillow ignores these tags or cannot open the file."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, TiffImagePlugin

from data_prep.machine_limits import due_to_machine

BITS, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT, SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC
SIGNED, FLOAT = 2, 3  # values of SAMPLE_FORMAT
UNKNOWN_RANGE = "the range of its values is unknown; save it with unsigned values of 8 or 16 bits"


def tags_of(image: Image.Image) -> Mapping[int, Any]:
    """The tags of an opened image; empty if it is not a TIFF."""
    return getattr(image, "tag_v2", {})


def tags_in(content: bytes) -> Mapping[int, Any]:
    """The tag SAMPLE_FORMAT of a TIFF that Pillow cannot open; empty if the tag is missing or unreadable."""
    try:
        tags, file = TiffImagePlugin.ImageFileDirectory_v2(content[:8]), io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        return {SAMPLE_FORMAT: tags.get(SAMPLE_FORMAT, ())}
    except Exception as error:  # whatever damaged tags raise
        if due_to_machine(error):
            raise
        return {}


def require_known_range(tags: Mapping[int, Any]) -> None:
    """Raises ValueError if it is unknown which value of a TIFF is black and which is white."""
    formats, bits = tags.get(SAMPLE_FORMAT, ()), tags.get(BITS, ())
    for kind, found in (("float", FLOAT in formats), ("signed", SIGNED in formats), ("32-bit", 32 in bits)):
        if found:
            raise ValueError(f"{kind} image: {UNKNOWN_RANGE}")


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a 16-bit TIFF. Pillow inverts the values only if they have fewer bits."""
    return image.mode.startswith("I;16") and tags_of(image).get(PHOTOMETRIC) == WHITE_IS_ZERO


def tile_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of each tile of a TIFF; (0, 0) if it has no tiles.

    A tile is decoded as a whole, and may be larger than the image.
    """
    tags = tags_of(image)
    return int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_HEIGHT, 0))
