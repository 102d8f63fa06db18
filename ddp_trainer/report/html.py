"""Renders the report's HTML templates. Values are escaped unless they are Markup.

The templates and the style sheet are files in `templates/`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from ddp_trainer.report import wording
from ddp_trainer.report.figures import to_svg
from ddp_trainer.report.gallery import data_url

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@cache
def environment() -> jinja2.Environment:
    """jinja2 with the templates of this package. Rendering fails if a template uses a value that was not passed."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("ddp_trainer.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "percent": wording.percent,
        "duration": wording.duration,
        "quantity": wording.quantity,
        "plain": wording.plain,
    }
    return found


def render(template: str, **values: object) -> Markup:
    """HTML of the file `template` in templates/, filled with `values`."""
    return Markup(environment().get_template(template).render(values))


def chart(figure: Figure, description: str) -> Markup:
    """`figure` as inline SVG in the reader's color scheme (light or dark), with `description` for screen readers."""
    svg = Markup(to_svg(figure))  # matplotlib escapes the texts in it
    return Markup('<div role="img" aria-label="{}">{}</div>').format(description, svg)


def picture(png: bytes, description: str) -> Markup:
    return Markup('<img src="{}" alt="{}">').format(data_url(png), description)
