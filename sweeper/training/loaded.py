"""A base model on the device, and what runs on it have in common: tokenised data, scores of the base, probes."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from sweeper import identity, methods, models, objectives, tasks
from sweeper.device import precision_name
from sweeper.errors import ModelError
from sweeper.models import BaseModel, is_tied
from sweeper.models.architecture import Target, number_of_layers
from sweeper.objectives import longest
from sweeper.objectives.objective import Row
from sweeper.placement import importance, placement
from sweeper.run import Run
from sweeper.spec import RunSpec, alone
from sweeper.tasks import general_text
from sweeper.tasks.example import Tokens
from sweeper.tasks.mixture import Mixing, by_part
from sweeper.training import export_proof, generate, inputs, probe, reference, texts
from sweeper.training.batches import DataOrder
from sweeper.training.context import Context
from sweeper.training.events import Remark, Stage
from sweeper.training.mixing import MixedOrder, Mixture
from sweeper.training.run_state import EvaluatedSplit, ExportProof, RunState
from sweeper.training.sharing import probe_key


class Loaded:
    """A base model, under the `model_key` of its runs.

    Attributes:
        content: what its files held when it was loaded (`sweeper.content`).
        scores: dataset and evaluation -> split -> what the base model itself scores.
        routes: dataset of several tasks -> task -> which task each of its test examples is taken for.
    """

    def __init__(self, base: BaseModel, key: str, context: Context, content: str | None) -> None:
        self.base, self.key, self.context, self.content = base, key, context, content
        self.scores: dict[str, dict[str, EvaluatedSplit]] = {}
        self.routes: dict[str, dict[str, list[int]]] = {}
        self._encoded: dict[str, dict[str, tasks.EncodedSplit]] = {}
        self._lengths_of: dict[str, list[int]] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._contents: dict[str, str | None] = {}
        self._mixtures: dict[str, Mixture] = {}
        self._probes: dict[str, probe.Probe] = {}
        self._exports: dict[str, ExportProof] = {}
        self._rows_of: dict[str, Sequence[Sequence[Tokens]]] = {}
        self._references: dict[bytes, float] = {}
        self._packed = self._general = False

    def prepare(self, run: Run) -> RunState:
        """A run with its modules, ranks and tokens, ready for a slot.

        Raises:
            SweeperError, ValueError: it cannot be trained on this model.
        """
        base, spec = self.base, run.spec
        targets = placement.resolve(base.targets, spec.placement, layers=number_of_layers(base.targets))
        splits = self._splits(spec)
        probed = self._probe(spec, targets, splits)
        scores = None if probed is None else probed.scores
        ranks = methods.module_ranks(spec, base.targets, tied=is_tied(base.model), scores=scores)
        examples = splits["train"].examples
        mixture = self._mixture(spec, splits["train"])
        return RunState(
            run=run, adapter=methods.adapter(spec, ranks), examples=examples, rows=self._rows(spec, examples),
            order=self._order(spec, examples, mixture), mixture=mixture,
            ranks=methods.trained_ranks(spec, ranks), splits=splits, texts=self._texts[repr(spec.dataset)],
            probe=probed, exported=self._export(spec, ranks), precision=precision_name(base.model.dtype),
            content={"model": self.content, "dataset": self._contents[repr(spec.dataset)]},
        )  # fmt: skip

    def must_wait(self, spec: RunSpec) -> bool:
        """Whether a run needs the bare base model, for a probe or a proof, while a pack is on it."""
        unproved = export_proof.key_of(alone(spec)) not in self._exports
        return self._packed and (self.unprobed(spec) or unproved or self._unscored(spec))

    def _unscored(self, spec: RunSpec) -> bool:
        """Whether the base model is yet to score the rows that a run's objective compares with it."""
        return objectives.of(spec.objective).reference and repr((spec.dataset, spec.objective)) not in self._rows_of

    def unprobed(self, spec: RunSpec) -> bool:
        """Whether a run needs a probe that there has not been yet."""
        return spec.allocation.name == importance.NAME and probe_key(spec) not in self._probes

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Within it a pack is on the base model."""
        self._packed = True
        try:
            yield
        finally:
            self._packed = False

    def _probe(
        self, spec: RunSpec, targets: Sequence[Target], splits: Mapping[str, tasks.EncodedSplit]
    ) -> probe.Probe | None:
        """What allocates a run's ranks by importance; None where nothing has to be probed."""
        asked = importance.probing(spec)
        if asked is None:
            return None
        key = probe_key(spec)
        if key not in self._probes:
            assert not self._packed  # the base must be bare
            question = probe.Question(
                asked=asked, targets=probe.probed(self.base, targets), examples=splits["train"].examples,
                batch_size=spec.trainer.batch_size, seed=spec.seed if asked.seed is None else asked.seed,
                accumulation=spec.trainer.accumulation,
            )  # fmt: skip
            with self.context.timeline.span("probe"):
                self._probes[key] = probe.find(self.base, question, self.context.cache / "probes")
        return self._probes[key]

    def _export(self, spec: RunSpec, ranks: Mapping[Target, int]) -> ExportProof:
        """How what the run leaves will be loaded.

        Raises:
            ModelError: the model does not call a module that the run adapts.
        """
        spec = alone(spec)  # each task's blocks are saved as an ordinary adapter
        key = export_proof.key_of(spec)
        if key not in self._exports:
            assert not self._packed  # the base must be bare
            with self.context.timeline.span("prove"):
                self._exports[key] = export_proof.find(self.base, spec, ranks, self.context.cache / "exports")
        found = self._exports[key]
        if found.unreached:
            some = ", ".join(found.unreached[:3])
            raise ModelError(
                f"placement={spec.placement.name}: model={spec.model.name} does not call {some} as modules, so an "
                "adapter there would change nothing. Leave them out with placement=custom or placement.layers."
            )
        return found

    def _mixture(self, spec: RunSpec, train: tasks.EncodedSplit) -> Mixture | None:
        """Which of its tasks a run of several sees when; runs of as many steps on a dataset share it."""
        if not train.parts:
            return None
        steps, per_step = spec.trainer.max_steps, spec.trainer.batch_size * spec.trainer.accumulation
        key = repr((spec.dataset, steps, per_step))
        if key not in self._mixtures:
            sizes = {name: len(part.examples) for name, part in train.parts.items()}
            self._mixtures[key] = Mixture.of(Mixing.of(spec.dataset), sizes, steps=steps, per_step=per_step)
        return self._mixtures[key]

    def _order(
        self, spec: RunSpec, examples: Sequence[tasks.Encoded], mixture: Mixture | None
    ) -> DataOrder | MixedOrder:
        lengths, trainer = self._lengths(spec, examples), spec.trainer
        if mixture is None:
            return DataOrder(lengths, trainer.batch_size, spec.seed, accumulation=trainer.accumulation)
        return MixedOrder(lengths, mixture, spec.seed, batch_size=trainer.batch_size, accumulation=trainer.accumulation)

    def _lengths(self, spec: RunSpec, examples: Sequence[tasks.Encoded]) -> list[int]:
        """Tokens of the longest row that each training example may become, so that objectives see the same order."""
        key = repr((spec.dataset, spec.objective))
        if key not in self._lengths_of:
            rows = self._rows(spec, examples)
            self._lengths_of[key] = [longest(example, own) for example, own in zip(examples, rows, strict=True)]
        return self._lengths_of[key]

    def _rows(self, spec: RunSpec, examples: Sequence[tasks.Encoded]) -> Sequence[Sequence[Tokens]]:
        """The token rows of each training example; runs of one objective on a dataset share them."""
        key = repr((spec.dataset, spec.objective))
        if key not in self._rows_of:
            objective = objectives.of(spec.objective)
            rows = objective.rows_of(examples)
            if objective.reference:
                assert not self._packed  # the base must be bare
                self.context.emit(Stage(message=f"scoring {spec.dataset.name} with the base model"))
                with self.context.timeline.span("score the base"):
                    rows = self._referenced(rows)
            self._rows_of[key] = rows
        return self._rows_of[key]

    def _referenced(self, rows: Sequence[Sequence[Tokens]]) -> list[Sequence[Tokens]]:
        """The rows with the base model's own log-likelihoods filled in; each is worked out once for all objectives."""
        every = {reference.key_of(row): row for own in rows for row in own}
        new = {key: row for key, row in every.items() if key not in self._references}
        if new:
            identity, cache = f"{self.key} {self.content}", self.context.cache / "references"
            found = reference.find(self.base, identity, list(new.values()), cache)
            self._references |= dict(zip(new, found, strict=True))
        known = self._references
        return [
            tuple(replace(row, reference=known[reference.key_of(row)]) for row in own if isinstance(row, Row))
            for own in rows
        ]

    def _splits(self, spec: RunSpec) -> dict[str, tasks.EncodedSplit]:
        key = repr(spec.dataset)
        if key not in self._encoded:
            self._contents[key] = identity.confirmed(spec.dataset)
            model_key = models.tokens_key(spec.model)
            found = tasks.encode(
                spec.dataset, self.base.tokenizer, model_key=model_key, cache=self.context.cache / "tokens"
            )
            for part in spec.dataset.parts or (spec.dataset,):
                of_part = {name: split.parts.get(part.name, split) for name, split in found.items()}
                inputs.check(self.base, part, of_part)
            self._encoded[key] = found
            keep = self.context.settings.keep_texts
            self._texts[key] = texts.of_splits(by_part(found), self.base.tokenizer) if keep else {}
            about = f"dataset={spec.dataset.name} on model={spec.model.name}"
            lines = tasks.remarks(spec.dataset, self.base.tokenizer, found)
            slow = (generate.remark(self.base, part, spec.evaluation) for part in spec.dataset.parts or (spec.dataset,))
            lines = list(dict.fromkeys([*lines, *(line for line in slow if line is not None)]))
            for line in lines:
                self.context.emit(Remark(message=f"{about}: {line}"))
        if general_text.SPLIT in spec.evaluation.splits and not self._general:
            inputs.check_general(self.base)
            self._general = True
        return self._encoded[key]
