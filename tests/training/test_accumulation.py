"""A step is the same however it is cut into forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import methods, record
from sweeper.arms import Arm, Dimension, single
from sweeper.lora import noise
from sweeper.lora.lowrank import keep_mask, row_index
from sweeper.lora.seeds import for_rows
from sweeper.lora.trainee import UnpackedSpec
from sweeper.models import budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:is_gradient_checkpointing:FutureWarning"),
]
CUTS = [(6, 1), (3, 2), (2, 3), (1, 6)]
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.3}, "dora": {}, "vera": {"options": {"d_initial": 0.5}}, "pissa": {},
    "relora": {"options": {"restarts": 2, "warmup_steps": 1, "prune": 0.9}}, "sparse": {"options": {"sparsity": 0.5}},
    "full_ft": {}, "bitfit": {}, "adalora": {},
}  # fmt: skip
TRAINER = {"max_steps": 8, "neftune_alpha": 5.0}


def test_rows_of_a_later_pass_draw_what_they_would_in_one() -> None:
    whole = keep_mask(4_000_000_000, 5, row_index(6 * 10, 10, torch.device("cpu")), 32, 0.4).view(6, 10, 32)
    part = keep_mask(for_rows(4_000_000_000, 4), 5, row_index(2 * 10, 10, torch.device("cpu")), 32, 0.4).view(2, 10, 32)
    assert torch.equal(part, whole[4:])
    seeds = torch.tensor([4_000_000_000, for_rows(4_000_000_000, 4)])
    drawn = noise.uniform(seeds, 6 * 10, 10, 32).view(2, 6, 10, 32)
    assert torch.equal(drawn[1, :2], drawn[0, 4:])
    assert not torch.equal(drawn[1, :2], drawn[0, :2])


@pytest.mark.parametrize("name", list(SECTIONS))
def test_equal_products_give_equal_results(
    name: str, load: Any, place: Any, make_run: Any, make_job: Any, make_examples: Any, train: Any
) -> None:
    """With dropout, noise, clipping, penalties, averages, learnt patterns and ranks that are given up."""
    base = load("llama")
    optim = {"lr": 3e-3, "max_grad_norm": 0.5, "weight_decay": 0.1}
    if name == "lora":
        optim |= {"update_penalty": 0.1, "orthogonality_penalty": 0.01, "norm_penalty": 0.01}
    averaged = {} if name == "adalora" else {"ema_decay": 0.9}
    spec = make_run("full", method={"name": name, **SECTIONS[name]}, trainer=TRAINER | averaged, optim=optim)
    targets = methods.placed(spec.method, place(base, "full"), base.targets, tied=True)
    adapter = methods.adapter(spec, budget.uniform(targets, 4))
    capacities: Any = adapter if isinstance(adapter, UnpackedSpec) else [adapter.capacity]
    found = []
    for batch_size, accumulation in CUTS:
        job = make_job(
            "x", adapter, make_examples(0), steps=8, batch_size=batch_size, accumulation=accumulation, seed=3
        )
        job = job.with_spec(optim=spec.optim)
        options = {"batch_size": batch_size, "accumulation": accumulation}
        found.append(train(base, [job], capacities=capacities, **options)["x"])
    whole = found[0]
    for cut in found[1:]:
        assert cut.losses == pytest.approx(whole.losses, rel=2e-5)
        assert cut.norms == pytest.approx(whole.norms, rel=1e-3)
        for key, parts in whole.adapter.items():
            torch.testing.assert_close(cut.adapter[key][0], parts[0], rtol=0, atol=2e-4, msg=key)


def test_a_sweep_scores_the_same_with_equal_products_and_trains_each(
    make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    shapes = [{"batch_size": 4}, {"batch_size": 2, "accumulation": 2}, {"batch_size": 1, "accumulation": 4}]
    specs = [make_run("full", trainer=shape, optim={"lr": 5e-2}) for shape in shapes]
    run_all(specs)
    whole, *cut = [record.read_record(tmp_path / "study" / spec.run_id) for spec in specs]
    for one in cut:
        assert one.scores["test"]["after"].nll == pytest.approx(whole.scores["test"]["after"].nll, rel=1e-5)
        assert one.efficiency.train_tokens == whole.efficiency.train_tokens
    assert {one.data["train"]["order"] for one in (whole, *cut)} == {"by step"}


def test_accumulated_runs_are_other_runs_than_those_of_the_former_order(make_spec: Any) -> None:
    """Ids as they were while each forward pass had an order of its own: only runs of one pass a step keep theirs."""
    before = {1: "9ce70a49dd74", 2: "12682a1077dc", 4: "1c860fc5e142"}
    now = {count: make_spec(trainer={"accumulation": count}).run_id for count in before}
    assert now[1] == before[1]
    assert len({*now.values(), *before.values()}) == 5


def test_a_search_over_accumulated_runs_is_another_search(make_spec: Any) -> None:
    """Trials that were judged while each pass had an order of its own are none of it."""
    before = {1: "485cc762", 2: "d2a0fd72"}
    now = {count: single(make_spec(trainer={"accumulation": count})) for count in before}
    assert now[1].key == before[1]
    assert now[2].key not in before.values()
    tuned = Dimension(key="trainer.accumulation", kind="choice", choices=(1, 2))
    keys = {Arm(defaults=arm.defaults, space=(tuned,), make=arm.make).key for arm in now.values()}
    assert len(keys) == 1
    assert not keys & {"485cc762", "d2a0fd72"}
