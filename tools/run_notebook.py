"""Runs a notebook from top to bottom and stores its outputs in it, small: `make notebook`.

.venv/bin/python -m tools.run_notebook notebooks/paper.ipynb
"""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

COLOURS = 64
"""Colours of a stored picture: lines and letters need few, and the file is then a third of its size."""


def smaller(png: str) -> str:
    """A picture, base64 to base64, with a palette of `COLOURS`."""
    from PIL import Image

    before = base64.b64decode(png)
    picture = Image.open(io.BytesIO(before)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    after = io.BytesIO()
    picture.save(after, "PNG", optimize=True)
    return base64.b64encode(min(before, after.getvalue(), key=len)).decode()


def settled(notebook: Any) -> Any:
    """The notebook without what differs from one run to the next, and with small pictures."""
    notebook.metadata.pop("language_info", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
                data.pop("text/plain", None)  # "<Figure size ...>"
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a notebook and store its outputs in it.")
    parser.add_argument("notebook", type=Path)
    path: Path = parser.parse_args().notebook
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    nbformat.write(settled(notebook), path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB with its outputs")


if __name__ == "__main__":
    main()
