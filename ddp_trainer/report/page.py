"""Builds the HTML page of the report, which has no scripts and loads no other files."""

from collections.abc import Sequence

from ddp_trainer.report.comparison import compare
from ddp_trainer.report.figures import VARIABLES
from ddp_trainer.report.html import render
from ddp_trainer.report.results import results
from ddp_trainer.report.sections import configuration, curves, headline, reproduce
from ddp_trainer.tracking.run_record import Run


def build_page(runs: Sequence[Run]) -> str:
    """HTML of the page. With several runs, it shows their comparison, then the details of the first run."""
    run, several = runs[0], len(runs) > 1
    sections = [headline(run, is_detail=several), results(run, is_detail=several), configuration(run), reproduce(run)]
    if several:
        sections.insert(0, compare(runs))
    else:
        sections.insert(1, curves(runs))
    title = f"{len(runs)} runs" if several else run.name
    return render("page.html", title=title, sections=sections, variables=VARIABLES)
