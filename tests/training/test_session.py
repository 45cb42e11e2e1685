"""What a run leaves on disk is true, repeatable, and independent of the runs beside it."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sweeper import record, tasks
from sweeper.record import Record
from sweeper.spec import RunSpec
from sweeper.training import context, pack_trainer
from sweeper.training.events import Evaluated, Remark, RunFinished, RunStarted, Step
from sweeper.training.writer import Writer

# PEFT still asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def specs(make_run: Callable[..., RunSpec]) -> list[RunSpec]:
    return [
        make_run("attn"),
        make_run("ff", rank=8, method={"dropout": 0.2}),
        make_run("full", rank=2, seed=1, method={"rank_stabilised": True}),
        make_run("attn", rank=16, trainer={"max_steps": 3}, optim={"lr": 3e-3, "schedule": "linear"}),
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder: Path, specs: list[RunSpec]) -> list[Record]:
    return [record.read_record(folder / spec.run_id) for spec in specs]


def test_records_are_true(
    specs: list[RunSpec], run_all: Any, load: Any, parity: dict[str, Any], tmp_path: Path
) -> None:
    events = run_all(specs)
    base = load("llama")
    by_name = {target.name: target for target in base.targets}
    found = trained(tmp_path / "study", specs)
    assert [event.record.run_id for event in events if isinstance(event, RunFinished)] == [
        specs[i].run_id for i in (3, 0, 1, 2)  # the shortest ends first
    ]  # fmt: skip
    assert {event.run_id: event.steps for event in events if isinstance(event, RunStarted)} == {
        spec.run_id: spec.trainer.max_steps for spec in specs
    }
    for spec, done in zip(specs, found, strict=True):
        folder = tmp_path / "study" / spec.run_id
        assert (done.status, done.steps, done.error) == ("completed", spec.trainer.max_steps, None)
        assert done.study == "study"
        assert len(done.modules) == {"attn": 12, "ff": 9, "full": 21}[spec.placement.name]
        for module in done.modules:
            target = by_name[module.name]
            assert (module.role, module.layer, module.rank) == (target.role, target.layer, spec.rank)
            assert module.parameters == spec.rank * (target.in_features + target.out_features)
        tensors = load_file(folder / ADAPTER)
        assert done.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
        assert done.trainable_parameters == sum(module.parameters for module in done.modules)
        assert done.total_parameters == sum(p.numel() for p in base.model.parameters())
        assert done.data["train"]["examples"] == 50
        assert done.efficiency.adapter_bytes == 4 * done.trainable_parameters
        assert done.efficiency.train_seconds_solo is None  # calibration was off
        assert done.efficiency.pack_runs > 1
        assert {entry.name for entry in folder.iterdir()} == {
            "record.json", "metrics.jsonl", "predictions.jsonl", "adapter",
        }  # fmt: skip
        for split in ("validation", "test"):
            before, after = done.scores[split]["before"], done.scores[split]["after"]
            assert before == found[0].scores[split]["before"]
            assert after.nll < before.nll
            assert (after.examples, after.tokens) == (10, before.tokens)
        plain = json.loads((folder / "record.json").read_text())
        for moments in plain["scores"].values():
            for score in moments.values():
                assert score["perplexity"] == pytest.approx(math.exp(score["nll"]), rel=1e-12)


def test_what_was_cut_is_remarked_once_for_a_dataset_and_model(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    short = {"max_length": 24}
    specs = [make_run(rank=rank, dataset=short) for rank in (2, 4)] + [make_run("ff", rank=2)]
    said = [event.message for event in run_all(specs) if isinstance(event, Remark) and not event.by_worker]
    kept = record.read_record(tmp_path / "study" / specs[0].run_id)
    assert kept.data["train"]["truncated"] + kept.data["train"]["dropped"] > 0
    assert said == [f"dataset={specs[0].dataset.name} on model={specs[0].model.name}: {record.shortened(kept.data)}"]


def test_steps_are_reported_once_each_and_kept(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    events = run_all(specs)
    for spec in specs:
        steps = [event for event in events if isinstance(event, Step) and event.run_id == spec.run_id]
        assert [event.step for event in steps] == list(range(1, spec.trainer.max_steps + 1))
        rows = [row for row in lines(tmp_path / "study" / spec.run_id / "metrics.jsonl") if "loss" in row]
        assert [(row["loss"], row["lr"], row["grad_norm"]) for row in rows] == [
            (event.loss, event.lr, event.grad_norm) for event in steps
        ]


def test_predictions_add_up_to_the_scores(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    run_all(specs)
    for spec, done in zip(specs, trained(tmp_path / "study", specs), strict=True):
        rows = lines(tmp_path / "study" / spec.run_id / "predictions.jsonl")
        for split, moments in done.scores.items():
            for moment, score in moments.items():
                own = [row for row in rows if (row["split"], row["moment"]) == (split, moment)]
                assert len({row["id"] for row in own}) == len(own) == score.examples
                assert sum(row["tokens"] for row in own) == score.tokens
                assert sum(row["nll"] for row in own) / score.tokens == pytest.approx(score.nll, rel=1e-12)
                matches = sum(row["exact_match"] for row in own) / len(own)
                assert score.metrics["exact_match"] == pytest.approx(matches)
        assert len(rows) == 40


def test_recorded_nll_is_that_of_the_exported_adapter_in_transformers(
    specs: list[RunSpec], run_all: Any, load: Any, tmp_path: Path
) -> None:
    run_all(specs)
    base = load("llama")
    for spec, done in zip(specs, trained(tmp_path / "study", specs), strict=True):
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "study" / spec.run_id / "adapter")
        splits = tasks.encode(spec.dataset, base.tokenizer, model_key="x", cache=None)
        for split in ("validation", "test"):
            total, tokens = 0.0, 0
            for example in splits[split].examples:
                ids = torch.tensor([example.input_ids])
                labels = ids.clone()
                labels[0, : example.prompt_length] = -100
                count = len(example.input_ids) - example.prompt_length
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=labels).loss) * count
                tokens += count
            assert done.scores[split]["after"].nll == pytest.approx(total / tokens, abs=1e-4)


def same_files(one: Path, two: Path, specs: list[RunSpec]) -> None:
    for spec in specs:
        for name in (ADAPTER, "predictions.jsonl"):
            assert (one / spec.run_id / name).read_bytes() == (two / spec.run_id / name).read_bytes()
        timeless = [
            [
                {key: value for key, value in row.items() if key not in ("seconds", "time")}
                for row in lines(folder / "metrics.jsonl")
            ]
            for folder in (one / spec.run_id, two / spec.run_id)
        ]
        assert timeless[0] == timeless[1]


def test_a_rerun_is_bit_identical(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    for study in ("one", "two"):
        run_all(specs, study)
    same_files(tmp_path / "one", tmp_path / "two", specs)


def alike(one: Path, two: Path, specs: list[RunSpec]) -> None:
    """Equal but for the rounding of another batch shape."""
    for spec, a, b in zip(specs, trained(one, specs), trained(two, specs), strict=True):
        assert (a.status, a.steps, a.modules, a.data) == (b.status, b.steps, b.modules, b.data)
        for split, moments in a.scores.items():
            for moment, score in moments.items():
                assert b.scores[split][moment].nll == pytest.approx(score.nll, rel=1e-5)
        losses = [[r["loss"] for r in lines(f / spec.run_id / "metrics.jsonl") if "loss" in r] for f in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_order_of_requests_changes_no_record(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    run_all(specs, "one")
    run_all([specs[i] for i in (2, 0, 3, 1)], "two")
    alike(tmp_path / "one", tmp_path / "two", specs)


@pytest.mark.parametrize("max_pack", [1, 2])
def test_the_size_of_the_pack_changes_no_record(
    max_pack: int, specs: list[RunSpec], run_all: Any, tmp_path: Path
) -> None:
    run_all(specs, "one")
    events = run_all(specs, "two", max_pack=max_pack)
    alike(tmp_path / "one", tmp_path / "two", specs)
    running, most = 0, 0
    for event in events:
        running += isinstance(event, RunStarted) - isinstance(event, RunFinished)
        most = max(most, running)
    assert most == max_pack
    assert all(done.efficiency.pack_runs <= max_pack for done in trained(tmp_path / "two", specs))


def test_runs_of_other_data_shapes_and_models_go_through_together(
    specs: list[RunSpec], make_run: Any, tiny_spec: Any, run_all: Any, tmp_path: Path
) -> None:
    others = [
        specs[0],
        make_run("attn", trainer={"batch_size": 3}),
        make_run("attn", trainer={"accumulation": 2}),
        make_run("attn", trainer={"activation_checkpointing": True}),
        make_run("attn", dataset={"system": "Even or odd?"}),
        make_run("full", model=dataclasses.asdict(tiny_spec("gpt2"))),
    ]
    run_all(others)
    for spec, done in zip(others, trained(tmp_path / "study", others), strict=True):
        assert done.status == "completed"
        assert done.scores["test"]["after"].nll < done.scores["test"]["before"].nll
        assert done.run_id == spec.run_id
    plain, _, _, recomputed, *_ = trained(tmp_path / "study", others)
    assert recomputed.scores["test"]["after"].nll == pytest.approx(plain.scores["test"]["after"].nll, rel=1e-5)


def test_evaluation_midway_changes_nothing_of_the_training(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    quiet, watched = make_run("full"), make_run("full", evaluation={"every_steps": 2})
    events = run_all([quiet], "one") and run_all([watched], "two")
    moments = [event.phase for event in events if isinstance(event, Evaluated) and event.split == "validation"]
    assert moments == ["before", "2", "4", "after"]
    adapters = [tmp_path / s / spec.run_id / ADAPTER for s, spec in (("one", quiet), ("two", watched))]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_exact_match_is_greedy_text_equal_to_the_response(
    make_run: Any, run_all: Any, load: Any, tmp_path: Path
) -> None:
    """Text is asked for by another metric; `exact_match` itself comes from teacher forcing."""
    spec = make_run(
        "full", rank=8, trainer={"max_steps": 20, "batch_size": 4}, evaluation={"generate": True},
        dataset={"metrics": ["exact_match", "final_number"], "max_new_tokens": 4},
    )  # fmt: skip
    run_all([spec])
    examples = tasks.load(spec.dataset)
    responses = {example.id: example.response for split in examples.values() for example in split}
    rows = lines(tmp_path / "study" / spec.run_id / "predictions.jsonl")
    assert {row["exact_match"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row["exact_match"] == float(row["text"].strip() == responses[row["id"]] and not row["capped"])


def test_solo_figures_come_from_a_calibration_that_is_kept(specs: list[RunSpec], run_all: Any, tmp_path: Path) -> None:
    run_all(specs, "plain")
    run_all(specs[:2], "one", calibrate=True)
    kept = sorted((tmp_path / "cache" / "calibrations").iterdir())
    assert len(kept) == 2
    run_all(specs[:2], "two", calibrate=True)
    same_files(tmp_path / "one", tmp_path / "two", specs[:2])
    for one, two in zip(trained(tmp_path / "one", specs[:2]), trained(tmp_path / "two", specs[:2]), strict=True):
        assert one.efficiency.train_seconds_solo is not None
        assert one.efficiency.train_seconds_solo > 0
        assert one.efficiency.train_seconds_solo == two.efficiency.train_seconds_solo
        assert one.efficiency.peak_memory_solo_bytes == two.efficiency.peak_memory_solo_bytes
        # at least the base model and the adapter with its gradient and moments
        assert one.efficiency.peak_memory_solo_bytes > 4 * one.total_parameters + 16 * one.trainable_parameters
    # and measuring left no trace in what was trained
    alike(tmp_path / "plain", tmp_path / "one", specs[:2])


def test_a_cache_that_cannot_be_written_is_done_without(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "file" / "cache"))
    run_all(specs[:1], calibrate=True)
    (found,) = trained(tmp_path / "study", specs[:1])
    assert found.efficiency.train_seconds_solo is not None


def test_no_steps_leave_the_base_model(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    """A fresh adapter is the identity, and there is nothing to calibrate."""
    spec = make_run("full", trainer={"max_steps": 0})
    run_all([spec], calibrate=True)
    (found,) = trained(tmp_path / "study", [spec])
    assert (found.status, found.steps) == ("completed", 0)
    for moments in found.scores.values():
        assert moments["after"].nll == pytest.approx(moments["before"].nll, rel=1e-6)


def test_a_run_shorter_than_a_calibration_is_calibrated(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = make_run(trainer={"max_steps": 1})
    run_all([spec], calibrate=True)
    (found,) = trained(tmp_path / "study", [spec])
    assert (found.status, found.steps) == ("completed", 1)
    assert found.efficiency.train_seconds_solo is not None
    assert found.efficiency.train_seconds_solo > 0


def test_training_ahead_of_what_is_known_leaves_the_same(
    specs: list[RunSpec], run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(specs)
    plain = trained(tmp_path / "study", specs)
    for spec in specs:
        (tmp_path / "study" / spec.run_id / "record.json").unlink()
    monkeypatch.setattr(context, "Writer", lambda listen, background: Writer(listen, background=True))
    monkeypatch.setattr(pack_trainer.Clock, "in_flight", 3)
    events = run_all(specs)
    assert {event.record.run_id for event in events if isinstance(event, RunFinished)} == {s.run_id for s in specs}
    for one, other in zip(plain, trained(tmp_path / "study", specs), strict=True):
        assert (one.scores, one.steps, one.trainable_parameters) == (
            other.scores,
            other.steps,
            other.trainable_parameters,
        )
