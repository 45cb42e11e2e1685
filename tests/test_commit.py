"""The commit that a record names: of a checkout by git, of a copy without one by the file that was written there."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeper import commit
from sweeper.commit import FILE


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The commit of a tree is looked up once a process."""
    commit.commit.cache_clear()
    yield
    commit.commit.cache_clear()


def git(tree: Path, *arguments: str) -> str:
    known = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *known, *arguments], cwd=tree, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def now(tree: Path) -> str | None:
    commit.commit.cache_clear()
    return commit.commit(tree)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    (made / "sweeper").mkdir(parents=True)
    (made / "sweeper" / "commit.py").write_text("here\n")
    (made / "größe.txt").write_text("1\n")
    git(made, "init", "-q")
    git(made, "add", "-A")
    git(made, "commit", "-q", "-m", "first")
    return made


def copy(tree: Path, to: Path) -> Path:
    """As a GPU host gets it: without `.git`, with what lies untracked in the tree."""
    return shutil.copytree(tree, to, ignore=shutil.ignore_patterns(".git"))


def test_a_checkout_is_named_by_git_and_marked_where_it_is_changed(tree: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")[:12]
    git(tree, "tag", "-a", "v1", "-m", "a release")
    assert now(tree) == head
    commit.write(tree)
    (tree / "untracked.txt").write_text("x\n")
    assert now(tree) == head
    (tree / "größe.txt").write_text("2\n")
    assert now(tree) == f"{head}+"


def test_a_copy_has_the_commit_that_was_written_down(tree: Path, tmp_path: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")[:12]
    assert now(copy(tree, tmp_path / "bare")) is None
    commit.write(tree)
    there = copy(tree, tmp_path / "there")
    (there / "outputs").mkdir()
    (there / "outputs" / "new.txt").write_text("x\n")
    assert now(there) == head
    (there / "größe.txt").unlink()
    assert now(there) == f"{head}+"
    (there / "größe.txt").write_text("1\n")
    assert now(there) == head
    (there / "sweeper" / "commit.py").write_text("there\n")
    assert now(there) == f"{head}+"


def test_a_changed_tree_stays_changed_in_its_copy(tree: Path, tmp_path: Path) -> None:
    (tree / "größe.txt").write_text("2\n")
    commit.write(tree)
    named = now(copy(tree, tmp_path / "there"))
    assert named == now(tree)
    assert named is not None
    assert named.endswith("+")


def test_a_file_of_an_older_commit_is_not_believed(tree: Path, tmp_path: Path) -> None:
    commit.write(tree)
    (tree / "größe.txt").write_text("2\n")
    git(tree, "commit", "-q", "-am", "second")
    former = git(tree, "rev-parse", "HEAD~")[:12]
    assert now(copy(tree, tmp_path / "there")) == f"{former}+"


def test_a_copy_inside_another_checkout_is_not_of_its_commit(tree: Path, tmp_path: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")[:12]
    commit.write(tree)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("a\n")
    git(other, "init", "-q")
    git(other, "add", "-A")
    git(other, "commit", "-q", "-m", "theirs")
    assert now(copy(tree, other / "there")) == head
    (other / "there" / FILE).unlink()
    assert now(other / "there") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"commit": "abc"}', '{"commit": "not one", "files": [], "sha256": ""}']
)
def test_a_damaged_file_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    assert now(tmp_path) is None


def test_where_there_is_no_checkout_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no git checkout, so there is no commit to write down"):
        commit.write(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_wheel_says_what_it_was_built_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "WHEEL", True)
    monkeypatch.setattr(commit, "PACKAGE", tmp_path)
    assert commit.commit() is None
    for text, known in (("0123456789ab+", "0123456789ab+"), ("<b>", None)):
        (tmp_path / FILE).write_text(text)
        commit.commit.cache_clear()
        assert commit.commit() == known
