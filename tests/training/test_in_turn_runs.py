"""Runs that fold their tasks' adapters, or hold them elastically, from spec to record; resuming; bad input."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from sweeper import methods
from sweeper.adapters.merge import merge
from sweeper.errors import SpecError
from sweeper.record import Record, read_record
from sweeper.rescoring import rescore
from sweeper.spec import DatasetSpec, EvaluationSpec, RunSpec, Settings, SharingSpec, from_mapping, to_mapping
from sweeper.tasks import encode
from sweeper.training import pack_trainer

from .plain import nll

MakeSpec = Callable[..., RunSpec]


@pytest.fixture
def in_turn(make_run: Callable[..., RunSpec], two_tasks: tuple[DatasetSpec, ...]) -> MakeSpec:
    """A run of two tasks one after the other, 4 steps each: whether numbers are odd, and their last digit."""

    def make(
        sharing: str, placement: str = "attn", *, options: dict[str, Any] | None = None,
        share: dict[str, Any] | None = None, **changes: Any,
    ) -> RunSpec:  # fmt: skip
        plain = {"rank": 8, "trainer": {"batch_size": 4, "max_steps": 8}, "optim": {"lr": 3e-2}} | changes
        dataset = DatasetSpec(name="sequence", family="sequence", parts=two_tasks, options=options or {})
        spec = make_run(placement, **plain)
        return dataclasses.replace(spec, dataset=dataset, sharing=SharingSpec(name=sharing, **(share or {})))

    return make


def recorded(tmp_path: Path, spec: RunSpec, study: str = "study") -> Record:
    return read_record(tmp_path / study / spec.run_id)


def adapter(tmp_path: Path, spec: RunSpec, study: str = "study") -> dict[str, Tensor]:
    return load_file(tmp_path / study / spec.run_id / "adapter" / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_merge_leaves_is_one_adapter_that_stock_peft_loads_and_that_folds_away(
    in_turn: MakeSpec, run_all: Any, load: Any, tmp_path: Path
) -> None:
    spec = in_turn("merge", "full")
    run_all([spec])
    found, base, folder = recorded(tmp_path, spec), load("llama"), tmp_path / "study" / spec.run_id
    assert not (folder / "tasks").exists()
    assert {module.rank for module in found.modules} == {16}
    assert [block["acts"] for block in found.sharing["blocks"]] == [["parity", "digit"]] * 2
    assert not {"through", "routing"} & set(found.sharing)
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / "adapter")
    for part in spec.dataset.parts:
        examples = encode(part, base.tokenizer, model_key="", cache=None)["test"].examples
        with torch.no_grad():
            total, count = nll(model, examples)
        score = found.scores[f"test/{part.name}"]
        assert float(total) / count == pytest.approx(score["after"].nll, rel=1e-5)
        assert abs(score["after"].nll - score["before"].nll) > 1e-2
    (saved,) = rescore.find([folder])
    again = list(rescore.rescore([saved], [], EvaluationSpec(name="default", splits=("test",)), Settings(study="x")))
    for one in again:
        assert one.score.nll == pytest.approx(found.scores[f"test/{one.dataset.name}"]["after"].nll, rel=1e-5)
    assert len(again) == 2


def test_folding_changes_the_scores_of_earlier_tasks_and_costs_what_one_adapter_does(
    in_turn: MakeSpec, run_all: Any, tmp_path: Path
) -> None:
    specs = [in_turn(name) for name in ("merge", "stack", "single")]
    run_all(specs)
    merged, stacked, single = (recorded(tmp_path, spec) for spec in specs)
    last = [found.scores["test/digit"]["after"].nll for found in (merged, stacked)]
    assert last[0] == pytest.approx(last[1], rel=1e-6)
    first = [found.scores["test/parity"]["after"].nll for found in (merged, stacked)]
    assert abs(first[0] - first[1]) > 1e-3
    flops = [found.efficiency.train_flops for found in (merged, single, stacked)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)
    assert flops[0] < 0.99 * flops[2]


@pytest.mark.parametrize("stop_after", [3, 4, 6])
def test_a_run_with_elastic_weights_goes_on_to_the_same_bits(
    stop_after: int, in_turn: MakeSpec, run_all: Any, tmp_path: Path
) -> None:
    spec = in_turn("ewc", share={"elasticity": 50.0, "fisher_examples": 10}, trainer={"ema_decay": 0.5, "max_steps": 8})
    run_all([spec], "whole")
    run_all([spec], "cut", stop_after=stop_after)
    assert not (tmp_path / "cut" / spec.run_id / "record.json").exists()
    run_all([spec], "cut")
    whole, cut = adapter(tmp_path, spec, "whole"), adapter(tmp_path, spec, "cut")
    assert whole.keys() == cut.keys() != set()
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert recorded(tmp_path, spec, "cut").sharing == {"fisher_examples": {"parity": 10}}


def test_consolidating_that_breaks_is_done_when_the_run_has_a_slot_again(
    in_turn: MakeSpec, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [in_turn("ewc", share={"elasticity": 50.0}), in_turn("single")]
    run_all(specs, "whole")
    plain, calls = pack_trainer.consolidate, []

    def broken(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no room")
        plain(*args)

    monkeypatch.setattr(pack_trainer, "consolidate", broken)
    run_all(specs, "broken")
    assert len(calls) == 2
    for spec in specs:
        for name, value in adapter(tmp_path, spec, "whole").items():
            torch.testing.assert_close(adapter(tmp_path, spec, "broken")[name], value, rtol=0, atol=1e-5)


def test_elastic_weights_move_less_and_are_recorded(in_turn: MakeSpec, run_all: Any, tmp_path: Path) -> None:
    """What a large elasticity holds does not come loose; the passes that found it are part of the cost."""
    free, held = in_turn("single"), in_turn("ewc", share={"elasticity": 1e7})
    run_all([free, held])
    moved = {}
    for spec in (free, held):
        lines = (tmp_path / "study" / spec.run_id / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        scores = {row["moment"]: row["nll"] for row in rows if row.get("split") == "test/parity"}
        moved[spec.sharing.name] = abs(scores["after"] - scores["4"])
    assert moved["ewc"] < 0.5 * moved["single"]
    single, elastic = (recorded(tmp_path, spec) for spec in (free, held))
    assert elastic.sharing == {"fisher_examples": {"parity": 50}}
    assert elastic.trainable_parameters == single.trainable_parameters
    assert elastic.efficiency.train_tokens == single.efficiency.train_tokens
    assert elastic.efficiency.train_flops > single.efficiency.train_flops
    assert adapter(tmp_path, held).keys() == adapter(tmp_path, free).keys()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_folded_run_merges_into_a_plain_model(in_turn: MakeSpec, run_all: Any, tmp_path: Path) -> None:
    spec = in_turn("merge")
    run_all([spec])
    (saved,) = rescore.find([tmp_path / "study" / spec.run_id])
    found = merge(saved, tmp_path / "out", device="cpu")  # raises where the logits are not the engine's
    assert found["max_logit_difference"] <= found["tolerance"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("sharing", "changes", "line"),
    [
        ("merge", {"options": {"replay": 0.5}}, "sharing=merge: its blocks train once, so dataset.options.replay"),
        ("merge", {"method": {"name": "lora", "dropout": 0.1}}, "method.dropout must be 0, got 0.1"),
        ("merge", {"share": {"elasticity": 1.0}}, "sharing.elasticity is for sharing=ewc, not merge"),
        ("single", {"share": {"fisher_examples": 8}}, "sharing.fisher_examples is for sharing=ewc, not single"),
        ("ewc", {"share": {"levels": (4,)}}, "sharing.levels, budget, common and private are of rank blocks"),
        ("ewc", {"method": {"name": "dora"}}, "method=dora cannot be held back; lora, rslora can"),
        ("ewc", {"method": {"name": "bitfit"}}, "method=bitfit cannot be held back"),
        (
            "ewc", {"trainer": {"patience": 1, "max_steps": 8}, "evaluation": {"every_steps": 2}},
            "trainer.patience would end all tasks at once",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(sharing: str, changes: dict[str, Any], line: str, in_turn: MakeSpec) -> None:
    with pytest.raises(SpecError) as caught:
        methods.check(in_turn(sharing, **changes))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("elasticity", -1.0, "sharing.elasticity must be at least 0, got -1.0"),
        ("elasticity", float("nan"), "sharing.elasticity must be at least 0"),
        ("fisher_examples", 0, "sharing.fisher_examples must be at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(field: str, value: float, line: str) -> None:
    with pytest.raises(SpecError, match=line):
        SharingSpec(name="ewc", **{field: value})


def test_ewc_needs_tasks_one_after_another(in_turn: MakeSpec) -> None:
    spec = in_turn("ewc")
    mixed = dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, name="mixture", family="mixture"))
    with pytest.raises(SpecError, match="sharing=ewc is for tasks one after another: dataset=sequence"):
        methods.check(mixed)


def test_defaults_are_left_out_of_plain_data_and_ids(in_turn: MakeSpec) -> None:
    spec = in_turn("stack")
    assert not {"elasticity", "fisher_examples"} & set(to_mapping(spec)["sharing"])
    held = in_turn("ewc", share={"elasticity": 2.0})
    assert to_mapping(held)["sharing"] == to_mapping(spec)["sharing"] | {"name": "ewc", "elasticity": 2.0}
    assert from_mapping(SharingSpec, to_mapping(held)["sharing"]) == held.sharing
    assert len({held.run_id, in_turn("ewc").run_id, in_turn("ewc", share={"fisher_examples": 8}).run_id}) == 3
