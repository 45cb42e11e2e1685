"""What a model is given is looked at on the host: on a GPU an index out of range ends the process."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.models import BaseModel, learned_positions
from sweeper.spec import DatasetSpec
from sweeper.tasks import EncodedSplit, general_text
from sweeper.tasks.example import Encoded


def check(base: BaseModel, spec: DatasetSpec, splits: Mapping[str, EncodedSplit]) -> None:
    """Looks at every token of a dataset.

    Raises:
        DataError: a token that the model's embedding has no row for, or more tokens than it has learned positions.
    """
    for split in splits.values():
        _check(base, split.examples, lambda example: tasks.where(spec, example.id))


def check_general(base: BaseModel) -> None:
    """As `check`, of the general text."""
    found = general_text.encode(base.tokenizer, longest=learned_positions(base.spec))
    _check(base, found.examples, lambda example: f"evaluation.splits={general_text.SPLIT}: passage {example.id}")


def _check(base: BaseModel, examples: Iterable[Encoded], where: Callable[[Encoded], str]) -> None:
    embedding: Any = base.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    most = learned_positions(base.spec)
    for example in examples:
        for ids in (example.input_ids, *(choice.ids for choice in example.choices)):
            if ids and not 0 <= min(ids) <= max(ids) < rows:
                bad = next(one for one in ids if not 0 <= one < rows)
                token = base.tokenizer.convert_ids_to_tokens(bad) if bad >= 0 else None
                raise DataError(
                    f"{where(example)}: token {bad} ({token!r}) lies beyond the {rows} rows of the embedding of "
                    f"model={base.spec.name}: its tokenizer has {len(base.tokenizer)} tokens, so it belongs to another "
                    "model, or the embedding was not resized for tokens that were added"
                )
        longest = max([len(example.input_ids), *(len(example.question) + len(c.ids) for c in example.choices)])
        if most is not None and longest > most:
            raise DataError(
                f"{where(example)}: {longest} tokens, and model={base.spec.name} has learned {most} positions: choose "
                f"dataset.max_length={most} or less"
            )
