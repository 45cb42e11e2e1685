"""What a command looks like in a terminal of a given width: a picture and the plain text of it, midway and at its end.

    python tools/terminal_shot.py --columns 40 80 --out shots [-- COMMAND ...]

The command runs in a pseudo-terminal; without one, a study of four tiny runs does. Its output goes through a terminal
emulator, so a line that is drawn too wide shows as it would. Needs the package pyte (0.8.2) besides the project's.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMOKE = ("-m", "experiment=smoke", "placement=attn,ff", "rank=4,8", "trainer.max_steps=24", "trainer.device=cpu")
LOOK_SECONDS = 0.25
SCROLLED = 1_000  # lines that are kept above the screen


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """Lines of cells, with their style as rich has it; `live` while the program hides the cursor to draw."""

    lines: tuple[tuple[tuple[str, str], ...], ...]
    live: bool

    @property
    def text(self) -> str:
        return "\n".join("".join(data for data, _ in line).rstrip() for line in self.lines).rstrip() + "\n"


def shots(command: Sequence[str], *, columns: int, rows: int, folder: Path, interrupt: str | None = None) -> list[Shot]:
    """What stands in the terminal every quarter of a second, and last what is left at the end.

    Args:
        folder: where the command runs. interrupt: Ctrl-C is pressed once this text stands there.
    """
    screen, found, pressed = _Screen(columns, rows), list[Shot](), interrupt is None
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(command[0], list(command), os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    looked = time.monotonic()
    for data in _read(terminal):
        screen.feed(data)
        if not pressed and str(interrupt) in screen.shot().text:
            pressed = True
            os.kill(pid, signal.SIGINT)
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            found.append(screen.shot())
    os.waitpid(pid, 0)
    return [*found, screen.shot()]


def midway(found: Sequence[Shot]) -> Shot:
    """The middle one of those that show the program at work."""
    live = [shot for shot in found if shot.live] or [shot for shot in found if shot.text.strip()] or list(found)
    return live[len(live) // 2]


def picture(shot: Shot, *, columns: int, title: str) -> str:
    """An SVG that needs nothing from elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=columns, file=io.StringIO(), record=True, force_terminal=True, color_system="standard")
    for line in shot.lines:
        console.print(Text.assemble(*line), no_wrap=True, crop=True)
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


class _Screen:
    def __init__(self, columns: int, rows: int) -> None:
        try:
            import pyte
        except ImportError:
            sys.exit("error: tools/terminal_shot.py needs a terminal emulator: pip install pyte==0.8.2")
        self.screen: Any = pyte.HistoryScreen(columns, rows, history=SCROLLED, ratio=1.0)
        self.stream = pyte.ByteStream(self.screen)
        self.columns = columns

    def feed(self, data: bytes) -> None:
        self.stream.feed(data)

    def shot(self) -> Shot:
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
        lines = [tuple((row[x].data, _style(row[x])) for x in range(self.columns)) for row in rows]
        while lines and not "".join(data for data, _ in lines[-1]).strip():
            lines.pop()
        return Shot(lines=tuple(lines), live=bool(self.screen.cursor.hidden))


def _style(cell: Any) -> str:
    """A cell's look in rich's words; the emulator knows no dim."""
    colour = {"default": "", "brown": "yellow"}.get(cell.fg, cell.fg)
    return " ".join(filter(None, ["bold" if cell.bold else "", colour if colour.isalpha() else ""]))


def _read(terminal: int) -> Iterator[bytes]:
    """What the program writes, with empty pieces between; ends with it."""
    while True:
        ready, _, _ = select.select([terminal], [], [], LOOK_SECONDS)
        try:
            data = os.read(terminal, 1 << 16) if ready else None
        except OSError:  # Linux says so where the other side is closed
            return
        if data == b"":
            return
        yield data or b""


def main(arguments: Sequence[str]) -> int:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[40, 80])
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("shots"))
    parser.add_argument("--interrupt", metavar="TEXT", help="press Ctrl-C once this text stands there")
    options = parser.parse_args(own)
    options.out.mkdir(parents=True, exist_ok=True)
    typed = command or [sys.executable, str(ROOT / "train.py"), *SMOKE]
    for columns in options.columns:
        with tempfile.TemporaryDirectory() as folder:
            place = Path.cwd() if command else Path(folder)
            found = shots(typed, columns=columns, rows=options.rows, folder=place, interrupt=options.interrupt)
        for name, shot in (("midway", midway(found)), ("end", found[-1])):
            path = options.out / f"{name}_{columns}.txt"
            path.write_text(shot.text, encoding="utf-8")
            title = f"{columns} columns, {name}"
            path.with_suffix(".svg").write_text(picture(shot, columns=columns, title=title), encoding="utf-8")
            print(f"{path.with_suffix('.svg')}\n{shot.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
