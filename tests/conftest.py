"""Fixtures of the whole suite."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper import record
from sweeper.record import Efficiency, Module, Record, Score
from sweeper.spec import RunSpec, Settings, run_spec, to_mapping
from sweeper.training.events import Evaluated, RunFinished, RunStarted, Stage, Step
from sweeper.training.source import Source
from sweeper.untrusted import sandbox

ROOT = Path(__file__).parent.parent


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(scope="module")
def sandboxed() -> None:
    """Skips where this machine cannot sandbox programs."""
    try:
        sandbox.ready()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random four-layer Llama with its byte-level tokenizer, float32 on the CPU. Do not change its weights."""
    import torch

    from sweeper import models
    from sweeper.spec import ModelSpec

    spec = ModelSpec(
        name="tiny_llama",
        source="random",
        location="llama",
        config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "vocab_size": 512,
            "tie_word_embeddings": True,
        },
    )
    return models.load(spec, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def make_spec() -> Callable[..., RunSpec]:
    """A small valid run; keyword arguments replace top-level fields, a dict updates a section."""

    def make(**changes: Any) -> RunSpec:
        plain: dict[str, Any] = {
            "model": {"name": "tiny_llama", "source": "random", "location": "llama"},
            "dataset": {"name": "jsonl", "family": "jsonl"},
            "method": {"name": "lora"},
            "placement": {"name": "attn", "roles": ["attn_q", "attn_k", "attn_v", "attn_o"]},
            "allocation": {"name": "uniform"},
            "rank": 4,
            "optim": {"lr": 1e-3},
            "trainer": {"max_steps": 4, "batch_size": 2},
            "evaluation": {"name": "default"},
        }
        for key, value in changes.items():
            plain[key] = plain.get(key, {}) | value if isinstance(value, dict) else value
        return run_spec(plain)

    return make


@pytest.fixture
def make_record(make_spec: Callable[..., RunSpec]) -> Callable[..., Record]:
    """A completed record of a spec; NLL falls with the rank so that rows can be told apart."""

    def make(spec: RunSpec | None = None, **changes: Any) -> Record:
        spec = spec or make_spec()
        scores = {
            "before": Score(nll=5.0, tokens=100, examples=10, metrics={"exact_match": 0.0}),
            "after": Score(nll=1.0 / spec.rank, tokens=100, examples=10, metrics={"exact_match": 0.75}),
        }
        plain: dict[str, Any] = {
            "run_id": spec.run_id,
            "study": "test",
            "status": "completed",
            "spec": to_mapping(spec),
            "modules": (Module(name="q", role="attn_q", layer=0, rank=spec.rank, parameters=100 * spec.rank),),
            "trainable_parameters": 100 * spec.rank,
            "total_parameters": 100_000,
            "steps": spec.trainer.max_steps,
            "scores": {"validation": scores, "test": scores},
            "efficiency": Efficiency(train_seconds_amortised=1.5, pack_runs=1, pack_peak_memory_bytes=3 << 20),
        }
        return Record(**(plain | changes))

    return make


class FakeEngine:
    """Has the trainer's signature, writes records and tells events, trains nothing.

    `fail` are run ids whose runs fail; `stop_after` calls `interrupt` after so many steps.
    """

    def __init__(self, make_record: Callable[..., Record]) -> None:
        self.make_record = make_record
        self.fail: set[str] = set()
        self.trained: list[str] = []
        self.stop_after: int | None = None
        self.interrupt: Callable[[], None] = lambda: None

    def __call__(self, source: Source, settings: Settings, *, should_stop: Callable[[], bool]) -> None:
        source.report(Stage(message="loading tiny_llama"))
        steps = 0
        while (groups := source.pending()) and (pulled := source.pull(1, [group.key for group in groups])).runs:
            (run,) = pulled.runs
            spec, run_id = run.spec, run.run_id
            source.report(RunStarted(run_id=run_id, steps=spec.trainer.max_steps))
            done = self.make_record(spec, study=settings.study)
            if run_id in self.fail:
                error = {"class": "OutOfMemoryError", "message": "no room"}
                done = self.make_record(spec, status="failed", scores={}, error=error)
            else:
                scores = done.scores["validation"]
                source.report(Evaluated(run_id=run_id, split="validation", phase="before", score=scores["before"]))
                for step in range(1, spec.trainer.max_steps + 1):
                    source.report(
                        Step(
                            run_id=run_id,
                            step=step,
                            loss=5 / step,
                            lr=1e-3,
                            grad_norm=1.0,
                            tokens=50,
                            answer_tokens=20,
                            seconds=0.1,
                        )
                    )
                    steps += 1
                    if steps == self.stop_after:
                        self.interrupt()
                    if should_stop():
                        return
                source.report(Evaluated(run_id=run_id, split="validation", phase="after", score=scores["after"]))
            record.write_record(run.folder, done)
            self.trained.append(run_id)
            source.report(RunFinished(record=done))


@pytest.fixture
def engine(make_record: Callable[..., Record]) -> FakeEngine:
    return FakeEngine(make_record)


@pytest.fixture
def composer() -> Iterator[Any]:
    """The project's own configuration, loaded the way `train.py` does."""
    from hydra.core.global_hydra import GlobalHydra

    from sweeper import config

    yield config.composer_of(None)
    GlobalHydra.instance().clear()


@pytest.fixture
def registering(tmp_path: Path) -> Iterator[None]:
    """What a test registers is gone after it (`sweeper.register`)."""
    from hydra.core.config_store import ConfigStore

    from sweeper import register
    from sweeper.methods import METHODS
    from sweeper.objectives import OBJECTIVES
    from sweeper.placement.placement import PICKS, PLACEMENTS
    from sweeper.tasks import FAMILIES

    tables: list[dict[Any, Any]] = [register.FOUND, register._loaded, FAMILIES, METHODS, PLACEMENTS, PICKS, OBJECTIVES]
    before, modules = [dict(table) for table in tables], set(sys.modules)
    yield
    repo = ConfigStore.instance().repo
    for group, name in register.FOUND:
        repo.get(group, {}).pop(f"{name}.yaml", None)
    for table, former in zip(tables, before, strict=True):
        table.clear()
        table.update(former)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def study(tmp_path: Path) -> Settings:
    """Settings whose study folder is empty and temporary."""
    return Settings(study="test", output_root=str(tmp_path))
