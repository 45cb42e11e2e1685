"""Sphinx configuration of the documentation site: `make docs` builds it, strictly and without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sweeper" / "plugins"), str(HERE / "_ext")]

project = "LoRA Atlas"
author = "the LoRA Atlas contributors"
copyright = f"2026, {author}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository_links",
    "reference_tables",
    "search_page",
]
templates_path = ["_templates"]
exclude_patterns = ["example/*.md", "_ext", "_templates"]
nitpicky = True
# types of other projects, whose documentation is not here, and names that only type checkers see
nitpick_ignore_regex = [
    ("py:.*", r"(pathlib|collections|typing|pandas|pd|torch|peft|transformers)\b.*"),
    ("py:.*", r"(Any|Path|Family|Example|Method|Ranks|AdapterSpec|UnpackedSpec|Target|Rescored|HarnessResult)"),
    ("py:.*", r"sweeper\.(?!api\b|register\b).*"),
    ("py:.*", r"(SpecError|DataError|DatasetSpec|MethodSpec|PlacementSpec)"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
default_role = "code"  # docstrings name code in single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"
