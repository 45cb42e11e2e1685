"""A Hugging Face dataset (hub id or local folder in `dataset.path`), its columns mapped by `dataset.options`.

`dataset.columns` says the same in fewer words, and counts where both do (`sweeper.tasks.columns`).

`prompt`, `response` and `group` are texts with column names in braces: `"{instruction}\\n\\n{input}"`; a list in a
column is joined by line breaks. A multiple-choice set gives `choices`, a list of such texts, and may give `answer`, a
text that comes out as the number of the right one (from 0), in place of `response`. `check` is Python source that tests
a generated program, the text `PROGRAM`. Without `prompt` and `response`, rows have one of the layouts that people
have: conversations, instructions, running text (`sweeper.tasks.conversation`).

Of preferences, `chosen` and `rejected`, or `completion` and `label`, name columns in place of `response`
(`sweeper.tasks.preference`); `prompt` may then be left out.

`splits` maps ours to the source's names; those it lacks are cut out of train. Published splits overlap at times: an
example whose group or near-duplicate prompt is in test is left out of validation and train, and one in validation out
of train. Rows whose prompt or response comes out empty are left out too. Without `revision` the newest version is read.
"""

import contextlib
import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sweeper import content as contents
from sweeper.content import COMMIT, Content
from sweeper.errors import DataError, first_line
from sweeper.spec import DatasetSpec
from sweeper.tasks import columns, conversation, preference
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.package import require_extra
from sweeper.tasks.split import asked, prompt_key, split_examples

OPTIONS = {
    "prompt": "text with {columns}",
    "response": "text with {columns}",
    "group": "text with {columns}; examples of one group stay in one split",
    "choices": "list of texts with {columns}, the answers to choose among",
    "answer": "text with {columns} that gives the number of the right choice, from 0",
    "check": "Python source with {columns} that raises where the text PROGRAM is wrong",
    "loss": conversation.OPTION,
    "chosen": "column of the preferred response, or of the chat that ends with it",
    "rejected": "column of the other one",
    "completion": "column of a response that `label` is of",
    "label": "column that says whether the completion is good",
    "splits": "ours -> the source's, for instance {train: train, test: test}",
    "config": "the source's configuration name",
    "revision": "commit, tag or branch",
}

COLUMNS = (
    "prompt", "response", "group", "answer", "check", *dict.fromkeys((*preference.COLUMNS, *conversation.NAMES)),
)  # fmt: skip
UNIT = "`group` of the options, else the prompt"

# split of ours -> rows; a row is a mapping from column to value
Tables = Mapping[str, Any]


def check(spec: DatasetSpec) -> None:
    """Reaches the dataset (downloading it the first time) and compares its columns with the mapping."""
    conversation.every_turn(spec)
    _columns(spec, read(spec))


def version(spec: DatasetSpec) -> str:
    """Only what the spec says; a local folder also by the size and time of its files."""
    folder = Path(str(spec.path)).expanduser()
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []
    return json.dumps([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def content(spec: DatasetSpec) -> Content:
    """The commit that is read: the hub's, or without network the one in the local cache."""
    revision = spec.options.get("revision")
    return contents.NONE if spec.path is None else _commit(spec.path, None if revision is None else str(revision))


def _commit(path: str, revision: str | None) -> Content:
    import huggingface_hub

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return contents.of_commit(revision, changed=-math.inf)
    with contextlib.suppress(Exception):  # whatever the HTTP library of the day raises; `check` says what is wrong
        info = huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10)
        if info.sha:
            when = math.inf if info.last_modified is None else info.last_modified.timestamp()
            return contents.of_commit(info.sha, changed=when)
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    name = cache / f"datasets--{path.replace('/', '--')}" / "refs" / (revision or "main")
    with contextlib.suppress(OSError):
        return contents.of_commit(name.read_text().strip(), changed=name.stat().st_mtime)
    return contents.NONE


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    tables = read(spec)
    _columns(spec, tables)
    options = _options(spec)
    examples: list[Example] = []
    marked: dict[str, str] = {}
    for split, rows in tables.items():
        for index, row in enumerate(rows):
            made = _example(f"{split}-{index}", row, options)
            if made.response and (made.prompt or _by_layout(options)):
                examples.append(made)
                if split != "train":
                    marked[made.id] = split
    try:
        kept = _without_overlap(examples, marked)
        return split_examples(kept, spec, marked=marked)
    except DataError as error:
        raise DataError(f"dataset={spec.name} ({spec.path}): {error}") from None


def _options(spec: DatasetSpec) -> dict[str, Any]:
    """The options, with what `dataset.columns` says in place of those of the same names."""
    return {**spec.options, **columns.templates(spec)}


def kind(spec: DatasetSpec) -> str:
    """What the examples are (`sweeper.tasks.preference`), by what the options name."""
    return _kind(_options(spec))


def _kind(options: Mapping[str, Any]) -> str:
    given = {key: value for key, value in options.items() if value is not None}
    return preference.PAIRS if "chosen" in given else preference.kind_of(given)


def _preference(name: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Example:
    """A row whose columns hold preferences: a column alone is taken as it is, for it may be a chat."""
    values = {}
    for key in ("prompt", *preference.COLUMNS):
        text = options.get(key)
        if text is not None:
            alone = re.fullmatch(r"\{([^{}\[\]]+)\}", text)
            column = text if isinstance(text, columns.Plain) else alone[1] if alone else None
            values[key] = columns.fill(text, row) if column is None else columns.as_text(row[column])
    values, fields = preference.unfolded(values, f"row {name}")
    group = options.get("group")
    return Example(name, values["prompt"], values["response"], columns.fill(group, row) if group else name, **fields)


def _example(name: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Example:
    if _kind(options) != preference.PLAIN:
        return _preference(name, row, options)

    def fill(text: str) -> str:
        try:
            return columns.fill(text, row)
        except DataError as error:
            raise DataError(f"row {name}: {error}") from None

    choices = tuple(fill(text) for text in options.get("choices") or ())
    group, test = options.get("group"), options.get("check")
    if _by_layout(options):
        layout = _layout(name, row, options)
        if lacking := _lacking(layout):
            raise DataError(f"row {name}: missing {' and '.join(lacking)}; it has {', '.join(row)}")
        return Example(
            name, "" if layout.running else layout.values["prompt"], layout.values["response"],
            fill(group) if group else name, turns=layout.turns, tools=layout.tools,
        )  # fmt: skip
    if options.get("answer") is not None:
        number = fill(options["answer"])
        if not number.isdecimal() or int(number) >= len(choices):
            raise DataError(f"row {name}: dataset.options.answer gives {number!r}, not a number below {len(choices)}")
        response = choices[int(number)]
    else:
        response = fill(options["response"])
    return Example(
        name, fill(options["prompt"]), response, fill(group) if group else name,
        choices=tuple(dict.fromkeys(choices)), check=fill(test) if test else "",
    )  # fmt: skip


def _by_layout(options: Mapping[str, Any]) -> bool:
    """Whether nothing says what prompt and response are made of."""
    said = any(options.get(name) is not None for name in ("prompt", "response", "answer", "choices"))
    return not said and _kind(options) == preference.PLAIN


def _layout(name: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> conversation.Recognised:
    named = {key: text for key, text in options.items() if key in conversation.NAMES}
    try:
        return conversation.recognised(columns.mapped(row, named))
    except DataError as error:
        raise DataError(f"row {name}: {error}") from None


def _lacking(found: conversation.Recognised) -> list[str]:
    return [key for key in ("prompt", "response")[found.running :] if not isinstance(found.values.get(key), str)]


def read(spec: DatasetSpec) -> Tables:
    """The source's splits under our names.

    Raises:
        DataError: no such dataset, configuration or split; or no network and no copy in the local cache.
    """
    if spec.path is None:
        raise DataError(f"dataset={spec.name} needs dataset.path: a hub id such as openai/gsm8k, or a folder")
    require_extra("datasets", "hub", spec)
    datasets: Any = importlib.import_module("datasets")
    with _offline_if_unreachable(spec):
        try:
            source = datasets.load_dataset(
                str(Path(spec.path).expanduser()) if _is_local(spec) else spec.path,
                spec.options.get("config"),
                revision=None if _is_local(spec) else _revision(spec),
            )
        except ConnectionError:
            raise DataError(
                f"dataset={spec.name}: {spec.path} cannot be reached and is not in the local cache; "
                "use a dataset that needs no network (icd10_chapter, gsm_symbolic, jsonl) or a folder as dataset.path"
            ) from None
        except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"dataset={spec.name}: {spec.path} cannot be loaded: {first_line(error)}") from None
    names = spec.options.get("splits") or {split: split for split in SPLITS if split in source}
    missing = [f"{ours}: {theirs}" for ours, theirs in names.items() if theirs not in source]
    if missing or "train" not in names:
        wrong = f"has no split {', '.join(missing)}" if missing else "needs dataset.options.splits.train"
        raise DataError(f"dataset={spec.name}: {spec.path} {wrong}; it has {', '.join(map(str, source))}")
    tables = {ours: source[theirs] for ours, theirs in names.items()}
    _same_commit(spec, tables)
    return tables


def _revision(spec: DatasetSpec) -> str | None:
    """What is read: the commit, where it is known."""
    if (spec.content or "").startswith(COMMIT):
        return str(spec.content).removeprefix(COMMIT)
    revision = spec.options.get("revision")
    return None if revision is None else str(revision)


def _same_commit(spec: DatasetSpec, tables: Tables) -> None:
    """Raises DataError where the tables, which name what they were made of, are of another commit: an old cache's."""
    if _is_local(spec) or not (spec.content or "").startswith(COMMIT):
        return
    for rows in tables.values():
        made_of = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
        commits = {found[1] for url in made_of if (found := re.search("@([0-9a-f]{40})/", str(url)))}
        if commits and _revision(spec) not in commits:
            raise DataError(
                f"dataset={spec.name}: {spec.path} is commit {_revision(spec)} and the local cache of tables has "
                f"{', '.join(sorted(commits))}: load it once with network, or give dataset.options.revision"
            )


def _is_local(spec: DatasetSpec) -> bool:
    return Path(str(spec.path)).expanduser().exists()


@contextlib.contextmanager
def _offline_if_unreachable(spec: DatasetSpec) -> Iterator[None]:
    """One quick request first: without an answer only the local cache is asked, not the network five times over."""
    if _is_local(spec):
        yield
        return
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    datasets: Any = importlib.import_module("datasets")
    try:
        huggingface_hub.HfApi().dataset_info(str(spec.path), revision=spec.options.get("revision"), timeout=10)
    except HfHubHTTPError as error:
        raise DataError(f"dataset={spec.name}: the hub refuses {spec.path}: {first_line(error)}") from None
    except ValueError as error:
        raise DataError(f"dataset={spec.name}: {spec.path} is no folder and no hub id: {first_line(error)}") from None
    except Exception:  # whatever the HTTP library of the day raises when nothing answers
        before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
    else:
        yield


def _columns(spec: DatasetSpec, tables: Tables) -> None:
    options, called = _options(spec), {key: f"dataset.columns.{key}" for key in spec.columns}
    required = _known_layout(tables, options) if _by_layout(options) else _required(options)
    texts = [(key, options.get(key)) for key in dict.fromkeys((*required, "prompt", "group", "check"))]
    for key, text in [*texts, *(("choices", text) for text in options.get("choices") or ())]:
        if text is None and key not in required:
            continue
        name = called.get(key, f"dataset.options.{key}")
        if not isinstance(text, str):
            raise DataError(f"{name} is required, a text with column names in braces, got {text!r}{_shown(tables)}")
        for split, rows in tables.items():
            try:
                used = set(columns.names_in(text, rows.column_names))
            except DataError as error:
                raise DataError(f"{name}={error}") from None
            unknown = sorted(used - set(rows.column_names))
            if unknown:
                raise DataError(
                    f"{name} names the column {', '.join(unknown)}, which {split} of {spec.path} "
                    f"lacks; it has {', '.join(rows.column_names)}"
                )


def _known_layout(tables: Tables, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Looks at the first row of each split; what is to be said of a source whose layout is not known.

    Raises:
        DataError: a conversation that cannot be read.
    """
    for split, rows in tables.items():
        for row in itertools.islice(rows, 1):
            if _lacking(_layout(f"{split}-0", row, options)):
                return "prompt", "response"
    return ()


def _required(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that must name columns."""
    if (found := _kind(options)) == preference.PAIRS:
        return preference.PAIRED
    if found == preference.LABELS:
        return "prompt", *preference.UNPAIRED
    return "prompt", "response" if options.get("answer") is None else "answer"


def _shown(tables: Tables) -> str:
    """The columns that there are, for a message."""
    names = dict.fromkeys(name for rows in tables.values() for name in rows.column_names)
    return f"; the columns are {', '.join(names)}"


def _without_overlap(examples: list[Example], marked: Mapping[str, str]) -> list[Example]:
    """Test is kept whole; validation loses what test has, train what either has."""
    seen: set[tuple[str, str]] = set()
    kept: list[Example] = []
    for split in ("test", "validation", "train"):
        part = [
            e
            for e in examples
            if marked.get(e.id, "train") == split
            and ("group", e.group) not in seen
            and ("prompt", prompt_key(asked(e))) not in seen
        ]
        seen.update(("group", e.group) for e in part)
        seen.update(("prompt", prompt_key(asked(e))) for e in part)
        kept += part
    return kept
