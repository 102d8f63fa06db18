"""matplotlib figures in the report's style, as SVG for the page and as PNG files, without changing global state.

The SVG uses the color variables of the page's style sheet, so one drawing works in the light and in the dark scheme.
Text in the SVG is real text, in the page's font.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import TYPE_CHECKING, NamedTuple

from data_prep.errors import InputError
from ddp_trainer.report.labels import fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SURFACE, INK, MUTED, LINE, CELL = "#ffffff", "#22282e", "#616b75", "#e3e5e8", "#2f86c6"
SERIES = (
    *("#1f6f9f", "#c2573a", "#3d8062", "#8a5fa6", "#b08518"),
    *("#0f8b8d", "#b5467b", "#7a8a2a", "#7d5a44", "#5f6b76"),
)
# The first ten runs of a comparison have different colors; each further ten have the same colors and another marker.
# Each entry: matplotlib's name of a marker, and the character that shows it in the table of the page.
MARKERS = (("", ""), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
# The color variables of the style sheet, for the light scheme. For the dark scheme, style.css has other values.
VARIABLES = {"card": SURFACE, "ink": INK, "muted": MUTED, "line": LINE} | {
    f"series-{number}": color for number, color in enumerate(SERIES)
}
_VARIABLE_OF = {color: f"var(--{name})" for name, color in VARIABLES.items()}


class Look(NamedTuple):
    """The look of the curves of one run in a comparison."""

    color: int  # index into SERIES
    marker: str
    character: str


def look_of(number: int) -> Look:
    return Look(number % len(SERIES), *MARKERS[number // len(SERIES) % len(MARKERS)])


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches, without an entry in pyplot's global list."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor=SURFACE, layout="constrained")


def style(axes: Axes, *, title: str, x: str, y: str = "") -> None:
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=8)
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """PNG of the figure. Faster than `savefig`, which draws the figure twice."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    _prepare_texts(figure)
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    target = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(target, format="PNG")
    return target.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for an HTML page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    _prepare_texts(figure)
    figure.set_facecolor("none")
    target = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddp_trainer"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return _for_the_page(target.getvalue())


def default_style() -> contextlib.AbstractContextManager[None]:
    """Within the context, figures do not depend on the user's matplotlib settings, such as `text.usetex`.

    Raises InputError if matplotlib cannot be imported with these settings.
    """
    try:
        from matplotlib import style as styles
    except (OSError, ValueError) as error:  # for example, MPLBACKEND is not the name of a backend
        reason = " ".join(str(error).split())[:300]
        fix = "check the variables MPLBACKEND and MPLCONFIGDIR, and the file matplotlibrc"
        raise InputError(f"matplotlib cannot be imported ({reason}); {fix}") from None
    return styles.context("default")


def _prepare_texts(figure: Figure) -> None:
    """Makes `$` an ordinary character, and lets other fonts supply the letters that one font lacks."""
    from matplotlib.text import Text

    families = fonts()
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)
            text.set_fontfamily(families)


def _for_the_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"| xmlns(?::xlink)?="[^"]*"| id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})", lambda match: f"{match[1]}: {_VARIABLE_OF.get(match[2], match[2])}", svg
    )
    return re.sub(r"\n\s*", "\n", svg).strip()
