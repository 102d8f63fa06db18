"""Writes the report of a run: one self-contained HTML page, and its pictures as separate PNG files.

The report is made from the files in the run directory alone, without GPU, data or W&B. `tracking.run_record` reads
these files; `scores` does the arithmetic; `charts`, `confusion` and `gallery` draw pictures; and `page` builds the
page.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.files import replace_file
from ddp_trainer.report.charts import curves_figure, reliability_figure
from ddp_trainer.report.confusion import confusion_png
from ddp_trainer.report.figures import default_style, to_png
from ddp_trainer.report.gallery import mistakes_figure
from ddp_trainer.report.labels import drawable_labels
from ddp_trainer.report.page import build_page
from ddp_trainer.report.scores import calibration
from ddp_trainer.tracking.run_record import Run, list_mistakes, load_runs

PICTURES = ("curves.png", "confusion.png", "reliability.png", "misclassified.png")


def write_report(run_dirs: Sequence[Path]) -> Path:
    """Writes RUN_DIR/report/ of the first run and returns the path of its index.html.

    With several runs, the page begins with their comparison, followed by the details of the first run.
    Raises InputError if a run directory cannot be used or the report cannot be written.
    """
    if not run_dirs:
        raise InputError("report: no run directory given; name at least one")
    runs = load_runs([Path(run_dir) for run_dir in run_dirs])
    folder = runs[0].path / "report"
    if folder.is_symlink():  # files would be written and deleted in the folder that it points to
        raise InputError(f"{folder} is a symbolic link; remove it")
    with default_style():
        pictures, page = draw_pictures(runs), build_page(runs)
    try:
        folder.mkdir(exist_ok=True)
        for name in PICTURES:
            if name in pictures:
                replace_file(folder / name, pictures[name])
            else:  # a picture from an earlier report would contradict the page
                (folder / name).unlink(missing_ok=True)
        replace_file(folder / "index.html", page.encode())
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return folder / "index.html"


def draw_pictures(runs: Sequence[Run]) -> dict[str, bytes]:
    """PNG files by their names in PICTURES. For a run without predictions, only the curves are drawn."""
    run, found = runs[0], runs[0].predictions
    pictures = {"curves.png": to_png(curves_figure(runs))}
    if found is not None:
        measured = calibration(found.labels, found.predicted, found.confidence)
        labels = dict(zip(run.classes, drawable_labels(run.classes, 14), strict=True))
        pictures["confusion.png"] = confusion_png(found, run.classes)
        pictures["reliability.png"] = to_png(reliability_figure(measured))
        pictures["misclassified.png"] = to_png(mistakes_figure(list_mistakes(run), labels), dpi=110)
    return pictures
