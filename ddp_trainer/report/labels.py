"""Short, unique names of classes and runs for the pictures of the report."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from data_prep.errors import visible

# Fonts for writing systems that matplotlib's own font lacks: first those of Linux, then those of macOS and Windows.
OTHER_FONTS = (
    *(
        "Noto Sans CJK JP",
        "Noto Sans CJK SC",
        "Noto Sans",
        "Noto Sans Thai",
        "Noto Sans Devanagari",
        "Noto Sans Hebrew",
    ),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "Nanum Gothic", "Unifont"),
    *("Arial Unicode MS", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Yu Gothic"),
)


def shorten(name: str, length: int = 16) -> str:
    """`name`; if it has more than `length` characters, `…` replaces its middle."""
    if len(name) <= length:
        return name
    head = length // 2
    return f"{name[:head].rstrip()}…{name[len(name) - (length - head - 1) :].lstrip()}"


def distinct_labels(names: Sequence[str], length: int = 16, noun: str = "class") -> list[str]:
    """A short label for each of `names`. `noun`: what the names belong to, such as class or run.

    A label begins with the number of its name if it would otherwise equal another label, or if the fonts on this
    machine cannot show it. If two labels are still equal, every label becomes `NOUN NUMBER`.
    """
    labels = [shorten(name, length) for name in names]
    labels = [
        f"{number}: {shorten(name, length - 4)}" if repeated or not is_drawable(name) else label
        for number, (name, label, repeated) in enumerate(zip(names, labels, _repeated(labels), strict=True))
    ]
    if any(_repeated(labels)):  # for example, if the name of one class equals the label of another
        return [f"{noun} {number}" for number in range(len(names))]
    return labels


def drawable_labels(names: Sequence[str], length: int = 16, noun: str = "class") -> list[str]:
    """`distinct_labels` for a PNG: a name that the fonts on this machine cannot show becomes `NOUN NUMBER`."""
    known = [name if is_drawable(name) else f"{noun} {number}" for number, name in enumerate(names)]
    return distinct_labels(known, length, noun)


def is_drawable(text: str) -> bool:
    return all(any(ord(char) in font for font in _character_sets()) for char in text)


def fonts() -> list[str]:
    """Font families for matplotlib, in order of preference."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed)]


@cache
def _character_sets() -> list[dict[int, int]]:
    from matplotlib.font_manager import findfont, get_font

    return [dict(get_font(findfont(name)).get_charmap()) for name in fonts()]


def _repeated(labels: Sequence[str]) -> list[bool]:
    counts = Counter(map(visible, labels))
    return [counts[visible(label)] > 1 for label in labels]
