"""What a study keeps as text: generated answers in each run's predictions, prompts and references once for all runs."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper.record import EXAMPLES, LONGEST_TEXT, MOST_TEXTS, replacing
from sweeper.redaction import without_secrets
from sweeper.tasks.example import EncodedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
PARTS = ("split", "moment", "task", "rule")  # of rows, which together are each example once
UNSCORED = ("train",)  # splits that have no predictions


def of_splits(splits: Mapping[str, EncodedSplit], tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Split (and SPLIT/TASK) -> what `write` takes: a JSON line for each of its first `MOST_TEXTS` examples.

    `prompt` is what the model reads, template, special tokens and what `dataset.max_length` did to it included;
    `response` the reference, and `choices` those that it is among.
    """
    found = {}
    for name, split in splits.items():
        if name.partition("/")[0] not in UNSCORED and not split.parts:
            found[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(split, tokenizer))
    return found


def _rows(split: EncodedSplit, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Row]:
    decode: Any = tokenizer.decode
    for example in split.examples[:MOST_TEXTS]:
        row = {"id": example.id, "prompt": shortened(decode(list(example.question)))}
        row["response"] = shortened(decode(list(example.answer), skip_special_tokens=True))
        yield row | ({"choices": [shortened(one.text) for one in example.choices]} if example.choices else {})


def write(study: Path, lines: str) -> str:
    """Keeps the examples of a split in a study and returns their digest, by which predictions find them.

    Runs on the same examples share one file, whoever writes it first; its content never changes.
    """
    content = without_secrets(lines).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = study / EXAMPLES / f"{digest}.jsonl.gz"
    if not path.exists():
        with replacing(path) as file:
            file.write(gzip.compress(content, mtime=0))
    return digest


def bounded(rows: Iterable[Mapping[str, Any]], *, keep: bool) -> list[Row]:
    """Rows for a file of predictions: their texts shortened, of the first `MOST_TEXTS` examples of a split.

    Args:
        keep: whether texts may stay. Else generated text and choices go, and groups, which may be text of the data,
            are digests.
    """
    found: list[Row] = []
    counts: dict[tuple[Any, ...], int] = {}
    for row in rows:
        part = tuple(row.get(name) for name in PARTS)
        counts[part] = number = counts.get(part, 0) + 1
        one = dict(row)
        if not keep:
            one = {key: value for key, value in one.items() if key not in ("text", "choice")}
            if "group" in one:
                one["group"] = hashlib.sha256(str(one["group"]).encode()).hexdigest()[:12]
        elif number > MOST_TEXTS:
            one.pop("text", None)
        elif "text" in one:
            one["text"] = shortened(one["text"])
        found.append(one)
    return found


def shortened(text: str) -> str:
    """A text of at most `LONGEST_TEXT` characters and a note between its two ends of how many are missing."""
    missing = len(text) - LONGEST_TEXT
    if missing <= 0:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} [... {missing:,} characters ...] {text[-half:]}"


def digests(study: Path, kept: Mapping[str, str], scored: Sequence[str]) -> dict[str, str]:
    """Split -> digest of its examples, which are written: of those splits that a run has scores of."""
    return {name: write(study, lines) for name, lines in kept.items() if name in scored}
