"""A base model with a library on it: what can be measured of a router there.

Shapes: K members, R sequences, T tokens.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sweeper import models, tasks
from sweeper.adapters.library import experts
from sweeper.adapters.library.experts import Experts, Folded, Gated, Installed, Router
from sweeper.cache import cache_folder
from sweeper.models import BaseModel
from sweeper.rescoring.rescore import Saved
from sweeper.spec import DatasetSpec
from sweeper.tasks.example import Encoded, EncodedSplit
from sweeper.training.batches import collate, mean_weights
from sweeper.training.evaluate import CPU_TOKENS, CUDA_TOKENS, evaluate_examples, joined
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.routing import features
from sweeper.training.run_state import EvaluatedSplit
from sweeper.training.score import score

TIMED, REPEATS = 32, 3  # examples of a timing, and how often it is repeated


@dataclass(frozen=True)
class Task:
    """A dataset that rules are scored on, and its splits in the base model's tokens."""

    dataset: DatasetSpec
    splits: Mapping[str, EncodedSplit]


@dataclass(frozen=True)
class ByExample:
    """A member for each example, by the example's id; each goes through that member's adapter alone."""

    chosen: Mapping[str, int]
    adapters: Sequence[Folded]


@dataclass
class Bench:
    """The members of a library on their base model, until `close`.

    Attributes:
        mask: where the rows [R, T] of the present pass are text, within `pass_over` and `loss`.
        centres: of the members' training prompts, once `centroid` has looked at them.
    """

    base: BaseModel
    members: Sequence[Saved]
    mask: Tensor | None = None
    centres: Tensor | None = None
    _encoded: dict[str, dict[str, EncodedSplit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = experts.read(self.base, self.members)
        # the engine's way of scoring a bare base model, which will have these modules in it
        self.pack = Pack(self.base, [{}], PackConfig(batch_size=1))
        self.installed = Installed(self.base, found)
        self.budget = CUDA_TOKENS if self.pack.device.type == "cuda" else CPU_TOKENS

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the base model back as it was."""
        self.pack.close()
        self.installed.close()

    @property
    def experts(self) -> list[Experts]:
        """By module, in the base's order."""
        return [module.experts for module in self.installed.modules.values()]

    def alone(self, member: int) -> Folded:
        """One member's adapter."""
        return Folded({one.target.name: one.of(member) for one in self.experts if bool(one.present_K[member])})

    def task(self, dataset: DatasetSpec) -> Task:
        """A dataset in the base model's tokens."""
        key = repr(dataset)
        if key not in self._encoded:
            self._encoded[key] = tasks.encode(
                dataset, self.base.tokenizer, model_key=models.tokens_key(self.members[0].spec.model),
                cache=cache_folder() / "tokens",
            )  # fmt: skip
        return Task(dataset, self._encoded[key])

    def evaluate(
        self, router: Router | ByExample | None, examples: Sequence[Encoded], dataset: DatasetSpec, *, generation: bool
    ) -> EvaluatedSplit:
        """The scores of examples through a router: NLL and the dataset's metrics.

        Args:
            generation: whether metrics are computed that need generated text.
        """
        if isinstance(router, ByExample):
            parts = [
                self.evaluate(
                    router.adapters[k], [e for e in examples if router.chosen[e.id] == k], dataset,
                    generation=generation,
                )
                for k in sorted({router.chosen[example.id] for example in examples})
            ]  # fmt: skip
            return joined(examples, parts, [self._response(example) for example in examples])
        self.installed.use(router)
        (found,) = evaluate_examples(
            self.pack, [-1], examples, dataset, generation=generation, exact_match="exact_match" in dataset.metrics
        )
        return found

    def nll(self, router: Router | None, examples: Sequence[Encoded]) -> float:
        """Mean NLL of the response tokens, in nats."""
        self.installed.use(router)
        (scores,) = score(self.pack, [-1], examples, budget=self.budget)
        return sum(one.nll for one in scores) / sum(one.tokens for one in scores)

    def loss(self, router: Router, examples: Sequence[Encoded]) -> Tensor:
        """As `nll`, of one forward pass and differentiable in what the router learns."""
        self.installed.use(router)
        with self.pack.evaluating():
            self.pack.use_lanes([-1])
            batch = collate([examples], [mean_weights(examples)], fixed=False).to(self.pack.device)
            hidden = self._hidden(batch.ids, batch.lengths)
            rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.index.flatten())
            losses, _ = self.pack.head.scores(rows, batch.targets, batch.weights)
        return losses.sum()

    @torch.no_grad()
    def pass_over(self, router: Router | None, examples: Sequence[Encoded]) -> None:
        """Forward passes over examples, without a head."""
        self.installed.use(router)
        order = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
        with self.pack.evaluating():
            self.pack.use_lanes([-1])
            while order:
                count = max(1, self.budget // len(order[0].input_ids))
                part, order = order[:count], order[count:]
                batch = collate([part], [[1.0] * len(part)], fixed=False).to(self.pack.device)
                self._hidden(batch.ids, batch.lengths)

    def top(self, router: Gated, examples: Sequence[Encoded]) -> Tensor | None:
        """Share of tokens and modules at which each member has the largest gate, [K]; where several adapt a module.

        None where no two members adapt the same module.
        """
        counts = torch.zeros(len(self.members), dtype=torch.int64, device=self.pack.device)

        def see(one: Experts, gates: Tensor) -> None:
            mask = self.mask
            alike = mask is not None and gates.shape[:-1] == mask.shape  # a mixture's experts see some tokens only
            if alike and int(one.present_K.sum()) > 1:
                counts.add_(torch.bincount(gates.argmax(-1)[mask], minlength=len(counts)))

        former, router.seen = router.seen, see
        try:
            self.pass_over(router, examples)
        finally:
            router.seen = former
        return (counts / counts.sum()).cpu() if int(counts.sum()) else None

    def seconds(
        self, router: Router | ByExample | None, beside: Router, examples: Sequence[Encoded]
    ) -> tuple[float, float]:
        """Seconds a token of forward passes without a head, of a router and of what it is compared with.

        Medians of several passes over up to `TIMED` examples, in turns, so that a slower moment is one of both.
        """
        chosen = list(examples)[:TIMED]
        taken: tuple[list[float], list[float]] = ([], [])
        for repeat in range(REPEATS + 1):
            for one, found in zip((router, beside), taken, strict=True):
                began = time.perf_counter()
                self._pass(one, chosen)
                if repeat:  # the first warms up
                    found.append(time.perf_counter() - began)
        tokens = sum(len(example.input_ids) for example in chosen)
        return statistics.median(taken[0]) / tokens, statistics.median(taken[1]) / tokens

    def _pass(self, router: Router | ByExample | None, examples: Sequence[Encoded]) -> None:
        if isinstance(router, ByExample):
            self.installed.use(None)
            features(self.pack, examples, budget=self.budget)
            for k in sorted({router.chosen[example.id] for example in examples}):
                self.pass_over(router.adapters[k], [e for e in examples if router.chosen[e.id] == k])
        else:
            self.pass_over(router, examples)
        if self.pack.device.type == "cuda":
            torch.cuda.synchronize(self.pack.device)

    def _hidden(self, ids_RT: Tensor, lengths_R: Tensor) -> Tensor:
        self.mask = torch.arange(ids_RT.shape[1], device=ids_RT.device) < lengths_R[:, None]
        try:
            return self.pack.hidden(ids_RT, lengths_R)
        finally:
            self.mask = None

    def _response(self, example: Encoded) -> str:
        decode: Any = self.base.tokenizer.decode
        return str(decode(example.answer, skip_special_tokens=True))
