#!/usr/bin/env python3
"""A picture of the README as a code host shows it.

    python tools/readme_shot.py readme.png                # 1012 pixels wide, as on a desktop
    python tools/readme_shot.py readme.png --width 390    # a phone

Needs Chromium. The page is as high as its text.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CSS = """
body { margin: 0 auto; max-width: 948px; padding: 32px; color: #1f2328; font: 16px/1.5 -apple-system, "Segoe UI",
       "Noto Sans", Helvetica, Arial, sans-serif; overflow-wrap: break-word }
h1, h2 { border-bottom: 1px solid #d1d9e0b3; padding-bottom: .3em; line-height: 1.25; margin: 24px 0 16px }
h1 { font-size: 2em; margin-top: 0 } h2 { font-size: 1.5em }
a { color: #0969da; text-decoration: none } img { max-width: 100% }
code { background: #818b981f; border-radius: 6px; padding: .2em .4em;
       font: 85% ui-monospace, "DejaVu Sans Mono", monospace }
pre { background: #f6f8fa; border-radius: 6px; font-size: 85%; line-height: 1.45; overflow: auto; padding: 16px }
pre code { background: none; font-size: 100%; padding: 0; white-space: pre }
table { border-collapse: collapse; display: block; max-width: 100%; overflow: auto; width: max-content }
td, th { border: 1px solid #d1d9e0; padding: 6px 13px } tr:nth-child(2n) { background: #f6f8fa }
"""


def page(markdown: str) -> str:
    """The HTML of a README, with its pictures found from the repository's root."""
    body = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    return f'<!doctype html><meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{CSS}</style>{body}'


def height(chromium: str, file: Path, width: int) -> int:
    """Pixels that the page takes at a width, as Chromium lays it out."""
    measured = file.with_name("measured.html")
    script = "<script>onload = () => document.title = document.documentElement.scrollHeight</script>"
    measured.write_text(file.read_text() + script)
    dom = shoot(chromium, measured, width, 100, "--dump-dom")
    return int(dom.partition("<title>")[2].partition("<")[0])


def shoot(chromium: str, file: Path, width: int, tall: int, *options: str) -> str:
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{tall}"]
    return subprocess.run([*command, *options, file.as_uri()], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1012, help="pixels")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        sys.exit(f"error: none of {', '.join(CHROMIUM)} is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "readme.html"
        file.write_text(page((ROOT / "README.md").read_text()))
        tall = height(chromium, file, args.width)
        shoot(chromium, file, args.width, tall, f"--screenshot={args.picture.resolve()}")
    print(f"{args.picture}: {args.width} x {tall} pixels")


if __name__ == "__main__":
    main()
