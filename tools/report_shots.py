"""Pictures of the report in Chromium for the documentation: .venv/bin/python -m tools.report_shots

Takes the shipped study (desktop, dark, phone) and PEFT's published results, and writes docs/report_*.png.
"""

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from analysis import analyse, archive, exchange, load, report

ROOT = Path(__file__).parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SHOTS: dict[str, tuple[str, dict[str, Any]]] = {
    "report_desktop": ("paper", {"size": (1280, 1000), "state": "#task=icd10_chapter"}),
    "report_dark": (
        "paper",
        {"size": (1280, 1000), "state": "#task=icd10_chapter&arm=ff+r8&theme=dark", "at": "#curves"},
    ),
    "report_phone": ("paper", {"size": (390, 844), "state": "#task=icd10_chapter", "at": "#explore"}),
    "report_peft": ("peft", {"size": (1280, 1000), "state": ""}),
}


def main() -> None:
    """Writes the reports to a temporary folder and takes their pictures."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        sys.exit(f"error: none of {', '.join(CHROMIUM)} is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = _pages(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (study, shot) in SHOTS.items():
            width, height = shot["size"]
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(pages[study].as_uri() + shot["state"])
            while not page.evaluate("performance.getEntriesByName('drawn').length"):
                page.wait_for_timeout(50)
            if "at" in shot:
                page.evaluate("(at) => document.querySelector(at).scrollIntoView()", shot["at"])
            page.screenshot(path=ROOT / "docs" / f"{name}.png")
            page.close()
        browser.close()


def _pages(folder: Path) -> dict[str, Path]:
    own = analyse(load(archive.extract(ROOT / "notebooks" / "study.tar.xz", folder / "study")))
    with tarfile.open(ROOT / "tests" / "analysis" / "data" / "peft_metamathqa.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    theirs = analyse(load(rows=exchange.read(str(folder / "MetaMathQA"))), draws=100)
    return {"paper": report.write(own, folder / "paper"), "peft": report.write(theirs, folder / "peft")}


if __name__ == "__main__":
    main()
