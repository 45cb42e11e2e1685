"""How many tokens a run's steps will see, from the lengths of its training examples, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sweeper import models, objectives, tasks
from sweeper.cache import cache_folder
from sweeper.errors import SweeperError
from sweeper.spec import DatasetSpec, RunSpec
from sweeper.tasks.mixture import Mixing
from sweeper.training.batches import DataOrder
from sweeper.training.mixing import MixedOrder, Mixture

if TYPE_CHECKING:
    from sweeper.tasks.example import EncodedSplit

CHARACTERS = 4.5  # of a token, where there is no tokenizer yet: of English text; of code it is fewer
DRAWN = 500_000  # examples of a run that are looked up one by one; of more, their mean is taken

How = Literal["counted", "sampled", "characters", "assumed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a run's training examples, and of all rows that its steps see.

    Attributes:
        tokens: of all steps, prompts and answers, padding not counted. rows: sequences of all steps.
        longest: no training example is longer.
        how: counted: of the very examples that the run draws, as its record will have it. sampled: from the mean of
            some. characters: from how much text there is. assumed: every example is `dataset.max_length` long.
    """

    tokens: int
    rows: int
    longest: int
    how: How

    @property
    def mean(self) -> int:
        """Tokens of a sequence."""
        return max(1, round(self.tokens / max(self.rows, 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One task: tokens and rows of each example that was looked at."""

    tokens: Sequence[int]
    longest: Sequence[int]
    rows: int
    how: How


class Reader:
    """Lengths of runs; datasets are read once for each model, and data orders drawn once for runs that share one."""

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}
        self._lengths: dict[str, Lengths] = {}

    def of(self, spec: RunSpec) -> Lengths:
        trainer = spec.trainer
        draws = trainer.max_steps, trainer.batch_size, trainer.accumulation, spec.seed
        key = repr((spec.model, spec.dataset, spec.objective, draws))
        if key not in self._lengths:
            self._lengths[key] = self._find(spec)
        return self._lengths[key]

    def _find(self, spec: RunSpec) -> Lengths:
        parts = [self._part(spec, one) for one in spec.dataset.parts or (spec.dataset,)]
        drawn = spec.trainer.max_steps * spec.trainer.batch_size * spec.trainer.accumulation
        how: How = next(
            (how for how in ("assumed", "characters", "sampled") if how in [one.how for one in parts]), "counted"
        )
        most = max((max(one.longest, default=1) for one in parts), default=1)
        longest = most if how == "counted" else spec.dataset.max_length
        rows = parts[0].rows
        if how == "counted" and drawn <= DRAWN:
            tokens = [count for one in parts for count in one.tokens]
            seen = _order(spec, parts)
            total = sum(
                tokens[i] for n in range(spec.trainer.max_steps * spec.trainer.accumulation) for i in seen.batch(n)
            )
            return Lengths(tokens=total, rows=drawn * rows, longest=longest, how=how)
        mean = sum(sum(one.tokens) / max(len(one.tokens), 1) for one in parts) / len(parts)
        return Lengths(
            tokens=round(drawn * mean), rows=drawn * rows, longest=longest, how="sampled" if how == "counted" else how
        )

    def _part(self, spec: RunSpec, dataset: DatasetSpec) -> _Part:
        key = repr((spec.model, dataset, spec.objective))
        if key not in self._parts:
            self._parts[key] = _look(spec, dataset)
        return self._parts[key]


def _look(spec: RunSpec, dataset: DatasetSpec) -> _Part:
    """The lengths of a task's training examples as they can be told now, without weights and without the network."""
    try:
        if not models.tokenizer_at_hand(spec.model):
            texts = tasks.load(dataset)["train"]
            guess = [_tokens_in(len(one.prompt) + len(one.response), dataset) for one in texts]
            return _Part(tokens=guess, longest=guess, rows=1, how="characters")
        split, whole = tasks.training_sample(
            dataset, models.tokenizer_of(spec.model), model_key=models.tokens_key(spec.model),
            cache=cache_folder() / "tokens",
        )  # fmt: skip
    except (SweeperError, OSError):  # training meets it again and says what is wrong
        return _Part(tokens=[dataset.max_length], longest=[dataset.max_length], rows=1, how="assumed")
    return _of_rows(spec, split, whole)


def _of_rows(spec: RunSpec, split: "EncodedSplit", whole: bool) -> _Part:
    rows = objectives.of(spec.objective).rows_of(split.examples)
    lengths = [[len(row.input_ids) for row in own] for own in rows]
    longest = [objectives.longest(example, own) for example, own in zip(split.examples, rows, strict=True)]
    return _Part(
        tokens=list(map(sum, lengths)), longest=longest, rows=len(lengths[0]),
        how="counted" if whole else "sampled",
    )  # fmt: skip


def _tokens_in(characters: int, dataset: DatasetSpec) -> int:
    return min(dataset.max_length, 1 + round(characters / CHARACTERS))


def _order(spec: RunSpec, parts: Sequence[_Part]) -> DataOrder | MixedOrder:
    """The data order of the run, as `sweeper.training.loaded` makes it."""
    trainer, lengths = spec.trainer, [length for one in parts for length in one.longest]
    if not spec.dataset.parts:
        return DataOrder(lengths, trainer.batch_size, spec.seed, accumulation=trainer.accumulation)
    sizes = {own.name: len(one.tokens) for own, one in zip(spec.dataset.parts, parts, strict=True)}
    mixture = Mixture.of(
        Mixing.of(spec.dataset), sizes, steps=trainer.max_steps, per_step=trainer.batch_size * trainer.accumulation
    )
    return MixedOrder(lengths, mixture, spec.seed, batch_size=trainer.batch_size, accumulation=trainer.accumulation)
