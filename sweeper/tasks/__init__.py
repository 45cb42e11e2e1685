"""Tasks: examples, splits, prompts and metrics. One file a family; `FAMILIES` is the table of them.

A family is a module with `OPTIONS` (the names `dataset.options` may have, each with its meaning), `check(spec)`
(raises DataError before anything is loaded), `load(spec)` (the splits as text) and `version(spec)` (changes when its
data does).
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sweeper.errors import DataError, SpecError, unknown
from sweeper.spec import DatasetSpec, to_mapping
from sweeper.tasks import cache as _cache
from sweeper.tasks import gsm_symbolic, hub, icd10_chapter, jsonl
from sweeper.tasks.example import SPLITS, Encoded, EncodedSplit, Example
from sweeper.tasks.metrics import METRICS, TEACHER_FORCED
from sweeper.tasks.template import TEMPLATES, adds_start, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FAMILIES", "METRICS", "SPLITS", "Encoded", "EncodedSplit", "Example", "check", "encode", "load"]

# Raise whenever the same spec and data would give other tokens, so that no stale cache file is read.
CODE_VERSION = 1


class Family(Protocol):
    """What a module under `sweeper.tasks` provides."""

    OPTIONS: dict[str, str]

    def check(self, spec: DatasetSpec) -> None: ...

    def version(self, spec: DatasetSpec) -> str: ...

    def load(self, spec: DatasetSpec) -> dict[str, tuple[Example, ...]]: ...


FAMILIES: dict[str, Family] = {
    "gsm_symbolic": gsm_symbolic,
    "hub": hub,
    "icd10_chapter": icd10_chapter,
    "jsonl": jsonl,
}


def check(spec: DatasetSpec) -> None:
    """Cheap validation before any model is loaded: names, options, the package or file or hub set behind the task.

    Raises:
        SpecError: a name or option that does not exist.
        DataError: data that is missing, malformed or too small.
    """
    _check_names(spec)
    FAMILIES[spec.family].check(spec)


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """The splits as text: "train", "validation" and "test", disjoint by group, the same for the same `split_seed`."""
    _check_names(spec)
    splits = FAMILIES[spec.family].load(spec)
    return {split: splits[split] for split in SPLITS}


def encode(
    spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", *, model_key: str, cache: Path | None
) -> dict[str, EncodedSplit]:
    """The splits as token ids, read from the folder `cache` if they were made before.

    What is longer than `max_length` loses the left part of its prompt (a start token stays), so the end of the
    question and the turn of the assistant are kept, and is counted in `truncated`. A response is never cut: if it
    leaves no room for a prompt, the example is left out and named in `dropped`.

    Raises:
        DataError: as `load`; or `max_length` leaves a split empty.
    """
    _check_names(spec)
    path = cache / f"{spec.family}-{_key(spec, tokenizer, model_key)}.npz" if cache is not None else None
    kept = _cache.read(path) if path is not None else None
    if kept is not None:
        return kept
    splits = {name: _encode_split(name, examples, spec, tokenizer) for name, examples in load(spec).items()}
    if path is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not correctness
            _cache.write(path, splits)
    return splits


def _check_names(spec: DatasetSpec) -> None:
    if spec.family not in FAMILIES:
        raise SpecError(unknown("dataset.family", spec.family, FAMILIES))
    if spec.template not in TEMPLATES:
        raise SpecError(unknown("dataset.template", spec.template, TEMPLATES))
    for metric in spec.metrics:
        if metric not in METRICS:
            raise SpecError(unknown("dataset.metrics", metric, METRICS))
        if metric not in TEACHER_FORCED and spec.max_new_tokens < 1:
            raise SpecError(f"dataset.metrics={metric} needs generated text: set dataset.max_new_tokens above 0")
    for option in spec.options:
        if option not in FAMILIES[spec.family].OPTIONS:
            choices = FAMILIES[spec.family].OPTIONS
            if not choices:
                raise SpecError(f"dataset.options.{option}: {spec.family} has no options")
            raise SpecError(unknown("dataset.options", option, choices))


def _encode_split(
    name: str, examples: tuple[Example, ...], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase"
) -> EncodedSplit:
    encoded: list[Encoded] = []
    dropped: list[str] = []
    truncated = 0
    starts = int(adds_start(tokenizer))
    for example in examples:
        prompt, response = tokenise(spec.template, example.prompt, example.response, spec.system, tokenizer)
        room = spec.max_length - len(response)
        if room <= starts:
            dropped.append(example.id)
            continue
        if len(prompt) > room:
            truncated += 1
            prompt = prompt[:starts] + prompt[len(prompt) - room + starts :]
        encoded.append(Encoded(example.id, (*prompt, *response), len(prompt)))
    if not encoded:
        raise DataError(f"dataset.max_length={spec.max_length} is too short for every response of the {name} split")
    return EncodedSplit(tuple(encoded), truncated, tuple(dropped))


def _key(spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", model_key: str) -> str:
    """Hash of everything the tokens depend on."""
    fields = to_mapping(spec)
    for scoring_only in ("name", "metrics", "max_new_tokens"):
        del fields[scoring_only]
    return hashlib.sha256(
        json.dumps(
            [CODE_VERSION, fields, FAMILIES[spec.family].version(spec), model_key, _identity(tokenizer)], sort_keys=True
        ).encode()
    ).hexdigest()[:20]


def _identity(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings: Mapping[str, object] = {
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "chat_template": tokenizer.chat_template,
    }
    return [hashlib.sha256(table.encode()).hexdigest(), json.dumps(settings)]
