"""Tokenised splits on disk: one npz file a dataset and tokenizer, written whole or not at all."""

import itertools
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sweeper.cache import touch
from sweeper.record import replacing
from sweeper.tasks.example import Choice, Encoded, EncodedSplit


def write(path: Path, splits: Mapping[str, EncodedSplit]) -> None:
    """Writes the splits to `path`, whole."""
    import numpy as np

    arrays: dict[str, Any] = {"splits": np.array(list(splits))}
    for name, split in splits.items():
        arrays[f"{name}/ids"] = np.array([e.id for e in split.examples])
        arrays[f"{name}/lengths"] = np.array([len(e.input_ids) for e in split.examples], dtype=np.int64)
        arrays[f"{name}/prompts"] = np.array([e.prompt_length for e in split.examples], dtype=np.int64)
        arrays[f"{name}/tokens"] = np.array([t for e in split.examples for t in e.input_ids], dtype=np.int32)
        choices = [choice for e in split.examples for choice in e.choices]
        arrays[f"{name}/choice_counts"] = np.array([len(e.choices) for e in split.examples], dtype=np.int64)
        arrays[f"{name}/choice_lengths"] = np.array([len(c.ids) for c in choices], dtype=np.int64)
        arrays[f"{name}/choice_tokens"] = np.array([t for c in choices for t in c.ids], dtype=np.int32)
        if any(e.rejected or e.label is not None for e in split.examples):
            arrays[f"{name}/rejected_lengths"] = np.array([len(e.rejected) for e in split.examples], dtype=np.int64)
            arrays[f"{name}/rejected_tokens"] = np.array([t for e in split.examples for t in e.rejected], np.int32)
            arrays[f"{name}/labels"] = np.array([-1 if e.label is None else e.label for e in split.examples], np.int8)
        # numpy's fixed-width strings would make every text as large as the longest one
        texts = json.dumps(
            {
                "choices": [c.text for c in choices],
                "checks": [e.check for e in split.examples],
                "groups": [e.group for e in split.examples],
                "asides": {number: e.asides for number, e in enumerate(split.examples) if e.asides},
                "majority": dict(split.majority),
            }
        )
        arrays[f"{name}/texts"] = np.frombuffer(texts.encode(), dtype=np.uint8)
        arrays[f"{name}/truncated"] = np.array(split.truncated)
        arrays[f"{name}/apart"] = np.array(split.apart)
        arrays[f"{name}/dropped"] = np.array(split.dropped, dtype=np.str_)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read(path: Path) -> dict[str, EncodedSplit] | None:
    """What `write` wrote; None if the file is missing or damaged in any way (the zip's checksums tell)."""
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {str(name): _split(str(name), arrays) for name in arrays["splits"]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    touch(path)
    return found


def _split(name: str, arrays: Mapping[str, Any]) -> EncodedSplit:
    tokens: list[int] = arrays[f"{name}/tokens"].tolist()
    examples = []
    start = 0
    columns = (arrays[f"{name}/{key}"].tolist() for key in ("ids", "lengths", "prompts", "choice_counts"))
    texts = json.loads(arrays[f"{name}/texts"].tobytes().decode())
    choices = _choices(name, arrays, texts["choices"])
    asides: dict[str, list[list[int]]] = texts.get("asides", {})
    written = texts["checks"], texts["groups"], *_preferences(name, arrays)
    for number, row in enumerate(zip(*columns, *written, strict=True)):
        example_id, length, prompt_length, count, check, group, rejected, label = row
        own = tuple(itertools.islice(choices, count))
        ids = tuple(tokens[start : start + length])
        between = tuple((first, last) for first, last in asides.get(str(number), ()))
        examples.append(Encoded(example_id, ids, prompt_length, own, check, group, rejected, label, between))
        start += length
    if start != len(tokens):
        raise ValueError(f"{name}: lengths and tokens disagree")
    dropped = tuple(map(str, arrays[f"{name}/dropped"].tolist()))
    truncated, apart = (int(arrays[f"{name}/{key}"]) for key in ("truncated", "apart"))
    return EncodedSplit(tuple(examples), truncated, dropped, texts["majority"], apart)


def _preferences(name: str, arrays: Mapping[str, Any]) -> tuple[list[tuple[int, ...]], list[bool | None]]:
    """Rejected responses and labels of a split's examples, where it has any."""
    if f"{name}/labels" not in arrays:
        count = len(arrays[f"{name}/lengths"])
        return [()] * count, [None] * count
    tokens = iter(arrays[f"{name}/rejected_tokens"].tolist())
    rejected = [tuple(itertools.islice(tokens, length)) for length in arrays[f"{name}/rejected_lengths"].tolist()]
    labels = [None if label < 0 else bool(label) for label in arrays[f"{name}/labels"].tolist()]
    return rejected, labels


def _choices(name: str, arrays: Mapping[str, Any], texts: list[str]) -> Iterator[Choice]:
    tokens: list[int] = arrays[f"{name}/choice_tokens"].tolist()
    start = 0
    for text, length in zip(texts, arrays[f"{name}/choice_lengths"].tolist(), strict=True):
        yield Choice(text, tuple(tokens[start : start + length]))
        start += length
