#!/usr/bin/env bash
# From a fresh machine to one sweep from a notebook, executed as Jupyter does.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
types "make install"
types ".venv/bin/python -m pip install -e '.[notebook]' -c constraints.txt"
.venv/bin/python - <<'PYTHON'
import nbformat

cells = [
    "import sweeper",
    "study = sweeper.sweep('experiment=smoke', 'placement=attn,ff', 'rank=4,8', study='mine')",
    "study.table()",
]
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
nbformat.write(book, "mine.ipynb")
PYTHON
types ".venv/bin/jupyter execute --inplace mine.ipynb"
grep -q 'attn' mine.ipynb
finish
