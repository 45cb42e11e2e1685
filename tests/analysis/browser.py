"""Pages of the report in the Chromium that the system has."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Opened:
    """A page with what it complained of: console messages, exceptions, requests that left the file."""

    page: Any
    errors: list[str] = field(default_factory=list)

    def js(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def rows(self, chart: str) -> list[dict[str, Any]]:
        """The rows that a chart draws now, as Vega has them; none if it is not shown."""
        found: list[dict[str, Any]] = self.js(
            f"atlas.views[{chart!r}] ? atlas.views[{chart!r}].data('rows').map((row) => ({{...row}})) : []"
        )
        return found

    def points(self, chart: str) -> Any:
        return self.page.locator(f"#chart-{chart} path[aria-roledescription=point]")

    def settle(self, expression: str) -> None:
        """Waits until an expression holds. Playwright's own wait evaluates a string in the page, whose policy forbids
        it."""
        until = time.monotonic() + 30
        while not self.js(expression):
            assert time.monotonic() < until, f"{expression} did not come true; {self.errors}"
            self.page.wait_for_timeout(40)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser.

    Raises:
        RuntimeError: there is no Chromium; these tests are not skipped, for then nobody would miss them.
    """
    if CHROMIUM is None:
        raise RuntimeError("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, *, state: str = "", **options: Any) -> Iterator[Opened]:
    """The report at a path, drawn; `options` are those of the browser's context."""
    context = browser.new_context(viewport={"width": 1200, "height": 900} | options.pop("viewport", {}), **options)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.errors.append(message.text))
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:", "blob:")) else found.errors.append(request.url)
        ),
    )
    found.page.goto(path.as_uri() + state)
    found.settle("performance.getEntriesByName('drawn').length > 0")
    yield found
    context.close()
