"""Commands that nobody should type, made at random: fields that there are and are not, values that fit and do not."""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

CONF = Path(__file__).parent.parent / "conf"
GROUPS = (
    "placement", "model", "dataset", "method", "allocation", "sharing", "objective", "optim", "evaluation",
    "experiment", "search", "tracking",
)  # fmt: skip
USUAL = (
    "attn", "ff", "full", "all", "tiny_llama", "tiny_gpt2", "lora", "dora", "rslora", "full_ft", "uniform", "chain_sum",
    "jsonl", "icd10_chapter", "nll", "default", "smoke", "lr", "atn", "importance", "budget", "lm_eval",
)  # fmt: skip
# the usual ones twice as often as all that there are
OPTIONS = (*USUAL, *USUAL, *sorted({path.stem for group in GROUPS for path in (CONF / group).glob("*.yaml")}))
FIELDS = (
    "rank", "alpha", "seed", "study", "output_root", "optim.lr", "optim.weight_decay", "optim.schedule", "optim.betas",
    "trainer.max_steps", "trainer.batch_size", "trainer.precision", "trainer.device", "trainer.accumulation",
    "dataset.path", "dataset.train_examples", "dataset.options", "dataset.options.stop", "dataset.metrics",
    "dataset.max_length", "model.location", "model.source", "model.config", "model.config.vocab_size", "model.roles",
    "method.dropout", "method.options", "method.options.x", "placement.roles", "placement.layers",
    "placement.patterns", "allocation.pattern", "allocation.options", "evaluation.splits", "evaluation.every_steps",
    "sweep.retries", "sweep.pack", "tracking", "tracking.mode", "plugins", "hydra.sweeper.n_trials",
    "hydra.sweeper.sampler", "hydra.sweeper.sampler_options", "hydra.sweeper.pruner", "hydra.sweeper.storage",
    "hydra.sweeper.objectives", "hydra.sweeper.widen", "hydra.launcher", "hydra/launcher", "hydra/sweeper",
    "hydra.mode", "hydra.run.dir", "hydra.job.num", "hydra.verbose",
)  # fmt: skip
VALUES = (
    "",
    "0",
    "1",
    "-1",
    "4",
    "8",
    "1e-3",
    "1e309",
    "-0.0",
    "nan",
    "inf",
    ".5",
    "1_000",
    "0x10",
    "9" * 400,
    "null",
    "true",
    "None",
    "abc",
    "é",
    "日本",
    "a b",
    "'a b'",
    '"x"',
    "'",
    '"',
    "[",
    "]",
    "[]",
    "[1,2]",
    "[a,[b]]",
    "{}",
    "{a:1}",
    "{a:{b:2}}",
    "{",
    "{a}",
    "(1,2)",
    "a,b",
    "4,8",
    "1,null",
    ",",
    "4,",
    ",4",
    "..",
    "/",
    "~",
    "*",
    "?",
    "\\",
    "\\,",
    "$",
    "${rank}",
    "${",
    "${nope}",
    "${oc.env:HOME}",
    "${oc.env:NOPE_NOT_SET}",
    "${hydra.job.num}",
    "%s",
    "{0}",
    "\t",
    "\n",
    "a\nb",
    "\x00",
    "\x1b[2J",
    "range(1,4)",
    "range(0,1,0)",
    "range(1)",
    "range(4,1)",
    "range(0,1e9)",
    "choice(1,2)",
    "choice()",
    "choice(null)",
    "interval(1e-4,1e-2)",
    "interval(1,0)",
    "interval(0,0)",
    "interval(a,b)",
    "int(interval(1,8))",
    "tag(log,interval(1e-4,1e-2))",
    "tag(log,interval(0,1))",
    "tag(tune,choice(4,8))",
    "tag(method,log,interval(1e-5,1e-3))",
    "glob(*)",
    "glob(f*)",
    "glob()",
    "sort(3,1,2)",
    "shuffle(1,2)",
    "sort()",
    "cast(1)",
    "int(x)",
    "float(1)",
    "bool(2)",
    "str(1)",
    "json_str('{')",
    "extend_list(1)",
    "@",
    "a@b",
    "a@_global_",
    "a/b",
    "../x",
    "a=b",
    "=",
    "==",
    "no such thing",
    "x" * 2000,
    "!!python/object:os.system",
    "- a",
    "\udcff",  # a byte that is no UTF-8, as Python hands it on
    "\u202e4",
    "4\u00a0",
    "٤",
    "1e-400",
    "[" * 300,
    "{a:" * 200,
    "range(" * 100,
    "-9223372036854775809",
    "18446744073709551616",
)
FLAGS = (
    "-m",
    "--multirun",
    "--help",
    "--hydra-help",
    "--version",
    "--cfg",
    "job",
    "hydra",
    "all",
    "--package",
    "--resolve",
    "--info",
    "plugins",
    "defaults",
    "searchpath",
    "--config-name",
    "--config-dir",
    "--config-path",
    "--experimental-rerun",
    "-x",
    "--",
    "-c",
    "-cd",
    "-cn",
    "--nope=3",
    "-",
)


def override(rng: random.Random) -> str:
    """One word of a command line for Hydra."""
    group = rng.random() < 0.4
    key = rng.choice(GROUPS if group else FIELDS)
    if rng.random() < 0.08:
        key = damaged(key, rng)
    if rng.random() < 0.1:
        key = rng.choice(("+", "++", "~", "@", "-")) + key
    values = OPTIONS if group and rng.random() < 0.85 else VALUES
    value = ",".join(rng.choice(values) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    if rng.random() < 0.05:
        value = damaged(value, rng)
    return key if rng.random() < 0.03 else f"{key}={value}"


def damaged(text: str, rng: random.Random) -> str:
    """A text with a character left out, doubled or put in."""
    place = rng.randrange(len(text) + 1)
    return (
        text[:place]
        + rng.choice(("", text[place : place + 1] * 2, "=", ".", ",", "'", "é", "[", "$"))
        + text[place + 1 :]
    )


def train(rng: random.Random) -> list[str]:
    """A command of train.py that trains nothing whatever else it says."""
    words = [override(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6)))]
    if rng.random() < 0.5:
        words.insert(rng.randrange(len(words) + 1), "-m")
    if rng.random() < 0.12:
        words.insert(rng.randrange(len(words) + 1), rng.choice(FLAGS))
    return ["experiment=smoke", "trainer.device=cpu", *words, "sweep.dry_run=true"]


def words_of(known: Sequence[str], values: Sequence[str] = VALUES) -> Callable[[random.Random], list[str]]:
    """Commands made of known words, each of which a value may follow."""

    def make(rng: random.Random) -> list[str]:
        found: list[str] = []
        for _ in range(rng.randrange(6)):
            word = rng.choice(known)
            found.append(damaged(word, rng) if rng.random() < 0.1 else word)
            if rng.random() < 0.5:
                found.append(rng.choice(values))
        return found

    return make


analysis = words_of(
    (
        "study",
        "empty",
        "nowhere",
        "--metric",
        "--out",
        "--tuned",
        "--draws",
        "--seed",
        "--no-figures",
        "--export",
        "--import",
        "--mixed",
        "nll",
        "paper",
        "exact_match",
        "peft",
        "csv",
        "--nope",
        "table.json",
        "optim.lr",
        "3",
    ),
)
adapters = words_of(
    (
        "merge",
        "combine",
        "spectra",
        "route",
        "study",
        "study/run",
        "empty",
        "nowhere",
        "--out",
        "out",
        "--method",
        "--weights",
        "--t",
        "--rank",
        "--density",
        "--seed",
        "--device",
        "--precision",
        "--top",
        "--epsilon",
        "--update-only",
        "--save",
        "rules=arrow,mole",
        "top_k=2",
        "dataset=icd10_chapter",
        "rank=4",
        "general=study/run",
        "ties",
        "cpu",
        "1",
    ),
)


def evaluate(rng: random.Random) -> list[str]:
    folders = [rng.choice(("study", "study/run", "empty", "nowhere", "", "\x00", "~")) for _ in range(rng.randrange(3))]
    words = [override(rng) for _ in range(rng.randrange(4))]
    return [*folders, *words]


def atlas(rng: random.Random) -> list[str]:
    """A command of `lora-atlas`, which fetches nothing that there is."""
    part = rng.choice(("train", "evaluate", "adapters", "analyse", "fetch", "--version", "-sc", "--help", "trian", ""))
    made = {"train": train, "evaluate": evaluate, "adapters": adapters, "analyse": analysis}
    rest = made[part](rng) if part in made else [rng.choice(VALUES) for _ in range(rng.randrange(3))]
    if part == "fetch" and not any(rest):
        rest = ["nothing"]
    return [damaged(part, rng) if part != "fetch" and rng.random() < 0.1 else part, *rest]


COMMANDS: dict[str, Callable[[random.Random], list[str]]] = {
    "train.py": train, "evaluate.py": evaluate, "adapters.py": adapters, "analysis": analysis, "lora-atlas": atlas,
}  # fmt: skip
SHARES = {"train.py": 0.6, "evaluate.py": 0.11, "adapters.py": 0.11, "analysis": 0.11, "lora-atlas": 0.07}


def commands(seed: int, count: int) -> Iterable[tuple[str, list[str]]]:
    """So many random commands, no two alike: the program and its words."""
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        script = rng.choices(list(SHARES), list(SHARES.values()))[0]
        words = COMMANDS[script](rng)
        if (name := repr((script, words))) not in seen:
            seen.add(name)
            yield script, words


# ---- what came of it, for docs/robustness.md ----

FIGURES = "SWEEPER_FUZZ_FIGURES"
"""Environment variable: the folder that `make fuzz` gathers figures in (tools/robustness.py)."""


class Figures:
    """Counts what was put in and what came out, and writes that down where `make fuzz` asks for it.

    `kind` is a row of the page, `part` one of the tests that fill it.
    """

    def __init__(self, kind: str, part: str) -> None:
        self.kind, self.part = kind, part
        self.accepted = self.refused = self.tracebacks = 0
        self.seen: set[str] = set()
        self.began = time.monotonic()

    def note(self, given: object, *, refused: bool, traceback: str | None = None) -> None:
        """An input, and whether it was refused or ended in a traceback, which is told at once: a part takes minutes."""
        digest = hashlib.sha256(repr(given).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if digest in self.seen:
            return
        self.seen.add(digest)
        self.tracebacks += traceback is not None
        self.refused += refused and traceback is None
        self.accepted += not refused and traceback is None
        if traceback is not None and (folder := os.environ.get(FIGURES)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / f"{self.part}.txt").open("a", encoding="ascii", errors="backslashreplace") as file:
                file.write(f"{given!r}\n{traceback[-3000:]}\n\n")

    def write(self) -> None:
        if folder := os.environ.get(FIGURES):
            plain = {
                "kind": self.kind, "accepted": self.accepted, "refused": self.refused, "tracebacks": self.tracebacks,
                "seconds": round(time.monotonic() - self.began, 1), "digests": sorted(self.seen),
            }  # fmt: skip
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{self.part}.json").write_text(json.dumps(plain))
