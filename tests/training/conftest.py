"""Tiny random models, random examples, and packs trained on them."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sweeper import models
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.placement import placement
from sweeper.placement.placement import PLACEMENTS, Target
from sweeper.run import Run
from sweeper.spec import (
    AllocationSpec,
    DatasetSpec,
    EvaluationSpec,
    MethodSpec,
    ModelSpec,
    OptimSpec,
    PlacementSpec,
    RunSpec,
    Settings,
    TrainerSpec,
)
from sweeper.tasks import Encoded
from sweeper.tasks.example import Tokens
from sweeper.training import train_runs
from sweeper.training.batches import DataOrder
from sweeper.training.events import Event, Step
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState
from sweeper.training.source import Fixed

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "vocab_size": 288,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 288},
    "gpt_neox": SIZES,
    "qwen2": GROUPED,
    "phi3": GROUPED,
    "gemma2": GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": GROUPED | {"logits_scaling": 4.0},
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 288,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 288},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 288},
}  # fmt: skip


def model_spec(kind: str) -> ModelSpec:
    return ModelSpec(name=f"tiny_{kind}", source="random", location=kind, config=ARCHITECTURES[kind])


@functools.cache
def _load(kind: str) -> BaseModel:
    return models.load(model_spec(kind), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def load() -> Callable[[str], BaseModel]:
    """A tiny random model of an architecture, float32 on the CPU, shared: a pack must be closed again."""
    return _load


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[[str], ModelSpec]:
    return model_spec


def _examples(seed: int, count: int = 24, shortest: int = 6, longest: int = 24) -> tuple[Encoded, ...]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = tuple(rng.integers(3, 280, int(rng.integers(shortest, longest + 1))).tolist())
        made.append(Encoded(f"{seed}/{i}", ids, int(rng.integers(1, len(ids)))))
    return tuple(made)


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., tuple[Encoded, ...]]:
    """Random token rows of random lengths, each with a random prompt length."""
    return _examples


def _place(base: BaseModel, name: str, **fields: Any) -> tuple[Target, ...]:
    spec = PlacementSpec(name=name, roles=PLACEMENTS.get(name, ()), **fields)
    return placement.resolve(base.targets, spec, layers=placement.number_of_layers(base.targets))


@pytest.fixture(scope="session")
def place() -> Callable[..., tuple[Target, ...]]:
    """Targets of a placement by name, such as `place(base, "attn", layers="first:1")`."""
    return _place


def _adapter(
    base: BaseModel, name: str = "full", rank: int = 4, *, scale: float = 2.0, dropout: float = 0.0, seed: int = 0,
    **fields: Any,
) -> AdapterSpec:  # fmt: skip
    names = [target.name for target in _place(base, name, **fields)]
    return AdapterSpec(ranks=dict.fromkeys(names, rank), scales=dict.fromkeys(names, scale), dropout=dropout, seed=seed)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., AdapterSpec]:
    return _adapter


def _job(
    run_id: str, adapter: AdapterSpec, examples: Sequence[Tokens], *, steps: int = 6, batch_size: int = 4,
    accumulation: int = 1, seed: int | None = None, bucketed: bool = True, **optim: Any,
) -> RunState:  # fmt: skip
    seed = adapter.seed if seed is None else seed
    lengths = [len(example.input_ids) for example in examples]
    spec = RunSpec(
        model=model_spec("llama"), dataset=DatasetSpec(name="none", family="jsonl"), method=MethodSpec(name="lora"),
        placement=PlacementSpec(name="full", roles=PLACEMENTS["full"]), allocation=AllocationSpec(name="uniform"),
        rank=4, alpha=8.0, seed=seed,
        optim=OptimSpec(**({"lr": 1e-2} | optim)), evaluation=EvaluationSpec(name="default"),
        trainer=TrainerSpec(max_steps=steps, batch_size=batch_size, accumulation=accumulation),
    )  # fmt: skip
    return RunState(
        run=Run(run_id=run_id, spec=spec, folder=Path(run_id)), adapter=adapter, examples=examples,
        order=DataOrder(lengths, batch_size, seed, accumulation=accumulation, bucketed=bucketed),
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_job() -> Callable[..., RunState]:
    return _job


@dataclass
class Trace:
    """What a run went through: loss and gradient norm of every step, and its adapter at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    adapter: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


def _train(
    base: BaseModel, jobs: Sequence[RunState], *, capacities: Sequence[dict[str, int]] | None = None,
    before_step: Callable[[Pack, int], None] = lambda pack, step: None, **options: Any,
) -> dict[str, Trace]:  # fmt: skip
    queue = [dataclasses.replace(job) for job in jobs]
    traces = {job.run_id: Trace() for job in jobs}
    with Pack(
        base, capacities or [job.adapter.ranks for job in jobs], PackConfig(**({"batch_size": 4} | options))
    ) as pack:
        step = 0
        while queue or pack.active:
            while queue and pack.free_slot(queue[0].adapter) is not None:
                pack.add(queue.pop(0))
            before_step(pack, step)
            pack.step()
            step += 1
            for result in pack.drain():
                trace = traces[result.state.run_id]
                trace.losses.append(result.loss)
                trace.norms.append(result.grad_norm)
            for slot, job in pack.active:
                if job.finished:
                    traces[job.run_id].adapter = pack.snapshot(slot)
                    pack.remove(slot)
    return traces


@pytest.fixture(scope="session")
def train() -> Callable[..., dict[str, Trace]]:
    """Trains jobs in one pack, in the order of its free slots; run id -> `Trace`. The jobs are not changed."""
    return _train


def _close(ours: Trace, wanted: Trace) -> None:
    assert ours.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert ours.adapter.keys() == wanted.adapter.keys() != set()
    for name, parts in wanted.adapter.items():
        for mine, other in zip(ours.adapter[name][:2], parts[:2], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Trace, Trace], None]:
    """Per-step losses within 1e-5 relative, final A and B within 1e-4."""
    return _close


def _same(ours: Trace, wanted: Trace) -> None:
    assert ours.losses == wanted.losses
    assert all(math.isfinite(loss) for loss in ours.losses)
    assert ours.adapter.keys() == wanted.adapter.keys() != set()
    for name, parts in wanted.adapter.items():
        assert all(torch.equal(mine, other) for mine, other in zip(ours.adapter[name], parts, strict=True)), name


@pytest.fixture(scope="session")
def assert_identical() -> Callable[[Trace, Trace], None]:
    """Every bit of losses, adapter and moments."""
    return _same


@pytest.fixture
def parity(tmp_path: Path) -> dict[str, Any]:
    """A dataset of numbers that are even or odd, as a section of a run's spec."""
    path = tmp_path / "parity.jsonl"
    rows = []
    for n in range(70):
        split = "train" if n < 50 else "validation" if n < 60 else "test"
        prompt = f"{(7 * n) % 90 + 10} is" + " clearly" * (n % 4)
        rows.append({"id": str(n), "prompt": prompt, "response": "01"[n % 2], "split": split})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "parity", "family": "jsonl", "path": str(path), "template": "plain", "max_length": 64}


@pytest.fixture
def two_tasks(parity: dict[str, Any], tmp_path: Path) -> tuple[DatasetSpec, ...]:
    """Whether numbers are odd, and their last digit."""
    path = tmp_path / "digit.jsonl"
    rows = [
        {
            "id": str(n), "prompt": f"{(3 * n) % 80 + 10} ends in", "response": str((3 * n) % 10),
            "split": "train" if n < 30 else "validation" if n < 40 else "test", "group": str(n // 2),
        }
        for n in range(50)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(
        DatasetSpec(name=name, family="jsonl", path=str(where), template="plain", max_length=64)
        for name, where in (("parity", parity["path"]), ("digit", path))
    )


@pytest.fixture
def make_run(make_spec: Callable[..., RunSpec], parity: dict[str, Any]) -> Callable[..., RunSpec]:
    """A run of a few steps on a tiny random Llama: `make_run("ff", rank=8, optim={"lr": 1e-2})`."""

    def make(name: str = "attn", **changes: Any) -> RunSpec:
        plain: dict[str, Any] = {
            "model": dataclasses.asdict(model_spec("llama")),
            "dataset": parity,
            "placement": {"name": name, "roles": list(PLACEMENTS[name])},
            "trainer": {"max_steps": 5, "batch_size": 2, "precision": "float32"},
            "optim": {"lr": 1e-2},
        }
        for key, value in changes.items():
            plain[key] = plain.get(key, {}) | value if isinstance(value, dict) else value
        return make_spec(**plain)

    return make


@pytest.fixture
def run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Event]]:
    """Trains specs into a study of a name; returns the events. `stop_after` steps in all, it is asked to stop."""
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))

    def go(
        specs: Sequence[RunSpec], study: str = "study", *, stop_after: float = math.inf, **settings: Any
    ) -> list[Event]:
        chosen = Settings(study=study, output_root=str(tmp_path), **({"device": "cpu", "calibrate": False} | settings))
        source = Fixed([Run.of(spec, chosen.folder) for spec in specs])

        def should_stop() -> bool:
            return sum(isinstance(event, Step) for event in source.events) >= stop_after

        train_runs(source, chosen, should_stop=should_stop)
        return source.events

    return go
