"""A base model on the device, and what runs on it have in common: tokenised data, scores of the base, probes."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from sweeper import methods, tasks
from sweeper.engine import probe
from sweeper.engine.batches import DataOrder
from sweeper.engine.context import Context
from sweeper.engine.evaluate import EvaluatedSplit
from sweeper.engine.events import Remark
from sweeper.engine.pack import Job
from sweeper.engine.progress import Prepared
from sweeper.engine.requests import RunRequest
from sweeper.engine.sharing import probe_key
from sweeper.models import BaseModel, budget, is_tied
from sweeper.models.architecture import Target, number_of_layers
from sweeper.ranks import allocation, importance, placement
from sweeper.spec import RunSpec


class Loaded:
    """A base model, under the `model_key` of its runs.

    Attributes:
        scores: dataset and evaluation -> split -> what the base model itself scores.
        remarks: what is to be said of its datasets, and has not been yet.
    """

    def __init__(self, base: BaseModel, key: str, context: Context) -> None:
        self.base, self.key, self.context = base, key, context
        self.scores: dict[str, dict[str, EvaluatedSplit]] = {}
        self.remarks: list[Remark] = []
        self._encoded: dict[str, dict[str, tasks.EncodedSplit]] = {}
        self._probes: dict[str, probe.Probe] = {}
        self._packed = False

    def prepare(self, request: RunRequest) -> Prepared:
        """A run with its modules, ranks and tokens.

        Raises:
            SweeperError, ValueError: it cannot be trained on this model.
        """
        base, spec = self.base, request.spec
        targets = placement.resolve(base.targets, spec.placement, layers=number_of_layers(base.targets))
        splits = self._splits(spec)
        probed = self._probe(spec, targets, splits)
        ranks = allocation.ranks(spec, targets, base.targets, None if probed is None else probed.scores)
        if (found := methods.placed(spec.method, targets, base.targets, tied=is_tied(base.model))) != targets:
            ranks = budget.uniform(found, spec.rank)
        examples = splits["train"].examples
        lengths = [len(example.input_ids) for example in examples]
        job = Job(
            run_id=request.run_id, adapter=methods.adapter(spec, ranks), optim=spec.optim,
            steps=spec.trainer.max_steps, seed=spec.seed, examples=examples,
            order=DataOrder(lengths, spec.trainer.batch_size, spec.seed),
        )  # fmt: skip
        return Prepared(request=request, job=job, ranks=ranks, splits=splits, probe=probed)

    def must_wait(self, spec: RunSpec) -> bool:
        """Whether a run needs a probe of the bare base model while a pack is on it."""
        return self._packed and self.unprobed(spec)

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
            )  # fmt: skip
            with self.context.timeline.span("probe"):
                self._probes[key] = probe.find(self.base, question, self.context.cache / "probes")
        return self._probes[key]

    def _splits(self, spec: RunSpec) -> dict[str, tasks.EncodedSplit]:
        key = repr(spec.dataset)
        if key not in self._encoded:
            model_key = f"{spec.model.source}:{spec.model.location}@{spec.model.revision}"
            self._encoded[key] = tasks.encode(
                spec.dataset, self.base.tokenizer, model_key=model_key, cache=self.context.cache / "tokens"
            )
            about = f"dataset={spec.dataset.name} on model={spec.model.name}"
            lines = tasks.remarks(spec.dataset, self.base.tokenizer, self._encoded[key])
            self.remarks += [Remark(message=f"{about}: {line}") for line in lines]
        return self._encoded[key]
