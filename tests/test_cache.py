"""The cache folder: bounded, cleared by age, safe beside running processes, rebuilt where it is damaged."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sweeper import cache
from sweeper.errors import SpecError


def put(path: Path, size: int, used: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_limit_takes_what_was_used_longest_ago_and_nothing_that_was_fetched(folder: Path) -> None:
    old = put(folder / "tokens" / "old.npz", 400, 1000)
    new = put(folder / "tokens" / "new.npz", 400, 3000)
    fetched = put(folder / "packages" / "data-1.0" / "file", 400, 10)
    verdict = put(folder / "verdicts" / "one.json", 400, 2000)
    cache.touch(old)
    gone = cache.trim(limit=1200)
    assert [entry.path for entry in gone] == [verdict]
    assert old.exists()
    assert new.exists()
    assert fetched.exists()
    assert {entry.path for entry in cache.trim(limit=0)} == {old, new}
    assert fetched.exists()


def test_what_another_process_holds_is_never_removed(folder: Path) -> None:
    model = folder / "model-12345678"
    put(model / "config.json", 10, 1000)
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from sweeper import cache
        cache.hold(Path(sys.argv[1]))
        print("held", flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert cache.trim(limit=0) == []
        assert (model / "config.json").exists()
        assert cache.main(["clean"]) == 0
        assert (model / "config.json").exists()
        other.communicate()
    assert [entry.path for entry in cache.trim(limit=0)] == [model]
    assert list(folder.iterdir()) == []


def test_two_processes_that_clear_at_once_remove_each_entry_once(folder: Path) -> None:
    for number in range(200):
        put(folder / "tokens" / f"{number}.npz", 10, number)
        put(folder / f"model-{number:08x}" / "config.json", 10, number)
    code = "from sweeper import cache; print(len(cache.trim(limit=0)))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(one.communicate()[0]) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sum(counts) == 400
    assert list(cache.entries(folder)) == []


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("12", 12), ("2K", 2000)]
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPER_CACHE_LIMIT", text)
    assert cache.limit_bytes() == size


def test_no_limit_and_one_that_is_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPER_CACHE_LIMIT", "none")
    assert cache.limit_bytes() is None
    monkeypatch.setenv("SWEEPER_CACHE_LIMIT", "plenty")
    with pytest.raises(SpecError, match=r"SWEEPER_CACHE_LIMIT=plenty: not a size"):
        cache.limit_bytes()


def test_the_command_lists_and_cleans_by_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder / "tokens" / "a.npz", 1500, 1000)
    put(folder / "verdicts" / "b.json", 10, 1000)
    assert cache.main([]) == 0
    assert "tokens" in (said := capsys.readouterr().out)
    assert "1.5 KB" in said
    assert cache.main(["clean", "tokens"]) == 0
    assert [entry.kind for entry in cache.entries(folder)] == ["verdicts"]
    assert cache.main(["clean", "token"]) == 2
    assert "verdicts" in capsys.readouterr().err


def test_converted_weights_that_were_damaged_are_converted_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sweeper.models import files

    made = []

    def convert(source: Path, final: Path) -> None:
        made.append(final)
        config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(final)
        files.write_whole(final)

    monkeypatch.setattr(files, "_convert", convert)
    monkeypatch.setattr(files, "gguf_file", lambda location: tmp_path / "m.gguf")
    monkeypatch.setattr(files, "converted_folder", lambda location: folder / "m-00000000")
    (tmp_path / "m.gguf").write_bytes(b"x")
    first = files.converted("m")
    assert files.converted("m") == first
    assert len(made) == 1
    weights = first / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert files.converted("m") == first
    assert len(made) == 2
    (first / "config.json").unlink()
    files.converted("m")
    assert len(made) == 3
