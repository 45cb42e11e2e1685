"""Carries out the commands of a page, in their order, in one folder: tiny model, few steps, little data."""

import contextlib
import csv
import io
import json
import os
import re
import runpy
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tools.printed_commands import FETCHED, HUB, TRAINING_TARGETS, Command

ROOT = Path(__file__).parents[2]
STAND_IN = "model=tiny_llama", "placement=attn,ff", "rank=2", "seed=0"
SMALL = {"train_examples": 16, "validation_examples": 4, "test_examples": 4, "max_length": 480}
REPLACED = {
    "model": "tiny_llama",
    "trainer.max_steps": "4",
    "trainer.precision": "float32",
    "trainer.device": "cpu",
    "sweep.calibrate": "false",
}
COMPOSED_ONLY = ("hydra/launcher", "hydra.launcher.", "hydra.sweeper.storage")
FOLDER = re.compile(r"outputs/([\w<>-]+)")
RUN = re.compile(r"\b(?:RUN|[0-9a-f]{12})\b")


def split(value: str) -> list[str]:
    """The parts of a comma list; commas within brackets and quotes are no separators."""
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def axes_of(overlay: str, folder: Path) -> dict[str, str]:
    """The axes that an overlay of `conf/` brings."""
    group, name = overlay.split("=")
    for place in (folder, ROOT / "conf"):
        path = place / group / f"{name}.yaml"
        if path.exists():
            params = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params") or {}
            return {key: str(value) for key, value in params.items()}
    raise FileNotFoundError(f"{overlay}: no such overlay")


@dataclass
class Reader:
    """Someone who types what a page says, in `folder`."""

    folder: Path
    drawn: bool = True  # figures take longer than all else that a page has a reader type
    output: str = ""
    known: dict[str, Path] = field(default_factory=dict)  # a run's id as it is printed -> its folder

    def type(self, command: Command) -> None:
        """Carries out a command.

        Raises:
            AssertionError: it did not end with exit code 0.
        """
        words = command.words
        if words[0] == "make":
            arguments = next((word.partition("=")[2].split() for word in words if word.startswith("ARGS=")), [])
            assert words[1] in TRAINING_TARGETS
            for recipe in recipes(words[1]):
                self.call([*recipe, *(arguments if recipe[0] == "train.py" else [])])
        else:
            self.call(words[1:])

    def call(self, words: Sequence[str]) -> None:
        if words[0] == "train.py":
            self._main(self.trained_small(list(words)))
            return
        words = [self._folder(word) for word in words]
        if words[0] == "evaluate.py":
            words = self._scored_small(words)
        if words[:2] == ["adapters.py", "route"]:
            words = [self._without(word, (*HUB, *FETCHED)) for word in words]
            words += [f"dataset.{key}={value}" for key, value in SMALL.items()]
        if words[:2] == ["-m", "analysis"]:
            words += ["--draws", "50"] if self.drawn else ["--draws", "50", "--no-figures"]
        self._main(words)

    def trained_small(self, words: list[str]) -> list[str]:
        """The command with its model, steps and data replaced by small ones and long axes cut to two values."""
        flags = [word for word in words if word.startswith("-")]
        if {"--help", "--cfg"} & set(flags):
            return words
        if "--from" in flags:  # a record says what is trained: that of a run that was small
            return [self._folder(word) for word in words]
        given = [word for word in words if "=" in word and not word.startswith("-")]
        rest = [word for word in words if word not in given]
        config = self.folder / words[words.index("--config-dir") + 1] if "--config-dir" in words else ROOT / "conf"
        overlays = [word for word in given if re.match(r"(experiment|search)=", word)]
        fields = {word.partition("=")[0]: word.partition("=")[2] for word in given}
        brought = {key: value for overlay in overlays for key, value in axes_of(overlay, config).items()}
        fields |= {key: value for key, value in brought.items() if key not in fields and len(split(value)) > 1}
        own = fields.get("model") == "path" and (self.folder / fields["model.location"]).is_dir()
        replaced = {key: value for key, value in REPLACED.items() if not (own and key == "model")}
        fields = {key: self._cut(key, value) for key, value in fields.items() if not key.startswith(COMPOSED_ONLY)}
        fields = {
            key: value for key, value in fields.items() if own or not key.startswith("model.") or key == "model.roles"
        }
        fields |= replaced
        fields |= self._data(fields)
        if fields.get("dataset") == "codeio":  # programs of several hundred letters, of which each is a token here
            fields |= {"dataset.max_length": "1600", "model.config.max_position_embeddings": "2048"}
        if any("tag(" in value or "interval(" in value for value in [*fields.values(), *brought.values()]):
            fields["hydra.sweeper.n_trials"] = "2"
            if any(overlay.startswith("experiment=") for overlay in overlays):  # which confirms on several seeds
                fields |= {"hydra.sweeper.confirm_seeds": "[1]", "hydra.sweeper.widen": "0"}
        if "search" in fields or "hydra.sweeper.pruner" in fields:
            fields["evaluation.every_steps"] = "1"
        if "allocation.budget" in fields or fields.get("experiment") == "methods":
            fields["allocation.budget"] = "20k"
        return [*rest, *(f"{key}={value}" for key, value in fields.items())]

    def _cut(self, key: str, value: str) -> str:
        if key == "trainer.init_from" or key == "hydra.sweeper.confirm_seeds":
            value = ",".join(str(self._run(part)) if RUN.search(part) else part for part in split(value))
            return re.sub(r"\[(\d+),.*\]", r"[\1]", value)
        kept = [part for part in split(value) if key != "dataset" or part not in (*HUB, *FETCHED)]
        return ",".join(kept[:2])

    def _data(self, fields: dict[str, str]) -> dict[str, str]:
        """Little data, for one task or for each of several."""
        if "dataset.parts" in fields:
            parts = fields["dataset.parts"].strip("[]").split(",")[:2]
            sizes = ",".join(f"{key}: {value}" for key, value in SMALL.items())
            return {"dataset.parts": "[" + ",".join(f"{{{part}: {{{sizes}}}}}" for part in parts) + "]"}
        if fields.get("experiment") in ("continual", "multi_task") and "dataset" not in fields:
            sizes = ",".join(f"{key}: {value}" for key, value in SMALL.items())
            parts = ",".join(f"{{{part}: {{{sizes}}}}}" for part in ("icd10_chapter", "hpo_term", "licence_category"))
            if fields["experiment"] == "multi_task":  # its tree names five
                parts = ",".join(
                    f"{{{part}: {{{sizes}}}}}"
                    for part in ("icd10_chapter", "hpo_term", "licence_category", "chain_sum", "long_sum")
                )
            return {"dataset.parts": f"[{parts}]"}
        # Hydra composes an overlay first as it is, and there a mixture has no sizes of its own
        plus = "++" if fields.get("experiment") in ("continual", "multi_task") else ""
        return {f"{plus}dataset.{key}": str(value) for key, value in SMALL.items() if f"dataset.{key}" not in fields}

    def _scored_small(self, words: list[str]) -> list[str]:
        words = [self._without(word, (*HUB, *FETCHED)) for word in words]
        if any(word.startswith("dataset=") for word in words):
            words += [f"dataset.{key}={value}" for key, value in SMALL.items()] + ["dataset.max_new_tokens=4"]
        return words

    def _without(self, word: str, names: Sequence[str]) -> str:
        key, equals, value = word.partition("=")
        return f"{key}={','.join(one for one in value.split(',') if one not in names)}" if equals else word

    def _folder(self, word: str) -> str:
        """An argument in which studies and runs are those that there are; a study that is missing is made."""
        if word == "<folder>":  # what the command before it exported, else a published table
            exported = self.folder / "paper/peft"
            return str(exported if exported.is_dir() else ROOT / "tests/analysis/data/published_2025.json")
        match = FOLDER.match(word)
        if match is None:
            return word
        study = match[1].strip("<>")
        if not any((self.folder / "outputs" / study).glob("*/record.json")):
            self._main(self.trained_small(["train.py", "-m", *STAND_IN, f"study={study}"]))
        word = word.replace(match[0], f"outputs/{study}")
        return str(self._run(word)) if RUN.search(word) else word

    def _run(self, word: str) -> Path | str:
        """The folder of the run that a word names, or its id where the word is no more than that."""
        named = RUN.search(word)
        assert named is not None
        match = FOLDER.match(word)
        study = match[1] if match else "default"
        if named[0] not in self.known or named[0] == "RUN":
            every = sorted(path.parent for path in (self.folder / "outputs" / study).glob("*/record.json"))
            taken = [path for path in every if path not in self.known.values()] or every
            self.known[named[0]] = taken[0]
        found = self.known[named[0]]
        return found.relative_to(self.folder) if match else found.name

    def _main(self, words: list[str]) -> None:
        """A program of the repository, in this process, as its file or module is started."""
        said = io.StringIO()
        with _as_started(words, self.folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = _ended(words)
        self.output = said.getvalue()
        assert code in (0, None), f"{words} ended with {code}:\n{self.output[-3000:]}"


def _ended(words: list[str]) -> object:
    try:
        if words[0] == "-m":
            module = words[1] if "." in words[1] else f"{words[1]}.__main__"
            loaded = sys.modules.pop(module, None)  # by another test; a process of its own would not have it
            try:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            finally:
                if loaded is not None:
                    sys.modules[module] = loaded
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@contextlib.contextmanager
def _as_started(words: list[str], folder: Path) -> Iterator[None]:
    from hydra.core.global_hydra import GlobalHydra

    arguments, here, environment = sys.argv, Path.cwd(), dict(os.environ)
    sys.argv = [str(ROOT / words[0]), *words[1:]] if words[0] != "-m" else words[1:]
    os.environ.pop("HYDRA_FULL_ERROR", None)
    os.chdir(folder)
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        os.chdir(here)
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def recipes(target: str) -> list[list[str]]:
    """The commands of a target of the Makefile that Python carries out, without their interpreter."""
    text = (ROOT / "Makefile").read_text()
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.M)
    assert lines is not None, target
    found = []
    for line in lines[1].splitlines():
        line = re.sub(r"\$\(or .*,(\w+)\)", r"\1", line.strip()).replace("$(ARGS)", "")
        if line.startswith("$(BIN)/python "):
            found.append(line.split()[1:])
    return found


def surroundings(folder: Path) -> None:
    """What a reader has who follows the pages: files of examples, and the folder of a model."""
    words = ["printer", "screen", "login", "invoice", "cable", "letter", "phone", "router"]
    rows = [
        (f"Classify the ticket: {word} {n} is broken", ("hardware", "account")[n % 2], n)
        for n in range(6)
        for word in words
    ]
    plain = [{"prompt": prompt, "response": response} for prompt, response, _ in rows]
    _write(folder / "mine.jsonl", plain)
    with (folder / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer", "source"), *((p, r, f"book{n}") for p, r, n in rows)])
    with tarfile.open(ROOT / "tests" / "analysis" / "data" / "peft_metamathqa.tar.xz") as tar:
        tar.extractall(folder / "method_comparison", filter="data")
    _write(folder / "tickets.jsonl", [row | {"customer": f"customer-{n // 3}"} for n, row in enumerate(plain)])
    chats = [[("user", row["prompt"]), ("assistant", row["response"])] * 2 for row in plain]
    turns = [{"messages": [{"role": who, "content": text} for who, text in chat]} for chat in chats]
    _write(folder / "chats.jsonl", turns)
    _write(folder / "choices.jsonl", [row | {"choices": ["hardware", "account"]} for row in plain])


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def save_model(folder: Path) -> None:
    """A folder with the weights and the tokenizer of the tests' own small model."""
    import torch

    from sweeper import models
    from sweeper.spec import ModelSpec

    plain = yaml.safe_load((ROOT / "conf/model/tiny_llama.yaml").read_text())
    spec = ModelSpec(**{key: value for key, value in plain.items() if key != "roles"})
    base = models.load(spec, dtype=torch.float32, device=torch.device("cpu"))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
