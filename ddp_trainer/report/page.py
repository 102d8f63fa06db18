"""The HTML page as a whole: head, style sheet, and the parts every section is made of.

Owned here: escaping, pictures as data URLs, colours. Not owned here: what the sections say (`sections`, `comparison`).
Whatever comes from a file passes through `escape`; the page has no scripts and loads nothing.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ddp_trainer.report.charts import THEMES, Theme
from ddp_trainer.tracking.run_record import Run

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f7; --card: #ffffff; --ink: #22282e; --muted: #616b75; --line: #e3e5e8;
  --accent: #1f6f9f; --track: #e9ebed; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #13171b; --card: #1c2126; --ink: #e4e6e8;
  --muted: #a0a9b2; --line: #333b43; --accent: #78b8e0; --track: #2b3238; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0; line-height: 1.25; } header > p { margin: 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 44px 0 14px; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 72ch; }
.muted, figcaption, dt, th { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; min-width: 0; }
.hero { display: flex; flex-wrap: wrap; gap: 4px 28px; align-items: baseline; margin: 14px 0 4px; }
.hero strong { font-size: 3.4rem; font-weight: 600; letter-spacing: -.03em; line-height: 1.15; color: var(--accent); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 18px 24px; margin: 22px 0 0; }
.facts dt { font-size: .82rem; } .facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.stack { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.card + .grid, .card + .muted { margin-top: 16px; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); align-items: start; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .85rem; margin-top: 10px; }
.medium img { max-width: 620px; } .small img { max-width: 440px; }
.wide { overflow-x: auto; } .wide img { min-width: 960px; }
.gallery { display: grid; gap: 18px 14px; grid-template-columns: repeat(auto-fill, minmax(min(104px, 30%), 1fr)); }
.gallery img { border-radius: 6px; image-rendering: pixelated; background: var(--track); }
.gallery figcaption { margin-top: 6px; font-size: .78rem; line-height: 1.35; } .gallery b { color: var(--ink);
  font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: .82rem; } thead th { white-space: nowrap; }
td, th { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
.num { padding-left: 6px; text-align: right; white-space: nowrap; }
tbody th { color: var(--ink); font-weight: 400; font-size: inherit; }
.bar { display: block; height: 4px; margin-top: 3px; min-width: 48px; border-radius: 2px; background: var(--track); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
th { overflow-wrap: break-word; }
.scroll tbody th { position: sticky; left: 0; background: var(--card); }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 2px;
  print-color-adjust: exact; }
.pairs { margin: 0; font-size: .88rem; } .pairs.columns { columns: 260px; column-gap: 36px; }
.pairs div { display: flex; gap: 14px; justify-content: space-between; padding: 5px 0; break-inside: avoid;
  border-bottom: 1px solid var(--line); }
.pairs:not(.columns) div:last-child { border-bottom: 0; }
.pairs dt { flex: none; color: var(--ink); }
.pairs dd { margin: 0; color: var(--muted); text-align: right; min-width: 0; }
pre { margin: 0 0 14px; padding: 14px 16px; border-radius: 8px; background: var(--track); white-space: pre-wrap;
  font: .82rem/1.6 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.notice { border-left: 3px solid var(--accent); padding: 2px 0 2px 14px; margin: 18px 0; }
@media (max-width: 560px) { main { padding: 24px 14px 40px; } .card { padding: 14px; }
  .hero strong { font-size: 2.7rem; } h2 { margin-top: 34px; }
  .facts { grid-template-columns: 1fr 1fr; } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #ccc; --accent: #1f5f8b;
  --track: #eee; color-scheme: light; } body { font-size: 10pt; } main { max-width: none; padding: 0; }
  .card { border: 0; padding: 0; } .wide { overflow: visible; } .wide img { min-width: 0; }
  figure, tr, .facts > div { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .bar, .bar i { print-color-adjust: exact; } .scroll { overflow: visible; } .scroll tbody th { position: static; }
  table { font-size: 8pt; } .num, thead th { white-space: normal; overflow-wrap: normal; }
  .grid, .grid.two { grid-template-columns: 1fr 1fr; } .gallery { grid-template-columns: repeat(8, 1fr); } }
"""


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image(pixels: np.ndarray, alt: str) -> str:
    """(H, W, 3) uint8 as it is."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    return f'<img src="{data_url(target.getvalue())}" alt="{escape(alt)}">'


def themed_image(draw: Callable[[Theme], bytes], alt: str) -> str:
    """A chart in the colours of the reader's scheme, and in the light ones on paper."""
    light, dark = (data_url(draw(THEMES[name])) for name in ("light", "dark"))
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>'
    )


def figure(picture: str, caption: str = "", kind: str = "") -> str:
    """`picture` and `caption` are HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card {kind}">{picture}{below}</figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: int = 0) -> str:
    """Cells are HTML. The first column heads its row; columns from `numeric` on (if above 0) hold numbers."""

    def cell(tag: str, place: int, content: str, scope: str) -> str:
        kind = ' class="num"' if numeric and place >= numeric else ""
        return f"<{tag}{kind}{scope}>{content}</{tag}>"

    top = "".join(cell("th", place, content, ' scope="col"') for place, content in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            cell("td" if place else "th", place, content, "" if place else ' scope="row"')
            for place, content in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{body}</tbody></table></div>'


def pairs(title: str, content: Mapping[str, object], *, columns: bool = False) -> str:
    """A card of names and values; columns: as many beside each other as there is room for."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in content.items())
    kind = "pairs columns" if columns else "pairs"
    return f'<div class="card"><h3>{escape(title)}</h3><dl class="{kind}">{rows}</dl></div>' if rows else ""


def colours() -> str:
    """Style rules with the colours of the runs, in both schemes."""
    light, dark = (
        " ".join(f"--series-{number}: {colour};" for number, colour in enumerate(THEMES[name].series))
        for name in ("light", "dark")
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def section(title: str, *parts: str) -> str:
    """Parts are HTML; the section is left out where there are none."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def build_page(runs: Sequence[Run]) -> str:
    """The whole page: for several runs their comparison first, then the details of the first run."""
    from ddp_trainer.report.comparison import compare
    from ddp_trainer.report.sections import describe

    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].name
    body = compare(runs) if several else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} - training report</title>\n<style>{STYLE}{colours()}</style>\n"
        f"</head>\n<body>\n<main>\n{body}{describe(runs[0], details=several)}</main>\n</body>\n</html>\n"
    )
