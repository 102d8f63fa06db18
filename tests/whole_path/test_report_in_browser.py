"""In Chromium or Chrome, if installed, a report loads no other file, has no errors and fits the window."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_trainer.report.write import write_report
from tests.support.chromium import PROGRAM, Chromium
from tests.support.run_directories import make_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
LAYOUT = """({
    width: document.documentElement.clientWidth,
    needed: document.documentElement.scrollWidth,
    broken: [...document.images].filter(image => !image.alt || !image.naturalWidth).length,
    images: document.images.length + document.querySelectorAll("[role=img] > svg").length,
    background: getComputedStyle(document.body).backgroundColor,
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module", params=["50 epochs, 10 classes", "1 epoch, 100 classes", "stopped run", "several runs"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [tmp_path_factory.mktemp("runs") / "a run whose name is long enough to be in the way"]
    num_epochs, num_classes = {"50 epochs, 10 classes": (50, 10), "1 epoch, 100 classes": (1, 100)}.get(
        request.param, (3, 10)
    )
    make_run(runs[0], num_classes=num_classes, num_epochs=num_epochs)
    if request.param == "stopped run":
        for name in ("summary.json", "predictions.npz"):
            (runs[0] / name).unlink()
    if request.param == "several runs":
        runs += [runs[0].with_name(f"seed-{seed}") for seed in (1, 2, 3)]
        for seed, run in enumerate(runs[1:], 1):
            make_run(run, seed=seed)
    return write_report(runs)


def test_page_fits_phone_desktop_and_paper_with_the_right_background(browser: Chromium, page: Path) -> None:
    colors = set()
    for width, dark, paper in ((390, False, False), (1280, True, False), (794, True, True)):
        browser.open(page, width=width, dark=dark, paper=paper)
        seen = browser.evaluate(LAYOUT)
        assert seen["needed"] <= seen["width"] == width, "the page scrolls sideways"
        assert seen["images"] >= 4 and seen["broken"] == 0
        assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
        assert browser.complaints() == []
        colors.add(seen["background"])
    assert colors == {"rgb(245, 246, 247)", "rgb(19, 23, 27)", "rgb(255, 255, 255)"}, (
        "not the backgrounds of light mode, dark mode and paper"
    )
