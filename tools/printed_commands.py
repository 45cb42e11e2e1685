"""The commands that the README and the documentation print, and which of them a test machine cannot carry out.

.venv/bin/python -m tools.printed_commands              # all of them, page by page
.venv/bin/python -m tools.printed_commands --not-run    # what the tests do not carry out, and why
"""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHELL = ("bash", "console", "sh")
FIRST = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?(?:python3?|pip|optuna-dashboard|tensorboard|jupyter)"
    r"|make|eval|git|wandb|lora-atlas|ray|sbatch)(?= )"
)
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w{}-]*)")
# within a sentence a program with arguments is a command, its bare name is not
INLINE = re.compile(r"(?<!`)`((?:\.venv/bin/[^\s`]+ (?:-m [^\s`]+|[^-\s`][^\s`]*) [^\s`]|make |eval )[^`]+)`(?!`)")
LEFT_OPEN = re.compile(r"…|\.\.\.|\bARGS\b$")
NAMED_FILE = re.compile(r"`([\w/]+\.(?:py|yaml|jsonl))`[.:]?$")

HUB = ("alpaca", "arxiv", "gsm8k", "legalbench", "mbpp", "medmcqa", "metamathqa", "pubmed_qa")
FETCHED = ("medmcqa_answer", "medmcqa_subject", "privacy_policy_qa", "pubmed_decision", "pubmed_question")
TRAINING_TARGETS = ("sweep", "paper")


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it is printed. `line` is where it begins, from 1; `block` is false for code within a sentence."""

    text: str
    page: str
    line: int
    block: bool = True

    @property
    def words(self) -> list[str]:
        """What a shell makes of it, without the prompt and a comment behind it."""
        return shlex.split(self.text.removeprefix("$ "), comments=True)


@dataclass(frozen=True, slots=True)
class NotRun:
    """A command that the tests do not carry out as it is: what it needs, and what is tested instead."""

    text: str
    why: str
    instead: str


def pages(root: Path) -> list[Path]:
    """The README and every page of the documentation."""
    found = [root / "README.md", root / "CONTRIBUTING.md", *root.glob("docs/*.md"), *root.glob("docs/*/*.md")]
    return sorted(path for path in found if "example" not in path.parts)


def commands(page: Path, root: Path) -> list[Command]:
    """Commands of shell blocks, of indented blocks and of code within sentences, in their order."""
    name = page.relative_to(root).as_posix()
    found = []
    for line, text, language in blocks(page.read_text()):
        if language is None:
            found += [Command(one, name, line, False) for one in INLINE.findall(text) if not LEFT_OPEN.search(one)]
        elif language in SHELL or language == "":
            found += [Command(one, name, line + at, True) for at, one in _joined(text) if FIRST.match(one)]
    return found


def files(page: Path) -> dict[str, str]:
    """Files that a page prints: a block whose text before it ends with the file's name in backticks."""
    found, before = {}, ""
    for _, text, language in blocks(page.read_text()):
        match = NAMED_FILE.search(before.rstrip())
        if language not in (None, "") and match:
            found[match[1]] = text
        before = text
    return found


def blocks(text: str) -> Iterator[tuple[int, str, str | None]]:
    """Line, text and language of every part of a page; the language of an indented block is "", of prose None."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        begin, fence = at, FENCE.match(lines[at])
        if fence:
            at += 1
            while at < len(lines) and not lines[at].lstrip().startswith(fence["ticks"]):
                at += 1
            cut = len(fence["indent"])
            yield begin + 2, "\n".join(line[cut:] for line in lines[begin + 1 : at]), fence["language"]
            at += 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield begin + 1, "\n".join(line[4:] for line in lines[begin:at]), ""
        elif not lines[at].strip():
            at += 1
        else:
            at += 1
            while at < len(lines) and lines[at].strip() and not FENCE.match(lines[at]):
                at += 1
            yield begin + 1, " ".join(line.strip() for line in lines[begin:at]), None


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a shell script with those that a backslash continues, as a shell joins them."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        begin, line = at, lines[at]
        while line.endswith("\\") and at + 1 < len(lines):
            at += 1
            line = line[:-1] + lines[at]
        yield begin, re.sub(r"\s{2,}(?!#)", " ", line.strip())
        at += 1


def needs(command: Command) -> NotRun | None:
    """What a command needs that a test machine does not have, or None where it is carried out."""
    words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
    text = shlex.join(words) if "<" in command.text else command.text.split("  #")[0].strip()

    def told(why: str, instead: str) -> NotRun:
        return NotRun(re.sub(r"\s+", " ", text), why, instead)

    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        if words[1] in TRAINING_TARGETS:
            return None
        return told("the whole project, or a package index", "`make -n`: the target exists and its recipe is complete")
    if program in ("git", "ray", "sbatch", "wandb", "optuna-dashboard", "tensorboard", "jupyter"):
        return told("a service or a repository of yours", "the files that it reads are made by the commands before it")
    if words[1:3] == ["-m", "pip"] or program == "pip":
        return told("a package index", "its extras are in `pyproject.toml` and pinned")
    if words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
        return told("a GPU, or hours", "the benchmark exists and has these options")
    if program == "lora-atlas":
        return told("a wheel's environment, or a package index", "`make wheel-check` uses the wheel in an empty folder")
    if words[1:3] == ["adapters.py", "push"] and "--dry-run" not in words:
        return told("an account of the hub", "its dry run is carried out")
    if words[1:2] == ["tools/terminal_shot.py"]:
        return told("the package pyte", "`tests/test_tools.py` takes a shot where it is installed")
    datasets = _values(words, "dataset")
    if datasets and set(datasets) <= {*HUB, *FETCHED}:
        return told("data of the hub, or of `make fetch`", "composed")
    if "evaluation=lm_eval" in words:
        return told("lm-eval (`make lm-eval`)", "composed")
    if "qlora" in _values(words, "method"):
        return told("a GPU", "composed")
    if any(word.startswith("wandb:") for word in words):
        return told("an account at W&B", "its options are parsed")
    if any(word.startswith("model.location=/") for word in words):
        return told("a model of yours", "composed")
    if "hydra/launcher=ray" in words:
        return told("Ray, and GPUs", "composed; the same grid is trained in this process")
    if any(word.startswith("hydra.sweeper.storage=") for word in words):
        return told("PostgreSQL", "composed; the same search is made with a journal file")
    return None


def _values(words: list[str], field: str) -> list[str]:
    return next((word.partition("=")[2].split(",") for word in words if word.startswith(f"{field}=")), [])


def printed(root: Path) -> list[Command]:
    """Every command of every page."""
    return [command for page in pages(root) for command in commands(page, root)]


def not_run(root: Path) -> list[tuple[NotRun, list[str]]]:
    """What is not carried out as it is printed, with the pages that print it."""
    found: dict[NotRun, list[str]] = {}
    for command in printed(root):
        if (one := needs(command)) is not None and command.page not in found.setdefault(one, []):
            found[one].append(command.page)
    return sorted(found.items(), key=lambda item: (item[0].why, item[0].text))


def main() -> None:
    root = Path(__file__).parents[1]
    if "--not-run" in sys.argv[1:]:
        for one, where in not_run(root):
            print(f"not run: {one.text}  (needs {one.why}; {one.instead}; on {', '.join(where)})")
        return
    for command in printed(root):
        one = needs(command)
        print(f"{command.page}:{command.line}: {command.text}" + (f"   [not run: needs {one.why}]" if one else ""))


if __name__ == "__main__":
    main()
