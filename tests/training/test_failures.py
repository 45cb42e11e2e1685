"""Whatever a run raises, wherever it does, is its own failure; the others end as if it had not been there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from sweeper import lost, methods, record
from sweeper.lora.store import AdapterStore
from sweeper.lost import ContextLost
from sweeper.record import Record
from sweeper.spec import RunSpec
from sweeper.tasks import metrics
from sweeper.training import checkpoint, pack_trainer, results, suspects, trainer
from sweeper.training.events import Event, Remark, RunFinished, Step
from sweeper.training.loaded import Loaded
from sweeper.training.pack import Pack


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process remembers is another's in the next test."""
    monkeypatch.setattr(lost, "_gone", [])


@pytest.fixture
def specs(make_run: Callable[..., RunSpec]) -> list[RunSpec]:
    return [
        make_run("attn", trainer={"max_steps": 6}),
        make_run("ff", rank=8, method={"dropout": 0.2}, trainer={"max_steps": 6}),
        make_run("full", rank=2, seed=1, trainer={"max_steps": 8}, evaluation={"every_steps": 3}),
        make_run("attn", rank=2, trainer={"max_steps": 7}),
        make_run("ff", rank=3, trainer={"max_steps": 5}),
    ]


def rows(folder: Path, *, timeless: bool = False) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in found] if timeless else found


def alike(one: Path, two: Path, specs: list[RunSpec]) -> None:
    """Every step taken once, every score there, equal but for the rounding of another batch shape."""
    for spec in specs:
        a, b = (record.read_record(study / spec.run_id) for study in (one, two))
        assert (a.status, a.steps) == (b.status, b.steps) == ("completed", spec.trainer.max_steps)
        assert not (two / spec.run_id / record.TRACEBACK).exists()
        losses, scored = [], []
        for study in (one, two):
            found = rows(study / spec.run_id)
            assert [row["step"] for row in found if "loss" in row] == list(range(1, spec.trainer.max_steps + 1))
            losses.append([row["loss"] for row in found if "loss" in row])
            scored.append({(row["split"], row["moment"]): row["nll"] for row in found if "moment" in row})
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert scored[0] == pytest.approx(scored[1], rel=1e-5)


def failed(study: Path, spec: RunSpec, kind: str, message: str) -> Record:
    found = record.read_record(study / spec.run_id)
    assert found.status == "failed"
    assert found.error is not None
    assert found.error["class"] == kind
    assert message in found.error["message"]
    trace = (study / spec.run_id / found.error["traceback"]).read_text()
    assert trace.startswith("Traceback")
    assert kind == ContextLost.__name__ or kind in trace
    return found


def ends(events: list[Event]) -> dict[str, str]:
    return {event.record.run_id: event.record.status for event in events if isinstance(event, RunFinished)}


def steps_taken(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.run_id, event.step) for event in events if isinstance(event, Step)]


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_of_a_shared_step_is_traced_to_its_run(
    at: int, place: int, specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step of the others is taken twice, and afterwards they train together again."""
    run_all(specs, "undisturbed")
    bad, whole, sizes = specs[place].run_id, Pack._micro_step, list[int]()

    def breaking(pack: Pack, batch: Any) -> Any:
        sizes.append(len(pack.active))
        if any(job.run_id == bad and job.done == at for _, job in pack.active):
            raise IndexError("index out of range in self")
        return whole(pack, batch)

    monkeypatch.setattr(Pack, "_micro_step", breaking)
    events = run_all(specs, "one-bad")
    others = [spec for spec in specs if spec.run_id != bad]
    assert ends(events) == {bad: "failed"} | {spec.run_id: "completed" for spec in others}
    assert failed(tmp_path / "one-bad", specs[place], "IndexError", "index out of range in self").steps == at
    taken = steps_taken(events)
    assert len(taken) == len(set(taken)) == sum(spec.trainer.max_steps for spec in others) + at
    assert 4 in sizes[sizes.index(1) :]
    alike(tmp_path / "undisturbed", tmp_path / "one-bad", others)


def test_two_bad_runs_are_both_found(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "undisturbed")
    bad, whole = {specs[1].run_id, specs[2].run_id}, Pack._micro_step

    def breaking(pack: Pack, batch: Any) -> Any:
        if any(job.run_id in bad and job.done == 1 for _, job in pack.active):
            raise KeyError("layer")
        return whole(pack, batch)

    monkeypatch.setattr(Pack, "_micro_step", breaking)
    run_all(specs, "two-bad")
    for place in (1, 2):
        failed(tmp_path / "two-bad", specs[place], "KeyError", "layer")
    alike(tmp_path / "undisturbed", tmp_path / "two-bad", [specs[0], specs[3], specs[4]])


def test_a_step_that_broke_halfway_is_taken_again_from_the_last_good_state(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser has moved some adapters by then, so what the pack holds is not what any run was."""
    run_all(specs, "undisturbed")
    bad, whole = specs[3].run_id, AdapterStore.update_ema

    def breaking(store: AdapterStore, slot: int, step: int) -> None:
        if store.held[slot].ranks == specs_ranks and step == 4:
            raise RuntimeError("the average cannot move")
        whole(store, slot, step)

    specs_ranks: dict[str, int] = {}
    added = Pack.add

    def noted(pack: Pack, job: Any, slot: int | None = None) -> int:
        if job.run_id == bad:
            specs_ranks.update(job.adapter.ranks)
        return added(pack, job, slot)

    monkeypatch.setattr(Pack, "add", noted)
    monkeypatch.setattr(AdapterStore, "update_ema", breaking)
    run_all(specs, "one-bad")
    failed(tmp_path / "one-bad", specs[3], "RuntimeError", "the average cannot move")
    alike(tmp_path / "undisturbed", tmp_path / "one-bad", [spec for spec in specs if spec.run_id != bad])


def test_an_error_of_many_together_and_of_none_alone_makes_packs_smaller(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "undisturbed")
    whole = Pack._micro_step

    def breaking(pack: Pack, batch: Any) -> Any:
        if len(pack.active) > 3:
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
        return whole(pack, batch)

    monkeypatch.setattr(Pack, "_micro_step", breaking)
    events = run_all(specs, "crowded")
    said = [event.message for event in events if isinstance(event, Remark)]
    assert "RuntimeError with 5 runs together; going on with 2" in said
    alike(tmp_path / "undisturbed", tmp_path / "crowded", specs)


@pytest.mark.parametrize("moment", ["before", "midway", "after"])
def test_an_error_of_an_evaluation_is_traced_to_its_run_and_costs_the_others_nothing(
    moment: str, specs: list[RunSpec], make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training it is all runs with that evaluation; for this one run it is of its own."""
    bad = specs[1] = make_run("ff", rank=8, trainer={"max_steps": 6}, evaluation={"every_steps": 3})
    run_all(specs, "undisturbed")
    name = "evaluate" if moment != "midway" else "queue_evaluation"
    whole = getattr(pack_trainer, name)

    def breaking(pack: Pack, slots: Any, run: Any, split: str, **options: Any) -> Any:
        mine = [slot for slot, job in pack.active if job.run_id == bad.run_id]
        if moment == "before" and slots == [-1] and run.run_id == bad.run_id:
            raise RuntimeError("expected scalar type Float")
        if moment != "before" and set(mine) & set(slots):
            raise RuntimeError("expected scalar type Float")
        return whole(pack, slots, run, split, **options)

    monkeypatch.setattr(pack_trainer, name, breaking)
    events = run_all(specs, "one-bad")
    others = [spec for spec in specs if spec is not bad]
    if moment == "before":  # shares the evaluation of the third run, which is scored in its place
        assert specs[2].evaluation == bad.evaluation
    failed(tmp_path / "one-bad", bad, "RuntimeError", "expected scalar type Float")
    taken = steps_taken(events)
    assert len(taken) == len(set(taken))
    alike(tmp_path / "undisturbed", tmp_path / "one-bad", others)


def test_an_evaluation_that_runs_out_of_memory_midway_is_made_up_for(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    run_all(specs, "roomy")
    whole, calls = pack_trainer.queue_evaluation, list[int]()

    def limited(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*args, **options)

    monkeypatch.setattr(pack_trainer, "queue_evaluation", limited)
    run_all(specs, "tight")
    alike(tmp_path / "roomy", tmp_path / "tight", specs)


def test_a_metric_that_raises_fails_the_runs_that_ask_for_it(
    make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(text: str, response: str) -> float:
        raise ZeroDivisionError("division by zero")

    good = make_run("attn")
    asking = make_run("attn", dataset={"metrics": ["final_number"], "max_new_tokens": 2}, evaluation={"generate": True})
    monkeypatch.setitem(metrics.TEXT, "final_number", breaking)
    assert ends(run_all([asking, good])) == {asking.run_id: "failed", good.run_id: "completed"}
    failed(tmp_path / "study", asking, "ZeroDivisionError", "division by zero")


@pytest.mark.parametrize(
    "error", [TypeError("TextEncodeInput must be"), AttributeError("no vocab_size"), MemoryError()]
)
def test_an_error_while_a_run_is_prepared_is_its_own(
    error: Exception, specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Loaded.prepare

    def breaking(loaded: Loaded, request: Any) -> Any:
        if request.run_id == specs[2].run_id:
            raise error
        return whole(loaded, request)

    monkeypatch.setattr(Loaded, "prepare", breaking)
    events = run_all(specs)
    assert [ends(events)[spec.run_id] == "failed" for spec in specs] == [False, False, True, False, False]
    failed(tmp_path / "study", specs[2], type(error).__name__, str(error))


def test_an_error_while_a_model_is_loaded_is_of_its_runs(
    specs: list[RunSpec], make_run: Any, tiny_spec: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    other = make_run("attn", model=dataclasses.asdict(tiny_spec("gpt2")))
    whole = methods.load_base

    def breaking(spec: RunSpec, **more: Any) -> Any:
        if spec.model.name == "tiny_gpt2":
            raise AttributeError("'SomeConfig' object has no attribute 'vocab_size'")
        return whole(spec, **more)

    monkeypatch.setattr(methods, "load_base", breaking)
    assert ends(run_all([other, specs[0]])) == {other.run_id: "failed", specs[0].run_id: "completed"}
    failed(tmp_path / "study", other, "AttributeError", "vocab_size")


FULL = "No space left on device"


@pytest.mark.parametrize(
    "error", [ValueError("cannot be saved"), SystemError("odd"), OSError(28, FULL), SafetensorError(FULL)]
)
def test_an_error_while_a_run_is_written_is_its_own(
    error: Exception, specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results.write_adapter

    def breaking(folder: Path, *args: Any, **more: Any) -> int:
        if folder.name == specs[0].run_id:
            raise error
        return whole(folder, *args, **more)

    monkeypatch.setattr(results, "write_adapter", breaking)
    run_all(specs)
    failed(tmp_path / "study", specs[0], type(error).__name__, str(error))
    assert all(record.status(tmp_path / "study" / spec.run_id) == "completed" for spec in specs[1:])


def test_a_run_that_no_slot_can_be_given_fails_and_leaves_the_slot(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "undisturbed")
    whole, held = Pack.add, Pack.free_slot

    def breaking(pack: Pack, job: Any, slot: int | None = None) -> int:
        if job.run_id == specs[1].run_id:
            pack.store.assign(held(pack, job.adapter), job.adapter)
            raise IndexError("too many ranks")
        return whole(pack, job, slot)

    monkeypatch.setattr(Pack, "add", breaking)
    run_all(specs, "one-bad")
    failed(tmp_path / "one-bad", specs[1], "IndexError", "too many ranks")
    alike(tmp_path / "undisturbed", tmp_path / "one-bad", [specs[0], *specs[2:]])


def test_a_checkpoint_of_other_shapes_fails_its_run_alone(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    run_all(specs, "undisturbed")
    run_all(specs, "stopped", stop_after=7)
    folder = tmp_path / "stopped" / specs[0].run_id
    state, saved = checkpoint.load(folder)  # type: ignore[misc]
    checkpoint.save(folder, {name: tuple(part[..., :1] for part in parts) for name, parts in state.items()}, saved)
    run_all(specs, "stopped")
    failed(tmp_path / "stopped", specs[0], "RuntimeError", "")
    alike(tmp_path / "undisturbed", tmp_path / "stopped", specs[1:])


def test_a_failure_that_cannot_be_written_is_told_all_the_same(
    specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / specs[0].run_id).write_text("no folder")
    events = run_all(specs)
    assert [ends(events)[spec.run_id] for spec in specs] == ["failed", *["completed"] * 4]


def test_errors_that_hold_half_a_character_can_be_written(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(loaded: Loaded, request: Any) -> Any:
        raise TypeError("cannot encode \ud83d")

    monkeypatch.setattr(Loaded, "prepare", breaking)
    run_all(specs[:1])
    failed(tmp_path / "study", specs[0], "TypeError", "cannot encode \\ud83d")


class Card:
    """A GPU that a run makes unusable: from then on whatever is asked of it in this process fails."""

    ERROR = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: set[str], at: int) -> None:
        self.dead, self.tried = False, list[set[str]]()
        step, snapshot = Pack.step, Pack.snapshot

        def stepped(pack: Pack) -> None:
            self.use()
            if any(job.run_id in bad and job.done == at for _, job in pack.active):
                self.tried.append({job.run_id for _, job in pack.active})
                self.dead = True
                self.use()
            step(pack)

        def snapped(pack: Pack, slot: int) -> Any:
            self.use()
            return snapshot(pack, slot)

        monkeypatch.setattr(Pack, "step", stepped)
        monkeypatch.setattr(Pack, "snapshot", snapped)

    def use(self) -> None:
        if self.dead:
            raise RuntimeError(self.ERROR)


@pytest.mark.parametrize(("place", "at"), [(0, 0), (2, 4), (4, 3)])
def test_processes_find_the_run_that_loses_the_gpu(
    place: int, at: int, specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is given smaller packs to try; the others lose only the steps since their checkpoint."""
    run_all(specs, "undisturbed")
    bad, study = specs[place], tmp_path / "lost"
    card = Card(monkeypatch, {bad.run_id}, at)
    for _ in range(8):
        card.dead = False
        lost._gone.clear()
        waiting = [spec for spec in specs if record.status(study / spec.run_id) is None]
        try:
            run_all(waiting, "lost", checkpoint_seconds=1e-9)
            break
        except ContextLost:
            continue
    assert [len(tried) for tried in card.tried] in ([5, 2, 1], [5, 3, 1], [5, 3, 2, 1])
    failed(study, bad, "ContextLost", "CUDA error: device-side assert triggered")
    others = [spec for spec in specs if spec is not bad]
    alike(tmp_path / "undisturbed", study, others)
    assert not list(study.rglob(suspects.NOTE))


def test_a_gpu_that_is_lost_to_a_single_run_blames_it(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, {specs[0].run_id}, 2)
    with pytest.raises(ContextLost):
        run_all(specs[:1])
    failed(tmp_path / "study", specs[0], "ContextLost", "device-side assert")


def test_a_gpu_that_was_lost_by_chance_costs_no_run(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an ECC error: every part goes beyond where it was, and then all train together again."""
    run_all(specs, "undisturbed")
    with monkeypatch.context() as patch:
        card = Card(patch, {specs[0].run_id}, 3)
        with pytest.raises(ContextLost):
            run_all(specs, "lost")
        assert len(card.tried) == 1
    with pytest.raises(ContextLost):  # whatever is asked of this process
        run_all(specs, "lost")
    lost._gone.clear()
    sizes, whole = list[int](), Pack.step

    def stepped(pack: Pack) -> None:
        sizes.append(len(pack.active))
        whole(pack)

    monkeypatch.setattr(Pack, "step", stepped)
    run_all(specs, "lost")
    assert sorted(set(sizes[:8])) == [2, 3]
    assert max(sizes[8:]) == 5
    alike(tmp_path / "undisturbed", tmp_path / "lost", specs)


def test_a_probe_that_loses_the_gpu_fails_its_run(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Loaded.prepare

    def breaking(loaded: Loaded, request: Any) -> Any:
        if request.run_id == specs[1].run_id:
            raise RuntimeError(Card.ERROR)
        return whole(loaded, request)

    monkeypatch.setattr(Loaded, "prepare", breaking)
    with pytest.raises(ContextLost):
        run_all(specs)
    failed(tmp_path / "study", specs[1], "ContextLost", "device-side assert")


def test_a_measurement_that_loses_the_gpu_is_not_made_again(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*_: Any) -> Any:
        raise RuntimeError(Card.ERROR)

    monkeypatch.setattr(trainer.calibrate, "measure", breaking)
    with pytest.raises(ContextLost) as caught:
        run_all(specs, calibrate=True)
    assert caught.value.measuring
    lost._gone.clear()
    monkeypatch.setenv(lost.VARIABLE, '{"failed": [], "in_a_row": 1, "measure": false}')
    events = run_all(specs, calibrate=True)
    assert set(ends(events).values()) == {"completed"}


def test_a_model_that_loses_the_gpu_twice_fails_its_runs(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(spec: RunSpec, **more: Any) -> Any:
        raise RuntimeError(Card.ERROR)

    monkeypatch.setattr(methods, "load_base", breaking)
    with pytest.raises(ContextLost):
        run_all(specs[:2])
    assert not list(tmp_path.rglob(record.RECORD))
    lost._gone.clear()
    monkeypatch.setenv(lost.VARIABLE, '{"failed": [], "in_a_row": 1, "measure": true}')
    with pytest.raises(ContextLost):
        run_all(specs[:2])
    for spec in specs[:2]:
        failed(tmp_path / "study", spec, "ContextLost", "device-side assert")
