"""What a plan costs before it is carried out: what the dry run says of every run, and of all of them together."""

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper import record
from sweeper.arms import Arm, number_of_points
from sweeper.spec import RunSpec, Settings
from sweeper.study.plan import Plan, module_ranks
from sweeper.study.search_settings import SearchSettings

if TYPE_CHECKING:
    from sweeper.study.lengths import Lengths

LATEST, LOOKED_AT = 20, 400  # records that the pace is taken from, and among which they are looked for
NEAR = math.log(1.5)  # packs whose numbers of runs are within this factor count as alike


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a run adapts and is expected to cost, alone. FLOPs are floating-point operations, memory is bytes.

    `lengths` are of its training examples, which the FLOPs follow from; the memory is for the longest of them.
    """

    modules: int
    parameters: int
    total_parameters: int
    flops: float
    memory: int
    base_memory: int
    lengths: "Lengths"


def costs(specs: Iterable[RunSpec], settings: Settings) -> list[Cost]:
    """The cost of each run; runs that differ only in what does not matter for it are reckoned once."""
    from sweeper.study.lengths import Reader

    known: dict[str, Cost] = {}
    reader, found = Reader(), []
    for spec in specs:
        lengths = reader.of(spec)
        key = repr(
            (
                spec.model, spec.method, spec.placement, spec.allocation, spec.sharing, spec.rank,
                len(spec.dataset.parts), lengths.mean, lengths.longest, spec.trainer,
            )
        )  # fmt: skip
        if key not in known:
            known[key] = cost(spec, settings, lengths)
        like = known[key]  # of another seed, perhaps, which draws examples of other lengths
        found.append(replace(like, lengths=lengths, flops=like.flops * lengths.tokens / max(like.lengths.tokens, 1)))
    return found


def cost(spec: RunSpec, settings: Settings, lengths: "Lengths") -> Cost:
    """What a run adapts and costs, with training examples of these lengths."""
    from sweeper import device, methods, models
    from sweeper.models import budget

    every = models.skeleton(spec.model)
    allocated = module_ranks(spec)
    ranks = methods.trained_ranks(spec, allocated)
    total = models.total_parameters(spec.model)
    trainable = methods.trainable(spec.method, ranks, total=total) + methods.routers(spec, ranks)
    dtype = device.precision_for(device.device_for(settings.device), spec.trainer.precision, study=settings.folder)
    batch = spec.trainer.batch_size
    values = methods.held(spec, allocated, total=total)
    memory = budget.memory(
        every,
        ranks,
        base_parameters=total,
        bytes_per_value=dtype.itemsize,
        batch_size=batch,
        length=lengths.longest,
        checkpointing=spec.trainer.activation_checkpointing,
        values=values,
        base_bytes=methods.base_bytes(spec, every, ranks, total=total, bytes_per_value=dtype.itemsize),
    )
    tasks = len(spec.dataset.parts) if spec.dataset.options.get("surgery") else 0  # whose gradients are kept apart
    return Cost(
        modules=len(ranks),
        parameters=trainable,
        total_parameters=total,
        flops=methods.train_flops(spec.method, every, ranks, length=lengths.mean, tokens=lengths.tokens),
        memory=memory.total + budget.GRADIENT_BYTES * tasks * values,
        base_memory=memory.base,
        lengths=lengths,
    )


def step_costs(plan: Plan, settings: Settings) -> dict[str, float]:
    """FLOPs of a step by the key of the arm, where arms differ in model, data or batch; else nothing is read."""
    kinds = {
        repr((spec.model, spec.dataset, spec.objective, spec.trainer.batch_size, spec.trainer.accumulation))
        for spec in (arm.default for arm in plan.arms)
    }
    if len(kinds) < 2:
        return {}
    found = costs([arm.default for arm in plan.arms], settings)
    return {
        arm.key: cost.flops / max(arm.default.trainer.max_steps, 1) for arm, cost in zip(plan.arms, found, strict=True)
    }


def notes(specs: Sequence[RunSpec], costs: Sequence[Cost], settings: Settings) -> list[str]:
    """What auto precision is, what the costs of a plan do not say (ranks that a probe will allocate), and what
    placements leave as it is.
    """
    from sweeper import device, methods, models
    from sweeper.placement import importance, placement

    found: dict[object, str] = {}
    if any(spec.trainer.precision == "auto" for spec in specs):
        fixed = device.study_precision(settings.folder)
        here = device.precision_name(device.precision_for(device.device_for(settings.device), fixed or "auto"))
        why = "as in the study's first run" if fixed else "on this device; the first run fixes it for the study"
        found["precision"] = f"trainer.precision=auto: {here}, {why}"
    for spec, cost in zip(specs, costs, strict=True):
        found.setdefault((repr(spec.model), repr(spec.dataset)), _of_lengths(spec, cost.lengths))
    for spec in specs:
        key = repr((spec.model, spec.placement))
        if key not in found and "placement" not in methods.lacks(spec.method):
            every = models.skeleton(spec.model)
            lines = placement.unadapted(every, spec.placement, layers=placement.number_of_layers(every))
            found[key] = "\n".join(f"{spec.model.name}: {line}" for line in lines)
    for spec, cost in zip(specs, costs, strict=True):
        asked = importance.probing(spec)
        if asked is not None:
            looked = "the weights" if asked.score == "weight" else f"{asked.batches} training batches"
            found[asked.score, asked.batches, spec.placement.name, cost.parameters] = (
                f"allocation=importance, {spec.placement.name}: a probe ({asked.score}, {looked}) decides each "
                f"module's rank before training; {cost.parameters:,} parameters in all, to within 1%"
            )
    return [line for lines in found.values() for line in lines.splitlines()]


def _of_lengths(spec: RunSpec, lengths: "Lengths") -> str:
    """How long training examples are, and how that is known."""
    from sweeper.study.lengths import CHARACTERS

    dataset, model = spec.dataset.name, spec.model.name
    if lengths.how == "assumed":
        return f"{dataset}: its examples cannot be read yet; each is taken to have dataset.max_length tokens"
    why = {
        "counted": "",
        "sampled": ", judging by a sample",
        "characters": f", taking {CHARACTERS:g} characters for one: {model} is not unpacked yet",
    }[lengths.how]
    most = f", at most {lengths.longest}" if lengths.how == "counted" else ""
    return f"{dataset} on {model}: training examples have {lengths.mean} tokens on average{most}{why}"


def estimate(plan: Plan, search: SearchSettings, settings: Settings, costs: Sequence[Cost]) -> list[str]:
    """How many runs and packs there will be, and how long they take at the pace of former runs on this machine."""
    from sweeper import device
    from sweeper.reporting.text import clock_time
    from sweeper.training import environment
    from sweeper.training.memory import MARGIN, MOST

    where = device.device_for(settings.device)
    if plan.tuned:
        if search.trials is None:
            return ["how many runs there will be depends on the budget"]
        first = dict(zip((run.run_id for run in plan.runs), costs, strict=True))
        ranges = [runs_of(arm, search) for arm in plan.arms]
        least, each = sum(fewest for fewest, _ in ranges), [most for _, most in ranges]
        runs = sum(each)
        flops = sum(count * first[arm.default.run_id].flops for count, arm in zip(each, plan.arms, strict=True))
    else:
        left = {run.run_id for run in plan.todo}
        least = runs = len(left)
        flops = sum(cost.flops for run, cost in zip(plan.runs, costs, strict=True) if run.run_id in left)
    if not runs:
        return []
    largest = max(cost.memory - cost.base_memory for cost in costs)
    room = MARGIN * (device.free_bytes(where) - costs[0].base_memory)
    slots = max(1, min(settings.max_pack or MOST, runs, int(room / max(largest, 1))))
    count = str(runs) if least == runs else f"{least} to {runs}"
    lines = [f"{count} run{'s' if runs > 1 else ''}, at most {slots} at a time in a pack on {where}"]
    bases = {run.spec.model.name for run in plan.runs}
    pace = _pace(settings, environment.describe(where, None)["device"], bases, slots)
    if pace is None:
        return [
            *lines,
            f"no run of {', '.join(sorted(bases))} on this device is recorded in {settings.output_root}: there is no "
            "estimate of time",
        ]
    most = " at most" if plan.tuned else ""  # trials may be pruned, and ranges not be widened
    return [*lines, f"training takes about {clock_time(flops / pace)}{most}, at the pace of the latest runs recorded"]


def runs_of(arm: Arm, search: SearchSettings) -> tuple[int, int]:
    """The fewest and the most runs that the search of an arm comes to. A pruned trial that is finished counts twice.

    An arm that is not tuned is its seeds. `search.trials` must be a number.
    """
    if not arm.space:
        return len(arm.seeds), len(arm.seeds)
    assert search.trials is not None
    fewest = int(min(search.trials, number_of_points(arm.space)))
    space, most = arm.space, fewest
    for widened in range(1, search.widen + 1):
        space = tuple(dimension.widened("high") for dimension in space)
        most = int(min(search.trials + widened * max(1, search.trials // 2), number_of_points(space)))
    finished = 0 if search.pruner == "none" else search.finish
    confirm = len(search.confirm_seeds)
    return len(arm.seeds) * fewest + confirm, len(arm.seeds) * (most + finished) + confirm


def _pace(settings: Settings, where: str, bases: Collection[str], slots: int) -> float | None:
    """FLOP/s, a run's share of its pack counted, of the latest runs of this device under the output folder.

    Of the models `bases` only: a tiny model's steps are all overhead, and say nothing of a large one's. Of packs whose
    number of runs is nearest to `slots`: a run alone leaves a GPU idle. The padding of those packs is in their pace.
    """
    paths = sorted(Path(settings.output_root).glob(f"**/{record.RECORD}"), key=lambda path: -path.stat().st_mtime)
    found: list[tuple[float, float]] = []  # how far the pack's size is from the one asked for, and its pace
    for path in paths[:LOOKED_AT]:
        if len(found) == LATEST:
            break
        try:
            run = record.read_record(path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        cost = run.efficiency
        of_these = run.environment.get("device") == where and run.spec["model"]["name"] in bases
        if of_these and cost.train_seconds_amortised and cost.train_flops:
            found.append((abs(math.log(cost.pack_runs / slots)), cost.train_flops / cost.train_seconds_amortised))
    nearest = min(found, default=(0.0, 0.0))[0]
    return statistics.median(pace for far, pace in found if far <= nearest + NEAR) if found else None
