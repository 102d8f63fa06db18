"""The report of a run: one self-contained HTML page and its pictures, from the run directory's files alone.

Owned here: which files are written, and in which order. Not owned here: reading (`loading`), arithmetic (`scores`),
pictures (`charts`, `matrices`), words and layout (`page`, `sections`, `comparison`). Needs no GPU, no data and no W&B.
"""

from collections.abc import Sequence
from pathlib import Path


def write_report(run_dirs: Sequence[Path]) -> Path:
    """Writes RUN_DIR/report/ of the first run and returns the path of its index.html.

    With several runs the page begins with their comparison and goes on with the details of the first.
    Raises InputError where a run directory cannot be used or the report cannot be written.
    """
    from data_prep.errors import InputError
    from data_prep.files import replace_file
    from ddp_trainer.report.charts import THEMES
    from ddp_trainer.report.page import build_page
    from ddp_trainer.report.pictures import draw_files
    from ddp_trainer.tracking.run_record import load_runs

    if not run_dirs:
        raise InputError("report: no run directory given; name at least one")
    runs = load_runs([Path(run_dir) for run_dir in run_dirs])
    folder = runs[0].path / "report"
    try:
        folder.mkdir(exist_ok=True)
        pictures = draw_files(runs, THEMES["light"])
        for name, content in pictures.items():
            replace_file(folder / name, content)
        for old in folder.glob("*.png"):  # of an earlier report from other files: it would contradict the page
            if old.name not in pictures:
                old.unlink()
        replace_file(folder / "index.html", build_page(runs).encode())
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): check the folder's permissions") from None
    return folder / "index.html"
