"""A stop, a crash, a full device or one bad run cost the others nothing."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sweeper import record
from sweeper.lora.store import AdapterStore
from sweeper.record import Record
from sweeper.spec import RunSpec
from sweeper.training import checkpoint, pack_trainer
from sweeper.training.events import Event, Remark, RunFinished, Step
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def specs(make_run: Callable[..., RunSpec]) -> list[RunSpec]:
    return [
        make_run("attn", trainer={"max_steps": 6}),
        make_run("ff", rank=8, method={"dropout": 0.2}, trainer={"max_steps": 6}),
        make_run("full", rank=2, seed=1, trainer={"max_steps": 8}, evaluation={"every_steps": 3}),
    ]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 1 + sum("loss" in row for row in rows)))
    return [row["loss"] for row in rows if "loss" in row]


def once_each(events: list[Event], specs: list[RunSpec]) -> bool:
    """Whether every step of every run was taken once."""
    taken = [(event.run_id, event.step) for event in events if isinstance(event, Step)]
    return sorted(taken) == sorted((s.run_id, n + 1) for s in specs for n in range(s.trainer.max_steps))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows without their times; the scores before training come first, whenever they were taken."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
        row.pop("time", None)
        if row.get("moment") == "before":
            row["step"] = 0
    return sorted(rows, key=lambda row: row.get("moment") != "before")


def identical(one: Path, two: Path, specs: list[RunSpec]) -> None:
    for spec in specs:
        assert losses(one / spec.run_id) == losses(two / spec.run_id)
        assert metrics(one / spec.run_id) == metrics(two / spec.run_id)
        for name in (ADAPTER, "predictions.jsonl"):
            assert (one / spec.run_id / name).read_bytes() == (two / spec.run_id / name).read_bytes()
        a, b = (record.read_record(study / spec.run_id) for study in (one, two))
        assert (a.status, a.steps, a.scores) == (b.status, b.steps, b.scores)
        assert a.efficiency.train_tokens == b.efficiency.train_tokens


def alike(one: Path, two: Path, specs: list[RunSpec]) -> None:
    """Equal but for the rounding of another batch shape."""
    for spec in specs:
        a, b = (record.read_record(study / spec.run_id) for study in (one, two))
        assert (a.status, a.steps) == (b.status, b.steps) == ("completed", spec.trainer.max_steps)
        assert losses(one / spec.run_id) == pytest.approx(losses(two / spec.run_id), rel=1e-5)
        assert a.scores["test"]["after"].nll == pytest.approx(b.scores["test"]["after"].nll, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 9, 19])
def test_a_stopped_study_goes_on_as_if_nothing_had_happened(
    steps: int, specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    """Nineteen steps in, the two shorter runs are done and the third is at its last but one."""
    run_all(specs, "undisturbed")
    first = run_all(specs, "stopped", stop_after=steps)
    done = {event.record.run_id for event in first if isinstance(event, RunFinished)}
    waiting = [spec for spec in specs if spec.run_id not in done]
    assert waiting
    for spec in waiting:
        folder = tmp_path / "stopped" / spec.run_id
        assert [path.name for path in folder.iterdir()] == [checkpoint.CHECKPOINT]
        assert record.status(folder) is None
    second = run_all(waiting, "stopped")
    assert once_each([*first, *second], specs)
    identical(tmp_path / "undisturbed", tmp_path / "stopped", specs)
    assert not list(tmp_path.rglob(checkpoint.CHECKPOINT))


def test_a_crash_costs_only_the_steps_since_the_last_checkpoint(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "undisturbed")
    step, calls = Pack.step, []

    def crash(pack: Pack) -> None:
        calls.append(pack)
        if len(calls) == 4:
            raise KeyboardInterrupt
        step(pack)

    monkeypatch.setattr(Pack, "step", crash)
    with pytest.raises(KeyboardInterrupt):
        run_all(specs, "crashed", checkpoint_seconds=1e-9)
    monkeypatch.setattr(Pack, "step", step)
    events = run_all(specs, "crashed")
    assert min(event.step for event in events if isinstance(event, Step)) == 4
    identical(tmp_path / "undisturbed", tmp_path / "crashed", specs)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scribble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit of the last tensor, which leaves a file that can be read."""
    found = bytearray(path.read_bytes())
    found[-3] ^= 1
    path.write_bytes(found)


def other_modules(path: Path) -> None:
    state, progress = checkpoint.load(path.parent)  # type: ignore[misc]
    state.popitem()
    checkpoint.save(path.parent, state, progress)


@pytest.mark.parametrize("damage", [cut, scribble, empty, flip, other_modules])
def test_a_damaged_checkpoint_is_ignored(
    damage: Callable[[Path], None], specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    run_all(specs, "undisturbed")
    run_all(specs, "stopped", stop_after=6)
    for spec in specs:
        damage(tmp_path / "stopped" / spec.run_id / checkpoint.CHECKPOINT)
    events = run_all(specs, "stopped")
    identical(tmp_path / "undisturbed", tmp_path / "stopped", specs)
    if damage is not other_modules:
        told = [event.message for event in events if isinstance(event, Remark)]
        assert sum("its checkpoint is damaged" in message for message in told) == len(specs)


def test_a_checkpoint_of_more_than_is_trained_now_is_not_gone_on_from(
    make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    """Former versions had AdaLoRA's divisor train along in bfloat16 and on a GPU."""
    spec = make_run("attn", method={"name": "adalora"}, trainer={"max_steps": 8})
    run_all([spec], "undisturbed")
    run_all([spec], "stopped", stop_after=5)
    folder = tmp_path / "stopped" / spec.run_id
    state, progress = checkpoint.load(folder)  # type: ignore[misc]
    name = next(name for name in state if ".lora_A." in name).replace(".lora_A.", ".ranknum.")
    checkpoint.save(folder, state | {name: tuple(torch.ones(1) for _ in range(3))}, progress)
    events = run_all([spec], "stopped")
    assert min(event.step for event in events if isinstance(event, Step)) == 1
    identical(tmp_path / "undisturbed", tmp_path / "stopped", [spec])


def test_a_checkpoint_is_replaced_whole_under_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two commands each writes a file of its own; one that cannot leaves the old checkpoint and nothing else."""
    write, names = checkpoint.save_file, list[Path]()

    def noted(tensors: Any, path: Path, **metadata: Any) -> None:
        names.append(path)
        write(tensors, path, **metadata)

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", noted)
    for step in (1, 2):
        checkpoint.save(tmp_path, {"q": (torch.ones(2), torch.full((1,), step))}, {"step": step})
    assert len(set(names)) == 2
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, {"q": (torch.ones(2),)}, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CHECKPOINT]
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert (found[1], found[0]["q"][1].item()) == ({"step": 2}, 2)
    checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_half_written_is_cleared_away(
    specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    run_all(specs, "stopped", stop_after=3)
    folder, token = tmp_path / "stopped" / specs[0].run_id, "0123456789abcdef"
    (folder / f".{checkpoint.CHECKPOINT}.{token}").write_bytes(b"half")
    (folder / f".adapter.{token}").mkdir()
    (folder / f".adapter.{token}" / "adapter_model.safetensors").write_bytes(b"half")
    (folder / ".notes").write_text("someone's own")
    run_all(specs, "stopped")
    names = {path.name for path in folder.iterdir()}
    assert names == {".notes", "adapter", "metrics.jsonl", "predictions.jsonl", "record.json"}


@pytest.mark.parametrize("from_step", [0, 3])
def test_a_step_that_runs_out_of_memory_splits_the_pack(
    from_step: int, specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "roomy")
    whole, calls = Pack.forward_backward, []

    def limited(pack: Pack, batch: Any) -> Any:
        calls.append(len(batch.index))
        if len(batch.index) > 1 and len(calls) > from_step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pack, batch)

    monkeypatch.setattr(Pack, "forward_backward", limited)
    events = run_all(specs, "tight")
    assert calls[from_step] == 3
    assert calls[-1] == 1
    assert any("out of memory with 3" in event.message for event in events if isinstance(event, Remark))
    assert once_each(events, specs)
    alike(tmp_path / "roomy", tmp_path / "tight", specs)


def test_an_evaluation_that_runs_out_of_memory_costs_no_step(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "roomy")
    whole = pack_trainer.evaluate

    def limited(pack: Pack, slots: Any, *args: Any, **kwargs: Any) -> Any:
        if len(slots) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pack, slots, *args, **kwargs)

    monkeypatch.setattr(pack_trainer, "evaluate", limited)
    assert once_each(run_all(specs, "tight"), specs)
    alike(tmp_path / "roomy", tmp_path / "tight", specs)


def test_base_scores_that_run_out_of_memory_are_taken_again(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "roomy")
    whole, calls = pack_trainer.evaluate, []

    def limited(pack: Pack, slots: Any, run: Any, split: str) -> Any:
        calls.append((list(slots), split))
        if calls.count(([-1], "test")) == 1 and calls[-1] == ([-1], "test"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pack, slots, run, split)

    monkeypatch.setattr(pack_trainer, "evaluate", limited)
    run_all(specs, "tight")
    for spec in specs:
        one, two = (record.read_record(tmp_path / study / spec.run_id) for study in ("roomy", "tight"))
        assert {split: one.scores[split]["before"] for split in one.scores} == {
            split: two.scores[split]["before"] for split in two.scores
        }


def test_a_run_out_of_patience_trains_no_further_when_its_last_scores_run_out_of_memory(
    make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = {"lr": 0.15, "schedule": "constant", "warmup_fraction": 0.0}
    trainer = {"max_steps": 24, "patience": 2}
    pair = [make_run("full", seed=seed, trainer=trainer, optim=optim, evaluation={"every_steps": 1}) for seed in (0, 1)]
    run_all(pair, "roomy")
    whole, calls = pack_trainer.evaluate, []

    def limited(pack: Pack, slots: Any, *args: Any) -> Any:
        calls.append(list(slots))
        if sum(slots != [-1] for slots in calls) == 1 and slots != [-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(pack, slots, *args)

    monkeypatch.setattr(pack_trainer, "evaluate", limited)
    run_all(pair, "tight")
    for spec in pair:
        one, two = (record.read_record(tmp_path / study / spec.run_id) for study in ("roomy", "tight"))
        assert one.saved == two.saved
        assert one.saved["stopped_early"]
        assert one.steps == two.steps < 24


def test_a_checkpoint_that_cannot_be_written_costs_no_run(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **_: Any) -> None:
        raise SafetensorError("No space left on device")

    run_all(specs, "roomy")
    monkeypatch.setattr(checkpoint, "save_file", full)
    events = run_all(specs, "full", checkpoint_seconds=1e-9)
    said = [event.message for event in events if isinstance(event, Remark) and "checkpoint" in event.message]
    assert f"{specs[0].run_id}: its checkpoint cannot be written: No space left on device" in said
    identical(tmp_path / "roomy", tmp_path / "full", specs)


def test_a_pack_that_cannot_even_be_built_is_made_smaller(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "roomy")
    build = AdapterStore.__init__

    def limited(store: AdapterStore, model: Any, targets: Any, capacities: Any, device: Any) -> None:
        if len(capacities) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        build(store, model, targets, capacities, device)

    monkeypatch.setattr(AdapterStore, "__init__", limited)
    run_all(specs, "tight")
    alike(tmp_path / "roomy", tmp_path / "tight", specs)


def test_a_run_that_does_not_fit_alone_fails_and_the_rest_go_on(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the adapter of the second run can be held."""
    run_all(specs, "roomy")
    build = AdapterStore.__init__

    def limited(store: AdapterStore, model: Any, targets: Any, capacities: Any, device: Any) -> None:
        if any(rank == 8 for capacity in capacities for rank in capacity.ranks.values()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore about it")
        build(store, model, targets, capacities, device)

    monkeypatch.setattr(AdapterStore, "__init__", limited)
    run_all(specs, "tight", max_pack=1)
    failed = record.read_record(tmp_path / "tight" / specs[1].run_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["class"] == "OutOfMemoryError"
    assert failed.error["message"] == "CUDA out of memory. Tried to allocate 8 GiB"
    alike(tmp_path / "roomy", tmp_path / "tight", [specs[0], specs[2]])


def test_a_run_that_breaks_is_recorded_as_failed_and_the_rest_complete(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "undisturbed")
    bad, step = specs[1].run_id, Pack.step

    def breaking(pack: Pack) -> None:
        if any(job.run_id == bad and job.done == 2 for _, job in pack.active):
            raise RuntimeError("cuBLAS is unwell\nand says so at length")
        step(pack)

    monkeypatch.setattr(Pack, "step", breaking)
    events = run_all(specs, "one-bad")
    finished = {e.record.run_id: e.record.status for e in events if isinstance(e, RunFinished)}
    assert finished == {specs[0].run_id: "completed", bad: "failed", specs[2].run_id: "completed"}
    failed = record.read_record(tmp_path / "one-bad" / bad)
    assert failed.error == {"class": "RuntimeError", "message": "cuBLAS is unwell", "traceback": "traceback.txt"}
    assert "and says so at length" in (tmp_path / "one-bad" / bad / "traceback.txt").read_text()
    alike(tmp_path / "undisturbed", tmp_path / "one-bad", [specs[0], specs[2]])


def test_a_run_that_diverges_is_recorded_as_such_and_disturbs_nobody(
    specs: list[RunSpec], make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    wild = make_run("ff", rank=8, trainer={"max_steps": 6}, optim={"lr": 1e30, "warmup_fraction": 0.0})
    run_all(specs, "tame")
    run_all([specs[0], wild, specs[2]], "wild")
    diverged = record.read_record(tmp_path / "wild" / wild.run_id)
    assert diverged.status == "diverged"
    assert 0 < diverged.steps < 6
    assert all(set(moments) == {"before"} for moments in diverged.scores.values())
    rows = [json.loads(line) for line in (tmp_path / "wild" / wild.run_id / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] is None
    assert math.isfinite(rows[-2].get("loss", 0.0))
    alike(tmp_path / "tame", tmp_path / "wild", [specs[0], specs[2]])


def statuses(study: Path) -> dict[str, Record]:
    return {found.run_id: found for found in record.records(study)}


def test_what_cannot_be_prepared_fails_alone(specs: list[RunSpec], make_run: Any, run_all: Any, tmp_path: Path) -> None:
    """A file that is not there, a role the model lacks, a model that does not exist."""
    lost = make_run("attn", dataset={"path": str(tmp_path / "lost.jsonl")})
    misplaced = make_run("attn", placement={"name": "attn", "roles": ["attn_q"], "layers": "last:99"})
    nowhere = make_run("attn", model={"location": "no_such_architecture"})
    run_all([lost, specs[0], misplaced, nowhere])
    found = statuses(tmp_path / "study")
    assert {run_id: done.status for run_id, done in found.items()} == {
        lost.run_id: "failed", misplaced.run_id: "failed", nowhere.run_id: "failed", specs[0].run_id: "completed",
    }  # fmt: skip
    for spec, kind, part in (
        (lost, "DataError", "lost.jsonl: no such file"), (misplaced, "SpecError", "this model has 3 layers"),
        (nowhere, "ModelError", "no_such_architecture"),
    ):  # fmt: skip
        error = found[spec.run_id].error
        assert error is not None
        assert error["class"] == kind
        assert part in error["message"]


def test_a_model_whose_head_is_of_its_own_making_trains_through_it(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs, "plain")
    shutil.rmtree(tmp_path / "cache" / "verdicts")  # the code of a version does not change under it
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    run_all(specs)
    found = statuses(tmp_path / "study")
    assert [found[spec.run_id].status for spec in specs] == ["completed"] * 3
    plain = statuses(tmp_path / "plain")
    for spec in specs:
        ours, other = (one[spec.run_id].scores["test"]["before"].nll for one in (found, plain))
        assert abs(ours - other) > 1e-3


def test_runs_are_the_same_to_the_last_bit_in_any_pack_where_that_is_asked_for(
    make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    """In bfloat16 on a CPU, with dropout, clipping, other ranks and examples of other lengths, alone and in packs."""
    trainer = {"max_steps": 4, "deterministic": True, "precision": "bfloat16", "batch_size": 3}
    common = {"trainer": trainer, "optim": {"max_grad_norm": 0.05}, "evaluation": {"every_steps": 2}}
    specs = [
        make_run("attn", **common), make_run("ff", rank=8, method={"dropout": 0.2}, **common),
        make_run("full", rank=2, seed=1, **common), make_run("ff", rank=24, seed=2, **common),
    ]  # fmt: skip
    for spec in specs:
        run_all([spec], "alone")
    for size in (2, 4):
        run_all(specs, f"packs-of-{size}", max_pack=size)
        identical(tmp_path / "alone", tmp_path / f"packs-of-{size}", specs)


def test_a_run_that_was_not_updated_has_diverged(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that is no number leaves the run as it is, and the loss finite."""
    run_all(specs, "tame")
    original = RunState.hyperparameters

    def rates(state: RunState) -> Any:
        rows = original(state)
        return [[math.inf, *row[1:]] for row in rows] if (state.run_id, state.done) == (specs[1].run_id, 2) else rows

    monkeypatch.setattr(RunState, "hyperparameters", rates)
    run_all(specs, "wild")
    assert record.read_record(tmp_path / "wild" / specs[1].run_id).status == "diverged"
    alike(tmp_path / "tame", tmp_path / "wild", [specs[0], specs[2]])
