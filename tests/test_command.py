"""The command `lora-atlas` as a user meets it: its parts, its errors, configurations of one's own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sweeper import command, installation

DRY = ("model=tiny_llama", "sweep.dry_run=true")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The script that pip makes of our entry point."""
    path = tmp_path / "bin" / "lora-atlas"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom sweeper.command import main\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def run(program: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    return subprocess.run(
        [program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lora-atlas", *arguments])
    return command.main()


def test_help_lists_the_parts_and_loads_none(program: Path, here: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{str(program)!r}, '--help']\n"
        f"try: runpy.run_path({str(program)!r}, run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\n"
        "print('heavy:', {'hydra', 'torch', 'transformers', 'pandas', 'sweeper.config'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True).stdout
    assert [name for name in command.PARTS if f"\n  {name} " in out] == list(command.PARTS)
    assert list(command.PARTS) == ["train", "repeat", "evaluate", "adapters", "analyse", "bundle", "cache", "fetch"]
    assert out.splitlines()[-1] == "heavy: set()"


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "--version") == 0
    assert re.fullmatch(r"lora-atlas \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_part_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "analyze", "outputs/default") == 2
    assert capsys.readouterr().err == (
        "error: lora-atlas analyze: no such command. Choose from adapters, analyse, bundle, cache, evaluate, "
        "fetch, repeat, train. Did you mean analyse?\n"
    )


@pytest.mark.parametrize(("part", "extra"), [("train", "train"), ("adapters", "train"), ("analyse", "analysis")])
def test_a_part_without_its_packages_names_the_extra(
    part: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(installation, "WHEEL", True)
    assert called(monkeypatch, part, "--help") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: lora-atlas {part} needs {command.PARTS[part].needs[0]}, ")
    assert said.endswith(f": pip install 'lora-atlas[{extra}]'\n")


@pytest.mark.parametrize("part", ["train", "evaluate", "adapters", "analyse", "fetch"])
def test_every_part_has_a_help_that_names_it_as_it_was_typed(part: str, program: Path, here: Path) -> None:
    out = run(program, here, part, "--help")
    assert out.returncode == 0, out.stderr
    assert f"lora-atlas {part}" in out.stdout
    assert not re.search(r"python (-m )?\w+", out.stdout)
    assert list(here.iterdir()) == []


def test_a_reader_that_has_seen_enough_ends_it_quietly(program: Path, here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for unbuffered in ("", "1"):
            env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(
                [program, "--help"], cwd=here, env=env, stdout=writing, stderr=subprocess.PIPE, check=False
            )
            assert (done.returncode, done.stderr) == (141, b"")
    finally:
        os.close(writing)


def test_errors_name_the_command_as_it_was_typed(program: Path, here: Path) -> None:
    out = run(program, here, "train", "rank=4,8")
    assert out.returncode == 2
    assert "rank=4,8: several values need -m: lora-atlas train -m rank=4,8" in out.stderr
    out = run(program, here, "train", "--rnk", "8")
    assert out.stderr.endswith("Flags: lora-atlas train --hydra-help\n") or "no such flag" in out.stderr


class TestOwnConfigurations:
    """`conf/` of the folder that the command is typed in."""

    def test_an_option_of_ones_own_stands_beside_the_packaged_ones(self, program: Path, here: Path) -> None:
        write(here / "conf/placement/mine.yaml", "name: mine\nroles: [attn_q]\nlayers: 'first:1'\n")
        out = run(program, here, "train", "-m", "placement=mine,attn", "rank=2", *DRY)
        assert "2 runs, 2 to train" in out.stdout, out.stderr
        assert "mine" in out.stdout
        assert "attn, attn_q, attn_qk" in run(program, here, "train", "placement=min").stderr

    def test_it_comes_before_the_packaged_one_of_its_name(self, program: Path, here: Path) -> None:
        packaged = run(program, here, "train", "--cfg", "job", "-p", "trainer").stdout
        write(here / "conf/trainer/default.yaml", re.sub(r"(?m)^max_steps: .*$", "max_steps: 7", packaged))
        assert "max_steps: 7" in run(program, here, "train", "--cfg", "job", "-p", "trainer").stdout

    @pytest.mark.slow
    def test_the_scripts_and_the_api_find_it_too(self, root: Path, here: Path) -> None:
        write(here / "conf/placement/mine.yaml", "name: mine\nroles: [attn_q]\nlayers: all\n")
        out = run(Path(sys.executable), here, str(root / "train.py"), "placement=mine", *DRY)
        assert "1 run, 1 to train" in out.stdout, out.stderr
        code = "import sweeper; sweeper.sweep('placement=mine,ff', 'model=tiny_llama', 'sweep.dry_run=true')"
        out = run(Path(sys.executable), here, "-c", code)
        assert "2 runs, 2 to train" in out.stdout, out.stderr

    def test_another_applications_is_left_alone(self, program: Path, here: Path) -> None:
        write(here / "conf/config.yaml", "defaults:\n  - model: resnet\n")
        write(here / "conf/model/resnet.yaml", "layers: 50\n")
        write(here / "conf/trainer/default.yaml", "gpus: 8\n")
        out = run(program, here, "train", *DRY)
        assert out.returncode == 0, out.stderr
        assert "resnet" not in run(program, here, "train", "--help").stdout


def test_the_shell_completes_parts_options_and_fields(program: Path, here: Path) -> None:
    def completed(line: str) -> list[str]:
        words = shlex.split(line) + ([""] if line.endswith(" ") else [])
        script = (
            'eval "$(lora-atlas -sc install=bash)"\n'
            f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n"
            f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDBREAKS=' '\n"
            'compopt() { :; }\n_lora_atlas_complete; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], cwd=here, env=env, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("lora-atlas a") == ["adapters", "analyse"]
    assert completed("lora-atlas train placement=attn_q") == [
        "placement=attn_q",
        "placement=attn_qk",
        "placement=attn_qv",
    ]
    assert completed("lora-atlas train -m rank=4 optim.warm") == ["optim.warmup_fraction="]
    assert completed("lora-atlas evaluate placement=at") == []


class TestInstallation:
    """What is typed to install more, or to run a part."""

    def test_a_checkout_stays_editable_and_pinned(self) -> None:
        own = shlex.join(installation.python())
        assert installation.install("hub", "search") == f"{own} -m pip install -e '.[hub,search]' -c constraints.txt"
        assert installation.install("qlora") == "make qlora"  # whose pins contradict each other

    def test_a_wheel_names_the_distribution(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installation, "WHEEL", True)
        assert installation.install("hub") == "pip install 'lora-atlas[hub]'"
        assert installation.install("qlora") == "pip install 'lora-atlas[qlora]'"
        assert installation.program("analyse") == "lora-atlas analyse"

    def test_an_environment_of_uv_is_made_anew_with_what_it_had(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(installation, "WHEEL", True)
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        receipt = tmp_path / "uv-receipt.toml"
        receipt.write_text('[tool]\nrequirements = [{ name = "lora-atlas", extras = ["train", "search"] }]\n')
        assert installation.install("analysis") == "uv tool install 'lora-atlas[analysis,search,train]'"
        receipt.write_text('[tool]\nrequirements = [{ name = "lora-atlas", path = "/d/a.whl" }, { name = "ray" }]\n')
        assert installation.install("train") == "uv tool install '/d/a.whl[train]'"

    def test_every_extra_that_is_named_exists(self, root: Path) -> None:
        import tomllib

        extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        sources = [path for name in ("sweeper", "analysis") for path in (root / name).rglob("*.py")]
        named = {name for path in sources for name in re.findall(r"""install\(["'](\w+)["']\)""", path.read_text())}
        assert {"mixed", "hub", "search", "ray"} <= named <= extras.keys()
        assert {part.extra for part in command.PARTS.values()} - {""} <= extras.keys()

    def test_no_printed_line_replaces_an_editable_install(self, root: Path) -> None:
        pages = [root / "Makefile", *(root / "docs").rglob("*.md"), *(root / "sweeper").rglob("*.py")]
        lines = [line for path in pages for line in path.read_text().splitlines() if "install" in line]
        bare = [line for line in lines if re.search(r"['\" ]\.\[\w", line) and not re.search(r"-e '?\.\[", line)]
        assert bare == []
        editable = [line for line in lines if "-e '.[" in line]
        assert editable
        assert all("-c constraints.txt" in line for line in editable)
