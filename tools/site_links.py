"""Internal links of a built site, anchors included; the network is not asked.

    .venv/bin/python -m tools.site_links build/docs

Sphinx checks links in the text. This looks at the pages as they are served: navigation, pictures, downloads, styles.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.links += [value for name in ("href", "src") if (value := given.get(name))]
        if anchor := given.get("id"):
            self.anchors.add(anchor)


def broken(site: Path) -> Iterator[str]:
    """A line for each link to a file or anchor that the site does not have."""
    pages = {path.resolve(): _Page() for path in site.rglob("*.html")}
    for path, page in pages.items():
        page.feed(path.read_text())
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            name = path.relative_to(site.resolve())
            if not target.exists():
                yield f"{name}: {link}: no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: {link}: no such anchor"


def main() -> int:
    site = Path(sys.argv[1])
    found = list(broken(site))
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages: no broken link")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
