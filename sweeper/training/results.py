"""What a run leaves in its folder: adapter, curve, predictions, and last the record that refers to them."""

import errno
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sweeper import methods
from sweeper.lora.blocks import Block
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.slot_store import Learnt
from sweeper.methods import sharing
from sweeper.models import total_parameters
from sweeper.record import (
    METRICS,
    PREDICTIONS,
    TASKS,
    TRACEBACK,
    Efficiency,
    Module,
    Record,
    write_atomically,
    write_lines,
    write_record,
)
from sweeper.run import Run
from sweeper.spec import Settings, alone, to_mapping
from sweeper.tasks import data_of
from sweeper.tasks.mixture import by_part
from sweeper.training import card, checkpoint, conflict, consolidate, experts, suspects, texts
from sweeper.training.calibrate import Solo
from sweeper.training.export import write_adapter, write_experts, write_tasks
from sweeper.training.failure import Failure
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState, now

Weights = Mapping[str, tuple[Tensor, ...]] | Learnt


def write_run(
    state: RunState, weights: Weights, solo: Solo | None, pack: Pack, settings: Settings, environment: Mapping[str, Any]
) -> Record:
    """Writes all that a run which has ended leaves, and removes its checkpoint.

    Args:
        weights: what it has learnt. solo: what it costs alone, where that was measured.
        environment: what its pack is made with.
    """
    folder, spec = state.run.folder, state.spec
    folder.mkdir(parents=True, exist_ok=True)
    adapter_bytes, splits = _write_weights(state, weights), by_part(state.splits)
    learnt = weights if isinstance(weights, Learnt) else None
    write_lines(folder / METRICS, state.metrics)
    write_lines(folder / PREDICTIONS, texts.bounded(state.predictions, keep=settings.keep_texts))
    kept: Mapping[str, str | None] = dict.fromkeys(state.scores)
    if settings.keep_texts:
        kept = texts.digests(folder.parent, state.texts, list(state.scores))
    record = Record(
        run_id=state.run_id,
        study=settings.study,
        status="diverged" if state.diverged else "pruned" if state.pruned else "completed",
        spec=to_mapping(spec),
        modules=_modules(state, learnt),
        trainable_parameters=methods.trainable(spec.method, state.ranks) + methods.routers(spec, state.ranks)
        if learnt is None else learnt.trainable,
        total_parameters=total_parameters(pack.base.model),
        steps=state.done,
        scores=state.scores,
        data={
            name: ({"order": "by step"} if name == "train" else {})
            | facts
            | {"majority": dict(splits[name].majority)}
            | ({"texts": kept[name]} if name in kept else {})
            | _seen(state, name)
            for name, facts in data_of(state.splits).items()
        },
        efficiency=_efficiency(state, adapter_bytes, solo, pack),
        environment={**environment, **state.environment, **({"resumed_from": state.resumed} if state.resumed else {})},
        search=state.run.search,
        sharing=_sharing(state),
        weighing=_weighing(state),
        conflict=conflict.recorded(state),
        init_from={**state.origin, **({"nll": state.begun} if state.begun else {})},
        saved={
            "step": state.done if state.best is None else state.best[1], "stopped_early": state.stopped,
            "average": spec.trainer.ema_decay is not None,
            **({} if state.exported.refused is None else {"peft": state.exported.refused}),
        },
        started=state.started,
        finished=now(),
    )  # fmt: skip
    (folder / TRACEBACK).unlink(missing_ok=True)  # of a former try
    _write_cards(state, record)
    write_record(folder, record)
    checkpoint.remove(folder)
    suspects.clear(folder)
    return record


def write_failure(
    run: Run, failure: Failure, settings: Settings, environment: Mapping[str, Any], *, steps: int, started: str
) -> Record:
    """Records that a run failed: class and message, and the traceback in a file beside it.

    Where its folder cannot be written either, the record is only returned.

    Raises:
        OSError: the disk is full, which would be the end of every other run as well.
    """
    record = Record(
        run_id=run.run_id,
        study=settings.study,
        status="failed",
        spec=to_mapping(run.spec),
        steps=steps,
        environment=environment,
        search=run.search,
        error={"class": failure.kind, "message": failure.message, "traceback": TRACEBACK},
        started=started,
        finished=now(),
    )
    try:
        write_atomically(run.folder / TRACEBACK, failure.trace)
        write_record(run.folder, record)
        suspects.clear(run.folder)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
    return record


def _write_weights(state: RunState, weights: Weights) -> int:
    """Writes what the run has learnt; returns its bytes. A pruned one leaves nothing: of such there are many."""
    if state.pruned:
        return 0
    folder, proved = state.run.folder, state.exported
    if isinstance(weights, Learnt):
        size = weights.write(folder)
    elif sharing.apart(_blocks(state)):
        return write_tasks(state.run, state.spec, list(state.ranks), weights, _blocks(state), proved)
    elif state.experts:
        assert isinstance(state.adapter, AdapterSpec)
        return write_experts(state.run, state.spec, state.adapter, list(state.ranks), weights, proved)
    else:
        size = write_adapter(
            folder, state.spec, list(state.ranks), weights, as_parameters=proved.as_parameters
        )  # fmt: skip
    return size


def _write_cards(state: RunState, record: Record) -> None:
    """Says beside the run's adapter, or that of each of its tasks, what it is and how it scored."""
    folder, spec = state.run.folder, state.spec
    card.write(folder, spec, record)
    for task, part in enumerate(spec.dataset.parts):
        card.write(folder / TASKS / part.name, alone(spec, task), record)


def _seen(state: RunState, split: str) -> dict[str, int]:
    """How many examples of one of its tasks a run has trained on, repeats counted; nothing of other splits."""
    split, _, task = split.partition("/")
    if split != "train" or not task or state.mixture is None:
        return {}
    return {"seen": int(state.mixture.counts[: state.done, state.mixture.names.index(task)].sum())}


def _blocks(state: RunState) -> tuple[Block, ...]:
    return state.adapter.blocks if isinstance(state.adapter, AdapterSpec) else ()


def _sharing(state: RunState) -> dict[str, Any]:
    """The rank blocks of a run and the parameters that each task's rows run through; see `Record.sharing`."""
    if state.experts:
        return experts.recorded(state)
    blocks = _blocks(state)
    if state.mixture is not None and state.consolidated:
        tasks = enumerate(state.mixture.names[: state.consolidated])
        return {"fisher_examples": {name: len(consolidate.examples(state, task)) for task, name in tasks}}
    if not blocks or state.mixture is None:
        return {}
    names, method = state.mixture.names, state.spec.method
    targets = {target.name: target for target in state.ranks}

    def parameters(ranks: Mapping[str, int]) -> int:
        return methods.trainable(method, {targets[name]: rank for name, rank in ranks.items()})

    return {
        "blocks": [
            {
                "name": block.name, "level": block.level, "acts": [names[task] for task in sorted(block.acts)],
                "trains": [names[task] for task in sorted(block.trains)], "parameters": parameters(block.ranks),
                "ranks": dict(block.ranks), "steps": state.mixture.clock(block.trains).steps,
            }
            for block in blocks
        ],
        "active_parameters": {
            name: sum(parameters(block.ranks) for block in blocks if task in block.acts)
            for task, name in enumerate(names)
        },
        **({"through": state.through} if state.through else {}),
        **({"routing": state.routing} if state.routing else {}),
    }  # fmt: skip


def _weighing(state: RunState) -> dict[str, Any]:
    """What the weights of the tasks' losses were in the end, where they are learnt; see `Record.weighing`."""
    return {
        task: {"log_variance": value, "weight": math.exp(min(-value, 700.0))}
        for task, value in state.log_variances.items()
    }


def _modules(state: RunState, learnt: Learnt | None) -> tuple[Module, ...]:
    """What was trained by module; a run alone says itself what it put where, and which rank that has in the end."""
    method = state.spec.method
    modules = [
        Module(
            name=target.name, role=target.role, layer=target.layer,
            rank=rank if learnt is None else learnt.ranks.get(target.name, rank),
            parameters=methods.parameters(method, target, rank)
            if learnt is None else learnt.parameters[target.name],
            score=None if state.probe is None else state.probe.scores.get(target.name),
        )
        for target, rank in state.ranks.items()
    ]  # fmt: skip
    return tuple(module for module in modules if module.parameters or learnt is None)


def _tokens(state: RunState, examples: Sequence[int]) -> tuple[int, int]:
    """Tokens and rows of some training examples."""
    seen = [len(row.input_ids) for i in examples for row in state.rows[i]]
    return sum(seen), len(seen)


def _flops(state: RunState, seen: Sequence[int], pack: Pack) -> float:
    """Operations of the examples that a run has seen; of blocks, those that act on an example's task."""
    blocks, by_task = _blocks(state), {-1: list(seen)}
    if blocks and state.mixture is not None:
        by_task = {task: [] for task in range(len(state.mixture.names))}
        for i in seen:
            by_task[int(state.mixture.task_of[i])].append(i)
    total = 0.0
    for task, examples in by_task.items():
        tokens, rows = _tokens(state, examples)
        ranks = sharing.active(state.ranks, sharing.computed(state.spec, blocks, task), task)
        total += methods.train_flops(
            state.spec.method, pack.base.targets, ranks, length=round(tokens / max(rows, 1)), tokens=tokens
        )
    return total


def _efficiency(state: RunState, adapter_bytes: int, solo: Solo | None, pack: Pack) -> Efficiency:
    passes = range(state.done * pack.config.accumulation)
    seen = [i for n in passes for i in state.order.batch(n)]
    tokens = _tokens(state, seen)[0]
    return Efficiency(
        train_seconds_amortised=state.train_seconds,
        eval_seconds_amortised=state.eval_seconds,
        train_seconds_solo=None if solo is None else solo.step_seconds * state.done,
        step_seconds_solo=() if solo is None else solo.repeats,
        peak_memory_solo_bytes=None if solo is None else solo.peak_memory_bytes,
        memory_measured=None if solo is None else solo.memory_measured,
        tokens_per_second_solo=None if solo is None else tokens / max(state.done, 1) / solo.step_seconds,
        train_tokens=tokens,
        train_flops=_flops(state, [*seen, *consolidate.seen(state)], pack),
        adapter_bytes=adapter_bytes,
        pack_runs=state.pack_runs,
        pack_seconds=time.monotonic() - state.began,
        compile_seconds=state.compile_seconds,
        probe_seconds=None if state.probe is None else state.probe.seconds,
        probe_flops=None if state.probe is None else state.probe.flops,
    )
