"""Sphinx's own page of search results under another name: `search` is a page of ours (docs/search.md)."""

from typing import Any

from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.domains.std import StandardDomain

NAME = "find"


class Builder(StandaloneHTMLBuilder):
    name = "html"

    def handle_page(self, pagename: str, addctx: dict[str, Any], templatename: str = "page.html", **more: Any) -> None:
        super().handle_page(NAME if templatename == "search.html" else pagename, addctx, templatename, **more)


def setup(app: Any) -> dict[str, bool]:
    app.add_builder(Builder, override=True)
    # or the contents would list ours under the title of theirs
    StandardDomain._virtual_doc_names = {  # type: ignore[misc]
        name: title for name, title in StandardDomain._virtual_doc_names.items() if name != "search"
    }
    return {"parallel_read_safe": True}
