"""Runs that train together on one frozen base: slots, lanes and the step.

The rows of the runs lie one after another in the batch; every frozen module runs once over all of them, an adapted one
adds each run's own low-rank product. Losses are per run and their sum is backpropagated; adapters are disjoint, so
the gradients are those of runs alone.
"""

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sweeper import lost
from sweeper.fused.decoder import Decoder, known
from sweeper.fused.rows import Rows
from sweeper.lora import gating, noise, surgery
from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.optimizer import IDLE, LR
from sweeper.lora.seeds import for_rows
from sweeper.lora.slot_store import SlotStore
from sweeper.lora.store import AdapterStore
from sweeper.lora.surgery import TaskGradients
from sweeper.lora.trainee import UnpackedSpec
from sweeper.lora.transfer import Fetched, fetch
from sweeper.lora.unpacked import UnpackedStore
from sweeper.models import BaseModel, hidden_size
from sweeper.models.attention import training_kernel
from sweeper.models.forward import hidden_states
from sweeper.models.loss import Head
from sweeper.objectives.nll import NLL
from sweeper.objectives.objective import Objective, Outputs
from sweeper.tasks.example import Tokens
from sweeper.training.batches import Batch, collate, supervised, tokens_of
from sweeper.training.capture import SCORE_COSTS, STEP_COSTS, CapturedStep, LaneCounts
from sweeper.training.compilation import compile_layers, decoder_layers, eager, uncompile_layers
from sweeper.training.pack_config import PackConfig
from sweeper.training.passes import Pass, passes, weights
from sweeper.training.run_state import RunState, StepResult
from sweeper.training.weighing import IDLE as UNSEEN
from sweeper.training.weighing import STATE, LearntWeights, hyperparameters


@dataclass
class _Pending:
    """Steps of some states: slot, state, step, learning rate, tokens of answers and of all rows.

    `values` are losses by lane, then norms by slot.

    `variances` are what log variances of tasks are after it, by slot; None where no run of the pack learns any.
    `one_off` are the host's seconds if it compiled or captured, else 0.
    """

    states: list[tuple[int, RunState, int, float, int, int]]
    lanes: int
    values: Fetched
    one_off: float
    variances: Fetched | None = None


class Pack:
    """Slots on one base model.

    Args:
        base: the frozen model; its modules are wrapped until `close`.
        capacities: for each slot, module name -> the highest rank it may hold, or what else it may hold; or the one run
            that has a model to itself.
    """

    def __init__(
        self, base: BaseModel, capacities: Sequence[Capacity | Mapping[str, int]] | UnpackedSpec, config: PackConfig
    ) -> None:
        self.base, self.config = base, config
        self.device, self.dtype = next(base.model.parameters()).device, next(base.model.parameters()).dtype
        self.store: SlotStore
        packed = not isinstance(capacities, UnpackedSpec)
        # before there are adapters: the bare model is what it is compared with
        fusible = packed and self._may_be_fused and known(base.model)
        if isinstance(capacities, UnpackedSpec):
            self.store = UnpackedStore(base, capacities, self.device)
        else:
            self.store = adapters = AdapterStore(base.model, base.targets, capacities, self.device)
            adapters.install()
        try:
            self._set_up()
            self.decoder = Decoder(base.model, coded=config.fp8) if fusible and self.store.able.graphs else None
        except BaseException:
            self.store.close()  # or the next pack would be put on top of this one
            raise

    def _set_up(self) -> None:
        config = self.config
        self.task = 0  # of the runs in slots that tell tasks apart, where a batch does not say
        self.sound = True  # whether every run is where its steps say, so that what it is can be kept
        self.states: list[RunState | None] = [None] * self.store.slots
        self.pending: deque[_Pending] = deque()
        self.weighing = LearntWeights(self.store.slots, self.device)
        self.surgery: TaskGradients | None = None
        if config.by_task:
            assert isinstance(self.store, AdapterStore)
            self.surgery = TaskGradients(self.store, config.by_task[0])
        self._lane_slots: dict[int, Tensor] = {}
        self._bare_lanes: dict[int, Tensor] = {}
        self._projections: dict[int, Tensor] = {}
        able = self.device.type == "cuda" and self.store.able.graphs
        self.compiled = config.compiled and able and self.store.able.compiles
        self._checkpoint_activations(config.checkpointing)
        if self.compiled:
            compile_layers(self.model, dynamic=True if config.lengths_vary else None)
        captures = able and (config.compiled or config.captured)
        self.captured = CapturedStep(self.forward_backward) if captures else None
        self.captured_scores = None if self.captured is None else CapturedStep(self._scores)
        values = len(decoder_layers(self.model)) * hidden_size(self.model)
        self._step_lanes, self._score_lanes = (
            LaneCounts(len(self.states), recording=by_layer * len(decoder_layers(self.model)), token=by_value * values)
            for by_layer, by_value in (STEP_COSTS, SCORE_COSTS)
        )
        self.store.lanes.apart = self.apart
        self._lengths: Tensor | None = None
        self._noise = self.model.get_input_embeddings().register_forward_hook(self._add_noise)
        self.model.train()

    def close(self) -> None:
        """Gives the base model back as it was."""
        self.captured = self.captured_scores = None
        if self.compiled:
            uncompile_layers(self.model)
        self._checkpoint_activations(False)
        self._noise.remove()
        self.store.close()
        self.model.eval()

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and lost.is_sign(error):
            lost.hold(self, error)
        else:
            self.close()

    @property
    def _may_be_fused(self) -> bool:
        """In float32 the kernels, which multiply exactly, are slower than the model's own layers."""
        narrow = self.device.type == "cuda" and self.dtype.itemsize == 2
        return self.config.fused and narrow and not self.config.checkpointing

    def compacts(self, rows: Iterable[Tokens]) -> bool:
        """Whether a batch of these examples can be compact, which only the decoder of our own reads."""
        lanes = self.store.lanes
        if self.decoder is None or lanes.forms or lanes.gated or lanes.routed or (self.model.training and lanes.draws):
            return False
        return max((len(row.input_ids) for row in rows), default=0) <= self.decoder.longest

    @property
    def active(self) -> list[tuple[int, RunState]]:
        return [(slot, state) for slot, state in enumerate(self.states) if state is not None]

    @property
    def model(self) -> Any:
        """What is trained: the base model, or a twin of it."""
        return self.store.model

    @property
    def head(self) -> Head:
        """The head of the model that the present lanes run through."""
        return Head.of(self.store.serving.model, self.base.verdict.head)

    def free_slot(self, adapter: AdapterSpec | UnpackedSpec) -> int | None:
        """A slot that is empty and can hold an adapter of these ranks, or None."""
        for slot, state in enumerate(self.states):
            if state is None and self.store.fits(slot, adapter):
                return slot
        return None

    def add(self, state: RunState, slot: int | None = None) -> int:
        """Puts a run in a slot, fresh or from `state.weights`. The other slots are not touched."""
        slot = self.free_slot(state.adapter) if slot is None else slot
        if slot is None or self.states[slot] is not None or not self.store.fits(slot, state.adapter):
            raise ValueError(f"no free slot can hold run {state.run_id}")
        kept = dict(state.weights or {})
        variances = kept.pop(STATE, None)
        self.store.assign(slot, state.adapter, kept or None, state.done)
        self.weighing.assign(slot, state.mixture.learns if state.mixture else 0, variances)
        if self.surgery is not None:
            self.surgery.assign(slot, state.adapter.blocks if isinstance(state.adapter, AdapterSpec) else ())
        self.states[slot] = state
        return slot

    def remove(self, slot: int) -> RunState:
        """Takes the run out of its slot."""
        state = self.states[slot]
        assert state is not None
        self.states[slot] = None
        self.store.release(slot)
        self.weighing.release(slot)
        return state

    def snapshot(self, slot: int) -> dict[str, tuple[Tensor, ...]]:
        """What the run of a slot has learnt, on the host: with `state.done`, all that resuming needs."""
        return self.store.snapshot(slot) | self.weighing.snapshot(slot)

    @property
    def state_bytes(self) -> int:
        """Memory of what is trained and kept of it, beyond the weights of `model`."""
        return self.store.state_bytes + (0 if self.surgery is None else self.surgery.bytes)

    def step(self) -> None:
        """One optimiser step of every run that is neither finished nor halted. Results come from `drain`."""
        moving = [(slot, state) for slot, state in self.active if not (state.finished or state.halted)]
        if not moving:
            return
        moving.sort(key=lambda entry: repr(entry[1].spec.objective))  # lanes of one objective lie side by side
        began = time.perf_counter()
        every = passes([state for _, state in moving], self.config)
        targets = [sum(supervised(one.rows[lane]) for one in every) for lane in range(len(moving))]
        seen = [sum(tokens_of(one.rows[lane]) for one in every) for lane in range(len(moving))]
        weighed = [weights(state, lane, every) for lane, (_, state) in enumerate(moving)]
        count = self._count_lanes([one.rows for one in every])
        self.use_lanes([slot for slot, _ in moving], count)
        losses = self._losses(moving, every, weighed, count)
        if self.surgery is not None:
            seeds = {slot: (state.seed, state.done) for slot, state in moving}
            self.surgery.combine([
                surgery.order(*seeds[slot], self.surgery.tasks) if slot in seeds else None
                for slot in range(len(self.states))
            ])  # fmt: skip
        rows = {slot: state.hyperparameters() for slot, state in moving}
        self.sound = False
        if self.weighing.active:
            learnt = {slot: _of_variances(state) for slot, state in moving}
            losses = losses + self.weighing.step(learnt, self.store.lanes.slots)
        norms = self.store.update(rows, {slot: state.done + 1 for slot, state in moving})
        entries = []
        for (slot, state), own, total in zip(moving, targets, seen, strict=True):
            state.done += 1
            state.tokens += own
            rate = max(row[LR] for row in rows[slot] if row is not IDLE)  # of several rank blocks the highest
            entries.append((slot, state, state.done, rate, own, total))
        one_off = time.perf_counter() - began if self.warming else 0.0
        variances = fetch(self.weighing.state[0].clone()) if self.weighing.active else None
        values = fetch(torch.cat([losses, norms]))
        self.pending.append(_Pending(entries, len(losses), values, one_off, variances))
        self.sound = True

    def drain(self, *, but: int = 0) -> Iterator[StepResult]:
        """Results of the steps since the last call, in order, except the last `but` steps. Waits for the device."""
        while len(self.pending) > but:
            entry = self.pending.popleft()
            values = entry.values.wait().tolist()
            losses, norms = values[: entry.lanes], values[entry.lanes :]
            variances = None if entry.variances is None else entry.variances.wait().tolist()
            for lane, (slot, state, step, lr, tokens, total) in enumerate(entry.states):
                learns = state.mixture.learns if variances and state.mixture else 0
                own = tuple(variances[slot][:learns]) if variances and learns else ()
                share = entry.one_off / len(entry.states)
                yield StepResult(state, step, losses[lane], lr, norms[slot], tokens, total, share, own)

    def _losses(
        self, moving: Sequence[tuple[int, RunState]], every: Sequence[Pass],
        weighed: Sequence[Sequence[tuple[list[float], list[float]]]], count: int,
    ) -> Tensor:  # fmt: skip
        """Losses [L] of the passes of a step; their gradients are in the store, or set aside by task."""
        losses = None
        for number, one in enumerate(every):
            if one.task is None or not one.empty:
                self._seed_dropout(moving, one.before)
                heavy, shares = zip(*(own[number] for own in weighed), strict=True)
                compact = self.compacts(row for lane in one.rows for row in lane)
                batch = collate(
                    one.rows, heavy, fixed=self.captured is not None, count=count, tasks=one.tasks, shares=shares,
                    compact=compact,
                )  # fmt: skip
                part = self._micro_step(batch)
                losses = part if losses is None else losses + part
            if self.surgery is not None and one.ends:
                assert one.task is not None
                self.surgery.keep(one.task)
        assert losses is not None
        return losses

    def _count_lanes(self, chosen: Sequence[Sequence[Sequence[Tokens]]]) -> int:
        """Lanes for a step of these examples, by forward pass and run."""
        runs = len(chosen[0])
        if self.captured is None:
            return runs
        longest = max(len(example.input_ids) for run in chosen[0] for example in run)
        tokens = len(chosen) * max(map(len, chosen[0])) * longest
        return self._step_lanes.choose(runs, tokens, self.captured.shapes)

    def lanes_to_score(self, runs: int, examples: Sequence[Tokens]) -> int:
        """Lanes for scoring examples for so many runs: some are empty where recorded passes can then be used again."""
        if self.captured_scores is None:
            return runs
        tokens = sum(len(example.input_ids) for example in examples)
        return self._score_lanes.choose(runs, tokens, self.captured_scores.shapes)

    def use_lanes(self, slots: Sequence[int], count: int | None = None) -> None:
        """Says which slot each lane of the coming batch belongs to; -1, or none given, is the bare base model."""
        slots = [*slots, *[-1] * ((count or len(slots)) - len(slots))]
        lanes = self.store.lanes
        if tuple(slots) != lanes.host_slots:
            lanes.host_slots = tuple(slots)
            # one tensor for each number of lanes: a captured step goes on reading the one it was recorded with
            held = self._lane_slots.setdefault(
                len(slots), torch.empty(len(slots), dtype=torch.int32, device=self.device)
            )
            lanes.slots = held.copy_(torch.tensor(list(slots), dtype=torch.int32), non_blocking=True)
            self._bare_lanes.setdefault(len(slots), torch.full_like(held, -1))
        if lanes.gated:
            lanes.gate_rows = self._gate_rows(torch.full((len(slots),), self.task, device=self.device))

    def _gate_rows(self, tasks: Tensor) -> Tensor:
        """Rows of the gates [G] of equal shares of the lanes' rows that are of these tasks [G]."""
        slots = self.store.lanes.slots.clamp(min=0).to(torch.int64)
        return slots.repeat_interleave(len(tasks) // len(slots)) * self.store.tasks + tasks

    @contextlib.contextmanager
    def on_task(self, task: int) -> Iterator[None]:
        """Within it what is scored or generated is of the runs' task of this number."""
        former, self.task = self.task, task
        try:
            yield
        finally:
            self.task = former

    def hidden(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Last hidden states [rows, T, D] of token ids [rows, T], padded on the right from `lengths` [rows]."""
        self.store.lanes.tokens = ids.shape[1]
        return hidden_states(self.store.serving.decoder, ids, lengths, self.base.verdict.padding)

    @torch.no_grad()
    def read_prompts(self, ids: Tensor, lengths: Tensor, prompts: Tensor) -> Tensor:
        """What routers read of prompts [rows, gating.WIDTH], from a pass of the bare base model.

        Args:
            ids: [rows, T], padded on the right from `lengths` [rows]. prompts: [rows] tokens of each prompt.
        """
        lanes, noisy = self.store.lanes, self._lengths
        former = lanes.slots, lanes.gated, lanes.routed
        lanes.slots, lanes.gated, lanes.routed, self._lengths = self._bare_lanes[len(lanes.slots)], False, False, None
        try:
            hidden = self.hidden(ids, lengths)
        finally:
            (lanes.slots, lanes.gated, lanes.routed), self._lengths = former, noisy
        width = hidden.shape[-1]
        if width not in self._projections:
            self._projections[width] = gating.projection(width).to(self.device)
        return gating.read(hidden, prompts, self._projections[width])

    def scores(self, batch: Batch) -> Tensor:
        """NLL of every target token, and 1 where it is the likeliest, [2, L, K] float32; no gradients, no dropout."""
        if self.captured_scores is not None:
            bare = self.store.serving.model is self.base.model
            return self.captured_scores(batch.pinned(), key=(*self.store.lanes.flags, bare))
        return self._scores(batch.to(self.device))

    def pass_through(self, batch: Batch) -> None:
        """Runs a batch through the model and nothing more, for what looks at its modules; never a captured pass."""
        self._gate(batch)
        self.hidden(batch.ids, batch.lengths)

    def target_states(self, batch: Batch) -> Tensor:
        """Hidden states [L, K, D] that predict the targets; never a captured pass."""
        self._gate(batch)
        return self._states(batch).view(*batch.index.shape, -1)

    def _states(self, batch: Batch) -> Tensor:
        """Hidden states [L*K, D] that predict the targets."""
        index = batch.index.flatten()
        if batch.starts is not None and batch.stops is not None:
            assert self.decoder is not None
            return self.decoder(batch.ids.flatten(), Rows(batch.starts, batch.stops), index, self.store.lanes)
        hidden = self.hidden(batch.ids, batch.lengths)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)

    def _scores(self, batch: Batch) -> Tensor:
        rows = self.target_states(batch).flatten(0, 1)
        _, found = self.head.scores(rows, batch.targets, batch.weights)
        return torch.stack([found.nll, found.correct.float()])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, layers uncompiled, averaged weights where a run has them; all as before afterwards."""
        self.model.eval()
        try:
            with self.store.averaged(), eager():
                yield
        finally:
            self.model.train()

    def warm_up(self, steps: int) -> None:
        """Steps whose results are thrown away, to compile and capture; meant for a pack that is only measured."""
        for _ in range(steps):
            self.step()
        self.pending.clear()

    @property
    def warming(self) -> bool:
        """Whether the last step did one-off work (compiling, capturing) and so says nothing about speed."""
        return self.captured is not None and not self.captured.replayed

    def forward_backward(self, batch: Batch) -> Tensor:
        """Losses [L] of one forward pass; their gradients are added to the store's."""
        slots = self.store.lanes.host_slots
        if not self.apart or len(slots) == 1:
            return self._pass(batch)
        losses = []
        try:
            for lane, slot in enumerate(slots):
                self.use_lanes([slot])
                losses.append(self._pass(batch.lane(lane)))
        finally:
            self.use_lanes(slots)
        return torch.cat(losses)

    @property
    def apart(self) -> bool:
        """Whether each run has passes of its own, whose results are then the same to the last bit in any pack."""
        return self.config.deterministic and self.device.type == "cpu"

    def _pass(self, batch: Batch) -> Tensor:
        self._lengths = batch.lengths
        with self.store.one_pass(1 / self.config.accumulation):
            with training_kernel(self.device, self.dtype, deterministic=self.config.deterministic):
                losses = self._forward_backward(batch, self._objectives(), weigh=self.weighing.active)
            self._lengths = None
        return losses

    def look_at_gradients(self, batch: Batch) -> None:
        """Adds the gradients of a batch's NLLs to the store's; nothing is updated, and other slots are not touched.

        In evaluation mode: no dropout, no noise; no penalties and no learnt weights; never captured or compiled.
        """
        self.model.eval()
        try:
            kernel = training_kernel(self.device, self.dtype, deterministic=self.config.deterministic)
            with self.store.one_pass(0.0), eager(), kernel:
                lanes = slice(0, len(self.store.lanes.slots))
                self._forward_backward(batch.to(self.device), [(NLL(), lanes)], weigh=False)
        finally:
            self.model.train()

    def add_gradients(self, slots: Sequence[int], rows: Sequence[Tokens]) -> None:
        """As `look_at_gradients`, for some slots of a row's NLL each, summed over its target tokens."""
        self.use_lanes(slots)
        self.look_at_gradients(collate([[row] for row in rows], [[1.0]] * len(rows), fixed=False))

    def _gate(self, batch: Batch) -> None:
        lanes = self.store.lanes
        if lanes.gated:
            lanes.gate_rows = self._gate_rows(batch.tasks)
        if lanes.routed:
            lanes.lengths = batch.lengths
        if lanes.prompted:
            lanes.features = self.read_prompts(batch.ids, batch.lengths, batch.prompts)

    def _objectives(self) -> list[tuple[Objective, slice]]:
        """The objectives of the present lanes, each with those that minimise it; lanes without a run join the former.

        Read off the host, so that a captured step knows them.
        """
        found: list[tuple[Objective, slice]] = []
        for lane, slot in enumerate(self.store.lanes.host_slots):
            state = self.states[slot] if slot >= 0 else None
            if found and (state is None or state.objective is found[-1][0]):
                found[-1] = found[-1][0], slice(found[-1][1].start, lane + 1)
            else:
                found.append((NLL() if state is None else state.objective, slice(lane, lane + 1)))
        return found

    def _forward_backward(
        self, batch: Batch, objectives: Sequence[tuple[Objective, slice]], *, weigh: bool
    ) -> Tensor:  # fmt: skip
        """Losses [L] of the lanes of each objective."""
        self._gate(batch)
        slots = self.store.lanes.slots
        weights = self.weighing.weigh(batch, slots) if weigh else batch.weights
        states = self._states(batch)
        parts = []
        for objective, lanes in objectives:
            with self._only(lanes):
                parts.append(self._of_lanes(objective, lanes, states, batch, weights, weigh=weigh))
        losses = torch.cat(parts)
        losses.sum().backward()
        return losses.detach()

    def _of_lanes(
        self, objective: Objective, lanes: slice, states: Tensor, batch: Batch, weights: Tensor, *, weigh: bool
    ) -> Tensor:  # fmt: skip
        """Losses of the lanes of one objective; all there are, where weights of losses are learnt."""
        _, count, rows, _, width = batch.shape
        own = states.view(count, width, -1)[lanes].flatten(0, 1)
        if objective.linear:
            losses, found = self.head.scores(own, batch.targets[lanes], weights[lanes])
            if weigh:
                self.weighing.note(batch, self.store.lanes.slots, found.nll)
            return losses
        seen = Outputs(
            head=self.head, states=own, targets=batch.targets[lanes], weights=weights[lanes], rows=batch.rows[lanes],
            positions=batch.positions[lanes], facts=batch.facts.view(count, rows, -1)[lanes],
        )  # fmt: skip
        return objective.losses(seen)

    @contextlib.contextmanager
    def _only(self, part: slice) -> Iterator[None]:
        """Within it an adapted head is given the rows of some lanes alone."""
        lanes = self.store.lanes
        count = len(lanes.slots)
        if part == slice(0, count):
            yield
            return
        former = lanes.slots, lanes.gate_rows, lanes.lengths, lanes.features
        lanes.slots = former[0][part]
        lanes.gate_rows, lanes.lengths, lanes.features = (
            None if each is None else each[part.start * len(each) // count : part.stop * len(each) // count]
            for each in former[1:]
        )
        try:
            yield
        finally:
            lanes.slots, lanes.gate_rows, lanes.lengths, lanes.features = former

    def _add_noise(self, module: torch.nn.Module, args: Any, embedded: Tensor) -> Tensor:
        lanes = self.store.lanes
        if self._lengths is None or not (lanes.noisy and self.model.training):
            return embedded
        return noise.add(embedded, self._lengths, lanes.noise, lanes.seeds, lanes.slots)

    def _micro_step(self, batch: Batch) -> Tensor:
        if self.captured is not None:
            shared = tuple((id(objective), lanes.start) for objective, lanes in self._objectives())
            return self.captured(batch.pinned(), key=(*self.store.lanes.flags, self.weighing.key, shared))
        return self.forward_backward(batch.to(self.device))

    def _seed_dropout(self, moving: Sequence[tuple[int, RunState]], before: Sequence[int]) -> None:
        """Seeds a forward pass of a step that has had `before` rows of each run already."""
        if not self.store.lanes.draws:
            return
        seeds = [0] * len(self.states)
        for (slot, state), had in zip(moving, before, strict=True):
            key = f"{state.seed}/{state.done}/0".encode()  # of the step, whichever pass this is
            drawn = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
            seeds[slot] = for_rows(drawn, had)
        self.store.seed(seeds)

    def _checkpoint_activations(self, on: bool) -> None:
        # transformers renamed this; both names must work
        newer = hasattr(self.model, "activation_checkpointing_enable")
        word = "activation_checkpointing" if newer else "gradient_checkpointing"
        if on:
            getattr(self.model, f"{word}_enable")(**{f"{word}_kwargs": {"use_reentrant": False}})
        elif self.config.checkpointing:
            getattr(self.model, f"{word}_disable")()
            if hasattr(self.model, "_require_grads_hook"):  # enabling it had the embedding ask for gradients
                self.model.disable_input_require_grads()


def open_pack(base: BaseModel, adapters: Sequence[AdapterSpec | UnpackedSpec], config: PackConfig) -> Pack:
    """A pack whose slots hold exactly these, in order; an unpacked one is given by itself."""
    (first, *_) = adapters
    if isinstance(first, UnpackedSpec):
        assert len(adapters) == 1
        return Pack(base, first, config)
    return Pack(base, [adapter.capacity for adapter in adapters if isinstance(adapter, AdapterSpec)], config)


def _of_variances(state: RunState) -> list[list[float]]:
    """How the log variance of each task moves in the coming step of a run; nothing where it learns none."""
    own = [clock.at(state.done) for clock in state.task_clocks]
    return [
        UNSEEN if number is None else hyperparameters(state.optim, state.done, state.steps, number) for number in own
    ]
