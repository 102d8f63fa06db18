"""The frame of a page and its small parts. Every text that comes from a file is escaped here or by the caller's `text`."""

import base64
import html
import math
from collections.abc import Sequence

from ddp_trainer.report.style import CSS

# Nothing may be loaded and no script may run: a name that slips through unescaped could still do no harm.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> str:
    return html.escape(str(value))


def page(title: str, body: Sequence[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, *parts: str) -> str:
    introduction = f'<p class="quiet">{text(lead)}</p>\n' if lead else ""
    return f"<section>\n<h2>{text(title)}</h2>\n{introduction}{''.join(parts)}</section>\n"


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    cells = (
        f'<div class="tile"><span>{text(name)}</span><b>{text(value)}</b></div>' for name, value in entries if value
    )
    return f'<div class="tiles">{"".join(cells)}</div>\n'


def chart(drawing: str, alt: str, *, style: str = "") -> str:
    """A card with an <svg> element, which is given its alternative text."""
    described = drawing.replace("<svg", f'<svg role="img" aria-label="{text(alt)}"', 1)
    return f'<figure class="card scroll {style}">{described}</figure>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 1) -> str:
    """`rows` are HTML already; columns from `numbers_from` on are set as numbers. A long table scrolls."""

    def row(tag: str, cells: Sequence[str]) -> str:
        classes = ["name" if place < numbers_from else "num" for place in range(len(cells))]
        return (
            "<tr>"
            + "".join(f'<{tag} class="{c}">{cell}</{tag}>' for c, cell in zip(classes, cells, strict=True))
            + "</tr>"
        )

    body = "\n".join(row("td", cells) for cells in rows)
    return (
        f'<div class="card scroll{" long" if len(rows) > 24 else ""}"><table><thead>'
        f"{row('th', [text(name) for name in head])}</thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def definitions(entries: Sequence[tuple[str, object]]) -> str:
    rows = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in entries)
    return f'<dl class="settings">{"".join(rows)}</dl>\n'


def image(png: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{text(alt)}">'


def percent(share: float, digits: int = 2) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def count(number: float) -> str:
    """12345 -> 12 345 with thin, unbreakable gaps."""
    return f"{number:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour} h {minute} min" if hour else f"{minute} min {second} s"
