"""Links of a page to files of the repository that are no pages: the file is shipped with the site.

`[SECURITY.md](../SECURITY.md)` is right where a page is read in the repository. On the site it becomes a download,
and a link to a file that does not exist is a warning, which `make docs` turns into a failure.
"""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\]\((?P<target>(?!https?:|mailto:|#|path:|project:)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def shipped(page: Path, source: Path, text: str) -> str:
    """The text of a page with links to files outside `source`, and to files that are no pages, made downloads."""

    def one(match: re.Match[str]) -> str:
        target = (page.parent / match["target"]).resolve()
        inside = target.is_relative_to(source)
        if not target.is_file() or (
            inside and target.suffix in (".md", ".png", ".svg") and "example" not in target.parts
        ):
            return match[0]
        return f"](<path:{match['target']}>)"

    return LINK.sub(one, text)


def setup(app: Any) -> dict[str, bool]:
    def on_read(app: Any, name: str, content: list[str]) -> None:
        content[0] = shipped(Path(app.env.doc2path(name)), Path(app.srcdir), content[0])

    app.connect("source-read", on_read)
    return {"parallel_read_safe": True}
