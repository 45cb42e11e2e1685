"""How many runs fit, and which may share a pack."""

import dataclasses
from typing import Any

import pytest
import torch

from sweeper.models import budget
from sweeper.spec import Settings
from sweeper.training import compilation, memory
from sweeper.training.calibrate import Solo
from sweeper.training.events import RunFinished, RunStarted
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from sweeper.training.sharing import pack_key, pack_key_of
from sweeper.training.source import Fixed, PendingGroup
from sweeper.training.trainer import Alike, Trainer

CPU = torch.device("cpu")
SETTINGS = Settings(study="x")


def solo(size: int) -> Solo:
    """A calibration that says a run adds `size` bytes to a pack."""
    return Solo(0.1, 100, 10 * size, size // 4, size - size // 4, "saved tensors")


@pytest.fixture
def runs(load: Any, place: Any, make_spec: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> list[RunState]:
    base, found = load("llama"), []
    for name, rank in [("attn", 2), ("ff", 4), ("full", 8)] * 4:
        spec = make_spec(rank=rank, trainer={"batch_size": 4})
        job = make_job(name, make_adapter(base, name, rank), make_examples(0))
        ranks = dict.fromkeys(place(base, name), rank)
        run = dataclasses.replace(job.run, spec=spec)
        found.append(dataclasses.replace(job, run=run, ranks=ranks))
    return found


@pytest.mark.parametrize(
    ("free", "expected"),
    [(0, 1), (999, 1), (5_000, 4), (10_000, 8), (10**9, 12)],
    ids=["nothing", "less than one", "some", "more", "plenty"],
)
def test_runs_that_fit_into_what_is_free(
    free: int, expected: int, load: Any, runs: list[RunState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest run counts for every slot, and a part of what is free is left free."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    sizes = [solo(size) for size in (400, 700, 1000)] * 4
    assert (
        memory.runs_that_fit(load("llama"), list(zip(runs, sizes, strict=True)), SETTINGS, CPU, at_once=12) == expected
    )
    capped = dataclasses.replace(SETTINGS, max_pack=3)
    assert memory.runs_that_fit(load("llama"), list(zip(runs, sizes, strict=True)), capped, CPU, at_once=12) == min(
        expected, 3
    )


def test_without_a_calibration_the_closed_form_counts(load: Any, runs: list[RunState]) -> None:
    base = load("llama")
    sizes = [memory.run_bytes(base, run, None) for run in runs[:3]]
    states = [16 * budget.lora_parameters(run.ranks) for run in runs[:3]]
    assert all(size > state for size, state in zip(sizes, states, strict=True))
    assert sizes[0] < sizes[2]
    assert memory.run_bytes(base, runs[0], solo(1000)) == 1000


def test_the_closed_form_and_the_calibration_are_of_one_size(load: Any, runs: list[RunState]) -> None:
    """The estimate may err by half, not by a multiple."""
    from sweeper.training.calibrate import _measure

    base = load("llama")
    for run in runs[:3]:
        measured = _measure(base, dataclasses.replace(run), PackConfig(batch_size=4))
        counted = memory.run_bytes(base, run, measured)
        assert 0.5 < memory.run_bytes(base, run, None) / counted < 2


def key(spec: Any, lengths: list[int]) -> Any:
    return pack_key(spec, lengths)


def test_runs_share_a_pack_unless_their_batches_differ(make_spec: Any) -> None:
    spec = make_spec()
    wanted = key(spec, [40] * 100)
    for like in (
        make_spec(rank=16, seed=3, method={"dropout": 0.1}, optim={"lr": 1.0, "schedule": "linear"}),
        make_spec(placement={"name": "ff", "roles": ["ff_up"], "layers": "first:1"}, trainer={"max_steps": 99}),
        make_spec(dataset={"name": "other"}, evaluation={"every_steps": 3}),
    ):
        assert key(like, [33] * 100) == wanted
    for unlike in (
        make_spec(trainer={"batch_size": 4}),
        make_spec(trainer={"accumulation": 2}),
        make_spec(trainer={"activation_checkpointing": True}),
    ):
        assert key(unlike, [40] * 100) != wanted
    assert key(spec, [65] * 100) != wanted
    assert key(spec, [32] * 100) != wanted
    # a few long examples do not decide
    assert key(spec, [40] * 95 + [500] * 5) == wanted
    assert key(spec, [40] * 80 + [500] * 20) != wanted


def test_datasets_of_different_length_train_in_packs_of_their_own(make_run: Any, run_all: Any) -> None:
    short = [make_run("attn"), make_run("ff")]
    long = [make_run(name, dataset={"system": "Is this number even or odd?"}) for name in ("attn", "ff")]
    events = run_all([short[0], long[0], short[1], long[1]])
    running: set[str] = set()
    together = set()
    for event in events:
        if isinstance(event, RunStarted):
            running.add(event.run_id)
        elif isinstance(event, RunFinished):
            running.discard(event.record.run_id)
        together.add(frozenset(running))
    assert frozenset(spec.run_id for spec in short) in together
    assert frozenset(spec.run_id for spec in long) in together
    assert max(map(len, together)) == 2


@pytest.mark.parametrize(
    ("chosen", "steps", "wanted"),
    [("auto", 60, (False, True)), ("auto", 10**6, (True, True)), ("on", 1, (True, True)),
     ("capture", 10**6, (False, True)), ("off", 10**6, (False, False))],
)  # fmt: skip
def test_layers_are_compiled_where_that_pays(
    chosen: str, steps: int, wanted: tuple[bool, bool], load: Any, make_run: Any, runs: list[RunState]
) -> None:
    trainer = Trainer(Fixed([]), Settings(study="s", compile=chosen, device="cpu"), lambda: False)  # type: ignore[arg-type]
    trainer.context.device = torch.device("cuda")
    groups = [PendingGroup(key="all", spec=make_run(trainer={"max_steps": steps}), most=9, left=9)]
    found = trainer._config(load("llama"), pack_key_of(runs[0]), Alike(groups=groups, samples=runs))
    assert (found.compiled, found.captured) == wanted


def test_compiling_pays_sooner_for_larger_batches_and_models() -> None:
    def pays(passes: float, tokens: float = 2000, width: int = 576) -> bool:
        return compilation.pays(passes, layers=30, width=width, tokens=tokens, lengths_vary=False)

    assert not pays(60)
    assert pays(6000)
    assert not pays(700)
    assert pays(700, tokens=10_000)
    assert pays(700, width=2048)
    assert not pays(0)
